"""Traffic to learn from, served by the engine itself with capture on, once; kept in `build/learning/traffic`.

Half of the requests are greedy, half are drawn at temperature 0.7 and top-p 0.95, as an application would ask.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.progress import track

from redraft.sampling.params import SamplingParams, StoppingParams
from redraft.telemetry.metrics import ServerMetrics
from redraft.traffic.reader import TrafficReader
from redraft.traffic.writer import TrafficWriter
from redraft_server.config import ServerConfig
from redraft_server.engine.api import EngineEvent, EngineRequest, RequestFinished
from redraft_server.engine.build import build_engine
from redraft_server.rollout.start import configured_draft
from redraft_training.dataset.example import Example
from redraft_training.dataset.select import to_example

FOLDER = Path("build", "learning", "traffic")
GREEDY, SAMPLED = SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_p=0.95)
MAX_NEW_TOKENS, MAX_PROMPT_TOKENS = 64, 300
_RUNNING = 32
_console = Console(stderr=True)


def load_traffic(
    data: Path, domain: str, part: str, count: int, *, skip: int = 0, draft: str | None = None
) -> list[Example]:
    """Examples of `count` prompts of one domain, served now if they were not before.

    `part` is `t` (traffic) or `e` (evaluation). Both kinds of sampling are applied in turn. Without a `draft` nothing
    is proposed, so nothing is logged of what a draft would propose.
    """
    folder = FOLDER / f"{domain}-{part}-{skip}-{count}{'' if draft is None else '-drafted'}"
    if not (folder / "complete").exists():
        _serve(_lines(data, domain, part)[skip : skip + count], domain, folder, draft)
        (folder / "complete").touch()
    records = TrafficReader(str(folder)).iter_records(on_problem=lambda _: None)
    return sorted((to_example(record) for record in records), key=lambda example: example.request_id)


def _lines(data: Path, domain: str, part: str) -> list[dict[str, str]]:
    with (data / f"{domain}.jsonl").open(encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [line for line in lines if line["id"].startswith(f"{domain}-{part}")]


def _serve(lines: Sequence[dict[str, str]], domain: str, folder: Path, draft: str | None) -> None:
    proposer = "none" if draft is None else "draft_model"
    config = ServerConfig.model_validate(
        {
            "model": {"target": "demo", "draft": draft},
            "engine": {
                "max_running_requests": _RUNNING,
                "kv_cache_tokens": 2 * _RUNNING * (MAX_PROMPT_TOKENS + MAX_NEW_TOKENS),
                "max_waiting_requests": len(lines),
            },
            "speculation": {"proposer": proposer, "adaptive": False, "num_speculative_tokens": 4},
            "traffic_log": {"url": str(folder)},
        }
    )
    metrics = ServerMetrics(CollectorRegistry(), "demo")
    writer = TrafficWriter(str(folder), metrics, max_queue_records=len(lines) + 1, sample_rate=1.0)
    engine = build_engine(config, metrics, writer, first_draft=partial(configured_draft, config)).engine
    finished = threading.Semaphore(0)

    def sink(events: list[EngineEvent]) -> None:
        if any(isinstance(event, RequestFinished) for event in events):
            finished.release()

    requests = [request for line in lines if (request := _request(engine.tokenizer, line, domain)) is not None]
    for request in requests:
        engine.submit(request, sink)
    for _ in track(requests, f"Serving {domain}", console=_console, disable=not _console.is_terminal):
        finished.acquire()
    engine.stop(30.0)
    if not writer.close(60.0):
        raise RuntimeError(f"the traffic of {domain} could not be written to {folder}")


def _request(tokenizer: object, line: dict[str, str], domain: str) -> EngineRequest | None:
    messages = [{"role": "user", "content": line["prompt"]}]
    if line.get("system"):
        messages.insert(0, {"role": "system", "content": line["system"]})
    ids = tuple(tokenizer.apply_chat_template(messages))  # type: ignore[attr-defined]
    if len(ids) > MAX_PROMPT_TOKENS:
        return None
    return EngineRequest(
        request_id=line["id"],
        prompt_token_ids=ids,
        sampling=GREEDY if int(line["id"][-1]) % 2 == 0 else SAMPLED,
        stopping=StoppingParams(max_new_tokens=MAX_NEW_TOKENS),
        domain=domain,
    )
