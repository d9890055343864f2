"""The rules beside each other: seconds of a step and bytes of fp32 state a prunable weight, in one run.

    python -m tests.bench.neighbours MODEL [BATCH] [LENGTH] [ROUNDS]

Every variant takes a step in turn, in another order each round, with masks in place (leap_dist/bench/overhead.py). The
last one is rule "gumbel" the published way, with masks in every forward pass and autograd through them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import leap_dist
from leap_dist.bench import overhead
from leap_dist.bench.budget import FP32, state_bytes
from leap_dist.bench.forecast import empty_task
from leap_dist.bench.processes import on_ranks
from leap_dist.config.job_file import parse_leap
from leap_dist.config.sections import ModelConfig
from leap_dist.core.oracle import Oracle
from leap_dist.models.load import load_model
from leap_dist.models.plan import make_plan
from leap_dist.zero.dense import initialize_dense

PHASE = {**overhead.PHASE, "score_init": "magnitude"}
RULES: dict[str, dict[str, Any]] = {
    "leap": {},
    "leap, frozen": {"weights": "frozen"},
    "movement": {"rule": "movement"},
    "gumbel": {"rule": "gumbel"},
    "gumbel, trained": {"rule": "gumbel", "weights": "trained"},
    "leap, heads and neurons": {"gates": ["head", "neuron"]},
    "gumbel, heads and neurons": {"rule": "gumbel", "gates": ["head", "neuron"]},
}
AUTOGRAD = "gumbel, masks in the forward pass"


def measure(setting: overhead.Setting) -> dict[str, Any]:
    """Ratios of seconds by variant, and bytes a prunable weight."""
    model = load_model(ModelConfig(name=setting.model), empty_task(overhead.TASK)).eval()
    batch = overhead.random_batch(model, setting)
    keys = overhead.deepspeed_keys(setting.stage, setting.batch)
    dense = initialize_dense(copy.deepcopy(model), keys, overhead.LR, False)
    steps: dict[str, Callable[[], Any]] = {overhead.DENSE: partial(overhead.engine_step, dense, batch)}
    held = {overhead.DENSE: 3 * FP32}
    for name, changes in RULES.items():
        section = {"leap": {**PHASE, **changes}, "train": {"learning_rate": overhead.LR}}
        engine, *_ = leap_dist.initialize(model=copy.deepcopy(model), config={**keys, **section})
        steps[name] = partial(overhead.engine_step, engine, batch)
        own = FP32 if engine.leap.config.frozen else 3 * FP32
        held[name] = own + state_bytes(engine.leap.plan)
    config = parse_leap({**PHASE, "rule": "gumbel"})
    masked = copy.deepcopy(model)
    oracle = Oracle(masked, make_plan(masked, config), config, lr=overhead.LR, max_norm=overhead.MAX_NORM)
    steps[AUTOGRAD] = partial(oracle.step, partial(overhead.loss_of, batch))
    return {"seconds": overhead.with_ratios(overhead.time_steps(steps, setting.steps)), "bytes": held}


def main() -> None:
    """Print a table."""
    numbers = [int(value) for value in sys.argv[2:]]
    batch, length, rounds = numbers + [8, 64, 5][len(numbers) :]
    setting = overhead.Setting(model=sys.argv[1], batch=batch, length=length, steps=rounds)
    found = on_ranks(1, measure, setting)[0]
    for name, row in found["seconds"].items():
        ratios = f"{row['ratio']:.2f} (median) {row['fastest ratio']:.2f} (fastest)"
        print(f"{name:36} {row['seconds']:.3f} s, {ratios}, {found['bytes'].get(name, '-')} B")


if __name__ == "__main__":
    main()
