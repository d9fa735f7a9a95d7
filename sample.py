"""Write text with a model.

    python sample.py                                              the newest run under out/
    python sample.py --init_from=gpt2 --start="Once upon a time" --num_samples=4
    python sample.py --start=FILE:prompt.txt --temperature=0      greedy
    echo "def main" | python sample.py --start=-
    python sample.py --interactive=True                           each line typed is a prompt, until Ctrl-D
    python sample.py --dtype=float16                              rounded weights, which are faster on a CPU

The text goes to standard output. What the program says of itself goes to standard error.
"""

import codecs
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lib import captured, checkpoint, packed, runtime, settings, tokenizer
from lib.settings import UserError

import torch


@dataclass
class Settings:
    out_dir: str = ""  # the run to sample from; '' is the newest under out/
    init_from: str = ""  # instead of a run: a checkpoint, gpt2*, a Hugging Face folder; a,b: their mean; '' is the run
    start: str = ""  # the prompt: text, FILE:path, or - for standard input; '' is the beginning of a document
    interactive: bool = False  # take each line of standard input as a prompt, until the end of the file
    num_samples: int = 1  # samples that are drawn at once
    max_new_tokens: int = 500  # the most tokens that a sample gets; an end-of-text ends it earlier
    temperature: float = 0.8  # divisor of the logits: likelier text below 1; 0 always takes the likeliest token
    top_k: int = 200  # number of the likeliest tokens that are drawn from; 0 is all
    top_p: float = 1.0  # total probability of the likeliest tokens that are drawn from; 1 is all
    seed: int = 1337  # seed of the draws; the same seed writes the same text
    # machine
    device: str = "auto"  # auto, cuda, cuda:1, mps, cpu
    # On an x86 CPU both of the 16-bit kinds mean weights in float16, and all else in float32.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto, float32, bfloat16, float16


def read_prompt(start):
    """The prompt that --start names. Raises UserError where it cannot be read."""
    try:
        if start == "-":
            raw = sys.stdin.buffer.read()
        elif start.startswith("FILE:"):
            raw = Path(start[5:]).expanduser().read_bytes()
        else:
            raw = start.encode("utf-8", "surrogateescape")  # the bytes that the shell handed over
    except OSError as error:
        raise UserError(f"--start={start}: {error.strerror}; name a file that can be read") from None
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not UTF-8 at character {error.start}; convert it") from None
    return decode_prompt(raw)


def decode_prompt(raw):
    """The text of bytes, without a byte-order mark. Raises UserError."""
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 at byte {error.start}; convert it") from None


def typed_lines():
    """The lines of standard input as bytes, each asked for when the one before was answered."""
    while True:
        settings.say("> ", file=sys.stderr, end="")
        line = sys.stdin.buffer.readline()
        if not line:
            settings.say("", file=sys.stderr)
            return
        yield line.rstrip(b"\r\n")


def encode_prompt(text, tok):
    """A prompt's ids. The text <|endoftext|> becomes the end-of-text, and an empty prompt begins a document."""
    if tok.eot < 0:
        return tok.encode(text or ("\n" if "\n" in tok.chars else tok.chars[0])).tolist()
    ids = []
    for i, part in enumerate(text.split(tokenizer.ENDOFTEXT)):
        ids += [tok.eot] if i else []
        ids += tok.encode(part).tolist()
    return ids or [tok.eot]


def main():
    s = settings.load(Settings, command_line_only=("init_from",), bare_means="start")
    settings.check(s, positive="num_samples max_new_tokens", not_negative="temperature top_k seed")
    if not 0 < s.top_p <= 1:
        raise UserError(f"top_p={s.top_p}: top_p is a probability, more than 0 and at most 1")
    if s.interactive and s.start:
        raise UserError("start and interactive exclude each other; drop one")
    text = "" if s.interactive else read_prompt(s.start)
    rt = runtime.choose(s.device, s.dtype, compile=False, rounds_weights=packed.available(rounds=True))
    opened = checkpoint.open_run(s.out_dir, s.init_from)
    tok = tokenizer.load(tokenizer.spec_of_model(opened))
    model = opened.model.to(rt.device).eval()
    c = model.config
    rounds = rt.dtype != torch.float32
    packs = rt.device.type == "cpu" and packed.available(rounds)
    width = 4 if packs else rt.dtype.itemsize  # bytes of a key's or a value's number; a packed model keeps float32
    if 2 * c.n_layer * c.n_embd * c.block_size * width * s.num_samples > rt.memory() > 0:
        raise UserError(f"num_samples={s.num_samples:,} at once do not fit in memory; take a smaller --num_samples")
    if packs:
        packed.pack(model, s.num_samples, rounds, s.top_k, tok.vocab_size)
    if rt.device.type == "cuda":
        captured.capture(model, rt.dtype)
    prompt = [] if s.interactive else encode_prompt(text, tok)
    if os.path.isfile(name := s.start.removeprefix("file:")):
        settings.say(f"this is the prompt itself; --start=FILE:{name} reads the file", file=sys.stderr)
    settings.say(f"{opened.name}: step {opened.iter_num:,}; {rt.why}", file=sys.stderr)
    if hasattr(sys.stdout, "reconfigure"):  # A notebook's stream can't, and is UTF-8.
        sys.stdout.reconfigure(encoding="utf-8")
    generator = torch.Generator(rt.device).manual_seed(s.seed)
    advice = runtime.memory_advice(lambda: "; take a smaller --num_samples")
    with torch.inference_mode(), nullcontext() if packs else rt.autocast(), advice:
        if not s.interactive:
            write(text, prompt, opened, tok, s, generator)
        for line in typed_lines() if s.interactive else ():
            try:
                text = decode_prompt(line)
                prompt = encode_prompt(text, tok)
            except UserError as error:  # The next line may be a better one.
                settings.say(error, file=sys.stderr)
            else:
                write(text, prompt, opened, tok, s, generator)


def write(text, prompt, opened, tok, s, generator):
    """Print samples that go on from a prompt, of which `prompt` are the ids. Raises UserError."""
    model, block_size = opened.model, opened.model.config.block_size
    if len(prompt) > block_size:
        settings.say(f"of the prompt's {len(prompt):,} tokens the last {block_size:,} are read", file=sys.stderr)
    options = dict(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, eot=tok.eot, vocab_size=tok.vocab_size)
    idx = torch.tensor([prompt] * s.num_samples, device=generator.device)  # (B, T)
    times = []
    drawn = timed(model.generate(idx, s.max_new_tokens, **options, generator=generator), times)
    began = time.perf_counter()
    try:
        count = write_as_drawn(text, drawn, tok) if s.num_samples == 1 else write_samples(text, drawn, tok)
    except ValueError as error:
        raise UserError(f"{opened.name}: {error}") from None
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"the text can't be written ({error.strerror}); make room for it") from None
    line = f"{count:,} token" + "s" * (count != 1)
    if len(times) > 1:  # The first one has the prompt's time in it.
        line += f", {count * (1 - 1 / len(times)) / (times[-1] - times[0]):,.1f} tokens/s"
    settings.say(f"{line}, the first after {times[0] - began:.2g} s", file=sys.stderr)


def timed(drawn, times):
    """Yield what is drawn, and put the time of each draw into a list."""
    for ids in drawn:
        times.append(time.perf_counter())
        yield ids


def write_as_drawn(prompt, drawn, tok):
    """Print one sample, each token as it is drawn. Returns the number of its tokens, without an end-of-text."""
    print(prompt, end="", flush=True)
    decoder, count = codecs.getincrementaldecoder("utf-8")("replace"), 0  # A character may be cut between two tokens.
    for ids in drawn:  # (1,) each
        token = ids.item()
        if token != tok.eot:
            print(decoder.decode(tok.decode([token])), end="", flush=True)
            count += 1
    print(decoder.decode(b"", final=True), flush=True)
    return count


def write_samples(prompt, drawn, tok):
    """Print several samples, each with a line under it. Returns the number of their tokens, without end-of-texts."""
    steps = [ids.tolist() for ids in drawn]
    count = 0
    for sample in zip(*steps, strict=True):
        ids = sample[: sample.index(tok.eot)] if tok.eot in sample else sample
        count += len(ids)
        print(prompt + tok.decode(ids).decode("utf-8", "replace"))
        print("-" * 15, flush=True)
    return count


if __name__ == "__main__":
    settings.run(main)
