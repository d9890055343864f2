"""leap.measure: the target as a share of all parameters, or of the FLOPs, exact in the model that is shrunk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config.leap import LeapConfig
from leap_dist.core.measure import Measure, amounts
from leap_dist.errors import UserError
from leap_dist.export.hf import load_exported
from leap_dist.models.flops import count_flops
from leap_dist.models.measure import measure_of
from leap_dist.models.outputs import example_inputs
from leap_dist.models.plan import make_plan
from leap_dist.run_folder import read_run, sealed
from tests.export.runs import xlnet
from tests.models.tiny import SETTINGS, tiny
from tests.ranks import RankPools
from tests.sweep.jobs import JOB
from tests.zero.test_structured import prune, shrunk_logits

BOTH = ["head", "neuron"]
UNCOUNTED = ("deberta", "deberta-v2", "mixtral", "qwen3_moe")
"""What cannot be run without values, or uses a matrix twice."""


def test_the_shrunk_model_has_the_share_of_parameters(ranks: RankPools, tmp_path: Path) -> None:
    leap = {"target": 0.7, "measure": "parameters", "gates": BOTH}
    first, second = ranks(2).run(prune, "gpt2", tmp_path / "hf", 3, leap, {"n_inner": 96})
    assert first["masks_sha256"] == second["masks_sha256"] and first["target"] == 0.7
    dense = sum(p.numel() for p in load_exported(tmp_path / "hf").parameters())
    model, _, _ = shrunk_logits(tmp_path / "hf", tmp_path / "shrunk")
    left = sum(p.numel() for p in model.parameters())
    assert amounts(first, first["measure"]) == (left, dense)
    assert abs(left - 0.7 * dense) <= 65  # a neuron: two rows of 32 and a bias; taken back after the last head
    assert first["density"] < 0.66  # embeddings stay


def test_coarse_steps_of_the_width_leave_the_exact_share_to_neurons(ranks: RankPools, tmp_path: Path) -> None:
    gates = [{"granularity": "hidden", "multiple_of": 16}, "neuron"]
    leap = {"target": 0.6, "measure": "parameters", "gates": gates}
    for world, stage in ((1, 1), (2, 3)):
        found = ranks(world).run(prune, "gpt2", tmp_path / f"hf{world}", stage, leap, {"n_inner": 96})[0]
        kept, total = amounts(found, found["measure"])
        assert found["gates"][0]["kept_units"] in (16, 32)
        assert 0 <= kept - 0.6 * total <= 65, (kept, total)  # a neuron: two rows of 32 and a bias


def test_the_shrunk_model_has_the_share_of_flops(ranks: RankPools, tmp_path: Path) -> None:
    leap = {"target": 0.6, "measure": "flops", "gates": BOTH}
    first, second = ranks(2).run(prune, "opt", tmp_path / "hf", 2, leap, {"ffn_dim": 96})
    assert first["masks_sha256"] == second["masks_sha256"]
    dense, (model, _, _) = load_exported(tmp_path / "hf"), shrunk_logits(tmp_path / "hf", tmp_path / "shrunk")
    before, after = (count_flops(m, example_inputs(dense, 1, 32)).total / 2 for m in (dense, model))
    assert amounts(first, first["measure"]) == pytest.approx((after, before))
    assert abs(after - 0.6 * before) <= 64
    assert abs(first["density"] - 0.6) > 0.005  # heads take more than their weights


def test_of_a_hybrid_what_is_not_zero_is_counted(ranks: RankPools, tmp_path: Path) -> None:
    for measure, control in (("parameters", "projected"), ("flops", "paper")):
        leap = {"target": 0.8, "measure": measure, "gates": ["row", "head"], "control": control}
        (found,) = ranks(1).run(prune, "opt", tmp_path / measure, 1, leap, {})
        model = load_exported(tmp_path / measure)
        kept, total = amounts(found, found["measure"])
        assert abs(kept - 0.8 * total) <= found["unit"]
        if measure == "parameters":
            zeros = sum(int((p == 0).sum()) for n, p in model.named_parameters() if n in found["tensors"])
            assert (kept, total) == (total - zeros, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("kind", sorted(set(SETTINGS) - {*UNCOUNTED, "vit"}))
def test_flops_add_up_for_every_architecture(kind: str) -> None:
    model = tiny(kind, attention="eager")
    config = LeapConfig(target=0.5, measure="flops", gates=tuple(BOTH), total_steps=10)
    plan = make_plan(model, config)
    measure = measure_of(model, plan, config, None)
    whole = measure.fixed + measure.removable(plan)
    length = 128 if kind == "t5" else 30 if kind == "roberta" else 32
    depth = 2 if kind == "albert" else 1  # its one layer is used twice
    assert whole * depth == pytest.approx(count_flops(model, example_inputs(model, 1, length)).total / 2)
    assert [each > 0 for each in measure.products] == [gate.granularity == "head" for gate in plan.gates]


def test_a_layer_takes_its_products_with_it() -> None:
    for kind in ("llama", "bert"):
        two, one = (tiny(kind, num_hidden_layers=layers) for layers in (2, 1))
        before, after = (count_flops(model, example_inputs(two, 1, 32)).total / 2 for model in (two, one))
        parameters = [sum(p.numel() for p in model.parameters()) for model in (two, one)]
        for gates in (("depth",), ("layer",)):
            config = LeapConfig(target=0.5, measure="flops", gates=gates, total_steps=10)
            plan = make_plan(two, config)
            measure = measure_of(two, plan, config, None)
            assert sum(measure.unit(plan, gate) for gate in range(len(plan.gates))) == pytest.approx(before - after)
        config = LeapConfig(target=0.5, measure="parameters", gates=("depth",), total_steps=10)
        plan = make_plan(two, config)
        assert measure_of(two, plan, config, None).unit(plan, 0) == parameters[0] - parameters[1]


def test_a_model_of_any_length_is_refused_with_the_reason() -> None:
    """XLNet's config says -1 positions."""
    model, config = xlnet(), LeapConfig(target=0.5, measure="flops", gates=("row",), total_steps=10)
    with pytest.raises(UserError, match=r"those of a xlnet model cannot be counted: .* on device meta"):
        measure_of(model, make_plan(model, config), config, None)


def test_weights_are_the_default_and_counted_as_ever() -> None:
    model = tiny("bert")
    config = LeapConfig(target=0.3, gates=tuple(BOTH), total_steps=10)
    plan = make_plan(model, config)
    measure = measure_of(model, plan, config, None)
    assert measure == Measure(target=0.3) and measure.share(plan) == 0.3 and measure.described() == {}
    assert (measure.removable(plan), measure.largest(plan)) == (plan.prunable, plan.unit)


def run_small(folder: str, gates: list[str]) -> None:
    from leap_dist.config.job_file import parse_job
    from leap_dist.train.loop import run_job
    from leap_dist.zero.ranks import Ranks

    leap = {"target": 0.7, "measure": "parameters", "gates": gates}
    run_job(parse_job(JOB | {"leap": leap}, "a test"), Path(folder), False, Ranks(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("gates", [BOTH, ["hidden", *BOTH]])
def test_a_run_says_its_measure_and_is_held_to_it(ranks: RankPools, tmp_path: Path, gates: list[str]) -> None:
    ranks(1).run(run_small, str(tmp_path / "run"), gates)
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text("utf-8"))
    assert certificate["measure"]["name"] == "parameters" and certificate["target"] == 0.7
    read = read_run(tmp_path / "run")
    kept, total = amounts(read.certificate.model_dump(), certificate["measure"])
    assert total == sum(p.numel() for p in load_exported(read.model).parameters())
    assert abs(kept - 0.7 * total) <= certificate["unit"]
    assert all(len(gate["tensors"]) == len(set(gate["tensors"])) for gate in certificate["gates"])
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert f"share of the model&#39;s parameters {kept / total:.4f}, asked for 0.7." in page
    less = {"measure": {"name": "parameters", "fixed": 1e6}}
    (tmp_path / "run" / "certificate.json").write_text(json.dumps(sealed(certificate | less)), "utf-8")
    with pytest.raises(UserError, match="does not say what the weights are: the density is not the target"):
        read_run(tmp_path / "run")


def refused(kind: str, leap: dict[str, Any]) -> str:
    import leap_dist

    own = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    model: torch.nn.Module = own if kind == "own" else tiny(kind, attention="eager")
    config = {"train_micro_batch_size_per_gpu": 1, "leap": {"total_steps": 10, **leap}}
    with pytest.raises(UserError) as caught:
        leap_dist.initialize(model=model, config=config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "leap", "message"),
    [
        (
            "gpt2",
            {"target": 0.05, "measure": "parameters", "gates": BOTH},
            "leap.target: 0.05 cannot be reached: with the fewest units that every gate keeps the lowest possible "
            "share of the model's parameters is 0.3",
        ),
        ("opt", {"target": 0.05, "measure": "flops", "gates": BOTH}, "share of the FLOPs of a forward pass is 0."),
        ("own", {"target": 0.5, "measure": "flops"}, 'leap.measure: got "flops", and the model is a Sequential'),
        ("mixtral", {"target": 0.5, "measure": "flops", "gates": ["head"]}, "of a mixtral model cannot be counted"),
        ("deberta-v2", {"target": 0.5, "measure": "flops", "gates": ["head"]}, "a weight of encoder.layer.0.attention"),
        (
            "llama",
            {"target": 0.5, "measure": "flops", "gates": ["head", "layer"]},
            "with gates head and layer: each would",
        ),
        ("gpt2", {"target": 0.5, "measure": "flop"}, 'leap.measure: got "flop"; allowed: "weights", "parameters"'),
        ("gpt2", {"start": "zeros", "measure": "flops"}, 'leap.measure: got "flops", which has no effect here'),
    ],
)
def test_mistakes(ranks: RankPools, kind: str, leap: dict[str, Any], message: str) -> None:
    (said,) = ranks(1).run(refused, kind, leap)
    assert message in said
