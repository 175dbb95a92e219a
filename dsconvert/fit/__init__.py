"""Fitting: from float weights and calibration values to DSConv integers, shifts and activation grids."""
