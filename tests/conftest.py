"""What several test files share: scripts run in this process, tiny corpora and models, files as others write them."""

import gc
import importlib
import io
import json
import os
import pickle
import signal
import sys
from pathlib import Path

from lib import checkpoint, data, huggingface, prepare, settings, tokenizer
from lib.settings import UserError
from model import GPT, GPTConfig

import hypothesis
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(settings.__file__).parent.parent  # of the repository

hypothesis.settings.register_profile("same every time", derandomize=True)
hypothesis.settings.load_profile("same every time")

# The folder of WikiText's raw files, for the tests that need them. They are skipped where the variable is not set.
WIKITEXT = Path(os.environ.get("WIKITEXT_RAW", "/nowhere"))
needs_wikitext = pytest.mark.skipif(
    not (WIKITEXT / "wiki.test.raw").is_file(), reason="WIKITEXT_RAW names no folder with wiki.test.raw"
)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Models as small as these only wait for a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def imports_are_no_garbage():
    """Python's collector would look through the 200,000 objects of torch and transformers again and again."""
    gc.collect()
    gc.freeze()


READ_GPT2 = tokenizer.Gpt2Tokenizer.__init__


@pytest.fixture(autouse=True, scope="session")
def gpt2_is_read_once():
    """GPT-2's vocabulary takes a quarter of a second to read, and nothing changes what has been read."""
    read = []

    def take(self):
        if not read:
            READ_GPT2(self)
            read.append(self.tiktoken)
        self.tiktoken = read[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer.Gpt2Tokenizer, "__init__", take)
        yield


# ---- scripts ----


def call_script(name, *args, stdin=b""):
    """Run main() of a script here, with these arguments. Returns the exit status."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(os.fsdecode, args)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            settings.run(importlib.import_module(name).main)
        except SystemExit as end:
            return end.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


@pytest.fixture
def script(capsys):
    """script("train", "--key=value", ...) runs train.py's main() here: (exit status, stdout, stderr)."""

    def call(name, *args, stdin=b""):
        capsys.readouterr()
        status = call_script(name, *args, stdin=stdin)
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def new_client(tmp_path, monkeypatch):
    """The hub's client is imported anew, as by a new process, since it reads the environment then. Gives its folder."""

    def take():
        names = [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]
        return {name: sys.modules.pop(name) for name in names}

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    before = take()
    yield tmp_path / "hf"
    take()
    sys.modules.update(before)


def refusal(call, *args, **kwargs):
    """What the UserError of call(*args) says: one line."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- corpora ----

SENTENCE = "the a of to and in that it was he his with as had for you not be her at on by which she all"
WORDS = SENTENCE.split(" ")


def text(documents, seed=0, words=60):
    """Documents of pseudo-random words in lines: enough structure that a loss falls."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(documents):
        drawn = [WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator)]
        yield "\n".join(" ".join(drawn[i : i + 10]) for i in range(0, words, 10)) + "\n"


def write_corpus(name, tok):
    """data/NAME of 40, 2 and 4 documents."""
    pieces = [(split, doc, True) for split, n in (("train", 40), ("val", 2), ("test", 4)) for doc in text(n, seed=n)]
    prepare.write(name, tok, pieces, sum(len(p[1]) for p in pieces))


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A working folder with data/tiny (bytes; train, val, test)."""
    monkeypatch.chdir(tmp_path)
    write_corpus("tiny", tokenizer.BytesTokenizer())
    return tmp_path


def documents(name, split, tok):
    """The texts that the end-of-texts of a split precede."""
    ids = data.Dataset(name).tokens(split)
    assert ids[0] == tok.eot
    parts = np.split(ids, np.flatnonzero(ids == tok.eot)[1:])
    return [tok.decode(part[1:].tolist()).decode() for part in parts]


def write_meta_pkl(folder, chars):
    """The character vocabulary of nanoGPT's data/shakespeare_char. Returns {character: id}."""
    stoi = {c: i for i, c in enumerate(chars)}
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "meta.pkl").write_bytes(pickle.dumps(meta))
    return stoi


# ---- models ----


def random_model(seed=0, **shape):
    """A tiny model that finds some ids much likelier than others."""
    torch.manual_seed(seed)
    shape = dict(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=16) | shape
    model = GPT(GPTConfig(**shape)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def save_run(model, folder="out/a", file="ckpt.pt", dataset="tiny", **more):
    """The weights of a run as our train.py writes them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    held = {"format": checkpoint.FORMAT, "iter_num": 7, "tokenizer": "bytes", "config": {"dataset": dataset}}
    checkpoint.save(Path(folder, file), checkpoint.weights(model) | held | more)


def save_nanogpt_run(model, dataset, prefix="_orig_mod.", folder="out/a"):
    """A run as nanoGPT's train.py writes it. Where the model was compiled each name has the prefix."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    whole = checkpoint.weights(model)
    state = {prefix + k: v for k, v in whole["model"].items()}
    held = {"optimizer": {}, "iter_num": 2000, "best_val_loss": torch.tensor(1.5)}
    config = {"dataset": dataset, "device": "cuda", "compile": bool(prefix)}
    torch.save({"model": state, "model_args": whole["model_args"], "config": config, **held}, f"{folder}/ckpt.pt")


def save_huggingface(model, folder, **changes):
    """A model as transformers writes it, its config.json with `changes`. Returns the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    hf, state = huggingface.convert(model)
    Path(folder, "config.json").write_text(json.dumps(hf | changes))
    save_file(state, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    return str(folder)


# ---- training ----

TINY = [
    "--dataset=tiny",
    "--block_size=16",
    "--batch_size=4",
    "--gradient_accumulation_steps=2",
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--dropout=0.2",
    "--learning_rate=1e-2",
    "--min_lr=1e-3",
    "--warmup_iters=2",
    "--max_iters=12",
    "--eval_interval=4",
    "--log_interval=1",
    "--device=cpu",
    "--compile=False",
]


@pytest.fixture
def train(script, corpus):
    """train("--out_dir=out/a", ...) trains a tiny model for 12 steps with dropout and accumulation.

    One block is enough for most of what a run does. What depends on several takes --n_layer=2.
    """
    return lambda *args: script("train", *TINY, *args)


def rows(out):
    """What a run has logged."""
    return [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]


def without_speed(found):
    """Rows without the one figure that differs from run to run."""
    return [{k: v for k, v in row.items() if k != "tokens_per_sec"} for row in found]


def weights(path):
    return checkpoint.load(path)["model"]


def same_bits(a, b):
    """Whether two state dicts are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_final_weights(a, b):
    """Whether two runs ended at the same bits."""
    return same_bits(weights(Path(a, "final.pt")), weights(Path(b, "final.pt")))
