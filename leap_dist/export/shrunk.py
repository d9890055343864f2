"""The models of a run: dense, masked (zeros in place) and shrunk (zeros gone); the last two must agree."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from leap_dist.errors import UserError
from leap_dist.export.hf import load_exported, load_exported_tokenizer
from leap_dist.export.latency import keeps_logits
from leap_dist.models.flops import LENGTH, max_length
from leap_dist.models.kept import compute_among_kept
from leap_dist.models.outputs import example_inputs, logit_difference
from leap_dist.models.pruned_folder import as_stock, load_pruned, save_shrunk
from leap_dist.models.shrink import shrink_
from leap_dist.run_folder import ExportedWeights, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHRUNK_TOLERANCE = 1e-5  # relative to the largest logit, fp32
CHECKED_BATCHES = (1, 3)
MOST_LOGITS = 2**24  # compared at once
Say = Callable[[str, float], None]


def silent(text: str, work: float) -> None:
    """Says nothing."""


class Models:
    """A run's models in fp32 on the CPU, each built when it is first asked for."""

    def __init__(self, run: Run, say: Say = silent, folder: Path | None = None) -> None:
        """`say`: what is called before a step that may take long, with its text and its work in tokens.

        folder: the run's model with fewer tokens, where its vocabulary was cut.
        """
        self.run, self.say, self.folder, self.cut = run, say, folder or run.model, folder not in (None, run.model)
        self.kept: dict[str, list[int]] = {}
        self.difference = 0.0

    @cached_property
    def masked(self) -> PreTrainedModel:
        """The exported weights with their zeros, computing as it was trained. UserError if they take no texts."""
        model = load_exported(self.folder)
        if model.main_input_name != "input_ids":
            raise UserError(
                f"{self.folder}: {type(model).__name__} takes {model.main_input_name}; allowed: models of texts, which "
                "take input_ids; export one of those"
            )
        compute_among_kept(model, ["expert"], self.run.certificate.tensors, self.run.family)
        return model

    @cached_property
    def dense(self) -> PreTrainedModel:
        """The original architecture with every weight there, at random: only its time is of interest."""
        config = type(self.masked.config).from_pretrained(self.run.model)
        with torch.random.fork_rng(devices=[]):
            return type(self.masked)(config).eval()

    @cached_property
    def shrunk(self) -> PreTrainedModel:
        """The model without its dead units. RuntimeError if it does not compute what the masked one does."""
        self.say("removing units", 0.0)
        model = load_exported(self.folder)
        self.kept = shrink_(model, self.run.family)
        self._check(model)
        return model

    @cached_property
    def stock(self) -> PreTrainedModel | None:
        """The shrunk model as transformers alone loads it, with the same tensors; None where no config describes it."""
        model = self.shrunk
        return as_stock(model, self.kept, self.run.family)

    @cached_property
    def saved_dtype(self) -> torch.dtype:
        """The type of the weights in the folder."""
        with ExportedWeights(self.folder) as weights:
            return weights.read(weights.names()[0]).dtype

    @cached_property
    def dtype(self) -> torch.dtype:
        """In which the shrunk model is written: as the run saved it, if that holds its weights exactly.

        A narrower stream changes those of norms; then it is fp32.
        """
        saved = self.saved_dtype
        exact = all(torch.equal(weight.to(saved).float(), weight) for weight in self.shrunk.parameters())
        return saved if exact else torch.float32

    @property
    def length(self) -> int:
        """Tokens of an example to measure with."""
        return min(LENGTH, max_length(self.masked))

    def save_shrunk(self, folder: Path) -> bool:
        """Write the shrunk model as a folder that `load_pruned` reads; whether stock AutoModel reads it too.

        RuntimeError if what `load_pruned` reads there does not compute what the masked model does.
        """
        model = self.shrunk
        self.say("writing the model, and reading it again", 0.0)
        tokenizer = load_exported_tokenizer(self.folder)
        extra = {"certificate": self.run.digest}
        _cast_(model, self.dtype)
        manifest = save_shrunk(model, self.kept, folder, tokenizer, self.run.family, extra)
        _cast_(model, torch.float32)
        self._check(load_pruned(folder).float())
        return manifest.stock

    def difference_of(self, model: PreTrainedModel) -> float:
        """The largest difference of its logits from the masked model's. RuntimeError if it is no number."""
        found = largest_difference(self.masked, model, self.say)
        if not found < float("inf"):
            raise RuntimeError(f"{self.run.model}: its logits are no numbers (NaN, inf); it was not exported")
        return found

    def _check(self, shrunk: PreTrainedModel) -> None:
        self.difference = largest_difference(self.masked, shrunk, self.say)
        if not self.difference <= SHRUNK_TOLERANCE:
            raise RuntimeError(
                f"{self.run.model}: the logits of the shrunk model differ from the masked one's by "
                f"{self.difference:.3g} of the largest, allowed {SHRUNK_TOLERANCE:g}; it was not exported"
            )


def _cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The weights alone: buffers, such as the frequencies of rotary embeddings, are fp32 in every model."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def largest_difference(masked: PreTrainedModel, other: PreTrainedModel, say: Say = silent) -> float:
    """Largest difference of logits, relative to the largest logit, over random inputs of several sizes."""
    sizes, values = compared_sizes(masked), []
    for number, (batch, length) in enumerate(sizes, start=1):
        say(f"comparing logits with the masked model's, {number} of {len(sizes)}", 2 * batch * length)
        inputs = example_inputs(masked, batch, length) | _some_logits(masked, batch, length)
        values.append(logit_difference(masked, other, inputs))
    return float(np.max(values))  # max() would lose NaN


def compared_sizes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(batch, length) of the inputs on which two models are compared."""
    longest = min(LENGTH, max_length(model))
    return [(batch, length) for batch in CHECKED_BATCHES for length in sorted({1, (longest + 1) // 2, longest})]


def _some_logits(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Of a language model with a large vocabulary only as many tokens as MOST_LOGITS allow, spread over the text."""
    most = max(MOST_LOGITS // (batch * model.config.get_text_config().vocab_size), 2)
    if most >= length or not keeps_logits(model):
        return {}
    return {"logits_to_keep": torch.linspace(0, length - 1, most).long()}
