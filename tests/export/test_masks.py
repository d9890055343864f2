"""Masks of a run, packed and back; and what the weights do not tell."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from leap_dist.errors import UserError
from leap_dist.export.masks import load_masks, save_masks
from leap_dist.run_folder import HIDDEN, read_run
from tests.export.runs import DOWN, QUERY, UP, Masks, classifier, element_masks, make_run, structure_masks

BIAS = UP.removesuffix("weight") + "bias"


def export(tmp_path: Path, masks: Masks, granularity: str, zeros: dict[str, Any] | None = None) -> Path:
    """Masks read from a run in which the weights `zeros` are kept and yet zero."""
    model = classifier()
    for name, place in (zeros or {}).items():
        with torch.no_grad():
            model.get_parameter(name)[place] = 0
    run = make_run(tmp_path / "run", model, masks, granularity)
    folder = tmp_path / "mask"
    folder.mkdir()
    assert save_masks(read_run(run), folder) == sum(mask.numel() for mask in masks.values())
    return folder


def check(folder: Path, masks: Masks) -> None:
    found = load_masks(str(folder))
    assert list(found) == sorted(masks)
    for name, mask in masks.items():
        assert found[name].dtype == torch.bool and torch.equal(found[name], mask), name


def test_masks_come_back_as_they_were(tmp_path: Path) -> None:
    masks = element_masks(classifier())
    folder = export(tmp_path, masks, "element")
    check(folder, masks)
    packed = load_file(folder / "masks.safetensors")
    assert np.array_equal(packed[QUERY].numpy(), np.packbits(masks[QUERY].flatten().numpy()))
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert json.loads((folder / "masks.json").read_text())["masks_sha256"] == certificate["masks_sha256"]


READS = """
import json, sys
import numpy as np
with np.load(sys.argv[1], allow_pickle=False) as file:
    meta = json.loads(str(file["__meta__"]))
    shapes = {name[: -len(".__shape__")]: file[name] for name in file.files if name.endswith(".__shape__")}
    bits = {name: np.unpackbits(file[name], count=int(np.prod(shape))) for name, shape in shapes.items()}
    assert set(file.files) == {"__meta__", *shapes, *(f"{name}.__shape__" for name in shapes)}
print(json.dumps([meta, {name: bits[name].reshape(shape).tolist() for name, shape in shapes.items()}]))
"""


def test_numpy_alone_reads_the_masks(tmp_path: Path) -> None:
    masks = {"classifier.bias": torch.tensor([True, False, True]), QUERY: torch.rand(32, 32) < 0.5}
    folder = export(tmp_path, masks, "element")
    run = [sys.executable, "-I", "-c", READS, str(folder / "mask.npz")]
    meta, found = json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    assert meta["masks_sha256"] == certificate["masks_sha256"] and meta["density"] == certificate["density"]
    assert {name: torch.tensor(mask).bool().tolist() for name, mask in found.items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }


def test_a_size_that_is_no_multiple_of_eight(tmp_path: Path) -> None:
    name = "classifier.bias"
    masks = {name: torch.tensor([True, False, True]), QUERY: torch.rand(32, 32) < 0.5}
    check(export(tmp_path, masks, "element"), masks)


@pytest.mark.parametrize(
    ("granularity", "zeros"),
    [
        ("row", {UP: (1, 2), BIAS: (1,)}),
        ("column", {DOWN: (3, 1)}),
        ("head", {QUERY: (0, 5), DOWN: (0, 1)}),
    ],
)
def test_kept_zeros_of_units_hide_no_mask(tmp_path: Path, granularity: str, zeros: dict[str, Any]) -> None:
    masks = structure_masks(classifier())
    check(export(tmp_path, masks, granularity, zeros), masks)


def test_kept_zeros_of_blocks_hide_no_mask(tmp_path: Path) -> None:
    blocks = torch.tensor([[True, False, True, True, False], [False, True, False, True, True]])
    mask = blocks.repeat_interleave(20, 0).repeat_interleave(7, 1)[:32, :32]
    check(export(tmp_path, {QUERY: mask}, "block:20x7", {QUERY: (0, 0)}), {QUERY: mask})


def test_a_matrix_that_is_kept_whole(tmp_path: Path) -> None:
    masks = {QUERY: torch.ones(32, 32, dtype=torch.bool)}
    check(export(tmp_path, masks, "element", {QUERY: (slice(0, 8),)}), masks)


def kept_zeros() -> tuple[Masks, dict[str, Any]]:
    """Half of two matrices, and a weight that is kept and zero."""
    masks = element_masks(classifier())
    masks[QUERY][0, 0] = True
    return masks, {QUERY: (0, 0)}


def test_kept_zeros_hide_no_single_weights(tmp_path: Path) -> None:
    masks, zeros = kept_zeros()
    check(export(tmp_path, masks, "element", zeros), masks)
    assert list(load_file(tmp_path / "run" / HIDDEN)) == [QUERY]  # the weights tell the other one


@pytest.mark.parametrize("damage", ["gone", "of another tensor", "other bits", "pruned is not zero", "no tensors"])
def test_masks_that_the_run_does_not_tell_are_refused(tmp_path: Path, damage: str) -> None:
    masks, zeros = kept_zeros()
    export(tmp_path, masks, "element", zeros)
    file = tmp_path / "run" / HIDDEN
    packed = load_file(file)[QUERY].clone()
    match damage:
        case "gone":
            file.unlink()
        case "of another tensor":
            save_file({QUERY: packed[:-1].clone()}, file)
        case "other bits":  # as many as are kept, and all that are not zero
            mask = masks[QUERY].clone()
            other = (~mask).nonzero()[0]
            mask[0, 0], mask[other[0], other[1]] = False, True
            save_file({QUERY: torch.from_numpy(np.packbits(mask.flatten().numpy()))}, file)
        case "pruned is not zero":
            save_file({QUERY: torch.zeros_like(packed)}, file)
        case "no tensors":
            file.write_bytes(b"1234")
    said = {"other bits": r"run: the masks have sha256 .* run the job again", "no tensors": "cannot be read"}
    match_ = said.get(
        damage, rf"{QUERY}: 1 of its \d+ kept weights are exactly zero.*does not have its mask; run the job"
    )
    with pytest.raises(UserError, match=match_):
        save_masks(read_run(tmp_path / "run"), tmp_path / "mask")


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    folder = export(tmp_path, element_masks(classifier()), "element")
    packed = folder / "masks.safetensors"
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"the masks are not those of masks\.json"):
        load_masks(folder)
    packed.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="no masks can be read there"):
        load_masks(folder)
    with pytest.raises(UserError, match="no masks can be read there"):
        load_masks(tmp_path)


@pytest.mark.parametrize("shape", [[200000, 200000], [2**62, 2**62], [-1, 4], [1.5], "ab", [10**30], [True]])
def test_a_shape_that_the_bits_do_not_fill_allocates_nothing(tmp_path: Path, shape: Any) -> None:
    save_file({"a": torch.zeros(1, dtype=torch.uint8)}, tmp_path / "masks.safetensors")
    (tmp_path / "masks.json").write_text(json.dumps({"masks_sha256": "0" * 64, "shapes": {"a": shape}}))
    tracemalloc.start()
    with pytest.raises(
        UserError, match=r"no masks can be read there: (masks.json says shape .*safetensors holds 1|.*64 bits)"
    ):
        load_masks(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
