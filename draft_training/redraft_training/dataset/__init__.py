"""Traffic as training examples: reading, selection, replay, packing."""
