"""All the texts in files of any kind that tasks are read from, without the settings of a task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leap_dist.errors import UserError
from leap_dist.tasks.documents import read_document
from leap_dist.tasks.files import kind_of, read_text
from leap_dist.tasks.squad import official_questions
from leap_dist.tasks.tables import TABLES, check_letters, read_rows


def texts_in(key: str, file: Path) -> list[str]:
    """Each text once: a plain file as a whole, the cells of a table's rows, SQuAD's paragraphs and questions.

    Cells that are numbers (ids, labels) are no texts. `key` is the setting that names the file. UserError for a file
    that is not there, holds no text, or is not what its name says.
    """
    kind = kind_of(file)
    if kind == ".json" and not read_text(key, file).lstrip().startswith("["):  # a list is rows
        found = [text for asked in official_questions(key, file) for text in (asked.context, asked.question)]
    elif kind in TABLES:
        found = [cell for place, row in read_rows(key, file) for cell in _strings(row, place)]
    else:
        found = [read_document(key, file)]
    texts = [text for text in dict.fromkeys(found) if text.strip()]
    if not texts:
        raise UserError(f"{key}: {file}: no text in it")
    return texts


def _strings(value: Any, place: str) -> Iterator[str]:
    """All strings in a row, in lists and objects inside it too; `place`: where the row stands."""
    if isinstance(value, str):
        if not _is_number(value):
            check_letters(value, place)
            yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner, place)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
