"""Text from a model: what each prompt gets, when it ends, and what is labelled."""

from __future__ import annotations

import pytest
import torch

from redraft.models.runner import ModelRunner
from redraft.sampling.params import SamplingParams
from redraft_training.dataset.errors import DatasetError
from redraft_training.dataset.generate import generate, mixed_runner
from tests.fakes import tiny_model
from tests.reference_decoding import plain_decode, plain_logits

VOCAB = 40
GREEDY = SamplingParams(temperature=0.0)
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12], [4, 4], [13, 3], [20, 21, 22, 23]]


def runner(seed: int = 0, num_blocks: int = 64) -> ModelRunner:
    model = tiny_model("llama", vocab_size=VOCAB, seed=seed)
    return ModelRunner(model, num_blocks=num_blocks, block_size=4, vocab_size=VOCAB)


def test_greedy_text_is_that_of_transformers() -> None:
    made = generate(runner(), PROMPTS, GREEDY, max_new_tokens=12, max_running=4)
    model = tiny_model("llama", vocab_size=VOCAB)
    assert [list(one.token_ids) for one in made] == [plain_decode(model, prompt, GREEDY, 12) for prompt in PROMPTS]
    assert not any(one.ended or one.failed for one in made)


def test_what_a_prompt_gets_does_not_depend_on_its_neighbours_or_on_memory() -> None:
    params = [SamplingParams(temperature=1.2, top_p=0.9), SamplingParams(temperature=0.7)] * 3
    together = generate(runner(), PROMPTS, params, max_new_tokens=10, seed=5)
    # room for one or two sequences at a time
    assert generate(runner(num_blocks=6), PROMPTS, params, max_new_tokens=10, seed=5) == together
    assert generate(runner(), PROMPTS, params, max_new_tokens=10, seed=5, max_running=1) == together
    assert generate(runner(), PROMPTS, params, max_new_tokens=10, seed=6) != together
    assert generate(runner(), PROMPTS[:3], params[:3], max_new_tokens=10, seed=5) == together[:3]


def test_an_end_token_ends_it_and_is_kept() -> None:
    plain = generate(runner(), PROMPTS, GREEDY, max_new_tokens=12)
    end = plain[0].token_ids[4]
    ended = generate(runner(), PROMPTS, GREEDY, max_new_tokens=12, end_token_ids=[end])
    for before, after in zip(plain, ended, strict=True):
        length = before.token_ids.index(end) + 1 if end in before.token_ids else 12
        assert after.token_ids == before.token_ids[:length]
        assert after.ended is (end in before.token_ids)


def test_labels_are_the_models_own_predictions() -> None:
    params = SamplingParams(temperature=0.8, repetition_penalty=1.3)
    progress: list[int] = []
    made = generate(runner(), PROMPTS, params, max_new_tokens=6, label_top_n=5, on_done=progress.append)
    model = tiny_model("llama", vocab_size=VOCAB)
    for prompt, one in zip(PROMPTS, made, strict=True):
        logits = plain_logits(model, [*prompt, *one.token_ids[:-1]])[len(prompt) - 1 :]
        assert len(one.labels) == len(one.token_ids) == 6
        for row, label in zip(logits, one.labels, strict=True):
            torch.testing.assert_close(torch.tensor(label.logits), row.topk(5).values, atol=1e-4, rtol=0)
            assert label.logsumexp == pytest.approx(float(row.logsumexp(0)), abs=1e-4)
            assert label.sampling_logsumexp != pytest.approx(label.logsumexp, abs=1e-3)
    assert progress == [1, 2, 3, 4, 5, 6]


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    for prompts in ([[1], []], [[1], list(range(30))]):
        with pytest.raises(DatasetError, match="KV memory"):
            generate(runner(num_blocks=8), prompts, GREEDY, max_new_tokens=8)


@pytest.mark.parametrize(("share", "seed"), [(1.0, 0), (0.0, 1)])
def test_a_mixture_with_nothing_of_one_is_the_other(share: float, seed: int) -> None:
    params = SamplingParams(temperature=0.9)
    mixed = generate(mixed_runner(runner(0), runner(1), share), PROMPTS, params, max_new_tokens=8)
    assert mixed == generate(runner(seed), PROMPTS, params, max_new_tokens=8)


def test_a_mixture_draws_from_both() -> None:
    prompt, share, count = [3, 4, 5], 0.3, 1500
    made = generate(
        mixed_runner(runner(0), runner(1), share), [prompt] * count, SamplingParams(), max_new_tokens=1, max_running=64
    )
    p, q = (plain_logits(tiny_model("llama", vocab_size=VOCAB, seed=s), prompt)[-1].softmax(0) for s in (0, 1))
    expected = (share * p + (1 - share) * q) * count
    counts = torch.zeros(VOCAB)
    for one in made:
        counts[one.token_ids[0]] += 1
    assert bool(((counts - expected).abs() < 4.5 * expected.sqrt() + 2).all())
    assert all(float((counts / count - alone).abs().sum()) > 0.2 for alone in (p, q)), "too alike to tell"


def test_mixed_runners_must_match() -> None:
    other = ModelRunner(tiny_model("llama", vocab_size=VOCAB), num_blocks=4, block_size=8, vocab_size=VOCAB)
    with pytest.raises(DatasetError, match="block size"):
        mixed_runner(runner(), other, 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        mixed_runner(runner(), runner(), 1.5)
