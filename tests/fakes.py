"""Tiny random models and tokenizers: real architectures of transformers, small enough for a unit test.

Everything is built in code from a seed, so no test needs a download or a committed binary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.attention import flex_attention
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from redraft.models.buckets import BucketLimits
from redraft.models.runner import ModelRunner

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3")
SLIDING_WINDOW = 16
"""Window of the sliding layers of gemma2 and gemma3 (layers alternate: sliding, full, ...)."""

EOS, PAD, UNK = "<eos>", "<pad>", "<unk>"
EOS_ID, PAD_ID, UNK_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{{ message['role'][0] + ': ' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a: ' }}{% endif %}"
)

_CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}


def tiny_model(
    arch: str, *, vocab_size: int = 64, layers: int = 2, seed: int = 0, tied: bool | None = None, head_dim: int = 8
) -> PreTrainedModel:
    """A random causal LM of `arch` in eval mode, float32 on CPU, without gradients.

    Hidden size 32, 4 query heads and 2 key/value heads of `head_dim`, 512 positions, `eos_token_id` 0.
    `tied` says whether the head shares the embedding (None: as is usual for the architecture). Weights are
    drawn wide enough (std 0.2) that the next-token distribution is far from uniform. The same arguments give
    the same weights; the global random state is left alone.
    """
    extra: dict[str, Any] = {}
    if tied is not None:
        extra["tie_word_embeddings"] = tied
    if arch in ("gemma2", "gemma3"):
        extra["layer_types"] = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
        extra["sliding_window"] = SLIDING_WINDOW
        extra["query_pre_attn_scalar"] = 8
    elif arch == "mistral":
        extra["sliding_window"] = None
    config = _CONFIGS[arch](
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        initializer_range=0.2,
        eos_token_id=EOS_ID,
        bos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        **extra,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(config)
    model.generation_config.eos_token_id = EOS_ID
    model.generation_config.pad_token_id = PAD_ID
    torch.nn.Module.eval(model).requires_grad_(False)
    return model


def tiny_tokenizer(vocab_size: int = 64, *, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose ids 0, 1, 2 are `<eos>`, `<pad>`, `<unk>`.

    Id 3 is the space; then letters, digits and other ASCII, so up to size 98 every id decodes to one
    character of its own; sizes from 259 on hold all 256 bytes (any UTF-8 text round-trips), and ids from 259
    on are two-letter merges ("aa", "ab", ...).
    """
    alphabet = _byte_symbols()
    vocab = {EOS: EOS_ID, PAD: PAD_ID, UNK: UNK_ID}
    for symbol in alphabet[: vocab_size - len(vocab)]:
        vocab[symbol] = len(vocab)
    merges: list[tuple[str, str]] = []
    letters = "abcdefghijklmnopqrstuvwxyz"
    for pair in ((a, b) for a in letters for b in letters):
        if len(vocab) >= vocab_size:
            break
        merges.append(pair)
        vocab["".join(pair)] = len(vocab)
    if len(vocab) != vocab_size:
        raise ValueError(f"tiny_tokenizer has between 4 and 935 ids, not {vocab_size}")
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (EOS, PAD, UNK)])
    build: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = build(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def save_tiny(
    directory: Path | str,
    arch: str = "llama",
    *,
    vocab_size: int = 64,
    layers: int = 2,
    seed: int = 0,
    tied: bool | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Write `tiny_model` and `tiny_tokenizer` as a complete checkpoint directory; return it."""
    path = Path(directory)
    tiny_model(arch, vocab_size=vocab_size, layers=layers, seed=seed, tied=tied).save_pretrained(path)
    tiny_tokenizer(vocab_size, chat_template=chat_template).save_pretrained(path)
    return path


def _byte_symbols() -> list[str]:
    """All 256 bytes as byte-level BPE writes them: space first, then ASCII, then the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in symbols]
    symbols.update({byte: chr(256 + n) for n, byte in enumerate(others)})
    first = b" abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\n-ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    order = list(dict.fromkeys([*first, *range(ord(" "), ord("~") + 1), *range(256)]))
    return [symbols[byte] for byte in order]


def without_compiling() -> None:
    """On a CPU torch would trace FlexAttention again for every shape, which takes seconds and changes nothing."""
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True


def runner_ahead(model: PreTrainedModel, buckets: BucketLimits, **sizes: int) -> ModelRunner:
    """A runner that works as on a GPU: short passes in buckets, and nobody asks it for a token before a step's end."""
    without_compiling()
    runner = ModelRunner(model, buckets=buckets, **sizes)
    runner.runs_ahead = True
    return runner
