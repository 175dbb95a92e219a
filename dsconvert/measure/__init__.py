"""What calibration images say: importance, activation grids, what each format would cost."""
