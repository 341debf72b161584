"""Measurements of speed, learning, exactness and behaviour under load; each writes a page into `benchmarks/results`."""
