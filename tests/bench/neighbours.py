"""The rules beside each other: seconds of a step, bytes of fp32 state a prunable weight, and peak memory.

    python -m tests.bench.neighbours MODEL [BATCH] [LENGTH] [ROUNDS]

Every variant takes a step in turn, in another order each round, with masks in place (leap_dist/bench/overhead.py). The
last one is rule "gumbel" the published way, with masks in every forward pass and autograd through them. Peaks are of
processes of their own.
"""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil

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

RULES: dict[str, dict[str, Any]] = {
    "leap": {},
    "leap, frozen": {"weights": "frozen"},
    "movement": {"rule": "movement"},
    "gumbel": {"rule": "gumbel"},
    "gumbel, trained": {"rule": "gumbel", "weights": "trained"},
    "leap, 2:4": {"gates": ["2:4"], "target": 0.5},
    "leap, heads and neurons": {"gates": ["head", "neuron"]},
    "gumbel, heads and neurons": {"rule": "gumbel", "gates": ["head", "neuron"]},
}
AUTOGRAD = "gumbel, masks in the forward pass"


def variant(name: str, model: Any, setting: overhead.Setting) -> tuple[Callable[[], Any], int | None]:
    """(a step of it, bytes of fp32 state a prunable weight)."""
    batch = overhead.random_batch(model, setting)
    keys = overhead.deepspeed_keys(setting.stage, setting.batch)
    if name == overhead.DENSE:
        return partial(overhead.engine_step, initialize_dense(model, keys, overhead.LR, False), batch), 3 * FP32
    if name == AUTOGRAD:
        config = parse_leap({**overhead.PHASE, "rule": "gumbel"})
        oracle = Oracle(model, make_plan(model, config), config, lr=overhead.LR, max_norm=overhead.MAX_NORM)
        return partial(oracle.step, partial(overhead.loss_of, batch)), None
    section = {"leap": {**overhead.PHASE, **RULES[name]}, "train": {"learning_rate": overhead.LR}}
    engine, *_ = leap_dist.initialize(model=model, config={**keys, **section})
    own = FP32 if engine.leap.config.frozen else 3 * FP32
    return partial(overhead.engine_step, engine, batch), own + state_bytes(engine.leap.plan, engine.leap.config)


def loaded(setting: overhead.Setting) -> Any:
    """The model without dropout."""
    return load_model(ModelConfig(name=setting.model), empty_task(overhead.TASK)).eval()


def seconds(setting: overhead.Setting) -> dict[str, Any]:
    """Ratios of seconds by variant, and bytes a prunable weight."""
    model = loaded(setting)
    found = {name: variant(name, copy.deepcopy(model), setting) for name in (overhead.DENSE, *RULES, AUTOGRAD)}
    times = overhead.time_steps({name: step for name, (step, _) in found.items()}, setting.steps)
    return {"seconds": overhead.with_ratios(times), "bytes": {name: held for name, (_, held) in found.items()}}


def peak(setting: overhead.Setting, name: str) -> float:
    """MiB that a process holds at most in three steps of a variant, beyond those with the model loaded."""
    model = loaded(setting)
    before = psutil.Process().memory_info().rss
    step, _ = variant(name, model, setting)
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def main() -> None:
    """Print a table."""
    numbers = [int(value) for value in sys.argv[2:]]
    batch, length, rounds = numbers + [8, 64, 5][len(numbers) :]
    setting = overhead.Setting(model=sys.argv[1], batch=batch, length=length, steps=rounds)
    found = on_ranks(1, seconds, setting)[0]
    for name, row in found["seconds"].items():
        ratios = f"{row['ratio']:.2f} (median) {row['fastest ratio']:.2f} (fastest)"
        highest = on_ranks(1, peak, setting, name)[0]
        print(f"{name:36} {row['seconds']:.3f} s, {ratios}, {found['bytes'][name] or '-'} B, {highest:.0f} MiB at most")


if __name__ == "__main__":
    main()
