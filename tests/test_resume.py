"""lib/resume.py: where a command begins, what must agree, and what a checkpoint must hold to be gone on with."""

import copy
import math
import os
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import train
from lib import checkpoint, resume, runtime
from lib.settings import UserError
from model import GPT, GPTConfig

import pytest
import torch
from conftest import refusal

SHAPE = dict(n_layer=1, n_head=2, n_embd=8, n_inner=0, bias=True)
SHA = "0" * 64
DATASET = SimpleNamespace(tokenizer_spec="bytes", vocab_size=257, checksums={"train": SHA, "val": "1" * 64})


def settings_of(**more):
    run = dict(out_dir="out/a", block_size=8, batch_size=5, gradient_accumulation_steps=2, device="cpu", **SHAPE)
    return train.Settings(**run | more)


def optimizer_of(s, model, rt):
    return train.make_optimizer(s, model, rt)


@pytest.fixture(scope="module", params=["adamw", "muon"])
def whole(request):
    """A whole checkpoint after two steps, as a dict."""
    s, rt = settings_of(optimizer=request.param), runtime.choose("cpu")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, block_size=8, **SHAPE))
    optimizer, scaler = optimizer_of(s, model, rt)
    for _ in range(2):
        model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[1].backward()
        optimizer.step()
    return checkpoint.weights(model) | {
        "format": checkpoint.FORMAT,
        "iter_num": 2,
        "best_val_loss": 3.5,
        "config": asdict(s),
        "tokenizer": "bytes",
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "sequence_index": 20,
        "skipped_steps": 0,
        "worse_evaluations": 0,
        "row": {"step": 2, "val_loss": 3.5},
        "data_sha256": SHA,
        "val_sha256": "1" * 64,
        "wandb_run_id": "",
    }


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out/a").mkdir(parents=True)


def begin(s):
    """What train.py does with a command up to the first step: (Start, model, optimizer)."""
    rt = runtime.choose("cpu")
    start = resume.find(s, DATASET, rt)
    resume.is_finished(s, start, s.max_iters, rt)
    model = train.make_model(s, start, DATASET, rt)
    optimizer, scaler = optimizer_of(s, model, rt)
    if start.path:
        resume.restore(start, optimizer, scaler)
    return start, model, optimizer


def save(held, name="out/a/ckpt.pt"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(held, name)


# ---- what a checkpoint must hold ----


def test_a_whole_checkpoint_is_gone_on_with_as_it_was(whole):
    save(whole)
    start, model, optimizer = begin(settings_of(optimizer=whole["config"]["optimizer"]))
    assert start.state == resume.State(2, 20, 3.5, 0, 0, {"step": 2, "val_loss": 3.5}) and start.in_place
    assert all(torch.equal(p, whole["model"][name]) for name, p in model.state_dict().items())
    for i, held in whole["optimizer"]["state"].items():
        for name, moment in held.items():
            assert torch.equal(optimizer.state_dict()["state"][i][name], moment)


def test_a_run_goes_on_whatever_init_from_says_and_other_weights_are_not_passed_over_unsaid(whole, capsys):
    save(whole)
    began = whole["config"]["init_from"]
    for init_from in ("scratch", "resume", began, f"./x/../{began}"):
        assert begin(settings_of(optimizer=whole["config"]["optimizer"], init_from=init_from))[0].in_place
    assert "init_from" not in capsys.readouterr().out
    for more in ({}, {"resume_from": "out/a/ckpt.pt", "out_dir": "out/b"}):
        s = settings_of(optimizer=whole["config"]["optimizer"], init_from="a.pt,b.pt", **more)
        assert begin(s)[0].state.step == 2 and s.init_from == began
        assert f"its weights came from init_from={began}, and a.pt,b.pt is not read" in capsys.readouterr().out


def test_a_shape_that_a_run_from_other_weights_does_not_have_is_said(whole, capsys):
    config = whole["config"] | {"init_from": "gpt2"}
    save(whole | {"config": config})
    begin(settings_of(optimizer=config["optimizer"], init_from="gpt2"))
    assert "shape" not in capsys.readouterr().out
    begin(settings_of(optimizer=config["optimizer"], init_from="gpt2", n_layer=7))
    assert "its own shape stays, without n_layer=7" in capsys.readouterr().out


def missing(*path):
    """A change that removes a key, however deep."""

    def change(held):
        for key in path[:-1]:
            held = held[key]
        del held[path[-1]]

    return change


def put(*path_and_value):
    """A change that sets a key, however deep."""
    *path, value = path_and_value

    def change(held):
        for key in path[:-1]:
            held = held[key]
        held[path[-1]] = value

    return change


def a_moment(value):
    """A change that sets the first moment of the last parameter, whose name depends on the optimizer."""

    def change(held):
        state = held["optimizer"]["state"]
        moments = state[max(state)]
        name = next(name for name in moments if name != "step")
        moments[name] = value(moments[name])

    return change


def a_moment_called(name, value):
    """A change that sets this moment of the first parameter, which AdamW trains in either optimizer."""

    def change(held):
        moments = held["optimizer"]["state"][0]
        moments[name] = value(moments[name])

    return change


def moments_shared(held):
    moments = held["optimizer"]["state"][0]
    moments["exp_avg_sq"] = moments["exp_avg"] = moments["exp_avg"].abs()


KEYS = ("optimizer", "scaler", "sequence_index", "skipped_steps", "worse_evaluations", "row", "data_sha256")
KEYS += ("wandb_run_id", "config", "tokenizer", "iter_num", "best_val_loss", "n_inner")
SETTINGS = (*resume.MUST_AGREE, "batch_size", "gradient_accumulation_steps", "init_from")
NOT_GONE_ON_WITH = {
    **{f"no {key}": (missing(key), "is missing") for key in KEYS if key not in ("sequence_index",)},
    "no sequence_index": (missing("sequence_index"), "holds weights alone"),
    "no format": (missing("format"), "is nanoGPT's"),
    **{f"no setting {key}": (missing("config", key), f"its setting {key} is missing") for key in SETTINGS},
    **{f"{key} as a list": (put(key, [1]), f"its {key} is of another kind") for key in KEYS},
    **{f"{key} as a tensor": (put(key, torch.ones(2)), f"its {key} is of another kind") for key in KEYS},
    "a step below 0": (put("iter_num", -5), "its iter_num is of another kind"),
    "a place before the data": (put("sequence_index", -7), "its sequence_index is of another kind"),
    "a place beyond 64 bits": (put("sequence_index", 10**30), "its sequence_index is of another kind"),
    "a best loss that is no number": (put("best_val_loss", math.nan), "its best_val_loss is of another kind"),
    "a row of texts": (put("row", "loss", "x"), "its row is of another kind"),
    "a row of dicts": (put("row", "val_loss", {}), "its row is of another kind"),
    "a learning rate as text": (put("config", "learning_rate", "fast"), "its setting learning_rate"),
    "a batch as a fraction": (put("config", "batch_size", 1.5), "its setting batch_size"),
    "a dataset as a number": (put("config", "dataset", 5), "its setting dataset"),
    "a layer more in the settings": (put("config", "n_layer", 2), "n_layer was 2 and is 1"),
    "another tokenizer": (put("tokenizer", "char:ab"), "the tokenizer was"),
    "a tokenizer of more ids": (put("tokenizer", "gpt2"), "the tokenizer was 'gpt2' and is 'bytes'"),
    # parts that contradict each other
    "a layer too many": (put("model_args", "n_layer", 2), "its n_layer contradicts the rest of it"),
    "heads of another number": (put("model_args", "n_head", 4), "its n_head contradicts the rest of it"),
    "no n_head": (missing("model_args", "n_head"), "its n_head contradicts the rest of it"),
    "other positions": (put("model_args", "block_size", 4), "its block_size contradicts the rest of it"),
    "another width of the MLP": (put("n_inner", 7), "its n_inner contradicts the rest of it"),
    "a place of another step": (put("sequence_index", 30), "its sequence_index contradicts the rest of it"),
    "a step of another place": (put("iter_num", 1), "its sequence_index contradicts the rest of it"),
    "more steps skipped than done": (put("skipped_steps", 3), "its skipped_steps contradicts the rest of it"),
    "a best loss below 0": (put("best_val_loss", -5.0), "its best_val_loss is of another kind"),
    "a best loss beyond a float": (put("best_val_loss", 10**400), "its best_val_loss is of another kind"),
    "a best loss on no device": (
        put("best_val_loss", torch.ones((), device="meta")),
        "its best_val_loss is of another",
    ),
    "a weight on no device": (put("model", "lm_head.weight", torch.ones(257, 8, device="meta")), "its model is of"),
    # the optimizer
    "no param_groups": (missing("optimizer", "param_groups"), "its optimizer is none of torch's"),
    "no state": (missing("optimizer", "state"), "its optimizer is none of torch's"),
    "groups of texts": (put("optimizer", "param_groups", ["x", "y"]), "its optimizer is that of other parameters"),
    "a group too few": (lambda held: held["optimizer"]["param_groups"].pop(), "that of other parameters"),
    "a group with fewer parameters": (
        lambda held: held["optimizer"]["param_groups"][0]["params"].pop(),
        "that of other parameters",
    ),
    "moments of fewer parameters": (missing("optimizer", "state", 0), "has the moments of other parameters"),
    "moments of one more": (put("optimizer", "state", 99, {}), "has the moments of other parameters"),
    "no moments": (put("optimizer", "state", 0, {}), "has other moments"),
    "moments that are none": (put("optimizer", "state", 0, 3), "has other moments"),
    "a moment of one element": (a_moment(lambda moment: moment.flatten()[:1]), "of another shape"),
    "a moment that is too large": (a_moment(lambda moment: torch.zeros(3 * moment.numel())), "of another shape"),
    "a moment of whole numbers": (a_moment(torch.Tensor.long), "of another shape"),
    "a moment that is no tensor": (a_moment(lambda moment: 0.5), "of another shape"),
    "a moment that is not finite": (a_moment(lambda moment: moment * math.nan), "is not finite"),
    "a moment of one element expanded": (a_moment(lambda moment: torch.zeros(1).expand(moment.shape)), "its numbers"),
    "a sparse moment": (a_moment(torch.Tensor.to_sparse), "of another shape"),
    "a moment of half precision": (a_moment(torch.Tensor.half), "of another shape"),
    "a moment on no device": (a_moment(lambda moment: moment.to("meta")), "of another shape"),
    "no moments after two steps": (put("optimizer", "state", {}), "has the moments of other parameters"),
    "moments that share their memory": (moments_shared, "share their memory"),
    "a step that was not done": (a_moment_called("step", lambda step: step + 7), "that no training gives"),
    "a step below 0 of a moment": (a_moment_called("step", torch.neg), "that no training gives"),
    "squares below 0": (a_moment_called("exp_avg_sq", lambda squares: squares - 1), "that no training gives"),
    "a step of several numbers": (put("optimizer", "state", 0, "step", torch.ones(3)), "of another shape"),
}


@pytest.mark.parametrize("name", NOT_GONE_ON_WITH)
def test_what_a_run_can_t_go_on_with_is_one_line(whole, name):
    change, says = NOT_GONE_ON_WITH[name]
    held = copy.deepcopy(whole)
    change(held)
    save(held)
    before = Path("out/a/ckpt.pt").read_bytes()
    assert says in refusal(begin, settings_of(optimizer=whole["config"]["optimizer"]))
    assert Path("out/a/ckpt.pt").read_bytes() == before


def test_a_run_of_another_optimizer_is_refused_by_that_name(whole):
    save(whole)
    then, now = whole["config"]["optimizer"], "adamw" if whole["config"]["optimizer"] == "muon" else "muon"
    assert f"optimizer was {then} and is {now}" in refusal(begin, settings_of(optimizer=now))


def test_a_run_that_has_skipped_a_step_has_a_step_less_in_its_moments(whole):
    save(whole | {"iter_num": 3, "sequence_index": 30, "skipped_steps": 1, "row": {"step": 3}})
    start, _, _ = begin(settings_of(optimizer=whole["config"]["optimizer"]))
    assert (start.state.step, start.state.skipped) == (3, 1)


def test_a_run_that_begins_at_a_checkpoint_has_its_loss_as_the_best(whole):
    """What was better before lies in the other folder."""
    save(whole | {"best_val_loss": 1.5, "worse_evaluations": 4}, "out/b/ckpt.pt")
    s = settings_of(optimizer=whole["config"]["optimizer"], resume_from="out/b/ckpt.pt")
    start, _, _ = begin(s)
    assert (start.state.best_val_loss, start.state.worse) == (3.5, 0)


@pytest.mark.parametrize(("processes", "keeps"), [(1, True), (2, True), (4, False)])
def test_a_found_batch_size_is_kept_where_the_processes_can_share_it(whole, processes, keeps):
    save(whole | {"config": whole["config"] | {"auto_batch_size": True}})
    s = settings_of(
        optimizer=whole["config"]["optimizer"], auto_batch_size=True, batch_size=1, gradient_accumulation_steps=10
    )
    start = resume.find(s, DATASET, replace(runtime.choose("cpu"), world_size=processes))
    assert (start.keeps_batch_size, s.batch_size) == (keeps, 5 if keeps else 1)


def test_what_the_settings_decide_is_not_taken_from_a_file(whole):
    """maximize=True would train uphill."""
    held = copy.deepcopy(whole)
    for group in held["optimizer"]["param_groups"]:
        group |= {"maximize": True, "lr": 1e9, "eps": 1.0, "betas": "x", "weight_decay": -1.0, "amsgrad": True}
    save(held)
    s = settings_of(optimizer=whole["config"]["optimizer"], weight_decay=0.3, beta2=0.9)
    _, model, optimizer = begin(s)
    fresh, _ = optimizer_of(s, model, runtime.choose("cpu"))
    for found, wanted in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert {k: v for k, v in found.items() if k != "params"} == {k: v for k, v in wanted.items() if k != "params"}


def test_a_run_without_a_step_has_no_moments_yet(whole):
    held = copy.deepcopy(whole)
    held["optimizer"]["state"] = {}
    save(held | {"iter_num": 0, "sequence_index": 0, "row": {}})
    _, _, optimizer = begin(settings_of(optimizer=whole["config"]["optimizer"]))
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("change", [missing("scale"), put("scale", 0.0), put("scale", -1.0), put("more", 1.0)])
def test_a_loss_scale_that_is_none_is_one_line(change):
    scaler = torch.amp.GradScaler("cpu")
    s, rt = settings_of(), runtime.choose("cpu")
    model = GPT(GPTConfig(vocab_size=257, block_size=8, **SHAPE))
    optimizer, _ = optimizer_of(s, model, rt)
    held = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    resume.restore(resume.Start(Path("x"), held), optimizer, scaler)
    change(held["scaler"])
    assert "its scaler is none of torch's" in refusal(resume.restore, resume.Start(Path("x"), held), optimizer, scaler)


def test_losses_of_another_validation_split_are_not_compared(whole, capsys):
    held = copy.deepcopy(whole) | {"worse_evaluations": 3}
    for known, best, worse, val_loss in (("1" * 64, 3.5, 3, 3.5), ("", 3.5, 3, 3.5), ("2" * 64, math.inf, 0, None)):
        save(held | {"val_sha256": known})
        start, _, _ = begin(settings_of(optimizer=whole["config"]["optimizer"]))
        assert (start.state.best_val_loss, start.state.worse, start.state.row.get("val_loss")) == (
            best,
            worse,
            val_loss,
        )
        assert ("the validation split is another one" in capsys.readouterr().out) == (val_loss is None)
    del held["val_sha256"]  # as in a file of before
    save(held)
    assert begin(settings_of(optimizer=whole["config"]["optimizer"]))[0].state.best_val_loss == 3.5


def test_losses_over_another_part_of_the_split_are_not_compared(whole, capsys):
    save(copy.deepcopy(whole) | {"worse_evaluations": 3})
    optimizer = whole["config"]["optimizer"]
    start, _, _ = begin(settings_of(optimizer=optimizer, eval_iters=whole["config"]["eval_iters"] + 1))
    assert (start.state.best_val_loss, start.state.worse) == (math.inf, 0) and "val_loss" not in start.state.row
    assert "eval_iters 0 -> 1; the best loss counts anew" in capsys.readouterr().out


VALUES = [None, True, -1, 0, 1, 10**30, 0.5, -0.0, math.nan, math.inf, "", "x", "char:", "gpt2", "\ud800", [], {}, (1,)]
VALUES += [
    torch.zeros(()),
    torch.ones(3),
    torch.zeros(2, 2).long(),
    torch.tensor(math.nan),
    [[[[]]]],
    {"a": {}},
    {1: 2},
]


def places(held, at=()):
    """The paths to every value in nested containers."""
    for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
        yield (*at, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*at, key))


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(5))
def test_any_change_of_a_checkpoint_is_one_line_or_is_gone_on_with(whole, seed):
    """Values removed and replaced anywhere in it, one to three at a time."""
    chance, refused = random.Random(seed), 0
    for _ in range(100):
        held = copy.deepcopy(whole)
        for _ in range(chance.randint(1, 3)):
            *path, last = chance.choice(list(places(held)))
            inner = held
            for key in path:
                inner = inner[key]
            if chance.random() < 0.3 and isinstance(inner, dict):
                del inner[last]
            else:
                inner[last] = copy.deepcopy(chance.choice(VALUES))
        save(held)
        try:
            _, model, optimizer = begin(settings_of(optimizer=whole["config"]["optimizer"]))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600
            continue
        # Whatever was let through must train.
        model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[1].backward()
        optimizer.step()
    assert 20 < refused < 100


# ---- where a command begins ----


def begins(**more):
    """The checkpoint that a command goes on from, as text; '' for a new run."""
    return str(resume.checkpoint_to_resume(settings_of(**more), restarted=False) or "")


def run_at(folder, **config):
    """A run's folder with a ckpt.pt that a command's settings can be compared with."""
    model = GPT(GPTConfig(vocab_size=5, block_size=2, n_layer=1, n_head=1, n_embd=2))
    save(checkpoint.weights(model) | {"config": config}, f"{folder}/ckpt.pt")


def test_an_empty_folder_begins_a_run_and_one_with_a_run_goes_on():
    assert begins() == begins(init_from="x.pt") == begins(out_dir="out/none") == ""
    run_at("out/a")
    assert begins() == begins(init_from="x.pt") == begins(init_from="resume") == "out/a/ckpt.pt"
    assert "there is no out/b/ckpt.pt to resume" in refusal(begins, out_dir="out/b", init_from="resume")


def test_evaluating_looks_at_the_folder_only_to_resume():
    run_at("out/a")
    assert begins(eval_only=True) == "" and begins(eval_only=True, init_from="resume") == "out/a/ckpt.pt"
    assert begins(eval_only=True, resume_from="x.pt") == "x.pt"


def test_resume_from_begins_a_folder_of_its_own():
    run_at("out/a")
    run_at("out/b", resume_from="out/a/ckpt.pt")
    assert begins(out_dir="out/c", resume_from="out/a/ckpt.pt") == "out/a/ckpt.pt"
    # What began so is gone on with, however the path is written, and with or without the setting.
    for source in ("out/a/ckpt.pt", "./out/b/../a/ckpt.pt", os.path.abspath("out/a/ckpt.pt"), ""):
        assert begins(out_dir="out/b", resume_from=source) == "out/b/ckpt.pt"
        resume.check_origin(settings_of(out_dir="out/b", resume_from=source), checkpoint.load("out/b/ckpt.pt"))
    # A run's own last checkpoint is where it goes on anyway.
    assert begins(resume_from="out/a/ckpt.pt") == "out/a/ckpt.pt"
    resume.check_origin(settings_of(resume_from="out/a/ckpt.pt"), checkpoint.load("out/a/ckpt.pt"))
    for out_dir, source in (("out/b", "out/a/ckpt_iter_4.pt"), ("out/a", "out/b/ckpt.pt"), ("out/a", "nowhere.pt")):
        s = settings_of(out_dir=out_dir, resume_from=source)
        assert "holds another run" in refusal(resume.check_origin, s, checkpoint.load(f"{out_dir}/ckpt.pt"))


@pytest.mark.parametrize("name", ["best.pt", "final.pt", "ckpt_iter_4.pt", "metrics.jsonl", "eval_test.json"])
@pytest.mark.parametrize("more", [{}, {"resume_from": "x.pt"}, {"init_from": "x.pt"}])
def test_a_folder_with_what_a_run_has_left_but_no_ckpt_is_left_alone(name, more):
    Path("out/a", name).write_text("")
    assert f"out/a has {name} but no ckpt.pt to go on from" in refusal(begins, **more)
    assert begins(**more | {"overwrite": True}) == more.get("resume_from", "")


def test_other_files_are_no_run():
    for name in (".lock", "ckpt.pt.partial", "run.log", "mine.pt"):
        Path("out/a", name).write_text("")
    assert begins() == ""


def test_a_checkpoint_on_a_disk_that_is_not_there_is_not_replaced():
    Path("out/a/ckpt.pt").symlink_to("/no/such/disk/ckpt.pt")
    assert "is a link to /no/such/disk/ckpt.pt, which is not there" in refusal(begins)
    run_at("disk")
    Path("out/a/ckpt.pt").unlink()
    Path("out/a/ckpt.pt").symlink_to(os.path.abspath("disk/ckpt.pt"))
    assert begins() == "out/a/ckpt.pt"


def test_overwrite_begins_anew_but_not_what_it_would_remove():
    run_at("out/a")
    shutil.copy("out/a/ckpt.pt", "out/a/mine.pt")
    assert begins(overwrite=True) == ""
    assert begins(overwrite=True, init_from="out/a/mine.pt") == ""  # which stays
    assert begins(overwrite=True, resume_from="out/b/x.pt") == "out/b/x.pt"
    for key, source in (
        ("init_from", "out/a"),
        ("init_from", "out/../out/a/ckpt.pt"),
        ("resume_from", "out/a/ckpt.pt"),
    ):
        says = refusal(begins, overwrite=True, **{key: source})
        assert f"overwrite=True would remove {key}={source} itself" in says
    says = refusal(begins, overwrite=True, init_from="out/a/mine.pt,out/a/ckpt.pt")
    assert "overwrite=True would remove init_from=out/a/ckpt.pt itself" in says
    assert "give one of them" in refusal(begins, overwrite=True, init_from="resume")


def test_torchrun_s_restart_of_an_overwriting_command_goes_on():
    s = settings_of(overwrite=True)
    assert resume.checkpoint_to_resume(s, restarted=True) is None
    run_at("out/a", overwrite=False)
    assert resume.checkpoint_to_resume(s, restarted=True) is None  # It had not come to remove the run before it.
    run_at("out/a", overwrite=True)
    assert resume.checkpoint_to_resume(s, restarted=True) == Path("out/a/ckpt.pt")
    assert resume.checkpoint_to_resume(s, restarted=False) is None


# ---- whether it is at its end ----


@pytest.mark.parametrize(("final", "finished"), [(None, False), (2, True), (1, False), ("damaged", False)])
def test_a_run_is_finished_where_its_final_weights_are_of_its_last_step(final, finished, capsys):
    """A longer run keeps the older final.pt until its own end, so its ckpt.pt may be at the end beside it."""
    if final:
        run_at("out/final")
        held = torch.load("out/final/ckpt.pt", weights_only=True)
        save(held | {"iter_num": 2 if final == "damaged" else final}, "out/a/final.pt")
    if final == "damaged":
        os.truncate("out/a/final.pt", 300)
    s, rt = settings_of(max_iters=2), runtime.choose("cpu")
    start = resume.Start(Path("out/a/ckpt.pt"), state=resume.State(step=2), in_place=True)
    assert resume.is_finished(s, start, 2, rt) == finished
    assert ("out/a has finished at step 2; raise max_iters" in capsys.readouterr().out) == finished
    assert not resume.is_finished(s, start, 3, rt)


def test_the_setting_that_makes_a_finished_run_longer_is_named(capsys):
    rt = runtime.choose("cpu")
    run_at("out/final")
    save(torch.load("out/final/ckpt.pt", weights_only=True) | {"iter_num": 2}, "out/a/final.pt")
    start = resume.Start(Path("out/a/ckpt.pt"), state=resume.State(step=2, worse=3), in_place=True)
    for more, max_iters, longer in (({"max_epochs": 1.0}, 2, "max_epochs"), ({"patience": 3}, 9, "patience")):
        assert resume.is_finished(settings_of(**more), start, max_iters, rt)
        assert f"raise {longer}," in capsys.readouterr().out


@pytest.mark.parametrize(("eval_only", "max_iters"), [(False, 2), (True, 2), (False, 0)])
def test_a_checkpoint_that_only_the_first_process_sees_is_no_shared_run(eval_only, max_iters):
    """One of step 0 shows by its evaluation alone, which the others would make without the first."""
    seen = []
    rt = SimpleNamespace(gather=lambda value: seen.append(value) or list(seen), say=print)
    s = SimpleNamespace(eval_only=eval_only, max_iters=max_iters, out_dir="out", patience=0)
    resume.is_finished(s, resume.Start(state=resume.State(row={"step": 0, "val_loss": 5.0})), 2, rt)
    with pytest.raises(UserError, match="put it on a shared disk"):
        resume.is_finished(s, resume.Start(), 2, rt)
