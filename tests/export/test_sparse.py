"""Block-sparse products: densities by hand, times that are there, and what a card says of them."""

from __future__ import annotations

import re

import pytest
import torch

from leap_dist.export.sparse import BlockTime, block_density, describe_blocks, measure_blocks
from tests.export.runs import DOWN, QUERY, UP, classifier


def time(density: float, dense: float, sparse: float) -> BlockTime:
    return BlockTime("w", (64, 32), density, dense, sparse)


def test_density_counts_blocks_with_anything_left() -> None:
    weight = torch.zeros(4, 6)
    assert block_density(weight, (2, 3)) == 0
    weight[1, 2] = weight[0, 0] = 1
    assert block_density(weight, (2, 3)) == 0.25
    weight[3, 5] = -1e-30
    assert block_density(weight, (2, 3)) == 0.5


def test_layers_that_fit_are_timed_once_a_shape_and_density() -> None:
    model = classifier(intermediate_size=64)
    names = [QUERY, QUERY.replace("layer.0", "layer.1"), UP, DOWN, "bert.encoder.layer.1.output.dense.weight"]
    with torch.no_grad():
        model.get_parameter(UP)[:32] = 0
        model.get_parameter(names[4])[:] = 0
    found = measure_blocks(model, names, (32, 32), tokens=8)
    assert [(t.name, t.shape, t.density) for t in found] == [
        (QUERY, (32, 32), 1.0),
        (UP, (64, 32), 0.5),
        (DOWN, (32, 64), 1.0),
    ]
    assert all(t.dense_ms > 0 and t.sparse_ms > 0 for t in found)
    assert not measure_blocks(model, ["bert.embeddings.word_embeddings.weight"], (8, 8), tokens=8)
    assert not measure_blocks(model, [QUERY], (24, 32), tokens=8)


def test_weights_that_no_linear_layer_owns_are_left_out() -> None:
    """The experts of a layer are one tensor; its attention is timed."""
    model = classifier("mixtral", num_local_experts=4, num_hidden_layers=1)
    names = [name for name, value in model.named_parameters() if "experts" in name or "q_proj" in name]
    found = measure_blocks(model, names, (16, 16), tokens=8)
    assert len(names) == 3
    assert [time.name for time in found] == [n for n in names if "q_proj" in n] * torch.backends.mkl.is_available()


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (
            [time(0.5, 1, 4), time(0.25, 1, 2)],
            "density 0.25 of 64x32: 0.50; density 0.5 of 64x32: 0.25: dense is faster, ",
        ),
        (
            [time(0.5, 1, 2), time(0.1, 2, 1)],
            "0.1 of 64x32: 2.00; .*: dense is faster for 1 of 2, the export stays dense",
        ),
        ([time(0.1, 2, 1)], "BSR is faster for all of them, the export is dense all the same"),
    ],
)
def test_what_a_card_says(times: list[BlockTime], said: str) -> None:
    text = describe_blocks(times, (32, 32), 16)
    assert text.startswith("torch's BSR with 32x32 blocks at 16 tokens, times as fast as dense here: ")
    assert re.search(said, text)
