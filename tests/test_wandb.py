"""W&B, for real but offline: what a run holds is read back from its file; and its failures never stop training."""

import json
import struct
import sys
from pathlib import Path

from lib import checkpoint

import pytest

wandb_pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")


def records(path):
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, records cut to fit) of protocol buffers."""
    content, at, parts, found = Path(path).read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            found.append(wandb_pb.Record.FromString(parts))
            parts = b""
    return found


@pytest.fixture
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_a_run_holds_settings_metrics_and_checkpoints_and_goes_on_as_the_same_run(train, offline, tmp_path):
    args = ["--wandb_log=True", "--wandb_project=proj", "--wandb_entity=team", "--wandb_run_name=first"]
    args += ["--wandb_tags=a,b", "--wandb_log_checkpoints=True", "--out_dir=out/a"]
    assert train(*args, "--max_iters=6")[0] == 0
    assert train(*args, "--max_iters=8")[0] == 0
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    runs, rows, artifacts = [], [], []
    for record in (r for path in files for r in records(path)):
        if record.HasField("run"):
            runs.append(record.run)
        if record.HasField("history"):
            rows.append({(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item})
        if record.request.HasField("log_artifact"):
            artifacts.append(record.request.log_artifact.artifact)
        if record.HasField("artifact"):
            artifacts.append(record.artifact)
    run_id = checkpoint.load("out/a/ckpt.pt")["wandb_run_id"]
    assert {run.run_id for run in runs} == {run_id} and run_id
    first = runs[0]
    assert (first.project, first.entity, first.display_name, list(first.tags)) == ("proj", "team", "first", ["a", "b"])
    settings = {u.key: json.loads(u.value_json) for u in first.config.update}
    asked = {"n_layer": 1, "dropout": 0.2, "learning_rate": 0.01, "dataset": "tiny", "wandb_tags": ["a", "b"]}
    assert asked.items() <= settings.items() and settings.keys() >= checkpoint.load("out/a/ckpt.pt")["config"].keys()
    # Every metric of every row, against our own step; the row at which the run went on stands in both parts.
    written = [json.loads(line) for line in Path("out/a/metrics.jsonl").read_text().splitlines()]
    logged = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8]
    for row in written:
        assert {k: v for k, v in row.items() if v is not None}.items() <= next(
            r for r in logged if r["step"] == row["step"]
        ).items()
    assert {a.name for a in artifacts} == {f"{run_id}-ckpt", f"{run_id}-best"}


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_w_and_b_failing_never_stops_training(train, monkeypatch, moment):
    class Run:
        id = "abc"

        def define_metric(self, *args, **kwargs):
            pass

        def log(self, row):
            if moment == "log" and row["step"] > 3:
                raise ConnectionError("the service\nis away")

        def finish(self):
            raise OSError("cannot finish")

    class Module:
        @staticmethod
        def init(**kwargs):
            if moment == "init":
                raise RuntimeError("api key is wrong")
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Module)
    status, out, _ = train("--out_dir=out/a", "--wandb_log=True")
    assert status == 0 and out.count("W&B failed") == 1 and "training goes on without it" in out
    assert [json.loads(x)["step"] for x in Path("out/a/metrics.jsonl").read_text().splitlines()] == list(range(13))
