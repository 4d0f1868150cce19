"""Data sets, as arrays or streams."""
