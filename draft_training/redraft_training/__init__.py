"""redraft."""
