"""The table of a record: mean and standard deviation over the seeds of each of its settings.

    python records/summary.py records/FOLDER

FOLDER/NAME-sSEED.jsonl are the metrics.jsonl of its runs; those that differ in the seed alone share a NAME.
NAME-sSEED.json beside one is what eval.py wrote of that run on another text: its first result gives the last column.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

COLUMNS = ["run", "seeds", "steps", "final validation loss", "best", "bits per byte of another text"]


def table(folder):
    """Markdown: a row a NAME, the lowest mean of the best validation losses first."""
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
    """Mean and standard deviation; a dash where one is not known."""
    if None in values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    if len(sys.argv) != 2 or not any(Path(sys.argv[1]).glob("*-s*.jsonl")):
        print("summary.py: name one folder with metrics as NAME-sSEED.jsonl", file=sys.stderr)
        sys.exit(2)
    print(table(sys.argv[1]))
