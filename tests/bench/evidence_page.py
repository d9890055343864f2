"""docs/evidence.md from the results of tests.bench.evidence: tables of means and spreads, published figures, hours."""

import statistics
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence.md"
LINES = ("leap", "movement", "magnitude", "platon", "soft movement")
Key = tuple[str, float, str]

HEAD = """\
# Evidence: what pruning costs a trained encoder

This page is made by `python -m tests.bench.evidence --out FOLDER --show`; do not edit it. Without `--show` the same
command runs the cells that are not done yet: {hours:.1f} hours of a core with AVX-512 BF16 so far. What every
certificate says is in [`tests/bench/results/evidence.json`](../tests/bench/results/evidence.json).

MiniLM (6 layers of 384, 10.6 million prunable weights) with the task's words alone, fine-tuned until it no longer
gained (SST-2: 1.5 epochs; other rates and twice as many steps end within 0.003 of its accuracy); then every cell
prunes it in 2,000 steps of 32, bf16, learning rate 1e-4, from the same start by our defaults.
`platon` and `soft movement` (nn_pruning's) are the published methods in plain torch, `tests/peers`. Each cell is
accuracy · loss of the task's dev file (MRPC: its test file; QQP: the first 5,000 pairs), with the standard deviation
and the number of seeds where there are several; the highest accuracy of a row is bold. SST-2's dev file has 872
sentences, so that one accuracy has a standard error of 0.011; losses tell more. Cells that are missing have not been
run yet.
"""

PUBLISHED = """\
## Published, of BERT-base

From larger models (85 million prunable weights), on their own schedules of 10 and more epochs, so of another scale
than the tables above:

| method | what is left | MNLI | QQP | SQuAD F1 |
|---|---|---|---|---|
| oBERT (arXiv 2203.07259) | 10 % | 83.8 | 91.35 | 88.3 |
| SMP-S (arXiv 2210.06210) | 10 % | 83.7 | 91.0 | 87.2 |
| soft movement (arXiv 2005.07683) | 10 % | 81.2 | 90.2 | 84.9 |
| CoFi (arXiv 2204.00408) | 6 %, 12.1 × as fast | 80.6 | | |
"""


def write_page(results: dict[str, list[dict[str, Any]]]) -> None:
    """Write the page of all tasks. results: rows of evidence.json by task."""
    hours = sum(row.get("hours", 0.0) for rows in results.values() for row in rows)
    parts = [HEAD.format(hours=hours), *(section(task, rows) for task, rows in results.items() if rows), PUBLISHED]
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def means(rows: list[dict[str, Any]]) -> dict[Key, tuple[float, float, float, int]]:
    """Mean accuracy, its standard deviation, mean loss and number of the seeds of each (gates, target, line)."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["gates"], row["target"], row["line"]), []).append(row["metrics"]["pruned"])
    return {
        key: (
            statistics.fmean(one["accuracy"] for one in found),
            statistics.stdev(one["accuracy"] for one in found) if len(found) > 1 else 0.0,
            statistics.fmean(one["loss"] for one in found),
            len(found),
        )
        for key, found in groups.items()
    }


def section(task: str, rows: list[dict[str, Any]]) -> str:
    """A task's tables: the methods beside each other, then what changes LEAP."""
    found = means(rows)
    own = {row["line"]: row for row in rows}
    names = {"start": "The start", "dense": "Trained as long without pruning"}
    dense = {text: own[line]["metrics"]["pruned"] for line, text in names.items() if line in own}
    said = [f"{text}: {one['accuracy']:.3f} · {one['loss']:.3f}." for text, one in dense.items()]
    picture = f"[Picture](../tests/bench/results/evidence_{task}.png)."
    lines = [f"## {task}", "", " ".join([*said, picture]), "", f"| gate | density | {' | '.join(LINES)} |"]
    lines.append("|" + "---|" * (len(LINES) + 2))
    for gates, target in sorted({key[:2] for key in found if key[2] in LINES}, key=lambda at: (at[0], -at[1])):
        row = [found.get((gates, target, line)) for line in LINES]
        best = max(cell[0] for cell in row if cell is not None)
        lines.append(f"| {gates} | {target:g} | {' | '.join(shown(cell, best) for cell in row)} |")
    others = [(key, cell) for key, cell in found.items() if key[2] not in (*LINES, *names)]
    if others:
        lines += ["", "| gate | density | what is different | |", "|---|---|---|---|"]
        lines += [f"| {gates} | {target:g} | {line} | {shown(cell)} |" for (gates, target, line), cell in others]
    return "\n".join(lines) + "\n"


def shown(cell: tuple[float, float, float, int] | None, best: float = 2.0) -> str:
    """A cell of a table."""
    if cell is None:
        return ""
    accuracy, spread, loss, seeds = cell
    text = f"{accuracy:.3f}" + (f" ± {spread:.3f} ({seeds})" if seeds > 1 else "") + f" · {loss:.3f}"
    return f"**{text}**" if accuracy == best else text
