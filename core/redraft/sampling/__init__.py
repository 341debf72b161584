"""Pure functions on tensors: logits to probabilities, acceptance rules, keyed randomness, divergences."""
