"""The cold start: opened turns, filters, answers with labels; and examples from files of text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from redraft.models.runner import ModelRunner
from redraft.models.tokenizer import Tokenizer
from redraft.sampling.params import SamplingParams
from redraft_training.dataset.chat import answer_end, chat_prompt, opened_turn
from redraft_training.dataset.errors import NotEnoughData
from redraft_training.dataset.generate import Generated
from redraft_training.dataset.synthesise import PromptFilter, SynthesisSettings, open_user_turn, synthesise
from redraft_training.dataset.texts import read_texts
from redraft_training.dataset.topics import TOPICS
from tests.fakes import CHAT_TEMPLATE, EOS_ID, tiny_model, tiny_tokenizer
from tests.reference_decoding import plain_logits

VOCAB = 98
NO_SYSTEM = CHAT_TEMPLATE.replace("'system', ", "")


def tokenizer(template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(VOCAB, chat_template=template))


def test_a_user_turn_is_opened_with_its_topic() -> None:
    prefix, ends = open_user_turn(tokenizer(), "fractions")
    text = tokenizer().decode(prefix, skip_special_tokens=False)
    assert text == "s: The user asks about fractions.<eos>u: "
    assert ends == {EOS_ID}
    prefix, _ = open_user_turn(tokenizer(NO_SYSTEM), "fractions")
    assert tokenizer().decode(prefix, skip_special_tokens=False) == "u: "
    prefix, ends = open_user_turn(tokenizer(None), "fractions")
    assert tokenizer().decode(prefix) == "A question about fractions:"
    assert [tokenizer().decode([end]) for end in ends] == ["\n"]


def test_a_turn_that_ends_with_a_token_of_its_own() -> None:
    """Behind the message the template goes on with more than the end: the first special token is it."""
    template = CHAT_TEMPLATE.replace("+ eos_token", "+ '<pad>' + ' ' + eos_token")
    prefix, end = opened_turn(tokenizer(template), [], "user")
    assert tokenizer().decode(prefix) == "u: "
    assert end == 1
    assert answer_end(tokenizer(template)) == 1
    assert answer_end(tokenizer()) == answer_end(tokenizer(None)) == EOS_ID


def written(text: str, *, ended: bool = True) -> Generated:
    return Generated((*tokenizer().encode(text, add_special_tokens=False), EOS_ID), ended)


def test_bad_prompts_are_dropped_for_a_reason() -> None:
    prompts = PromptFilter(SynthesisSettings(num_examples=9, min_prompt_tokens=5))
    for text, expected in [
        ("how do i bake a good bread at home", True),
        ("how do i bake a good bread at home today", False),  # six of seven runs of three words are known
        ("how do i sew a button on a shirt", True),
        ("what", False),
        ("again and again and again and again and again", False),
        ("1 + 1 = 2 ???", False),
    ]:
        assert (prompts.accept(written(text), tokenizer()) == text) is expected
    assert prompts.accept(written("where does the river begin", ended=False), tokenizer()) is None
    assert prompts.dropped == {"duplicate": 1, "too_short": 1, "repetitive": 1, "not_text": 1, "unfinished": 1}


def settings(count: int) -> SynthesisSettings:
    return SynthesisSettings(
        num_examples=count,
        topics={"math": ("sums",), "chat": ("cats", "dogs")},
        min_prompt_tokens=2,
        max_prompt_tokens=40,
        max_answer_tokens=6,
        max_similarity=1.0,
        label_top_n=4,
        attempts=30,
    )


def runner() -> ModelRunner:
    model = tiny_model("llama", vocab_size=VOCAB, seed=3)
    with torch.no_grad():  # random models hardly ever end a turn: make this one do
        model.lm_head.weight[EOS_ID] *= 2.5
    return ModelRunner(model, num_blocks=512, block_size=4, vocab_size=VOCAB)


def test_the_target_writes_prompts_and_answers_them() -> None:
    made = synthesise(runner(), tokenizer(), settings(8), created_unix_s=7.0)
    assert len(made.examples) == 8
    assert {e.domain for e in made.examples} == {"synthetic/math", "synthetic/chat"}
    assert {e.params.temperature for e in made.examples} == {0.0, 0.7}
    assert len({e.request_id for e in made.examples}) == 8
    assert made.num_tried >= 8 + sum(made.dropped.values())
    model = tiny_model("llama", vocab_size=VOCAB, seed=3)
    with torch.no_grad():
        model.lm_head.weight[EOS_ID] *= 2.5
    for one in made.examples:
        text = tokenizer().decode(one.prompt_token_ids, skip_special_tokens=False)
        assert text.startswith("u: ")
        assert text.endswith("<eos>a: ")
        logits = plain_logits(model, [*one.prompt_token_ids, *one.output_token_ids[:-1]])
        for row, label in zip(logits[len(one.prompt_token_ids) - 1 :], one.labels, strict=True):
            assert label is not None
            torch.testing.assert_close(torch.tensor(list(label.logits)), row.topk(4).values, atol=1e-3, rtol=0)
    again = synthesise(runner(), tokenizer(), settings(8), created_unix_s=7.0)
    assert again == made
    assert synthesise(runner(), tokenizer(), replace(settings(8), seed=100), created_unix_s=7.0) != made


def test_it_gives_up_on_a_model_that_writes_nothing_of_use() -> None:
    hopeless = replace(settings(2), min_prompt_tokens=1000, attempts=3)
    made = synthesise(runner(), tokenizer(), hopeless, created_unix_s=7.0)
    assert (made.examples, made.num_tried) == ((), 6)
    assert sum(made.dropped.values()) == 6


def test_the_built_in_topics_are_distinct_phrases() -> None:
    topics = [topic for own in TOPICS.values() for topic in own]
    assert len(topics) == len(set(topics)) > 60
    assert all(topic == topic.strip(" .") for topic in topics)


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_texts_become_examples_without_labels(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        {"prompt": "add 1 and 2", "response": "that is 3", "domain": "math"},
        {"prompt": "add 1 and 2", "response": "that is 3", "domain": "math"},
        "",
        "{not json",
        {"prompt": "no answer"},
        {"prompt": "", "response": "x"},
        ["a list"],
        {"messages": [{"role": "poet", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a long thought"}]},
    )
    params = SamplingParams(temperature=0.6)
    examples, report = read_texts(path, tokenizer(), params, max_output_tokens=11, domain="other")
    first, second = examples
    assert list(first.prompt_token_ids) == chat_prompt(tokenizer(), [{"role": "user", "content": "add 1 and 2"}])
    assert tokenizer().decode(first.output_token_ids, skip_special_tokens=False) == "that is 3<eos>"
    assert tokenizer().decode(second.output_token_ids, skip_special_tokens=False) == "a long thou"
    assert (first.domain, second.domain, first.params) == ("math", "other", params)
    assert first.labels == (None,) * len(first.output_token_ids)
    assert report.lines == 8
    assert report.skipped == {"duplicate": 1, "not_json": 1, "incomplete": 3, "template": 1}
    assert [e.request_id for e in read_texts(path, tokenizer(), params, max_output_tokens=11)[0]] == [
        e.request_id for e in examples
    ]


def test_a_file_without_a_usable_line_says_so(tmp_path: Path) -> None:
    with pytest.raises(NotEnoughData, match=r"t\.jsonl has no usable line \(1 incomplete\)"):
        read_texts(write(tmp_path / "t.jsonl", {"question": "secret"}), tokenizer(), SamplingParams())
