"""Markup that escapes what it is not, and one file around it."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from importlib import resources

from piip_scale.text import printable

GENERATOR = '<meta name="generator" content="piip-scale">'
"""Tells a page of ours from any other file."""

_EMPTY_TAGS = frozenset({"img", "meta", "line", "path", "rect", "circle", "br"})
# Nothing is fetched, and nothing runs but a script of ours, whatever a name from outside would like.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
SORTABLE = "sortable"
"""The class of tables that a click on a heading sorts, on a page that ``sorts``."""


class Html(str):
    """Markup; every other string is text, and escaped on its way into it."""

    __slots__ = ()


def markup(value: object) -> Html:
    """A value as markup: text is escaped, and what cannot be shown is spelled out."""
    return value if isinstance(value, Html) else Html(html.escape(printable(str(value))))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
        name: Of it.
        children: Inside it, escaped where they are text.
        attributes: A ``_`` at the end of a name is dropped, others become ``-``; those that are ``None`` are left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{markup(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _EMPTY_TAGS and not children:
        return Html(f"<{name}{given}>" if name in ("img", "meta", "br") else f"<{name}{given}/>")
    return Html(f"<{name}{given}>{joined(children)}</{name}>")


def joined(children: Iterable[object], between: str = "") -> Html:
    """Several values, one after the other."""
    return Html(between.join(map(markup, children)))


def table(heads: Sequence[object], rows: Iterable[Sequence[object]], **attributes: object) -> Html:
    """A table that scrolls by itself where it is wider than the screen; its first column holds names."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in heads))
    body = [tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows]
    inner = tag("table", tag("thead", head), tag("tbody", *body), **attributes)
    return tag("div", inner, class_="wide", tabindex="0")


def picture(content: bytes, kind: str, alt: str) -> Html:
    """An image inside the page.

    Args:
        content: Of its file.
        kind: ``png`` or ``jpeg``.
        alt: What it shows.
    """
    data = base64.b64encode(content).decode("ascii")
    return tag("img", src=f"data:image/{kind};base64,{data}", alt=alt, loading="lazy")


def document(title: str, *children: object, note: str = "", sorts: bool = False) -> bytes:
    """A whole file, in UTF-8.

    Args:
        title: Of it.
        children: Its body.
        note: Small, beside the title.
        sorts: It has tables that can be sorted.
    """
    script = _resource("sort.js") if sorts else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = _POLICY + f"; script-src 'sha256-{digest}'" * sorts
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Html(GENERATOR),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(_resource("style.css"))),
    )
    heading = tag("header", tag("h1", title), tag("small", note))
    end = tag("script", Html(script)) if sorts else ""
    whole = tag("html", head, tag("body", heading, tag("main", *children), end), lang="en")
    return f"<!doctype html>\n{whole}\n".encode()


def _resource(name: str) -> str:
    return resources.files("piip_scale.pages").joinpath(name).read_text(encoding="utf-8")
