"""One shot: what comes before the cut of a run that takes no training step, and the calibration of runs that do."""

from __future__ import annotations

from functools import partial

from leap_dist.config.sections import JobConfig
from leap_dist.console import console
from leap_dist.train.evaluate import evaluate
from leap_dist.train.job import Job
from leap_dist.train.progress import Progress
from leap_dist.train.signals import Interrupted
from leap_dist.train.syntax import NUM_TEXTS, head_worth
from leap_dist.zero.calibration import calibrate

OF_STEPS = (
    *("epochs", "max_steps", "learning_rate", "weight_decay", "warmup_fraction", "dense_reference", "log_every"),
    *("checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "max_bad_steps"),
)
"""Keys of `train` that a run without training steps does not read."""


def prepare_one_shot(job: Job) -> None:
    """Evaluate the dense model and calibrate; nothing of it can be resumed. Raises Interrupted where that is asked."""
    ignored = without_steps(job.config)
    if job.ranks.first and ignored:
        text = f'leap.mode "one_shot" takes no training step; without effect: {", ".join(ignored)}'
        console().print(text, markup=False, soft_wrap=True)
    size = job.config.train.eval_batch_size
    job.state.measured["dense"] = evaluate(job.engine, job.task, size, job.ranks, lambda: leave_if_asked(job))
    start_heads(job)
    show_inputs(job)


def without_steps(config: JobConfig) -> list[str]:
    """What the job file sets, by dotted key, that has no effect where no training step is taken."""
    found = [f"train.{key}" for key in OF_STEPS if key in config.train.model_fields_set]
    found += ["distill"] if config.distill else []
    return found + (["scheduler"] if "scheduler" in config.deepspeed else [])


def show_inputs(job: Job) -> None:
    """Calibrate, where scores start from what the weights are multiplied with."""
    if job.engine.leap.inputs is None:
        return
    wanted = job.config.leap.calibration_batches
    with Progress(-(-wanted // job.ranks.world_size), enabled=job.ranks.first) as progress:
        done = calibrate(job.engine, job.batches.calibration(wanted), partial(_after, job, progress, "calibrate"))
    if job.ranks.first:
        fewer = f" of the {wanted} that leap.calibration_batches asks for: there are no more" if done < wanted else ""
        console().print(f"calibrated on {done} micro-batches{fewer}", markup=False, soft_wrap=True)


def start_heads(job: Job) -> None:
    """Before the first step, the scores of heads from syntax, where leap.score_init says that."""
    if job.parser is None or job.config.leap.target == 1.0:
        return
    with Progress(-(-NUM_TEXTS // job.ranks.world_size), enabled=job.ranks.first) as progress:
        worth = head_worth(
            *(job.engine, job.parser, job.head_gates, job.batches.examples(NUM_TEXTS), job.task, job.tokenizer),
            job.ranks,
            partial(_after, job, progress, "syntax"),
        )
    job.engine.leap.level.start_units(worth.values)
    if job.ranks.first:
        text = f"scores of heads start from attention on {', '.join(worth.types)} in {worth.num_texts} texts (syntax)"
        console().print(text, markup=False, soft_wrap=True)


def _after(job: Job, progress: Progress, what: str, done: int, of: int) -> None:
    """After each pass of what is done before the first step, on all ranks."""
    progress.update(done, what, {})
    leave_if_asked(job)


def leave_if_asked(job: Job) -> None:
    """Raises Interrupted on every rank if any was asked to stop."""
    reasons = [why for why in job.ranks.gather_objects(job.watch.asked()) if why is not None]
    if reasons:
        raise Interrupted(reasons[0], 0, saved=False)
