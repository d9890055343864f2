"""What the small files of a run folder are made of, as far as anything here relies on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Histogram = Annotated[list[Count], Field(min_length=40, max_length=40)]
MOST_DRAWN = 2**16  # units of a gate that are drawn one by one


class Part(BaseModel):
    """Of a file only what is relied on is checked; the rest is kept as it is."""

    model_config = ConfigDict(extra="allow", frozen=True)


PartT = TypeVar("PartT", bound=Part)


class GateCount(Part):
    """One gate: what its units are, and the tensors whose weights it prunes."""

    name: str = ""
    granularity: str
    tensors: list[str]
    kept: int
    prunable: int
    density: float


class TensorCount(Part):
    """One masked tensor. `zeros_kept`: its weights that are kept and yet exactly zero."""

    shape: list[int]
    kept: int
    zeros_kept: int
    numel: int
    density: float
    counted: bool


class Measured(Part):
    """What a target is a share of, where that is not the prunable weights; fixed: of it what is in no gate."""

    name: Literal["parameters", "flops", "latency"]
    fixed: Annotated[float, Field(ge=0)]


class Certificate(Part):
    """certificate.json, as export/certificate.py builds it."""

    target: float
    density: float
    unit: float
    measure: Measured | None = None
    kept: int
    prunable: int
    metrics: dict[str, dict[str, float | None]]
    gates: list[GateCount]
    tensors: dict[str, TensorCount]
    masks_sha256: Sha256
    weights_sha256: Sha256
    seed: int
    versions: dict[str, str | None]
    permuted: bool | str = False


class Job(Part):
    """config.json, of which a page shows some."""

    leap: dict[str, Any] = {}
    data: dict[str, Any] = {}
    model: dict[str, Any] = {}


class Scored(Part):
    """A gate in scores.json, as core/histograms.py describes it."""

    name: str
    granularity: str
    units: Count
    kept_units: Count
    kept: Histogram
    removed: Histogram
    which: Annotated[list[Count], Field(max_length=MOST_DRAWN)] = []

    @model_validator(mode="after")
    def _few(self) -> Scored:
        if self.which and self.units > MOST_DRAWN:
            raise ValueError(f"units are drawn one by one; allowed: at most {MOST_DRAWN}")
        return self


class Scores(Part):
    """scores.json."""

    reach: Annotated[float, Field(gt=0, le=1e6)]
    gates: list[Scored]


class After(Part):
    after: float


class Card(Part):
    """card.json, as export/card.py writes it."""

    kind: str
    bytes: After
    parameters: After | None
    latency: list[After]
