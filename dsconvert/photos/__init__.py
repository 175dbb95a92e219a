"""Images and labels of a user: found, bounded, read, put into shape."""
