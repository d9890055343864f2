"""Checkpoints of BERT-base on one rank: their size beside a dense run's, and the time that training loses to them.

    OMP_NUM_THREADS=1 python -m tests.bench.checkpoint --folder FOLDER [--saves 5]

A dense AdamW checkpoint has fp32 masters and two moments, 12 bytes a weight. Lost in a save: the call, which copies the
state to host memory, and what steps take longer while it is written and synced to FOLDER's disk, all by the fastest
seen; share: lost at one save a minute. "cpu" is by the processor time of the training thread, "all cpu" that of all
threads in a save without training. Weights are random. The last checkpoint is loaded again and compared before anything
is reported. Writes results/checkpoint.json.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import leap_dist
from leap_dist.bench.forecast import empty_task
from leap_dist.bench.overhead import LR, PHASE, TASK, Setting, deepspeed_keys, engine_step, random_batch
from leap_dist.bench.processes import on_ranks
from leap_dist.checkpoint.checkpoints import Checkpoints
from leap_dist.checkpoint.engine_state import fragment_states, tensor_table, written_by
from leap_dist.checkpoint.folders import latest_checkpoint, step_of
from leap_dist.checkpoint.manifest import MANIFEST
from leap_dist.config.sections import ModelConfig
from leap_dist.machine import machine
from leap_dist.models.load import load_model
from leap_dist.zero.ranks import Ranks

GATES = {"element": ["element"], "head+neuron": ["head", "neuron"]}
BATCH, LENGTH = 1, 32
UNDISTURBED = 3  # steps before every save
RESULTS = Path(__file__).parent / "results"


def engine_of(gates: list[str]) -> tuple[Any, Callable[[], None]]:
    """An engine in the prune phase, and a function for its steps."""
    torch.manual_seed(0)
    model = load_model(ModelConfig(from_config={"model_type": "bert"}), empty_task(TASK)).eval()
    batch = random_batch(model, Setting(batch=BATCH, length=LENGTH))
    section = {"leap": {**PHASE, "gates": gates}, "train": {"learning_rate": LR}}
    engine, *_ = leap_dist.initialize(model=model, config={**deepspeed_keys(2, BATCH), **section})
    return engine, partial(engine_step, engine, batch)


def seconds_of(action: Callable[[], Any]) -> tuple[float, float]:
    """(by the wall clock, of this thread's processor time): neighbours on the machine disturb the second less."""
    started = time.perf_counter(), time.thread_time()
    action()
    return time.perf_counter() - started[0], time.thread_time() - started[1]


def is_same(engine: Any, checkpoints: Checkpoints) -> bool:
    """Whether loading over a changed state brings every bit back."""
    views = [view for fragment in written_by(engine, 0) for _, view in fragment_states(engine, fragment)]
    before = [view.clone() for view in views]
    for view in views:
        view.zero_()
    checkpoints.load(engine)
    return all(torch.equal(view, saved) for view, saved in zip(views, before, strict=True))


@dataclass
class Times:
    """What was timed over all saves, (wall clock, processor time) each; `write` by the wall clock alone."""

    call: list[tuple[float, float]] = field(default_factory=list)
    step: list[tuple[float, float]] = field(default_factory=list)
    meanwhile: list[tuple[float, float]] = field(default_factory=list)
    write: list[float] = field(default_factory=list)

    def row(self) -> dict[str, float]:
        """The fastest of each, and the seconds that a save costs by them."""
        found = {"write": min(self.write)}
        for place, kind in enumerate(("", " cpu")):
            call, step, meanwhile = (
                min(times[place] for times in timed) for timed in (self.call, self.step, self.meanwhile or self.step)
            )
            lost = call + found["write"] * max(0.0, 1.0 - step / meanwhile)
            parts = {"call": call, "step": step, "step while writing": meanwhile, "lost": lost, "share": lost / 60.0}
            found |= {f"{name}{kind}": value for name, value in parts.items()}
        return found


def save_while_training(
    engine: Any, step: Callable[[], None], checkpoints: Checkpoints, folder: Path, times: Times
) -> None:
    """Steps alone, a save, and steps while it is written."""
    times.step += [seconds_of(step) for _ in range(UNDISTURBED)]
    times.call.append(seconds_of(lambda: checkpoints.save(engine, {})))
    called, num = time.time(), engine.leap.num_steps
    while True:
        during = seconds_of(step)
        latest = latest_checkpoint(folder)
        if latest is not None and step_of(latest) == num:
            break  # was complete before the step's end
        times.meanwhile.append(during)
    checkpoints.wait()
    times.write.append((latest / MANIFEST).stat().st_mtime - called)


def measure(gates: list[str], folder: Path, saves: int) -> dict[str, float]:
    """A row of the table. The first save makes its place in host memory and is told of alone."""
    engine, step = engine_of(gates)
    checkpoints, times = Checkpoints(folder, Ranks(0, 1, engine.device), keep=1), Times()
    step()
    first, _ = seconds_of(lambda: checkpoints.save(engine, {}))
    for _ in range(saves):
        save_while_training(engine, step, checkpoints, folder, times)
    started = time.process_time()
    checkpoints.save(engine, {})
    checkpoints.wait()
    busy = time.process_time() - started
    latest = latest_checkpoint(folder)
    assert latest is not None
    if not is_same(engine, checkpoints):
        raise RuntimeError("the state that was loaded is not the one that was saved, nothing is reported")
    stored = sum(file.stat().st_size for file in latest.iterdir())
    dense = 12 * sum(entry.numel for name, entry in tensor_table(engine).items() if not name.startswith("leap."))
    return {"MB": stored / 1e6, "to dense": stored / dense, "first call": first, **times.row(), "all cpu": busy}


def main() -> None:
    """Measure all gates; print and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--saves", type=int, default=5)
    arguments = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    found = {"machine": machine(), "threads": torch.get_num_threads(), "batch": BATCH, "length": LENGTH, "gates": rows}
    for name, gates in GATES.items():
        folder = arguments.folder / name.replace(":", "_")
        rows[name] = on_ranks(1, measure, gates, folder, arguments.saves)[0]
        print(f"{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in rows[name].items()), flush=True)
        shutil.rmtree(folder)
    (RESULTS / "checkpoint.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
