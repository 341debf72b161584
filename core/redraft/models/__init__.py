"""Models: naming, fetching and loading them; their tokenizer; attention, paged KV cache and runner."""
