"""What Python's garbage collector need not look at."""

from __future__ import annotations

import gc


def settle() -> None:
    """Take what has been loaded out of the collector's sight; call it once, when the process is ready to serve.

    The libraries and models are a million objects that stay. A full collection would look at all of them, and stop
    every stream for a fifth of a second; the traffic log's records bring one about every few seconds.
    """
    gc.collect()
    gc.freeze()
