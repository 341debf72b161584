"""The commands of `redraft-train`. Heavy imports are inside functions: torch takes seconds, and --help should not."""
