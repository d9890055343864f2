"""Columns in another order before an n:m mask: the same function, and more of the scores stays."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import leap_dist
from leap_dist.config.job_file import parse_job, parse_leap
from leap_dist.errors import UserError
from leap_dist.models.permute import are_orders_of, find_orders, greedy_order, permute_
from leap_dist.models.plan import make_plan
from leap_dist.train.loop import run_job
from leap_dist.train.reorder import reorder
from leap_dist.train.signals import Interrupted
from leap_dist.train.watch import Watch
from leap_dist.zero.ranks import Ranks
from tests.models.tiny import EAGER_ONLY, HEADS, tiny
from tests.ranks import RankPools
from tests.zero.test_fixed import JOB, TINY, run


def kept(weight: torch.Tensor, n: int, m: int) -> float:
    return weight.abs().view(-1, m).topk(n, dim=1).values.sum().item()


@pytest.mark.parametrize("kind", ["bert", "deberta", "gemma3_text", "llama", "phi3", "opt", "t5", "qwen3_moe"])
def test_the_function_stays_and_more_of_the_scores_is_kept(kind: str) -> None:
    model = tiny(kind, HEADS[kind], "eager" if kind in EAGER_ONLY else "sdpa")
    plan = make_plan(model, parse_leap({"target": 0.5, "gates": ["2:4"]}))
    weights = dict(model.named_parameters())
    ids = torch.randint(3, 64, (2, 9))
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if kind == "t5" else {"input_ids": ids}
    with torch.no_grad():
        for weight in weights.values():  # columns of other sizes, as trained models have
            weight.mul_(torch.rand(weight.shape[-1]) * 1.5)
        before = model(**inputs)[0]
        was = {name: weight.clone() for name, weight in weights.items()}
        orders = find_orders(model, plan, lambda name: weights[name].abs(), None)
        permute_(model, orders, None)
        after = model(**inputs)[0]
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    changed = [name for name, weight in weights.items() if not torch.equal(weight, was[name])]
    gains = [kept(weights[name], 2, 4) - kept(was[name], 2, 4) for name in changed if name in plan.covers]
    assert min(gains) > -1e-4 and max(gains) > 0  # a row's order alone changes nothing but rounding
    for order in orders.values():
        assert torch.equal(order.sort(1).values, torch.arange(order.shape[1]).expand_as(order))


def test_strong_columns_are_dealt_to_different_groups() -> None:
    scores = torch.ones(16, 12)
    scores[:, [4, 5, 6, 7, 0, 1]] = 10.0  # four of them neighbours, of which 2:4 would drop two
    order = greedy_order(scores, 2, 4)
    assert kept(scores[:, order], 2, 4) == scores.sum(1)[0] * 16 - 6 * 16
    again = greedy_order(scores[:, order], 2, 4)
    assert kept(scores[:, order][:, again], 2, 4) == kept(scores[:, order], 2, 4)


def one_shots(folder: str) -> list[dict[str, Any]]:
    leap = {"target": 0.5, "mode": "one_shot", "score_init": "activation", "gates": ["2:4"]}
    return [run(Path(folder) / str(permute), 2, leap | {"permute": permute}) for permute in (None, "greedy")]


def test_a_job_keeps_its_orders_in_the_run_folder(ranks: RankPools, tmp_path: Path) -> None:
    plain, greedy = ranks(2).run(one_shots, str(tmp_path), timeout=300)[0]
    assert greedy["metrics"]["dense"] == pytest.approx(plain["metrics"]["dense"])
    assert greedy["masks_sha256"] != plain["masks_sha256"] and greedy["density"] == 0.5
    assert not (tmp_path / "None" / "permutation.npz").exists()
    with np.load(tmp_path / "greedy" / "permutation.npz", allow_pickle=False) as file:
        assert len(file.files) == 2 * TINY["num_hidden_layers"]
        for order in file.values():
            assert (np.sort(order) == np.arange(order.shape[1])).all()
    assert json.loads((tmp_path / "greedy" / "config.json").read_text())["leap"]["permute"] == "greedy"


def test_a_target_that_the_pattern_cannot_reach_is_refused_before_the_search() -> None:
    leap = {"target": 0.3, "mode": "one_shot", "score_init": "magnitude", "gates": ["2:4"], "permute": "greedy"}
    batches: Any = None  # scores by magnitude ask for none
    with pytest.raises(UserError, match=r"^leap\.target: 0\.3 cannot be reached: .*; raise the target"):
        reorder(parse_job(JOB | {"leap": leap}), tiny("bert"), batches, Ranks.here())


MASKS_OF = ("shot", "trained", "zeros", "later", "unmoved")


def masks_of_a_permuted_run(folder: str) -> list[str]:
    """What comes of its masks, as a folder and as an npz, on its own model and on one in the order of before."""
    from leap_dist.export.masks import save_masks
    from leap_dist.run_folder import read_run

    base, said = Path(folder), []
    leap = {"target": 0.5, "mode": "one_shot", "score_init": "magnitude", "gates": ["2:4"]}
    run(base / "plain", 2, {"target": 1.0, "mode": "one_shot"})
    run(base / "shot", 2, leap | {"permute": "greedy"}, model={"name": str(base / "plain" / "model")})
    run(base / "unmoved", 2, leap, model={"name": str(base / "plain" / "model")})
    later = {"target": 0.3, "mode": "one_shot", "score_init": "magnitude"}
    run(base / "later", 2, later, model={"name": str(base / "shot" / "model")})
    begun = {"trained": str(base / "shot-masks"), "zeros": "zeros"}
    for name, start in ((name, begun.get(name, "")) for name in MASKS_OF):
        if start:  # with the masks of the first, which its own are
            run(base / name, 2, {"start": start}, model={"name": str(base / "shot" / "model")})
        if torch.distributed.get_rank() == 0:
            (base / f"{name}-masks").mkdir()
            save_masks(read_run(base / name), base / f"{name}-masks")
        torch.distributed.barrier()
    starts = [base / f"{name}-masks" for name in MASKS_OF]
    for start in (starts[0] / "mask.npz", *starts):
        for model in ("plain", "shot") if start is starts[-1] else ("shot", "plain"):
            try:
                found = run(
                    base / f"{start.parent.name}-{start.name}-{model}",
                    2,
                    {"start": str(start)},
                    model={"name": str(base / model / "model")},
                )
                said.append(str(found["density"]))
            except UserError as error:
                said.append(str(error))
    return said


def test_masks_of_a_permuted_run_are_for_its_own_columns(ranks: RankPools, tmp_path: Path) -> None:
    said = ranks(2).run(masks_of_a_permuted_run, str(tmp_path), timeout=300)
    kept = [round(float(density), 2) for density in said[0][::2]]
    assert said[0] == said[1] and kept == [0.5, 0.5, 0.5, 0.5, 0.3, 0.5]
    for refused in said[0][1::2]:
        assert refused.startswith("leap.start: ") and "for columns in another order than those of this model" in refused
        assert refused.endswith("allowed: as model.name the model/ of the run that they are of, or an export of it")


def of_an_older_version(folder: str) -> list[str]:
    """Masks that say that their columns moved, and not where to: they are held to the zeros of the model."""
    from leap_dist.export.masks import save_masks
    from leap_dist.run_folder import read_run

    base, said = Path(folder), []
    run(base / "shot", 2, {"target": 0.5, "mode": "one_shot", "score_init": "magnitude", "gates": ["2:4"]})
    run(base / "dense", 2, {"target": 1.0, "mode": "one_shot"})
    (base / "masks").mkdir()
    save_masks(read_run(base / "shot"), base / "masks")
    with np.load(base / "masks" / "mask.npz", allow_pickle=False) as file:
        np.savez(base / "moved.npz", **dict(file), __permuted__=np.array(True))
    for model in ("shot", "dense"):
        try:
            own = {"name": str(base / model / "model")}
            said.append(str(run(base / f"of-{model}", 2, {"start": str(base / "moved.npz")}, model=own)["density"]))
        except UserError as error:
            said.append(str(error))
    return said


def test_masks_that_do_not_name_their_order_are_held_to_the_models_zeros(ranks: RankPools, tmp_path: Path) -> None:
    right, wrong = ranks(1).run(of_an_older_version, str(tmp_path), timeout=300)[0]
    assert right == "0.5" and "of the weights that they prune are not zero in this one; allowed: as model.name" in wrong


@pytest.mark.parametrize(
    ("leap", "message"),
    [
        ({}, r'leap\.permute: got "greedy", but there is no n:m gate .*; add one to leap\.gates, or remove it'),
        ({"gates": ["row", "head"]}, r'leap\.permute: got "greedy", but there is no n:m gate'),
        ({"gates": ["2:4"], "permute": "learned"}, r'leap\.permute: got "learned"; allowed: "greedy" or null'),
    ],
)
def test_no_order_without_a_pattern(leap: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_leap({"target": 0.5, "permute": "greedy", **leap})


def test_what_has_no_block_and_loops_of_ones_own_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    leap = {"target": 0.5, "gates": ["2:4"], "permute": "greedy", "total_steps": 10}
    plan = make_plan(model, parse_leap(leap))
    with pytest.raises(UserError, match=r'leap\.permute: got "greedy", but no attention or FFN block of this model is'):
        find_orders(model, plan, lambda name: model.get_parameter(name).abs(), None)
    bert = tiny("bert", "AutoModelForSequenceClassification")
    inner = parse_leap(leap | {"include": ["re:.*query.weight"]})
    with pytest.raises(UserError, match=r'leap\.permute: got "greedy", but no n:m gate is on the output projection'):
        find_orders(bert, make_plan(bert, inner), lambda name: bert.get_parameter(name).abs(), None)
    with pytest.raises(UserError, match=r'leap\.permute: got "greedy"; launch/prune\.py reorders'):
        leap_dist.initialize(model=model, config={"train_micro_batch_size_per_gpu": 1, "leap": leap})


def resumed_with_other_batches(folder: str, damage: bool) -> tuple[dict[str, Any], str]:
    """A run by one micro-batch's inputs, stopped after 8 steps and resumed with micro-batches of half the size."""
    looks = [0]

    def asked() -> str | None:
        looks[0] += 1
        return "SIGTERM" if looks[0] >= 8 else None

    leap = {"target": 0.5, "score_init": "activation", "gates": ["2:4"], "permute": "greedy", "calibration_batches": 1}
    job = JOB | {"leap": leap, "train": JOB["train"] | {"max_steps": 20, "checkpoint_every": None}}
    with pytest.raises(Interrupted):
        run_job(parse_job(job), Path(folder), False, Ranks.here(), Watch(asked=asked))
    file = Path(folder) / "permutation.npz"
    if damage:
        file.write_bytes(file.read_bytes()[:-40])
    job |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    try:
        return run_job(parse_job(job), Path(folder), False, Ranks.here()), ""
    except UserError as error:
        return {}, str(error)


def test_a_run_that_is_resumed_keeps_its_orders(ranks: RankPools, tmp_path: Path) -> None:
    """With which its model and its masks are marked."""
    certificate, _ = ranks(1).run(resumed_with_other_batches, str(tmp_path), False)[0]
    digest = hashlib.sha256(b"")
    with np.load(tmp_path / "permutation.npz", allow_pickle=False) as file:
        for name in sorted(file.files):
            digest.update(name.encode() + b"\0" + file[name].tobytes())
    assert certificate["permuted"] == digest.hexdigest()[:16]
    assert json.loads((tmp_path / "model/config.json").read_text())["leap_permuted"] == certificate["permuted"]


def test_orders_that_are_damaged_are_refused(ranks: RankPools, tmp_path: Path) -> None:
    _, refusal = ranks(1).run(resumed_with_other_batches, str(tmp_path), True)[0]
    file = tmp_path / "permutation.npz"
    assert refusal == f"{file}: damaged: these are no orders of this model's columns; restore it, or start a new run"


def test_orders_are_those_of_a_models_own_columns() -> None:
    model = tiny("llama", HEADS["llama"], "sdpa")
    plan = make_plan(model, parse_leap({"target": 0.5, "gates": ["2:4"]}))
    orders = find_orders(model, plan, lambda name: model.get_parameter(name).abs(), None)
    name, order = next(iter(orders.items()))
    assert are_orders_of(model, orders, None)
    for wrong in ({}, {"other": order}, {name: order[:, 1:]}, {name: torch.zeros_like(order)}, {name: order + 1}):
        assert not are_orders_of(model, wrong, None)
