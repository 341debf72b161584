"""Divergences: values and gradients against references in numpy float64, and the limits that tie them together."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from redraft.sampling import divergence as d

VOCAB = 7
FloatArray = np.ndarray

# ---- references: plain sums over ids, straight from the definitions


def ref_forward_kl(p: FloatArray, q: FloatArray) -> float:
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def ref_cross_entropy(p: FloatArray, q: FloatArray) -> float:
    return float(-sum(a * np.log(b) for a, b in zip(p, q, strict=True) if a > 0))


def ref_reverse_kl(p: FloatArray, q: FloatArray) -> float:
    outside = float(q[p == 0].sum())
    inside = sum(b * np.log(b / a) for a, b in zip(p, q, strict=True) if a > 0)
    return float(inside + (outside * np.log(outside / 1e-6) if outside > 0 else 0.0))


def ref_jsd(beta: float) -> Callable[[FloatArray, FloatArray], float]:
    def value(p: FloatArray, q: FloatArray) -> float:
        m = beta * p + (1 - beta) * q
        return beta * ref_forward_kl(p, m) + (1 - beta) * ref_forward_kl(q, m)

    return value


def ref_tv(p: FloatArray, q: FloatArray) -> float:
    return float(0.5 * np.abs(p - q).sum())


def ref_neg_log_alpha(p: FloatArray, q: FloatArray) -> float:
    return float(-np.log(1.0 - ref_tv(p, q)))


def ref_lk(p: FloatArray, q: FloatArray) -> float:
    return 0.3 * ref_forward_kl(p, q) + 0.7 * ref_tv(p, q)


Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CASES: dict[str, tuple[Function, Callable[[FloatArray, FloatArray], float]]] = {
    "forward_kl": (d.forward_kl, ref_forward_kl),
    "cross_entropy": (d.cross_entropy, ref_cross_entropy),
    "reverse_kl": (d.reverse_kl, ref_reverse_kl),
    "jsd(0.5)": (lambda p, q: d.jsd(p, q, 0.5), ref_jsd(0.5)),
    "jsd(0.1)": (lambda p, q: d.jsd(p, q, 0.1), ref_jsd(0.1)),
    "tv": (d.total_variation, ref_tv),
    "neg_log_alpha": (d.neg_log_acceptance, ref_neg_log_alpha),
    "lk": (lambda p, q: d.lk(p, q, torch.tensor(0.3, dtype=p.dtype)), ref_lk),
}


def softmax(z: FloatArray) -> FloatArray:
    e = np.exp(z - z.max())
    return np.asarray(e / e.sum())


def targets(kind: str, rng: np.random.Generator) -> FloatArray:
    p = softmax(rng.normal(size=VOCAB) * 1.5)
    if kind == "truncated":
        p[np.argsort(p)[:3]] = 0.0
    if kind == "one_hot":
        p = (np.arange(VOCAB) == 2).astype(np.float64)
    return p / p.sum()


def finite_differences(function: Callable[[FloatArray], float], z: FloatArray) -> FloatArray:
    step = 1e-6
    return np.array([(function(z + step * e) - function(z - step * e)) / (2 * step) for e in np.eye(len(z))])


def tensors(p: FloatArray, z: FloatArray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(p).unsqueeze(0), torch.tensor(z, requires_grad=True)


@pytest.mark.parametrize("kind", ["full", "truncated", "one_hot"])
@pytest.mark.parametrize("name", list(CASES))
def test_value_and_gradient(name: str, kind: str) -> None:
    function, reference = CASES[name]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        p, z = targets(kind, rng), rng.normal(size=VOCAB) * 1.5
        p_tensor, z_tensor = tensors(p, z)
        value = function(p_tensor, z_tensor.log_softmax(0).unsqueeze(0))
        value.sum().backward()
        assert value.shape == (1,)
        assert value.item() == pytest.approx(reference(p, softmax(z)), abs=1e-9)
        assert z_tensor.grad is not None
        expected = finite_differences(lambda at, p=p: reference(p, softmax(at)), z)
        np.testing.assert_allclose(z_tensor.grad.numpy(), expected, atol=1e-7)


@pytest.mark.parametrize("name", list(CASES))
def test_rows_are_independent_and_float32(name: str) -> None:
    function, reference = CASES[name]
    rng = np.random.default_rng(3)
    p = np.stack([targets(kind, rng) for kind in ("full", "truncated", "one_hot")])
    q = np.stack([softmax(rng.normal(size=VOCAB)) for _ in p])
    values = function(torch.tensor(p).float(), torch.tensor(q).float().log())
    assert values.dtype == torch.float32
    assert values.tolist() == pytest.approx([reference(a, b) for a, b in zip(p, q, strict=True)], abs=2e-5)


# ---- what ties them together


def both(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 4, VOCAB, generator=generator, dtype=torch.float64).mul(1.5).softmax(dim=-1)
    return p, q.log()


def test_jsd_limits_are_the_two_kl() -> None:
    p, log_q = both()
    tiny = 1e-6
    torch.testing.assert_close(d.jsd(p, log_q, tiny) / tiny, d.forward_kl(p, log_q), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(d.jsd(p, log_q, 1 - tiny) / tiny, d.reverse_kl(p, log_q), atol=1e-4, rtol=1e-4)


def test_total_variation_is_what_acceptance_lacks() -> None:
    p, log_q = both()
    torch.testing.assert_close(
        d.total_variation(p, log_q) + d.expected_acceptance(p, log_q.exp()), torch.ones(4).double()
    )
    torch.testing.assert_close(d.neg_log_acceptance(p, log_q), -d.expected_acceptance(p, log_q.exp()).log())


def test_pinsker_bounds_the_rejection_rate_by_the_kl() -> None:
    p, log_q = both(1)
    assert bool((d.total_variation(p, log_q) <= (d.forward_kl(p, log_q) / 2).sqrt()).all())


def test_one_hot_targets_give_the_cross_entropy() -> None:
    _, log_q = both()
    ids = torch.tensor([0, 3, 6, 3])
    p = torch.nn.functional.one_hot(ids, VOCAB).double()
    expected = -log_q.gather(1, ids.unsqueeze(1)).squeeze(1)
    for function in (d.forward_kl, d.cross_entropy, d.neg_log_acceptance):
        torch.testing.assert_close(function(p, log_q), expected)


def test_everything_is_zero_where_q_is_p() -> None:
    p, _ = both()
    for name, (function, _) in CASES.items():
        if name != "cross_entropy":
            torch.testing.assert_close(function(p, p.log()), torch.zeros(4).double(), msg=name, atol=1e-12, rtol=0)


def test_lk_weight_moves_from_kl_to_tv_and_is_a_constant() -> None:
    acceptance = torch.tensor([0.0, 0.5, 1.0], requires_grad=True)
    weight = d.lk_kl_weight(acceptance, 3.0)
    assert weight.tolist() == pytest.approx([1.0, np.exp(-1.5), np.exp(-3.0)])
    assert not weight.requires_grad


def test_neg_log_acceptance_learns_where_total_variation_cannot() -> None:
    z = torch.tensor([[400.0, 0.0, 0.0]], requires_grad=True)
    p = torch.tensor([[0.0, 1.0, 0.0]])
    value = d.neg_log_acceptance(p, z.log_softmax(1))
    value.sum().backward()
    assert value.item() == pytest.approx(400.0)
    assert z.grad is not None
    assert z.grad[0].tolist() == pytest.approx([1.0, -1.0, 0.0])


# ---- ids that q cannot reach


@pytest.mark.parametrize("unreachable", [-torch.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("name", list(CASES))
def test_unreachable_ids_leave_value_and_gradient_finite(name: str, unreachable: float) -> None:
    function, _ = CASES[name]
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 1.0, 0.0]])
    z = torch.tensor([[0.4, -0.2, unreachable, 0.1]] * 2, requires_grad=True)
    log_q = z.log_softmax(1)
    value = function(p, log_q)
    value.sum().backward()
    assert z.grad is not None
    assert bool(value.isfinite().all())
    assert bool(z.grad.isfinite().all())
    assert z.grad[:, 2].tolist() == [0.0, 0.0]
    assert d.unreachable_mass(p, log_q).tolist() == pytest.approx([0.2, 1.0])


def test_forward_kl_of_a_reduced_vocabulary_still_weighs_what_is_reachable() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    q = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64)
    expected = 0.5 * np.log(0.5 / 0.6) + 0.3 * np.log(0.3 / 0.4)
    assert d.forward_kl(p, q.log()).item() == pytest.approx(expected)
    assert d.total_variation(p, q.log()).item() == pytest.approx(0.2)


# ---- sparse: m ids and a tail


def gradient(value: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor) -> torch.Tensor:
    leaf = z.clone().requires_grad_()
    (result,) = torch.autograd.grad(value(leaf.log_softmax(0).unsqueeze(0)).sum(), leaf)
    return result


def sparse_forward_kl(p: torch.Tensor, ids: list[int], drawn: int | None, *, log_q: torch.Tensor) -> torch.Tensor:
    """The forward KL as seen through the ids alone, corrected by a draw if there is one."""
    others = [v for v in range(p.shape[1]) if v not in ids]
    tail, log_q_tail = p[:, others].sum(dim=1), log_q[:, others].logsumexp(dim=1)
    value = d.forward_kl(*d.with_tail(p[:, ids], tail, log_q[:, ids], log_q_tail))
    if drawn is None:
        return value
    return value + d.tail_draw(log_q_tail, log_q[:, drawn], torch.tensor([drawn in others]))


def test_one_draw_makes_the_gradient_unbiased() -> None:
    """Exact expectation over the draw, on the whole vocabulary."""
    p, log_q = (row[:1] for row in both(5))
    ids, z = [4, 1, 0], log_q[0]
    full = gradient(lambda q: d.forward_kl(p, q), z)
    draws = [gradient(lambda q, y=y: sparse_forward_kl(p, ids, y, log_q=q), z) for y in range(VOCAB)]
    expected = p[0] @ torch.stack(draws)
    torch.testing.assert_close(expected, full, atol=1e-12, rtol=0)


def test_without_the_draw_the_tail_is_biased_and_less_so_merged_than_dropped() -> None:
    p, log_q = (row[:1] for row in both(5))
    ids, z = [4, 1, 0], log_q[0]
    full = gradient(lambda q: d.forward_kl(p, q), z)
    merged = gradient(lambda q: sparse_forward_kl(p, ids, None, log_q=q), z)
    dropped = gradient(lambda q: d.forward_kl(p[:, ids], q[:, ids]), z)
    torch.testing.assert_close(merged[ids], full[ids], atol=1e-12, rtol=0)  # exact at the ids themselves
    assert 0.01 < float((merged - full).norm()) < float((dropped - full).norm())
    assert float((dropped - full)[ids].norm()) > 0.01


def test_one_draw_with_a_reduced_vocabulary() -> None:
    """q lives on ids 0..4 of 7, the ids are 4 and 6: the expected gradient is that of the full sum over 0..4."""
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(1, VOCAB, generator=generator, dtype=torch.float64).softmax(dim=1)
    z = torch.randn(5, generator=generator, dtype=torch.float64)
    nowhere = torch.full((1, 2), -torch.inf, dtype=torch.float64)
    ids, others = [4, 6], [0, 1, 2, 3, 5]

    def sparse(log_q: torch.Tensor, drawn: int) -> torch.Tensor:
        log_q = torch.cat([log_q, nowhere], dim=1)
        tail, log_q_tail = p[:, others].sum(dim=1), log_q[:, others].logsumexp(dim=1)
        value = d.forward_kl(*d.with_tail(p[:, ids], tail, log_q[:, ids], log_q_tail))
        return value + d.tail_draw_alone(tail, log_q_tail, log_q[:, drawn], torch.tensor([drawn in (0, 1, 2, 3)]))

    full = gradient(lambda q: d.forward_kl(p, torch.cat([q, nowhere], dim=1)), z)
    draws = [gradient(lambda q, y=y: sparse(q, y), z) for y in range(VOCAB)]
    expected = p[0] @ torch.stack(draws)
    torch.testing.assert_close(expected, full, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("cross_entropy", "lk")])
def test_merging_the_tail_never_overstates_a_divergence(name: str) -> None:
    function, _ = CASES[name]
    p, log_q = both(7)
    ids = [2, 5, 3]
    merged = function(*d.with_tail(p[:, ids], 1.0 - p[:, ids].sum(dim=1), log_q[:, ids]))
    assert bool((merged <= function(p, log_q) + 1e-12).all())


def test_acceptance_is_bracketed_by_what_the_tail_may_hold() -> None:
    p, log_q = both(8)
    q, ids = log_q.exp(), [0, 1, 6]
    truth = d.expected_acceptance(p, q)
    low = d.expected_acceptance(p[:, ids], q[:, ids])
    atoms, log_atoms = d.with_tail(p[:, ids], 1.0 - p[:, ids].sum(dim=1), log_q[:, ids])
    high = d.expected_acceptance(atoms, log_atoms.exp())
    assert bool(((low < truth) & (truth <= high)).all())
    slack = torch.minimum(1.0 - p[:, ids].sum(dim=1), 1.0 - q[:, ids].sum(dim=1))
    torch.testing.assert_close(high - low, slack)


@pytest.mark.parametrize("name", list(CASES))
def test_ids_of_probability_zero_may_be_left_to_the_tail(name: str) -> None:
    """A target cut by top-k is the same whether its zeros are listed or not."""
    function, _ = CASES[name]
    p, log_q = both(9)
    ids = [1, 2, 4]
    cut = torch.zeros_like(p)
    cut[:, ids] = p[:, ids] / p[:, ids].sum(dim=1, keepdim=True)
    sparse = function(*d.with_tail(cut[:, ids], torch.zeros(4).double(), log_q[:, ids]))
    torch.testing.assert_close(sparse, function(cut, log_q))


# ---- the table in the docs


def test_docs_example() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, 0.8, 0.1]])
    kl_weight = d.lk_kl_weight(d.expected_acceptance(p, q).mean(), 3.0)
    functions: dict[str, Function] = {
        "forward_kl": d.forward_kl,
        "cross_entropy": d.cross_entropy,
        "reverse_kl": d.reverse_kl,
        "jsd": lambda p, log_q: d.jsd(p, log_q, 0.5),
        "tv": d.total_variation,
        "neg_log_alpha": d.neg_log_acceptance,
        "lk": lambda p, log_q: d.lk(p, log_q, kl_weight),
    }
    page = (Path(__file__).parents[3] / "docs" / "distillation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([\d.]+) \| \(([^)]+)\) \|$", page, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(functions)
    for name, value, entries in rows:
        z = q.log().requires_grad_()
        computed = functions[name](p, z.log_softmax(1))
        (slope,) = torch.autograd.grad(computed.sum(), z)
        assert f"{computed.item():.3f}" == value, name
        assert ", ".join(f"{entry:.3f}" for entry in slope[0].tolist()) == entries, name
