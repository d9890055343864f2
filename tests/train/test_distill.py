"""Distillation: each part of the loss by hand; padding and pruned heads left out; teachers that do not fit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig

from leap_dist.config.job_file import parse_job, parse_leap
from leap_dist.config.sections import DistillConfig
from leap_dist.errors import UserError
from leap_dist.models.plan import make_plan
from leap_dist.train.distill import Distiller, check_teacher, check_words, head_gates, match_layers
from leap_dist.zero.teacher import host_teacher
from tests.models.tiny import tiny
from tests.ranks import RankPools

HEAD = "AutoModelForSequenceClassification"


def model_of(seed: int, **changes: Any) -> Any:
    torch.manual_seed(seed)
    model = tiny("bert", HEAD, attention="eager", **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


class Hosted(nn.Module):
    """What a distiller uses of an engine: the model, its plan, and which units are left."""

    def __init__(self, model: nn.Module, gates: list[str]) -> None:
        super().__init__()
        self.module = model
        plan = make_plan(model, parse_leap({"target": 0.5, "gates": gates}))
        mask = torch.ones(plan.num_structured_units, dtype=torch.bool)
        self.leap = SimpleNamespace(plan=plan, gating=SimpleNamespace(unit_mask=mask))

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def distiller(student: nn.Module, teacher: Any, gates: list[str], **settings: Any) -> Distiller:
    config, hosted = DistillConfig(**settings).weighed(False, causal=False), Hosted(student, gates)
    layers = match_layers(config, student.config, teacher.config)
    heads = head_gates(student, hosted.leap.plan, None, len(layers))
    task: Any = SimpleNamespace(problem="single_label_classification")
    return Distiller(config, teacher, hosted, task, layers, heads)


def batch_of(padding: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 60, (3, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 9 - padding :] = 0 if padding else 1
    return {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}


def test_every_part_by_hand() -> None:
    student, teacher, batch = model_of(1), model_of(2), batch_of(padding=4)
    found = distiller(student, teacher, ["head"], alpha=0.7, temperature=3.0, hidden_weight=0.5, attention_weight=2.0)
    layer = found.engine.leap.plan.units(1)
    found.engine.leap.gating.unit_mask[layer] = torch.tensor([True, False, True, False])
    loss = found.loss(batch)
    shown = {"output_hidden_states": True, "output_attentions": True}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = student(**inputs, **shown), teacher(**inputs, **shown)
    p, q = (theirs.logits.double() / 3).softmax(-1), (ours.logits.double() / 3).softmax(-1)
    divergence = 9 * (p * (p / q).log()).sum(-1).mean()
    task = -ours.logits.double().log_softmax(-1)[torch.arange(3), batch["labels"]].mean()
    tokens = [(row, place) for row in range(3) for place in range(9) if batch["attention_mask"][row, place]]
    hidden, attention = 0.0, 0.0
    for number in range(2):
        a, b = ours.hidden_states[number + 1].double(), theirs.hidden_states[number + 1].double()
        hidden += sum(float(((a[t] - b[t]) ** 2).sum() / (b[t] ** 2).sum()) for t in tokens) / len(tokens) / 2
        heads = range(4) if number == 0 else (0, 2)
        a, b = ours.attentions[number].double(), theirs.attentions[number].double()
        each = [float(((a[row, h, place] - b[row, h, place]) ** 2).sum()) for row, place in tokens for h in heads]
        attention += sum(each) / len(each) / 2
    expected = 0.7 * (divergence + 0.5 * hidden + 2.0 * attention) + 0.3 * task
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)
    assert found.parts["loss_hidden"].item() == pytest.approx(0.5 * hidden, rel=1e-5)


def test_hidden_states_are_compared_in_the_dimensions_that_are_left() -> None:
    student, teacher, batch = model_of(1), model_of(2), batch_of(padding=4)
    found = distiller(student, teacher, ["head", "hidden"], hidden_weight=0.5)
    kept = torch.arange(32) % 3 != 1
    plan = found.engine.leap.plan
    stream = next(index for index, gate in enumerate(plan.gates) if gate.granularity == "hidden")
    found.engine.leap.gating.unit_mask[plan.units(stream)] = kept
    found.loss(batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours, theirs = (model(**inputs, output_hidden_states=True).hidden_states[1:] for model in (student, teacher))
    tokens = batch["attention_mask"].bool()
    pairs = [(a[tokens][:, kept], b[tokens][:, kept]) for a, b in zip(ours, theirs, strict=True)]
    each = [((a - b).square().sum(-1) / b.square().sum(-1)).mean() for a, b in pairs]
    assert found.parts["loss_hidden"].item() == pytest.approx(0.5 * float(sum(each)) / 2, rel=1e-5)


def test_a_student_that_is_its_teacher_has_the_tasks_loss_alone() -> None:
    model = model_of(1)
    found = distiller(model, model, ["element"], alpha=0.5)
    loss = found.loss(batch_of(padding=0))
    assert loss.item() == pytest.approx(0.5 * found.parts["loss_task"].item(), rel=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "distilbert", "gpt2", "llama"])
def test_attention_is_compared_before_dropout(model_type: str) -> None:
    """A student that is its teacher was told to be another, by up to p / (1 - p) of each weight."""
    keys = {"distilbert": "attention_dropout", "gpt2": "attn_pdrop", "llama": "attention_dropout"}
    none = dict.fromkeys(("hidden_dropout_prob", "dropout", "embd_pdrop", "resid_pdrop"), 0.0)
    drops = none | {keys.get(model_type, "attention_probs_dropout_prob"): 0.5}
    depth = {"gpt2": "n_layer", "distilbert": "n_layers"}.get(model_type, "num_hidden_layers")
    student = tiny(model_type, HEAD, attention="eager", **drops, **{depth: 1})
    teacher = copy.deepcopy(student).eval()
    found = distiller(student.train(), teacher, ["element"])
    found.loss(batch_of(padding=4)).backward()
    assert found.parts["loss_attention"].item() == pytest.approx(0.0, abs=1e-9)
    assert student(**batch_of(0), output_attentions=True).attentions[0].sum(-1).std() > 0.1  # dropout is on


def test_layers_are_spread_over_a_deeper_teacher() -> None:
    student, teacher = model_of(1), model_of(2, num_hidden_layers=6)
    assert match_layers(DistillConfig(), student.config, teacher.config) == [2, 5]
    assert match_layers(DistillConfig(layers=(0, 3)), student.config, teacher.config) == [0, 3]
    assert match_layers(DistillConfig(), teacher.config, student.config) == [0, 0, 0, 0, 1, 1]  # less deep than it
    for layers in ((1,), (0, 6)):
        with pytest.raises(
            UserError, match=r"^distill\.layers: got .*; allowed: 2 integers, each 0 to 5, one for each"
        ):
            match_layers(DistillConfig(layers=layers), student.config, teacher.config)


def test_teachers_that_do_not_fit_are_refused() -> None:
    student = model_of(1)
    for changes, match in (
        (
            {"hidden_size": 48},
            r"^distill\.hidden_weight: got 1\.0, but the teacher has hidden_size 48 and the model 32",
        ),
        (
            {"num_attention_heads": 2},
            r"^distill\.attention_weight: got 1\.0, but the teacher has num_attention_heads 2",
        ),
    ):
        with pytest.raises(UserError, match=match):
            match_layers(DistillConfig().weighed(False, causal=False), student.config, model_of(2, **changes).config)
    with pytest.raises(UserError, match=r'^distill\.teacher: got "big", which has 80 words; allowed: .* 64 words'):
        check_teacher("big", student.config, model_of(2, vocab_size=80).config)
    with pytest.raises(UserError, match=r'^distill\.teacher: got "big", which has 3 labels; allowed: .* 2 labels'):
        check_teacher("big", student.config, model_of(2, num_labels=3).config)
    check_words("big", {"a": 0, "b": 1}, {"b": 1, "a": 0, "c": 2})
    with pytest.raises(UserError, match=r"^distill\.teacher: got \"big\", where the token 'b' is 2, and 1 in the tok"):
        check_words("big", {"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 1, "b": 2})


def test_weights_that_nobody_gave() -> None:
    for encoder_decoder, causal, expected in ((False, False, (1, 1)), (False, True, (1, 0)), (True, True, (0, 0))):
        found = DistillConfig().weighed(encoder_decoder, causal)
        assert (found.hidden_weight, found.attention_weight) == expected
        given = DistillConfig(hidden_weight=0.5, attention_weight=2).weighed(encoder_decoder, causal)
        assert (given.hidden_weight, given.attention_weight) == (0.5, 2.0)


def test_the_distance_of_hidden_states_has_no_unit() -> None:
    """Of Gemma 3, whose hidden states are large, it was 9,000 beside a loss of 3."""
    student, teacher, found = model_of(1), model_of(2), []
    for scale in (1.0, 100.0):
        made = distiller(student, teacher, ["element"], attention_weight=0.0)
        states = [model(batch_of(0)["input_ids"], output_hidden_states=True) for model in (student, teacher)]
        for output in states:
            output.hidden_states = tuple(scale * state for state in output.hidden_states)
        found.append(made._hidden(*states, torch.ones(3, 9)).item())
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("key", ["hidden_weight", "attention_weight"])
def test_inner_states_of_an_encoder_and_a_decoder_are_refused(key: str) -> None:
    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1)
    weights = {"hidden_weight": 0.0, "attention_weight": 0.0}
    assert match_layers(DistillConfig(**weights), config, config) == [0]
    with pytest.raises(
        UserError, match=rf"^distill\.{key}: got 1\.0; a model of an encoder and a decoder .* set it to 0"
    ):
        match_layers(DistillConfig(**weights | {key: 1.0}), config, config)


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(UserError, match=r"distill\.alpha: got 0, with which a teacher has no effect; .* the section"):
        parse_job(JOB | {"distill": {"alpha": 0}})
    config, model = DistillConfig(layers=(0, 1), hidden_weight=0.0).weighed(False, causal=True), model_of(1)
    with pytest.raises(UserError, match=r"distill\.layers: got \[0, 1\], which has no effect where hidden_weight and"):
        match_layers(config, model.config, model.config)


def test_a_temperature_of_numbers_is_refused() -> None:
    model, task = model_of(1), SimpleNamespace(problem="regression")
    config = DistillConfig(temperature=3.0).weighed(False, causal=False)
    with pytest.raises(UserError, match=r"^distill\.temperature: got 3\.0; the answers of a regression .* remove it"):
        Distiller(config, model, Hosted(model, ["element"]), task, [0, 1], [None, None])  # type: ignore[arg-type]


def hosted_pair(stage: int) -> tuple[bool, bool]:
    """Whether a teacher that is the student answers as it does on a long text, in bf16, and keeps its buffers."""
    import leap_dist

    torch.manual_seed(0)
    model = tiny("llama", "AutoModelForCausalLM", max_position_embeddings=2048)
    copied = copy.deepcopy(model)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "leap": {"target": 0.5, "total_steps": 10},
    }
    engine, *_ = leap_dist.initialize(model=model, config=config, optimizer=torch.optim.AdamW(model.parameters()))
    teacher, words = host_teacher(copied, engine), torch.arange(2000)[None] % 60
    engine.eval()
    with torch.no_grad():
        same = torch.equal(engine(words).logits, teacher(words).logits)
    frequencies = all(b.dtype == torch.float32 for name, b in copied.named_buffers() if "inv_freq" in name)
    engine.destroy()
    return same, frequencies


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_teacher_in_bf16_turns_words_as_the_student_does(ranks: RankPools, stage: int) -> None:
    """Frequencies of positions in bf16 gave a teacher other than the student: KL 0.02 at 2,000 words."""
    assert ranks(2).run(hosted_pair, stage) == [(True, True)] * 2


JOB: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "model": {
        "from_config": {
            "model_type": "bert",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 32,
            "max_position_embeddings": 16,
        }
    },
    "data": {"task": "builtin/clock"},
    "train": {"max_steps": 12, "learning_rate": 1e-3, "log_every": 6, "eval_batch_size": 512},
    "leap": {"target": 0.5, "gates": ["head", "neuron"]},
    "distill": {"teacher": "self"},
    "tracking": {"mlflow_uri": None},
}


def run(stage: int, folder: str) -> dict[str, Any]:
    from leap_dist.train.loop import run_job
    from tests.checkpoint.test_checkpoints import this_rank

    config = parse_job({**JOB, "zero_optimization": {"stage": stage}})
    return run_job(config, Path(folder), False, this_rank())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_job_with_a_teacher_on_two_ranks(ranks: RankPools, tmp_path: Path, stage: int) -> None:
    certificate = ranks(2).run(run, stage, str(tmp_path / "run"))[0]
    assert abs(certificate["kept"] - 0.5 * certificate["prunable"]) <= certificate["unit"]
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["loss_hidden"] > 0 and last["loss_attention"] > 0 and last["loss_kl"] >= 0
    parts = last["loss_kl"] + last["loss_hidden"] + last["loss_attention"]
    assert last["loss"] == pytest.approx(0.9 * parts + 0.1 * last["loss_task"], rel=1e-4)
