"""What the studies take for bf16 products on a CPU that has no instructions for them: right, with their gradients."""

from __future__ import annotations

import torch
from torch.nn import functional

from leap_dist.bench.processes import on_ranks
from tests.bench.bf16 import take_in_fp32

ROUNDING = 2**-8  # of a number in bf16, to its size


def products(dtype: torch.dtype) -> list[torch.Tensor]:
    """Of linear layers with and without a bias, of attention and of batches, and the gradients."""
    torch.manual_seed(0)
    x, w, b, q, k, v = (
        torch.randn(*shape).bfloat16().to(dtype).requires_grad_()
        for shape in ((5, 7), (3, 7), (3,), *[(2, 3, 9, 8)] * 3)
    )
    linear, plain = functional.linear(x, w, b), functional.linear(x, w)
    attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    batches = torch.baddbmm(q[0], k[0], v[0, :, :8]) + q[1] @ k[1, :, :8]
    out = [linear, plain, attention, batches]
    into = torch.mm(x.detach(), w.detach().t(), out=torch.empty(5, 3, dtype=dtype))
    added = into.clone().addmm_(x.detach(), w.detach().t())
    grads = torch.autograd.grad([one.sum() for one in out], [x, w, b, q, k, v])
    return [one.detach() for one in (*out, *grads, into, added)]


def measure() -> tuple[list[str], list[float], bool]:
    """Dtypes, the largest error to the largest number, and whether a product is the rounded one of fp32."""
    take_in_fp32()
    found, exact = products(torch.bfloat16), products(torch.float64)
    errors = [((ours - right).abs().max() / right.abs().max()).item() for ours, right in zip(found, exact, strict=True)]
    a, b = torch.randn(64, 999).bfloat16(), torch.randn(999, 32).bfloat16()
    return [str(one.dtype) for one in found], errors, torch.equal(a @ b, (a.float() @ b.float()).bfloat16())


def test_bf16_products_in_fp32_are_rounded_once() -> None:
    dtypes, errors, taken = on_ranks(1, measure)[0]
    assert set(dtypes) == {"torch.bfloat16"}
    assert max(errors) < 2 * ROUNDING
    assert taken
