"""Write one HTML page about a converted model."""
