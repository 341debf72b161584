"""Where the models run: which device, in which number format, in how many processes."""

from __future__ import annotations

import os
import signal

import torch

from redraft.errors import ConfigError
from redraft.models.buckets import BucketLimits
from redraft.models.loader import read_config
from redraft.models.parallel import check_shardable
from redraft.models.parallel_group import Group
from redraft.models.ref import ModelRef
from redraft.models.source import resolve_source
from redraft_server.config import ModelConfig, ServerConfig


def model_device(name: str) -> torch.device:
    """The device that `model.device` means. Raises `ConfigError` for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device: cuda was asked for, but torch sees no GPU; set model.device to cpu")
    return device


def model_dtype(config: ModelConfig, device: torch.device) -> torch.dtype | None:
    """The number format of the target; None for the checkpoint's own."""
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else None
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def bucket_limits(config: ServerConfig, device: torch.device) -> BucketLimits | None:
    """What is run in fixed shapes, as CUDA graphs: every step that only decodes, on a GPU of its own."""
    if device.type != "cuda" or config.model.tensor_parallel > 1:
        return None
    return BucketLimits(config.engine.max_running_requests, 1 + config.speculation.num_speculative_tokens)


def start_group(config: ServerConfig, target: ModelRef) -> Group:
    """The processes of a tensor-parallel target, this one in the lead. When one is lost, this one is told to end.

    Raises:
        ConfigError: there are too few GPUs.
        UnsupportedModel: the target cannot be split so.
    """
    model, engine = config.model, config.engine
    num_gpus = torch.cuda.device_count()
    if 0 < num_gpus < model.tensor_parallel:
        raise ConfigError(f"model.tensor_parallel is {model.tensor_parallel}, but torch sees {num_gpus} GPUs")
    source = resolve_source(target, cache_dir=model.cache_dir)
    check_shardable(read_config(source), model.tensor_parallel, source.name)
    dtype = model_dtype(model, model_device(model.device))
    return Group(
        model.target,
        num_shards=model.tensor_parallel,
        num_blocks=-(-engine.kv_cache_tokens // engine.kv_block_size),
        block_size=engine.kv_block_size,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        cache_dir=None if model.cache_dir is None else str(model.cache_dir),
        on_lost=lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
