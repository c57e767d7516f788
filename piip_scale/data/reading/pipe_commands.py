"""A user's shell command with a place for a file's name, made into one that reads the name from a variable.

The name comes from a set that somebody else may have written. It is never a part of the command's text, however the
user quoted its place, so no shell of ours parses it. Pure functions.
"""

from __future__ import annotations

import re

from piip_scale.errors import DataError

NAME = "{name}"
VARIABLE = "PIIP_SCALE_FILE"
"""Environment variable that holds the name while the command runs."""

_UNQUOTED = re.compile(r"\\.|\{name\}|\$\(|<<|(?:^|(?<=[\s;]))#[^\n]*|['\"`()]", re.DOTALL)
_DOUBLE = re.compile(r"\\.|\{name\}|\$\(|[\"`]", re.DOTALL)
# What ends a stretch of a command, or matters in it, by the character that began it.
_TOKENS = {
    "": _UNQUOTED,
    "(": _UNQUOTED,
    "`": _UNQUOTED,
    '"': _DOUBLE,
    "'": re.compile(r"'|\{name\}"),
    "<<": re.compile(r"\{name\}"),
}
_REFERENCES = {"'": f"'\"${VARIABLE}\"'", '"': f"${{{VARIABLE}}}"}
_NO_PLACE = {"`": "backquotes; use $( ) instead", "<<": "a here-document; use printf and a pipe instead"}


def taking_name(command: str) -> str:
    """The command with each ``{name}`` made a reference to ``VARIABLE`` that fits the quotes around it.

    Raises:
        DataError: A ``{name}`` stands where no reference is sure to be one word, or none stands there.
    """
    parts, nesting, at, num_names = [], [""], 0, 0
    while match := _TOKENS[nesting[-1]].search(command, at):
        parts.append(command[at : match.start()])
        if match[0] == NAME:
            parts.append(_reference(command, nesting))
            num_names += 1
        else:
            parts.append(match[0])
            _nest(match[0], nesting)
        at = match.end()
    if num_names == 0:
        raise _refused(command, f"{NAME} stands for the name of a file of the set, unescaped", f"put {NAME} there")
    return "".join([*parts, command[at:]])


def _nest(token: str, nesting: list[str]) -> None:
    """Takes in a token that is no name: where quotes, parentheses and their like begin and end."""
    if token in ("$(", "("):
        nesting.append("(")
    elif token == "<<":
        nesting.append(token)
    elif token == ")" and nesting[-1] == "(":
        nesting.pop()
    elif token in ("'", '"', "`"):
        if nesting[-1] == token:
            nesting.pop()
        else:
            nesting.append(token)


def _reference(command: str, nesting: list[str]) -> str:
    for mark, what in _NO_PLACE.items():
        if mark in nesting:
            raise _refused(command, f"{NAME} stands outside of {what.partition(';')[0]}", what.partition("; ")[2])
    return _REFERENCES.get(nesting[-1], f'"${VARIABLE}"')


def _refused(command: str, rule: str, fix: str) -> DataError:
    return DataError("the command of a pipe: location", value=command, rule=rule, fix=fix)
