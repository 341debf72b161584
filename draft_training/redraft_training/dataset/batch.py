"""Examples packed into rectangles of tokens, with every position at which a loss or a score is due.

Several examples share a row; a branch lies behind its example's text in the same row, at the positions it would have
had as text. The mask keeps examples apart and lets a branch see only the text it left and itself, so every prediction
is the one the model would make on that prefix alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from redraft.sampling.processors import SamplingRow
from redraft_training.dataset.example import Example, Label


@dataclass(frozen=True, slots=True)
class Batch:
    """n positions of some examples, over `rows` rows of `length` tokens.

    Attributes:
        input_ids, position_ids: [rows, length] int64; padding is 0.
        attention_mask: [rows, 1, length, length] bool, True where a token may be seen (padding sees itself).
        predict: [n] int64, index into the flattened rows: the model's output there predicts.
        owner: [n] int64, index into `examples`.
        offset: [n] int64, output position that is predicted.
        depth: [n] int64, 0 on the path, else the number of rejected tokens in the prefix.
        next_ids: [n] int64, the token that was emitted there; -1 off the path.
        sampling_rows: n descriptions of how the request draws its token there.
        labels: n captured labels, None where there is none.
    """

    examples: tuple[Example, ...]
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    predict: Tensor
    owner: Tensor
    offset: Tensor
    depth: Tensor
    next_ids: Tensor
    sampling_rows: tuple[SamplingRow, ...]
    labels: tuple[Label | None, ...]

    @property
    def num_positions(self) -> int:
        return len(self.labels)
