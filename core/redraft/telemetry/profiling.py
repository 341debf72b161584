"""Named ranges for a profiler. They cost one global read each while no profiler listens.

::

    with profile_range("verify"):
        ...

    with profiled_by(torch.profiler.record_function), torch.profiler.profile() as profile:
        engine.step()

The caller brings the profiler's range type, so this module needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

RangeFactory = Callable[[str], AbstractContextManager[object]]

_OFF: AbstractContextManager[object] = nullcontext()
_factory: RangeFactory | None = None


def profile_range(name: str) -> AbstractContextManager[object]:
    """A context manager that marks its body as `name` while `profiled_by` is in force in the process."""
    factory = _factory
    return _OFF if factory is None else factory(name)


@contextmanager
def profiled_by(factory: RangeFactory) -> Iterator[None]:
    """Send every range of the process, on any thread, to `factory` until the block ends."""
    # Process-wide on purpose: the steps worth profiling run on the engine's thread, not on the caller's.
    global _factory
    previous, _factory = _factory, factory
    try:
        yield
    finally:
        _factory = previous
