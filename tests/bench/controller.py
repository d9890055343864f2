"""How the level is held: R over steps against the target, for both controls, from 500 to 20,000 steps, one set of defaults.

    OMP_NUM_THREADS=1 python -m tests.bench.controller [--steps 500 2000] [--controls paper] [--picture]

A small transformer on builtin/clock, pruned by LeapAdamW on one process. Every run: gap = R - target after the last
step of the prune phase, overshoot = how far R fell below the target in it, spread = the keep ratios of the gates at its
end. A run whose masks do not have the exact target at the end stops the benchmark. Rows of results/controller.json
are replaced as runs finish, so lengths and controls can be run one by one; `--picture` only draws the table anew.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leap_dist.config import DataConfig, LeapConfig, parse_leap
from leap_dist.core.communicator import Communicator
from leap_dist.core.counting import check_exact
from leap_dist.core.fragments import whole
from leap_dist.core.gating import MASK, SCORES, THRESHOLDS
from leap_dist.core.optimizer import GATED, LeapAdamW
from leap_dist.models.plan import make_plan
from leap_dist.tasks import builtin

RESULTS = Path(__file__).resolve().parent / "results"
TARGETS, STEPS, CONTROLS = (0.8, 0.5, 0.2, 0.05), (500, 2000, 20000), ("projected", "paper")
HYBRID = (0.2, 2000)  # target and length of the runs with two gates a matrix
LR, WEIGHT_DECAY, WARMUP, SEED = 3e-3, 0.01, 0.1, 17
MODELS = {500: (32, 2, 32), 2000: (32, 2, 32), 20000: (16, 1, 16)}  # steps -> hidden size, layers, batch
COLUMNS = {"R": "remaining", "density": "density", "level": "level"}
COLUMNS |= {name: f"keep_ratio_{name}" for name in ("min", "max", "std")}


class Layer(nn.Module):
    """Pre-norm attention and FFN, without biases: four gated matrices."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 2 * hidden, bias=False), nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, hidden) to the same shape; two heads."""
        query, key, value = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """Token ids (batch, length) to two logits, read at the first token."""

    def __init__(self, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(builtin.VOCAB_SIZE, hidden)
        self.places = nn.Parameter(0.3 * torch.randn(builtin.LENGTH, hidden))
        self.layers = nn.Sequential(*(Layer(hidden) for _ in range(num_layers)))
        self.answer = nn.Linear(hidden, 2, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (batch, 2)."""
        return self.answer(self.layers(self.words(ids) + self.places)[:, 0])


def make_optimizer(model: nn.Module, config: LeapConfig) -> LeapAdamW:
    """LeapAdamW over whole tensors, with the gates' own parameters beside the model's."""
    plan = make_plan(model, config)
    named = dict(model.named_parameters())
    gates = {THRESHOLDS: nn.Parameter(torch.zeros(len(plan.gates)))}
    if plan.num_structured_units:
        gates[SCORES] = nn.Parameter(torch.zeros(plan.num_structured_units))
    gated = [p for name, p in named.items() if name in plan.covers]
    rest = [p for name, p in named.items() if name not in plan.covers]
    groups: list[dict[str, Any]] = [{"params": [*gated, *gates.values()], GATED: True}, {"params": rest}]
    optimizer = LeapAdamW(groups, plan, config, lr=LR, weight_decay=WEIGHT_DECAY)
    optimizer.bind(whole((named | gates).items()), Communicator())
    return optimizer


def load_tables() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(token ids, labels) of the training and the validation examples."""
    task = builtin.load(DataConfig(task=builtin.CLOCK))
    tables: Any = (task.train, task.validation["validation"])
    columns = [torch.from_numpy(t.columns["input_ids"]).long().view(-1, builtin.LENGTH) for t in tables]
    train, validation = ((ids, torch.tensor(t.labels)) for ids, t in zip(columns, tables, strict=True))
    return train, validation


def rate(step: int, steps: int) -> float:
    """The learning rate: linear warm-up and linear decay."""
    warmup = max(1, round(WARMUP * steps))
    return LR * min((step + 1) / warmup, (steps - step) / (steps - warmup))


def measure(settings: dict[str, Any], train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """One run: its curves at every per cent of the steps, and the numbers of the table.

    Raises RuntimeError if the masks do not have the target at the end.
    """
    config = parse_leap(settings)
    target, steps = config.target, settings["total_steps"]
    hidden, num_layers, batch = MODELS[steps]
    torch.manual_seed(SEED)
    model = Classifier(hidden, num_layers)
    optimizer = make_optimizer(model, config)
    settle_start, every = optimizer.schedule.settle_start, max(1, steps // 1000)
    rows: list[dict[str, float]] = []
    lowest, last, losses, started = 1.0, {}, [], time.perf_counter()
    for step in range(steps):
        chosen = torch.randint(len(train[1]), (batch,))
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(train[0][chosen]), train[1][chosen])
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % every == 0 or done == settle_start - 1:
            report = optimizer.report()
            if done % (steps // 100) == 0:
                rows.append({"step": done, **{name: round(report[key], 5) for name, key in COLUMNS.items()}})
            if done < settle_start:
                lowest, last = min(lowest, report["remaining"]), report
    kept = sum(int(optimizer.state[p][MASK].sum()) for p in model.parameters() if MASK in optimizer.state[p])
    check_exact(kept, optimizer.plan.prunable, target, optimizer.plan.unit)
    with torch.no_grad():
        accuracy = (model(validation[0]).argmax(1) == validation[1]).float().mean().item()
    measured = {
        "gap": last["remaining"] - target,
        "overshoot": max(0.0, target - lowest),
        "density_gap": last["density"] - target,
        "spread": [last["keep_ratio_std"], last["keep_ratio_min"], last["keep_ratio_max"]],
        "density": kept / optimizer.plan.prunable,
        "loss": sum(losses[-steps // 20 :]) / len(losses[-steps // 20 :]),
        "accuracy": accuracy,
        "ms_per_step": 1e3 * (time.perf_counter() - started) / steps,
    }
    rounded = json.loads(json.dumps(measured), parse_float=lambda text: round(float(text), 5))
    return {**settings, **rounded, "curve": {key: [row[key] for row in rows] for key in rows[0]}}


def table(runs: list[dict[str, Any]]) -> str:
    """The runs as text, one a line."""
    lines = ["control    steps  target  gates        gap      overshoot  k std (min..max)       density  loss   accuracy"]
    for run in runs:
        std, low, high = run["spread"]
        lines.append(
            f"{run['control']:9s} {run['total_steps']:6d}  {run['target']:<6}  {'+'.join(run['gates']):11s}"
            f"{run['gap']:+8.4f}  {run['overshoot']:8.4f}   {std:6.4f} ({low:.4f}..{high:.4f})  {run['density']:.4f}"
            f"   {run['loss']:.3f}  {run['accuracy']:.3f}"
        )
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    """R over the run: a row of panels for each control, a column for each length, a line for each target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(CONTROLS), len(STEPS), figsize=(11, 6.2), sharex=True, sharey=True)
    colours = dict(zip(TARGETS, ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True))  # Okabe and Ito
    schedule = LeapConfig(target=0.5)
    dense, settle = schedule.dense_fraction, 1 - schedule.settle_fraction
    for axis, (control, steps) in zip(axes.flat, ((c, s) for c in CONTROLS for s in STEPS), strict=True):
        axis.axvspan(0, dense, color="0.86", lw=0)
        axis.axvspan(settle, 1, color="0.93", lw=0)
        for run in runs:
            if (run["control"], run["total_steps"], run["gates"]) == (control, steps, ["element"]):
                target, curve = run["target"], run["curve"]
                axis.axhline(target, color=colours[target], lw=0.9, ls="--", alpha=0.8)
                parts = [step / steps for step in curve["step"]]
                axis.plot(parts, curve["R"], color=colours[target], lw=1.8, label=f"target {target}")
        axis.set(xlim=(0, 1), ylim=(0, 1.02), title=f"{control}, {steps:,} steps")
        for x, phase in ((dense / 2, "dense"), (0.3, "prune"), (0.9, "settle")):
            up = {"rotation": 90} if phase == "dense" else {}
            axis.text(x, 0.1 if up else 0.95, phase, ha="center", va="center", size=8, color="0.35", **up)
        axis.tick_params(labelbottom=True)
    figure.supxlabel("fraction of the run", size=10)
    figure.supylabel("R, the remaining ratio the thresholds ask for", size=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(TARGETS), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run the cells asked for, print the table, write the JSON and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="*", default=STEPS, choices=STEPS)
    parser.add_argument("--controls", nargs="*", default=CONTROLS, choices=CONTROLS)
    parser.add_argument("--picture", action="store_true", help="run nothing, draw what is there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of controller.json and controller.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = arguments.out / "controller.json"
    runs: dict[str, dict[str, Any]] = json.loads(file.read_text())["runs"] if file.exists() else {}
    cells = [(c, s, t, ["element"]) for s in sorted(arguments.steps) for c in arguments.controls for t in TARGETS]
    cells += [(c, s, HYBRID[0], ["row", "element"]) for c in arguments.controls for s in arguments.steps if s == HYBRID[1]]
    tables = load_tables()
    for control, steps, target, gates in [] if arguments.picture else cells:
        settings = {"target": target, "control": control, "total_steps": steps, "gates": gates}
        run = runs["/".join([control, str(steps), str(target), *gates])] = measure(settings, *tables)
        print(table([run]).splitlines()[1], f"  {run['ms_per_step']:.1f} ms a step", flush=True)
        about = {"machine": platform.machine(), "threads": 1, "torch": torch.__version__, "models": MODELS}
        file.write_text(json.dumps({**about, "runs": runs}, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    print(table(list(runs.values())))
    draw(list(runs.values()), arguments.out / "controller.png")


if __name__ == "__main__":
    main()
