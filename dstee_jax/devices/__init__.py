"""Several devices: what is sent, and how the state lies on them."""
