"""Floating-point operations of a forward pass, counted from the products that run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 128  # tokens, where the model takes as many
BATCHED = ("bmm", "baddbmm")


@dataclass(frozen=True)
class Flops:
    """FLOPs per token at `length` tokens, a multiply-add as two.

    linear: all products with weights, heads and routers included; of the experts only those that were routed to.
    attention: queries with keys, and the result with values, over the full length.
    """

    length: int
    linear: float
    attention: float

    @property
    def total(self) -> float:
        """Linear layers and attention products."""
        return self.linear + self.attention


def count_flops(model: PreTrainedModel, inputs: Mapping[str, Tensor], **options: int) -> Flops:
    """Count one forward pass with `inputs` (input_ids: batch, length) and further options of the model."""
    with plain_implementations(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs, **options)
    by_operator = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    tokens, length = inputs["input_ids"].numel(), inputs["input_ids"].shape[1]
    attention = sum(count for operator, count in by_operator.items() if operator.split(".")[1] in BATCHED)
    return Flops(length, (sum(by_operator.values()) - attention) / tokens, attention / tokens)


@contextmanager
def plain_implementations(model: PreTrainedModel, attention: str = "eager", experts: str = "eager") -> Iterator[None]:
    """Attention, and experts where the model has them, by other implementations of transformers for a while.

    "eager" has them as plain products: a fused kernel hides its products from whoever counts or exports them.
    """
    before = model.config._attn_implementation, model.get_experts_implementation()
    model.set_attn_implementation(attention)
    model.set_experts_implementation(experts)
    try:
        yield
    finally:
        model.set_attn_implementation(before[0])
        model.set_experts_implementation(before[1])


def max_length(model: PreTrainedModel) -> int:
    """Tokens that the model has positions for; without a limit, LENGTH."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet says -1
        return LENGTH
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return limit - module.padding_idx - 1  # RoBERTa counts positions from behind its padding index
    return limit
