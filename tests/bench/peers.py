"""A job's data, model, steps and schedule with published methods in place of LEAP: soft movement and PLATON.

    python -m tests.bench.peers JOB soft_movement [--pull 100] [--rate 0.01]
    python -m tests.bench.peers JOB platon

JOB is a job file of launch/prune.py with one gate of single weights. Prints one line of JSON: the metrics of the dense
and of the pruned model, the density, and the density before the cut to the target, which for soft movement is what its
threshold came to.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from leap_dist.bench.processes import on_ranks, stdout_to_stderr
from leap_dist.config.job_file import load_job
from leap_dist.core.phases import Schedule
from leap_dist.models.load import load_model, load_tokenizer
from leap_dist.models.plan import make_plan
from leap_dist.tasks import load_task, needs_tokenizer
from leap_dist.train.batches import Batches
from leap_dist.train.evaluate import evaluate
from leap_dist.train.job import linear_scale
from leap_dist.train.progress import Progress
from leap_dist.zero.ranks import Ranks
from tests.bench.bf16 import install
from tests.peers.pruners import Platon, SoftMovement


def run(file: Path, method: str, pull: float, rate: float) -> dict[str, Any]:
    """The whole job on one process."""
    install()
    job = load_job(file)
    ranks, train, leap = Ranks(0, 1, torch.device("cpu")), job.train, job.leap
    tokenizer = load_tokenizer(job.model, job.data.tokenizer) if needs_tokenizer(job.data.task) else None
    task = load_task(job.data, tokenizer)
    batches = Batches(task, job.deepspeed["train_micro_batch_size_per_gpu"], 1, train.seed, ranks)
    torch.manual_seed(train.seed)
    model: Any = load_model(job.model, task).train()
    names = list(make_plan(model, leap, job.family).covers)
    known = model, names, train.learning_rate, train.weight_decay
    pruner = SoftMovement(*known, pull, rate) if method == "soft_movement" else Platon(*known)
    total = train.max_steps or round((train.epochs or 1) * batches.steps_per_epoch)
    assert leap.target is not None
    schedule = Schedule(total, leap.dense_fraction, leap.settle_fraction, leap.target)
    bf16 = bool(job.deepspeed.get("bf16", {}).get("enabled"))
    scale = linear_scale(total, train.warmup_fraction)
    found: dict[str, Any] = {"method": method, "dense": evaluate(model, task, train.eval_batch_size, ranks)}
    torch.manual_seed(train.seed + 1)
    with Progress(total, enabled=True) as progress:
        for step in range(total):
            if step == schedule.settle_start:
                found["density before the cut"] = pruner.density()
                pruner.settle(leap.target)
            (batch,) = batches.step(step)
            loss = pruner.step(partial(_loss, batch, bf16), schedule.level(step), leap.target, scale(step))
            if (step + 1) % train.log_every == 0:
                progress.update(step + 1, schedule.phase(step), {"loss": loss.item(), "density": pruner.density()})
    return found | {"pruned": evaluate(model, task, train.eval_batch_size, ranks), "density": pruner.density()}


def _loss(batch: dict[str, torch.Tensor], bf16: bool, forward: Callable[..., Any]) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss: torch.Tensor = forward(**batch).loss
    return loss


def main() -> None:
    """Run one job; its progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("method", choices=["soft_movement", "platon"])
    parser.add_argument("--pull", type=float, default=100.0, help="of soft movement's scores towards 0, at the end")
    parser.add_argument("--rate", type=float, default=1e-2, help="of its scores; a short run needs a higher one")
    arguments = parser.parse_args()
    with stdout_to_stderr():
        found = on_ranks(1, run, arguments.job.resolve(), arguments.method, arguments.pull, arguments.rate)[0]
    json.dump(found, sys.stdout)
    print()


if __name__ == "__main__":
    main()
