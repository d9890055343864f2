"""WikiText-2 with a small decoder: a GPT-2 shape trained a little on the validation text, then pruned to one half.

    python -m tests.bench.wikitext --out FOLDER [--steps 400] [--workers 2]

Perplexity is that of the raw test text, by a byte-level BPE of 8,192 tokens made from the validation text; "dense"
trains on for as many steps as the others prune. Needs the data folder (../shared/data or $LEAP_DATA). Every cell is a
run of launch/prune.py; what is done is not run again. Writes tests/bench/results/wikitext.json.
"""

import argparse
import json
from pathlib import Path

from tests.bench.accuracy import DATA, RESULTS, RULES, SEED, start, sweep

VOCABULARY = 8192
SHAPE = {"model_type": "gpt2", "n_layer": 4, "n_head": 6, "n_embd": 192, "n_positions": 128, "vocab_size": VOCABULARY}
TRAIN, TEST = DATA / "wikitext2" / "valid.tokens.txt", DATA / "wikitext2" / "wiki.test.raw.txt"
TARGET = 0.5
START_STEPS = 400


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE from the training text, as transformers loads it."""
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train([str(TRAIN)], vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], show_progress=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)


def prepare(out: Path, steps: int) -> Path:
    """Write the tokenizer and the job file that all cells share; the job file."""
    out.mkdir(parents=True, exist_ok=True)
    make_tokenizer(out / "tokenizer")
    data = {"task": "lm", "train": str(TRAIN), "validation": str(TEST), "tokenizer": str(out / "tokenizer")}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    job = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "model": {"from_config": {**SHAPE, **ends}},
        "data": {**data, "max_length": 128},
        "train": {"max_steps": steps, "learning_rate": 1e-3, "seed": SEED, "log_every": 20},
        "leap": {"target": TARGET},
        "tracking": {"mlflow_uri": f"sqlite:///{out / 'mlflow.db'}", "experiment": "wikitext"},
    }
    (out / "job.json").write_text(json.dumps(job, indent=1))
    return out / "job.json"


def main() -> None:
    """Run all cells; print and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    job = prepare(arguments.out.resolve(), arguments.steps)
    text = json.loads(job.read_text())
    begun = start(job, START_STEPS)
    model = {"name": str(begun)}
    job.write_text(json.dumps({**text, "model": model}, indent=1))
    cells = sweep("dense", job, {"leap.target": [1.0]}, 1)
    cells += sweep(
        "pruned", job, {"leap.gates": [["element"], ["head", "neuron"]], "leap.rule": RULES}, arguments.workers
    )
    certificate = json.loads((begun.parent / "certificate.json").read_text())
    for cell in cells:
        print(f"{cell['settings']} {cell['density']:.4f} perplexity {cell['metrics']['pruned']['perplexity']:.2f}")
    found = {
        "start_steps": START_STEPS,
        "steps": arguments.steps,
        "shape": SHAPE,
        "start": certificate["metrics"]["pruned"],
        "cells": cells,
    }
    (RESULTS / "wikitext.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
