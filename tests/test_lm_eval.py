"""Our `lm_eval` protocol against EleutherAI's lm-evaluation-harness itself.

    pip install "lm-eval[hf]" && WIKITEXT_RAW=FOLDER python -m pytest -m slow tests/test_lm_eval.py

The harness's own task `wikitext` scores pages of the folder's raw files, with a model that export.py wrote.
"""

import importlib.util
import itertools
import json
from pathlib import Path

from lib import data, prepare, tokenizer, wikitext

import numpy as np
import pytest
from conftest import WIKITEXT, needs_wikitext
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        None in (importlib.util.find_spec("lm_eval"), importlib.util.find_spec("accelerate")),
        reason='lm-evaluation-harness is not installed: pip install "lm-eval[hf]"',
    ),
]


def harness_pages(split):
    """The pages of the harness's data set on the hub, by the rule of the script that made it."""
    pages, page = [], None
    for line in (WIKITEXT / wikitext.RAW[split]).read_bytes().decode().split("\n"):
        stripped = line.replace("= = =", "===").replace("= =", "==").strip()
        if stripped.startswith("= ") and stripped.endswith(" ="):
            page = []
            pages.append(page)
        if page is not None:
            page.append(line)
    return ["\n".join(page) for page in pages]


def detokenizer():
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return lambda page: wikitext_detokenizer({"page": page})


@settings(max_examples=300, deadline=None, database=None)
@given(lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5), block_size=st.integers(1, 20))
def test_the_windows_are_those_of_the_harness(lengths, block_size):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    pages = np.split(np.arange(1000, 1000 + sum(lengths)), np.cumsum(lengths)[:-1])
    eot, theirs, ours = 256, [], []
    for page in pages:
        for pair in get_rolling_token_windows(page.tolist(), eot, block_size, context_len=1):
            context, continuation = make_disjoint_window(pair)
            theirs.append((context, continuation))
    ids = np.concatenate([[eot, *page] for page in pages])
    for begin, end, first in data.document_windows(ids, eot, block_size):
        ours.append((ids[begin:first].tolist(), ids[first:end].tolist()))
    assert ours == theirs


marks = ["s '", "/' 5/", " @-@ ", " @,@ ", " @.@ ", " ( ", " ) ", "[ ", " ]", "{ ", " }", '"', ' " ', "'", " ' ", " 's"]
marks += [f" {m} " for m in ":;.!?,"] + ["= ", "= = = =", " ° ", " \n", "\n ", " N ", " ", "\t", "\u00a0", "word", "é"]


@settings(max_examples=2000, deadline=None, database=None)
@given(text=st.lists(st.sampled_from(marks) | st.text(max_size=3), max_size=25).map("".join))
def test_any_text_is_detokenized_as_the_harness_does(text):
    assert wikitext.detokenize(text) == detokenizer()(text)


@needs_wikitext
@pytest.mark.parametrize(("split", "number"), [("val", 60), ("test", 62)])
def test_wikitexts_pages_are_those_of_the_harness(split, number):
    theirs = [(detokenizer()(page), len(page.encode())) for page in harness_pages(split)]
    pieces = wikitext.page_pieces(split, wikitext.file_rows(WIKITEXT / wikitext.RAW[split]))
    ours = [(text, counts["bytes"]) for name, text, _, counts in pieces if name == f"{split}_lm_eval"]
    assert len(ours) == number and ours == theirs


def harness_figures(folder, pages, batch_size):
    """The figures of simple_evaluate() for a folder's model by the task `wikitext`, on these pages and not its own."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext import preprocess_wikitext

    Path("pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    task = {
        "task": "wikitext_on_this_disk",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "pages.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": preprocess_wikitext.wikitext_detokenizer,
        "process_results": preprocess_wikitext.process_results,
        "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size)
    results = lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0)["results"]["wikitext_on_this_disk"]
    return [results[f"{m},none"] for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")]


@needs_wikitext
@pytest.mark.parametrize(("spec", "n_pages", "steps"), [("bytes", 6, 1500), ("gpt2", 3, 20)])
def test_the_figures_are_those_of_the_harness(script, tmp_path, monkeypatch, spec, n_pages, steps):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pieces = list(wikitext.page_pieces("test", wikitext.file_rows(WIKITEXT / wikitext.RAW["test"])))
    pieces = pieces[:n_pages] + pieces[62 : 62 + n_pages]  # pages of the split itself, then those for lm_eval
    pages = wikitext.pages(wikitext.file_rows(WIKITEXT / wikitext.RAW["val"]))
    train = [("train", "".join(page), True) for page in itertools.islice(pages, 20)]
    prepare.write("wiki", tokenizer.load(spec), [*train, *pieces], 1)
    shape = ["--n_layer=2", "--n_head=4", "--n_embd=64", "--block_size=64", "--dropout=0.0"]
    settings = ["--dataset=wiki", "--device=cpu", "--compile=False", "--eval_interval=0", "--learning_rate=6e-3"]
    settings += ["--batch_size=16", "--gradient_accumulation_steps=1", "--warmup_iters=50", f"--max_iters={steps}"]
    for args in (["train", *shape, *settings, "--out_dir=out/a"], ["export", "--out_dir=out/a", "--hf_dir=hf"]):
        status, _, err = script(*args)
        assert status == 0, err

    def ours(*args):
        status, _, err = script("eval", "--init_from=hf", "--dataset=wiki", "--device=cpu", "--json=e.json", *args)
        assert status == 0, err
        (result,) = json.loads(Path("e.json").read_text())["results"]
        return result

    result = ours("--protocol=lm_eval")
    theirs = harness_figures("hf", harness_pages("test")[:n_pages], batch_size=8)
    mine = [result[k] for k in ("word_ppl", "byte_ppl", "bits_per_byte")]
    assert mine == pytest.approx(theirs, rel=1e-4)
    if spec == "bytes":  # This model has learned to use its context, so other windows would show.
        assert ours("--protocol=lm_eval", "--block_size=4")["nll"] > 1.05 * result["nll"]
    print(f"{spec}: ours {mine}, the harness's {theirs}")
