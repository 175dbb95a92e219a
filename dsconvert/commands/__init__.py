"""The commands of `dsconvert`, one file each, and what they share."""
