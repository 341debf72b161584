"""Results of the exactness matrix, gathered over several runs in `build/`, and the page made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.exactness_cases import TEMPERATURE, TOP_P, Case, Part, ProposerKind
from benchmarks.exactness_check import TIE, Mismatch
from benchmarks.machine import machine_line
from benchmarks.report import table, write_page
from redraft.files import write_file

FOLDER = Path("build", "exactness")

_PROPOSERS = {
    ProposerKind.NONE: "none",
    ProposerKind.NGRAM: "ngram",
    ProposerKind.DRAFT_A: "draft A",
    ProposerKind.DRAFT_B: "draft B",
    ProposerKind.SWAP: "swapped every few steps",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What results must have in common to stand on one page."""

    target: str  # fingerprints
    draft_a: str
    draft_b: str
    prompt_ids: tuple[str, ...]
    new_tokens: int
    transformers: str  # version

    def digest(self, *names: str) -> str:
        """Of the named attributes, or of all."""
        values = asdict(self)
        chosen = {name: values[name] for name in names or values}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Result:
    """Of one case."""

    case: Case
    prompts: int
    tokens: int
    draft_tokens: int
    accepted_tokens: int
    mismatches: tuple[Mismatch, ...]
    text_mismatches: int  # prompts whose text differs from a reference that has one

    @property
    def is_exact(self) -> bool:
        """All the same but for ties."""
        return all(m.is_tie for m in self.mismatches) and self.text_mismatches <= len(self.mismatches)


class Store:
    """One JSON file per setting, rewritten after every case; an interrupted matrix goes on where it was."""

    def __init__(self, setting: Setting, folder: Path = FOLDER) -> None:
        self.setting = setting
        self._path = folder / f"results-{setting.digest()}.json"
        self._reference_path = folder / f"reference-{setting.digest('target', 'new_tokens', 'transformers')}.json"
        self._seeded_path = folder / f"seeded-{setting.digest('target', 'new_tokens', 'prompt_ids')}.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Result] = {key: _result(value) for key, value in _read(self._path).items()}
        self.reference: dict[str, list[int]] = _read(self._reference_path)
        """transformers' greedy tokens by prompt id; shared by all settings of this target."""
        self.seeded_reference: dict[str, tuple[list[int], str]] = _read(self._seeded_path)
        """Tokens and text by prompt id, of redraft without speculation, alone."""

    def add(self, result: Result) -> None:
        self.results[result.case.key] = result
        _write(self._path, {key: asdict(value) for key, value in self.results.items()})

    def save_references(self) -> None:
        _write(self._reference_path, self.reference)
        _write(self._seeded_path, self.seeded_reference)


def write_matrix_page(path: Path, store: Store, models: str, total_cases: int) -> None:
    parts = [
        f"{models}. {len(store.setting.prompt_ids)} prompts, at most {store.setting.new_tokens} new tokens each, until "
        f"end-of-text. {len(store.results)} of {total_cases} cases of the matrix have been run. k does not adapt. "
        "Draft A is the draft given; draft B is the target without a few of its middle layers: accepted often, and so "
        "slow that it is of use only here. Concurrency 16: all prompts submitted at once, 16 in every step.",
        *(
            f"## {heading}\n\n{_section([r for r in store.results.values() if r.case.part is part])}"
            for part, heading in (
                (Part.GREEDY, "Greedy, against transformers' generate"),
                (Part.SEEDED, f"Seeded, temperature {TEMPERATURE}, top-p {TOP_P}, against no speculation, alone"),
            )
        ),
    ]
    write_page(path, "Exactness", machine_line() + ".", parts)


def _section(results: Sequence[Result]) -> str:
    if not results:
        return "Not run yet."
    order = list(ProposerKind)
    ranked = sorted(results, key=lambda r: (r.case.concurrency, order.index(r.case.proposer), r.case.k))
    header = ("proposer", "k", "concurrency", "prompts", "tokens", "acceptance rate", "differ", "of these ties")
    rows = [_row(result) for result in ranked]
    found = [(result, mismatch) for result in ranked for mismatch in result.mismatches]
    ties = sum(mismatch.is_tie for _, mismatch in found)
    tokens = sum(result.tokens for result in ranked)
    unexplained = len(found) - ties
    generations = sum(result.prompts for result in ranked)
    verdict = (
        f"{generations} generations, {tokens} tokens: {len(found)} differ from the reference, {ties} of them at an "
        f"fp32 tie (margin below {TIE:g} in transformers' logits), {unexplained} otherwise"
        f"{'.' if unexplained == 0 else ': NOT EXACT.'}"
    )
    if ranked[0].case.part is Part.SEEDED:  # transformers' tokens have no streamed text to compare with
        verdict += f" The streamed text differs in {sum(result.text_mismatches for result in ranked)}."
    distinct = {(m.prompt, m.position, m.ours, m.reference): m for _, m in found}
    if not distinct:
        return f"{verdict}\n\n{table(header, rows)}"
    places = table(
        ("prompt", "new token", "redraft", "reference", "margin", "tie"),
        [
            (m.prompt, str(m.position), str(m.ours), str(m.reference), f"{m.margin:.1e}", "yes" if m.is_tie else "NO")
            for m in distinct.values()
        ],
    )
    return f"{verdict}\n\n{table(header, rows)}\n\nWhere they differ first, each place once:\n\n{places}"


def _row(result: Result) -> tuple[str, ...]:
    case = result.case
    rate = f"{result.accepted_tokens / result.draft_tokens:.2f}" if result.draft_tokens else ""
    ties = sum(mismatch.is_tie for mismatch in result.mismatches)
    return (
        _PROPOSERS[case.proposer],
        str(case.k),
        str(case.concurrency),
        str(result.prompts),
        str(result.tokens),
        rate,
        str(len(result.mismatches)),
        str(ties),
    )


def _result(value: dict[str, Any]) -> Result:
    case = value["case"]
    return Result(
        **{
            **value,
            "case": Case(Part(case["part"]), ProposerKind(case["proposer"]), case["k"], case["concurrency"]),
            "mismatches": tuple(Mismatch(**mismatch) for mismatch in value["mismatches"]),
        }
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: object) -> None:
    write_file(path, json.dumps(content, indent=1).encode())
