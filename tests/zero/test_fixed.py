"""Masks that are there at the start: fixed, exact, and of this very model, or refused by name."""

from __future__ import annotations

import hashlib
import json
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import leap_dist
from leap_dist.config.job_file import parse_job, parse_leap
from leap_dist.errors import UserError
from leap_dist.models.plan import start_plan
from tests.ranks import RankPools

TINY = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
JOB: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "model": {"from_config": {**TINY, "intermediate_size": 24}},
    "data": {"task": "builtin/clock"},
    "train": {"max_steps": 10, "learning_rate": 1e-3, "eval_batch_size": 512},
    "tracking": {"mlflow_uri": None},
}
ONE_SHOT = {"target": 0.4, "mode": "one_shot", "score_init": "activation"}


def run(folder: Path, stage: int, leap: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The certificate of a job, on every rank."""
    from leap_dist.train.loop import run_job
    from leap_dist.zero.ranks import Ranks

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    job = {**JOB, "zero_optimization": {"stage": stage}, "leap": leap, **changes}
    run_job(parse_job(job), folder, False, Ranks(rank, world, torch.device("cpu")))
    torch.distributed.barrier()
    found: dict[str, Any] = json.loads((folder / "certificate.json").read_text())
    return found


def chain(folder: str, stage: int) -> list[dict[str, Any]]:
    """Certificates of one shot, and of what is trained with its masks: as zeros, as a folder, as two kinds of npz."""
    from leap_dist.export.masks import load_masks, save_masks
    from leap_dist.run_folder import read_run

    base = Path(folder)
    found = [run(base / "shot", stage, ONE_SHOT)]
    pruned = {"name": str(base / "shot" / "model")}
    masks = base / "masks"
    if torch.distributed.get_rank() == 0:
        masks.mkdir()
        save_masks(read_run(base / "shot"), masks)
        arrays: dict[str, Any] = {"__meta__": np.array(json.dumps({"made": "here"}))}
        short: dict[str, Any] = {}
        for name, mask in load_masks(masks).items():
            arrays[name] = short[name.replace(".weight", ".mask")] = np.packbits(mask.numpy())
            arrays[f"{name}.__shape__"] = np.array(mask.shape)
        np.savez(base / "mask.npz", **arrays)
        np.savez_compressed(base / "mask_compressed.npz", **short)
    torch.distributed.barrier()
    starts = ["zeros", masks, base / "mask.npz", base / "mask_compressed.npz"]
    for number, start in enumerate(starts if stage == 0 else starts[::3]):
        found.append(run(base / f"run{number}", stage, {"start": str(start)}, model=pruned))
    return found


@pytest.mark.parametrize(("stage", "world"), [(0, 1), (2, 2), (3, 2)])
def test_what_one_shot_made_is_trained_with_its_masks(ranks: RankPools, tmp_path: Path, stage: int, world: int) -> None:
    shot, *trained = ranks(world).run(chain, str(tmp_path), stage, timeout=300)[0]
    assert abs(shot["kept"] - 0.4 * shot["prunable"]) <= 1 and set(shot["metrics"]) == {"dense", "pruned"}
    for found in trained:
        assert found["masks_sha256"] == shot["masks_sha256"] and found["weights_sha256"] != shot["weights_sha256"]
        assert found["target"] == found["density"] == shot["density"] and "note" not in found
        assert set(found["metrics"]) == {"start", "pruned"}
        assert found["metrics"]["start"] == shot["metrics"]["pruned"]
        assert found["weights_sha256"] == trained[0]["weights_sha256"]
    resolved = json.loads((tmp_path / "run0" / "config.json").read_text())
    assert resolved["leap"]["start"] == "zeros" and resolved["leap"]["target"] == shot["density"]
    assert parse_job(resolved).leap.target == shot["density"]


def zeros_of_its_own(folder: str) -> list[dict[str, Any]]:
    """2:4 in one shot of a model that holds zeros, as ones quantized before do; and what is trained with its masks."""
    from safetensors.torch import load_file, save_file

    from leap_dist.export.masks import save_masks
    from leap_dist.run_folder import read_run

    base = Path(folder)
    run(base / "dense", 2, {"target": 1.0, "mode": "one_shot"})
    model, file = {"name": str(base / "dense" / "model")}, base / "dense" / "model" / "model.safetensors"
    if torch.distributed.get_rank() == 0:
        weights = load_file(file)
        for name, weight in weights.items():
            weights[name] = torch.where(torch.rand_like(weight) < 0.6, 0.0, weight) if "query" in name else weight
        save_file(weights, file, {"format": "pt"})
    torch.distributed.barrier()
    shot = run(base / "shot", 2, {**ONE_SHOT, "target": 0.5, "gates": ["2:4"]}, model=model)
    if torch.distributed.get_rank() == 0:
        (base / "masks").mkdir()
        save_masks(read_run(base / "shot"), base / "masks")
    torch.distributed.barrier()
    start = {"start": str(base / "masks")}
    return [shot, run(base / "trained", 2, start, model={"name": str(base / "shot" / "model")})]


def test_zeros_of_a_model_do_not_hide_its_masks(ranks: RankPools, tmp_path: Path) -> None:
    shot, trained = ranks(2).run(zeros_of_its_own, str(tmp_path), timeout=300)[0]
    assert sum(tensor["zeros_kept"] for tensor in shot["tensors"].values()) > 10
    assert trained["masks_sha256"] == shot["masks_sha256"] and trained["density"] == 0.5
    assert sum(tensor["zeros_kept"] for tensor in trained["tensors"].values()) == 0  # kept ones are trained


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.answer = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(torch.tanh(self.two(torch.tanh(self.one(x)))))


def with_zeros() -> Net:
    model = Net()
    with torch.no_grad():
        model.one.weight[:, ::2] = 0.0
    return model


def engine_of(model: nn.Module, stage: int, **leap: Any) -> Any:
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    return leap_dist.initialize(model=model, config=config | {"leap": {"total_steps": 10, **leap}})[0]


def steps(engine: Any, num: int) -> None:
    for _ in range(num):
        engine.backward(engine(torch.randn(4, 5)).square().mean())
        engine.step()


def own_loop(folder: str, stage: int) -> dict[str, Any]:
    """A loop whose weights come after initialize, and what is refused of it."""
    from leap_dist.checkpoint.checkpoints import Checkpoints
    from leap_dist.zero.engine import gather_masks

    said = []
    for model, leap in (
        (Net(), {"start": "zeros"}),
        (with_zeros(), {"start": "zeros", "target": 0.5}),
        (with_zeros(), {"start": f"{folder}/none"}),
    ):
        with pytest.raises(UserError) as refusal:
            engine_of(model, stage, **leap)
        said.append(str(refusal.value))
    engine = engine_of(with_zeros(), stage, start="zeros")
    assert engine.leap.settled and engine.leap.phase == "settle" and engine.leap.config.target == 63 / 84
    assert not {"score", "score_exp_avg"} & {key for state in engine.leap.state.values() for key in state}
    steps(engine, 3)
    checkpoints = Checkpoints(f"{folder}/checkpoints")
    checkpoints.save(engine, {"step": 3})
    checkpoints.wait()
    steps(engine, 7)
    certificate = leap_dist.finalize(engine)
    masks = dict(gather_masks(engine))
    engine.destroy()
    engine = engine_of(with_zeros(), stage, start="zeros")
    assert Checkpoints(f"{folder}/checkpoints").load(engine) == {"step": 3}
    resumed = dict(gather_masks(engine))
    engine.destroy()
    assert all(torch.equal(masks[name], resumed[name]) for name in masks)
    return {"said": said, "kept": certificate["kept"], "one": masks["one.weight"].sum(0).tolist()}


@pytest.mark.parametrize("stage", [1, 3])
def test_a_loop_of_ones_own_keeps_the_zeros_of_its_model(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    for found in ranks(2).run(own_loop, str(tmp_path), stage):
        none, other, missing = found["said"]
        assert none.startswith('leap.start: got "zeros", by which no weight of the 84 prunable ones is zero; allowed')
        assert other.startswith('leap.target: got 0.5, but the masks of leap.start "zeros" keep 63 of 84 weights')
        assert missing.startswith("leap.start: ") and "cannot be read" in missing
        assert found["kept"] == 63 and found["one"] == [0, 7, 0, 7, 0]


# Files of masks


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **{name.replace("__", ".", 1): array for name, array in arrays.items()})
    return str(path)


def packed(*shape: int) -> np.ndarray:
    return np.packbits(torch.rand(*shape).numpy() < 0.5)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({}, "has no masks; the model's tensors are called one.weight, one.bias, two.weight and so on"),
        ({"other__weight": packed(7, 7)}, r"has masks of other\.weight, which the model does not have; its tensors"),
        (
            {"two__weight": packed(9, 9)},
            r"has 11 bytes \(11 of torch\.uint8\) for two\.weight, whose 49 weights take 7",
        ),
        (
            {"two__weight": np.ones(7)},
            r"has 56 bytes \(7 of torch\.float64\) for two\.weight, whose 49 weights take 7 of torch\.uint8",
        ),
        ({"two__weight": np.ones(7, dtype=object)}, "cannot be read: Object arrays cannot be loaded"),
        (
            {"two__weight": packed(7, 7), "two__weight.__shape__": np.array(["7", "7"])},
            r"a shape \(.*\) is <U1, not whole",
        ),
        ({"two__weight": np.ones(5_000_000, dtype=np.uint8)}, "more than any mask of the model"),
    ],
)
def test_masks_of_another_model_are_refused(tmp_path: Path, arrays: dict[str, Any], match: str) -> None:
    path = npz(tmp_path / "mask.npz", **arrays)
    with pytest.raises(UserError, match=match):
        start_plan(Net(), parse_leap({"start": path}), None)


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"two.weight": 1})])
def test_what_is_no_npz_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mask.npz"
    path.write_bytes(content)
    allowed = r'allowed: "zeros", a folder that launch/export\.py RUN --to mask writes, or an \.npz of packed masks$'
    with pytest.raises(UserError, match=f"cannot be read: .*; {allowed}"):
        start_plan(Net(), parse_leap({"start": str(path)}), None)


def test_what_others_say_of_their_masks_is_not_read(tmp_path: Path) -> None:
    about = np.array({"pickled": object}, dtype=object)
    arrays: dict[str, Any] = {"one.weight": packed(7, 5), "__meta__": about}
    np.savez(tmp_path / "mask.npz", **arrays)
    plan, fixed = start_plan(Net(), parse_leap({"start": str(tmp_path / "mask.npz")}), None)
    assert plan.prunable == 35 and fixed is not None and fixed.order == ""


def test_a_file_of_ours_that_was_changed_is_refused(tmp_path: Path) -> None:
    """Our digest is that of the certificate; a `__meta__` without one is anybody's."""
    mask = packed(7, 5)
    digest = hashlib.sha256(b"one.weight\0" + mask.tobytes()).hexdigest()
    for said, given, fits in (
        ({"masks_sha256": digest}, mask, True),
        ({"masks_sha256": digest}, mask ^ 255, False),
        ({"density": 0.5}, mask ^ 255, True),
        ("no JSON", mask ^ 255, True),
    ):
        meta = np.array(said if isinstance(said, str) else json.dumps(said))
        np.savez(tmp_path / "mask.npz", **{"one.weight": given, "__meta__": meta})
        with nullcontext() if fits else pytest.raises(UserError, match="its masks are not those of its __meta__"):
            start_plan(Net(), parse_leap({"start": str(tmp_path / "mask.npz")}), None)


def test_a_word_near_zeros_is_guessed() -> None:
    with pytest.raises(UserError, match=r'^leap\.start: zero cannot be read: .*; did you mean "zeros"\?$'):
        start_plan(Net(), parse_leap({"start": "zero"}), None)


def test_a_shape_that_is_another_is_refused(tmp_path: Path) -> None:
    arrays = {"one.weight": packed(7, 5), "one.weight.__shape__": np.array([5, 7])}
    np.savez(tmp_path / "mask.npz", **arrays)
    with pytest.raises(UserError, match=r"has a mask of shape \(5, 7\) for one\.weight, which is \(7, 5\)"):
        start_plan(Net(), parse_leap({"start": str(tmp_path / "mask.npz")}), None)


def test_only_what_a_file_names_is_pruned_and_a_bias_is_not_counted(tmp_path: Path) -> None:
    np.savez(tmp_path / "mask.npz", **{"two.mask": packed(7, 7), "one.bias": packed(7)})
    plan, fixed = start_plan(Net(), parse_leap({"start": str(tmp_path / "mask.npz")}), None)
    assert set(plan.covers) == {"two.weight", "one.bias"} and plan.prunable == 49 and fixed is not None
    frozen = Net()
    frozen.two.requires_grad_(False)
    with pytest.raises(UserError, match=r"has a mask of two\.weight, which is not trained"):
        start_plan(frozen, parse_leap({"start": str(tmp_path / "mask.npz")}), None)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({}, r"leap\.target: missing; allowed: a number, 0 < target <= 1"),
        ({"start": "zeros", "gates": ["row"]}, r"leap\.gates: got .*, which has no effect here: the masks of leap\.st"),
        ({"start": "zeros", "rule": "movement"}, r"leap\.rule: got \"movement\", which has no effect here"),
        ({"start": "zeros", "dense_fraction": 0.2}, r"leap\.dense_fraction: got 0\.2, which has no effect here"),
        ({"start": "zeros", "score_init": "activation"}, r"leap\.score_init: got \"activation\", which has no effect"),
        ({"start": "a.npz", "include": ["x"]}, r"leap\.include: got .*, which has no effect here"),
        ({"start": "zeros", "mode": "one_shot"}, r"leap\.start: got \"zeros\"; one shot makes its masks itself"),
    ],
)
def test_settings_that_do_not_go_with_fixed_masks(section: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        parse_leap(section)
    assert parse_leap({"start": "zeros", "include": ["x"], "gates": "element"}).start == "zeros"


def test_masks_stay_in_place_on_shards() -> None:
    """Fragments that begin and end inside a byte."""
    from leap_dist.core.fixed import unpack

    mask = torch.rand(77) < 0.5
    bits = torch.from_numpy(np.packbits(mask.numpy()))
    for start in range(0, 77, 5):
        for length in (0, 1, 7, 8, 77 - start):
            length = min(length, 77 - start)
            assert torch.equal(unpack(bits, start, length), mask[start : start + length])


def beside_a_dense_run(folder: str) -> dict[str, Any]:
    train = JOB["train"] | {"dense_reference": True}
    return run(Path(folder) / "run", 2, {"target": 0.5, "gates": ["2:4"]}, train=train)


def test_an_n_of_m_run_has_a_dense_one_beside_it(ranks: RankPools, tmp_path: Path) -> None:
    """Whose gates cannot be the pattern's, which never keeps all."""
    found = ranks(1).run(beside_a_dense_run, str(tmp_path), timeout=300)[0]
    assert set(found["metrics"]) == {"dense", "dense_reference", "pruned"} and found["density"] == 0.5
