"""Perplexity of a model on a split of a dataset, by named protocols.

    python eval.py                                     the newest run under out/, on its own dataset
    python eval.py config/books.py --split=val --protocol=documents
    python eval.py --init_from=gpt2 --dataset=wikitext103 --stride=512

`stream`: all tokens of the split in one row, without end-of-texts, cut into windows. With stride 0 (or block_size) the
windows are disjoint and have block_size predictions each. With 0 < stride < block_size they have block_size tokens,
each window begins `stride` after the one before, and only what no window scored before is scored. All tokens but the
first are scored.
`documents`: each document by itself, after one end-of-text, in windows of block_size predictions. A later window begins
with the token before it. A short last window reaches back for context. All tokens are scored.
`lm_eval`: the same over WikiText's pages, as lm-evaluation-harness's task `wikitext` detokenizes them.
Each of these tokens is scored exactly once. The +- of a figure is its standard error over the documents. The JSON also
has the loss by position, which is the number of tokens that a window has before the one that is scored: what context is
worth. `python plot.py` draws it.
"""

import math
import sys
import time
from dataclasses import dataclass
from typing import Literal

from lib import checkpoint, data, files, runtime, settings, wikitext
from lib.settings import UserError

import numpy as np
from tqdm import tqdm

PROTOCOLS = ("stream", "documents", "lm_eval")
SECONDS_BETWEEN_LINES = 60  # of the progress that is told where there is no terminal


@dataclass
class Settings:
    out_dir: str = ""  # the run to evaluate; '' is the newest under out/
    init_from: str = ""  # instead of a run: a checkpoint, gpt2*, a Hugging Face folder; a,b: their mean; '' is the run
    dataset: str = ""  # a folder under data/; '' is the one that the model was trained on
    split: Literal["", "train", "val", "test"] = ""  # train, val, test; '' is test where there is one, else val
    protocol: Literal["", "stream", "documents", "lm_eval"] = ""  # stream, documents, lm_eval; '' is all that apply
    block_size: int = 0  # tokens in a window; 0 is the model's own
    stride: int = 0  # tokens from a window of `stream` to the next one; 0 is block_size
    batch_size: int = 0  # windows at once; 0 is 8 on a GPU, and on a CPU 1, since its cache holds no more
    json: str = ""  # where the figures are written, - for standard output; '' is eval_SPLIT.json beside a checkpoint
    # machine
    device: str = "auto"  # auto, cuda, cuda:1, mps, cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto, float32, bfloat16, float16
    compile: Literal["auto", True, False] = False  # auto, True, False: torch.compile, which pays for large splits only


def read(dataset, split, protocol, block_size, stride):
    """(ids, the windows over them, where each document begins among them) of a protocol.

    Raises UserError where the text is not there or not whole, or where there is nothing to score.
    """
    if protocol == "stream":
        if dataset.eot < 0:  # Nothing says where documents begin.
            ids, starts = dataset.text_ids(split), np.zeros(1, np.int64)
        else:
            ids = dataset.document_ids(split)
            starts = np.flatnonzero(ids == dataset.eot)
            ids, starts = ids[ids != dataset.eot], starts - np.arange(len(starts))
        windows = data.stream_windows(len(ids), block_size, stride)
    else:
        ids = dataset.document_ids(token_file(split, protocol))
        starts = np.flatnonzero(ids == dataset.eot)
        windows = data.document_windows(ids, dataset.eot, block_size)
        # The longest windows come first, so that those of a batch are alike.
        windows.sort(key=lambda window: window[0] - window[1])
    if not windows:
        raise UserError(f"{dataset.folder} has too few tokens in {split}; there is nothing to score")
    return ids, windows, starts


def token_file(split, protocol):
    return f"{split}_lm_eval" if protocol == "lm_eval" else split


def score(model, ids, windows, starts, block_size, batch_size, rt, name=""):
    """Sums of -ln p in nats over windows of ids (n,): (of each document (D,), tokens scored of each (D,), of each group
    of positions (G,), tokens scored of each (G,)).

    The sums are taken in float64. `starts` (D,) says where documents begin. A token's position is the number of tokens
    before it in its window. Group 0 is position 1, group g has those from 2^(g-1) + 1 to 2^g.
    """
    limits = 2 ** np.arange((block_size - 1).bit_length() + 1)  # last position of each group
    nlls, scored = np.zeros(len(starts)), np.zeros(len(starts), np.int64)
    nlls_at, scored_at = np.zeros(len(limits)), np.zeros(len(limits), np.int64)
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
    for part in with_progress(batches, name):
        # A compiled model wants one shape, so empty windows fill the last batch.
        part += [(0, 1, 1)] * (batch_size - len(part) if rt.compile else 0)
        width = block_size if rt.compile else max(end - 1 - begin for begin, end, _ in part)
        with rt.autocast():
            nll = model.nll(*rt.to_device(*data.window_batch(ids, part, width))).cpu().numpy()
        targets = np.concatenate([np.arange(first, end) for _, end, first in part])
        document = np.searchsorted(starts, targets, side="right") - 1
        np.add.at(nlls, document, nll)
        np.add.at(scored, document, 1)
        position = np.concatenate([np.arange(first, end) - begin for begin, end, first in part])
        group = np.searchsorted(limits, position)
        np.add.at(nlls_at, group, nll)
        np.add.at(scored_at, group, 1)
    return nlls, scored, nlls_at, scored_at


def with_progress(batches, name):
    """Yield the batches under a bar on a terminal, and elsewhere with a line a minute on standard error."""
    bar = tqdm(batches, desc=name, unit="batch", leave=False, disable=None)
    said = time.monotonic()
    for done, batch in enumerate(bar):
        if bar.disable and time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            settings.say(f"{name}: {done:,} of {len(batches):,} batches", file=sys.stderr)
            said = time.monotonic()
        yield batch


# ---- figures ----


def units(protocol, counts, scored):
    """The denominator of each figure: {figure: number, or an array (D,) of the documents'; None where not known}."""
    words, lines = counts.get("words"), counts.get("lines")
    if protocol == "stream":  # A line's end is a word there, as in the vocabularies of the word-level papers.
        words = None if words is None or lines is None else words + lines
    return {
        "token_ppl": scored,
        "word_ppl": words,
        "byte_ppl": counts.get("bytes"),
        "bits_per_byte": counts.get("bytes"),
    }


def figures(nll, per):
    """Perplexities and bits per byte of a sum in nats; None where a count is not known."""
    return {
        figure: None if not n else nll / n / math.log(2) if figure == "bits_per_byte" else exp(nll / n)
        for figure, n in per.items()
    }


def standard_errors(values, nlls, per):
    """The standard error of each of the figures `values`, from the nats nlls (D,) and the units (D,) of documents.

    A figure is a function of the ratio R = sum(nll) / sum(units). If the documents are drawn independently, the error
    of R is sqrt(D / (D - 1) * sum((nll_d - R units_d)^2)) / sum(units) (Cochran 1977, 6.4). By the delta method that of
    exp(R) is exp(R) times as much. An error is None where there are not two documents, where their counts are not
    known, or where it is beyond a float64.
    """
    errors, D = {}, len(nlls)
    for figure, value in values.items():
        if value is None or per[figure] is None or D < 2:
            errors[figure] = None
            continue
        n = int(per[figure].sum())
        residuals = nlls - nlls.sum() / n * per[figure]
        error = math.sqrt(D / (D - 1) * (residuals**2).sum()) / n
        error *= 1 / math.log(2) if figure == "bits_per_byte" else value
        errors[figure] = error if error < math.inf else None
    return errors


def exp(x):
    """e^x; None where it is beyond a float64, which JSON could not hold either."""
    return math.exp(x) if x < 709 else None


def evaluate(model, text, counts, protocol, block_size, stride, batch_size, rt):
    """One entry of the report's results, from what read() gives and the counts in meta.json.

    Raises UserError where the loss is not finite.
    """
    ids, windows, starts = text
    nlls, each, nlls_at, scored_at = score(model, ids, windows, starts, block_size, batch_size, rt, protocol)
    nll = sum(nlls_at.tolist())
    if not math.isfinite(nll):
        raise UserError("the model gives no finite loss on this text; its weights have diverged")
    scored, expected = int(each.sum()), len(ids) - (1 if protocol == "stream" else len(starts))
    assert scored == expected, f"{scored} tokens scored of {expected}"
    values = figures(nll, units(protocol, counts, scored))
    columns = {k: np.array(v) for k, v in counts.get("per_document", {}).items()}
    return {
        "protocol": protocol,
        "block_size": block_size,
        "stride": stride if protocol == "stream" else 0,
        "tokens_scored": scored,
        "nll": nll,
        **values,
        "loss_by_position": by_position(nlls_at, scored_at, max(end - begin for begin, end, _ in windows) - 1),
        "documents": len(starts),
        "standard_error": standard_errors(values, nlls, units(protocol, columns, each)),
        "document_nll": nlls.tolist(),  # for the comparison of two models on the same documents
    }


def by_position(nlls, scored, highest):
    """The report's entry for each group of positions that has tokens, from the sums (G,) and the counts (G,).

    highest: the highest position that is scored.
    """
    groups = []
    for g, (nll, n) in enumerate(zip(nlls.tolist(), scored.tolist(), strict=True)):
        if n:
            first, last = 2**g // 2 + 1, min(2**g, highest)
            groups.append({"first": first, "last": last, "tokens_scored": n, "nll": nll, "loss": nll / n})
    return groups


def which_protocols(wanted, dataset, split):
    """The protocols to evaluate by: the one that is wanted, or all that the dataset has text for."""
    has = {"stream": True, "documents": dataset.eot >= 0, "lm_eval": f"{split}_lm_eval" in dataset.paths}
    if not has["lm_eval"]:
        older = dataset.name == "wikitext103" and split != "train"  # prepared before there was this protocol
        lacks = f"{dataset.folder} has no {split}_lm_eval.bin for lm_eval: "
        lacks += (
            "remove the folder and run python prepare_wikitext103.py, which writes it now"
            if older
            else "that protocol is WikiText's val and test; here take stream or documents"
        )
        if wanted == "lm_eval":
            raise UserError(lacks)
        if older and not wanted:
            settings.say(lacks, file=sys.stderr)
    return [wanted] if wanted else [protocol for protocol in PROTOCOLS if has[protocol]]


# These figures are what others have published of it with GPT-2's tokens: (protocol, source, figures).
PUBLISHED = (
    ("stream", "Transformer, 125 M, from scratch (Hyena paper, table 4.3)", {"token_ppl": 18.6}),
    ("stream", "Hyena-3-slim, 125 M, and hybrid H3, 125 M (the same)", {"token_ppl": 18.5}),
    ("stream", "Hyena-S5 (S5 repository)", {"token_ppl": 18.3}),
    ("stream", "GPT-2 small, 124 M, from scratch (Monarch paper)", {"token_ppl": 20.6}),
    (
        "lm_eval",
        "GPT-2 small, 124 M, zero-shot, block 1,024 (published runs of the task)",
        {"word_ppl": 37.3698, "byte_ppl": 1.9682, "bits_per_byte": 0.9769},
    ),
)
FORMATS = {"token_ppl": ",.4f", "word_ppl": ",.4f", "byte_ppl": ",.4f", "bits_per_byte": ".4f"}


def main():
    s = settings.load(Settings, command_line_only=("init_from", "block_size", "compile"))
    settings.check(s, not_negative="batch_size block_size stride")
    rt = runtime.choose(s.device, s.dtype, s.compile)
    s.batch_size = s.batch_size or (1 if rt.device.type == "cpu" else 8)
    opened = checkpoint.open_run(s.out_dir, s.init_from)
    name, model = s.dataset or opened.dataset, opened.model.to(rt.device).eval()
    if not name:
        raise UserError(f"{opened.name} does not say what it was trained on; name the data by --dataset=NAME")
    dataset = data.Dataset(name)
    dataset.check_tokenizer(opened)
    split = s.split or ("test" if "test" in dataset.paths else "val")
    T = s.block_size or model.config.block_size
    if T > model.config.block_size:
        raise UserError(f"block_size={T} is more than the model's {model.config.block_size} positions; take less")
    if s.stride > T:
        raise UserError(f"stride={s.stride} is more than block_size={T} and would leave out tokens; take less")
    if 0 < s.stride == T:
        s.stride = 0
    if s.stride and s.protocol not in ("", "stream"):
        raise UserError(f"stride={s.stride} is for --protocol=stream; {s.protocol} has none")
    path = s.json or opened.path and opened.path.with_name(f"eval_{split}.json")
    if path:
        files.check_json(path)
    dataset.tokens(split)  # raises, naming the splits that there are
    texts = {p: read(dataset, split, p, T, s.stride) for p in which_protocols(s.protocol, dataset, split)}
    counts = {protocol: dataset.splits[token_file(split, protocol)] for protocol in texts}

    size = f"{model.num_params() / 1e6:.4g} M parameters"
    settings.say(f"{opened.name}: {size}, step {opened.iter_num:,}; {rt.why}", file=sys.stderr)
    report = {"model": opened.name, "dataset": name, "split": split, "results": []}
    with runtime.memory_advice(lambda: f" with batch_size={s.batch_size}; take a smaller --batch_size"):
        runtime.compile_parts(model, rt, s.batch_size, T)
        if rt.device.type == "cuda":  # A GPU takes a second to start, which is no part of its rate.
            ids, windows, starts = next(iter(texts.values()))
            score(model, ids, windows[: s.batch_size], starts, T, s.batch_size, rt)
        began = time.perf_counter()
        for protocol, text in texts.items():
            report["results"].append(evaluate(model, text, counts[protocol], protocol, T, s.stride, s.batch_size, rt))
    rate = sum(r["tokens_scored"] for r in report["results"]) / (time.perf_counter() - began)

    known = wikitext.VAL_AND_TEST["test"]
    is_wikitext = known.items() <= dataset.splits[split].items()  # No other tokenizer gives so many tokens.
    lines = [f"\n{name}, {split} split, {opened.name}\n"]
    lines += [table(report["results"], opened.name, PUBLISHED if is_wikitext else ()), ""]
    lines += [explain(protocol, T, s.stride, counts[protocol]) for protocol in texts]
    lines += ["+- is the standard error over the documents. Compare a figure within its column and its protocol only."]
    settings.say("\n".join(lines), file=sys.stderr if path == "-" else sys.stdout)
    settings.say(f"{rate:,.0f} tokens/s", file=sys.stderr)
    if path:
        files.write_json(path, report)
    if path and path != "-":
        settings.say(f"{path} has the figures at full precision", file=sys.stderr)


# ---- what is printed ----


def table(results, model, published=()):
    """The figures of several protocols as lines of text; a dash is a figure that is not known.

    The published figures of a protocol stand under its row. A window or a count that was not published is a dash.
    """
    rows = [("protocol", "block", "stride", "scored", "token ppl", "word ppl", "byte ppl", "bits per byte", "model")]
    for r in results:
        block, stride = f"{r['block_size']:,}", f"{r['stride'] or r['block_size']:,}"
        shown = [cell(r[k], r["standard_error"][k], form) for k, form in FORMATS.items()]
        rows.append((r["protocol"], block, stride, f"{r['tokens_scored']:,}", *shown, model))
        for protocol, source, values in published:
            if (protocol, r["stride"]) == (r["protocol"], 0):  # None of the published figures is strided.
                rows.append((protocol, *"---", *(str(values.get(k, "-")) for k in FORMATS), source))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows)


def cell(value, error, form):
    return "-" if value is None else f"{value:{form}}" if error is None else f"{value:{form}} +- {error:{form}}"


def explain(protocol, block_size, stride, counts):
    """A line that says what a protocol's figures measure."""
    windows = f"windows of {block_size:,} predictions"
    what = {
        "stream": f"every token but the first scored once, disjoint {windows}; end-of-texts left out",
        "documents": f"every token scored once, each document by itself after one end-of-text, {windows}",
        "lm_eval": f"lm-evaluation-harness's task wikitext, version 2, {windows}",
    }[protocol]
    if protocol == "stream" and stride:
        what = what.replace(f"disjoint {windows}", f"windows of {block_size:,} tokens, each {stride:,} further")
    known = []
    if counts["words"] is not None:
        known += [f"word ppl over {counts['words']:,} words"]
        known[-1] += f" + {counts['lines']:,} lines" if protocol == "stream" and counts["lines"] is not None else ""
    if counts["bytes"] is not None:
        known += [f"bits per byte over {counts['bytes']:,} bytes"]
    return f"{protocol}: {'; '.join([what, ', '.join(known)]) if known else what}."


if __name__ == "__main__":
    settings.run(main)
