"""Perplexity of a model on a split of a dataset, by a named protocol.

    python eval.py                                     the newest run under out/, on its own dataset
    python eval.py config/books.py --split=val
    python eval.py --init_from=gpt2 --dataset=wikitext103 --stride=512

`stream`: all tokens of the split in one row, without end-of-texts, cut into windows. stride 0 (or block_size): disjoint
windows of block_size predictions. 0 < stride < block_size: windows of block_size tokens, each stride further than the
one before; in each only what no window scored before is scored. Every token but the first is scored exactly once.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

import checkpoint
import config
import data
import runtime


@dataclass
class Settings:
    out_dir: str = ""  # the run to evaluate; '' is the newest under out/
    init_from: str = ""  # instead of a run: a checkpoint, gpt2*, a Hugging Face folder
    dataset: str = ""  # '' is the one that the model was trained on
    split: Literal["", "train", "val", "test"] = ""  # train, val, test; '' is test where there is one, else val
    block_size: int = 0  # tokens in a window; 0 is the model's own
    stride: int = 0  # tokens from a window to the next; 0 is block_size
    batch_size: int = 8  # windows at once
    json: str = ""  # where the figures are written; '' is eval_SPLIT.json beside the checkpoint
    # machine
    device: str = "auto"  # auto, cuda, cuda:1, mps, cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto, float32, bfloat16, float16
    compile: Literal["auto", True, False] = False  # auto, True, False: torch.compile; pays for large splits only


def stream(model, ids, block_size, stride, batch_size, rt):
    """(sum of -ln p in nats, tokens scored) of the `stream` protocol over ids (n,). The sum is taken in float64."""
    windows, total, scored = data.stream_windows(len(ids), block_size, stride), 0.0, 0
    if rt.compile:
        runtime.compile_blocks(model, rt, batch_size, block_size)
    for i in tqdm(range(0, len(windows), batch_size), unit="batch", leave=False, disable=not sys.stderr.isatty()):
        part = windows[i : i + batch_size]
        part += [(0, 1, 1)] * (batch_size - len(part) if rt.compile else 0)  # one shape, compiled once
        with rt.autocast():
            nll = model.nll(*rt.to_device(*data.window_batch(ids, part, block_size)))
        total, scored = total + nll.cpu().double().sum().item(), scored + len(nll)
    assert scored == len(ids) - 1, f"{scored} tokens scored of {len(ids) - 1}"
    return total, scored


def figures(nll, scored, counts):
    """Perplexities and bits per byte of a sum in nats, from a split's counts; None where a count is not known."""
    words = counts["words"] + counts["lines"] if None not in (counts["words"], counts["lines"]) else None
    byte = nll / counts["bytes"] if counts["bytes"] else None
    return {
        "token_ppl": exp(nll / scored),
        "word_ppl": exp(nll / words) if words else None,
        "byte_ppl": None if byte is None else exp(byte),
        "bits_per_byte": None if byte is None else byte / math.log(2),
    }


def exp(x):
    """e^x; None where it is beyond a float64, which JSON could not hold either."""
    return math.exp(x) if x < 709 else None


def main():
    s = config.load(Settings, command_line_only=("init_from", "block_size", "compile"))
    config.check(s, positive="batch_size", not_negative="block_size stride")
    rt = runtime.choose(s.device, s.dtype, s.compile)
    opened = checkpoint.open_run(s.out_dir, s.init_from)
    name, model = s.dataset or opened.dataset, opened.model.to(rt.device).eval()
    if not name:
        raise config.UserError(f"{opened.name} does not say what it was trained on; --dataset=NAME")
    dataset = data.Dataset(name)
    spec = opened.tokenizer or data.nanogpt_tokenizer(opened.dataset, opened.model.config.vocab_size)
    if spec != dataset.tokenizer_spec:
        raise config.UserError(
            f"{opened.name} has the tokenizer {spec[:40]!r}, data/{name} was made with "
            f"{dataset.tokenizer_spec[:40]!r}; take a dataset with the model's"
        )
    split = s.split or ("test" if "test" in dataset.paths else "val")
    T = s.block_size or model.config.block_size
    if T > model.config.block_size:
        raise config.UserError(
            f"block_size={T} is more than the model's {model.config.block_size} positions; take less"
        )
    if s.stride > T:
        raise config.UserError(f"stride={s.stride} is more than block_size={T} and would leave out tokens; take less")
    if 0 < s.stride == T:
        s.stride = 0
    ids, counts = dataset.text_ids(split), dataset.splits[split]
    if len(ids) < 2:
        raise config.UserError(f"data/{name} has {len(ids)} tokens in {split}; there is nothing to score")

    size = f"{model.num_params() / 1e6:.1f} M parameters"
    print(f"{opened.name}: {size}, step {opened.iter_num:,}; {rt.why}", file=sys.stderr)
    began = time.perf_counter()
    with runtime.memory_advice(f" with batch_size={s.batch_size}; take a smaller --batch_size"):
        nll, scored = stream(model, ids, T, s.stride, s.batch_size, rt)
    seconds = time.perf_counter() - began
    if not math.isfinite(nll):
        raise config.UserError(f"{opened.name} gives no finite loss on this text; its weights have diverged")
    result = {"protocol": "stream", "block_size": T, "stride": s.stride, "tokens_scored": scored, "nll": nll}
    result |= figures(nll, scored, counts)
    report = {"model": opened.name, "dataset": name, "split": split, "results": [result]}

    print(f"\n{name}, {split} split, {opened.name}\n")
    print(table(report["results"]))
    strided, plain = f"windows of {T:,} tokens, each {s.stride:,} further", f"disjoint windows of {T:,} predictions"
    print(f"\nstream: every token but the first scored once, {strided if s.stride else plain}; end-of-texts left out.")
    if counts["words"] is not None:
        words, lines = counts["words"], counts["lines"]
        print(f"Word perplexity over {words:,} words + {lines:,} lines, bits per byte over {counts['bytes']:,} bytes.")
    print(f"{scored / seconds:,.0f} tokens/s", file=sys.stderr)
    path = Path(s.json) if s.json else opened.path and opened.path.with_name(f"eval_{split}.json")
    if path:
        try:
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise config.UserError(f"{path} can't be written ({error.strerror}); --json=PATH names another") from None
        print(f"{path} has the figures at full precision", file=sys.stderr)


def table(results):
    """The figures of several protocols as lines of text; a dash is a figure whose count is not known."""
    head = ("protocol", "block", "stride", "tokens scored", "token ppl", "word ppl", "bits per byte")
    rows = [head]
    for r in results:
        shown = [f"{r[k]:{form}}" if r[k] is not None else "-" for k, form in FORMATS.items()]
        rows.append((r["protocol"], f"{r['block_size']:,}", f"{r['stride'] or r['block_size']:,}", *shown))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


FORMATS = {"tokens_scored": ",", "token_ppl": ",.4f", "word_ppl": ",.4f", "bits_per_byte": ".4f"}


if __name__ == "__main__":
    config.run(main, checkpoint.CheckpointError, data.DataError, runtime.RuntimeChoiceError)
