"""Which entries of arrays are kept: drop-and-grow, and the exact searches behind it."""
