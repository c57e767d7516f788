"""The raw DeepSpeed keys that ``zero.deepspeed`` may hold, each with what its value must be and why it is safe.

Some of DeepSpeed's keys change what its checkpoints mean (``round_robin_gradients``), switch off what training relies
on (``check_grad_overflow``) or do nothing here. So the keys that were tried are listed, each is tested, and all others
are refused: those known with the reason, the rest with the nearest names. Nothing here touches DeepSpeed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from piip_scale.config.zero import ZeroConfig
from piip_scale.engine.zero.refused_keys import OWNED, REFUSED
from piip_scale.errors import ConfigError

AUTO = "auto"
"""As a value it leaves the key out, as it does in DeepSpeed's own sections: then we decide it, or DeepSpeed's default
holds."""
_MAX_SUGGESTIONS = 3


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        text: In a sentence.
        holds: Whether it is so.
    """

    text: str
    holds: Callable[[Any], bool]


def _is_whole(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and value == int(value)


def _one_of(*values: str) -> Rule:
    return Rule(f"it is one of {', '.join(values)}", lambda value: value in values)


_SWITCH = Rule("it is true or false", lambda value: isinstance(value, bool))
_COUNT = Rule("it is a whole number of at least 0", lambda value: _is_whole(value) and value >= 0)
_SIZE = Rule("it is a whole number of at least 1", lambda value: _is_whole(value) and value >= 1)
_EVEN = Rule("it is an even number of at least 2", lambda value: _is_whole(value) and value >= 2 and value % 2 == 0)
_NAMES = Rule("it is a list of names", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
_TYPE = _one_of("fp32", "bf16")

ANY = (0, 1, 2, 3)
_SHARDED = (1, 2, 3)


@dataclass(frozen=True)
class Key:
    """A raw key that may be set.

    Attributes:
        path: Its place, dots between the sections.
        rule: What its value must be.
        why: Why training and checkpoints stay what they are.
        sample: A value other than DeepSpeed's default, which the tests train with.
        stages: ZeRO stages in which it does something.
        needs: The field of ``zero`` that must not be ``none``.
        on_disk: That field must name a folder.
        keeps_numbers: Training with it gives the same numbers up to rounding in fp32.
        spelt: DeepSpeed's other name for it, under which it is given: of both, DeepSpeed refuses one.
        without: A switch beside it that must be false where this one is true: DeepSpeed asserts that.
    """

    path: str
    rule: Rule
    why: str
    sample: Any
    stages: tuple[int, ...] = _SHARDED
    needs: str = ""
    on_disk: bool = False
    keeps_numbers: bool = True
    spelt: str = ""
    without: str = ""

    @property
    def example(self) -> dict[str, Any]:
        """``zero.deepspeed`` with the sample, and with what must stand beside it."""
        return nested({self.path: self.sample} | ({self.without: False} if self.without else {}))


_LOGS = "only prints or writes a log"
_MESSAGES = "how large messages are and when they are sent; what they sum stays"
_MEMORY = "when parameters are gathered and released, not what they are"
_Z = "zero_optimization."

ALLOWED = (
    Key("steps_per_print", _SIZE, _LOGS, 5, ANY),
    Key("wall_clock_breakdown", _SWITCH, _LOGS, True, ANY),
    Key("memory_breakdown", _SWITCH, _LOGS, True, ANY),
    Key("dump_state", _SWITCH, _LOGS, True, ANY),
    Key("log_level", _one_of("debug", "info", "warning", "error", "critical"), _LOGS, "error", ANY),
    Key("comms_logger.enabled", _SWITCH, _LOGS, True, ANY),
    Key("comms_logger.verbose", _SWITCH, _LOGS, True, ANY),
    Key("comms_logger.prof_all", _SWITCH, _LOGS, False, ANY),
    Key("comms_logger.prof_ops", _NAMES, _LOGS, ["all_reduce"], ANY),
    Key("comms_logger.debug", _SWITCH, _LOGS, True, ANY),
    Key("timers.throughput.enabled", _SWITCH, _LOGS, False, ANY),
    Key("timers.throughput.synchronized", _SWITCH, "whether its timer waits for the device", False, ANY),
    Key(
        "checkpoint.tag_validation", _one_of("Warn", "Ignore", "Fail"), "our tags are the same everywhere", "Fail", ANY
    ),
    Key("zero_allow_untested_optimizer", _SWITCH, "torch's AdamW is one that DeepSpeed has tested", True, ANY),
    Key("data_types.grad_accum_dtype", _TYPE, "rounds gradients, as its name says", "bf16", keeps_numbers=False),
    Key("prescale_gradients", _SWITCH, "divides before the sum, not after it", True, without=f"{_Z}reduce_scatter"),
    Key(f"{_Z}contiguous_gradients", _SWITCH, "where gradients wait for their message", False, (1, 2)),
    Key(f"{_Z}reduce_scatter", _SWITCH, _MESSAGES, False),
    Key(f"{_Z}reduce_bucket_size", _SIZE, _MESSAGES, 4096),
    Key(f"{_Z}use_multi_rank_bucket_allreduce", _SWITCH, _MESSAGES, False, (1, 2)),
    Key(f"{_Z}allgather_partitions", _SWITCH, _MESSAGES, False, (1, 2)),
    Key(f"{_Z}allgather_bucket_size", _SIZE, _MESSAGES, 4096, (1, 2)),
    Key(f"{_Z}overlap_comm", _SWITCH, _MESSAGES, False, (3,)),
    Key(f"{_Z}sub_group_size", _SIZE, "the reader takes any cut of the flat tensors", 4000, (3,)),
    Key(f"{_Z}stage3_prefetch_bucket_size", _COUNT, _MEMORY, 4096, (3,)),
    Key(f"{_Z}prefetch_bucket_size", _COUNT, _MEMORY, 4096, (3,), spelt=f"{_Z}stage3_prefetch_bucket_size"),
    Key(f"{_Z}stage3_max_live_parameters", _COUNT, _MEMORY, 100, (3,)),
    Key(f"{_Z}max_live_parameters", _COUNT, _MEMORY, 100, (3,), spelt=f"{_Z}stage3_max_live_parameters"),
    Key(f"{_Z}stage3_max_reuse_distance", _COUNT, _MEMORY, 0, (3,)),
    Key(f"{_Z}max_reuse_distance", _COUNT, _MEMORY, 0, (3,), spelt=f"{_Z}stage3_max_reuse_distance"),
    Key(f"{_Z}stage3_use_all_reduce_for_fetch_params", _SWITCH, _MESSAGES, True, (3,)),
    Key(
        f"{_Z}use_all_reduce_for_fetch_params",
        _SWITCH,
        _MESSAGES,
        True,
        (3,),
        spelt=f"{_Z}stage3_use_all_reduce_for_fetch_params",
    ),
    Key(f"{_Z}stage3_allgather_sequential", _SWITCH, _MESSAGES, True, (3,)),
    Key(f"{_Z}allgather_sequential", _SWITCH, _MESSAGES, True, (3,), spelt=f"{_Z}stage3_allgather_sequential"),
    Key(f"{_Z}ignore_unused_parameters", _SWITCH, "an unused parameter is an error instead of nothing", False, (2,)),
    Key(f"{_Z}memory_efficient_linear", _SWITCH, "which of two linear layers is used", True, (3,)),
    Key(f"{_Z}log_trace_cache_warnings", _SWITCH, _LOGS, True, (3,)),
    Key(f"{_Z}enable_sanity_checks", _SWITCH, "checks what must hold anyway", True, (3,)),
    Key(f"{_Z}offload_optimizer.pin_memory", _SWITCH, "where in host memory", False, needs="offload_optimizer"),
    Key(f"{_Z}offload_param.pin_memory", _SWITCH, "where in host memory", False, (3,), needs="offload_parameters"),
    Key(f"{_Z}offload_optimizer.buffer_count", _SIZE, _MEMORY, 5, (3,), needs="offload_optimizer", on_disk=True),
    Key(f"{_Z}offload_param.buffer_count", _SIZE, _MEMORY, 6, (3,), needs="offload_parameters", on_disk=True),
    Key("aio.block_size", _SIZE, "how files are read", 4096 * 64, (3,), on_disk=True),
    Key("aio.queue_depth", _SIZE, "how files are read", 4, (3,), on_disk=True),
    Key("aio.intra_op_parallelism", _SIZE, "how files are read", 2, (3,), on_disk=True),
    Key("aio.single_submit", _SWITCH, "how files are read", True, (3,), on_disk=True),
    Key("aio.overlap_events", _SWITCH, "how files are read", False, (3,), on_disk=True),
)
"""Every raw key that may be set."""

_BY_PATH = {key.path: key for key in ALLOWED}
_STAGES_12_EVEN = f"{_Z}reduce_bucket_size"


def checked_keys(raw: Mapping[str, Any], decided: Mapping[str, Any], zero: ZeroConfig) -> dict[str, Any]:
    """The raw keys that go to DeepSpeed on top of ours, nested as they were written.

    Args:
        raw: ``zero.deepspeed`` of the config.
        decided: What we give DeepSpeed, nested.
        zero: The config's section ``zero``.

    Returns:
        The raw keys without those that say ``auto``; whole numbers as integers.

    Raises:
        ConfigError: A key that is refused or unknown, that contradicts one of ours, or whose value breaks its rule.
    """
    ours, given, found = dict(leaves(decided)), dict(leaves(raw)), {}
    for path, value in given.items():
        if not _is_known(path):
            raise _unknown(*_first_unknown(path, raw))
        if value != AUTO and _is_given(path, value, ours):
            found[_BY_PATH[path].spelt or path] = _checked(path, value, zero)
            _check_beside(_BY_PATH[path], value, given, zero)
    return nested(found)


def _is_known(path: str) -> bool:
    if path in _BY_PATH or path in REFUSED or _owner(path):
        return True
    # A whole section that is refused, whatever is in it.
    return _refused_section(path) is not None


def _is_given(path: str, value: object, ours: Mapping[str, Any]) -> bool:
    """Whether a key goes to DeepSpeed; raises where it contradicts ours or is refused."""
    owner = _owner(path)
    if owner:
        if path in ours and ours[path] == value:
            return False
        raise ConfigError(
            f"zero.deepspeed.{path}",
            value=value,
            rule=f"{owner} decides it" + (f" and makes it {ours[path]!r}" if path in ours else ""),
            fix=f"leave it out, and change {owner} instead",
        )
    section = path if path in REFUSED else _refused_section(path)
    if section is None or path in _BY_PATH:
        return True
    default, reason = REFUSED[section]
    if path == section and value == default:
        return False
    raise ConfigError(f"zero.deepspeed.{path}", value=value, rule=f"not allowed: {reason}", fix="leave it out")


def _owner(path: str) -> str | None:
    return next((field for name, field in OWNED.items() if path == name or path.startswith(f"{name}.")), None)


def _refused_section(path: str) -> str | None:
    return next((name for name in REFUSED if path.startswith(f"{name}.")), None)


def _checked(path: str, value: Any, zero: ZeroConfig) -> Any:
    key = _BY_PATH[path]
    rule = _EVEN if path == _STAGES_12_EVEN and zero.stage in (1, 2) else key.rule
    if not rule.holds(value):
        raise ConfigError(
            f"zero.deepspeed.{path}", value=value, rule=rule.text, fix="correct the value or leave it out"
        )
    _check_refines(key, value, zero)
    return int(value) if rule in (_COUNT, _SIZE, _EVEN) else value


def _check_refines(key: Key, value: object, zero: ZeroConfig) -> None:
    """Refuses a key of an offloading that is not there: DeepSpeed would begin a section for it."""
    place = getattr(zero, key.needs) if key.needs else "/"
    if place == "none" or (key.on_disk and place == "cpu"):
        place_needed = "the path of a folder" if key.on_disk else "cpu or the path of a folder"
        raise ConfigError(
            f"zero.deepspeed.{key.path}",
            value=value,
            rule=f"it refines zero.{key.needs}, which is {place!r}",
            fix=f"set zero.{key.needs} to {place_needed}, or leave the key out",
        )


def _check_beside(key: Key, value: object, given: Mapping[str, Any], zero: ZeroConfig) -> None:
    if key.without and zero.stage and value is True and given.get(key.without, AUTO) is not False:
        raise ConfigError(
            f"zero.deepspeed.{key.path}",
            value=value,
            rule=f"DeepSpeed takes it only where {key.without} is false",
            fix=f"set that to False in zero.deepspeed too, or leave {key.path} out",
        )


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a nested dict with its path, dots between the keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of values by path; the reverse of ``leaves``."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        inside = tree
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[name] = value
    return tree


def _known() -> list[str]:
    """Paths that may be suggested: not of keys that DeepSpeed has no more."""
    refused = (name for name, (_, reason) in REFUSED.items() if "removed" not in reason)
    return [*_BY_PATH, *OWNED, *refused]


def _first_unknown(path: str, raw: Mapping[str, Any]) -> tuple[str, Any]:
    """The outermost section or key on a path that is unknown, with what stands there."""
    parts, inside = path.split("."), raw
    for depth, part in enumerate(parts, start=1):
        outer = ".".join(parts[:depth])
        inside = inside[part]
        if not any(key.startswith(f"{outer}.") for key in _known()):
            return outer, inside
    return path, inside


def _unknown(path: str, value: object) -> ConfigError:
    known = _known()
    section, _, name = path.rpartition(".")
    inside = f"{section}." if section else ""
    beside = sorted({key.removeprefix(inside).split(".")[0] for key in known if key.startswith(inside)})
    if any(key.startswith(f"{path}.") for key in known):
        return ConfigError(f"zero.deepspeed.{path}", value=value, rule="it is a section of keys", fix="give it a dict")
    near = difflib.get_close_matches(name, beside, n=_MAX_SUGGESTIONS, cutoff=0.5)
    return ConfigError(
        f"unknown key zero.deepspeed.{path}",
        value=value,
        rule=f"did you mean {' or '.join(near)}?" if near else f"DeepSpeed has {', '.join(beside) or 'no keys there'}",
        fix="correct the key or leave it out",
    )
