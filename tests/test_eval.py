"""eval.py against a slow exact computation, transformers' perplexity guide, and properties."""

import copy
import functools
import io
import json
import math
import os
import sys
import threading
import tty
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import eval as evaluation
import train
from lib import data, prepare, runtime, tokenizer
from model import GPT, Block

import numpy as np
import pytest
import torch
from conftest import random_model, save_huggingface, save_run, write_meta_pkl
from torch.nn import functional as F

DOCUMENTS = ["The first page\nhas two lines.\n", "Über Straßen,\n\n  and no\tlast line end", "x\n", "The end. " * 6]
FIGURES = ["nll", "token_ppl", "word_ppl", "byte_ppl", "bits_per_byte"]
KEYS = ["protocol", "block_size", "stride", "tokens_scored", *FIGURES]


def write_dataset(name, *splits, documents=DOCUMENTS):
    prepare.write(name, tokenizer.BytesTokenizer(), [(split, text, True) for split in splits for text in documents], 0)


def random_ids(n, vocab_size=257):
    return np.random.default_rng(n).integers(vocab_size, size=n).astype(np.uint16)


def stream(model, ids, T, stride, batch_size, rt):
    """(nats, tokens scored) by the protocol `stream` of ids that are one document."""
    windows = data.stream_windows(len(ids), T, stride)
    (nll,), (scored,), nlls_at, scored_at = evaluation.score(model, ids, windows, np.zeros(1, int), T, batch_size, rt)
    assert nll == pytest.approx(nlls_at.sum(), rel=1e-12)
    assert scored == scored_at.sum()
    return nll, scored


def exact_losses(model, ids, T, stride):
    """(position, nats) of each target of the protocol, in float64. Its context is read for this target alone."""
    model, ids = copy.deepcopy(model).double(), torch.from_numpy(ids.astype(np.int64))
    for t in range(1, len(ids)):
        # Windows without a stride are disjoint and have T targets. Of those that begin at 0, stride, ... the first one
        # that reaches t scores it.
        begin = (t - 1) // T * T if stride in (0, T) else max(0, -(-(t - T + 1) // stride)) * stride
        with torch.no_grad():
            logits = model(ids[None, begin:t])[0][0, -1]
        yield t - begin, -torch.log_softmax(logits, 0)[ids[t]].item()


def exact_nll(model, ids, T, stride):
    return sum(nll for _, nll in exact_losses(model, ids, T, stride))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working folder with data/tiny (bytes; val and test)."""
    monkeypatch.chdir(tmp_path)
    write_dataset("tiny", "val", "test")
    return tmp_path


@pytest.fixture
def run(script):
    """run("--key=value", ...) runs the script: (exit status, standard output, standard error)."""
    return functools.partial(script, "eval", "--device=cpu")


@pytest.fixture
def report(run):
    """report("--key=value", ...) is what the script writes as JSON, of `stream` alone where no other is named."""

    def report(*args):
        status, _, err = run("--protocol=stream", *args, "--json=report.json")
        assert status == 0, err
        return json.loads(Path("report.json").read_text())

    return report


# ---- the sum ----


@pytest.mark.parametrize(
    ("n", "T", "stride"),
    [
        (70, 16, 0),
        (70, 16, 16),
        (65, 16, 0),  # a full last window
        (66, 16, 0),  # a last window of one target
        (70, 16, 1),
        (70, 16, 5),
        (70, 16, 8),
        (70, 16, 15),
        (70, 7, 0),  # fewer positions than the model's
        (70, 7, 3),
        (30, 1, 0),
        (9, 16, 0),  # less than a window
        (9, 16, 5),
        (2, 16, 0),
        (2, 2, 1),
    ],
)
def test_the_nll_is_that_of_a_slow_exact_computation(n, T, stride):
    model, ids, rt = random_model(), random_ids(n), runtime.choose("cpu", "float32", False)
    exact = exact_nll(model, ids, T, stride)
    for batch_size in (1, 3, 64):
        nll, scored = stream(model, ids, T, stride, batch_size, rt)
        assert scored == n - 1
        assert nll == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("stride", [1, 6, 11])
def test_the_strided_stream_is_transformers_perplexity_guide(script, stride):
    from transformers import AutoModelForCausalLM

    model, ids = random_model(), random_ids(50)
    save_run(model)
    assert script("export", "--hf_dir=hf")[0] == 0
    theirs = AutoModelForCausalLM.from_pretrained("hf").eval().double()
    encodings, max_length, nll_sum, n_tokens, prev_end = torch.from_numpy(ids.astype(np.int64))[None], 16, 0.0, 0, 0
    for begin in range(0, encodings.size(1), stride):
        end = min(begin + max_length, encodings.size(1))
        input_ids = encodings[:, begin:end]
        targets = input_ids.clone()
        targets[:, : -(end - prev_end)] = -100
        with torch.no_grad():
            logits = theirs(input_ids).logits
        # The guide adds up means. This is the sum itself.
        nll_sum += F.cross_entropy(logits[0, :-1], targets[0, 1:], ignore_index=-100, reduction="sum").item()
        n_tokens += int((targets[:, 1:] != -100).sum())
        prev_end = end
        if end == encodings.size(1):
            break
    nll, scored = stream(model, ids, max_length, stride, 4, runtime.choose("cpu", "float32", False))
    assert scored == n_tokens
    assert nll == pytest.approx(nll_sum, rel=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_figures_are_the_eager_ones(monkeypatch, backend):
    model, ids, rt = random_model(), random_ids(60), runtime.choose("cpu", "float32", False)
    eager = stream(model, ids, 16, 0, 3, rt)
    compile_block, scores, shapes = Block.compile, model.nll, set()
    monkeypatch.setattr(Block, "compile", lambda block, **how: compile_block(block, backend=backend, **how))
    monkeypatch.setattr(model, "nll", lambda x, y: shapes.add(x.shape) or scores(x, y))
    rt.compile = True
    runtime.compile_parts(model, rt, 3, 16)
    assert stream(model, ids, 16, 0, 3, rt) == pytest.approx(eager, rel=1e-6)
    assert model.transformer.h[0]._compiled_call_impl is not None  # It has not fallen back.
    assert shapes == {(3, 16)}  # four windows in two batches of one shape


# ---- the figures ----


@pytest.mark.parametrize("stride", [0, 5])
def test_the_report_has_exact_figures_over_the_counts_of_the_text(report, stride):
    model = random_model()
    save_run(model)
    found = report(f"--stride={stride}")
    (result,) = found.pop("results")
    assert found == {"model": "out/a/ckpt.pt", "dataset": "tiny", "split": "test"}
    assert list(result) == [*KEYS, "loss_by_position", "documents", "standard_error", "document_nll"]

    ids = np.frombuffer("".join(DOCUMENTS).encode(), np.uint8)
    assert (result["protocol"], result["block_size"], result["stride"]) == ("stream", 16, stride)
    assert result["tokens_scored"] == len(ids) - 1
    nll = result["nll"]
    assert nll == pytest.approx(exact_nll(model, ids, 16, stride), rel=1e-6)
    units = sum(len(d.split()) + len(d.splitlines()) for d in DOCUMENTS)
    assert result["token_ppl"] == pytest.approx(math.exp(nll / (len(ids) - 1)), rel=1e-14)
    assert result["word_ppl"] == pytest.approx(math.exp(nll / units), rel=1e-14)
    assert result["byte_ppl"] == pytest.approx(math.exp(nll / len(ids)), rel=1e-14)
    assert result["bits_per_byte"] == pytest.approx(nll / len(ids) / math.log(2), rel=1e-14)


def test_the_table_shows_what_the_report_holds(run):
    save_run(random_model())
    status, out, _ = run("--stride=5", "--json=report.json")
    results = json.loads(Path("report.json").read_text())["results"]
    assert status == 0 and [r["protocol"] for r in results] == ["stream", "documents"]
    rows = out.splitlines()[4:]
    for result, row, stride in zip(results, rows, ("5", "16"), strict=False):
        shown = [
            (f"{result[k]:{f}}", "+-", f"{result['standard_error'][k]:{f}}") for k, f in evaluation.FORMATS.items()
        ]
        scored = str(result["tokens_scored"])
        assert row.split() == [result["protocol"], "16", stride, scored, *sum(shown, ()), "out/a/ckpt.pt"]


def test_end_of_texts_are_not_scored(report):
    """Where the documents of a text begin makes no difference to its figures."""
    save_run(random_model())
    write_dataset("whole", "test", documents=["".join(DOCUMENTS)])
    assert data.Dataset("whole").splits["test"]["documents"] < data.Dataset("tiny").splits["test"]["documents"]
    parts, whole = (report(f"--dataset={name}")["results"][0] for name in ("tiny", "whole"))
    for key in ("tokens_scored", "nll", "token_ppl", "byte_ppl", "bits_per_byte"):
        assert parts[key] == whole[key]


def test_what_a_nanogpt_folder_does_not_know_is_null_and_a_dash(run, report):
    ids = random_ids(60, 50257)
    Path("data/plain").mkdir()
    np.insert(ids, [0, 20, 40], 50256).astype("<u2").tofile("data/plain/val.bin")
    model = random_model(vocab_size=50257, n_embd=4)
    save_run(model, tokenizer="gpt2", dataset="plain")
    found = report()
    (result,) = found["results"]
    assert found["split"] == "val"
    assert result["tokens_scored"] == 59
    assert result["nll"] == pytest.approx(exact_nll(model, ids, 16, 0), rel=1e-6)
    assert result["token_ppl"] == pytest.approx(math.exp(result["nll"] / 59), rel=1e-14)
    assert [result[k] for k in FIGURES[2:]] == [None, None, None]
    assert [result["standard_error"][k] for k in FIGURES[2:]] == [None, None, None]
    assert result["documents"] == 3 and result["standard_error"]["token_ppl"] > 0
    row = next(line.split() for line in run()[1].splitlines() if "stream" in line and "59" in line)
    assert row[-4:-1] == ["-", "-", "-"]


def test_a_figure_beyond_a_float_leaves_the_report_valid_json(run):
    """4,000 bytes are one word here, whose perplexity has more than 308 digits."""
    save_run(random_model())
    write_dataset("long", "test", documents=["x" * 4000])
    status, *_ = run("--dataset=long")
    assert status == 0
    text = Path("out/a/eval_test.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert {result["word_ppl"] for result in found["results"]} == {None}


def test_an_error_beyond_a_float_is_null():
    """The perplexity is 3e307, and its standard error more than 1e309."""
    one = np.array([1.0, 1.0])
    nlls = np.array([100.0, 1316.0])
    found = evaluation.figures(nlls.sum(), {"word_ppl": 2})
    assert found["word_ppl"] > 1e307
    assert evaluation.standard_errors(found, nlls, {"word_ppl": one}) == {"word_ppl": None}


def test_batch_size_changes_nothing(report):
    save_run(random_model())
    results = [report("--stride=3", f"--batch_size={n}")["results"][0] for n in (1, 7, 100)]
    for key in ("tokens_scored", *FIGURES):
        assert [r[key] for r in results] == pytest.approx([results[0][key]] * 3, rel=1e-6)


def test_dropout_is_for_training(report):
    results = []
    for dropout in (0.0, 0.9):
        save_run(random_model(dropout=dropout))
        results += report()["results"]
    assert results[0] == results[1]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_one_line(run, monkeypatch, value):
    save_run(random_model())
    monkeypatch.setattr(GPT, "nll", lambda self, idx, targets: torch.full_like(targets[targets >= 0].float(), value))
    status, _, err = run()
    assert status == 2 and err.splitlines()[-1].endswith("no finite loss on this text; its weights have diverged")
    assert not list(Path().rglob("eval_*.json"))


def test_a_stride_of_block_size_is_the_plain_stream(report):
    save_run(random_model())
    assert report("--stride=16") == report() == report("--stride=0", "--block_size=16")


def test_a_smaller_block_size_is_taken_and_reported(report):
    model = random_model()
    save_run(model)
    (result,) = report("--block_size=6")["results"]
    assert result["block_size"] == 6
    ids = np.frombuffer("".join(DOCUMENTS).encode(), np.uint8)
    assert result["nll"] == pytest.approx(exact_nll(model, ids, 6, 0), rel=1e-6)


# ---- the loss by position ----


def check_positions(result, exact):
    """The entries are those of exact [(position, nats)], in groups that end at powers of two or at the highest one."""
    groups, highest = result["loss_by_position"], max(position for position, _ in exact)
    assert sum(group["nll"] for group in groups) == result["nll"]
    assert sum(group["tokens_scored"] for group in groups) == result["tokens_scored"] == len(exact)
    assert [group["loss"] for group in groups] == [group["nll"] / group["tokens_scored"] for group in groups]
    last, limits = 0, [2**i for i in range(99) if 2**i < highest] + [highest]
    for group in groups:
        assert list(group) == ["first", "last", "tokens_scored", "nll", "loss"]
        assert (group["first"] - 1, group["last"]) in zip([0, *limits], limits, strict=False)
        assert last < group["first"] <= group["last"]
        last = group["last"]
        losses = [nll for position, nll in exact if group["first"] <= position <= last]
        assert group["tokens_scored"] == len(losses)
        assert group["nll"] == pytest.approx(sum(losses), rel=1e-6)


@pytest.mark.parametrize(("T", "stride"), [(16, 0), (16, 1), (16, 5), (7, 0), (7, 3), (2, 0), (1, 0)])
def test_the_loss_by_position_is_that_of_a_slow_exact_computation(report, T, stride):
    model = random_model()
    save_run(model)
    exact = list(exact_losses(model, np.frombuffer("".join(DOCUMENTS).encode(), np.uint8), T, stride))
    assert max(position for position, _ in exact) == (T - 1 if stride else T)
    for batch_size in (1, 64):
        (result,) = report(f"--block_size={T}", f"--stride={stride}", f"--batch_size={batch_size}")["results"]
        check_positions(result, exact)


def test_the_sums_by_position_are_the_nll_to_the_bit(monkeypatch):
    """Also where the losses fill a float64, so that a sum in another order is another one."""
    model, generator = random_model(), torch.Generator().manual_seed(0)
    monkeypatch.setattr(model, "nll", lambda x, y: torch.rand((y >= 0).sum(), dtype=float, generator=generator))
    dataset = data.Dataset("tiny")
    text = evaluation.read(dataset, "test", "stream", 16, 0)
    rt = runtime.choose("cpu", "float32", False)
    result = evaluation.evaluate(model, text, dataset.splits["test"], "stream", 16, 0, 3, rt)
    assert sum(group["nll"] for group in result["loss_by_position"]) == result["nll"]
    assert sum(result["document_nll"]) != result["nll"]


def test_positions_that_a_text_does_not_reach_have_no_entry(report):
    save_run(random_model())
    write_dataset("short", "test", documents=["abc", "x"])
    (result,) = report("--dataset=short", "--protocol=documents")["results"]
    assert [(g["first"], g["last"], g["tokens_scored"]) for g in result["loss_by_position"]] == [
        (1, 1, 2),
        (2, 2, 1),
        (3, 3, 1),
    ]


def test_plot_draws_the_loss_by_position(run, script):
    save_run(random_model())
    assert run()[0] == 0
    assert script("plot", "out/a/eval_test.json") == (0, "out/a/eval_test.png\n", "")
    assert Path("out/a/eval_test.png").read_bytes().startswith(b"\x89PNG")


# ---- documents ----


def exact_documents(model, documents, eot, T):
    """[(position, nats)] of each document, token by token in float64, by the rule of lm-evaluation-harness.

    Its targets are in groups of T. The first group follows an end-of-text. Any other one has the T ids before its last
    target as context.
    """
    model, found = copy.deepcopy(model).double(), []
    for document in documents:
        ids, losses = torch.tensor([eot, *document]), []
        for t in range(1, len(ids)):
            last = min((t - 1) // T * T + T, len(document))  # target of the group of t
            begin = max(0, last - T)
            with torch.no_grad():
                logits = model(ids[None, begin:t])[0][0, -1]
            losses.append((t - begin, -torch.log_softmax(logits, 0)[ids[t]].item()))
        found.append(losses)
    return found


@pytest.mark.parametrize("T", [1, 7, 16])
def test_documents_are_those_of_a_slow_exact_computation(report, T):
    save_run(random_model())
    exact = exact_documents(random_model(), [list(d.encode()) for d in DOCUMENTS], 256, T)
    nlls, scored = [sum(nll for _, nll in losses) for losses in exact], [len(d.encode()) for d in DOCUMENTS]
    for batch_size in (1, 3, 64):
        (result,) = report("--protocol=documents", f"--block_size={T}", f"--batch_size={batch_size}")["results"]
        assert (result["tokens_scored"], result["documents"]) == (sum(scored), len(DOCUMENTS))
        assert result["nll"] == pytest.approx(sum(nlls), rel=1e-6)
        assert result["document_nll"] == pytest.approx(nlls, rel=1e-6)
        check_positions(result, [loss for losses in exact for loss in losses])
    words, size = sum(len(d.split()) for d in DOCUMENTS), sum(len(d.encode()) for d in DOCUMENTS)
    assert result["word_ppl"] == pytest.approx(math.exp(result["nll"] / words), rel=1e-14)
    assert result["byte_ppl"] == pytest.approx(math.exp(result["nll"] / size), rel=1e-14)
    assert result["bits_per_byte"] == pytest.approx(result["nll"] / size / math.log(2), rel=1e-14)


def test_a_batch_of_short_documents_is_read_no_further_than_it_goes(monkeypatch):
    model, shapes = random_model(), []
    scores = model.nll
    monkeypatch.setattr(model, "nll", lambda x, y: shapes.append(x.shape) or scores(x, y))
    write_dataset("short", "test", documents=["abc", "x" * 40, "de", "f"])
    rt = runtime.choose("cpu", "float32", False)
    dataset = data.Dataset("short")
    text = evaluation.read(dataset, "test", "documents", 16, 0)
    evaluation.evaluate(model, text, dataset.splits["test"], "documents", 16, 0, 3, rt)
    assert shapes == [(3, 16), (3, 3)]


def test_a_token_of_the_stream_belongs_to_its_document(monkeypatch):
    """No matter which window scores it. The loss of an id is the id here, so a document's sum is known."""
    documents = ["a b\n", "", "c" * 30, "x", "The end. " * 9]
    write_dataset("many", "test", documents=documents)
    dataset, rt, model = data.Dataset("many"), runtime.choose("cpu", "float32", False), random_model()
    monkeypatch.setattr(model, "nll", lambda x, y: y[y >= 0].float())
    for stride in (0, 5):
        ids, windows, starts = evaluation.read(dataset, "test", "stream", 16, stride)
        nlls, scored, nlls_at, scored_at = evaluation.score(model, ids, windows, starts, 16, 4, rt)
        assert nlls.tolist() == [sum(d.encode()) - (i == 0) * ord("a") for i, d in enumerate(documents)]
        assert scored.tolist() == [len(d) - (i == 0) for i, d in enumerate(documents)]
        assert (nlls_at.sum(), scored_at.sum()) == (nlls.sum(), scored.sum())


def test_standard_errors_are_those_of_a_bootstrap():
    random = np.random.default_rng(0)
    tokens = random.integers(200, 2000, size=120)
    words = np.rint(tokens * random.normal(0.8, 0.05, size=120))
    nlls = tokens * random.normal(3.0, 0.3, size=120)
    per = {"token_ppl": tokens, "word_ppl": words, "byte_ppl": words * 5, "bits_per_byte": words * 5}
    found = evaluation.figures(nlls.sum(), {k: v.sum() for k, v in per.items()})
    errors = evaluation.standard_errors(found, nlls, per)
    draws = random.integers(120, size=(20_000, 120))
    for figure, units in per.items():
        ratios = nlls[draws].sum(1) / units[draws].sum(1)
        spread = (ratios / math.log(2) if figure == "bits_per_byte" else np.exp(ratios)).std()
        assert errors[figure] == pytest.approx(spread, rel=0.05)


def test_of_documents_of_one_length_it_is_the_standard_error_of_their_mean():
    nlls, per = np.array([2.0, 3.0, 7.0]), {"token_ppl": np.array([5, 5, 5])}
    (error,) = evaluation.standard_errors({"token_ppl": 1.0}, nlls, per).values()
    assert error == pytest.approx(np.std(nlls / 5, ddof=1) / math.sqrt(3), rel=1e-14)


def test_a_standard_error_needs_two_documents_and_their_counts(report):
    save_run(random_model())
    write_dataset("whole", "test", documents=["".join(DOCUMENTS)])
    (result,) = report("--dataset=whole")["results"]
    assert set(result["standard_error"].values()) == {None}
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    del meta["splits"]["test"]["per_document"]  # Folders prepared earlier do not have it.
    Path("data/tiny/meta.json").write_text(json.dumps(meta))
    (result,) = report()["results"]
    assert result["standard_error"].pop("token_ppl") > 0
    assert set(result["standard_error"].values()) == {None}


def test_lm_eval_is_the_documents_of_its_own_file_over_its_own_counts(report):
    save_run(random_model())
    pieces = [("test", text, True) for text in DOCUMENTS]
    known = [{"words": 7, "lines": None, "bytes": 50}, {"words": 30, "lines": None, "bytes": 60}]
    pieces += [("test_lm_eval", text, True, c) for text, c in zip(DOCUMENTS[:2], known, strict=True)]
    prepare.write("wiki", tokenizer.BytesTokenizer(), pieces, 0)
    write_dataset("two", "test", documents=DOCUMENTS[:2])
    both = report("--protocol=", "--dataset=wiki")["results"]
    assert [r["protocol"] for r in both] == ["stream", "documents", "lm_eval"]
    (two,) = report("--dataset=two", "--protocol=documents")["results"]
    (one,) = report("--dataset=wiki", "--protocol=lm_eval")["results"]
    assert one == both[2]
    for key in ("tokens_scored", "nll", "token_ppl", "document_nll"):
        assert one[key] == two[key]
    assert one["word_ppl"] == pytest.approx(math.exp(one["nll"] / 37), rel=1e-14)
    assert one["byte_ppl"] == pytest.approx(math.exp(one["nll"] / 110), rel=1e-14)
    assert None not in one["standard_error"].values()


def test_a_wikitext_without_the_pages_of_lm_eval_says_how_to_get_them(run):
    save_run(random_model())
    write_dataset("wikitext103", "test")
    status, out, err = run("--dataset=wikitext103")
    assert status == 0 and "\ndocuments: " in out and "lm_eval" not in out
    assert "no test_lm_eval.bin for lm_eval: remove the folder and run python prepare_wikitext103.py" in err
    status, _, err = run("--dataset=wikitext103", "--protocol=lm_eval")
    assert status == 2 and len(err.splitlines()) == 1 and "python prepare_wikitext103.py" in err


def test_published_figures_stand_under_their_protocol_and_in_their_column():
    errors = dict.fromkeys(evaluation.FORMATS)
    result = dict(block_size=8, tokens_scored=1, standard_error=errors, **dict.fromkeys(evaluation.FORMATS, 2.0))
    results = [result | {"protocol": p, "stride": 0} for p in evaluation.PROTOCOLS]
    lines = evaluation.table(results, "ours", evaluation.PUBLISHED).splitlines()
    assert len(lines) == 1 + len(results) + len(evaluation.PUBLISHED)
    for line in lines[1:]:
        protocol, *cells = line.split()[:8]
        if line.endswith(" ours"):
            continue
        values = next(v for p, source, v in evaluation.PUBLISHED if line.endswith(source) and p == protocol)
        assert cells == [*"---", *(str(values.get(k, "-")) for k in evaluation.FORMATS)]
        assert protocol == "lm_eval" or set(values) == {"token_ppl"}
    strided = evaluation.table([result | {"protocol": "stream", "stride": 4}], "ours", evaluation.PUBLISHED)
    assert len(strided.splitlines()) == 2


def test_published_figures_stand_beside_wikitexts_test_text_alone(script, monkeypatch):
    save_run(random_model(vocab_size=50_257), tokenizer="gpt2", dataset="mine")
    prepare.write("mine", tokenizer.Gpt2Tokenizer(), [("test", text, True) for text in DOCUMENTS], 0)
    assert "Hyena" not in script("eval", "--protocol=stream")[1]
    counts = json.loads(Path("data/mine/meta.json").read_text())["splits"]["test"]
    known = evaluation.wikitext.VAL_AND_TEST
    monkeypatch.setitem(known, "test", {k: counts[k] for k in known["test"]})
    assert script("eval", "--protocol=stream")[1].count("Hyena") == 3


def test_characters_have_no_documents(run):
    """No id of nanoGPT's character vocabulary is an end-of-text."""
    chars = sorted(set("".join(DOCUMENTS)))
    stoi = write_meta_pkl("data/letters", chars)
    np.array([stoi[c] for c in "".join(DOCUMENTS)], "<u2").tofile("data/letters/val.bin")
    save_run(random_model(vocab_size=len(chars)), tokenizer="", dataset="letters")
    status, out, _ = run()
    assert status == 0 and "\nstream: " in out and "\ndocuments: " not in out
    status, _, err = run("--protocol=documents")
    assert status == 2 and "--protocol=stream" in err.splitlines()[-1]
    write_meta_pkl("data/letters", [*chars, "Ω"])
    status, _, err = run()
    assert status == 2 and "data/letters/meta.pkl of its training names; put it back" in err.splitlines()[-1]


# ---- which model, which text, where the figures go ----


@pytest.mark.parametrize(("splits", "taken"), [(("train", "val", "test"), "test"), (("train", "val"), "val")])
def test_the_split_is_test_else_val(run, splits, taken):
    save_run(random_model(), dataset="mine")
    write_dataset("mine", *splits)
    status, out, _ = run()
    assert status == 0
    assert f"mine, {taken} split" in out
    assert json.loads(Path(f"out/a/eval_{taken}.json").read_text())["split"] == taken


def test_a_split_that_is_named_is_taken(run):
    save_run(random_model())
    assert run("--split=val")[0] == 0
    assert json.loads(Path("out/a/eval_val.json").read_text())["split"] == "val"


def test_json_names_another_place(run):
    save_run(random_model())
    assert run()[0] == run("--json=else where.json")[0] == 0
    assert Path("else where.json").read_text() == Path("out/a/eval_test.json").read_text()
    Path("out/a/eval_test.json").unlink()
    assert run("--json=else where.json")[0] == 0
    assert not Path("out/a/eval_test.json").exists()


def test_a_dash_prints_the_json_alone_and_the_table_on_standard_error(run):
    save_run(random_model())
    _, table, _ = run("--json=report.json")
    status, out, err = run("--json=-")
    assert status == 0
    assert out == Path("report.json").read_text()
    json.loads(out)
    assert table.strip() and table in err
    assert not Path("-").exists() and not list(Path().rglob("eval_*.json"))


def test_an_earlier_report_is_replaced(run):
    save_run(random_model())
    Path("report.json").write_text(json.dumps({"results": ["x" * 9999]}))
    Path("empty.json").touch()
    assert run("--json=report.json")[0] == run("--json=empty.json")[0] == 0
    assert Path("report.json").read_text() == Path("empty.json").read_text()
    assert json.loads(Path("report.json").read_text())["results"][0]["protocol"] == "stream"
    assert not list(Path().glob("*.partial"))


@pytest.mark.parametrize("file", ["out/a/best.pt", "notes.txt", "link.json"])
def test_a_file_that_is_no_report_is_refused_and_stays(run, file, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", pytest.fail)  # It is refused before hours are spent.
    save_run(random_model(), file="best.pt")
    Path("notes.txt").write_text("what I found: {}\n")
    Path("link.json").symlink_to("notes.txt")
    before = Path(file).read_bytes()
    status, out, err = run(f"--json={file}")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1 and "--json=PATH names another" in err
    assert Path(file).read_bytes() == before
    assert Path("link.json").is_symlink()


def test_a_pipe_and_a_device_are_written_to(run):
    """The device is a terminal of our own, so that no mistake can replace one that others need."""
    save_run(random_model())
    assert run("--json=report.json")[0] == 0
    os.mkfifo("pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append(Path("pipe").read_text()), daemon=True)
    reader.start()
    assert run("--json=pipe")[0] == 0
    reader.join(timeout=10)
    ours, theirs = os.openpty()
    tty.setraw(theirs)
    assert run(f"--json={os.ttyname(theirs)}")[0] == 0
    report = Path("report.json").read_text()
    seen = b""
    while len(seen) < len(report):  # A terminal gives what it has, which may be a part.
        seen += os.read(ours, 1 << 16)
    found.append(seen.decode())
    os.close(ours)
    os.close(theirs)
    assert found == [report] * 2
    assert Path("pipe").is_fifo()


def test_the_newest_run_is_taken_and_its_best_checkpoint(report):
    for age, (folder, file) in enumerate([("b", "ckpt.pt"), ("a", "best.pt"), ("b", "best.pt"), ("b", "final.pt")]):
        save_run(random_model(age), f"out/{folder}", file)
        os.utime(f"out/{folder}/{file}", (10_000 - age, 10_000 - age))  # out/b/ckpt.pt is the newest file of all.
    assert report()["model"] == "out/b/best.pt"
    os.utime("out/a/best.pt", (20_000, 20_000))
    assert report()["model"] == "out/a/best.pt"
    assert report("--out_dir=out/b")["model"] == "out/b/best.pt"
    assert report("--init_from=out/b/ckpt.pt")["model"] == "out/b/ckpt.pt"
    Path("out/b/best.pt").unlink()
    assert report("--out_dir=out/b")["model"] == "out/b/ckpt.pt"


def test_the_config_file_of_a_training_serves_with_its_init_from_ignored(report):
    save_run(random_model(1), "out/b")
    save_run(random_model(), "out/a")
    values = {f.name: f.default for f in fields(train.Settings)}
    values |= dict(init_from="gpt2-xl", out_dir="out/b", dataset="tiny", block_size=4, compile=True, batch_size=5)
    Path("run.py").write_text("".join(f"{key} = {value!r}\n" for key, value in values.items()))
    found = report("run.py")
    assert found == report("--out_dir=out/b", "--batch_size=5")
    assert (found["model"], found["results"][0]["block_size"]) == ("out/b/ckpt.pt", 16)


def test_a_huggingface_folder_is_evaluated_as_its_checkpoint_is(run, report):
    save_run(random_model())
    save_huggingface(random_model(), "hf")
    assert report("--init_from=hf", "--dataset=tiny") == report() | {"model": "hf"}
    before = sorted(Path().rglob("*"))
    assert run("--init_from=hf", "--dataset=tiny")[0] == 0
    assert sorted(Path().rglob("*")) == before  # There is no checkpoint to write a report beside.


def test_only_the_table_goes_to_standard_output(run):
    save_run(random_model())
    _, out, err = run()
    assert "tokens/s" in err
    assert "device cpu" in err
    assert "tokens/s" not in out
    assert "device" not in out


# ---- progress ----


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, as eval.py reads it: a list of one number."""
    now = [0.0]
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def run_through(batches, clock, seconds):
    """Take so many batches, each in so many seconds."""
    for i, batch in enumerate(evaluation.with_progress(list(range(batches)), "documents")):
        assert batch == i
        clock[0] += seconds


def test_a_log_has_a_line_a_minute(clock, capsys):
    run_through(1980, clock, 0.5)
    assert capsys.readouterr() == ("", "".join(f"documents: {n:,} of 1,980 batches\n" for n in range(120, 1980, 120)))


def test_a_batch_of_many_minutes_has_one_line(clock, capsys):
    run_through(3, clock, 400)
    assert capsys.readouterr().err == "documents: 1 of 3 batches\ndocuments: 2 of 3 batches\n"


def test_less_than_a_minute_has_no_line(clock, capsys):
    run_through(60, clock, 1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_the_bar_alone(clock, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run_through(3, clock, 400)
    assert "0/3" in terminal.getvalue() and "of 3 batches" not in terminal.getvalue()


def test_the_lines_are_those_of_the_evaluation(run, monkeypatch):
    save_run(random_model())
    assert "batches" not in run()[2]
    monkeypatch.setattr(evaluation, "SECONDS_BETWEEN_LINES", 0)
    _, out, err = run("--batch_size=2")
    sizes = [len(d.encode()) for d in DOCUMENTS]
    windows = {"stream": math.ceil((sum(sizes) - 1) / 16), "documents": sum(math.ceil(size / 16) for size in sizes)}
    for protocol, n in windows.items():
        assert f"{protocol}: 1 of {math.ceil(n / 2)} batches\n" in err
    assert "batches" not in out


# ---- mistakes ----


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--stride=17"], "stride=17 is more than block_size=16"),
        (["--stride=9", "--block_size=8"], "stride=9 is more than block_size=8"),
        (["--block_size=17"], "block_size=17 is more than the model's 16"),
        (["--block_size=-1"], "block_size"),
        (["--stride=-1"], "stride"),
        (["--batch_size=-1"], "batch_size"),
        (["--split=valid"], "one of"),
        (["--split=train"], "no train split (there: val, test)"),
        (["--dataset=nothing"], "no dataset 'data/nothing' (there: letters, short, tiny)"),
        (["--dataset=letters"], "tokenizer"),
        (["--dataset=short"], "nothing to score"),
        (["--out_dir=out/none"], "no checkpoint in out/none"),
        (["--init_from=out/a"], "neither a checkpoint nor"),
        (["--init_from=out/b/broken.pt"], "is damaged"),
        (["--init_from=out/b/unsaid.pt"], "--dataset=NAME"),
        (["--json=no/such/folder.json"], "--json=PATH"),
        (["--json=out"], "--json=PATH"),
        (["--json=/proc/self/comm"], "--json=PATH"),  # a file in a folder that takes no other
        (["--protocol=lm_eval"], "that protocol is WikiText's"),
        (["--protocol=words"], "one of"),
        (["--device=tpu"], "device=tpu"),
    ],
)
def test_a_mistake_is_one_line(run, args, says):
    save_run(random_model(), "out/b")
    save_run(random_model(), "out/b", "unsaid.pt", dataset="")
    Path("out/a").mkdir()
    Path("out/b/broken.pt").write_bytes(Path("out/b/ckpt.pt").read_bytes()[:-100])
    write_dataset("short", "test", documents=["x"])
    Path("data/letters").mkdir()
    np.zeros(99, "<u2").tofile("data/letters/test.bin")  # nanoGPT's, of GPT-2 ids
    status, _, err = run(*args)
    assert status == 2
    assert says in err.splitlines()[-1]
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    assert not list(Path().rglob("eval_*.json"))


def test_no_run_at_all_is_one_line(run):
    status, out, err = run()
    assert (status, out) == (2, "")
    assert err.startswith("eval.py: there is no run under out")
    assert len(err.splitlines()) == 1


def test_a_nanogpt_checkpoint_whose_vocabulary_is_not_here_is_one_line(run):
    """Without its dataset's meta.pkl it would pass for GPT-2's, and it has too few ids for that."""
    save_run(random_model(vocab_size=65), tokenizer="", dataset="letters")
    Path("data/plain").mkdir()
    random_ids(60, 50257).tofile("data/plain/val.bin")
    status, out, err = run("--dataset=plain")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_a_token_file_that_is_not_what_meta_json_describes_is_refused(run):
    save_run(random_model())
    ids = np.fromfile("data/tiny/test.bin", "<u2")
    ids[5] += 1
    ids.tofile("data/tiny/test.bin")
    status, out, err = run()
    assert (status, out) == (2, "")
    assert "data/tiny/test.bin is not the file" in err
    assert len(err.splitlines()) == 1
