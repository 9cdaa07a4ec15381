"""Measurements, each as ratios within one run; results in RESULTS.md."""
