"""The training loop: optimiser, checkpoints, metrics, provenance."""
