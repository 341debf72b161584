"""The experiments. Each is a list of named cells; a cell that has a result is not run again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.learning.bench import FOLDER, Bench
from benchmarks.learning.traffic import load_traffic
from redraft.models.ref import ModelRef
from redraft_training.cycle_models import directory_ref
from redraft_training.dataset.example import Example

DOMAINS = ("sql", "extract", "support", "math", "code")
FAR_PAIRS = (("support", "sql"), ("math", "code_multi"))
SKIP = 230  # the general draft was distilled from the first prompts of every domain
CYCLE = 125  # requests of a cycle
CYCLES = (1, 2, 4)
NUM_EVALUATION = 60
CYCLE_SETTINGS = (
    "distill.epochs=3",
    "distill.batch_tokens=1024",
    "distill.learning_rate=0.0007",
    "student.vocab_size=16384",
)
SHORT_SETTINGS = (
    "distill.epochs=3",
    "distill.batch_tokens=768",
    "distill.learning_rate=0.001",
    "student.vocab_size=8192",
)
SEEDS = (0, 1, 2)

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "word_kd": ("how=forward_kl", "temperature=1.0"),
    "sequence_kd": ("what=sequences", "how=cross_entropy", "temperature=1.0"),
    "forward_kl at own sampling": ("how=forward_kl",),
    "forward_kl, hard greedy": ("how=forward_kl", "greedy_targets=hard"),
    "reverse_kl": ("how=reverse_kl",),
    "jsd": ("how=jsd",),
    "tv": ("how=tv",),
    "neg_log_alpha": ("how=neg_log_alpha",),
    "lk": ("how=lk",),
    "gkd, captured, lambda 0.5": ("how=jsd", "on_policy_fraction=0.5"),
    "distillspec, captured, lambda 1": ("how=forward_kl", "on_policy_fraction=1.0"),
    "gkd, rollouts, lambda 0.5": ("how=jsd", "on_policy_fraction=0.5", "on_policy_source=rollout"),
    "gkd, rollouts, lambda 1": ("how=jsd", "on_policy_fraction=1.0", "on_policy_source=rollout"),
    "fitnets": ("what=features", "how=forward_kl", "temperature=1.0"),
    "rkd": ("what=relations", "how=forward_kl", "temperature=1.0"),
    "minillm": ("how=policy_gradient", "temperature=1.0", "on_policy_fraction=1.0", "on_policy_source=rollout"),
}


def domains(bench: Bench, data: Path, general: ModelRef, pruned: ModelRef) -> None:
    """Each domain for itself: the pruned draft, the general one, and that one after 1, 2, 4 cycles."""
    for domain in DOMAINS:
        evaluation = load_traffic(data, domain, "e", NUM_EVALUATION)
        traffic = load_traffic(data, domain, "t", CYCLE * CYCLES[-1], skip=SKIP)
        for name, draft in (("pruned", pruned), ("general", general)):
            key = f"domains/{domain}/{name}"
            if bench.known(key) is None:
                bench.keep(key, asdict(bench.judge(draft, evaluation)))
        draft, seen = general, 0
        for cycles in CYCLES:
            name = f"domains-{domain}-{cycles}"
            key = f"domains/{domain}/cycle {cycles}"
            part = traffic[: CYCLE * cycles]
            if bench.known(key) is None:
                trained = bench.train(name, part, CYCLE_SETTINGS, draft)
                seen += trained.tokens
                judged = asdict(bench.judge(trained.draft, evaluation))
                bench.keep(
                    key,
                    {
                        **judged,
                        "tokens": trained.tokens,
                        "cpu_s": round(trained.cpu_seconds),
                        "requests": len(part),
                        "output_tokens": _outputs(part),
                    },
                )
            draft = directory_ref(FOLDER / "runs" / name / "draft")


def drift(bench: Bench, data: Path, general: ModelRef) -> None:
    """A is learnt, then B with replay of A and without: what becomes of both."""
    for first, second in FAR_PAIRS:
        evaluations = {name: load_traffic(data, name, "e", NUM_EVALUATION) for name in (first, second)}
        parts = {name: load_traffic(data, name, "t", CYCLE * 4, skip=SKIP) for name in (first, second)}
        name = f"drift-{first}-{second}"
        stages: list[tuple[str, Sequence[Example], str | None]] = [
            ("A", parts[first], None),
            ("B with replay", [*parts[first][: CYCLE * 2], *parts[second]], "A"),
            ("B without replay", parts[second], "A"),
        ]
        for stage, examples, before in stages:
            key = f"drift/{first} to {second}/{stage}"
            if bench.known(key) is None:
                base = general if before is None else directory_ref(FOLDER / "runs" / f"{name}-{before}" / "draft")
                trained = bench.train(f"{name}-{stage}", examples, CYCLE_SETTINGS, base)
                bench.keep(
                    key, {domain: asdict(bench.judge(trained.draft, own)) for domain, own in evaluations.items()}
                )


def captured(bench: Bench, data: Path, pruned: ModelRef) -> None:
    """Labels from verification against running the target again: α and processor time, three seeds."""
    evaluation, traffic = _small(data)
    for seed in SEEDS:
        for teacher in ("captured", "rerun"):
            overrides = (*SHORT_SETTINGS, f"distill.seed={seed}", f"teacher={teacher}")
            _trained_cell(bench, f"captured/{teacher}/{seed}", traffic, evaluation, overrides, pruned)


def ablation(bench: Bench, data: Path, pruned: ModelRef) -> None:
    """Every objective on the same draft, data and number of epochs, three seeds."""
    evaluation, traffic = _small(data)
    for seed in SEEDS:
        for name, settings in OBJECTIVES.items():
            overrides = (*SHORT_SETTINGS, f"distill.seed={seed}", *(f"distill.objective.{entry}" for entry in settings))
            _trained_cell(bench, f"ablation/{name}/{seed}", traffic, evaluation, overrides, pruned)


def _small(data: Path) -> tuple[list[Example], list[Example]]:
    """Evaluation and training examples of two domains."""
    evaluation = [example for name in ("sql", "support") for example in load_traffic(data, name, "e", NUM_EVALUATION)]
    traffic = [e for name in ("sql", "support") for e in load_traffic(data, name, "t", CYCLE * 4, skip=SKIP)[:CYCLE]]
    return evaluation, traffic


def _trained_cell(
    bench: Bench,
    key: str,
    traffic: Sequence[Example],
    evaluation: Sequence[Example],
    overrides: Sequence[str],
    base: ModelRef,
) -> None:
    if bench.known(key) is None:
        trained = bench.train(key.replace("/", "-").replace(" ", "_"), traffic, overrides, base)
        judged = asdict(bench.judge(trained.draft, evaluation))
        bench.keep(key, {**judged, "tokens": trained.tokens, "cpu_s": round(trained.cpu_seconds)})


def _outputs(examples: Sequence[Example]) -> int:
    return sum(len(example.output_token_ids) for example in examples)
