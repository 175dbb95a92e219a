"""Choose a format (bits and block size) for every layer, for a file size or an allowed loss of accuracy."""
