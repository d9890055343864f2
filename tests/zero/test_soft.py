"""Soft masks and frozen weights in real engines: the same under every stage, on any number of ranks, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from leap_dist.zero.binding import all_fragments
from tests.peers.nets import relative_error
from tests.ranks import RankPools
from tests.zero.test_engine import STEPS, final_weights, oracle_weights, pruned_engine, run_steps

GUMBEL: dict[str, Any] = {"rule": "gumbel", "score_init": "magnitude"}
FROZEN: dict[str, Any] = {"weights": "frozen"}


def all_stages(stages: list[int], kind: str) -> dict[int, tuple[dict[str, Tensor], str, list[float]]]:
    """By stage, of rule "gumbel": weights, hash of the masks, kept weights."""
    found = {}
    for stage in stages:
        weights, certificate = final_weights(kind, stage, 1, GUMBEL)
        found[stage] = weights, certificate["masks_sha256"], [certificate["kept"], certificate["density"]]
    return found


@pytest.mark.parametrize("kind", ["element", "head+neuron", "2:4"])
def test_soft_masks_are_the_same_on_any_ranks_under_every_stage(ranks: RankPools, kind: str) -> None:
    expected, hashes = oracle_weights(kind, GUMBEL), set()
    few, all_of_them = ((1, [0]), (2, [3])), ((1, [2]), (2, [0, 1]), (3, [3]))
    for world, stages in few if kind == "head+neuron" else all_of_them:
        for result in ranks(world).run(all_stages, stages, kind):
            for weights, masks, _ in result.values():
                hashes.add(masks)
                for name, weight in weights.items():
                    assert relative_error(weight, expected[name]) <= 1e-5, (name, world)
    assert len(hashes) == 1


def digest(engine: Any) -> list[Tensor]:
    """Copies of everything that a step changes; not of padding, which holds anything."""
    leap, found = engine.leap, []
    for fragment in all_fragments(engine):
        states = [t for _, t in sorted(leap.states_of(fragment.flat).items()) if torch.is_tensor(t)]
        found += [fragment.view(t).clone() for t in (fragment.flat, *states)]
    return found


def resumed(folder: str, stage: int, kind: str, changes: dict[str, Any]) -> bool:
    """Whether a run that is loaded where masks are soft, twice and both ways, has the bits of the undisturbed one."""
    from leap_dist.checkpoint.checkpoints import Checkpoints

    first, later = STEPS // 2, STEPS - 3
    engine = pruned_engine(kind, stage, 1, changes)
    run_steps(engine, 1, 0, first)
    checkpoints = Checkpoints(folder)
    checkpoints.save(engine, {"step": first})
    checkpoints.wait()
    engine.save_checkpoint(folder + "-host", tag="first")
    run_steps(engine, 1, first, later)
    halfway = digest(engine)
    run_steps(engine, 1, later, STEPS)
    end, alike = digest(engine), True
    engine.destroy()
    for ours in (True, False):
        engine = pruned_engine(kind, stage, 1, changes)
        if ours:
            assert checkpoints.load(engine) == {"step": first}
        else:
            engine.load_checkpoint(folder + "-host", tag="first")
        run_steps(engine, 1, first, later)
        alike &= all(map(torch.equal, digest(engine), halfway))
        run_steps(engine, 1, later, STEPS)
        alike &= engine.leap.settled and all(map(torch.equal, digest(engine), end))
        engine.destroy()
    return alike


@pytest.mark.parametrize(
    ("stage", "world", "kind", "changes"),
    [
        (0, 1, "element", {"rule": "gumbel", "control": "paper"}),
        (2, 2, "element", GUMBEL | {"weights": "trained"}),
        (3, 2, "head+neuron", GUMBEL),
        (2, 2, "2:4", GUMBEL | {"weights": "trained"}),
        (1, 2, "hybrid", FROZEN),
    ],
)
def test_a_resumed_run_has_the_bits_of_the_undisturbed_one(
    ranks: RankPools, tmp_path: Path, stage: int, world: int, kind: str, changes: dict[str, Any]
) -> None:
    assert all(ranks(world).run(resumed, str(tmp_path / "run"), stage, kind, changes))
