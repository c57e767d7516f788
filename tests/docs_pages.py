"""What README and docs show, read out of their Markdown: commands, links, paths and config keys."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_SECTIONS = "data|train|zero|optimizer|schedule|model|detector|segmentor|classifier"

_SUFFIXES = (".py", ".sbatch", ".safetensors")


@dataclass(frozen=True)
class Command:
    """One command line of a page, in arguments, without prompt and comment."""

    page: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.arguments)}"


def commands() -> list[Command]:
    """Every line of every shell block: of one with a prompt, the lines that have it."""
    found = []
    for page in PAGES:
        for language, block in _FENCE.findall(page.read_text()):
            lines = block.replace("\\\n", " ").splitlines()
            prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
            if language in ("", "bash", "sh") and not _is_picture(lines):
                split = (tuple(shlex.split(line, comments=True)) for line in prompted or lines)
                found += [Command(page.name, arguments) for arguments in split if arguments]
    return found


def examples() -> list[Command]:
    """What ``--help`` shows as an example, of commands that take one of our configs."""
    found = []
    for path in sorted((ROOT / "piip_scale" / "cli").glob("*.py")):
        shown = re.findall(r"Example[^`\n]*: `(piip-scale [^`\n]+)`", path.read_text())
        found += [Command(path.name, tuple(shlex.split(text))) for text in shown if "configs/" in text]
    return found


def _is_picture(lines: list[str]) -> bool:
    return any("-->" in line or "--+" in line for line in lines)


def inline(page: Path) -> list[str]:
    """Everything in single backticks, outside of blocks."""
    return _INLINE.findall(_FENCE.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return _LINK.findall(_FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paths(page: Path) -> set[str]:
    """Words in backticks and in blocks that name a file or folder of this repository; ``mine`` is the reader's own."""
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "data"}
    blocks = [word for command in commands() if command.page == page.name for word in command.arguments]
    words = (word for text in [*inline(page), *blocks] for word in re.findall(r"[\w./-]+", text))
    named = {word.rstrip(".") for word in words if word.split("/")[0] in tops and "/" in word}
    return {path for path in named if "mine" not in path}


def config_keys(page: Path) -> set[str]:
    """Words in backticks that name a config key, ``N`` for the index of a list."""
    words = (re.fullmatch(rf"((?:{_SECTIONS})(?:\.\w+)+)(=.*)?", text) for text in inline(page))
    return {match[1] for match in words if match and not match[1].endswith(_SUFFIXES)}
