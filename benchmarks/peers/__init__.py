"""redraft beside other engines: same weights, prompts, threads and sampling, each engine in its own environment."""
