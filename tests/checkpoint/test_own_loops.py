"""Checkpoints in loops of one's own: made early, of models with buffers, loaded back in the same process, and refused
where the leap section is another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import leap_dist
from leap_dist.checkpoint.checkpoints import Checkpoints
from leap_dist.errors import UserError
from tests.checkpoint.test_checkpoints import changed, put, rewritten
from tests.ranks import RankPools
from tests.zero.test_engine import pruned_engine, run_steps
from tests.zero.test_soft import digest

TRAINED = {"rule": "gumbel", "score_init": "magnitude", "weights": "trained"}


# Made before the ranks have met


def made_early(folder: str) -> tuple[Any, list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: False)
        checkpoints = Checkpoints(folder)
    checkpoints.wait()  # nothing was begun
    engine = pruned_engine("row", 2, 1, {})
    run_steps(engine, 1, 0, 2)
    checkpoints.save(engine, {"step": 2})
    checkpoints.wait()
    (checkpoint,) = Path(folder).iterdir()
    return Checkpoints(folder).load(engine), sorted(path.name for path in checkpoint.iterdir())


@pytest.mark.parametrize("world", [1, 2])
def test_it_may_be_made_before_the_ranks_meet(ranks: RankPools, tmp_path: Path, world: int) -> None:
    files = ["manifest.json", *(f"rank-0000{rank}.safetensors" for rank in range(world))]
    assert ranks(world).run(made_early, str(tmp_path / "checkpoints")) == [({"step": 2}, files)] * world


# Buffers


class Normed(nn.Module):
    """Its inputs are centred by a running mean, so that what it learns depends on its buffers."""

    center: Tensor
    rough: Tensor
    calls: Tensor
    mask: Tensor

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm, self.head = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 3)
        self.register_buffer("center", torch.zeros(size))
        self.register_buffer("rough", torch.zeros(2, 3, dtype=torch.bfloat16))
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("none", None)
        self.register_buffer("mask", torch.ones(1, 1, dtype=torch.bool).expand(3, 3))  # one element in memory

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.center.lerp_(x.mean(0), 0.5)
            self.rough += x[0, 0].bfloat16()
            self.calls += 1
        return self.head(torch.relu(self.norm(self.first(x - self.center)))) * self.mask.all()


def normed_engine(stage: int, size: int = 8) -> Any:
    leap = {"target": 0.4, "total_steps": 10, "include": ["first.weight"]}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "leap": leap}
    model = Normed(size)
    return leap_dist.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), config=config)[0]


def take(engine: Any, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 * step + torch.distributed.get_rank())
        engine.backward(engine(3.0 + torch.randn(4, 8, generator=generator)).square().mean())
        engine.step()


def held(engine: Any) -> dict[str, Any]:
    """This rank's buffers that are saved, and what the model says in evaluation."""
    found = {name: buffer.tolist() for name, buffer in engine.module.named_buffers() if name != "calls"}
    engine.eval()
    found["output"] = engine(torch.ones(2, 8)).tolist()
    engine.train()
    return found


def with_buffers(folder: str, stage: int) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The buffers of this rank when it saves and when it has loaded, and whether both runs ended alike."""
    engine, checkpoints = normed_engine(stage), Checkpoints(folder, keep=1)
    take(engine, 0, 1)
    checkpoints.save(engine, {"step": 1})  # the next save has the same memory
    take(engine, 1, 2)
    checkpoints.save(engine, {"step": 2})
    saved = held(engine)
    take(engine, 2, 10)
    checkpoints.wait()
    whole = leap_dist.finalize(engine), held(engine)
    engine.destroy()
    engine = normed_engine(stage)
    assert checkpoints.load(engine) == {"step": 2}
    loaded = held(engine)
    assert engine.module.calls == 0
    take(engine, 2, 10)
    alike = (leap_dist.finalize(engine), held(engine)) == whole
    engine.destroy()
    return saved, loaded, alike


def buffers_of(folder: str, size: int = 8) -> dict[str, Any]:
    """The buffers after loading, without what follows from sums in another order."""
    engine = normed_engine(1, size)
    assert Checkpoints(folder).load(engine) == {"step": 2}
    return held(engine) | {"output": None}


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (1, 2), (3, 2)])
def test_buffers_go_on_bit_for_bit(ranks: RankPools, tmp_path: Path, stage: int, world: int) -> None:
    found = ranks(world).run(with_buffers, str(tmp_path), stage)
    for saved, loaded, alike in found:
        assert loaded == saved and alike
        assert saved["norm.num_batches_tracked"] == 2 and saved["rough"][0][0] != 0.0
    means = [saved["norm.running_mean"] for saved, _, _ in found]
    assert all(mean != means[0] for mean in means[1:])
    on_others = ranks(3 - world).run(buffers_of, str(tmp_path))  # where all have those of the first rank
    assert all(other == found[0][0] | {"output": None} for other in on_others)


def test_buffers_that_do_not_fit_are_told_and_older_checkpoints_have_none(ranks: RankPools, tmp_path: Path) -> None:
    ranks(1).run(with_buffers, str(tmp_path), 1)
    with pytest.raises(UserError, match=r"of another model, .*: buffer 'center' was \(8,\) and is \(7,\); restore"):
        ranks(1).run(buffers_of, str(tmp_path), 7)
    changed(tmp_path, rewritten("center/buffer", torch.zeros(7)))
    with pytest.raises(UserError, match=r"rank-00000.safetensors: buffer 'center' has another size than its manifest"):
        ranks(1).run(buffers_of, str(tmp_path))
    changed(tmp_path, rewritten("center/buffer", None))
    with pytest.raises(UserError, match=r"rank-00000.safetensors: its buffers cannot be read: .*center/buffer"):
        ranks(1).run(buffers_of, str(tmp_path))
    changed(tmp_path, put("buffers", None))
    changed(tmp_path, put("section", None))
    (found,) = ranks(1).run(buffers_of, str(tmp_path))
    assert found["center"] == [0.0] * 8 and found["norm.num_batches_tracked"] == 0


# Another leap section


CHANGES: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("plain", {}, [{"target": 0.3, "total_steps": 40}, {"control": "paper"}, {"rule": "movement"}, {}]),
    ("soft", TRAINED, [{"score_init": "magnitude"}, {"rule": "movement", "score_init": "magnitude"}]),
]


def other_sections(folder: str) -> list[str]:
    """What loading says where the leap section is another; "" where it goes on."""
    said = []
    for name, before, sections in CHANGES:
        engine, checkpoints = pruned_engine("element", 2, 1, before), Checkpoints(f"{folder}/{name}")
        run_steps(engine, 1, 0, 5)
        checkpoints.save(engine, {"step": 5})
        checkpoints.wait()
        for changes in sections:
            engine = pruned_engine("element", 2, 1, changes)
            values = engine.leap.gating.values.flat.clone()
            try:
                checkpoints.load(engine)
                said.append("")
            except UserError as error:
                assert engine.leap.num_steps == 0 and torch.equal(engine.leap.gating.values.flat, values)
                said.append(str(error).replace(folder, "..."))
    return said


@pytest.mark.parametrize("world", [1, 2])
def test_another_section_is_refused_with_every_key_and_both_values(
    ranks: RankPools, tmp_path: Path, world: int
) -> None:
    def refused(name: str, differences: str) -> str:
        place = f"--resume: .../{name}/step-00000005 is of another leap section: "
        return f"{place}{differences}; restore the config, or start a new run"

    follows = "leap.weights was 'trained' and is 'auto'; leap.score_moments was 'own' and is 'shared'"
    for said in ranks(world).run(other_sections, str(tmp_path)):
        assert said == [
            refused("plain", "leap.target was 0.2 and is 0.3; leap.total_steps was 30 and is 40"),
            refused("plain", "leap.control was 'projected' and is 'paper'"),
            refused("plain", "leap.rule was 'leap' and is 'movement'"),
            "",
            refused("soft", f"leap.rule was 'gumbel' and is 'leap'; {follows}"),
            refused("soft", f"leap.rule was 'gumbel' and is 'movement'; {follows}"),
        ]


def branched(folder: str, settle_start: int) -> dict[str, Any]:
    """A run that goes on from step 12 of another, with a target and a settle phase of its own."""
    engine, checkpoints = pruned_engine("element", 2, 1, {}), Checkpoints(folder)
    run_steps(engine, 1, 0, 12)
    checkpoints.save(engine, {"step": 12})
    checkpoints.wait()
    changes = {"target": 0.4, "total_steps": settle_start + 5, "settle_fraction": 5 / (settle_start + 5)}
    engine = pruned_engine("element", 2, 1, changes)
    assert checkpoints.load(engine) == {"step": 12}
    run_steps(engine, 1, 12, settle_start + 5)
    return leap_dist.finalize(engine)


def test_a_run_that_settles_with_the_next_step_may_branch_off(ranks: RankPools, tmp_path: Path) -> None:
    (certificate,) = ranks(1).run(branched, str(tmp_path / "next"), 13)
    assert abs(certificate["kept"] - 0.4 * certificate["prunable"]) <= 1
    with pytest.raises(UserError, match=r"leap.target was 0.2 and is 0.4; leap.settle_fraction was 0.2 and is 0.26.*"):
        ranks(1).run(branched, str(tmp_path / "later"), 14)


def beside_another(folder: str) -> list[Any]:
    """What is there after a run that loads nothing saves where a longer one has saved, and what it says."""
    engine = pruned_engine("row", 2, 1, {})
    run_steps(engine, 1, 0, 3)
    checkpoints = Checkpoints(folder)
    checkpoints.save(engine, {"step": 3})
    checkpoints.wait()
    engine = pruned_engine("row", 2, 1, {})
    run_steps(engine, 1, 0, 2)
    with pytest.raises(UserError) as caught:
        Checkpoints(folder).save(engine, {"step": 2})
    said = str(caught.value).replace(folder, "FOLDER")
    there = sorted(path.name for path in Path(folder).iterdir())
    Checkpoints(folder).load(engine)
    run_steps(engine, 1, 3, 4)
    loaded = Checkpoints(folder)  # what counts is the run, not by which object it was loaded
    loaded.save(engine, {"step": 4})
    loaded.wait()
    with pytest.raises(UserError, match=r"^folder: .* has step-00000004 of another run, and this one is at step 0"):
        loaded.save(pruned_engine("row", 2, 1, {}), {"step": 0})
    return [said, there, sorted(path.name for path in Path(folder).iterdir())]


def test_a_run_removes_no_later_checkpoints_of_another(ranks: RankPools, tmp_path: Path) -> None:
    said = (
        "folder: FOLDER has step-00000003 of another run, and this one is at step 2; give each run a folder of its "
        "own, or call load first to resume that run"
    )
    expected = [said, ["step-00000003"], ["step-00000003", "step-00000004"]]
    assert ranks(2).run(beside_another, str(tmp_path / "run")) == [expected] * 2


def with_another_rate(folder: str) -> list[tuple[float, ...]]:
    """The rates of weights and scores before a save, and after a load by a run that was made with another rate."""
    found = []
    for rate in (1e-3, 1e-4):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
        config = {"train_micro_batch_size_per_gpu": 4, "leap": {"target": 0.4, "total_steps": 10}}
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        engine, *_ = leap_dist.initialize(model=model, optimizer=optimizer, config=config)
        if not found:  # the first
            engine.backward(engine(torch.ones(4, 8)).square().mean())
            engine.step()
            checkpoints = Checkpoints(folder)
            checkpoints.save(engine, {"step": 1})
            checkpoints.wait()
        else:
            Checkpoints(folder).load(engine)
        group = engine.leap.param_groups[0]
        found.append((group["lr"], group["base_lr"], engine.leap.rates.scores(group, 2, 2, True).lr))
    return found


def test_scores_keep_their_rate_where_a_run_resumes_with_another(ranks: RankPools, tmp_path: Path) -> None:
    ((before, after),) = ranks(1).run(with_another_rate, str(tmp_path / "run"))
    assert before == after and before[0] == 1e-3


# Back in the same process


def gone_back(folder: str, stage: int, kind: str, changes: dict[str, Any], first: int) -> list[bool]:
    """Whether a run that goes back to step `first` in its own process, in both ways, takes the same steps again."""
    engine, checkpoints = pruned_engine(kind, stage, 1, changes), Checkpoints(folder)
    run_steps(engine, 1, 0, first)
    checkpoints.save(engine, {"step": first})
    checkpoints.wait()
    engine.save_checkpoint(folder + "-host", tag="first")
    run_steps(engine, 1, first, first + 8)
    expected: list[Tensor] = digest(engine)
    alike = []
    for load in (lambda: checkpoints.load(engine), lambda: engine.load_checkpoint(folder + "-host", tag="first")):
        load()
        run_steps(engine, 1, first, first + 8)
        alike.append(all(map(torch.equal, digest(engine), expected)))
    return alike


@pytest.mark.parametrize(
    ("stage", "world", "kind", "changes", "first"),
    [
        (2, 1, "element", TRAINED, 12),  # soft masks
        (3, 2, "element", TRAINED, 12),
        (0, 1, "hybrid", {"dense_fraction": 0.15}, 2),  # dense, after pruned steps
        (1, 2, "hybrid", {"dense_fraction": 0.15}, 2),
    ],
)
def test_a_run_goes_back_in_its_own_process(
    ranks: RankPools, tmp_path: Path, stage: int, world: int, kind: str, changes: dict[str, Any], first: int
) -> None:
    assert ranks(world).run(gone_back, str(tmp_path / "run"), stage, kind, changes, first) == [[True, True]] * world


# Schedulers


class Own:
    """A scheduler that does not say its state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, *_: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.9

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]


SCHEDULERS: dict[str, Any] = {
    "warm-up, then steps": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.MultiStepLR(o, [1, 5])], [2]
    ),
    "momentum too": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=3, cycle_momentum=True),
    "OneCycle": {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2, "cycle_first_step_size": 4},
    "own": Own,
}


def scheduled_engine(name: str) -> Any:
    torch.manual_seed(1)
    model, made = nn.Linear(8, 3), SCHEDULERS[name]
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "leap": {"target": 0.4, "total_steps": 10}}
    config["leap"]["include"] = ["weight"]
    if isinstance(made, dict):
        config["scheduler"], made = {"type": name, "params": made}, None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return leap_dist.initialize(model=model, optimizer=optimizer, config=config, lr_scheduler=made)[0]


def scheduled_steps(engine: Any, start: int, end: int) -> str:
    for step in range(start, end):
        random = torch.Generator().manual_seed(step)
        engine.backward(engine(torch.randn(4, 8, generator=random)).square().mean())
        engine.step()
    return str(leap_dist.finalize(engine)["weights_sha256"]) if end == 10 else ""


def scheduled(folder: str, name: str) -> tuple[str, str]:
    """The weights of a run, and of one that resumes from its checkpoint, after ten steps."""
    checkpoints = Checkpoints(folder)
    engine = scheduled_engine(name)
    scheduled_steps(engine, 0, 3)
    try:
        checkpoints.save(engine, {"step": 3})
    except UserError as error:
        return str(error), ""
    checkpoints.wait()
    whole = scheduled_steps(engine, 3, 10)
    engine = scheduled_engine(name)
    checkpoints.load(engine)
    return whole, scheduled_steps(engine, 3, 10)


@pytest.mark.parametrize("name", ["warm-up, then steps", "momentum too", "OneCycle"])
def test_a_schedule_continues_bit_for_bit(ranks: RankPools, tmp_path: Path, name: str) -> None:
    ((whole, resumed),) = ranks(1).run(scheduled, str(tmp_path), name)
    assert whole == resumed and len(whole) == 64


def test_a_scheduler_that_does_not_say_its_state_is_refused(ranks: RankPools, tmp_path: Path) -> None:
    ((refusal, _),) = ranks(1).run(scheduled, str(tmp_path), "own")
    assert refusal.startswith("lr_scheduler: a Own has no state_dict and load_state_dict, so that a run with it cannot")
    assert not list(tmp_path.iterdir())
