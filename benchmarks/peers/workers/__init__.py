"""One program per engine, run by that engine's own interpreter; what they share is the protocol, not the imports."""
