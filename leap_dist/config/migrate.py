"""A legacy DeepSpeed config with a `compression_training` section -> a job file with a `leap` section.

DeepSpeed has removed its compression library and refuses configs that still have the section. What LEAP does in its
place is carried over; for everything else there is a line that says what is lost and what to set.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_dist.config.job_file import parse_leap, parse_section
from leap_dist.config.json_file import read_json
from leap_dist.config.leap import LeapConfig
from leap_dist.config.legacy import PLACE_WORDS, PRUNING, STRUCTURED, Group, Reader, tensor_pattern
from leap_dist.config.section import is_int, is_number, show
from leap_dist.config.sections import DEEPSPEED_KEYS, SECTIONS, TrainConfig
from leap_dist.errors import UserError


@dataclass(frozen=True)
class Imported:
    """A job, lines on what it does not have of the old config, and keys without which it does not run."""

    job: dict[str, Any]
    notes: tuple[str, ...]
    missing: tuple[str, ...]


def import_file(file: Path, output: Path | None) -> int:
    """Print the job that `file` becomes, or write it to `output`; the lines on it go to stderr. The exit code."""
    imported = import_compression(read_json(file), str(file))
    text = json.dumps(imported.job, indent=2, ensure_ascii=False)
    if output is None:
        print(text)
    else:
        _write_new(output, f"{text}\n")
        print(f"job file: {output}")
    lines = [f"note: {note}" for note in imported.notes]
    lines += [f"add: {', '.join(imported.missing)}"] if imported.missing else []
    print("\n".join(lines), file=sys.stderr)
    return 0


def _write_new(output: Path, text: str) -> None:
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"--output: {output} exists; choose another file, or remove it") from None
    except OSError as error:
        with suppress(OSError):
            output.unlink(missing_ok=True)  # a full disk has taken the name, and not all of the text
        raise UserError(f"--output: {output} cannot be written: {error.strerror}") from error


def import_compression(raw: Mapping[str, Any], source: str = "config") -> Imported:
    """The job for a DeepSpeed config with compression_training; UserError where there is nothing to carry over."""
    legacy = raw.get("compression_training")
    if not isinstance(legacy, Mapping):
        received = show(legacy) if "compression_training" in raw else "nothing"
        raise UserError(f"{source}: compression_training: got {received}; allowed: the object of an old config")
    if "leap" in raw:
        raise UserError(f"{source}: leap: the file has this section already; remove it or compression_training")
    reader = Reader()
    reader.read(legacy)
    if reader.problems:
        plural = "problem" if len(reader.problems) == 1 else "problems"
        raise UserError("\n  ".join([f"{source}: {len(reader.problems)} {plural}", *reader.problems]))
    if not reader.sections:
        raise UserError(
            f"{source}: compression_training: nothing that LEAP prunes is enabled in it; "
            f"allowed: {', '.join(PRUNING)}, with shared_parameters.enabled true"
        )
    train = _train_section(raw, reader.notes)
    leap = {"target": _target(reader.sections, reader.notes), **_gates(reader), **_schedule(reader, train)}
    parse_leap(leap)
    return _job(raw, train, leap, reader.notes)


def _job(raw: Mapping[str, Any], train: dict[str, Any], leap: dict[str, Any], notes: list[str]) -> Imported:
    """The parts together; what neither DeepSpeed nor a job file knows stays behind."""
    own = ("compression_training", "optimizer", "train")
    gone = [key for key in raw if key not in (*own, *SECTIONS, *DEEPSPEED_KEYS)]
    notes += [f"{key}: not carried over: today's DeepSpeed does not read it" for key in gone]
    kept = {key: value for key, value in raw.items() if key not in (*own, *gone)}
    missing = [f"{name}.{key}" for name, key in (("model", "name"), ("data", "task")) if name not in raw]
    if not {"epochs", "max_steps"} & train.keys():
        missing.append("train.epochs")
    if not is_int(raw.get("train_micro_batch_size_per_gpu")):
        missing.append("train_micro_batch_size_per_gpu")
    return Imported({**kept, **({"train": train} if train else {}), "leap": leap}, tuple(notes), tuple(missing))


def _gates(reader: Reader) -> dict[str, Any]:
    """gates, include and exclude.

    A gate on tensors has its patterns itself. A gate on blocks would take them for names of blocks: there they stand
    in leap.include, which chooses for all gates, so that they are kept only where no gate on tensors is.
    """
    modules: dict[str, tuple[str, ...]] = {}
    whole: set[str] = set()
    for group in (group for groups in reader.sections.values() for group in groups):
        whole |= set() if group.modules else {group.granularity}
        before = modules.get(group.granularity, ())
        modules[group.granularity] = tuple(dict.fromkeys((*before, *map(tensor_pattern, group.modules))))
    include = {gate: [] if gate in whole else list(patterns) for gate, patterns in modules.items()}
    blocks = {gate: patterns for gate, patterns in include.items() if gate in STRUCTURED}
    chosen = {gate: patterns for gate, patterns in include.items() if gate not in STRUCTURED}
    result: dict[str, Any] = {
        "gates": [{"granularity": gate, "include": own} if (own := chosen.get(gate)) else gate for gate in include]
    }
    if not chosen and all(blocks.values()):
        result["include"] = [pattern for patterns in blocks.values() for pattern in patterns]
    else:
        reader.notes += [
            f'modules of the gate "{gate}": not carried over beside gates for other tensors: it prunes every '
            f"{STRUCTURED[gate]} block; name blocks in its include to change that"
            for gate, patterns in blocks.items()
            if patterns
        ]
    if chosen:
        reader.notes.append(
            "modules: LEAP's gates are for the linear layers of the encoder or decoder; embeddings and the model's "
            "head stay dense unless leap.include names their weights"
        )
    if reader.exclude:
        result["exclude"] = reader.exclude
    return result


def _target(sections: Mapping[str, list[Group]], notes: list[str]) -> float:
    """One density. Groups of a section count alike; sections multiply in the parts of a layer where they meet."""
    densities = {name: [group.density for group in groups] for name, groups in sections.items()}
    means = {name: sum(values) / len(values) for name, values in densities.items()}
    places = {name: set().union(*(group.places for group in groups)) for name, groups in sections.items()}
    met = [
        math.prod(means[name] for name in sections if place in places[name])
        for place in PLACE_WORDS
        if any(place in found for found in places.values())
    ]
    target = round(sum(met) / len(met), 6)
    for name, values in densities.items():
        if len(set(values)) > 1:
            given = ", ".join(f"{value:g}" for value in values)
            notes.append(
                f"{name}: the groups' dense_ratio {given} become one, their mean {means[name]:g}: LEAP learns the "
                "shares under one target"
            )
    if len(sections) > 1:
        given = " and ".join(f"{name} {means[name]:g} ({', '.join(sorted(places[name]))})" for name in sections)
        notes.append(
            f"leap.target {target:g}: from {given}, multiplied where they meet, and the mean of attention and FFN: "
            "set the density that you want"
        )
    return target


def _schedule(reader: Reader, train: Mapping[str, Any]) -> dict[str, float]:
    """dense_fraction and settle_fraction, where the length of the run is known; or lines on how to set them."""
    total = train.get("max_steps")
    leap: dict[str, float] = {}
    if len(set(reader.starts.values())) > 1:
        given = ", ".join(f"{place} {steps}" for place, steps in reader.starts.items())
        reader.notes.append(f"{given}: LEAP has one dense phase, which ends with the first of them")
    start = min(reader.starts.items(), key=lambda item: item[1], default=("", 0))
    end = next(iter(reader.ends.items()), ("", 0))
    dense = round(start[1] / total, 6) if total else 0.0
    settle = round(1 - end[1] / total, 6) if total and end[1] else 0.0
    if dense + (settle or LeapConfig.model_fields["settle_fraction"].default) < 1 and settle >= 0:
        leap |= {"dense_fraction": dense} if dense else {}
        leap |= {"settle_fraction": settle} if settle else {}
    if start[1] and "dense_fraction" not in leap:
        text = f"{start[0]} {start[1]}: LEAP counts in parts of the run: set leap.dense_fraction to {start[1]}"
        reader.notes.append(f"{text} / train.max_steps")
    if end[1] and "settle_fraction" not in leap:
        text = f"{end[0]} {end[1]}: LEAP counts in parts of the run: set leap.settle_fraction to 1 - {end[1]}"
        reader.notes.append(f"{text} / train.max_steps")
    return leap


def _train_section(raw: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The train section from optimizer and scheduler; what the config has of it already goes first."""
    train = _from_optimizer(raw["optimizer"], notes) if "optimizer" in raw else {}
    given = raw.get("train", {})
    if not isinstance(given, Mapping):
        raise UserError(f'train: got {show(given)}; allowed: a JSON object, such as {{"epochs": 3}}')
    scheduler = raw.get("scheduler")
    params = scheduler.get("params") if isinstance(scheduler, Mapping) else None
    steps = params.get("total_num_steps", 0) if isinstance(params, Mapping) else 0
    if is_int(steps) and steps > 0 and not given.keys() & {"epochs", "max_steps"}:
        train["max_steps"] = steps
        notes.append(f"scheduler.params.total_num_steps {steps}: also train.max_steps, the length of the run")
    train |= given
    parse_section(TrainConfig, "train", train)
    return train


def _from_optimizer(optimizer: Any, notes: list[str]) -> dict[str, Any]:
    """learning_rate and weight_decay of an Adam; LEAP's step is AdamW, and the config may name no other."""
    section = optimizer if isinstance(optimizer, Mapping) else {}
    kind, params = section.get("type"), section.get("params")
    if str(kind).lower() not in ("adam", "adamw") or not isinstance(params, Mapping):
        notes.append(f"optimizer {show(kind)}: not carried over: LEAP's step is AdamW; set train.learning_rate")
        return {}
    train: dict[str, Any] = {}
    for old, new in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        value = params.get(old, -1)
        if is_number(value) and (value > 0 or (old == "weight_decay" and value == 0)):
            train[new] = value
            notes.append(f"optimizer.params.{old} {value}: now train.{new}")
    lost = [
        f"{key} {show(value)}" for key, value in params.items() if {"lr": "learning_rate"}.get(key, key) not in train
    ]
    if lost:
        notes.append(f"optimizer.params: not carried over: {', '.join(lost)}")
    return train
