"""Models that MLflow serves answer as the exported models do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from leap_dist.config.sections import TrackingConfig
from leap_dist.export.kinds import export_run
from leap_dist.models.pruned_folder import load_pruned, save_shrunk
from leap_dist.models.shrink import shrink_
from leap_dist.run_folder import read_run
from leap_dist.tracking.mlflow import Tracker
from tests.export.runs import Masks, classifier, expert_masks, layer_masks, make_run, structure_masks

pytestmark = pytest.mark.slow

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
TEXTS = ["good film", "bad bad film"]
IDS = torch.arange(14).view(2, 7) % 40


@pytest.fixture
def store(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that is the process's own: `mlflow.pyfunc.load_model` reads that."""
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path)}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # MLflow sets it where it is not set
    return uri


def logged(store: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The MLflow address of a folder's model."""
    import transformers  # noqa: F401  its import may warn

    capfd.readouterr()
    with Tracker(TrackingConfig(mlflow_uri=store, experiment="models", log_model=True), {}, True) as tracker:
        tracker.model(folder)
    assert capfd.readouterr() == ("", "")
    return f"runs:/{tracker.run_id}/model"


def files_of(address: str) -> dict[str, Path]:
    import mlflow

    root = Path(mlflow.artifacts.download_artifacts(address))
    return {str(path.relative_to(root)): path for path in root.rglob("*")}


def test_a_text_model_is_served_without_leap_dist(
    store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow
    from transformers import BertTokenizer

    model: Any = classifier(num_labels=2)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "model")
    address = logged(store, tmp_path / "model", capfd)
    with torch.inference_mode():
        chances = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.softmax(-1)
    assert mlflow.models.get_model_info(address).signature.inputs is not None
    registered = mlflow.register_model(address, "pruned")
    for place in (address, f"models:/pruned/{registered.version}"):
        answer = mlflow.pyfunc.load_model(place).predict(TEXTS)
        assert answer["label"].tolist() == [model.config.id2label[i] for i in chances.argmax(-1).tolist()]
        np.testing.assert_allclose(answer["score"], chances.amax(-1), rtol=1e-5)
    files = files_of(address)
    assert "leap_dist" not in files["MLmodel"].read_text() + files["requirements.txt"].read_text()
    assert not [name for name in files if name.endswith((".pkl", ".bin", ".pt", ".py"))]


@pytest.mark.parametrize("shrunk", [False, True])
def test_any_other_model_is_served_by_our_loader(
    shrunk: bool, store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    model, folder = classifier(), tmp_path / "model"
    if shrunk:
        with torch.no_grad():
            for name, mask in structure_masks(model).items():
                model.get_parameter(name).mul_(mask)
        save_shrunk(model, shrink_(model), folder)
        model = load_pruned(folder)
    else:
        model.save_pretrained(folder)
    address = logged(store, folder, capfd)
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits.numpy()
    answer = mlflow.pyfunc.load_model(address).predict(pd.DataFrame({"input_ids": IDS.tolist()}))
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-6)
    schema = mlflow.models.get_model_info(address).signature
    assert schema.inputs.required_input_names() == ["input_ids"] and schema.outputs.inputs[0].shape == (-1, 3)
    with pytest.raises(mlflow.MlflowException, match="input_ids"):
        mlflow.pyfunc.load_model(address).predict(pd.DataFrame({"ids": IDS.tolist()}))
    files = files_of(address)
    assert "loader_module: leap_dist.tracking.model" in files["MLmodel"].read_text()
    assert not [name for name in files if name.endswith((".pkl", ".bin", ".pt", ".py"))]


def word_pieces(folder: Path) -> Any:
    """A tokenizer of WORDS, which is saved to a model's folder."""
    from transformers import BertTokenizer

    (folder / "words.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "words.txt"))
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "granularity", "masks"), [("bert", "depth", layer_masks), ("mixtral", "expert", expert_masks)]
)
def test_a_run_that_stock_code_computes_otherwise_answers_as_it_was_measured(
    kind: str, granularity: str, masks: Any, store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`depth` under norms that follow the sum leaves norms that are zero: stock answers would not depend on the text"""
    import mlflow

    model = classifier(kind, **({"num_local_experts": 4} if kind == "mixtral" else {}))
    run = make_run(tmp_path / "run", model, masks(model), granularity)
    tokenizer = word_pieces(run / "model")
    (card,) = export_run(read_run(run), ["shrunk"], tmp_path / "out", threads=1, latency=False)
    assert card.logit_difference is not None and card.logit_difference < 1e-5
    with torch.inference_mode():
        inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
        expected = load_pruned(tmp_path / "out" / "shrunk")(**inputs).logits.numpy()
    answer = mlflow.pyfunc.load_model(logged(store, run / "model", capfd)).predict(pd.DataFrame({"text": TEXTS}))
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)
    assert abs(answer[0] - answer[1]).max() > 1e-3


def decoder_layer(model: Any) -> Masks:
    """Of a GPT-2: all of its last layer, whose norms come before what they feed."""
    parts = (name for name, _ in model.named_parameters() if name.startswith("transformer.h.1."))
    return {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name in parts}


@pytest.mark.parametrize(
    ("kind", "granularity", "masks"), [("bert", "head", structure_masks), ("gpt2", "depth", decoder_layer)]
)
def test_a_run_that_stock_code_computes_alike_is_served_without_leap_dist(
    kind: str, granularity: str, masks: Any, store: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Biases that follow heads are pruned too, and nothing else is there to compute; or norms that give zeros anyway"""
    model = classifier(kind)
    run = make_run(tmp_path / "run", model, masks(model), granularity)
    word_pieces(run / "model")
    address = logged(store, run / "model", capfd)
    assert "leap_dist" not in files_of(address)["MLmodel"].read_text()
