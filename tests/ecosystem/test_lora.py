"""Recovery by LoRA: adapters on pruned models, trained, merged and saved; zeros stay zero."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import leap_dist
from leap_dist.errors import UserError
from tests.models.tiny import save_masked

pytestmark = pytest.mark.slow

IDS = torch.arange(1, 25).view(2, 12)
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def language_model(kind: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """Two layers with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    sizes |= {"intermediate_size": 48, "pad_token_id": 0} if kind == "llama" else {"bos_token_id": 0, "eos_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).to(dtype).eval()


def cut_(model: Any) -> dict[str, torch.Tensor]:
    """Half of every matrix of the layers to zero: single weights in the first, 2:4 in the second. The zeros by name."""
    zeros = {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and (".layers." in name or ".h." in name):
            first = ".0." in name
            zeros[name] = (
                torch.rand(weight.shape) < 0.5 if first else (torch.arange(weight.shape[1]) % 4 > 1).expand_as(weight)
            )
            weight.data[zeros[name]] = 0.0
    return zeros


def adapted(model: Any, targets: Any, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **settings))


def train_(model: Any) -> tuple[float, float]:
    """Thirty steps on one batch; the first loss and the last."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(30):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses[0], losses[-1]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    answer: torch.Tensor = model(input_ids=IDS).logits.float()
    return answer


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_zeros_stay_and_the_rest_learns(kind: str, safe: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = language_model(kind)
    zeros, before = cut_(model), logits(model)
    lora = adapted(model, TARGETS[kind], lora_dropout=0.1)
    targets = [name for name in zeros if any(target in name for target in TARGETS[kind])]
    assert leap_dist.hold_zeros(lora) == sum(int(zeros[name].sum()) for name in targets) > 0
    lora.train()
    first, last = train_(lora)
    assert last < first - 0.1
    expected = logits(lora)
    assert not close(expected, before, 1e-2)
    merged = lora.merge_and_unload(safe_merge=safe)
    assert close(logits(merged), expected)
    assert all(torch.equal(merged.get_parameter(name) == 0, where) for name, where in zeros.items())
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_without_it_the_zeros_are_lost() -> None:
    model = language_model()
    zeros = cut_(model)
    lora = adapted(model, TARGETS["llama"])
    train_(lora)
    merged = lora.merge_and_unload()
    left = sum(int((merged.get_parameter(name) == 0).sum()) for name in zeros if "q_proj" in name)
    assert left == 0


def test_an_adapter_in_a_file_is_held_again(tmp_path: Path) -> None:
    from peft import PeftModel

    model = language_model()
    cut_(model)
    base = copy.deepcopy(model)
    lora = adapted(model, TARGETS["llama"])
    leap_dist.hold_zeros(lora)
    train_(lora)
    expected = logits(lora)
    lora.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    leap_dist.hold_zeros(loaded)
    assert close(logits(loaded), expected)
    loaded.merge_adapter()
    assert close(logits(loaded), expected)
    loaded.unmerge_adapter()
    assert close(logits(loaded), expected)


def test_half_precision() -> None:
    model = language_model(dtype=torch.bfloat16)
    zeros = cut_(model)
    lora = adapted(model, TARGETS["llama"])
    leap_dist.hold_zeros(lora)
    train_(lora)
    expected = logits(lora)
    merged = lora.merge_and_unload()
    assert close(logits(merged), expected, 3e-2)
    assert all(torch.equal(merged.get_parameter(name) == 0, where) for name, where in zeros.items())


def test_a_shrunk_model_with_layers_of_many_widths(tmp_path: Path) -> None:
    model = language_model()
    neuron = torch.arange(48) % 3 != 0
    with torch.no_grad():
        mlp = model.model.layers[0].mlp
        for part in (mlp.gate_proj, mlp.up_proj):
            part.weight.mul_(neuron[:, None])
        mlp.down_proj.weight.mul_(neuron)
    save_masked(model, tmp_path / "shrunk", extra={"certificate": 1})
    (tmp_path / "shrunk" / "card.json").write_text("{}")
    (tmp_path / "shrunk" / "tokenizer.json").write_text("{}")
    lora = adapted(leap_dist.load_pruned(tmp_path / "shrunk"), TARGETS["llama"])
    assert leap_dist.hold_zeros(lora) == 0
    train_(lora)
    with pytest.raises(UserError, match="got a model with adapters; allowed: what model"):
        leap_dist.save_pruned(lora, tmp_path / "recovered", like=tmp_path / "shrunk")
    merged = lora.merge_and_unload()
    leap_dist.save_pruned(merged, tmp_path / "recovered", like=tmp_path / "shrunk")
    assert torch.equal(logits(leap_dist.load_pruned(tmp_path / "recovered")), logits(merged))
    files = sorted(path.name for path in (tmp_path / "recovered").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors", "pruned.json", "tokenizer.json"]
    assert json.loads((tmp_path / "recovered" / "pruned.json").read_text())["extra"] == {}
    with pytest.raises(UserError, match="shrunk: exists; give another folder"):
        leap_dist.save_pruned(merged, tmp_path / "shrunk", like=tmp_path / "shrunk")
    with pytest.raises(UserError, match=r"weights do not fit config.json and pruned.json: .* has another shape"):
        leap_dist.save_pruned(language_model(), tmp_path / "other", like=tmp_path / "shrunk")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("targets", "settings", "message"),
    [
        (
            ["q_proj"],
            {"use_dora": True},
            r"q_proj has 5\d\d zeros, and its adapter is Dora: merged, they wo",
        ),
        (["q_proj"], {"init_lora_weights": "pissa"}, r'model: init_lora_weights "pissa" has changed the weights'),
        (
            ["q_proj"],
            {"modules_to_save": ["up_proj"]},
            r"up_proj\.modules_to_save\.default\.weight has 7\d\d zeros and is trained itself",
        ),
        (["embed_tokens"], {}, r"embed_tokens has \d+ zeros, and its adapter is lora.layer.Embedding"),
    ],
)
def test_an_adapter_that_cannot_be_held_is_refused(targets: Any, settings: Any, message: str) -> None:
    model = language_model()
    cut_(model)
    model.model.embed_tokens.weight.data[3] = 0.0
    lora = adapted(model, ["down_proj", *targets], **settings)
    with pytest.raises(UserError, match=message):
        leap_dist.hold_zeros(lora)
    assert not any(
        "Masked" in str(module)
        for name, layer in lora.named_modules()
        for module in getattr(layer, "lora_variant", {}).values()
    )


def test_an_adapter_with_a_bias_of_its_own_is_refused() -> None:
    """It would be added to the zero bias of a unit that was removed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=48, attention_bias=True))
    cut_(model)
    with pytest.raises(UserError, match=r"its adapter has a bias of its own \(lora_bias\): merged, they would be lost"):
        leap_dist.hold_zeros(adapted(model, ["q_proj"], lora_bias=True))


def test_what_is_merged_or_has_no_adapter_is_refused() -> None:
    model = language_model()
    cut_(model)
    with pytest.raises(UserError, match="model: got LlamaForCausalLM; allowed: a PEFT model with its adapters"):
        leap_dist.hold_zeros(model)
    lora = adapted(model, ["q_proj"])
    lora.merge_adapter()
    with pytest.raises(UserError, match="zeros, and its adapter is merged already"):
        leap_dist.hold_zeros(lora)
