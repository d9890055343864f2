"""How a rank reads a checkpoint that other ranks, or another ZeRO stage, wrote: which runs of which files it needs.

Everything is checked here, before anything of the engine changes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from leap_dist.checkpoint.engine_state import (
    buffer_key,
    buffer_table,
    fragment_states,
    gate_table,
    persistent_buffers,
    random_states,
    scheduler_state,
    section_of,
    tensor_table,
)
from leap_dist.checkpoint.folders import step_of
from leap_dist.checkpoint.manifest import MANIFEST, Damaged, EngineState, Manifest, check_file, file_name, read_manifest
from leap_dist.config.leap import LeapConfig
from leap_dist.core.fragments import Fragment
from leap_dist.core.gates import GatePlan
from leap_dist.core.hosted import GATED
from leap_dist.core.thresholds import CALIBRATIONS
from leap_dist.errors import UserError
from leap_dist.zero.binding import all_fragments
from leap_dist.zero.ranks import Ranks

OF_SCHEDULE = "target", "total_steps", "dense_fraction", "settle_fraction"
"""Settings that say when a run settles, and at what."""


@dataclass(frozen=True)
class Piece:
    """Elements [first, last) of a stored state, and where they go."""

    key: str
    first: int
    last: int
    target: Tensor


@dataclass(frozen=True)
class Restoring:
    """A checkpoint that can be read: pieces by file, (buffer, its value), and this rank's random states if the ranks
    are as many."""

    manifest: Manifest
    pieces: Mapping[Path, list[Piece]]
    buffers: Sequence[tuple[Tensor, Tensor]]
    random: Mapping[str, Tensor]

    def fill(self) -> None:
        """Put all pieces in place."""
        for path, pieces in self.pieces.items():
            with safe_open(path, framework="pt") as file:
                for piece in pieces:
                    piece.target.copy_(file.get_slice(piece.key)[piece.first : piece.last])
        for buffer, value in self.buffers:
            buffer.copy_(value)


def plan_restoring(checkpoint: Path, engine: Any, ranks: Ranks) -> Restoring:
    """How this rank reads a checkpoint. Raises Damaged or OSError; UserError if it does not fit the engine."""
    manifest = read_manifest(checkpoint)
    _check_fits(checkpoint, manifest, engine)
    runs = _runs_by_tensor(manifest)
    pieces: dict[Path, list[Piece]] = {}
    for fragment in all_fragments(engine):
        for name, first, offset, length in runs_under(fragment, runs):
            for key, view in fragment_states(engine, fragment):
                piece = Piece(f"{fragment.tensor}/{key}", first, first + length, view[offset : offset + length])
                pieces.setdefault(checkpoint / name, []).append(piece)
    own = checkpoint / file_name(ranks.rank)
    same_ranks = manifest.world_size == ranks.world_size
    buffers = own if same_ranks else checkpoint / file_name(0)
    for path in pieces.keys() | ({own} if same_ranks else set()) | ({buffers} if manifest.buffers else set()):
        check_file(path, manifest.files[path.name])
        _check_pieces(path, manifest, pieces.get(path, []))
    found = _buffers_of(buffers, engine) if manifest.buffers else []
    return Restoring(manifest, pieces, found, _random_of(own) if same_ranks else {})


def runs_under(
    fragment: Fragment, runs: Mapping[str, list[tuple[int, int, str]]]
) -> Iterator[tuple[str, int, int, int]]:
    """(file, first element in its run, first element in the fragment, number) of all that makes up a fragment.

    runs: (first element, number, file) of every stored run of each tensor, in order. Raises Damaged for a gap.
    """
    done = 0
    for start, length, name in runs.get(fragment.tensor, ()):
        first = fragment.start + done
        last = min(start + length, fragment.start + fragment.length)
        if start <= first < last:
            yield name, first - start, done, last - first
            done += last - first
    if done < fragment.length:
        raise Damaged(f"element {fragment.start + done} of {fragment.tensor!r} is in no file")


def _runs_by_tensor(manifest: Manifest) -> dict[str, list[tuple[int, int, str]]]:
    runs: dict[str, list[tuple[int, int, str]]] = {}
    for name, entry in manifest.files.items():
        for tensor, (start, length) in entry.runs.items():
            runs.setdefault(tensor, []).append((start, length, name))
    return {tensor: sorted(found) for tensor, found in runs.items()}


def _check_fits(checkpoint: Path, manifest: Manifest, engine: Any) -> None:
    """Raises UserError if the checkpoint is of another model, of other gates or schedules; Damaged for values."""
    leap, saved = engine.leap, manifest.engine
    gates = _first_difference(_numbered(manifest.gates), _numbered(gate_table(engine)), "gate")
    if not gates and (others := _other_settings(manifest, engine)):  # tensors may have other states by them
        raise UserError(
            f"--resume: {checkpoint} is of another leap section: {'; '.join(others)}; restore the config, or start a "
            "new run"
        )
    differing = _first_difference(manifest.tensors, tensor_table(engine), "tensor") or gates
    if manifest.buffers is not None:
        differing = differing or _first_difference(manifest.buffers, buffer_table(engine), "buffer")
    if not differing and len(saved.lr) != len(leap.param_groups):
        differing = f"it has {len(saved.lr)} parameter groups, this run {len(leap.param_groups)}"
    if not differing and saved.base_lr is None and not leap.param_groups[0][GATED]:
        differing = "an older version wrote it, with its parameter groups in another order"
    if not differing and not _alike(saved.scheduler, scheduler_state(engine)):
        differing = "its learning rate follows another scheduler"
    if differing:
        raise UserError(
            f"--resume: {checkpoint} is of another model, or of other gates: {differing}; restore the config, or "
            "start a new run"
        )
    counts = zip(saved.leap.kept_units, leap.plan.gates, strict=False)
    if len(saved.leap.kept_units) != len(leap.plan.gates) or any(kept > gate.num_units for kept, gate in counts):
        raise Damaged("it keeps more units than there are")
    if problem := _wrong_values(step_of(checkpoint), saved, leap.plan):
        raise Damaged(f"{MANIFEST} was changed: {problem}")


def _other_settings(manifest: Manifest, engine: Any) -> list[str]:
    """The settings that a checkpoint was written with and this run does not have, in words.

    One that an older version did not know had its default. A run that settles with the next step uses nothing of
    the schedule before it: it may branch off from another, as the rungs of a ladder do.
    """
    if manifest.section is None:
        return []
    state, now = manifest.engine.leap, section_of(engine)
    before = LeapConfig.model_construct().model_dump(mode="json") | manifest.section
    branches_off = not state.settled and engine.leap.schedule.phase(state.num_steps + 1) == "settle"
    free = OF_SCHEDULE if branches_off else ()
    return [
        f"leap.{key} was {before[key]!r} and is {value!r}"
        for key, value in now.items()
        if key not in free and before[key] != value
    ]


def _wrong_values(step: int, saved: EngineState, plan: GatePlan) -> str:
    """What no run can have written of its state after `step` steps; "" if all may be true."""
    leap = saved.leap
    if leap.num_steps != step:
        return f"engine.leap.num_steps is {leap.num_steps}, the folder is of step {step}"
    if not leap.num_left_out_dense <= leap.num_left_out <= step:
        return f"engine.leap.num_left_out is {leap.num_left_out}; allowed: the number of steps at most"
    if not CALIBRATIONS[0] <= leap.calibration <= CALIBRATIONS[1]:
        return f"engine.leap.calibration is {leap.calibration}; allowed: {CALIBRATIONS[0]:g} to {CALIBRATIONS[1]:g}"
    if leap.kept_weights > plan.prunable or not leap.task_size >= 0.0:
        return "engine.leap.kept_weights or task_size is out of range"
    units = {str(number): gate.num_units for number, gate in enumerate(plan.gates)}
    if any(len(values) != units.get(gate) for gate, values in leap.given.items()):
        return "engine.leap.given is of other gates"
    sizes = {"steps": 1, "sums": len(units), "squares": len(units)} if leap.signal else {}
    if {key: len(values) for key, values in leap.signal.items()} != sizes:
        return "engine.leap.signal is of other gates"
    if not all(0.0 <= value < math.inf for values in leap.signal.values() for value in values):
        return "engine.leap.signal is out of range"
    whole = list(units.values()), plan.prunable
    if not leap.masked and (list(leap.kept_units), leap.kept_weights) != whole:
        return "engine.leap.masked is false, and yet units or weights are pruned"
    if not all(0.0 <= rate < math.inf for rate in saved.lr):
        return f"engine.lr is {list(saved.lr)}; allowed: finite numbers >= 0"
    return ""


def _numbered(gates: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """(place, number of units) of every gate."""
    return {name: (place, num_units) for place, (name, num_units) in enumerate(gates)}


def _first_difference(saved: Mapping[str, Any], now: Mapping[str, Any], what: str) -> str:
    """The first entry that the two tables do not share, in words; "" if they are equal."""
    for name in [*now, *saved]:
        if name not in saved:
            return f"it has no {what} {name!r}"
        if name not in now:
            return f"this run has no {what} {name!r}"
        if saved[name] != now[name]:
            return f"{what} {name!r} was {saved[name]} and is {now[name]}"
    return ""


def _alike(saved: Any, now: Any) -> bool:
    """Whether a scheduler's state has the keys and the kinds of values that it has now."""
    if isinstance(now, dict):
        return isinstance(saved, dict) and saved.keys() == now.keys() and all(_alike(saved[k], now[k]) for k in now)
    if isinstance(now, list):
        return isinstance(saved, list) and len(saved) == len(now) and all(map(_alike, saved, now))
    if isinstance(now, int | float):
        return isinstance(saved, int | float)
    return isinstance(saved, str | None | int | float) if now is None else type(saved) is type(now)


def _check_pieces(path: Path, manifest: Manifest, pieces: list[Piece]) -> None:
    """Raises Damaged unless the file holds what the manifest says, before anything is read of it."""
    entry = manifest.files[path.name]
    try:
        with safe_open(path, framework="pt") as file:
            for key in {piece.key for piece in pieces}:
                tensor, _, state = key.rpartition("/")
                stored = file.get_slice(key)
                found = stored.get_dtype(), list(stored.get_shape())
                if found != (manifest.tensors[tensor].states[state], [entry.runs[tensor][1]]):
                    raise Damaged(f"{path.name}: {key!r} has another size or dtype than its manifest says")
    except SafetensorError as error:
        raise Damaged(f"{path.name} cannot be read: {error}") from error


def _buffers_of(path: Path, engine: Any) -> list[tuple[Tensor, Tensor]]:
    """The model's buffers whose values in a file are others, with these, on the CPU."""
    found = []
    try:
        with safe_open(path, framework="pt") as file:
            for name, buffer in persistent_buffers(engine).items():
                value = file.get_tensor(buffer_key(name)).to(buffer.dtype)
                if value.shape != buffer.shape:
                    raise Damaged(f"{path.name}: buffer {name!r} has another size than its manifest says")
                if not torch.equal(value, buffer.cpu()):
                    found.append((buffer, value))
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise Damaged(f"{path.name}: its buffers cannot be read: {error}") from error
    return found


def _random_of(path: Path) -> dict[str, Tensor]:
    """The random states in a rank's own file, tried on generators of their own."""
    try:
        with safe_open(path, framework="pt") as file:
            states = {name: file.get_tensor(name) for name in random_states() if name in file.keys()}  # noqa: SIM118  a file handle, no dict
        for name, state in states.items():
            torch.Generator(name.removeprefix("random/")).set_state(state)
    except (SafetensorError, RuntimeError, TypeError) as error:
        raise Damaged(f"{path.name}: its random state cannot be used: {error}") from error
    if "random/cpu" not in states:
        raise Damaged(f"{path.name} has no random state")
    return states
