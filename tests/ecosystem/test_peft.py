"""A model with adapters: its weights are frozen, so it is refused, in memory and as a folder, until they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import leap_dist
from leap_dist.errors import UserError
from leap_dist.models.load import load_config
from tests.ecosystem.tiny import tiny_bert

pytestmark = pytest.mark.slow

CONFIG = {"leap": {"target": 0.25, "total_steps": 10}}


@pytest.fixture
def adapted() -> Any:
    """A tiny BERT with LoRA adapters."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))


def test_a_peft_model_is_refused_and_a_merged_one_is_not(adapted: Any) -> None:
    with pytest.raises(UserError, match=r"model: got a PEFT model; .* prune model.merge_and_unload\(\).requires_gr"):
        leap_dist.host(adapted, None, CONFIG)
    with pytest.raises(UserError, match="model: got a PEFT model"):
        leap_dist.initialize(model=adapted, config=CONFIG | {"train_micro_batch_size_per_gpu": 1})
    merged = adapted.merge_and_unload().requires_grad_(True)
    optimizer = leap_dist.host(merged, None, CONFIG)
    assert optimizer.plan.prunable == 16384
    leap_dist.release(merged)


def test_a_folder_with_an_adapter_is_refused(adapted: Any, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="that folder holds a PEFT adapter: merge it with its model, and save that"):
        load_config(str(tmp_path))
