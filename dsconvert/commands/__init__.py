"""The commands of `dsconvert.cli` that are long enough for a file of their own."""
