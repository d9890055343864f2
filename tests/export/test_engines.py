"""The table of engines: what an export says that it loads in is what loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leap_dist.export.kinds import export_run
from leap_dist.run_folder import read_run
from tests.export.runs import classifier, expert_masks, language_model, layer_masks, make_run, structure_masks

pytestmark = pytest.mark.slow

IDS = torch.arange(1, 9).view(1, 8)


def neurons(model: Any, layers: list[int]) -> dict[str, torch.Tensor]:
    """Masks that take a third of the neurons of some layers."""
    alive, masks = torch.arange(48) % 3 != 0, {}
    for layer in layers:
        place = f"model.layers.{layer}.mlp."
        masks |= {f"{place}{part}_proj.weight": alive[:, None].expand(48, 32).clone() for part in ("gate", "up")}
        masks[f"{place}down_proj.weight"] = alive.expand(32, 48).clone()
    return masks


def test_alike_layers_load_everywhere(tmp_path: Path) -> None:
    """transformers gives the same tokens from the shrunk folder as from the run's."""
    from transformers import AutoModelForCausalLM

    model = language_model()
    run = read_run(make_run(tmp_path / "run", model, neurons(model, [0, 1]), "neuron"))
    hf, small = export_run(run, ["hf", "shrunk"], tmp_path / "out", threads=1, latency=False)
    assert [(engine.name, engine.loads) for engine in small.engines] == [
        ("leap_dist.load_pruned", True),
        ("transformers AutoModel", True),
        ("vLLM", True),
        ("llama.cpp", True),
    ]
    assert [engine.loads for engine in hf.engines] == [True, True]
    said = [
        AutoModelForCausalLM.from_pretrained(folder).generate(IDS, max_new_tokens=6, do_sample=False).tolist()
        for folder in (run.model, tmp_path / "out" / "shrunk")
    ]
    assert said[0] == said[1]


def test_layers_that_differ_load_in_less(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = language_model()
    run = read_run(make_run(tmp_path / "run", model, neurons(model, [0]), "neuron"))
    (small,) = export_run(run, ["shrunk"], tmp_path / "out", threads=1, latency=False)
    loads = {engine.name: engine for engine in small.engines}
    assert not loads["transformers AutoModel"].loads and not loads["vLLM"].loads and loads["llama.cpp"].loads
    assert '"uniform": true' in loads["vLLM"].note
    assert "| vLLM | no | no config of transformers describes it: prune with" in small.page()
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "shrunk")


def width_masks(model: Any) -> dict[str, torch.Tensor]:
    """Of a BERT: half the dimensions of its stream, of all that has as many at its end or at its start."""
    kept = torch.arange(32) % 2 == 0
    masks = {}
    for name, value in model.named_parameters():
        if value.shape[-1] == 32:
            masks[name] = kept.expand(value.shape).clone()
        elif value.shape[0] == 32:
            masks[name] = kept[:, None].expand(value.shape).clone()
    return masks


@pytest.mark.parametrize(
    ("granularity", "kind", "masks", "says"),
    [
        ("depth", "bert", layer_masks, "layers were removed, it would still compute their norms: use shrunk"),
        ("hidden", "bert", width_masks, "dimensions were removed, it would still take the means of norms over all"),
        ("expert", "mixtral", expert_masks, "experts were removed, it would still route tokens to them: use shrunk"),
    ],
)
def test_a_model_that_stock_code_computes_otherwise(
    granularity: str, kind: str, masks: Any, says: str, tmp_path: Path
) -> None:
    """The table says no to AutoModel where the card's notes say that it computes something else."""
    model = classifier(kind, **({"num_local_experts": 4} if kind == "mixtral" else {}))
    run = read_run(make_run(tmp_path / "run", model, masks(model), granularity))
    (card,) = export_run(run, ["hf"], tmp_path / "out", threads=1, latency=False)
    assert card.logit_difference is not None and card.logit_difference > 1e-3
    assert [engine.loads for engine in card.engines] == [False] * len(card.engines) != []
    assert card.engines[0].note.startswith(says) and "Serve the `shrunk` export." in card.page()


def test_layers_of_which_stock_code_computes_nothing(tmp_path: Path) -> None:
    """Where the norm is before the sum a layer without weights adds nothing."""
    model = language_model()
    names = [name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")]
    masks = {name: torch.zeros_like(model.get_parameter(name), dtype=torch.bool) for name in names}
    run = read_run(make_run(tmp_path / "run", model, masks, "depth"))
    (card,) = export_run(run, ["hf"], tmp_path / "out", threads=1, latency=False)
    assert card.logit_difference == 0 and all(engine.loads for engine in card.engines)


def test_a_classifier(tmp_path: Path) -> None:
    model = classifier()
    run = read_run(make_run(tmp_path / "run", model, structure_masks(model), "head"))
    (card,) = export_run(run, ["mask"], tmp_path / "out", threads=1)
    (small,) = export_run(run, ["shrunk"], tmp_path / "out", threads=1, latency=False)
    assert card.engines == [] and [engine.name for engine in small.engines] == [
        "leap_dist.load_pruned",
        "transformers AutoModel",
    ]
