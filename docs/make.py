"""Writes what docs/ takes from the code: `python docs/make.py` makes docs/keys.md and the tree in docs/architecture.md.

Keys, their meanings, defaults and allowed values come from the sections that check a job file and a sweep file;
the tree says of every file what the first sentence of its docstring says. tests/test_docs.py compares both.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from annotated_types import Gt
from pydantic.fields import FieldInfo

from leap_dist.config.job_file import _section_in as section_in
from leap_dist.config.section import Section
from leap_dist.config.sections import OPTIONAL, SECTIONS
from leap_dist.sweep.sweep_file import SweepConfig

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "leap_dist"
KEYS, ARCHITECTURE = DOCS / "keys.md", DOCS / "architecture.md"
WIDTH = 158
READING_ORDER = (
    *(
        "config",
        "ops",
        "core",
        "tasks",
        "models",
        "zero",
        "export",
        "checkpoint",
        "tracking",
        "train",
        "bench",
        "sweep",
    ),
)
OTHER_FILES = {".html": "a template of report.html", ".css": "its style", ".js": "its script"}

HEAD = """\
# Every key

This page is made from `leap_dist/config/sections.py` and its neighbours by `python docs/make.py`; do not edit it.

A job file is one JSON object. Its top level is a [DeepSpeed config](https://www.deepspeed.ai/docs/config-json/); beside
DeepSpeed's keys stand the sections below. `--set section.key=value` overrides a key. [jobs.md](jobs.md) shows whole
files.
"""

# ---------------------------------------------------------------------------------------------- keys


def keys_page() -> str:
    """docs/keys.md."""
    parts = [HEAD]
    for name, cls in SECTIONS.items():
        optional = " (optional)" if name in OPTIONAL else ""
        parts.append(f"## Section `{name}`{optional}\n\n{inspect.getdoc(cls)}\n\n{entries(cls, f'{name}.')}")
    parts.append(
        f"## A sweep file\n\nRead by `launch/sweep.py`; see [sweeps.md](sweeps.md).\n\n{entries(SweepConfig, '')}"
    )
    return "\n".join(parts)


def entries(cls: type[Section], prefix: str) -> str:
    """A list of a section's keys; those of sections inside it follow theirs."""
    lines: list[str] = []
    meanings = field_docstrings(cls)
    for key, field in cls.model_fields.items():
        facts = [meanings.get(key, ""), f"Allowed: {field.description}.", default_of(field)]
        text = " ".join(fact for fact in facts if fact)
        lines += textwrap.wrap(f"- **`{prefix}{key}`**: {text}", WIDTH, subsequent_indent="  ", break_long_words=False)
        if inner := section_in(field.annotation):
            many = "[]" if "tuple" in str(field.annotation) else ""
            lines += entries(inner, f"{prefix}{key}{many}.").splitlines()
    return "\n".join(lines) + "\n"


def default_of(field: FieldInfo) -> str:
    """The default as it would stand in the file; nothing where it is made when it is needed: the meaning says how."""
    if field.is_required():
        return "Required."
    if field.default_factory is not None:
        return ""
    if field.default is not None and any(isinstance(at, Gt) and field.default <= at.gt for at in field.metadata):
        return ""  # it stands for no value, as the meaning says
    return f"Default: `{json.dumps(written(field.default))}`."


def written(value: Any) -> Any:
    """A default in the form of the file."""
    if isinstance(value, tuple):
        return [written(item) for item in value]
    if isinstance(value, Section):
        given = value.model_dump(exclude_defaults=True)
        return given["granularity"] if given.keys() == {"granularity"} else given
    return value


def field_docstrings(cls: type[Section]) -> dict[str, str]:
    """The string below each field of a class, by name."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            found[field.target.id] = " ".join(str(after.value.value).split())  # type: ignore[attr-defined]
    return found


# ---------------------------------------------------------------------------------------------- tree


def tree() -> str:
    """Every file of leap_dist with the first sentence of its docstring, in reading order."""
    lines = ["leap_dist/"]
    lines += [line for file in sorted(PACKAGE.glob("*.py")) if (line := tree_line(file, "  "))]
    folders = {folder.name: folder for folder in PACKAGE.iterdir() if folder.is_dir() and folder.name[0] not in "._"}
    for name in (*READING_ORDER, *sorted(folders.keys() - set(READING_ORDER))):
        lines += folder_lines(folders[name], "  ")
    return "\n".join(lines)


def folder_lines(folder: Path, indent: str) -> Iterator[str]:
    """A folder and what is in it."""
    start = folder / "__init__.py"
    yield line_of(f"{indent}{folder.name}/", first_sentence(start) if start.is_file() else "")
    for file in sorted(folder.iterdir()):
        if file.is_dir() and file.name[0] not in "._":
            yield from folder_lines(file, f"{indent}  ")
        elif file.is_file() and (line := tree_line(file, f"{indent}  ")):
            yield line


def tree_line(file: Path, indent: str) -> str:
    """The line of a file; none for a folder's __init__.py, which the folder's own line stands for."""
    if file.suffix in OTHER_FILES:
        return line_of(f"{indent}{file.name}", OTHER_FILES[file.suffix])
    if file.suffix != ".py" or (file.name == "__init__.py" and file.parent != PACKAGE):
        return ""
    return line_of(f"{indent}{file.name}", first_sentence(file))


def line_of(name: str, text: str) -> str:
    return f"{name:<28}{text}".rstrip()


def first_sentence(file: Path) -> str:
    """The first line of a module's docstring: what the file is for."""
    docstring = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return docstring.split("\n\n")[0].replace("\n", " ").removesuffix(".")


def with_tree(page: str) -> str:
    """docs/architecture.md with the tree of today."""
    head, mark, rest = page.partition("```text\nleap_dist/\n")
    assert mark, f"{ARCHITECTURE}: no block that begins with leap_dist/"
    return f"{head}```text\n{tree()}\n{rest[rest.index('```') :]}"


if __name__ == "__main__":
    KEYS.write_text(keys_page(), "utf-8")
    ARCHITECTURE.write_text(with_tree(ARCHITECTURE.read_text("utf-8")), "utf-8")
