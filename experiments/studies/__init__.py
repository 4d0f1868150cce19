"""Studies of many runs, one command each."""
