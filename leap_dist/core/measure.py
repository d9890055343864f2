"""What the target is a share of: prunable weights, all parameters of the model, the FLOPs or the latency of a pass.

An amount is `fixed`, which no gate can remove, plus that of what is kept: a weight counts one, and with it comes what
follows its unit. FLOPs are counted in those of one weight, so that a weight counts one there too; of latency all that
gates cover is as much as their weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from leap_dist.core.gates import GatePlan
from leap_dist.errors import UserError

MeasureName = Literal["weights", "parameters", "flops", "latency"]


SAID = {"parameters": "share of the model's parameters", "flops": "share of the FLOPs of a forward pass"}
SAID |= {"weights": "density", "latency": "share of the dense model's latency"}


def said_of(certificate: Mapping[str, Any]) -> str:
    """What the target of a certificate is, in words."""
    return SAID[certificate["measure"]["name"] if certificate.get("measure") else "weights"]


@dataclass(frozen=True)
class Measure:
    """target: the share that the user asks for. products: by gate, what a unit takes beside its weights
    ("flops"), or in place of them, less these ("latency").

    "parameters" counts the biases that follow their units, as the masks say; "weights" counts prunable weights alone.
    """

    name: MeasureName = "weights"
    target: float = 1.0
    fixed: float = 0.0
    products: tuple[float, ...] = ()

    def unit(self, plan: GatePlan, gate: int) -> float:
        """The amount of a gate's largest unit."""
        sizes = plan.gates[gate].unit_size
        followers = max(plan.gates[gate].follower_sizes) if self.name == "parameters" else 0
        return sizes + followers + (self.products[gate] if self.products else 0)

    def grain(self, plan: GatePlan, group: Sequence[int]) -> float:
        """What comes or goes at least when the kept count of tied gates changes."""
        return sum(self.unit(plan, gate) * plan.gates[gate].multiple_of for gate in group)

    def largest(self, plan: GatePlan) -> float:
        """The grain to which the target can be exact."""
        return max((self.grain(plan, group) for group in plan.tied), default=1)

    def removable(self, plan: GatePlan) -> float:
        """All that gates cover."""
        if self.name == "parameters":
            return sum(map(plan.numel, plan.covers))
        return plan.prunable + self.of_products([gate.num_units for gate in plan.gates])

    def of_products(self, keep: Sequence[int]) -> float:
        """What kept units take beside their weights."""
        return sum(each * number for each, number in zip(self.products, keep, strict=True)) if self.products else 0

    def linear(self, plan: GatePlan) -> bool:
        """Whether the amount is a sum over gates of what each kept unit takes."""
        alike = all(len(gate.follower_sizes) == 1 for gate in plan.gates) if self.name == "parameters" else True
        return plan.linear and alike

    def share(self, plan: GatePlan) -> float:
        """The part of what gates cover that is to be kept, at least a trace."""
        if self.name == "weights":
            return self.target
        removable = self.removable(plan)
        return max((self.target * (self.fixed + removable) - self.fixed) / removable, 1e-6)

    def described(self) -> dict[str, Any]:
        """For a certificate, from which `amounts` counts; nothing of prunable weights."""
        return {} if self.name == "weights" else {"measure": {"name": self.name, "fixed": self.fixed}}


def fewest_units(plan: GatePlan) -> list[int]:
    """The lowest kept counts of all gates."""
    return [gate.lowest for gate in plan.gates]


def most_units(plan: GatePlan) -> list[int]:
    """The highest: an n:m pattern keeps no more than it says."""
    return [gate.lowest if gate.pattern else gate.num_units for gate in plan.gates]


def check_reachable(plan: GatePlan, measure: Measure, lowest: float, highest: float) -> None:
    """Raise UserError if the target is below or above what the gates allow, in what the measure counts of them."""
    total, unit, what = measure.fixed + measure.removable(plan), measure.largest(plan), SAID[measure.name]
    asked = measure.target * total - measure.fixed
    if lowest - asked > unit:
        beside = f", of which {measure.fixed / total:.4f} is in no gate" if measure.fixed else ""
        raise UserError(
            f"leap.target: {measure.target} cannot be reached: with the fewest units that every gate keeps the lowest "
            f"possible {what} is {(measure.fixed + lowest) / total:.4f}{beside}; raise the target, lower min_keep "
            "or multiple_of, or choose finer gates in leap.gates"
        )
    if asked - highest > unit:
        raise UserError(
            f"leap.target: {measure.target} cannot be reached: with its n:m pattern the highest possible {what} is "
            f"{(measure.fixed + highest) / total:.4f}; lower the target to it"
        )


def amounts(counts: Mapping[str, Any], measure: Mapping[str, Any] | None) -> tuple[float, float]:
    """(kept, all) of what a measure counts, from the counts of a certificate (core/counting.py)."""
    if measure is None:
        return counts["kept"], counts["prunable"]
    if measure["name"] == "parameters":
        kept, covered = (sum(tensor[key] for tensor in counts["tensors"].values()) for key in ("kept", "numel"))
        return measure["fixed"] + kept, measure["fixed"] + covered
    products = [(gate["kept_units"], gate["units"], gate["products"]) for gate in counts["gates"]]
    kept = counts["kept"] + sum(kept * each for kept, _, each in products)
    return measure["fixed"] + kept, measure["fixed"] + counts["prunable"] + sum(n * each for _, n, each in products)
