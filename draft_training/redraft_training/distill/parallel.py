"""Whole tensors from, and back into, a model on one process, under DDP or under FSDP; and sums over ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from redraft_training.distill.errors import CheckpointError, TrainingError

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)
_OWN = StateDictOptions(ignore_frozen_params=True, strict=False)
_SEPARATOR = "/"  # no parameter's name has one


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, and buffers, on the CPU, each tied one once; empty on ranks above 0 under FSDP.

    A collective operation. The tensors may share memory with the model.
    """
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    tensors: dict[str, Any] = get_model_state_dict(module, options=_WHOLE)
    for name, tensor in tensors.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            kept[name] = tensor
    return kept


def load_trained_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put `trained_tensors` back. Raises `CheckpointError` where names or shapes are not the model's."""
    own = {name: tuple(value.shape) for name, value in _trainable(module).items()}
    known = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = [name for name, shape in own.items() if known.get(name) != shape]
    if wrong:
        raise CheckpointError(f"the checkpoint does not fit the draft: {len(wrong)} tensors differ, e.g. {wrong[0]}")
    set_model_state_dict(module, dict(tensors), options=_WHOLE)


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<parameter>/<name>` -> tensor, for every tensor of the optimiser's state. A collective operation."""
    content: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=_WHOLE)
    state = content.get("state", {})
    flat = {
        f"{parameter}{_SEPARATOR}{name}": value for parameter, entry in state.items() for name, value in entry.items()
    }
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


def load_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put `optimizer_tensors` back; the settings of the parameter groups stay as they are."""
    # whole tensors come to rank 0 only, the parameter groups to every rank only with the ranks' own
    content: Any = get_optimizer_state_dict(module, optimizer, options=_OWN)
    content["state"] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(_SEPARATOR)
        content["state"].setdefault(parameter, {})[key] = tensor
    set_optimizer_state_dict(module, optimizer, content, options=_WHOLE)


def sum_over_ranks(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Element-wise sums, the same on every rank."""
    if accelerator.num_processes == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(total)
    summed: list[float] = total.tolist()
    return summed


@contextmanager
def on_main_process(accelerator: Accelerator) -> Iterator[bool]:
    """Yield whether this is the main process; the others wait for it at the end, and fail if it has failed."""
    failed = 1.0
    try:
        yield accelerator.is_main_process
        failed = 0.0
    finally:
        # an all-reduce is a barrier too
        total = sum_over_ranks(accelerator, [failed])[0]
    if total:
        raise TrainingError("the main process failed; its own message says why")


def parameters_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all parameters, frozen ones included (1 to 2 GB/s)."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    return {_plain(name): value for name, value in module.named_parameters() if value.requires_grad}


def _plain(name: str) -> str:
    """The parameter's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_fsdp_wrapped_module"))
