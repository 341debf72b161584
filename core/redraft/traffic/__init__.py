"""The traffic log: what was served, kept as Parquet shards for distillation. Imports no torch."""
