"""2:4 models pass, others are refused by name; on the CPU the export loads dense."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from leap_dist.errors import UserError
from leap_dist.export.kinds import export_run
from leap_dist.export.semi_structured import (
    check_semi_structured,
    crowded_groups,
    load_semi_structured,
    write_marker,
)
from leap_dist.run_folder import read_run, read_run_or_model
from tests.export.runs import DOWN, QUERY, UP, classifier, make_run

pytestmark = pytest.mark.slow


def two_of_four(rows: int, columns: int) -> torch.Tensor:
    """Two random places of every four neighbours in a row."""
    places = torch.rand(rows, columns // 4, 4).argsort(dim=-1)
    return (places < 2).view(rows, columns)


def test_groups_lie_along_the_inputs() -> None:
    weight = torch.zeros(4, 8)
    weight[:, 0] = 1
    assert crowded_groups(weight) == 0
    assert crowded_groups(weight.T.reshape(8, 4)) == 1
    weight[1, 4:7] = 1
    weight[3, 4:] = -1
    assert crowded_groups(weight) == 2


def test_a_model_that_is_2_4_loads_dense_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = classifier()
    masks = {QUERY: two_of_four(32, 32), UP: two_of_four(48, 32)}
    run = read_run(make_run(tmp_path / "run", model, masks, "2:4"))
    names = check_semi_structured(run)
    assert names == [QUERY, UP]
    folder = Path(shutil.copytree(run.model, tmp_path / "export"))
    write_marker(folder, names)
    loaded = load_semi_structured(folder)
    ids = torch.arange(1, 13).view(2, 6)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 2:4 kernels")
def test_a_gpu_computes_the_same(tmp_path: Path) -> None:
    model = classifier(hidden_size=128, intermediate_size=256)
    masks = {QUERY: two_of_four(128, 128), UP: two_of_four(256, 128)}
    run = read_run(make_run(tmp_path / "run", model, masks, "2:4"))
    write_marker(run.model, [QUERY, UP])
    sparse = load_semi_structured(run.model)
    ids = torch.arange(1, 13).view(2, 6).cuda()
    expected = model.cuda().half()(input_ids=ids).logits
    assert type(sparse.get_parameter(QUERY)) is not torch.nn.Parameter
    assert torch.allclose(sparse(input_ids=ids).logits, expected, rtol=1e-2, atol=1e-2)


def test_other_models_are_refused_by_name(tmp_path: Path) -> None:
    masks = {QUERY: two_of_four(32, 32), UP: torch.ones(48, 32, dtype=torch.bool)}
    masks[DOWN] = two_of_four(32, 48)
    masks[DOWN][0, :4] = True
    run = read_run(make_run(tmp_path / "run", classifier(), masks, "2:4"))
    with pytest.raises(UserError, match="the model is not 2:4 sparse; allowed: at most 2 weights left") as caught:
        check_semi_structured(run)
    assert f"{UP} has 384 of 384 groups with 3 or 4; {DOWN} has 1 of 384" in str(caught.value)
    assert QUERY not in str(caught.value)


def test_a_model_that_nothing_pruned_is_refused(tmp_path: Path) -> None:
    classifier().save_pretrained(tmp_path / "model")
    message = (
        r'--to semi_structured: got .*model, of which no matrix was pruned; allowed: a run with "gates": \["2:4"\]'
    )
    with pytest.raises(UserError, match=message):
        list(export_run(read_run_or_model(tmp_path / "model"), ["semi_structured"], tmp_path / "out", threads=1))
    assert not (tmp_path / "out").exists()


def test_a_width_that_four_does_not_divide_is_refused(tmp_path: Path) -> None:
    model = classifier(intermediate_size=30)
    run = read_run(make_run(tmp_path / "run", model, {DOWN: torch.zeros(32, 30, dtype=torch.bool)}))
    with pytest.raises(UserError, match=r"output\.dense\.weight is \(32, 30\), no matrix with a multiple of 4 inputs"):
        check_semi_structured(run)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a semi_structured export: it has no readable semi_structured\.json"):
        load_semi_structured(tmp_path)
