"""A model replayed over texts, under calibration and evaluation: dense, then its last rows under rules."""
