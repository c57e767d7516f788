"""Scalars for TensorBoard; the x axis is the optimiser step."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image

from piip_scale.telemetry.memory import GIB
from piip_scale.telemetry.records import IntervalRecord, SaveRecord, StartRecord, StepRecord

_FLUSH_SECONDS = 10
# TensorBoard sorts groups by name and opens the first of them only.
_OVERVIEW = "0_overview"
_OF_CLASS = "per_class/"
# The page of curves opens the first group only, too.
_PR, _PR_OF_CLASS = "pr", "pr_per_class"
_PICTURES = "truth_beside_found"
# Charts of the custom scalars page, by the question they answer; tags are regular expressions.
_LAYOUT = {
    "Is it healthy?": {
        "losses": ["Multiline", ["loss/.*"]],
        "gradient norm before clipping": ["Multiline", ["train/grad_norm"]],
        "gradient norm by part": ["Multiline", ["branches/grad_norm_.*"]],
        "gammas into each branch, and merging weights": ["Multiline", ["branches/(gamma|merging).*"]],
        "share of steps that are clipped": ["Multiline", ["train/clipped_share"]],
        # Of a detector's 24 measures those that one asks for first.
        "evaluation": ["Multiline", ["eval/((box|mask)_ap(50)?|miou|macc|aacc|top[15]_accuracy)$"]],
    },
    "Is it fast?": {
        "images per second, of all ranks and of each": ["Multiline", ["throughput/images_per_second.*"]],
        "share of time that waits for data": ["Multiline", [f"{_OVERVIEW}/data_wait_share"]],
        "step and waiting for data, ms": ["Multiline", ["time/.*"]],
        "slowest and fastest rank's own time, ms a step": ["Multiline", ["ranks/.*_own_ms"]],
        "share of GPU time that was of use": ["Multiline", ["run/goodput"]],
        "share of the device's peak (MFU)": ["Multiline", ["throughput/mfu"]],
        "memory, GiB": ["Multiline", ["memory/.*"]],
        "standing still for a checkpoint, s": ["Multiline", ["checkpoint/stall_seconds"]],
    },
}
# Text is shown whole, and sent whole to the browser each time.
_MOST_EVENTS = 100
_HOUR_S = 3600.0
USEFUL_GPU_HOURS = "run/useful_gpu_hours"
"""Goes on where a resumed run's curve does, so that what was done in vain is not in it."""


class TensorBoardWriter:
    """Writes event files that ``tensorboard --logdir`` shows.

    Args:
        folder: Takes the event files; made where absent.
        first_step: Steps done before; events of later ones, left by a process that went further than its last
            checkpoint, are hidden.

    Raises:
        OSError: The disk refuses.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # costs a second, which --help need not pay

        _hush_writers()
        # From the first process on: TensorBoard takes the first such mark for the run's beginning and hides nothing.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1, flush_secs=_FLUSH_SECONDS)  # type: ignore[no-untyped-call]
        self._writer.add_custom_scalars(_LAYOUT)  # type: ignore[no-untyped-call]

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Shows each named text as it stands, in letters of one width."""
        for tag, text in texts.items():
            shown = "\n".join(f"    {line}" for line in text.splitlines())
            self._writer.add_text(tag, shown, step)  # type: ignore[no-untyped-call]

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Makes the run a session of the page of hyperparameters; where it has several, TensorBoard takes the first."""
        from torch.utils.tensorboard.summary import hparams

        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
        _, start, _ = hparams(plain, {})
        self._writer.file_writer.add_summary(start)  # type: ignore[attr-defined]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each named curve; its file is written by another thread.

        Raises:
            OSError: The disk refused an earlier point.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        # All in one event: the writing thread opens its file for each, and more than ten of them wait for it.
        points = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._writer.file_writer.add_summary(Summary(value=points), step)  # type: ignore[attr-defined]

    def events(self, events: Sequence[tuple[int, str]]) -> None:
        """Shows what has happened so far, the newest first, as one text under ``events``.

        TensorBoard keeps ten texts of a tag, drawn by lot; of the newest alone it is sure.

        Args:
            events: Step and text of each, in order; at least one.
        """
        # Indented it is shown as it stands, whatever marks of Markdown are in it.
        lines = [f"    step {step}  {' '.join(text.split())}" for step, text in reversed(events[-_MOST_EVENTS:])]
        self._writer.add_text("events", "\n".join(lines), events[-1][0])  # type: ignore[no-untyped-call]

    def pr_curves(self, step: int, curves: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Adds each curve at this step to the page of its plugin; see ``EvaluationRecord``."""
        for name, (right, wrong, missed, precision, recall) in curves.items():
            self._writer.add_pr_curve_raw(  # type: ignore[no-untyped-call]
                f"{_PR_OF_CLASS if '/' in name else _PR}/{name}",
                right,
                wrong,
                np.zeros_like(right),
                missed,
                precision,
                recall,
                step,
                num_thresholds=len(right),
            )

    def pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        """Adds each picture, a JPEG file, at this step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, content in picture_tags(pictures).items():
            with PIL.Image.open(io.BytesIO(content)) as picture:
                width, height = picture.size
            # As it is: the writer's own way decodes and stores a PNG of several times the size.
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
            summary = Summary(value=[Summary.Value(tag=tag, image=image)])
            self._writer.file_writer.add_summary(summary, step)  # type: ignore[attr-defined]  # torch types it as None

    def close(self, *, is_done: bool = False) -> None:
        """Writes what is left.

        Args:
            is_done: The run has come to its end, and will not be resumed.

        Raises:
            OSError: The disk refuses.
        """
        if is_done:
            from torch.utils.tensorboard.summary import hparams

            # TensorBoard keeps the first of a run, so that one which may go on has none yet.
            *_, end = hparams({}, {})
            self._writer.file_writer.add_summary(end)  # type: ignore[attr-defined]
        self._writer.close()  # type: ignore[no-untyped-call]


@functools.cache
def _hush_writers() -> None:
    """Keeps tensorboard 2.21's writing thread from printing the refusal of a disk that it also gives to ``flush``."""
    previous = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (issubclass(args.exc_type, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            previous(args)

    threading.excepthook = hook


def step_scalars(record: StepRecord, images_per_second: float) -> dict[str, float]:
    """Every scalar of one step by its TensorBoard tag."""
    values = {_loss_tag(name): value for name, value in record.losses.items()}
    values |= {
        "loss/total": record.total_loss,
        "train/lr": record.lr,
        "throughput/images_per_second": images_per_second,
        "throughput/images_per_second_per_rank": images_per_second / record.num_ranks,
        "time/step_ms": record.step_seconds * 1e3,
        "time/data_wait_ms": record.data_wait_seconds * 1e3,
    }
    if record.forward_seconds is not None and record.backward_seconds is not None:
        passes = {"forward": record.forward_seconds, "backward": record.backward_seconds}
        left = record.step_seconds - record.data_wait_seconds - sum(passes.values())
        values |= {f"time/{name}_ms": value * 1e3 for name, value in (passes | {"update": max(left, 0.0)}).items()}
    peak = {} if record.memory_bytes is None else {"peak": record.memory_bytes}
    values |= {f"memory/{kind}_gib": size / GIB for kind, size in (peak | dict(record.memory_now_bytes)).items()}
    optional = {
        "train/grad_norm": record.grad_norm,
        "throughput/model_tflops_per_rank": record.model_tflops,
        "throughput/mfu": record.mfu,
        "data/broken_samples": record.broken_samples,
    }
    interval = {} if record.interval is None else interval_scalars(record.interval)
    return values | {tag: value for tag, value in optional.items() if value is not None} | interval


def interval_scalars(record: IntervalRecord) -> dict[str, float]:
    """Every scalar of an interval by its TensorBoard tag; what is not known is left out."""
    optional = {
        "data/padding_share": record.padding_share,
        "train/clipped_share": record.clipped_share,
        "throughput/gpu_utilisation": record.gpu_utilisation,
        "time/communication_ms": None if record.message_seconds is None else record.message_seconds * 1e3,
    }
    values = {tag: value for tag, value in optional.items() if value is not None}
    for name, pace in (("slowest", record.slowest), ("fastest", record.fastest)):
        if pace is not None:
            values |= {f"ranks/{name}": float(pace.rank), f"ranks/{name}_own_ms": pace.own_seconds * 1e3}
    for name, parts in (
        ("grad_norm_", record.gradient_norms),
        ("gamma_into_branch_", record.gammas),
        ("merging_weight_of_branch_", record.merging_weights),
    ):
        values |= {f"branches/{name}{part.replace(' ', '_')}": value for part, value in parts.items()}
    return values | _use_of_gpus(record)


def _use_of_gpus(record: IntervalRecord) -> dict[str, float]:
    if record.attempt is None:
        return {}
    share = record.useful_gpu_seconds / record.gpu_seconds if record.gpu_seconds else 0.0
    return {
        "run/attempt": float(record.attempt),
        "run/goodput": share,
        "run/gpu_hours": record.gpu_seconds / _HOUR_S,
        USEFUL_GPU_HOURS: record.useful_gpu_seconds / _HOUR_S,
    }


def interval_texts(record: IntervalRecord) -> dict[str, str]:
    """What of an interval is no number: for files, beside its scalars."""
    named = (("slowest", record.slowest), ("fastest", record.fastest))
    return {f"ranks/{name}_node": pace.node for name, pace in named if pace is not None}


def step_overview(record: StepRecord, images_per_second: float) -> dict[str, float]:
    """The few of a step's curves that say whether a run is healthy and fast, in the group that comes first."""
    shares = {"data_wait_share": record.data_wait_seconds / record.step_seconds} if record.step_seconds > 0 else {}
    norm = {} if record.grad_norm is None else {"grad_norm": record.grad_norm}
    interval = record.interval
    if interval and interval.message_seconds is not None:
        shares["communication_share"] = interval.message_seconds / interval.step_seconds
    values = {"loss": record.total_loss, "images_per_second": images_per_second} | shares | norm
    return {f"{_OVERVIEW}/{name}": value for name, value in values.items()}


def evaluation_scalars(metrics: Mapping[str, float]) -> dict[str, float]:
    """Every scalar of one evaluation by its TensorBoard tag: those of single classes in a group of their own.

    The metric that a task names first is in the overview, too. COCO's -1, of objects that a set lacks, is no score.
    """
    scores = {name: value for name, value in metrics.items() if value != -1}
    first = {f"{_OVERVIEW}/{name}": scores[name] for name in list(metrics)[:1] if name in scores}
    return first | {name if name.startswith(_OF_CLASS) else f"eval/{name}": value for name, value in scores.items()}


def picture_tags(pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """An evaluation's pictures by their TensorBoard tags."""
    return {f"{_PICTURES}/{name}": content for name, content in pictures.items()}


def start_scalars(record: StartRecord) -> dict[str, float]:
    """Every scalar of a start by its TensorBoard tag."""
    foreseen = {"checkpoint/expected_seconds": record.save_seconds} if record.save_seconds else {}
    return {f"start/{name}_seconds": seconds for name, seconds in record.seconds.items()} | foreseen


def save_scalars(record: SaveRecord) -> dict[str, float]:
    """Every scalar of one checkpoint by its TensorBoard tag."""
    return {
        "checkpoint/stall_seconds": record.stall_seconds,
        "checkpoint/write_seconds": record.write_seconds,
        "checkpoint/gib": record.num_bytes / GIB,
    }


def _loss_tag(name: str) -> str:
    return f"loss/{name}" if "loss" in name else f"train/{name}"
