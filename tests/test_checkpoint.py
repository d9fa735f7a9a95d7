"""checkpoint.py: whole or not at all, plain data only, and every kind of model opened."""

import math
import os
import pickle
import shutil
import time
import zipfile
from pathlib import Path

from lib import checkpoint, huggingface
from lib.settings import UserError
from model import GPT, GPTConfig

import pytest
import torch
from conftest import random_model, refusal, same_bits, save_huggingface, weights

SHAPE = dict(block_size=8, vocab_size=40, n_layer=2, n_head=2, n_embd=8)
CHARS = "char:" + "".join(map(chr, range(65, 105)))  # a tokenizer of 40 ids


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(**SHAPE))


@pytest.fixture
def path(tmp_path, model):
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.weights(model) | {"format": 1, "tokenizer": CHARS})
    return tmp_path / "ckpt.pt"


def same(a, b):
    return same_bits(a.state_dict(), b.state_dict())


def test_what_is_saved_is_what_is_opened(path, model):
    opened = checkpoint.open_model(path)
    assert same(opened.model, model) and opened.model.config == model.config and opened.tokenizer == CHARS
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


def test_a_copy_that_fails_leaves_the_old_files_whole_and_no_stray(path, monkeypatch):
    link, before = path.with_name("ckpt_iter_1.pt"), path.read_bytes()
    link.write_bytes(b"kept")

    def fail(source, target):
        target.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError("not supported")))
    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"model": {}, "model_args": {}}, links=[link])
    assert (path.read_bytes(), link.read_bytes()) == (before, b"kept") and len(list(path.parent.iterdir())) == 2


def test_any_flipped_byte_of_a_tensor_is_found(path):
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda i: i.file_size)
    start = entry.header_offset + 200
    for at in (start, start + entry.file_size // 2):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)


def test_a_record_that_is_marked_as_a_folder_is_found(path):
    """torch would take its tensor for empty, and leave in it what the memory held."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        count, at = len(archive.infolist()), archive.start_dir
    for _ in range(count):
        path.write_bytes(whole[: at + 38] + bytes([whole[at + 38] ^ 0x10]) + whole[at + 39 :])
        with pytest.raises(UserError, match="damaged"):
            checkpoint.load(path)
        at += 46 + sum(int.from_bytes(whole[i : i + 2], "little") for i in (at + 28, at + 30, at + 32))


def test_a_folder_and_a_file_without_the_right_to_read_it_are_named(path, monkeypatch):
    says = refusal(checkpoint.load, path.parent)
    assert says.endswith(f"it is a folder, name one of its files ({path.name})")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    assert "give yourself the right to read it" in refusal(checkpoint.load, path)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.99])
def test_a_file_cut_short_is_found(path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_checkpoint_that_carries_code_is_refused_and_does_not_run(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    torch.save(checkpoint.weights(model) | {"config": Hostile()}, "a.pt")
    Path("b.pt").write_bytes(pickle.dumps(Hostile()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(UserError):
            checkpoint.open_model(name)
    assert not Path("pwned").exists()


ARGS = SHAPE | {"dropout": 0.0, "bias": True}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 99}, "newer version"),
        ({"model_args": {"n_layer": 2}}, "do not fit"),
        ({"model_args": ARGS | {"n_embd": 16}}, "do not fit"),
        ({"model_args": ARGS | {"n_head": 3}}, "do not fit"),
        ({"model_args": {k: v for k, v in ARGS.items() if k != "n_head"}}, "n_head is missing"),
        ({"model_args": ARGS | {"width": 3}}, "do not fit"),
        ({"model": {}}, "do not fit"),
        ({"n_inner": 12}, "do not fit"),
        # sizes that would keep a machine busy, or that it has no memory for
        ({"model_args": ARGS | {"n_layer": 10**6}}, "n_layer=1,000,000, and there are weights of 2 blocks"),
        ({"model_args": ARGS | {"n_embd": 10**7}}, "do not fit"),
        ({"model_args": ARGS | {"n_embd": 2**62}}, "do not fit"),
        ({"model_args": ARGS | {"vocab_size": 10**12}}, "do not fit"),
        ({"model_args": ARGS | {"block_size": 10**12}}, "do not fit"),
        ({"n_inner": 10**12}, "do not fit"),
        ({"n_inner": 2**62}, "do not fit"),
        ({"model": 3}, "its model is of another kind"),
        ({"model": {"transformer.wte.weight": [1.0]}}, "its model is of another kind"),
        ({"model": {3: torch.zeros(2)}}, "its model is of another kind"),
        ({"model_args": [2]}, "its model_args is of another kind"),
        ({"model_args": {"n_layer": torch.ones(2)}}, "its model_args is of another kind"),
        ({"n_inner": -1}, "its n_inner is of another kind"),
        ({"format": "1"}, "its format is of another kind"),
        ({"format": True}, "its format is of another kind"),
        ({"iter_num": None}, "its iter_num is of another kind"),
        ({"iter_num": -5}, "its iter_num is of another kind"),
        ({"iter_num": 10**30}, "its iter_num is of another kind"),
        ({"best_val_loss": "x"}, "its best_val_loss is of another kind"),
        ({"best_val_loss": math.nan}, "its best_val_loss is of another kind"),
        ({"best_val_loss": torch.ones(2)}, "its best_val_loss is of another kind"),
        ({"config": [1]}, "its config is of another kind"),
        ({"config": {"n_layer": {}}}, "its config is of another kind"),
        ({"config": {"learning_rate": math.inf}}, "its config is of another kind"),
        ({"config": {"dataset": 5}}, "its dataset is of another kind"),
        ({"tokenizer": 5}, "its tokenizer is of another kind"),
        ({"tokenizer": "char:"}, "its tokenizer is of another kind"),
        ({"tokenizer": "char:aa"}, "its tokenizer is of another kind"),
        ({"tokenizer": "char:a\ud800"}, "its tokenizer is of another kind"),
        ({"tokenizer": "gpt2"}, "has 40 ids, its tokenizer 'gpt2' 50,257"),
    ],
)
def test_what_a_checkpoint_may_not_hold_is_one_line_at_once(tmp_path, model, change, says):
    torch.save(checkpoint.weights(model) | change, tmp_path / "a.pt")
    began = time.perf_counter()
    assert says in refusal(checkpoint.open_model, tmp_path / "a.pt")
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("lm_head.weight", torch.zeros(40, 8), "lm_head.weight is not transformer.wte.weight"),
        ("lm_head.weight", torch.zeros(41, 8), "lm_head.weight is (41, 8), wanted is (40, 8)"),
        ("transformer.h.1.mlp.c_fc.weight", torch.zeros(32, 8, dtype=torch.int64), "is of torch.int64"),
        ("transformer.h.0.ln_1.weight", torch.zeros(8).to_sparse(), "its model is of another kind"),
        ("transformer.h.0.attn.c_attn.weight", torch.zeros(8, 24), "(8, 24), wanted is (24, 8)"),
        ("transformer.h.7.ln_1.weight", torch.zeros(8), "weights of 3 blocks"),
        ("score.weight", torch.zeros(2, 8), "wanted is no weight of GPT-2"),
    ],
)
def test_weights_that_are_not_the_model_s_are_named(tmp_path, model, name, tensor, says):
    held = checkpoint.weights(model)
    torch.save(held | {"model": held["model"] | {name: tensor}}, tmp_path / "a.pt")
    assert says in refusal(checkpoint.open_model, tmp_path / "a.pt")


def test_a_damaged_file_leads_to_those_beside_it_by_a_setting_that_every_script_has(path, model):
    checkpoint.save(path.with_name("best.pt"), checkpoint.weights(model))
    path.write_bytes(path.read_bytes()[:500])
    says = refusal(checkpoint.load, path)
    assert says.endswith("--init_from=PATH takes another (beside it: best.pt)")


def test_a_file_of_safetensors_is_opened_by_its_folder(tmp_path, model):
    folder = save_huggingface(model, tmp_path / "hf")
    says = refusal(checkpoint.open_model, f"{folder}/model.safetensors")
    assert f"--init_from={folder} opens them" in says and checkpoint.open_model(folder).model.config.n_layer == 2


def test_a_dict_without_a_model_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="model_args"):
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
    opened = checkpoint.open_model(save_huggingface(model, tmp_path / "hf"))
    assert same(opened.model, model) and opened.path is None
    Path(tmp_path, "run").mkdir()
    for name in ("final.pt", "ckpt.pt", "best.pt"):
        checkpoint.save(tmp_path / "run" / name, checkpoint.weights(model))
        assert checkpoint.open_model(tmp_path / "run").path.name == name


def test_several_checkpoints_are_the_mean_of_their_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["a.pt", "b.pt", "c.pt"]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        net = GPT(GPTConfig(**SHAPE, dropout=0.1 * seed))
        rest = {"tokenizer": CHARS, "iter_num": 10 - seed, "config": {"dataset": "mine"}}
        checkpoint.save(name, checkpoint.weights(net) | rest)
    states = [checkpoint.load(name)["model"] for name in names]
    opened = checkpoint.open_model("a.pt,b.pt,c.pt")
    for key, value in opened.model.state_dict().items():
        exact = sum(state[key].double() for state in states) / 3
        assert (value - exact).abs().max() <= 2**-22 * max(state[key].abs().max() for state in states)
    assert opened.model.lm_head.weight is opened.model.transformer.wte.weight
    assert (opened.name, opened.path) == ("the mean of a.pt, b.pt, c.pt", None)
    assert checkpoint.open_model("[a-c].pt").name == checkpoint.open_model("a.pt,[bc]*").name == opened.name
    assert (opened.tokenizer, opened.dataset, opened.iter_num) == (CHARS, "mine", 10)
    assert same(checkpoint.open_model("b.pt,b.pt").model, checkpoint.open_model("b.pt").model)
    checkpoint.save("a.pt,b.pt", checkpoint.load("c.pt"))  # A name may have a comma.
    assert same(checkpoint.open_model("a.pt,b.pt").model, checkpoint.open_model("c.pt").model)


def test_a_mean_is_of_the_dataset_of_those_that_name_one(tmp_path, model):
    for name, dataset in (("a", "mine"), ("b", "mine"), ("c", "yours"), ("none", "")):
        rest = {"config": {"dataset": dataset}, "tokenizer": CHARS}
        checkpoint.save(tmp_path / f"{name}.pt", checkpoint.weights(model) | rest)
    for names, dataset in (("ab", "mine"), ("ac", ""), (("none", "a"), "mine"), (("a", "none"), "mine"), ("aca", "")):
        assert checkpoint.open_model(",".join(f"{tmp_path}/{n}.pt" for n in names)).dataset == dataset


def test_models_that_have_no_mean_are_named(tmp_path, model, path):
    other = checkpoint.weights(GPT(GPTConfig(**SHAPE | {"n_layer": 1}))) | {"tokenizer": CHARS}
    checkpoint.save(tmp_path / "shape.pt", other)
    checkpoint.save(tmp_path / "tokens.pt", checkpoint.weights(model) | {"tokenizer": CHARS[:-1] + "z"})
    for name, what in (("shape.pt", "n_layer"), ("tokens.pt", "tokenizer")):
        says = refusal(checkpoint.open_model, f"{path},{tmp_path / name}")
        assert says.startswith(f"{path} and {tmp_path / name} have no mean: they differ in {what};")
    assert "missing.pt" in refusal(checkpoint.open_model, f"{path},missing.pt")
    assert "',' is no checkpoint or folder" in refusal(checkpoint.open_model, ",")
    for names in (f"{path},", f",{path}", f"{path},,{path}"):
        assert same(checkpoint.open_model(names).model, model)


def test_the_newest_run(tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no run under out/"):
        checkpoint.open_run()
    for name, saved in (("out/b/best", 5), ("out/a/ckpt", 6), ("out/c/ckpt", 8), ("out/c/best", 7)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(f"{name}.pt", checkpoint.weights(model))
        os.utime(f"{name}.pt", (0, saved))
    assert checkpoint.newest_run() == Path("out/c")
    assert checkpoint.open_run().path == Path("out/c/best.pt")
    assert checkpoint.open_run(out_dir="out/a").path == Path("out/a/ckpt.pt")
    assert checkpoint.open_run("out/a", init_from="out/b/best.pt").path == Path("out/b/best.pt")
    with pytest.raises(UserError, match="no checkpoint in out/none; train first"):
        checkpoint.open_run("out/none")
    Path("out/a").rename("out/books-lr3")
    with pytest.raises(UserError, match="no checkpoint in out/book_lr3; did you mean out/books-lr3.* Else train first"):
        checkpoint.open_run("out/book_lr3")


def test_a_tokenizer_that_only_the_number_of_ids_tells_is_said(tmp_path, capsys):
    for folder, more in (("said", {"tokenizer_spec": "bytes"}), ("unsaid", {})):
        save_huggingface(random_model(), tmp_path / folder, **more)
        assert checkpoint.open_model(tmp_path / folder).tokenizer == "bytes"
        assert ("by its 257 ids it is taken to have" in capsys.readouterr().err) == (folder == "unsaid")


@pytest.mark.parametrize("source", ["gpt3", "out/none.pt", "a/b/c", "nowhere/", "x.safetensors"])
def test_a_source_that_names_no_model_is_one_line(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError) as error:
        checkpoint.open_model(source)
    assert "\n" not in str(error.value)


def test_a_name_on_the_hub_may_have_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load(source):
        asked.append(source)
        raise ZeroDivisionError

    monkeypatch.setattr(huggingface, "load", load)
    with pytest.raises(ZeroDivisionError):
        checkpoint.open_model("user/gpt2-v1.0")
    assert asked == ["user/gpt2-v1.0"]


def slowly(save, fails=()):
    """checkpoint.save that takes its time, and finds the disk full for the checkpoints with one of these numbers."""

    def save_slowly(path, state, links=()):
        time.sleep(0.05)
        if state["n"] in fails:
            raise OSError(28, "No space left on device")
        save(path, state, links)

    return save_slowly


def test_background_writes_hold_what_they_were_given_in_their_order_and_tell_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", slowly(checkpoint.save, fails={2}))
    monkeypatch.setattr(checkpoint.Writer, "in_background", lambda writer, state: True)
    with checkpoint.Writer() as writer:
        weight = torch.zeros(4)
        for n in range(4):
            weight.fill_(n)  # The training goes on.
            state = {"model": {"a": weight, "tied": weight}, "model_args": {}, "n": n}
            writer.write(tmp_path / f"{n}.pt", state, about=n)
            assert sum(not future.done() for *_, future in writer.pending) <= 2  # no more copies than that
        seen = writer.ended() + writer.ended(wait=True)
        assert [(write.about, write.path.name, write.error and write.error.errno) for write in seen] == [
            (0, "0.pt", None),
            (1, "1.pt", None),
            (2, "2.pt", 28),
            (3, "3.pt", None),
        ]
        assert writer.ended(wait=True) == []  # Each write is told once.
    for n in (0, 1, 3):
        loaded = weights(tmp_path / f"{n}.pt")
        assert loaded["a"].tolist() == [n] * 4 and loaded["a"].data_ptr() == loaded["tied"].data_ptr()


def test_what_was_given_is_on_the_disk_when_the_writer_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", slowly(checkpoint.save))
    monkeypatch.setattr(checkpoint.Writer, "in_background", lambda writer, state: True)
    with pytest.raises(KeyboardInterrupt), checkpoint.Writer() as writer:
        for n in range(2):
            writer.write(tmp_path / f"{n}.pt", {"model": {}, "model_args": {}, "n": n})
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["0.pt", "1.pt"]


def test_a_write_in_the_foreground_has_ended_when_it_returns(tmp_path, model):
    with checkpoint.Writer() as writer:
        writer.write(tmp_path / "a.pt", checkpoint.weights(model), [tmp_path / "b.pt"])
        (write,) = writer.ended()
    assert (write.path, write.links, write.error) == (tmp_path / "a.pt", [tmp_path / "b.pt"], None)
    assert same_bits(weights(tmp_path / "a.pt"), weights(tmp_path / "b.pt"))


def test_a_bug_in_a_write_is_no_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", lambda *args: 1 / 0)
    with checkpoint.Writer() as writer:
        writer.write(tmp_path / "a.pt", {"model": {}})
        with pytest.raises(ZeroDivisionError):
            writer.ended()
