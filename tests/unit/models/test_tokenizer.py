"""The tokenizer: fingerprints, chat templates, bytes of a token, and exact streaming."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from redraft.errors import ChatTemplateMissing, ModelError, TokenizerMismatch
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.tokenizer import Tokenizer, check_compatible, load_tokenizer
from tests.fakes import EOS_ID, save_tiny, tiny_tokenizer


@cache
def byte_level() -> Tokenizer:
    """All 256 bytes and 41 merges: any text round-trips."""
    return Tokenizer(tiny_tokenizer(300))


@cache
def sentencepiece() -> Tokenizer:
    """Spaces as a mark, dropped at the start, and a token for each byte: as Llama 2 and Gemma."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgh", "\u2581a"]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(
        models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>"))


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int], prefix: list[int] | None = None) -> str:
    """Push `ids` in chunks of `sizes` (repeated), then flush."""
    detokenizer = tokenizer.detokenizer(prefix_ids=prefix or [])
    text, start, turn = "", 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        text += detokenizer.push(ids[start : start + size])
        start, turn = start + size, turn + 1
    return text + detokenizer.flush()


chunk_sizes = st.lists(st.integers(1, 5), min_size=1, max_size=6)


@given(ids=st.lists(st.integers(0, 305), max_size=60), sizes=chunk_sizes)
def test_streamed_text_is_the_decoded_text_for_any_ids(ids: list[int], sizes: list[int]) -> None:
    # Any ids: also invalid UTF-8, special tokens, and ids past the vocabulary
    assert stream(byte_level(), ids, sizes) == byte_level().decode(ids)


@given(text=st.text(max_size=40), sizes=chunk_sizes)
def test_streamed_text_round_trips(text: str, sizes: list[int]) -> None:
    assert stream(byte_level(), byte_level().encode(text), sizes) == text


@given(text=st.text(max_size=40), sizes=chunk_sizes)
def test_streamed_text_round_trips_with_byte_fallback(text: str, sizes: list[int]) -> None:
    ids = sentencepiece().encode(text, add_special_tokens=False)
    assert stream(sentencepiece(), ids, sizes) == sentencepiece().decode(ids)


@given(text=st.text("ab \u20ac\U0001f600", max_size=30), at=st.integers(0, 100), sizes=chunk_sizes)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_text_goes_on_where_the_prompt_ended(make: object, text: str, at: int, sizes: list[int]) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut = at % (len(ids) + 1)
    # A character cut in two belongs to what follows
    decoded = (tokenizer.decode(ids[:end]) for end in range(cut, -1, -1))
    before = next(part for part in decoded if not part.endswith("\ufffd"))
    assert before + stream(tokenizer, ids[cut:], sizes, prefix=ids[:cut]) == tokenizer.decode(ids)


def test_leading_space_is_kept_only_after_a_prompt() -> None:
    tokenizer = sentencepiece()
    space_a = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.detokenizer().push(space_a) == "a"
    assert tokenizer.detokenizer(prefix_ids=space_a).push(space_a) == " a"


def test_unfinished_character_is_held_back_then_whole_or_flushed() -> None:
    first, second, third = byte_level().encode("\u20ac")
    detokenizer = byte_level().detokenizer()
    assert [detokenizer.push([first]), detokenizer.push([second]), detokenizer.push([third])] == ["", "", "\u20ac"]
    assert detokenizer.push([first]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_endless_invalid_bytes_are_released_and_not_kept() -> None:
    continuation = byte_level().encode("\u20ac")[1]
    detokenizer = byte_level().detokenizer()
    text = "".join(detokenizer.push([continuation]) for _ in range(1000))
    assert len(text) > 900
    assert text + detokenizer.flush() == "\ufffd" * 1000


def test_special_tokens_are_skipped_unless_asked() -> None:
    ids = [*byte_level().encode("a"), EOS_ID]
    assert byte_level().detokenizer().push(ids) == "a"
    assert byte_level().detokenizer(skip_special_tokens=False).push(ids) == "a<eos>"


@given(st.lists(st.integers(0, 299), max_size=30))
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_token_bytes_join_to_the_text(make: object, ids: list[int]) -> None:
    tokenizer: Tokenizer = make()  # type: ignore[operator]
    ids = [token_id for token_id in ids if token_id < tokenizer.vocab_size]
    joined = b"".join(tokenizer.token_bytes(token_id) for token_id in ids)
    try:
        text = joined.decode()
    except UnicodeDecodeError:
        return
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    assert decoded == (text.removeprefix(" ") if make is sentencepiece else text)


def test_token_text_and_range() -> None:
    assert byte_level().token_text(4) == "a"
    assert byte_level().token_text(EOS_ID) == "<eos>"
    assert byte_level().token_text(10_000) == ""
    assert byte_level().token_bytes(10_000) == b""
    for bad in (-1, 2**32):
        with pytest.raises(ValueError, match="not a token id"):
            byte_level().token_text(bad)


def test_lone_surrogate_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="Unicode"):
        byte_level().encode("a\ud800b")


def test_truncation_and_padding_in_the_file_are_ignored() -> None:
    fast = tiny_tokenizer(300)
    fast.backend_tokenizer.enable_truncation(max_length=3)
    fast.backend_tokenizer.enable_padding(length=8)
    assert len(Tokenizer(fast).encode("hello")) == 5


def test_chat_template_renders_and_refuses() -> None:
    tokenizer = byte_level()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "u: hi<eos>a: "
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "u: hi<eos>"
    with pytest.raises(ValueError, match="unknown role: robot"):
        tokenizer.apply_chat_template([{"role": "robot", "content": "hi"}])
    with pytest.raises(ValueError, match="template refused"):
        tokenizer.apply_chat_template([{"role": "user"}])
    with pytest.raises(ValueError, match="no messages"):
        tokenizer.apply_chat_template([])
    with pytest.raises(ChatTemplateMissing):
        Tokenizer(tiny_tokenizer(chat_template=None)).apply_chat_template([{"role": "user", "content": "hi"}])


def test_load_reads_end_of_sequence_ids_of_the_model(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    config = (tmp_path / "generation_config.json").read_text().replace('"eos_token_id": 0', '"eos_token_id": [7, 9]')
    (tmp_path / "generation_config.json").write_text(config)
    tokenizer = load_tokenizer(ModelRef(ModelKind.DIRECTORY, str(tmp_path)))
    assert tokenizer.eos_token_ids == {EOS_ID, 7, 9}
    assert tokenizer.vocab_size == 64
    assert tokenizer.fingerprint == Tokenizer(tiny_tokenizer()).fingerprint  # saving and loading change nothing


def test_missing_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(ModelRef(ModelKind.DIRECTORY, str(tmp_path)))


def test_fingerprint_is_stable_across_processes() -> None:
    code = (
        "from redraft.models.tokenizer import Tokenizer; from tests.fakes import tiny_tokenizer; "
        "print(Tokenizer(tiny_tokenizer(300)).fingerprint)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == byte_level().fingerprint


def test_check_compatible_names_the_difference() -> None:
    target = Tokenizer(tiny_tokenizer(64))
    check_compatible(target, Tokenizer(tiny_tokenizer(64, chat_template=None)))
    with pytest.raises(TokenizerMismatch, match="target has 64 tokens, the draft 65"):
        check_compatible(target, Tokenizer(tiny_tokenizer(65)))
    swapped = tiny_tokenizer(64).backend_tokenizer.to_str().replace('"a":4', '"b":4').replace('"b":5', '"a":5')
    other = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(swapped)))
    with pytest.raises(TokenizerMismatch, match="token 4 is 'a' in the target, 'b' in the draft"):
        check_compatible(target, other)
    plain = PreTrainedTokenizerFast(
        tokenizer_object=Backend.from_str(
            tiny_tokenizer(64).backend_tokenizer.to_str().replace('"special":true', '"special":false')
        )
    )
    with pytest.raises(TokenizerMismatch, match="special tokens"):
        check_compatible(target, Tokenizer(plain))
