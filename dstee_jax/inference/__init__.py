"""After training: kernels in the form that is fastest here, networks without idle units."""
