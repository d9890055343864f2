"""What the tests of other training libraries share: a tiny BERT, rows to learn, and ranks left as they were."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

LEARNING_RATE = 1e-3


def tiny_bert(**settings: Any) -> Any:
    """Two layers of 8192 prunable weights each; the same weights on every rank."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=50, hidden_dropout_prob=0.0, **sizes, **settings))


def rows(number: int) -> list[dict[str, torch.Tensor]]:
    """Eight tokens; the label says whether the first is the larger of the first two."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 50, (number, 8), generator=generator)
    return [{"input_ids": x, "labels": (x[0] > x[1]).long()} for x in tokens]


@contextmanager
def accelerate_left_behind() -> Iterator[None]:
    """Accelerate keeps its state in the process and in its environment, and transformers builds models sharded as long
    as it knows of a stage 3 config; the next call to these ranks needs none of it. Accelerate looks for no backend
    where there is no card: each rank would take itself for the only one, and all write one file of random numbers at
    once."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = dict(os.environ)
    try:
        with patch.object(PartialState, "_prepare_backend", return_value=("gloo", DistributedType.NO)):
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(before)
