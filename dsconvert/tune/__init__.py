"""Learn the shifts and biases of a converted model: briefly from the float network, or from labelled images."""
