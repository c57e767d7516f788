"""What a profile says: the dearest modules and kernels, and whether the host or the device limits a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch.autograd import DeviceType  # type: ignore[attr-defined]  # imported there, and used as its own

RANGE = "module "
"""Begins the names of the ranges that are modules' calls."""
OUTSIDE = "outside of modules (update, gradients' reduction, loading)"

# torch replaces the number behind it by a star.
_STEP_RANGE = "ProfilerStep"
_DEVICE_BOUND_SHARE = 0.8
_NUM_ROWS = 10
_NAME_WIDTH = 72
_US_PER_MS = 1000.0
_COMMUNICATION = ("nccl", "gloo:")


class Event(Protocol):
    """What is read of ``torch.autograd.profiler_util.FunctionEvent``; times in microseconds."""

    name: str
    thread: int
    fwd_thread: int | None
    sequence_nr: int
    device_type: Any
    is_async: bool
    is_user_annotation: bool | None
    kernels: Sequence[Any]
    cpu_parent: Any
    time_range: Any

    @property
    def self_cpu_time_total(self) -> float:
        """Without what it called."""
        ...


@dataclass
class Cost:
    """Time of one module, operator or kernel, in microseconds, over all profiled steps."""

    forward_us: float = 0.0
    backward_us: float = 0.0
    calls: int = 0

    @property
    def total_us(self) -> float:
        """Of both passes."""
        return self.forward_us + self.backward_us


@dataclass(frozen=True)
class ProfileSummary:
    """What was measured on this rank.

    Attributes:
        num_steps: Profiled steps.
        on_gpu: The device is a GPU; otherwise host and device are one.
        window_us: Wall time of the steps, and of logging between them.
        busy_us: Of it, the time in which at least one kernel or copy ran; on a CPU an operator.
        communication_us: The same of those that exchange with other ranks.
        modules: By name; of one module without those inside it.
        operators: Kernels by name; on a CPU operators, without those they call.
    """

    num_steps: int
    on_gpu: bool
    window_us: float
    busy_us: float = 0.0
    communication_us: float = 0.0
    modules: Mapping[str, Cost] = field(default_factory=dict)
    operators: Mapping[str, Cost] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """One line: what limits a step."""
        step_ms = self.window_us / self.num_steps / _US_PER_MS
        if self.on_gpu and not self.busy_us:
            return (
                f"no kernel was recorded (may CUPTI be used here?): host or device, not known; {step_ms:.1f} ms a step"
            )
        busy = self.busy_us / self.window_us if self.window_us else 0.0
        bound = "device-bound" if busy >= _DEVICE_BOUND_SHARE else "host-bound"
        exchanged = (
            f", {self.communication_us / self.window_us:.0%} with communication" if self.communication_us else ""
        )
        if not self.on_gpu:
            return (
                f"the device is the CPU, so host and device are one: operators ran {busy:.0%} of the time{exchanged}, "
                f"the rest is Python and waiting; a step took {step_ms:.1f} ms"
            )
        return f"{bound}: the device was busy {busy:.0%} of the time{exchanged}; a step took {step_ms:.1f} ms"

    def text(self) -> str:
        """The verdict and both tables."""
        measured = "kernels" if self.on_gpu else "operators"
        modules = _table("dearest modules, without those inside them", self.modules, self.num_steps, by_pass=True)
        operators = _table(f"dearest {measured}", self.operators, self.num_steps, by_pass=False)
        return "\n".join([self.verdict, "", *modules, "", *operators]) + "\n"


def summarise(events: Sequence[Event], num_steps: int, units: Mapping[str, str], *, on_gpu: bool) -> ProfileSummary:
    """Reads a profile.

    What a backward pass does belongs to the module whose forward pass left it: autograd gives both one number.

    Args:
        events: Of ``torch.profiler``, with parents.
        num_steps: Profiled steps.
        units: What a row is called, by a module's name; others go by their own.
        on_gpu: Times are kernels'; otherwise operators' on the CPU.
    """
    on_host = sorted((e for e in events if e.device_type == DeviceType.CPU), key=lambda e: e.time_range.start)
    kernels = [e for e in events if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    steps = [e.time_range for e in on_host if e.name.startswith(_STEP_RANGE)]
    window = (min(s.start for s in steps), max(s.end for s in steps)) if steps else (0.0, 0.0)
    operators: dict[str, Cost] = defaultdict(Cost)
    ran = kernels if on_gpu else list(filter(_is_operator, on_host))
    for event in ran:
        spent_us = event.time_range.end - event.time_range.start if on_gpu else event.self_cpu_time_total
        operators[event.name].forward_us += spent_us
        operators[event.name].calls += 1
    return ProfileSummary(
        num_steps,
        on_gpu,
        window[1] - window[0],
        _union_us(ran, window),
        _union_us([e for e in (kernels if on_gpu else on_host) if _exchanges(e)], window),
        _module_costs(on_host, units, on_gpu=on_gpu),
        operators,
    )


def _module_costs(on_host: Sequence[Event], units: Mapping[str, str], *, on_gpu: bool) -> dict[str, Cost]:
    """By row; ``on_host`` by rising start, so that parents come before what they call."""
    owners: dict[int, tuple[str, bool]] = {}
    left_by: dict[tuple[int, int], str] = {}
    costs: dict[str, Cost] = defaultdict(Cost)
    for event in on_host:
        owner, is_backward = owners[id(event)] = _owner(event, owners, left_by)
        if event.sequence_nr >= 0 and not event.fwd_thread:
            # The last one that began with a number is the one that took it.
            left_by[event.sequence_nr, event.thread] = owner
        cost = costs[units.get(owner, owner)]
        if event.name.startswith(RANGE):
            cost.calls += 1
        elif _is_operator(event):
            spent_us = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
            cost.backward_us += spent_us * is_backward
            cost.forward_us += spent_us * (not is_backward)
    return costs


def _owner(
    event: Event, owners: Mapping[int, tuple[str, bool]], left_by: Mapping[tuple[int, int], str]
) -> tuple[str, bool]:
    """The module that an event belongs to, and whether to its backward pass."""
    outer, is_backward = owners.get(id(event.cpu_parent), (OUTSIDE, False))
    if event.name.startswith(RANGE):
        return event.name.removeprefix(RANGE), is_backward
    # A thread's number where the event is of a backward pass, else 0 or none.
    if event.fwd_thread:
        return left_by.get((event.sequence_nr, event.fwd_thread), outer), True
    return outer, is_backward


def _exchanges(event: Event) -> bool:
    return any(name in event.name.lower() for name in _COMMUNICATION)


def _is_operator(event: Event) -> bool:
    # Annotations span others' time, and their projections onto the device are no kernels.
    return not (event.is_user_annotation or event.is_async or event.name.startswith((RANGE, _STEP_RANGE)))


def _union_us(events: Iterable[Event], window: tuple[float, float]) -> float:
    """Time inside the window in which at least one of them ran."""
    spans = sorted((max(e.time_range.start, window[0]), min(e.time_range.end, window[1])) for e in events)
    total_us, reached = 0.0, window[0]
    for start, end in spans:
        total_us += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total_us


def _table(title: str, costs: Mapping[str, Cost], num_steps: int, *, by_pass: bool) -> Iterator[str]:
    whole_us = sum(cost.total_us for cost in costs.values()) or 1.0
    passes = f" {'forward':>10} {'backward':>10}" * by_pass
    yield f"{'ms/step':>10} {'share':>6}{passes} {'calls/step':>10}  {title}"
    for name, cost in sorted(costs.items(), key=lambda item: -item[1].total_us)[:_NUM_ROWS]:
        total, forward, backward = (
            us / num_steps / _US_PER_MS for us in (cost.total_us, cost.forward_us, cost.backward_us)
        )
        passes = f" {forward:10.3f} {backward:10.3f}" * by_pass
        shown = name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 3]}..."
        yield f"{total:10.3f} {cost.total_us / whole_us:6.1%}{passes} {cost.calls / num_steps:10.1f}  {shown}"
