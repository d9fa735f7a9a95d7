"""Faults and bad input: each script, as a process, ends in one line and status 2, or says what is wrong and goes on.

Whatever happens, what was on the disk before is still there. The table of mistakes runs in this process by default, and
each row as a process of its own by `python -m pytest -m stress`.
"""

import ctypes
import hashlib
import json
import math
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import eval as evaluation
import prepare_text
import prepare_wikitext103
import sample
import train as train_py
from lib import checkpoint, data, prepare, settings, tokenizer
from lib.settings import UserError

import hypothesis
import pytest
import torch
from conftest import ROOT, TINY, call_script, same_bits, same_final_weights, weights, write_corpus
from hypothesis import given
from hypothesis import strategies as st

LIBC = ctypes.CDLL(None)
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_ENDPOINT": NOWHERE, "WANDB_BASE_URL": NOWHERE, "WANDB_SILENT": "true"}
ENV |= {"WANDB_API_KEY": "0123456789abcdef" * 2 + "secret00", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": "hub"}
ON = [*TINY, "--out_dir=out/a"]  # goes on with the run of `before`
NEW = [*TINY, "--out_dir=out/new", "--max_iters=4"]


def run(*command, env=None, stdin="", **more):
    """A script as a process: the finished process."""
    name, *args = command
    return subprocess.run(
        [sys.executable, ROOT / f"{name}.py", *args], input=stdin, env=ENV | (env or {}), capture_output=True,
        text=True, errors="replace", timeout=200, **more,
    )  # fmt: skip


def content(folder):
    """{path: bytes} of a folder; a lock file has none."""
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file() and p.suffix != ".lock"}


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A working folder: data/tiny of bytes, data/words of GPT-2 ids, and out/a, a run of eight steps."""
    folder, here = tmp_path_factory.mktemp("before"), Path.cwd()
    os.chdir(folder)
    try:
        write_corpus("tiny", tokenizer.BytesTokenizer())
        write_corpus("words", tokenizer.Gpt2Tokenizer())
        assert call_script("train", *ON, "--max_iters=8", "--save_interval=4", "--lr_decay_iters=12") == 0
        Path("book.txt").write_text("A book.\n" * 50)
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def folder(before, tmp_path, monkeypatch):
    shutil.copytree(before, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")


# ---- what can happen to a file ----


def put(path, what):
    """A file with this text or these bytes."""

    def act():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(what if isinstance(what, bytes) else what.encode())

    return act


def cut(path, share):
    return lambda: os.truncate(path, int(os.path.getsize(path) * share) // 2 * 2)


def flip(path, share):
    def act():
        whole = bytearray(Path(path).read_bytes())
        whole[int(len(whole) * share)] ^= 0x10
        Path(path).write_bytes(whole)

    return act


def odd(path):
    return lambda: Path(path).write_bytes(Path(path).read_bytes() + b"x")


def gone(path):
    return lambda: Path(path).unlink()


def folder_at(path):
    def act():
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir(parents=True)

    return act


def meta(change):
    def act():
        path = Path("data/tiny/meta.json")
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return act


def ckpt(**changes):
    def act():
        state = torch.load("out/a/ckpt.pt", weights_only=True)
        torch.save({k: v for k, v in (state | changes).items() if v is not None}, "out/a/ckpt.pt")

    return act


def linked(path, target):
    def act():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(target)

    return act


def moment_of_one_element():
    state = torch.load("out/a/ckpt.pt", weights_only=True)
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
    torch.save(state, "out/a/ckpt.pt")


def ckpt_of(name, **changes):
    return lambda: torch.save(torch.load(f"out/a/{name}", weights_only=True) | changes, f"out/a/{name}")


def scales(value):
    """A run whose weights have come to this."""

    def change():
        state = torch.load("out/a/best.pt", weights_only=True)
        state["model"]["transformer.ln_f.weight"].fill_(value)
        torch.save(state, "out/a/best.pt")

    return change


def other_tokens():
    """A dataset of the same name that agrees with its own meta.json."""
    documents = [(split, f"another text, no. {i}\n", True) for split in data.SPLITS for i in range(40)]
    prepare.write("tiny", tokenizer.BytesTokenizer(), documents, 0)


def beyond_the_vocabulary():
    """An id that no tokenizer of 257 ids gives, in files that agree with each other."""
    tokens = data.Dataset("tiny").tokens("train").copy()
    tokens[7] = 300
    tokens.tofile("data/tiny/train.bin")
    digest = hashlib.sha256(tokens.data).hexdigest()
    meta(lambda m: m["splits"]["train"].update(sha256=digest))()


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def hostile_checkpoint():
    torch.save(torch.load("out/a/ckpt.pt", weights_only=True) | {"row": Hostile()}, "out/a/ckpt.pt")


def nanogpt_s_data():
    """data/tiny as nanoGPT would have it, with a vocabulary that carries code."""
    Path("data/tiny/meta.json").unlink()
    Path("data/tiny/meta.pkl").write_bytes(pickle.dumps({"itos": {0: Hostile()}}))


# (what happens before, the command, what its one line says)
REFUSED = {
    # settings
    "unknown setting": (None, ["train", *NEW, "--batchsize=3"], "nearest is 'batch_size'"),
    "a setting of another script": (None, ["sample", "--learning_rate=1"], "unknown setting 'learning_rate'"),
    "no value": (None, ["train", *NEW, "--seed"], "--seed=VALUE"),
    "a prompt without its name": (None, ["sample", "Once upon"], "write --start='Once upon'"),
    "a blank for the equals sign": (None, ["train", *NEW, "--max_iters", "50"], "write --max_iters=50"),
    "an editor's dash": (None, ["train", *NEW, "\N{EM DASH}seed=8"], "write --seed=8"),
    "no dashes": (None, ["train", *NEW, "seed=3"], "--seed=3"),
    "text for a number": (None, ["train", *NEW, "--batch_size=many"], "batch_size takes a whole number"),
    "a part of one": (None, ["train", *NEW, "--batch_size=1.5"], "batch_size takes a whole number"),
    "zero": (None, ["train", *NEW, "--block_size=0"], "must be more than 0"),
    "negative": (None, ["train", *NEW, "--eval_interval=-1"], "can't be negative"),
    "not a number": (None, ["train", *NEW, "--learning_rate=nan"], "learning_rate takes a number"),
    "no such backend": (None, ["train", *NEW, "--backend=ncl"], "one of nccl, gloo"),
    "infinite": (None, ["train", *NEW, "--grad_clip=inf"], "grad_clip takes a number"),
    "more than 64 bits": (None, ["train", *NEW, "--seed=1e30"], "seed takes a whole number"),
    "all is dropped": (None, ["train", *NEW, "--dropout=1"], "less than 1"),
    "beta of one": (None, ["train", *NEW, "--beta2=1"], "less than 1"),
    "not divisible": (None, ["train", *NEW, "--n_head=3"], "not divisible by n_head=3"),
    "a billion layers": (None, ["train", *NEW, "--n_layer=1e9"], "take a smaller n_layer"),
    "a huge width": (None, ["train", *NEW, "--n_embd=1e9"], "take a smaller n_layer, n_embd"),
    "a huge MLP": (None, ["train", *NEW, "--n_inner=1e13"], "M parameters and 64 tokens"),
    "a huge prime batch": (None, ["train", *NEW, "--batch_size=9223372036854775783"], "tokens in a micro-batch take"),
    "a huge batch": (None, ["train", *NEW, "--batch_size=1e12"], "tokens in a micro-batch take more"),
    "a block longer than the text": (None, ["train", *NEW, "--block_size=1e6"], "take block_size="),
    "no such choice": (None, ["train", *NEW, "--compile=maybe"], "one of auto, True, False"),
    "no such precision": (None, ["train", *NEW, "--dtype=float8"], "one of auto, float32"),
    "float16 on a CPU": (None, ["train", *NEW, "--dtype=float16"], "needs a CUDA GPU"),
    "no CUDA": (None, ["train", *NEW, "--device=cuda:7"], "CUDA devices here"),
    "no such device": (None, ["train", *NEW, "--device=tpu"], "use auto, cuda"),
    "anew and on": (None, ["train", *ON, "--overwrite=True", "--init_from=resume"], "give one of them"),
    "nothing to resume": (None, ["train", *NEW, "--init_from=resume"], "no out/new/ckpt.pt to resume"),
    "no such checkpoint": (None, ["train", *NEW, "--resume_from=out/x.pt"], "there is no checkpoint out/x.pt"),
    "no such weights": (None, ["train", *NEW, "--init_from=nowhere"], "'nowhere' is no checkpoint"),
    "weights alone": (None, ["train", *NEW, "--resume_from=out/a/best.pt"], "holds weights alone"),
    "a checkpoint for a folder with another run": (
        None,
        ["train", *ON, "--resume_from=out/a/ckpt_iter_4.pt"],
        "holds another run",
    ),
    "beyond its end": (None, ["train", *NEW, "--resume_from=out/a/ckpt_iter_8.pt"], "is of step 8, this command ends"),
    "another tokenizer": (None, ["train", *NEW, "--init_from=out/a", "--dataset=words"], "has the tokenizer 'bytes'"),
    "fewer positions": (None, ["train", *NEW, "--init_from=out/a", "--block_size=32"], "--block_size=16 or less"),
    # config files
    "no config file": (None, ["train", "config/none.py"], "no such config file"),
    "a typo in one": (put("c.py", "batch_sise = 3"), ["train", "c.py"], "c.py:1: unknown setting 'batch_sise'"),
    "a wrong type in one": (put("c.py", "\nseed = 'x'"), ["train", "c.py"], "c.py:2: seed = 'x'"),
    "a syntax error": (put("c.py", "seed = = 1"), ["train", "c.py"], "c.py:1: SyntaxError"),
    "an exception": (put("c.py", "\n\nseed = 1 / 0"), ["train", "c.py"], "c.py:3: ZeroDivisionError"),
    "one that exits": (put("c.py", "import sys\nsys.exit(0)"), ["train", "c.py"], "c.py:2: SystemExit"),
    "one that is not UTF-8": (put("c.py", b"seed = '\xff'"), ["train", "c.py"], "c.py:1: UnicodeDecodeError"),
    "one that is a folder": (folder_at("c.py"), ["train", "c.py"], "no such config file"),
    # checkpoints
    "zero length": (put("out/a/ckpt.pt", ""), ["train", *ON], "ckpt_iter_4.pt"),
    "cut short": (cut("out/a/ckpt.pt", 0.7), ["train", *ON], "--resume_from=PATH"),
    "a flipped bit": (flip("out/a/ckpt.pt", 0.5), ["train", *ON], "is damaged"),
    "a folder": (folder_at("out/a/ckpt.pt"), ["train", *ON], "there is no checkpoint out/a/ckpt.pt"),
    "no checkpoint at all": (put("out/a/ckpt.pt", "It was a dark night."), ["train", *ON], "is damaged"),
    "another model": (None, ["train", *ON, "--n_layer=3"], "n_layer was 1 and is 3"),
    "another seed": (None, ["train", *ON, "--seed=1"], "seed was 1337 and is 1"),
    "another batch": (None, ["train", *ON, "--batch_size=2"], "tokens a step was 128 and is 64"),
    "a newer format": (ckpt(format=99), ["train", *ON], "newer version"),
    "weights of another shape": (ckpt(n_inner=7), ["train", *ON], "its n_inner contradicts"),
    "nanoGPT's to resume": (ckpt(format=None), ["train", *ON], "is nanoGPT's"),
    "one that carries code": (hostile_checkpoint, ["train", *ON], "not a checkpoint of plain data"),
    "no ckpt.pt but others": (gone("out/a/ckpt.pt"), ["train", *ON], "no ckpt.pt to go on from"),
    "metrics of a run that is gone": (put("out/new/metrics.jsonl", "{}"), ["train", *NEW], "no ckpt.pt to go on from"),
    "a link to a disk that is not there": (linked("out/new/ckpt.pt", "/nowhere/ckpt.pt"), ["train", *NEW], "mount its"),
    "a moment of one element": (moment_of_one_element, ["train", *ON], "a moment exp_avg of another shape"),
    "a step below 0": (ckpt(iter_num=-5), ["train", *ON], "its iter_num is of another kind"),
    "no place in the data": (ckpt(data_sha256=None), ["train", *ON], "its data_sha256 is missing"),
    "a damaged one to evaluate": (flip("out/a/best.pt", 0.4), ["eval", "--out_dir=out/a"], "--init_from=PATH"),
    "a damaged one to sample": (cut("out/a/best.pt", 0.9), ["sample", "--out_dir=out/a"], "--init_from=PATH"),
    "a report over a checkpoint": (None, ["eval", "--json=out/a/best.pt"], "something else than a report"),
    # data
    "no such dataset": (None, ["train", *NEW, "--dataset=nothing"], "there: tiny, words"),
    "ids cut short": (cut("data/tiny/train.bin", 0.5), ["train", *NEW], "meta.json says"),
    "half an id": (odd("data/tiny/train.bin"), ["train", *NEW], "not a whole number"),
    "no ids": (put("data/tiny/train.bin", ""), ["train", *NEW], "0 bytes long"),
    "no train split": (gone("data/tiny/train.bin"), ["train", *NEW], "has no train split"),
    "no val split": (gone("data/tiny/val.bin"), ["train", *NEW], "--eval_interval=0"),
    "a flipped bit in the ids": (flip("data/tiny/train.bin", 0.5), ["train", *NEW], "prepare"),
    "beyond the vocabulary": (beyond_the_vocabulary, ["train", *NEW], "the id 300"),
    "changed since the run began": (other_tokens, ["train", *ON], "the tokens of data/tiny/train.bin are others"),
    "no meta.json": (gone("data/tiny/meta.json"), ["train", *ON], "the tokenizer was 'bytes' and is 'gpt2'"),
    "half a meta.json": (cut("data/tiny/meta.json", 0.5), ["train", *NEW], "not readable"),
    "a meta.json of other things": (put("data/tiny/meta.json", "[1, 2]"), ["train", *NEW], "not readable"),
    "impossible counts": (meta(lambda m: m["splits"]["train"].update(tokens=-5)), ["train", *NEW], "not readable"),
    "lying counts": (meta(lambda m: m["splits"]["train"].update(tokens=5)), ["train", *NEW], "meta.json says 45"),
    "a lying checksum": (meta(lambda m: m["splits"]["val"].update(sha256="0")), ["train", *NEW], "not the file"),
    "a lying dtype": (meta(lambda m: m.update(dtype="uint32")), ["train", *NEW], "prepare it again"),
    "a lying vocabulary": (meta(lambda m: m.update(vocab_size=99)), ["train", *NEW], "has not 99 ids"),
    "ids that the tokenizer has not": (meta(lambda m: m.update(tokenizer="gpt2")), ["train", *NEW], "has not 257 ids"),
    "infinite counts": (meta(lambda m: m["splits"]["val"].update(words=1e999)), ["train", *NEW], "not readable"),
    "no end to its brackets": (put("data/tiny/meta.json", "[" * 200_000), ["train", *NEW], "not readable"),
    "counts of other documents": (
        meta(lambda m: m["splits"]["test"]["per_document"]["words"].append(3)),
        ["eval"],
        "counts of other documents",
    ),
    "an unknown tokenizer": (meta(lambda m: m.update(tokenizer="words")), ["eval"], "was made with 'words'"),
    "a meta.pkl that carries code": (nanogpt_s_data, ["train", *NEW], "not a nanoGPT character vocabulary"),
    # places
    "out_dir is a file": (put("out/new", "x"), ["train", *NEW], "out_dir=out/new can't be written"),
    "a metrics.jsonl that is a folder": (folder_at("out/a/metrics.jsonl"), ["train", *ON], "metrics.jsonl"),
    "no hub": (None, ["prepare_wikitext103"], "--source=PATH"),
    "no hub to start from": (None, ["train", *NEW, "--init_from=gpt2"], "gpt2 cannot be had from the hub"),
    "no such source": (None, ["prepare_wikitext103", "--source=x.zip"], "no such folder or zip"),
    "a part of the corpus": (put("src/wiki.test.raw", "x\n"), ["prepare_wikitext103", "--source=src"], "--check=False"),
    # sampling
    "a name too long": (None, ["train", *NEW, f"--out_dir=out/{'a' * 300}"], "File name too long"),
    "a rate that would rise": (None, ["train", *NEW, "--learning_rate=1e-4"], "min_lr=0.001 is more than"),
    "too many epochs": (None, ["train", *NEW, "--max_epochs=1e308"], "take less"),
    "weights that are not finite": (scales(math.nan), ["sample"], "not finite"),
    "weights that have diverged": (scales(3e38), ["sample", "--temperature=0"], "not finite"),
    "a tokenizer of another size": (ckpt_of("best.pt", tokenizer="gpt2"), ["sample"], "its tokenizer 'gpt2' 50,257"),
    "a stride of documents": (None, ["eval", "--protocol=documents", "--stride=8"], "is for --protocol=stream"),
    "no run": (None, ["sample", "--out_dir=out/none"], "no checkpoint in out/none"),
    "a run that is a file": (None, ["sample", "--out_dir=out/a/ckpt.pt"], "opened by --init_from=out/a/ckpt.pt"),
    "a prompt that is not UTF-8": (None, ["sample", b"--start=\xff\xfe"], "not UTF-8 at byte 0"),
    "no prompt file": (None, ["sample", "--start=FILE:none.txt"], "No such file"),
    "a prompt file that is not UTF-8": (put("p", b"ab\xff"), ["sample", "--start=FILE:p"], "not UTF-8 at byte 2"),
    "no samples": (None, ["sample", "--num_samples=0"], "must be more than 0"),
    "too many samples": (None, ["sample", "--num_samples=1e12"], "take a smaller --num_samples"),
    "more samples than oneDNN counts": (None, ["sample", "--num_samples=3e9"], "take a smaller --num_samples"),
    "a probability of two": (None, ["sample", "--top_p=2"], "at most 1"),
    "a negative temperature": (None, ["sample", "--temperature=-1"], "can't be negative"),
    # evaluation
    "a stride that leaves out tokens": (None, ["eval", "--stride=17"], "take less"),
    "more positions than there are": (None, ["eval", "--block_size=17"], "take less"),
    "another dataset's tokenizer": (None, ["eval", "--dataset=words"], "take or prepare data with the model's"),
    "no such split": (None, ["eval", "--split=valid"], "one of"),
    # preparing
    "no files": (None, ["prepare_text", "--dataset=x"], "name the files"),
    "no such file": (None, ["prepare_text", "x.txt", "--dataset=x"], "no such file, folder or glob"),
    "a file that is not UTF-8": (put("b", b"a\xff\nb\n"), ["prepare_text", "b", "--dataset=x"], "byte 1 is not UTF-8"),
    "a dataset that is there": (None, ["prepare_text", "book.txt", "--dataset=tiny"], "--overwrite=True replaces it"),
    "a path for a name": (None, ["prepare_text", "book.txt", "--dataset=../x"], "give the data a name"),
    "a share of two": (None, ["prepare_text", "book.txt", "--dataset=x", "--val_fraction=2"], "less than 1"),
    # pictures
    "no such run": (None, ["plot", "out/none"], "name the folder of a run"),
    "rows that are none": (put("out/a/metrics.jsonl", "[]\n"), ["plot", "out/a"], "not the metrics of a run"),
}


def check_refused(name, call):
    """Row `name` of the table. call(script, *arguments) -> (status, stdout, stderr)."""
    happens, command, says = REFUSED[name]
    if happens:
        happens()
    before = content(".")
    status, out, err = call(*command)
    assert status == 2, err or out
    *others, line = err.splitlines()
    assert line.startswith(f"{command[0]}.py: ") and says in line, err
    # sample.py and eval.py say there which model they opened, since what they write is on standard output.
    assert len(others) <= (command[0] in ("sample", "eval")) and "Traceback" not in out + err
    assert not Path("pwned").exists()
    after = content(".")
    assert {path: after.get(path) for path in before} == before and not list(Path().rglob("*.partial"))


NEEDS_A_PROCESS = {"no hub", "no hub to start from"}  # The hub's client reads its address when it is imported.


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in NEEDS_A_PROCESS])
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_lost(folder, script, name):
    check_refused(name, script)


def as_process(*command):
    done = run(*command)
    return done.returncode, done.stdout, done.stderr


def test_a_mistake_ends_a_process(folder):
    """One of a script that does without torch, whose import takes seconds."""
    check_refused("a file that is not UTF-8", as_process)


@pytest.mark.stress
@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_ends_a_process_in_one_line_and_nothing_is_lost(folder, name):
    check_refused(name, as_process)


# ---- what does not end a run ----


def unprivileged(**limits):
    """What a child does before it begins: it gives up the right to write where it may not, and takes limits."""

    def act():
        LIBC.prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: matters to root only
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))

    return act


@pytest.mark.stress
def test_a_disk_that_is_full_stops_no_run_that_has_a_checkpoint(folder):
    kept = Path("out/a/ckpt.pt").read_bytes()
    done = run("train", *ON, preexec_fn=unprivileged(RLIMIT_FSIZE=6000))
    assert done.returncode == 2 and "make room in out/a" in done.stderr and len(done.stderr.splitlines()) == 1
    assert "the older one stands" in done.stdout and "step 12/12" in done.stdout
    assert Path("out/a/ckpt.pt").read_bytes() == kept and not list(Path("out/a").glob("*.partial"))
    assert run("train", *ON).returncode == 0 and run("train", *TINY, "--out_dir=out/b").returncode == 0
    assert same_final_weights("out/a", "out/b")
    done = run("train", *TINY, "--out_dir=out/c", preexec_fn=unprivileged(RLIMIT_FSIZE=6000))
    assert done.returncode == 2 and "make room there" in done.stderr and "step 1/12" not in done.stdout


@pytest.mark.stress
def test_an_out_dir_that_becomes_read_only_and_writable_again(folder):
    args = [*TINY, "--max_iters=1200", "--eval_interval=50", "--eval_iters=1", "--log_interval=50"]
    command = [sys.executable, "-u", ROOT / "train.py", *args, "--out_dir=out/b"]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, text=True, preexec_fn=unprivileged()) as process:
        killer = threading.Timer(120, process.kill)
        killer.start()
        for line in process.stdout:
            if line.startswith("step 100 |"):
                os.chmod("out/b", 0o555)
            if "could not be written" in line:
                os.chmod("out/b", 0o755)
                break
        rest = process.stdout.read()
        killer.cancel()
    assert process.returncode == 0 and "finished 1,200 steps" in rest
    assert run("train", *args, "--out_dir=out/c").returncode == 0 and same_final_weights("out/b", "out/c")


@pytest.fixture
def wrong_key():
    """A W&B server that knows nobody."""

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b'{"errors": [{"message": "permission denied"}]}'
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_address[1]}"}
    server.shutdown()


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["away", "wrong key", "half a key", "no key"])
def test_w_and_b_that_can_t_be_had_stops_nothing_and_its_key_is_nowhere(folder, wrong_key, kind):
    env = {
        "away": {"WANDB_INIT_TIMEOUT": "3"},
        "wrong key": wrong_key,
        "half a key": {"WANDB_API_KEY": "0123456789secret00"},
        "no key": {"WANDB_API_KEY": "", "HOME": str(folder), "NETRC": "/dev/null"},
    }[kind]
    done = run("train", *NEW, "--wandb_log=True", env=env)
    assert done.returncode == 0 and done.stdout.count("W&B failed") == 1 and "finished 4 steps" in done.stdout
    written = "".join(p.read_text(errors="replace") for p in Path("out/new").rglob("*") if p.is_file())
    assert "secret00" not in done.stdout + done.stderr + written and "Traceback" not in done.stderr


@pytest.mark.stress
def test_a_compiler_that_fails_leaves_it_eager(folder):
    done = run("train", *NEW, "--compile=True", env={"TORCHINDUCTOR_CACHE_DIR": "cache", "CXX": "/bin/false"})
    assert done.returncode == 0 and "going on without it" in done.stdout and "finished" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.stress
@pytest.mark.parametrize("compiled", [False, True])
def test_a_temporary_folder_that_takes_nothing_is_one_line(folder, compiled):
    done = run("train", *NEW, f"--compile={compiled}", env={"TORCHINDUCTOR_CACHE_DIR": "/dev/null/full"})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "TORCHINDUCTOR_CACHE_DIR=" in done.stderr


@pytest.mark.stress
@pytest.mark.parametrize("prompt", ["", "long " * 50, "<|endoftext|>", "né 語"])
def test_any_prompt_in_utf_8_is_continued(folder, prompt):
    done = run("sample", f"--start={prompt}", "--max_new_tokens=3")
    assert done.returncode == 0 and done.stdout.startswith(prompt) and len(done.stderr.splitlines()) <= 3
    assert ("the last 16 are read" in done.stderr) == (len(prompt) > 16)


def test_writing_in_the_background_changes_nothing(train, monkeypatch):
    save = checkpoint.save

    def save_slowly(path, content, links=()):
        time.sleep(0.05)
        save(path, content, links)

    assert train("--out_dir=out/a", "--save_interval=3")[0] == 0
    monkeypatch.setattr(checkpoint, "save", save_slowly)
    monkeypatch.setattr(checkpoint.Writer, "in_background", lambda self, state: True)
    assert train("--out_dir=out/b", "--save_interval=3", "--max_iters=7", "--lr_decay_iters=12")[0] == 0
    assert train("--out_dir=out/b", "--save_interval=3")[0] == 0
    assert same_final_weights("out/a", "out/b")
    for name in ("ckpt.pt", "best.pt", "ckpt_iter_3.pt", "ckpt_iter_9.pt"):
        assert same_bits(*(weights(f"out/{out}/{name}") for out in "ab"))


@pytest.mark.parametrize("background", [False, True])
def test_a_signal_in_the_last_step_loses_no_row(train, monkeypatch, background):
    forward, count = train_py.GPT.forward, [0]

    def call(self, x, y=None):
        count[0] += 1
        if count[0] == 2 * 12:  # micro-batches
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, x, y)

    monkeypatch.setattr(train_py.GPT, "forward", call)
    monkeypatch.setattr(checkpoint.Writer, "in_background", lambda self, state: background)
    assert train("--out_dir=out/a", "--eval_interval=0")[0] == 0
    assert [json.loads(line)["step"] for line in Path("out/a/metrics.jsonl").open()] == list(range(1, 13))


# ---- every setting of every script ----

NUMBERS = st.one_of(st.integers(), st.floats()).map(str)
WORDS = st.sampled_from(["True", "false", "auto", "nan", "-inf", "1e3", "1_000", "0.5", "a,b", " ", "=", "０", "1e400"])


@pytest.mark.parametrize("module", [train_py, evaluation, sample, prepare_text, prepare_wikitext103])
@hypothesis.settings(max_examples=60, deadline=None, database=None)
@given(drawn=st.data())
def test_any_settings_are_values_or_one_line(module, drawn):
    hints = list(module.Settings.__annotations__)
    pairs = drawn.draw(st.lists(st.tuples(st.sampled_from(hints) | st.text(), st.text() | NUMBERS | WORDS), max_size=3))
    argv = [f"--{key}={value}" for key, value in pairs]
    if {"--help", "-h"} & set(argv):
        return
    try:
        s = settings.load(module.Settings, argv, positional="path" if module is prepare_text else "")
        if module is train_py:
            train_py.check(s)
    except UserError as error:
        assert str(error).strip()
        return
    for key, default in vars(module.Settings()).items():
        value = getattr(s, key)
        assert type(value) is type(default) or key == "compile" and value in (True, False, "auto")
        assert not isinstance(value, float) or -1e400 < value < 1e400
