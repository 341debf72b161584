"""docs/retraining.md, held to the code."""

from __future__ import annotations

import re

import yaml

from redraft_training.commands.common import Exit
from redraft_training.settings_text import describe
from scripts.training_docs import PAGE, render

TEXT = PAGE.read_text(encoding="utf-8")


def test_table_of_settings_is_current() -> None:
    assert render() == TEXT, "run: python -m scripts.training_docs"


def test_settings_named_in_the_text_exist() -> None:
    names = {setting.name for setting in describe()}
    named = set(re.findall(r"`((?:data|student|distill|gate)\.\w+)`", TEXT.partition("\n## Settings\n")[0]))
    assert len(named) > 10
    assert named <= names


def test_every_exit_status_is_documented() -> None:
    assert set(re.findall(r"^\| (\d) \|", TEXT, re.M)) == {str(int(status)) for status in Exit}


def test_cron_job_is_yaml() -> None:
    (job,) = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", TEXT, re.S)]
    assert job["kind"] == "CronJob"
