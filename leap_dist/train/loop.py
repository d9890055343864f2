"""The main job: dense -> prune -> settle, evaluated dense and pruned, exported and certified."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from leap_dist.checkpoint.checkpoints import Checkpoints
from leap_dist.checkpoint.folders import latest_checkpoint
from leap_dist.config.sections import JobConfig
from leap_dist.console import console
from leap_dist.core.histograms import REACH, score_histograms
from leap_dist.core.measure import amounts
from leap_dist.errors import UserError
from leap_dist.export import certificate as cert
from leap_dist.export.hf import save_model
from leap_dist.files import replacing
from leap_dist.models.inputs import describe_start
from leap_dist.models.permute import order_of
from leap_dist.run_folder import CERTIFICATE, CHECKPOINTS, HIDDEN, MODEL, RANKS, REFERENCE, SCORES
from leap_dist.tracking.mlflow import Tracker
from leap_dist.tracking.records import record_end
from leap_dist.train.evaluate import evaluate
from leap_dist.train.folder_writer import FolderWriter, needed
from leap_dist.train.guards import Heartbeats
from leap_dist.train.job import Job, build_job, let_go
from leap_dist.train.one_shot import leave_if_asked, prepare_one_shot
from leap_dist.train.output import as_logged, check_output, completed, prepared
from leap_dist.train.reference import dense_reference
from leap_dist.train.reorder import save_orders
from leap_dist.train.signals import Interrupted
from leap_dist.train.steps import resume_from_newest, train
from leap_dist.train.summary import leap_ms, print_summary, tags_of
from leap_dist.train.watch import NOTHING, Stopped, Watch
from leap_dist.zero.engine import describe_gates, gather_masks, gather_weights, settle
from leap_dist.zero.ranks import Ranks, torch_linear_put_back

MAKE_ROOM = "make room, and start the same command again: it resumes from the last checkpoint, if one was written"


@torch_linear_put_back()  # the next job in this process may have another stage
def run_job(config: JobConfig, output: Path, resume: bool, ranks: Ranks, watch: Watch = NOTHING) -> dict[str, Any]:
    """Run a job into the folder `output`; returns the certificate (on rank 0; {} on the others).

    A folder that holds an unfinished run of this job is resumed; `resume` asks for one.
    Raises UserError, with nothing written, for what the user has to mend; Stopped and Interrupted if `watch` says so.
    """
    if ranks.on_first(lambda: completed(output, config, ranks.world_size)):
        return json.loads((output / CERTIFICATE).read_text("utf-8")) if ranks.first else {}
    resumes = ranks.on_first(lambda: check_output(output, resume, config, ranks.world_size))
    torch.manual_seed(config.train.seed)
    trains = config.leap.mode == "train"
    saved = resumes and ranks.on_first(lambda: latest_checkpoint(output / CHECKPOINTS) is not None)
    beside = trains and config.train.dense_reference and not saved
    reference = {"dense_reference": dense_reference(config, output, ranks, watch)} if beside else {}
    job = build_job(config, ranks, watch, output if resumes else None)
    job.state.measured |= reference
    try:
        return _run(job, output, resumes)
    finally:
        let_go(job)


def _run(job: Job, output: Path, resumes: bool) -> dict[str, Any]:
    """The job from where it stands to its certificate."""
    config, ranks, state = job.config, job.ranks, job.state
    trains = config.leap.mode == "train"
    checkpoints = Checkpoints(output / CHECKPOINTS, ranks, config.train.keep_checkpoints)
    run_id = resume_from_newest(job, checkpoints) if resumes and trains else None
    settings = as_logged(job.config, ranks.world_size)
    if ranks.first and job.engine.leap.why_start:
        console().print(describe_start(job.engine.leap.config, job.engine.leap.why_start), markup=False, soft_wrap=True)
    tags = tags_of(job, output) if ranks.first else {}
    with (
        Tracker(config.tracking, settings, ranks.first, run_id, tags, folder=output) as tracker,
        prepared(output, settings, state.start, config.data) if ranks.first else nullcontext() as writer,
    ):
        try:
            if ranks.first:
                save_orders(output, job.orders)
            tracker.datasets(config.data, job.task)
            with Heartbeats(output / RANKS, ranks, config.train.collective_timeout) as heartbeats:
                state.heartbeats = heartbeats
                if trains:
                    train(job, tracker, output, checkpoints, writer)
                else:
                    prepare_one_shot(job)
                certificate = _finish(job, output, writer)
        except (Stopped, Interrupted):
            tracker.finish("KILLED")
            raise
        if ranks.first:
            record_end(tracker, output, job.total_steps, state.measured, certificate, leap_ms(job))
            for done in (CHECKPOINTS, REFERENCE):
                shutil.rmtree(output / done, ignore_errors=True)
            print_summary(job, certificate, output)
            for path in writer.page() if writer else ():
                tracker.artifact(path)
    return certificate


def _finish(job: Job, output: Path, writer: FolderWriter | None) -> dict[str, Any]:
    """Evaluate the pruned model, export it, and certify the exported files. `writer`: the first rank's."""
    engine, ranks, leap = job.engine, job.ranks, job.engine.leap
    ranks.on_first(writer.check if writer else lambda: None)
    settle(engine)
    once = job.config.leap.mode == "one_shot"  # nothing of it is saved: it need not be finished first
    heed = (lambda: leave_if_asked(job)) if once else (lambda: None)
    job.state.measured["pruned"] = evaluate(engine, job.task, job.config.train.eval_batch_size, ranks, heed)
    _save(job, output / MODEL)
    hidden: dict[str, Tensor] = {}
    counts = cert.count(output / MODEL, gather_masks(engine), describe_gates(leap), ranks.rank, hidden)
    gates = score_histograms(leap.gating, leap.kept_units)
    if writer is None:
        return {}
    writer.text(SCORES, json.dumps({"reach": REACH, "gates": gates}) + "\n")
    if hidden:
        with needed(output / HIDDEN, MAKE_ROOM), replacing(output / HIDDEN) as partial:
            save_file(hidden, partial)
    described = leap.measure.described()
    certificate = cert.build(
        counts,
        target=leap.measure.target,
        unit=leap.measure.largest(leap.plan),
        measure=described.get("measure"),
        metrics=job.state.measured,
        seed=job.config.train.seed,
        note=leap.level.note(amounts(counts, described.get("measure"))[0]),
        permuted=order_of(engine.module) or bool(leap.level.fixed and leap.level.fixed.order is None),
    )
    with needed(output / CERTIFICATE, MAKE_ROOM):
        cert.write(output / CERTIFICATE, certificate)
    return certificate


def _save(job: Job, folder: Path) -> None:
    """Write the model. Raises UserError on every rank if the first one could not."""
    problem: list[UserError] = []
    try:
        with needed(folder, MAKE_ROOM):
            save_model(job.engine.module, gather_weights(job.engine), folder, job.tokenizer, job.ranks.rank)
    except UserError as error:
        problem.append(error)

    def tell() -> None:
        for error in problem:
            raise error

    job.ranks.on_first(tell)
