"""What each process of a training runs, however it was started: alone, by ``launch_local``, torchrun or srun."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from piip_scale.config.run import RunConfig
from piip_scale.engine.determinism import apply_determinism
from piip_scale.engine.fp32_precision import apply_fp32_precision
from piip_scale.engine.session import Session, TaskFactory
from piip_scale.engine.stop import StopFlag, unsaved
from piip_scale.engine.watchdog import Watchdog
from piip_scale.errors import Interrupted, PiipError
from piip_scale.logging import configure_logging, get_logger
from piip_scale.run.failing import report_failure
from piip_scale.run.gpu_time import GpuTimeFile
from piip_scale.run.heartbeat import Heartbeat, read_beat
from piip_scale.run.profiled_steps import ProfiledSteps
from piip_scale.run.reasons import has_lost_contact
from piip_scale.run.run_dir import RunDirectory
from piip_scale.world import read_world

_ECHO_WAIT_S = 1.0
_MINUTE_S = 60.0


def train_worker(
    config: RunConfig,
    config_text: str,
    run: RunDirectory,
    task_factory: TaskFactory,
    *,
    resume: bool = False,
    restart: bool = False,
    show_progress: bool = True,
    profiled: ProfiledSteps | None = None,
    settings: Mapping[str, Any] | None = None,
) -> int:
    """Trains as one rank of the world that the environment describes. Collective.

    An error is reported by the first rank that meets it, in one line on standard error, with its traceback in
    ``errors/rank_N.txt`` of the run directory; a watchdog ends ranks that hang, or outlive another's error.

    Args:
        config: The run.
        config_text: The resolved config as the run directory keeps it.
        run: The run's directory; rank 0 opens it.
        task_factory: Makes the task.
        resume: Continue the run that is there.
        restart: Set aside the run that is there, and start over.
        show_progress: Draw a progress line on the main rank.
        profiled: Steps of this attempt that the main rank profiles.
        settings: Keys that were changed from the recipe, with their values.

    Returns:
        The process's exit code: 0 when done, the error's own otherwise. Leave the process at once with it.

    Raises:
        PiipError: The world does not add up, the directory cannot be opened, or the environment contradicts the
            config; nothing has started then.
    """
    world = read_world()
    configure_logging(world.rank)
    earlier, gpu_time = None, None
    if world.is_main:
        last_beat = read_beat(run.heartbeats, 0)
        run.open(config_text, resume=resume, restart=restart)
        gpu_time = GpuTimeFile(run.gpu_time, world.num_ranks, last_beat.unix_time_s if last_beat else 0.0)
        before = run.status()
        run.write_status("running", before.step if before else 0)
        earlier = before.ending if before and before.state == "failed" else None
    apply_determinism(config.train)
    apply_fp32_precision(config.train)
    stop = StopFlag()
    stop.install()
    heartbeat = Heartbeat(config.train.hang_minutes * _MINUTE_S, config.train.slow_hang_minutes * _MINUTE_S)
    session = Session(config, run, world, stop, heartbeat, show_progress, earlier, profiled, gpu_time, settings or {})
    with Watchdog(run, world, heartbeat):
        try:
            session.train(task_factory)
        except Interrupted as error:
            if world.is_main:
                get_logger(__name__).warning(error.line)
            return error.exit_code
        except KeyboardInterrupt as error:
            return report_failure(run, world.rank, unsaved().with_traceback(error.__traceback__), heartbeat.last.step)
        except Exception as error:  # noqa: BLE001 - the last place where a rank can still speak
            if _is_echo(error):
                time.sleep(_ECHO_WAIT_S)
            return report_failure(run, world.rank, error, heartbeat.last.step)
    return 0


def _is_echo(error: BaseException) -> bool:
    """Whether the rank at the other end, or the launcher if that was killed, knows more than this one."""
    return has_lost_contact(error) or (isinstance(error, PiipError) and error.is_echo)
