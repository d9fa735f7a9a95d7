"""Write text with a model.

    python sample.py                                              the newest run under out/
    python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=4
    python sample.py --start=FILE:prompt.txt --temperature=0      greedy
    echo "def main" | python sample.py --start=-
    python sample.py --dtype=bfloat16                             on a CPU faster for one sample, by rounded weights

The text goes to standard output, what the program says of itself to standard error.
"""

import codecs
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import config
import data
import runtime


@dataclass
class Settings:
    out_dir: str = ""  # the run to sample from; '' is the newest under out/
    init_from: str = ""  # instead of a run: a checkpoint, gpt2*, a Hugging Face folder
    start: str = ""  # the prompt: text, FILE:path, or - for standard input; '' is the beginning of a document
    num_samples: int = 1  # drawn at once
    max_new_tokens: int = 500  # the most that a sample gets; one ends by itself at end-of-text
    temperature: float = 0.8  # below 1 more likely text; 0 always takes the likeliest token
    top_k: int = 200  # draw among so many of the likeliest tokens; 0 is all
    top_p: float = 1.0  # draw among the likeliest that together have this probability
    seed: int = 1337  # the same seed draws the same text
    # machine
    device: str = "auto"  # auto, cuda, cuda:1, mps, cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto, float32, bfloat16, float16


def read_prompt(start):
    """The prompt that --start names. Raises UserError where it cannot be read."""
    try:
        if start == "-":
            return sys.stdin.buffer.read().decode().removeprefix("\ufeff")
        if start.startswith("FILE:"):
            return Path(start[5:]).read_bytes().decode().removeprefix("\ufeff")
        return start.encode("utf-8", "surrogateescape").decode()  # the bytes that the shell handed over
    except OSError as error:
        raise config.UserError(f"--start={start}: {error.strerror}") from None
    except UnicodeError as error:
        unit = "character" if isinstance(error, UnicodeEncodeError) else "byte"
        raise config.UserError(f"the prompt is not UTF-8 at {unit} {error.start}; convert it") from None


def encode_prompt(text, tok):
    """A prompt's ids; the text <|endoftext|> in it is the end-of-text, an empty prompt the beginning of a document."""
    if tok.eot < 0:
        return tok.encode(text or ("\n" if "\n" in tok.chars else tok.chars[0])).tolist()
    ids = []
    for i, part in enumerate(text.split(data.ENDOFTEXT)):
        ids += [tok.eot] if i else []
        ids += tok.encode(part).tolist()
    return ids or [tok.eot]


def main():
    s = config.load(Settings, command_line_only=("init_from",))
    config.check(s, positive="num_samples max_new_tokens", not_negative="temperature top_k seed")
    if not 0 < s.top_p <= 1:
        raise config.UserError(f"top_p={s.top_p}: top_p is a probability, more than 0 and at most 1")
    text = read_prompt(s.start)
    rt = runtime.choose(s.device, s.dtype, compile=False)
    opened = checkpoint.open_run(s.out_dir, s.init_from)
    tok = data.tokenizer(data.model_tokenizer(opened))
    model = opened.model.to(rt.device).eval()
    packs = rt.device.type == "cpu" and torch.backends.mkldnn.is_available()
    packs = packs and (rt.dtype == torch.float32 or s.num_samples == 1)
    c = model.config
    if 2 * c.n_layer * c.n_embd * c.block_size * rt.dtype.itemsize * s.num_samples > rt.memory() > 0:  # keys and values
        raise config.UserError(
            f"num_samples={s.num_samples:,} at once do not fit in memory; take a smaller --num_samples"
        )
    if packs:
        model.pack(s.num_samples, rt.dtype)
    prompt = encode_prompt(text, tok)
    print(f"{opened.name}: step {opened.iter_num:,}; {rt.why}", file=sys.stderr)
    if len(prompt) > c.block_size:
        print(f"of the prompt's {len(prompt):,} tokens the last {c.block_size:,} are read", file=sys.stderr)

    generator = torch.Generator(rt.device).manual_seed(s.seed)
    streams = s.num_samples == 1
    advice = runtime.memory_advice("; take a smaller --num_samples")
    decoder, samples, drawn_in_all, began = codecs.getincrementaldecoder("utf-8")("replace"), [], 0, time.perf_counter()
    sys.stdout.reconfigure(encoding="utf-8")
    if streams:
        print(text, end="", flush=True)
    with torch.inference_mode(), nullcontext() if packs else rt.autocast(), advice:
        idx = torch.tensor([prompt] * s.num_samples, device=rt.device)  # (B, T)
        options = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, eot=tok.eot, vocab_size=tok.vocab_size)
        try:
            for drawn in model.generate(idx, s.max_new_tokens, **options, generator=generator):
                ids = drawn.tolist()
                if streams and ids[0] != tok.eot:
                    print(decoder.decode(tok.decode(ids)), end="", flush=True)
                samples.append(ids)
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{opened.name}: {error}") from None
    seconds = time.perf_counter() - began
    for sample in [] if streams else zip(*samples, strict=True):
        ids = sample[: sample.index(tok.eot)] if tok.eot in sample else sample
        drawn_in_all += len(ids)
        print(text + tok.decode(ids).decode("utf-8", "replace"))
        print("-" * 15)
    if streams:
        print(decoder.decode(b"", final=True))
        drawn_in_all = sum(ids[0] != tok.eot for ids in samples)
    print(f"{drawn_in_all:,} tokens, {drawn_in_all / seconds:,.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    config.run(main, checkpoint.CheckpointError, data.DataError, runtime.RuntimeChoiceError)
