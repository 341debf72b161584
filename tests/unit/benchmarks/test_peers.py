"""The peers' bench without the peers: protocol, alternation, what is skipped and what is reported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from benchmarks.cells import Cells
from benchmarks.peers.bench import Bench
from benchmarks.peers.catalogue import PEERS, Mode, Peer
from benchmarks.peers.environments import Environment, PeerUnavailable
from benchmarks.peers.launch import Launcher
from benchmarks.peers.page import write
from benchmarks.peers.session import Plan, Sampling, measure
from benchmarks.peers.worker_process import WorkerProcess
from benchmarks.peers.workers.protocol import Request, cut_at_end
from redraft.models.tokenizer import Tokenizer
from tests.fakes import tiny_tokenizer
from tests.unit.benchmarks.echo_worker import Behaviour

REQUEST = Request([[1, 2, 3], [4]], 2, 0.0, 1.0, 0)


def _worker(tmp_path: Path, behaviour: Behaviour) -> WorkerProcess:
    return WorkerProcess(Path(sys.executable), "tests.unit.benchmarks.echo_worker", behaviour, tmp_path / "log", {})


def test_worker_answers_past_its_engines_chatter(tmp_path: Path) -> None:
    with _worker(tmp_path, Behaviour()) as worker:
        answer = worker.generate(REQUEST)
        again = worker.generate(REQUEST)
    assert worker.version == "echo 1"
    assert answer["token_ids"] == again["token_ids"] == [[1, 2], [4]]
    assert (answer["draft_tokens"], answer["accepted_tokens"]) == (4, 3)
    assert answer["seconds"] >= 0.0
    log = (tmp_path / "log").read_text()
    assert "chatter" in log
    assert "closed" in log  # what an engine has started must not outlive it


def test_worker_that_cannot_load_gives_its_reason(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailable, match="ValueError: no model here"):
        _worker(tmp_path, Behaviour(fails=True)).__enter__()


def test_worker_that_dies_is_noticed(tmp_path: Path) -> None:
    with (
        _worker(tmp_path, Behaviour(dies_at=1)) as worker,
        pytest.raises(PeerUnavailable, match=r"ended with status 9: .*out of memory"),
    ):
        worker.generate(REQUEST)


def test_cut_at_end() -> None:
    assert cut_at_end([5, 2, 0, 0], frozenset({2, 3})) == [5, 2]
    assert cut_at_end([5, 6], frozenset({2})) == [5, 6]


class _Fake:
    """A worker of a known speed."""

    version = "fake 1"

    def __init__(self, name: str, tokens_per_s: float, order: list[str], token: int = 7) -> None:
        self.name, self.tokens_per_s, self.order, self.token = name, tokens_per_s, order, token
        self.session = 0

    def generate(self, request: Request) -> Any:
        self.order.append(self.name)
        tokens = [[self.token] * request.max_new_tokens for _ in request.prompts]
        seconds = request.max_new_tokens * len(request.prompts) / self.tokens_per_s
        return {"token_ids": tokens, "seconds": seconds, "draft_tokens": 8, "accepted_tokens": 2}

    def __enter__(self) -> _Fake:
        return self

    def __exit__(self, *exc_info: object) -> None: ...


def test_modes_take_turns_between_runs_of_the_reference() -> None:
    order: list[str] = []
    plan = Plan([[[1]], [[2]]], max_new_tokens=4, sampling=Sampling(0.0, 1.0), repeats=1)
    modes = {"a": _Fake("a", 20.0, order), "b": _Fake("b", 5.0, order, token=8)}
    results = measure(plan, _Fake("ref", 10.0, order), modes, lambda _: None)
    assert order == ["ref", "a", "b", "ref", "ref", "b", "a", "ref"]
    fast, slow = results["a"].values(), results["b"].values()
    assert (fast["ratio_to_plain"], fast["tokens_per_s"], fast["acceptance_rate"]) == (2.0, 20.0, 0.25)
    assert (slow["ratio_to_plain"], slow["same_tokens"]) == (0.5, [0, 2])
    assert fast["same_tokens"] == [2, 2]


def test_sampled_tokens_are_not_compared() -> None:
    plan = Plan([[[1]]], max_new_tokens=4, sampling=Sampling(0.7, 0.95), repeats=2)
    result = measure(plan, _Fake("ref", 10.0, []), {"a": _Fake("a", 10.0, [])}, lambda _: None)["a"]
    assert result.values()["same_tokens"] is None
    assert result.values()["rounds"] == 2


class _Launcher:
    """Starts fakes; the engine `broken` cannot be set up, the mode `odd` cannot be started."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def prepare(self, peer: Peer) -> None:
        if peer.name == "broken":
            raise PeerUnavailable("no wheel for this Python")

    def worker(self, peer: Peer, mode: Mode, streams: int) -> _Fake:
        if mode.name == "odd":
            raise PeerUnavailable("no such weights")
        self.started.append(f"{peer.name} {mode.name}")
        return _Fake(mode.name, 10.0, [])


def _bench(cells: Cells, launcher: _Launcher, peers: Sequence[Peer]) -> Bench:
    return Bench(
        launcher=cast(Launcher, launcher),
        cells=cells,
        tokenizer=Tokenizer(tiny_tokenizer(320)),
        data=None,
        peers=peers,
        domains=("built-in",),
        temperatures=(0.0,),
        num_prompts=1,
        max_new_tokens=4,
        repeats=1,
        console=Console(quiet=True),
    )


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> tuple[Peer, ...]:
    monkeypatch.setattr("benchmarks.prompts.has_data", lambda _: False)
    modes = (Mode("plain", "plain"), Mode("odd", "plain"), Mode("alone", "draft", batches=False))
    return (Peer("one", "", None, modes), Peer("broken", "", None, modes))


def test_what_is_known_is_not_run_and_what_cannot_run_is_reported(tmp_path: Path, peers: tuple[Peer, ...]) -> None:
    cells, launcher = Cells(tmp_path / "peers.json"), _Launcher()
    bench = _bench(cells, launcher, peers)
    bench.run(1)
    assert launcher.started == ["redraft plain", "one plain", "one alone"]
    assert bench.unavailable == {"one odd": "no such weights", "broken": "no wheel for this Python"}
    assert [(row["engine"], row["mode"], row["ratio_to_plain"]) for row in cells.rows] == [
        ("one", "plain", 1.0),
        ("one", "alone", 1.0),
    ]
    again = _Launcher()
    _bench(Cells(cells.path), again, peers[:1]).run(1)
    assert again.started == ["redraft plain"]  # for the mode that could not be started before
    text = write(cells, bench.unavailable, 2, 4).read_text()
    assert "no wheel for this Python" in text


def test_modes_that_cannot_batch_are_left_out_of_many_streams(tmp_path: Path, peers: tuple[Peer, ...]) -> None:
    bench = _bench(Cells(tmp_path / "peers.json"), _Launcher(), peers[:1])
    assert bench.remaining(1)[0] == 3
    assert bench.remaining(4)[0] == 2


def test_page_weighs_redraft_against_the_goals(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "peers.json")
    common = {"tokens_per_s": 10.0, "acceptance_rate": 0.5, "ratio_quartiles": [1.0, 2.0], "same_tokens": [1, 1]}
    for engine, mode, ratio in (("redraft", "draft", 1.8), ("llama.cpp", "f32 draft", 0.9), ("vllm", "draft", 1.5)):
        identity = {"engine": engine, "mode": mode, "domain": "sql", "streams": 1, "temperature": 0.0}
        cells.keep(identity, {**common, "ratio_to_plain": ratio, "other_cores": 0.5, "version": engine})
    text = write(cells, {}, 2, 4).read_text()
    assert "| redraft draft / llama.cpp f32 draft | 2.00 | 1.5 | reached |" in text
    assert "| redraft draft / vllm draft | 1.20 | 1.5 | MISSED |" in text
    assert "3 of 3 cells were measured beside other busy processes" in text


def test_a_failed_command_names_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment = Environment("none")
    environment.folder.mkdir(parents=True)
    with pytest.raises(PeerUnavailable, match="no such compiler"):
        environment.run(["sh", "-c", "echo first; echo no such compiler >&2; exit 3"])
    assert "first" in environment.log.read_text()


def test_every_installed_peer_has_its_pins() -> None:
    folder = Path("benchmarks", "peers", "requirements")
    for peer in PEERS:
        if peer.environment is not None:
            lines = (folder / f"{peer.environment}.txt").read_text().splitlines()
            assert all("==" in line for line in lines if not line.startswith("#"))
