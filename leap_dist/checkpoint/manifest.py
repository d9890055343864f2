"""manifest.json: what the files of a checkpoint have to be, and what they hold.

It is written last, so a folder without it is not complete; a checksum over its own content shows every change. A folder
may be damaged or come from anywhere: everything in it is checked before it is used, and nothing is executed.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from leap_dist.errors import UserError

FORMAT: Final = 2
MANIFEST = "manifest.json"
LARGEST = 64 * 2**20  # bytes: 70 billion parameters on 512 ranks take about 40 MB
CHUNK = 16 * 2**20  # bytes that are read or written at once

Count = Annotated[int, Field(ge=0, le=2**53)]
Number = int | float


class Damaged(Exception):
    """A checkpoint that is not what was written, or not all of it: an older one is used in its place."""


class ManifestPart(BaseModel):
    """A part of the manifest. Numbers may be infinite or NaN, as those of a run may be."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorEntry(ManifestPart):
    """A tensor of the model: its number of elements, and the dtype of each of its states."""

    numel: Count
    states: dict[str, Literal["F32", "F64", "BOOL"]]


class FileEntry(ManifestPart):
    """One rank's file: what it must be, and the run (first element, number) that it holds of each tensor's states."""

    size: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    runs: dict[str, tuple[Count, Annotated[int, Field(ge=1, le=2**53)]]]


class LeapState(ManifestPart):
    """`LeapAdamW.plain_state()`."""

    num_steps: Count
    num_left_out: Count = 0
    num_left_out_dense: Count = 0
    settled: bool
    started: bool = True  # as all were that an older version has saved
    given: dict[str, list[float]] = {}
    calibration: float
    kept_units: tuple[Count, ...]
    kept_weights: Count
    masked: bool
    regulariser: dict[str, float]
    task_size: float
    soft: dict[str, float] = {}
    signal: dict[str, list[float]] = {}


class EngineState(ManifestPart):
    """Counters and schedules of an engine, outside tensors. `updates` counts calls of step() that ended an update;
    lr, betas and base_lr are by group, the last two not in those of older versions."""

    leap: LeapState
    lr: tuple[float, ...]
    betas: tuple[tuple[float, float], ...] | None = None
    base_lr: tuple[float, ...] | None = None
    scheduler: dict[str, JsonValue] | None
    scaler: dict[str, Number]
    updates: Count
    global_steps: Count
    global_samples: Count
    skipped_steps: Count


class Manifest(ManifestPart):
    """The contents of manifest.json. gates: (name, number of units); score: of the model, higher is better; buffers:
    their shapes; section: the settings of `leap`. Those of older versions have neither of the last two."""

    format: Literal[2] = FORMAT
    world_size: Annotated[int, Field(ge=1, le=10**6)]
    gates: tuple[tuple[str, Count], ...]
    tensors: dict[str, TensorEntry]
    buffers: dict[str, tuple[Count, ...]] | None = None
    section: dict[str, JsonValue] | None = None
    files: dict[str, FileEntry]
    engine: EngineState
    progress: dict[str, JsonValue]
    score: float | None


def file_name(rank: int) -> str:
    """The name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def with_checksum(body: Mapping[str, Any]) -> bytes:
    """A manifest's JSON text with its checksum."""
    return json.dumps({**body, "sha256": _checksum(body)}).encode()


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint, sound in itself. Raises Damaged or OSError; UserError for another's format."""
    text = _read_small(checkpoint / MANIFEST)
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{MANIFEST} is not JSON: {error}") from error
    if not isinstance(body, dict) or body.pop("sha256", None) != _checksum(body):
        raise Damaged(f"{MANIFEST} was changed: its checksum does not fit")
    if body.get("format") != FORMAT:
        raise UserError(
            f"{checkpoint}: got format {body.get('format')!r}; this version of leap_dist reads format {FORMAT}: use "
            "the version that wrote it"
        )
    try:
        manifest = Manifest.model_validate_json(json.dumps(body))
    except ValidationError as error:
        first = error.errors()[0]
        raise Damaged(f"{MANIFEST}: {'.'.join(map(str, first['loc']))!r}: {first['msg']}") from error
    _check_names(manifest)
    return manifest


def check_file(path: Path, entry: FileEntry) -> None:
    """Raises Damaged unless the file is the one that was written, a plain one of its size and SHA-256; OSError."""
    size = _plain_size(path)
    if size != entry.size:
        raise Damaged(f"{path.name} has {size} bytes, not {entry.size}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry.sha256:
        raise Damaged(f"{path.name} was changed: its SHA-256 does not fit")


def _check_names(manifest: Manifest) -> None:
    """Files are those of the ranks, and runs lie in tensors of the manifest."""
    num = manifest.world_size
    if len(manifest.files) != num or manifest.files.keys() != {file_name(rank) for rank in range(num)}:
        raise Damaged(f"{MANIFEST} does not name the files of {num} ranks")
    for name, entry in manifest.files.items():
        for tensor, (start, length) in entry.runs.items():
            known = manifest.tensors.get(tensor)
            if known is None or start + length > known.numel:
                raise Damaged(f"{MANIFEST}: {name} holds elements that {tensor!r} does not have")


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _read_small(path: Path) -> bytes:
    size = _plain_size(path)
    if size > LARGEST:
        raise Damaged(f"{path.name} has {size} bytes; allowed: at most {LARGEST}")
    return path.read_bytes()


def _plain_size(path: Path) -> int:
    """Bytes of a plain file; a link may lead out of the folder, and a pipe has no end."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise Damaged(f"{path.name} is not a regular file")
    return found.st_size
