"""Sources of files in processes that were forked while a download could be under way."""

import gc
import os

from sections.faulty_server import FaultyServer

from piip_scale.data.reading.sources import NEVER, ObjectSource


def test_a_forked_process_leaves_its_parents_connections_alone(tmp_path):
    """It shares the queue of their events: closed there, they bring the parent nothing more."""
    content = bytes(100_000)
    (tmp_path / "shard").write_bytes(content)
    with FaultyServer(tmp_path) as server:
        source = ObjectSource(server.url, stall_s=2)

        def arrives():
            return b"".join(source.stream("shard", 0, len(content), NEVER)) == content

        assert arrives()
        if (child := os.fork()) == 0:
            gone = not arrives()
            # Sooner or later every process does.
            gc.collect()
            os._exit(gone)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert arrives()
