"""The redraft server: a gRPC edge and an engine that decodes speculatively."""
