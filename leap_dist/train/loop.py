"""The main job: dense -> prune -> settle, evaluated dense and pruned, exported and certified."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from leap_dist.checkpoint.checkpoints import Checkpoints
from leap_dist.checkpoint.folders import latest_checkpoint
from leap_dist.config.leap import LeapConfig
from leap_dist.config.sections import JobConfig
from leap_dist.console import console
from leap_dist.core.gates import pattern_of
from leap_dist.core.histograms import REACH, score_histograms
from leap_dist.core.measure import amounts
from leap_dist.errors import UserError
from leap_dist.export import certificate as cert
from leap_dist.export.hf import save_model
from leap_dist.files import replacing
from leap_dist.models.inputs import describe_start
from leap_dist.models.permute import order_of
from leap_dist.run_folder import CERTIFICATE, CHECKPOINTS, HIDDEN, MODEL, RANKS, SCORES
from leap_dist.tracking.mlflow import Tracker, check_store_answers
from leap_dist.tracking.records import record_end
from leap_dist.train.evaluate import evaluate
from leap_dist.train.folder_writer import FolderWriter, needed
from leap_dist.train.guards import BadSteps, Heartbeats, spoiled
from leap_dist.train.job import Job, build_job
from leap_dist.train.meter import Meter
from leap_dist.train.one_shot import prepare_one_shot, show_inputs, start_heads
from leap_dist.train.output import as_logged, check_output, completed, prepared
from leap_dist.train.progress import Progress
from leap_dist.train.reorder import save_orders
from leap_dist.train.saving import Saver, read_progress
from leap_dist.train.signals import Interrupted
from leap_dist.train.summary import leap_ms, print_summary, tags_of
from leap_dist.train.watch import NOTHING, Stopped, Watch, rungs
from leap_dist.zero.engine import describe_gates, destroy, gather_masks, gather_weights, settle
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
    reference: dict[str, dict[str, float]] = {}
    if trains and config.train.dense_reference and not saved:
        # what is refused is known before the reference has trained for long; a search for an order takes minutes itself
        leap = config.leap.model_copy(update={"permute": None})
        _let_go(build_job(config.model_copy(update={"leap": leap}), ranks, watch))
        ranks.on_first(lambda: check_store_answers(config.tracking))
        reference = _dense_reference(config, ranks, watch)
    job = build_job(config, ranks, watch)
    job.state.measured |= reference
    try:
        return _run(job, output, resumes)
    finally:
        _let_go(job)


def _let_go(job: Job) -> None:
    """Of its engines, which would stay in memory: this process may run other jobs."""
    destroy(job.engine)
    if job.distiller is not None and isinstance(job.distiller.teacher, type(job.engine)):
        destroy(job.distiller.teacher)


def _run(job: Job, output: Path, resumes: bool) -> dict[str, Any]:
    """The job from where it stands to its certificate."""
    config, ranks, state = job.config, job.ranks, job.state
    trains = config.leap.mode == "train"
    checkpoints = Checkpoints(output / CHECKPOINTS, ranks, config.train.keep_checkpoints)
    found, run_id = checkpoints.load(job.engine) if resumes and trains else None, None
    if found is not None:
        progress = read_progress(found, job.engine.leap.num_steps, job.phases.dense_end, job.before)
        state.start, state.measured, state.left_out = progress.step, dict(progress.measured), progress.left_out
        run_id = progress.run_id
        job.batches.resume(progress.stream)
    settings = as_logged(job.config, ranks.world_size)
    if ranks.first and job.engine.leap.why_start:
        console().print(describe_start(job.engine.leap.config, job.engine.leap.why_start), markup=False, soft_wrap=True)
    tags = tags_of(job, output) if ranks.first else {}
    with (
        Tracker(config.tracking, settings, ranks.first, run_id, tags, folder=output) as tracker,
        prepared(output, settings, state.start) if ranks.first else nullcontext() as writer,
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
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
            print_summary(job, certificate, output)
            for path in writer.page() if writer else ():
                tracker.artifact(path)
    return certificate


def train(
    job: Job,
    tracker: Tracker,
    output: Path | None,
    checkpoints: Checkpoints | None,
    writer: FolderWriter | None = None,
) -> None:
    """All steps that are left. With an output folder checkpoints go there; metrics by the first rank's `writer`."""
    config, ranks, state = job.config.train, job.ranks, job.state
    check = writer.check if writer else lambda: None
    saver = Saver(job.engine, ranks, config, job.watch, checkpoints, state.start, job.total_steps, check)
    meter = Meter(ranks, state.start)
    asked = rungs(job.phases.dense_end, job.phases.settle_start, job.total_steps)
    bad = BadSteps(job.engine, config.max_bad_steps, state.left_out)
    job.engine.train()  # with dropout, from the first step and after a resume: models from files come without
    if state.start == 0:
        start_heads(job)
    if state.start == job.phases.dense_end == 0:
        show_inputs(job)
    with Progress(job.total_steps, enabled=ranks.first, start=state.start) as progress:
        for step in range(state.start, job.total_steps):
            if step == job.phases.dense_end and job.before not in state.measured:
                state.measured[job.before] = evaluate(job.engine, job.task, config.eval_batch_size, ranks)
            if step in asked and job.watch.may_go_on is not None:
                _ask(job, asked[step], job.watch.may_go_on)
            phase = job.engine.leap.phase
            loss = _train_step(job, step, meter)
            done = step + 1
            if bad.after(loss):
                saver.wait()
                raise UserError(bad.message(done, output and latest_checkpoint(output / CHECKPOINTS)))
            state.left_out = bad.total
            if done % config.log_every == 0 or done == job.total_steps:
                fields = _log_step(job, done, phase, loss, meter, tracker, writer)
                progress.update(done, phase if job.config.leap.target != 1.0 else "dense", fields)
            kept = {"measured": state.measured, "run_id": tracker.run_id, "left_out": state.left_out}
            if saver.after(done, loss, kept | ({"stream": job.batches.state} if job.batches.state else {})):
                tracker.checkpoint()
            if state.heartbeats is not None:
                state.heartbeats.step = done
    saver.wait()


def _ask(job: Job, rung: int, may_go_on: Callable[[int, Mapping[str, float]], bool]) -> None:
    """Raises Stopped on every rank if the answer is no."""
    metrics = evaluate(job.engine, job.task, job.config.train.eval_batch_size, job.ranks)
    if not job.ranks.on_first(lambda: may_go_on(rung, metrics)):
        raise Stopped(metrics)


def _train_step(job: Job, step: int, meter: Meter) -> torch.Tensor:
    """One optimizer step; the mean loss over its micro-batches on this rank, detached."""
    batches = job.batches.step(step)
    total = torch.zeros((), device=job.ranks.device)
    for batch in batches:
        loss = _loss(job, batch)
        job.engine.backward(spoiled(loss))
        job.engine.step()
        total += loss.detach().float()
        meter.count(batch)
    return total / len(batches)


def _loss(job: Job, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Of one micro-batch: the teacher's, that of words by chunks, or the model's own."""
    if job.distiller:
        return job.distiller.loss(batch)
    if job.words and job.words.fits(batch):
        return job.words.loss(batch)[0]
    loss: torch.Tensor = job.engine(**batch).loss
    return loss


def _log_step(
    job: Job, step: int, phase: str, loss: torch.Tensor, meter: Meter, tracker: Tracker, writer: FolderWriter | None
) -> dict[str, float]:
    """Gather and write the measures of a step; returns what the progress line shows."""
    measured = job.engine.leap.measures()
    values = {"loss": job.ranks.mean(loss).item(), "lr": job.engine.leap.param_groups[0]["lr"], **measured}
    values |= {"left_out_steps": job.state.left_out, **meter.read(step)}
    if phase == "prune":
        job.state.costs.append({key: value for key, value in measured.items() if key.startswith("leap_")})
    if job.distiller:
        values |= {name: job.ranks.mean(part).item() for name, part in job.distiller.parts.items()}
    if job.watch.notify is not None:
        job.watch.notify(step, job.total_steps, values)
    if writer is not None:
        writer.metrics({"step": step, "phase": phase, **values})
        tracker.log(step, values)
    line = {"loss": values["loss"]}
    if job.config.leap.target == 1.0:
        return line  # nothing is pruned, and the rest stands still
    line |= {"R": measured["remaining"], "target": measured["level"], "density": measured["density"]}
    return line | ({"λ": measured["lambda"]} if "lambda" in measured else {})


def _finish(job: Job, output: Path, writer: FolderWriter | None) -> dict[str, Any]:
    """Evaluate the pruned model, export it, and certify the exported files. `writer`: the first rank's."""
    engine, ranks, leap = job.engine, job.ranks, job.engine.leap
    ranks.on_first(writer.check if writer else lambda: None)
    settle(engine)
    job.state.measured["pruned"] = evaluate(engine, job.task, job.config.train.eval_batch_size, ranks)
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


def _dense_reference(config: JobConfig, ranks: Ranks, watch: Watch) -> dict[str, dict[str, float]]:
    """The metrics of a run of the same length and seed in which nothing is pruned."""
    if ranks.first:
        console().print("dense reference: a run of the same length without pruning", markup=False)
    plain = dict.fromkeys(("start", "prior_mask", "permute"))
    gates = tuple(gate for gate in config.leap.gates if pattern_of(gate.granularity) is None)  # n of m is never all
    whole = gates or LeapConfig.model_fields["gates"].default
    trained = {"target": 1.0, "weights": "trained", "rule": "leap", "gates": whole, **plain}
    dense = config.model_copy(update={"leap": config.leap.model_copy(update=trained)})
    job = build_job(dense, ranks, Watch(asked=watch.asked))
    train(job, Tracker(config.tracking, {}, enabled=False), output=None, checkpoints=None)
    metrics = evaluate(job.engine, job.task, config.train.eval_batch_size, ranks)
    _let_go(job)
    return {"dense_reference": metrics}
