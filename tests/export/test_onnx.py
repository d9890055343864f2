"""ONNX files, run by onnxruntime: any batch, any length, the same answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config.job_file import parse_leap
from leap_dist.errors import UserError
from leap_dist.export import onnx
from leap_dist.export.metric import with_types
from leap_dist.models.plan import make_plan
from leap_dist.models.shrink import shrink_
from tests.export.runs import classifier
from tests.models.masking import mask_
from tests.models.tiny import DEEPER, HEADS, tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(onnx.missing_libraries()), reason="needs the onnx extra"),
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A BERT and its file."""
    model, path = classifier(), tmp_path_factory.mktemp("onnx") / "model.onnx"
    assert onnx.save_onnx(model, path, longest=16) <= onnx.TOLERANCE
    return model, path


def test_any_batch_and_length(exported: tuple[Any, Path]) -> None:
    model, path = exported
    run = onnx.onnx_runner(path, threads=1)
    for batch, length in ((1, 1), (1, 16), (4, 3), (7, 11)):
        inputs = onnx.model_inputs(model, batch, length)
        inputs["token_type_ids"][:, length // 2 :] = 1
        expected = model(**inputs).logits
        assert (run(inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_inputs_are_the_models_own_and_free(exported: tuple[Any, Path]) -> None:
    import onnxruntime

    _, path = exported
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask", "token_type_ids"]
    assert all(isinstance(size, str) for i in session.get_inputs() for size in i.shape)
    assert [o.name for o in session.get_outputs()] == ["logits"]


def test_the_file_is_the_weights_and_no_paths_of_this_machine(exported: tuple[Any, Path]) -> None:
    model, path = exported
    content = path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert len(content) < weights + 60_000


def test_experts(tmp_path: Path) -> None:
    model = classifier("mixtral", num_local_experts=3, num_hidden_layers=1)
    before = model.get_experts_implementation()
    assert onnx.save_onnx(model, tmp_path / "model.onnx", longest=16) <= onnx.TOLERANCE
    assert model.get_experts_implementation() == before


def test_a_classifier_with_a_decoder_takes_what_its_task_gives(tmp_path: Path) -> None:
    """It makes decoder_input_ids by itself; a model of language is given them."""
    sizes = {
        "num_layers": 1,
        "num_decoder_layers": 1,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }
    model = tiny("t5", "AutoModelForSequenceClassification", **sizes)
    assert onnx.save_onnx(model, tmp_path / "model.onnx", longest=8) <= onnx.TOLERANCE
    batch = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    found = with_types(onnx.onnx_runner(tmp_path / "model.onnx", threads=1))(batch)
    assert torch.allclose(found, model(**batch).logits, atol=1e-5)
    assert "decoder_input_ids" in onnx.model_inputs(tiny("t5", "AutoModelForSeq2SeqLM"), 1, 4)


@pytest.mark.parametrize("gates", [["depth"], [{"granularity": "hidden", "multiple_of": 8}, "head"]])
@pytest.mark.parametrize("kind", ["gemma3_text", "llama", "qwen3_moe"])
def test_decoders_that_lost_layers_and_width(kind: str, gates: list[Any], tmp_path: Path) -> None:
    model = tiny(kind, HEADS[kind], **DEEPER[kind])
    mask_(model, make_plan(model, parse_leap({"target": 0.5, "gates": gates})), share=0.4)
    before = sum(parameter.numel() for parameter in model.parameters())
    shrink_(model)
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert onnx.save_onnx(model, tmp_path / "model.onnx", longest=16) <= onnx.TOLERANCE


def test_padding_beyond_a_sliding_window_is_not_compared(tmp_path: Path) -> None:
    """It sees nothing there, and each engine gives a number of its own."""
    model = tiny("gemma3_text", "AutoModelForCausalLM", sliding_window=4, max_position_embeddings=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert onnx.save_onnx(model, tmp_path / "model.onnx", longest=48) <= onnx.TOLERANCE


def test_another_answer_is_refused(exported: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = exported
    with torch.no_grad():
        changed = classifier()
        changed.classifier.bias += 1
    assert onnx.onnx_difference(changed, path, 16) > onnx.TOLERANCE
    monkeypatch.setattr(onnx, "onnx_difference", lambda *_: float("nan"))
    with pytest.raises(RuntimeError, match=r"model\.onnx: the logits of onnxruntime differ from torch's by nan"):
        onnx.save_onnx(model, tmp_path / "model.onnx", longest=16)


def test_no_numbers_are_refused(tmp_path: Path) -> None:
    model = classifier()
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[-1, 3] = torch.nan  # shorter texts have numbers
    with pytest.raises(RuntimeError, match=r"model\.onnx: the logits of onnxruntime differ from torch's by nan"):
        onnx.save_onnx(model, tmp_path / "model.onnx", longest=16)


def test_a_model_that_answers_nothing_but_zeros(tmp_path: Path) -> None:
    model = classifier()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()
    assert onnx.save_onnx(model, tmp_path / "model.onnx", longest=16) == 0


def test_libraries_that_are_not_installed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.require_libraries("--to onnx")
    found = importlib.util.find_spec
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    message = r'--to onnx: onnxscript not installed; install with pip install -e "\.\[onnx\]"'
    with pytest.raises(UserError, match=message):
        onnx.require_libraries("--to onnx")
