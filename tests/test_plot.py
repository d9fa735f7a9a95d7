"""plot.py: the curves are the rows of metrics.jsonl, and the picture shows them."""

import json
from pathlib import Path

import plot

import matplotlib.figure
import matplotlib.image
import pytest
from conftest import refusal
from matplotlib.colors import to_rgb

ROWS = [
    {"step": 0, "tokens": 0, "val_loss": 5.5},
    {"step": 10, "tokens": 1000, "loss": 4.25, "lr": 0.1},
    {"step": 20, "tokens": 2000, "loss": 3.5, "lr": 0.1, "val_loss": 3.75},
    {"step": 30, "tokens": 3000, "loss": 3.0, "lr": 0.1},
]


def write_run(folder, rows=ROWS):
    Path(folder).mkdir(parents=True)
    Path(folder, "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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


@pytest.mark.parametrize("path", ["out/a", "out/a/metrics.jsonl"])
def test_curves_are_the_losses_over_the_tokens(path):
    write_run("out/a")
    curves = plot.read_metrics(path)
    assert curves == {"loss": [(1000, 4.25), (2000, 3.5), (3000, 3.0)], "val_loss": [(0, 5.5), (2000, 3.75)]}


@pytest.mark.parametrize("key", ["loss", "val_loss"])
def test_one_kind_of_loss_is_enough(run, key):
    write_run("out/a", [{"tokens": 0, key: 2.0}, {"tokens": 9, key: 1.0}])
    assert plot.read_metrics("out/a") == {"loss": [], "val_loss": [], key: [(0, 2.0), (9, 1.0)]}
    assert run("out/a")[0] == 0


def test_a_run_gives_a_picture_in_its_folder(run):
    write_run("out/a")
    status, out, err = run("out/a")
    assert (status, out, err) == (0, "out/a/loss.png\n", "")
    assert colours("out/a/loss.png") == {"C0"}


def test_each_run_has_its_colour(run):
    for name in "abc":
        write_run(f"out/{name}", [{**row, "tokens": row["tokens"] * (ord(name) - 96)} for row in ROWS])
    assert run("out/a")[0] == 0
    assert run("out/a", "out/b", "out/c", "--out=all.png")[:2] == (0, "all.png\n")
    assert colours("out/a/loss.png") == {"C0"}
    assert colours("all.png") == {"C0", "C1", "C2"}


def test_max_loss_is_where_the_picture_ends(run, monkeypatch):
    write_run("out/a")
    tops = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, *args, **kw: (tops.append(figure.axes[0].get_ylim()[1]), save(figure, *args, **kw)),
    )
    assert run("out/a", "--max_loss=4")[0] == run("out/a")[0] == 0
    assert tops[0] == 4 and tops[1] > 5.5
    status, _, err = run("out/a", "--max_loss=3")
    assert status == 2 and "take more than 3" in err and len(err.splitlines()) == 1


def test_the_picture_of_a_metrics_file_goes_beside_it(run):
    write_run("out/a")
    assert run("out/a/metrics.jsonl")[:2] == (0, "out/a/loss.png\n")
    assert colours("out/a/loss.png") == {"C0"}


@pytest.mark.parametrize(("out", "begins"), [("loss.svg", b"<?xml"), ("loss.pdf", b"%PDF")])
def test_the_ending_names_the_kind_of_picture(run, out, begins):
    write_run("out/a")
    assert run("out/a", f"--out={out}")[0] == 0
    assert Path(out).read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "no losses yet"),
        (b'{"step": 1, "tokens": 5}\n', "no losses yet"),
        (b'{"tokens": 5, "loss": 1.0}\n{"tok\n', "is not the metrics of a run"),
        (b'{"step": 5, "loss": 1.0}\n', "is not the metrics of a run"),
        (b"17\n", "is not the metrics of a run"),
        (b'{"tokens": 5, "loss": "caf\xe9"}\n', "is not the metrics of a run"),
    ],
)
def test_metrics_that_cannot_be_drawn_are_one_line(run, text, says):
    write_run("out/good")
    Path("out/a").mkdir()
    Path("out/a/metrics.jsonl").write_bytes(text)
    status, out, err = run("out/good", "out/a")
    assert (status, out) == (2, "")
    assert err.startswith("plot.py: out/a/metrics.jsonl")
    assert says in err
    assert len(err.splitlines()) == 1
    assert not list(Path().rglob("*.png"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "name the folder of a run"),
        (["out/none"], "out/none: No such file or directory; name the folder of a run"),
        (["out"], "out/metrics.jsonl: No such file or directory"),
        (["out/a", "--out=no/folder.png"], "--out=PATH"),
        (["out/a", "--out=loss.xyz"], "--out=PATH"),
    ],
)
def test_a_mistake_is_one_line(run, args, says):
    write_run("out/a")
    status, out, err = run(*args)
    assert (status, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_reading_metrics_raises_what_the_script_catches():
    assert refusal(plot.read_metrics, "nothing").startswith("nothing: ")


def test_a_last_row_cut_short_by_a_kill_is_left_out():
    Path("out/cut").mkdir(parents=True)
    Path("out/cut/metrics.jsonl").write_bytes(b'{"tokens": 5, "loss": 1.0}\n{"tok')
    assert plot.read_metrics("out/cut")["loss"] == [(5, 1.0)]
