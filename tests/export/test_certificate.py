"""Counts and hashes of exported files, held against hand counts and a second way to hash."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from leap_dist.export import certificate
from leap_dist.run_folder import INDEX_FILE

GATES = [
    {"name": "a:row", "granularity": "row", "tensors": ["a.weight"]},
    {"name": "b:element", "granularity": "element", "tensors": ["b.weight"]},
]


def example() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(masked weights, masks) of two gated matrices, one bias that follows its rows, one dense tensor."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        "a.bias": torch.randn(5, generator=generator),
        "a.weight": torch.randn(5, 7, generator=generator),
        "b.weight": torch.randn(3, 3, generator=generator),
        "norm.weight": torch.ones(()),
    }
    rows = torch.tensor([True, False, True, True, False])
    masks = {"a.bias": rows, "a.weight": rows[:, None].expand(5, 7).clone(), "b.weight": torch.eye(3) > 0}
    for name, mask in masks.items():
        weights[name] = weights[name] * mask
    return weights, masks


def count(folder: Path, weights: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> dict[str, Any]:
    save_file(weights, folder / "model.safetensors")
    return certificate.count(folder, masks.items(), GATES)


def test_counts_by_hand(tmp_path: Path) -> None:
    weights, masks = example()
    weights["b.weight"][1, 1] = 0.0
    counts = count(tmp_path, weights, masks)
    assert (counts["kept"], counts["prunable"], counts["density"]) == (24, 44, 24 / 44)
    assert counts["gates"] == [
        GATES[0] | {"kept": 21, "prunable": 35, "density": 0.6},
        GATES[1] | {"kept": 3, "prunable": 9, "density": 1 / 3},
    ]
    assert counts["tensors"] == {
        "a.bias": _tensor([5], 3, 0, counted=False),
        "a.weight": _tensor([5, 7], 21, 0),
        "b.weight": _tensor([3, 3], 3, 1),
    }


def _tensor(shape: list[int], kept: int, zeros_kept: int, counted: bool = True) -> dict[str, Any]:
    numel = math.prod(shape)
    return {
        "shape": shape,
        "numel": numel,
        "kept": kept,
        "density": kept / numel,
        "zeros_kept": zeros_kept,
        "counted": counted,
    }


def test_a_hybrid_counts_its_tensor_once(tmp_path: Path) -> None:
    weights, masks = example()
    save_file(weights, tmp_path / "model.safetensors")
    gates = [*GATES, {"name": "a:element", "tensors": ["a.weight"]}]
    counts = certificate.count(tmp_path, masks.items(), gates)
    assert (counts["kept"], counts["prunable"]) == (24, 44)
    assert counts["gates"][2]["kept"] == 21


def test_hashes_are_as_documented(tmp_path: Path) -> None:
    weights, masks = example()
    counts = count(tmp_path, weights, masks)
    packed = {name: np.packbits(mask.numpy()) for name, mask in masks.items()}
    raw = {name: weight.numpy() for name, weight in weights.items()}
    for key, arrays in (("masks_sha256", packed), ("weights_sha256", raw)):
        joined = b"".join(name.encode() + b"\0" + arrays[name].tobytes() for name in sorted(arrays))
        assert counts[key] == hashlib.sha256(joined).hexdigest()


def test_one_bit_changes_one_hash(tmp_path: Path) -> None:
    weights, masks = example()
    first = count(tmp_path, weights, masks)
    masks["b.weight"][0, 1] = True
    second = count(tmp_path, weights, masks)
    assert second["masks_sha256"] != first["masks_sha256"]
    assert second["weights_sha256"] == first["weights_sha256"]
    weights["norm.weight"] = torch.nextafter(weights["norm.weight"], torch.tensor(2.0))
    assert count(tmp_path, weights, masks)["weights_sha256"] != first["weights_sha256"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_hashed_by_its_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, masks = example()
    counts = count(tmp_path, {name: weight.to(dtype) for name, weight in weights.items()}, masks)
    raw = hashlib.sha256()
    for name in sorted(weights):
        flat = weights[name].to(dtype).reshape(-1)
        raw.update(name.encode() + b"\0" + bytes(flat.view(torch.uint8).tolist()))
    assert counts["weights_sha256"] == raw.hexdigest()


def test_files_with_an_index_count_like_one_file(tmp_path: Path) -> None:
    weights, masks = example()
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = count(tmp_path / "one", weights, masks)
    parts = {"model-00001-of-00002.safetensors": ["b.weight", "a.bias"]}
    parts["model-00002-of-00002.safetensors"] = ["norm.weight", "a.weight"]
    for file, names in parts.items():
        save_file({name: weights[name] for name in names}, tmp_path / "two" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (tmp_path / "two" / INDEX_FILE).write_text(json.dumps(index))
    assert certificate.count(tmp_path / "two", masks.items(), GATES) == one


def test_sharded_export_of_transformers_is_read(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(vocab_size=20, hidden_size=8, num_attention_heads=2))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    name = "bert.pooler.dense.weight"
    masks = [(name, torch.ones(8, 8, dtype=torch.bool))]
    counts = certificate.count(tmp_path, masks, [{"tensors": [name]}])
    assert (counts["kept"], counts["prunable"], counts["density"]) == (64, 64, 1.0)


@pytest.mark.parametrize("value", [1e-45, float("nan"), -2.0])
def test_pruned_weight_that_is_not_zero_is_an_error(tmp_path: Path, value: float) -> None:
    weights, masks = example()
    weights["b.weight"][0, 1] = weights["b.weight"][2, 0] = value
    with pytest.raises(RuntimeError, match=r"b\.weight: 2 pruned weights are not zero"):
        count(tmp_path, weights, masks)


def test_negative_zero_is_zero(tmp_path: Path) -> None:
    weights, masks = example()
    weights["b.weight"][0, 1] = -0.0
    assert count(tmp_path, weights, masks)["tensors"]["b.weight"]["kept"] == 3


def test_mask_that_fits_nothing_is_an_error(tmp_path: Path) -> None:
    weights, masks = example()
    with pytest.raises(RuntimeError, match=r"c\.weight has a mask, but is not among the weights"):
        count(tmp_path, weights, masks | {"c.weight": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(RuntimeError, match=r"b\.weight: the mask is \(9,\), the weight \(3, 3\)"):
        count(tmp_path, weights, masks | {"b.weight": torch.eye(3).view(-1) > 0})
    with pytest.raises(RuntimeError, match=r"gates prune b\.weight, but no mask came"):
        count(tmp_path, weights, {name: mask for name, mask in masks.items() if name != "b.weight"})
    with pytest.raises(AssertionError, match=r"out of name order: a\.weight after b\.weight"):
        count(tmp_path, weights, dict(reversed(masks.items())))


def test_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"neither model\.safetensors nor"):
        certificate.count(tmp_path, [], GATES)


def test_other_ranks_exhaust_the_masks(tmp_path: Path) -> None:
    seen = []

    def masks() -> Iterator[tuple[str, None]]:
        for name in ("a", "b"):
            yield name, None
            seen.append(name)

    assert certificate.count(tmp_path, masks(), GATES, rank=2) == {}
    assert seen == ["a", "b"]


@pytest.mark.parametrize(
    ("kept", "prunable", "target", "unit"),
    [
        (50, 100, 0.5, 1),
        (49, 100, 0.5, 1),
        (51, 100, 0.5, 1),
        (66, 100, 0.5, 16),
        (4, 10, 0.33, 1),
        (0, 10, 0.05, 1),
        (10, 10, 1.0, 1),
        (299, 1000, 0.1 * 3, 1),  # 0.1 * 3 is a little more than 0.3: the difference is a little more than 1
        (0, 0, 0.5, 1),
    ],
)
def test_within_one_unit_is_exact(kept: int, prunable: int, target: float, unit: int) -> None:
    certificate.check_exact(kept, prunable, target, unit)


@pytest.mark.parametrize(
    ("kept", "prunable", "target", "unit"),
    [(48, 100, 0.5, 1), (52, 100, 0.5, 1), (67, 100, 0.5, 16), (33, 100, 0.5, 16), (50, 100, math.nan, 1)],
)
def test_beyond_one_unit_is_an_error(kept: int, prunable: int, target: float, unit: int) -> None:
    with pytest.raises(RuntimeError, match=rf"the density is not the target: kept {kept} of {prunable}"):
        certificate.check_exact(kept, prunable, target, unit)


def test_certificate_has_the_keys_that_others_rely_on(tmp_path: Path) -> None:
    weights, masks = example()
    counts = count(tmp_path, weights, masks)
    metrics = {"dense": {"accuracy": 0.9}, "pruned": {"accuracy": 0.8, "pearson": math.nan}}
    built = certificate.build(counts, target=0.5, unit=7, metrics=metrics, seed=17)
    certificate.write(tmp_path / "certificate.json", built)
    read = json.loads((tmp_path / "certificate.json").read_text())
    assert read == built
    assert list(read) == [
        "target",
        "density",
        "unit",
        "kept",
        "prunable",
        "metrics",
        "gates",
        "tensors",
        "masks_sha256",
        "weights_sha256",
        "seed",
        "versions",
        "sha256",
    ]
    assert read["metrics"]["pruned"] == {"accuracy": 0.8, "pearson": None}
    assert list(read["versions"]) == ["leap_dist", "torch", "deepspeed", "transformers", "python"]
    assert read["versions"]["deepspeed"].startswith("0.19.")
    assert not (tmp_path / ".certificate.json.partial").exists()


def test_no_certificate_beside_the_target(tmp_path: Path) -> None:
    weights, masks = example()
    counts = count(tmp_path, weights, masks)
    with pytest.raises(RuntimeError, match="the density is not the target"):
        certificate.build(counts, target=0.3, unit=7, metrics={}, seed=0)
