"""A teacher beside a hosted model: frozen, in the model's precision, and sharded like it under ZeRO-3."""

from typing import Any

from torch import nn

from leap_dist.zero.ranks import errors_only


def host_teacher(model: nn.Module, engine: Any) -> Any:
    """`model`, ready to be called on the device of `engine`: itself, or under stage 3 a ZeRO-3 engine of its own."""
    model.requires_grad_(False).eval()
    if engine.zero_optimization_stage() < 3:
        return _cast(model, engine.module).to(engine.device)
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": engine.bfloat16_enabled()},
        "fp16": {"enabled": engine.fp16_enabled()},
    }
    with errors_only():
        hosted, *_ = deepspeed.initialize(model=model, config=config)
    hosted.eval()
    return hosted


def _cast(model: nn.Module, hosted: nn.Module) -> nn.Module:
    """The teacher, its parameters in the precision of the student's; buffers as they are, as engines leave them.

    A rotary embedding's frequencies in bf16 turn far words by other angles than the student's.
    """
    own = {name: parameter.dtype for name, parameter in hosted.named_parameters()}
    usual = next(hosted.parameters()).dtype
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(own.get(name, usual))
    return model
