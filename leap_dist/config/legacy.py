"""Reads the `compression_training` section of a legacy DeepSpeed config: what was pruned, how far, and when."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from leap_dist.config.section import is_int, is_number, nearest, show

IMPORT = "make a job of the old file: python launch/prune.py --import-compression FILE"
PRUNING = ("sparse_pruning", "row_pruning", "head_pruning")
WITHOUT_A_GATE = {
    "channel_pruning": "LEAP has no gate for the channels of convolutions",
    "weight_quantization": "LEAP does not quantise while it trains; export to int8, int8_torch or gguf_q8_0",
    "activation_quantization": "LEAP does not quantise while it trains; export to int8, which does at run time",
    "layer_reduction": 'LEAP does not start from fewer layers; the gate "depth" learns which layers can go',
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

_ANCHOR = re.compile(r"(\\[^Z]|\[\^?\]?(?:\\.|[^\]\\])*\])|\$|\\Z")


def tensor_pattern(modules: str) -> str:
    """A pattern of tensor names: the weights of the modules in whose names `re.search` finds `modules`.

    What is found has to end before ".weight", and where the old pattern ends with the name, the new one ends there.
    """
    inside = _ANCHOR.sub(lambda found: found[1] or r"(?=\.weight$)", modules)
    return rf"re:.*(?:{inside}).*\.weight$"


@dataclass(frozen=True)
class Group:
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
class Reader:
    """Reads compression_training, and gathers what is wrong in it and what is not carried over."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sections: dict[str, list[Group]] = field(default_factory=dict)
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

    def _snip(self, place: str, shared: Mapping[str, Any]) -> Group:
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
            return Group("element" if size == "1x1" else f"block:{size}", density, ())
        if n_m and int(n_m[1]) < int(n_m[2]):
            # The old pattern says how many of every m are pruned, ours how many are kept.
            kept, of = int(n_m[2]) - int(n_m[1]), int(n_m[2])
            if not math.isclose(density, kept / of):
                self.notes.append(f"{place}.dense_ratio {density}: not carried over: the pattern keeps {kept} of {of}")
            return Group(f"{kept}:{of}", kept / of, ())
        self.problems.append(f'{place}.block_pattern: got {show(pattern)}; allowed: NxM or N:M, such as "4x1" or "2:4"')
        return Group("element", density, ())

    def _group(self, name: str, place: str, body: Any) -> Group:
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
        return Group(granularity, self._density(f"{place}.params", params, 0.5), modules)

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
        """A number of steps, as it is reported later."""
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
