"""What a person looks at: one HTML page about a converted model."""
