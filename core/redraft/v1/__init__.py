"""Generated protobuf and gRPC stubs of the public API; the sources are in proto/."""
