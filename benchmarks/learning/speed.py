"""What drafts are worth: tokens a second of one stream with a draft over without, prompt by prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.engine.alternate import Run, alternate
from benchmarks.engines import SharedModel, generate, running_engine
from benchmarks.learning.bench import FOLDER, Bench
from benchmarks.learning.experiments import CYCLES, DOMAINS, FAR_PAIRS, LONG_CYCLES, LONG_DOMAINS
from benchmarks.machine import processor
from benchmarks.prompts import load_domain
from redraft.models.ref import ModelRef
from redraft.models.tokenizer import Tokenizer, load_tokenizer
from redraft.sampling.params import SamplingParams, StoppingParams
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.length import LengthController
from redraft.speculation.proposer import Proposer
from redraft_server.config import SpeculationConfig
from redraft_training.cycle_models import directory_ref

NUM_PROMPTS, NEW_TOKENS = 6, 64
MAX_DRAFT = SpeculationConfig().num_speculative_tokens  # as a server has it
SAMPLING = {
    "greedy": SamplingParams(temperature=0.0),
    "sampled": SamplingParams(temperature=0.7, top_p=0.95),
}


def speed(bench: Bench, data: Path, general: ModelRef, pruned: ModelRef) -> None:
    """Every domain with the pruned draft, the general one, and what the other experiments have trained for it."""
    tokenizer = load_tokenizer(ModelRef.parse("demo"))
    target = SharedModel.load("demo", tokenizer)
    drafts = {"pruned": pruned, "general": general}
    for domain in DOMAINS:
        for name, draft in {**drafts, **_trained(domain)}.items():
            if bench.known(f"speed/{domain}/{name}") is None:
                measured = _measure(target, tokenizer, draft, data, domain)
                bench.keep(f"speed/{domain}/{name}", {**measured, "machine": processor()})


def _trained(domain: str) -> Mapping[str, ModelRef]:
    """Drafts that are on this disk, by what was done to them."""
    cycles = LONG_CYCLES if domain in LONG_DOMAINS else CYCLES
    runs = {f"cycle {cycle}": f"domains-{domain}-cycle_{cycle}" for cycle in cycles}
    for first, second in FAR_PAIRS:
        if domain in (first, second):
            pair = f"drift-{first}_to_{second}-3_B_with_replay"
            runs |= {run.name: run.name for run in (FOLDER / "runs").glob(f"{pair}_*_requests")}
    folders = {name: FOLDER / "runs" / run / "draft" for name, run in runs.items()}
    return {name: directory_ref(folder) for name, folder in sorted(folders.items()) if folder.exists()}


def _measure(
    target: SharedModel, tokenizer: Tokenizer, draft: ModelRef, data: Path, domain: str
) -> dict[str, dict[str, object]]:
    """By kind of sampling; the same engine with a proposer of adaptive length, and without one."""
    prompts = [prompt.token_ids(tokenizer)[-1024:] for prompt in load_domain(data, domain, NUM_PROMPTS)]
    cost = target.step_cost()
    loaded = SharedModel.load_draft(str(draft), target, tokenizer)
    length = LengthController(DraftModelProposer.name, cost, loaded.step_cost())
    proposer = DraftModelProposer(loaded.runner, version=loaded.version, length=length)

    def run(one: Proposer | None, sampling: SamplingParams) -> Run:
        def completed(cycle: int) -> float:
            k = 0 if one is None else MAX_DRAFT
            with running_engine(target, tokenizer, one, k=k, target_cost=cost, max_running=1) as engine:
                stopping = StoppingParams(max_new_tokens=NEW_TOKENS)
                started = time.perf_counter()
                (result,) = generate(engine, [prompts[cycle]], [sampling], stopping)
                return len(result.token_ids) / (time.perf_counter() - started)

        return completed

    return {
        kind: alternate(run(None, sampling), run(proposer, sampling), len(prompts)).values()
        for kind, sampling in SAMPLING.items()
    }
