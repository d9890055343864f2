"""A language model's head that judges words by chunks of tokens, in place of giving all logits at once.

While a model is called here, its head's forward pass is another: it sees the hidden states, and what it gives is taken
from where the model has its logits. Anything that hosts the head (ZeRO-3 gathers its weight) sees a plain call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from leap_dist.ops.words import Head, Teaching, judge_words, word_loss

logger = logging.getLogger(__name__)

Batch = Mapping[str, Tensor]
LOOKED_AT = 16  # tokens that both ways judge, to see that they agree
NUMBER = 5.0  # that a cap would make smaller
_FITS: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class WordHead:
    """The head of `model`, a module or the engine that hosts one; `causal`: a token is predicted by the one before."""

    def __init__(self, model: Any, causal: bool) -> None:
        self.model, self.causal = model, causal
        self.module: Any = getattr(model, "module", model)
        self._cap = getattr(getattr(self.module, "config", None), "final_logit_softcapping", None)

    def fits(self, batch: Batch) -> bool:
        """Whether the model's logits are one matrix product, which chunks can make; looked at once. Collective."""
        if not isinstance(self.module, nn.Module):
            return False
        if self.module not in _FITS:
            _FITS[self.module] = self._can() and self._agrees(batch)
            if not _FITS[self.module]:
                name = type(self.module).__name__
                logger.warning("the head of %s is not a plain matrix product: its loss takes all logits at once", name)
        return _FITS[self.module]

    def loss(self, batch: Batch, teaching: Teaching | None = None, **shown: bool) -> tuple[Tensor, Tensor, Any]:
        """(loss, its parts by labels and by the teacher, the model's output without logits)."""
        parts: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            kept, labels = self._pairs(hidden, batch["labels"])
            loss, both = word_loss(kept.flatten(0, 1), labels.flatten(), self._head(), teaching)
            parts.append(both)
            return loss.expand(*hidden.shape[:2], 1)

        output = self._call(batch, forward, **shown)
        return output.logits[0, 0, 0], parts[0], output

    def judge(self, batch: Batch) -> Tensor:
        """(batch, tokens, 2): cross entropy and whether the word is right, of the tokens that labels ask for."""

        def forward(hidden: Tensor) -> Tensor:
            kept, labels = self._pairs(hidden, batch["labels"])
            return judge_words(kept.flatten(0, 1), labels.flatten(), self._head()).view(*labels.shape, 2)

        judged: Tensor = self._call(batch, forward).logits
        return judged

    @torch.no_grad()
    def teaching(self, batch: Batch, temperature: float, alpha: float, **shown: bool) -> tuple[Teaching, Any]:
        """What this model, a teacher, says of a batch's tokens, made when it is asked for; and its output."""
        kept: list[Tensor] = []

        def forward(hidden: Tensor) -> Tensor:
            kept.append(self._pairs(hidden, batch["labels"])[0].flatten(0, 1))
            return hidden[..., :1]

        output, head = self._call(batch, forward, **shown), self._head()
        return Teaching(lambda part: head.logits(kept[0][part]), temperature, alpha), output

    def _pairs(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states and the labels that they are for."""
        return (hidden[:, :-1].contiguous(), labels[:, 1:]) if self.causal else (hidden, labels)

    def _head(self) -> Head:
        head = self.module.get_output_embeddings()
        return Head(head.weight, head.bias, self._cap)

    def _call(self, batch: Batch, forward: Callable[[Tensor], Tensor], **shown: bool) -> Any:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with _head_with(self.module, forward):
            return self.model(**inputs, **shown)

    def _can(self) -> bool:
        """In fp16 gradients need their scale from the start; a router's loss is more than that of words."""
        head = getattr(self.module, "get_output_embeddings", lambda: None)()
        other = getattr(self.model, "is_compiled", False) or getattr(self.module.config, "output_router_logits", False)
        return type(head) is nn.Linear and head.weight.dtype is not torch.float16 and not other

    @torch.no_grad()
    def _agrees(self, batch: Batch) -> bool:
        """Whether both ways judge the first tokens alike, and nothing follows the head: a number comes out as it is."""
        few = {key: value[:1, :LOOKED_AT] for key, value in batch.items() if value.dim() > 1}
        training = self.module.training
        self.model.eval()
        try:
            logits = self.model(**{key: value for key, value in few.items() if key != "labels"}).logits.float()
            words = logits.argmax(-1)
            labels = torch.cat([words[:, :1], words[:, :-1]], dim=1) if self.causal else words
            try:
                number = self._call(few, lambda hidden: torch.full_like(hidden[..., :1], NUMBER)).logits
                judged = self.judge({**few, "labels": labels})
            except RuntimeError:  # what follows the head takes logits alone: ESM adds a bias of the vocabulary's size
                return False
        finally:
            self.model.train(training)
        own = -logits.log_softmax(-1).amax(-1)[:, : judged.shape[1]]
        if (number != NUMBER).any():  # a cap, as RecurrentGemma has it, that would go over losses
            return False
        return judged.shape[:2] == own.shape and torch.allclose(judged[..., 0], own, rtol=1e-2, atol=1e-3)


@contextmanager
def _head_with(model: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The model's head gives what `forward` makes of its input; softcapping is left to that."""
    head, config = model.get_output_embeddings(), model.config
    cap, before = getattr(config, "final_logit_softcapping", None), vars(head).get("forward")
    head.forward = forward
    if cap is not None:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        del head.forward
        if before is not None:
            head.forward = before
        if cap is not None:
            config.final_logit_softcapping = cap
