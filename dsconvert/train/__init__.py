"""Training a converted model with labels: what is learned, the loss, the images, the loop."""
