"""Folders of checkpoints: each is complete, or not there.

`step-00000120` is written aside as `.step-00000120.partial`, every file and folder synced to disk, and renamed when its
manifest is in it. Ranks write their files at the same time and tell the first, through small records in the same
folder, that theirs are complete: threads that write must not communicate. The file system is shared by all nodes.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from leap_dist.checkpoint.manifest import (
    CHUNK,
    LARGEST,
    MANIFEST,
    Damaged,
    FileEntry,
    Manifest,
    file_name,
    read_manifest,
    with_checksum,
)
from leap_dist.errors import UserError
from leap_dist.files import nearest

DTYPES = {  # in safetensors
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PATIENCE = 900.0  # seconds that the first rank waits for the files of the others; less than a collective may take
POLL = 0.05  # seconds between two looks
ACTIONS = {
    errno.ENOSPC: "free space, lower train.keep_checkpoints",
    errno.EDQUOT: "raise the quota, lower train.keep_checkpoints",
    errno.EFBIG: "raise the limit on file sizes",
}


class CheckpointError(UserError):
    """A checkpoint could not be written; older ones are as they were, and the run could continue without."""


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, newest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,16}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`; whether it is intact is not looked at."""
    return next((path for path in checkpoints_in(folder) if (path / MANIFEST).is_file()), None)


def step_of(checkpoint: Path) -> int:
    """The number of steps that were done."""
    return int(checkpoint.name.removeprefix("step-"))


def partial_of(final: Path) -> Path:
    """Where a checkpoint is while it is written."""
    return final.with_name(f".{final.name}.partial")


def make_room(final: Path) -> None:
    """Make the folder that ranks write to, without what a run that was killed has left. On the first rank."""
    for leftover in final.parent.glob(".step-*.partial"):
        shutil.rmtree(leftover)
    for old in final.parent.glob(".step-*.old"):
        place = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if place.exists():
            shutil.rmtree(old)
        else:
            old.rename(place)
    partial_of(final).mkdir(parents=True)


def write_part(final: Path, rank: int, tensors: Mapping[str, Tensor], runs: Mapping[str, tuple[int, int]]) -> None:
    """Write a rank's file and then its record. Raises CheckpointError, which the record reports to the first rank."""
    path = partial_of(final) / file_name(rank)
    try:
        size, sha256 = write_tensors(path, tensors)
        _write_record(final, rank, {"size": size, "sha256": sha256, "runs": dict(runs)})
    except OSError as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        failure = CheckpointError(explain(error, final, f"the part of rank {rank} takes {needed / 1e6:.4g} MB"))
        with contextlib.suppress(OSError):  # if not even the record can be written, the first rank waits in vain
            path.unlink(missing_ok=True)  # what it took may be what is missing for the record
            _write_record(final, rank, {"error": str(failure)})
        raise failure from error


def explain(error: OSError, final: Path, needed: str) -> str:
    """What a user has to know of a checkpoint that was not written."""
    place = nearest(final.parent)
    free = shutil.disk_usage(place).free
    action = ACTIONS.get(error.errno or 0, "see that it can be written to")
    return (
        f"{final} could not be written: {error.strerror or error}; {needed}, {free / 1e6:.4g} MB are free in {place}: "
        f"{action}, or give another --output; older checkpoints are as they were"
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write CPU tensors as a safetensors file, synced to disk; returns its size and SHA-256, made in the same pass."""
    header: dict[str, object] = {}
    offset = 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # keeps them aligned
    for name, tensor in ordered:
        place = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        offset = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    head = len(text).to_bytes(8, "little") + text
    contents = [memoryview(head), *(tensor.view(-1).view(torch.uint8).numpy().data for _, tensor in ordered)]
    with path.open("xb") as file:
        for data in contents:
            for first in range(0, len(data), CHUNK):
                digest.update(data[first : first + CHUNK])
                file.write(data[first : first + CHUNK])
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(text) + offset, digest.hexdigest()


def await_parts(final: Path, world_size: int) -> dict[str, FileEntry]:
    """The files of all ranks, once all are complete; raises CheckpointError if one could not be written."""
    found: dict[int, FileEntry] = {}
    deadline = time.monotonic() + PATIENCE
    while True:
        for rank in set(range(world_size)) - found.keys():
            record = _record(final, rank)
            if record.is_file():
                content = json.loads(record.read_text("utf-8"))
                if "error" in content:
                    raise CheckpointError(content["error"])
                found[rank] = FileEntry.model_validate_json(json.dumps(content))
                record.unlink()
        if len(found) == world_size:
            return {file_name(rank): found[rank] for rank in range(world_size)}
        if time.monotonic() > deadline:
            late = ", ".join(str(rank) for rank in range(world_size) if rank not in found)
            raise CheckpointError(
                f"{final} could not be written: rank {late} did not write its part within {PATIENCE:g} s; see that all "
                "nodes share the folder and that it is fast enough; older checkpoints are as they were"
            )
        time.sleep(POLL)


def complete(final: Path, manifest: Manifest, keep: int) -> None:
    """Write the manifest, give the folder its name, and remove checkpoints that are not kept. On the first rank."""
    text = with_checksum(manifest.model_dump())
    if len(text) > LARGEST:
        raise CheckpointError(
            f"{final} could not be written: its manifest would have {len(text)} bytes; allowed: at most {LARGEST}; use "
            "fewer ranks"
        )
    try:
        with (partial_of(final) / MANIFEST).open("xb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _sync(partial_of(final))
        _put_in_place(final)
        for path in set(checkpoints_in(final.parent)) - kept_checkpoints(final, keep):
            shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(explain(error, final, f"its manifest takes {len(text) / 1e6:.4g} MB")) from error


def kept_checkpoints(final: Path, keep: int) -> set[Path]:
    """Of the checkpoints up to `final` the `keep` latest and the one with the highest score.

    Later ones are what a run left that had to go back to before them.
    """
    past = [path for path in checkpoints_in(final.parent) if step_of(path) <= step_of(final)]
    scores = {path: score for path in past if (score := _score(path)) is not None}
    return {*past[:keep], *sorted(scores, key=lambda path: (scores[path], step_of(path)))[-1:]}


def _score(checkpoint: Path) -> float | None:
    """The score of a checkpoint that has one."""
    try:
        score = read_manifest(checkpoint).score
    except (Damaged, OSError, UserError):
        return None
    return score if score == score else None


def _put_in_place(final: Path) -> None:
    """Rename; an older folder of that name is there until the new one is."""
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(old)
    partial_of(final).rename(final)
    _sync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def _record(final: Path, rank: int) -> Path:
    return partial_of(final) / f"rank-{rank:05d}.json"


def _write_record(final: Path, rank: int, content: Mapping[str, object]) -> None:
    record = _record(final, rank)
    aside = record.with_suffix(".aside")
    aside.write_text(json.dumps(content), "utf-8")
    aside.rename(record)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
