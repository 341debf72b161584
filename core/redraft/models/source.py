"""From a `ModelRef` to a directory on this machine that holds a standard Hugging Face checkpoint.

Every kind of model ends as such a directory, so nothing after this module knows about hubs or file formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from redraft.errors import ModelNotFound
from redraft.models.cache import Progress, stderr_progress
from redraft.models.demo import demo_directory
from redraft.models.demo_draft import demo_draft_directory
from redraft.models.gguf import convert_gguf
from redraft.models.ref import ModelKind, ModelRef

# Only what loading needs. Weights other than safetensors are not even fetched; `consolidated.safetensors`
# is the same weights once more, in a vendor's own layout.
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_IGNORED = ["*/*", "consolidated*", "optimizer*", "training_args*"]


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint on this machine.

    `name` is what people call the model; `revision` is the hub's commit, or the SHA-256 of the GGUF file, or
    None for a plain directory.
    """

    directory: Path
    name: str
    revision: str | None


def resolve_source(
    ref: ModelRef, *, cache_dir: Path | None = None, progress: Progress = stderr_progress
) -> CheckpointSource:
    """Fetch or convert whatever `ref` names, unless that is done already.

    `cache_dir` holds converted models (None: `redraft.models.cache.cache_directory()`); files from the hub
    stay in Hugging Face's own cache. Raises `ModelNotFound`, `UnsafeCheckpoint`, `ChecksumMismatch` or
    `UnsupportedModel`.
    """
    match ref.kind:
        case ModelKind.DEMO:
            source = CheckpointSource(*demo_directory(cache_dir=cache_dir, progress=progress))
        case ModelKind.DEMO_DRAFT:
            source = CheckpointSource(*demo_draft_directory(cache_dir=cache_dir, progress=progress))
        case ModelKind.GGUF:
            directory, digest = convert_gguf(Path(ref.location), cache_dir=cache_dir, progress=progress)
            source = CheckpointSource(directory, Path(ref.location).stem, digest)
        case ModelKind.DIRECTORY:
            source = _directory_source(Path(ref.location))
        case ModelKind.HUB:
            source = _hub_source(ref, progress)
    return source


def _directory_source(directory: Path) -> CheckpointSource:
    if not directory.is_dir():
        raise ModelNotFound(f"there is no directory {directory}")
    if not (directory / "config.json").is_file():
        raise ModelNotFound(f"{directory} is not a model directory: it has no config.json")
    return CheckpointSource(directory, directory.resolve().name, None)


def _hub_source(ref: ModelRef, progress: Progress) -> CheckpointSource:
    progress(f"Fetching {ref} from Hugging Face (kept in its cache)")
    try:
        snapshot = huggingface_hub.snapshot_download(
            ref.location, revision=ref.revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
        )
    except GatedRepoError as error:
        raise ModelNotFound(f"{ref} is gated on Hugging Face: accept its licence there and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{ref.location} on Hugging Face has no revision {ref.revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"Hugging Face has no model {ref.location!r} (a private one needs HF_TOKEN); "
            f"for a directory write ./{ref.location}"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFound(
            f"{ref} is not in Hugging Face's cache and the hub cannot be reached: check the network or "
            "HF_HUB_OFFLINE, or give a local directory, a .gguf file or `demo`"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFound(f"cannot fetch {ref} from Hugging Face: {type(error).__name__}") from error
    directory = Path(snapshot)
    if not (directory / "config.json").is_file():
        raise ModelNotFound(f"{ref} on Hugging Face is not a transformers model: it has no config.json")
    return CheckpointSource(directory, ref.location, directory.name)
