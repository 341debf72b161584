"""What the hardware allows: a pass can be no faster than its bytes through memory, nor than its arithmetic."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks.machine import read_bandwidth_gb_s
from redraft.models.checkpoint_files import weight_files
from redraft.models.kv_cache import kv_bytes_per_token
from redraft.models.loader import LoadedModel
from redraft.models.packed import KernelLinear
from redraft.models.runner import ModelRunner

_GEMM_SIZE, _GEMM_RUNS = 1024, 5


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Of this machine, now, on the threads that the models use."""

    bandwidth_gb_s: float  # reading memory
    peak_gflop_s: float  # fp32 matrix product

    @classmethod
    def measure(cls) -> Ceilings:
        """Takes about a quarter of a second on two quiet cores."""
        return cls(read_bandwidth_gb_s(), _peak_gflop_s())


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of a pass, and what sets it: memory or arithmetic."""

    seconds: float
    bound: str


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a forward pass must read and compute at least.

    Attributes:
        weight_bytes: of everything that is multiplied, once.
        products: multiply-adds of one row, its logits included.
        kv_bytes: of one position in all layers.
    """

    weight_bytes: int
    products: int
    kv_bytes: int

    @classmethod
    def of(cls, loaded: LoadedModel, runner: ModelRunner) -> Footprint:
        """Of the matrices of the layers, and of the head the rows that are computed."""
        config = loaded.config.get_text_config()
        layers = _layer_weights(loaded.directory)
        head = (config.vocab_size if runner.output_ids is None else len(runner.output_ids)) * config.hidden_size
        # packed, they have the size that they are read in; else that of the checkpoint's numbers
        packed = sum(m.weight_packed.panels.nbytes for m in runner.model.modules() if isinstance(m, KernelLinear))
        num_bytes = packed or (layers + head) * loaded.dtype.itemsize
        return cls(num_bytes, layers + head, kv_bytes_per_token(config, loaded.dtype))

    def floor(self, batch: int, rows: int, context: int, ceilings: Ceilings) -> Floor:
        """Of a pass over `rows` new tokens, all with logits, of each of `batch` sequences with `context` before."""
        num_bytes = self.weight_bytes + batch * (context + rows) * self.kv_bytes
        memory = num_bytes / ceilings.bandwidth_gb_s / 1e9
        arithmetic = 2 * self.products * batch * rows / ceilings.peak_gflop_s / 1e9
        return Floor(memory, "memory") if memory >= arithmetic else Floor(arithmetic, "arithmetic")


def _layer_weights(directory: Path) -> int:
    """Entries of all matrices inside the stack of layers."""
    total = 0
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys() if ".layers." in name]  # noqa: SIM118
        total += sum(rows * columns for rows, columns in (shape for shape in shapes if len(shape) == 2))
    return total


def _peak_gflop_s() -> float:
    a, b = torch.ones(_GEMM_SIZE, _GEMM_SIZE), torch.ones(_GEMM_SIZE, _GEMM_SIZE)
    seconds = []
    for _ in range(_GEMM_RUNS):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return float(2 * _GEMM_SIZE**3 / min(seconds) / 1e9)
