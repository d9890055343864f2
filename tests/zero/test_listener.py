"""What gated layers are given is counted once, for real tokens alone, in training; and the message where nothing is."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from leap_dist.config.job_file import parse_leap
from leap_dist.config.leap import BY_INPUTS
from leap_dist.core.communicator import Communicator
from leap_dist.core.inputs import Inputs
from leap_dist.errors import UserError
from leap_dist.models.inputs import resolve_start
from leap_dist.models.plan import make_plan
from leap_dist.zero.listener import Listener

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 30}


def listening(model: nn.Module, **changes: Any) -> Inputs:
    """Sums of the inputs of a model's linear layers, with a listener on it."""
    config = parse_leap({"target": 0.5, "score_init": "activation", **changes})
    axes = resolve_start(model, make_plan(model, config), config).axes
    inputs = Inputs(axes, Communicator(), Communicator(), torch.device("cpu"))
    inputs.listener = Listener(model, inputs, on=True)  # type: ignore[attr-defined]  # kept as long as the sums
    return inputs


def squares(inputs: Inputs) -> dict[str, Tensor]:
    inputs.pool()
    return {name: norm.double() ** 2 for name, norm in inputs.norms().items()}


def seen_by(model: nn.Module, run: Callable[[], Any]) -> dict[str, Tensor]:
    """The squares of what linear layers are given, (rows, features) by name, in plain torch."""
    rows: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: rows.setdefault(f"{name}.weight", []).append(given[0].detach())
        )
        for name, module in model.named_modules()
        if "Linear" in type(module).__name__ or "Conv1D" in type(module).__name__
    ]
    run()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.double().reshape(-1, x.shape[-1]) for x in found]) ** 2 for name, found in rows.items()}


def llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **SMALL)).train()


IDS = torch.arange(12).view(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]])


def same(found: dict[str, Tensor], expected: dict[str, Tensor], rows: Tensor | None = None) -> None:
    for name, sums in found.items():
        kept = expected[name] if rows is None else expected[name][rows.flatten().bool()]
        torch.testing.assert_close(sums, kept.sum(0), rtol=1e-6, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    "make",
    [
        llama,
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=30)).train(),
        lambda: BertModel(BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train(),
    ],
    ids=["llama", "gpt2", "bert"],
)
@pytest.mark.parametrize("positional", [False, True])
def test_padding_is_left_out(make: Callable[[], nn.Module], positional: bool) -> None:
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = listening(model)
    arguments = (IDS, MASK) if positional and "GPT2" not in type(model).__name__ else (IDS,)
    rest = {} if len(arguments) == 2 else {"attention_mask": MASK}
    expected = seen_by(model, lambda: model(*arguments, **rest))
    same(squares(inputs), expected, MASK)


def test_features_are_no_tokens_where_there_are_as_many() -> None:
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)).train()
    inputs = listening(model, include=["pooler.dense.weight"])
    mask = torch.ones(2, 8)  # the pooler is given (2, 8 features)
    mask[:, 5:] = 0
    expected = seen_by(model, lambda: model(torch.arange(16).view(2, 8), attention_mask=mask))
    same(squares(inputs), expected)


def test_an_encoder_and_a_decoder_have_masks_of_their_own() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2, dropout_rate=0.0)
    model = T5ForConditionalGeneration(config).train()
    inputs = listening(model)
    later = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])  # as long as the encoder's, and another one
    given = {"attention_mask": MASK, "decoder_attention_mask": later}
    expected = seen_by(model, lambda: model(input_ids=IDS, decoder_input_ids=IDS + 3, **given))
    found = squares(inputs)
    of_states = {n: s for n, s in found.items() if n.startswith("encoder") or "EncDecAttention.k" in n}
    of_states |= {n: s for n, s in found.items() if "EncDecAttention.v" in n}
    assert len(found) == 6 + 10 and len(of_states) == 6 + 2
    same(of_states, expected, MASK)
    same({n: s for n, s in found.items() if n not in of_states}, expected, later)


class WithDict(LlamaForCausalLM):
    """Hands its stack of layers prepared masks, as multimodal models do."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.model(input_ids, attention_mask={"full_attention": attention_mask})


def test_where_the_innermost_mask_has_another_form_the_outer_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LlamaModel, "forward", lambda self, ids, attention_mask: self.layers[0].mlp(self.embed_tokens(ids))
    )
    torch.manual_seed(0)
    model = WithDict(LlamaConfig(num_key_value_heads=1, **SMALL)).train()
    inputs = listening(model, include=["re:.*(up_proj|down_proj).weight"])
    expected = seen_by(model, lambda: model(IDS, MASK))
    same(squares(inputs), expected, MASK)


def test_evaluation_does_not_count_whatever_runs_it() -> None:
    model = llama()
    inputs = listening(model)
    expected = seen_by(model, lambda: model(IDS))
    model.eval()
    model(IDS)
    with torch.no_grad():
        model(IDS)
    model.train()
    same(squares(inputs), expected)


def test_a_loop_that_forgets_to_call_train_counts() -> None:
    model = llama().eval()
    inputs = listening(model)
    with torch.no_grad():
        model(IDS)
    expected = seen_by(model, lambda: model(IDS))
    same(squares(inputs), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_backward_pass_recomputes_does_not_count(reentrant: bool) -> None:
    plain, recomputed = llama(), llama()
    inputs = listening(recomputed)
    expected = seen_by(plain, lambda: plain(IDS, attention_mask=MASK))
    recomputed.activation_checkpointing_enable({"use_reentrant": reentrant})
    recomputed.enable_input_require_grads()
    recomputed(IDS, attention_mask=MASK, labels=IDS).loss.backward()
    same(squares(inputs), expected, MASK)


def test_a_part_that_is_recomputed_counts_once_in_a_plain_module_too() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.three(self.two(checkpoint(self.one, x, use_reentrant=False)))

    model, x = Half(), torch.randn(5, 4)
    inputs = listening(model)
    model(x).sum().backward()
    hidden = nn.functional.linear(x, model.one.weight, model.one.bias).detach()
    same(squares(inputs), {"one.weight": x.double() ** 2, "two.weight": hidden.double() ** 2})


def test_a_shared_weight_sums_over_its_layers() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.answer = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.answer(self.two(self.one(x)))

    model, x = Twice(), torch.randn(5, 4)
    inputs = listening(model)
    hidden = model.one(x)
    inputs.pool()
    inputs.flat.zero_()
    model(x)
    same(squares(inputs), {"one.weight": torch.cat([x, hidden.detach()]).double() ** 2})


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_inputs_of_a_convolution_are_its_channels(transposed: bool, groups: int) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    model = nn.Sequential(kind(4, 6, 3, groups=groups), nn.Flatten(), nn.LazyLinear(2)).train()
    x = torch.randn(2, 4, 5, 5)
    model(x)
    inputs = listening(model, include=["0.weight"])
    model(x)
    same(squares(inputs), {"0.weight": x.double().square().transpose(0, 1).flatten(1).T})
    own = inputs.axes["0.weight"]
    assert own.num_inputs == 4 and own.outputs.units.stop == 6


def test_a_step_whose_inputs_are_not_finite_counts_for_nothing() -> None:
    model = llama()
    inputs = listening(model)
    expected = seen_by(model, lambda: model(IDS))
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    with torch.no_grad():
        embedding[0, 0] = torch.nan
        model(IDS)
        embedding.copy_(before)
    same(squares(inputs), expected)


def test_a_model_is_left_as_it_was_and_is_not_held() -> None:
    model = llama()
    inputs = listening(model)
    assert any(module._forward_pre_hooks for module in model.modules())
    inputs.listen(False)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.idle, self.answer = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.answer(self.one(x))

    model = Idle()
    inputs = listening(model)
    model(torch.randn(3, 4))
    inputs.pool()
    with pytest.raises(UserError, match=r"has shown the inputs of idle\.weight; call engine\.train\(\)"):
        inputs.norms()
    with pytest.raises(UserError, match="has shown the inputs of any weight"):
        listening(model).norms()


# What "auto" comes to


def bert() -> nn.Module:
    return BertModel(BertConfig(**SMALL))


class Attention(nn.Module):
    """torch's attention hands its weights to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first, self.answer = nn.MultiheadAttention(4, 2), nn.Linear(4, 4), nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("make", "changes", "start", "why"),
    [
        (llama, {}, "gradient", "weights and masks are trained"),
        (llama, {"weights": "frozen"}, "activation", "there are no gradients"),
        (llama, {"mode": "one_shot"}, "activation", "there are no gradients"),
        (bert, {"score_init": "gradient"}, "gradient", ""),
        (bert, {}, "gradient", "weights and masks are trained"),
        (bert, {"gates": ["block:4x4"], "rule": "movement"}, "gradient", "weights and masks are trained"),
        (bert, {"mode": "one_shot"}, "activation", "there are no gradients"),
        (bert, {"weights": "frozen", "gates": ["head"]}, "activation", "there are no gradients"),
        (bert, {"weights": "frozen", "gates": ["row"]}, "magnitude", "without gradients that is better for row"),
        (bert, {"mode": "one_shot", "gates": ["block:4x4"]}, "magnitude", "without gradients that is better for block"),
        (bert, {"mode": "one_shot", "gates": ["element", "row"]}, "magnitude", "without gradients that is better for"),
        (llama, {"mode": "one_shot", "gates": ["block:4x4"]}, "activation", "there are no gradients"),
        (Attention, {"mode": "one_shot", "include": ["re:.*weight"]}, "magnitude", "no module shows the inputs of"),
        (llama, {"score_init": "magnitude"}, "magnitude", ""),
        (llama, {"score_init": "zero"}, "zero", ""),
        (llama, {"rule": "magnitude"}, "auto", ""),
        (llama, {"include": ["model.embed_tokens.weight"]}, "magnitude", "no module shows the inputs of model.embed"),
        (Attention, {"score_init": "activation", "include": ["first.weight"]}, "activation", ""),
    ],
)
def test_what_scores_start_from(make: Callable[[], nn.Module], changes: dict[str, Any], start: str, why: str) -> None:
    model, config = make(), parse_leap({"target": 0.5, **changes})
    found = resolve_start(model, make_plan(model, config), config)
    assert found.config.score_init == start and found.why.startswith(why) and bool(found.why) == bool(why)
    assert bool(found.axes) == (start in BY_INPUTS)


def test_weights_whose_inputs_no_module_shows_are_named() -> None:
    config = parse_leap({"target": 0.5, "score_init": "activation", "include": ["re:.*weight"]})
    model = Attention()
    with pytest.raises(
        UserError, match=r"shows the inputs of inner\.in_proj_weight, inner\.out_proj\.weight; leave it"
    ):
        resolve_start(model, make_plan(model, config), config)
