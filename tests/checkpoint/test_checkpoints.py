"""A run that is stopped and resumed ends with the same bits; at other ranks or stages it goes on from the same bits."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from leap_dist.checkpoint.checkpoints import Checkpoints
from leap_dist.checkpoint.folders import write_tensors
from leap_dist.checkpoint.manifest import MANIFEST, with_checksum
from leap_dist.core.phases import Schedule
from leap_dist.errors import UserError
from tests.peers.nets import GLOBAL_BATCH, batches, leap, loss_of, net
from tests.ranks import RankPools
from tests.zero.test_engine import pruned_engine, run_steps

STEPS = 24
SHORT = {"total_steps": STEPS, "dense_fraction": 0.15}
STOPS = [1, 12, 21]  # in the dense, the prune and the settle phase


def this_rank() -> Any:
    from leap_dist.zero.ranks import Ranks

    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), torch.device("cpu"))


def outcome(engine: Any) -> dict[str, Any]:
    import leap_dist

    certificate = leap_dist.finalize(engine)
    thresholds = engine.leap.gating.gather_thresholds()
    return {**certificate, "thresholds": thresholds.tolist(), "random": torch.rand(3).tolist()}


def undisturbed(kind: str, stage: int, changes: dict[str, Any]) -> dict[str, Any]:
    engine = pruned_engine(kind, stage, 1, SHORT | changes)
    torch.manual_seed(5 + torch.distributed.get_rank())
    run_steps(engine, 1, 0, STEPS)
    return outcome(engine)


def interrupted(kind: str, stage: int, changes: dict[str, Any], folder: str) -> dict[str, Any]:
    """Save and start over with a new engine in every phase; a few steps follow each save while it is written."""
    done = 0
    for stop in [*STOPS, STEPS]:
        engine, checkpoints = pruned_engine(kind, stage, 1, SHORT | changes), Checkpoints(Path(folder), this_rank())
        torch.manual_seed(5 + torch.distributed.get_rank() if done == 0 else 99)
        assert checkpoints.load(engine) == ({"step": done} if done else None)
        run_steps(engine, 1, done, stop)
        done = stop
        if stop < STEPS:
            checkpoints.save(engine, {"step": stop})
            run_steps(engine, 1, stop, stop + 3)
            checkpoints.wait()
    return outcome(engine)


CASES = [
    ("element", 0, 1, {}),
    ("element", 2, 2, {}),
    ("element", 3, 2, {"control": "paper"}),
    ("hybrid", 1, 2, {}),
    ("row", 2, 1, {"rule": "magnitude"}),
    ("head+2:4", 3, 2, {}),
    ("hybrid", 3, 2, {"score_init": "activation"}),
    ("element", 0, 2, {"score_init": "gradient"}),
]


def test_a_run_is_stopped_in_every_phase() -> None:
    config = leap("element", STEPS, dense_fraction=SHORT["dense_fraction"])
    schedule = Schedule(STEPS, config.dense_fraction, config.settle_fraction, config.target)
    assert [schedule.phase(stop) for stop in STOPS] == ["dense", "prune", "settle"]


@pytest.mark.parametrize(("kind", "stage", "world", "changes"), CASES)
def test_resumes_bit_for_bit(
    ranks: RankPools, tmp_path: Path, kind: str, stage: int, world: int, changes: dict[str, Any]
) -> None:
    expected = ranks(world).run(undisturbed, kind, stage, changes)
    resumed = ranks(world).run(interrupted, kind, stage, changes, str(tmp_path))
    assert resumed == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{stop:08d}" for stop in STOPS[-2:]]


# At other ranks and stages


def contents(engine: Any) -> dict[str, Any]:
    """Everything that a checkpoint holds, gathered: all states of all tensors, and what is outside of tensors."""
    from leap_dist.checkpoint.engine_state import HOSTED, engine_state, tensor_table
    from leap_dist.zero.binding import gather

    found: dict[str, Any] = engine_state(engine).model_dump(exclude={"scaler"})  # stage 0 has none
    for name, entry in tensor_table(engine).items():
        for key in entry.states:
            ((_, whole),) = gather(engine, [name], None if key == HOSTED else key)
            found[f"{name}/{key}"] = whole.numpy().tobytes()
    for name, weight in masked_weights(engine).items():
        found[name] = weight.numpy().tobytes()
    return found


def masked_weights(engine: Any) -> dict[str, torch.Tensor]:
    from leap_dist.zero.engine import gather_weights

    return dict(gather_weights(engine))


def masks_sha256(engine: Any) -> str:
    from leap_dist.zero.engine import gather_masks

    return hashlib.sha256(b"".join(mask.numpy().tobytes() for _, mask in gather_masks(engine))).hexdigest()


def link(kind: str, stage: int, accumulation: int, folder: str, first: int, last: int) -> dict[str, Any]:
    """Resume after `first` steps, save after `last` ones, and take one step more."""
    engine = pruned_engine(kind, stage, accumulation, SHORT | STARTS.get(kind, {}))
    checkpoints = Checkpoints(Path(folder), this_rank())
    before = torch.get_rng_state()
    found: dict[str, Any] = {}
    if first:
        assert checkpoints.load(engine) == {"step": first}
        found |= {"loaded": contents(engine), "random_kept": torch.equal(torch.get_rng_state(), before)}
        run_steps(engine, accumulation, first, first + 1)
        found["masks"] = masks_sha256(engine)
        first += 1
    run_steps(engine, accumulation, first, last)
    if last == STEPS:
        return found | {"end": outcome(engine)}
    checkpoints.save(engine, {"step": last})
    found["saved"] = contents(engine)
    run_steps(engine, accumulation, last, last + 1)
    checkpoints.wait()
    return found | {"next": masks_sha256(engine)}


# (ranks, ZeRO stage, accumulation) of the four parts of a run.
CHAINS = {
    "element": [(2, 2, 1), (1, 3, 3), (3, 1, 1), (2, 0, 1)],
    "hybrid": [(3, 3, 1), (2, 2, 3), (1, 0, 1), (3, 3, 1)],
    "head+2:4": [(1, 1, 1), (3, 2, 1), (2, 3, 1), (1, 2, 1)],
    "head+neuron": [(2, 1, 1), (3, 0, 1), (1, 3, 1), (2, 3, 1)],
}
STARTS = {"hybrid": {"score_init": "activation"}}


@pytest.mark.parametrize("kind", CHAINS)
def test_resumes_at_any_ranks_and_stage(ranks: RankPools, tmp_path: Path, kind: str) -> None:
    bounds = [0, *STOPS, STEPS]
    before: dict[str, Any] = {}
    for (world, stage, accumulation), first, last in zip(CHAINS[kind], bounds, bounds[1:], strict=False):
        found = ranks(world).run(link, kind, stage, accumulation, str(tmp_path), first, last)
        if before:
            for each in found:
                assert [name for name, saved in before["saved"].items() if each["loaded"][name] != saved] == []
            assert all(each["masks"] == before["next"] for each in found)
            assert all(each["random_kept"] for each in found)
        before = found[0]
    end = before["end"]
    assert end == ranks(1).run(undisturbed, kind, 2, STARTS.get(kind, {}))[0] | {
        key: end[key] for key in ("weights_sha256", "thresholds", "random")
    }


def checkpoint_of(kind: str, stage: int, folder: str, *steps: int) -> None:
    engine, checkpoints = pruned_engine(kind, stage, 1, {}), Checkpoints(Path(folder), this_rank(), keep=9)
    for first, last in zip((0, *steps), steps, strict=False):
        run_steps(engine, 1, first, last)
        checkpoints.save(engine, {"step": last})
    checkpoints.wait()


def load(kind: str, stage: int, folder: str, changes: dict[str, Any] | None = None) -> Any:
    return Checkpoints(Path(folder), this_rank()).load(pruned_engine(kind, stage, 1, changes or {}))


def test_only_what_is_needed_is_stored_and_read(ranks: RankPools, tmp_path: Path) -> None:
    ranks(3).run(checkpoint_of, "element", 0, str(tmp_path), 2)
    checkpoint = tmp_path / "step-00000002"
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}
    assert json.loads((checkpoint / MANIFEST).read_text())["progress"] == {"step": 2}
    for rank in (1, 2):  # under stage 0 the first rank has all
        assert load_file(checkpoint / f"rank-0000{rank}.safetensors").keys() == {"random/cpu"}
        (checkpoint / f"rank-0000{rank}.safetensors").unlink()
    assert ranks(2).run(load, "element", 3, str(tmp_path)) == [{"step": 2}] * 2


# What cannot be loaded


def load_after_damage(folder: str) -> tuple[Any, str]:
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        loaded = load("hybrid", 2, folder)
    return loaded, printed.getvalue()


def test_a_damaged_checkpoint_is_passed_over(ranks: RankPools, tmp_path: Path) -> None:
    ranks(2).run(checkpoint_of, "hybrid", 2, str(tmp_path), 2, 3, 4)
    os.truncate(tmp_path / "step-00000004" / "rank-00001.safetensors", 99)
    (tmp_path / "step-00000003" / MANIFEST).unlink()
    (first, warnings), (second, nothing) = ranks(2).run(load_after_damage, str(tmp_path))
    assert first == second == {"step": 2} and nothing == ""
    assert "step-00000004 is damaged and not used: rank-00001.safetensors has 99 bytes, not" in warnings
    assert "step-00000003 is damaged and not used: [Errno 2] No such file or directory" in warnings
    (tmp_path / "step-00000002" / "rank-00000.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"--resume: no checkpoint in .* is intact; the oldest, step-00000002: .*No such"
    ):
        ranks(2).run(load, "hybrid", 2, str(tmp_path))


def changed(folder: Path, change: Any, step: int = 2) -> None:
    """Change the checkpoint of a step as somebody would who knows about the manifest's checksum."""
    checkpoint = folder / f"step-{step:08d}"
    body = json.loads((checkpoint / MANIFEST).read_text())
    del body["sha256"]
    change(body, checkpoint)
    (checkpoint / MANIFEST).write_bytes(with_checksum(body))


def put(*keys: Any) -> Any:
    """A change: the last of `keys` is the value at the place that the others lead to; None removes it."""

    def change(body: Any, _: Path) -> None:
        *way, last, value = keys
        for key in way:
            body = body[key]
        if value is None:
            del body[last]
        else:
            body[last] = value

    return change


def rewritten(name: str, tensor: torch.Tensor | None) -> Any:
    """A change: the file of the first rank has another tensor of this name, or none."""

    def change(body: Any, checkpoint: Path) -> None:
        tensors = load_file(checkpoint / FIRST) | ({} if tensor is None else {name: tensor.clone()})
        if tensor is None:
            del tensors[name]
        replaced(body, checkpoint, lambda path: write_tensors(path, tensors))

    return change


def without_tensor(body: Any, checkpoint: Path) -> None:
    """A change: a tensor is missing everywhere."""
    del body["tensors"]["0.weight"], body["files"][FIRST]["runs"]["0.weight"]


def garbage(body: Any, checkpoint: Path) -> None:
    """A change: the file of the first rank is none of safetensors, and claims terabytes."""
    content = (2**42).to_bytes(8, "little") + b"{}"
    sha256 = hashlib.sha256(content).hexdigest()
    replaced(body, checkpoint, lambda path: (path.write_bytes(content), sha256))


def replaced(body: Any, checkpoint: Path, write: Any) -> None:
    (checkpoint / FIRST).unlink()
    size, sha256 = write(checkpoint / FIRST)
    body["files"][FIRST] |= {"size": size, "sha256": sha256}


FIRST = "rank-00000.safetensors"
MISFITS = {
    "another format": (put("format", 1), "got format 1; this version of leap_dist reads format 2"),
    "no tensor": (without_tensor, "it has no tensor '0.weight'"),
    "more tensors": (put("tensors", "x", {"numel": 1, "states": {}}), "this run has no tensor 'x'"),
    "another size": (put("tensors", "0.weight", "numel", 99), "tensor '0.weight' was numel=99 .* and is numel=13"),
    "other gates": (put("gates", 0, 1, 7), r"gate '.*' was \(0, 7\) and is \(0, "),
    "other groups": (put("engine", "lr", []), "it has 0 parameter groups, this run 3"),
    "no scheduler": (put("engine", "scheduler", {}), "its learning rate follows another scheduler"),
    "another scheduler": (
        put("engine", "scheduler", "base_lrs", 0, "x"),
        "its learning rate follows another scheduler",
    ),
    "many units": (put("engine", "leap", "kept_units", 0, 10**6), "it keeps more units than there are"),
    "another step": (put("engine", "leap", "num_steps", 10**9), "num_steps is 1000000000, the folder is of step 2"),
    "no calibration": (
        put("engine", "leap", "calibration", -1.0),
        "calibration is -1.0; allowed: 0.001 to",
    ),
    "a false calibration": (put("engine", "leap", "calibration", False), "engine.leap.calibration.*valid number"),
    "more weights": (put("engine", "leap", "kept_weights", 10**6), "kept_weights or task_size is out of range"),
    "other heads": (put("engine", "leap", "given", {"0": [1.0]}), "given is of other gates"),
    "a weight less": (put("engine", "leap", "kept_weights", 1), "masked is false, and yet units or weights are pruned"),
    "a rate": (put("engine", "lr", 0, float("nan")), r"engine.lr is \[nan, .*; allowed: finite numbers >= 0"),
    "a gap": (put("files", FIRST, "runs", "1.weight", None), "element 0 of '1.weight' is in no file"),
    "another dtype": (put("tensors", "0.weight", "states", "hosted", "BOOL"), "tensor '0.weight' was"),
    "a shorter tensor": (
        rewritten("0.weight/hosted", torch.zeros(12)),
        "'0.weight/hosted' has another size or dtype than",
    ),
    "a tensor less": (rewritten("0.weight/hosted", None), f"{FIRST} cannot be read: .*0.weight/hosted"),
    "a header of terabytes": (garbage, f"{FIRST} cannot be read: .*header too large"),
    "no random state": (rewritten("random/cpu", None), f"{FIRST} has no random state"),
    "a short random state": (
        rewritten("random/cpu", torch.zeros(3).byte()),
        f"{FIRST}: its random state cannot be used",
    ),
    "a shorter run": (put("files", FIRST, "runs", "0.weight", [0, 12]), "element 12 of '0.weight' is in no file"),
}


def misfit_messages(folder: str) -> dict[str, str]:
    """What loading says, by kind of misfit."""
    checkpoint_of("hybrid", 2, folder, 2)
    engine, said = pruned_engine("hybrid", 2, 1, {}), {}
    files = {path: path.read_bytes() for path in (Path(folder) / "step-00000002").iterdir()}
    for name, (change, _) in MISFITS.items():
        changed(Path(folder), change)
        try:
            Checkpoints(Path(folder), this_rank()).load(engine)
        except UserError as error:
            said[name] = str(error)
        for path, content in files.items():
            path.write_bytes(content)
    return said


def test_what_does_not_fit_is_told(ranks: RankPools, tmp_path: Path) -> None:
    said = ranks(1).run(misfit_messages, str(tmp_path))[0]
    assert said.keys() == MISFITS.keys()
    for name, (_, message) in MISFITS.items():
        with pytest.raises(UserError, match=message):
            raise UserError(said[name])
    with pytest.raises(UserError, match=r"is of another model, or of other gates: .*; restore the config"):
        ranks(2).run(load, "hybrid", 2, str(tmp_path), {"gates": ["element"]})


def one_weight_less(folder: str) -> tuple[int, str]:
    """What loading says of a masked checkpoint that names one weight less than its masks keep."""
    checkpoint_of("hybrid", 2, folder, 12)
    engine = pruned_engine("hybrid", 2, 1, {})
    manifest = json.loads((Path(folder) / "step-00000012" / MANIFEST).read_text())
    kept = manifest["engine"]["leap"]["kept_weights"]
    changed(Path(folder), put("engine", "leap", "kept_weights", kept - 1), 12)
    with pytest.raises(UserError) as refusal:
        Checkpoints(Path(folder), this_rank()).load(engine)
    return kept, str(refusal.value)


def test_masks_keep_what_the_manifest_says(ranks: RankPools, tmp_path: Path) -> None:
    kept, said = ranks(1).run(one_weight_less, str(tmp_path))[0]
    assert f"engine.leap.kept_weights is {kept - 1}, the masks keep {kept}" in said


def from_outside(folder: str) -> dict[str, Any]:
    """A loop of a user's own that knows leap_dist alone."""
    import leap_dist

    said = []
    for wrong in (
        lambda: leap_dist.Checkpoints(7),  # type: ignore[arg-type]
        lambda: leap_dist.Checkpoints(""),
        lambda: leap_dist.Checkpoints(folder, keep=0),
        lambda: leap_dist.Checkpoints(folder).load(net()),
    ):
        with pytest.raises(UserError) as caught:
            wrong()
        said.append(str(caught.value))
    checkpoints = leap_dist.Checkpoints(folder)
    engine = pruned_engine("row", 2, 3, {})
    assert checkpoints.load(engine) is None
    x, y = batches(1)[0]
    size = GLOBAL_BATCH // (3 * torch.distributed.get_world_size())
    engine.backward(loss_of(engine(x[:size]), y[:size]))
    engine.step()
    with pytest.raises(
        UserError, match=r"^engine: it is in the middle of a step, after 1 of 3 micro-batches; save and"
    ):
        checkpoints.save(engine, {"step": 1})
    for _ in range(2):
        engine.backward(loss_of(engine(x[:size]), y[:size]))
        engine.step()
    checkpoints.save(engine, {"step": 1})
    checkpoints.wait()
    other = pruned_engine("row", 3, 1, {})
    progress = leap_dist.Checkpoints(folder).load(other)
    return {"said": said, "progress": progress, "steps": other.leap.num_steps}


def test_checkpoints_are_of_use_from_the_outside(ranks: RankPools, tmp_path: Path) -> None:
    found = ranks(2).run(from_outside, str(tmp_path / "checkpoints"))[0]
    assert found["said"] == [
        "folder: got 7; allowed: the path of a folder, which is created if it does not exist",
        "folder: got ''; allowed: the path of a folder, which is created if it does not exist",
        "keep: got 0; allowed: an integer >= 1",
        "engine: got a Sequential; allowed: one that leap_dist.initialize or attach made",
    ]
    assert (found["progress"], found["steps"]) == ({"step": 1}, 1)
