"""The whole circle on tiny models: an engine serves and logs, cycles learn, the registry holds what they say."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from redraft.models.loader import weights_fingerprint
from redraft.models.ref import ModelKind, ModelRef
from redraft.sampling.params import SamplingParams
from redraft.traffic.record import TrafficRecord
from redraft.traffic.writer import TrafficWriter
from redraft_training.cycle import Outcome
from redraft_training.cycle_models import Models
from redraft_training.evaluate import charts
from redraft_training.evaluation_run import judge
from tests.engine_harness import EngineSpec, generate, request, running_engine
from tests.fakes import save_tiny
from tests.unit.traffic.fakes import Observer
from tests.unit.training.cycle_runs import LAYERS, Site

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95)


class OfThisTarget:
    """The log of an engine whose target is a directory: the harness's has no fingerprint of its own."""

    def __init__(self, writer: TrafficWriter, fingerprint: str) -> None:
        self._writer, self._fingerprint = writer, fingerprint

    def offer(self, record: TrafficRecord) -> bool:
        return self._writer.offer(replace(record, target_fingerprint=self._fingerprint))


def serve(site: Site, domain: str, first_token: int, requests: int = 60) -> None:
    """Serve with a draft of no relation to the target; prompts begin with tokens of the domain's own."""
    rng = random.Random(first_token)
    writer = TrafficWriter(str(site.root / "traffic"), Observer())
    sink = OfThisTarget(writer, weights_fingerprint(site.target))
    with running_engine(EngineSpec(k=3, teacher_top_n=64), sink=sink) as engine:
        generate(
            engine,
            [
                request(
                    [first_token, *(rng.randrange(3, 64) for _ in range(4))],
                    (GREEDY, replace(SAMPLED, seed=number))[number % 2],
                    12,
                    domain=domain,
                    request_id=f"{domain}-{number}",  # which requests are held out follows from it
                )
                for number in range(requests)
            ],
        )
    assert writer.close(30.0)


@pytest.mark.parametrize("quantise", ["none", "int8"])
def test_circle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantise: str) -> None:
    for name in ("overview", "single"):  # drawing would take most of the time
        monkeypatch.setattr(charts, name, lambda *_: b"png")
    site = Site(tmp_path)
    save_tiny(site.target, layers=LAYERS)
    serve(site, "sql", 5)
    settings = f"student.quantise={quantise}"
    first = site.run(settings, "distill.epochs=1")  # leaves something to learn
    assert first.outcome is Outcome.PUBLISHED, first.reason
    manifest = site.registry.verify(first.version or "")
    assert manifest.evaluation is not None
    assert manifest.evaluation.per_domain.keys() == {"sql"}

    # what the manifest promises is what anybody measures again
    fetched = site.registry.fetch(manifest.version, tmp_path / "fetched")
    again = judge(
        site.settings(settings),
        Models(site.settings(settings)),
        ModelRef(ModelKind.DIRECTORY, str(fetched)),
        None,
        tmp_path / "report",
    )
    assert again.overall.alpha_new == pytest.approx(manifest.evaluation.expected_acceptance, abs=1e-9)
    assert again.overall.num_positions == manifest.evaluation.num_positions

    assert site.run(settings).outcome is Outcome.NOT_ENOUGH_DATA
    serve(site, "chat", 40, requests=100)
    second = site.run(settings, "distill.epochs=10", "gate.max_domain_loss=1")
    assert second.outcome is Outcome.PUBLISHED, second.reason
    newer = site.registry.verify(second.version or "")
    assert newer.parent_version == first.version
    assert newer.evaluation is not None
    assert newer.evaluation.baseline_version == first.version
    assert newer.evaluation.per_domain.keys() == {"chat", "sql"}
    assert newer.evaluation.baseline_expected_acceptance is not None
    assert newer.evaluation.expected_acceptance > newer.evaluation.baseline_expected_acceptance
    current = site.registry.current()
    assert current is not None
    assert (current.version, current.previous) == (second.version, first.version)
