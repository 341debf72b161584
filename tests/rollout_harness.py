"""A server with a registry: real checkpoints of tiny models, a real engine, a rollout that tests drive by hand."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from redraft.models.loader import weights_fingerprint
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.tokenizer import load_tokenizer
from redraft.registry.contents import describe_directory
from redraft.registry.manifest import DraftManifest, EvaluationSummary
from redraft.registry.store import DraftRegistry
from redraft.sampling.params import SamplingParams
from redraft.telemetry.metrics import ServerMetrics
from redraft_server.config import (
    EngineConfig,
    GrpcConfig,
    MetricsConfig,
    ModelConfig,
    RegistryConfig,
    RolloutConfig,
    ServerConfig,
    SpeculationConfig,
)
from redraft_server.engine.build import build_engine
from redraft_server.engine.engine import Engine
from redraft_server.rollout.manager import Rollout
from redraft_server.rollout.start import DraftSupply
from tests.engine_harness import WAIT_S, Collected, generate, request
from tests.fakes import save_tiny

TARGET_SEED, GOOD, POOR, POOR_TOO = 0, 0, 11, 12
"""Seeds. A draft of the target's own seed is accepted always, another about once in four times."""
PROMPTS = ((5, 6, 7, 8), (9, 10, 9, 10, 9), (30, 31, 32, 33, 34, 35, 36))


class Checkpoints:
    """Tiny checkpoints on disk, each written once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.target = save_tiny(root / "target", seed=TARGET_SEED)
        self.target_fingerprint = weights_fingerprint(self.target)
        self.tokenizer_fingerprint = load_tokenizer(ModelRef(ModelKind.DIRECTORY, str(self.target))).fingerprint

    def draft(self, seed: int, **changes: Any) -> Path:
        name = "-".join(["draft", str(seed), *(f"{key}{value}" for key, value in changes.items())])
        path = self._root / name
        return path if path.exists() else save_tiny(path, seed=seed, **changes)


@dataclass
class Publisher:
    """Puts drafts into a registry as training would."""

    checkpoints: Checkpoints
    registry: DraftRegistry
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def publish(
        self,
        seed: int,
        *,
        promised: float | None = None,
        make_current: bool = True,
        directory: Path | None = None,
        **facts: Any,
    ) -> str:
        number = next(self._numbers)
        directory = directory or self.checkpoints.draft(seed)
        evaluation = None
        if promised is not None:
            evaluation = EvaluationSummary(
                expected_acceptance=promised, baseline_expected_acceptance=0.25, num_positions=1000
            )
        values: dict[str, Any] = {
            "version": f"v{number}",
            "created_unix_s": 1.8e9 + number,
            "files": describe_directory(directory),
            "target_name": "tiny",
            "target_fingerprint": self.checkpoints.target_fingerprint,
            "tokenizer_fingerprint": self.checkpoints.tokenizer_fingerprint,
            "num_parameters": 1000,
            "evaluation": evaluation,
        }
        manifest = DraftManifest(**(values | facts))
        return self.registry.publish(directory, manifest, make_current=make_current).version


def rollout_config(checkpoints: Checkpoints, url: Path | str, **settings: Any) -> ServerConfig:
    """Small tiny-model settings; `settings` are those of the rollout, or whole groups."""
    groups = {name: settings.pop(name) for name in ("speculation", "model") if name in settings}
    rollout = {"shadow_positions": 24, "shadow_share": 1.0, "canary_share": 0.5, "margin": 0.1} | settings
    values: dict[str, Any] = {
        "model": ModelConfig(target=str(checkpoints.target)),
        "engine": EngineConfig(kv_cache_tokens=2048, kv_block_size=4, max_batch_tokens=64, max_running_requests=8),
        "speculation": SpeculationConfig(proposer="draft_model", num_speculative_tokens=3, adaptive=False),
        "registry": RegistryConfig(url=str(url), poll_s=1e-6),  # every tick looks
        "rollout": RolloutConfig(**rollout),
        "grpc": GrpcConfig(port=0),
        "metrics": MetricsConfig(enabled=False),
    }
    return ServerConfig(**(values | groups))


@dataclass
class Served:
    engine: Engine
    rollout: Rollout
    supply: DraftSupply
    metrics: ServerMetrics
    page: CollectorRegistry

    def value(self, name: str, **labels: str) -> float:
        return self.page.get_sample_value(name, {"model": "tiny", **labels}) or 0.0

    @property
    def active(self) -> str:
        return self.engine.info.draft_version

    def states(self) -> dict[str, str]:
        return {view.version: view.state.value for view in self.rollout.views()}

    def traffic(self, seeds: Sequence[int], max_new_tokens: int = 16) -> list[Collected]:
        """One request for each seed; every one must end as it should."""
        requests = [
            request(PROMPTS[seed % len(PROMPTS)], SamplingParams(temperature=0.8, seed=seed), max_new_tokens)
            for seed in seeds
        ]
        results = generate(self.engine, requests)
        for result in results:
            assert result.finished.error is None
            assert result.finished.completion_tokens == max_new_tokens
        return results

    def tick_until(self, state: str, seeds: Iterator[int], batch: int = 8, at_most: int = 100) -> list[Collected]:
        """Traffic and ticks in turn until the rollout is in `state`; the results of the traffic."""
        results: list[Collected] = []
        for _ in range(at_most):
            self.rollout.tick()
            if self.rollout.state == state:
                return results
            results += self.traffic(list(itertools.islice(seeds, batch)))
        raise AssertionError(f"still {self.rollout.state} after {at_most} ticks")


@contextmanager
def rollout_server(config: ServerConfig) -> Iterator[Served]:
    """An engine with its rollout, which does nothing unless ticked."""
    page = CollectorRegistry()
    metrics = ServerMetrics(page, "tiny", max_draft_tokens=4)
    supply = DraftSupply(config, metrics)
    built = build_engine(config, metrics, first_draft=supply.first, monitor=supply.monitor)
    try:
        rollout = supply.rollout(built.engine, built.host, built.draft)
        yield Served(built.engine, rollout, supply, metrics, page)
    finally:
        built.engine.stop(WAIT_S)
        built.engine.scheduler.check_integrity()


def remove(registry_directory: Path) -> None:
    """The disk is gone."""
    shutil.rmtree(registry_directory)
