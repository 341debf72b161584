"""What the server tells its operators: metrics, logs and profile ranges. Imports no torch."""
