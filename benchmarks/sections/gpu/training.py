"""A real small training: made scenes, shards, a kill without warning, resuming, AP; how long a step waits for data."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from sections.gpu.jobs import Job, Setting, Values

ROOT = Path(__file__).parents[3]
_CONFIG = ROOT / "configs" / "demo" / "digits.py"
_LIMIT_S = 600


def jobs(setting: Setting) -> list[Job]:
    """One training, one row."""
    return [Job("digits, killed and resumed", partial(_train, setting))]


def _train(setting: Setting) -> Values:
    with tempfile.TemporaryDirectory() as folder:
        shards_s = _make_shards(setting, Path(folder))
        run_dir, steps = Path(folder) / "run", setting.size(400, 6)
        command = _command(setting, Path(folder), run_dir, steps)
        started = time.monotonic()
        killed_at = _run_until(command, run_dir, steps // 2)
        _run([*command, "--resume"])
        logged = _metrics(run_dir)
        return {
            "killed after step": killed_at,
            "training s": time.monotonic() - started,
            "data s": shards_s,
        } | _summary(logged)


def _make_shards(setting: Setting, folder: Path) -> float:
    from piip_scale.data.packing.pack import pack_coco
    from piip_scale.demo.scenes import write_scenes

    started = time.monotonic()
    num_train, num_val = setting.size(1600, 16), setting.size(160, 4)
    scenes = write_scenes(folder / "scenes", num_train=num_train, num_val=num_val, size_px=128, seed=0)
    for split, source in (("train", scenes.train), ("val", scenes.val)):
        pack_coco(source, scenes.images, folder / split, workers=setting.size(8, 1))
    return time.monotonic() - started


def _command(setting: Setting, folder: Path, run_dir: Path, steps: int) -> list[str]:
    changes = [f"data.{split}_shards={str(folder / split)!r}" for split in ("train", "val")]
    every = max(steps // 4, 1)
    changes += [f"train.{key}={value}" for key, value in _train_keys(steps, every, setting).items()]
    changes += [f"data.workers={setting.size(8, 1)}", f"data.micro_batch_size={setting.size(8, 2)}"]
    command = [sys.executable, "-m", "piip_scale.cli.main", "train", str(_CONFIG), f"--run-dir={run_dir}", "--procs=1"]
    return [*command, "--no-progress", *(f"--set={change}" for change in changes)]


def _train_keys(steps: int, every: int, setting: Setting) -> dict[str, Any]:
    keys = {"steps": steps, "evaluate_every_steps": steps, "checkpoint_every_steps": every}
    return keys | {"log_every_steps": setting.size(10, 1)}


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=_LIMIT_S)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-1000:]}")


def _run_until(command: list[str], run_dir: Path, step: int) -> int:
    """Starts a training and kills it at a step with a checkpoint behind it; returns the last step that it logged."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdout=log, stderr=log, start_new_session=True, text=True
        )
        deadline = time.monotonic() + _LIMIT_S
        while process.poll() is None and time.monotonic() < deadline:
            reached = max((line["step"] for line in _metrics(run_dir)), default=0)
            if reached >= step and any((run_dir / "checkpoints").glob("step_*")):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return int(reached)
            time.sleep(0.05)
        log.seek(0)
        raise RuntimeError(f"the training ended or hung before step {step}: {log.read()[-1000:]}")


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # a line on its way
    return found


def _summary(logged: list[dict[str, Any]]) -> Values:
    flat = [{key: value for key, value in line.items() if isinstance(value, int | float)} for line in logged]
    values: Values = {}
    for wanted in ("images_per_second", "data_wait", "step_seconds", "memory", "mfu"):
        # The second half of the run: the first steps compile and fill caches.
        found = [(key, line[key]) for line in flat[len(flat) // 2 :] for key in line if wanted in key]
        for key in dict.fromkeys(key for key, _ in found):
            values[key] = statistics.median(value for other, value in found if other == key)
    last = flat[-1] if flat else {}
    return values | {key: value for key, value in last.items() if "AP" in key and key.count("/") <= 2}


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
