import io
import logging
import sys

import pytest

from piip_scale.logging import configure_logging, get_logger


@pytest.fixture(autouse=True)
def restored():
    logger = logging.getLogger("piip_scale")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_rank_0_speaks_and_others_only_when_something_is_wrong(capsys):
    for rank in (0, 3):
        configure_logging(rank)
        get_logger("piip_scale.engine.trainer").info("started")
        get_logger("elsewhere").warning("careful")
    assert capsys.readouterr().err.splitlines() == ["started", "careful", "[rank 3] careful"]


def test_a_second_configuration_replaces_the_first(capsys):
    configure_logging()
    configure_logging()
    get_logger().info("once")
    assert capsys.readouterr().err == "once\n"


def test_messages_follow_standard_error(monkeypatch, capsys):
    configure_logging()
    lines = []

    class Bar:
        def write(self, text):
            lines.append(text)

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stderr", Bar())
    get_logger().info("above the bar")
    assert "".join(lines) == "above the bar\n"
    assert capsys.readouterr().err == ""


def test_a_stream_that_was_closed_meanwhile_is_no_loss(monkeypatch):
    first, second = io.TextIOWrapper(io.BytesIO()), io.StringIO()
    logger = get_logger()
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        configure_logging()
        monkeypatch.setattr("sys.stderr", first)
        logger.warning("one")
        first.close()
        monkeypatch.setattr("sys.stderr", second)
        logger.warning("two")
    finally:
        logger.handlers[:], logger.level, logger.propagate = before
    assert second.getvalue() == "two\n"
