"""The version, which files and messages name."""

VERSION = "0.1.0"
