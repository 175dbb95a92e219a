"""The steps of quantize and export strung together."""
