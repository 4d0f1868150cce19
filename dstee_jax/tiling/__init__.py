"""Kernels of which tiles are active: how they are kept, and products with them."""
