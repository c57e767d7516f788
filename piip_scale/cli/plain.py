"""User's text on its way into rich's tables and bars, which take brackets for marks of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from piip_scale.text import printable

if TYPE_CHECKING:
    from rich.text import Text


def plain(text: str) -> Text:
    """The text as rich shows it, letter for letter, on one line."""
    from rich.text import Text

    return Text(printable(text))


def escaped(text: str) -> str:
    """The same for what rich takes as a string alone."""
    from rich.markup import escape

    return escape(printable(text))
