"""The registry's part in starting a server: which draft it begins with, and the rollout that follows."""

from __future__ import annotations

import logging
from pathlib import Path

from redraft.errors import RedraftError
from redraft.models.cache import cache_directory
from redraft.models.ref import ModelRef
from redraft.registry.errors import RegistryError
from redraft.registry.store import DraftRegistry
from redraft.telemetry.metrics import ServerMetrics
from redraft_server.config import ServerConfig
from redraft_server.engine.drafts import DraftHost, ResidentDraft
from redraft_server.engine.engine import Engine
from redraft_server.rollout.fleet import Fleet
from redraft_server.rollout.loader import DraftLoader
from redraft_server.rollout.manager import Rollout
from redraft_server.rollout.monitor import LiveMonitor

logger = logging.getLogger(__name__)


class DraftSupply:
    """Where an engine's drafts come from: the registry, then the configuration.

    Args:
        config: with `registry.url` set.
        metrics: told of failures.

    Raises `ConfigError` for a URL that cannot be used.
    """

    def __init__(self, config: ServerConfig, metrics: ServerMetrics) -> None:
        assert config.registry.url is not None
        self.registry = DraftRegistry(config.registry.url)
        self.monitor = LiveMonitor()
        self._config = config
        self._metrics = metrics

    def first(self, host: DraftHost) -> ResidentDraft | None:
        """The draft to start with: the registry's current one, else the one before it, else the configured one.

        While the current one is still on trial somewhere, the last that was proven comes first: a restart must not
        put a draft into service that nobody has tried.

        One that cannot be used is named in the log and passed over. Raises `ModelError` for the configured one only.
        """
        loader = self._loader(host)
        for version in self._candidates():
            try:
                return loader.load(version)
            except (RedraftError, OSError) as error:
                logger.error("cannot start with draft %s: %s", version, error, extra={"draft_version": version})
                self._metrics.rollout.observe_registry_error("load")
        return configured_draft(self._config, host)

    def rollout(self, engine: Engine, host: DraftHost, active: ResidentDraft | None) -> Rollout:
        """The rollout for an engine that has begun with `active`."""
        fleet = Fleet(engine, self._loader(host), self._config.rollout.max_resident_drafts, active)
        poll_s = self._config.registry.poll_s
        return Rollout(engine, fleet, self.registry, self.monitor, self._config.rollout, self._metrics, poll_s=poll_s)

    def _candidates(self) -> tuple[str, ...]:
        """Versions to start with, best first."""
        try:
            current = self.registry.current()
        except RegistryError as error:
            logger.error("cannot read the draft registry: %s", error)
            self._metrics.rollout.observe_registry_error("current")
            return ()
        if current is None:
            return ()
        wanted = (current.proven or current.version, current.version, current.previous)
        return tuple(dict.fromkeys(version for version in wanted if version is not None))

    def _loader(self, host: DraftHost) -> DraftLoader:
        root: Path = self._config.model.cache_dir or cache_directory()
        return DraftLoader(self.registry, host, root / "drafts")


def configured_draft(config: ServerConfig, host: DraftHost) -> ResidentDraft | None:
    """`model.draft`. Raises `ModelError` if it cannot be used."""
    return None if config.model.draft is None else host.load(ModelRef.parse(config.model.draft))
