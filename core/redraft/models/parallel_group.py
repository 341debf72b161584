"""The processes of a tensor-parallel target: one leads, the others repeat its forward passes.

The leader is the server: it alone schedules, samples and drafts. Before a forward pass it broadcasts the pass's chunks,
token ids and block tables, and the followers run the same pass on their shards of weights and KV cache. They need
nothing else: KV is addressed by the leader's block tables, and logits they throw away.

    leader      broadcast chunks ─ forward ─ logits ─ accept ─ ...
    follower    broadcast chunks ─ forward ─ wait for the next

A group stands or falls as one. When a process is lost the others cannot go on: `on_lost` is called in the leader, and
followers end when the leader's connection does.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from redraft.models.runner import Chunk, ModelRunner

STOP_TIMEOUT_S = 30.0
"""For followers to end by themselves; then they are killed."""

# Between passes a server may be idle for any time; within one, and while models load, processes wait for each other
_IDLE = timedelta(days=3650)
_PASS = timedelta(minutes=30)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FollowerSpec:
    """What a follower is told when it starts. `dtype` is a name of torch's, or None for the checkpoint's own; at the
    file `meeting` the processes find each other."""

    target: str
    dtype: str | None
    cache_dir: str | None
    num_blocks: int
    block_size: int
    rank: int
    num_shards: int
    meeting: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> FollowerSpec:
        return cls(**json.loads(text))


class Group:
    """The leader's end: starts the followers on this machine, and tells them what to run. `close` ends them.

    Args:
        target, dtype, cache_dir, num_blocks, block_size: of every process, see `FollowerSpec`.
        num_shards: processes, this one included.
        on_lost: called once, on a thread of the group or the one in `tell`, when a follower has ended unasked or a
            pass has failed. The group is of no use then.
    """

    def __init__(
        self,
        target: str,
        *,
        num_shards: int,
        num_blocks: int,
        block_size: int,
        dtype: str | None = None,
        cache_dir: str | None = None,
        on_lost: Callable[[], None],
    ) -> None:
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._ended = False  # guarded by _lock: closed or lost
        # A file that is ours alone: torch's own meeting point over TCP would listen on every interface
        self._folder = tempfile.TemporaryDirectory(prefix="redraft-")
        meeting = f"{self._folder.name}/meeting"
        self._followers = []
        for rank in range(1, num_shards):
            spec = FollowerSpec(target, dtype, cache_dir, num_blocks, block_size, rank, num_shards, meeting)
            command = [sys.executable, "-m", "redraft.models.parallel_worker", spec.to_json()]
            self._followers.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
        atexit.register(self.close)
        for follower in self._followers:
            threading.Thread(target=self._watch, args=(follower,), name="follower-watch", daemon=True).start()
        try:
            self._control = join_group(meeting, 0, num_shards)
        except BaseException:
            self._ended = True
            self.close()
            raise

    def tell(self, chunks: Sequence[Chunk]) -> None:
        """Have the followers run a forward pass over `chunks`, side by side with the caller's own."""
        self._broadcast(encode_chunks(chunks))

    def lost(self) -> None:
        """The processes are no longer in step."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        logger.error("a process of the tensor-parallel target is lost")
        self._on_lost()

    def close(self) -> None:
        """End the followers. Harmless again, and after a loss."""
        with self._lock:
            running, self._ended = not self._ended, True
        if running:
            with suppress(RuntimeError):  # one has ended just now
                self._broadcast([])
            dist.destroy_process_group()
        for follower in self._followers:
            try:
                follower.wait(STOP_TIMEOUT_S if running else 0)
            except subprocess.TimeoutExpired:
                follower.kill()
                follower.wait()
        self._folder.cleanup()
        atexit.unregister(self.close)

    def _broadcast(self, message: list[int]) -> None:
        body = torch.tensor(message, dtype=torch.int64)
        dist.broadcast(torch.tensor([len(body)]), src=0, group=self._control)
        if message:
            dist.broadcast(body, src=0, group=self._control)

    def _watch(self, follower: subprocess.Popen[bytes]) -> None:
        follower.wait()
        self.lost()


class LeadingRunner(ModelRunner):
    """The runner of the leader's shard: as any other, and the followers run every pass too."""

    def __init__(self, model: PreTrainedModel, group: Group, **sizes: Any) -> None:
        super().__init__(model, **sizes)
        self._group = group
        self.runs_ahead = False  # the followers are told every token by the host

    def forward(self, chunks: Sequence[Chunk], drawn: Tensor | None = None) -> Tensor:
        assert drawn is None, "the followers know only what the host knows"
        try:
            self._group.tell(chunks)
            return super().forward(chunks)
        except BaseException:
            # The followers may have run it, or wait in its middle: nobody knows what their KV holds
            self._group.lost()
            raise


def join_group(meeting: str, rank: int, num_shards: int) -> dist.ProcessGroup:
    """Set up `torch.distributed` for the model's own collectives; returns a group for what is told between passes."""
    os.environ["LOCAL_RANK"] = str(rank)  # transformers takes the GPU of this number
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, "lo")  # all on this machine, and nobody is asked who he is
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store: Any = dist.FileStore(meeting, num_shards)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_shards, timeout=_PASS)
    control = dist.new_group(backend="gloo", timeout=_IDLE)
    assert isinstance(control, dist.ProcessGroup)
    return control


def follow(runner: ModelRunner, control: dist.ProcessGroup) -> None:
    """Run what the leader tells until it says stop. Raises RuntimeError when the leader is gone."""
    while True:
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, src=0, group=control)
        if not size.item():
            return
        message = torch.zeros(int(size.item()), dtype=torch.int64)
        dist.broadcast(message, src=0, group=control)
        runner.forward(decode_chunks(message.tolist()))


def encode_chunks(chunks: Sequence[Chunk]) -> list[int]:
    """Each chunk as: start, num_logits, number of tokens, number of blocks, tokens, blocks."""
    message: list[int] = []
    for chunk in chunks:
        message += (chunk.start, chunk.num_logits, len(chunk.token_ids), len(chunk.block_ids))
        message += chunk.token_ids
        message += chunk.block_ids
    return message


def decode_chunks(message: list[int]) -> list[Chunk]:
    chunks: list[Chunk] = []
    at = 0
    while at < len(message):
        start, num_logits, num_tokens, num_blocks = message[at : at + 4]
        tokens = at + 4
        blocks = tokens + num_tokens
        at = blocks + num_blocks
        chunks.append(Chunk(message[tokens:blocks], start, message[blocks:at], num_logits))
    return chunks
