"""Where a command begins: at a new run, or at one to go on with; and what then must agree. Nothing here writes."""

import contextlib
import math
import os
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from lib import checkpoint
from lib.assemble import is_plain
from lib.files import stamp
from lib.settings import UserError

import torch

# A resume is refused where a setting of MUST_AGREE differs. Any other difference takes effect, and is printed unless it
# changes nothing of the training.
SHAPE = ("n_layer", "n_head", "n_embd", "n_inner", "bias")
MUST_AGREE = ("block_size", *SHAPE, "seed", "optimizer")
NEEDED = (*MUST_AGREE, "batch_size", "gradient_accumulation_steps", "init_from")
MAY_DIFFER_UNSAID = ("out_dir", "init_from", "resume_from", "overwrite", "eval_only")
# A run leaves these in out_dir. Only --overwrite=True removes them.
FILES = ("ckpt.pt", "best.pt", "final.pt", "ckpt_iter_*.pt", "ckpt_epoch_*.pt", "eval_*.json", "metrics.jsonl")
FILES += ("run.json", "samples.txt")


@dataclass
class State:
    """How far a run has come: all that changes in it besides weights, optimizer and loss scale."""

    step: int = 0  # steps done
    sequence: int = 0  # the next sequence of the run, which is its place in the data
    best_val_loss: float = math.inf  # the lowest validation loss, which best.pt has
    worse: int = 0  # evaluations in a row with no better loss
    skipped: int = 0  # steps that were left out because they were not finite
    row: dict = field(default_factory=dict)  # figures of this step for metrics.jsonl


# A State's fields, and their names in a checkpoint. iter_num and best_val_loss are nanoGPT's.
KEYS = {"step": "iter_num", "best_val_loss": "best_val_loss", "sequence": "sequence_index"}
KEYS |= {"worse": "worse_evaluations", "skipped": "skipped_steps", "row": "row"}


@dataclass
class Start:
    """Where a command begins."""

    path: Path | None = None  # the checkpoint that it goes on from; None is a new run
    ckpt: dict = field(default_factory=dict)  # what that checkpoint holds
    state: State = field(default_factory=State)
    in_place: bool = False  # whether path is out_dir's own ckpt.pt; else the command begins in a new out_dir
    keeps_batch_size: bool = False  # whether the micro-batches are those that auto_batch_size has found before
    stamp: tuple | None = None  # identity of out_dir's ckpt.pt, which shows whether another process has saved since


def find(s, dataset, rt):
    """The Start of a command. A run that goes on keeps its init_from, resume_from and found batch size in the settings.

    Raises UserError where the command contradicts what is in out_dir.
    """
    last = Path(s.out_dir, "ckpt.pt")
    start = Start(stamp=stamp(last), path=checkpoint_to_resume(s, rt.restarted))
    if not start.path:
        if s.eval_only and s.init_from == "scratch" and last.exists():
            rt.say(f"this evaluates a new model, and {last} is there; --init_from=resume evaluates that")
        return start
    start.ckpt = load(start.path)
    start.in_place = is_same(start.path, last)
    if start.in_place:
        check_origin(s, start.ckpt)
    changes = check_agreement(start.ckpt, start.path, s, dataset)
    start.state = State(**{name: start.ckpt[key] for name, key in KEYS.items()})
    then = start.ckpt["config"]
    if s.init_from not in ("scratch", "resume") and not is_same(s.init_from, then["init_from"]):
        changes.append(f"its weights came from init_from={then['init_from']}, and {s.init_from} is not read")
    if then["init_from"] != "scratch" and (unused := unused_shape(s, then)):
        changes.append(unused)
    has_found = s.auto_batch_size and then.get("auto_batch_size") is True
    if has_found and then["gradient_accumulation_steps"] % rt.world_size == 0:
        start.keeps_batch_size = True  # Micro-batches of another size would draw another dropout.
        s.batch_size, s.gradient_accumulation_steps = then["batch_size"], then["gradient_accumulation_steps"]
    s.init_from = then["init_from"]  # A resume does not change where the run's first weights came from.
    if start.in_place:
        s.resume_from = then.get("resume_from", "")
    validation = dataset.checksums.get("val", "")
    is_other_split = validation and start.ckpt.get("val_sha256", "") not in ("", validation)
    has_other_validation = is_other_split or then.get("eval_iters", s.eval_iters) != s.eval_iters
    if has_other_validation:  # Losses over other windows can't be compared.
        start.state.row.pop("val_loss", None)
        if is_other_split:
            changes.append("the validation split is another one")
        changes.append("the best loss counts anew" + ", with a new best.pt" * (not s.eval_only))
    if has_other_validation or not start.in_place:
        # An older best.pt does not count. The best so far is this checkpoint, if it was evaluated.
        val_loss = start.state.row.get("val_loss")
        start.state.best_val_loss = val_loss if checkpoint.is_number(val_loss) else math.inf
        start.state.worse = 0
    rt.say(f"resuming {start.path} at step {start.state.step:,}" + "".join(f"; {change}" for change in changes))
    return start


def is_finished(s, start, max_iters, rt):
    """Whether a command has nothing left to train.

    Raises UserError where the checkpoint is beyond the command's end, or where the processes do not see the same run.
    """
    step, trains = start.state.step, s.max_iters > 0 and not s.eval_only
    if trains and start.path and not start.in_place and step > max_iters:
        raise UserError(
            f"{start.path} is of step {step:,}, this command ends at {max_iters:,}; raise max_iters or max_epochs"
        )
    ended = start.in_place and has_ended(start.state, max_iters, s.patience)
    finished = trains and (step > max_iters or ended and holds_step(Path(s.out_dir, "final.pt"), step))
    # A process whose step has been evaluated would not take part in the others' evaluation. A command that evaluates
    # alone would give a mean over the weights of several steps.
    if len(set(rt.gather((step, finished, "val_loss" in start.state.row)))) > 1:
        raise UserError(f"the processes find different checkpoints in {s.out_dir}; put it on a shared disk")
    if finished:
        longer = "patience" if step < max_iters else "max_epochs" if s.max_epochs else "max_iters"
        rt.say(f"{s.out_dir} has finished at step {step:,}; raise {longer}, or start anew by --overwrite=True")
    return finished


def has_ended(state, max_iters, patience):
    """Whether a run is at its end, by its length or by its patience."""
    return state.step == max_iters or 0 < patience <= state.worse


def holds_step(path, step):
    """Whether `path` has weights of this step."""
    with contextlib.suppress(UserError):
        return checkpoint.load(path).get("iter_num") == step
    return False


def load(path):
    """A checkpoint to go on from. Raises UserError."""
    remedy = "go on from another by --resume_from=PATH and a new --out_dir, or start anew by --overwrite=True"
    return checkpoint.load(path, remedy)


def checkpoint_to_resume(s, restarted):
    """The checkpoint that a command goes on from, or None where it starts a run. Raises UserError.

    restarted: torchrun has started the command again after a failure.
    """
    last = Path(s.out_dir, "ckpt.pt")
    origin = Path(s.resume_from) if s.resume_from else None  # where a new run begins
    if s.init_from == "resume":
        if s.overwrite:
            raise UserError("overwrite=True starts anew and init_from=resume goes on; give one of them")
        if not last.exists():
            raise UserError(f"init_from=resume: there is no {last} to resume; check out_dir, or start from scratch")
        return last
    if s.eval_only or not s.max_iters:
        return origin
    if s.overwrite and not (restarted and last.exists() and load(last).get("config", {}).get("overwrite")):
        check_overwrite(s)
        return origin
    if last.exists():
        return last
    if last.is_symlink():
        raise UserError(
            f"{last} is a link to {os.readlink(last)}, which is not there; mount its disk, or remove the link"
        )
    if left := files_of_run(s.out_dir):
        raise UserError(
            f"{s.out_dir} has {left[0].name} but no ckpt.pt to go on from; take another --out_dir, or "
            "--overwrite=True, which removes what is there"
        )
    return origin


def check_origin(s, ckpt):
    """Raise UserError where the run in out_dir, of which `ckpt` is the ckpt.pt, did not begin from s.resume_from."""
    began_from = ckpt.get("config", {}).get("resume_from")
    sources = [Path(s.out_dir, "ckpt.pt"), *([began_from] if began_from else [])]
    if s.resume_from and not any(is_same(s.resume_from, path) for path in sources):
        raise UserError(
            f"{s.out_dir} holds another run, and resume_from={s.resume_from} begins a new one; take another "
            "--out_dir, or --overwrite=True, which removes what is there"
        )


def files_of_run(out_dir):
    """What a run has left in out_dir. A link counts, wherever it leads."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else ()
    return sorted(Path(out_dir, name) for name in names if any(fnmatch(name, pattern) for pattern in FILES))


def check_overwrite(s):
    """Raise UserError where --overwrite=True would remove the very weights that the new run starts from."""
    out = Path(s.out_dir)
    files = [os.path.realpath(path) for path in files_of_run(out)]
    sources = [("init_from", name) for name in checkpoint.names_in(s.init_from)]
    for key, source in (*sources, ("resume_from", s.resume_from)):
        is_out = source not in ("", "scratch") and is_same(source, out) and not (out / "config.json").exists()
        if source and (os.path.realpath(source) in files or is_out and files):
            raise UserError(f"overwrite=True would remove {key}={source} itself; take another --out_dir")


def is_same(a, b):
    return os.path.realpath(a) == os.path.realpath(b)


# ---- what must agree ----


def check_agreement(ckpt, path, s, dataset):
    """Raise UserError where a checkpoint cannot be gone on with under these settings. Returns what else differs."""
    checkpoint.check_whole(ckpt, path)
    then = ckpt["config"]
    now = asdict(s)
    if then.get("init_from") != "scratch":  # A run that began from other weights has their shape.
        now |= {key: then[key] for key in SHAPE if key in then}
    for key, value in now.items():
        if (key in NEEDED and key not in then) or (key in then and not is_kind_of(then[key], value)):
            raise UserError(f"{path} can't be resumed: its setting {key} is missing or of another kind; take another")
    tokens = [sequences_per_step(c) * c["block_size"] for c in (then, now)]
    pairs = {key: (then[key], now[key]) for key in MUST_AGREE} | {"tokens a step": tuple(tokens)}
    wrong = [f"{key} was {old} and is {new}" for key, (old, new) in pairs.items() if old != new]
    if ckpt["data_sha256"] != dataset.checksums["train"]:
        wrong.append(f"the tokens of data/{s.dataset}/train.bin are others")
    if ckpt["tokenizer"] != dataset.tokenizer_spec:
        wrong.append(f"the tokenizer was {ckpt['tokenizer'][:40]!r} and is {dataset.tokenizer_spec[:40]!r}")
    if wrong:
        raise UserError(
            f"{path} can't be resumed: {'; '.join(wrong)}; undo that, or start a new run"
            f"{' without --resume_from,' * bool(s.resume_from)} in another --out_dir or by --overwrite=True"
        )
    check_consistency(ckpt, path)
    # auto_batch_size says what it finds in a line of its own.
    unsaid = MAY_DIFFER_UNSAID + ("batch_size", "gradient_accumulation_steps") * s.auto_batch_size
    changed = [key for key, value in now.items() if key not in unsaid and then.get(key, value) != value]
    return [f"{key} {then[key]} -> {now[key]}" for key in changed]


def sequences_per_step(config):
    return config["batch_size"] * config["gradient_accumulation_steps"]


def check_consistency(ckpt, path):
    """Raise UserError for a checkpoint whose parts contradict each other."""
    config, model_args = ckpt["config"], ckpt["model_args"] | {"n_inner": ckpt["n_inner"]}
    wrong = [key for key in ("block_size", *SHAPE) if model_args.get(key) != config[key]]
    wrong += ["sequence_index"] if ckpt["sequence_index"] != ckpt["iter_num"] * sequences_per_step(config) else []
    wrong += ["skipped_steps"] if ckpt["skipped_steps"] > ckpt["iter_num"] else []
    wrong += ["row"] if ckpt["row"].get("step", ckpt["iter_num"]) != ckpt["iter_num"] else []
    if wrong:
        raise UserError(f"{path} can't be resumed: its {wrong[0]} contradicts the rest of it; take another checkpoint")


def is_kind_of(value, example):
    """Whether a checkpoint's setting is of the kind that the command's is. `compile` may be a switch or a text."""
    kinds = {bool: (bool, str), str: (bool, str), int: (int,), float: (int, float), tuple: (list, tuple)}[type(example)]
    return type(value) in kinds


def unused_shape(s, config):
    """What to say of a shape in the settings that is not the one in the config (a dict) of the model; '' for none."""
    unused = [key for key in SHAPE if getattr(s, key) not in (config[key], getattr(type(s), key))]
    given = ", ".join(f"{key}={getattr(s, key)}" for key in unused)
    return f"its own shape stays, without {given}" if given else ""


def restore(start, optimizer, scaler):
    """Give the optimizer its moments and the scaler its loss scale, if there is a checkpoint to go on from.

    Rates, decays and all else that the settings decide stay as the optimizer was made. Raises UserError for a
    checkpoint whose moments do not fit the parameters, since a fused optimizer would write beyond them.
    """
    if not start.path:
        return
    saved, loss_scale = start.ckpt["optimizer"], start.ckpt["scaler"]
    groups = optimizer.state_dict()["param_groups"]
    if reason := misfit(saved, optimizer.param_groups, groups, start.state.step - start.state.skipped):
        raise UserError(f"{start.path} can't be resumed: its optimizer {reason}; take another checkpoint")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    if scaler.is_enabled() and loss_scale:
        if loss_scale.keys() != scaler.state_dict().keys() or not loss_scale["scale"] > 0:
            raise UserError(f"{start.path} can't be resumed: its scaler is none of torch's; take another checkpoint")
        scaler.load_state_dict(loss_scale)


def misfit(saved, groups, numbered, steps):
    """Why an optimizer's saved state does not fit its groups' parameters after so many steps; '' where it does."""
    saved_groups, state = saved.get("param_groups"), saved.get("state")
    if not isinstance(saved_groups, list) or not isinstance(state, dict):
        return "is none of torch's"
    saved_numbers = [g.get("params") if isinstance(g, dict) else None for g in saved_groups]
    are_numbers = all(isinstance(n, list) and all(type(i) is int for i in n) for n in saved_numbers)
    if not are_numbers or saved_numbers != [g["params"] for g in numbered]:
        return "is that of other parameters"
    if not state and not steps:
        return ""
    if state.keys() != {i for g in numbered for i in g["params"]}:
        return "has the moments of other parameters"
    places = set()  # addresses: two moments in one place would change each other
    for group, numbers in zip(groups, numbered, strict=True):
        names = {"momentum_buffer"} if group.get("muon") else {"step", "exp_avg", "exp_avg_sq"}
        for i, p in zip(numbers["params"], group["params"], strict=True):
            if not isinstance(state[i], dict) or state[i].keys() != names:
                return "has other moments"
            for name, moment in state[i].items():
                if reason := misfit_of_moment(name, moment, p, steps):
                    return f"has a moment {name} {reason}"
                places.add(moment.data_ptr())
    if len(places) != sum(len(moments) for moments in state.values()):
        return "has moments that share their memory"
    return ""


def misfit_of_moment(name, moment, p, steps):
    """Why a saved moment can't be that of the parameter p after so many steps; '' where it can."""
    shape = () if name == "step" else p.shape
    if not is_plain(moment) or moment.shape != shape or moment.dtype != torch.float32:
        return "of another shape"
    if not moment.is_contiguous() or moment.untyped_storage().nbytes() < 4 * moment.numel():
        return "that does not hold its numbers"
    if not moment.isfinite().all():
        return "that is not finite"
    if name == "step" and moment.item() != steps or name == "exp_avg_sq" and (moment < 0).any():
        return "that no training gives"
    return ""
