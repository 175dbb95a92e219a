"""What is learned: briefly without labels, or with them."""
