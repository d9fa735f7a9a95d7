"""prepare_wikitext103.py: the published counts of the real text, each source, and a hub that answers well and badly."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import prepare_wikitext103 as wikitext103
from lib import data, tokenizer, wikitext

import numpy as np
import pytest
from conftest import ROOT, WIKITEXT, needs_wikitext
from hub import Hub, card, parquet

REPO, FOLDER = "datasets/Salesforce/wikitext", "wikitext-103-raw-v1/"

ARTICLES = [
    ["", " = Valkyria = \n", "", " It was @-@ a game . \n", "", " = = Plot = = \n", "", " Two , three . \n", ""],
    [" = Heron = \n", "", " A bïrd , of 1 @,@ 5 kg . \n", " More of it . \n", "", ""],
]
ROWS = [row for article in ARTICLES for row in article]


def raw(rows):
    """The raw file whose rows on the hub are these."""
    return "".join(row or " \n" for row in rows).encode()


def counts(rows):
    pages = [i for i, row in enumerate(rows) if wikitext.is_title(row)]
    return {"lines": len(rows), "words": sum(len(r.split()) for r in rows), "documents": len(pages)}


@pytest.fixture
def prepared(script, tmp_path, monkeypatch):
    """prepared("--source=FOLDER", ...) runs the script: (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: script("prepare_wikitext103", *args)


def check_dataset(rows=ROWS):
    dataset, tok = data.Dataset("wikitext103"), tokenizer.Gpt2Tokenizer()
    for split in ("train", "val", "test"):
        found = dataset.splits[split]
        assert {k: found[k] for k in ("lines", "words", "documents")} == counts(rows)
        assert found["bytes"] == len("".join(rows).encode())
        # The tokens of the pages, without end-of-texts, are those of the joined rows.
        assert np.array_equal(dataset.text_ids(split), tok.encode("".join(rows)))
        begins = np.flatnonzero(dataset.tokens(split) == tok.eot)
        assert len(begins) == 2 and begins[0] == 0
        dataset.verify(split)
    for split in ("val", "test"):
        assert dataset.splits[split]["per_document"]["lines"] == [len(article) for article in ARTICLES]
        ids, found = dataset.document_ids(f"{split}_lm_eval"), dataset.splits[f"{split}_lm_eval"]
        assert tok.decode(ids.tolist()).decode().split(tokenizer.ENDOFTEXT) == ["", *HARNESS]
        assert [found[k] for k in data.COUNTS] == [len(ids) - 2, 2, 20 + 18, None, 75 + 61]
        assert found["per_document"] == {"words": [20, 18], "bytes": [75, 61]}


# These are the two pages in the harness's task `wikitext`, made by hand. A page begins with the line of its title, and
# the newline between two pages belongs to neither.
HARNESS = [
    " = Valkyria =\n\nIt was-a game.\n\n== Plot ==\n\nTwo, three.\n",
    " = Heron =\n\nA bïrd, of 1,5 kg.\nMore of it.\n\n\n",
]


@needs_wikitext
def test_the_published_counts_on_the_real_validation_and_test_text(prepared, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("wiki.valid.raw", "wiki.test.raw"):
        (source / name).symlink_to(WIKITEXT / name)
    status, out, _ = prepared(f"--source={source}", "--check=False")
    assert status == 0 and "left out, because there is no such split: train" in out and "warning" not in out
    splits = json.loads(Path("data/wikitext103/meta.json").read_text())["splits"]
    facts = [
        (c["tokens"], c["documents"], c["words"] + c["lines"], c["bytes"]) for c in map(splits.get, ("val", "test"))
    ]
    assert facts == [(247_289, 60, 217_646, 1_144_248), (283_287, 62, 245_569, 1_287_656)]
    facts = [(c["documents"], c["words"], c["lines"], c["bytes"]) for c in map(splits.get, data.TOKEN_FILES[3:])]
    assert facts == [(60, 214_006, None, 1_146_785), (62, 241_335, None, 1_290_527)]
    for found in splits.values():
        assert {k: sum(v) for k, v in found["per_document"].items()} == {k: found[k] for k in found["per_document"]}
    status, out, _ = prepared(f"--source={source}", "--check=False")
    assert status == 0 and "exists already (val, test, val_lm_eval, test_lm_eval)" in out


@pytest.mark.parametrize("kind", ["folder", "zip", "parquet", "whole repository"])
def test_every_source_gives_the_same_tokens(prepared, kind, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    if kind == "folder":
        for name in wikitext.RAW.values():
            (source / name).write_bytes(raw(ROWS))
    elif kind == "zip":
        source = tmp_path / "wikitext-103-raw-v1.zip"
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in wikitext.RAW.values():
                archive.writestr(f"wikitext-103-raw/{name}", raw(ROWS))
    else:
        inner = source / FOLDER if kind == "whole repository" else source
        inner.mkdir(exist_ok=True)
        for hub in wikitext.HUB.values():
            (inner / f"{hub}-00000-of-00002.parquet").write_bytes(parquet(ROWS[:5]))
            (inner / f"{hub}-00001-of-00002.parquet").write_bytes(parquet(ROWS[5:]))
        if kind == "whole repository":  # It holds another corpus too.
            (source / "wikitext-2-raw-v1").mkdir()
            (source / "wikitext-2-raw-v1" / "train-00000-of-00001.parquet").write_bytes(parquet(["no\n"]))
    status, out, err = prepared(f"--source={source}", "--check=False")
    assert status == 0, err
    assert out.count("warning: ") == 16  # for three counts of each of five splits, and the bytes of test
    check_dataset()


def test_a_part_of_the_corpus_is_refused_and_leaves_nothing(prepared, tmp_path):
    (tmp_path / "wiki.valid.raw").write_bytes(raw(ROWS))
    status, _, err = prepared(f"--source={tmp_path}")
    assert status == 2 and "no train and test split; --check=False" in err and len(err.splitlines()) == 1
    for name in ("wiki.train.raw", "wiki.test.raw"):
        (tmp_path / name).write_bytes(raw(ROWS))
    status, _, err = prepared(f"--source={tmp_path}")
    assert status == 2 and "train has 15 lines, WikiText-103 has 1,801,350" in err
    assert os.listdir("data") == [".wikitext103.lock"]


def test_a_differing_train_token_count_only_warns(prepared, tmp_path, monkeypatch):
    tokens = len(tokenizer.Gpt2Tokenizer().encode("".join(ROWS)))
    facts = {"lines": len(ROWS), "words": counts(ROWS)["words"], "tokens": tokens}
    published = {"train": facts | {"tokens": tokens + 1}, "val": facts, "test": facts}
    published |= dict.fromkeys(data.TOKEN_FILES[3:], {})
    monkeypatch.setattr(wikitext103, "PUBLISHED", published)
    for name in wikitext.RAW.values():
        (tmp_path / name).write_bytes(raw(ROWS))
    status, out, _ = prepared(f"--source={tmp_path}")
    assert status == 0 and f"warning: train has {tokens:,} tokens" in out
    monkeypatch.setattr(wikitext103, "PUBLISHED", published | {"val": facts | {"tokens": tokens + 1}})
    shutil.rmtree("data/wikitext103")
    status, _, err = prepared(f"--source={tmp_path}")
    assert status == 2 and "val has" in err


@pytest.mark.parametrize("what", ["nothing", "an empty folder", "not a zip", "not UTF-8", "broken parquet"])
def test_a_source_that_is_none_is_one_line(prepared, tmp_path, what):
    source = tmp_path / "source"
    if what != "nothing":
        source.mkdir()
    if what == "not a zip":
        source = tmp_path / "a.zip"
        source.write_bytes(b"PK but no zip")
    elif what == "not UTF-8":
        (source / "wiki.train.raw").write_bytes(b" = T = \n caf\xe9 \n")
    elif what == "broken parquet":
        (source / "train-0.parquet").write_bytes(b"PAR1 but no parquet")
    status, _, err = prepared(f"--source={source}", "--check=False")
    last = [line for line in err.splitlines() if line and "it/s" not in line and "B/s" not in line]
    assert status == 2 and len(last) == 1 and str(source) in last[0] and not data.names()


@pytest.mark.parametrize(
    ("text", "detokenized"),
    [
        ("the dogs ' bone , it", "the dogs' bone, it"),
        ("the dog 's bone", "the dog's bone"),
        ("1 @,@ 000 @.@ 5 kg of half @-@ baked", "1,000.5 kg of half-baked"),
        ("so : it ; was . it ! was ? it , was", "so: it; was. it! was? it, was"),
        ("( a ( b ) c ) [ d ] { e } \" f g \" ' h '", "(a ( b) c ) [d] {e} \"f g\" 'h'"),
        ("a , . b", "a ,. b"),
        ("( a\nb ) /' 5/", "(a\nb) /'[0-9]/"),
        ("( no end", "( no end"),
        ("= = = = = = =", "======="),
        (" = = Two = = \n = = = Three = = = \n", " == Two ==\n=== Three ===\n"),
        ("20 ° C , N of it , N N N", "20°C, 1 of it, 1 N N"),
    ],
)
def test_pages_are_detokenized_step_by_step(text, detokenized):
    assert wikitext.detokenize(text) == detokenized


def test_a_title_is_what_the_harness_takes_for_one():
    assert wikitext.is_title(" = Valkyria Chronicles III = \n") and wikitext.is_title(" = A = B = \n")
    assert not any(map(wikitext.is_title, [" = = Plot = = \n", "", " = text \n", " text = \n", " a = b \n"]))
    assert not wikitext.is_title(" = = = Deep = = = \n")


def hub_files():
    files = {"README.md": card({FOLDER[:-1]: (FOLDER[:-1], ["test", "train", "validation"])})}
    files[f"{FOLDER}train-00000-of-00002.parquet"] = parquet(ROWS[:7])
    files[f"{FOLDER}train-00001-of-00002.parquet"] = parquet(ROWS[7:])
    return files | {f"{FOLDER}{s}-00000-of-00001.parquet": parquet(ROWS) for s in ("test", "validation")}


def run_script(tmp_path, endpoint):
    """The script as a process of its own, since the hub's libraries read HF_ENDPOINT when they are imported."""
    env = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(ROOT / "prepare_wikitext103.py"), "--check=False"]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)


def test_from_a_hub_that_breaks_off_answers_500_and_then_answers_well(tmp_path, monkeypatch):
    """The cache keeps what has been downloaded, and the same command goes on from there."""
    monkeypatch.chdir(tmp_path)
    broken = f"{FOLDER}train-00001-of-00002.parquet"
    with Hub({REPO: hub_files()}) as hub:
        hub.faults = {broken: [500]}
        failed = run_script(tmp_path, hub.url)
        assert failed.returncode == 2 and not data.names()
        last = failed.stderr.splitlines()[-1]
        assert "500" in last and "--source=" in last and "config/demo.py" in last and "Traceback" not in failed.stderr
        before = len(hub.answers)
        hub.faults = {broken: ["half"]}
        worked = run_script(tmp_path, hub.url)
        assert worked.returncode == 0, worked.stderr
        again = hub.answers[before:]
    check_dataset()
    # The download did break off, and files in the cache were not sent again.
    assert "half" in again and sum(a.startswith("resolve GET 20") for a in again) <= 2
    kinds = {"resolve HEAD 200", "resolve GET 200", "resolve 404", "resolve 500", "half", "info", "tree"}
    assert kinds <= set(hub.answers)


def test_without_a_hub_one_line_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    failed = run_script(tmp_path, "http://127.0.0.1:9")
    last = failed.stderr.splitlines()[-1]
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "could not be fetched from the hub" in last and "--source=" in last
    assert not (tmp_path / "data/wikitext103").exists()
