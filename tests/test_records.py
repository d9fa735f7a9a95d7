"""The tables of the records are computed from the metrics beside them."""

import json
import statistics
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "records"))
import summary

FOLDERS = [p for p in (ROOT / "records").iterdir() if p.is_dir() and p.name != "__pycache__"]


def test_summary_takes_the_seeds_of_a_name_together(tmp_path):
    for seed, losses in enumerate(([3.0, 2.0], [3.0, 1.0, 1.5], [2.0, 3.0])):
        rows = [{"step": 0, "val_loss": 9.0}] + [{"step": i + 1, "val_loss": v} for i, v in enumerate(losses)]
        (tmp_path / f"a-b-s{seed}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "c-s1.jsonl").write_text('{"step": 5, "val_loss": 0.5}\n')
    c, a = summary.table(tmp_path).splitlines()[2:]
    assert c == "| c | 1 | 5 | 0.5000 | 0.5000 |"
    final, best = [2.0, 1.5, 3.0], [2.0, 1.0, 2.0]
    means = [f"{statistics.mean(v):.4f} ± {statistics.stdev(v):.4f}" for v in (final, best)]
    assert a == f"| a-b | 3 | 3 | {means[0]} | {means[1]} |"
    for seed in range(2):  # The third seed has no report.
        (tmp_path / f"a-b-s{seed}.json").write_text('{"results": [{"bits_per_byte": 2.5}, {"bits_per_byte": 9.0}]}')
    (tmp_path / "c-s1.json").write_text('{"results": [{"bits_per_byte": 2.25}]}')
    c, a = summary.table(tmp_path).splitlines()[2:]
    assert c.endswith("| 0.5000 | 2.2500 |") and a.endswith(f"| {means[1]} | - |")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_a_record_s_table_is_that_of_its_metrics(folder):
    assert summary.table(folder) in (folder / "README.md").read_text(encoding="utf-8")


def test_the_gains_of_means_of_checkpoints_are_those_of_their_losses():
    folder = ROOT / "records" / "2026-11-26-dropout-decay"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    for name, losses in json.loads((folder / "averages.json").read_text(encoding="utf-8")).items():
        last = json.loads((folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        final = losses.pop("final")
        gains = [f"{loss - final:+.4f}" for loss in losses.values()]
        assert final == last["val_loss"] and " | ".join([f"| {name}", f"{final:.4f}", *gains]) + " |" in readme
