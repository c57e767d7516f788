"""How far a run is, noted in its directory beside the steps: no step waits for the disk."""

from __future__ import annotations

import threading

from piip_scale.errors import PiipError
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
        self._thread: threading.Thread | None = None
        self._refusal: PiipError | None = None

    def note(self, step: int) -> None:
        """Notes, soon, that the run is at a step; left out while a disk is still busy with the note before.

        Raises:
            RunError: The disk refused an earlier note.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        self.finish()
        self._thread = threading.Thread(target=self._write, args=(step,), name=f"note step {step}", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits for a note that is being written.

        Raises:
            RunError: The disk refused it.
        """
        if self._thread is not None:
            self._thread.join()
        if self._refusal is not None:
            raise self._refusal

    def _write(self, step: int) -> None:
        try:
            if self._gpu_time:
                self._gpu_time.note()
            self._run.write_status("running", step)
        except PiipError as error:
            self._refusal = error
