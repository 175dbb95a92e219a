"""The converted model: as a value, as a file, and whether a file is one."""
