"""What can be wrong with training data.

```
RedraftError
└── DatasetError
    ├── ForeignLog          nothing in the log is of this target and this vocabulary
    ├── NotEnoughData       too few examples, or too few captured labels, to train on
    └── DatasetUnreadable   a file that we wrote ourselves is damaged, or of another version
```

No message quotes text or token ids.
"""

from __future__ import annotations

from redraft.errors import RedraftError


class DatasetError(RedraftError):
    """Training data cannot be used."""


class ForeignLog(DatasetError):
    """There are records, but none of this target and this vocabulary."""


class NotEnoughData(DatasetError):
    """Fewer examples or labels than asked for. Not a fault: there will be more when there is more traffic."""


class DatasetUnreadable(DatasetError):
    """A data set's or a replay memory's own file is damaged, missing, or of another version."""
