"""Masks that rule "gumbel" starts from: as the oracle has it, on shards, and refused by name where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leap_dist.config.job_file import parse_leap
from leap_dist.core.fixed import Fixed
from leap_dist.core.oracle import Oracle
from leap_dist.errors import UserError
from leap_dist.models.plan import make_plan, prior_of
from tests.core.test_optimizer import build, step_both, train
from tests.peers.nets import LR, WEIGHT_DECAY, batches, leap, net, relative_error
from tests.ranks import RankPools
from tests.zero.test_fixed import run


@pytest.mark.parametrize(("kind", "weights"), [("element", "frozen"), ("2:4", "frozen"), ("2:4", "trained")])
def test_equals_the_oracle(kind: str, weights: str) -> None:
    config = leap(kind, 40, rule="gumbel", weights=weights)
    model, reference = net(kind), net(kind)
    plan = build(net(kind), config, kind).plan
    drawn = torch.Generator().manual_seed(3)
    masks = {name: torch.rand(plan.numel(name), generator=drawn) < 0.3 for name in plan.covers}
    packed = {name: torch.from_numpy(np.packbits(mask.numpy())) for name, mask in masks.items()}
    optimizer = build(model, config, kind, prior=Fixed(packed))
    prior = [masks[gate.slices[0].tensor] for gate in plan.gates]
    oracle = Oracle(reference, plan, config, LR, WEIGHT_DECAY, prior=prior)
    for x, y in batches(40):
        step_both(oracle, model, optimizer, x, y)
        if optimizer.num_steps == 20:
            assert oracle.curve is not None
            expected = oracle.masked_weights(oracle.soft_units(oracle.curve))
            for name, parameter in model.named_parameters():
                assert relative_error(parameter, expected[name].detach()) <= 1e-5, name
    expected = oracle.masked_weights()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter, expected[name]) <= 1e-5, name


@pytest.mark.parametrize("weights", ["frozen", "trained"])
def test_masks_without_the_name_of_their_order_are_judged_before_the_first_step(weights: str) -> None:
    config, drawn = leap("element", 40, rule="gumbel", weights=weights), torch.Generator().manual_seed(3)
    model, plan = net(), build(net(), config).plan
    masks = {name: torch.rand(plan.numel(name), generator=drawn) < 0.3 for name in plan.covers}
    given = Fixed({n: torch.from_numpy(np.packbits(m.numpy())) for n, m in masks.items()}, None, "leap.prior_mask")
    with pytest.raises(UserError, match=r"^leap\.prior_mask: leap\.permute put .* that they prune are not zero"):
        build(model, config, prior=given)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask.view_as(model.get_parameter(name)))
    optimizer = build(model, config, prior=given)
    train(model, optimizer, 40)
    assert optimizer.settled


def chain(folder: str, stage: int) -> list[Any]:
    """Masks of one shot by magnitude; what rule "gumbel" makes of them in few steps, and of none."""
    from leap_dist.export.masks import load_masks, save_masks
    from leap_dist.run_folder import read_run

    base = Path(folder)
    model = {"name": str(base / "dense" / "model")}
    run(base / "dense", stage, {"target": 1.0, "mode": "one_shot"})
    run(base / "shot", stage, {"target": 0.4, "mode": "one_shot", "score_init": "magnitude"}, model=model)
    soft: dict[str, Any] = {"target": 0.4, "rule": "gumbel"}
    if torch.distributed.get_rank() == 0:
        (base / "masks").mkdir()
        save_masks(read_run(base / "shot"), base / "masks")
    torch.distributed.barrier()
    given = load_masks(base / "masks")
    found: list[Any] = []
    for name, section in (("prior", soft | {"prior_mask": str(base / "masks" / "mask.npz")}), ("own", soft)):
        certificate = run(base / name, stage, section, model=model)
        if torch.distributed.get_rank() == 0:
            (base / f"{name}-masks").mkdir()
            save_masks(read_run(base / name), base / f"{name}-masks")
        torch.distributed.barrier()
        masks = load_masks(base / f"{name}-masks")
        same = sum(int((masks[key] == mask).sum()) for key, mask in given.items())
        found.append((certificate["density"], certificate["masks_sha256"], same / certificate["prunable"]))
    return found


def test_masks_stay_near_those_that_they_start_from(ranks: RankPools, tmp_path: Path) -> None:
    """In ten steps little is learned, so that the masks at the end are near those at the start."""
    found = []
    for world, stage in ((1, 2), (2, 3)):
        (tmp_path / str(world)).mkdir()
        found.append(ranks(world).run(chain, str(tmp_path / str(world)), stage, timeout=300)[0])
    for prior, own in found:
        assert prior[0] == own[0] and prior[1] != own[1] and prior[2] > own[2] and prior[2] > 0.9
    assert found[0][0][2] == pytest.approx(found[1][0][2], abs=0.02)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 7), nn.Linear(7, 7)


@pytest.mark.parametrize(
    ("arrays", "changes", "match"),
    [
        ({"one.weight": 1}, {}, r"two\.weight has a gate, but no mask in it; change leap\.include or leap\.exclude"),
        ({"one.weight": 1, "two.weight": 1}, {"exclude": ["two.weight"]}, r"two\.weight has a mask in it, but no gate"),
        ({"one.weight": 1, "two.weight": 1}, {"gates": ["row"]}, r'single weights stay, and "row" is in leap\.gates'),
        ({"one.weight": 0, "two.weight": 0}, {}, r"keeps no weight; allowed: one that keeps a part"),
        ({"one.weight": 255, "two.weight": 255}, {}, r"keeps every weight"),
    ],
)
def test_masks_that_do_not_fit_are_refused(
    tmp_path: Path, arrays: dict[str, int], changes: dict[str, Any], match: str
) -> None:
    sizes = {"one.weight": 35, "two.weight": 49}
    packed = {name: np.full(-(-sizes[name] // 8), value, dtype=np.uint8) for name, value in arrays.items()}
    np.savez(tmp_path / "mask.npz", **packed)
    include = {"include": ["re:.*weight"]}
    config = parse_leap(
        {"target": 0.5, "rule": "gumbel", "prior_mask": str(tmp_path / "mask.npz"), **include, **changes}
    )
    with pytest.raises(UserError, match=rf"^leap\.prior_mask: .*{match}"):
        prior_of(Net(), make_plan(Net(), config), config)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({}, r'leap\.prior_mask: got "m\.npz", which has no effect here: rule "leap" has no soft masks; remove it'),
        ({"mode": "one_shot"}, r'leap\.prior_mask: got "m\.npz", which has no effect here: mode "one_shot"'),
        ({"rule": "gumbel", "score_init": "zero"}, r'leap\.score_init: got "zero", which has no effect here: scores'),
        (
            {"rule": "gumbel", "permute": "greedy", "gates": ["2:4"]},
            r'leap\.permute: got "greedy"; leap\.prior_mask is',
        ),
    ],
)
def test_settings_that_do_not_go_with_them(section: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        parse_leap({"target": 0.5, "prior_mask": "m.npz", **section})


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    config = parse_leap({"target": 0.5, "rule": "gumbel", "prior_mask": str(tmp_path / "zeros")})
    with pytest.raises(UserError, match=r"^leap\.prior_mask: .* cannot be read: .*; allowed: a folder that .* masks$"):
        prior_of(Net(), make_plan(Net(), config), config)
