"""Checkpoints: every rank writes the fragments it holds, tensor by tensor, as safetensors.

A folder `step-00000120` holds `rank-00000.safetensors` of each rank, with keys "tensor/state/start", and `state.json`
of rank 0, written last. No pickle. Loading looks up, for every fragment that a rank holds, the stored runs that
overlap it, so that nothing depends on how the flat buffers are laid out.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from leap_dist.core.fragments import Fragment
from leap_dist.errors import UserError
from leap_dist.zero.binding import find_fragments, refresh_hosted
from leap_dist.zero.ranks import Ranks

HOSTED = "hosted"  # the state key under which the fp32 masters themselves are stored
STATE_FILE = "state.json"


def save_checkpoint(engine: Any, folder: Path, ranks: Ranks, progress: Mapping[str, Any]) -> Path:
    """Write step-<n> below `folder`, and remove older ones once it is complete; `progress` is JSON-able.

    Collective. The step's folder appears under its name only when every rank has written its part.
    """
    final = folder / f"step-{engine.leap.num_steps:08d}"
    partial = folder / f".{final.name}.partial"
    if ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    save_file(_rank_tensors(engine), partial / f"rank-{ranks.rank:05d}.safetensors")
    ranks.barrier()
    if ranks.first:
        state = {"progress": dict(progress), "engine": _engine_state(engine), "world_size": ranks.world_size}
        (partial / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for older in sorted(folder.glob("step-*")):
            if older != final:
                shutil.rmtree(older)
    ranks.barrier()
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`."""
    found = sorted(path for path in folder.glob("step-*") if (path / STATE_FILE).is_file())
    return found[-1] if found else None


def load_checkpoint(engine: Any, checkpoint: Path, ranks: Ranks) -> dict[str, Any]:
    """Put a checkpoint into an engine that was built from the same config; returns what was given as `progress`.

    Raises UserError if it was written by another number of ranks.
    """
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    if state["world_size"] != ranks.world_size:
        raise UserError(
            f"--resume: {checkpoint} was written by {state['world_size']} ranks, this run has {ranks.world_size}; "
            "start as many ranks as before"
        )
    with safe_open(checkpoint / f"rank-{ranks.rank:05d}.safetensors", framework="pt") as stored:
        for fragment in find_fragments(engine):
            for key in _keys(engine, fragment):
                source = stored.get_tensor(f"{fragment.tensor}/{key}/{fragment.start}")
                _target(engine, fragment, key).copy_(source)
        _set_random_state(stored.get_tensor("random/cpu"), stored)
    _restore_engine(engine, state["engine"])
    refresh_hosted(engine)
    progress: dict[str, Any] = state["progress"]
    return progress


def _keys(engine: Any, fragment: Fragment) -> list[str]:
    """The state keys of a fragment's flat buffer, and the masters."""
    state = engine.leap.state[fragment.flat]
    return [HOSTED, *(key for key, value in state.items() if isinstance(value, Tensor))]


def _target(engine: Any, fragment: Fragment, key: str) -> Tensor:
    """The part of a flat buffer, or of a state tensor of its shape, that a fragment is."""
    return fragment.view(fragment.flat if key == HOSTED else engine.leap.state[fragment.flat][key])


def _rank_tensors(engine: Any) -> dict[str, Tensor]:
    """Everything that this rank has to write."""
    tensors = {
        f"{fragment.tensor}/{key}/{fragment.start}": _target(engine, fragment, key).cpu().clone()
        for fragment in find_fragments(engine)
        for key in _keys(engine, fragment)
    }
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    return tensors


def _set_random_state(cpu: Tensor, stored: Any) -> None:
    torch.set_rng_state(cpu)
    if torch.cuda.is_available() and "random/cuda" in stored.keys():  # noqa: SIM118  a file handle, no dict
        torch.cuda.set_rng_state(stored.get_tensor("random/cuda"))


def _engine_state(engine: Any) -> dict[str, Any]:
    """Counters and schedules that live outside tensors."""
    scheduler = engine.lr_scheduler
    return {
        "leap": engine.leap.progress(),
        "lr": [group["lr"] for group in engine.leap.param_groups],
        "scheduler": None if scheduler is None else _json_able(scheduler.state_dict()),
        "loss_scale": getattr(engine.optimizer, "loss_scale", 1.0),
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
    }


_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def _restore_engine(engine: Any, state: Mapping[str, Any]) -> None:
    engine.leap.load_progress(state["leap"])
    for group, lr in zip(engine.leap.param_groups, state["lr"], strict=True):
        group["lr"] = lr
    if state["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(state["scheduler"])
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and hasattr(scaler, "cur_scale"):
        scaler.cur_scale = state["loss_scale"]
    for name in _COUNTERS:
        setattr(engine, name, state["counters"][name])


def _json_able(values: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's state without the functions it was made from."""
    return {key: value for key, value in values.items() if isinstance(value, int | float | str | list | None)}
