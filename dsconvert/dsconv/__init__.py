"""The DSConv operator (arXiv 1901.01928): its weight as a value, its codes, packing and torch modules."""
