"""The waiting queue: first come, first served within a tenant, tenants in turn."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from redraft_server.engine.request import Completion


class WaitingQueue:
    """Completions that wait for a place in the running batch.

    Each tenant has a line of its own and the lines take turns, so a tenant with a thousand requests delays another
    by one request at most. A preempted completion goes back to the head of everything: it was admitted before.
    """

    def __init__(self) -> None:
        self._resumed: deque[Completion] = deque()
        self._lines: OrderedDict[str, deque[Completion]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._resumed) + sum(len(line) for line in self._lines.values())

    def __iter__(self) -> Iterator[Completion]:
        yield from self._resumed
        for line in self._lines.values():
            yield from line

    def push(self, completion: Completion) -> None:
        self._lines.setdefault(completion.request.spec.tenant, deque()).append(completion)

    def push_front(self, completion: Completion) -> None:
        self._resumed.appendleft(completion)

    def peek(self) -> Completion | None:
        """The next to be admitted; stays the same until it is popped or removed, or one is pushed to the front."""
        if self._resumed:
            return self._resumed[0]
        return next(iter(self._lines.values()))[0] if self._lines else None

    def pop(self) -> Completion:
        if self._resumed:
            return self._resumed.popleft()
        tenant, line = next(iter(self._lines.items()))
        completion = line.popleft()
        del self._lines[tenant]
        if line:
            self._lines[tenant] = line  # to the end: the next tenant's turn
        return completion

    def remove(self, completion: Completion) -> None:
        """Take a waiting completion out, wherever it stands."""
        if completion in self._resumed:
            self._resumed.remove(completion)
            return
        tenant = completion.request.spec.tenant
        self._lines[tenant].remove(completion)
        if not self._lines[tenant]:
            del self._lines[tenant]
