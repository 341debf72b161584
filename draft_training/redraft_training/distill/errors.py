"""What can go wrong in a training run.

```
RedraftError
└── TrainingError
    ├── TrainingDiverged       loss or gradient is not a finite number
    ├── NothingToTrain         no batch, no labelled position, or no parameter that may change
    ├── WorldSizeUnsupported   the request does not work in this parallel set-up
    └── CheckpointError        a checkpoint cannot be written or read
        └── CheckpointMismatch it belongs to other settings, other data or another parent
```
"""

from __future__ import annotations

from redraft.errors import RedraftError


class TrainingError(RedraftError):
    """A training run cannot go on."""


class TrainingDiverged(TrainingError):
    """The loss or the gradient is NaN or infinite; the parameters are as before that step."""


class NothingToTrain(TrainingError):
    """There is no batch, no labelled position, or no parameter that may change."""


class WorldSizeUnsupported(TrainingError):
    """What was asked for does not work with sharded parameters."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written or read."""


class CheckpointMismatch(CheckpointError):
    """The checkpoint belongs to other settings, other data or another parent draft."""
