"""Every mistake in a conversation, its template or its tokenizer is one message."""

from __future__ import annotations

from typing import Any

import pytest

from leap_dist.errors import UserError
from leap_dist.tasks import load_task
from tests.tasks.test_chats import TEMPLATES, TURNS, called

HIDES = "{% if messages[-1]['role'] == 'assistant' %}a{% endif %}" + TEMPLATES["plain"]


def with_turn(**changes: Any) -> dict[str, Any]:
    return {"messages": [TURNS[1], {**TURNS[2], **changes}]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": TURNS[:2]}, r"no answer, the messages are of system, user; allowed: at least one of assistant"),
        ({"messages": []}, r'column "messages": got an empty list; allowed: a list of messages'),
        ({"messages": None}, r'column "messages": got None; allowed: a list of messages'),
        ({"messages": {"role": "user"}}, r"got \{'role': 'user'\}; allowed: a list of messages"),
        ({"messages": ["hello"]}, r'message 1: got hello; allowed: \{"role": \.\.\., "content": \.\.\.\}'),
        ({"messages": [{"from": "human", "value": "x"}]}, r"message 1: got \{'from': 'human', 'value': 'x'\}; allowed"),
        (with_turn(role="bot"), r"message 2: role: got bot; allowed: system, developer, user, assistant, tool"),
        (with_turn(role=3), r"message 2: role: got 3; allowed: system"),
        (with_turn(content=None), r"message 2: content: got nothing; allowed: text"),
        (with_turn(content=[{"type": "image"}]), r"message 2: content: got \[\{'type': 'image'\}\]; allowed: text"),
        (with_turn(content="a\ud800"), r'"messages": message 2: content: .ud800 at character 2 is half of a surrogate'),
        (
            with_turn(name="\udfff"),
            r"message 2: name: .udfff at character 1 is half of a surrogate pair, not text; save",
        ),
        (
            {"messages": [TURNS[1], called(**{"zone\ud800": "x"})]},
            r"message 2: tool_calls: .ud800 at character 5 is half of a surrogate pair, not text; save the file again",
        ),
        (
            {"messages": TURNS, "tools": [{"name": ["\ud83d"]}]},
            r'column "tools": .ud83d at character 1 is half of a sur',
        ),
        (with_turn(content=" "), r"message 2: an answer without text; remove the row, or give the answer"),
        (with_turn(weight=0.5), r"message 2: weight: got 0.5; allowed: 1, or 0: it is not learned"),
        (with_turn(weight="0"), r"message 2: weight: got \"0\"; allowed: 1, or 0"),
        (with_turn(weight=0), r'column "messages": no answer to learn, weight is 0 in all; allowed: at least one of 1'),
    ],
)
def test_what_is_no_conversation(rows: Any, speaker: Any, row: dict[str, Any], message: str) -> None:
    speaker.chat_template = TEMPLATES["plain"]
    with pytest.raises(UserError, match=rf"chat\.jsonl: line 2.*{message}"):
        load_task(rows([{"messages": TURNS}, row]), speaker)


@pytest.mark.parametrize(
    ("found", "settings", "message"),
    [
        ([{"prompt": "a", "completion": ""}], {}, r'line 1, column "completion": an answer without text'),
        ([{"prompt": "a", "completion": None}], {}, r'line 1: nothing in column "completion"'),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], {}, r'line 2: no "completion" in it; it has prompt'),
        (
            [{"text": "a", "messages": TURNS}],
            {},
            r'data\.text: missing, and the rows have the columns "text", and mess',
        ),
        (
            [{"s": "a text"}, {"s": TURNS}],
            {"text": "s"},
            r"chat\.jsonl: texts and conversations .*; allowed: one of",
        ),
        ([{"messages": TURNS}], {"task": "mlm"}, r"line 1: a conversation, which mlm does not learn from"),
        (
            [{"messages": TURNS}],
            {"stride": 4},
            r"data\.stride: got 4; .* has conversations, which are judged one by one",
        ),
    ],
)
def test_refused(rows: Any, speaker: Any, found: list[Any], settings: dict[str, Any], message: str) -> None:
    speaker.chat_template = TEMPLATES["plain"]
    if settings.get("task") == "mlm":
        speaker.add_special_tokens({"mask_token": "<|mask|>"})
    with pytest.raises(UserError, match=message):
        load_task(rows(found, **settings), speaker)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            None,
            r"the tokenizer has no chat template; allowed: the tokenizer of an instruction model in data\.tokenizer",
        ),
        ("{{ raise_exception('no system') }}", r"line 1: the tokenizer's chat template refuses it: no system"),
        ("{{ messages[9]['role'] + 1 }}", r"line 1: the tokenizer's chat template refuses it: "),
        ("{% if %}", r"line 1: the tokenizer's chat template refuses it: "),
        (HIDES, r"line 1: message 3: the tokenizer's chat template writes what comes before an answer in another way"),
        (
            "{% generation %}{% endgeneration %}hello",
            r"line 1: the tokenizer's chat template leaves no token of the ans",
        ),
    ],
)
def test_a_template_that_does_not_fit(rows: Any, speaker: Any, template: str | None, message: str) -> None:
    speaker.chat_template = template
    with pytest.raises(UserError, match=message):
        load_task(rows([{"messages": TURNS}]), speaker)


def test_a_tokenizer_that_does_not_say_where_tokens_are(rows: Any) -> None:
    from transformers import ByT5Tokenizer

    slow = ByT5Tokenizer(chat_template=TEMPLATES["plain"])
    with pytest.raises(UserError, match=r"the tokenizer does not say where tokens are in the text; allowed: a fast"):
        load_task(rows([{"messages": TURNS}]), slow)
