"""The GPU benchmark where there is no GPU: it runs through, and says what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer

from benchmarks import gpu
from tests.fakes import save_tiny, without_compiling


def test_it_runs_through_and_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiling()
    monkeypatch.setattr(gpu, "_ROUNDS", 2)
    target, draft = (str(save_tiny(tmp_path / name, seed=seed)) for name, seed in (("target", 0), ("draft", 1)))
    page = tmp_path / "gpu.md"
    gpu.main(target=target, draft=draft, device="cpu", batches="1,2", rows="1,3", context=20, output=page)
    text = page.read_text(encoding="utf-8")
    assert sum(line.startswith(("| target", "| draft")) for line in text.splitlines()) == 2 * 2 * 2
    assert sum(line.startswith(("| greedy", "| top-p")) for line in text.splitlines()) == 2 * 2 * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        gpu.main(device="cuda", output=tmp_path / "gpu.md")
    assert ended.value.exit_code == 2
    assert "--device cpu" in capsys.readouterr().err
