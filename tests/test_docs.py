"""The pages themselves: what is made from code is current, links lead somewhere, lines and words keep their limits."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType

import pytest

from leap_dist.config.job_file import load_job
from leap_dist.config.sections import SECTIONS
from leap_dist.errors import UserError
from tests.pages import PAGES, README, ROOT, Page

WIDEST = 160
MOST_WORDS = 1500
STIFF = r"\b(?:(?:is|are|was) told|tells so|passed over|go(?:es|ne)? on with|goes on|for want of|nobody gets)\b"
"""Plainer: reported, skipped, resumes, without, no one."""
SPOKEN = [*sorted((ROOT / "leap_dist").rglob("*.*")), *sorted((ROOT / "launch").glob("*.py"))]


def load_make() -> ModuleType:
    """docs/make.py."""
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load_make()


def test_the_key_reference_is_current() -> None:
    assert make.KEYS.read_text("utf-8") == make.keys_page(), "run: python docs/make.py"


@pytest.mark.parametrize("name", sorted(SECTIONS.keys() - {"family"}))  # there what is allowed says what it means
def test_every_key_has_a_meaning(name: str) -> None:
    assert not SECTIONS[name].model_fields.keys() - make.field_docstrings(SECTIONS[name]).keys()


def test_every_file_stands_in_the_tree_and_nothing_else() -> None:
    page = make.ARCHITECTURE.read_text("utf-8")
    assert page == make.with_tree(page), "run: python docs/make.py"
    found, folders = set(), []
    for line in make.tree().splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders = [*folders[:depth], name]
        found |= {"".join(folders)} if not name.endswith("/") else set()
    ours = [file for file in (ROOT / "leap_dist").rglob("*.*") if "__pycache__" not in file.parts]
    ours = [file for file in ours if file.name != "__init__.py" or file.parent.name == "leap_dist"]
    assert found == {str(file.relative_to(ROOT)) for file in ours}
    assert all(f"  {file.name} " in page for file in (ROOT / "launch").glob("*.py"))


def test_every_page_is_linked_from_the_index() -> None:
    index = next(page for page in PAGES if page.name == "docs/README.md")
    others = {page.path.name for page in PAGES if page.path.parent == index.path.parent} - {"README.md"}
    assert others <= {link.partition("#")[0] for link in index.links()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page) -> None:
    for link in page.links():
        name, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            target = (page.path.parent / name).resolve() if name else page.path
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in Page(target).anchors(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_is_too_long(page: Page) -> None:
    wide = [number for number, line in enumerate(page.text.splitlines(), start=1) if len(line) > WIDEST]
    assert not wide, f"{page.name}: lines {wide} have more than {WIDEST} columns"


def test_the_readme_is_one_page() -> None:
    assert len(README.text.split()) <= MOST_WORDS


def test_words_are_plain() -> None:
    texts = {page.name: page.text for page in PAGES}
    texts |= {str(f.relative_to(ROOT)): f.read_text("utf-8") for f in SPOKEN if f.suffix in (".py", ".html", ".js")}
    found = [
        f"{name}:{text[: match.start()].count(chr(10)) + 1}: {match[0]}"
        for name, text in texts.items()
        for match in re.finditer(STIFF, text)
    ]
    assert not found, "\n".join(found)


def test_the_message_that_is_shown_is_the_one_that_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    page = next(page for page in PAGES if page.name == "docs/troubleshooting.md")
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        load_job("configs/ds_leap.json", ["leap.target=7"])
    assert page.blocks("text") == [f"error: {error.value}\n"]
