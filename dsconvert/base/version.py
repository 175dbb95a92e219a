"""The version of dsconvert, as files and messages name it."""

VERSION = "0.1.0"
