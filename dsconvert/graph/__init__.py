"""A network as a flat list of operations on named values, with a float and an integer executor."""
