"""How fast a draft learns: acceptance by domain and cycle, drift and recovery, objectives, captured against re-run."""
