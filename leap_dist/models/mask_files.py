"""Masks in files: a folder that `--to mask` wrote, and the npz files that others publish.

masks.safetensors holds for every masked tensor the uint8 of np.packbits over its flat mask (1 = kept), masks.json the
shapes and the certificate's masks_sha256. An npz holds the same bytes by tensor name, some files also
`<name>.__shape__` and a `__meta__`; MaskLLM's names end in ".mask". Files may come from anywhere: nothing in them is
executed, and sizes are checked before anything is read. Where our digest is in them, it is checked.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from leap_dist.config.json_file import read_json
from leap_dist.core.fixed import ALLOWED, START, Fixed, Shape, unpack
from leap_dist.errors import UserError, few_of

PACKED, INDEX = "masks.safetensors", "masks.json"
PERMUTED = "permuted"  # in INDEX: the name of the order that leap.permute put the model's columns in
NPZ, SHAPE, META = "mask.npz", ".__shape__", "__meta__"
MARK = f"__{PERMUTED}__"  # in NPZ, where they are
SMALL = 2**20  # bytes of what is no mask: a shape, a header


def load_masks(folder: Path | str) -> dict[str, Tensor]:
    """Bool masks by tensor name, True = kept. UserError if the folder holds none, or not those it was written with."""
    packed, shapes, _ = _read_folder(Path(folder))
    return {name: unpack(packed[name], 0, prod(shapes[name])).view(shapes[name]) for name in sorted(shapes)}


def read_masks(key: str, path: Path, shapes: Mapping[str, Shape], model_order: str) -> Fixed:
    """Packed masks by the names of a model's tensors, whose shapes are given; in name order.

    key: the setting that named `path`, for messages. model_order: the name of the order of the model's columns. Raises
    UserError if there are no masks, or those of another model, or for columns in another order.
    """
    if path.is_dir():
        packed, said, order = _read_folder(path, f"{key}: ")
    else:
        packed, said, order = _read_npz(key, path, max(map(prod, shapes.values())))
    names = {name: _own_name(name, shapes) for name in packed}
    unknown = [name for name, own in names.items() if own is None]
    if unknown or not names:
        near = ", ".join(list(shapes)[:3])
        what = (
            f"has masks of {few_of(unknown)}, which the model does not have; its"
            if unknown
            else "has no masks; the model's"
        )
        raise UserError(f"{key}: {path} {what} tensors are called {near} and so on; give the mask of this model")
    found: dict[str, Tensor] = {}
    for name, own in names.items():
        assert own is not None
        shape = shapes[own]
        if name in said and tuple(said[name]) != shape:
            raise UserError(f"{key}: {path} has a mask of shape {tuple(said[name])} for {own}, which is {shape}")
        if packed[name].dtype != torch.uint8 or packed[name].shape != (-(-prod(shape) // 8),):
            bits = f"{packed[name].nbytes} bytes ({packed[name].numel()} of {packed[name].dtype}) for {own}"
            asked = f"{-(-prod(shape) // 8)} of torch.uint8"
            raise UserError(f"{key}: {path} has {bits}, whose {prod(shape)} weights take {asked}")
        if own in found:
            raise UserError(f"{key}: {path} has two masks of {own}; keep one")
        found[own] = packed[name]
    if order not in (None, model_order):
        raise UserError(
            f"{key}: {path}: the masks are for columns in another order than those of this model, by "
            f"leap.permute; {ALLOWED}"
        )
    return Fixed(dict(sorted(found.items())), order, key)


def _own_name(name: str, shapes: Mapping[str, Shape]) -> str | None:
    """The tensor of the model that a name in a file means."""
    base = name.removeprefix("module.").removesuffix(".mask")
    return next((own for own in (name, base, f"{base}.weight") if own in shapes), None)


def _read_folder(folder: Path, key: str = "") -> tuple[dict[str, Tensor], dict[str, list[int]], str | None]:
    """(packed masks, shapes, order of columns) of a folder of ours."""
    try:
        index = read_json(folder / INDEX)
        if not (folder / PACKED).is_file():  # a pipe would be waited for
            raise OSError(f"{PACKED} is not a regular file")
        packed = load_file(folder / PACKED)
        shapes: dict[str, list[int]] = index["shapes"]
        for name, shape in shapes.items():
            _check_shape(packed[name], shape)
        said, order = index["masks_sha256"], _order(index.get(PERMUTED, ""))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        what = "give the folder that launch/export.py RUN --to mask writes"
        raise UserError(f"{key}{folder}: no masks can be read there: {error}; {what}") from error
    if _digest({name: packed[name] for name in shapes}) != said:
        raise UserError(f"{key}{folder}: the masks are not those of {INDEX}; export them again, with --to mask")
    return {name: packed[name] for name in sorted(shapes)}, shapes, order


def _digest(packed: Mapping[str, Tensor]) -> str:
    """As a certificate's masks_sha256."""
    digest = hashlib.sha256()
    for name in sorted(packed):
        digest.update(name.encode() + b"\0")
        digest.update(packed[name].contiguous().numpy().data)
    return digest.hexdigest()


def _check_shape(packed: Tensor, shape: Any) -> None:
    """A mask has the shape of the bits that are there: ValueError before anything is made of it."""
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not whole or packed.dtype != torch.uint8 or packed.shape != (-(-prod(shape) // 8),):
        said = f"{INDEX} says shape {str(shape)[:80]}"
        raise ValueError(f"{said}, {PACKED} holds {packed.numel()} bytes of {packed.dtype}")


def _read_npz(key: str, path: Path, largest: int) -> tuple[dict[str, Tensor], dict[str, list[int]], str | None]:
    """(packed masks, the shapes that are said, order of columns); `largest`: elements of the model's largest tensor."""
    try:
        if not path.is_file():
            raise OSError("it is no file" if path.exists() else "there is nothing of this name")
        with zipfile.ZipFile(path) as file:
            for info in file.infolist():
                if info.file_size > largest // 8 + SMALL:
                    raise ValueError(f"{info.filename} has {info.file_size} bytes, more than any mask of the model")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name not in (META, MARK)}
            order = _order(file[MARK].item()) if MARK in file.files else ""
            said = _said(file)
        shapes = {name.removesuffix(SHAPE): _sizes(a) for name, a in arrays.items() if name.endswith(SHAPE)}
        packed = {name: torch.from_numpy(a) for name, a in arrays.items() if not name.endswith(SHAPE)}
        if said is not None and said != _digest(packed):
            raise ValueError(f"its masks are not those of its {META}, whose masks_sha256 is another; export them again")
    except (OSError, ValueError, TypeError, EOFError, LookupError, zipfile.BadZipFile, NotImplementedError) as error:
        zeros = '"zeros", ' if key == START else ""
        allowed = f"{zeros}a folder that launch/export.py RUN --to mask writes, or an .npz of packed masks"
        hint = '; did you mean "zeros"?' if zeros and get_close_matches(str(path), ["zeros"]) else ""
        raise UserError(f"{key}: {path} cannot be read: {error}; allowed: {allowed}{hint}") from error
    return packed, shapes, order


def _order(said: Any) -> str | None:
    """The name of an order of columns in a file; None of older ones, which say that there is one."""
    return said if isinstance(said, str) else None


def _said(file: Any) -> str | None:
    """masks_sha256 in the `__meta__` of an npz of ours; None in anybody else's, which may hold anything."""
    try:
        return str(json.loads(str(file[META]))["masks_sha256"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def _sizes(array: Any) -> list[int]:
    sizes = np.asarray(array).reshape(-1)[:16]
    if not np.issubdtype(sizes.dtype, np.integer):
        raise ValueError(f"a shape ({SHAPE}) is {sizes.dtype}, not whole numbers")
    return [int(size) for size in sizes]
