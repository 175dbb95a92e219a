"""The user's images and labels: found, checked within bounds, read, and brought into shape."""
