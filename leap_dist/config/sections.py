"""What a job file may say: every key of our sections, with its meaning, default and what is allowed.

The top level of the file is a DeepSpeed config as DeepSpeed documents it; beside its keys stand our sections
`model`, `data`, `train`, `leap`, `tracking` and, if wanted, `distill` and (for an architecture that is in none of our
tables) `family`. job_file.py reads and checks a whole file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from leap_dist.config.family import FamilyConfig
from leap_dist.config.leap import LeapConfig
from leap_dist.config.section import (
    Conflict,
    Names,
    Section,
    as_tuple,
    is_int,
    show,
    with_home,
)
from leap_dist.secrets import must_quote

DEEPSPEED_KEYS = (
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler",
    "fp16", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping", "gradient_predivide_factor",
    "hybrid_engine", "log_level", "managed_gradient_accumulation", "memory_breakdown", "optimizer", "pipeline",
    "prescale_gradients", "scheduler", "seq_parallel_communication_data_type", "sequence_parallel_size",
    "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown",
    "wandb", "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)  # fmt: skip
"""Top-level keys that DeepSpeed 0.19 reads. Its own checks judge their values."""


def exactly_one(raw: Mapping[str, Any], first: str, second: str) -> list[Conflict]:
    given = [key for key in (first, second) if raw.get(key) is not None]
    if len(given) == 1:
        return []
    received = "both" if given else "neither"
    return [("", f"got {received} of {first} and {second}; allowed: exactly one (null removes one)")]


class ModelConfig(Section):
    """Which transformers model: trained weights by name, or random ones from a config."""

    name: str | None = Field(default=None, min_length=1, description="a hub id or a local folder, not empty")
    """Trained weights, with their config and tokenizer."""
    from_config: dict[str, Any] | None = Field(
        default=None, description='a transformers config object with "model_type"'
    )
    """An architecture with random weights, in place of `name`."""

    _home = field_validator("name")(with_home)

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        found = exactly_one(raw, "name", "from_config")
        config = raw.get("from_config")
        if isinstance(config, Mapping) and not isinstance(config.get("model_type"), str):
            received = show(config["model_type"]) if "model_type" in config else "nothing"
            problem = f'got {received}; allowed: an architecture, such as "bert"'
            found.append(("from_config.model_type", problem))
        return found


Files = Annotated[tuple[Annotated[str, Field(min_length=1), AfterValidator(with_home)], ...], BeforeValidator(as_tuple)]
FILES = "a file or a pattern such as data/*.jsonl.gz, or a list of them; with dataset, the name of a split"


class DataConfig(Section):
    """Which task, and optionally local files or another dataset for it."""

    task: str = Field(min_length=1, description='a task name, such as "glue/sst2", "squad", "lm" or "builtin/clock"')
    """What the model is trained for and judged by; docs/tasks.md lists them."""
    dataset: str | None = Field(default=None, min_length=1, description="a hub id, or a folder that datasets can load")
    """In place of local files and of the task's own dataset."""
    subset: str | None = Field(default=None, min_length=1, description="the name of one of the dataset's subsets")
    """Read in place of the dataset's default."""
    train: Files | None = Field(default=None, min_length=1, description=FILES)
    """.tsv, .csv, .jsonl (or .ndjson), .json or .parquet; for squad official JSON; for lm and mlm plain text too. All
    may be packed: .gz, .zst, .bz2, .xz."""
    validation: Files | None = Field(default=None, min_length=1, description=FILES)
    """The examples that the metrics are computed on. For lm and mlm files beside a dataset, too."""
    streaming: bool = Field(default=False, description="true or false")
    """lm and mlm: read the rows of the dataset while training, in place of all before it; needs train.max_steps."""
    shuffle_buffer: int = Field(default=10_000, ge=1, description="an integer >= 1")
    """streaming: rows that are mixed at once; 1: the order that they have."""
    text: Names | None = Field(default=None, min_length=1, max_length=2, description="one or two column names")
    """The columns that hold the sentence, or the two sentences of a pair; for lm and mlm the one with the text, for lm
    also with the messages of a conversation, or two: with the prompt and with the answer."""
    label: str | None = Field(default=None, min_length=1, description="a column name")
    """The column with the class, or with the score for glue/stsb."""
    tokenizer: str | None = Field(default=None, min_length=1, description="a hub id or a local folder, not empty")
    """null: the one that comes with model.name."""
    max_length: int = Field(default=128, ge=8, description="an integer >= 8")
    """Tokens an example is cut to, special tokens included; 384 for squad, 512 for lm where it is not given."""
    doc_stride: int | None = Field(default=None, ge=0, description="an integer >= 0, at most max_length / 2, or null")
    """squad: tokens that two neighbouring windows of a text share; null: a third of max_length."""
    stride: int | None = Field(default=None, ge=1, description="an integer >= 1, at most max_length, or null")
    """lm: new tokens of each block in validation, where blocks overlap and only those are judged; null: no overlap."""
    max_answer_length: int = Field(default=30, ge=1, description="an integer >= 1")
    """squad: tokens of the longest answer that is given."""
    n_best: int = Field(default=20, ge=1, description="an integer >= 1")
    """squad: spans of each window, and answers of each question, that are weighed."""
    null_score_threshold: float = Field(default=0.0, description="a number")
    """squad_v2: by how much "no answer" has to score above the best span to be given."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1, description="a number, 0 < p < 1")
    """mlm: part of the words that are left out."""
    seed: int = Field(default=0, ge=0, description="an integer >= 0")
    """Decides what a builtin task generates, and which words mlm leaves out in validation."""

    _home = field_validator("dataset", "tokenizer")(with_home)

    @property
    def shared_tokens(self) -> int:
        """doc_stride, its default filled in."""
        return self.max_length // 3 if self.doc_stride is None else self.doc_stride

    @model_validator(mode="before")
    @classmethod
    def _length_of_task(cls, raw: Any) -> Any:
        length = MAX_LENGTHS.get(str(raw.get("task"))) if isinstance(raw, Mapping) else None
        return {"max_length": length, **raw} if length else raw

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        given = [key for key in DATA_SOURCES if raw.get(key) is not None]
        task = str(raw.get("task"))
        found = _options_of_other_tasks(raw, task)
        if task.startswith("builtin/"):
            why = "a builtin task generates its data, remove it"
            return found + [(key, f"got {show(raw[key])}; {why}") for key in given]
        found += _repeated_columns(raw, task)
        stride, length = raw.get("doc_stride"), raw.get("max_length", MAX_LENGTHS.get(task))
        if task in QA_TASKS and is_int(length) and length < 32:
            found.append(("max_length", f"got {length}; allowed: at least 32, for a question and a part of the text"))
        elif task in QA_TASKS and is_int(stride) and is_int(length) and stride > length // 2:
            found.append(("doc_stride", f"got {stride}; allowed: at most half of max_length, which is {length}"))
        buffer = DataConfig.model_fields["shuffle_buffer"].default
        if not raw.get("streaming") and raw.get("shuffle_buffer", buffer) != buffer:
            found.append(("shuffle_buffer", f"got {show(raw['shuffle_buffer'])}; an option of streaming: remove it"))
        if is_int(raw.get("stride")) and is_int(length) and raw["stride"] > length:
            found.append(("stride", f"got {raw['stride']}; allowed: at most max_length, which is {length}"))
        if raw.get("dataset") is not None:
            return found + _several_splits(raw)
        if raw.get("streaming"):
            found.append(("streaming", "got true; a dataset is streamed: give dataset, which a folder of files can be"))
        if "subset" in given:
            found.append(("subset", f"got {show(raw['subset'])}; a subset is of a dataset: give dataset, or remove it"))
        if ("train" in given) != ("validation" in given):
            missing = "validation" if "train" in given else "train"
            found.append((missing, "missing; local files come in pairs, train and validation"))
        elif "train" not in given:
            why = "columns are for local files: give train and validation, or dataset, or remove it"
            found += [(key, f"got {show(raw[key])}; {why}") for key in given if key in ("text", "label")]
        return found


DATA_SOURCES = ("dataset", "subset", "train", "validation", "text", "label", "tokenizer")
PACKED_ENDINGS = (".gz", ".zst", ".bz2", ".xz")
TEXT_ENDINGS = (".txt", ".md", ".raw", ".tokens")
FILE_ENDINGS = (".tsv", ".csv", ".jsonl", ".ndjson", ".json", ".parquet", *TEXT_ENDINGS, *PACKED_ENDINGS)
MAX_LENGTHS = {"squad": 384, "squad_v2": 384, "lm": 512}
"""Where max_length is not given; other tasks have the field's default."""
QA_TASKS = ("squad", "squad_v2")
TASK_OPTIONS: dict[str, tuple[str, ...]] = dict.fromkeys(("doc_stride", "max_answer_length", "n_best"), QA_TASKS)
TASK_OPTIONS |= dict.fromkeys(("streaming", "shuffle_buffer"), ("lm", "mlm"))
TASK_OPTIONS |= {"null_score_threshold": ("squad_v2",), "mask_probability": ("mlm",), "stride": ("lm",)}
"""Options of DataConfig that only some tasks read."""


def _several_splits(raw: Mapping[str, Any]) -> list[Conflict]:
    """A dataset gives one split for each."""
    several = [key for key in ("train", "validation") if isinstance(raw.get(key), list | tuple) and len(raw[key]) > 1]
    if names_files(raw.get("validation")):
        several = [key for key in several if key == "train"]
    return [(key, f"got {show(raw[key])}; allowed: the name of one split of the dataset") for key in several]


def names_files(names: Any) -> bool:
    """Whether what stands in place of a split's name is a file, or files: by its ending."""
    given = [names] if isinstance(names, str) else names if isinstance(names, list | tuple) else []
    return any(isinstance(name, str) and name.lower().endswith(FILE_ENDINGS) for name in given)


def _repeated_columns(raw: Mapping[str, Any], task: str) -> list[Conflict]:
    """A column that is read twice: as both texts of a pair, or as the text that the label is learned from."""
    text, label = raw.get("text"), raw.get("label") or "label"
    names = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else []
    if len(names) == 2 and names[0] == names[1]:
        return [("text", f"got {show(text)}; allowed: one column, or two that differ")]
    if label in names and task not in (*QA_TASKS, "lm", "mlm"):
        return [("text", f"got {show(text)}, but {label} is the column of the label; allowed: columns of texts")]
    return []


def _options_of_other_tasks(raw: Mapping[str, Any], task: str) -> list[Conflict]:
    """Settings that the task would ignore."""
    off = {key: DataConfig.model_fields[key].default for key in TASK_OPTIONS}
    found = [
        (key, f"got {show(raw[key])}; an option of {' and '.join(tasks)}: remove it")
        for key, tasks in TASK_OPTIONS.items()
        if task not in tasks and raw.get(key, off[key]) != off[key]
    ]
    unread = ("label", "text") if task in QA_TASKS else ("label",) if task in ("lm", "mlm") else ()
    why = f"{task} has no such column: remove it"
    return found + [(key, f"got {show(raw[key])}; {why}") for key in unread if raw.get(key) is not None]


FEWEST_STEPS = 10
"""Of a run: fewer are no three phases."""
LEARNING_RATE, WEIGHT_DECAY = 3e-5, 0.01
"""Of the weights, in a job and in a loop of one's own."""


class TrainConfig(Section):
    """The length of the run and the optimizer of the weights."""

    epochs: float | None = Field(default=None, gt=0, description="a number > 0")
    """Passes over the training data; exactly one of `epochs` and `max_steps` is given."""
    max_steps: int | None = Field(default=None, ge=FEWEST_STEPS, description=f"an integer >= {FEWEST_STEPS}, or null")
    """Optimizer steps (not micro-batches)."""
    learning_rate: float = Field(default=LEARNING_RATE, gt=0, description="a number > 0")
    """Peak rate of the weights."""
    weight_decay: float = Field(default=WEIGHT_DECAY, ge=0, description="a number >= 0")
    """AdamW's decay of the weights; scores and thresholds have none."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1, description="a number, 0 <= f < 1")
    """Part of the steps in which the rate climbs to its peak; then it falls linearly, to 0 at the end. Not with a
    `scheduler` of DeepSpeed's, which says both."""
    seed: int = Field(default=17, ge=0, lt=2**32, description="an integer, 0 <= seed < 2**32")
    """Decides random weights, the order of the data and dropout."""
    dense_reference: bool = Field(default=False, description="true or false")
    """Also train a dense model for as many steps before the run, to compare with."""
    checkpoint_every: int | None = Field(default=None, ge=1, description="an integer >= 1, or null")
    """Optimizer steps between two checkpoints; null: checkpoint_minutes alone counts; a sweep's trial writes ten."""
    checkpoint_minutes: float | None = Field(default=30.0, gt=0, description="a number > 0, or null")
    """Minutes between two checkpoints, by the first rank's clock; null: only checkpoint_every counts."""
    keep_checkpoints: int = Field(default=2, ge=1, description="an integer >= 1")
    """The latest checkpoints that are kept; the best one of the settle phase, by training loss, stays too."""
    max_bad_steps: int = Field(default=10, ge=1, description="an integer >= 1")
    """Steps in a row whose loss or gradient may be no finite number; their updates are left out."""
    collective_timeout: float = Field(default=30.0, gt=0, description="a number > 0")
    """Minutes without a sign of life of a rank, or in a collective that does not end, after which the job ends."""
    log_every: int = Field(default=10, ge=1, description="an integer >= 1")
    """Optimizer steps between two lines of metrics."""
    eval_batch_size: int = Field(default=64, ge=1, description="an integer >= 1")
    """Examples of a rank's batch in evaluation."""

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        both = raw.get("epochs") is not None and raw.get("max_steps") is not None
        return exactly_one(raw, "epochs", "max_steps") if both else []


class DistillConfig(Section):
    """A teacher whose answers and inner states the model is also trained on."""

    teacher: str = Field(default="self", min_length=1, description='a hub id, a local folder, or "self"')
    """"self": the model as it starts, before anything is pruned; worth it if that is fine-tuned already."""
    alpha: float = Field(default=0.9, ge=0, le=1, description="a number, 0 <= alpha <= 1")
    """Weight of the distillation; the task's own loss has 1 - alpha."""
    temperature: float = Field(default=2.0, gt=0, description="a number > 0")
    """Softens the answers of both: KL(softmax(teacher / t), softmax(student / t)) t^2."""
    hidden_weight: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description='a number >= 0, or "auto"'
    )
    """Weight of the squared distance of hidden states over the teacher's squared length; needs a teacher of the same
    width. "auto": 1, and 0 for a model of an encoder and a decoder, where it has to be."""
    attention_weight: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description='a number >= 0, or "auto"'
    )
    """Weight of the squared distance of attention weights; above 0 attention runs unfused, for it has to be seen,
    and the teacher needs as many heads. Of any teacher vocabulary and labels have to be the model's. "auto": as
    hidden_weight, and 0 for the task lm, whose texts are long."""
    layers: Annotated[
        tuple[int, ...] | Literal["auto"],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ] = Field(default="auto", description='a list of integers, or "auto"')
    """The teacher's layer for each of ours, counted from 0; "auto": spread evenly over the teacher's depth."""
    _home = field_validator("teacher")(with_home)

    def weighed(self, encoder_decoder: bool, causal: bool) -> Self:
        """With numbers in place of "auto", for a model of an encoder and a decoder, or one that writes text."""
        auto = {"hidden_weight": not encoder_decoder, "attention_weight": not encoder_decoder and not causal}
        return self.model_copy(update={key: float(on) for key, on in auto.items() if getattr(self, key) == "auto"})

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        problem = "got 0, with which a teacher has no effect; allowed: more, or remove the section"
        return [("alpha", problem)] if raw.get("alpha") == 0 else []


def default_store() -> str:
    """What MLflow's own variable names, or a file in the working directory."""
    return with_home(os.environ.get("MLFLOW_TRACKING_URI")) or "sqlite:///mlflow.db"


# pydantic takes the key `register` for a method of every abstract class, which nothing here uses
warnings.filterwarnings("ignore", 'Field name "register" in "TrackingConfig" shadows')


class TrackingConfig(Section):
    """Where MLflow writes."""

    mlflow_uri: str | None = Field(
        default_factory=default_store, min_length=1, description="an MLflow tracking URI, or null"
    )
    """null switches tracking off. Default: $MLFLOW_TRACKING_URI, or else sqlite:///mlflow.db."""
    experiment: str = Field(default="leap", min_length=1, description="a name, not empty")
    """The MLflow experiment of the run; made if it is not there."""
    run_name: str | None = Field(default=None, min_length=1, description="a name, or null")
    """null: the name of the run folder."""
    parent_run: str | None = Field(default=None, min_length=1, description="the id of an MLflow run, or null")
    """The run that this one is shown below; a sweep fills it in."""
    log_model: bool = Field(default=False, description="true or false")
    """Also store the pruned model with the run, for MLflow to load and serve: a copy of all its weights."""
    register: str | None = Field(
        default=None, pattern=r"^\w[\w .\-]*$", max_length=200, description="letters, digits, spaces and ._-, or null"
    )
    """Store it, and make it a version of the registered model of this name."""
    _home = field_validator("mlflow_uri")(with_home)

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        uri = raw.get("mlflow_uri", default_store())
        problem = must_quote(uri) if isinstance(uri, str) else ""
        return [("mlflow_uri", problem)] if problem else []


class EngineConfig(Section):
    """What an engine is built from. `deepspeed` holds every key that is DeepSpeed's, as written."""

    deepspeed: dict[str, Any]
    train: TrainConfig
    leap: LeapConfig
    family: FamilyConfig | None = None


class JobConfig(EngineConfig):
    """A whole job: an engine with its model, its data, and where it is tracked."""

    model: ModelConfig
    data: DataConfig
    tracking: TrackingConfig
    distill: DistillConfig | None = None

    def resolved(self) -> dict[str, Any]:
        """The file form again, every default filled in: `parse_job(config.resolved()) == config`."""
        sections = self.model_dump(mode="json", exclude={name for name in OPTIONAL if getattr(self, name) is None})
        if not self.leap.target:  # what the masks of leap.start keep
            del sections["leap"]["target"]
        return {**sections.pop("deepspeed"), **{name: sections[name] for name in SECTIONS if name in sections}}


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "leap": LeapConfig,
    "tracking": TrackingConfig,
    "family": FamilyConfig,
    "distill": DistillConfig,
}

OPTIONAL = ("family", "distill")
"""Sections without which a job is whole."""

UNRELATED_TO_RESULT = (
    "tracking.",
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.log_every",
    "train.max_bad_steps",
    "train.collective_timeout",
)
"""Beginnings of the keys that say what is written and when a job gives up: with others it is the same job."""
