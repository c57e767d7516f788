"""Time limits against the lead: the seconds before its end at which a training is asked to save. Pure functions."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from piip_scale.errors import ConfigError
from piip_scale.launch.options import OptionValue, time_limit_s
from piip_scale.launch.slurm_records import PartitionRecord

_FROM_NOW = re.compile(r"now\+(\d+) *(second|minute|hour|day|week)?s?")
_UNITS_S = {"": 1, "second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800}


@dataclass(frozen=True)
class TimeLimit:
    """How long a job may run.

    Attributes:
        seconds: So long.
        text: The value as it was set.
        source: What set it: ``--time``, or a partition's or a quality of service's own limit.
    """

    seconds: int
    text: str
    source: str


def given_limits(options: Mapping[str, OptionValue]) -> list[TimeLimit]:
    """Those that the job's options set: ``time``, and ``time-min``, down to which Slurm may shorten it."""
    found = []
    for name in ("time", "time-min"):
        text = str(options.get(name, ""))
        seconds = time_limit_s(text)
        if seconds is not None:
            found.append(TimeLimit(seconds, text, f"--{name}"))
    return found


def site_limits(
    options: Mapping[str, OptionValue], partitions: Sequence[PartitionRecord], qos_limits_s: Mapping[str, int]
) -> list[TimeLimit]:
    """Those that the site sets where the job asks for none: of its partitions, and of its quality of service.

    Args:
        options: Of the job.
        partitions: All of the cluster.
        qos_limits_s: The longest limit of a quality of service, by name; without those that have none.
    """
    if time_limit_s(str(options.get("time", ""))) is not None:
        return []
    names = str(options.get("partition", "")).split(",")
    own = [one for one in partitions if (one.is_default if names == [""] else one.name in names)]
    found = []
    for one in own:
        what, seconds = ("default", one.default_s) if one.default_s is not None else ("longest", one.longest_s)
        if seconds is not None:
            found.append(TimeLimit(seconds, f"{seconds} s", f"the {what} of partition {one.name}"))
    for qos in dict.fromkeys([str(options.get("qos", "")), *(one.qos for one in own)]):
        if qos in qos_limits_s:
            seconds = qos_limits_s[qos]
            found.append(TimeLimit(seconds, f"{seconds} s", f"the longest of QOS {qos}"))
    return found


def check_lead(limits: Sequence[TimeLimit], lead_s: int) -> None:
    """Refuses limits that leave no time to train in before the training is asked to save.

    Raises:
        ConfigError: One is no longer than the lead, naming what set it.
    """
    for limit in limits:
        if limit.seconds <= lead_s:
            raise ConfigError(
                f"time limit ({limit.source})",
                value=limit.text,
                rule=f"longer than the {lead_s} s before its end at which the training is asked to save",
                fix="raise --time, or lower signal_lead_s in a profile",
            )


def absolute_moment(text: str, now_unix_s: float) -> str:
    """``now+3days`` as a moment that stays where it is when a script is submitted again; other forms as they are."""
    match = _FROM_NOW.fullmatch(text)
    if match is None:
        return text
    seconds = int(match[1]) * _UNITS_S[match[2] or ""]
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now_unix_s + seconds))
