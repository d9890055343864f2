"""Conversations: the loss is on the answers alone, whatever the template."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from leap_dist.config.sections import DataConfig
from leap_dist.errors import UserError
from leap_dist.ops.words import IGNORED
from leap_dist.tasks import cache, load_task

HEAD = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
TEMPLATES = {
    "marked": HEAD
    + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "plain": HEAD + "{{ m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "no prompt": HEAD + "{{ m['content'] + '<|end|>\n' }}{% endfor %}",
}
FORGETS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<|think|>\n' }}{% endif %}"
    "{{ m['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""As Qwen3's: what an answer began with is not there any more when the next one is given."""
TURNS = [
    {"role": "system", "content": "Be brief, über alles."},
    {"role": "user", "content": "Where is Rome?"},
    {"role": "assistant", "content": "In Italy, à côté."},
    {"role": "user", "content": "And Oslo?"},
    {"role": "assistant", "content": "In Norway."},
]
ANSWERS = ["In Italy, à côté.<|end|>", "In Norway.<|end|>"]


def answers(example: dict[str, Any], tokenizer: Any) -> list[str]:
    """The texts of the runs of tokens that have labels."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, IGNORED)
        runs[-1].append(token) if label != IGNORED else runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_loss_is_on_the_answers_alone(rows: Any, speaker: Any, kind: str) -> None:
    speaker.chat_template = TEMPLATES[kind]
    task = load_task(rows([{"messages": TURNS}] * 2), speaker)
    for example in (*task.train, *task.validation["validation"]):
        assert answers(example, speaker) == ANSWERS
        assert example["input_ids"] == speaker.apply_chat_template(TURNS, return_dict=True)["input_ids"]
    batch = task.collate(task.train[:])
    assert (batch["labels"] != IGNORED).sum() == 2 * len(speaker("".join(ANSWERS))["input_ids"])


@pytest.mark.parametrize("answer", ["a", "s", "0", "1", "t|>", "  Oslo", "<|assistant|>"])
def test_an_answer_that_its_heading_has_too(rows: Any, speaker: Any, answer: str) -> None:
    """Without a prompt for answers, and of one that is the first message, for which no template has a prompt."""
    turns = [TURNS[1], {"role": "assistant", "content": answer}]
    speaker.chat_template = TEMPLATES["no prompt"]
    (example,) = load_task(rows([{"messages": turns}]), speaker).train
    assert answers(example, speaker) == [f"{answer}<|end|>"]
    speaker.chat_template = TEMPLATES["plain"]
    (example,) = load_task(rows([{"messages": [turns[1], *TURNS[1:3]]}]), speaker).train
    assert answers(example, speaker) == [f"{answer}<|end|>", ANSWERS[0]]


def test_an_answer_that_the_template_trims(rows: Any, speaker: Any) -> None:
    speaker.chat_template = TEMPLATES["no prompt"].replace("m['content']", "m['content'] | trim")
    (example,) = load_task(rows([{"prompt": "Where?", "completion": " a "}]), speaker).train
    assert answers(example, speaker) == ["a<|end|>"]


CALLS = HEAD + (
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}{{ '[' + call.function | tojson + ']' }}{% endfor %}"
    "{{ '<|end|>\n' }}{% endfor %}"
)


@pytest.mark.parametrize("prompt", ["", "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"])
@pytest.mark.parametrize("content", [None, "", "None"])
def test_an_answer_that_calls_a_tool(rows: Any, speaker: Any, prompt: str, content: str | None) -> None:
    speaker.chat_template = CALLS + prompt
    (example,) = load_task(rows([{"messages": [TURNS[1], called(content, zone=None)]}]), speaker).train
    written = '[{"name": "time", "arguments": {"zone": null}}]<|end|>'  # a null in JSON is the user's own
    assert answers(example, speaker) == [f"{content or ''}{written}"]


def called(content: str | None = None, **arguments: str | None) -> dict[str, Any]:
    call = {"function": {"name": "time", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


@pytest.mark.parametrize("from_hub", [False, True])
def test_what_a_table_adds_to_objects_is_not_written(tmp_path: Path, speaker: Any, from_hub: bool) -> None:
    """Arrow gives each object of a column the keys of all others, with nulls."""
    import pyarrow
    from pyarrow.parquet import write_table

    tools = [{"name": "time", "allowed": ["CET", None]}, {"name": "map", "place": {"x": "1"}}]
    found = [
        {"messages": [TURNS[1], called(zone="CET")], "tools": tools},
        {"messages": [TURNS[1], called(city="Rome")], "tools": None},
    ]
    for split in ("train", "validation"):
        write_table(pyarrow.Table.from_pylist(found), tmp_path / f"{split}.parquet")
    speaker.chat_template = "{{ (tools or []) | tojson }}" + CALLS
    files = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "validation")}
    data = DataConfig(**{"task": "lm", **({"dataset": str(tmp_path)} if from_hub else files)})
    examples = list(load_task(data, speaker).train)
    start = '[{"name": "time", "allowed": ["CET", null]}, {"name": "map", "place": {"x": "1"}}]<|user|>'
    assert sorted(speaker.decode(example["input_ids"])[: len(start)] for example in examples)[1] == start
    calls = ('{"zone": "CET"}', '{"city": "Rome"}')
    written = {text for example in examples for text in answers(example, speaker)}
    assert written == {f'[{{"name": "time", "arguments": {call}}}]<|end|>' for call in calls}


def test_what_the_template_writes_of_its_own_is_not_read_from_the_cache(
    rows: Any, speaker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The special tokens of tokenizer_config.json, and the date."""
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(cache, "SMALLEST", 0)
    speaker.chat_template = "{{ strftime_now('%Y') }}" + TEMPLATES["plain"].replace("'<|end|>\n'", "eos_token")
    data = rows([{"messages": TURNS}])
    for year, end in ((2025, "<|end|>"), (2025, "<|think|>"), (2031, "<|think|>"), (2025, "<|end|>")):
        clock = Mock(now=Mock(return_value=datetime(year, 1, 1)))
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        monkeypatch.setitem(speaker._special_tokens_map, "eos_token", end)
        (example,) = load_task(data, speaker).train
        text = speaker.decode(example["input_ids"])
        assert text.startswith(f"{year}<|system|>") and text.endswith(f"In Norway.{end}")


def test_what_the_template_rewrites_is_an_example_of_its_own(rows: Any, speaker: Any) -> None:
    speaker.chat_template = FORGETS
    train = load_task(rows([{"messages": TURNS}]), speaker).train
    assert [answers(example, speaker) for example in train] == [[f"<|think|>\n{text}"] for text in ANSWERS]
    assert speaker.decode(train[1]["input_ids"]).count("<|think|>") == 1


def test_a_space_before_an_answer_is_a_part_of_its_first_word(rows: Any, tmp_path: Path) -> None:
    """As in Llama 2: the token begins at the space, which the template puts before the answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "▁[I]", "▁where", "▁[/I]", "▁here", "▁we", "▁are"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    spaced = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")
    spaced.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[I] ' + m['content'] + ' [/I]' }}"
        "{% else %}{{ ' ' + m['content'] | trim }}{% endif %}{% endfor %}"
    )
    (example,) = load_task(rows([{"prompt": "where", "completion": "here we are "}]), spaced).train
    assert example["labels"] == [IGNORED, IGNORED, IGNORED, 4, 5, 6]


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "Where is Rome?", "completion": "In Italy."}, {}),
        ({"prompt": "Where is Rome?", "response": "In Italy."}, {}),
        ({"instruction": "Where is Rome?", "input": "", "output": "In Italy."}, {}),
        ({"instruction": "Where is Rome?", "output": "In Italy."}, {}),
        ({"question": "Where is Rome?", "answer": "In Italy."}, {"text": ["question", "answer"]}),
        ({"prompt": TURNS[:2], "completion": TURNS[2:3]}, {}),
        ({"dialogue": [*TURNS[:3], TURNS[3]]}, {"text": "dialogue"}),
        ({"messages": [TURNS[1] | {"tool_calls": None}, TURNS[2]], "prompt": "no"}, {}),
    ],
)
def test_columns(rows: Any, speaker: Any, row: dict[str, Any], settings: dict[str, Any]) -> None:
    speaker.chat_template = TEMPLATES["plain"]
    (example,) = load_task(rows([row], **settings), speaker).train
    text = speaker.decode(example["input_ids"])
    assert "<|user|>\nWhere is Rome?<|end|>\n<|assistant|>\nIn Italy" in text and "Oslo" not in text
    assert len(answers(example, speaker)) == 1 and answers(example, speaker)[0].startswith("In Italy")


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("extra", [[], [TURNS[1], {"role": "assistant", "content": "In Italy."}]])
def test_answers_in_a_prompt_are_not_learned(rows: Any, speaker: Any, kind: str, extra: list[Any]) -> None:
    speaker.chat_template = TEMPLATES[kind]
    row = {"prompt": TURNS[:4], "completion": [TURNS[4], *extra]}
    (example,) = load_task(rows([row]), speaker).train
    assert answers(example, speaker) == ["In Norway.<|end|>", *["In Italy.<|end|>"] * bool(extra)]
    assert speaker.decode(example["input_ids"]).count("<|assistant|>") == 2 + bool(extra)
    with pytest.raises(UserError, match=r'line 1, column "completion": no answer, the messages are of user; allowed'):
        load_task(rows([row | {"completion": TURNS[3:4]}]), speaker)


def test_answers_in_a_prompt_that_the_template_rewrites(rows: Any, speaker: Any) -> None:
    speaker.chat_template = FORGETS
    (example,) = load_task(rows([{"prompt": TURNS[:4], "completion": "In Norway."}]), speaker).train
    assert answers(example, speaker) == ["<|think|>\nIn Norway.<|end|>"]


@pytest.mark.parametrize("kind", [*TEMPLATES, "forgets"])
@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (0, 0, 1), (1, 1, 0), (1.0, True, None)])
def test_answers_of_weight_0_are_not_learned(rows: Any, speaker: Any, kind: str, weights: tuple[Any, ...]) -> None:
    speaker.chat_template = TEMPLATES.get(kind, FORGETS)
    texts = ["In Italy, à côté.", "In Norway.", "No."][: len(weights)]
    turns = [
        turn
        for text, weight in zip(texts, weights, strict=True)
        for turn in (TURNS[1], {"role": "assistant", "content": text, "weight": weight})
    ]
    examples = load_task(rows([{"messages": turns}]), speaker).train
    found = [answer.removeprefix("<|think|>\n") for example in examples for answer in answers(example, speaker)]
    assert found == [f"{text}<|end|>" for text, weight in zip(texts, weights, strict=True) if weight != 0]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_an_answer_of_weight_0_between_two_that_are_learned(rows: Any, speaker: Any, kind: str) -> None:
    turns = [TURNS[1], TURNS[2], TURNS[3], {**TURNS[4], "weight": 0}, TURNS[3], TURNS[4]]
    speaker.chat_template = TEMPLATES[kind]
    (example,) = load_task(rows([{"messages": turns}]), speaker).train
    assert answers(example, speaker) == ANSWERS
    speaker.chat_template = TEMPLATES["marked"] + "{{ messages | length }}"
    with pytest.raises(UserError, match="nobody can say where answers of weight 0 end; allowed: no answer of weight 0"):
        load_task(rows([{"messages": turns}]), speaker)


def test_the_cache_knows_what_is_a_prompt(rows: Any, speaker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SMALLEST", 0)
    speaker.chat_template = TEMPLATES["plain"]
    parts = {"prompt": TURNS[:4], "completion": TURNS[4:]}, {"prompt": TURNS[:2], "completion": TURNS[2:]}
    found = [answers(load_task(rows([row]), speaker).train[0], speaker) for row in parts]
    assert found == [ANSWERS[1:], ANSWERS]


@pytest.mark.parametrize(
    ("value", "text"), [("1 2", "Add.\n\n1 2"), (0, "Add.\n\n0"), (0.0, "Add.\n\n0.0"), ("", "Add."), (None, "Add.")]
)
def test_an_input_follows_its_instruction(rows: Any, speaker: Any, value: Any, text: str) -> None:
    speaker.chat_template = TEMPLATES["plain"]
    (example,) = load_task(rows([{"instruction": "Add.", "input": value, "output": "3"}]), speaker).train
    assert f"<|user|>\n{text}<|end|>" in speaker.decode(example["input_ids"])


def test_a_row_may_have_an_input_where_the_first_has_none(rows: Any, speaker: Any) -> None:
    speaker.chat_template = TEMPLATES["plain"]
    bare = {"instruction": "Where is Rome?", "output": "In Italy."}
    task = load_task(rows([bare, {"instruction": "Add.", "input": "1 2", "output": "3"}]), speaker)
    texts = [speaker.decode(example["input_ids"]) for example in task.train]
    assert any("<|user|>\nAdd.\n\n1 2<|end|>" in text for text in texts) and len(texts) == 2
    with pytest.raises(UserError, match=r'column "instruction": messages, which an input cannot follow'):
        load_task(rows([bare, {"instruction": TURNS[:2], "input": "1 2", "output": "3"}]), speaker)


def test_tools_go_to_the_template(rows: Any, speaker: Any) -> None:
    speaker.chat_template = "{% for tool in tools or [] %}[{{ tool['name'] }}]{% endfor %}" + TEMPLATES["plain"]
    task = load_task(
        rows([{"messages": TURNS, "tools": [{"name": "map"}]}, {"messages": TURNS, "tools": None}]), speaker
    )
    starts = {speaker.decode(example["input_ids"])[:5] for example in task.train}
    assert "[map]" in starts and len(starts) == 2
    with pytest.raises(UserError, match=r'column "tools": got map; allowed: a list of functions, or nothing'):
        load_task(rows([{"messages": TURNS, "tools": "map"}]), speaker)


def test_each_row_has_the_template_that_is_for_it(rows: Any, speaker: Any) -> None:
    """Of those with names tool_use is for rows with tools; each says for itself whether it marks answers."""
    with_tools = {"messages": TURNS, "tools": [{"name": "map"}]}
    tool_use = "{{ '[' + tools[0]['name'] + ']' }}"
    for kind in ("plain", "marked"):
        speaker.chat_template = {"default": TEMPLATES["plain"], "tool_use": tool_use + TEMPLATES[kind]}
        train = list(load_task(rows([with_tools, {"messages": TURNS}]), speaker).train)
        assert all(answers(example, speaker) == ANSWERS for example in train)
        starts = {speaker.decode(example["input_ids"])[:10] for example in train}
        assert starts == {"[map]<|sys", "<|system|>"}
    del speaker.chat_template["default"]
    (example,) = load_task(rows([with_tools]), speaker).train
    assert answers(example, speaker) == ANSWERS
    told = r"line 2: none of the tokenizer's chat templates is for this row, they are called tool_use; allow"
    with pytest.raises(UserError, match=told):
        load_task(rows([with_tools, {"messages": TURNS}]), speaker)


def test_long_conversations_are_cut_and_counted(rows: Any, speaker: Any, caplog: pytest.LogCaptureFixture) -> None:
    speaker.chat_template = TEMPLATES["plain"]
    late = [{"role": "user", "content": "x" * 200}, TURNS[2]]
    task = load_task(rows([{"messages": TURNS}, {"messages": late}], max_length=64), speaker)
    assert [len(example["input_ids"]) for example in task.train] == [64] and task.max_length == 64
    told = "2 of 2 conversations are longer than data.max_length (64) and are cut there; 1 have no answer"
    assert told in caplog.text
    with pytest.raises(UserError, match=r"chat\.jsonl: no answer begins within data\.max_length, which is 64 tokens"):
        load_task(rows([{"messages": late}], max_length=64), speaker)


def test_a_conversation_of_several_examples_is_counted_once(rows: Any, speaker: Any, caplog: Any) -> None:
    speaker.chat_template = FORGETS
    long = [TURNS[1] | {"content": "x" * 60}, TURNS[2], *TURNS[3:]] + TURNS[3:] * 2
    load_task(rows([{"messages": long}, {"messages": TURNS[1:3]}], max_length=64), speaker)
    assert "1 of 2 conversations are longer than data.max_length (64) and are cut there; 1 have no" in caplog.text
