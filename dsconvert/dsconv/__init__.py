"""The DSConv operator (arXiv 1901.01928): its tensors, packing and torch modules."""
