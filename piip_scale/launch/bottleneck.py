"""What limits a run's steps, in words, by what its last steps say of themselves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from piip_scale.launch.run_metrics import longest_step

_STEP, _WAIT, _MFU = "time/step_ms", "time/data_wait_ms", "throughput/mfu"
_MESSAGES = "time/communication_ms"
_SLOW_MS, _FAST_MS, _SLOW, _SLOW_NODE = (
    *("ranks/slowest_own_ms", "ranks/fastest_own_ms"),
    *("ranks/slowest", "ranks/slowest_node"),
)
_PREFIX, _SUFFIX = "time/", "_ms"
_ORDER = ("forward", "backward", "update")
# Below it a cure would not be noticed.
_MUCH = 0.1
_MUCH_STILL = 0.3
_MUCH_SLOWER = 1.5
_CURES = {"update": "the optimiser's update: a larger micro-batch, or offloading less, helps"}


@dataclass(frozen=True)
class Limit:
    """Where the time of a step goes.

    Attributes:
        sentences: The verdict first.
        shares: Of a step's time by what is done in it, which come to about 1; empty where it is not known.
    """

    sentences: Sequence[str]
    shares: Mapping[str, float] = field(default_factory=dict)


def what_limits(steps: Iterable[Mapping[str, Any]]) -> Limit:
    """Where the time of a run's last steps went.

    Args:
        steps: The last lines of steps in its metrics; what one of them lacks is not spoken of.
    """
    lines = _without_standstills(list(steps))
    step_ms = _mean(lines, _STEP)
    if not step_ms:
        return Limit(["Not known: no step has written its time yet."])
    shares = {name: value / step_ms for name, value in _parts(lines).items()}
    wait = min(_mean(lines, _WAIT) / step_ms, 1.0)
    still = min(_mean(lines, _MESSAGES) / step_ms, 1.0)
    verdict = _verdict(wait, shares) if wait >= _MUCH else _of_ranks(lines, still) or _verdict(wait, shares)
    sentences = [verdict, _step_sentence(step_ms, still), *_utilisation(lines)]
    return Limit(sentences, {"waiting for data": wait} | shares)


def _without_standstills(lines: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    times = [_mean([line], _STEP) for line in lines]
    most_ms = longest_step([ms for ms in times if ms])
    return [line for line, ms in zip(lines, times, strict=True) if ms <= most_ms]


def _of_ranks(lines: list[Mapping[str, Any]], still: float) -> str:
    """What the ranks' exchange costs, where it costs much: a slow rank, or the messages themselves."""
    slow_ms, fast_ms = _mean(lines, _SLOW_MS), _mean(lines, _FAST_MS)
    if fast_ms and slow_ms > _MUCH_SLOWER * fast_ms:
        last = next(line for line in reversed(lines) if _SLOW in line)
        return (
            f"A slow rank: rank {last[_SLOW]:.0f} on {last.get(_SLOW_NODE, 'a node without a name')} takes "
            f"{slow_ms:.0f} ms of its own for a step, the fastest {fast_ms:.0f}, and all wait for it."
        )
    if still >= _MUCH_STILL:
        return (
            f"Communication: for {still:.0%} of a step computing stands still for messages between GPUs: "
            "zero.node_partition or a larger micro-batch helps."
        )
    return ""


def _verdict(wait: float, shares: Mapping[str, float]) -> str:
    if wait >= _MUCH:
        return (
            f"Data: {wait:.0%} of a step waits for the loaders. More data.workers, a cache near the GPUs, or smaller "
            "images help."
        )
    name = max(shares, key=lambda key: shares[key], default="")
    if name in _CURES and shares[name] > 0.5:
        return f"{name.capitalize()}: {shares[name]:.0%} of a step are {_CURES[name]}."
    return f"Computing: loaders keep up, {wait:.0%} of a step waits for data."


def _step_sentence(step_ms: float, still: float) -> str:
    inside = f"; for {still:.0%} of it computing stands still for messages between ranks" if still else ""
    return f"A step takes {step_ms:.0f} ms{inside}."


def _utilisation(lines: list[Mapping[str, Any]]) -> list[str]:
    mfu = _mean(lines, _MFU)
    return [f"MFU {mfu:.1%}: the model's own multiply-adds over what the devices could do."] if mfu else []


def _parts(lines: list[Mapping[str, Any]]) -> dict[str, float]:
    """Milliseconds of each named part of a step, other than its wait for data, in the order in which they come."""
    tags = {
        tag: None
        for line in lines
        for tag in line
        if tag.startswith(_PREFIX) and tag.endswith(_SUFFIX) and tag not in (_STEP, _WAIT, _MESSAGES)
    }
    means = {tag.removeprefix(_PREFIX).removesuffix(_SUFFIX): _mean(lines, tag) for tag in tags}
    return {name.replace("_", " "): means[name] for name in sorted(means, key=_place)}


def _place(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER)), name


def _mean(lines: list[Mapping[str, Any]], tag: str) -> float:
    """Over the lines that have it; 0 where none has."""
    values = [value for line in lines if isinstance(value := line.get(tag), float | int) and math.isfinite(value)]
    return sum(values) / len(values) if values else 0.0
