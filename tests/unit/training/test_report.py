"""The report: whole files, self-contained, and safe whatever a domain is called."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import redraft.files
from redraft_training.distill.metrics import MetricsRow
from redraft_training.evaluate import charts
from redraft_training.evaluate.comparison import compare
from redraft_training.evaluate.replay import DraftTally, ReplayResult
from redraft_training.evaluate.report import Report, render_html, write_report
from redraft_training.evaluate.speedup import CostProfile
from tests.unit.training.evaluate_examples import draft_scores, scored

PROFILE = CostProfile(((1, 0.010), (32, 0.020)), ((1, 0.001), (8, 0.002)))
HOSTILE = ("<script>alert(1)</script>", "$x^2$ $\\frac", "検索", "", "a" * 300, "tab\there")


def a_report(domains: tuple[str, ...] = ("sql", "chat"), **changes: object) -> Report:
    rng = np.random.default_rng(0)

    def scores(version: str, level: float) -> object:
        return draft_scores(
            version,
            *(
                scored(f"r{i}", [np.nan, *np.clip(rng.normal(level, 0.1, 30), 0, 1)], domain=domains[i % len(domains)])
                for i in range(4 * len(domains))
            ),
        )

    comparison = compare(scores("d-new", 0.7), scores("d-old", 0.4), profile=PROFILE, num_resamples=200)  # type: ignore[arg-type]
    values: dict[str, object] = {
        "comparison": comparison,
        "published": True,
        "reasons": ("beats the serving draft",),
        "training": tuple(
            MetricsRow(i, 0, 3.0 / (i + 1), 0.4, 0.5 if i % 5 == 0 else float("nan"), 1e-3, 1.0, i * 100, 50.0, i * 2.0)
            for i in range(20)
        ),
        "replay_old": a_replay((5, 3, 1)),
        "replay_new": a_replay((2, 3, 6)),
        "provenance": {"code": {"git_sha": "abc123"}, "tokens": 2000, "note": "<b>bold</b>"},
    }
    return Report(**{**values, **changes})  # type: ignore[arg-type]


def a_replay(histogram: tuple[int, ...]) -> ReplayResult:
    accepted = sum(j * count for j, count in enumerate(histogram))
    tally = DraftTally(30, accepted, float(accepted))
    return ReplayResult(
        3, 0, 40, 20, 30, accepted, 0, histogram, tally, (tally,), {"sql": tally}, {"1": tally}, 1.0, 2.0, ()
    )


class Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def pictures(html: str) -> list[Image.Image]:
    sources = [attrs["src"] for tag, attrs in Tags(html).tags if tag == "img"]
    assert all(source is not None and source.startswith("data:image/png;base64,") for source in sources)
    return [Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2]))) for source in sources]


def test_both_files_are_written_and_nothing_else(tmp_path: Path) -> None:
    directory = tmp_path / "out"
    png, html = write_report(directory, a_report())
    assert sorted(path.name for path in directory.iterdir()) == ["report.html", "report.png"]
    with Image.open(png) as image:
        image.load()
        assert min(image.size) > 500
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 50, "an empty picture"
    assert html.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert oct(html.stat().st_mode & 0o777) == "0o644"


def test_the_page_needs_nothing_beside_it() -> None:
    html = render_html(a_report())
    found = Tags(html).tags
    assert len(pictures(html)) == 6
    assert all(attrs.get("alt") for tag, attrs in found if tag == "img")
    assert not [tag for tag, _ in found if tag in ("script", "link", "iframe")]
    assert not re.search(r"https?://", html)


def test_the_page_says_what_matters() -> None:
    made = a_report()
    text = " ".join(" ".join(Tags(render_html(made)).text).split())
    overall = made.comparison.overall
    assert f"{overall.alpha_old:.3f} → {overall.alpha_new:.3f}" in text
    assert f"{made.comparison.gap_recovered:.0%} of the gap" in text
    assert "Passed the gate" in text
    assert "beats the serving draft" in text
    assert "abc123" in text
    for domain in ("sql", "chat"):
        assert domain in text


def test_a_refusal_is_told_in_words() -> None:
    text = render_html(a_report(published=False, reasons=("gain includes zero",)))
    assert "Refused by the gate" in text
    assert "gain includes zero" in text
    assert "Passed" not in text


def test_hostile_domain_names_are_text(tmp_path: Path) -> None:
    """Tags, formulas that do not parse, letters the font lacks: warnings are errors in this test run."""
    _, html = write_report(tmp_path, a_report(HOSTILE, training=(), replay_old=None, replay_new=None))
    text = html.read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "<b>bold" not in text
    assert "<script>alert(1)</script>" in " ".join(Tags(text).text)
    assert "(none)" in text


def test_with_little_to_show(tmp_path: Path) -> None:
    """First draft, no gate, no training, no replay, no cost profile."""
    scores = draft_scores("d", *(scored(f"r{i}", [np.nan, 0.5, 1.0]) for i in range(3)))
    bare = Report(compare(scores, None, num_resamples=100))
    _, html = write_report(tmp_path, bare)
    text = html.read_text(encoding="utf-8")
    assert "no draft" in text
    assert "the gate" not in text
    assert len(pictures(text)) == 3


def test_many_domains_are_cut_in_the_picture_and_listed_in_the_table() -> None:
    names = tuple(f"domain-{i}" for i in range(charts.MAX_DOMAINS + 5))
    text = render_html(a_report(names, training=(), replay_old=None, replay_new=None))
    assert all(name in text for name in names)


def test_a_failure_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small: dict[str, object] = {"training": (), "replay_old": None, "replay_new": None}
    _, html = write_report(tmp_path, a_report(**small))
    before = html.read_bytes()

    def no_space(source: object, destination: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(redraft.files.os, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path, a_report(published=False, **small))
    assert html.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.png"]
