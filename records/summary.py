"""Print the table of a record: the mean and standard deviation of each kind of run over its seeds.

    python records/summary.py records/FOLDER

FOLDER/NAME-sSEED.jsonl is the metrics.jsonl of a run. Runs that differ only in the seed share a NAME.
NAME-sSEED.json beside it is the report of eval.py for that run on another text. Its first result gives the last column.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

COLUMNS = ["run", "seeds", "steps", "final validation loss", "best", "bits per byte of another text"]


def table(folder):
    """The table in Markdown. Each NAME has a row; the lowest mean of the best validation losses comes first."""
    runs = defaultdict(list)
    for path in sorted(Path(folder).glob("*-s*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        losses = [row["val_loss"] for row in rows if "val_loss" in row]
        other = path.with_suffix(".json")
        bits = json.loads(other.read_text(encoding="utf-8"))["results"][0]["bits_per_byte"] if other.exists() else None
        runs[path.stem.rpartition("-s")[0]].append((rows[-1]["step"], losses[-1], min(losses), bits))
    columns = COLUMNS if any(Path(folder).glob("*-s*.json")) else COLUMNS[:-1]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, results in sorted(runs.items(), key=lambda item: statistics.mean(r[2] for r in item[1])):
        steps, last, best, bits = zip(*results, strict=True)
        cells = [name, str(len(results)), f"{max(steps):,}", spread(last), spread(best), spread(bits)]
        lines.append("| " + " | ".join(cells[: len(columns)]) + " |")
    return "\n".join(lines)


def spread(values):
    """The mean and standard deviation of the values, or a dash where one of them is unknown."""
    if None in values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not any(Path(sys.argv[1]).glob("*-s*.jsonl")):
        print("summary.py: name one folder that holds metrics as NAME-sSEED.jsonl", file=sys.stderr)
        sys.exit(2)
    print(table(sys.argv[1]))
