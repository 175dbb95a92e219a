"""What calibration images tell about the float network: importance, activation ranges and the cost of each format."""
