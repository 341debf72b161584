"""A model split over several processes by transformers' tensor-parallel plan: what each of them holds.

Every process has whole layers of part of the width: some attention heads with their keys and values, some columns of
the MLP, some rows of embedding and head. A forward pass is the same calls in every process, which meet in a sum twice
a layer; every one ends with the whole logits. `parallel_group` keeps the processes in step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import get_kv_heads_per_rank

from redraft.errors import UnsupportedModel


def sharding_options(num_shards: int) -> dict[str, Any]:
    """What `from_pretrained` needs to load this process's shard; the process group must have been set up."""
    return {"distributed_config": DistributedConfig(tp_plan="auto", tp_size=num_shards)}


def check_shardable(config: PreTrainedConfig, num_shards: int, name: str) -> None:
    """Raise `UnsupportedModel` unless the model has a tensor-parallel plan and its heads can be dealt out evenly."""
    if not getattr(config, "base_model_tp_plan", None):
        raise UnsupportedModel(f"{name} ({config.model_type}) has no tensor-parallel plan in transformers")
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % num_shards or kv_heads % num_shards:
        raise UnsupportedModel(
            f"{name} has {heads} attention heads and {kv_heads} key/value heads, "
            f"which cannot be dealt out evenly to {num_shards} processes; choose another model.tensor_parallel"
        )


def num_shards(model: PreTrainedModel) -> int:
    """Processes that the model is split over; 1 for a whole one."""
    return next((p.device_mesh.size() for p in model.parameters() if isinstance(p, DTensor)), 1)


def local_kv_heads(model: PreTrainedModel, heads: int) -> int:
    """Of `heads` key/value heads, those whose keys and values this process computes."""
    shards = num_shards(model)
    if shards == 1:
        return heads
    untyped: Any = model
    own = get_kv_heads_per_rank(untyped.tp_plan, heads, shards)
    if not isinstance(own, int):
        raise UnsupportedModel(f"{heads} key/value heads cannot be dealt out to {shards} processes")
    return own


def local_tensor(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
