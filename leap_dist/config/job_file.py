"""The job file: one JSON object -> one frozen, validated `JobConfig`.

Every problem of a file is reported in one `UserError`, one line each: dotted key, value received, what is allowed,
nearest right name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from leap_dist.config.family import FamilyConfig
from leap_dist.config.json_file import Twice, loads, read_json, shortened
from leap_dist.config.leap import GATE_NAMES, LeapConfig
from leap_dist.config.legacy import IMPORT
from leap_dist.config.section import Section, is_int, nearest, show
from leap_dist.config.sections import (
    DEEPSPEED_KEYS,
    OPTIONAL,
    SECTIONS,
    EngineConfig,
    JobConfig,
    TrainConfig,
    exactly_one,
)
from leap_dist.errors import UserError
from leap_dist.files import shipped, user_path
from leap_dist.secrets import remember, remember_all, remember_setting

CONFIG_FOLDER = shipped("configs")
MOST_LEVELS = 64  # of lists and objects in each other, and parts of a dotted key
MOST_PROBLEMS = 50  # in one message

SectionT = TypeVar("SectionT", bound=Section)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file and apply overrides of the form "leap.target=0.05".

    A bare name is looked up in the configs/ that come with leap_dist too, and ".json" may be left out. The part of an
    override after "=" is JSON, or else a plain string.
    """
    for text in overrides:
        _remember(text)
    file = _find(user_path(str(path)))
    raw = read_json(file)
    if isinstance(raw.get("config"), str) and not raw.keys() & SECTIONS.keys():
        raise UserError(f"config: {file} is a sweep, not a job; start it with launch/sweep.py --config {path}")
    problems = [problem for text in overrides if (problem := _override(raw, text))]
    keys = Counter(text.partition("=")[0].strip() for text in overrides)
    problems += [f"override: {shortened(key)} is given {num} times; keep one" for key, num in keys.items() if num > 1]
    return _parse_job(raw, str(file), problems)


def parse_job(raw: Mapping[str, Any], source: str = "config") -> JobConfig:
    """Validate a job; `UserError` with every problem, headed by `source`."""
    if not isinstance(raw, Mapping):
        raise UserError(f"{source}: got {show(raw)}; allowed: a JSON object")
    return _parse_job(raw, source, [])


def parse_leap(raw: Mapping[str, Any]) -> LeapConfig:
    """Validate the "leap" section alone."""
    return parse_section(LeapConfig, "leap", raw)


def parse_engine(raw: Mapping[str, Any]) -> EngineConfig:
    """Validate what an engine needs of a job: "leap", and "train" and "family" if given.

    The length of the run is "leap.total_steps", or else "train.max_steps".
    """
    if "leap" not in raw:
        raise UserError('leap: the config has no "leap" section; the shortest is {"target": 0.5, "total_steps": 1000}')
    leap, train = raw["leap"], raw.get("train") or {}
    if isinstance(leap, Mapping) and isinstance(train, Mapping) and leap.get("mode") != "one_shot":
        steps = leap.get("total_steps") or train.get("max_steps")
        if steps is None:
            raise UserError("leap.total_steps: missing; give the number of optimizer steps of the whole run")
        leap = {**leap, "total_steps": steps}
        train = train if train.get("epochs") is not None else {**train, "max_steps": steps}
    return EngineConfig(
        deepspeed={key: value for key, value in raw.items() if key not in SECTIONS},
        leap=parse_section(LeapConfig, "leap", leap),
        train=parse_section(TrainConfig, "train", train),
        family=parse_section(FamilyConfig, "family", raw["family"]) if raw.get("family") else None,
    )


def parse_section(cls: type[SectionT], name: str, raw: Any) -> SectionT:
    """Validate one section alone."""
    _check_depth(name, raw)
    remember_all(raw)
    problems: list[str] = []
    section = _parse_section(cls, name, raw, problems)
    _raise_if(problems, name)
    assert section is not None
    return section


# ---------------------------------------------------------------------------------------------- reading


def _find(path: Path) -> Path:
    """The config file that `path` means."""
    folders = [Path(), CONFIG_FOLDER] if path.parent == Path() else [Path()]
    tried = [folder / name for folder in folders for name in (path, Path(f"{path}.json"))]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    known = sorted(file.name for file in CONFIG_FOLDER.glob("*.json"))
    near = nearest(path.name, [*known, *(Path(name).stem for name in known)])
    places = ", ".join(map(str, tried))
    raise UserError(f"config: no file {path}; looked for {places}; in configs/: {', '.join(known) or 'none'}{near}")


def _check_depth(source: str, value: Any) -> None:
    """Raises UserError for what is nested so deeply that no part of the program could walk through it."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for outer in level
            if isinstance(outer, Mapping | list | tuple)
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            return
    raise UserError(f"{source}: lists or objects are nested too deeply; allowed: {MOST_LEVELS} levels")


def _override(raw: dict[str, Any], text: str) -> str | None:
    """Set one dotted key in `raw`; the problem, if the text or the place is wrong."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > MOST_LEVELS:
        return f'override: got "{shortened(text)}"; allowed: section.key=value, such as leap.target=0.05'
    if index := re.search(r"\[\d+\]", key):
        whole = f"{key[: index.start()].strip()}=[...]"
        return f"override: got \"{shortened(text)}\"; a list is given whole: --set '{shortened(whole)}'"
    try:
        found = _override_value(value.strip())
    except Twice as error:
        return f'override: got "{shortened(text)}"; {error}'
    if found is None and not _may_be_null(parts):
        _remove(raw, parts)
        return None
    place = raw
    for depth, part in enumerate(parts[:-1], start=1):
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            above = ".".join(parts[:depth])
            return f'override: got "{shortened(text)}"; {above} holds {show(place)}, which has no keys'
    place[parts[-1]] = found
    return None


def _remove(raw: dict[str, Any], parts: Sequence[str]) -> None:
    """Take a key out, if it is there."""
    place: Any = raw
    for part in parts[:-1]:
        place = place.get(part) if isinstance(place, dict) else None
    if isinstance(place, dict):
        place.pop(parts[-1], None)


def _may_be_null(parts: Sequence[str]) -> bool:
    """Whether null is a value of a key of ours; elsewhere, as in DeepSpeed's part, it removes the key."""
    section = SECTIONS.get(parts[0])
    if section is None or len(parts) == 1:
        return False
    field = section.model_fields.get(parts[1])
    return len(parts) > 2 or field is None or type(None) in get_args(field.annotation)


def _remember(text: str) -> None:
    """Note the secrets of an override, so that no message shows them."""
    remember(text)
    key, _, value = text.partition("=")
    remember_setting(key.strip(), value.strip(' "'))


def _override_value(text: str) -> Any:
    try:
        return loads(text)
    except Twice:
        raise
    except (ValueError, RecursionError):
        return text


# ---------------------------------------------------------------------------------------------- checking


def _parse_job(raw: Mapping[str, Any], source: str, problems: list[str]) -> JobConfig:
    _check_depth(source, raw)
    remember_all(raw)
    deepspeed = {key: value for key, value in raw.items() if key not in SECTIONS}
    unknown = {key: value for key, value in deepspeed.items() if key not in DEEPSPEED_KEYS}
    problems += [_unknown_top_level(key, value) for key, value in islice(unknown.items(), MOST_PROBLEMS + 1)]
    problems += _deepspeed_problems(deepspeed)
    given = {name: cls for name, cls in SECTIONS.items() if name in raw or name not in OPTIONAL}
    sections = {name: _parse_section(cls, name, raw.get(name, {}), problems) for name, cls in given.items()}
    problems += _length_problem(raw)
    problems += _schedule_problem(deepspeed, sections["train"])
    _raise_if(problems, source)
    return JobConfig.model_validate({"deepspeed": deepspeed, **sections})


def _schedule_problem(deepspeed: Mapping[str, Any], train: Section | None) -> list[str]:
    """A warm-up beside a scheduler of DeepSpeed's, which has its own."""
    default = TrainConfig.model_fields["warmup_fraction"].default
    if "scheduler" not in deepspeed or not isinstance(train, TrainConfig) or train.warmup_fraction == default:
        return []
    why = "the scheduler section says what the rate does: remove one of them"
    return [f"train.warmup_fraction: got {train.warmup_fraction}, which has no effect here: {why}"]


def _raise_if(problems: list[str], source: str) -> None:
    if len(problems) > MOST_PROBLEMS:
        lines = [f"{source}: more than {MOST_PROBLEMS} problems; the first are", *problems[:MOST_PROBLEMS]]
        raise UserError("\n  ".join(lines))
    if problems:
        plural = "problem" if len(problems) == 1 else "problems"
        raise UserError("\n  ".join([f"{source}: {len(problems)} {plural}", *problems]))


def _parse_section(cls: type[SectionT], name: str, raw: Any, problems: list[str]) -> SectionT | None:
    """The section, or None after adding what is wrong with it to `problems`."""
    if not isinstance(raw, Mapping):
        allowed = f"a JSON object with keys {', '.join(cls.model_fields)}"
        problems.append(f"{name}: got {show(raw)}; allowed: {allowed}")
        return None
    lines = [f"{name}.{key}: {text}" if key else f"{name}: {text}" for key, text in cls.conflicts(raw)]
    try:
        section = cls.model_validate(dict(raw))
    except ValidationError as error:
        lines += islice(_field_lines(cls, name, error), MOST_PROBLEMS + 1)
        section = None
    problems += list(dict.fromkeys(lines))
    return section


def _field_lines(cls: type[Section], section: str, error: ValidationError) -> Iterable[str]:
    """One line for each field that pydantic refuses."""
    found = error.errors()
    parents = {item["loc"][:-1] for item in found}
    for item in found:
        inside = item["loc"] in parents
        if not item["loc"] or inside:  # a conflict, or an item of the field is wrong: these have lines of their own
            continue
        place, owner, key = _place(cls, section, item["loc"])
        if item["type"] == "conflict":
            yield f"{place}.{item['msg']}"
        elif item["type"] == "extra_forbidden":
            own = owner is cls and section in SECTIONS
            yield _unknown_in_section(section, key, item["input"]) if own else _unknown(place, owner, item["input"])
        else:
            field = owner.model_fields[key]
            received = "missing" if item["type"] == "missing" else f"got {show(item['input'])}"
            why = f" ({item['msg']})" if item["type"] in ("pattern", "fp32") else ""
            choices = GATE_NAMES if key in ("gates", "granularity") else get_args(field.annotation)
            yield f"{place}: {received}{why}; allowed: {field.description}{nearest(item['input'], choices)}"


def _place(cls: type[Section], section: str, loc: Sequence[int | str]) -> tuple[str, type[Section], str]:
    """(dotted key with indices, the class that has the last key of it, that key)."""
    place, owner, key = section, cls, ""
    inner: type[Section] | None = cls
    for part in loc:
        if isinstance(part, int):
            place += f"[{part}]"
        elif inner is not None:
            place, owner, key = f"{place}.{part}", inner, part
            field = inner.model_fields.get(part)
            inner = _section_in(field.annotation) if field else None
    return place, owner, key


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a field's type is made of: tuple[GateConfig, ...] -> GateConfig."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)


def _unknown(place: str, owner: type[Section], value: Any) -> str:
    """The line for a key that a part of a section does not have."""
    own, key = list(owner.model_fields), place.rpartition(".")[2]
    return f"{place}: got {show(value)}, unknown key; allowed: {', '.join(own)}{nearest(key, own)}"


def _unknown_in_section(section: str, key: str, value: Any) -> str:
    """The line for a key that its section does not have."""
    own = list(SECTIONS[section].model_fields)
    elsewhere = [f"{name}.{key}" for name, cls in SECTIONS.items() if key in cls.model_fields]
    near = nearest(key, own, prefix=f"{section}.") if not elsewhere else f"; did you mean {elsewhere[0]}?"
    return f"{section}.{key}: got {show(value)}, unknown key; allowed: {', '.join(own)}{near}"


def _unknown_top_level(key: str, value: Any) -> str:
    """The line for a top-level key that is neither ours nor DeepSpeed's."""
    if key == "compression_training":
        return f"{key}: what DeepSpeed pruned by; {IMPORT}"
    names = [*SECTIONS, *DEEPSPEED_KEYS]
    inside = [f"{name}.{key}" for name, cls in SECTIONS.items() if key in cls.model_fields]
    near = f"; did you mean {inside[0]}?" if inside else nearest(key, names)
    allowed = f"{', '.join(SECTIONS)}, and DeepSpeed's keys"
    return f"{key}: got {show(value)}, unknown key; allowed: {allowed}{near}"


def _deepspeed_problems(deepspeed: Mapping[str, Any]) -> Iterable[str]:
    """What is refused of DeepSpeed's part before DeepSpeed sees it."""
    if "optimizer" in deepspeed:
        yield (
            f"optimizer: got {show(deepspeed['optimizer'])}; LEAP is the optimizer: remove it, and set "
            "learning_rate, weight_decay and warmup_fraction in train"
        )
    batch = deepspeed.get("train_micro_batch_size_per_gpu")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        received = "missing" if batch is None else f"got {show(batch)}"
        yield f"train_micro_batch_size_per_gpu: {received}; allowed: an integer >= 1"
    for key in ("bf16", "fp16"):
        section = deepspeed.get(key, {})
        if not isinstance(section, Mapping):
            yield f'{key}: got {show(section)}; allowed: a JSON object, such as {{"enabled": true}}'
        elif not isinstance(section.get("enabled", False), bool):
            yield f"{key}.enabled: got {show(section['enabled'])}; allowed: true or false"
    if deepspeed.get("managed_gradient_accumulation", True) is not True:
        received = show(deepspeed["managed_gradient_accumulation"])
        yield (
            f"managed_gradient_accumulation: got {received}; allowed: true: each micro-batch of a job would be a step; "
            "remove it"
        )
    zero = deepspeed.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f'zero_optimization: got {show(zero)}; allowed: a JSON object, such as {{"stage": 2}}'
    elif not is_int(zero.get("stage", 0)) or not 0 <= zero.get("stage", 0) <= 3:
        yield f"zero_optimization.stage: got {show(zero['stage'])}; allowed: 0, 1, 2 or 3"


def _length_problem(raw: Mapping[str, Any]) -> Iterable[str]:
    """A run has a length, unless it is one shot; leap.total_steps and train.max_steps are the same number."""
    leap, train = raw.get("leap"), raw.get("train", {})
    if isinstance(leap, Mapping) and isinstance(train, Mapping):
        if leap.get("mode") != "one_shot" and train.get("epochs") is None and train.get("max_steps") is None:
            yield from (f"train: {text}" for _, text in exactly_one(train, "epochs", "max_steps"))
        data, epochs = raw.get("data"), train.get("epochs")
        if isinstance(data, Mapping) and data.get("streaming") is True and epochs is not None:
            yield f"train.epochs: got {show(epochs)}; nobody knows how long a streamed dataset is: give train.max_steps"
        total, steps = leap.get("total_steps"), train.get("max_steps")
        if is_int(total) and is_int(steps) and total != steps:
            yield f"leap.total_steps: got {total}; allowed: train.max_steps, which is {steps}, or null"
