"""ModelRef: every accepted spelling, and a clear refusal of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.errors import ModelError
from redraft.models.ref import ModelKind, ModelRef


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("demo", ModelRef(ModelKind.DEMO, "demo")),
        (" demo ", ModelRef(ModelKind.DEMO, "demo")),
        ("gpt2", ModelRef(ModelKind.HUB, "gpt2")),
        ("Qwen/Qwen3-0.6B", ModelRef(ModelKind.HUB, "Qwen/Qwen3-0.6B")),
        ("org/name@v1.0", ModelRef(ModelKind.HUB, "org/name", "v1.0")),
        ("org/name@refs/pr/3", ModelRef(ModelKind.HUB, "org/name", "refs/pr/3")),
        ("./models/a", ModelRef(ModelKind.DIRECTORY, "models/a")),
        ("./demo", ModelRef(ModelKind.DIRECTORY, "demo")),
        ("/srv/models/a@b", ModelRef(ModelKind.DIRECTORY, "/srv/models/a@b")),
        ("..", ModelRef(ModelKind.DIRECTORY, "..")),
        ("weights/model.gguf", ModelRef(ModelKind.GGUF, "weights/model.gguf")),
        ("/srv/MODEL.GGUF", ModelRef(ModelKind.GGUF, "/srv/MODEL.GGUF")),
    ],
)
def test_parse_recognises_each_kind(text: str, expected: ModelRef) -> None:
    assert ModelRef.parse(text) == expected


def test_home_is_expanded() -> None:
    assert ModelRef.parse("~/m").location == str(Path.home() / "m")


def test_existing_directory_wins_over_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert ModelRef.parse("org/name").kind is ModelKind.DIRECTORY
    assert ModelRef.parse("org/other").kind is ModelKind.HUB


@pytest.mark.parametrize(
    "text",
    ["", "  ", "a/b/c", "org/", "/name@".lstrip("/"), "org/na me", "org/name@", "org/name@-x", "a\nb", "-x", "a..b/c"],
)
def test_nonsense_is_refused_with_the_accepted_forms(text: str) -> None:
    with pytest.raises(ModelError, match="Hugging Face id"):
        ModelRef.parse(text)


@given(st.text(max_size=60) | st.text("./~@a0-_", max_size=12))
def test_any_text_parses_or_raises_model_error_and_round_trips(text: str) -> None:
    try:
        ref = ModelRef.parse(text)
    except ModelError:
        return
    assert ModelRef.parse(str(ref)) == ref
