"""Draw the losses of runs over the tokens that they have seen, and print a table of what the runs came to.

    python plot.py out/demo
    python plot.py 'out/lr*' --max_loss=5 --out=sweep.png
    python plot.py out/a/eval_test.json out/b/eval_test.json

The losses are those in metrics.jsonl in the folder of a run, the settings those in run.json beside it. Runs that differ
only in the seed are one line: their mean, in a band of one standard deviation on either side. Reports of eval.py give
another picture: the loss by the position in the window.
"""

import glob
import itertools
import json
import math
import os
import re
import statistics
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lib import settings
from lib.clock import clock_time
from lib.settings import UserError

import numpy as np


@dataclass
class Settings:
    run: tuple[str, ...] = ()  # folders of runs, their metrics.jsonl, or reports of eval.py; globs may be quoted
    max_loss: float = 0.0  # highest loss in the picture, in nats per token; 0 shows every loss
    out: str = ""  # path of the picture: .png, .svg or .pdf; '' is loss.png beside one run, else in the current folder


# These settings say where a run was made and how it was logged. They do not change its training.
UNRELATED = re.compile("out_dir|overwrite|device|backend|log_interval|save_.*|sample_tokens|wandb_.*")
HUGE = 1e30  # A figure of a run that is larger, or not finite, is left out.
PICTURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}  # first bytes of each kind of picture


@dataclass
class Run:
    """What the files of a run say."""

    curves: dict  # {"loss": [(tokens, loss)], "val_loss": [(tokens, loss)]}
    step: int | None  # the last one
    tokens: int  # seen until then
    last: float | None  # the last validation loss; None where there is none
    best: float | None  # the lowest one
    alike: object  # equal for runs that differ only in the seed
    seed: str = ""
    settings: dict = field(default_factory=dict)  # those that may change the training, as text
    seconds: float | None = None  # of the training steps


class NoLosses(UserError):
    """The run has logged no loss: it has just begun, or it was killed early."""


def find(names):
    """The files that the arguments mean, each once: the metrics of a folder, a file itself, the runs of a glob."""
    paths = {}
    for name in names:
        matches = [] if os.path.exists(name) else sorted(glob.glob(name, recursive=True))
        folders = {m for m in matches if Path(m, "metrics.jsonl").exists() or Path(m, "run.json").exists()}
        runs = [m for m in matches if m in folders or m.endswith((".jsonl", ".json"))]
        for path in map(Path, runs or [name]):
            path = path / "metrics.jsonl" if path.is_dir() else path
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


@contextmanager
def reported(path, fault, remedy):
    """Raise UserError where the system refuses a file, or where its content can't be used, which is the `fault`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from None
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:100]
        raise UserError(f"{path} {fault} ({reason}); {remedy}") from None


def read_run(path):
    """The Run whose metrics are `path`. Raises UserError where they can't be read, NoLosses where they have none."""
    curves = {"loss": [], "val_loss": []}
    described = path.name == "metrics.jsonl" and path.with_name("run.json").is_file()
    with reported(path, "is not the metrics of a run", "name the folder of a run"):
        # A run writes run.json before its first row.
        text = "" if described and not path.exists() else path.read_text(encoding="utf-8")
        lines = text.splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # A kill may cut off the last one.
        for row in rows:
            for key, curve in curves.items():
                if row.get(key) is not None:
                    point = float(row["tokens"]), float(row[key])
                    curve += [point] if all(abs(value) < HUGE for value in point) else []
        step = int(rows[-1]["step"]) if rows and "step" in rows[-1] else None
    if not any(curves.values()):
        raise NoLosses(f"{path} has no losses yet; wait for the run to log some")
    losses = [loss for _, loss in curves["val_loss"]] or [None]
    run = Run(curves, step, int(max(curves["loss"] + curves["val_loss"])[0]), losses[-1], min(losses), alike=path)
    if described:
        run.settings, run.seconds = read_description(path.with_name("run.json"))
        run.seed = run.settings.pop("seed", "")
        run.alike = tuple(run.settings.items())
    elif record := re.fullmatch(r"(.+)-s(\d+)\.jsonl", path.name):  # as the records name the metrics of a run
        run.alike, run.seed = path.with_name(record[1]), record[2]
    return run


def read_runs(paths):
    """{path: Run}. A run without losses is left out with a line on standard error. NoLosses where no other is left."""
    runs, errors = {}, []
    for path in paths:
        try:
            runs[path] = read_run(path)
        except NoLosses as error:
            errors.append(error)
    if not runs:
        raise errors[0]
    for error in errors:
        settings.say(f"left out: {error}", file=sys.stderr)
    return runs


def read_description(path):
    """(settings as text, seconds of the training steps or None) of a run.json. Raises UserError."""
    with reported(path, "does not describe a run", "move it away"):
        description = json.loads(path.read_text(encoding="utf-8"))
        values = {k: str(v) for k, v in sorted(description["settings"].items()) if not UNRELATED.fullmatch(k)}
        values["data_sha256"] = str((description.get("data") or {}).get("sha256"))[:8]  # whatever the name of the data
        seconds = float(description.get("seconds") or 0)
        return values, seconds if 0 < seconds < 1e12 else None


def read_report(path):
    """{protocol: (mean loss, [(middle of a group of positions, loss)])} of a report of eval.py. Raises UserError."""
    with reported(path, "has no losses by position", "python eval.py writes such a report"):
        losses = {}
        for r in json.loads(path.read_text(encoding="utf-8"))["results"]:
            groups = [(math.sqrt(g["first"] * g["last"]), float(g["loss"])) for g in r["loss_by_position"]]
            losses[str(r["protocol"])] = float(r["nll"]) / float(r["tokens_scored"]), groups
        points = list(itertools.chain(*(groups for _, groups in losses.values())))
        if not points or not all(0 < position < HUGE and abs(loss) < HUGE for position, loss in points):
            raise ValueError("impossible figures")
        return losses


# ---- the lines and the table ----


def unique_names(paths, parts=1):
    """A name for each path: its end, without .jsonl or .json, with as many folders as tell them apart."""
    paths = [Path(os.path.abspath(path)) for path in paths]
    ends = [p.parent.parts if p.name == "metrics.jsonl" else p.with_suffix("").parts for p in paths]
    while len({end[-parts:] for end in ends}) < len(ends) and parts < max(map(len, ends)):
        parts += 1
    return ["/".join(end[-parts:]) for end in ends]


def shared_name(names):
    """The name of runs that differ only in the seed: what theirs have in common."""
    if len(names) == 1:
        return names[0]
    without_seed = {re.sub(r"(^|[-_./=])(seed|s)?[-_=]?\d+$", "", name) for name in names}
    common = without_seed.pop() if len(without_seed) == 1 else os.path.commonprefix(names).rstrip("-_./=")
    return common or f"{names[0]} to {names[-1]}"


def lines_of(paths):
    """[(name, runs that differ only in the seed)] of metrics: the lines of the picture and of the table.

    The lowest best loss comes first.
    """
    groups, repeats, runs = defaultdict(list), Counter(), read_runs(paths)
    for name, run in zip(unique_names(runs), runs.values(), strict=True):
        repeats[run.alike, run.seed] += 1  # A run that repeats a seed is no other seed, and has a line of its own.
        groups[run.alike, repeats[run.alike, run.seed]].append((name, run))
    lines = [(shared_name(names), alike) for names, alike in (zip(*g, strict=True) for g in groups.values())]
    return sorted(lines, key=lambda line: statistics.mean(math.inf if r.best is None else r.best for r in line[1]))


def spread(values):
    """The mean and standard deviation of the values; a dash where one of them is unknown."""
    if None in values:
        return "-"
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def table(lines):
    """What differs in the settings of the lines, and what they came to."""
    known = [runs[0].settings for _, runs in lines if runs[0].settings]
    keys = [k for k in dict.fromkeys(k for s in known for k in s) if len({s.get(k) for s in known}) > 1]
    rows = [["run", *keys, "seeds", "steps", "tokens", "time", "last validation loss", "best"]]
    for name, runs in lines:
        seconds = [run.seconds for run in runs]
        time = "-" if None in seconds else clock_time(round(statistics.mean(seconds)))
        row = [name, *(runs[0].settings.get(key, "-") for key in keys), str(len(runs))]
        for counts in ([run.step for run in runs], [run.tokens for run in runs]):  # Seeds may have come less far.
            ends = [] if None in counts else sorted({min(counts), max(counts)})
            row.append(" to ".join(f"{count:,}" for count in ends) or "-")
        rows.append([*row, time, spread([run.last for run in runs]), spread([run.best for run in runs])])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


# ---- the pictures ----


def frame(labels, title):
    """(figure, axes, a colour for each label). The legend stands outside the axes, and the figure grows with it."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    # A long label is broken, after a separator where one is near. A dollar sign would begin a formula, and a file's
    # name may hold bytes that are no text.
    labels = [re.sub("(?=.{49})(.{24,47}[-_/ ]|.{48})", r"\1\n", label) for label in labels]
    labels = [label.encode("utf-8", "replace").decode().replace("$", r"\$") for label in labels]
    columns = math.ceil(sum(label.count("\n") + 1 for label in labels) / 22)
    longest = max(len(part) for label in labels for part in [title, *label.split("\n")])
    figure = Figure(figsize=(7.2 + columns * (0.65 + 0.075 * longest), 5), layout="constrained")
    spectrum = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(labels)))
    colours = spectrum if len(labels) > 10 else [f"C{i}" for i in range(len(labels))]
    handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours]
    figure.legend(handles, labels, title=title, loc="outside right upper", ncols=columns, fontsize=9, frameon=False)
    axes = figure.subplots()
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    return figure, axes, colours


def draw_runs(lines):
    """(figure, axes) of the training and the validation losses of lines over the tokens."""
    from matplotlib.ticker import EngFormatter

    labels = []
    for name, runs in lines:
        last = spread([run.last for run in runs])
        last = f"{smooth(mean_curve(runs, 'loss')[1])[-1]:.4f} in training" if last == "-" else last
        labels.append(f"{name}: {last}" + (f", {len(runs)} seeds" if len(runs) > 1 else ""))
    figure, axes, colours = frame(labels, "last validation loss")
    for (_, runs), colour in zip(lines, colours, strict=True):
        tokens, loss, _ = mean_curve(runs, "loss")
        axes.plot(tokens, loss, color=colour, alpha=0.25, linewidth=0.7, zorder=1)
        axes.plot(tokens, smooth(loss), color=colour, alpha=0.6, linewidth=1, zorder=2)
        tokens, loss, deviation = mean_curve(runs, "val_loss")
        axes.plot(tokens, loss, color=colour, linewidth=1.5, marker="." if len(loss) < 60 else "", zorder=4)
        if len(runs) > 1:
            axes.fill_between(tokens, loss - deviation, loss + deviation, color=colour, alpha=0.3, linewidth=0)
    axes.set_title("thick: validation; thin: training, smoothed; faint: training", fontsize=9, loc="left")
    axes.set_xlabel("tokens seen in training")
    axes.xaxis.set_major_formatter(EngFormatter())
    return figure, axes


def mean_curve(runs, key):
    """(tokens, mean loss, standard deviation), (n,) each, over the runs that have a loss there."""
    losses = defaultdict(list)
    for tokens, loss in itertools.chain(*(run.curves[key] for run in runs)):
        losses[tokens].append(loss)
    points = [(t, statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0) for t, v in sorted(losses.items())]
    return np.array(points).reshape(-1, 3).T


def smooth(losses):
    """Each loss of (n,) as the mean of the rows around it: on either side as many as a tenth of those before it."""
    i, n = np.arange(len(losses)), len(losses)
    first, end = i - (i + 1) // 10, np.minimum(i + (i + 1) // 10 + 1, n)
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    return (sums[end] - sums[first]) / (end - first)


def draw_reports(paths):
    """(figure, axes) of the loss by the position in the window, of each protocol of some reports."""
    reports = zip(unique_names(paths, parts=2), map(read_report, paths), strict=True)
    entries = [(f"{name}, {protocol}", *entry) for name, report in reports for protocol, entry in report.items()]
    figure, axes, colours = frame([f"{label}: {mean:.4f}" for label, mean, _ in entries], "mean loss")
    for (*_, groups), colour in zip(entries, colours, strict=True):
        axes.plot(*zip(*groups, strict=True), color=colour, marker=".")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("position in the window (tokens of context)")
    return figure, axes


def check_picture(path):
    """Raise UserError where a picture is of no kind that is drawn, or would replace a file of another kind."""
    if path.suffix.lower() not in PICTURES:
        raise UserError(f"{path} is no .png, .svg or .pdf; --out=PATH takes these")
    if path.is_file() and path.stat().st_size and not path.read_bytes().startswith(tuple(PICTURES.values())):
        raise UserError(f"{path} holds no picture, so it is not overwritten; --out=PATH names another")


def main():
    s = settings.load(Settings, positional="run")
    settings.check(s, not_negative="max_loss")
    if not s.run:
        raise UserError("name the folder of a run, such as out/demo")
    paths = find(s.run)
    are_reports = paths[0].suffix == ".json"
    if any((path.suffix == ".json") != are_reports for path in paths):
        raise UserError("runs and reports of eval.py make two pictures; name those of one kind")
    folder, name = (paths[0].parent, paths[0].stem) if len(paths) == 1 else (Path(), "loss_by_position")
    out = Path(s.out) if s.out else folder / (f"{name}.png" if are_reports else "loss.png")
    check_picture(out)
    lines = [] if are_reports else lines_of(paths)
    figure, axes = draw_runs(lines) if lines else draw_reports(paths)
    lowest = min(loss for line in axes.lines for loss in line.get_ydata())
    if 0 < s.max_loss <= lowest:
        raise UserError(f"max_loss={s.max_loss} cuts off every loss; take more than {lowest:.4g}")
    axes.set_ylim(top=s.max_loss or None)
    with reported(out, "can't be written", "--out=PATH names another"):
        figure.savefig(out, dpi=120)
    settings.say(f"{table(lines)}\n\n{out}" if lines else out)


if __name__ == "__main__":
    settings.run(main)
