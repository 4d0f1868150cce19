"""After training: kernels in the form that is fastest on this machine."""
