"""Which layer gets which format."""
