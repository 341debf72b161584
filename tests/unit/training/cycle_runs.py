"""A tiny target, a traffic log that it might have written, and settings for a cycle of a few seconds."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redraft.models.loader import weights_fingerprint
from redraft.models.tokenizer import Tokenizer
from redraft.registry.store import DraftRegistry
from redraft.sampling.logprobs import teacher_rows
from redraft.sampling.processors import SamplingRow
from redraft.traffic.record import SamplingRecord, StepRecord, TeacherPosition, Timings, TrafficRecord
from redraft.traffic.writer import TrafficWriter
from redraft_training.cycle import CycleResult, run_cycle
from redraft_training.settings import CycleSettings, load_settings
from tests.fakes import save_tiny, tiny_model, tiny_tokenizer
from tests.unit.traffic.fakes import Observer
from tests.unit.training.distill_runs import GREEDY, SAMPLED, examples

VOCAB = 64
LAYERS = 2
DRAFTED, ACCEPTED = (5, 6), 1

torch.set_num_threads(1)


@dataclass(frozen=True)
class Site:
    """Directories of one deployment."""

    root: Path

    @classmethod
    def make(cls, root: Path, *, requests: int = 60) -> Site:
        site = cls(root)
        save_tiny(site.target, layers=LAYERS)
        site.log(requests)
        return site

    @property
    def target(self) -> Path:
        return self.root / "target"

    @property
    def registry(self) -> DraftRegistry:
        return DraftRegistry(str(self.root / "registry"))

    def log(self, requests: int, *, seed: int = 0, domain: str = "sql", **changes: Any) -> None:
        """Serve so many requests more, just now."""
        fingerprint = changes.pop("target_fingerprint", None) or weights_fingerprint(self.target)
        writer = TrafficWriter(str(self.root / "traffic"), Observer())
        for made in records(requests, fingerprint, seed=seed, domain=domain, **changes):
            assert writer.offer(made)
        assert writer.close(30.0)

    def settings(self, *overrides: str, work_dir: str = "work") -> CycleSettings:
        return load_settings(None, [*SMALL, *overrides], **self.places(work_dir))

    def places(self, work_dir: str = "work") -> dict[str, str]:
        """The options that every command takes."""
        return {
            "target": str(self.target),
            "traffic": str(self.root / "traffic"),
            "registry": str(self.root / "registry"),
            "work_dir": str(self.root / work_dir),
        }

    def run(self, *overrides: str, work_dir: str = "work") -> CycleResult:
        return run_cycle(self.settings(*overrides, work_dir=work_dir))


SMALL = (
    "student.num_layers=1",
    "student.vocab_size=60",
    "data.held_out_share=0.4",
    "data.min_new_tokens=100",
    "gate.min_positions=50",
    "gate.min_domain_positions=20",
    "distill.epochs=2",
    "distill.batch_tokens=128",
    "distill.learning_rate=0.005",
    "distill.checkpoint_every_batches=2",
)


def records(
    count: int, target_fingerprint: str, *, seed: int, domain: str, captured: bool = True
) -> list[TrafficRecord]:
    """What `distill_runs.examples` wrote, as the server would have logged it. Each request has its own id."""
    model = tiny_model("llama", layers=LAYERS)
    tokenizer = Tokenizer(tiny_tokenizer(VOCAB)).fingerprint
    now = time.time()
    made = []
    for index, example in enumerate(examples(count, seed=seed)):
        prompt, output = example.prompt_token_ids, example.output_token_ids
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
        rows = [SamplingRow(example.params, prompt, output[:position]) for position in range(len(output))]
        kept = teacher_rows(logits, VOCAB, rows) if captured else []
        teacher = tuple(
            TeacherPosition(position, (), row.ids, row.logits, row.logsumexp, row.sampling_logsumexp)
            for position, row in enumerate(kept)
        )
        params = GREEDY if example.params.is_greedy else SAMPLED
        made.append(
            TrafficRecord(
                request_id=example.request_id,
                sample_index=0,
                created_unix_s=now - 0.001 * (count - index),
                tenant="acme",
                model="tiny",
                target_fingerprint=target_fingerprint,
                tokenizer_fingerprint=tokenizer,
                draft_version="d-1",
                prompt_token_ids=prompt,
                output_token_ids=output,
                finish_reason="length",
                sampling=SamplingRecord(params.temperature, 0, params.top_p, 0.0, 1.0, 0.0, 0.0, None, "maximal"),
                timings=Timings(0.0, 0.1, 0.2),
                steps=(StepRecord(1, DRAFTED, ACCEPTED, "draft_model", "d-1"),) if len(output) > 3 else (),
                teacher=teacher,
                domain=domain,
            )
        )
    random.Random(seed).shuffle(made)  # servers do not write in order
    return made
