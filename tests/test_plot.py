"""plot.py: the curves are the rows of metrics.jsonl, the picture shows them, and the table says what they came to."""

import json
import math
import statistics
import sys
from pathlib import Path

import plot

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, refusal
from matplotlib.colors import to_rgb, to_rgba

sys.path.insert(0, str(ROOT / "records"))
import summary

ROWS = [
    {"step": 0, "tokens": 0, "val_loss": 5.5},
    {"step": 10, "tokens": 1000, "loss": 4.25, "lr": 0.1},
    {"step": 20, "tokens": 2000, "loss": 3.5, "lr": 0.1, "val_loss": 3.75},
    {"step": 30, "tokens": 3000, "loss": 3.0, "lr": 0.1},
]


VALUES = ["x", {}, None, [], 10**400, -1, 0, 1e300]  # that stand where they should not


def write_run(folder, rows=ROWS, seconds=None, sha256="ab" * 32, **settings):
    """A run, with a run.json where settings are given."""
    Path(folder).mkdir(parents=True)
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if settings:
        described = {"settings": {"out_dir": folder} | settings, "data": {"sha256": sha256}, "seconds": seconds}
        Path(folder, "run.json").write_text(json.dumps(described))


def losing(*losses):
    """Rows with these validation losses, a step of 1,000 tokens apart."""
    return [{"step": i, "tokens": 1000 * i, "val_loss": loss} for i, loss in enumerate(losses)]


def cells(out):
    """The table in what the script prints, as a dict for each row."""
    head, *rows = out.split("\n\n")[0].splitlines()
    names = head.replace("last validation loss", "last").split()
    rows = [row.replace(" ± ", "±").replace(" to ", "-").split() for row in rows]
    return [dict(zip(names, row, strict=True)) for row in rows]


def colours(path):
    """The first six of matplotlib's line colours that a PNG has. One of the later colours is a grey."""
    assert Path(path).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(path)[..., :3]
    return {f"C{i}" for i in range(6) if (abs(pixels - to_rgb(f"C{i}")).max(axis=-1) < 0.003).any()}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(script):
    return lambda *args: script("plot", *args)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, *args, **kw: (saved.append(figure), save(figure, *args, **kw)),
    )
    return saved


def legend(figure):
    """The entries of a figure's only legend, its line breaks taken out."""
    (found,) = figure.legends
    assert not any(axes.get_legend() for axes in figure.axes)
    return [text.get_text().replace("\n", " ") for text in found.get_texts()]


def check_legend_is_beside_the_axes(figure):
    """Beside the axes, whole, and not at their cost."""
    figure.dpi = 120  # as it was saved
    figure.draw_without_rendering()
    (found,), (axes,) = figure.legends, figure.axes
    outside, inside = found.get_window_extent(), axes.get_tightbbox()
    assert inside.x1 <= outside.x0 and outside.x1 <= figure.bbox.x1
    assert 0 <= outside.y0 and outside.y1 <= figure.bbox.y1
    assert axes.get_window_extent().width > 700


def lines(figure):
    """The lines of a figure as (n, 2) arrays of x and y."""
    return [line.get_xydata() for line in figure.axes[0].lines]


@pytest.mark.parametrize("path", ["out/a", "out/a/metrics.jsonl"])
def test_curves_are_the_losses_over_the_tokens(path):
    write_run("out/a")
    (path,) = plot.find([path])
    assert plot.read_run(path).curves == {
        "loss": [(1000, 4.25), (2000, 3.5), (3000, 3.0)],
        "val_loss": [(0, 5.5), (2000, 3.75)],
    }


@pytest.mark.parametrize("key", ["loss", "val_loss"])
def test_one_kind_of_loss_is_enough(run, key):
    write_run("out/a", [{"tokens": 0, key: 2.0}, {"tokens": 9, key: 1.0}])
    curves = plot.read_run(Path("out/a/metrics.jsonl")).curves
    assert curves == {"loss": [], "val_loss": [], key: [(0, 2.0), (9, 1.0)]}
    assert run("out/a")[0] == 0


def test_a_run_gives_a_picture_in_its_folder(run):
    write_run("out/a")
    status, out, err = run("out/a")
    assert (status, out.splitlines()[2:], err) == (0, ["", "out/a/loss.png"], "")
    assert colours("out/a/loss.png") == {"C0"}


def test_each_run_has_its_colour(run):
    for name in "abc":
        write_run(f"out/{name}", [{**row, "tokens": row["tokens"] * (ord(name) - 96)} for row in ROWS])
    assert run("out/a")[0] == 0
    before = Path("out/a/loss.png").read_bytes()
    status, out, _ = run("out/a", "out/b", "out/c", "--out=all.png")
    assert (status, out.splitlines()[-1]) == (0, "all.png")
    assert colours("out/a/loss.png") == {"C0"}
    assert colours("all.png") == {"C0", "C1", "C2"}
    status, out, _ = run("out/a", "out/b", "out/c")
    assert (status, out.splitlines()[-1]) == (0, "loss.png")  # in the current folder
    assert colours("loss.png") == {"C0", "C1", "C2"}
    assert Path("out/a/loss.png").read_bytes() == before


def test_max_loss_is_where_the_picture_ends(run, figures):
    write_run("out/a")
    assert run("out/a", "--max_loss=4")[0] == run("out/a")[0] == 0
    tops = [figure.axes[0].get_ylim()[1] for figure in figures]
    assert tops[0] == 4 and tops[1] > 5.5
    status, _, err = run("out/a", "--max_loss=3")
    assert status == 2 and "take more than 3" in err and len(err.splitlines()) == 1


def test_the_picture_of_a_metrics_file_goes_beside_it(run):
    write_run("out/a")
    status, out, _ = run("out/a/metrics.jsonl")
    assert (status, out.splitlines()[-1]) == (0, "out/a/loss.png")
    assert colours("out/a/loss.png") == {"C0"}


@pytest.mark.parametrize(("out", "begins"), [("loss.svg", b"<?xml"), ("loss.pdf", b"%PDF")])
def test_the_ending_names_the_kind_of_picture(run, out, begins):
    write_run("out/a")
    assert run("out/a", f"--out={out}")[0] == 0
    assert Path(out).read_bytes().startswith(begins)


@pytest.mark.parametrize(
    "text",
    [
        b'{"tokens": 5, "loss": 1.0}\n{"tok\n',
        b'{"step": 5, "loss": 1.0}\n',
        b"17\n",
        b'{"tokens": 5, "loss": "caf\xe9"}\n',
        b'{"tokens": 5, "loss": "x"}\n',
        b'{"tokens": 5, "loss": {}}\n',
        b'{"tokens": [], "val_loss": 1}\n',
        b'{"tokens": 5, "loss": 1%s}\n' % (b"0" * 400),
        b'{"tokens": 5, "loss": 1%s}\n' % (b"0" * 9000),
        b'{"tokens": 5, "loss": 1, "step": "x"}\n',
        b'{"tokens": 5, "loss": 1, "step": 1e999}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_metrics_that_cannot_be_drawn_are_one_line(run, text):
    write_run("out/good")
    Path("out/a").mkdir()
    Path("out/a/metrics.jsonl").write_bytes(text)
    status, out, err = run("out/good", "out/a")
    assert (status, out) == (2, "")
    assert err.startswith("plot.py: out/a/metrics.jsonl is not the metrics of a run")
    assert len(err.splitlines()) == 1
    assert not list(Path().rglob("*.png"))


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"",
        b'{"step": 1, "tok',
        b'{"step": 1, "tokens": 5}\n',
        b'{"tokens": 5, "loss": NaN}\n{"tokens": 1e999, "loss": 5}\n',
    ],
)
def test_a_run_without_losses_is_left_out_where_there_are_others(run, text):
    write_run("out/killed", seed=1)
    metrics = Path("out/killed/metrics.jsonl")
    metrics.unlink() if text is None else metrics.write_bytes(text)
    reason = "out/killed/metrics.jsonl has no losses yet; wait for the run to log some\n"
    assert run("out/killed") == run("out/*") == (2, "", f"plot.py: {reason}")
    write_run("out/good", seed=1)
    for args in (["out/killed", "out/good"], ["out/*"]):
        status, out, err = run(*args)
        assert (status, err) == (0, f"left out: {reason}")
        assert [row["run"] for row in cells(out)] == ["good"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "name the folder of a run"),
        (["out/none"], "out/none: No such file or directory; name the folder of a run"),
        (["out"], "out/metrics.jsonl: No such file or directory"),
        (["out/a", "--out=no/folder.png"], "--out=PATH"),
        (["out/a", "--out=loss.xyz"], "--out=PATH"),
        (["out/a", "--out=out"], "--out=PATH"),
        (["out/a", "--out=folder.png"], "--out=PATH"),
        (["out/a", "--out=best.pt"], "no .png, .svg or .pdf"),
        (["out/a", "--out=copy.png"], "copy.png holds no picture, so it is not overwritten"),
        (["out/none*"], "out/none*: No such file or directory"),
        (["best.pt"], "best.pt is not the metrics of a run"),
        (["out/a", "eval_test.json"], "two pictures"),
        (["eval_test.json"], "python eval.py writes such a report"),
        (["none.json"], "none.json: No such file or directory; python eval.py writes"),
    ],
)
def test_a_mistake_is_one_line(run, args, says):
    write_run("out/a")
    Path("folder.png").mkdir()
    Path("best.pt").write_bytes(b"PK\x03\x04\xff")
    Path("copy.png").write_bytes(b"PK\x03\x04\xff")
    Path("eval_test.json").write_text('{"results": [{"protocol": "stream", "nll": 1.0, "tokens_scored": 5}]}')
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before


def test_reading_metrics_raises_what_the_script_catches():
    assert refusal(plot.read_run, Path("nothing")).startswith("nothing: ")


def test_a_last_row_cut_short_by_a_kill_is_left_out():
    Path("out/cut").mkdir(parents=True)
    Path("out/cut/metrics.jsonl").write_bytes(b'{"tokens": 5, "loss": 1.0}\n{"tok')
    assert plot.read_run(Path("out/cut/metrics.jsonl")).curves["loss"] == [(5, 1.0)]


def test_an_earlier_picture_is_replaced(run):
    write_run("out/a")
    Path("empty.png").touch()
    assert [run("out/a", f"--out={name}")[0] for name in ("b.svg", "b.svg", "b.PNG", "b.PNG", "empty.png")] == [0] * 5


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:9])
def test_whatever_stands_in_a_row_ends_in_one_line_or_in_a_picture(run, value):
    for key in ("step", "tokens", "val_loss"):
        Path("out/a").mkdir(parents=True, exist_ok=True)
        row = {"step": 1, "tokens": 5, "loss": 1.0, "val_loss": 2.0, key: value}
        Path("out/a/metrics.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{json.dumps(row)}\n")
        status, _, err = run("out/a")
        assert (status, len(err.splitlines())) in ((0, 0), (2, 1))


# ---- the picture ----


def test_the_legend_has_one_entry_a_run_outside_the_axes(run, figures):
    write_run("out/a")
    write_run("out/b", losing(5.0, 2.0))
    write_run("out/c", [{"tokens": 5, "loss": 4.0}])
    assert run("out/a", "out/b", "out/c")[0] == 0
    (figure,) = figures
    assert legend(figure) == ["b: 2.0000", "a: 3.7500", "c: 4.0000 in training"]
    assert figure.legends[0].get_title().get_text() == "last validation loss"
    check_legend_is_beside_the_axes(figure)
    assert figure.axes[0].get_xlabel() == "tokens seen in training"
    assert figure.axes[0].get_ylabel() == "loss (nats per token)"


@pytest.mark.parametrize("runs", [10, 14, 70])
def test_no_two_runs_have_the_same_colour(run, figures, runs):
    for i in range(runs):
        write_run(f"out/{i:02}-{'name' * 5}", losing(5.0, 1 + i / 100))
    assert run("out/*")[0] == 0
    (figure,) = figures
    assert legend(figure) == [f"{i:02}-{'name' * 5}: {1 + i / 100:.4f}" for i in range(runs)]
    colours = [to_rgba(handle.get_color()) for handle in figure.legends[0].get_lines()]
    assert len(set(colours)) == runs
    assert [to_rgba(line.get_color()) for line in figure.axes[0].lines[2::3]] == colours
    check_legend_is_beside_the_axes(figure)


def test_legend_colours_and_table_have_the_lowest_best_loss_first(run, figures):
    best = {f"lr{rate}e-{power}": (7 * rate + 3 * power) % 13 / 13 for rate in (1, 2, 4, 6) for power in (1, 2, 3)}
    for name, loss in best.items():
        write_run(f"out/{name}", losing(5.0, loss, 2.0 + loss))
    status, out, _ = run("out/lr*")
    assert status == 0
    ranked = sorted(best, key=best.get)
    assert [row["run"] for row in cells(out)] == ranked != sorted(best)
    (figure,) = figures
    assert legend(figure) == [f"{name}: {2 + best[name]:.4f}" for name in ranked]
    assert [line.get_ydata()[1] for line in figure.axes[0].lines[2::3]] == [best[name] for name in ranked]


def test_a_long_name_is_broken_after_a_separator(run, figures):
    words = [f"{word}_{i}" for i, word in enumerate(["warmup", "learning", "rate", "weight", "decay", "dropout"] * 2)]
    for separator in "_-":
        write_run(separator.join(words))
        assert run(separator.join(words))[0] == 0
    write_run("x" * 100)
    assert run("x" * 100)[0] == 0
    first, second, third = ([text.get_text() for text in figure.legends[0].get_texts()][0] for figure in figures)
    for label in (first, second):
        *broken, _ = label.split("\n")
        assert len(broken) > 1
        assert all(25 <= len(line) <= 48 and line[-1] in "_-" for line in broken)
    assert [len(line) for line in third.split("\n")] == [48, 48, 4 + len(": 3.7500")]


def test_the_training_loss_is_faint_under_a_smoothed_line(run, figures):
    write_run("out/a")
    assert run("out/a")[0] == 0
    raw, smooth, validation = figures[0].axes[0].lines
    assert raw.get_xydata().tolist() == [[1000, 4.25], [2000, 3.5], [3000, 3.0]]
    assert validation.get_xydata().tolist() == [[0, 5.5], [2000, 3.75]]
    assert raw.get_alpha() < smooth.get_alpha() < 1
    assert raw.get_zorder() < smooth.get_zorder() < validation.get_zorder()


def test_smoothing_takes_noise_away_and_keeps_the_curve():
    few = np.array([5.0, 3.0, 4.0, 2.0, 1.0])
    assert plot.smooth(few).tolist() == few.tolist()
    assert plot.smooth(np.array([])).tolist() == []
    i = np.arange(1, 20_001)
    curve, noise = 1 + 4 * i**-0.3, np.random.default_rng(0).normal(size=len(i))
    error = plot.smooth(curve + 0.1 * noise) - curve
    assert abs(error[1000:]).max() < 0.03
    assert plot.smooth(curve)[0] == pytest.approx(5)
    assert abs(plot.smooth(curve) - curve).max() < 0.02


def test_a_single_evaluation_can_be_seen(run):
    write_run("out/a", losing(2.0))
    assert run("out/a")[0] == 0
    assert colours("out/a/loss.png") == {"C0"}


@pytest.mark.parametrize("rows", [5, 20_000])
def test_a_run_of_any_length_is_drawn(run, figures, rows):
    write_run("out/a", [{"step": i, "tokens": i, "loss": 2 + (i % 7) / 10, "val_loss": 2.5} for i in range(rows)])
    assert run("out/a")[0] == 0
    assert [len(line) for line in lines(figures[0])] == [rows] * 3


def test_names_are_those_of_the_folders_with_as_much_of_the_path_as_tells_them_apart(run, figures):
    long = "all_the_settings_" * 12
    for folder in ("old/a", "new/a", "new/b", "_x$y$", long):
        write_run(folder)
    Path("metrics of c.jsonl").write_bytes(Path("old/a/metrics.jsonl").read_bytes())
    assert run("new/a", "new/b")[0] == run("old/a", "new/a/metrics.jsonl", "new/b")[0] == 0
    assert run("metrics of c.jsonl", "_x$y$", long)[::2] == (0, "")
    for figure in figures:
        check_legend_is_beside_the_axes(figure)
    names = [[entry.partition(":")[0] for entry in legend(figure)] for figure in figures]
    assert names[:2] == [["a", "b"], ["old/a", "new/a", "new/b"]]
    assert names[2][:2] == ["metrics of c", r"_x\$y\$"]
    assert names[2][2].replace(" ", "") == long  # It is broken into lines.


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (["lr1e-3-s1"], "lr1e-3-s1"),
        (["lr1e-3-s1", "lr1e-3-s2"], "lr1e-3"),
        (["a-s1", "a-s12"], "a"),
        (["a-seed=1", "a-seed=2"], "a"),
        (["a/1", "a/2"], "a"),
        (["a_1337", "a_1338"], "a"),
        (["demo", "demo-again"], "demo"),
        (["lr1e-3", "lr1e-3-s2"], "lr1e-3"),
        (["s1", "s2", "s3"], "s1 to s3"),
        (["x", "y"], "x to y"),
    ],
)
def test_the_name_of_several_seeds_is_what_theirs_have_in_common(names, shared):
    assert plot.shared_name(names) == shared


# ---- seeds ----


def test_runs_that_differ_only_in_the_seed_are_a_mean_with_a_band(run, figures):
    for seed, last in ((1, 2.0), (2, 2.5), (3, 4.5)):
        write_run(f"out/a-s{seed}", losing(6.0, last), seed=seed, lr=0.1, device=f"cuda:{seed}")
    write_run("out/b-s1", losing(6.0, 1.0), seed=1, lr=0.2, device="cuda:0")
    status, out, _ = run("out/a-s1", "out/a-s2", "out/a-s3", "out/b-s1")
    assert status == 0
    (figure,) = figures
    assert legend(figure) == ["b-s1: 1.0000", f"a: 3.0000 ± {statistics.stdev([2, 2.5, 4.5]):.4f}, 3 seeds"]
    assert lines(figure)[5].tolist() == [[0, 6.0], [1000, 3.0]]
    (band,) = figure.axes[0].collections
    ends = band.get_paths()[0].vertices
    found = sorted({y for x, y in ends if x == 1000})
    assert found == pytest.approx([3 - statistics.stdev([2, 2.5, 4.5]), 3 + statistics.stdev([2, 2.5, 4.5])])
    b, a = cells(out)
    assert (a["run"], a["lr"], a["seeds"], a["last"]) == ("a", "0.1", "3", "3.0000±1.3229")
    assert (b["run"], b["lr"], b["seeds"], b["last"]) == ("b-s1", "0.2", "1", "1.0000")


def test_a_seed_counts_once(run, figures):
    for name, seed in (("a", 1), ("b", 2), ("c", 2)):
        write_run(f"out/{name}", losing(5.0, 4.0 + seed), seed=seed)
    assert run("out/a", "out/b", "out/c", "out/./a", "out/a/metrics.jsonl")[0] == 0
    assert legend(figures[0]) == ["a to b: 5.5000 ± 0.7071, 2 seeds", "c: 6.0000"]


def test_the_same_settings_on_other_data_are_another_run(run, figures):
    write_run("out/a", seed=1, sha256="ab" * 32)
    write_run("out/b", seed=2, sha256="cd" * 32)
    status, out, _ = run("out/a", "out/b")
    assert status == 0 and len(legend(figures[0])) == 2
    assert sorted((row["run"], row["data_sha256"]) for row in cells(out)) == [("a", "abababab"), ("b", "cdcdcdcd")]


def test_a_seed_that_is_not_done_is_in_the_mean_as_far_as_it_went(run, figures):
    write_run("out/a-s1", losing(6.0, 3.0, 2.0), seed=1)
    write_run("out/a-s2", losing(6.0, 5.0), seed=2)
    status, out, _ = run("out/a-s1", "out/a-s2")
    assert status == 0
    assert lines(figures[0])[2].tolist() == [[0, 6.0], [1000, 4.0], [2000, 2.0]]
    (row,) = cells(out)
    assert (row["steps"], row["tokens"]) == ("1-2", "1,000-2,000")


@pytest.mark.parametrize("folder", [p for p in (ROOT / "records").glob("2*") if p.is_dir()], ids=lambda p: p.name)
def test_the_table_of_a_record_is_that_of_its_summary(folder):
    out = plot.table(plot.lines_of(plot.find([f"{folder}/*-s*.jsonl"])))
    theirs = [[cell.strip() for cell in line.split("|")[1:6]] for line in summary.table(folder).splitlines()[2:]]
    ours = [[row[key].replace("±", " ± ") for key in ("run", "seeds", "steps", "last", "best")] for row in cells(out)]
    for row in ours:
        row[0] = row[0].rpartition("-s")[0] if row[1] == "1" else row[0]
    assert ours == theirs


# ---- the table ----


def test_the_table_has_what_differs_and_what_the_runs_came_to(run):
    rows = [{"step": 0, "tokens": 0, "val_loss": 5.0}, {"step": 1500, "tokens": 1_536_000, "val_loss": 2.0}]
    rows += [{"step": 2000, "tokens": 2_048_000, "val_loss": 2.5}, {"step": 2010, "tokens": 2_058_240, "loss": 1.0}]
    write_run("out/a", rows, seconds=3725.4, seed=1, n_layer=4, learning_rate=0.0001, wandb_tags=["x"], bias=True)
    write_run("out/b", losing(3.0, 1.5), seed=1, n_layer=4, learning_rate=0.1, wandb_tags=[], bias=False)
    write_run("out/none", [{"tokens": 7, "loss": 1.0}])
    status, out, err = run("out/a", "out/b", "out/none")
    assert (status, err) == (0, "")
    head = ["run", "bias", "learning_rate", "seeds", "steps", "tokens", "time", "last", "best"]
    assert [list(row.values()) for row in cells(out)] == [
        ["b", "False", "0.1", "1", "1", "1,000", "-", "1.5000", "1.5000"],
        ["a", "True", "0.0001", "1", "2,010", "2,058,240", "1:02:05", "2.5000", "2.0000"],
        ["none", "-", "-", "1", "-", "7", "-", "-", "-"],
    ]
    assert list(cells(out)[0]) == head
    assert len({len(line) for line in out.split("\n\n")[0].splitlines()}) == 1  # The columns are aligned.


def test_a_quoted_glob_finds_the_runs_and_nothing_else(run, figures):
    for name in ("lr1", "lr2", "other"):
        write_run(f"out/{name}")
    Path("out/lr-plan.txt").write_text("three rates\n")
    Path("out/lr-empty").mkdir()
    write_run("out/odd[1]")
    write_run("out/odd1")
    assert run("out/lr*")[0] == run("**/lr*")[0] == run("out/odd[1]")[0] == 0
    assert [[entry.partition(":")[0] for entry in legend(figure)] for figure in figures] == [
        ["lr1", "lr2"],
        ["lr1", "lr2"],
        ["odd[1]"],
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"settings": []}',
        b'{"settings": {}, "seconds": "x"}',
        b'{"settings": {}, "seconds": 1%s}' % (b"0" * 400),
        b'{"settings": {}, "data": 5}',
        b'{"settings": "\xff"}',
        b"[" * 100_000,
    ],
)
def test_a_description_that_is_none_is_one_line(run, text):
    write_run("out/a")
    Path("out/a/run.json").write_bytes(text)
    status, out, err = run("out/a")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("plot.py: out/a/run.json does not describe a run") and "move it away" in err


def test_a_run_that_has_not_ended_has_no_time_yet(run):
    Path("a").mkdir()
    write_run("out/a", seconds=None, seed=1)
    write_run("out/b", seconds=math.inf, seed=1)
    assert [row["time"] for row in cells(run("out/a", "out/b")[1])] == ["-", "-"]


# ---- reports of eval.py ----


def report(*groups, **more):
    groups = [dict(first=first, last=last, loss=loss) for first, last, loss in groups]
    return {"protocol": "stream", "nll": 30.0, "tokens_scored": 10, "loss_by_position": groups} | more


def test_reports_are_drawn_over_the_position(run, figures):
    first = [report((1, 1, 5.0), (2, 2, 4.0), (3, 4, 3.0)), report((1, 1, 6.0), protocol="documents", nll=25.0)]
    for folder, results in (("out/a", first), ("out/b", [report((1, 1, 2.0), (2, 2, 1.0))])):
        Path(folder).mkdir(parents=True)
        Path(folder, "eval_test.json").write_text(json.dumps({"results": results}))
    assert run("out/a/eval_test.json") == (0, "out/a/eval_test.png\n", "")
    assert run("out/*/eval_test.json") == (0, "loss_by_position.png\n", "")
    assert run("out/*/eval_test.json", "--max_loss=4", "--out=low.svg")[:2] == (0, "low.svg\n")
    one, two, low = figures
    assert legend(one) == ["a/eval_test, stream: 3.0000", "a/eval_test, documents: 2.5000"]
    assert legend(two) == [*legend(one), "b/eval_test, stream: 3.0000"]
    assert one.legends[0].get_title().get_text() == "mean loss"
    assert lines(two)[0] == pytest.approx(np.array([[1, 5.0], [2, 4.0], [math.sqrt(12), 3.0]]))
    assert [line.tolist() for line in lines(two)[1:]] == [[[1, 6.0]], [[1, 2.0], [2, 1.0]]]
    assert low.axes[0].get_ylim()[1] == 4 and low.axes[0].get_xscale() == "log"
    assert low.axes[0].get_xlabel() == "position in the window (tokens of context)"


@pytest.mark.parametrize("value", VALUES, ids=lambda value: str(value)[:9])
def test_whatever_stands_in_a_report_ends_in_one_line_or_in_a_picture(run, value):
    good = {"results": [report((1, 1, 5.0))]}
    bad = [{"results": value}, {"results": [value]}, value]
    for key in good["results"][0]:
        bad.append({"results": [good["results"][0] | {key: value}]})
    for key in ("first", "last", "loss"):
        bad.append({"results": [report() | {"loss_by_position": [dict(first=1, last=1, loss=5.0) | {key: value}]}]})
    for content in bad:
        Path("eval_test.json").write_text(json.dumps(content))
        status, _, err = run("eval_test.json")
        assert (status, len(err.splitlines())) in ((0, 0), (2, 1)), content
