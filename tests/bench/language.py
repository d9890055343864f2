"""Gemma 3 270M pruned in a few hundred steps: one shot, fixed masks that are trained around, LEAP, movement, dense.

    python -m tests.bench.language --model GEMMA --out FOLDER [--gates element 2:4 head+neuron] [--steps 300]

First the vocabulary is cut to the tokens of WikiText-2 and SQuAD. Every cell trains the same steps of 2 x 256 tokens of
WikiText-2's validation text and SQuAD's paragraphs in bf16, and is judged on 32,000 tokens of WikiText-2's raw test
text and on QQP questions, by perplexity and bits a byte. Each is a run of launch/prune.py; a run that was stopped
resumes, and what is done is not run again. What is there so far is printed and written after each cell.

Needs the data folder (../shared/data or $LEAP_DATA). Writes tests/bench/results/language.json.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.bench.accuracy import DATA, RESULTS
from tests.bench.smaller import export, prune, to_train_on

GATES: dict[str, tuple[list[str], float]] = {
    "element": (["element"], 0.5),
    "2:4": (["2:4"], 0.5),
    "head+neuron": (["head", "neuron"], 0.75),
}
LENGTH = 256
TEST_CHARACTERS, QUESTIONS = 142_000, 600  # about 32,000 tokens, and 30 blocks


def texts(out: Path) -> dict[str, list[str]]:
    """Files to train on, and the two to be judged on."""
    test, questions = out / "test.txt", out / "questions.txt"
    test.write_text((DATA / "wikitext2/wiki.test.raw.txt").read_text()[:TEST_CHARACTERS])
    head, *rows = (DATA / "qqp/dev.tsv").read_text().splitlines()
    column = head.split("\t").index("question1")
    questions.write_text("\n".join(row.split("\t")[column] for row in rows[:QUESTIONS]))
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


def cells(kind: str, out: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, the model's folder below `out`, the "leap" section) of the cells of a kind of gates, in order."""
    gates, target = GATES[kind]
    base: dict[str, Any] = {"target": target, "gates": gates}
    for start in ("magnitude", "activation"):
        yield f"one shot, {start}", "words/hf", base | {"mode": "one_shot", "score_init": start}
    fixed = f"{kind.replace(':', '_')}/one_shot_activation/model"
    yield "fixed mask by activation", fixed, {"start": "zeros"}
    yield "leap from activation", "words/hf", base | {"score_init": "activation"}
    yield "leap from magnitude", "words/hf", base | {"score_init": "magnitude"}
    yield "movement", "words/hf", base | {"rule": "movement"}


def judged(folder: Path, certificate: dict[str, Any], files: dict[str, list[str]]) -> dict[str, Any]:
    """Density, and the metrics on both texts: on the questions by a run that cuts nothing."""
    job = job_of(folder / "model", files | {"test": files["questions"]}, 0, {"target": 1.0, "mode": "one_shot"})
    other = prune(job, folder.with_name(folder.name + "_questions"))
    metrics = {"test": certificate["metrics"]["pruned"], "questions": other["metrics"]["pruned"]}
    return {"density": certificate["density"], **metrics}


def show(found: dict[str, dict[str, Any]]) -> None:
    """Print and write what is there."""
    for kind, rows in found.items():
        for name, row in rows.items():
            both = " ".join(f"{row[text]['perplexity']:8.2f}" for text in ("test", "questions"))
            print(f"{kind:12} {name:26} {row['density']:.3f} {both}")
    (RESULTS / "language.json").write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Run the cells of all gates that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the folder of Gemma 3 270M")
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    files = texts(out)
    export(arguments.model.resolve(), out / "words", ["hf"], "--vocabulary", *files["train"], *files["test"])
    file = RESULTS / "language.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    for kind in arguments.gates:
        for name, model, leap in cells(kind, out):
            folder = out / kind.replace(":", "_") / name.replace(",", "").replace(" ", "_")
            certificate = prune(job_of(out / model, files, arguments.steps, leap), folder)
            found.setdefault(kind, {})[name] = judged(folder, certificate, files)
            show(found)
    dense = prune(job_of(out / "words/hf", files, arguments.steps, {"target": 1.0}), out / "dense")
    found["dense"] = {"trained as long": judged(out / "dense", dense, files)}
    show(found)


if __name__ == "__main__":
    main()
