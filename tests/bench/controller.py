"""The controller: R over steps against the target, both controls, 500 to 20,000 steps, one set of defaults.

    OMP_NUM_THREADS=1 python -m tests.bench.controller [--steps 500 2000] [--controls paper]

A small transformer that has learned builtin/clock is pruned by LeapAdamW, without an engine. Gap = R - target (density
- target) after the last step of the prune phase, overshoot = how far R fell below the target in it, k: the gates' keep
ratios at its end. Runs replace their rows of results/controller.json as they finish; `--steps` alone draws only.
"""

import argparse
import copy
import functools
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leap_dist.config.job_file import parse_leap
from leap_dist.config.leap import LeapConfig
from leap_dist.config.sections import DataConfig
from leap_dist.core.communicator import Communicator
from leap_dist.core.counting import check_exact
from leap_dist.core.fragments import whole
from leap_dist.core.gating import MASK
from leap_dist.core.hosted import GATED
from leap_dist.core.optimizer import LeapAdamW
from leap_dist.models.plan import make_plan
from leap_dist.tasks import builtin

RESULTS = Path(__file__).resolve().parent / "results"
TARGETS, STEPS, CONTROLS = (0.8, 0.5, 0.2, 0.05), (500, 2000, 20000), ("projected", "paper")
HYBRID = (2000, 0.2, ["row", "element"])  # steps, target and gates of the runs with two gates a matrix
LR, WARMUP, BATCH, SEED = 3e-3, 0.1, 32, 17
SHAPES = {500: (32, 2), 2000: (32, 2), 20000: (16, 1)}  # steps -> hidden size, layers
DENSE = {(32, 2): (2000, 3e-3), (16, 1): (5000, 1e-2)}  # shape -> steps and rate of the training before
COLUMNS = ("remaining", "density", "level", "keep_ratio_min", "keep_ratio_max", "keep_ratio_std")
Table = tuple[Tensor, Tensor]  # token ids, labels


class Layer(nn.Module):
    """Pre-norm attention with two heads and FFN, (batch, length, hidden) to the same; four gated matrices."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        sizes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * hidden), (2 * hidden, hidden))
        self.qkv, self.out, self.up, self.down = (nn.Linear(*size, bias=False) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """Token ids (batch, length) to two logits (batch, 2), read at the first token."""

    def __init__(self, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(builtin.VOCAB_SIZE, hidden)
        self.places = nn.Parameter(0.3 * torch.randn(builtin.LENGTH, hidden))
        self.layers = nn.Sequential(*(Layer(hidden) for _ in range(num_layers)))
        self.answer = nn.Linear(hidden, 2, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.answer(self.layers(self.words(ids) + self.places)[:, 0])


def make_optimizer(model: nn.Module, config: LeapConfig) -> LeapAdamW:
    """LeapAdamW over whole tensors."""
    plan = make_plan(model, config)
    named = dict(model.named_parameters())
    gated = {"params": [named[name] for name in plan.covers], GATED: True}
    rest = {"params": [p for name, p in named.items() if name not in plan.covers]}
    optimizer = LeapAdamW([gated, rest], plan, config, lr=LR)
    optimizer.bind(whole(named.items()), Communicator())
    return optimizer


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, table: Table, step: int, steps: int) -> float:
    """One step on a random batch with linear warm-up and decay of the rate; returns the loss."""
    chosen = torch.randint(len(table[1]), (BATCH,))
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(table[0][chosen]), table[1][chosen])
    loss.backward()
    warmup = WARMUP * steps
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * min((step + 1) / warmup, (steps - step) / (steps - warmup))
    optimizer.step()
    return loss.item()


@functools.cache
def trained(shape: tuple[int, int], table: Table) -> Classifier:
    """A dense model that has learned the task."""
    torch.manual_seed(SEED)
    model, (steps, rate) = Classifier(*shape), DENSE[shape]
    optimizer = torch.optim.AdamW([{"params": model.parameters(), "base_lr": rate}], lr=rate)
    for step in range(steps):
        train_step(model, optimizer, table, step, steps)
    return model


def measure(settings: dict[str, Any], train: Table, validation: Table) -> dict[str, Any]:
    """One run: the table's numbers, curves at every per cent; RuntimeError if the masks miss the target at the end."""
    config, steps = parse_leap(settings), settings["total_steps"]
    model = copy.deepcopy(trained(SHAPES[steps], train))
    torch.manual_seed(SEED)
    optimizer = make_optimizer(model, config)
    last_prune, rows, lowest, loss = optimizer.schedule.settle_start - 1, [], 1.0, 0.0
    for step in range(1, steps + 1):
        loss += (train_step(model, optimizer, train, step - 1, steps) - loss) / min(step, steps // 20)
        if step % (steps // 500) and step != last_prune:
            continue
        report = optimizer.measures()
        if step % (steps // 100) == 0:
            rows.append([step, *(round(report[key], 4) for key in COLUMNS)])
        if step <= last_prune:
            lowest, end = min(lowest, report["remaining"]), report
    kept = sum(int(state[MASK].sum()) for state in optimizer.state.values() if MASK in state)
    check_exact(kept, optimizer.plan.prunable, config.target, optimizer.plan.unit)
    with torch.no_grad():
        correct = model(validation[0]).argmax(1) == validation[1]
    numbers = {name.removeprefix("keep_ratio_"): end[name] for name in COLUMNS[3:]} | {
        "gap": end["remaining"] - config.target,
        "gap_of_density": end["density"] - config.target,
        "overshoot": max(0.0, config.target - lowest),
        "density": kept / optimizer.plan.prunable,
        "loss": loss,
        "accuracy": correct.float().mean().item(),
    }
    curve = dict(zip(("step", *COLUMNS), zip(*rows, strict=True), strict=True))
    return {**settings, **{key: round(number, 5) for key, number in numbers.items()}, "curve": curve}


def show(runs: Iterable[dict[str, Any]]) -> None:
    """Print the runs, one a line."""
    print("control    steps target gates            gap (density)  overshoot  k std (min..max)        loss   accuracy")
    for run in runs:
        name = f"{run['control']:9s} {run['total_steps']:6d} {run['target']:<6} {'+'.join(run['gates']):11s}"
        level = f"{run['gap']:+8.4f} {run['gap_of_density']:+8.4f}  {run['overshoot']:9.4f}"
        ratios = f"{run['std']:.4f} ({run['min']:.4f}..{run['max']:.4f})"
        print(f"{name} {level}  {ratios}  {run['loss']:.4f}  {run['accuracy']:.3f}")


def draw(runs: Iterable[dict[str, Any]], file: Path) -> None:
    """R over the run: a row of panels for each control, a column for each length, a line for each target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.2))
    axes = figure.subplots(len(CONTROLS), len(STEPS), sharex=True, sharey=True)
    colours = dict(zip(TARGETS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))  # Okabe and Ito
    defaults = LeapConfig(target=0.5)
    for axis, (control, steps) in zip(axes.flat, itertools.product(CONTROLS, STEPS), strict=True):
        axis.axvspan(0, defaults.dense_fraction, color="0.9", lw=0)
        axis.axvspan(1 - defaults.settle_fraction, 1, color="0.9", lw=0)
        for run in runs:
            if (run["control"], run["total_steps"], run["gates"]) == (control, steps, ["element"]):
                colour, curve, label = colours[run["target"]], run["curve"], f"target {run['target']}"
                axis.axhline(run["target"], color=colour, lw=0.9, ls="--")
                axis.plot([step / steps for step in curve["step"]], curve["remaining"], color=colour, label=label)
        axis.set(xlim=(0, 1), ylim=(0, 1.02), title=f"{control}, {steps:,} steps")
    figure.supxlabel("fraction of the run (grey: dense and settle, white: prune)", size=10)
    figure.supylabel("R, the remaining ratio the thresholds ask for", size=10)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="upper center", ncols=len(TARGETS), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run the cells asked for, print the table, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS, choices=STEPS, help="none: draw only")
    parser.add_argument("--controls", nargs="*", default=CONTROLS, choices=CONTROLS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = builtin.load(DataConfig(task=builtin.CLOCK))
    batches = [task.collate(list(examples)) for examples in (task.train, task.validation["validation"])]
    tables = [(batch["input_ids"], batch["labels"]) for batch in batches]
    file = RESULTS / "controller.json"
    runs: dict[str, dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else {}
    cells = [(steps, target, ["element"]) for steps in STEPS for target in TARGETS] + [HYBRID]
    for (steps, target, gates), control in itertools.product(cells, arguments.controls):
        if steps in arguments.steps:
            settings = {"target": target, "control": control, "total_steps": steps, "gates": gates}
            run = runs[f"{control} {steps} {target} {'+'.join(gates)}"] = measure(settings, *tables)
            print(f"{control} {steps} {target} {gates}: gap {run['gap']}", flush=True)
            text = json.dumps({"torch": torch.__version__, "shapes": SHAPES, "runs": runs}, separators=(",", ":"))
            file.write_text(text.replace('},"', '},\n"') + "\n")
    show(runs.values())
    draw(runs.values(), RESULTS / "controller.png")


if __name__ == "__main__":
    main()
