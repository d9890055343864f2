"""The loss of predicted words by chunks of tokens: the logits of a batch never stand in memory at once.

A chunk's logits are made, judged, turned into their own gradient in place, and freed. The gradients of the hidden
states and of the head are made in the forward pass, so nothing is computed twice (as in Liger, arXiv 2410.10989).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # the label of a token that has none, as transformers' losses know it
CHUNK = 2**25  # logits of a chunk: 128 MiB in fp32
MOST_ADDED = 8  # chunks whose gradients of the head a sum in bf16 or fp16 takes; of 64 it has an error of 1 %
ROWS = 2**15  # of the head's gradient that are made at once where it is summed in fp32


class Head(NamedTuple):
    """What turns hidden states (N, d) into logits (N, V): h W^T + b; with a cap: cap * tanh(logits / cap)."""

    weight: Tensor
    bias: Tensor | None = None
    cap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """In fp32."""
        values = F.linear(hidden, self.weight, self.bias).float()
        return values if self.cap is None else values.div_(self.cap).tanh_().mul_(self.cap)


class Teaching(NamedTuple):
    """A teacher's logits (n, V) for the tokens of a slice, and how much its KL t^2 and the labels count."""

    logits: Callable[[slice], Tensor]
    temperature: float
    alpha: float  # of the teacher; labels have 1 - alpha


def word_loss(hidden: Tensor, labels: Tensor, head: Head, teaching: Teaching | None = None) -> tuple[Tensor, Tensor]:
    """The mean loss over tokens whose label is not IGNORED, and its parts (labels, teacher), detached, fp32 (2,).

    hidden: (N, d); labels: (N,). The loss is the cross entropy, or (1 - alpha) times it + alpha t^2 KL(teacher, ours).
    """
    loss: tuple[Tensor, Tensor] = _WordLoss.apply(hidden, head.weight, head.bias, labels, head.cap, teaching)
    return loss


@torch.no_grad()
def judge_words(hidden: Tensor, labels: Tensor, head: Head) -> Tensor:
    """Of each token its cross entropy (0 where ignored) and whether its word is the most likely one; fp32 (N, 2)."""
    judged = torch.zeros(len(labels), 2, device=hidden.device)
    for part in _chunks(labels, len(head.weight)):
        logits = head.logits(hidden[part])
        judged[part, 0] = F.cross_entropy(logits, labels[part], ignore_index=IGNORED, reduction="none")
        judged[part, 1] = (logits.argmax(-1) == labels[part]).float()
    return judged


def _chunks(labels: Tensor, num_words: int) -> Iterator[slice]:
    size = max(1, CHUNK // num_words)
    for start in range(0, len(labels), size):
        yield slice(start, min(start + size, len(labels)))


class _WordLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        cap: float | None,
        teaching: Teaching | None,
    ) -> tuple[Tensor, Tensor]:
        wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
        leaves = [x if need else None for x, need in zip((hidden, weight, bias), wanted, strict=True)]
        many = len(labels) * len(weight) > MOST_ADDED * CHUNK
        grads = [x if x is None else _sum_of(x, fine=many and x is not hidden) for x in leaves]
        count = (labels != IGNORED).sum().clamp(min=1)
        parts = torch.zeros(2, device=hidden.device)
        for part in _chunks(labels, len(weight)):
            logits = Head(weight, bias, cap).logits(hidden[part])
            slope = 1.0 - (logits / cap).square() if cap is not None else None
            parts += _judge_(logits, labels[part], teaching, part) / count  # logits are now the gradient
            if any(wanted):
                if slope is not None:
                    logits *= slope
                _add_grads(grads, (logits / count).to(hidden.dtype), hidden[part], weight, part)
        # not saved as tensors are: backward scales them in place, once
        ctx.grads = [x if x is None else x.to(hidden.dtype) for x in grads]
        alpha = teaching.alpha if teaching else 0.0
        weights = torch.tensor([1.0 - alpha, alpha], device=hidden.device)
        ctx.mark_non_differentiable(parts)
        return (parts * weights).sum(), parts

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        return (*(grad if grad is None else grad.mul_(outer[0]) for grad in grads), None, None, None)


def _sum_of(leaf: Tensor, fine: bool) -> Tensor:
    """Where a gradient is summed: as the leaf is, or `fine`, in fp32 at least."""
    return torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32) if fine else leaf.dtype)


def _add_grads(grads: list[Tensor | None], step: Tensor, hidden: Tensor, weight: Tensor, part: slice) -> None:
    """Add a chunk's share: `step` is dL/dlogits of its tokens."""
    of_hidden, of_weight, of_bias = grads
    if of_hidden is not None:
        torch.mm(step, weight, out=of_hidden[part])
    if of_weight is not None and of_weight.dtype == step.dtype:
        of_weight.addmm_(step.t(), hidden)
    elif of_weight is not None:
        for own, rows in zip(of_weight.split(ROWS), step.split(ROWS, dim=1), strict=True):
            own += rows.t() @ hidden
    if of_bias is not None:
        of_bias += step.sum(0)


def _judge_(logits: Tensor, labels: Tensor, teaching: Teaching | None, part: slice) -> Tensor:
    """Sums of a chunk's losses (labels, teacher); the logits become the gradient of the weighted sum."""
    asked = labels != IGNORED
    sums = torch.zeros(2, device=logits.device)
    pull: Tensor | None = None
    if teaching is not None:
        t = teaching.temperature
        ours, theirs = (logits / t).log_softmax(-1), (teaching.logits(part).float() / t).log_softmax(-1)
        each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        sums[1] = (each * asked).sum() * t * t
        pull = ours.exp_().sub_(theirs.exp_()).mul_(t * teaching.alpha)
    normaliser = logits.logsumexp(-1, keepdim=True)
    rows, words = torch.arange(len(labels), device=labels.device), labels.clamp(min=0)
    sums[0] = ((normaliser[:, 0] - logits[rows, words]) * asked).sum()
    logits.sub_(normaliser).exp_()
    logits[rows, words] -= 1.0
    if pull is not None and teaching is not None:
        logits.mul_(1.0 - teaching.alpha).add_(pull)
    logits.mul_(asked[:, None])
    return sums
