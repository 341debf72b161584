"""What the rollout tells Prometheus while nothing else happens: alerts rest on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft.registry.store import DraftRegistry
from tests.rollout_harness import POOR, Checkpoints, Publisher, remove, rollout_config, rollout_server


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


def test_refusals_are_counted_though_nothing_is_published(checkpoints: Checkpoints, tmp_path: Path) -> None:
    publisher = Publisher(checkpoints, DraftRegistry(str(tmp_path / "registry")))
    first = publisher.publish(POOR)
    manifest = publisher.registry.get(first).manifest
    config = rollout_config(checkpoints, publisher.registry.url)
    with rollout_server(config) as served:
        name, labels = "redraft_registry_refused_drafts", {"model": "tiny"}
        assert served.page.get_sample_value(name, labels) is None  # unknown is not 0
        served.rollout.tick()
        assert served.page.get_sample_value(name, labels) == 0
        for number in (1, 2):
            refused = manifest.model_copy(update={"version": f"refused{number}"})
            publisher.registry.refuse(checkpoints.draft(POOR), refused, "the interval includes zero")
            served.rollout.tick()
            assert served.page.get_sample_value(name, labels) == number
        remove(Path(publisher.registry.url))
        served.rollout.tick()
        assert served.page.get_sample_value(name, labels) == 2
        assert served.value("redraft_registry_errors_total", operation="current") == 1
