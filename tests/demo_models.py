"""The demo target and its drafts, loaded once and shared by one engine after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from redraft.models.block_pool import BlockPool
from redraft.models.loader import load_model
from redraft.models.ref import ModelRef
from redraft.models.runner import ModelRunner
from redraft.models.tokenizer import Tokenizer, load_tokenizer
from redraft.speculation.cost import StepCost
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.fallback import FallbackProposer
from redraft.speculation.ngram import NgramProposer
from redraft.speculation.proposer import Proposer
from redraft_server.engine.api import EngineInfo
from redraft_server.engine.engine import Engine, EngineParts
from redraft_server.engine.scheduler import SchedulerLimits

DEMO = ModelRef.parse("demo")
DRAFT_LAYERS = {"A": (0, 10, 20, 29), "B": tuple(layer for layer in range(30) if layer not in (12, 14, 16))}
"""A is what `make model` makes: cheap, and hardly ever accepted. B is often accepted, and far too slow to be of use."""
NUM_BLOCKS, BLOCK_SIZE = 256, 16
MAX_RUNNING, MAX_BATCH_TOKENS = 8, 256


@dataclass(frozen=True)
class DemoModels:
    """`reference` is transformers' own model, untouched by ours; the runners own copies of the weights."""

    tokenizer: Tokenizer
    reference: PreTrainedModel
    target: ModelRunner
    drafts: dict[str, ModelRunner]

    @classmethod
    def load(cls, reference: PreTrainedModel, draft_dirs: dict[str, Path]) -> DemoModels:
        tokenizer = load_tokenizer(DEMO)

        def runner(ref: ModelRef) -> ModelRunner:
            return ModelRunner(
                load_model(ref).model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, vocab_size=tokenizer.vocab_size
            )

        drafts = {name: runner(ModelRef.parse(str(path))) for name, path in draft_dirs.items()}
        return cls(tokenizer, reference, runner(DEMO), drafts)

    def proposer(self, name: str, epoch: int = 0) -> Proposer | None:
        """`none`, `ngram`, `A`, `B`, or `ngram+B`."""
        if name == "none":
            return None
        if name == "ngram":
            return NgramProposer()
        if name == "ngram+B":
            return FallbackProposer([NgramProposer(), self._draft("B", epoch)])
        return self._draft(name, epoch)

    def _draft(self, name: str, epoch: int) -> Proposer:
        return DraftModelProposer(self.drafts[name], version=name, epoch=epoch, max_catch_up=MAX_BATCH_TOKENS)

    @contextmanager
    def engine(self, proposer: str, k: int) -> Iterator[Engine]:
        """One engine at a time: the runners' KV is shared."""
        engine = Engine(
            EngineParts(
                target=self.target,
                tokenizer=self.tokenizer,
                proposer=self.proposer(proposer),
                pool=BlockPool(NUM_BLOCKS, BLOCK_SIZE, prefix_cache=True),
                limits=SchedulerLimits(
                    max_running=MAX_RUNNING,
                    max_batch_tokens=MAX_BATCH_TOKENS,
                    max_model_len=NUM_BLOCKS * BLOCK_SIZE,
                    num_speculative_tokens=k,
                ),
                info=self._info(proposer, k),
                max_waiting=64,
                target_cost=StepCost(),
            )
        )
        engine.start()
        try:
            yield engine
        finally:
            engine.stop(60.0)
            engine.scheduler.check_integrity()
            assert engine.scheduler.pool.num_free == NUM_BLOCKS

    def _info(self, proposer: str, k: int) -> EngineInfo:
        return EngineInfo(
            model="demo",
            model_revision="",
            vocab_size=self.tokenizer.vocab_size,
            context_length=NUM_BLOCKS * BLOCK_SIZE,
            max_prompt_tokens=NUM_BLOCKS * BLOCK_SIZE - 1,
            max_new_tokens_limit=1024,
            eos_token_ids=self.tokenizer.eos_token_ids,
            target_fingerprint="",
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            proposer=proposer,
            num_speculative_tokens=k,
            draft_name=None,
            draft_version="",
            kv_block_size=BLOCK_SIZE,
            kv_num_blocks=NUM_BLOCKS,
            kv_bytes=0,
            weight_bytes=0,
            dtype="float32",
            device="cpu",
        )

    def chat_prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of one user message in the model's template."""
        return tuple(self.tokenizer.apply_chat_template([{"role": "user", "content": text}]))


@torch.inference_mode()
def next_token_logits(model: PreTrainedModel, token_ids: tuple[int, ...]) -> torch.Tensor:
    """transformers' logits after each token, [len(token_ids), vocab_size]."""
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
    """What transformers' `generate` appends, its end-of-text token included."""
    ids = torch.tensor([prompt])
    generate: Any = model.generate  # declared as something that is not callable
    output: torch.Tensor = generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0
    )
    return tuple(output[0, len(prompt) :].tolist())
