"""Gemma 3 270M pruned: one shot, fixed masks that are trained around, LEAP, its neighbours, dense.

    python -m tests.bench.language --model GEMMA --out FOLDER [--gates element 2:4 head+neuron] [--cells NAME ...]
    python -m tests.bench.language --out FOLDER --show

First the vocabulary is cut to the tokens of WikiText-2 and SQuAD. Every cell trains the same 300 steps of 2 x 256
tokens of WikiText-2's validation text and SQuAD's paragraphs in bf16, "long" 2,000, and is judged on 32,000 tokens of
WikiText-2's raw test text and on QQP questions, by perplexity and bits a byte. Each is a run of launch/prune.py; a run
that was stopped resumes, and what is done is not run again. Several of these commands may share a folder: each takes
the next cell that no other has. --show makes the file from what is there; what it has of other cells stays.

Needs the data folder (../shared/data or $LEAP_DATA). Writes tests/bench/results/language.json.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.places import DATA, RESULTS
from tests.bench.smaller import claimed, export, prune, put, to_train_on

GATES: dict[str, tuple[list[str], float]] = {
    "element": (["element"], 0.5),
    "2:4": (["2:4"], 0.5),
    "head+neuron": (["head", "neuron"], 0.75),
}
LENGTH, STEPS, LONG = 256, 300, 2000
TEST_CHARACTERS, QUESTIONS = 142_000, 600  # about 32,000 tokens, and 30 blocks


def texts(out: Path) -> dict[str, list[str]]:
    """Files to train on, and the two to be judged on."""
    test, questions = out / "test.txt", out / "questions.txt"
    put(test, (DATA / "wikitext2/wiki.test.raw.txt").read_text()[:TEST_CHARACTERS])
    head, *rows = (DATA / "qqp/dev.tsv").read_text().splitlines()
    column = head.split("\t").index("question1")
    put(questions, "\n".join(row.split("\t")[column] for row in rows[:QUESTIONS]))
    return {"train": to_train_on(out), "test": [str(test)], "questions": [str(questions)]}


def job_of(model: Path, files: dict[str, list[str]], steps: int, leap: dict[str, Any]) -> dict[str, Any]:
    """A job on these texts, judged on the test text."""
    train = {} if leap.get("mode") == "one_shot" else {"max_steps": steps, "checkpoint_every": 25}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "model": {"name": str(model)},
        "data": {"task": "lm", "train": files["train"], "validation": files["test"], "max_length": LENGTH},
        "train": {"learning_rate": 5e-5, "log_every": 10, "seed": 17, "eval_batch_size": 4, **train},
        "leap": leap,
        "tracking": {"mlflow_uri": None},
    }


@dataclass(frozen=True)
class Cell:
    """One run: its "leap" section beside target and gates; `fixed`: with the masks of this one-shot cell; `others`:
    more keys of its job; `taught`: by the dense model that was trained as long."""

    kind: str
    name: str
    leap: dict[str, Any]
    fixed: str | None = None
    steps: int = STEPS
    others: dict[str, Any] = field(default_factory=dict)
    taught: bool = False

    def folder(self, out: Path) -> Path:
        """Of the run."""
        long = "long_" if self.steps == LONG else ""
        return out / self.kind.replace(":", "_") / (long + self.name.replace(",", "").replace(" ", "_"))

    @property
    def needs(self) -> "list[Cell]":
        """The cells that have to be done before."""
        return [*([Cell(self.kind, self.fixed, {})] if self.fixed else []), *([DENSE] if self.taught else [])]


DENSE = Cell("dense", "trained as long", {})
ONE_SHOT = [
    ("one shot, magnitude", {"mode": "one_shot", "score_init": "magnitude"}),
    ("one shot, activation", {"mode": "one_shot", "score_init": "activation"}),
]
TRAINED = [
    ("leap", {}),
    ("leap from activation", {"score_init": "activation"}),
    ("leap from magnitude", {"score_init": "magnitude"}),
    ("movement", {"rule": "movement"}),
]
LEVERS: list[tuple[str, dict[str, Any]]] = [  # what the budget makes smaller, whole
    ("whole budget", {"tokens_per_step": None}),
    ("whole score rate", {"score_learning_rate": 2e-3}),
    ("whole threshold rate", {"threshold_learning_rate": 0.178}),
    ("equal shares", {"threshold_learning_rate": 1e-9}),
    ("own moments", {"score_moments": "own"}),
]
DESCENTS: list[tuple[str, dict[str, Any]]] = [  # of the long run: as the short one's, whose budget is a seventh
    ("sooner at the target", {"tokens_per_step": 77, "score_learning_rate": 1e-3}),
    ("budget of 300 steps", {"tokens_per_step": 77}),
]
FROZEN = [
    ("gumbel, frozen", {"rule": "gumbel", "score_init": "activation", "weights": "frozen"}),
    ("leap, frozen", {"score_init": "activation", "weights": "frozen"}),
]


def cells(kinds: list[str]) -> Iterator[Cell]:
    """All of these kinds of gates, each with its one-shot cells before those that start from their zeros."""
    for kind in kinds:
        yield from (Cell(kind, name, leap) for name, leap in ONE_SHOT)
        yield Cell(kind, "fixed mask by activation", {}, "one shot, activation")
        yield from (Cell(kind, name, leap) for name, leap in TRAINED)
        if kind == kinds[0]:
            yield Cell("dense", "as published", {"mode": "one_shot"})
            yield DENSE
    if "2:4" in kinds:
        ordered = {"permute": "greedy"}
        yield Cell("2:4", "one shot, activation, permuted", {"mode": "one_shot", **ordered})
        yield Cell("2:4", "fixed mask, permuted", {}, "one shot, activation, permuted")
        yield Cell("2:4", "leap, permuted", ordered)
    yield from (Cell(kind, name, leap) for kind in kinds if kind != "head+neuron" for name, leap in FROZEN)
    if "element" in kinds:
        yield Cell("element", "leap", {}, steps=LONG)
        yield Cell("element", "fixed mask by activation", {}, "one shot, activation", LONG)
        yield from (Cell("element", f"leap, {name}", leap, steps=LONG) for name, leap in DESCENTS)
        yield from (Cell("element", f"leap, {name}", leap) for name, leap in LEVERS)
        yield Cell("element", "leap, taught", {}, others={"distill": {"teacher": "self"}})
        yield Cell("element", "leap, taught by a trained model", {}, taught=True)
        yield Cell("element", "fixed mask, taught by a trained model", {}, "one shot, activation", taught=True)
        yield Cell("element", "leap, taught by answers", {}, others={"distill": {"hidden_weight": 0.0}})
        yield Cell("element", "leap, 2,048 tokens", {}, steps=STEPS // 4, others={"gradient_accumulation_steps": 4})


def job(cell: Cell, out: Path, files: dict[str, list[str]]) -> dict[str, Any]:
    """The job of a cell."""
    gates, target = GATES.get(cell.kind, (None, 1.0))
    model, leap = out / "words/hf", {"target": target, **({"gates": gates} if gates else {}), **cell.leap}
    if cell.fixed is not None:
        first = cell.needs[0].folder(out)  # a permuted model is in its run alone
        masks = export(first, first.with_name(first.name + "_masks"), ["mask"])
        model, leap = first / "model", {"start": str(masks)}
    teacher = {"distill": {"teacher": str(DENSE.folder(out) / "model")}} if cell.taught else {}
    return job_of(model, files, cell.steps, leap) | teacher | cell.others


def run(cell: Cell, out: Path, files: dict[str, list[str]]) -> None:
    """Run a cell and judge it on the questions too, by a run that cuts nothing; unless another process has it."""
    folder = cell.folder(out)
    for first in cell.needs:
        with claimed(first.folder(out), wait=True):
            pass
    with claimed(folder) as ours:
        if ours:
            prune(job(cell, out, files), folder)
            other = job_of(
                folder / "model", files | {"test": files["questions"]}, 0, {"target": 1.0, "mode": "one_shot"}
            )
            prune(other, questions_of(folder))


def questions_of(folder: Path) -> Path:
    """The folder of the run that judges a cell's model on the questions."""
    return folder.with_name(folder.name + "_questions")


def result_of(cell: Cell, out: Path) -> dict[str, Any] | None:
    """Density, settings and the metrics on both texts; None where it is not done."""
    folder = cell.folder(out)
    files = [one / "certificate.json" for one in (folder, questions_of(folder))]
    if not all(file.is_file() for file in files):
        return None
    found, other = (json.loads(file.read_text()) for file in files)
    metrics = {"test": found["metrics"]["pruned"], "questions": other["metrics"]["pruned"]}
    shared = {key: found[key] for key in ("density", "masks_sha256", "versions")}
    leap = {"start": cell.fixed} if cell.fixed else cell.leap
    taught = {"distill": {"teacher": DENSE.name}} if cell.taught else {}
    return {"steps": 0 if "mode" in leap else cell.steps, "leap": leap, **taught, **cell.others, **shared, **metrics}


def write(out: Path) -> None:
    """Print and write what is there, and what the file has of cells that are not: they ran on another machine."""
    file = RESULTS / "language.json"
    before: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    found: dict[str, dict[str, Any]] = {}
    for cell in cells(list(GATES)):
        name = cell.folder(out).name
        row = result_of(cell, out) or before.get(cell.kind, {}).get(name)
        if row is not None:
            found.setdefault(cell.kind, {})[name] = row
            both = " ".join(f"{row[text]['perplexity']:8.2f}" for text in ("test", "questions"))
            print(f"{cell.kind:12} {cell.name:32} {row['steps']:5} {row['density']:.3f} {both}")
    file.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Run the cells of the gates that were asked for, then write what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="the folder of Gemma 3 270M")
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--cells", nargs="+", help="by name, as the table has them; default: all")
    parser.add_argument("--show", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if not arguments.show:
        out.mkdir(parents=True, exist_ok=True)
        files = texts(out)
        with claimed(out / "words", wait=True):
            export(arguments.model.resolve(), out / "words", ["hf"], "--vocabulary", *files["train"], *files["test"])
        for cell in cells(arguments.gates):
            if arguments.cells is None or cell.name in arguments.cells:
                run(cell, out, files)
    write(out)


if __name__ == "__main__":
    main()
