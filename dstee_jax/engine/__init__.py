"""How a step runs: from state to state."""
