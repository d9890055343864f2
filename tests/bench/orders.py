"""Whether learned orders of columns beat greedy ones before a 2:4 mask: Gemma 3 270M cut at once, in plain torch.

    python -m tests.bench.orders --model FOLDER --out FOLDER [--steps 100] [--random 4]

The model is what tests.bench.language makes below its --out, words/hf. Scores are |W| ||x||, all matrices are cut to
2:4, and the inputs of every layer's attention output (alike in all heads) and FFN down projections come in the order
that is there, in random ones, in that of leap.permute "greedy" and ones near to it, or in one that is learned as
PermLLM does (arXiv 2510.10136): in blocks of 64 columns, 5 steps of Sinkhorn at a temperature from 1 to 0.1, hard in
the forward pass with a straight-through gradient, for the cosine between dense and masked outputs on 4 x 256 tokens;
from the order that is there, and from the greedy one. Perplexity on 30 blocks of WikiText-2's raw test text and 20 of
QQP questions, and, as one cut's perplexity holds much chance, what is learned for: each of these matrices' cosine on
4 x 256 other tokens.

Needs the data folder (../shared/data or $LEAP_DATA). Writes tests/bench/results/orders.json.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cosine_similarity

from leap_dist.models.permute import greedy_order
from tests.bench.places import RESULTS
from tests.bench.starts import Cuts, Setting, arguments_of, loss_of, perplexity

SINKHORN, WIDTH, RATE, TOKENS = 5, 64, 0.02, 4
Seen = dict[str, Tensor]  # inputs of matrices, (tokens, columns)
Find = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(weights, scores, inputs) of a matrix, columns as (outputs, heads, columns), (tokens, heads, columns) -> an order."""


def kept(scores: Tensor) -> Tensor:
    """The 2:4 mask along the last axis."""
    groups = scores.unflatten(-1, (-1, 4))
    return torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1.0).flatten(-2)


def at_random(weight: Tensor, scores: Tensor, inputs: Tensor) -> Tensor:
    """What chance does."""
    return torch.randperm(weight.shape[-1])


def greedy(weight: Tensor, scores: Tensor, inputs: Tensor) -> Tensor:
    """That of leap.permute."""
    return greedy_order(scores.transpose(0, 1).flatten(0, 1), 2, 4)


def shaken(weight: Tensor, scores: Tensor, inputs: Tensor) -> Tensor:
    """Another greedy order, nearly as good: that of scores which are a few percent off."""
    return greedy(weight, scores * (1 + 0.03 * torch.randn_like(scores)), inputs)


class Learned:
    """An order in blocks of columns, by gradients, from another order."""

    def __init__(self, steps: int, first: Find | None) -> None:
        self.steps, self.first = steps, first

    def __call__(self, weight: Tensor, scores: Tensor, inputs: Tensor) -> Tensor:
        start = self.first(weight, scores, inputs) if self.first else torch.arange(weight.shape[-1])
        weight, scores, inputs = (one[..., start] for one in (weight, scores / scores.mean(), inputs))
        dense = torch.einsum("thc,ohc->to", inputs, weight)
        blocks = weight.shape[-1] // WIDTH
        noise = (torch.rand(blocks, WIDTH, WIDTH) - 0.5) / 4
        logits = (noise + torch.eye(WIDTH) if self.first else noise).requires_grad_()
        optimizer = torch.optim.AdamW([logits], lr=RATE, weight_decay=0.0)
        best, order = -2.0, start
        for step in range(self.steps):
            soft = self._soft(logits / (1.0 - 0.9 * step / self.steps))
            hard = self._hard(soft)
            moves = hard + soft - soft.detach()
            moved, worth, given = (
                torch.einsum("ahbc,bcd->ahbd", one.unflatten(-1, (blocks, WIDTH)), moves).flatten(2)
                for one in (weight, scores, inputs)
            )
            near = (worth.unflatten(-1, (-1, 4))).softmax(-1).flatten(-2) * 2
            mask = kept(worth.detach()) + near - near.detach()
            close = cosine_similarity(dense, torch.einsum("thc,ohc->to", given, moved * mask), dim=1).mean()
            if close.item() > best:
                places = hard.argmax(1) + torch.arange(blocks)[:, None] * WIDTH
                best, order = close.item(), start[places.flatten()]
            optimizer.zero_grad()
            (1.0 - close).backward()
            optimizer.step()
        return order

    @staticmethod
    def _soft(logits: Tensor) -> Tensor:
        """Nearly doubly stochastic."""
        for _ in range(SINKHORN):
            logits = logits - logits.logsumexp(1, keepdim=True)
            logits = logits - logits.logsumexp(2, keepdim=True)
        return logits.exp()

    @staticmethod
    def _hard(soft: Tensor) -> Tensor:
        """The nearest permutations."""
        found = torch.zeros_like(soft)
        for block, one in zip(found, soft.detach().numpy(), strict=True):
            block[linear_sum_assignment(one, maximize=True)] = 1.0
        return found


def cut(cuts: Cuts, seen: Seen, others: Seen, find: Find | None, heads: int) -> dict[str, float]:
    """Every matrix to 2:4; those of `seen` in an order of their columns, with their cosines on other tokens."""
    cosines = {}
    for name, weight in track(cuts.weights.items(), disable=not isinstance(find, Learned)):
        scores = cuts.scores(0.0)(name)
        if find is None or name not in seen:
            mask = kept(scores)
        else:
            shape = (heads if "o_proj" in name else 1, -1)
            order = find(weight.float().unflatten(1, shape), scores.unflatten(1, shape), seen[name].unflatten(1, shape))
            mask = torch.empty_like(scores).unflatten(1, shape)
            mask[..., order] = kept(scores.unflatten(1, shape)[..., order])
            mask = mask.flatten(1)
        if name in others:
            dense, masked = (others[name] @ matrix.float().T for matrix in (weight, weight * mask))
            cosines[name] = cosine_similarity(dense, masked, dim=1).mean().item()
        cuts.put(name, mask.bool())
    return cosines


def main() -> None:
    """Cut in every order, print and write."""
    more: dict[str, Any] = {"steps": {"type": int, "default": 100}, "random": {"type": int, "default": 4}}
    arguments = arguments_of(__doc__, **more)
    setting = Setting(arguments.model, arguments.out)
    model, cuts = setting.model, setting.cuts
    seen, others = (inputs_of(model, cuts, setting.train[at : at + TOKENS]) for at in (0, TOKENS))
    ways: dict[str, Find | None] = {
        "as published": None,
        **{f"random {number}": at_random for number in range(arguments.random)},
        "greedy": greedy,
        **{f"greedy, shaken {number}": shaken for number in range(arguments.random)},
        "learned": Learned(arguments.steps, None),
        "learned from greedy": Learned(arguments.steps, greedy),
    }
    found: dict[str, Any] = {"steps": arguments.steps}
    print(f"{'order':20} {'test':>8} {'questions':>9} {'cosine':>8} seconds")
    for number, (name, find) in enumerate(ways.items()):
        torch.manual_seed(number)
        began = time.monotonic()
        cosines = cut(cuts, seen, others, find, model.config.num_attention_heads)
        seconds = time.monotonic() - began
        values = [perplexity(model, blocks) for blocks in setting.judged]
        cuts.restore()
        mean = sum(cosines.values()) / len(cosines)
        found[name] = {"perplexity": values, "seconds": round(seconds), "cosine": mean, "cosines": cosines}
        print(f"{name:20} {values[0]:8.1f} {values[1]:9.1f} {mean:.6f} {seconds:7.0f}", flush=True)
    (RESULTS / "orders.json").write_text(json.dumps(found, indent=1) + "\n")


@torch.no_grad()
def inputs_of(model: Any, cuts: Cuts, blocks: list[list[int]]) -> Seen:
    """What the matrices whose columns are free are given, (tokens, columns), fp32."""
    found: dict[str, list[Tensor]] = {name: [] for name in cuts.weights if "o_proj" in name or "down_proj" in name}
    hooks = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda module, given, rows=rows: rows.append(given[0][0].float())
        )
        for name, rows in found.items()
    ]
    for block in blocks:
        loss_of(model, block)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(rows) for name, rows in found.items()}


if __name__ == "__main__":
    main()
