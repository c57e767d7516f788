"""Names of files, as a set of somebody else's may hold them, on their way into a user's shell command."""

from __future__ import annotations

import pytest

from piip_scale.data.reading.sources import NEVER, PipeSource, TransferError
from piip_scale.errors import DataError

PLACES = {
    "unquoted": "printf %s {name}",
    "single": "printf %s '{name}'",
    "double": 'printf %s "{name}"',
    "within words": """printf %s%s%s 'it'"'"'s {name} of "mine"' "" ''""",
    "substituted": "printf %s $(printf %s '{name}' | cat)",
    "substituted in double": """printf %s "$(printf %s '{name}')" """,
    "after a comment": "# it's a comment\nprintf %s {name}",
    "after escapes": "x=\\'\\\"; printf %s {name}",
    "in a subshell": "(printf %s '{name}')",
}
HOSTILE = [
    "'; touch pwned; '",
    "$(touch pwned)",
    "`touch pwned`",
    '"; touch pwned; "',
    "a;b",
    "a*b?",
    "a\nb",
    "é %s \\n",
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [*HOSTILE, "it's two  words"])
def test_a_name_is_never_part_of_a_command(tmp_path, monkeypatch, place, name):
    monkeypatch.chdir(tmp_path)
    got = b"".join(PipeSource(f"pipe:{PLACES[place]}", 300.0).stream(name, 0, None, NEVER)).decode()
    expected = f'it\'s {name} of "mine"' if place == "within words" else name
    if place == "substituted":
        # The user's own $( ) without quotes makes several words of any output.
        got, expected = ("".join(text.split()) for text in (got, expected))
    assert got == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["-rf", "..", ".", "", "../thesis.tex", "/etc/passwd", "a\0b", "\ud800"])
def test_a_name_is_of_a_file_in_one_folder(name):
    with pytest.raises(TransferError, match="name") as caught:
        list(PipeSource("pipe:cat {name}", 300.0).stream(name, 0, None, NEVER))
    assert caught.value.is_final


@pytest.mark.parametrize(
    ("command", "fix"),
    [
        ("cat `basename '{name}'`", r"use \$\( \)"),
        ("cat <<END\n{name}\nEND", "printf"),
        (r"cat \{name}", "put {name} there"),
    ],
)
def test_a_place_where_a_name_could_not_stay_one_word_is_refused(command, fix):
    with pytest.raises(DataError, match=fix) as caught:
        PipeSource(f"pipe:{command}", 300.0)
    assert "\n" not in caught.value.line
