"""Text that comes from outside, on its way to people: one line, no control characters, writable as UTF-8."""

from __future__ import annotations

import unicodedata

_UNSEEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Control characters (a terminal obeys them), halves of surrogate pairs (no encoding takes them), breaks of lines."""

_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They reorder what follows, so that a line reads otherwise than it is."""


def printable(text: str) -> str:
    """The text with what cannot be shown written as an escape, as Python writes it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(letter) if is_unseen(letter) else letter for letter in text)


def is_unseen(letter: str) -> bool:
    """Whether a character is none that a name may hold: a control character, half a pair, a change of direction."""
    return unicodedata.category(letter) in _UNSEEN or letter in _TURNING


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
