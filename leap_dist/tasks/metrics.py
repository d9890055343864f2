"""How classes and scores are judged: metrics by name, from torchmetrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from leap_dist.tasks.base import Batch

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


@dataclass(frozen=True)
class LabelEvaluation:
    """One label for each example: a class id, or (`regression`) a number."""

    metrics: tuple[str, ...]
    num_labels: int
    regression: bool = False

    def predict(self, model: Callable[..., Any], batch: Batch) -> dict[str, Tensor]:
        """prediction (argmax or raw value), label and loss, each (batch,)."""
        label = batch["labels"]
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.float()
        if self.regression:
            value = logits.squeeze(-1)
            return {"prediction": value, "label": label, "loss": (value - label) ** 2}
        loss = F.cross_entropy(logits, label, reduction="none")
        return {"prediction": logits.argmax(-1), "label": label, "loss": loss}

    def score(self, split: str, kept: Mapping[str, Tensor]) -> dict[str, float]:
        """The metrics, and the mean loss."""
        metrics = make_metrics(self.metrics, self.num_labels)
        metrics.update(kept["prediction"], kept["label"])
        values = {name: float(value) for name, value in metrics.compute().items()}
        return values | {"loss": kept["loss"].mean().item()}


def make_metrics(names: Sequence[str], num_labels: int) -> MetricCollection:
    """The named metrics; `update(preds, target)` takes class ids, or raw scores for the correlations."""
    from torchmetrics import MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
    from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef

    make: dict[str, Callable[[], Any]] = {
        "accuracy": lambda: MulticlassAccuracy(num_labels, average="micro"),
        "f1": BinaryF1Score,
        "matthews": lambda: MulticlassMatthewsCorrCoef(num_labels),
        "pearson": PearsonCorrCoef,
        "spearman": SpearmanCorrCoef,
    }
    return MetricCollection({name: make[name]() for name in names})
