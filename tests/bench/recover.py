"""Which neurons recover best: Gemma 3 270M with 0.645 of every layer's neurons by several scores, then trained briefly.

    python -m tests.bench.recover --model FOLDER --out FOLDER [--steps 48] [--ways NAME ...]

In plain torch, with masks fixed: what is compared is what masks start from, not what learns them. The model and the
calibration are those of tests.bench.starts. Training is AdamW at 5e-5 on 2 x 256 tokens a step in bf16 autocast, with 5
steps of warm-up and a linear decay. Perplexity at the start and at the end on 40 blocks of WikiText-2's raw test text
and 30 of QQP questions, and the mean loss of the second half of the steps. A way that is done is not run again.

Needs the data folder (../shared/data or $LEAP_DATA). Writes tests/bench/results/recover.json.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from tests.bench.places import RESULTS
from tests.bench.starts import BATCH, Cuts, Setting, arguments_of, perplexity
from tests.bench.starts import STEPS as SHOWN

KEPT, RATE, WARM = 0.645, 5e-5, 5
Worth = Callable[[str, list[str]], Tensor]
"""A down projection's name and those of gate and up -> what its inputs, the neurons, are worth."""


def ways_of(cuts: Cuts) -> dict[str, Worth]:
    """Scores of neurons, by name."""
    gradient = cuts.structured(cuts.scores(0.25))["all"]
    activation = cuts.structured(cuts.scores(0.0))["output"]

    def flow(name: str, others: list[str]) -> Tensor:
        return cuts.inputs[name].sqrt()

    def root(one: Worth, other: Worth) -> Worth:
        def both(name: str, others: list[str]) -> Tensor:
            parts = [worth(name, others) for worth in (one, other)]
            return (parts[0] / parts[0].mean() * parts[1] / parts[1].mean()).sqrt()

        return both

    return {
        "activation": activation,
        "mean activation": flow,
        "gradient, all weights": gradient,
        "root of activation and gradient": root(activation, gradient),
        "root of mean activation and gradient": root(flow, gradient),
    }


def masks_of(cuts: Cuts, worth: Worth) -> dict[str, Tensor]:
    """The best of every layer's neurons stay: masks by matrix, that broadcast."""
    masks: dict[str, Tensor] = {}
    for name in (name for name in cuts.weights if name.endswith("down_proj.weight")):
        others = [name.replace("down_proj", other) for other in ("gate_proj", "up_proj")]
        found = worth(name, others)
        keep = torch.zeros(len(found)).index_fill_(0, found.topk(round(KEPT * len(found))).indices, 1.0)
        masks |= {name: keep[None], **dict.fromkeys(others, keep[:, None])}
    return masks


def recovered(
    folder: Path, masks: dict[str, Tensor], train: list[list[int]], judged: list[list[list[int]]], steps: int
) -> dict[str, Any]:
    """Train with masks; perplexities before and after, and the mean loss of the second half."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, foreach=True)

    @torch.no_grad()
    def mask_() -> None:
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)

    def judge() -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            return [perplexity(model, blocks) for blocks in judged]

    mask_()
    found: dict[str, Any] = {"start": judge()}
    losses = []
    for step in track(range(steps)):
        optimizer.param_groups[0]["lr"] = RATE * min((step + 1) / WARM, (steps - step) / (steps - WARM))
        ids = torch.tensor(train[BATCH * step : BATCH * (step + 1)])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mask_()
        losses.append(loss.item())
    half = losses[steps // 2 :]
    return found | {"end": judge(), "loss": sum(half) / len(half)}


def main() -> None:
    """Recover by every way, print and write."""
    ways = {"nargs": "+", "help": "by name; default: all"}
    arguments = arguments_of(__doc__, steps={"type": int, "default": 48}, ways=ways)
    setting = Setting(arguments.model, arguments.out, (40, 30))
    cuts, train = setting.cuts, setting.train[2 * SHOWN * BATCH :]
    file = RESULTS / "recover.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for name, worth in ways_of(cuts).items():
        if name not in (arguments.ways or [name]) or found.get(name, {}).get("steps") == arguments.steps:
            continue
        row = recovered(arguments.model, masks_of(cuts, worth), train, setting.judged, arguments.steps)
        found[name] = {"steps": arguments.steps, **row}
        print(name, *(f"{value:.2f}" for value in row["end"]), f"{row['loss']:.4f}", flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
