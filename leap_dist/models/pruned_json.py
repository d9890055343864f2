"""pruned.json: what was removed from a model, beside the weights that are left.

A folder comes from anywhere, so everything in it is checked before it is used, and nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from leap_dist.config.family import FamilyConfig
from leap_dist.config.json_file import read_json
from leap_dist.config.section import Section
from leap_dist.errors import UserError

NAME = "pruned.json"


Removed = Literal["head", "neuron", "expert", "depth", "hidden"]


class KeptUnits(Section):
    """One structure of the model before pruning, and the units that are left."""

    name: str
    kind: Removed
    num_units: int = Field(ge=0)
    kept: tuple[int, ...]


class WeightFile(Section):
    """What a weight file must be."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class PrunedJson(Section):
    """The contents of pruned.json. stock: config.json alone describes the model, and transformers loads it."""

    format: Literal[1] = 1
    model_class: str
    stock: bool
    structures: tuple[KeptUnits, ...]
    family: FamilyConfig | None
    files: dict[str, WeightFile]
    per_layer_config: dict[str, dict[str, int]]
    """Config keys by layer, in transformers' schema; empty if they cannot say it."""
    extra: dict[str, Any]


def describe_file(path: Path) -> WeightFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return WeightFile(size=path.stat().st_size, sha256=digest)


def write_pruned_json(folder: Path, manifest: PrunedJson) -> None:
    (folder / NAME).write_text(manifest.model_dump_json(indent=1) + "\n", "utf-8")


def read_pruned_json(folder: Path) -> PrunedJson:
    """The manifest of a folder, sound in itself. Raises UserError if it is damaged or not there."""
    path = folder / NAME
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    if not path.is_file():
        raise UserError(f"{folder}: holds no pruned model: it has no {NAME}; give a folder that an export made")
    try:
        manifest = PrunedJson.model_validate_json(json.dumps(read_json(path, "export it again")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: damaged: {f'{where}: ' if where else ''}{first['msg']}; export it again") from error
    for entry in manifest.structures:
        ascending = all(low < high for low, high in zip(entry.kept, entry.kept[1:], strict=False))
        if not ascending or any(not 0 <= unit < entry.num_units for unit in entry.kept):
            raise UserError(
                f"{path}: damaged: {entry.name}: kept units must ascend and lie in 0..{entry.num_units - 1}; "
                "export it again"
            )
    return manifest


def check_files(folder: Path, manifest: PrunedJson) -> list[Path]:
    """The weight files, whole and unchanged; UserError else."""
    for name, stored in manifest.files.items():
        path = folder / name
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{folder / NAME}: got file {name!r}; allowed: a *.safetensors file of this folder")
        if not path.is_file():
            raise UserError(f"{path}: there is no such file, but {NAME} names it; copy the whole folder")
        if path.stat().st_size != stored.size or describe_file(path) != stored:
            raise UserError(f"{path}: is not the file that was exported (size or SHA-256 differ); copy it again")
    return [folder / name for name in manifest.files]
