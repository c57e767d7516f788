"""Text from outside: cleaned where nothing is ambiguous, else refused; and never obeyed by a terminal."""

import logging
import os
import unicodedata

import pytest

from piip_scale.data.packing.door import (
    ClassNames,
    chosen_classes,
    class_names,
    parted_names,
    read_lines,
    stored_name,
    whole_number,
)
from piip_scale.errors import DataError
from piip_scale.text import printable


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cat", "cat"),
        (" cat\r\n", "cat"),
        ("\ufeffcat", "cat"),
        ("traffic\nlight", "traffic light"),
        ("a \t b", "a b"),
        ("two  blanks", "two  blanks"),
        ("dog [b]", "dog [b]"),
        ("door, double", "door, double"),
        ("猫", "猫"),
        (unicodedata.normalize("NFD", "café"), "café"),
        (3, "3"),
    ],
)
def test_names_are_cleaned(text, name):
    assert ClassNames().cleaned(text, "it") == name


@pytest.mark.parametrize(
    "text", ["", " ", "\ufeff", "\x1b[31mred", "a\0", "a\ud83d", "a\u202eb", "x" * 501, None, True, []]
)
def test_names_that_cannot_be_shown_are_refused(text):
    with pytest.raises(DataError, match="class name in it") as caught:
        ClassNames().cleaned(text, "it")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_names_that_are_the_same_once_cleaned_are_refused():
    with pytest.raises(DataError, match="named once"):
        class_names(["cat", "cat\n"], "it")


def test_commas_part_names_that_are_not_known_whole():
    assert parted_names(["a,b", "c"]) == ("a", "b", "c")
    known = ["wall", "door, double"]
    assert chosen_classes(["door, double", "wall"], known, "it", subset=True) == ("door, double", "wall")
    assert chosen_classes(["door, double,wall"], ["wall", "door", "double"], "it", subset=True)[0] == "door"
    # Names of a file are whole, whether the input has them or not.
    assert chosen_classes(["door, double"], ["wall"], "it", subset=False) == ("door, double",)
    with pytest.raises(DataError, match="--class cow; it has wall"):
        chosen_classes(["cow"], ["wall"], "it", subset=True)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_any_system(tmp_path, encoding, end):
    (tmp_path / "names.txt").write_bytes(end.join(["cat", "café\u2028x", "dog", ""]).encode(encoding))
    assert read_lines(tmp_path / "names.txt") == ["cat", "café\u2028x", "dog"]


def test_lines_that_are_no_text(tmp_path):
    (tmp_path / "names.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match="is no text; it must be UTF-8"):
        read_lines(tmp_path / "names.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_lines(tmp_path)


def test_a_name_of_any_bytes_can_be_stored():
    assert stored_name("a.jpg") == "a.jpg"
    assert stored_name(os.fsdecode(b"caf\xe9.jpg")) == "caf\\xe9.jpg"


@pytest.mark.parametrize("value", ["1.5", "", "one", -1, 2**63, 1.5, float("nan"), True, None, [1], "9" * 30])
def test_what_is_no_whole_number(value):
    assert whole_number(value) is None


def test_errors_and_lines_hold_nothing_that_a_terminal_obeys():
    error = DataError("file \x1b[2J\ud800", value="\x07", rule="a\nb\u202ec")
    assert error.line == "file \\x1b[2J\\ud800: got '\\x07'; a b\\u202ec"
    error.line.encode()
    assert printable("plain 猫 [b]") == "plain 猫 [b]"


def test_a_name_that_is_cleaned_is_logged_once_a_set(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            door = ClassNames()
            for owner in ("a.xml", "b.xml"):
                assert door.cleaned("logged\nonce ", owner) == "logged once"
            assert door.cleaned("as it is", "a.xml") == "as it is"
            assert door.cleaned(7, "a.xml") == "7"
    assert caplog.messages == ["class name in a.xml: 'logged\\nonce ' is written 'logged once'"] * 2


def test_a_folder_of_any_bytes_names_a_class(caplog):
    name = os.fsdecode("caf\u00e9".encode("latin-1"))
    assert ClassNames().of_folder(name, "images") == "caf\\xe9"
    assert caplog.messages == ["class name in images: 'caf\\udce9' is written 'caf\\\\xe9'"]
