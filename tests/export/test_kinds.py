"""Exports of small runs: what is written, what the cards say, and what is refused."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.config.job_file import parse_leap
from leap_dist.errors import UserError
from leap_dist.export import gguf, latency, onnx, shrunk, speed
from leap_dist.export.card import Card
from leap_dist.export.hf import load_exported
from leap_dist.export.kinds import KINDS, export_run, parse_kinds
from leap_dist.export.masks import load_masks
from leap_dist.export.shrunk import Models
from leap_dist.models.flops import LENGTH, max_length
from leap_dist.models.plan import make_plan
from leap_dist.models.pruned_folder import load_pruned
from leap_dist.run_folder import Run, read_run, read_run_or_model
from tests.export.runs import classifier, expert_masks, language_model, make_run, structure_masks, xlnet
from tests.models.masking import mask_
from tests.models.tiny import tiny

pytestmark = pytest.mark.slow

IDS = torch.arange(1, 25).view(2, 12)
HEAD, NEURONS, WIDTH = 8, 32, 32  # of layer 0: one of four heads of 8 is gone; of 48 neurons 32 are left


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "MAX_ROUNDS", 1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A BERT that lost a head and a third of its neurons."""
    model = classifier()
    return read_run(make_run(tmp_path_factory.mktemp("runs") / "run", model, structure_masks(model), "head"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=IDS).logits
    return answer


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize(("text", "expected"), [("hf", ["hf"]), (" onnx, hf,,hf", ["onnx", "hf"])])
def test_kinds_are_listed_once(text: str, expected: list[str]) -> None:
    assert parse_kinds(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "hf,shrnk",
            '--to: got "shrnk"; allowed: hf, shrunk, onnx, mask, semi_structured, gguf, gguf_q8_0, gguf_q4_k_m, '
            "int8, int8_torch; did you mean shrunk",
        ),
        (
            "shrnk,hf,onx",
            '--to: got "shrnk", "onx"; allowed: hf, shrunk, onnx, mask, semi_structured, gguf, gguf_q8_0, gguf_q4_k_m, '
            "int8, int8_torch; did you mean shrunk, onnx?",
        ),
        ("tensorrt", '--to: got "tensorrt"; allowed: hf, shrunk, onnx, mask, semi_structured, gguf, gguf_q8_0'),
        (" ,", "--to: got nothing; allowed: one or more of hf, "),
    ],
)
def test_unknown_kinds_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_kinds(text)
    assert str(caught.value).startswith(message)


def test_every_kind_is_written_with_a_card(run: Run, tmp_path: Path) -> None:
    wanted = [
        kind
        for kind in KINDS
        if kind not in ("semi_structured", "int8", "int8_torch", *gguf.KINDS)
        and not (kind == "onnx" and onnx.missing_libraries())
    ]
    cards = {card.kind: card for card in export_run(run, wanted, tmp_path, threads=1)}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(wanted)
    for kind, card in cards.items():
        stored = json.loads((tmp_path / kind / "card.json").read_text())
        assert stored["kind"] == kind and stored["density"] == run.certificate.density
        assert stored["bytes"]["after"] == card.bytes.after
        assert stored["weights_sha256"] == run.certificate.weights_sha256
        assert (tmp_path / kind / "README.md").read_text() == card.page()
    expected = logits(load_exported(run.model))
    assert torch.equal(logits(load_exported(tmp_path / "hf")), expected)
    assert close(logits(load_pruned(tmp_path / "shrunk")), expected)
    assert set(load_masks(tmp_path / "mask")) == set(run.certificate.tensors)
    if "onnx" in wanted:
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "token_type_ids": torch.zeros_like(IDS)}
        assert close(onnx.onnx_runner(tmp_path / "onnx" / "model.onnx", 1)(inputs), expected)
    check_numbers(cards)


def check_numbers(cards: dict[str, Card]) -> None:
    """Sizes and FLOPs of the shrunk model against what was taken out, by hand."""
    hf, small, bits = cards["hf"], cards["shrunk"], cards["mask"]
    gone_head = 3 * HEAD * (WIDTH + 1) + WIDTH * HEAD
    gone = gone_head + 2 * (48 - NEURONS) * (2 * WIDTH + 1)
    assert hf.parameters is not None and small.parameters is not None
    assert hf.parameters.before == hf.parameters.after == small.parameters.before
    assert small.parameters.after == small.parameters.before - gone
    assert hf.bytes.before == hf.bytes.after and small.bytes.after < small.bytes.before
    assert small.flops_before is not None and small.flops_after is not None
    assert small.flops_before == hf.flops_before == hf.flops_after
    linear = 4 * HEAD * WIDTH + 2 * (48 - NEURONS) * 2 * WIDTH
    assert small.flops_before.linear - small.flops_after.linear == pytest.approx(2 * linear)
    assert small.flops_before.attention - small.flops_after.attention == 2 * 2 * 16 * HEAD
    assert [(time.batch, time.length, time.threads) for time in small.latency] == [(1, 16, 1), (32, 16, 1)]
    assert hf.logit_difference == 0 and small.logit_difference is not None and small.logit_difference < 1e-5
    assert bits.parameters is None and bits.flops_after is None and not bits.latency
    assert bits.bytes.after < bits.bytes.before / 8


def test_a_card_reads_well(run: Run, tmp_path: Path) -> None:
    (card,) = export_run(run, ["shrunk"], tmp_path, threads=1)
    page = card.page()
    assert "\n---\n\n# shrunk: pruned model, removed structures gone\n\nPruned to a density of 0." in page
    for text in (
        "| weights on disk, bytes | ",
        "| FLOPs per token, attention products at length 16 | 4,096 | 3,584 | 0.875 |",
        "| latency, batch 32, length 16, ms | ",
        "stock AutoModel cannot: no config of transformers says it",
        "- Measured by the run: dense accuracy 0.9; pruned accuracy 0.8.",
        ", 1 thread; dense with random weights in torch, this in torch.",
    ):
        assert text in page
    assert list(card.row())[:4] == ["export", "weights MB", "parameters", "MFLOPs/token"]


def test_a_model_without_its_experts(tmp_path: Path) -> None:
    """Stock routing computes something else: the card says so; the shrunk model is right."""
    model = classifier("mixtral", num_local_experts=4, num_hidden_layers=1)
    run = read_run(make_run(tmp_path / "run", model, expert_masks(model), "expert"))
    hf, small = export_run(run, ["hf", "shrunk"], tmp_path / "export", threads=1)
    assert hf.logit_difference is not None and hf.logit_difference > 1e-3
    assert "stock AutoModel would still route tokens to them" in hf.page() and "Serve the `shrunk` export" in hf.page()
    assert small.logit_difference is not None and small.logit_difference < 1e-5
    assert small.parameters is not None and small.parameters.after < small.parameters.before


def test_blocks_are_measured_for_the_card(tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    mask = torch.eye(2).repeat_interleave(16, 0).repeat_interleave(16, 1) > 0
    run = read_run(make_run(tmp_path / "run", classifier(), {name: mask}, "block:16x16"))
    (card,) = export_run(run, ["shrunk"], tmp_path / "export", threads=1)
    said = [note for note in card.notes if "BSR with 16x16 blocks" in note]
    assert len(said) == torch.backends.mkl.is_available()
    assert all("density 0.5 of 32x32: " in note for note in said)


def test_semi_structured_is_refused_before_anything_is_written(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model is not 2:4 sparse"):
        list(export_run(run, ["hf", "semi_structured"], tmp_path / "export", threads=1))
    assert not (tmp_path / "export").exists()


def test_semi_structured(tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    mask = (torch.arange(32) % 2 == 0).expand(32, 32).clone()
    run = read_run(make_run(tmp_path / "run", classifier(), {name: mask}, "2:4"))
    (card,) = export_run(run, ["semi_structured"], tmp_path / "export", threads=1)
    assert "1 matrices are 2:4 sparse along their input dimension." in card.page()
    assert json.loads((tmp_path / "export" / "semi_structured" / "semi_structured.json").read_text())["tensors"] == [
        name
    ]


def test_a_kind_is_exported_to_a_folder_once_at_a_time(run: Run, tmp_path: Path) -> None:
    first = export_run(run, ["hf", "mask"], tmp_path / "out", threads=1, latency=False)
    next(first)
    with pytest.raises(UserError, match=r"^--to mask: another process exports that kind to .*out; wait for it to end"):
        list(export_run(run, ["shrunk", "mask"], tmp_path / "out", threads=1, latency=False))
    list(export_run(run, ["shrunk"], tmp_path / "out", threads=1, latency=False))
    assert [card.kind for card in first] == ["mask"]
    list(export_run(run, ["mask"], tmp_path / "out", threads=1, latency=False))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["hf", "mask", "shrunk"]


def test_a_foreign_folder_stops_everything(run: Run, tmp_path: Path) -> None:
    (tmp_path / "shrunk").mkdir()
    with pytest.raises(UserError, match="shrunk exists and is not an export"):
        list(export_run(run, ["hf", "shrunk"], tmp_path, threads=1))
    assert [path.name for path in tmp_path.iterdir()] == ["shrunk"]


def test_missing_libraries_stop_everything(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r'--to onnx: onnx, onnxscript, onnxruntime not installed; .* pip install -e "\.\[onnx\]"$'
    ):
        list(export_run(run, ["hf", "onnx"], tmp_path, threads=1))
    assert not list(tmp_path.iterdir())


def test_a_shrunk_model_that_computes_something_else_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shrunk.shrink_

    def wrong(model: Any, family: Any = None) -> dict[str, list[int]]:
        kept = real(model, family)
        with torch.no_grad():
            model.classifier.bias += 0.1
        return kept

    monkeypatch.setattr(shrunk, "shrink_", wrong)
    with pytest.raises(
        RuntimeError, match=r"the logits of the shrunk model differ .* by \S+ of the largest, allowed 1e-05"
    ):
        list(export_run(run, ["shrunk"], tmp_path, threads=1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "message"),
    [("hf", "its logits are no numbers"), ("shrunk", "differ from the masked one's by nan of the largest")],
)
def test_a_model_that_gives_no_numbers_is_refused(kind: str, message: str, tmp_path: Path) -> None:
    model = classifier()
    masks = structure_masks(model)
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight[-1, 3] = torch.nan  # shorter texts have numbers
    run = read_run(make_run(tmp_path / "run", model, masks, "head"))
    with pytest.raises(RuntimeError, match=message):
        list(export_run(run, [kind], tmp_path / "out", threads=1, latency=False))
    assert not (tmp_path / "out" / kind).exists()


def test_a_model_of_any_length(tmp_path: Path) -> None:
    """XLNet's config says -1 positions."""
    model = xlnet()
    name = "transformer.layer.0.ff.layer_1.weight"
    run = read_run(make_run(tmp_path / "run", model, {name: torch.arange(32).expand(24, 32) % 2 == 0}))
    for card in export_run(run, ["hf", "shrunk"], tmp_path / "out", threads=1, latency=False):
        assert card.logit_difference == 0 and card.flops_after is not None and card.flops_after.length == LENGTH


@pytest.mark.parametrize(
    ("gates", "layers", "dtype"),
    [
        ([], 1, torch.bfloat16),
        ([], 2, torch.bfloat16),
        ([{"granularity": "hidden", "multiple_of": 8}], 0, torch.float32),  # its norms are other numbers
    ],
)
def test_shrunk_keeps_the_type_of_the_weights(gates: Any, layers: int, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = language_model()
    for layer in range(layers):
        model.model.layers[layer].mlp.gate_proj.weight.data[:8] = 0.0
    if gates:
        mask_(model, make_plan(model, parse_leap({"target": 0.5, "gates": gates})), share=0.4)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    (card,) = export_run(read_run_or_model(tmp_path), ["shrunk"], tmp_path / "out", threads=1, latency=False)
    folder, name = tmp_path / "out" / "shrunk", str(dtype).removeprefix("torch.")
    loaded = [load_pruned(folder)]
    if layers != 1:  # layers of one width: transformers loads them too
        loaded.append(AutoModelForCausalLM.from_pretrained(folder))
    assert {weight.dtype for each in loaded for weight in each.parameters()} == {dtype}
    assert json.loads((folder / "config.json").read_text())["dtype"] == name
    assert card.notes[0].endswith(f"Its weights are in {name}.")
    assert card.bytes.after < card.bytes.before or dtype == torch.float32
    assert card.logit_difference is not None and card.logit_difference < 1e-5


def test_a_model_of_images_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    tiny("vit", "AutoModelForImageClassification").save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="vit: ViTForImageClassification takes pixel_values; allowed: models of texts"):
        list(export_run(read_run_or_model(tmp_path / "vit"), ["shrunk"], tmp_path / "out", threads=1))
    assert not (tmp_path / "out").exists()


def test_models_are_built_once(run: Run) -> None:
    models = Models(run)
    assert models.shrunk is models.shrunk and models.masked is not models.dense
    state = torch.random.get_rng_state()
    assert all(parameter.count_nonzero() for name, parameter in models.dense.named_parameters() if "weight" in name)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("kind", "expected"), [("bert", 16), ("roberta", 15), ("llama", 16)])
def test_the_longest_input_a_model_takes(kind: str, expected: int) -> None:
    model = classifier(kind)
    assert max_length(model) == expected
    ids = torch.full((1, expected), 5)
    assert model(input_ids=ids).logits.shape == (1, 3)


def test_the_longest_input_where_there_is_no_limit() -> None:
    assert max_length(xlnet()) == LENGTH


# ------------------------------------------------------------------------------ language models


@pytest.fixture(scope="module")
def decoder_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A Llama that lost a third of the neurons of its first layer."""
    model, neuron = language_model(), torch.arange(48) % 3 != 0
    place = "model.layers.0.mlp."
    masks = {f"{place}{part}_proj.weight": neuron[:, None].expand(48, 32).clone() for part in ("gate", "up")}
    masks[f"{place}down_proj.weight"] = neuron.expand(32, 48).clone()
    return read_run(make_run(tmp_path_factory.mktemp("runs") / "run", model, masks, "neuron"))


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all logits that a Llama makes."""
    from transformers import LlamaForCausalLM

    shapes: list[tuple[int, ...]] = []
    forward = LlamaForCausalLM.forward

    def spy(self: Any, *args: Any, **settings: Any) -> Any:
        output = forward(self, *args, **settings)
        shapes.append(tuple(output.logits.shape))
        return output

    spy.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    return shapes


def test_logits_are_not_all_made(
    decoder_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shrunk, "MOST_LOGITS", 4 * 3 * 40)
    shapes = watch(monkeypatch)
    (card,) = export_run(decoder_run, ["shrunk"], tmp_path, threads=1)
    assert (3, 16, 40) not in shapes and (3, 4, 40) in shapes  # comparing
    assert (32, 16, 40) not in shapes and (32, 1, 40) in shapes  # measuring
    assert "Latency with the logits of the last token alone, as in generation." in card.page()
    assert card.logit_difference is not None and card.logit_difference < 1e-5
    shown = capsys.readouterr().err
    assert "shrunk: comparing logits with the masked model's, 6 of 6" in shown
    assert re.search(r"shrunk: measuring latency at batch 32 \(\d\d% done, about \d+:\d\d left\)", shown)


def test_a_fault_at_any_compared_token_is_found(decoder_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrunk, "MOST_LOGITS", 4 * 3 * 40)
    models = Models(decoder_run)
    wrong = load_exported(decoder_run.model)
    with torch.no_grad():
        wrong.model.layers[1].mlp.down_proj.weight[0, 0] += 0.1
    assert shrunk.largest_difference(models.masked, wrong) > 1e-3
    assert shrunk.largest_difference(models.masked, models.shrunk) < 1e-5


def test_no_latency(decoder_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "medians", lambda *_: pytest.fail("measured all the same"))
    (card,) = export_run(decoder_run, ["shrunk"], tmp_path, threads=1, latency=False)
    assert card.latency == [] and "atency" not in card.page() and card.flops_after is not None


def test_a_batch_that_would_take_too_long(decoder_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "LONGEST", 1e-6)
    (card,) = export_run(decoder_run, ["shrunk"], tmp_path, threads=1)
    assert [time.batch for time in card.latency] == [1]
    assert "Latency at batch 32 is not measured: a call of each would take about " in card.page()


def test_a_tokenizer_without_its_file_is_found_before_anything_is_written(tmp_path: Path) -> None:
    model = classifier()
    run = read_run(make_run(tmp_path / "run", model, structure_masks(model), "head"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (run.model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"its tokenizer cannot be loaded: .*; there is no tokenizer\.json; rest"):
        list(export_run(run, ["hf", "shrunk"], tmp_path / "out", threads=1, latency=False))
    assert not (tmp_path / "out").exists()


def test_all_work_is_in_the_total(decoder_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shrunk model is compared once for all kinds, and once more as it is read again."""
    wanted = ["hf", "shrunk", "gguf_q8_0"]
    list(export_run(decoder_run, wanted, tmp_path, threads=1, latency=False))
    length = 16
    compared = 2 * 4 * (1 + length // 2 + length)
    total = 3 * compared + 3 * 2 * length
    said = re.findall(r"gguf_q8_0: counting FLOPs \((\d+)% done", capsys.readouterr().err)
    assert said == [f"{1 - 2 * length / total:.0%}"[:-1]]
