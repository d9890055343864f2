"""The plain-torch definition of the optimizer's inner loops, over flat fp32 runs of elements.

On the CPU they work in blocks that stay in the cache; the arithmetic is elementwise, so results do not depend
on how the elements are cut into blocks or fragments. AdamW is Loshchilov and Hutter, arXiv 1711.05101, with the
operations of torch.optim.AdamW in their order, so that it gives the same bits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_BLOCK = 1 << 16  # 256 KiB in fp32: six such blocks fit the second-level cache of one core


@dataclass(frozen=True)
class Adam:
    """The scalars of one AdamW step; `step` counts from 1."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


def blocks(numel: int, device: torch.device) -> Iterator[slice]:
    """Cut a run of elements into cache blocks on the CPU; one block elsewhere."""
    size = CPU_BLOCK if device.type == "cpu" else max(numel, 1)
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def adamw_block_(
    weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scratch: Tensor, adam: Adam
) -> None:
    """One AdamW step on one block; every tensor has shape (n,); scratch is overwritten, grad is kept."""
    if adam.weight_decay:
        weight.mul_(1 - adam.lr * adam.weight_decay)
    exp_avg.lerp_(grad, 1 - adam.beta1)
    exp_avg_sq.mul_(adam.beta2).addcmul_(grad, grad, value=1 - adam.beta2)
    correction1 = 1 - adam.beta1**adam.step
    correction2 = 1 - adam.beta2**adam.step
    torch.sqrt(exp_avg_sq, out=scratch)
    scratch.div_(math.sqrt(correction2)).add_(adam.eps)
    weight.addcdiv_(exp_avg, scratch, value=-(adam.lr / correction1))


def adamw_(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: Adam) -> None:
    """One AdamW step; every tensor has shape (n,)."""
    scratch = torch.empty_like(weight[:CPU_BLOCK] if weight.device.type == "cpu" else weight)
    for b in blocks(weight.numel(), weight.device):
        block = weight[b]
        adamw_block_(block, grad[b], exp_avg[b], exp_avg_sq[b], scratch[: block.numel()], adam)


def masked_adamw_(latent: Tensor, grad: Tensor, mask: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: Adam) -> None:
    """AdamW on the latent weights with dL/dW = G * M; mask is bool, every tensor has shape (n,)."""
    size = CPU_BLOCK if latent.device.type == "cpu" else latent.numel()
    kept, scratch = torch.empty_like(latent[:size]), torch.empty_like(latent[:size])
    for b in blocks(latent.numel(), latent.device):
        num = latent[b].numel()
        masked = kept[:num].copy_(mask[b]).mul_(grad[b])
        adamw_block_(latent[b], masked, exp_avg[b], exp_avg_sq[b], scratch[:num], adam)


def element_scores_(
    score: Tensor,
    grad: Tensor,
    latent: Tensor,
    mask: Tensor,
    others: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    adam: Adam,
) -> Tensor:
    """Adam on the scores of an element gate, with dL/dS = G * W * prod_{g' != g} M_g'.

    mask is the gate's own mask, `others` the product of the other gates' (None: all ones), both bool, before
    this step; every tensor has shape (n,). Returns this run's part of dL/dsigma = sum M dL/dS, float64, shape ().
    """
    size = CPU_BLOCK if score.device.type == "cpu" else score.numel()
    buffers = [torch.empty_like(score[:size]) for _ in range(2)]
    total = torch.zeros((), dtype=torch.float64, device=score.device)
    for b in blocks(score.numel(), score.device):
        gradient, scratch = (buffer[: score[b].numel()] for buffer in buffers)
        torch.mul(grad[b], latent[b], out=gradient)
        if others is not None:
            gradient.mul_(scratch.copy_(others[b]))
        total += torch.dot(gradient, scratch.copy_(mask[b]))
        adamw_block_(score[b], gradient, exp_avg[b], exp_avg_sq[b], scratch, adam)
    return total


def write_masked_(weight: Tensor, latent: Tensor, mask: Tensor) -> None:
    """weight = latent * mask, with mask bool; every tensor has shape (n,)."""
    size = CPU_BLOCK if weight.device.type == "cpu" else weight.numel()
    kept = torch.empty_like(latent[:size])
    for b in blocks(weight.numel(), weight.device):
        torch.mul(latent[b], kept[: latent[b].numel()].copy_(mask[b]), out=weight[b])
