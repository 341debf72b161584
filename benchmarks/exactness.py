"""The exactness matrix: every proposer, k and concurrency gives the same tokens.

    python -m benchmarks.exactness --draft build/demo-draft
    python -m benchmarks.exactness --draft build/demo-draft --part greedy --k 1 --k 8 --concurrency 16 --prompts 8

Greedy generations are compared with transformers' `generate`, seeded ones with redraft's own without speculation, one
request at a time. Results gather in `build/exactness`: cases already run with the same models, prompts and
`--new-tokens` are not run again (`--again` does: use it when the code has changed), and the page shows all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.engines import Completed, SharedModel
from benchmarks.exactness_cases import (
    CONCURRENCIES,
    SEEDED_REFERENCE,
    Bench,
    Case,
    Part,
    ProposerKind,
    all_cases,
    ensure_good_draft,
    sampling_params,
)
from benchmarks.exactness_check import find_mismatch
from benchmarks.exactness_store import FOLDER, Result, Setting, Store, write_matrix_page
from benchmarks.machine import wait_passively
from benchmarks.prompts import BenchmarkPrompt, DataOption, load_prompts
from benchmarks.report import RESULTS
from benchmarks.transformers_peer import TransformersPeer
from redraft.models.ref import ModelRef
from redraft.models.tokenizer import load_tokenizer

console = Console()


def main(
    draft: Annotated[str, typer.Option(help="Draft A's checkpoint directory (`make model` makes it).")],
    draft_b: Annotated[str | None, typer.Option(help="Draft B. Default: made once from the target.")] = None,
    target: Annotated[str, typer.Option(help="The target: demo, a directory, or a Hugging Face id.")] = "demo",
    part: Annotated[list[Part] | None, typer.Option(help="Only this part; may be repeated, as the next three.")] = None,
    proposer: Annotated[list[ProposerKind] | None, typer.Option(help="Only this proposer.")] = None,
    k: Annotated[list[int] | None, typer.Option(help="Only this k; proposer none counts as 0.")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(help=f"Only this concurrency, of {CONCURRENCIES}.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens per prompt.")] = 64,
    again: Annotated[bool, typer.Option("--again", help="Run cases whose result is there, too.")] = False,
    data: DataOption = None,
    output: Annotated[Path, typer.Option(help="Where the page goes.")] = RESULTS / "exactness.md",
) -> None:
    """Run the matrix or a part of it; add to the results and write the page."""
    ref = ModelRef.parse(target)
    tokenizer = load_tokenizer(ref)
    prompt_set = load_prompts(data, prompts)
    good_draft = draft_b or f"./{ensure_good_draft(ref, FOLDER / f'draft-b-{Path(target).name}')}"
    drafts = {
        ProposerKind.DRAFT_A: SharedModel.load(draft, tokenizer),
        ProposerKind.DRAFT_B: SharedModel.load(good_draft, tokenizer),
    }
    bench = Bench(tokenizer, SharedModel.load(target, tokenizer), drafts, new_tokens)
    setting = Setting(
        target=bench.target.loaded.weights_fingerprint,
        draft_a=drafts[ProposerKind.DRAFT_A].loaded.weights_fingerprint,
        draft_b=drafts[ProposerKind.DRAFT_B].loaded.weights_fingerprint,
        prompt_ids=tuple(prompt.id for prompt in prompt_set.prompts),
        new_tokens=new_tokens,
        transformers=version("transformers"),
    )
    store = Store(setting)
    if again:
        store.seeded_reference.clear()  # of the code as it is now
    everything = list(all_cases())
    cases = [
        case
        for case in everything
        if (not part or case.part in part)
        and (not proposer or case.proposer in proposer)
        and (not k or case.k in k)
        and (not concurrency or case.concurrency in concurrency)
        and (again or case.key not in store.results)
    ]
    Matrix(bench, target, prompt_set.prompts, store).run(cases)
    write_matrix_page(output, store, f"{bench.target.loaded.name}, float32, {prompt_set.source}", len(everything))
    typer.echo(output.read_text(encoding="utf-8"))
    if not all(result.is_exact for result in store.results.values()):
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class Reference:
    """What a generation must equal. transformers gives tokens, of which the text is a function."""

    token_ids: tuple[int, ...]
    text: str | None = None


@dataclass
class Matrix:
    """Runs cases and compares them with their references, which are computed when first needed."""

    bench: Bench
    target: str
    prompts: Sequence[BenchmarkPrompt]
    store: Store
    _references: dict[Part, list[Reference]] = field(default_factory=dict)

    def run(self, cases: Sequence[Case]) -> None:
        with Progress(console=console) as progress:
            total = progress.add_task("cases", total=len(cases))
            for case in cases:
                reference = self._reference(case.part, progress)
                completed = self._generate(case, progress)
                result = self._compare(case, completed, reference)
                self.store.add(result)
                progress.console.print(f"{case.key}: {len(result.mismatches)} of {result.prompts} differ")
                progress.advance(total)

    def _reference(self, part: Part, progress: Progress) -> list[Reference]:
        if part not in self._references:
            make = self._greedy_reference if part is Part.GREEDY else self._seeded_reference
            self._references[part] = make(progress)
        return self._references[part]

    def _greedy_reference(self, progress: Progress) -> list[Reference]:
        """transformers, prompt by prompt: padding would change its arithmetic."""
        known = self.store.reference
        missing = [index for index, prompt in enumerate(self.prompts) if prompt.id not in known]
        if missing:
            task = progress.add_task("transformers", total=len(missing))
            for index in missing:
                known[self.prompts[index].id] = list(self._peer.greedy(self._token_ids[index]))
                progress.advance(task)
            progress.remove_task(task)
            self.store.save_references()
        return [Reference(tuple(known[prompt.id])) for prompt in self.prompts]

    def _seeded_reference(self, progress: Progress) -> list[Reference]:
        known = self.store.seeded_reference
        if not known:
            completed = self._generate(SEEDED_REFERENCE, progress)
            known.update((p.id, (list(c.token_ids), c.text)) for p, c in zip(self.prompts, completed, strict=True))
            self.store.save_references()
        return [Reference(tuple(known[prompt.id][0]), known[prompt.id][1]) for prompt in self.prompts]

    def _generate(self, case: Case, progress: Progress) -> list[Completed]:
        task = progress.add_task(case.key, total=len(self.prompts))
        completed = self.bench.run(case, self._token_ids, lambda count: progress.advance(task, count))
        progress.remove_task(task)
        return completed

    def _compare(self, case: Case, completed: Sequence[Completed], reference: Sequence[Reference]) -> Result:
        mismatches = [
            find_mismatch(
                prompt.id,
                self._token_ids[index],
                completed[index].token_ids,
                reference[index].token_ids,
                sampling_params(case.part, index),
                lambda token_ids: self._peer.logits_after(token_ids),  # the peer is loaded only if it is asked
            )
            for index, prompt in enumerate(self.prompts)
        ]
        stats = [one.speculation for one in completed]
        return Result(
            case,
            prompts=len(completed),
            tokens=sum(len(one.token_ids) for one in completed),
            draft_tokens=sum(one.draft_tokens for one in stats),
            accepted_tokens=sum(one.accepted_tokens for one in stats),
            mismatches=tuple(mismatch for mismatch in mismatches if mismatch is not None),
            text_mismatches=sum(
                other.text is not None and one.text != other.text
                for one, other in zip(completed, reference, strict=True)
            ),
        )

    @cached_property
    def _token_ids(self) -> list[tuple[int, ...]]:
        return [prompt.token_ids(self.bench.tokenizer) for prompt in self.prompts]

    @cached_property
    def _peer(self) -> TransformersPeer:
        return TransformersPeer(self.target, self.bench.tokenizer, max_new_tokens=self.bench.new_tokens)


if __name__ == "__main__":
    wait_passively()
    typer.run(main)
