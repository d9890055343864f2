"""The optimizer steps of a run: trained, logged, saved, and compared with other runs at rungs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from leap_dist.checkpoint.checkpoints import Checkpoints
from leap_dist.checkpoint.folders import latest_checkpoint
from leap_dist.errors import UserError
from leap_dist.ops.words import IGNORED
from leap_dist.run_folder import CHECKPOINTS
from leap_dist.tracking.mlflow import Tracker
from leap_dist.train.evaluate import evaluate
from leap_dist.train.folder_writer import FolderWriter
from leap_dist.train.guards import BadSteps, spoiled
from leap_dist.train.job import Job
from leap_dist.train.meter import Meter
from leap_dist.train.one_shot import show_inputs, start_heads
from leap_dist.train.progress import Progress
from leap_dist.train.saving import Saver, read_progress
from leap_dist.train.watch import Stopped, rungs


def resume_from_newest(job: Job, checkpoints: Checkpoints) -> str | None:
    """Put the newest checkpoint, if there is one, into a job; returns the MLflow run that it continues."""
    found = checkpoints.load(job.engine)
    if found is None:
        return None
    progress = read_progress(found, job.engine.leap.num_steps, job.phases.dense_end, job.before)
    job.state.start, job.state.measured = progress.step, dict(progress.measured)
    job.state.left_out = progress.left_out
    job.batches.resume(progress.stream)
    return progress.run_id


def train(
    job: Job,
    tracker: Tracker,
    output: Path,
    checkpoints: Checkpoints,
    writer: FolderWriter | None = None,
) -> None:
    """All steps that are left, with checkpoints in the run folder `output`; metrics by the first rank's `writer`."""
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
                raise UserError(bad.message(done, latest_checkpoint(output / CHECKPOINTS)))
            state.left_out = bad.total
            if done % config.log_every == 0 or done == job.total_steps:
                fields = _log_step(job, done, phase, loss, meter, tracker, writer)
                progress.update(done, phase if job.config.leap.target != 1.0 else "dense", fields)
            if saver.after(done, loss, _kept(job, tracker)):
                tracker.checkpoint()
            if state.heartbeats is not None:
                state.heartbeats.step = done
    saver.end(_kept(job, tracker))


def _kept(job: Job, tracker: Tracker) -> dict[str, Any]:
    """What a checkpoint holds beside the engine."""
    state, stream = job.state, job.batches.state
    kept = {"measured": state.measured, "run_id": tracker.run_id, "left_out": state.left_out}
    return kept | ({"stream": stream} if stream else {})


def _ask(job: Job, rung: int, may_go_on: Callable[[int, Mapping[str, float]], bool]) -> None:
    """Raises Stopped on every rank if the answer is no."""
    metrics = evaluate(job.engine, job.task, job.config.train.eval_batch_size, job.ranks)
    if not job.ranks.on_first(lambda: may_go_on(rung, metrics)):
        raise Stopped(metrics)


def _train_step(job: Job, step: int, meter: Meter) -> torch.Tensor:
    """One optimizer step; this rank's part of its loss, detached: the mean over ranks is that of the step."""
    batches = job.batches.step(step)
    total = torch.zeros((), device=job.ranks.device)
    for batch, share in zip(batches, _shares(job, batches), strict=True):
        loss = _loss(job, batch) * share
        job.engine.backward(spoiled(loss))
        job.engine.step()
        total += loss.detach().float()
        meter.count(batch)
    return total / len(batches)


def _shares(job: Job, batches: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    """What each micro-batch's loss counts, fp32: its words with a label over those of an average one on all ranks.

    So a step's loss is the mean over its words, however it is cut; where all micro-batches have as many these are ones.
    """
    if job.words is None:
        return torch.ones(len(batches), device=job.ranks.device)
    first = int(job.words.causal)  # the first word is nobody's to predict
    counts = torch.stack([(batch["labels"][:, first:] != IGNORED).sum() for batch in batches]).double()
    return (counts / job.ranks.mean(counts.mean()).clamp(min=1e-9)).float()


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
