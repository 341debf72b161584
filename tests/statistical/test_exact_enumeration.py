"""Losslessness by enumeration: no sampling, no luck.

The coupling functions are deterministic given their uniforms, and piecewise constant in each of them. So the law of
what they emit can be computed exactly: run the *implementation* once in the middle of every piece and weigh the result
by the piece's volume. All rows are produced by small random tables whose entry depends on the whole context, so a rule
that is right only for independent positions would fail.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from redraft.sampling.coupling import DraftedTokens, Layout, accept_choice, accept_maximal, draw, race

TOLERANCE = 1e-6
Law = dict[tuple[int, ...], float]


@dataclass(frozen=True)
class Table:
    """A distribution for every context of at most `depth` tokens, rows float32 as in production."""

    vocab_size: int
    rows: dict[tuple[int, ...], np.ndarray]

    def __getitem__(self, context: Sequence[int]) -> np.ndarray:
        return self.rows[tuple(context)]


def contexts(vocab_size: int, depth: int) -> list[tuple[int, ...]]:
    return [c for n in range(depth + 1) for c in itertools.product(range(vocab_size), repeat=n)]


def random_table(vocab_size: int, depth: int, rng: np.random.Generator, *, sparsity: float = 0.0) -> Table:
    """Dirichlet rows; with `sparsity` that share of the entries is exactly 0 (never a whole row)."""
    rows = {}
    for context in contexts(vocab_size, depth):
        row = rng.dirichlet(np.full(vocab_size, 0.7))
        dropped = rng.random(vocab_size) < sparsity
        dropped[rng.integers(vocab_size)] = False
        row = np.where(dropped, 0.0, row + 1e-4)
        rows[context] = (row / row.sum()).astype(np.float32)
    return Table(vocab_size, rows)


def one_hot_table(vocab_size: int, depth: int, rng: np.random.Generator) -> Table:
    eye = np.eye(vocab_size, dtype=np.float32)
    return Table(vocab_size, {c: eye[rng.integers(vocab_size)] for c in contexts(vocab_size, depth)})


def disjoint_tables(vocab_size: int, depth: int, rng: np.random.Generator) -> tuple[Table, Table]:
    """Target and draft never agree on a possible token."""
    target, draft = random_table(vocab_size, depth, rng), random_table(vocab_size, depth, rng)
    for context in contexts(vocab_size, depth):
        mine = rng.permutation(vocab_size) < vocab_size // 2
        for table, kept in ((target, mine), (draft, ~mine)):
            row = np.where(kept, table.rows[context], 0.0)
            table.rows[context] = (row / row.sum()).astype(np.float32)
    return target, draft


def pieces(breakpoints: Sequence[float]) -> list[tuple[float, float]]:
    """(middle, length) of the intervals that the breakpoints cut (0, 1) into."""
    edges = [0.0, *sorted({float(b) for b in breakpoints if 0.0 < b < 1.0}), 1.0]
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise(edges)]


def cdf(row: np.ndarray) -> list[float]:
    values = np.maximum(row.astype(np.float64), 0.0)
    total = values.sum()
    return list(np.cumsum(values) / total) if total > 0 else []


def target_law(target: Table, length: int) -> Law:
    """The law of `length` tokens drawn from the target itself."""
    law: Law = {}
    for path in itertools.product(range(target.vocab_size), repeat=length):
        weight = 1.0
        for depth, token in enumerate(path):
            weight *= float(target[path[:depth]][token])
        law[path] = weight
    return law


def extend(law: Law, target: Table, length: int) -> Law:
    """Complete shorter emissions by the target's own draws, as later steps would."""
    result: Law = defaultdict(float)
    for emitted, weight in law.items():
        for rest in itertools.product(range(target.vocab_size), repeat=length - len(emitted)):
            path, share = (*emitted, *rest), weight
            for depth in range(len(emitted), length):
                share *= float(target[path[:depth]][path[depth]])
            result[path] += share
    return result


def assert_same(left: Law, right: Law) -> None:
    for outcome in set(left) | set(right):
        assert left.get(outcome, 0.0) == pytest.approx(right.get(outcome, 0.0), abs=TOLERANCE), outcome


def drafted_tokens(draft: Table, path: Sequence[int], certain: Sequence[bool]) -> DraftedTokens:
    spread = [draft[path[:j]] for j in range(len(path)) if not certain[j]]
    numbers = itertools.count()
    return DraftedTokens(
        torch.tensor(path, dtype=torch.int64),
        torch.tensor([-1 if c else next(numbers) for c in certain], dtype=torch.int64),
        torch.tensor(np.array(spread)) if spread else torch.empty(0, draft.vocab_size),
    )


def maximal_law_given_path(target: Table, draft: Table, path: Sequence[int], certain: Sequence[bool]) -> Law:
    """Law of the emitted tokens given the drafted ones, integrating every uniform exactly.

    Only the pieces of the uniforms that can matter are multiplied out: those of all tests, times those of the one
    recover-uniform that the verdict reads. The pieces of the latter come from the former's verdict; that the
    verdict reads no other is asserted, not assumed.
    """
    k = len(path)
    p = torch.tensor(np.array([target[path[:j]] for j in range(k + 1)]))
    drafted = drafted_tokens(draft, path, certain)
    layout = Layout.of([k])
    ratios = [float(target[path[:j]][path[j]]) / float(draft[path[:j]][path[j]]) for j in range(k)]
    law: Law = defaultdict(float)
    for tests in itertools.product(*(pieces([ratio]) for ratio in ratios)):
        accept = torch.tensor([middle for middle, _ in tests], dtype=torch.float64)
        weight = float(np.prod([length for _, length in tests]))
        verdict = accept_maximal(p, drafted, layout, accept, torch.full((k + 1,), 0.5, dtype=torch.float64))
        count = verdict.num_accepted[0]
        row = target[path[:count]].astype(np.float32)
        if count < k:
            rest = np.maximum(row - draft[path[:count]], 0.0)
            row = rest if rest.sum() > 0 else row
        for middle, length in pieces(cdf(row)):
            recover = torch.full((k + 1,), 0.999, dtype=torch.float64)
            recover[count] = middle
            final = accept_maximal(p, drafted, layout, accept, recover)
            assert final.num_accepted[0] == count
            law[(*path[:count], final.final_token[0])] += weight * length
    return law


def emitted_law(target: Table, draft: Table, k: int, certain: Sequence[bool]) -> Law:
    """Sum over all draft paths, weighted by the draft's probability of the path."""
    law: Law = defaultdict(float)
    for path in itertools.product(range(draft.vocab_size), repeat=k):
        weight = 1.0
        for depth, token in enumerate(path):
            weight *= float(draft[path[:depth]][token])
        if weight == 0.0:
            continue
        for emitted, share in maximal_law_given_path(target, draft, path, certain).items():
            law[emitted] += weight * share
    return law


CASES = ("random", "sparse", "equal", "disjoint", "one_hot_draft", "one_hot_target", "nearly_equal")


def tables(case: str, vocab_size: int, k: int) -> tuple[Table, Table, list[bool]]:
    """Target rows for k + 1 positions, draft rows for k, and which draft tokens are proposed with certainty."""
    rng = np.random.default_rng([CASES.index(case), vocab_size, k])
    target, draft, certain = random_table(vocab_size, k, rng), random_table(vocab_size, k, rng), [False] * k
    if case == "sparse":
        target, draft = (random_table(vocab_size, k, rng, sparsity=0.5) for _ in range(2))
    elif case == "equal":
        draft = target
    elif case == "disjoint":
        target, draft = disjoint_tables(vocab_size, k, rng)
    elif case == "one_hot_draft":
        draft, certain = one_hot_table(vocab_size, k, rng), [True] * k
    elif case == "one_hot_target":
        target = one_hot_table(vocab_size, k, rng)
    elif case == "nearly_equal":
        noise = {c: row * (1 + 1e-6 * rng.standard_normal(vocab_size)) for c, row in target.rows.items()}
        draft = Table(vocab_size, {c: (r / r.sum()).astype(np.float32) for c, r in noise.items()})
    return target, draft, certain


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("vocab_size", "k"), [(2, 1), (2, 3), (3, 2), (4, 2), (5, 1), (3, 3)])
def test_emitted_tokens_follow_the_target(case: str, vocab_size: int, k: int) -> None:
    target, draft, certain = tables(case, vocab_size, k)
    law = emitted_law(target, draft, k, certain)
    first: Law = defaultdict(float)
    for emitted, weight in law.items():
        first[emitted[:1]] += weight
    assert_same(first, target_law(target, 1))
    assert_same(extend(law, target, k + 1), target_law(target, k + 1))


def test_a_wrong_rule_would_be_noticed() -> None:
    """The same sum with q of another table than the tokens were drawn from is off by far more than the tolerance."""
    target, draft, certain = tables("random", 3, 2)
    stale = random_table(3, 2, np.random.default_rng(99))
    law: Law = defaultdict(float)
    for path in itertools.product(range(3), repeat=2):
        weight = float(draft[()][path[0]]) * float(draft[path[:1]][path[1]])
        for emitted, share in maximal_law_given_path(target, stale, path, certain).items():
            law[emitted] += weight * share
    wrong, right = extend(law, target, 3), target_law(target, 3)
    assert max(abs(wrong[path] - right[path]) for path in right) > 1e-2


def test_certain_and_spread_tokens_mix_in_one_sequence() -> None:
    """First token by lookup, second by a model: q rows and certain tokens interleave."""
    rng = np.random.default_rng(5)
    target, spread, sure = random_table(3, 3, rng), random_table(3, 3, rng), one_hot_table(3, 3, rng)
    rows = {c: (sure if len(c) != 1 else spread)[c] for c in contexts(3, 3)}
    law = emitted_law(target, Table(3, rows), 3, [True, False, True])
    assert_same(extend(law, target, 4), target_law(target, 4))


def test_sequences_of_a_batch_do_not_touch_each_other() -> None:
    """Several sequences, k 2, 0, 3 and 1 of different kinds, give the verdicts they give alone."""
    rng = np.random.default_rng(8)
    kinds = [("random", 2), ("random", 0), ("one_hot_draft", 3), ("sparse", 1)]
    built = [tables(case, 4, max(k, 1)) for case, k in kinds]
    for _ in range(200):
        target_rows, own, alone = [], [], []
        accept = torch.tensor(rng.random(6))
        recover = torch.tensor(rng.random(10))
        layout = Layout.of([k for _, k in kinds])
        first_draft = 0
        for number, ((_, k), (target, draft, certain)) in enumerate(zip(kinds, built, strict=True)):
            path: list[int] = []
            for _ in range(k):
                row = draft[path].astype(np.float64)
                path.append(int(rng.choice(4, p=row / row.sum())))
            rows = torch.tensor(np.array([target[path[:j]] for j in range(k + 1)]))
            drafted = drafted_tokens(draft, path, certain[:k])
            start = int(layout.first_row[number])
            uniforms = (accept[first_draft : first_draft + k], recover[start : start + k + 1])
            alone.append(accept_maximal(rows, drafted, Layout.of([k]), *uniforms))
            target_rows.append(rows)
            own.append(drafted)
            first_draft += k
        offsets = np.cumsum([0, *(len(d.probs) for d in own)])
        together = DraftedTokens(
            torch.cat([d.token_ids for d in own]),
            torch.cat(
                [torch.where(d.prob_row < 0, -1, d.prob_row + int(o)) for d, o in zip(own, offsets, strict=False)]
            ),
            torch.cat([d.probs for d in own]),
        )
        verdict = accept_maximal(torch.cat(target_rows), together, layout, accept, recover)
        assert list(verdict.num_accepted) == [v.num_accepted[0] for v in alone]
        assert list(verdict.final_token) == [v.final_token[0] for v in alone]


def test_invariant_emission_never_depends_on_the_draft() -> None:
    rng = np.random.default_rng(3)
    vocab_size, k = 4, 3
    target = random_table(vocab_size, k, rng, sparsity=0.3)
    for _ in range(20):
        noise = torch.tensor(rng.exponential(size=(k + 1, vocab_size)), dtype=torch.float32)
        chosen: list[int] = []  # what plain decoding emits under this noise
        for j in range(k + 1):
            chosen.append(int(race(torch.tensor(target[chosen])[None], noise[j : j + 1])))
        for path in itertools.product(range(vocab_size), repeat=k):
            rows = torch.tensor(np.array([target[path[:j]] for j in range(k + 1)]))
            verdict = accept_choice(race(rows, noise).tolist(), [path])
            count = verdict.num_accepted[0]
            emitted = [*path[:count], verdict.final_token[0]]
            assert emitted == chosen[: count + 1]
            assert count == next((j for j in range(k) if path[j] != chosen[j]), k)


def test_invariant_sequences_of_a_batch_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(4)
    layout = Layout.of([2, 0, 3])
    for _ in range(50):
        rows = torch.tensor(rng.dirichlet(np.ones(4), size=layout.num_rows), dtype=torch.float32)
        noise = torch.tensor(rng.exponential(size=(layout.num_rows, 4)), dtype=torch.float32)
        choice = race(rows, noise)
        tokens = torch.where(torch.tensor(rng.random(5)) < 0.7, choice[layout.draft_rows], torch.tensor(0))
        drafts = [part.tolist() for part in tokens.split(layout.num_drafts)]
        verdict = accept_choice(race(rows, noise).tolist(), drafts)
        first_draft = 0
        for number, k in enumerate(layout.num_drafts):
            start, own = int(layout.first_row[number]), tokens[first_draft : first_draft + k]
            agreed = [int(own[j]) == int(choice[start + j]) for j in range(k)]
            count = agreed.index(False) if False in agreed else k
            assert int(verdict.num_accepted[number]) == count
            assert int(verdict.final_token[number]) == int(choice[start + count])
            first_draft += k


@pytest.mark.parametrize("row", [[0.5, 0.3, 0.2], [0.9, 0.1, 0.0], [0.25, 0.0, 0.25, 0.5], [0.999, 5e-4, 5e-4]])
def test_race_follows_the_distribution(row: list[float]) -> None:
    """Given the others' best time m = min E_u / p_u, token v wins while E_v is below a threshold.

    The threshold t(m) is found in the implementation by bisection; P(E_v > t) = exp(-t) is exact, and m, which is
    exponential with rate 1 - p_v, is integrated by Gauss-Laguerre.
    """
    probs = torch.tensor([row], dtype=torch.float32)
    nodes, weights = np.polynomial.laguerre.laggauss(20)
    for token, p in enumerate(row):
        others = [v for v in range(len(row)) if v != token and row[v] > 0]
        rate = sum(row[v] for v in others)
        loses = 0.0
        for best, weight in zip(nodes, weights, strict=True):
            noise = torch.full((1, len(row)), 1e30)
            noise[0, others[0]] = best * row[others[0]]
            low, high = 0.0, float(best) + 1.0
            for _ in range(40):
                middle = (low + high) / 2
                noise[0, token] = max(middle, 1e-30)
                low, high = (middle, high) if int(race(probs, noise)) == token else (low, middle)
            loses += weight * rate * np.exp(best - rate * best - low)
        assert 1.0 - loses == pytest.approx(p, abs=TOLERANCE)


@pytest.mark.parametrize(
    "row",
    [[0.2, 0.5, 0.3], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.4, 0.0, 0.6, 0.0], [2.0, 1.0, 5.0], [1e-7, 1.0, 1e-7]],
)
def test_draw_inverts_the_cdf(row: list[float]) -> None:
    """Normalised or not, with zeros anywhere: every piece of the uniform maps to one token, of the right length."""
    probs = torch.tensor([row], dtype=torch.float32)
    law: dict[int, float] = defaultdict(float)
    for middle, length in pieces(cdf(np.array(row, dtype=np.float32))):
        law[int(draw(probs, torch.tensor([middle])))] += length
    for token, p in enumerate(row):
        assert law[token] == pytest.approx(p / sum(row), abs=1e-9 if p == 0 else TOLERANCE)


def test_draw_never_returns_an_impossible_token_at_the_edges() -> None:
    row = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]])
    for u in (2.0**-54, 1.0 - 2.0**-53, 1.0, float(np.float32(0.3))):
        assert int(draw(row, torch.tensor([u], dtype=torch.float64))) in (1, 3)
