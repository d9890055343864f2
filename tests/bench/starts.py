"""How much of a weight's score is its input and how much its gradient: Gemma 3 270M cut at once, in plain torch.

    python -m tests.bench.starts --model FOLDER --out FOLDER

The model is what tests.bench.language makes below its --out, words/hf: Gemma with the tokens of its texts. Inputs
and gradients are those of 16 steps of 2 x 256 tokens of the training texts; scores are |W| ||x||^(1 - p) g^p, g the
root of the mean square of a weight's gradient. Cut to 0.5 of the single weights of each matrix, over the mean of their
row, to 2:4, and to 0.75 of each layer's neurons and heads: by the sum over all weights of a unit, by that over its
output's weights alone, and by ||x_j|| of the output's inputs, which Minitron ranks by (arXiv 2407.14679); perplexity
on 30 blocks of WikiText-2's raw test text and 20 of QQP questions.

Needs the data folder (../shared/data or $LEAP_DATA). Writes tests/bench/results/starts.json.
"""

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tests.bench.language import LENGTH, texts
from tests.bench.places import RESULTS

EXPONENTS, OF_UNITS = (0.0, 0.125, 0.25, 0.5, 1.0), (0.0, 0.25, 0.5)
STEPS, BATCH = 16, 2
Scores = Callable[[str], Tensor]


def blocks_of(files: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """A text in blocks that begin with BOS."""
    ids = [one for file in files for one in tokenizer(Path(file).read_text(), add_special_tokens=False)["input_ids"]]
    rest = LENGTH - 1
    return [[tokenizer.bos_token_id, *ids[at : at + rest]] for at in range(0, len(ids) - rest, rest)]


def loss_of(model: nn.Module, block: list[int]) -> Tensor:
    """Mean over a block."""
    ids = torch.tensor([block])
    return cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:])


@torch.no_grad()
def perplexity(model: nn.Module, blocks: list[list[int]]) -> float:
    """Over all blocks."""
    return math.exp(sum(loss_of(model, block).item() for block in blocks) / len(blocks))


class Cuts:
    """A model, its matrices as they are, and what calibration saw of them."""

    def __init__(self, model: nn.Module, batches: list[list[list[int]]]) -> None:
        self.model = model
        names = [name for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
        self.weights = {name: model.get_parameter(name).detach().clone() for name in names}
        self.inputs = {name: torch.zeros(weight.shape[1]) for name, weight in self.weights.items()}
        self.squares = {name: torch.zeros(weight.shape) for name, weight in self.weights.items()}
        hooks = [
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(self._seer(name))
            for name in names
        ]
        for batch in batches:
            model.zero_grad()
            torch.stack([loss_of(model, block) for block in batch]).mean().backward()
            for name, sums in self.squares.items():
                grad = model.get_parameter(name).grad
                assert grad is not None
                sums += grad.float().square()
        for hook in hooks:
            hook.remove()
        model.zero_grad()

    def _seer(self, name: str) -> Callable[..., None]:
        def see(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].detach().float()
            self.inputs[name] += rows.reshape(-1, rows.shape[-1]).square().sum(0)

        return see

    def scores(self, p: float) -> Scores:
        """|W| ||x||^(1 - p) g^p by name."""
        return lambda name: (
            self.weights[name].float().abs() * self.inputs[name].sqrt() ** (1 - p) * self.squares[name].sqrt() ** p
        )

    def put(self, name: str, keep: Tensor) -> None:
        """Mask a matrix."""
        self.model.get_parameter(name).data = self.weights[name] * keep

    def element(self, scores: Scores) -> None:
        """Half of every matrix, over the mean of each row."""
        for name in self.weights:
            found = scores(name)
            found = found / found.mean(1, keepdim=True)
            self.put(name, found > found.flatten().kthvalue(found.numel() // 2).values)

    def two_of_four(self, scores: Scores) -> None:
        """The better two of every four neighbours in a row."""
        for name in self.weights:
            groups = scores(name).unflatten(1, (-1, 4))
            keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(2, dim=2).indices, True)
            self.put(name, keep.flatten(1))

    def units(self, before: list[str], after: str, size: int, worth: Callable[[str, list[str]], Tensor]) -> None:
        """Three quarters of every layer's units, of `size` outputs of the matrices `before` and inputs of `after`.

        worth: of each input of `after`, from its name and those before it; summed over a unit.
        """
        for name in [name for name in self.weights if name.endswith(f"{after}.weight")]:
            others = [name.replace(after, other) for other in before]
            found = worth(name, others).unflatten(0, (-1, size)).sum(1)
            keep = torch.zeros_like(found, dtype=torch.bool)
            keep[found.topk(3 * len(found) // 4).indices] = True
            keep = keep.repeat_interleave(size)
            self.put(name, keep[None])
            for other in others:
                self.put(other, keep[:, None])

    def structured(self, scores: Scores) -> dict[str, Callable[[str, list[str]], Tensor]]:
        """Ways to say what a unit is worth, by name."""
        return {
            "all": lambda name, others: scores(name).sum(0) + sum(scores(other).sum(1) for other in others),
            "output": lambda name, others: scores(name).sum(0),
        }

    def restore(self) -> None:
        """Every weight as it was."""
        for name, weight in self.weights.items():
            self.model.get_parameter(name).data = weight


class Setting:
    """The model, what calibration saw of it, blocks to train on in a mixed order, and two texts to be judged on."""

    def __init__(self, folder: Path, out: Path, judged: tuple[int, int] = (30, 20)) -> None:
        """out: for texts; judged: blocks of the raw test text and of QQP questions."""
        out.mkdir(parents=True, exist_ok=True)
        files, tokenizer = texts(out), AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.train = blocks_of(files["train"], tokenizer)
        random.Random(0).shuffle(self.train)
        self.cuts = Cuts(self.model, [self.train[at : at + BATCH] for at in range(0, STEPS * BATCH, BATCH)])
        names = ("test", "questions")
        self.judged = [blocks_of(files[name], tokenizer)[:num] for name, num in zip(names, judged, strict=True)]


def arguments_of(doc: str | None, **more: dict[str, Any]) -> argparse.Namespace:
    """--model, --out and `more`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="for texts")
    for name, settings in more.items():
        parser.add_argument(f"--{name}", **settings)
    return parser.parse_args()


def main() -> None:
    """Cut by every exponent, print and write."""
    arguments = arguments_of(__doc__)
    setting = Setting(arguments.model, arguments.out)
    model, cuts, judged = setting.model, setting.cuts, setting.judged
    found: dict[str, Any] = {"dense": [perplexity(model, blocks) for blocks in judged]}

    def judge(cut: str, by: str) -> None:
        values = found.setdefault(cut, {})[by] = [perplexity(model, blocks) for blocks in judged]
        cuts.restore()
        print(cut, by, *(f"{value:.1f}" for value in values), flush=True)
        (RESULTS / "starts.json").write_text(json.dumps(found, indent=1) + "\n")

    units = {
        "neurons": (["gate_proj", "up_proj"], "down_proj", 1),
        "heads": (["q_proj"], "o_proj", model.config.head_dim),
    }
    for kind, (before, after, size) in units.items():
        for p in OF_UNITS:
            for way, worth in cuts.structured(cuts.scores(p)).items():
                cuts.units(before, after, size, worth)
                judge(kind, f"{way}, {p:g}")
        cuts.units(before, after, size, lambda name, others: cuts.inputs[name])
        judge(kind, "mean activation")
    for p in EXPONENTS:
        cuts.element(cuts.scores(p))
        judge("element", f"{p:g}")
        cuts.two_of_four(cuts.scores(p))
        judge("2:4", f"{p:g}")


if __name__ == "__main__":
    main()
