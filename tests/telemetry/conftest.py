import pytest
from tensorboard.summary.writer import event_file_writer


@pytest.fixture(autouse=True)
def _files_in_order(monkeypatch):
    """Event files that one process makes within a second are told apart by a count: its tenth would be read first."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
