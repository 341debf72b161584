"""The learning rate as a function of how far a run is: no scheduler object, so nothing of it needs a checkpoint."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["cosine", "linear"]


def learning_rate_at(progress: float, peak: float, warmup_share: float, decay: Decay) -> float:
    """Linear from 0 to `peak` over the first `warmup_share` of the run, then down to 0 at its end.

    `progress` is the share of the run that is done, in [0, 1].
    """
    if progress < warmup_share:
        return peak * progress / warmup_share
    rest = min((progress - warmup_share) / (1.0 - warmup_share), 1.0)
    return peak * (0.5 * (1.0 + math.cos(math.pi * rest)) if decay == "cosine" else 1.0 - rest)
