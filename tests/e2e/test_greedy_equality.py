"""On a real model: greedy text is transformers' own, and seeded text does not depend on how it was drafted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from redraft.sampling.params import SamplingParams, StoppingParams
from redraft_server.engine.api import EngineEvent, EngineRequest
from redraft_server.engine.engine import Engine
from tests.demo_models import MAX_RUNNING, DemoModels, greedy, next_token_logits
from tests.engine_harness import Collected, generate
from tests.fixtures_prompts import demo_prompts

pytestmark = pytest.mark.model

NUM_PROMPTS, NEW_TOKENS = 6, 48
NUM_ALONE = 2  # of the prompts are also run one at a time
TIE_MARGIN = 1e-4
MAX_TIES = 1
CONFIGURATIONS = [("none", 0), ("ngram", 4), ("A", 8), ("B", 1), ("B", 4)]
SEEDED = SamplingParams(temperature=0.8, top_p=0.95)
SEEDED_TOKENS = 32


Text = tuple[str, tuple[int, ...]]


@dataclass
class Reference:
    """Greedy continuations by transformers, and the ties met so far (shared by all configurations)."""

    prompts: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    ties: set[tuple[int, int]] = field(default_factory=set)  # (prompt, position)


@pytest.fixture(scope="module")
def expected(demo_models: DemoModels) -> Reference:
    prompts = [demo_models.chat_prompt(text) for text in demo_prompts(NUM_PROMPTS)]
    return Reference(prompts, [greedy(demo_models.reference, prompt, NEW_TOKENS) for prompt in prompts])


def greedy_request(number: int, prompt: tuple[int, ...]) -> EngineRequest:
    return EngineRequest(
        f"greedy-{number}", prompt, SamplingParams(temperature=0.0), StoppingParams(max_new_tokens=NEW_TOKENS)
    )


def assert_same_up_to_ties(models: DemoModels, expected: Reference, number: int, output: tuple[int, ...]) -> None:
    wanted = expected.outputs[number]
    if output == wanted:
        return
    pairs = zip(output, wanted, strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    assert at is not None, f"prompt {number}: one output is cut short: {len(output)} and {len(wanted)} tokens"
    logits = next_token_logits(models.reference, (*expected.prompts[number], *wanted[:at]))[-1]
    margin = abs(float(logits[wanted[at]] - logits[output[at]]))
    assert margin < TIE_MARGIN, f"prompt {number}, token {at}: {output[at]} for {wanted[at]}, logits {margin:.2e} apart"
    expected.ties.add((number, at))


@pytest.mark.parametrize(("proposer", "k"), CONFIGURATIONS, ids=[f"{name}-k{k}" for name, k in CONFIGURATIONS])
def test_greedy_equals_transformers(demo_models: DemoModels, expected: Reference, proposer: str, k: int) -> None:
    requests = [greedy_request(number, prompt) for number, prompt in enumerate(expected.prompts)]
    with demo_models.engine(proposer, k) as engine:
        together = generate(engine, requests)
        alone = [generate(engine, [request])[0] for request in requests[:NUM_ALONE]]
    for run in (together, alone):
        for number, collected in enumerate(run):
            assert_same_up_to_ties(demo_models, expected, number, tuple(collected.token_ids()))
    drafted = sum(one.finished.speculation.draft_tokens for one in together)
    accepted = sum(one.finished.speculation.accepted_tokens for one in together)
    assert (drafted > 0) == (proposer != "none")
    if proposer in ("ngram", "B"):
        assert 0 < accepted < drafted, "both outcomes of a verification must occur"
    assert len(expected.ties) <= MAX_TIES, expected.ties
    print(f"{proposer} k={k}: {accepted} of {drafted} accepted, ties {sorted(expected.ties)}")  # noqa: T201


def test_the_reference_is_worth_comparing_with(demo_models: DemoModels, expected: Reference) -> None:
    """Some outputs end by themselves, some by length, and all say something."""
    eos = demo_models.tokenizer.eos_token_ids
    assert len(set(expected.outputs)) == NUM_PROMPTS
    ended = [output[-1] in eos for output in expected.outputs]
    assert not all(ended)
    assert all(len(output) == NEW_TOKENS for output, end in zip(expected.outputs, ended, strict=True) if not end)


# -- seeded ------------------------------------------------------------------------------------------------------


def seeded_requests(expected: Reference, count: int) -> list[EngineRequest]:
    return [
        EngineRequest(
            f"seeded-{number}",
            expected.prompts[number % NUM_PROMPTS],
            replace(SEEDED, seed=100 + number),
            StoppingParams(max_new_tokens=SEEDED_TOKENS),
        )
        for number in range(count)
    ]


def texts(collected: Sequence[Collected]) -> list[Text]:
    return [(one.text(), tuple(one.token_ids())) for one in collected]


@pytest.fixture(scope="module")
def plain_texts(demo_models: DemoModels, expected: Reference) -> list[Text]:
    """The seeded requests without speculation."""
    with demo_models.engine("none", 0) as engine:
        return texts(generate(engine, seeded_requests(expected, MAX_RUNNING)))


@pytest.mark.parametrize(("proposer", "k"), [("A", 1), ("B", 5), ("ngram", 5)])
def test_seeded_text_in_a_batch_is_the_same_with_any_draft(
    demo_models: DemoModels, expected: Reference, plain_texts: list[Text], proposer: str, k: int
) -> None:
    with demo_models.engine(proposer, k) as engine:
        assert texts(generate(engine, seeded_requests(expected, MAX_RUNNING))) == plain_texts


@pytest.mark.parametrize(("proposer", "k"), [("none", 0), ("A", 5), ("ngram+B", 1)])
def test_seeded_text_alone_is_the_same_with_any_draft(
    demo_models: DemoModels, expected: Reference, plain_texts: list[Text], proposer: str, k: int
) -> None:
    with demo_models.engine(proposer, k) as engine:
        for number, one in enumerate(seeded_requests(expected, NUM_ALONE)):
            assert texts(generate(engine, [one])) == [plain_texts[number]]


class SwappingSink(Collected):
    """Swaps the draft each time the stream has received another few messages, on the engine's own thread."""

    def __init__(self, swap: Callable[[], None], every: int) -> None:
        super().__init__()
        self._swap, self._every, self._calls = swap, every, 0

    def __call__(self, events: list[EngineEvent]) -> None:
        self._calls += 1
        if self._calls % self._every == 0:
            self._swap()
        super().__call__(events)


def test_seeded_text_is_the_same_when_drafts_are_swapped_in_mid_generation(
    demo_models: DemoModels, expected: Reference, plain_texts: list[Text]
) -> None:
    names = ["B", "ngram", "none", "A"]
    used: list[str] = []

    def swap(engine: Engine) -> None:
        name = names[len(used) % len(names)]
        used.append(name)
        engine.replace_proposer(demo_models.proposer(name, epoch=len(used)), len(used))

    with demo_models.engine("A", 5) as engine:
        requests = seeded_requests(expected, MAX_RUNNING)
        sinks = [SwappingSink(lambda: swap(engine), every=4), *(Collected() for _ in requests[1:])]
        for one, sink in zip(requests, sinks, strict=True):
            engine.submit(one, sink)
        assert texts([sink.wait() for sink in sinks]) == plain_texts
    assert set(used) == set(names)


def test_another_seed_gives_another_text(plain_texts: list[Text]) -> None:
    assert plain_texts[0] != plain_texts[NUM_PROMPTS], "the same prompt with two seeds"
