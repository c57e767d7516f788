"""Text at the door: names and lists as other tools write them, cleaned where nothing is ambiguous, else refused."""

from __future__ import annotations

import codecs
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from piip_scale.data.reading.manifest import MAX_NAME_LETTERS
from piip_scale.errors import DataError
from piip_scale.logging import get_logger
from piip_scale.text import is_unseen

_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""By their marks at the start of a file; UTF-32's begins like UTF-16's, and is tried before it."""

_LINE_END = re.compile(r"\r\n|\r|\n")
_BREAKS = re.compile(r"\s*[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


class ClassNames:
    """Cleans the class names of one set, and logs each that it changes once: VOC's many files may hold the same."""

    def __init__(self) -> None:
        self._logged: set[tuple[str, str]] = set()

    def cleaned(self, value: object, owner: str) -> str:
        """A class's name on one line, in composed letters (NFC).

        Args:
            value: As it stands in the input.
            owner: Where, for the message.

        Raises:
            DataError: It is no text, is empty, or holds characters that cannot be shown.
        """
        text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        name = _on_one_line(text) if isinstance(text, str) else ""
        if not name:
            raise DataError(
                f"class name in {owner}",
                value=value[:100] if isinstance(value, str) else value,
                rule=f"it is text of 1 to {MAX_NAME_LETTERS} letters, none of them a control character or half of a "
                "pair",
                fix="correct it",
            )
        if isinstance(value, str):
            self._log(value, name, owner)
        return name

    def of_folder(self, name: str, owner: str) -> str:
        """The class that a folder names; bytes of its name that are no UTF-8 become escapes.

        Raises:
            DataError: As ``cleaned``.
        """
        stored = stored_name(name)
        if stored != name:
            self._log(name, stored, owner)
        return self.cleaned(stored, owner)

    def _log(self, value: str, name: str, owner: str) -> None:
        if name != value and (value, name) not in self._logged:
            self._logged.add((value, name))
            get_logger(__name__).warning(f"class name in {owner}: {value!a} is written {name!a}")


def _on_one_line(text: str) -> str:
    """The name that a text holds; empty where it cannot be one."""
    # macOS writes names decomposed: the same class would be two.
    name = unicodedata.normalize("NFC", _BREAKS.sub(" ", text.replace("\ufeff", "")).strip())
    return name if len(name) <= MAX_NAME_LETTERS and not any(map(is_unseen, name)) else ""


def class_names(values: Iterable[object], owner: str) -> tuple[str, ...]:
    """Several names, none twice.

    Raises:
        DataError: One is none, or two are the same once they are cleaned.
    """
    door = ClassNames()
    names = tuple(door.cleaned(value, owner) for value in values)
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise DataError(f"class names of {owner}", value=twice[:5], rule="each must be named once")
    return names


def chosen_classes(values: Sequence[str], known: Collection[str], owner: str, *, subset: bool) -> tuple[str, ...]:
    """Classes in the label order wanted.

    Args:
        values: Their names; of a subset, which is given by hand, also several with commas between them.
        known: Names that the input has.
        owner: The input, for the message.
        subset: They must be some of the known ones.

    Raises:
        DataError: A name is none, stands twice, or is not known.
    """
    if not subset:
        return class_names(values, owner)
    chosen = parted_names(values, known)
    if unknown := [name for name in chosen if name not in known]:
        raise DataError(
            f"--class {unknown[0]}", rule=f"{owner} has {', '.join(list(known)[:30])}", fix="name some of them"
        )
    return chosen


def parted_names(values: Sequence[str], known: Collection[str] = ()) -> tuple[str, ...]:
    """Names given one by one, or several with commas between them; a known name may hold commas itself."""
    names: list[str] = []
    for value in values:
        names += [value] if value in known or "," not in value else [part for part in value.split(",") if part.strip()]
    return class_names(names, "--class")


def check_file_name(name: object, owner: str) -> str:
    """A file's name that a path can hold and a line can show.

    Raises:
        DataError: It is no text, is empty, or holds characters that no path may.
    """
    # A byte that is no UTF-8 stands in Python's paths as half a pair of this range; such files exist.
    if (
        isinstance(name, str)
        and name.strip()
        and not any(is_unseen(letter) and not "\udc80" <= letter <= "\udcff" for letter in name)
    ):
        return name
    raise DataError(f"file name in {owner}", value=name, rule="it is text without control characters", fix="rename it")


def stored_name(name: str) -> str:
    """A file's name as notes keep it: text, whatever bytes it has on disk."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    return name


def read_text(path: Path, owner: str = "") -> str:
    """A text file in UTF-8, or in UTF-16 or UTF-32 with its mark.

    Args:
        path: The file.
        owner: What it is, for the message.

    Raises:
        DataError: It is absent or no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{owner}{path} cannot be read", value=os.strerror(error.errno or 0), fix="check the path"
        ) from None
    try:
        return decoded(content)
    except UnicodeDecodeError:
        raise DataError(f"{owner}{path} is no text", rule="it must be UTF-8", fix="save it as UTF-8") from None


def decoded(content: bytes) -> str:
    """Text by the mark at its start, else UTF-8.

    Raises:
        UnicodeDecodeError: It is neither.
    """
    encoding = next((encoding for mark, encoding in _ENCODINGS if content.startswith(mark)), "utf-8")
    return content.decode(encoding)


def read_lines(path: Path, owner: str = "") -> list[str]:
    """The lines of a text file, whatever ends them.

    Raises:
        DataError: As ``read_text``.
    """
    # Not splitlines(): it also ends lines at characters that stand inside names.
    lines = _LINE_END.split(read_text(path, owner))
    return lines[:-1] if not lines[-1] else lines


def whole_number(value: Any, least: int = 0) -> int | None:
    """A whole number that tools also write as text or as a float; ``None`` where it is none."""
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdecimal() and len(value) < 25:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    is_one = isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63
    return value if is_one else None
