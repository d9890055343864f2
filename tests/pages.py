"""The README and the pages of docs/, as text: their code blocks, the commands in them, their links."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("python", "deepspeed", "leap-", "pip", "docker", "sbatch", "kubectl", "eval", "tests/", "sudo")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    """One file. `name` is its path in the checkout."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text("utf-8")

    @cached_property
    def prose(self) -> str:
        """The text without its code blocks."""
        return BLOCK.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        """The fenced blocks in a language."""
        return [block for name, block in BLOCK.findall(self.text) if name == language]

    def commands_of_blocks(self) -> list[str]:
        """Every command of the shell blocks, without comments."""
        lines = "".join(self.blocks("sh")).replace("\\\n", " ").splitlines()
        return [part.strip() for line in lines for part in line.split(" && ") if part.strip() and part[0] != "#"]

    def commands(self) -> list[str]:
        """These, and those between backticks in the text."""
        inline = [span for span in re.findall(r"`([^`\n]+)`", self.prose) if span.startswith(PROGRAMS) and " " in span]
        return list(dict.fromkeys(self.commands_of_blocks() + [span for span in inline if "..." not in span]))

    def links(self) -> list[str]:
        """What its links and pictures point at."""
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    def anchors(self) -> set[str]:
        """What a link may name behind #, as code hosts make it of headings."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [Page(ROOT / "README.md"), Page(ROOT / "CHANGELOG.md"), *map(Page, sorted((ROOT / "docs").glob("*.md")))]
README = PAGES[0]


def as_launcher(command: str) -> tuple[str, list[str]] | None:
    """(prune, its arguments) for `deepspeed --num_gpus 2 launch/prune.py ...` and for `leap-prune ...`."""
    words = shlex.split(command, comments=True)
    for place, word in enumerate(words):
        if match := re.fullmatch(r"launch/(\w+)\.py|leap-(\w+)", word):
            return match[1] or match[2], words[place + 1 :]
    return None


def as_object(text: str) -> dict[str, Any]:
    """A block of JSON, or of one key of an object."""
    found: dict[str, Any] = json.loads(text if text.lstrip().startswith("{") else f"{{{text}}}")
    return found
