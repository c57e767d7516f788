"""Times as lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from piip_scale.engine.gpus import Gpu
from piip_scale.engine.planning.choices import Choice
from piip_scale.engine.planning.cluster import H6B_OPERATORS, Assumptions, Cluster
from piip_scale.engine.planning.memory import GIB
from piip_scale.engine.planning.step_time import StepTime

_MILLI, _MICRO, _TERA = 1e-3, 1e-6, 1e12
_HOUR_S, _DAY_H, _HOUR_MIN = 3600, 24, 60
_NAME_WIDTH = 84
_SMALL_SHARE = 0.02
_WORTH_A_CHANGE = 1.01


def time_lines(time: StepTime) -> list[str]:
    """What each part computes, what a step is made of, and what it comes to."""
    lines = [_cells("ms that a GPU computes in a micro-batch", "forward", "again", "backward")]
    digits = 1 if max(max(row) for _, *row in time.parts) >= _MILLI else 3
    lines += [_cells(name, *(f"{seconds / _MILLI:.{digits}f}" for seconds in row)) for name, *row in time.parts]
    phases = ", ".join(
        f"{phase.times} x {phase.name} {phase.seconds:.3f} (bound by {phase.bound_by})" for phase in time.phases
    )
    return [*lines, f"s of a step: {phases}", f"a step takes {_speed(time)}"]


def assumption_lines(gpu: Gpu, cluster: Cluster, network_gbps: float, assumed: Assumptions) -> list[str]:
    """What the times rest on: the data sheet, and what only a measurement shows."""
    nodes = cluster.num_ranks // cluster.ranks_per_node
    of_gpu = network_gbps / cluster.ranks_per_node
    network = f"; network {network_gbps:g} Gb/s a node, which is {of_gpu:g} Gb/s a GPU" if nodes > 1 else ""
    inner_us, outer_us = assumed.inner_latency_s / _MICRO, assumed.outer_latency_s / _MICRO
    operator_us, host_ms = assumed.operator_s / _MICRO, assumed.operator_s * H6B_OPERATORS / _MILLI
    guesses = {
        "products": f"products reach {cluster.flops / cluster.peak_flops:.0%} of the peak",
        "memory": f"memory {assumed.memory_share:.0%} of its rate",
        "links": f"links {assumed.link_share:.0%} of theirs, {inner_us:g} us a hop in a node and {outer_us:g} between",
        "host": f"the host takes {operator_us:.1f} us an operator, {host_ms:.0f} ms a micro-batch of H6B (of a CPU)",
    }
    lines = [
        f"{gpu.name}: {cluster.peak_flops / _TERA:g} TFLOP/s in {_precision(gpu, cluster)}, "
        f"{gpu.memory_gb_s:,g} GB/s of memory, {gpu.link_gb_s:g} GB/s to GPUs of its node{network}",
        "assumed: " + "; ".join(text for key, text in guesses.items() if key not in assumed.measured),
    ]
    measured = "; ".join(f"{key} {text}" for key, text in assumed.measured.items())
    return [*lines, *([f"measured: {measured}"] if measured else [])]


def choice_lines(asked: Choice, others: Sequence[Choice]) -> list[str]:
    """A table of ways to run steps of as many images, the run as it was asked for first."""
    lines = [_cells("one change at a time", "s a step", "images/s", "MFU", "GiB", "")]
    for choice in (asked, *others):
        time, memory = choice.time, choice.memory
        mfu = "" if time.mfu is None else _share(time.mfu)
        verdict = "fits" if choice.fits else "does not fit" if not memory.fits else "host is full"
        numbers = (f"{time.seconds:.3f}", f"{time.images_per_s:.1f}", mfu, f"{memory.total / GIB:.1f}", verdict)
        lines.append(_cells(choice.name or "as it is", *numbers))
    return lines


def fastest_line(asked: Choice, best: Choice | None, without_copies: Choice | None = None) -> str:
    """Which way is the fastest that fits, and why.

    Args:
        asked: The run as it is.
        best: The fastest that fits, if any.
        without_copies: The same of runs whose saves write from no copies in host memory, where nothing else fits.
    """
    if best is None and without_copies is not None:
        name = without_copies.name or "as it is"
        with_it = f"--set train.background_saves=False: {name}, {_speed(without_copies.time)}"
        return f"fastest: none of these fits; with {with_it}"
    if best is None:
        return "fastest: none of these fits"
    if not best.name or (best.time.seconds >= asked.time.seconds and asked.fits):
        return f"fastest that fits: as it is; {_wait(asked.time)} is what bounds it"
    if asked.fits and asked.time.seconds < _WORTH_A_CHANGE * best.time.seconds:
        return f"fastest that fits: as it is, within 1% of {best.name}; {_wait(asked.time)} is what bounds it"
    gain = f"{asked.time.seconds / best.time.seconds:.2f} x as fast" if asked.fits else "which fits"
    return f"fastest that fits: {best.name}: {_speed(best.time)}, {gain}: {_why(asked.time, best.time)}"


def schedule_line(time: StepTime, steps: int | None) -> str:
    """What a whole schedule takes, or what is needed to say so."""
    if steps is None:
        return "the training set is not there: --epoch-images N says how long the schedule takes"
    if not steps:
        return "an epoch has fewer images than a step: no step is made"
    hours = steps * time.seconds / _HOUR_S
    taken = f"{hours:,.1f} h ({hours / _DAY_H:.1f} days)" if hours >= 1 else f"{hours * _HOUR_MIN:.1f} min"
    return f"{steps:,} steps take {taken}, {hours * time.num_ranks:,.3g} GPU hours"


def _speed(time: StepTime) -> str:
    mfu = "" if time.mfu is None else f", MFU {_share(time.mfu)}"
    return f"{time.seconds:.3f} s, {time.images_per_s:.1f} images/s{mfu}"


def _why(asked: StepTime, best: StepTime) -> str:
    """What shrinks of what the step waited for; where that stays, what shrinks most."""
    before, after = asked.waits, best.waits
    saved = {name: before[name] - after[name] for name in before}
    name = asked.bound_by if saved[asked.bound_by] > 0 else max(saved, key=saved.__getitem__)
    return f"{name} takes {after[name]:.3f} s of a step in place of {before[name]:.3f}"


def _precision(gpu: Gpu, cluster: Cluster) -> str:
    return "bf16" if cluster.peak_flops == gpu.bf16_tflops * _TERA else "TF32"


def _share(share: float) -> str:
    """A percentage that is not cut down to nothing."""
    return f"{share:.0%}" if share >= _SMALL_SHARE else f"{share:.2%}"


def _wait(time: StepTime) -> str:
    return f"{time.bound_by}, {time.waits[time.bound_by]:.3f} s of a step's {time.seconds:.3f},"


def _cells(name: str, *others: str) -> str:
    return f"{name:<{_NAME_WIDTH}}" + "".join(f"{text:>13}" for text in others)
