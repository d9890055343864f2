"""Folders of checkpoints: complete or not there, whatever fails, and never at the cost of an older one."""

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from leap_dist.checkpoint import folders
from leap_dist.checkpoint.folders import CheckpointError
from leap_dist.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    FileEntry,
    Manifest,
    check_file,
    read_manifest,
    with_checksum,
)
from leap_dist.errors import UserError
from tests.checkpoint.mutations import EXAMPLES, changed_bytes, changed_json

TENSORS = {"a/hosted": torch.arange(5.0), "a/mask": torch.tensor([True, False, True]), "b/hosted": torch.zeros(0)}
ENGINE: dict[str, Any] = {
    "leap": {
        "num_steps": 3,
        "settled": False,
        "calibration": 1.0,
        "kept_units": [4],
        "kept_weights": 8,
        "masked": True,
        "regulariser": {"lambda": 0.5},
        "task_size": 0.1,
    },
    "lr": [1e-3],
    "scheduler": {"last_epoch": 3, "base_lrs": [0.1]},
    "scaler": {"cur_scale": 1.0},
    "updates": 3,
    "global_steps": 3,
    "global_samples": 6,
    "skipped_steps": 0,
}


def manifest(files: dict[str, FileEntry], score: float | None = None) -> Manifest:
    body = {
        "world_size": len(files),
        "gates": [["row a", 5]],
        "tensors": {"a": {"numel": 5, "states": {"hosted": "F32"}}},
        "files": {name: entry.model_dump() for name, entry in files.items()},
        "engine": ENGINE,
        "progress": {"step": 3},
        "score": score,
    }
    return Manifest.model_validate_json(json.dumps(body))


def write(folder: Path, step: int, score: float | None = None, keep: int = 2, tensors: Any = None) -> Path:
    """A checkpoint of one rank, as the thread writes it."""
    final = folder / f"step-{step:08d}"
    folders.make_room(final)
    folders.write_part(final, 0, tensors or TENSORS, {"a": (0, 5)})
    folders.complete(final, manifest(folders.await_parts(final, 1), score), keep)
    return final


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    return [folders.step_of(path) for path in folders.checkpoints_in(folder)]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_is_plain_safetensors_and_a_manifest(tmp_path: Path) -> None:
    final = write(tmp_path, 3, score=0.5)
    assert names(tmp_path) == [final.name] and names(final) == [MANIFEST, "rank-00000.safetensors"]
    found = load_file(final / "rank-00000.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    read = read_manifest(final)
    check_file(final / "rank-00000.safetensors", read.files["rank-00000.safetensors"])
    assert read.score == 0.5 and read.files["rank-00000.safetensors"].runs == {"a": (0, 5)}


def test_large_tensors_are_written_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "CHUNK", 1000)
    size, sha256 = folders.write_tensors(tmp_path / "x", {"x": torch.randn(12345)})
    check_file(tmp_path / "x", FileEntry(size=size, sha256=sha256, runs={}))


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, score in [(1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, float("nan"))]:
        write(tmp_path, step, score)
    assert steps(tmp_path) == [5, 4, 2]
    write(tmp_path, 6, 0.9, keep=1)  # as good, and later
    assert steps(tmp_path) == [6]


def test_what_a_run_went_back_from_is_removed_once_a_newer_one_is_complete(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        write(tmp_path, step, keep=9)
    (tmp_path / "step-00000020" / MANIFEST).write_text("damaged")
    write(tmp_path, 12, keep=1)
    assert steps(tmp_path) == [12]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 3, score=0.1)
    write(tmp_path, 3, score=0.2)
    assert names(tmp_path) == ["step-00000003"] and read_manifest(tmp_path / "step-00000003").score == 0.2


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    assert folders.latest_checkpoint(tmp_path) is None
    final = write(tmp_path, 3)
    (tmp_path / "step-00000004").mkdir()
    (tmp_path / "step-of-another-kind").mkdir()
    assert folders.latest_checkpoint(tmp_path) == final


# What fails while it is written


def test_a_file_that_cannot_grow_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    older = write(tmp_path, 1)
    final = tmp_path / "step-00000002"
    folders.make_room(final)
    message = (
        r"step-00000002 could not be written: File too large; the part of rank 0 takes 4 MB, .* MB are free in .*: "
    )
    with (
        file_size_limit(10**6),
        pytest.raises(CheckpointError, match=message + "raise the limit on file sizes, or give"),
    ):
        folders.write_part(final, 0, {"x": torch.zeros(10**6)}, {})
    assert names(folders.partial_of(final)) == ["rank-00000.json"]  # what was written is gone, the record tells why
    with pytest.raises(CheckpointError, match="part of rank 0 takes"):
        folders.await_parts(final, 2)
    assert folders.latest_checkpoint(tmp_path) == older


def test_a_manifest_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "step-00000002"
    folders.make_room(final)
    folders.write_part(final, 0, TENSORS, {"a": (0, 5)})
    complete = manifest(folders.await_parts(final, 1))
    with file_size_limit(100), pytest.raises(CheckpointError, match="File too large; its manifest takes"):
        folders.complete(final, complete, 2)
    monkeypatch.setattr(folders, "LARGEST", 100)
    with pytest.raises(CheckpointError, match=r"manifest would have .* bytes; allowed: at most 100; use fewer ranks"):
        folders.complete(final, complete, 2)
    assert steps(tmp_path) == []


def test_a_rank_that_does_not_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "PATIENCE", 0.1)
    final = tmp_path / "step-00000002"
    folders.make_room(final)
    folders.write_part(final, 1, TENSORS, {})
    with pytest.raises(CheckpointError, match=r"rank 0, 2 did not write its part within 0.1 s"):
        folders.await_parts(final, 3)


def test_kill_9_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    older = write(tmp_path, 1)
    final = tmp_path / "step-00000002"
    large = {"x": torch.zeros(50_000_000)}
    child = os.fork()
    if child == 0:
        while True:
            write(tmp_path, 2, tensors=large)
    part = folders.partial_of(final) / "rank-00000.safetensors"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 0):
        assert time.monotonic() < deadline
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert names(tmp_path) == [f".{final.name}.partial", older.name]
    assert folders.latest_checkpoint(tmp_path) == older and read_manifest(older)
    write(tmp_path, 3)
    assert names(tmp_path) == [older.name, "step-00000003"]


def test_killed_between_two_renames(tmp_path: Path) -> None:
    older = write(tmp_path, 1)
    older.rename(tmp_path / f".{older.name}.old")
    write(tmp_path, 2)
    assert steps(tmp_path) == [2, 1]
    os.rename(tmp_path / "step-00000002", tmp_path / ".step-00000001.old")  # its place is taken
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


# What is damaged


def reseal(checkpoint: Path, **changes: Any) -> None:
    """Change the manifest as somebody would who knows about its checksum."""
    body = json.loads((checkpoint / MANIFEST).read_text()) | changes
    del body["sha256"]
    (checkpoint / MANIFEST).write_bytes(with_checksum(body))


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FILE = {"size": 1, "sha256": "0" * 64, "runs": {}}
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (lambda c: flip(c / MANIFEST), "manifest.json (was changed: its checksum does|is not JSON)"),
    "no object": (lambda c: (c / MANIFEST).write_text("[]"), "was changed"),
    "nested": (lambda c: (c / MANIFEST).write_text("[" * 10**6), "is not JSON"),
    "a link": (lambda c: link(c / MANIFEST), "manifest.json is not a regular file"),
    "a path": (lambda c: reseal(c, files={"../rank-00000.safetensors": FILE}), "does not name the files of 1 ranks"),
    "many ranks": (lambda c: reseal(c, world_size=10**6), "does not name the files of 1000000 ranks"),
    "a key": (lambda c: reseal(c, more=1), "'more': Extra inputs"),
    "a run": (
        lambda c: reseal(c, files={"rank-00000.safetensors": {**FILE, "runs": {"a": [3, 3]}}}),
        "rank-00000.safetensors holds elements that 'a' does not have",
    ),
    "a file that is cut short": (lambda c: os.truncate(c / "rank-00000.safetensors", 9), "has 9 bytes, not"),
    "a file with a flipped bit": (
        lambda c: flip(c / "rank-00000.safetensors"),
        "was changed: its SHA-256 does not fit",
    ),
    "a file that is a link": (lambda c: link(c / "rank-00000.safetensors"), "is not a regular file"),
}


def read_all(checkpoint: Path) -> None:
    for name, entry in read_manifest(checkpoint).files.items():
        check_file(checkpoint / name, entry)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    checkpoint = write(tmp_path, 3)
    read_all(checkpoint)
    change(checkpoint)
    with pytest.raises(Damaged, match=message):
        read_all(checkpoint)


def test_a_manifest_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 3)
    os.truncate(checkpoint / MANIFEST, 5 * 2**30)  # a file with a hole
    with pytest.raises(Damaged, match=r"manifest.json has 5368709120 bytes; allowed: at most"):
        read_manifest(checkpoint)


def test_another_format_is_the_users_to_mend(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 3)
    reseal(checkpoint, format=3)
    with pytest.raises(UserError, match="got format 3; this version of leap_dist reads format 2"):
        read_manifest(checkpoint)


@settings(max_examples=EXAMPLES, deadline=None, database=None)
@given(st.data())
def test_nothing_else_comes_out_of_a_mutated_manifest(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    checkpoint = tmp_path_factory.getbasetemp() / "fuzzed" / "step-00000003"
    if not checkpoint.exists():
        write(checkpoint.parent, 3)
    text = (checkpoint / MANIFEST).read_bytes()
    body = json.loads(text)
    del body["sha256"]
    knowing = data.draw(st.booleans())
    mutated = with_checksum(changed_json(body, data)) if knowing else changed_bytes(text, data)
    (checkpoint / MANIFEST).write_bytes(mutated)
    try:
        with suppress(Damaged, UserError):  # and nothing else
            read_manifest(checkpoint)
    finally:
        (checkpoint / MANIFEST).write_bytes(text)
