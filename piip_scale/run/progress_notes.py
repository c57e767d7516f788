"""How far a run is, noted in its directory beside the steps: no step waits for the disk."""

from __future__ import annotations

import threading
from queue import SimpleQueue

from piip_scale.run.gpu_time import GpuTimeFile
from piip_scale.run.run_dir import RunDirectory


class ProgressNotes:
    """Notes the status and the GPU time of a run that goes on, in a thread. Main rank only.

    Args:
        run: The run's directory.
        gpu_time: What its attempts take; not noted where not given.
    """

    def __init__(self, run: RunDirectory, gpu_time: GpuTimeFile | None = None) -> None:
        self._run, self._gpu_time = run, gpu_time
        self._steps: SimpleQueue[int] = SimpleQueue()
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._refusal: Exception | None = None
        # One for all notes: who starts a thread waits until it runs.
        self._thread = threading.Thread(target=self._work, name="progress notes", daemon=True)

    def note(self, step: int) -> None:
        """Notes, soon, that the run is at a step; left out while a disk is still busy with the note before.

        Raises:
            RunError: The disk refused an earlier note.
        """
        if not self._is_idle.is_set():
            return
        self.finish()
        if not self._thread.is_alive():
            self._thread.start()
        self._is_idle.clear()
        self._steps.put(step)

    def finish(self) -> None:
        """Waits for a note that is being written.

        Raises:
            RunError: The disk refused it.
        """
        self._is_idle.wait()
        if self._refusal is not None:
            raise self._refusal

    def _work(self) -> None:
        while True:
            step = self._steps.get()
            try:
                self._write(step)
            except Exception as error:  # noqa: BLE001 - raised where the training sees it
                self._refusal = error
            self._is_idle.set()

    def _write(self, step: int) -> None:
        if self._gpu_time:
            self._gpu_time.note()
        self._run.write_status("running", step)
