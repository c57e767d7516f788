"""Other places that a run's curves go to, beside its own files: Weights & Biases, MLflow.

Both take their settings from their own variables of the environment (``WANDB_MODE=offline``, ``MLFLOW_TRACKING_URI``).
"""

from __future__ import annotations

import json
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from piip_scale.errors import ConfigError, RunError
from piip_scale.files import disk_errors, write_text_atomically
from piip_scale.logging import get_logger
from piip_scale.run.run_dir import RunDirectory, State

# What is logged while a tracker cannot be reached waits here; more is dropped, with a warning.
_MOST_WAITING = 10_000
_LONGEST_CLOSING_S = {"done": 60.0, "stopped": 15.0, "failed": 5.0}
_STEP = "step"
_WANDB_PROCESS = "wandb-core"


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker gets of a run at its start.

    Attributes:
        folder: The run's directory; its name is the run's.
        project: What runs belong to: a project of W&B, an experiment of MLflow.
        settings: Keys that were changed from the recipe, with their values.
        texts: By name, as ``config``.
        identity: Of this run in the tracker, where it was there before.
    """

    folder: Path
    project: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    identity: str | None = None


class Tracker(Protocol):
    """A run in one tracker. Any method may fail or take long: ``Tracking`` calls them in a thread."""

    identity: str

    def __init__(self, run: TrackedRun) -> None:
        """The run begins, or goes on."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        ...

    def pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Adds pictures, JPEG files."""
        ...

    def close(self, state: State) -> None:
        """The run ends."""
        ...

    @staticmethod
    def abandon() -> None:
        """Nobody waits any longer for what is not sent, nor may the end of the process."""
        ...


class WandbTracker:
    """A run of Weights & Biases.

    Args:
        run: What it is.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._wandb = wandb
        settings = wandb.Settings(console="off", silent=True)  # Ranks' own output stays theirs.
        # Before all else: without a key, W&B would ask for one at the terminal of whoever started the training.
        wandb.setup(settings)
        self._run = wandb.init(
            project=run.project,
            name=run.folder.name,
            id=run.identity,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings) | dict(run.texts),
            settings=settings,
        )
        # Its own counter refuses a step that is lower than the last, as a checkpoint's that became visible later.
        self._run.define_metric("*", step_metric=_STEP)
        self.identity: str = self._run.id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve, over ``step``."""
        self._run.log({_STEP: step, **values})

    def pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Adds pictures."""
        with tempfile.TemporaryDirectory() as folder:
            shown = {}
            for number, (name, content) in enumerate(pictures.items()):
                path = Path(folder) / f"{number}.jpg"
                path.write_bytes(content)
                shown[name] = self._wandb.Image(str(path))
            self._run.log({_STEP: step, **shown})

    def close(self, state: State) -> None:
        """Ends the run; one that failed or was stopped may go on."""
        self._run.finish(exit_code=int(state == "failed"))

    @staticmethod
    def abandon() -> None:
        """Ends W&B's own process, for whose last byte sent Python's end would wait: for good without a network."""
        import psutil  # DeepSpeed requires it
        import wandb

        for process in psutil.Process().children():
            with suppress(psutil.Error):
                if process.name().startswith(_WANDB_PROCESS):
                    process.kill()
        # Or it would look for that process when Python ends, and print that it is gone. Told so, it would leave Python.
        with suppress(Exception, SystemExit):
            wandb.teardown()


class MlflowTracker:
    """A run of MLflow, in its own default place where ``MLFLOW_TRACKING_URI`` is not set: the run's directory.

    Args:
        run: What it is.
    """

    _STATES = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        # A job's working directory, MLflow's own default, holds nothing that stays.
        folder, server = run.folder.absolute(), os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(server or f"sqlite:///{folder / 'mlflow.db'}")
        self._metric = Metric
        if run.identity is not None:
            self.identity = run.identity
            self._client.update_run(self.identity, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(run.project)
        files = None if server else (folder / "mlflow_files").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(run.project, files)
        self.identity = self._client.create_run(experiment, run_name=run.folder.name).info.run_id
        params = [Param(_mlflow_name(key), str(value)) for key, value in run.settings.items()]
        self._client.log_batch(self.identity, params=params)
        for name, text in run.texts.items():
            self._client.log_text(self.identity, text, f"{name}.txt")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(_mlflow_name(name), float(value), now_ms, step) for name, value in values.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Adds pictures, as files in a folder of the step."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in pictures.items():
                path = Path(folder) / f"{_mlflow_name(name).replace('/', '_')}.jpg"
                path.write_bytes(content)
            self._client.log_artifacts(self.identity, folder, f"pictures/step_{step:08d}")

    def close(self, state: State) -> None:
        """Ends the run."""
        self._client.set_terminated(self.identity, self._STATES[state])

    @staticmethod
    def abandon() -> None:
        """Nothing: its calls end with the thread that waits for them."""


def _mlflow_name(name: str) -> str:
    """A name of letters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
"""By the values of ``telemetry.trackers``, which are the packages' names."""


def require_trackers(names: tuple[str, ...]) -> None:
    """Holds a config to what is installed.

    Raises:
        ConfigError: A tracker's package is absent.
    """
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(
                "config key telemetry.trackers",
                value=name,
                rule="its package must be installed",
                fix=f"pip install {name}, or leave it out",
            )


class Tracking:
    """One tracker in a thread of its own: whatever happens to it, and however long it takes, the training goes on.

    What fails is logged once, and the tracker gets no more of this process; the run's own files have it all.

    Args:
        name: Of ``TRACKERS``.
        run: What it gets of the run; ``identity`` is filled in from the run's directory.
    """

    def __init__(self, name: str, run: TrackedRun) -> None:
        self._name, self._run, self._gave_up = name, run, False
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve, some time."""
        self._put(lambda tracker: tracker.scalars(step, values))

    def pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Adds pictures, some time."""
        if pictures:
            self._put(lambda tracker: tracker.pictures(step, pictures))

    def close(self, state: State) -> None:
        """Waits for what is not sent yet, but not for long where other ranks, or a signal's time, wait for this one."""
        longest_s = _LONGEST_CLOSING_S[state]
        self._put(lambda tracker: tracker.close(state))
        self._put(None)
        self._thread.join(longest_s)
        if self._thread.is_alive():
            self._warn(f"has not taken everything after {longest_s:.0f} s")
        if self._gave_up:
            TRACKERS[self._name].abandon()

    def _put(self, call: Callable[[Tracker], None] | None) -> None:
        if self._gave_up:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._warn("takes too long")

    def _work(self) -> None:
        try:
            tracker = self._opened()
            while (call := self._calls.get()) is not None:
                call(tracker)
        except Exception as error:  # noqa: BLE001 - of networks and foreign code, none of it worth a training
            self._warn(f"failed: {type(error).__name__}: {error}".splitlines()[0])

    def _opened(self) -> Tracker:
        path = RunDirectory(self._run.folder).trackers
        known = read_identities(path)
        run = replace(self._run, identity=known.get(self._name))
        tracker = TRACKERS[self._name](run)
        if tracker.identity != run.identity:
            with _IDENTITIES, disk_errors(RunError, f"write {path}"):
                known = read_identities(path) | {self._name: tracker.identity}
                write_text_atomically(path, json.dumps(known, indent=2) + "\n")
        return tracker

    def _warn(self, what: str) -> None:
        if not self._gave_up:
            self._gave_up = True
            get_logger(__name__).warning(
                "%s %s; the run goes on without it, its own files have everything", self._name, what
            )


_IDENTITIES = threading.Lock()


def read_identities(path: Path) -> dict[str, str]:
    """What this run is called in each tracker; nothing where it is in none, or that cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
