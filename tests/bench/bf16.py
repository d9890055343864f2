"""Run a script with bf16 products at the speed of fp32 ones on a CPU that has no instructions for bf16.

    python -m tests.bench.bf16 SCRIPT ARGUMENT ...

Without such instructions (AVX-512 BF16, AMX) torch takes about eight times as long for products in bf16 as in fp32.
Here they are taken in fp32 and rounded to bf16 once, which is what the instructions do: studies in bf16 give the same
figures, but for the order of the sums, on either machine. Where the CPU has them, nothing is changed.
"""

import runpy
import sys
from collections.abc import Callable
from typing import Any

import torch

# aten::linear and matmul come down to these on the CPU; attention is one kernel there, forward and backward
PRODUCTS = (
    "mm",
    "mm.out",
    "addmm",
    "addmm_",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
KEPT: list[torch.library.Library] = []  # what it registers goes when it goes


def exact(value: Any) -> Any:
    """A bf16 tensor in fp32."""
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


def product_in_fp32(name: str) -> Callable[..., Any]:
    """This operation with bf16 tensors taken in fp32, and all else as torch has it."""
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(one, torch.Tensor) and one.dtype == torch.bfloat16 for one in args):
            return kernel.call_boxed(keys, *args, **kwargs)
        into = args[0] if name.endswith("_") else kwargs.get("out")
        found = kernel.call_boxed(keys, *map(exact, args), **{key: exact(value) for key, value in kwargs.items()})
        if into is not None:
            return into.copy_(found)
        if isinstance(found, torch.Tensor):
            return found.bfloat16()
        out, *rest = found  # attention's output, and its sums, which are in fp32 always; or all the gradients
        return (out.bfloat16(), *(rest if name.endswith("cpu") else (one.bfloat16() for one in rest)))

    return product


def take_in_fp32() -> None:
    """From now on take bf16 products in fp32."""
    KEPT.append(torch.library.Library("aten", "IMPL"))
    for name in PRODUCTS:
        KEPT[-1].impl(name, product_in_fp32(name), "CPU", with_keyset=True, allow_override=True)


def install() -> None:
    """`take_in_fp32`, once, where the CPU has no instructions for bf16."""
    if not KEPT and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        take_in_fp32()


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = ""
    runpy.run_path(sys.argv[0], run_name="__main__")
