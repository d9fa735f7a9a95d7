"""Draw the training and validation loss of one or more runs over the tokens that they have seen.

    python plot.py out/demo
    python plot.py out/small out/large --max_loss=5 --out=compare.png

The losses are those in metrics.jsonl in the folder of each run.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from lib import settings
from lib.settings import UserError


@dataclass
class Settings:
    run: tuple[str, ...] = ()  # folders of runs, or their metrics.jsonl
    max_loss: float = 0.0  # highest loss in the picture, in nats per token; 0 shows every loss
    out: str = ""  # path of the picture: .png, .svg or .pdf; '' is loss.png in the folder of the first run


def read_metrics(run):
    """The curves of a run, {"loss": [(tokens, loss)], "val_loss": [(tokens, loss)]}. `run` is its folder or its file.

    Raises UserError where the file can't be read or has no losses.
    """
    path = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # A kill may cut off the last one.
        curves = {
            key: [(float(r["tokens"]), float(r[key])) for r in rows if r.get(key) is not None]
            for key in ("loss", "val_loss")
        }
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the folder of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not the metrics of a run ({error}); name the folder of a run") from None
    if not any(curves.values()):
        raise UserError(f"{path} has no losses yet; wait for the run to log some")
    return curves


def main():
    s = settings.load(Settings, positional="run")
    settings.check(s, not_negative="max_loss")
    if not s.run:
        raise UserError("name the folder of a run, such as out/demo")
    runs = {run: read_metrics(run) for run in s.run}
    lowest = min(loss for curves in runs.values() for curve in curves.values() for _, loss in curve)
    if 0 < s.max_loss <= lowest:
        raise UserError(f"max_loss={s.max_loss} cuts off every loss; take more than {lowest:.4g}")
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (run, curves) in enumerate(runs.items()):
        name = Path(run).resolve().name if Path(run).is_dir() else run
        for key, label, style in (
            ("loss", "train", {"alpha": 0.35, "linewidth": 1}),
            ("val_loss", "validation", {"marker": "."}),
        ):
            if curves[key]:
                axes.plot(*zip(*curves[key], strict=True), color=f"C{i}", label=f"{name}, {label}", **style)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    if s.max_loss:
        axes.set_ylim(top=s.max_loss)
    axes.grid(alpha=0.3)
    axes.legend()
    first = Path(s.run[0])
    out = Path(s.out) if s.out else (first if first.is_dir() else first.parent) / "loss.png"
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"{out} can't be written ({error}); --out=PATH names another") from None
    settings.say(out)


if __name__ == "__main__":
    settings.run(main)
