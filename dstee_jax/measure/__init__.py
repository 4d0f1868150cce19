"""What a sparse network is like: density, exploration, costs."""
