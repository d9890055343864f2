"""What LEAP refuses to run under, found before anything is built, and why."""

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.nn.parameter import is_lazy

from leap_dist.config.legacy import IMPORT
from leap_dist.config.sections import SECTIONS
from leap_dist.core.fragments import Fragment
from leap_dist.errors import UserError
from leap_dist.zero.groups import optimizer_problems
from leap_dist.zero.ranks import is_short_of_memory, peer_is_gone

OTHER_SHARDING = {"zenflow": None, "mics_shard_size": -1, "zero_hpz_partition_size": 1, "zero_quantized_weights": False}
"""Keys of zero_optimization for ways of sharding that LEAP does not know, each with the value that means off."""

BF16_OPTIONS = (
    ("bf16_master_weights_and_grads", False, "scores and thresholds need fp32 masters"),
    ("bf16_optimizer_states", False, "scores and thresholds need fp32 moments"),
    ("check_grad_overflow", True, "a gradient that is not finite would spoil every score"),
)
"""Options of the bf16 section that LEAP cannot have, each with the only value that is allowed, and why."""


def check_engine_config(
    config: Mapping[str, Any],
    model: nn.Module,
    mpu: Any,
    mesh_param: Any,
    lr_scheduler: Any,
    optimizer: Any,
    planned: bool = False,
) -> None:
    """Raise one UserError with every reason why this job cannot work; a `planned` model may have no values yet."""
    problems = [*_config_problems(config)] or [*_deepspeed_problems(config)]
    problems += [*_object_problems(model, mpu, lr_scheduler, optimizer, planned), *_dtype_problems(config, model)]
    if mesh_param is not None:
        problems.append("mesh_param: device meshes are not supported yet; use data parallel ranks with ZeRO")
    _raise_if(problems)


def check_hosting(config: Mapping[str, Any], model: nn.Module, optimizer: Any) -> None:
    """The same for an engine that another library builds: that one fills in "auto", and then DeepSpeed checks."""
    known = _without_auto(config)
    problems = [*_config_problems(known), *_object_problems(model, None, None, optimizer)]
    problems += _dtype_problems(config, model)
    offload = _section(_section(known, "zero_optimization"), "offload_optimizer").get("device", "none")
    if offload != "none" and known.get("zero_force_ds_cpu_optimizer", True):
        problems.append(
            "zero_force_ds_cpu_optimizer: has to be false where the optimizer is offloaded, or another one is put in "
            "the place of LEAP's"
        )
    _raise_if(problems)


@contextmanager
def refusals_of_deepspeed() -> Iterator[None]:
    """What DeepSpeed raises while it builds an engine of the user's config, as one message in its own words.

    Memory that is short and ranks that are gone are no matter of the config, and are raised as they are.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_short_of_memory(error) or peer_is_gone(error):
            raise
        raise UserError(f"DeepSpeed cannot build the engine: {_words(error)}") from error


def _words(error: Exception) -> str:
    """What an error says; where it says nothing, the line that raised it."""
    text = " ".join(str(error).split())
    if not text:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{Path(last.filename).name}, line {last.lineno}: {last.line}"
    return f"{type(error).__name__}: {text}"


def _raise_if(problems: list[str]) -> None:
    if problems:
        raise UserError("\n".join(problems))


def _without_auto(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without the values that are still to be filled in."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if value != "auto"
    }


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if "optimizer" in config:
        yield (
            "optimizer: LEAP's step is the optimizer (AdamW); remove the section and give lr, betas, eps and "
            "weight_decay through optimizer=torch.optim.AdamW(...), model_parameters groups, or the train section"
        )
    yield from _zero_problems(config)
    yield from _precision_problems(config)
    if "compression_training" in config:
        yield f"compression_training: what DeepSpeed pruned by; {IMPORT}"
    for name in ("tensor_parallel", "expert_parallel", "hybrid_engine"):
        if _section(config, name).get("enabled", name in config):
            yield f"{name}: not supported together with LEAP yet; remove the section"
    if _section(config, "checkpoint").get("load_universal"):
        yield (
            "checkpoint.load_universal: universal checkpoints hold no latent weights, scores and masks; remove it, and "
            "load the checkpoint itself at the number of ranks that wrote it"
        )
    clipping = config.get("gradient_clipping", 1.0)
    if not isinstance(clipping, int | float) or isinstance(clipping, bool) or not clipping >= 0:
        yield f"gradient_clipping: got {clipping!r}; allowed: a number >= 0"
    if config.get("sequence_parallel_size", 1) != 1:
        yield "sequence_parallel_size: not supported together with LEAP yet; use 1"


def _zero_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(config.get("zero_optimization", {}), Mapping):
        yield f'zero_optimization: got {config["zero_optimization"]!r}; allowed: an object, such as {{"stage": 2}}'
    zero = _section(config, "zero_optimization")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        yield f"zero_optimization.stage: got {stage!r}; allowed: 0, 1, 2, 3"
    for name in ("offload_optimizer", "offload_param"):
        if _section(zero, name).get("device") == "nvme":
            yield f"zero_optimization.{name}.device: got 'nvme'; the state has to stay in memory: use 'cpu' or drop it"
    if _section(zero, "offload_optimizer").get("ratio", 1.0) != 1.0:
        yield "zero_optimization.offload_optimizer.ratio: the state has to be in one place; use 1.0 or drop it"
    if zero.get("compute_grad_norm") is False:
        yield (
            "zero_optimization.compute_grad_norm: got False; allowed: True: without the norm a gradient that is not "
            "finite is not found, and would spoil every score"
        )
    for name, off in OTHER_SHARDING.items():
        if zero.get(name) not in (None, off):
            yield f"zero_optimization.{name}: LEAP does not know this way of sharding yet; remove it"
    if zero.get("load_from_fp32_weights") is False:
        yield "zero_optimization.load_from_fp32_weights: got False; LEAP resumes from the fp32 weights: remove it"
    if zero.get("elastic_checkpoint"):
        yield "zero_optimization.elastic_checkpoint: such checkpoints hold no progress of LEAP; remove it"


def _precision_problems(config: Mapping[str, Any]) -> Iterator[str]:
    low = [name for name in ("bf16", "fp16") if _section(config, name).get("enabled")]
    if _section(config, "zero_optimization").get("stage", 0) == 0 and low:
        yield (
            f"{low[0]}.enabled: zero_optimization.stage 0 hides its fp32 master weights; use stage 1, 2 or 3, or fp32"
        )
    for key, value, why in BF16_OPTIONS:
        if _section(config, "bf16").get(key, value) != value:
            yield f"bf16.{key}: got {not value}; allowed: {value}: {why}"
    if _section(config, "amp").get("enabled"):
        yield "amp.enabled: LEAP's step works with bf16 or fp16 under ZeRO stage 1, 2 or 3; use one of them, or fp32"


def _deepspeed_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed has against its part of the config; only once ranks run, for it divides the batch by them."""
    if not torch.distributed.is_initialized():
        return
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.config import DeepSpeedConfig
    from torch.optim import lr_scheduler

    own = {key: value for key, value in config.items() if key not in SECTIONS}
    try:
        DeepSpeedConfig(deepcopy(own))
    except ValidationError as error:
        for item in error.errors():
            place = ".".join(map(str, item["loc"]))
            yield f"{error.title}.{place}: got {item['input']!r}; DeepSpeed says: {item['msg']}"
    except Exception as error:  # whatever its checks run into
        yield f"DeepSpeed refuses its part of the config: {_words(error)}"
    kind = _section(config, "scheduler").get("type")
    if "scheduler" in config and not (hasattr(lr_schedules, str(kind)) or hasattr(lr_scheduler, str(kind))):
        yield f"scheduler.type: got {kind!r}; allowed: {', '.join(lr_schedules.VALID_LR_SCHEDULES)}, or one of torch's"
    if _section(config, "fp16").get("enabled") and not get_accelerator().is_fp16_supported():
        yield f"fp16.enabled: the {get_accelerator().device_name()} of this machine cannot; use bf16 or fp32"


def _object_problems(
    model: nn.Module, mpu: Any, lr_scheduler: Any, optimizer: Any, planned: bool = False
) -> Iterator[str]:
    if mpu is not None:
        yield "mpu: tensor and pipeline parallel groups are not supported yet; use data parallel ranks with ZeRO"
    if type(model).__name__ in ("PipelineModule", "DualPipeVModule"):
        yield "model: pipeline modules are not supported yet; use data parallel ranks with ZeRO"
    if getattr(model, "peft_config", None):
        yield (
            "model: got a PEFT model; LEAP prunes weights that are trained, and adapters leave those frozen: merge "
            "them first, and prune model.merge_and_unload().requires_grad_(True)"
        )
    yield from _unready_parameters(model, planned)
    if any(hasattr(p, "allreduce") and not p.allreduce for p in model.parameters()):
        yield "model: expert parallel parameters are not supported yet"
    if optimizer is not None and type(optimizer) is not torch.optim.AdamW:
        kind = type(optimizer).__name__
        yield (
            f"optimizer: got a {kind}; LEAP steps as AdamW: pass a torch.optim.AdamW, whose settings it takes over, "
            "or none"
        )
    if type(optimizer) is torch.optim.AdamW:
        yield from optimizer_problems(optimizer)
    if lr_scheduler is not None and not callable(lr_scheduler):
        yield (
            "lr_scheduler: got a scheduler that is tied to another optimizer; pass a function that makes it: "
            "lr_scheduler=lambda optimizer: LinearLR(optimizer, ...)"
        )


def _dtype_problems(config: Mapping[str, Any], model: nn.Module) -> Iterator[str]:
    """Parameters that no fp32 master is kept of. With a bf16 or fp16 section DeepSpeed casts them all."""
    if any(_section(config, name).get("enabled") for name in ("bf16", "fp16")):  # "auto" is known to be one or none
        return
    stage = _section(config, "zero_optimization").get("stage", 0)
    found = {p.dtype: name for name, p in reversed(list(model.named_parameters())) if p.requires_grad}
    allowed = (torch.float32,) if stage == 0 else (torch.float32, torch.bfloat16, torch.float16)
    way_out = "call model.float(), or train with a bf16 section under stage 1, 2 or 3"
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    for dtype, name in found.items():
        if dtype not in allowed:
            yield f"model: {name} is {dtype}; allowed under zero_optimization.stage {stage}: {names}; {way_out}"
    if len(found) > 1 and all(dtype in allowed for dtype in found):
        shown = ", ".join(f"{name} is {dtype}" for dtype, name in found.items())
        yield f"model: its parameters have several dtypes: {shown}; allowed: one; {way_out}"


def check_masters(fragments: Iterable[Fragment]) -> None:
    """Raise UserError unless LEAP steps on fp32: what another library's settings have made of an engine."""
    for fragment in fragments:
        if fragment.flat.dtype != torch.float32:
            raise UserError(
                f"engine: it steps {fragment.tensor} in {fragment.flat.dtype}; allowed: torch.float32, which scores "
                "and thresholds need: use zero_optimization.stage 1, 2 or 3 with a bf16 section, or model.float()"
            )


def _unready_parameters(model: nn.Module, planned: bool) -> Iterator[str]:
    """Parameters that have no shape or no storage yet; one of each kind is named."""
    named = list(model.named_parameters())
    lazy = next((name for name, p in named if is_lazy(p)), None)
    if lazy is not None:
        yield f"model: {lazy} has no shape yet (a lazy module); call the model once first"
    meta = next((name for name, p in named if p.is_meta), None)
    if meta is not None and not planned:
        yield f"model: {meta} is on the meta device, without values; load the weights first"
    if not any(p.requires_grad for _, p in named):
        yield "model: it has no parameter that is trained; call requires_grad_(True) on what is to be pruned"


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}
