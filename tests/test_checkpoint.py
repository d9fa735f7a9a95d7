"""checkpoint.py: whole or not at all, plain data only, and every kind of model opened."""

import json
import os
import pickle
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import eval as evaluation
from model import GPT, GPTConfig

SHAPE = dict(block_size=8, vocab_size=40, n_layer=2, n_head=2, n_embd=8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE))


@pytest.fixture
def path(tmp_path, model):
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.weights(model) | {"format": 1, "tokenizer": "bytes"})
    return tmp_path / "ckpt.pt"


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="this system has no /dev/fd")
def test_a_text_goes_to_an_open_file_or_pipe_as_a_shell_redirects_it(tmp_path):
    """/dev/stdout is a link to it, which stays a link; what was written before stays too."""
    with open(tmp_path / "out", "w") as f:
        f.write("before\n")
        f.flush()
        evaluation.check_writable(Path(f"/dev/fd/{f.fileno()}"))
        checkpoint.write_text(Path(f"/dev/fd/{f.fileno()}"), "text\n")
        f.write("after\n")
    assert (tmp_path / "out").read_text() == "before\ntext\nafter\n"
    reads, writes = os.pipe()
    with open(reads) as f:
        evaluation.check_writable(Path(f"/dev/fd/{writes}"))
        checkpoint.write_text(Path(f"/dev/fd/{writes}"), "text\n")
        os.close(writes)
        assert f.read() == "text\n"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="this system has no /dev/shm")
def test_a_file_in_memory_is_replaced_like_any_other():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for text in ("first", "second"):
            checkpoint.write_text(Path(folder, "a.json"), text)
        assert {p.name: p.read_text() for p in Path(folder).iterdir()} == {"a.json": "second"}


def test_whether_a_pipe_can_be_written_is_found_out_without_a_reader(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    evaluation.check_writable(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    checkpoint.write_text(tmp_path / "pipe", "text")
    assert os.read(reader, 99) == b"text"
    os.close(reader)


def test_what_is_saved_is_what_is_opened(path, model):
    opened = checkpoint.open_model(path)
    assert same(opened.model, model) and opened.model.config == model.config and opened.tokenizer == "bytes"
    assert opened.model.lm_head.weight is opened.model.transformer.wte.weight


def test_n_inner_is_kept_and_is_none_of_nanogpt_s_seven(tmp_path):
    model = GPT(GPTConfig(**SHAPE, n_inner=12))
    checkpoint.save(tmp_path / "a.pt", checkpoint.weights(model))
    loaded = checkpoint.load(tmp_path / "a.pt")
    seven = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert set(loaded["model_args"]) == seven and same(checkpoint.build(loaded, "a.pt"), model)


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_the_old_file_whole_and_no_stray(path, monkeypatch, moment):
    before = path.read_bytes()

    def fail(*args, **kwargs):
        if moment == "torch.save":
            args[1].write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch if moment == "torch.save" else os, moment.split(".")[1], fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"model": {}, "model_args": {}})
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["ckpt.pt"]


def test_links_keep_the_file_when_it_is_written_again(tmp_path, model):
    path, link = tmp_path / "ckpt.pt", tmp_path / "ckpt_iter_1.pt"
    checkpoint.save(path, checkpoint.weights(model) | {"iter_num": 1}, links=[link])
    checkpoint.save(path, checkpoint.weights(model) | {"iter_num": 2})
    assert [checkpoint.load(p)["iter_num"] for p in (link, path)] == [1, 2]


def test_links_are_copies_where_the_file_system_has_none(tmp_path, model, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError("not supported")))
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.weights(model), links=[tmp_path / "ckpt_iter_1.pt"])
    assert (tmp_path / "ckpt_iter_1.pt").read_bytes() == (tmp_path / "ckpt.pt").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_any_flipped_byte_of_a_tensor_is_found(path):
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda i: i.file_size)
    start = entry.header_offset + 200
    for at in (start, start + entry.file_size // 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(path)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_found(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.load(path)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_checkpoint_that_carries_code_is_refused_and_does_not_run(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint.weights(model) | {"config": Hostile()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.open_model(name)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 99}, "newer version"),
        ({"model_args": {"n_layer": 2}}, "do not fit"),
        ({"model_args": SHAPE | {"dropout": 0.0, "bias": True, "n_embd": 16}}, "do not fit"),
        ({"model_args": SHAPE | {"dropout": 0.0, "bias": True, "n_head": 3}}, "do not fit"),
        ({"model": {}}, "do not fit"),
        ({"model": 3}, "its model is of another kind"),
        ({"format": "1"}, "its format is of another kind"),
        ({"iter_num": None}, "its iter_num is of another kind"),
        ({"best_val_loss": "x"}, "its best_val_loss is of another kind"),
        ({"config": [1]}, "its config is of another kind"),
        ({"tokenizer": 5}, "its tokenizer is of another kind"),
    ],
)
def test_another_kind_of_checkpoint_is_one_line(tmp_path, model, change, says):
    torch.save(checkpoint.weights(model) | change, tmp_path / "a.pt")
    with pytest.raises(checkpoint.CheckpointError, match=says) as error:
        checkpoint.open_model(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


def test_a_dict_without_a_model_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(checkpoint.CheckpointError, match="model_args"):
        checkpoint.load(tmp_path / "a.pt")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_nanogpt_s_checkpoints_open(tmp_path, model, prefix):
    """As its train.py writes them: prefixes of wrappers, masks of older versions, more rows than there are ids."""
    state = {prefix + k: v for k, v in model.state_dict().items()}
    state |= {f"{prefix}transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(2)}
    args = SHAPE | {"dropout": 0.0, "bias": True}
    torch.save(
        {"model": state, "model_args": args, "iter_num": 7, "best_val_loss": torch.tensor(2.5)}, tmp_path / "c.pt"
    )
    opened = checkpoint.open_model(tmp_path / "c.pt")
    assert same(opened.model, model) and opened.iter_num == 7 and opened.tokenizer == ""


def test_a_hugging_face_folder_opens_and_a_run_s_folder_gives_its_best(tmp_path, model):
    hf, state = model.to_huggingface()
    Path(tmp_path, "hf").mkdir()
    Path(tmp_path, "hf", "config.json").write_text(json.dumps(hf))
    save_file(state, tmp_path / "hf" / "model.safetensors")
    opened = checkpoint.open_model(tmp_path / "hf")
    assert same(opened.model, model) and opened.path is None
    Path(tmp_path, "run").mkdir()
    for name in ("final.pt", "ckpt.pt", "best.pt"):
        checkpoint.save(tmp_path / "run" / name, checkpoint.weights(model))
        assert checkpoint.open_model(tmp_path / "run").path.name == name


def test_the_newest_run(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="no run under out/"):
        checkpoint.open_run()
    for name, saved in (("out/b/best", 7), ("out/a/ckpt", 6), ("out/c/ckpt", 8), ("out/c/best", 5)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(f"{name}.pt", checkpoint.weights(model))
        os.utime(f"{name}.pt", (0, saved))
    assert checkpoint.newest_run() == Path("out/c")
    assert checkpoint.open_run().path == Path("out/c/best.pt")
    assert checkpoint.open_run(out_dir="out/a").path == Path("out/a/ckpt.pt")
    assert checkpoint.open_run("out/a", init_from="out/b/best.pt").path == Path("out/b/best.pt")
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in out/none"):
        checkpoint.open_run("out/none")


def test_a_tokenizer_that_only_the_number_of_ids_tells_is_said(tmp_path, capsys):
    for folder, more in (("said", {"tokenizer_spec": "bytes"}), ("unsaid", {})):
        Path(tmp_path, folder).mkdir()
        hf, state = GPT(GPTConfig(block_size=4, vocab_size=257, n_layer=1, n_head=1, n_embd=4)).to_huggingface()
        Path(tmp_path, folder, "config.json").write_text(json.dumps(hf | more))
        save_file(state, tmp_path / folder / "model.safetensors")
        assert checkpoint.open_model(tmp_path / folder).tokenizer == "bytes"
        assert ("by its 257 ids it is taken to have" in capsys.readouterr().err) == (folder == "unsaid")


@pytest.mark.parametrize("source", ["gpt3", "out/none.pt", "a/b/c", "nowhere/", "x.safetensors"])
def test_a_source_that_names_no_model_is_one_line(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.open_model(source)
    assert "\n" not in str(error.value)


def test_a_name_on_the_hub_may_have_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(GPT, "from_huggingface", lambda repo: asked.append(repo) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.open_model("user/gpt2-v1.0")
    assert asked == ["user/gpt2-v1.0"]


def test_background_writes_hold_what_they_were_given_in_their_order_and_report_failures(tmp_path, monkeypatch):
    save, seen = checkpoint.save, []

    def slow(path, state, links=()):
        time.sleep(0.05)
        if state["n"] == 2:
            raise OSError(28, "No space left on device")
        save(path, state, links)

    monkeypatch.setattr(checkpoint, "save", slow)
    monkeypatch.setattr(checkpoint.Writer, "in_background", lambda self, state: True)
    writer, weight = checkpoint.Writer(), torch.zeros(4)
    for n in range(4):
        weight.fill_(n)  # as the training goes on
        state = {"model": {"a": weight, "tied": weight}, "model_args": {}, "n": n}
        writer.write(tmp_path / f"{n}.pt", state, [], lambda error, n=n: seen.append((n, error and error.errno)))
    assert len(writer.pending) == 2  # no more copies than that
    writer.finished(wait=True)
    assert seen == [(0, None), (1, None), (2, 28), (3, None)]
    for n in (0, 1, 3):
        loaded = checkpoint.load(tmp_path / f"{n}.pt")["model"]
        assert loaded["a"].tolist() == [n] * 4 and loaded["a"].data_ptr() == loaded["tied"].data_ptr()
