"""The main job: dense -> prune -> settle, evaluated dense and pruned, exported and certified."""

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from leap_dist.config import JobConfig, ModelConfig
from leap_dist.core.stopwatch import TIMINGS
from leap_dist.errors import UserError
from leap_dist.export import certificate as cert
from leap_dist.export.hf import save_model
from leap_dist.export.latency import machine
from leap_dist.export.run_folder import CERTIFICATE, MODEL, RESOLVED
from leap_dist.models.load import load_config, load_model, load_tokenizer
from leap_dist.tasks import load_task, needs_tokenizer
from leap_dist.tasks.base import Task
from leap_dist.tracking.mlflow import Tracker, differing, parameters
from leap_dist.train.batches import Batches
from leap_dist.train.distill import Distiller, check_teacher, head_gates, match_layers
from leap_dist.train.evaluate import evaluate
from leap_dist.train.progress import Progress, console, summary_table
from leap_dist.train.watch import NOTHING, Stopped, Watch
from leap_dist.zero.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from leap_dist.zero.engine import describe_gates, gather_masks, gather_weights, initialize, settle
from leap_dist.zero.ranks import Ranks, torch_linear_put_back
from leap_dist.zero.teacher import host_teacher

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
FREE_TO_CHANGE = ("tracking.", "train.checkpoint_every", "train.log_every", "leap.total_steps")


@dataclass
class Job:
    """A validated job with everything it needs built: model hosted, data ready, nothing written yet."""

    config: JobConfig
    ranks: Ranks
    task: Task
    tokenizer: Any
    engine: Any
    batches: Batches
    total_steps: int
    distiller: Distiller | None = None
    watch: Watch = NOTHING
    start: int = 0
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # metrics by name: dense, pruned, ...
    costs: list[dict[str, float]] = field(default_factory=list)  # of the prune phase's steps that were logged

    @property
    def phases(self) -> Any:
        """The schedule of the run's phases."""
        return self.engine.leap.schedule


@torch_linear_put_back()  # the next job in this process may have another stage
def run_job(config: JobConfig, output: Path, resume: bool, ranks: Ranks, watch: Watch = NOTHING) -> dict[str, Any]:
    """Run a job into the folder `output`; returns the certificate (on rank 0; {} on the others).

    Raises UserError, with nothing written, for what the user has to mend; Stopped if `watch` says so.
    """
    checkpoint = ranks.on_first(lambda: _check_output(output, resume, config))
    torch.manual_seed(config.train.seed)
    reference = _dense_reference(config, ranks) if config.train.dense_reference else {}
    job = build_job(config, ranks)
    job.watch = watch
    run_id = None
    job.measured |= reference
    if checkpoint is not None:
        progress = load_checkpoint(job.engine, checkpoint, ranks)
        job.start, job.measured, run_id = progress["step"], progress["measured"], progress["run_id"]
    resolved = job.config.resolved()
    tags = _tags(job, output) if ranks.first else {}
    with Tracker(config.tracking, resolved, enabled=ranks.first, run_id=run_id, tags=tags) as tracker:
        if ranks.first:
            _prepare_output(output, resolved, job.start)
        try:
            train(job, tracker, output)
        except Stopped:
            tracker.finish("KILLED")
            raise
        certificate = _finish(job, output)
        if ranks.first:
            tracker.log(job.total_steps, _flat(job.measured) | _ending(job, certificate))
            tracker.artifact(output / CERTIFICATE)
            tracker.artifact(output / RESOLVED)
            _report(job, certificate, output)
    return certificate


def build_job(config: JobConfig, ranks: Ranks) -> Job:
    """Load data, tokenizer and model, and let DeepSpeed host the model."""
    tokenizer = load_tokenizer(config.model, config.data.tokenizer) if needs_tokenizer(config.data.task) else None
    task = ranks.first_then_rest(lambda: load_task(config.data, tokenizer))
    micro = config.deepspeed["train_micro_batch_size_per_gpu"]
    accumulation = _accumulation(config.deepspeed, ranks.world_size)
    batches = Batches(task, micro, accumulation, config.train.seed, ranks)
    total = config.train.max_steps or max(1, round((config.train.epochs or 0) * batches.steps_per_epoch))
    if total < 10:
        raise UserError(f"train: {total} optimizer steps are too few for three phases; allowed: at least 10")
    config = config.model_copy(update={"leap": config.leap.model_copy(update={"total_steps": total})})
    torch.manual_seed(config.train.seed)
    model = load_model(config.model, task)
    teacher = _load_teacher(config, task, model) if config.distill else None
    scheduler = None if "scheduler" in config.deepspeed else _linear_schedule(total, config.train.warmup_fraction)
    engine, *_ = initialize(model=model, config=config.resolved(), lr_scheduler=scheduler)
    distiller = _distiller(config, task, engine, teacher) if config.distill else None
    torch.manual_seed(config.train.seed + 1 + ranks.rank)  # dropout differs between ranks
    return Job(config, ranks, task, tokenizer, engine, batches, total, distiller)


def _load_teacher(config: JobConfig, task: Task, model: Any) -> Any:
    """The dense model that teaches; attention of both runs unfused where it is compared."""
    assert config.distill is not None
    name = config.distill.teacher
    if name == "self":
        teacher = copy.deepcopy(model)
    else:
        try:
            check_teacher(name, model.config, load_config(name))
            teacher = load_model(ModelConfig(name=name), task)
        except UserError as error:  # of a model as such; here it is the teacher's
            raise UserError(str(error).replace("model.name", "distill.teacher")) from error
    if config.distill.attention_weight:
        for either in (model, teacher):
            either.set_attn_implementation("eager")
    return teacher


def _distiller(config: JobConfig, task: Task, engine: Any, teacher: Any) -> Distiller:
    assert config.distill is not None
    student = engine.module
    layers = match_layers(config.distill, student.config, teacher.config)
    heads = head_gates(student, engine.leap.plan, config.family, len(layers))
    return Distiller(config.distill, host_teacher(teacher, engine), engine, task, layers, heads)


def _accumulation(deepspeed: Mapping[str, Any], world_size: int) -> int:
    """Micro-batches in an optimizer step, as DeepSpeed takes them: as given, or what fills train_batch_size."""
    for key in ("gradient_accumulation_steps", "train_batch_size"):
        value = deepspeed.get(key, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{key}: got {value!r}; allowed: an integer >= 1")
    filled = deepspeed.get("train_batch_size", 1) // (deepspeed["train_micro_batch_size_per_gpu"] * world_size)
    accumulation: int = deepspeed.get("gradient_accumulation_steps", max(1, filled))
    return accumulation


def train(job: Job, tracker: Tracker, output: Path | None) -> None:
    """All steps that are left. With an output folder, metrics and checkpoints go there."""
    log_every = job.config.train.log_every
    with Progress(job.total_steps, enabled=job.ranks.first, start=job.start) as progress:
        for step in range(job.start, job.total_steps):
            if step == job.phases.dense_end and "dense" not in job.measured:
                job.measured["dense"] = evaluate(job.engine, job.task, job.config.train.eval_batch_size, job.ranks)
            if step == job.phases.settle_start and job.watch.goes_on is not None:
                _ask(job, job.watch.goes_on)
            phase = job.engine.leap.phase
            loss = _train_step(job, step)
            done = step + 1
            if done % log_every == 0 or done == job.total_steps:
                fields = _log_step(job, done, phase, loss, tracker, output)
                progress.update(done, phase, fields)
            if output is not None and done < job.total_steps:
                _save(job, tracker.run_id, output, done)


def _ask(job: Job, goes_on: Callable[[Mapping[str, float]], bool]) -> None:
    """Raises Stopped on every rank if the answer is no."""
    metrics = evaluate(job.engine, job.task, job.config.train.eval_batch_size, job.ranks)
    if not job.ranks.on_first(lambda: goes_on(metrics)):
        raise Stopped(metrics)


def _save(job: Job, run_id: str | None, output: Path, done: int) -> None:
    """The checkpoints that are due after `done` steps. Those that stay are no part of this MLflow run."""
    state = {"step": done, "measured": job.measured}
    if done in job.watch.snapshots:
        save_checkpoint(job.engine, job.watch.snapshots[done], job.ranks, {**state, "run_id": None})
    every = job.config.train.checkpoint_every
    if every is None and job.watch.num_checkpoints is not None:
        every = -(-job.total_steps // job.watch.num_checkpoints)
    if every is not None and done % every == 0:
        save_checkpoint(job.engine, output / CHECKPOINTS, job.ranks, {**state, "run_id": run_id})


def _train_step(job: Job, step: int) -> torch.Tensor:
    """One optimizer step; the mean loss over its micro-batches on this rank, detached."""
    batches = job.batches.step(step)
    total = torch.zeros((), device=job.ranks.device)
    for batch in batches:
        loss = job.distiller.loss(batch) if job.distiller else job.engine(**batch).loss
        job.engine.backward(loss)
        job.engine.step()
        total += loss.detach().float()
    return total / len(batches)


def _log_step(
    job: Job, step: int, phase: str, loss: torch.Tensor, tracker: Tracker, output: Path | None
) -> dict[str, float]:
    """Gather and write the measures of a step; returns what the progress line shows."""
    report = job.engine.leap.report()
    values = {"loss": job.ranks.mean(loss).item(), "lr": job.engine.leap.param_groups[0]["lr"], **report}
    if phase == "prune":
        job.costs.append({key: value for key, value in report.items() if key.startswith("leap_")})
    if job.distiller:
        values |= {name: job.ranks.mean(part).item() for name, part in job.distiller.parts.items()}
    if job.watch.told is not None:
        job.watch.told(step, job.total_steps, values)
    if job.ranks.first and output is not None:
        with (output / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "phase": phase, **values}) + "\n")
        tracker.log(step, values)
    shown = {
        "loss": values["loss"],
        "R": report["remaining"],
        "target": report["level"],
        "density": report["density"],
    }
    return shown | ({"λ": report["lambda"]} if "lambda" in report else {})


def _finish(job: Job, output: Path) -> dict[str, Any]:
    """Evaluate the pruned model, export it, and certify the exported files."""
    engine, ranks, leap = job.engine, job.ranks, job.engine.leap
    settle(engine)
    job.measured["pruned"] = evaluate(engine, job.task, job.config.train.eval_batch_size, ranks)
    save_model(engine.module, gather_weights(engine), output / MODEL, job.tokenizer, ranks.rank)
    counts = cert.count(output / MODEL, gather_masks(engine), describe_gates(leap), ranks.rank)
    if not ranks.first:
        return {}
    certificate = cert.build(
        counts,
        target=leap.config.target,
        unit=leap.plan.unit,
        metrics=job.measured,
        seed=job.config.train.seed,
    )
    cert.write(output / CERTIFICATE, certificate)
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    return certificate


def _dense_reference(config: JobConfig, ranks: Ranks) -> dict[str, dict[str, float]]:
    """The metrics of a run of the same length and seed in which nothing is pruned."""
    if ranks.first:
        console().print("dense reference: a run of the same length without pruning", markup=False)
    dense = config.model_copy(update={"leap": config.leap.model_copy(update={"target": 1.0})})
    job = build_job(dense, ranks)
    train(job, Tracker(config.tracking, {}, enabled=False), output=None)
    metrics = evaluate(job.engine, job.task, config.train.eval_batch_size, ranks)
    job.engine.destroy()
    return {"dense_reference": metrics}


def _linear_schedule(total: int, warmup_fraction: float) -> Any:
    """Linear warm-up, then linear decay to zero at the last step, for any optimizer."""
    warmup = round(total * warmup_fraction)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (total - step) / max(total - warmup, 1)

    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def _check_output(output: Path, resume: bool, config: JobConfig) -> Path | None:
    """The checkpoint to go on from, None for a new run. Raises UserError if the folder does not allow it."""
    if not resume:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(
                f"--output: {output} exists; choose another folder, remove it, or go on with --resume if it "
                "holds an unfinished run"
            )
        place = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise UserError(f"--output: {output} cannot be made: {place} is no folder that can be written to")
        return None
    if (output / CERTIFICATE).is_file():
        raise UserError(f"--resume: the run in {output} is finished; its result is in {output / CERTIFICATE}")
    checkpoint = latest_checkpoint(output / CHECKPOINTS)
    if checkpoint is None:
        raise UserError(
            f"--resume: there is no checkpoint in {output / CHECKPOINTS}; start without --resume, "
            "with train.checkpoint_every set"
        )
    _check_same_job(output, config)
    return checkpoint


def _check_same_job(output: Path, config: JobConfig) -> None:
    """A run goes on as the job that it was started as; settings of FREE_TO_CHANGE do not matter to it."""
    before = parameters(json.loads((output / RESOLVED).read_text(encoding="utf-8")))
    now = parameters(config.resolved())
    changed = [
        f"--resume: {key} is {now.get(key, 'missing')}, but was {before.get(key, 'missing')} when the run in {output} "
        "was started; set it back, or start a new run"
        for key in differing(before, now)
        if not key.startswith(FREE_TO_CHANGE)
    ]
    if changed:
        raise UserError("\n  ".join(changed))


def _prepare_output(output: Path, resolved: Mapping[str, Any], start: int) -> None:
    """Make the run folder, or cut the metrics of a resumed run back to its checkpoint."""
    output.mkdir(parents=True, exist_ok=True)
    (output / RESOLVED).write_text(json.dumps(resolved, indent=2) + "\n", encoding="utf-8")
    metrics = output / METRICS
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= start]
        metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _flat(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {f"{name}_{metric}": value for name, values in measured.items() for metric, value in values.items()}


def _tags(job: Job, output: Path) -> dict[str, str]:
    """What runs are told apart by in MLflow, beside their parameters. The first rank's."""
    here, device = machine(), job.ranks.device
    found = {
        "commit": here["commit"] or "unknown",
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else here["processor"],
        "folder": str(output.resolve()),
        "ranks": job.ranks.world_size,
        "zero_stage": job.engine.zero_optimization_stage(),
        "rule": job.config.leap.rule,
        "gates": " + ".join(gate.granularity for gate in job.config.leap.gates),
        "metric": job.task.primary,
    }
    found |= {f"version.{name}": version or "not installed" for name, version in cert.versions().items()}
    return {f"leap.{name}": str(value) for name, value in found.items()}


def _ending(job: Job, certificate: Mapping[str, Any]) -> dict[str, float]:
    """What a finished run is compared by, beside its metrics: what is left, and what LEAP took of a pruning step."""
    left = {
        "pruned_density": certificate["density"],
        "kept_weights": certificate["kept"],
        "prunable_weights": certificate["prunable"],
    }
    if job.costs:
        left["leap_ms"] = sum(cost[name] for cost in job.costs for name in TIMINGS) / len(job.costs)
    return left


def _report(job: Job, certificate: Mapping[str, Any], output: Path) -> None:
    """The table at the end."""
    primary = job.task.primary
    rows: list[dict[str, str | float]] = []
    for name, metrics in job.measured.items():
        density = certificate["density"] if name == "pruned" else 1.0
        kept = certificate["kept"] if name == "pruned" else certificate["prunable"]
        rows.append({"model": name, "density": density, "weights": kept, primary: metrics[primary]})
    summary_table(rows, title=f"{job.task.name}, target density {certificate['target']}")
    if job.costs:
        console().print(_cost_line(job.costs), markup=False, soft_wrap=True)
    console().print(f"certificate and model: {output}", markup=False)


def _cost_line(costs: list[dict[str, float]]) -> str:
    """What LEAP cost in a step of the prune phase, a mean over those that were logged."""
    mean = {key: sum(cost[key] for cost in costs) / len(costs) for key in costs[0]}
    parts = ", ".join(f"{name.removeprefix('leap_ms_')} {mean[name]:.3g}" for name in TIMINGS)
    sent = f"{mean['leap_collectives']:.3g} collectives of {mean['leap_bytes_communicated'] / 1e3:.3g} kB"
    return f"LEAP's step: ms {parts}; {sent}; {mean['leap_extra_bytes'] / 1e6:.3g} MB more state on a rank than AdamW"
