"""What lies in a model's folder, and in that of its exports, where tokens are left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from leap_dist.errors import UserError
from leap_dist.export.kinds import export_run
from leap_dist.export.vocabulary import Wanted
from leap_dist.run_folder import read_run_or_model
from tests.disks import fill
from tests.export.test_vocabulary import USED, make_model, text

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("left", ["vocab.txt", "tokenizer.json"])
def test_a_model_folder_with_a_vocabulary_alone_keeps_its_tokenizer(left: str, tmp_path: Path) -> None:
    """Folders of older models have no tokenizer_config.json: the model's config says whose vocabulary it is."""
    source = make_model(tmp_path / "model", "bert")
    numbers = AutoTokenizer.from_pretrained(source).get_vocab()
    for file in [*source.glob("tokenizer*.json"), *source.glob("special_tokens*")]:
        if file.name != left:
            file.unlink()
    if left == "vocab.txt":
        (source / left).write_text("\n".join(sorted(numbers, key=lambda word: numbers[word])) + "\n", "utf-8")
    before, wanted = AutoTokenizer.from_pretrained(source), Wanted([text(tmp_path)])
    line = USED.splitlines()[2]
    for kinds, fewer in ((["hf", "shrunk"], None), (["hf", "shrunk"], wanted)):
        output = tmp_path / f"out {fewer is None}"
        for card in export_run(read_run_or_model(source), kinds, output, 1, False, fewer):
            after = AutoTokenizer.from_pretrained(output / card.kind)
            assert after.tokenize(line) == before.tokenize(line) != []
            assert (len(after) < len(before)) == (fewer is not None)


def test_the_smaller_model_lies_in_the_folder_of_the_exports(tmp_path: Path, small_disk: Path) -> None:
    """Beside that folder nothing can be written here; and what a kill leaves in it goes with the next export."""
    source, wanted = make_model(tmp_path / "model", "bert"), Wanted([text(tmp_path)])
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / ".others.lock").write_text("")
    (tmp_path / "wide" / ".others.partial").mkdir()
    (small_disk / "out").symlink_to(tmp_path / "wide")
    fill(small_disk)
    cards = export_run(read_run_or_model(source), ["hf", "shrunk"], small_disk / "out", 1, False, wanted)
    next(cards)
    assert len(list((tmp_path / "wide").glob(".vocabulary.*.partial"))) == 1
    assert [card.kind for card in cards] == ["shrunk"]
    assert sorted(path.name for path in (tmp_path / "wide").iterdir()) == [
        ".others.lock",
        ".others.partial",
        "hf",
        "shrunk",
    ]


def test_a_file_that_cannot_be_copied_is_named(tmp_path: Path) -> None:
    """The disk is not to blame for a link to nothing, as a hub's cache may have."""
    source = make_model(tmp_path / "model", "bert")
    (source / "notes.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"/model/notes\.txt: cannot be copied: .*No such file.*; restore it, or take"):
        list(export_run(read_run_or_model(source), ["hf"], tmp_path / "out", 1, False))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """Also where a folder says that it takes files, as root is told of this one."""
    source = make_model(tmp_path / "model", "bert")
    with pytest.raises(UserError, match=r"^--output: /proc/nothing(/hf)? cannot be (made|written): "):
        list(export_run(read_run_or_model(source), ["hf"], Path("/proc/nothing"), 1, False))
