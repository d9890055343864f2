"""What the host of LeapAdamW saves and loads through its state_dict: torch's, with an entry "leap".

The entry holds what is in no tensor of a parameter: progress, masks of structured units, the gates' own values, and by
what config and gates they came about.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leap_dist.errors import UserError

LEAP = "leap"


def leap_entry(optimizer: Any) -> dict[str, Any]:
    """The entry, of plain values and tensors."""
    values = optimizer.gating.values
    return {
        "of": made_by(optimizer),
        "progress": optimizer.plain_state(),
        "unit_mask": optimizer.gating.unit_mask,
        "values": {"value": values.flat, **values.state},
        "inputs": {} if optimizer.inputs is None else {"inputs": optimizer.inputs.flat},
    }


def made_by(optimizer: Any) -> dict[str, Any]:
    """What has to be the same for a state to fit, by name: every key of the leap section, and every gate."""
    settings = {f"leap.{key}": value for key, value in optimizer.config.model_dump(mode="json").items()}
    gates = {f"gate {gate.granularity} {gate.name!r}": gate.num_units for gate in optimizer.plan.gates}
    return {**settings, **gates}


def restore(optimizer: Any, flats: Sequence[Tensor], saved: Mapping[str, Any]) -> None:
    """Copy a state_dict into the tensors that are bound. flats: those of all groups, in their order.

    Raises UserError, with nothing changed, if it is of another config, of other gates, or sharded in another way.
    """
    _check(optimizer, saved)
    ids = [number for group in saved["param_groups"] for number in group["params"]]
    if len(ids) != len(flats):
        raise _misfit(f"it has {len(ids)} parameters, this run {len(flats)}")
    states = [saved["state"].get(number, {}) for number in ids]
    own, mine = saved[LEAP]["values"], optimizer.gating.values
    pairs = [(own, {"value": mine.flat, **mine.state})]
    inputs = {} if optimizer.inputs is None else {"inputs": optimizer.inputs.flat}
    pairs.append((saved[LEAP].get("inputs", {}), inputs))
    pairs += [(state, optimizer.state.get(flat, {})) for state, flat in zip(states, flats, strict=True)]
    pairs.append(({"unit_mask": saved[LEAP]["unit_mask"]}, {"unit_mask": optimizer.gating.unit_mask}))
    copies = [copy for there, here in pairs for copy in _copies(there, here)]
    for source, target in copies:
        target.copy_(source.reshape(target.shape))
    for flat, state in zip(flats, states, strict=True):
        here = optimizer.state[flat]
        for key in [key for key, value in here.items() if not torch.is_tensor(value)]:
            del here[key]  # a state from before the first step has no "step"
        here.update({key: value for key, value in state.items() if not torch.is_tensor(value)})
    for group, loaded in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in loaded.items() if key != "params"})
    optimizer.take_counts(saved[LEAP]["progress"])
    optimizer.level.take_plain_state(saved[LEAP]["progress"])


def _check(optimizer: Any, saved: Mapping[str, Any]) -> None:
    if LEAP not in saved:
        raise UserError(
            "checkpoint: the optimizer that wrote it was not LEAP's; only its weights can be loaded, before the "
            "first step: engine.load_checkpoint(..., load_module_only=True)"
        )
    there, here = saved[LEAP]["of"], made_by(optimizer)
    problems = []
    for name in [*here, *(name for name in there if name not in here)]:
        if there.get(name, _NONE) != here.get(name, _NONE):
            was, now = (values.get(name, _NONE) for values in (there, here))
            problems.append(f"{name}: the checkpoint was written with {was!r}, this run has {now!r}")
    if problems:
        shown = problems[:5] + ([f"and {len(problems) - 5} more differences"] if len(problems) > 5 else [])
        raise UserError("\n".join([*shown, "checkpoint: restore the config, or load its weights only"]))
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        num = len(saved["param_groups"])
        raise _misfit(f"it has {num} parameter groups, this run {len(optimizer.param_groups)}")


def _copies(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """(source, target) of every state tensor."""
    sources, targets = ({k: v for k, v in state.items() if torch.is_tensor(v)} for state in (there, here))
    if sources.keys() != targets.keys():
        name = sorted(sources.keys() ^ targets.keys())[0]
        raise _misfit(f"{name!r} is in one of the two only")
    for name, target in targets.items():
        if sources[name].numel() != target.numel():
            raise _misfit(f"{name!r} has {sources[name].numel()} elements on this rank, this run {target.numel()}")
        yield sources[name], target


def _misfit(difference: str) -> UserError:
    return UserError(
        f"checkpoint: it is of another model, or was sharded in another way: {difference}; load it with the model, the "
        "number of ranks and the ZeRO stage that it was written with"
    )


class _Missing:
    def __repr__(self) -> str:
        return "nothing of this name"


_NONE = _Missing()
