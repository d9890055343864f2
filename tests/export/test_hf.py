"""Exported folders load with plain transformers and give the same logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from leap_dist.errors import UserError
from leap_dist.export.hf import save_model

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}
IDS = torch.arange(1, 15).view(2, 7)


def tiny_classifier() -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification, BertConfig

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(BertConfig(num_labels=3, **SIZES)).eval()


def parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        yield name, parameter.detach()


def reload(folder: Path, auto: str = "AutoModelForSequenceClassification") -> torch.nn.Module:
    """The model in `folder`, complete: no weight missing, none left over."""
    import transformers

    model, report = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def test_pruned_classifier_comes_back_with_the_same_logits(tmp_path: Path) -> None:
    model = tiny_classifier()
    matrix = model.get_parameter("bert.encoder.layer.0.attention.self.query.weight")
    mask = torch.rand_like(matrix) < 0.3
    with torch.no_grad():
        matrix.mul_(mask)
    folder = save_model(model, parameters(model), tmp_path / "run" / "model")
    again = reload(folder)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    loaded = again.get_parameter("bert.encoder.layer.0.attention.self.query.weight")
    assert torch.equal(loaded != 0, mask)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]


def test_weights_given_win_over_the_hosted_ones(tmp_path: Path) -> None:
    model = tiny_classifier()
    wanted = {name: torch.randn_like(weight) for name, weight in parameters(model)}
    reused = torch.empty(max(weight.numel() for weight in wanted.values()))

    def through_one_buffer() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in wanted.items():
            yield name, reused[: weight.numel()].copy_(weight.view(-1)).view(weight.shape)

    again = reload(save_model(model, through_one_buffer(), tmp_path / "model"))
    for name, weight in parameters(again):
        assert torch.equal(weight, wanted[name]), name


def test_master_weights_of_a_bf16_model_load_as_fp32(tmp_path: Path) -> None:
    model = tiny_classifier()
    masters = [(name, weight.clone()) for name, weight in parameters(model)]
    expected = model(input_ids=IDS).logits
    again = reload(save_model(model.to(torch.bfloat16), masters, tmp_path / "model"))
    assert again.dtype == torch.float32
    assert torch.equal(again(input_ids=IDS).logits, expected)


def test_tied_weights_are_written_once_and_tied_again(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig(tie_word_embeddings=True, **SIZES)).eval()
    folder = save_model(model, parameters(model), tmp_path / "model")
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = [name for name in sorted(file.keys()) if file.get_slice(name).get_shape() == [40, 16]]
    assert names == ["bert.embeddings.word_embeddings.weight"]
    again = reload(folder, "AutoModelForMaskedLM")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_persistent_buffers_and_hosted_extras(tmp_path: Path) -> None:
    """Buffers are exported with the weights; parameters that only training needs are not."""
    model = tiny_classifier()
    model.register_buffer("calibration", torch.tensor([3.0]))
    weights = list(parameters(model))
    model.register_parameter("threshold", torch.nn.Parameter(torch.zeros(5)))
    folder = save_model(model, weights, tmp_path / "model")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.get_tensor("calibration").item() == 3.0
        assert "threshold" not in set(file.keys())


def test_fused_experts_keep_the_names_of_the_model(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForSequenceClassification

    sizes = SIZES | {"num_key_value_heads": 1, "num_local_experts": 3, "num_hidden_layers": 1}
    model = MixtralForSequenceClassification(MixtralConfig(pad_token_id=0, **sizes)).eval()
    folder = save_model(model, parameters(model), tmp_path / "model")
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
    assert torch.equal(reload(folder)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_tokenizer_is_saved_beside_the_weights(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    model = tiny_classifier()
    folder = save_model(model, parameters(model), tmp_path / "model", tokenizer)
    assert AutoTokenizer.from_pretrained(folder)("good film").input_ids == tokenizer("good film").input_ids


def test_other_ranks_exhaust_the_weights_and_write_nothing(tmp_path: Path) -> None:
    seen = []

    def weights() -> Iterator[tuple[str, None]]:
        for name in ("a", "b"):
            yield name, None
            seen.append(name)

    assert save_model(tiny_classifier(), weights(), tmp_path / "model", rank=1) == tmp_path / "model"
    assert seen == ["a", "b"] and not list(tmp_path.iterdir())


def test_older_export_and_leftovers_are_replaced(tmp_path: Path) -> None:
    model = tiny_classifier()
    folder = save_model(model, parameters(model), tmp_path / "model")
    (folder / "stale.txt").touch()
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").touch()
    (tmp_path / ".model.old").mkdir()
    save_model(model, parameters(model), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (folder / "stale.txt").exists()


def test_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    model = tiny_classifier()
    with pytest.raises(UserError, match="exists and holds no exported model"):
        save_model(model, parameters(model), tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_failure_leaves_the_older_export(tmp_path: Path) -> None:
    model = tiny_classifier()
    folder = save_model(model, parameters(model), tmp_path / "model")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(RuntimeError, match=r"nowhere\.weight is not a parameter of Bert"):
        save_model(model, [("nowhere.weight", torch.zeros(1))], folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    model = tiny_classifier()
    folder = save_model(model, parameters(model), tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
