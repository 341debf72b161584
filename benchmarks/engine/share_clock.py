"""Wall time of one thread, split over named shares: the innermost share that is open gets the time."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any


@dataclass(frozen=True, slots=True)
class Probe:
    """A function whose time belongs to a share: `owner` is a module or a class, `names` are attributes of it."""

    share: str
    owner: Any
    names: Sequence[str]


class ShareClock:
    """Seconds by share. Calls on other threads than the one that last called `restart` are not counted."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._now = now
        self._open: list[str] = []
        self._since = 0.0
        self._thread = threading.get_ident()

    def restart(self) -> None:
        """Count the calling thread from now on, from nothing; shares that are open stay so."""
        self._thread = threading.get_ident()
        self.seconds.clear()
        self.calls.clear()
        self._since = self._now()

    def read(self) -> dict[str, float]:
        """Seconds so far, on the counted thread."""
        self._switch()
        return dict(self.seconds)

    @contextmanager
    def share(self, name: str) -> Iterator[None]:
        """Time in the block belongs to `name`, less what inner shares take."""
        self._switch()
        self._open.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    @contextmanager
    def watching(self, probes: Sequence[Probe]) -> Iterator[None]:
        """Within the block, put a share around every call of the probes' functions.

        Raises:
            AttributeError: an owner lacks one of its names, as the code has changed.
        """
        with ExitStack() as stack:
            for probe in probes:
                for name in probe.names:
                    stack.enter_context(self._watched(probe, name))
            yield

    @contextmanager
    def _watched(self, probe: Probe, name: str) -> Iterator[None]:
        original = getattr(probe.owner, name)

        @wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(*args, **kwargs)
            with self.share(probe.share):
                return original(*args, **kwargs)

        is_own = name in vars(probe.owner)  # else it is a class's, and setting it on an instance only hides it
        setattr(probe.owner, name, timed)
        try:
            yield
        finally:
            if is_own:
                setattr(probe.owner, name, original)
            else:
                delattr(probe.owner, name)

    def _switch(self) -> None:
        """Credit the time since the last switch to the innermost open share."""
        now = self._now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
