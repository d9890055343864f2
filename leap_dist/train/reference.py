"""The dense model beside a pruned one: trained as long before it, in a folder of its own until the run has ended."""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from leap_dist.checkpoint.checkpoints import Checkpoints
from leap_dist.config.json_file import read_json
from leap_dist.config.leap import GateConfig, LeapConfig
from leap_dist.config.sections import JobConfig
from leap_dist.console import console
from leap_dist.errors import UserError
from leap_dist.files import alone
from leap_dist.run_folder import CHECKPOINTS, RANKS, REFERENCE
from leap_dist.tracking.mlflow import Tracker, check_store_answers
from leap_dist.train.evaluate import evaluate
from leap_dist.train.guards import Heartbeats
from leap_dist.train.job import build_job, let_go
from leap_dist.train.output import as_logged, check_output, check_same_data, check_same_job, prepared, same_result
from leap_dist.train.steps import resume_from_newest, train
from leap_dist.train.watch import Watch
from leap_dist.zero.ranks import Ranks

RESULT = "metrics.json"
"""In the folder of a reference that is done: its metrics."""
LOOK = 2.0  # seconds between two looks whether another run has ended with it
Metrics = dict[str, float]


def dense_reference(config: JobConfig, output: Path, ranks: Ranks, watch: Watch) -> Metrics:
    """The metrics of a run of the same length and seed in which nothing is pruned.

    It is trained in a folder below `output`, or below `watch.references`, where one run after another may have it: one
    that was cut off is resumed, and one that is done is not trained again.
    Raises UserError for what it or the run after it would be refused for, before it trains; Interrupted.
    """
    dense, folder = _unpruned(config), output / REFERENCE
    if watch.references is not None:
        folder = watch.references / same_result(as_logged(dense, ranks.world_size))
    with _in_turn(folder, ranks) if watch.references is not None else nullcontext():
        known = ranks.on_first(lambda: finished_reference(folder, dense, ranks.world_size))
        if known is not None:
            return known
        resumes = ranks.on_first(lambda: check_output(folder, False, dense, ranks.world_size))
        # what is refused is known before it has trained for long; a search for an order takes minutes itself
        leap = config.leap.model_copy(update={"permute": None})
        let_go(build_job(config.model_copy(update={"leap": leap}), ranks, watch))
        ranks.on_first(lambda: check_store_answers(config.tracking))
        if ranks.first:
            console().print("dense reference: a run of the same length without pruning", markup=False)
        return _trained(dense, folder, resumes, ranks, replace(watch, notify=None, may_go_on=None, snapshots={}))


def _unpruned(config: JobConfig) -> JobConfig:
    """The job with all weights kept, whatever it prunes; of all gates those of rows take the least memory."""
    include, exclude, steps = config.leap.include, config.leap.exclude, config.leap.total_steps
    rows = (GateConfig(granularity="row"),)
    leap = LeapConfig(
        target=1.0, gates=rows, include=include, exclude=exclude, total_steps=steps, score_init="magnitude"
    )
    return config.model_copy(update={"leap": leap})


@contextmanager
def _in_turn(folder: Path, ranks: Ranks) -> Iterator[None]:
    """A block that one run at a time is in. The ranks meet while they wait, so that none takes another for lost."""
    with ExitStack() as held:
        while not ranks.on_first(lambda: _entered(folder, held)):
            time.sleep(LOOK)
        yield


def _entered(folder: Path, held: ExitStack) -> bool:
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(alone(folder.with_suffix(".lock"), 0.0))
    except TimeoutError:
        return False
    return True


def finished_reference(folder: Path, dense: JobConfig, world_size: int) -> Metrics | None:
    """The metrics of a reference that is done; None if it is not. Raises UserError if it was of another job."""
    file = folder / RESULT
    if not file.is_file():
        return None
    check_same_job("--output", folder, dense, world_size)
    check_same_data("--output", folder, dense)
    remedy = f"remove {folder} to train the dense reference again"
    try:
        return TypeAdapter(Metrics).validate_python(read_json(file, remedy, finite=False))
    except ValidationError as error:
        raise UserError(f"{file}: not the metrics of a dense reference; {remedy}") from error


def _trained(dense: JobConfig, folder: Path, resumes: bool, ranks: Ranks, watch: Watch) -> Metrics:
    """Train what is left of it, with checkpoints, and write its metrics down."""
    job = build_job(dense, ranks, watch)
    try:
        checkpoints = Checkpoints(folder / CHECKPOINTS, ranks, dense.train.keep_checkpoints)
        if resumes:
            resume_from_newest(job, checkpoints)
        settings = as_logged(job.config, ranks.world_size)
        with prepared(folder, settings, job.state.start, dense.data) if ranks.first else nullcontext() as writer:
            with Heartbeats(folder / RANKS, ranks, dense.train.collective_timeout) as job.state.heartbeats:
                train(job, Tracker(dense.tracking, {}, enabled=False), folder, checkpoints, writer)
                metrics = evaluate(job.engine, job.task, dense.train.eval_batch_size, ranks)
            if writer is not None:
                writer.text(RESULT, json.dumps(metrics) + "\n")
        if ranks.first and (folder / RESULT).is_file():  # not on a full disk
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    finally:
        let_go(job)
    return metrics
