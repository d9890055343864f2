"""A legacy DeepSpeed config with a `compression_training` section -> a job file with a `leap` section.

DeepSpeed has removed its compression library and refuses configs that still have the section. What LEAP does in its
place is carried over; for everything else there is a line that says what is lost and what to set.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leap_dist.config import DEEPSPEED_KEYS, SECTIONS, LeapConfig
from leap_dist.errors import UserError
from leap_dist.job_file import parse_leap, read_json
from leap_dist.section import is_int, is_number, nearest, show

PRUNING = ("sparse_pruning", "row_pruning", "head_pruning")
WITHOUT_A_GATE = {
    "channel_pruning": "LEAP has no gate for the channels of convolutions",
    "weight_quantization": "LEAP does not quantise; quantise the exported model",
    "activation_quantization": "LEAP does not quantise; quantise the exported model",
    "layer_reduction": 'LEAP does not start from fewer layers; the gate "layer" learns which sublayers can go',
}
SHARED_KEYS = ("enabled", "method", "schedule_offset")
SNIP_KEYS = ("schedule_offset_end", "schedule_offset_stride", "block_pattern", "dense_ratio", "excluded_modules")
"""Keys of shared_parameters that DeepSpeed reads for sparse_pruning's method "snip_momentum" alone."""
METHODS = {
    "sparse_pruning": ("l1", "topk", "snip_momentum"),
    "row_pruning": ("l1", "topk"),
    "head_pruning": ("topk", "l1"),
}
"""The first is what DeepSpeed takes where none is given."""
STRUCTURED = {"head": "attention", "neuron": "FFN"}
"""Gates on blocks, not on single tensors, and the part of a layer that they prune."""
PLACE_WORDS = {
    "attention": re.compile(r"att|self|query|key|value|[qkvo]_proj"),
    "FFN": re.compile(r"intermediate|mlp|ffn|feed|fc|(up|down|gate)_proj"),
}
"""How patterns for one part of a layer look; a pattern with the words of neither, or of both, may give both."""


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
        raise UserError(f"--output: {output} cannot be written: {error.strerror}") from error


def import_compression(raw: Mapping[str, Any], source: str = "config") -> Imported:
    """The job for a DeepSpeed config with compression_training; UserError where there is nothing to carry over."""
    legacy = raw.get("compression_training")
    if not isinstance(legacy, Mapping):
        received = show(legacy) if "compression_training" in raw else "nothing"
        raise UserError(f"{source}: compression_training: got {received}; allowed: the object of an old config")
    if "leap" in raw:
        raise UserError(f"{source}: leap: the file has this section already; remove it or compression_training")
    reader = _Reader()
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


# ---------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Group:
    """One entry of different_groups. `modules`: patterns over module names; empty: all of them."""

    granularity: str
    density: float
    modules: tuple[str, ...]

    @property
    def places(self) -> set[str]:
        """The parts of a layer, attention and FFN, that the group can prune."""
        if self.granularity in STRUCTURED:
            return {STRUCTURED[self.granularity]}
        found = [{place for place, words in PLACE_WORDS.items() if words.search(text)} for text in self.modules]
        return set().union(*found) if found and all(found) else set(PLACE_WORDS)


@dataclass
class _Reader:
    """Reads compression_training, and gathers what is wrong in it and what is not carried over."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: dict[str, list[_Group]] = field(default_factory=dict)
    exclude: list[str] = field(default_factory=list)
    starts: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)

    def read(self, legacy: Mapping[str, Any]) -> None:
        """Every section of compression_training."""
        for name, body in legacy.items():
            if name not in (*PRUNING, *WITHOUT_A_GATE):
                near = nearest(name, (*PRUNING, *WITHOUT_A_GATE))
                self.notes.append(f"{name}: not carried over: unknown key{near}")
            elif (section := self._object(name, body)) and self._enabled(name, section):
                if name in WITHOUT_A_GATE:
                    self.notes.append(f"{name}: not carried over: {WITHOUT_A_GATE[name]}")
                else:
                    self._pruning(name, section)

    def _enabled(self, name: str, section: Mapping[str, Any]) -> bool:
        place = name if name == "layer_reduction" else f"{name}.shared_parameters"
        holder = section if name == "layer_reduction" else self._object(place, section.get("shared_parameters", {}))
        enabled = holder.get("enabled", False)
        if not isinstance(enabled, bool):
            self.problems.append(f"{place}.enabled: got {show(enabled)}; allowed: true or false")
        return enabled is True

    def _pruning(self, name: str, section: Mapping[str, Any]) -> None:
        """One enabled section of PRUNING."""
        self._unknown(name, section, ("shared_parameters", "different_groups"))
        shared = section["shared_parameters"]
        method = self._method(name, shared)
        groups = self._object(f"{name}.different_groups", section.get("different_groups", {}))
        if method == "snip_momentum":
            if groups:
                self.notes.append(f'{name}.different_groups: not carried over: method "{method}" has one group')
            self.sections[name] = [self._snip(f"{name}.shared_parameters", shared)]
        else:
            if not groups:
                self.problems.append(f"{name}.different_groups: missing; allowed: one or more groups with dense_ratio")
            found = [self._group(name, f"{name}.different_groups.{key}", body) for key, body in groups.items()]
            self.sections[name] = found

    def _method(self, name: str, shared: Mapping[str, Any]) -> str:
        """The method, with a line on what becomes of it, and the keys of shared_parameters beside it."""
        place, methods = f"{name}.shared_parameters", METHODS[name]
        method = shared.get("method", methods[0])
        if method not in methods:
            allowed = " or ".join(map(show, methods))
            self.problems.append(f"{place}.method: got {show(method)}; allowed: {allowed}{nearest(method, methods)}")
        elif method != "topk":
            old = '; "rule": "magnitude" in leap is nearest to the old behaviour' if method == "l1" else ""
            self.notes.append(f'{place}.method "{method}": LEAP learns scores and thresholds instead{old}')
        known = [*SHARED_KEYS, *(["num_heads"] if name == "head_pruning" else [])]
        if method == "snip_momentum":
            known += SNIP_KEYS
            self._steps(self.ends, f"{place}.schedule_offset_end", shared)
        if "num_heads" in known and "num_heads" in shared:
            self.notes.append(f"{place}.num_heads: not needed: LEAP reads it from the model")
        self._steps(self.starts, f"{place}.schedule_offset", shared)
        self._unknown(place, shared, known, SNIP_KEYS if name == "sparse_pruning" else ())
        return str(method)

    def _snip(self, place: str, shared: Mapping[str, Any]) -> _Group:
        """The one group of method "snip_momentum"; it names what is left out, not what is pruned."""
        density = self._density(place, shared, 0.1)
        excluded = self._patterns(f"{place}.excluded_modules", shared.get("excluded_modules", []))
        self.exclude += map(tensor_pattern, excluded)
        if excluded:
            text = "now leap.exclude, for all gates; remove patterns that the model has no weight for"
            self.notes.append(f"{place}.excluded_modules: {text}")
        if "schedule_offset_stride" in shared:
            self.notes.append(f"{place}.schedule_offset_stride: not carried over: LEAP moves its masks in every step")
        pattern = shared.get("block_pattern", "4x1")
        block = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(pattern))
        n_m = re.fullmatch(r"([1-9]\d*)(?::|in)([1-9]\d*)", str(pattern))
        if block:
            size = f"{block[1]}x{block[2]}"
            return _Group("element" if size == "1x1" else f"block:{size}", density, ())
        if n_m and int(n_m[1]) < int(n_m[2]):
            # The old pattern says how many of every m are pruned, ours how many are kept.
            kept, of = int(n_m[2]) - int(n_m[1]), int(n_m[2])
            if not math.isclose(density, kept / of):
                self.notes.append(f"{place}.dense_ratio {density}: not carried over: the pattern keeps {kept} of {of}")
            return _Group(f"{kept}:{of}", kept / of, ())
        self.problems.append(f'{place}.block_pattern: got {show(pattern)}; allowed: NxM or N:M, such as "4x1" or "2:4"')
        return _Group("element", density, ())

    def _group(self, name: str, place: str, body: Any) -> _Group:
        """One entry of different_groups."""
        group = self._object(place, body)
        params = self._object(f"{place}.params", group.get("params", {}))
        self._unknown(place, group, ("params", "modules", "related_modules"))
        self._unknown(f"{place}.params", params, ("dense_ratio", "num_heads"))
        modules = self._patterns(f"{place}.modules", group.get("modules", ["*"]))
        granularity = {"sparse_pruning": "element", "row_pruning": "row", "head_pruning": "head"}[name]
        related = group.get("related_modules")
        if related and granularity == "row":
            granularity = "neuron"
            self.notes.append(
                f'{place}.related_modules {show(related)}: the gate "neuron" takes the column of the next layer of the '
                "FFN with each row, and the row of a gate layer; other pairs of layers are not carried over"
            )
        elif related and granularity == "head":
            self.notes.append(
                f"{place}.related_modules: not needed: a head goes with its query, key, value and output weights"
            )
        elif related:
            self.notes.append(f"{place}.related_modules: not carried over: it is for structured pruning")
        return _Group(granularity, self._density(f"{place}.params", params, 0.5), modules)

    def _density(self, place: str, holder: Mapping[str, Any], default: float) -> float:
        if "dense_ratio" not in holder:
            self.notes.append(f"{place}.dense_ratio: missing; {default} is DeepSpeed's default")
        ratio = holder.get("dense_ratio", default)
        if is_number(ratio) and 0 < ratio <= 1:
            return float(ratio)
        self.problems.append(f"{place}.dense_ratio: got {show(ratio)}; allowed: a number, 0 < dense_ratio <= 1")
        return default

    def _patterns(self, place: str, value: Any) -> tuple[str, ...]:
        """Regular expressions over module names; none where "*" stands for all."""
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            self.problems.append(f"{place}: got {show(value)}; allowed: a list of patterns of module names")
            return ()
        if "*" in patterns:
            return ()
        for pattern in patterns:
            try:
                re.compile(tensor_pattern(pattern)[3:])
            except re.error as error:
                self.problems.append(f"{place}: got {show(pattern)}; not a regular expression: {error}")
        return tuple(patterns)

    def _steps(self, found: dict[str, int], place: str, shared: Mapping[str, Any]) -> None:
        """A number of steps, as it is later told of."""
        steps = shared.get(place.rpartition(".")[2], 0)
        if not is_int(steps) or steps < 0:
            self.problems.append(f"{place}: got {show(steps)}; allowed: an integer >= 0")
        elif steps:
            found[place] = steps

    def _object(self, place: str, value: Any) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            return value
        self.problems.append(f"{place}: got {show(value)}; allowed: a JSON object")
        return {}

    def _unknown(
        self, place: str, holder: Mapping[str, Any], known: Iterable[str], elsewhere: Iterable[str] = ()
    ) -> None:
        """A line for each key that DeepSpeed would not have read here."""
        known = list(known)
        for key in holder:
            if key in known:
                continue
            why = 'only method "snip_momentum" has it' if key in elsewhere else f"unknown key{nearest(key, known)}"
            self.notes.append(f"{place}.{key}: not carried over: {why}")


# ---------------------------------------------------------------------------------------------- the leap section

_ANCHOR = re.compile(r"(\\[^Z]|\[\^?\]?(?:\\.|[^\]\\])*\])|\$|\\Z")


def tensor_pattern(modules: str) -> str:
    """A pattern of tensor names: the weights of the modules in whose names `re.search` finds `modules`.

    What is found has to end before ".weight", and where the old pattern ends with the name, the new one ends there.
    """
    inside = _ANCHOR.sub(lambda found: found[1] or r"(?=\.weight$)", modules)
    return rf"re:.*(?:{inside}).*\.weight$"


def _gates(reader: _Reader) -> dict[str, Any]:
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


def _target(sections: Mapping[str, list[_Group]], notes: list[str]) -> float:
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


# ---------------------------------------------------------------------------------------------- steps and rates


def _schedule(reader: _Reader, train: Mapping[str, Any]) -> dict[str, float]:
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
    given = raw.get("train")
    scheduler = raw.get("scheduler")
    params = scheduler.get("params") if isinstance(scheduler, Mapping) else None
    steps = params.get("total_num_steps", 0) if isinstance(params, Mapping) else 0
    if is_int(steps) and steps > 0 and not (isinstance(given, Mapping) and given.keys() & {"epochs", "max_steps"}):
        train["max_steps"] = steps
        notes.append(f"scheduler.params.total_num_steps {steps}: also train.max_steps, the length of the run")
    return train | dict(given) if isinstance(given, Mapping) else train


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
