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
from redraft_training.student.quantise import quantise_checkpoint

DOMAINS = ("sql", "extract", "support", "math", "code_multi")
FAR_PAIRS = (("support", "sql"), ("extract", "math"))
SKIP = 660  # the general draft was distilled from the first prompts of every domain
CYCLE = 100  # requests of a cycle
CYCLES = (1, 2, 4)
LONG_DOMAINS, LONG_CYCLES = ("sql", "support"), (1, 2, 4, 10)
NUM_EVALUATION = 60
DRIFT_REQUESTS = 200  # of A, then of B without replay
DRIFT_STEPS = ((0, 100), (100, 200), (200, 400))  # requests of B, learnt with replay of as many of A
LONG_DRIFT_STEPS = (*DRIFT_STEPS, (400, 1000))
DOMAIN_SETTINGS = ("distill.epochs=2", "distill.batch_tokens=1024", "student.vocab_size=16384")
CYCLE_SETTINGS = (*DOMAIN_SETTINGS, "distill.learning_rate=0.0007")
ABLATION_DOMAINS, ABLATION_REQUESTS = ("sql", "support"), 80
SHORT_SETTINGS = (
    "distill.epochs=2",
    "distill.batch_tokens=512",
    "distill.learning_rate=0.0015",
    "student.vocab_size=8192",
)
SEEDS = (0, 1, 2)
LEARNING_RATES = (7e-4, 4e-4, 2e-4)

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "word_kd": ("how=forward_kl", "temperature=1.0"),
    "word_kd, 3 epochs": ("how=forward_kl", "temperature=1.0"),
    "sequence_kd": ("what=sequences", "how=cross_entropy", "temperature=1.0"),
    "forward_kl at own sampling": ("how=forward_kl", "temperature=null"),
    "reverse_kl": ("how=reverse_kl", "temperature=null"),
    "jsd": ("how=jsd", "temperature=null"),
    "tv": ("how=tv", "temperature=null"),
    "neg_log_alpha": ("how=neg_log_alpha", "temperature=null"),
    "lk": ("how=lk", "temperature=null"),
    "gkd, captured, lambda 0.5": ("how=jsd", "temperature=null", "on_policy_fraction=0.5"),
    "distillspec, captured, lambda 1": ("how=forward_kl", "temperature=null", "on_policy_fraction=1.0"),
    "word_kd, captured, lambda 0.5": ("how=forward_kl", "temperature=1.0", "on_policy_fraction=0.5"),
    "word_kd, captured, lambda 1": ("how=forward_kl", "temperature=1.0", "on_policy_fraction=1.0"),
    "gkd, rollouts, lambda 0.5": ("how=jsd", "temperature=null", "on_policy_fraction=0.5", "on_policy_source=rollout"),
    "fitnets": ("what=features", "how=forward_kl", "temperature=1.0"),
    "rkd": ("what=relations", "how=forward_kl", "temperature=1.0"),
    "minillm": ("how=policy_gradient", "temperature=1.0", "on_policy_fraction=1.0", "on_policy_source=rollout"),
}
FINE_TUNING: dict[str, tuple[str, tuple[str, ...]]] = {
    "word_kd": ("word_kd", ()),
    "word_kd, learning rate 2e-4": ("word_kd", ("distill.learning_rate=0.0002",)),
    "forward_kl at own sampling": ("forward_kl at own sampling", ()),
    "lk": ("lk", ()),
    "tv": ("tv", ()),
    "word_kd, captured, lambda 0.5": ("word_kd, captured, lambda 0.5", ()),
    "distillspec, captured, lambda 1": ("distillspec, captured, lambda 1", ()),
}
"""Tried on a draft that is good already: the objective, and what else differs."""
LONGER = {"word_kd, 3 epochs": ("distill.epochs=3",)}  # about the tokens of text and captured drafts in two epochs


def domains(bench: Bench, data: Path, general: ModelRef, pruned: ModelRef) -> None:
    """Each domain for itself: the pruned draft, the general one, and that one after some cycles.

    A cycle learns the requests since the last one, and replays as many of the earlier ones.
    """
    for domain in DOMAINS:
        cycles = LONG_CYCLES if domain in LONG_DOMAINS else CYCLES
        names = ["pruned", "general", *(f"cycle {cycle}" for cycle in cycles)]
        missing = [name for name in names if bench.known(f"domains/{domain}/{name}") is None]
        if not missing:
            continue  # the traffic need not be served again
        evaluation = load_traffic(data, domain, "e", NUM_EVALUATION)
        for name, draft in (("pruned", pruned), ("general", general)):
            if name in missing:
                bench.keep(f"domains/{domain}/{name}", asdict(bench.judge(draft, evaluation)))
        if not any(name.startswith("cycle") for name in missing):
            continue
        traffic = load_traffic(data, domain, "t", CYCLE * cycles[-1], skip=SKIP)
        draft, seen = general, 0
        for cycle in cycles:
            fresh = traffic[seen : CYCLE * cycle]
            examples = [*fresh, *traffic[:seen][-len(fresh) :]]
            key, judged_on = f"domains/{domain}/cycle {cycle}", {domain: evaluation}
            draft = _learn(bench, key, examples, draft, judged_on, fresh, DOMAIN_SETTINGS)
            seen = CYCLE * cycle


def drift(bench: Bench, data: Path, general: ModelRef) -> None:
    """A is learnt, then B with replay of A and without, then A again: what becomes of both."""
    for first, second in FAR_PAIRS:
        pair = f"drift/{first} to {second}"
        evaluations = {name: load_traffic(data, name, "e", NUM_EVALUATION) for name in (first, second)}
        steps = LONG_DRIFT_STEPS if second in LONG_DOMAINS else DRIFT_STEPS
        ours = load_traffic(data, first, "t", CYCLE * CYCLES[-1], skip=SKIP)
        old, again = ours[:DRIFT_REQUESTS], ours[DRIFT_REQUESTS : DRIFT_REQUESTS + CYCLE]
        new = load_traffic(data, second, "t", steps[-1][1], skip=SKIP)
        learnt = _learn(bench, f"{pair}/1 A, {DRIFT_REQUESTS} requests", old, general, evaluations, old)
        unmixed = new[:DRIFT_REQUESTS]
        _learn(bench, f"{pair}/2 B without replay, {DRIFT_REQUESTS} requests", unmixed, learnt, evaluations, unmixed)
        for start, end in steps:
            fresh = new[start:end]
            examples = [*fresh, *old[: len(fresh)], *new[:start][-len(fresh) :]]
            learnt = _learn(bench, f"{pair}/3 B with replay, {end} requests", examples, learnt, evaluations, fresh)
        _learn(bench, f"{pair}/4 A again, {CYCLE} requests", [*again, *new[:CYCLE]], learnt, evaluations, again)


def _learn(
    bench: Bench,
    key: str,
    examples: Sequence[Example],
    base: ModelRef,
    evaluations: dict[str, list[Example]],
    fresh: Sequence[Example],
    settings: Sequence[str] = CYCLE_SETTINGS,
) -> ModelRef:
    """Train and judge, unless that was done; the draft."""
    name = key.replace("/", "-").replace(" ", "_").replace(",", "")
    if bench.known(key) is None:
        trained = bench.train(name, examples, settings, base)
        cost = {
            "tokens": trained.tokens,
            "cpu_s": round(trained.cpu_seconds),
            "requests": len(fresh),
            "output_tokens": _outputs(fresh),
        }
        judged = {domain: asdict(bench.judge(trained.draft, own)) for domain, own in evaluations.items()}
        bench.keep(key, {**next(iter(judged.values())), **cost} if len(judged) == 1 else {**judged, "cost": cost})
    return directory_ref(FOLDER / "runs" / name / "draft")


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
            objective = (f"distill.objective.{entry}" for entry in settings)
            overrides = (*SHORT_SETTINGS, f"distill.seed={seed}", *objective, *LONGER.get(name, ()))
            _trained_cell(bench, f"ablation/{name}/{seed}", traffic, evaluation, overrides, pruned)


def fine_tuning(bench: Bench, data: Path, general: ModelRef) -> None:
    """Some objectives again, on the same requests, where the draft is good already; three seeds."""
    evaluation, traffic = _small(data)
    if bench.known("fine_tuning/day 0/0") is None:
        bench.keep("fine_tuning/day 0/0", {**asdict(bench.judge(general, evaluation)), "cpu_s": 0})
    for seed in SEEDS:
        for name, (objective, changes) in FINE_TUNING.items():
            chosen = (f"distill.objective.{entry}" for entry in OBJECTIVES[objective])
            overrides = (*CYCLE_SETTINGS, f"distill.seed={seed}", *chosen, *changes)
            _trained_cell(bench, f"fine_tuning/{name}/{seed}", traffic, evaluation, overrides, general)


def quantised(bench: Bench, data: Path, pruned: ModelRef) -> None:
    """Int8 after training against int8 while training, from the same newborn draft, three seeds."""
    evaluation, traffic = _small(data)
    texts = [example.token_ids for example in traffic]
    objective = [f"distill.objective.{entry}" for entry in OBJECTIVES["word_kd"]]
    for seed in SEEDS:
        overrides = (*SHORT_SETTINGS, f"distill.seed={seed}", *objective)
        _trained_cell(bench, f"quantised/float/{seed}", traffic, evaluation, overrides, pruned)
        during = (*overrides, "student.quantise=int8")
        _trained_cell(bench, f"quantised/int8 while training/{seed}", traffic, evaluation, during, pruned)
        key = f"quantised/int8 after training/{seed}"
        if bench.known(key) is None:
            rounded = FOLDER / "runs" / f"quantised-after-{seed}"
            if not rounded.exists():
                quantise_checkpoint(
                    directory_ref(FOLDER / "runs" / f"quantised-float-{seed}" / "draft"), rounded, texts
                )
            bench.keep(key, {**asdict(bench.judge(directory_ref(rounded), evaluation)), "cpu_s": 0})


def learning_rates(bench: Bench, data: Path, general: ModelRef) -> None:
    """One domain learnt by the draft of day 0 at several rates, from few requests and more; judged on two."""
    learnt, other = ABLATION_DOMAINS
    evaluations = {name: load_traffic(data, name, "e", NUM_EVALUATION) for name in (learnt, other)}
    traffic = load_traffic(data, learnt, "t", CYCLE * LONG_CYCLES[-1], skip=SKIP)
    for count in (CYCLE, 4 * CYCLE):
        for rate in LEARNING_RATES:
            settings = (*CYCLE_SETTINGS, f"distill.learning_rate={rate}")
            key = f"learning_rate/{count} requests, {rate:.0e}"
            _learn(bench, key, traffic[:count], general, evaluations, traffic[:count], settings)


def _small(data: Path) -> tuple[list[Example], list[Example]]:
    """Evaluation and training examples of two domains; the latter with what the general draft proposed."""
    evaluation = [example for name in ABLATION_DOMAINS for example in load_traffic(data, name, "e", NUM_EVALUATION)]
    traffic = [
        example
        for name in ABLATION_DOMAINS
        for example in load_traffic(data, name, "t", ABLATION_REQUESTS, skip=SKIP, draft="demo-draft")
    ]
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
        trained = bench.train(key.replace("/", "-").replace(" ", "_").replace(",", ""), traffic, overrides, base)
        judged = asdict(bench.judge(trained.draft, evaluation))
        bench.keep(key, {**judged, "tokens": trained.tokens, "cpu_s": round(trained.cpu_seconds)})


def _outputs(examples: Sequence[Example]) -> int:
    return sum(len(example.output_token_ids) for example in examples)
