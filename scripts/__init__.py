"""Developer tools: the demo and what it shares with tests and benchmarks."""
