"""`speculative_step` against plain transformers forwards: same tokens, same scores, same teacher rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch

from redraft.models.runner import Chunk, ModelRunner
from redraft.sampling.params import Coupling, SamplingParams
from redraft.sampling.processors import probabilities
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.fallback import FallbackProposer
from redraft.speculation.ngram import NgramProposer
from redraft.speculation.proposer import Proposal, Proposer, SequenceProposal
from redraft.speculation.state import SequenceState
from redraft.speculation.step import StepOutput, Work, speculative_step
from tests.fakes import ARCHITECTURES, tiny_model
from tests.reference_decoding import (
    decode_all,
    make_runner,
    make_states,
    plain_decode,
    plain_logits,
    step,
)

VOCAB = 32
NUM_TOKENS = 20
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [5], [10, 11, 12, 10, 11, 12, 10], [4, 9] * 10]
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1, temperature=0.9, top_p=0.95),
    SamplingParams(temperature=0.0, repetition_penalty=1.3),
    SamplingParams(seed=2, temperature=1.2, top_k=12, presence_penalty=0.6, frequency_penalty=0.3),
]


def drafting(arch: str, seed: int) -> DraftModelProposer:
    runner = make_runner(tiny_model(arch, vocab_size=VOCAB, seed=seed))
    return DraftModelProposer(runner, version=f"d{seed}", max_catch_up=16)


def lookup() -> NgramProposer:
    return NgramProposer(min_match=1, max_match=3)


PROPOSERS: dict[str, Callable[[str], Proposer | None]] = {
    "none": lambda arch: None,
    "ngram": lambda arch: lookup(),
    "draft": lambda arch: drafting(arch, 11),
    "self": lambda arch: drafting(arch, 0),
    "ngram+draft": lambda arch: FallbackProposer([lookup(), drafting(arch, 11)]),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    """Plain decoding of every prompt, by architecture, filled on demand."""
    return {}


def plain_texts(arch: str, known: dict[str, list[list[int]]]) -> list[list[int]]:
    if arch not in known:
        model = tiny_model(arch, vocab_size=VOCAB, seed=0)
        known[arch] = [
            plain_decode(model, prompt, params, NUM_TOKENS, key=1000 + index, min_new_tokens=4, end_token_ids=(0, 5))
            for index, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
        ]
    return known[arch]


def assert_text_is_plain(
    arch: str, proposer: str, k: int, known: dict[str, list[list[int]]], *, chunk: int = 64
) -> None:
    states = make_states(PROMPTS, PARAMS, min_new_tokens=4, end_token_ids=(0, 5))
    target = make_runner(tiny_model(arch, vocab_size=VOCAB, seed=0))
    outputs = decode_all(states, target, PROPOSERS[proposer](arch), k, NUM_TOKENS, chunk=chunk)
    assert [state.token_ids[state.num_prompt_tokens :] for state in states] == plain_texts(arch, known)
    for own in outputs:
        for output in own:
            assert len(output.emitted) == output.num_accepted + bool(output.emitted)
            assert len(output.proposal.token_ids) <= k
            if proposer == "self":
                assert output.num_accepted == len(output.proposal.token_ids)
            if proposer == "none":
                assert output.proposal.token_ids == ()
    if proposer != "none":
        assert any(output.num_accepted for own in outputs for output in own), "nothing was ever accepted"


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("proposer", list(PROPOSERS))
def test_greedy_and_seeded_text_is_plain_text(proposer: str, k: int, expected: dict[str, list[list[int]]]) -> None:
    """Greedy, penalised and seeded sequences in one batch, with tokens banned at the start."""
    assert_text_is_plain("llama", proposer, k, expected)


@pytest.mark.parametrize("proposer", ["none", "ngram+draft"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch: str, proposer: str, expected: dict[str, list[list[int]]]) -> None:
    assert_text_is_plain(arch, proposer, 3, expected)


@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_chunked_prefill_changes_nothing(chunk: int, expected: dict[str, list[list[int]]]) -> None:
    assert_text_is_plain("gemma3", "draft", 3, expected, chunk=chunk)


@dataclass
class Fixed:
    """Proposes the given tokens once, with a q that has nothing to do with them (uniform)."""

    tokens: dict[int, tuple[int, ...]]  # by the state's key
    name: str = "fixed"
    settled: list[tuple[int, int]] = field(default_factory=list)

    def propose(self, states: Sequence[SequenceState], limits: Sequence[int]) -> Proposal:
        sequences, rows = [], 0
        for state, limit in zip(states, limits, strict=True):
            own = self.tokens.get(state.key, ())[:limit]
            sequences.append(SequenceProposal(own, tuple(range(rows, rows + len(own))), self.name, "v1"))
            rows += len(own)
        return Proposal(tuple(sequences), torch.full((rows, VOCAB), 1 / VOCAB))

    def settle(self, state: SequenceState, num_accepted: int, proposal: SequenceProposal) -> None:
        self.settled.append((state.key, num_accepted))


def verified_once(
    params: Sequence[SamplingParams], drafts: dict[int, tuple[int, ...]], **options: int
) -> tuple[list[SequenceState], tuple[StepOutput, ...], Fixed]:
    """All prompts through one step that prefills and verifies `drafts` at once."""
    proposer = Fixed(drafts)
    states = make_states(PROMPTS, params)
    result = step(states, make_runner(tiny_model("llama", vocab_size=VOCAB)), proposer, 4, **options)
    return states, result.outputs, proposer


def greedy_drafts() -> dict[int, tuple[int, ...]]:
    """Two right tokens and two wrong ones; all wrong; none; all right."""
    model, params = tiny_model("llama", vocab_size=VOCAB), SamplingParams(temperature=0.0)
    right = [tuple(plain_decode(model, prompt, params, 4)) for prompt in PROMPTS]
    wrong = [tuple((t + 1) % VOCAB for t in tokens) for tokens in right]
    return {1000: right[0][:2] + wrong[0][2:], 1001: wrong[1], 1003: right[3]}


def test_verdicts_move_the_state() -> None:
    states, outputs, proposer = verified_once([SamplingParams(temperature=0.0)] * 4, greedy_drafts())
    assert [output.num_accepted for output in outputs] == [2, 0, 0, 4]
    assert proposer.settled == [(1000, 2), (1001, 0), (1003, 4)]
    for state, output, prompt in zip(states, outputs, PROMPTS, strict=True):
        assert state.token_ids == [*prompt, *output.emitted]
        assert state.num_computed == len(state.token_ids) - 1


def test_scores_of_emitted_tokens() -> None:
    """log_softmax of the raw logits, whatever the sampling parameters; rank and alternatives too."""
    model = tiny_model("llama", vocab_size=VOCAB)
    params = [SamplingParams(temperature=0.0, logit_bias=((7, 100.0),)), PARAMS[1], PARAMS[2], PARAMS[3]]
    for num_top in (0, 3, VOCAB + 5):
        states, outputs, _ = verified_once(params, greedy_drafts(), logprobs=num_top)
        for state, output in zip(states, outputs, strict=True):
            assert [entry.token_id for entry in output.logprobs] == list(output.emitted)
            logits = plain_logits(model, state.token_ids)[state.num_prompt_tokens - 1 : -1]
            plain = torch.log_softmax(logits, dim=1)
            for row, entry in zip(plain, output.logprobs, strict=True):
                assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
                assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
                best = row.topk(min(num_top, VOCAB))
                assert [token for token, _ in entry.top] == best.indices.tolist()
                assert [score for _, score in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_without_the_wish_there_are_no_scores() -> None:
    _, outputs, _ = verified_once(PARAMS, greedy_drafts())
    assert all(not o.logprobs and not o.prompt_logprobs and not o.teacher for o in outputs)


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
@pytest.mark.parametrize("speculates", [False, True])
def test_scores_of_the_prompt(chunk: int, speculates: bool) -> None:
    """Every prompt token but the first, once, in order, however the prefill is cut; also beside drafted tokens."""
    model = tiny_model("llama", vocab_size=VOCAB)
    states = make_states(PROMPTS, [SamplingParams(temperature=0.0)] * 4)
    target = make_runner(tiny_model("llama", vocab_size=VOCAB))
    proposer = Fixed(greedy_drafts()) if speculates else None
    outputs = decode_all(states, target, proposer, 4, 6, chunk=chunk, prompt_logprobs=2)
    for own, prompt, state in zip(outputs, PROMPTS, states, strict=True):
        scores = [entry for output in own for entry in output.prompt_logprobs]
        assert [entry.token_id for entry in scores] == prompt[1:]
        plain = torch.log_softmax(plain_logits(model, prompt), dim=1)[:-1]
        for row, entry in zip(plain, scores, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()
        assert state.token_ids[len(prompt) :] == plain_decode(model, prompt, state.params, 6)


def test_teacher_rows_cover_accepted_and_rejected_positions() -> None:
    """One row before the first drafted token and one after each, conditioned on the drafted tokens."""
    model, drafts = tiny_model("llama", vocab_size=VOCAB), greedy_drafts()
    states, outputs, _ = verified_once(
        [SamplingParams(temperature=0.0, logit_bias=((3, 9.0),))] * 4, drafts, teacher_top_n=5
    )
    for state, output, prompt in zip(states, outputs, PROMPTS, strict=True):
        drafted = drafts.get(state.key, ())
        assert output.proposal.token_ids == drafted
        plain = plain_logits(model, [*prompt, *drafted])[len(prompt) - 1 :]
        assert len(output.teacher) == len(plain) == len(drafted) + 1
        for row, logits in zip(output.teacher, plain, strict=True):
            best = logits.topk(5)
            assert list(row.ids) == best.indices.tolist()
            assert list(row.logits) == pytest.approx(best.values.tolist(), abs=1e-4)
            assert row.logsumexp == pytest.approx(float(logits.logsumexp(0)), abs=1e-4)


@pytest.mark.parametrize("certain", [False, True])
def test_expected_acceptance_is_the_overlap(certain: bool) -> None:
    """Sum of min(p, q) at each position whose token was tested; p after the sampling parameters."""
    model, drafts = tiny_model("llama", vocab_size=VOCAB), greedy_drafts()
    params = [SamplingParams(temperature=0.9, top_p=0.9, seed=i, coupling=Coupling.MAXIMAL) for i in range(4)]
    proposer = Fixed(drafts)
    if certain:
        original = proposer.propose

        def all_certain(states: Sequence[SequenceState], limits: Sequence[int]) -> Proposal:
            proposal = original(states, limits)
            sure = tuple(
                SequenceProposal(s.token_ids, (-1,) * len(s.token_ids), s.proposer, s.draft_version)
                for s in proposal.sequences
            )
            return Proposal(sure, torch.empty(0, VOCAB))

        proposer.propose = all_certain  # type: ignore[method-assign]
    states = make_states(PROMPTS, params)
    before = [list(state.token_ids) for state in states]
    result = step(states, make_runner(tiny_model("llama", vocab_size=VOCAB)), proposer, 4)
    for state, output, prompt in zip(states, result.outputs, before, strict=True):
        drafted = drafts.get(state.key, ())
        assert len(output.expected_acceptance) == min(output.num_accepted + 1, len(drafted))
        logits = plain_logits(model, [*prompt, *drafted])[len(prompt) - 1 :]
        p = probabilities(logits, [state.sampling_row()] * len(logits))
        for j, value in enumerate(output.expected_acceptance):
            q = torch.full((VOCAB,), 1 / VOCAB)
            if certain:
                q = torch.nn.functional.one_hot(torch.tensor(drafted[j]), VOCAB).float()
            assert value == pytest.approx(float(torch.minimum(p[j], q).sum()), abs=1e-4)


def test_a_chunk_that_ends_inside_the_prompt_emits_nothing() -> None:
    states = make_states([[3, 4, 5, 6, 7]], [SamplingParams(temperature=0.0)])
    target = make_runner(tiny_model("llama", vocab_size=VOCAB))
    output = speculative_step([Work(states[0], 3)], target, lookup()).outputs[0]
    assert output == StepOutput()
    assert states[0].num_computed == 3
    assert states[0].token_ids == [3, 4, 5, 6, 7]


def test_counts_of_target_tokens() -> None:
    proposer = Fixed(greedy_drafts())
    states = make_states(PROMPTS, [SamplingParams(temperature=0.0)] * 4)
    result = step(states, make_runner(tiny_model("llama", vocab_size=VOCAB)), proposer, 4)
    assert result.num_target_tokens == sum(map(len, PROMPTS)) + sum(map(len, greedy_drafts().values()))


class Overflowing(ModelRunner):
    """A runner whose logits are `value` after any chunk that holds `token`."""

    value = float("nan")
    token = 31

    def forward(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
        logits = super().forward(chunks, drawn)
        hit = [self.token in chunk.token_ids for chunk in chunks for _ in range(chunk.num_logits)]
        return logits.masked_fill(torch.tensor(hit, dtype=torch.bool).unsqueeze(1), self.value)


def overflowing(seed: int) -> Overflowing:
    model = tiny_model("llama", vocab_size=VOCAB, seed=seed)
    return Overflowing(model, num_blocks=256, block_size=4, vocab_size=VOCAB)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=0.0), SamplingParams(seed=1), SamplingParams(seed=1, coupling=Coupling.MAXIMAL)],
)
def test_a_target_that_overflows_fails_that_sequence_alone(params: SamplingParams, value: float) -> None:
    prompts = [[3, 4, 5], [3, 31, 5], [6, 7]]
    healthy = make_states(prompts, [params] * 3)
    decode_all([healthy[0], healthy[2]], make_runner(tiny_model("llama", vocab_size=VOCAB)), None, 0, 1)
    states = make_states(prompts, [params] * 3)
    target = overflowing(0)
    target.value = value
    result = speculative_step([Work(s, s.num_pending, 3) for s in states], target, lookup())
    assert [output.failed for output in result.outputs] == [False, True, False]
    assert result.outputs[1].emitted == ()
    assert states[1].token_ids == prompts[1]
    for index in (0, 2):
        assert states[index].token_ids == healthy[index].token_ids


def test_an_overflow_after_a_rejected_token_does_not_count() -> None:
    """The draft proposes a token that breaks the target; the target never meant to emit it."""
    drafts: dict[int, tuple[int, ...]] = {1000: (30, 31, 3)}
    assert plain_decode(tiny_model("llama", vocab_size=VOCAB), PROMPTS[0], PARAMS[0], 1)[0] != 30

    class Late(Overflowing):
        def forward(self, chunks: Sequence[Chunk], drawn: torch.Tensor | None = None) -> torch.Tensor:
            logits = ModelRunner.forward(self, chunks, drawn)
            logits[-2:] = float("nan")  # the rows after 31
            return logits

    states = make_states(PROMPTS[:1], PARAMS[:1])
    target = Late(tiny_model("llama", vocab_size=VOCAB), num_blocks=256, block_size=4, vocab_size=VOCAB)
    output = step(states, target, Fixed(drafts), 3).outputs[0]
    assert not output.failed
    assert list(output.emitted) == plain_decode(tiny_model("llama", vocab_size=VOCAB), PROMPTS[0], PARAMS[0], 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_draft_that_overflows_costs_acceptance_and_nothing_else(
    value: float, expected: dict[str, list[list[int]]]
) -> None:
    runner = overflowing(11)
    runner.value, runner.token = value, 9
    states = make_states(PROMPTS, PARAMS, min_new_tokens=4, end_token_ids=(0, 5))
    target = make_runner(tiny_model("llama", vocab_size=VOCAB))
    decode_all(states, target, DraftModelProposer(runner, version="d"), 3, NUM_TOKENS)
    assert [state.token_ids[state.num_prompt_tokens :] for state in states] == plain_texts("llama", expected)
    # under maximal coupling the token's q enters the verdict: it must be the distribution the token came from
    state = make_states([[4, 9]], [SamplingParams(seed=4, coupling=Coupling.MAXIMAL)])[0]
    proposal = DraftModelProposer(runner, version="d").propose([state], [2])
    assert proposal.probs[0].tolist() == pytest.approx([1 / VOCAB] * VOCAB)
    assert bool(proposal.probs.isfinite().all())
