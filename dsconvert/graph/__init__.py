"""The network as a list of operations on named values, with a float and an integer executor."""
