"""From a configuration to an engine that runs: load, check, reserve, warm up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from redraft.errors import ConfigError
from redraft.models.block_pool import BlockPool
from redraft.models.kv_cache import kv_bytes_per_token
from redraft.models.loader import LoadedModel, load_model
from redraft.models.parallel import local_tensor
from redraft.models.parallel_group import LeadingRunner
from redraft.models.ref import ModelRef
from redraft.models.rounding import WeightFormat
from redraft.models.tokenizer import Tokenizer, load_tokenizer
from redraft.speculation.cost import StepCost, measure_cost
from redraft.speculation.fallback import FallbackProposer
from redraft.speculation.length import LengthController
from redraft.speculation.ngram import NgramProposer
from redraft.speculation.proposer import Proposer
from redraft.speculation.router import DraftRouter
from redraft.telemetry.metrics import ServerMetrics
from redraft.traffic.writer import TrafficWriter
from redraft_server.config import ServerConfig
from redraft_server.engine.api import EngineInfo
from redraft_server.engine.devices import bucket_limits, model_device, model_dtype, start_group
from redraft_server.engine.drafts import DraftHost, ResidentDraft, RunnerSizes
from redraft_server.engine.engine import Engine, EngineParts
from redraft_server.engine.observe import DraftMonitor
from redraft_server.engine.recorder import Recorder
from redraft_server.engine.scheduler import SchedulerLimits

FirstDraft = Callable[[DraftHost], ResidentDraft | None]
"""Gives the draft to start with; None for none."""


@dataclass(frozen=True, slots=True)
class Built:
    """An engine that runs, what loads further drafts for it, and the draft it began with."""

    engine: Engine
    host: DraftHost
    draft: ResidentDraft | None


def build_engine(
    config: ServerConfig,
    metrics: ServerMetrics,
    writer: TrafficWriter | None = None,
    *,
    first_draft: FirstDraft,
    monitor: DraftMonitor | None = None,
) -> Built:
    """Load target and draft and start the engine.

    Raises:
        ModelError: a model cannot be had or used; TokenizerMismatch if target and draft do not fit together.
        ConfigError: settings that contradict the model (a context longer than it has).
    """
    device = model_device(config.model.device)
    if config.model.threads is not None:
        torch.set_num_threads(config.model.threads)
    target_ref = ModelRef.parse(config.model.target)
    group = None if config.model.tensor_parallel == 1 else start_group(config, target_ref)
    target = _load(target_ref, config, device)
    tokenizer = load_tokenizer(target_ref, cache_dir=config.model.cache_dir)
    pool = BlockPool(
        -(-config.engine.kv_cache_tokens // config.engine.kv_block_size),
        config.engine.kv_block_size,
        prefix_cache=config.engine.prefix_cache,
    )
    sizes = RunnerSizes(pool.num_blocks, pool.block_size, tokenizer.vocab_size, bucket_limits(config, device))
    runner = sizes.runner(target) if group is None else LeadingRunner(target.model, group, **asdict(sizes))
    target_cost = measure_cost(runner)
    host = DraftHost(
        target,
        tokenizer,
        sizes,
        target_cost,
        adaptive=config.speculation.adaptive,
        max_catch_up=config.engine.max_batch_tokens,
        cache_dir=config.model.cache_dir,
    )
    draft = first_draft(host)
    info = _info(config, target, draft, tokenizer, pool)
    host.context_length = info.context_length
    router = DraftRouter()
    if draft is not None:
        router.set({draft.version: draft.proposer}, {draft.version: 1.0})
    engine = Engine(
        EngineParts(
            target=runner,
            tokenizer=tokenizer,
            proposer=_proposer(config, router, target_cost),
            pool=pool,
            limits=SchedulerLimits(
                max_running=config.engine.max_running_requests,
                max_batch_tokens=config.engine.max_batch_tokens,
                max_model_len=info.context_length,
                num_speculative_tokens=info.num_speculative_tokens,
                teacher_top_n=config.traffic_log.teacher_top_n if writer is not None else 0,
            ),
            info=info,
            max_waiting=config.engine.max_waiting_requests,
            target_cost=target_cost,
            metrics=metrics,
            recorder=None if writer is None else Recorder(writer, info, metrics),
            router=router,
            monitor=monitor,
        )
    )
    metrics.set_active_drafts([info.draft_version] if info.draft_version else [])
    engine.start()
    return Built(engine, host, draft)


def _load(ref: ModelRef, config: ServerConfig, device: torch.device) -> LoadedModel:
    weights = WeightFormat(config.model.weights)
    if weights is not WeightFormat.FULL and device.type != "cpu":
        raise ConfigError(f"model.weights is {weights}, which is for a CPU: set model.device to cpu")
    return load_model(
        ref,
        dtype=model_dtype(config.model, device),
        device=device,
        cache_dir=config.model.cache_dir,
        num_shards=config.model.tensor_parallel,
        weights=weights,
    )


def _proposer(config: ServerConfig, router: DraftRouter, target_cost: StepCost) -> Proposer | None:
    settings = config.speculation
    if settings.proposer == "none" or settings.num_speculative_tokens == 0:
        return None
    proposers: list[Proposer] = []
    if "ngram" in settings.proposer:
        length = LengthController(NgramProposer.name, target_cost, None) if settings.adaptive else None
        proposers.append(NgramProposer(min_match=settings.ngram_min, max_match=settings.ngram_max, length=length))
    if "draft_model" in settings.proposer:
        proposers.append(router)
    return proposers[0] if len(proposers) == 1 else FallbackProposer(proposers)


def _info(
    config: ServerConfig, target: LoadedModel, draft: ResidentDraft | None, tokenizer: Tokenizer, pool: BlockPool
) -> EngineInfo:
    capacity = pool.num_blocks * pool.block_size
    own_context = int(getattr(target.config, "max_position_embeddings", capacity))
    if config.engine.max_model_len is not None and config.engine.max_model_len > own_context:
        raise ConfigError(
            f"engine.max_model_len is {config.engine.max_model_len}, but {target.name} has a context of {own_context}"
        )
    context = min(config.engine.max_model_len or own_context, own_context, capacity)
    if draft is not None:
        context = min(context, int(getattr(draft.model.config, "max_position_embeddings", context)))
    models = [target.model] if draft is None else [target.model, draft.model]
    uses_speculation = config.speculation.proposer != "none"
    return EngineInfo(
        model=target.name,
        model_revision=target.revision or "",
        vocab_size=tokenizer.vocab_size,
        context_length=context,
        max_prompt_tokens=min(config.limits.max_prompt_tokens or context - 1, context - 1),
        max_new_tokens_limit=config.limits.max_new_tokens,
        eos_token_ids=tokenizer.eos_token_ids,
        target_fingerprint=target.weights_fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        proposer=config.speculation.proposer,
        num_speculative_tokens=config.speculation.num_speculative_tokens if uses_speculation else 0,
        draft_name=None if draft is None else draft.name,
        draft_version="" if draft is None else draft.version,
        kv_block_size=pool.block_size,
        kv_num_blocks=pool.num_blocks,
        kv_bytes=sum(kv_bytes_per_token(m.config.get_text_config(), m.dtype) for m in models) * capacity,
        weight_bytes=_num_bytes(models),
        dtype=_number_format(config, target),
        device=str(target.device),
    )


def _number_format(config: ServerConfig, target: LoadedModel) -> str:
    """Of the target's weights."""
    return str(target.dtype).removeprefix("torch.") if config.model.weights == "full" else config.model.weights


def _num_bytes(models: Sequence[PreTrainedModel]) -> int:
    """Bytes the weights occupy: parameters and packed copies, what is tied or shared between models once."""
    whole = [t for model in models for t in (*model.parameters(), *model.buffers())]
    tensors = {t.data_ptr(): t for t in map(local_tensor, whole)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
