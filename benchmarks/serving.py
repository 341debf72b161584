"""redraft against transformers: same weights, prompts and threads, one after the other, prompt by prompt.

    python -m benchmarks.serving --draft build/demo-draft

Every cycle runs the same prompts through all variants, transformers' plain generation first and last; a variant's
figure is the ratio to the mean of those two, so that a machine that grows slower during the hour treats all alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from benchmarks.engines import MAX_BATCH_TOKENS, SharedModel, generate, running_engine
from benchmarks.machine import OtherLoad, machine_line, read_bandwidth_gb_s, wait_passively
from benchmarks.prompts import DataOption, load_prompts
from benchmarks.report import RESULTS
from benchmarks.serving_report import (
    BASELINE,
    PEER_ASSISTED,
    PEER_LOOKUP,
    REDRAFT_NGRAM,
    REDRAFT_NGRAM_DRAFT,
    REDRAFT_PLAIN,
    REDRAFT_ZERO_CHOSEN,
    REDRAFT_ZERO_REQUESTED,
    Sample,
    Setting,
    write_report,
)
from benchmarks.transformers_peer import PeerOutput, TransformersPeer
from redraft.models.ref import ModelRef
from redraft.models.tokenizer import Tokenizer, load_tokenizer
from redraft.sampling.params import SamplingParams, StoppingParams
from redraft.speculation.cost import StepCost
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.fallback import FallbackProposer
from redraft.speculation.length import LengthController
from redraft.speculation.ngram import NgramProposer
from redraft.speculation.proposer import Proposer

K = 4
NGRAM_MIN, NGRAM_MAX = 2, 4  # as the server's defaults
BATCH_CYCLES = 2  # per round
_PROHIBITIVE_S = 1e6

Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Variant:
    name: str
    run: Callable[[Prompts], Sample]


def main(
    draft: Annotated[str, typer.Option(help="The draft's checkpoint directory (`make model` makes it).")],
    target: Annotated[str, typer.Option(help="The target: demo, a directory, or a Hugging Face id.")] = "demo",
    prompts: Annotated[int, typer.Option(min=1, max=16, help="Prompts, also the size of the batch.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=2, help="New tokens per prompt; end-of-text is ignored.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Passes over the prompts.")] = 2,
    data: DataOption = None,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = RESULTS / "serving.md",
) -> None:
    """Compare tokens per second with transformers at batch 1 and as one batch; write a Markdown page."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # assisted generation warns about its own arguments
    tokenizer = load_tokenizer(ModelRef.parse(target))
    prompt_set = load_prompts(data, prompts)
    token_ids = [prompt.token_ids(tokenizer) for prompt in prompt_set.prompts]
    peer = TransformersPeer(
        target, tokenizer, max_new_tokens=new_tokens, ignore_eos=True, draft=draft, num_draft_tokens=K
    )
    with ExitStack() as stack:
        models = SharedModel.load(target, tokenizer), SharedModel.load(draft, tokenizer)
        redraft = _redraft_variants(stack, *models, tokenizer, new_tokens)
        singles = [
            _peer_variant(BASELINE, peer.plain),
            _peer_variant(PEER_ASSISTED, peer.assisted),
            _peer_variant(PEER_LOOKUP, peer.prompt_lookup),
            *redraft,
        ]
        batched = [v for v in singles if v.name in (BASELINE, REDRAFT_PLAIN, REDRAFT_NGRAM)]
        bandwidths = [read_bandwidth_gb_s()]
        load = OtherLoad()
        single_cycles, batch_cycles = _measure(singles, batched, token_ids, rounds, load)
        bandwidths.append(read_bandwidth_gb_s())
    setting = Setting(
        machine=machine_line(),
        load=load,
        bandwidths_gb_s=tuple(bandwidths),
        weight_bytes=sum(p.numel() * p.element_size() for p in peer.model.parameters()),
        models=f"{models[0].loaded.name} with draft {models[1].loaded.name}, float32",
        prompts=f"{prompts} {prompt_set.source}, {min(map(len, token_ids))} to {max(map(len, token_ids))} tokens",
        new_tokens=new_tokens,
        k=K,
        batch=prompts,
    )
    write_report(output, setting, single_cycles, batch_cycles)
    typer.echo(output.read_text(encoding="utf-8"))


def _measure(
    singles: Sequence[Variant], batched: Sequence[Variant], token_ids: Prompts, rounds: int, load: OtherLoad
) -> tuple[list[list[Sample]], list[list[Sample]]]:
    """Cycles of batch 1 and of the batch, in turn; one warm-up run of each variant before that is not counted."""
    single_cycles: list[list[Sample]] = []
    batch_cycles: list[list[Sample]] = []
    per_round = len(token_ids) * (len(singles) + 1) + BATCH_CYCLES * (len(batched) + 1)
    with Progress() as progress:
        task = progress.add_task("warming up", total=len(singles) + rounds * per_round)

        def run(variant: Variant, batch: Prompts) -> Sample:
            progress.update(task, description=f"{variant.name}, batch {len(batch)}")
            load.start()
            sample = variant.run(batch)
            load.stop()
            progress.advance(task)
            return sample

        def cycle(variants: Sequence[Variant], batch: Prompts, number: int) -> list[Sample]:
            baseline, *others = variants
            turn = number % len(others)
            return [run(v, batch) for v in (baseline, *others[turn:], *others[:turn], baseline)]

        for variant in singles:
            run(variant, token_ids[:1])
        load.samples.clear()
        for _ in range(rounds):
            for prompt in token_ids:
                single_cycles.append(cycle(singles, [prompt], len(single_cycles)))
            for _ in range(BATCH_CYCLES):
                batch_cycles.append(cycle(batched, token_ids, len(batch_cycles)))
    return single_cycles, batch_cycles


def _peer_variant(name: str, generate_batch: Callable[[Prompts], PeerOutput]) -> Variant:
    def run(batch: Prompts) -> Sample:
        started = time.perf_counter()
        output = generate_batch(batch)
        return Sample(name, time.perf_counter() - started, tuple(output.token_ids), output.target_passes * len(batch))

    return Variant(name, run)


def _redraft_variants(
    stack: ExitStack, target: SharedModel, draft: SharedModel, tokenizer: Tokenizer, new_tokens: int
) -> list[Variant]:
    """One engine per variant on the same runners. No prefix cache: transformers has none, and prompts come again."""
    stopping = StoppingParams(max_new_tokens=new_tokens, ignore_eos=True)
    greedy = SamplingParams(temperature=0.0)

    def variant(name: str, proposer: Proposer | None, cost: StepCost, max_draft_tokens: int | None = None) -> Variant:
        engine = stack.enter_context(
            running_engine(target, tokenizer, proposer, k=K, target_cost=cost, prefix_cache=False)
        )

        def run(batch: Prompts) -> Sample:
            started = time.perf_counter()
            completed = generate(engine, batch, [greedy] * len(batch), stopping, max_draft_tokens=max_draft_tokens)
            seconds = time.perf_counter() - started
            stats = [one.speculation for one in completed]
            return Sample(
                name,
                seconds,
                tuple(one.token_ids for one in completed),
                sum(s.verify_steps for s in stats),
                sum(s.draft_tokens for s in stats),
                sum(s.accepted_tokens for s in stats),
            )

        return Variant(name, run)

    def ngram(cost: StepCost) -> Proposer:
        length = LengthController(NgramProposer.name, cost, None)
        return NgramProposer(tokenizer.vocab_size, min_match=NGRAM_MIN, max_match=NGRAM_MAX, length=length)

    def model(cost: StepCost, draft_cost: StepCost) -> Proposer:
        length = LengthController(DraftModelProposer.name, cost, draft_cost)
        return DraftModelProposer(draft.runner, version=draft.version, max_catch_up=MAX_BATCH_TOKENS, length=length)

    costs = [target.step_cost() for _ in range(5)]
    return [
        variant(REDRAFT_PLAIN, None, costs[0]),
        variant(REDRAFT_ZERO_REQUESTED, model(costs[1], draft.step_cost()), costs[1], max_draft_tokens=0),
        variant(REDRAFT_ZERO_CHOSEN, model(costs[2], _prohibitive_cost()), costs[2]),
        variant(REDRAFT_NGRAM, ngram(costs[3]), costs[3]),
        variant(REDRAFT_NGRAM_DRAFT, FallbackProposer([ngram(costs[4]), model(costs[4], draft.step_cost())]), costs[4]),
    ]


def _prohibitive_cost() -> StepCost:
    """A draft so slow that the length controller settles on k = 0. Its rare probes still happen, and still cost."""
    cost = StepCost()
    cost.observe(1, _PROHIBITIVE_S)
    return cost


if __name__ == "__main__":
    wait_passively()
    typer.run(main)
