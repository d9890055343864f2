"""Pictures: what stands in them, that they are the same each time, and what of them gets into a page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leap_dist.errors import UserError
from leap_dist.tracking.pareto import Point, picture_of
from leap_dist.tracking.plots import COLOURS, DARK, INK, Picture, inline, save, save_all
from leap_dist.tracking.run_plots import course, kept, scores
from leap_dist.tracking.slices import Slice, slices
from tests.tracking.folders import LAYERS, certificate, gates, steps

pytestmark = pytest.mark.slow


def texts(picture: Picture, file: Path) -> list[str]:
    """The words in a picture; they are text in an SVG."""
    save(picture, file)
    return re.findall(r"<text [^>]*>([^<]*)</text>", file.read_text("utf-8"))


def test_the_course_of_a_run(tmp_path: Path) -> None:
    found = texts(course(steps(), 0.5), tmp_path / "a.svg")
    assert {"dense", "prune", "settle", "optimizer step", "training loss", "target 0.5", "scheduled level"} <= set(
        found
    )
    assert any("density of 0.5" in text for text in found)
    long = [{**line, "step": line["step"] * 1000 + more} for line in steps() for more in range(1000)]
    save(course(long, 0.5), tmp_path / "long.svg")
    assert (tmp_path / "long.svg").stat().st_size < 200_000  # 30,000 points, thinned


def test_every_matrix_and_head_by_layer(tmp_path: Path) -> None:
    found = texts(kept(certificate()["tensors"], gates()), tmp_path / "a.svg")
    assert " ".join(map(str, range(LAYERS))) in " ".join(found)
    assert {"query", "attention.output.dense", "intermediate.dense", "output.dense", "keep ratio"} <= set(found)
    assert found.count("0.50") == LAYERS * 4 and "Heads kept (blue)" in found  # no cell for a bias


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["transformer.h.2.attn.c_attn.weight", "transformer.h.10.attn.c_attn.weight"], {"2", "10", "c_attn"}),
        (["encoder.block.0.layer.0.q.weight", "decoder.block.0.layer.0.q.weight"], {"encoder.block.0", "q"}),
        (["0.weight", "2.weight", "head.weight"], {"0", "2", "none", "weight", "head"}),
        (["model.layers.0.mlp.experts.down_proj"], {"0", "down_proj"}),
    ],
)
def test_layers_and_matrices_of_other_models(names: list[str], labels: set[str], tmp_path: Path) -> None:
    tensor = {"density": 0.25, "counted": True}
    found = texts(kept(dict.fromkeys(names, tensor), []), tmp_path / "a.svg")
    assert labels <= set(found) and found.count("0.25") == len(names)


def test_a_very_large_model_has_a_picture_of_bounded_size(tmp_path: Path) -> None:
    tensor = {"density": 0.25, "counted": True}
    names = [f"layers.{layer}.experts.{expert}.up.weight" for layer in range(50) for expert in range(41)]
    picture = kept(dict.fromkeys(names, tensor), [])
    assert max(picture.size) < 40
    found = texts(picture, tmp_path / "a.svg")
    assert "0.25" not in found and {"0", "2", "48", "0.up", "40.up"} <= set(found) and not {"1", "1.up"} & set(found)


def test_scores_around_the_cut_by_granularity(tmp_path: Path) -> None:
    found = texts(scores(gates(), 4.0), tmp_path / "a.svg")
    assert {f"head: {2 * LAYERS} of {4 * LAYERS} kept", "element: 500 of 1,000 kept", "cut", "removed"} <= set(found)


def test_light_and_dark_files_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    picture = scores(gates(), 4.0)
    files = save_all(picture, tmp_path / "a")
    assert [file.name for file in files] == ["a.png", "a.svg", "a_dark.svg"]
    light, dark = (file.read_text("utf-8") for file in files[1:])
    assert INK in light and INK not in dark and DARK[INK] in dark and DARK[INK] not in light
    assert files[0].read_bytes().startswith(b"\x89PNG")
    save(picture, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text("utf-8") == light


def test_the_front_is_ringed_and_of_too_many_lines_the_best_are_shown(tmp_path: Path) -> None:
    points = [
        Point("t", "a", 0.5, 0.8, 0.9),
        Point("t", "a", 0.2, 0.7, 0.9),
        Point("t", "b", 0.4, 0.6, 0.9, spread=0.1),
    ]
    assert {"Pareto front", "dense model", "a", "b", "accuracy"} <= set(
        texts(picture_of(points, "accuracy"), tmp_path / "a.svg")
    )
    many = [Point("t", f"line {n}", 0.1 * n, 0.1 * n, None) for n in range(1, len(COLOURS) + 2)]
    found = texts(picture_of(many, "loss"), tmp_path / "b.svg")
    assert "best of all" in found and "line 1" not in found


# ------------------------------------------------------------------------------ in a page


HOSTILE = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
 width="72pt" height="9pt" viewBox="0 0 1 1" onload="alert(1)"><script>alert(2)</script>
 <style>* {{ display: none }}</style>
 <foreignObject><b>x</b></foreignObject><image xlink:href="http://far/x.png"/><a xlink:href="javascript:x">y</a>
 <defs><path id="m" d="M 0 0"/></defs><use xlink:href="#m"/><g id="unused" clip-path="url(#m)"/>
 <rect style="fill: {ink}"/><rect style="fill: url(http://far)"/></svg>"""


def test_settings_of_a_search_over_decades_have_plain_numbers(tmp_path: Path) -> None:
    rates = Slice("train.learning_rate", [1e-4, 3e-3, 9e-3], 0.7)
    rules = Slice("leap.rule", ["leap", "movement", "leap"])
    found = texts(slices([rules, rates], "loss", [0.5, 0.4, 0.3], [0.1, 0.1, 0.2]), tmp_path / "a.svg")
    assert found.index("train.learning_rate (70%)") < found.index("leap.rule")
    assert {"0.0001", "0.001", "0.01", "leap", "movement", "density"} <= set(found)
    assert not [text for text in found if "$" in text]


def test_only_drawing_gets_into_a_page(tmp_path: Path) -> None:
    file = tmp_path / "a.svg"
    file.write_text(HOSTILE.format(ink=INK))
    found = inline(file, "p1-", 'the "label"')
    assert not re.search(r"alert|script|style>|foreign|far|javascript|onload|unused|<b>", found)
    assert 'id="p1-m"' in found and 'href="#p1-m"' in found and 'clip-path="url(#p1-m)"' in found
    assert "fill: var(--ink)" in found and 'aria-label="the &quot;label&quot;"' in found
    assert "width: 65px" in found.replace("min-", "") and 'width="' not in found


def test_what_is_no_picture_is_told(tmp_path: Path) -> None:
    for text in ("<svg", "<svg/>", '<svg width="wide"/>'):
        (tmp_path / "a.svg").write_text(text)
        with pytest.raises(UserError, match=r"a\.svg: damaged: not an SVG file of ours: .*; remove it, or write"):
            inline(tmp_path / "a.svg", "p", "x")
