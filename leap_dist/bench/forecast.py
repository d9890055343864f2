"""The forecast of a job: what it prunes, what it takes of every rank and of the network, and where it fits.

The model is built on the meta device from its config alone, so that 70 billion parameters need no more than a laptop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from leap_dist.bench.activations import activation_bytes, word_bytes
from leap_dist.bench.budget import (
    FP32,
    Hosting,
    Memory,
    Traffic,
    engine_traffic,
    leap_traffic,
    memory,
    state_bytes,
    total,
)
from leap_dist.config.leap import LeapConfig
from leap_dist.config.sections import JobConfig, ModelConfig
from leap_dist.console import console, summary_table
from leap_dist.core.closed_form import closed_form
from leap_dist.core.gates import GatePlan
from leap_dist.core.measure import check_reachable, fewest_units, most_units
from leap_dist.errors import UserError, own_words
from leap_dist.models.inputs import describe_start, resolve_start
from leap_dist.models.load import auto_class, check_positions, load_config, load_model
from leap_dist.models.measure import measure_of
from leap_dist.models.padding import num_positions
from leap_dist.models.plan import prior_of, start_plan
from leap_dist.tasks import problem_of
from leap_dist.tasks.base import Task
from leap_dist.tasks.glue import GLUE
from leap_dist.train.batches import accumulation
from leap_dist.train.syntax import gates_by_layer, load_parser
from leap_dist.zero.refusals import check_engine_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GPU = 80 * 10**9  # bytes of the GPU that the forecast counts in
MOST_RANKS = 2**20
MUCH = 0.01  # of the gradients' bytes: where those of units take more, coarser gates are advised
TWO = ("0", "1")
WORDS = ("causal_lm", "masked_lm")  # problems whose blocks of text have data.max_length tokens, all of them predicted
FLOAT = torch.float32
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Passes:
    """What the passes of a micro-batch hold beside the weights, in bytes; `said`: of what, and what is not counted."""

    activations: int
    logits: int
    said: str

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.logits


@dataclass(frozen=True)
class Forecast:
    """A job's model on the meta device, its gates and its hosting."""

    config: JobConfig
    model: PreTrainedModel
    plan: GatePlan
    hosting: Hosting
    why_start: str = ""

    @cached_property
    def passes(self) -> Passes:
        """What a micro-batch takes beside the weights. A forward pass of the whole model, so only where it is asked."""
        return passes_of(self.config, self.model, self.hosting)

    def at(self, ranks: int) -> Forecast:
        """The same on another number of ranks."""
        return replace(self, hosting=Hosting.of(self.config.deepspeed, ranks))

    def memory(self, ranks: int, stage: int, dense: bool = False) -> Memory:
        """Bytes on one rank, with other ranks or another stage; dense: of AdamW on all weights."""
        leap = self.config.leap.model_copy(update={"weights": "trained"}) if dense else self.config.leap
        return self._with_teacher(
            None if dense else self.plan, Hosting.of(self.config.deepspeed, ranks).at(stage), leap
        )

    @property
    def plain(self) -> Memory:
        """Bytes of AdamW as this job has it, on weights that may be frozen."""
        return self._with_teacher(None, self.hosting, self.config.leap)

    def _with_teacher(self, plan: GatePlan | None, hosting: Hosting, leap: LeapConfig) -> Memory:
        """Its weights are frozen, in the model's precision, and under stage 3 sharded as these."""
        found = memory(self.model, plan, hosting, leap)
        parts = hosting.ranks if hosting.stage == 3 else 1
        return replace(found, weights=found.weights + -(-self.teacher // parts) * hosting.width)

    @cached_property
    def teacher(self) -> int:
        """Parameters of the teacher, 0 where there is none."""
        distill = self.config.distill
        if distill is None or self.one_shot:
            return 0
        own = self.config.model if distill.teacher == "self" else ModelConfig(name=distill.teacher)
        try:
            return sum(p.numel() for p in empty_model(own, self.config.data.task).parameters())
        except UserError as error:
            raise UserError(str(error).replace("model.name", "distill.teacher")) from error

    @property
    def one_shot(self) -> bool:
        """Whether the job takes no training step."""
        return self.config.leap.mode == "one_shot"

    def gpus(self, stage: int, dense: bool = False) -> int | None:
        """The fewest GPUs whose memory holds a rank each; None if no number does."""
        offloads = self.hosting.offloads
        room = GPU - self.passes.total
        return fewest(lambda ranks: self.memory(ranks, stage, dense).on_device(offloads) <= room)


def forecast(config: JobConfig, ranks: int) -> Forecast:
    """The forecast of a job on so many ranks. Raises UserError for what the job would be refused for."""
    if ranks < 1:
        raise UserError(f"--plan: got {ranks}; allowed: a number of ranks >= 1")
    accumulation(config.deepspeed, ranks)
    hosting = Hosting.of(config.deepspeed, ranks)
    model = empty_model(config.model, config.data.task)
    if problem_of(config.data.task) in WORDS:
        check_positions(model.config, config.data.task, config.data.max_length)
    check_engine_config(config.resolved(), model, None, None, None, None, planned=True)
    plan, fixed = start_plan(model, config.leap, config.family)
    prior_of(model, plan, config.leap)
    if fixed is None:
        _check_target(model, plan, config)
    if config.leap.score_init == "syntax":
        load_parser(config.leap.syntax_model, config.data.task)
        gates_by_layer(model, plan, config.family)
    start = resolve_start(model, plan, config.leap)
    return Forecast(config.model_copy(update={"leap": start.config}), model, plan, hosting, start.why)


def passes_of(config: JobConfig, model: PreTrainedModel, hosting: Hosting) -> Passes:
    """What a micro-batch takes beside the weights: activations, and the logits of a language model."""
    batch, length = config.deepspeed["train_micro_batch_size_per_gpu"], config.data.max_length
    length = min(length, num_positions(model.config) or length)
    what = f"a micro-batch of {batch} x {length} tokens"
    if config.leap.mode == "one_shot":
        return Passes(0, 0, f"not in these sums: what a layer takes for {what}, which passes without gradients")
    width, words, missing = hosting.width, 0, "buffers of communication"
    if config.distill is not None:
        missing += ", what the teacher's pass takes for its time"
        causal = problem_of(config.data.task) == "causal_lm"
        if config.distill.weighed(model.config.is_encoder_decoder, causal).attention_weight:
            model.set_attn_implementation("eager")  # whose probabilities are compared
    if problem_of(config.data.task) in WORDS:
        head = model.get_output_embeddings().weight
        words = word_bytes(head.shape[0], head.shape[1], batch * length, width)
    try:
        held = activation_bytes(model, batch, length, torch.bfloat16 if width == 2 else FLOAT)
    except Exception as error:  # code of any architecture, where tensors have no values
        problem = f"its code cannot run on tensors without values here ({own_words(error)[:80]})"
        return Passes(0, words, f"not in these sums: activations, for {problem}; {missing}")
    return Passes(held, words, f"activations are of {what}; not in these sums: {missing}")


def _check_target(model: PreTrainedModel, plan: GatePlan, config: JobConfig) -> None:
    """Raise UserError where the measure of the target cannot be counted, or its gates cannot reach it.

    Where kept weights depend on which units stay, that is seen when the job starts.
    """
    measure = measure_of(model, plan, config.leap, config.family)
    if form := closed_form(plan, followers=measure.name == "parameters"):
        lowest, highest = (form(keep) + measure.of_products(keep) for keep in (fewest_units(plan), most_units(plan)))
        check_reachable(plan, measure, lowest, highest)


def empty_model(model: ModelConfig, task_name: str) -> PreTrainedModel:
    """The model that a job would load, on the meta device; of a hub id or folder only the config is read."""
    task = empty_task(task_name)
    with torch.device("meta"):
        if model.from_config is not None:
            return load_model(model, task)
        assert model.name is not None
        return _from_stored_config(model.name, task)


def _from_stored_config(name: str, task: Task) -> PreTrainedModel:
    from huggingface_hub.errors import StrictDataclassError

    config = load_config(name)
    config.num_labels = task.num_labels
    try:
        model: PreTrainedModel = auto_class(task.problem).from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, RuntimeError, LookupError, ArithmeticError, StrictDataclassError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f'model.name: got "{name}"; transformers cannot build a model from its config: {first}'
        ) from error
    return model


def empty_task(name: str) -> Task:
    """What a model's head depends on of a task; classes that only the data could tell are taken to be two."""
    problem = problem_of(name)
    classes = (GLUE[name].label_names if name in GLUE else None) or TWO
    labels = {"single_label_classification": classes, "regression": ("score",)}.get(problem, ())
    nothing = cast(Any, None)  # what only a run would call
    return Task(
        name=name,
        num_labels=len(labels) or 2,
        train=(),
        validation={},
        collate=nothing,
        evaluation=nothing,
        primary="",
        problem=problem,
        label_names=labels,
    )


def fewest(fits: Callable[[int], bool]) -> int | None:
    """The smallest number of ranks that fits; None beyond MOST_RANKS. What a rank holds falls with their number."""
    high = 1
    while not fits(high):
        high *= 2
        if high > MOST_RANKS:
            return None
    low = high // 2  # does not fit, or is 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


# ---------------------------------------------------------------------------------------------- this machine


def machine_memory() -> tuple[str, int, int]:
    """(what, how many, bytes of each): this machine's GPUs, or its memory as one."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
        return torch.cuda.get_device_name(0), count, smallest
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return "memory", 1, min(physical, int(CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no control group, or no limit in it
        return "memory", 1, physical


def fit_line(job: Forecast) -> str:
    """Whether all ranks fit this machine."""
    what, count, each = machine_memory()
    own, ranks = job.memory(job.hosting.ranks, job.hosting.stage), job.hosting.ranks
    if what == "memory":
        needed = ranks * (own.total + job.passes.total + own.copy)
        verdict = "fits" if needed <= each else "does not fit"
        return f"this machine: {verdict}: {as_bytes(needed)} for {_ranks(ranks)}, memory {as_bytes(each)}"
    needed = own.on_device(job.hosting.offloads) + job.passes.total
    verdict = "fits" if needed <= each and ranks <= count else "does not fit"
    return (
        f"this machine: {verdict}: {as_bytes(needed)} a rank for {_ranks(ranks)}, {count} x {what} of {as_bytes(each)}"
    )


def gpu_line(job: Forecast) -> str:
    """How many GPUs the job takes, and at stage 3 where the configured one is another."""
    stages = dict.fromkeys((job.hosting.stage, 3))
    counts = [
        f"stage {stage}: {_count(job.gpus(stage))}, dense {_count(job.gpus(stage, dense=True))}" for stage in stages
    ]
    return f"GPUs of {as_bytes(GPU)}, at {'; '.join(counts)}"


def _count(gpus: int | None) -> str:
    return "no number is enough" if gpus is None else str(gpus)


# ---------------------------------------------------------------------------------------------- printing


def print_forecast(job: Forecast) -> None:
    """The tables and the verdict."""
    hosting = job.hosting
    parameters = sum(p.numel() for p in job.model.parameters())
    name = job.config.model.name or job.model.config.model_type
    host = f"ZeRO stage {hosting.stage}, {8 * hosting.width}-bit, {_ranks(hosting.ranks)}"
    console().print(f"{name}: {parameters:,} parameters, {job.plan.prunable:,} prunable; {host}", markup=False)
    summary_table(gate_rows(job.plan), title="gates")
    summary_table(memory_rows(job), title="a rank holds")
    if not job.one_shot:
        summary_table(traffic_rows(job), title="a rank sends to collectives in a step")
    if job.why_start:
        console().print(describe_start(job.config.leap, job.why_start), markup=False, soft_wrap=True)
    for line in (*advice(job), *state_lines(job), fit_line(job), gpu_line(job), job.passes.said):
        console().print(line, markup=False, soft_wrap=True)


def gate_rows(plan: GatePlan) -> list[Mapping[str, str | float]]:
    """Gates, units and weights by granularity."""
    rows: list[Mapping[str, str | float]] = []
    for kind in dict.fromkeys(gate.granularity for gate in plan.gates):
        gates = [gate for gate in plan.gates if gate.granularity == kind]
        units, weights = sum(gate.num_units for gate in gates), sum(gate.num_weights for gate in gates)
        rows.append({"granularity": kind, "gates": len(gates), "units": f"{units:,}", "weights": f"{weights:,}"})
    return rows


def memory_rows(job: Forecast) -> list[Mapping[str, str | float]]:
    """Bytes by purpose, dense and with LEAP."""
    ranks, stage, offloads = job.hosting.ranks, job.hosting.stage, job.hosting.offloads
    dense, leap = job.memory(ranks, stage, dense=True), job.memory(ranks, stage)
    plain = job.plain
    lines = {
        "weights, the teacher's too" if job.teacher else "weights": (dense.weights, plain.weights),
        "gradients": (dense.gradients, plain.gradients),
        "optimizer state": (dense.state, plain.state),
        "LEAP's own": (0, leap.total - plain.total),
    }
    passes = job.passes
    if passes.activations:
        lines["activations"] = (passes.activations, passes.activations)
    if passes.logits:
        lines["logits of a chunk"] = (passes.logits, passes.logits)
    lines["total"] = (dense.total + passes.total, leap.total + passes.total)
    if offloads:
        on_gpu = [one.on_device(offloads) + passes.total for one in (dense, leap)]
        lines["of it on the GPU"] = (on_gpu[0], on_gpu[1])
    if leap.copy:
        lines["host memory for checkpoints"] = (dense.copy, leap.copy)
    return [{"": name, "dense": as_bytes(a), "LEAP": as_bytes(b)} for name, (a, b) in lines.items()]


def traffic_rows(job: Forecast) -> list[Mapping[str, str | float]]:
    """Collectives and bytes by purpose: DeepSpeed's, then LEAP's with their sum."""
    engine = engine_traffic(job.model, job.hosting)
    leap = leap_traffic(job.plan, job.config.leap, job.hosting)
    own = total(leap, "LEAP in all")
    rows = [_traffic_row(line) for line in (*engine, *leap, own)]
    if engine:
        rows[-1] |= {"bytes": f"{as_bytes(own.bytes)}, {own.bytes / engine[0].bytes:.3%} of the reduction"}
    return list(rows)


def advice(job: Forecast) -> list[str]:
    """What would make LEAP's traffic small, where there are so many units that it is not."""
    if job.one_shot:
        return ["one shot: no gradients, no moments; what it sends, it sends once"]
    reduced, units = engine_traffic(job.model, job.hosting), job.plan.num_structured_units
    sent = leap_traffic(job.plan, job.config.leap, job.hosting)
    if not reduced or not sent or units * FP32 <= MUCH * reduced[0].bytes:
        return []
    share = total(sent, "").bytes / reduced[0].bytes
    return [f"LEAP sends {share:.1%} of the gradients' bytes, for {units:,} units; larger blocks send less"]


def state_lines(job: Forecast) -> list[str]:
    """Bytes of fp32 state that a prunable weight takes, against dense AdamW's."""
    if job.one_shot:
        return []
    leap, dense = job.config.leap, 3 * FP32
    own = state_bytes(job.plan, leap)
    own += FP32 if leap.frozen else dense
    note = "; frozen weights have no moments" if leap.frozen else ""
    return [f"state of a prunable weight: {own} B in fp32, of dense AdamW {dense} B{note}"]


def _traffic_row(traffic: Traffic) -> dict[str, str | float]:
    return {"": traffic.purpose, "collectives": traffic.collectives, "bytes": as_bytes(traffic.bytes)}


def as_bytes(count: float) -> str:
    """Decimal units: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"
