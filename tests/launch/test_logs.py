from __future__ import annotations

import tracemalloc

import pytest
from run_files import make_spec, write_status
from typer.testing import CliRunner

from piip_scale.cli import jobs as command
from piip_scale.cli.app import app
from piip_scale.launch import logs
from piip_scale.launch.logs import follow, sizes, tail


@pytest.mark.parametrize(
    ("content", "num_lines", "expected"),
    [
        (b"", 5, ""),
        (b"a\nb\nc\n", 0, ""),
        (b"a\nb\nc\n", 1, "c\n"),
        (b"a\nb\nc\n", 2, "b\nc\n"),
        (b"a\nb\nc\n", 99, "a\nb\nc\n"),
        (b"a\nb\nno end", 1, "no end"),
        (b"a\nb\nno end", 2, "b\nno end"),
        (b"\n\n\n", 2, "\n\n"),
        # A bar redraws itself within its line.
        (b"a\n1%\r2%\r3%\nb\n", 2, "1%\r2%\r3%\nb\n"),
        (b"\xff\xfe\x00\n\xe2\x82\nb", 2, "\ufffd\nb"),
        ("é\u2028ü\n".encode() * 3, 1, "é\u2028ü\n"),
    ],
)
def test_the_last_lines_whatever_the_blocks(tmp_path, monkeypatch, content, num_lines, expected):
    (tmp_path / "log").write_bytes(content)
    for size in (1, 2, 3, 1 << 16):
        monkeypatch.setattr(logs, "_BLOCK_BYTES", size)
        assert tail(tmp_path / "log", num_lines) == expected


def test_the_end_of_a_large_log_takes_no_more_than_that(tmp_path):
    with (tmp_path / "log").open("wb") as file:
        # A hole: a disk has nothing to store for it.
        file.seek(1 << 32)
        file.write(b"\nlast but one\nlast\n")
    tracemalloc.start()
    assert tail(tmp_path / "log", 1) == "last\n"
    assert tail(tmp_path / "log", 2) == "last but one\nlast\n"
    # The line before is of gigabytes.
    assert len(tail(tmp_path / "log", 3)) < 1 << 26
    assert tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()


def test_following_joins_letters_and_starts_anew_where_a_log_was(tmp_path):
    log, pieces = tmp_path / "log", [b"a\xc3", b"\xa9b", None]

    def over():
        piece = pieces.pop(0)
        if piece is not None:
            with log.open("ab") as file:
                file.write(piece)
        return piece is None

    assert "".join(follow(lambda: [log] * log.exists(), over, poll_s=0.0, ask_every_s=0.0)) == "aéb"


@pytest.mark.parametrize("content", ["no end", "[red]x[/red]\n", "a\n\x00b\n"])
def test_the_command_ends_its_last_line(tmp_path, monkeypatch, content):
    monkeypatch.setattr(command, "has_slurm", lambda: False)
    run = tmp_path / "run"
    make_spec(run)
    write_status(run, "done", 1)
    (run / "job" / "log-12.txt").write_text(content)
    done = CliRunner().invoke(app, ["jobs", "logs", "-n", "9", str(run)])
    assert (done.exit_code, done.stdout) == (0, content if content.endswith("\n") else f"{content}\n")


def test_nothing_is_lost_between_the_end_of_a_log_and_what_follows(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"a\nb\n")
    shown = sizes([log, tmp_path / "gone"])
    with log.open("ab") as file:
        file.write(b"c\n")
    assert tail(log, 1, shown[log]) == "b\n"
    assert "".join(follow(lambda: [log], lambda: True, shown=shown, poll_s=0.0)) == "c\n"
