"""The converted model as a value and as a file, with a check of what a file may hold."""
