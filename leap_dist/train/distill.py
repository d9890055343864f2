"""Distillation: a dense teacher's answers, hidden states and attention, beside the task's own loss.

loss = alpha (KL t^2 + w_h D(hidden) + w_a MSE(attention)) + (1 - alpha) task, as the published runs of LEAP's first
version combined them, with a relative D for their MSE, which is some 1e4 for hidden states of Gemma 3. Padding, pruned
heads and pruned dimensions take no part in the squared distances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from leap_dist.config.family import FamilyConfig
from leap_dist.config.sections import DistillConfig
from leap_dist.core.gates import GatePlan
from leap_dist.errors import UserError
from leap_dist.models.blocks import find_structures
from leap_dist.ops.words import IGNORED
from leap_dist.tasks.base import Task
from leap_dist.tasks.head import WordHead

Batch = Mapping[str, Tensor]
TINY = torch.finfo(torch.float32).tiny
ANSWERS = ("labels", "start_positions", "end_positions")  # of a batch; a teacher is not asked for its loss


class Distiller:
    """Computes the loss of a student, hosted by `engine`, beside a teacher in evaluation mode.

    config: `weighed`, so that its weights are numbers.
    layers: the teacher's layer for each of the student's (`match_layers`); heads: their gates (`head_gates`).
    `parts` holds the parts of the last loss, detached: "loss_task", "loss_kl", "loss_hidden", "loss_attention".
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Callable[..., Any],
        engine: Any,
        task: Task,
        layers: Sequence[int],
        heads: Sequence[int | None],
    ) -> None:
        self.config, self.teacher, self.engine, self.task = config, teacher, engine, task
        self._weight_of_hidden, self._weight_of_attention = _numbers(config)
        self.layers, self._heads = list(layers), list(heads)
        if task.problem == "regression" and config.temperature != DistillConfig().temperature:
            raise UserError(
                f"distill.temperature: got {config.temperature}; the answers of a regression are numbers, which "
                "nothing softens: remove it"
            )
        causal = task.problem == "causal_lm"
        sharded = isinstance(getattr(teacher, "module", None), nn.Module)  # its head is whole in its own pass alone
        by_chunks = task.problem in ("causal_lm", "masked_lm") and not sharded
        self._words = WordHead(engine, causal) if by_chunks else None
        self._teacher_words = WordHead(teacher, causal)
        self.parts: dict[str, Tensor] = {}

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch with labels; a scalar."""
        of_hidden, of_attention = self._weight_of_hidden, self._weight_of_attention
        shown = {"output_hidden_states": of_hidden > 0, "output_attentions": of_attention > 0}
        by_chunks = self._words is not None and self._words.fits(batch) and self._teacher_words.fits(batch)
        undropped = Undropped()
        with undropped if of_attention else nullcontext():
            loss, parts, student, teacher = self._by_chunks(batch, shown) if by_chunks else self._whole(batch, shown)
        mask = batch["attention_mask"] if "attention_mask" in batch else torch.ones_like(batch["input_ids"])
        inside: dict[str, Tensor] = {}
        if of_hidden:
            inside["loss_hidden"] = of_hidden * self._hidden(student, teacher, mask)
        if of_attention:
            seen = [undropped.before(each) for each in student.attentions]
            inside["loss_attention"] = of_attention * self._attention(seen, teacher.attentions, mask)
        self.parts = {name: part.detach().float() for name, part in {**parts, **inside}.items()}
        return loss + self.config.alpha * sum(inside.values())

    def _by_chunks(self, batch: Batch, shown: dict[str, bool]) -> tuple[Tensor, dict[str, Tensor], Any, Any]:
        """The loss by labels and by the teacher's answers, its two parts, and both outputs, without all logits."""
        assert self._words is not None
        teaching, teacher = self._teacher_words.teaching(batch, self.config.temperature, self.config.alpha, **shown)
        loss, (task, divergence), student = self._words.loss(batch, teaching, **shown)
        return loss, {"loss_task": task, "loss_kl": divergence}, student, teacher

    def _whole(self, batch: Batch, shown: dict[str, bool]) -> tuple[Tensor, dict[str, Tensor], Any, Any]:
        """The same from all logits at once."""
        student, alpha = self.engine(**batch, **shown), self.config.alpha
        with torch.no_grad():
            teacher = self.teacher(**{key: value for key, value in batch.items() if key not in ANSWERS}, **shown)
        parts = {"loss_task": student.loss, "loss_kl": self._divergence(student, teacher, batch)}
        return alpha * parts["loss_kl"] + (1.0 - alpha) * parts["loss_task"], parts, student, teacher

    def _divergence(self, student: Any, teacher: Any, batch: Batch) -> Tensor:
        """KL t^2 of the answers, a mean over examples or labelled tokens; squared distance where they are numbers."""
        if self.task.problem == "regression":
            return F.mse_loss(student.logits.float(), teacher.logits.float())
        names = ("start_logits", "end_logits") if hasattr(student, "start_logits") else ("logits",)
        pairs = [(getattr(student, name).float(), getattr(teacher, name).float()) for name in names]
        if pairs[0][0].dim() == 3:  # a language model: only what has a label is asked for
            if self.task.problem == "causal_lm":  # a token is predicted by the one before
                pairs = [(ours[:, :-1], theirs[:, :-1]) for ours, theirs in pairs]
            labels = batch["labels"][:, 1:] if self.task.problem == "causal_lm" else batch["labels"]
            asked = labels != IGNORED
            pairs = [(ours[asked], theirs[asked]) for ours, theirs in pairs]
        t = self.config.temperature
        values = [
            F.kl_div((ours / t).log_softmax(-1), (theirs / t).log_softmax(-1), reduction="batchmean", log_target=True)
            for ours, theirs in pairs
        ]
        return torch.stack(values).mean() * t * t

    def _hidden(self, student: Any, teacher: Any, mask: Tensor) -> Tensor:
        """Squared distance of the hidden states after each layer, of every token over the teacher's squared length (so
        that it has no unit: SquareHead, arXiv 2310.06927); its mean over tokens that are no padding. In the dimensions
        that are not pruned.
        """
        tokens, kept = mask.bool(), self._kept_dimensions()
        distances = []
        for ours, theirs in enumerate(self.layers):
            pair = (student.hidden_states[ours + 1], teacher.hidden_states[theirs + 1])
            a, b = (states[tokens].float() if kept is None else states[tokens][:, kept].float() for states in pair)
            distances.append(((a - b).square().sum(-1) / b.square().sum(-1).clamp(min=TINY)).mean())
        return torch.stack(distances).mean()

    def _kept_dimensions(self) -> Tensor | None:
        """Which dimensions of the residual stream are not pruned, bool (width,); None where no gate covers it."""
        leap = self.engine.leap
        gate = next((i for i, gate in enumerate(leap.plan.gates) if gate.granularity == "hidden"), None)
        return None if gate is None else leap.gating.unit_mask[leap.plan.units(gate)]

    def _attention(self, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Squared distance of the attention weights of a query, summed over keys; its mean over queries and heads left.

        Attention weights have shape (batch, heads, queries, keys).
        """
        queries = mask.bool()
        distances = []
        for ours, theirs in enumerate(self.layers):
            difference = student[ours].float() - teacher[theirs].float()
            each = difference.square().sum(-1).transpose(1, 2)[queries]  # (queries, heads)
            kept = self._kept_heads(ours, each.shape[1]).to(each.device)
            distances.append(each[:, kept].mean() if kept.any() else each.sum() * 0.0)
        return torch.stack(distances).mean()

    def _kept_heads(self, layer: int, num_heads: int) -> Tensor:
        """Which query heads of a layer are not pruned, bool (num_heads,)."""
        gate = self._heads[layer]
        if gate is None:
            return torch.ones(num_heads, dtype=torch.bool)
        leap = self.engine.leap
        units = leap.gating.unit_mask[leap.plan.units(gate)].cpu()
        return units.repeat_interleave(num_heads // len(units))


def _numbers(config: DistillConfig) -> tuple[float, float]:
    """(hidden_weight, attention_weight)."""
    hidden, attention = config.hidden_weight, config.attention_weight
    assert hidden != "auto" and attention != "auto", "DistillConfig.weighed makes numbers of them"
    return hidden, attention


class Undropped(TorchFunctionMode):
    """While it is entered, remembers what attention weights were before dropout, after which models show them.

    A student that equals its teacher would be pulled away from it by weights that dropout has scaled or set to 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.dropout and result.dim() == 4 and result.requires_grad:
            self._before[id(result)] = result, args[0]
        return result

    def before(self, weights: Tensor) -> Tensor:
        """Attention weights of any shape; as they are where no dropout was applied to them last."""
        return self._before.get(id(weights), (weights, weights))[1]


def head_gates(model: nn.Module, plan: GatePlan, family: FamilyConfig | None, num_layers: int) -> list[int | None]:
    """For each layer the gate of its attention heads, None where they have none."""
    index = {gate.name: number for number, gate in enumerate(plan.gates)}
    blocks = [s for s in find_structures(model, family) if s.kind == "head" and s.role == "attention"]
    found = [index.get(f"{block.name}:head") for block in blocks]
    return found if len(found) == num_layers else [None] * num_layers


def match_layers(config: DistillConfig, ours: Any, theirs: Any) -> list[int]:
    """The teacher's layer for each of ours, by the configs of both. Raises UserError where the two do not fit."""
    encoder_decoder = ours.is_encoder_decoder
    ours, theirs = ours.get_text_config(), theirs.get_text_config()
    depth, teacher_depth = ours.num_hidden_layers, theirs.num_hidden_layers
    if config.layers == "auto":
        layers = [max(round((layer + 1) * teacher_depth / depth) - 1, 0) for layer in range(depth)]
    else:
        layers = list(config.layers)
    if len(layers) != depth or not all(0 <= layer < teacher_depth for layer in layers):
        raise UserError(
            f"distill.layers: got {list(layers)}; allowed: {depth} integers, each 0 to {teacher_depth - 1}, one "
            'for each layer of the model, or "auto"'
        )
    if config.layers != "auto" and not (config.hidden_weight or config.attention_weight):
        raise UserError(
            f"distill.layers: got {layers}, which has no effect where hidden_weight and attention_weight are 0: "
            "remove it"
        )
    for key in ("hidden_weight", "attention_weight"):
        if getattr(config, key) and encoder_decoder:
            raise UserError(
                f"distill.{key}: got {getattr(config, key)}; a model of an encoder and a decoder is taught by the "
                "teacher's answers alone: set it to 0"
            )
    for key, size in (("hidden_weight", "hidden_size"), ("attention_weight", "num_attention_heads")):
        if getattr(config, key) and getattr(ours, size) != getattr(theirs, size):
            raise UserError(
                f"distill.{key}: got {getattr(config, key)}, but the teacher has {size} {getattr(theirs, size)} and "
                f"the model {getattr(ours, size)}; set it to 0, or choose another teacher"
            )
    return layers


def check_words(name: str, ours: Mapping[str, int], theirs: Mapping[str, int]) -> None:
    """Raises UserError for a teacher whose tokenizer gives a token another id; by the vocabularies of both."""
    other = next((token for token, number in ours.items() if theirs.get(token, number) != number), None)
    if other is not None:
        raise UserError(
            f'distill.teacher: got "{name}", where the token {other!r} is {theirs[other]}, and {ours[other]} in the '
            "tokenizer of the job; allowed: a teacher with the same tokenizer"
        )


def check_teacher(name: str, ours: Any, theirs: Any) -> None:
    """Raises UserError for a teacher that speaks of other words or other labels; by the configs of both models."""
    for key, what in (("vocab_size", "words"), ("num_labels", "labels")):
        here, there = (getattr(config.get_text_config(), key, None) for config in (ours, theirs))
        if here != there:
            raise UserError(
                f'distill.teacher: got "{name}", which has {there} {what}; allowed: a teacher with the {here} {what} '
                "of the model"
            )
