"""Target and draft as each engine reads them, converted once into `build/peers/models`.

A draft with a reduced vocabulary is nothing that another engine knows; its checkpoint is complete all the same, so the
others run it with its whole head. One of int8 layers is stored dequantised, and they read those numbers; llama.cpp,
which can, gets them as q8_0, the fastest it has for a draft.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.environments import FOLDER, Environment, llama_cpp_source
from redraft.models.demo import demo_gguf
from redraft.models.loader import weights_fingerprint
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.source import resolve_source

MODELS = FOLDER / "models"
_GGUF_DRAFT = "q8_0"
_HASH_CHARS = 12


@dataclass(frozen=True)
class Checkpoints:
    """Two checkpoint directories, and what is made of them."""

    target: str
    draft: str

    def original(self, is_draft: bool) -> Path:
        """The checkpoint's directory, which redraft, transformers and vLLM read."""
        return resolve_source(ModelRef.parse(self.draft if is_draft else self.target)).directory

    def gguf(self, environment: Environment, is_draft: bool, weights: str) -> Path:
        """A GGUF file with weights f32, q8_0 or, for the demo target only, the q4_1 it came with.

        Raises PeerUnavailable if the conversion fails; ValueError for other weights.
        """
        if is_draft:
            weights = _GGUF_DRAFT
        if weights == "q4_1":
            if ModelRef.parse(self.target).kind is not ModelKind.DEMO:
                raise ValueError("q4_1 weights are there for the demo target only")
            return demo_gguf()
        source = self.original(is_draft)
        file = MODELS / f"{_key(source)}-{weights}.gguf"
        if not file.is_file():
            tree = llama_cpp_source(environment)
            fresh = file.with_suffix(".part")
            file.parent.mkdir(parents=True, exist_ok=True)
            script = [str(environment.python), str(tree / "convert_hf_to_gguf.py"), str(source)]
            environment.run(
                [*script, "--outtype", weights, "--outfile", str(fresh)],
                {**os.environ, "PYTHONPATH": str(tree / "gguf-py")},
            )
            fresh.rename(file)
        return file

    def openvino(self, environment: Environment, is_draft: bool) -> Path:
        """An OpenVINO directory with fp32 weights. Raises PeerUnavailable if the conversion fails."""
        source = self.original(is_draft)
        directory = MODELS / f"{_key(source)}-openvino"
        if not directory.is_dir():
            fresh = directory.with_suffix(".part")
            shutil.rmtree(fresh, ignore_errors=True)
            command = [str(environment.python.with_name("optimum-cli")), "export", "openvino", "--model", str(source)]
            environment.run([*command, "--task", "text-generation-with-past", "--weight-format", "fp32", str(fresh)])
            fresh.rename(directory)
        return directory


def _key(directory: Path) -> str:
    return weights_fingerprint(directory).removeprefix("sha256:")[:_HASH_CHARS]
