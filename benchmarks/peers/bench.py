"""The bench: engine by engine, cell by cell, whatever is not known yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.cells import Cells
from benchmarks.machine import OtherLoad
from benchmarks.peers.catalogue import PEERS, PLAIN, Mode, Peer
from benchmarks.peers.environments import FOLDER, PeerUnavailable
from benchmarks.peers.launch import CONTEXT, Launcher
from benchmarks.peers.session import Plan, Sampling, measure
from benchmarks.peers.worker_process import WorkerProcess
from benchmarks.peers.workers.protocol import Request
from benchmarks.prompts import load_domain, load_mixed
from redraft.models.tokenizer import Tokenizer

MIXED = "mixed"
"""The domain of several streams: prompts of all domains."""
_SAMPLED_TOP_P = 0.95
_WARM_UP_TOKENS = 8
# For the estimate, on two cores: seconds of a token of one stream, streams that cost as much as one, and a start.
_TOKEN_S, _FREE_STREAMS, _START_S = 0.05, 4.0, 15.0


@dataclass(frozen=True, slots=True)
class Setting:
    """What a cell is measured at, beside engine and mode."""

    domain: str
    streams: int
    temperature: float


@dataclass
class Bench:
    """What is to be measured, and on what. Engines and modes that cannot run end in `unavailable`, with the reason."""

    launcher: Launcher
    cells: Cells
    tokenizer: Tokenizer
    data: Path | None
    peers: Sequence[Peer]
    domains: Sequence[str]
    temperatures: Sequence[float]
    num_prompts: int
    max_new_tokens: int
    repeats: int
    console: Console
    unavailable: dict[str, str] = field(default_factory=dict)

    def run(self, streams: int) -> None:
        """Measure every cell of that many streams that is not known."""
        for peer in self.peers:
            missing = [mode for mode in peer.modes if any(self._missing(peer, mode, streams))]
            if not missing or peer.name in self.unavailable:
                continue
            try:
                with self.console.status(f"Setting up {peer.name} (logs in {FOLDER}) ..."):
                    self.launcher.prepare(peer)
                self._session(peer, missing, streams)
            except PeerUnavailable as error:
                self._give_up(peer.name, error)

    def remaining(self, streams: int) -> tuple[int, float]:
        """Cells that are not known, and roughly how many seconds they will take on two cores."""
        cells, seconds = 0, 0.0
        batches = self.num_prompts if streams == 1 else 1
        run_s = _TOKEN_S * self.max_new_tokens * max(1.0, streams / _FREE_STREAMS)
        for peer in self.peers:
            missing = [len(list(self._missing(peer, mode, streams))) for mode in peer.modes]
            cells += sum(missing)
            # two runs of the reference around every round of all modes
            seconds += (sum(missing) + 2 * max(missing)) * self.repeats * batches * run_s
            seconds += _START_S * sum(map(bool, missing))
        return cells, seconds

    def _session(self, peer: Peer, modes: Sequence[Mode], streams: int) -> None:
        """Workers of all these modes at once, beside one of redraft plain."""
        with ExitStack() as stack, Progress(console=self.console) as progress:
            task = progress.add_task(f"{peer.name}, {streams} at once: loading", total=None)
            reference = stack.enter_context(self.launcher.worker(PEERS[0], PEERS[0].mode(PLAIN), streams))
            workers: dict[str, WorkerProcess] = {}
            for mode in modes:
                try:
                    worker = stack.enter_context(self.launcher.worker(peer, mode, streams))
                    worker.generate(self._warm_up())
                    workers[mode.name] = worker
                except PeerUnavailable as error:
                    self._give_up(f"{peer.name} {mode.name}", error)
            reference.generate(self._warm_up())
            for setting in self._settings(streams):
                ready = {
                    name: worker
                    for name, worker in workers.items()
                    if not self._is_known(peer.name, name, setting) and f"{peer.name} {name}" not in self.unavailable
                }
                if ready:
                    progress.update(task, description=f"{peer.name}, {setting}: {', '.join(ready)}")
                    self._measure(peer, setting, reference, ready)

    def _measure(
        self, peer: Peer, setting: Setting, reference: WorkerProcess, workers: Mapping[str, WorkerProcess]
    ) -> None:
        load = OtherLoad(lambda: {reference.session, *(worker.session for worker in workers.values())})

        def on_run(name: str) -> None:
            load.stop()
            load.start()

        load.start()
        results = measure(self._plan(setting), reference, workers, on_run)
        load.stop()
        for name, measured in results.items():
            identity = {"engine": peer.name, "mode": name, **asdict(setting)}
            busy = None if load.median is None else round(load.median, 3)
            values = {**measured.values(), "other_cores": busy, "version": workers[name].version}
            self.cells.keep(identity, values)
            self.console.print(f"{peer.name} {name}, {setting}: {values['ratio_to_plain']}", highlight=False)

    def _plan(self, setting: Setting) -> Plan:
        count = max(self.num_prompts, setting.streams)
        if setting.domain == MIXED:
            prompts = load_mixed(self.data, count)
        else:
            prompts = load_domain(self.data, setting.domain, count)
        longest = CONTEXT - self.max_new_tokens
        token_ids = [list(prompt.token_ids(self.tokenizer))[-longest:] for prompt in prompts]
        size = setting.streams
        batches = [token_ids[start : start + size] for start in range(0, len(token_ids) - size + 1, size)]
        top_p = 1.0 if setting.temperature == 0.0 else _SAMPLED_TOP_P
        return Plan(batches, self.max_new_tokens, Sampling(setting.temperature, top_p), self.repeats)

    def _warm_up(self) -> Request:
        prompt = list(load_mixed(self.data, 1)[0].token_ids(self.tokenizer))
        return Request([prompt], _WARM_UP_TOKENS, 0.0, 1.0, 0)

    def _settings(self, streams: int) -> Iterator[Setting]:
        for temperature in self.temperatures:
            for domain in self.domains if streams == 1 else (MIXED,):
                yield Setting(domain, streams, temperature)

    def _missing(self, peer: Peer, mode: Mode, streams: int) -> Iterator[Setting]:
        if streams == 1 or mode.batches:
            yield from (one for one in self._settings(streams) if not self._is_known(peer.name, mode.name, one))

    def _is_known(self, engine: str, mode: str, setting: Setting) -> bool:
        return self.cells.is_known(engine=engine, mode=mode, **asdict(setting))

    def _give_up(self, name: str, error: PeerUnavailable) -> None:
        self.unavailable[name] = str(error)
        self.console.print(f"[bold red]{name} is not measured:[/] {error}", highlight=False)
