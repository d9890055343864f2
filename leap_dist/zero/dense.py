"""A DeepSpeed engine with dense AdamW: what a job with LEAP is compared with."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from leap_dist.zero.ranks import errors_only


def initialize_dense(model: nn.Module, config: Mapping[str, Any], lr: float, fused: bool = False) -> Any:
    """The engine; `config` holds DeepSpeed's keys. Where LEAP gives no weight decay, this gives none."""
    import deepspeed

    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.dim() >= 2]},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    client = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    with errors_only():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(groups, lr=lr, fused=fused), config={**config, **client}
        )
    return engine
