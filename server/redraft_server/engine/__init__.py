"""The engine: admission, scheduling, the step loop on its own thread, output, recording."""
