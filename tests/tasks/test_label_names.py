"""Labels by name and by number: which class is which, also where data and model call them differently."""

from __future__ import annotations

from typing import Any

import pytest

from leap_dist.errors import UserError
from leap_dist.tasks import load_task
from tests.tasks.test_glue import TEXT


def test_known_names_in_another_case_are_those_classes(files: Any, tokenizer: Any) -> None:
    """F1 is that of class 1, which the alphabet would make "Not_Equivalent"."""
    table = "sentence1\tsentence2\tlabel\na\tb\tEquivalent\na\tc\tNot_Equivalent\n"
    task = load_task(files(table, task="glue/mrpc"), tokenizer)
    assert [example["labels"] for example in task.train] == [1, 0]
    assert task.label_names == ("not_equivalent", "equivalent")


PARTLY = (
    r"allowed: not_equivalent, equivalent, the classes of glue/mrpc, or in all rows their numbers, from 0 to 1; ren"
)


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [
        ("glue/mrpc", ["equivalent", "not equivalent"], rf"line 3, column \"label\": got 'not equivalent'; {PARTLY}"),
        ("glue/mrpc", ["same", "other"], rf"line 2, column \"label\": got 'same'; {PARTLY}"),
        ("glue/mrpc", ["equivalent", "0"], rf"line 3, column \"label\": got '0'; {PARTLY}"),
        ("glue/mrpc", ["1", "no"], rf"line 3, column \"label\": got 'no'; {PARTLY}"),
        ("glue/qqp", ["y", "n"], r"got 'y'; allowed: not_duplicate, duplicate, the classes of glue/qqp"),
        ("glue/rte", ["entailment", "not-entailment"], r"got 'not-entailment'; allowed: entailment, not_entailment"),
        ("glue/sst2", ["positive", "neg"], r"got 'neg'; allowed: negative, positive, the classes of glue/sst2"),
    ],
)
def test_names_that_are_known_in_part(files: Any, tokenizer: Any, task: str, labels: list[str], message: str) -> None:
    """The alphabet would number them anew, and F1 be that of the other class."""
    table = "s\tlabel\n" + "".join(f"a\t{label}\n" for label in labels)
    with pytest.raises(UserError, match=rf"train\.tsv: .*{message}"):
        load_task(files(table, task=task, text="s"), tokenizer)


def test_classes_of_thousands_of_digits(files: Any, tokenizer: Any) -> None:
    """More than Python makes an integer of."""
    labels = ["9" * 5000, "1" + "0" * 5000, "007"]
    table = "text,label\n" + "".join(f"a,{label}\n" for label in labels)
    task = load_task(files(table, suffix=".csv", **TEXT), tokenizer)
    assert [example["labels"] for example in task.train] == [1, 2, 0]


@pytest.mark.parametrize(
    ("labels", "classes", "ids"),
    [
        ("10", ("bad", "good"), [1, 0]),  # as a head that was trained before calls them
        ("11", ("bad", "good"), [1, 1]),
        ("21", ("1", "2"), [1, 0]),
        ("11", ("1", "0"), [0, 0]),
    ],
)
def test_numbers_in_the_data_of_a_trained_model(
    files: Any, tokenizer: Any, labels: str, classes: tuple[str, ...], ids: list[int]
) -> None:
    data = files("text\tlabel\n" + "".join(f"a\t{label}\n" for label in labels), **TEXT)
    task = load_task(data, tokenizer, classes)
    assert [example["labels"] for example in task.validation["validation"]] == ids
    assert task.label_names == classes
    with pytest.raises(UserError, match=r"got '2'; allowed: bad, good$"):
        load_task(files("text\tlabel\na\t2\n", **TEXT), tokenizer, ("bad", "good"))
