"""The job file: one JSON object -> one frozen, validated `JobConfig`.

The top level of the file is a DeepSpeed config as DeepSpeed documents it; beside its keys stand our sections
`model`, `data`, `train`, `leap` and `tracking`. Every problem of a file is reported in one `UserError`, one
line each: dotted key, value received, what is allowed, nearest right name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from leap_dist.errors import UserError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs"

DEEPSPEED_KEYS = (
    "activation_checkpointing",
    "aio",
    "amp",
    "autotuning",
    "bf16",
    "checkpoint",
    "comet",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_efficiency",
    "data_types",
    "dataloader_drop_last",
    "datastates_ckpt",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "expert_parallel",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "hybrid_engine",
    "log_level",
    "managed_gradient_accumulation",
    "memory_breakdown",
    "optimizer",
    "pipeline",
    "prescale_gradients",
    "scheduler",
    "seq_parallel_communication_data_type",
    "sequence_parallel_size",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "timers",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "use_data_before_expert_parallelism",
    "vocabulary_size",
    "wall_clock_breakdown",
    "wandb",
    "weight_quantization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
"""Top-level keys that DeepSpeed 0.19 reads. Its own checks judge their values."""

GATE_NAMES = ("element", "row", "column", "block:RxC")

Conflict = tuple[str, str]
"""A key (relative to its section, "" for the section itself) and what is wrong about it."""


# ---------------------------------------------------------------------------------------------- field types


def _as_tuple(value: Any) -> Any:
    """A JSON list, or one plain string, as the tuple that a field stores."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _gate(value: str) -> str:
    """A granularity that exists, spelled as written."""
    if value in GATE_NAMES[:3] or re.fullmatch(r"block:[1-9]\d*x[1-9]\d*", value):
        return value
    raise PydanticCustomError("gate", "not a granularity")


def _tensor_pattern(value: str) -> str:
    """A tensor name, or "re:" and a pattern that compiles."""
    if value.startswith("re:"):
        try:
            re.compile(value[3:])
        except re.error as error:
            why = f"not a regular expression: {error}"
            raise PydanticCustomError("pattern", "{why}", {"why": why}) from error
    return value


Gates = Annotated[tuple[Annotated[str, AfterValidator(_gate)], ...], BeforeValidator(_as_tuple)]
Patterns = Annotated[tuple[Annotated[str, AfterValidator(_tensor_pattern)], ...], BeforeValidator(_as_tuple)]
PositiveFloat = Annotated[float, Field(gt=0)]
Columns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class _Section(BaseModel):
    """A part of the job file. Each field's description says what is allowed; the error messages print it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        """Combinations of keys that cannot be; `raw` may hold values of any type."""
        return []

    @model_validator(mode="after")
    def _no_conflicts(self) -> _Section:
        for key, problem in self.conflicts(self.model_dump()):
            raise PydanticCustomError("conflict", "{text}", {"text": f"{key}: {problem}"})
        return self


# ---------------------------------------------------------------------------------------------- sections


class LeapConfig(_Section):
    """What is pruned, to which density, and how. Fractions are parts of `total_steps`."""

    target: float = Field(gt=0, le=1, description="a number, 0 < target <= 1")
    """Density to reach: kept prunable weights / prunable weights."""
    gates: Gates = Field(default=("element",), min_length=1, description=f"one or more of {', '.join(GATE_NAMES)}")
    """Granularities; with several, a weight is kept only if each of them keeps it."""
    rule: Literal["leap", "movement", "magnitude"] = Field(
        default="leap", description='"leap", "movement" or "magnitude"'
    )
    """"leap" learns scores and thresholds; the other two follow a cubic schedule by hand."""
    control: Literal["projected", "paper"] = Field(default="projected", description='"projected" or "paper"')
    """How rule "leap" holds the level: an exact projection per step, or the published regulariser."""
    temperature: float = Field(default=32.0, gt=0, description="a number > 0")
    """T in the keep ratio sigmoid(sigma / T)."""
    score_init: Literal["magnitude", "zero"] = Field(default="magnitude", description='"magnitude" or "zero"')
    """Scores start at |W| / mean |W|, or at 0 as published."""
    score_learning_rate: float = Field(default=1e-2, gt=0, description="a number > 0")
    threshold_learning_rate: PositiveFloat | Literal["auto"] = Field(
        default="auto", description='a number > 0, or "auto"'
    )
    """"auto": derived from the distance to the target and the length of the prune phase."""
    lambda_max: PositiveFloat | Literal["auto"] = Field(default="auto", description='a number > 0, or "auto"')
    """Largest weight of the regulariser (control "paper" only); "auto": measured on the task's gradient."""
    lambda_min: float = Field(default=10.0, ge=0, description="a number >= 0, at most lambda_max")
    """Smallest weight of the regulariser (control "paper" with a number for lambda_max only)."""
    dense_fraction: float = Field(default=0.05, ge=0, lt=1, description="a number, 0 <= f < 1")
    """First part of the steps, in which nothing is pruned."""
    settle_fraction: float = Field(default=0.2, gt=0, lt=1, description="a number, 0 < f < 1")
    """Last part of the steps, in which the masks are frozen at the exact target."""
    include: Patterns = Field(default=(), description='a list of tensor names or "re:<pattern>"')
    """Tensors to prune; empty: the encoder's linear weights."""
    exclude: Patterns = Field(default=(), description='a list of tensor names or "re:<pattern>"')
    """Tensors to leave dense; taken from what `include` selects."""
    total_steps: int | None = Field(default=None, ge=10, description="an integer >= 10, or null")
    """Optimizer steps of the whole run; launch/prune.py fills it in from `train`."""

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        found: list[Conflict] = []
        dense, settle = raw.get("dense_fraction", 0.05), raw.get("settle_fraction", 0.2)
        if _is_number(dense) and _is_number(settle) and dense + settle >= 1:
            problem = f"got {dense}; allowed: dense_fraction + settle_fraction < 1, and settle_fraction is {settle}"
            found.append(("dense_fraction", problem))
        gates = _as_tuple(raw.get("gates", ()))
        if isinstance(gates, tuple) and len(set(map(str, gates))) < len(gates):
            found.append(("gates", f"got {_show(gates)}; each granularity may stand once"))
        low, high = raw.get("lambda_min", 10.0), raw.get("lambda_max", 160.0)
        if _is_number(low) and _is_number(high) and low > high > 0:
            found.append(("lambda_min", f"got {low}; allowed: at most lambda_max, which is {high}"))
        return found


class ModelConfig(_Section):
    """Which transformers model: trained weights by name, or random ones from a config."""

    name: str | None = Field(default=None, min_length=1, description="a hub id or a local folder, not empty")
    from_config: dict[str, Any] | None = Field(
        default=None, description='a transformers config object with "model_type"'
    )

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        found = _exactly_one(raw, "name", "from_config")
        config = raw.get("from_config")
        if isinstance(config, Mapping) and not isinstance(config.get("model_type"), str):
            received = _show(config["model_type"]) if "model_type" in config else "nothing"
            problem = f'got {received}; allowed: an architecture, such as "bert"'
            found.append(("from_config.model_type", problem))
        return found


class DataConfig(_Section):
    """Which task, and optionally local files for it."""

    task: str = Field(min_length=1, description='a task name, such as "glue/sst2" or "builtin/clock"')
    train: str | None = Field(default=None, min_length=1, description="a TSV, CSV or JSONL file")
    validation: str | None = Field(default=None, min_length=1, description="a TSV, CSV or JSONL file")
    text: Columns | None = Field(default=None, min_length=1, max_length=2, description="one or two column names")
    """Columns of the local files that hold the sentence, or the two sentences of a pair."""
    label: str | None = Field(default=None, min_length=1, description="a column name")
    max_length: int = Field(default=128, ge=8, description="an integer >= 8")
    """Tokens an example is cut to, special tokens included."""
    seed: int = Field(default=0, ge=0, description="an integer >= 0")
    """Decides what a builtin task generates."""

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        given = [key for key in ("train", "validation", "text", "label") if raw.get(key) is not None]
        if str(raw.get("task")).startswith("builtin/"):
            why = "a builtin task generates its data, remove it"
            return [(key, f"got {_show(raw[key])}; {why}") for key in given]
        if ("train" in given) != ("validation" in given):
            missing = "validation" if "train" in given else "train"
            return [(missing, "missing; local files come in pairs, train and validation")]
        if given and "train" not in given:
            why = "columns are for local files: give train and validation, or remove it"
            return [(key, f"got {_show(raw[key])}; {why}") for key in given]
        return []


class TrainConfig(_Section):
    """The length of the run and the optimizer of the weights."""

    epochs: float | None = Field(default=None, gt=0, description="a number > 0")
    max_steps: int | None = Field(default=None, gt=0, description="an integer > 0")
    """Optimizer steps (not micro-batches)."""
    learning_rate: float = Field(default=3e-5, gt=0, description="a number > 0")
    """Peak rate of the weights."""
    weight_decay: float = Field(default=0.01, ge=0, description="a number >= 0")
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1, description="a number, 0 <= f < 1")
    """Part of the steps in which the rate climbs to its peak."""
    seed: int = Field(default=17, ge=0, lt=2**32, description="an integer, 0 <= seed < 2**32")
    dense_reference: bool = Field(default=False, description="true or false")
    """Also train a dense model for as many steps, to compare with."""
    checkpoint_every: int | None = Field(default=None, ge=1, description="an integer >= 1, or null")
    """Optimizer steps between two checkpoints; null writes none."""
    log_every: int = Field(default=10, ge=1, description="an integer >= 1")
    """Optimizer steps between two lines of metrics."""
    eval_batch_size: int = Field(default=64, ge=1, description="an integer >= 1")

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        return _exactly_one(raw, "epochs", "max_steps")


class TrackingConfig(_Section):
    """Where MLflow writes."""

    mlflow_uri: str | None = Field(
        default="sqlite:///mlflow.db", min_length=1, description="an MLflow tracking URI, or null"
    )
    """null switches tracking off."""
    experiment: str = Field(default="leap", min_length=1, description="a name, not empty")
    run_name: str | None = Field(default=None, min_length=1, description="a name, or null")


class JobConfig(_Section):
    """A whole job. `deepspeed` holds every key that is DeepSpeed's, as written."""

    deepspeed: dict[str, Any]
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    leap: LeapConfig
    tracking: TrackingConfig

    def resolved(self) -> dict[str, Any]:
        """The file form again, every default filled in: `parse_job(config.resolved()) == config`."""
        sections = self.model_dump(mode="json")
        return {**sections.pop("deepspeed"), **sections}


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "leap": LeapConfig,
    "tracking": TrackingConfig,
}

SectionT = TypeVar("SectionT", bound=_Section)


# ---------------------------------------------------------------------------------------------- entry points


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file and apply overrides of the form "leap.target=0.05".

    A bare name is looked up in the checkout's configs/ too, and ".json" may be left out. The part of an
    override after "=" is JSON, or else a plain string.
    """
    file = _find(Path(path))
    raw = _read(file)
    problems = [problem for text in overrides if (problem := _override(raw, text))]
    return _parse_job(raw, str(file), problems)


def parse_job(raw: Mapping[str, Any], source: str = "config") -> JobConfig:
    """Validate a job; `UserError` with every problem, headed by `source`."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{source}: got {_show(raw)}; allowed: a JSON object")
    return _parse_job(raw, source, [])


def parse_leap(raw: Mapping[str, Any]) -> LeapConfig:
    """Validate the "leap" section alone."""
    problems: list[str] = []
    leap = _parse_section(LeapConfig, "leap", raw, problems)
    _raise_if(problems, "leap")
    assert leap is not None
    return leap


# ---------------------------------------------------------------------------------------------- reading


def _find(path: Path) -> Path:
    """The config file that `path` means."""
    folders = [Path(), CONFIG_FOLDER] if path.parent == Path() else [Path()]
    tried = [folder / name for folder in folders for name in (path, Path(f"{path}.json"))]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    known = sorted(file.name for file in CONFIG_FOLDER.glob("*.json"))
    near = _nearest(path.name, [*known, *(Path(name).stem for name in known)])
    places = ", ".join(map(str, tried))
    raise UserError(f"config: no file {path}; looked for {places}; in configs/: {', '.join(known) or 'none'}{near}")


def _read(file: Path) -> dict[str, Any]:
    """The JSON object in `file`."""
    try:
        text = file.read_text("utf-8-sig")
        raw = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{file}: not JSON: {where}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file}: got {_show(raw)}; allowed: a JSON object")
    return raw


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the same key stands twice: {', '.join(twice)}; keep one")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; allowed: a finite number")


def _override(raw: dict[str, Any], text: str) -> str | None:
    """Set one dotted key in `raw`; the problem, if the text or the place is wrong."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        return f'override: got "{text}"; allowed: section.key=value, such as leap.target=0.05'
    place = raw
    for depth, part in enumerate(parts[:-1], start=1):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            above = ".".join(parts[:depth])
            return f'override: got "{text}"; {above} holds {_show(place)}, which has no keys'
    place[parts[-1]] = _override_value(value.strip())
    return None


def _override_value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        return text


# ---------------------------------------------------------------------------------------------- checking


def _parse_job(raw: Mapping[str, Any], source: str, problems: list[str]) -> JobConfig:
    deepspeed = {key: value for key, value in raw.items() if key not in SECTIONS}
    unknown = {key: value for key, value in deepspeed.items() if key not in DEEPSPEED_KEYS}
    problems += [_unknown_top_level(key, value) for key, value in unknown.items()]
    problems += _deepspeed_problems(deepspeed)
    sections = {name: _parse_section(cls, name, raw.get(name, {}), problems) for name, cls in SECTIONS.items()}
    problems += _total_steps_problem(raw)
    _raise_if(problems, source)
    return JobConfig.model_validate({"deepspeed": deepspeed, **sections})


def _raise_if(problems: list[str], source: str) -> None:
    if problems:
        plural = "problem" if len(problems) == 1 else "problems"
        raise UserError("\n  ".join([f"{source}: {len(problems)} {plural}", *problems]))


def _parse_section(cls: type[SectionT], name: str, raw: Any, problems: list[str]) -> SectionT | None:
    """The section, or None after adding what is wrong with it to `problems`."""
    if not isinstance(raw, Mapping):
        allowed = f"a JSON object with keys {', '.join(cls.model_fields)}"
        problems.append(f"{name}: got {_show(raw)}; allowed: {allowed}")
        return None
    lines = [f"{name}.{key}: {text}" if key else f"{name}: {text}" for key, text in cls.conflicts(raw)]
    try:
        section = cls.model_validate(dict(raw))
    except ValidationError as error:
        lines += _field_lines(cls, name, error)
        section = None
    problems += list(dict.fromkeys(lines))
    return section


def _field_lines(cls: type[_Section], section: str, error: ValidationError) -> Iterable[str]:
    """One line for each field that pydantic refuses."""
    places = [item["loc"] for item in error.errors()]
    for item in error.errors():
        inside = any(place[:-1] == item["loc"] for place in places)
        if item["type"] == "conflict" or inside:  # an item of the field is wrong, and has a line of its own
            continue
        key = str(item["loc"][0])
        place = f"{section}.{key}" + "".join(f"[{part}]" for part in item["loc"][1:] if isinstance(part, int))
        if item["type"] == "extra_forbidden":
            yield _unknown_in_section(section, key, item["input"])
            continue
        field = cls.model_fields[key]
        received = "missing" if item["type"] == "missing" else f"got {_show(item['input'])}"
        why = f" ({item['msg']})" if item["type"] == "pattern" else ""
        choices = GATE_NAMES if key == "gates" else get_args(field.annotation)
        yield f"{place}: {received}{why}; allowed: {field.description}{_nearest(item['input'], choices)}"


def _unknown_in_section(section: str, key: str, value: Any) -> str:
    """The line for a key that its section does not have."""
    own = list(SECTIONS[section].model_fields)
    elsewhere = [f"{name}.{key}" for name, cls in SECTIONS.items() if key in cls.model_fields]
    near = _nearest(key, own, prefix=f"{section}.") if not elsewhere else f"; did you mean {elsewhere[0]}?"
    return f"{section}.{key}: got {_show(value)}, unknown key; allowed: {', '.join(own)}{near}"


def _unknown_top_level(key: str, value: Any) -> str:
    """The line for a top-level key that is neither ours nor DeepSpeed's."""
    names = [*SECTIONS, *DEEPSPEED_KEYS]
    inside = [f"{name}.{key}" for name, cls in SECTIONS.items() if key in cls.model_fields]
    near = f"; did you mean {inside[0]}?" if inside else _nearest(key, names)
    allowed = f"{', '.join(SECTIONS)}, and DeepSpeed's keys"
    return f"{key}: got {_show(value)}, unknown key; allowed: {allowed}{near}"


def _deepspeed_problems(deepspeed: Mapping[str, Any]) -> Iterable[str]:
    """What is refused of DeepSpeed's part before DeepSpeed sees it."""
    if "optimizer" in deepspeed:
        yield (
            f"optimizer: got {_show(deepspeed['optimizer'])}; LEAP is the optimizer: remove it, and set "
            "learning_rate, weight_decay and warmup_fraction in train"
        )
    batch = deepspeed.get("train_micro_batch_size_per_gpu")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        received = "missing" if batch is None else f"got {_show(batch)}"
        yield f"train_micro_batch_size_per_gpu: {received}; allowed: an integer >= 1"
    for key in ("bf16", "fp16"):
        if not isinstance(deepspeed.get(key, {}), Mapping):
            yield f'{key}: got {_show(deepspeed[key])}; allowed: a JSON object, such as {{"enabled": true}}'
    zero = deepspeed.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f'zero_optimization: got {_show(zero)}; allowed: a JSON object, such as {{"stage": 2}}'
    elif not _is_int(zero.get("stage", 0)) or not 0 <= zero.get("stage", 0) <= 3:
        yield f"zero_optimization.stage: got {_show(zero['stage'])}; allowed: 0, 1, 2 or 3"


def _total_steps_problem(raw: Mapping[str, Any]) -> Iterable[str]:
    """leap.total_steps and train.max_steps are the same number, if both are given."""
    leap, train = raw.get("leap"), raw.get("train")
    if isinstance(leap, Mapping) and isinstance(train, Mapping):
        total, steps = leap.get("total_steps"), train.get("max_steps")
        if _is_int(total) and _is_int(steps) and total != steps:
            yield f"leap.total_steps: got {total}; allowed: train.max_steps, which is {steps}, or null"


def _exactly_one(raw: Mapping[str, Any], first: str, second: str) -> list[Conflict]:
    given = [key for key in (first, second) if raw.get(key) is not None]
    if len(given) == 1:
        return []
    received = "both" if given else "neither"
    return [("", f"got {received} of {first} and {second}; allowed: exactly one (null removes one)")]


# ---------------------------------------------------------------------------------------------- words


def _nearest(value: Any, choices: Iterable[Any], prefix: str = "") -> str:
    """ "; did you mean ...?", or nothing when no choice is near."""
    names = [choice for choice in choices if isinstance(choice, str)]
    near = get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _show(value: Any) -> str:
    """A received value as it stands in the file, shortened."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))
