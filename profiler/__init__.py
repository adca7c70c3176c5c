"""A loaded model: calibration statistics, the measured grid, the fitted error model, evaluation."""
