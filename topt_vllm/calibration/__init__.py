"""Offline calibration: which threshold keeps about k keys, per layer, query head and context length."""
