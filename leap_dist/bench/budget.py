"""Budget: what a job takes of every rank, in memory and in traffic, with and without LEAP.

From shapes alone, so that a model on the meta device will do. Follows DeepSpeed 0.19.8 and the state that LeapAdamW
makes; activations and the buffers of communication are not counted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from leap_dist.config.leap import LeapConfig
from leap_dist.config.section import is_number, show
from leap_dist.core.closed_form import closed_form
from leap_dist.core.gate_values import gate_sizes
from leap_dist.core.gates import GatePlan
from leap_dist.core.gating import ELEMENT_MASK, EXP_AVG, EXP_AVG_SQ, LATENT, MASK, state_keys
from leap_dist.core.inputs import num_features
from leap_dist.core.select import COUNTS, NUM_SUMS, most_bytes
from leap_dist.errors import UserError
from leap_dist.models.inputs import resolve_start
from leap_dist.ops.soft import SUMS
from leap_dist.train.batches import micro_batches

FP32, INT32, INT64 = 4, 4, 8  # bytes
BUCKET = 5 * 10**8  # DeepSpeed's default for both bucket sizes, in elements
PERSISTENT = 10**5  # parameters of so many elements or fewer are held whole under stage 3, by default
ALIGNMENT = 2  # stages 1 and 2 pad a group to a multiple of this times the ranks


@dataclass(frozen=True)
class Hosting:
    """How DeepSpeed hosts a model: stage, ranks, bytes of a hosted number, micro-batches in a step; sizes in elements.

    `offloads` names what is kept in CPU memory: "weights", "state".
    """

    stage: int
    ranks: int
    width: int = FP32
    accumulation: int = 1
    reduce_bucket: int = BUCKET
    gather_bucket: int = BUCKET
    persistent: int = PERSISTENT
    offloads: frozenset[str] = frozenset()

    @classmethod
    def of(cls, deepspeed: Mapping[str, Any], ranks: int) -> "Hosting":
        """As a job's DeepSpeed keys say. Raises UserError for one of another kind than is needed here."""
        zero = deepspeed.get("zero_optimization") or {}
        half = any((deepspeed.get(name) or {}).get("enabled") for name in ("bf16", "fp16"))
        places = {"weights": "offload_param", "state": "offload_optimizer"}
        devices = {name: _device(zero, key) for name, key in places.items()}
        return cls(
            stage=zero.get("stage", 0),
            ranks=ranks,
            width=2 if half else FP32,
            accumulation=micro_batches(deepspeed, ranks),
            reduce_bucket=_size(zero, "reduce_bucket_size", BUCKET),
            gather_bucket=_size(zero, "allgather_bucket_size", BUCKET),
            persistent=_size(zero, "stage3_param_persistence_threshold", PERSISTENT, lowest=0),
            offloads=frozenset(name for name, device in devices.items() if device == "cpu"),
        )

    def at(self, stage: int) -> "Hosting":
        """The same under another stage."""
        return replace(self, stage=stage)

    def shard(self, sizes: Iterable[int]) -> int:
        """Elements that a rank holds of one parameter group, padding included."""
        if self.stage == 3:
            return sum(-(-size // self.ranks) for size in sizes)
        total = sum(sizes)
        return total if self.stage == 0 else -(-total // (ALIGNMENT * self.ranks)) * ALIGNMENT


def _device(zero: Mapping[str, Any], key: str) -> Any:
    """Where what a section of zero_optimization names is kept; None without the section."""
    found = zero.get(key) or {}
    if not isinstance(found, Mapping):
        raise UserError(
            f'zero_optimization.{key}: got {show(found)}; allowed: a JSON object, such as {{"device": "cpu"}}; or '
            "leave it out"
        )
    return found.get("device")


def _size(zero: Mapping[str, Any], key: str, default: int, lowest: int = 1) -> int:
    """A number of elements."""
    found = zero.get(key, default)
    if not is_number(found) or found < lowest:
        raise UserError(f"zero_optimization.{key}: got {show(found)}; allowed: a number >= {lowest}; or leave it out")
    return int(found)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. gradients: at the step; state: fp32 masters and Adam's moments, those of the gates' own
    values too; extra: LEAP's own state; selection: what a selection takes for its time, at most; copy: in host memory,
    of what a checkpoint is written from while training continues, no part of the total."""

    weights: int
    gradients: int
    state: int
    extra: int = 0
    selection: int = 0
    copy: int = 0

    @property
    def total(self) -> int:
        """Everything but the copy."""
        return self.weights + self.gradients + self.state + self.extra + self.selection

    def on_device(self, offloads: frozenset[str]) -> int:
        """What is left on the device where some of it is kept in CPU memory."""
        weights = 0 if "weights" in offloads else self.weights
        return weights + (self.gradients if "state" in offloads else self.total - self.weights)


def group_sizes(model: nn.Module, plan: GatePlan | None) -> list[list[int]]:
    """Sizes of the trained parameters, in the engine's groups: gated, matrices, vectors."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    covers = plan.covers if plan else {}
    gated = [p.numel() for name, p in trained if name in covers]
    rest = [p for name, p in trained if name not in covers]
    groups = [gated, [p.numel() for p in rest if p.dim() >= 2], [p.numel() for p in rest if p.dim() < 2]]
    return [group for group in groups if group]


def memory(model: nn.Module, plan: GatePlan | None, hosting: Hosting, config: LeapConfig) -> Memory:
    """Bytes that one rank holds; without a plan, of the same job with AdamW and no gates.

    One shot has no gradients and no moments, and the weights stand where they are cut.
    """
    one_shot = config.mode == "one_shot"
    groups = group_sizes(model, plan)
    untrained = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    numel, shard = sum(map(sum, groups)), sum(map(hosting.shard, groups))
    if hosting.stage == 3:
        whole = sum(size for group in groups for size in group if size <= hosting.persistent)
        weights = (shard + whole + -(-untrained // hosting.ranks)) * hosting.width
    else:
        weights = (numel + untrained) * hosting.width
    if hosting.stage == 0:
        gradients, state = numel * FP32, 2 * numel * FP32
    else:
        held = numel if hosting.stage == 1 else shard
        gradients = held * hosting.width + max(map(hosting.shard, groups)) * FP32  # fp32 for the group that steps
        state = 3 * shard * FP32
    gradients = 0 if one_shot else gradients
    if one_shot or config.frozen:
        state = 0 if hosting.stage == 0 else shard * FP32
    saved = FP32 if config.frozen else 3 * FP32  # of a weight that no gate covers
    if plan is None or not plan.gates:
        return Memory(weights, gradients, state, copy=0 if one_shot else saved * shard)
    sizes = gate_sizes(plan).values()
    own = sum(sizes) if hosting.stage == 0 else sum(-(-size // hosting.ranks) for size in sizes)
    gated = hosting.shard(groups[0])
    extra = state_bytes(plan, config) * gated
    selection = _selection(groups[0], plan, hosting) if config.start is None else 0
    seen = num_features(resolve_start(model, plan, config).axes)  # sums of squares of inputs, in fp64
    seen = seen if hosting.stage == 0 else -(-seen // hosting.ranks)
    copy = _bytes_of(state_keys(plan, config)) * gated + saved * (shard - gated) + 3 * FP32 * own + 2 * FP32 * seen
    state += (1 if one_shot else 3) * own * FP32
    return Memory(weights, gradients, state, extra, selection, 0 if one_shot else copy)


def state_bytes(plan: GatePlan, config: LeapConfig) -> int:
    """Bytes that LEAP's state takes of each weight of the gated group, beside its fp32 master and Adam's moments."""
    dense = (EXP_AVG, EXP_AVG_SQ, LATENT) if config.mode == "one_shot" else (EXP_AVG, EXP_AVG_SQ)
    return _bytes_of(key for key in state_keys(plan, config) if key not in dense)


def _bytes_of(keys: Iterable[str]) -> int:
    """Of these states, of one weight."""
    return sum(1 if key in (MASK, ELEMENT_MASK) else FP32 for key in keys)


def _selection(gated: list[int], plan: GatePlan, hosting: Hosting) -> int:
    """Bytes that a selection takes on one rank: of this rank's scores, and of every gate."""
    ranked = [gate for gate in plan.gates if gate.pattern is None]
    weights = hosting.shard(gated) if any(gate.elementwise for gate in ranked) else 0
    units = sum(gate.num_units for gate in ranked if not gate.elementwise)
    return most_bytes(weights + units, len(ranked)) if ranked else 0


# ---------------------------------------------------------------------------------------------- traffic


@dataclass(frozen=True)
class Traffic:
    """Collectives of one optimizer step for one purpose, and the bytes that a rank hands to them."""

    purpose: str
    collectives: int
    bytes: int


def engine_traffic(model: nn.Module, hosting: Hosting) -> list[Traffic]:
    """DeepSpeed's own, with dense AdamW: gradients reduced, weights gathered. Counts are of full buckets."""
    if hosting.ranks == 1:
        return []
    sizes = [size for group in group_sizes(model, None) for size in group]
    numel, accumulation = sum(sizes), hosting.accumulation if hosting.stage >= 2 else 1
    reduced = Traffic(
        "gradients reduced", accumulation * -(-numel // hosting.reduce_bucket), accumulation * numel * hosting.width
    )
    if hosting.stage == 0:
        return [reduced]
    if hosting.stage < 3:
        return [reduced, Traffic("weights gathered", -(-numel // hosting.gather_bucket), numel * hosting.width)]
    passed = 2 * accumulation  # for the forward and for the backward pass
    split = [size for size in sizes if size > hosting.persistent]
    kept = numel - sum(split)
    gathered = Traffic("weights gathered", passed * len(split) + 1, (passed * sum(split) + kept) * hosting.width)
    return [reduced, gathered]


def leap_traffic(plan: GatePlan, config: LeapConfig, hosting: Hosting) -> list[Traffic]:
    """LEAP's own in a step of the prune phase, where brackets hold the cuts and no cut parts equal scores.

    A cut that parts scores which share its first digits takes two sums more, one that parts equal scores a count by
    fragment, and one outside its bracket a second search: all are few, and most of them come in the first steps. Where
    kept weights do not follow from kept counts (hybrids) a step may select up to four times.
    """
    if hosting.ranks == 1 or hosting.stage == 0 or not plan.gates or config.start or config.mode == "one_shot":
        return []
    gates, units = len(plan.gates), plan.num_structured_units
    if config.rule == "gumbel":  # a pass in which the mean is at the level at once; most steps take one or two
        found = [Traffic("gate gradients", 1, units * FP32), Traffic("scores of units", 2, 2 * units * FP32)]
        found.append(Traffic("soft masks", 1, gates * SUMS * INT64))
        if any(gate.pattern for gate in plan.gates):  # scores for the forward pass; scores and products for the update
            found.append(Traffic("n:m groups cut by ranks", 3, 3 * _cut_groups(plan, hosting)))
        return [traffic for traffic in found if traffic.bytes]
    ranked = sum(gate.pattern is None for gate in plan.gates)
    regularised = config.rule == "leap" and config.control == "paper"
    found = [
        Traffic("gate gradients", 1, (gates + units) * FP32),
        Traffic("thresholds", 1 + regularised, (1 + regularised) * gates * FP32),
        Traffic("finite scores", 1, INT32),
        Traffic("selection", NUM_SUMS, ranked * COUNTS * INT32),
        Traffic("masks of units", 1, -(-units // 8)),
    ]
    if len(plan.gates) > ranked:
        found.append(Traffic("n:m groups cut by ranks", 1, _cut_groups(plan, hosting)))
    measured = {False, config.measure == "parameters"}  # once more, with what follows the units
    if counts := sum(closed_form(plan, followers) is None for followers in measured):
        found.append(Traffic("kept weights", counts, counts * INT64))
    return [traffic for traffic in found if traffic.bytes]


def _cut_groups(plan: GatePlan, hosting: Hosting) -> int:
    """Bytes of the table of scores that ranks share, at most: every border between two ranks cuts a group."""
    patterned = [gate.pattern[1] for gate in plan.gates if gate.pattern]
    borders = (hosting.ranks - 1) * (len(patterned) if hosting.stage == 3 else 1)
    return borders * max(patterned) * FP32


def total(traffic: Iterable[Traffic], purpose: str) -> Traffic:
    """The sum of several, under one name."""
    parts = list(traffic)
    return Traffic(purpose, sum(t.collectives for t in parts), sum(t.bytes for t in parts))
