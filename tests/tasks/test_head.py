"""Heads that judge words by chunks: the loss and the gradients of plain transformers, hosted or not, or said."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from leap_dist.ops import words
from leap_dist.ops.words import IGNORED
from leap_dist.tasks.head import WordHead
from tests.models.tiny import tiny
from tests.ranks import RankPools

CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"


def batch_of(rows: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 60, (rows, 9), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, IGNORED)}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "CHUNK", 5 * 64)


@pytest.mark.parametrize(
    ("kind", "head", "changes"),
    [
        ("gpt2", CAUSAL, {}),
        ("llama", CAUSAL, {}),
        ("opt", CAUSAL, {}),
        ("gemma2", CAUSAL, {"final_logit_softcapping": 2.0, "attention": "eager"}),
        ("gemma3_text", CAUSAL, {}),
        ("qwen3_moe", CAUSAL, {}),
        ("bert", MASKED, {}),
        ("distilbert", MASKED, {}),
    ],
)
def test_loss_and_gradients_are_those_of_transformers(kind: str, head: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = tiny(kind, head, **changes).train(False)
    batch, asked = batch_of(), WordHead(model, head == CAUSAL)
    expected = model(**batch).loss
    expected.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert asked.fits(batch)
    loss, _, output = asked.loss(batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    assert output.logits.shape[-1] == 1  # and no more
    for name, parameter in model.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)
    plain = model(**batch)
    assert plain.logits.shape[-1] == 64 and torch.equal(plain.loss, expected)  # the model is as it was


def test_a_head_that_does_more_is_left_to_itself(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(1)
    model = CohereForCausalLM(CohereConfig(vocab_size=64, logit_scale=0.25, eos_token_id=2, **sizes)).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
    asked = WordHead(model, causal=True)
    with caplog.at_level(logging.WARNING, logger="leap_dist.tasks.head"):
        assert not asked.fits(batch_of()) and not asked.fits(batch_of())
    assert [record.getMessage() for record in caplog.records] == [
        "the head of CohereForCausalLM is not a plain matrix product: its loss takes all logits at once"
    ]


def test_a_head_whose_cap_has_another_name_is_left_to_itself() -> None:
    """Few words have losses that a cap of 30 hardly moves: what it does to a number is exact."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    sizes |= {"lru_width": 32, "num_key_value_heads": 1, "head_dim": 8, "attention_window_size": 32}
    torch.manual_seed(1)
    model = RecurrentGemmaForCausalLM(RecurrentGemmaConfig(vocab_size=64, **sizes)).eval()
    assert not WordHead(model, causal=True).fits(batch_of())


def test_a_head_whose_bias_is_added_outside_is_left_to_itself() -> None:
    from transformers import EsmConfig, EsmForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = EsmForMaskedLM(EsmConfig(vocab_size=64, pad_token_id=1, mask_token_id=2, **sizes)).eval()
    assert not WordHead(model, causal=False).fits(batch_of())
    assert model(**batch_of()).logits.shape[-1] == 64


def trained(stage: int, by_chunks: bool) -> list[float]:
    """Losses of steps in a real engine."""
    import deepspeed

    torch.manual_seed(1)
    model = tiny("gemma3_text", CAUSAL)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    rank, losses = torch.distributed.get_rank(), []
    batch = {key: value[2 * rank : 2 * rank + 2] for key, value in batch_of(4).items()}
    asked = WordHead(engine, causal=True)
    for _ in range(4):
        loss = asked.loss(batch)[0] if by_chunks and asked.fits(batch) else engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.eval()
    losses += asked.judge(batch)[..., 0].sum(1).tolist()
    engine.destroy()
    return losses


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_trains_as_it_does_on_all_logits(ranks: RankPools, stage: int) -> None:
    chunks, whole = ranks(2).run(trained, stage, True), ranks(2).run(trained, stage, False)
    for ours, theirs in zip(chunks, whole, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
        assert ours[3] < ours[0]
