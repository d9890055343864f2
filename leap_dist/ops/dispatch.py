"""The ops by device: PyTorch ops of namespace `leap_dist`, plain torch everywhere, Triton where it can run.

Each op has one plain-torch definition (reference.py, units.py, soft.py); kernels.py, unit_kernels.py and
soft_kernels.py have the Triton versions, of the same signatures.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from leap_dist.ops import reference, soft, units

NAMESPACE = "leap_dist"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
GPU_ROW = 4096  # elements of one Triton program
DTYPES = {torch.float32, torch.bfloat16, torch.bool, torch.int64}  # of the tensors that the kernels take
KERNELS = {reference.__name__: "kernels", units.__name__: "unit_kernels", soft.__name__: "soft_kernels"}
CAPABILITY = (7, 0)  # of the oldest GPUs that Triton compiles for


def reasons(device: torch.device, dtypes: Set[torch.dtype] = frozenset()) -> list[str]:
    """Every reason why the Triton kernels cannot run on tensors of a device and these dtypes; empty if they can."""
    found = []
    if importlib.util.find_spec("triton") is None:
        found.append("triton is not installed: pip install triton")
    if device.type != "cuda":
        found.append(f"the tensors are on {device.type}, not on a CUDA device")
    elif not torch.cuda.is_available():
        found.append("torch finds no CUDA device")
    elif (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        found.append(f"the GPU has compute capability {capability}, less than {CAPABILITY}")
    return found + [f"{dtype} is not supported" for dtype in sorted(dtypes - DTYPES, key=str)]


@functools.cache
def runs_on_triton(device: torch.device, dtypes: frozenset[torch.dtype] = frozenset()) -> bool:
    """Whether the Triton kernels can run; a GPU on which they cannot is reported once, with all reasons."""
    found = reasons(device, dtypes)
    if found and device.type == "cuda":
        warnings.warn(f"LEAP runs on {device} without its fused kernels: {'; '.join(found)}", stacklevel=2)
    return not found


def row_size(device: torch.device) -> int:
    """Elements of one row of a table of runs on a device."""
    if device.type == "cpu":
        return reference.CPU_BLOCK
    return GPU_ROW if runs_on_triton(device) else 1 << 62


def _register(plain: Callable[..., Any], mutates: Sequence[str], fake: Callable[..., Any]) -> Any:
    """An op from its plain definition; on CUDA the function of the same name in the module of KERNELS.

    Defined in the library itself: `torch.library.custom_op` takes 50 us a call for gradients that no op here has,
    this takes 6, and a step calls hundreds.
    """
    name = plain.__name__

    def on_cuda(*arguments: Any) -> Any:
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        device = next(tensor.device for tensor in tensors if tensor.is_cuda)
        if not runs_on_triton(device, frozenset(tensor.dtype for tensor in tensors)):
            return plain(*arguments)
        fused = importlib.import_module(f"leap_dist.ops.{KERNELS[plain.__module__]}")
        return getattr(fused, name)(*arguments)

    LIBRARY.define(name + torch.library.infer_schema(plain, mutates_args=mutates), tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _nothing(*arguments: Any) -> None:
    """In-place ops return nothing."""


def _fake_element(table: Tensor, grad: Tensor, *rest: Any) -> Tensor:
    return grad.new_empty(len(table), dtype=torch.float64)


def _fake_take(table: Tensor, scores: Tensor, *rest: Any) -> Tensor:
    return scores.new_empty(torch.library.get_ctx().new_dynamic_size())


def _fake_histogram(table: Tensor, scores: Tensor, base: Tensor, *rest: Any) -> Tensor:
    return base.new_empty(len(base), 1 << reference.DIGIT_BITS)


def _fake_count(table: Tensor, scores: Tensor, bracket: Tensor) -> Tensor:
    return table.new_empty(len(table), 2)


def _fake_best_of(table: Tensor, scores: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
    return mask.new_empty(len(table))


def _fake_sums(patches: Tensor, grad: Tensor, latent: Tensor, others: Tensor | None, num_units: int) -> Tensor:
    return grad.new_empty(num_units, dtype=torch.float64)


def _fake_soft(table: Tensor, keys: Tensor, latent: Tensor, *rest: Any) -> Tensor:
    return latent.new_empty(len(table), soft.SUMS, dtype=torch.float64)


LATENT_STATE = ("latent", "exp_avg", "exp_avg_sq")
SCORE_STATE = ("score", "score_exp_avg", "score_exp_avg_sq")

adamw_ = _register(reference.adamw_, ("weight", "exp_avg", "exp_avg_sq"), _nothing)
masked_adamw_ = _register(reference.masked_adamw_, LATENT_STATE, _nothing)
element_adamw_ = _register(reference.element_adamw_, LATENT_STATE + SCORE_STATE, _fake_element)
shared_adamw_ = _register(reference.shared_adamw_, (*LATENT_STATE, "score"), _fake_element)
score_adamw_ = _register(reference.score_adamw_, SCORE_STATE, _fake_element)
write_masked_ = _register(reference.write_masked_, ("hosted",), _nothing)
count_inside = _register(reference.count_inside, (), _fake_count)
take_inside = _register(reference.take_inside, (), _fake_take)
histogram = _register(reference.histogram, (), _fake_histogram)
cut_ = _register(reference.cut_, ("mask",), _nothing)
best_of_ = _register(reference.best_of_, ("mask",), _fake_best_of)
unit_sums = _register(units.unit_sums, (), _fake_sums)
expand_units_ = _register(units.expand_units_, ("mask",), _nothing)
write_soft_ = _register(soft.write_soft_, ("hosted",), _fake_soft)
learn_soft_ = _register(soft.learn_soft_, ("score", "exp_avg", "exp_avg_sq", "masked"), _nothing)
