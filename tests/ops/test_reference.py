"""The inner loops against torch.optim.AdamW bit for bit, and against float64."""

import pytest
import torch

from leap_dist.ops import reference as ops

SIZES = [0, 1, 7, 1000, ops.CPU_BLOCK, ops.CPU_BLOCK + 13]


def adam(step: int = 3, weight_decay: float = 0.1) -> ops.Adam:
    return ops.Adam(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=weight_decay, step=step)


@pytest.mark.parametrize("size", SIZES)
def test_adamw_gives_the_bits_of_torch(size: int) -> None:
    torch.manual_seed(size)
    start = torch.randn(size)
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    ours, exp_avg, exp_avg_sq = start.clone(), torch.zeros(size), torch.zeros(size)
    for step in range(1, 5):
        grad = torch.randn(size)
        parameter.grad = grad.clone()
        theirs.step()
        ops.adamw_(ours, grad, exp_avg, exp_avg_sq, adam(step))
    assert torch.equal(ours, parameter.detach())


@pytest.mark.parametrize("size", SIZES)
def test_any_cut_gives_the_same_bits(size: int) -> None:
    torch.manual_seed(size)
    whole = [torch.randn(size), torch.randn(size), torch.randn(size), torch.rand(size)]
    parts = [t.clone() for t in whole]
    mask = torch.rand(size) < 0.5
    ops.masked_adamw_(whole[0], whole[1], mask, whole[2], whole[3], adam())
    for start, stop in ((0, size // 3), (size // 3, size // 2), (size // 2, size)):
        cut = [t[start:stop] for t in parts]
        ops.masked_adamw_(cut[0], cut[1], mask[start:stop], cut[2], cut[3], adam())
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("hybrid", [False, True])
def test_element_scores_against_float64(size: int, hybrid: bool) -> None:
    torch.manual_seed(size)
    score, grad, latent, exp_avg = (torch.randn(size) for _ in range(4))
    exp_avg_sq = torch.rand(size)
    mask, others = torch.rand(size) < 0.4, torch.rand(size) < 0.7 if hybrid else None
    s, g, w, m, v = (t.double() for t in (score, grad, latent, exp_avg, exp_avg_sq))
    ds = g * w * (others.double() if others is not None else 1.0)
    m, v = 0.9 * m + 0.1 * ds, 0.999 * v + 0.001 * ds**2
    expected = s - 1e-2 * (m / (1 - 0.9**3)) / ((v / (1 - 0.999**3)).sqrt() + 1e-8)
    sigma = ops.element_scores_(score, grad, latent, mask, others, exp_avg, exp_avg_sq, adam(weight_decay=0.0))
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sigma, (ds * mask).sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_masked_write_fills_every_element(size: int) -> None:
    latent, mask = torch.randn(size), torch.rand(size) < 0.5
    weight = torch.full((size,), float("nan"))
    ops.write_masked_(weight, latent, mask)
    assert torch.equal(weight, latent * mask)
