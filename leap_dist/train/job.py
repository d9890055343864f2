"""A job with everything it needs built: data, tokenizer, model in its engine, teacher."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leap_dist.config.leap import BY_INPUTS, LeapConfig
from leap_dist.config.sections import FEWEST_STEPS, JobConfig, ModelConfig
from leap_dist.errors import UserError
from leap_dist.models.inputs import beside_heads
from leap_dist.models.load import lacks_file, load_config, load_model, load_tokenizer
from leap_dist.tasks import load_task, needs_tokenizer
from leap_dist.tasks.base import Task
from leap_dist.tasks.head import WordHead
from leap_dist.train.batches import Batches, StreamBatches, accumulation, examples_per_step
from leap_dist.train.distill import Distiller, check_teacher, check_words, head_gates, match_layers
from leap_dist.train.guards import Heartbeats
from leap_dist.train.reorder import reorder
from leap_dist.train.syntax import gates_by_layer, load_parser
from leap_dist.train.watch import NOTHING, Watch
from leap_dist.zero.engine import destroy, initialize
from leap_dist.zero.ranks import Ranks
from leap_dist.zero.teacher import host_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class RunState:
    """What changes while a job runs."""

    start: int = 0  # the step that the run begins or resumes at
    left_out: int = 0  # steps whose loss or gradient was not finite
    measured: dict[str, dict[str, float]] = field(default_factory=dict)  # metrics by name: dense, pruned, ...
    costs: list[dict[str, float]] = field(default_factory=list)  # of the prune phase's steps that were logged
    heartbeats: Heartbeats | None = None


@dataclass(frozen=True)
class Job:
    """A validated job with everything it needs built: model hosted, data ready, nothing written yet."""

    config: JobConfig
    ranks: Ranks
    task: Task
    tokenizer: Any
    engine: Any
    batches: Batches | StreamBatches
    total_steps: int
    distiller: Distiller | None = None
    words: WordHead | None = None  # of a language model
    watch: Watch = NOTHING
    state: RunState = field(default_factory=RunState)
    orders: Mapping[str, torch.Tensor] = field(default_factory=dict)  # of columns, where leap.permute changed them
    parser: Any = None  # of sentences, where heads' scores start from syntax
    head_gates: Sequence[int | None] = ()  # of each layer, there

    @property
    def before(self) -> str:
        """What the metrics of the model are called that is not pruned yet, or as it was pruned before."""
        return "dense" if self.config.leap.start is None else "start"

    @property
    def phases(self) -> Any:
        """The schedule of the run's phases."""
        return self.engine.leap.schedule


def build_job(config: JobConfig, ranks: Ranks, watch: Watch = NOTHING, begun: Path | None = None) -> Job:
    """Load data, tokenizer and model, and let DeepSpeed host the model; `begun`: the folder of a run to be resumed."""
    tokenizer = load_tokenizer(config.model, config.data.tokenizer) if needs_tokenizer(config.data.task) else None
    syntax = config.leap.score_init == "syntax"
    parser = load_parser(config.leap.syntax_model, config.data.task, tokenizer) if syntax else None
    task = ranks.first_then_rest(lambda: load_task(config.data, tokenizer))
    micro = config.deepspeed["train_micro_batch_size_per_gpu"]
    per_step, seed, most = accumulation(config.deepspeed, ranks.world_size), config.train.seed, config.train.max_steps
    batches: Batches | StreamBatches = (
        StreamBatches(task, micro, per_step, seed, ranks, most)
        if task.stream
        else Batches(task, micro, per_step, seed, ranks)
    )
    one_shot = config.leap.mode == "one_shot"
    total = 0 if one_shot else _total_steps(config, batches)
    lengths = {"total_steps": total or None, "tokens_per_step": _tokens_per_step(config, task, batches, ranks)}
    config = config.model_copy(update={"leap": config.leap.model_copy(update=lengths)})
    torch.manual_seed(config.train.seed)
    model = load_model(config.model, task, config.leap.frozen)
    if isinstance(batches, StreamBatches):
        batches.check(model.config.get_text_config().vocab_size)
    distills = config.distill is not None and not one_shot
    if config.distill is not None:
        weighed = config.distill.weighed(model.config.is_encoder_decoder, task.problem == "causal_lm")
        config = config.model_copy(update={"distill": weighed})
    teacher = _load_teacher(config, task, model, tokenizer) if distills else None
    scheduled = one_shot or "scheduler" in config.deepspeed
    scheduler = None if scheduled else _linear_schedule(total, config.train.warmup_fraction)
    orders = reorder(config, model, batches, ranks, begun) if config.leap.permute else {}
    settings = config.model_copy(update={"leap": beside_heads(config.leap).model_copy(update={"permute": None})})
    engine, *_ = initialize(model=model, config=settings, lr_scheduler=scheduler)
    asked = engine.leap.level.measure.target  # of what leap.measure counts; the level's own is that of the gates
    own: dict[str, Any] = {"permute": config.leap.permute, "target": asked}
    if syntax:
        own["score_init"] = "syntax"
    heads = gates_by_layer(engine.module, engine.leap.plan, config.family) if syntax else []
    if not engine.leap.config.budgeted:  # where they have no effect a file that names them is refused
        own["tokens_per_step"] = None
    if not syntax and engine.leap.config.score_init not in BY_INPUTS:
        own["calibration_batches"] = LeapConfig.model_fields["calibration_batches"].default
    resolved = engine.leap.config.model_copy(update=own)
    config = config.model_copy(update={"leap": resolved})  # with what depends on the model
    distiller = _distiller(config, task, engine, teacher) if distills else None
    torch.manual_seed(config.train.seed + 1 + ranks.rank)  # dropout differs between ranks
    words = WordHead(engine, task.problem == "causal_lm") if task.problem in ("causal_lm", "masked_lm") else None
    built = (config, ranks, task, tokenizer, engine, batches, total, distiller, words, watch)
    return Job(*built, orders=orders, parser=parser, head_gates=heads)


def let_go(job: Job) -> None:
    """Of its engines, which would stay in memory: this process may run other jobs."""
    destroy(job.engine)
    if job.distiller is not None and isinstance(job.distiller.teacher, type(job.engine)):
        destroy(job.distiller.teacher)


def _total_steps(config: JobConfig, batches: Batches | StreamBatches) -> int:
    """Optimizer steps of the whole run. Raises UserError for too few."""
    if config.train.max_steps is not None:
        return config.train.max_steps
    total = max(1, round((config.train.epochs or 0) * batches.steps_per_epoch))
    if total < FEWEST_STEPS:
        raise UserError(
            f"train.epochs: got {config.train.epochs}; {total} optimizer steps are too few for three phases; allowed: "
            f"at least {FEWEST_STEPS}"
        )
    if config.leap.total_steps not in (None, total):
        raise UserError(
            f"leap.total_steps: got {config.leap.total_steps}; train.epochs: {config.train.epochs} is {total} steps of "
            "these data; allowed: that number, or null"
        )
    return total


def _tokens_per_step(config: JobConfig, task: Task, batches: Batches | StreamBatches, ranks: Ranks) -> int | None:
    """As given, or of text: conversations have tokens of their own, documents full blocks."""
    given = config.leap.tokens_per_step
    if given != "auto" or task.problem != "causal_lm":
        return None if given == "auto" else given
    return round(examples_per_step(config.deepspeed, ranks.world_size) * batches.mean_length)


def _load_teacher(config: JobConfig, task: Task, model: Any, tokenizer: "PreTrainedTokenizerBase | None") -> Any:
    """The dense model that teaches; attention of both runs unfused where it is compared."""
    assert config.distill is not None
    name = config.distill.teacher
    if name == "self":
        teacher = copy.deepcopy(model)
    else:
        try:
            check_teacher(name, model.config, load_config(name))
            if tokenizer is not None and not lacks_file(Path(name)):
                check_words(name, tokenizer.get_vocab(), load_tokenizer(ModelConfig(name=name)).get_vocab())
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


def _linear_schedule(total: int, warmup_fraction: float) -> Any:
    """`linear_scale` for any optimizer."""
    scale = linear_scale(total, warmup_fraction)
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, scale)


def linear_scale(total: int, warmup_fraction: float) -> Callable[[int], float]:
    """What learning rates are times in a step: linear warm-up, then linear decay to zero at the last step."""
    warmup = round(total * warmup_fraction)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (total - step) / max(total - warmup, 1)

    return scale
