"""A follower of a tensor-parallel target, as a process: `python -m redraft.models.parallel_worker SPEC`.

Started by `redraft.models.parallel_group.Group`; ends when the leader says so or is gone.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from redraft.errors import RedraftError
from redraft.models.loader import load_model
from redraft.models.parallel_group import FollowerSpec, follow, join_group
from redraft.models.ref import ModelRef
from redraft.models.runner import ModelRunner


def main(argv: list[str]) -> int:
    """0 after the leader's stop, 1 for any other end."""
    # Signals to the whole process group, such as Ctrl-C, are for the leader: it may still have requests to finish
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    spec = FollowerSpec.from_json(argv[0])
    try:
        run(spec)
    except (RedraftError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        sys.stderr.write(f"redraft: process {spec.rank} of the tensor-parallel target has ended: {first}\n")
        return 1
    return 0


def run(spec: FollowerSpec) -> None:
    """Load the shard and follow."""
    control = join_group(spec.meeting, spec.rank, spec.num_shards)
    loaded = load_model(
        ModelRef.parse(spec.target),
        dtype=None if spec.dtype is None else getattr(torch, spec.dtype),
        cache_dir=None if spec.cache_dir is None else Path(spec.cache_dir),
        num_shards=spec.num_shards,
        progress=lambda line: None,
    )
    runner = ModelRunner(
        loaded.model, num_blocks=spec.num_blocks, block_size=spec.block_size, vocab_size=loaded.config.vocab_size
    )
    follow(runner, control)
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
