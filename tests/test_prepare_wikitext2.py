"""prepare_wikitext2.py: the hub's other configuration, its counts, and the text that it shares with WikiText-103."""

import os
import subprocess
import sys
from pathlib import Path

import prepare_wikitext2
import prepare_wikitext103
from lib import data, settings, wikitext
from train import Settings as TrainSettings

import pytest
from conftest import ROOT, WIKITEXT, needs_wikitext
from hub import Hub, card, parquet

REPO, CONFIG = "datasets/Salesforce/wikitext", "wikitext-2-raw-v1"
ROWS = ["", " = Valkyria = \n", "", " It was @-@ a game . \n", " = Heron = \n", "", " A bird . \n"]
OTHERS = ["", " = Not this one = \n", "", " WikiText-103 's text . \n"]


def counts(rows):
    return {"lines": len(rows), "words": sum(len(row.split()) for row in rows)}


@pytest.fixture
def prepared(script, tmp_path, monkeypatch):
    """prepared("--source=FOLDER", ...) runs the script: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: script("prepare_wikitext2", *args)


def write_raw(folder, **rows):
    for split, of_split in rows.items():
        (folder / wikitext.RAW[split]).write_text("".join(row or " \n" for row in of_split), encoding="utf-8")


def test_the_hub_gives_the_rows_of_this_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub_splits = list(wikitext.HUB.values())
    files = {"README.md": card({config: (config, hub_splits) for config in ("wikitext-103-raw-v1", CONFIG)})}
    files |= {f"{CONFIG}/{split}-00000-of-00001.parquet": parquet(ROWS) for split in hub_splits}
    files |= {f"wikitext-103-raw-v1/{split}-00000-of-00001.parquet": parquet(OTHERS) for split in hub_splits}
    with Hub({REPO: files}) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, str(ROOT / "prepare_wikitext2.py"), "--check=False"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "warning: train has 7 lines, WikiText-2 has 36,718" in done.stdout
    assert "warning: train has 15 words, WikiText-2 has 2,051,910" in done.stdout
    dataset = data.Dataset("wikitext2")
    assert list(dataset.paths) == list(data.TOKEN_FILES)
    for split in data.SPLITS:
        assert {k: dataset.splits[split][k] for k in ("lines", "words")} == counts(ROWS)
        assert dataset.splits[split]["documents"] == 2
        dataset.verify(split)


def test_rows_and_words_must_be_the_published_ones(prepared, tmp_path, monkeypatch):
    published = {split: counts(ROWS) for split in data.SPLITS} | dict.fromkeys(data.TOKEN_FILES[3:], {})
    write_raw(tmp_path, train=ROWS, val=ROWS, test=ROWS)
    for what in ("lines", "words"):
        train = published["train"] | {what: published["train"][what] + 1}
        monkeypatch.setattr(prepare_wikitext2, "PUBLISHED", published | {"train": train})
        status, _, err = prepared(f"--source={tmp_path}")
        assert status == 2 and f"train has {train[what] - 1} {what}, WikiText-2 has {train[what]};" in err
        assert not data.names()
    monkeypatch.setattr(prepare_wikitext2, "PUBLISHED", published)
    status, out, _ = prepared(f"--source={tmp_path}")
    assert status == 0 and "warning" not in out and data.names() == ["wikitext2"]
    before = Path("data/wikitext2/meta.json").stat()
    assert "data/wikitext2 exists already" in prepared(f"--source={tmp_path}")[1]
    assert Path("data/wikitext2/meta.json").stat() == before
    status, _, err = prepared("--source=mistyped")
    assert status == 2 and "--source=mistyped: there is no such folder or zip" in err


def test_a_part_of_the_corpus_is_one_line_that_names_it(prepared, tmp_path):
    write_raw(tmp_path, val=ROWS)
    status, _, err = prepared(f"--source={tmp_path}")
    assert status == 2 and "no train and test split; --check=False" in err and len(err.splitlines()) == 1


@needs_wikitext
def test_validation_and_test_text_have_the_published_counts(prepared, tmp_path):
    for name in ("wiki.valid.raw", "wiki.test.raw"):
        (tmp_path / name).symlink_to(WIKITEXT / name)
    status, out, _ = prepared(f"--source={tmp_path}", "--check=False")
    assert status == 0 and "left out, because there is no such split: train" in out and "warning" not in out


def test_validation_and_test_counts_are_wikitext_103s():
    small, large = prepare_wikitext2.PUBLISHED, prepare_wikitext103.PUBLISHED
    assert {k: v for k, v in small.items() if k != "train"} == {k: v for k, v in large.items() if k != "train"}
    assert small["train"] == {"lines": 36_718, "words": 2_051_910}


def test_the_config_names_the_dataset():
    s = settings.load(TrainSettings, [str(ROOT / "config/wikitext2.py")])
    assert (s.dataset, s.out_dir) == ("wikitext2", "out/wikitext2")
