"""Which weights are active at first: counts by leaf, random and given masks, initial scale."""
