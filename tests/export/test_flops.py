"""FLOPs against counts by hand."""

from __future__ import annotations

import pytest
import torch

from leap_dist.models.flops import Flops, count_flops
from tests.export.runs import classifier

LENGTH = 12


def inputs(batch: int, length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = torch.arange(1, batch * length + 1).view(batch, length) % 39 + 1
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("batch", [1, 3])
def test_an_encoder(batch: int) -> None:
    layer = 4 * 32 * 32 + 2 * 32 * 48
    head = (32 * 32 + 32 * 3) / LENGTH  # pooler and classifier, once a sequence
    found = count_flops(classifier(), inputs(batch))
    assert found.linear == pytest.approx(2 * (2 * layer + head), rel=1e-12)
    assert found.attention == 2 * 2 * 2 * LENGTH * 32
    assert found.total == found.linear + found.attention and found.length == LENGTH


def test_a_decoder_with_grouped_heads() -> None:
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    found = count_flops(classifier("llama"), inputs(1))
    assert found.linear == 2 * (2 * layer + 32 * 3)
    assert found.attention == 2 * 2 * 2 * LENGTH * 32


def test_only_experts_that_are_routed_to_count() -> None:
    attention = 2 * 32 * 32 + 2 * 32 * 16
    few, many = (
        count_flops(classifier("mixtral", num_local_experts=number, num_experts_per_tok=2), inputs(1)).linear
        for number in (3, 6)
    )
    assert few == 2 * (2 * (attention + 32 * 3 + 2 * 3 * 32 * 48) + 32 * 3)
    assert many - few == 2 * 2 * 32 * 3  # the larger routers


def test_the_model_is_left_as_it_was() -> None:
    model = classifier("mixtral")
    before = model.config._attn_implementation, model.get_experts_implementation()
    count_flops(model, inputs(1))
    assert (model.config._attn_implementation, model.get_experts_implementation()) == before


def test_the_total_is_the_sum() -> None:
    assert Flops(8, 3.0, 4.0).total == 7.0
