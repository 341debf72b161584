"""Who may call, as whom and how often, and the certificates: all from files that are read again when they change."""
