"""The layouts, and how each of them stores the quantized weights."""
