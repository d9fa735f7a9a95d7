"""Draw the train and validation loss of one or more runs over the tokens they have seen.

    python plot.py out/demo
    python plot.py out/small out/large --max_loss=5 --out=compare.png

The rows come from metrics.jsonl in the folder of each run.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import config


@dataclass
class Settings:
    run: tuple[str, ...] = ()
    max_loss: float = 0.0  # cut off what is above; 0 shows all
    out: str = ""  # the picture, .png, .svg or .pdf; '' is loss.png in the first run's folder


def read_metrics(run):
    """The rows of a run's metrics.jsonl; `run` is its folder or the file. Raises UserError where there are none."""
    path = Path(run, "metrics.jsonl") if Path(run).is_dir() else Path(run)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last one short
        curves = {key: [(r["tokens"], r[key]) for r in rows if r.get(key) is not None] for key in ("loss", "val_loss")}
    except OSError as error:
        raise config.UserError(f"{path}: {error.strerror}; name the folder of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise config.UserError(f"{path} is not the metrics of a run ({error})") from None
    if not any(curves.values()):
        raise config.UserError(f"{path} has no rows yet")
    return curves


def main():
    s = config.load(Settings, positional="run")
    config.check(s, not_negative="max_loss")
    if not s.run:
        raise config.UserError("name the folder of a run, such as out/demo")
    runs = {run: read_metrics(run) for run in s.run}
    lowest = min(loss for curves in runs.values() for curve in curves.values() for _, loss in curve)
    if 0 < s.max_loss <= lowest:
        raise config.UserError(f"max_loss={s.max_loss} cuts off everything; take more than {lowest:.4g}")
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
        raise config.UserError(f"{out} can't be written ({error}); --out=PATH names another") from None
    print(out)


if __name__ == "__main__":
    config.run(main)
