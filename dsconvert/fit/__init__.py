"""Fit a layer: from its float weight and calibration images to VQK, m, CDSw and the bias CDSb."""
