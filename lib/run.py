"""What a command writes into a run's folder, and what of it is on the disk; W&B.

out_dir holds ckpt.pt (all that it takes to go on), best.pt and final.pt (weights), ckpt_iter_N.pt and ckpt_epoch_N.pt
(kept for good), metrics.jsonl, run.json, samples.txt and .lock. Of several processes only the first one writes. All see
the same State.
"""

import contextlib
import copy
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

from lib import checkpoint, describe, files, sampling, settings
from lib.files import stamp
from lib.resume import FILES, KEYS, files_of_run, has_ended
from lib.settings import UserError

import torch
from filelock import Timeout

RETRY_SECONDS = 60  # from a ckpt.pt that could not be written to the next attempt
MAX_SKIPPED_IN_A_ROW = 5  # steps without a finite loss and gradient after which a run is not going to recover


class Run:
    """out_dir while a command trains in it.

    saved, best_loss and failed_at say what is on the disk. The loop changes `state` and tells the Run what happened. A
    write that fails is reported, and the older file stands. ckpt.pt is tried again after a minute, best.pt with the
    next weights that are better than those on the disk, and final.pt by the same command.
    """

    def __init__(self, s, rt, writer, start, model, optimizer, scaler, dataset):
        self.s, self.rt, self.writer, self.state, self.dataset = s, rt, writer, start.state, dataset
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.out, self.ckpt_path = Path(s.out_dir), Path(s.out_dir, "ckpt.pt")
        self.loss = 0.0  # the newest loss of the weights
        self.skipped_in_a_row = 0
        self.saved = copy.deepcopy(start.state) if start.in_place else None  # the State in ckpt.pt; None for no file
        # Without evaluations the split is not read, and the best loss stays that of the text before.
        self.val_sha256 = dataset.checksums.get("val") or start.ckpt.get("val_sha256", "")
        self.best_loss = start.state.best_val_loss  # the validation loss of best.pt
        self.failed_at = None  # time.monotonic() at which ckpt.pt could not be written; None where it could
        self.save_is_due = not start.in_place  # The first save shows at once whether the disk takes a checkpoint.
        self.sample_is_due = False
        self.same_command = "the same command" + (" without --overwrite" if s.overwrite else "")
        self.writes = rt.rank == 0
        if self.writes:
            self.take_folder(start)
            self.description = describe.beginning(s, rt, dataset, model, self.state)  # It goes to run.json.
            if start.in_place:
                self.description |= describe.origin(self.out / "run.json")
            self.wandb = WandB(s, start.ckpt["wandb_run_id"] if start.in_place else "")
            keep_rows_before(self.out / "metrics.jsonl", self.state.step)

    def take_folder(self, start):
        """Lock out_dir. Remove what a killed write has left there, and with --overwrite=True what a run has."""
        try:
            if self.out.is_symlink() and not self.out.exists():
                raise UserError(f"out_dir={self.out} is a link to {os.readlink(self.out)}, which is not there; make it")
            self.out.mkdir(parents=True, exist_ok=True)
            self.take_lock()
            self.folder_id = identity(self.out)
            if stamp(self.ckpt_path) != start.stamp:
                raise UserError(
                    f"another process has just saved {self.ckpt_path}; {self.same_command} goes on from there"
                )
            partials = [path for name in FILES for path in self.out.glob(f"{name}.partial")]
            old = partials + (files_of_run(self.out) if not start.in_place and self.s.overwrite else [])
            if folders := [path for path in old if path.is_dir() and not path.is_symlink()]:
                raise UserError(f"{folders[0]} is a folder, and has the name of a run's file; move it away")
            for path in old:
                path.unlink()
        except OSError as error:
            at = f", {error.filename}" if error.filename else ""
            raise UserError(f"out_dir={self.out} can't be written ({error.strerror}{at}); name another") from None

    def take_lock(self):
        path = self.out / ".lock"
        try:
            self.lock = files.lock(path, timeout=0)
        except Timeout:
            raise UserError(
                f"another process trains in {self.out} and holds {path}; stop it, or name another --out_dir"
            ) from None
        self.lock_id = identity(path)

    def ended(self, max_iters):
        """Whether the run is at its end, by its length or by its patience."""
        return has_ended(self.state, max_iters, self.s.patience)

    # ---- what the loop tells ----

    def evaluated(self, val_loss):
        """Take note of the validation loss of the state. None is an evaluation that a signal has cut off.

        Every process calls this. Raises UserError if the run has diverged.
        """
        if val_loss is None:
            return
        state = self.state
        self.rt.say(f"step {state.step:,} | val loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 99)):.2f}")
        state.row |= {"step": state.step, "tokens": state.sequence * self.s.block_size, "val_loss": val_loss}
        self.loss = val_loss
        if not math.isfinite(val_loss):
            raise self.diverged(f"the validation loss is {val_loss}")
        # Only the first process knows of a best.pt that could not be written.
        state.best_val_loss = self.rt.gather(state.best_val_loss)[0]
        state.worse = 0 if val_loss < state.best_val_loss else state.worse + 1
        state.best_val_loss = min(state.best_val_loss, val_loss)
        self.sample_is_due = self.writes and self.s.sample_tokens > 0
        self.save_is_due |= self.s.always_save_checkpoint or state.worse == 0

    def takes_step(self, loss, norm):
        """Whether a step with this loss and gradient norm is taken. One that is not finite is skipped.

        Raises UserError where the run does not recover.
        """
        self.loss = loss
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            return True
        self.state.skipped += 1
        # float16 skips some steps while it looks for a loss scale. At a scale of 1, or with none, the run diverges.
        self.skipped_in_a_row += not self.scaler.is_enabled() or self.scaler.get_scale() <= 1
        which = f"step {self.state.step + 1:,} skipped, no. {self.state.skipped:,} of the run"
        self.rt.say(f"{which}: loss {loss}, gradient norm {norm}")
        if self.skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise self.diverged(f"{MAX_SKIPPED_IN_A_ROW} steps in a row were not finite")
        return False

    def save_what_is_due(self, kept_names):
        """Write ckpt.pt and best.pt where it is time for them. ckpt.pt keeps this state under `kept_names`."""
        state = self.state
        retry = self.failed_at is not None and time.monotonic() - self.failed_at > RETRY_SECONDS
        # Weights whose loss is not finite do not take the place of good ones.
        if math.isfinite(self.loss) and self.saved != state and (kept_names or retry or self.save_is_due):
            self.failed_at, self.save_is_due = None, False
            self.save("ckpt.pt", kept_names)
        # The row tells whether these weights are the best, since a resumed run may have been killed between ckpt.pt and
        # best.pt. Random weights are not worth a file.
        is_best = state.worse == 0 and state.row.get("val_loss") == state.best_val_loss
        if is_best and (state.step or self.s.init_from != "scratch"):
            self.save("best.pt")
        if self.sample_is_due:
            self.sample_is_due = False
            self.sample()

    def sample(self):
        """Show how the model goes on with the beginning of the validation text, and add that to samples.txt."""
        try:
            text = sampling.continuation(self.model, self.dataset, self.s, self.rt, self.state.step)
        except (ValueError, UserError, ImportError) as error:
            text = f"no sample: {error}"
        self.rt.say(text)
        with self.record("samples.txt") as path:
            files.append_line(path, f"---- step {self.state.step:,} ----\n{text}")

    def log_row(self):
        """Add the row of this step to metrics.jsonl and to W&B. A resume at this step replaces it."""
        row = self.state.row
        if not self.writes or not row:
            return
        # JSON has no NaN and no infinity: null says that a figure was not finite.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self.record("metrics.jsonl") as path:
            files.append_line(path, json.dumps(finite))
        self.wandb.log(row)

    def write_description(self, **figures):
        """Write run.json with these figures. It says what the run was; a failure to write it ends nothing."""
        self.description |= figures
        with self.record("run.json") as path:
            files.write_text(path, json.dumps(self.description, indent=2) + "\n")

    def finish(self, interrupted):
        """Bring the last step to the disk, and final.pt unless interrupted. Raises UserError where there is no room."""
        if not math.isfinite(self.loss):
            raise self.diverged(f"the loss is {self.loss}")
        if not self.writes:
            return
        self.collect(wait=True)
        if self.saved != self.state:
            self.save("ckpt.pt")
            self.collect(wait=True)
        if self.saved != self.state:
            raise UserError(f"the last steps are not saved: {self.remedy}, and {self.same_command} goes on")
        if not interrupted:
            self.save("final.pt")
            self.collect(wait=True)
        rows = describe.read_rows(self.out / "metrics.jsonl")
        outcome = describe.outcome(rows, self.description["first_step"], self.state, self.rt)
        self.write_description(**outcome)
        self.rt.say(describe.summary(outcome))

    def close(self):
        if self.writes:
            self.wandb.finish()

    # ---- files ----

    @contextlib.contextmanager
    def record(self, name):
        """The path of a file that is for people. A write to it that fails is reported, and ends nothing."""
        self.wait_for_first()
        try:
            self.check_folder()
            yield self.out / name
        except OSError as error:
            self.rt.say(f"{self.out / name} could not be written ({error.strerror}); training goes on")

    def save(self, name, kept_names=()):
        """Begin to write the whole run as ckpt.pt, or its weights as best.pt or final.pt.

        `kept_names` are further names of the file, under which it stays. On a CPU the file is written when this
        returns. collect() takes note of it. Raises UserError where the weights are not finite.
        """
        if not self.writes:
            return
        if name != "ckpt.pt":
            self.wait_for_first()
        extremes = [value for p in self.model.parameters() for value in torch.aminmax(p.detach())]
        if not torch.stack(extremes).isfinite().all():
            raise self.diverged("the weights are not finite")
        content = checkpoint.weights(self.model) | {
            "format": checkpoint.FORMAT,
            "iter_num": self.state.step,
            "best_val_loss": self.state.best_val_loss,
            "config": asdict(self.s),
            "tokenizer": self.dataset.tokenizer_spec,
        }
        state = copy.deepcopy(self.state)
        if name == "ckpt.pt":
            content |= {key: getattr(state, field) for field, key in KEYS.items()} | {
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "data_sha256": self.dataset.checksums["train"],
                "val_sha256": self.val_sha256,
                "wandb_run_id": self.wandb.id,
            }
        self.check_folder()
        links = [self.out / kept_name for kept_name in kept_names]
        self.writer.write(self.out / name, content, links, about=state)
        self.collect()

    def wait_for_first(self):
        """Wait for the first ckpt.pt. Without it another file would be the remains of a run that can't go on."""
        if self.saved is None:
            self.collect(wait=True)

    def collect(self, wait=False):
        """Take note of the writes that have ended. `wait` first waits for the others."""
        for write in self.writer.ended(wait) if self.writes else ():
            if write.error:
                self.failed(write)
                continue
            if write.path.name == "ckpt.pt":
                is_first, self.saved = self.saved is None, write.about
                if is_first:
                    self.write_description()
            if write.path.name == "best.pt":
                self.best_loss = write.about.best_val_loss
            if self.s.wandb_log_checkpoints and write.path.name != "final.pt":
                self.wandb.log_file(write.path)

    def failed(self, write):
        """Report a write that failed. Raises UserError for final.pt, and where no ckpt.pt stands yet."""
        self.check_folder()
        self.remedy = files.remedy(write.error, f"in {self.out}")
        names = " and ".join(map(str, [write.path, *write.links]))
        reason = f"{names} could not be written ({write.error.strerror or write.error})"
        if not self.ckpt_path.is_file():
            raise UserError(f"{reason}; {files.remedy(write.error, 'there')}, or name another --out_dir")
        if write.path.name == "ckpt.pt":
            self.failed_at = time.monotonic()
            reason += f"; the older one stands, and the next attempt at ckpt.pt follows in {RETRY_SECONDS} s"
        if write.path.name == "best.pt" and self.state.best_val_loss == write.about.best_val_loss:
            self.state.best_val_loss = self.best_loss  # The next weights have to beat those on the disk.
        self.rt.say(reason)
        if write.path.name == "final.pt":
            raise UserError(f"final.pt is not written: {self.remedy}, and {self.same_command} writes it")

    def check_folder(self):
        """Raise UserError where out_dir is no longer the folder that was locked. Another run may be in its place."""
        if identity(self.out) != self.folder_id:
            step = f", of step {self.saved.step:,}," if self.saved else ""
            raise UserError(
                f"{self.out} is no longer the folder that this run has locked, so nothing more is written there; the "
                f"last checkpoint{step} is where that folder was moved to, if it was not removed"
            )
        if identity(self.out / ".lock") != self.lock_id:
            self.take_lock()  # Somebody has removed the file, and another process could lock a new one.

    def diverged(self, how):
        """The UserError of a run that can't recover, once the writes before it have ended."""
        self.collect(wait=True)
        exists = self.ckpt_path.exists()
        # The loss before the last update was finite. That of its weights is not known.
        then = f"the last checkpoint stands in {self.out}: go on from it, or from one before it," if exists else "start"
        return UserError(
            f"the run has diverged at step {self.state.step:,}: {how}; {then} with a lower --learning_rate"
        )


def identity(path):
    """What tells a file or folder from another one that took its name; None for neither."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_dev, status.st_ino


def keep_rows_before(path, step):
    """Drop the rows of metrics.jsonl from a step on, and a last one cut short. Raises UserError."""
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{path} is no file, and the rows of the run go there; move it away")
    text, rows = path.read_text(encoding="utf-8", errors="replace"), []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            rows += [line] if json.loads(line)["step"] < step else []
    wanted = "".join(row + "\n" for row in rows)
    try:
        if wanted != text:
            files.write_text(path, wanted)
    except OSError as error:
        remedy = files.remedy(error, f"in {path.parent}")
        raise UserError(f"{path} can't be written ({error.strerror}); {remedy}") from None


class WandB:
    """A W&B run. A failure is printed once, and the training goes on without W&B. `id` is '' where there is no run."""

    def __init__(self, s, run_id):
        self.run, self.id = None, run_id
        if s.wandb_log:
            self.attempt(self.start, s)

    def start(self, s):
        import wandb

        self.run = wandb.init(
            project=s.wandb_project,
            entity=s.wandb_entity or None,
            name=s.wandb_run_name or None,
            tags=s.wandb_tags or None,
            id=self.id or None,
            resume="allow",
            config=asdict(s),
        )
        self.id = self.run.id
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")  # W&B's own step can't go back, and a resume may.

    def attempt(self, action, *args, **kwargs):
        try:
            action(*args, **kwargs)
        except Exception as error:  # A service may raise anything.
            settings.say(f"W&B failed ({settings.brief(error)}); training goes on without it")
            self.run = None

    def log(self, row):
        if self.run:
            self.attempt(self.run.log, row)

    def log_file(self, path):
        if self.run:
            self.attempt(self.run.log_artifact, str(path), name=f"{self.id}-{path.stem}", type="model")

    def finish(self):
        if self.run:
            self.attempt(self.run.finish)
