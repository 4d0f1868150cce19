"""Functions of the parameters in the forward pass, in whose results the network is sparse."""
