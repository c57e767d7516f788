"""A run's directory with a supervisor over a cluster that is only told about."""

from __future__ import annotations

from fakes import FakeExecutor, FakeStep, beat, save, spec

from piip_scale.launch.attempts import History
from piip_scale.launch.spec import JobFiles
from piip_scale.launch.supervisor import Supervisor, SupervisorSettings
from piip_scale.launch.watching import StopRequests
from piip_scale.run.run_dir import RunDirectory


class Scene:
    """A run's directory with a supervisor over a cluster that is only told about."""

    def __init__(self, folder, *steps, preflight=False, nodes=("n1", "n2"), has_queue=True, **more) -> None:
        self.spec = spec(folder, **more)
        self.run = RunDirectory(self.spec.run_dir)
        self.executor = FakeExecutor(self.spec.run_dir, *steps, nodes=nodes, has_queue=has_queue)
        self.history = History(JobFiles(self.spec.run_dir).attempts)
        self.requests = StopRequests(self.run, self.executor.why_ending)
        self.settings = SupervisorSettings(preflight=preflight, poll_s=0.001)

    def supervisor(self) -> Supervisor:
        return Supervisor(self.spec, self.executor, self.requests, self.settings)

    def supervise(self) -> int:
        return self.supervisor().run()

    def step(self, *deeds, code=1, notes=()) -> FakeStep:
        """A step that does something and ends."""

        def poll():
            for deed in deeds:
                deed()
            return code

        step = FakeStep(poll, lambda: 1, notes)
        self.executor.steps.append(step)
        return step

    def waiting_step(self) -> FakeStep:
        """A step that trains until it is asked to stop, and then saves at step 7."""
        self.run.heartbeats.mkdir(parents=True, exist_ok=True)

        def stop():
            save(self.run, 7)
            self.status("stopped", 7)()
            return 130

        step = FakeStep(lambda: [beat(self.run, rank) for rank in range(2)] and None, stop)
        self.executor.steps.append(step)
        return step

    def status(self, state, step=0):
        return lambda: self.run.write_status(state, step)

    def saved(self, step):
        return lambda: save(self.run, step)

    def _fail(self, error, rank, node) -> None:
        ending = self.run.record_error(rank, error, 5, node)
        self.run.write_failure(ending)

    def error(self, error, rank=0, node="n1"):
        return lambda: self._fail(error, rank, node)
