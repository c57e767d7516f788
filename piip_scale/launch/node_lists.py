"""Lists of nodes as Slurm writes them: ``n[1-3,07-09],login1``. Pure functions."""

from __future__ import annotations

import itertools
import re

_MAX_NODES = 1 << 16
_BRACKETS = re.compile(r"\[([0-9,-]*)\]")
NODE_LIST = r"[\w.\[\],-]+"
"""As a part of a pattern: what a list of nodes may consist of."""


def expand_nodes(text: str) -> tuple[str, ...]:
    """The nodes of a list, in its order, each once; leading zeros stay.

    A list that reads otherwise stands for itself, so that an error which names it still does.
    """
    found: dict[str, None] = {}
    for part in _split(text):
        for name in _expand(part):
            found[name] = None
            if len(found) > _MAX_NODES:
                return (text,)
    return tuple(found)


def _split(text: str) -> list[str]:
    """At the commas that stand outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip() not in ("", "(null)", "None")]


def _expand(part: str) -> list[str]:
    pieces = _BRACKETS.split(part)
    # Plain text and brackets' contents take turns.
    choices = [_numbers(piece) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    if not all(choices):
        return [part]
    return ["".join(names) for names in itertools.islice(itertools.product(*choices), _MAX_NODES + 1)]


def _numbers(text: str) -> list[str]:
    found: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return []
        end = min(int(last or first), int(first) + _MAX_NODES)
        found += [f"{number:0{len(first)}d}" for number in range(int(first), end + 1)]
    return found
