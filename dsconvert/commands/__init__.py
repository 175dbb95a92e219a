"""The commands of `dsconvert.commands.cli` that are long enough for a file of their own."""
