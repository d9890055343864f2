"""The certificate of a run: counts and hashes taken from the exported files, never from thresholds.

`count` reads the safetensors of an exported folder tensor by tensor and holds them against the masks; `build`
puts the counts beside target, metrics and versions, and refuses a density that is not the target.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from leap_dist.core.counting import Counter, check_exact
from leap_dist.core.measure import amounts
from leap_dist.files import write_text
from leap_dist.run_folder import ExportedWeights, sealed

PACKAGES = ("leap_dist", "torch", "deepspeed", "transformers")


def count(
    folder: Path,
    masks: Iterable[tuple[str, torch.Tensor | None]],
    gates: list[dict[str, Any]],
    rank: int = 0,
    hidden: dict[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Counts and hashes of the weights exported to `folder`, on rank 0; {} on the others.

    masks: (tensor name, bool mask of the tensor's shape, True = kept) in name order; None for the mask on
    other ranks than 0, which walk it to the end (it may run collectives).
    gates: one dict per gate; its "tensors" names the tensors whose weights it prunes. A masked tensor that no
    gate names (a bias that follows its row) is checked and hashed, but its elements are no prunable weights.
    hidden: filled with the packed masks that the weights do not tell (`Counter.hidden`).

    Returns kept, prunable, density, gates (each with its kept, prunable, density), tensors (by name: shape,
    numel, kept, density, zeros_kept = kept but exactly zero, counted), masks_sha256 (in name order: name,
    zero byte, np.packbits of the flat mask), weights_sha256 (`ExportedWeights.sha256`).
    Raises RuntimeError if a pruned position is not zero in the file, or a mask fits no tensor.
    """
    if rank != 0:
        for _ in masks:
            pass
        return {}
    counter = Counter(gates)
    with ExportedWeights(folder) as weights:
        waiting = weights.names()
        for name, mask in _in_name_order(masks):
            while waiting and waiting[0] < name:
                plain = waiting.pop(0)
                counter.add(plain, weights.read(plain), None)
            counter.add(name, weights.read(name), mask)
            waiting.remove(name)
        for plain in waiting:
            counter.add(plain, weights.read(plain), None)
    if hidden is not None:
        hidden |= counter.hidden
    return counter.result()


def build(
    counts: Mapping[str, Any],
    *,
    target: float,
    unit: float,
    metrics: Mapping[str, Mapping[str, float]],
    seed: int,
    note: str | None = None,
    measure: Mapping[str, Any] | None = None,
    permuted: bool | str = False,
) -> dict[str, Any]:
    """The certificate, JSON-able, from what `count` returned.

    unit: what the measure counts of the largest unit. measure: what the target is a share of, as `Measure.described`
    says; None: of the prunable weights. metrics: {"dense": {...}, "pruned": {...}}; a value that is no
    finite number becomes null. note: why the density is not the target, where that is to be said. permuted: the
    name of the order that leap.permute put the model's columns in (models/permute.py), or True where it has none.
    Raises RuntimeError if the density is further off than one unit (`check_exact`).
    The key sha256 is the digest of all others.
    """
    check_exact(*amounts(counts, measure), target, unit)
    certificate = {
        "target": target,
        **({"measure": dict(measure)} if measure else {}),
        "density": counts["density"],
        "unit": unit,
        "kept": counts["kept"],
        "prunable": counts["prunable"],
        "metrics": {name: _finite(values) for name, values in metrics.items()},
        "gates": counts["gates"],
        "tensors": counts["tensors"],
        "masks_sha256": counts["masks_sha256"],
        "weights_sha256": counts["weights_sha256"],
        "seed": seed,
        "versions": versions(),
        **({"note": note} if note else {}),
        **({"permuted": permuted} if permuted else {}),
    }
    return sealed(certificate)


def versions() -> dict[str, str | None]:
    """What a run depends on, by name; None for a package that runs from a checkout without being installed."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def write(path: Path, certificate: Mapping[str, Any]) -> None:
    """Write the certificate as JSON; `path` is there only when it is complete."""
    write_text(path, json.dumps(certificate, indent=2, allow_nan=False) + "\n")


def _in_name_order(
    masks: Iterable[tuple[str, torch.Tensor | None]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The masks on the host; order and presence are the caller's duty."""
    previous = ""
    for name, mask in masks:
        assert name > previous, f"masks out of name order: {name} after {previous}"
        assert mask is not None and mask.dtype == torch.bool, f"rank 0 needs the bool mask of {name}"
        previous = name
        yield name, mask.detach().cpu()


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
