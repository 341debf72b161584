"""What can go wrong in an evaluation.

```
RedraftError
└── EvaluationError       the evaluation cannot give a number
    ├── NothingToScore    no position with a teacher's prediction, or none that two drafts share
    └── InvalidProfile    a step-cost profile that is damaged or measures nothing
```
"""

from __future__ import annotations

from redraft.errors import RedraftError


class EvaluationError(RedraftError):
    """An evaluation cannot give a number."""


class NothingToScore(EvaluationError):
    """There is no position to score, or none that two drafts share."""


class InvalidProfile(EvaluationError):
    """A step-cost profile is damaged or measures nothing."""
