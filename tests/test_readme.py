"""README.md: its lists are those of the code."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import config

README = Path(config.__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "positional"),
    [
        ("train", ""),
        ("sample", ""),
        ("eval", ""),
        ("export", ""),
        ("prepare_text", "path"),
        ("prepare_wikitext103", ""),
        ("plot", "run"),
        ("bench", ""),
    ],
)
def test_all_settings_stand_in_the_readme_as_help_prints_them(monkeypatch, name, positional):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    shown = config.help_text(importlib.import_module(name).Settings, positional)
    assert shown[shown.index("usage:") :] in README
    settings = [line for line in shown.splitlines() if line.startswith("  --")]
    assert [line for line in settings if len(line.split(maxsplit=1)) < 2] == []  # each says what it is


def test_every_file_that_the_readme_names_is_there():
    root = Path(config.__file__).parent.parent
    named = set(re.findall(r"(?:python|\]\()\s*((?:config/|docs/)?\w+\.(?:py|png))", README))
    assert {"train.py", "eval.py", "sample.py", "docs/demo.png"} <= named
    assert [name for name in named if not (root / name).is_file()] == []
