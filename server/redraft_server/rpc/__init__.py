"""The gRPC edge: protobuf in, plain data to the engine, plain data back, protobuf out."""
