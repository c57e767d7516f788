"""What the host does for a micro-batch of PIIP-H6B: its whole structure at widths at which little is computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from piip_scale.config.detection import DetectionRun
from piip_scale.config.loading import load_config
from piip_scale.engine.step import seed_step, total_loss
from piip_scale.engine.zero.setup import build_engine, init_distributed
from piip_scale.tasks.detection.model import build_detection_model
from piip_scale.world import World
from sections.record import table
from sections.subject import HEADS, NUM_CLASSES, TINY_H6B, made_up_batch

PHASES = ("forward", "backward", "update")
_HOST = "host, {}"
_ROOT = Path(__file__).parents[2]
_CONFIG = _ROOT / "configs" / "coco" / "mask_rcnn_h6b_1024_512.py"
_WARM_UP, _STEPS, _ROUNDS, _TIMED = 3, 5, 2, 3
_SIZE_PX = 128
# Of the published shape but for the width: 48 blocks whose matrices are sharded beside 32 that stay whole.
_TINY = (
    *TINY_H6B,
    "model.branches.1.embed_dim=32",
    f"detector.overrides={HEADS}",
    # DeepSpeed's own limits and the bucket over 625, as the branch is smaller: as much is released as at full width.
    "zero.deepspeed={'zero_optimization': {'stage3_max_live_parameters': 1600000, "
    "'stage3_max_reuse_distance': 1600000, 'stage3_prefetch_bucket_size': 80000}}",
)


def section(against: Path | None = None) -> str:
    """The table of plain and compiled blocks, and of another version of the package, processes in turn.

    Args:
        against: Folder with that version's ``piip_scale``.
    """
    ways: dict[str, tuple[Path, list[str]]] = {"before": (against, [])} if against is not None else {}
    ways |= {"blocks plain": (_ROOT, ["train.compile='off'"]), "blocks compiled": (_ROOT, ["train.compile='blocks'"])}
    rounds = [{way: _in_a_process(*how) for way, how in ways.items()} for _ in range(_ROUNDS)]
    found = {way: {key: median(each[way][key] for each in rounds) for key in rounds[0][way]} for way in ways}
    keys = next(iter(found.values()))
    rows = [[key, *(f"{found[way][key]:,.0f}" if key in found[way] else "" for way in ways)] for key in keys]
    text = (
        f"PIIP-H6B's recipe, whole but for its widths (128 and 32 channels, an image of {_SIZE_PX} px, small heads), "
        "under ZeRO-3 in bf16 on one rank and one thread, as much released as at full width. Milliseconds of the "
        f"process's own time, medians of {_STEPS} micro-batches and of {_ROUNDS} processes in turn. The rows of `host` "
        "are the quickest of the micro-batches without kernels, which a GPU runs meanwhile: instead of its own time "
        "each operator is charged that of the quickest one with a result of its own, both at their least in "
        f"{_TIMED} more micro-batches, where operators of the same inputs count as one. Operators are those that reach "
        "torch's dispatcher; programs hide theirs, so that their kernels cannot be told apart."
    )
    return f"{text}\n\n{table(['', *ways], rows)}"


def _in_a_process(package: Path, overrides: list[str]) -> dict[str, float]:
    path = os.pathsep.join([str(package), str(_ROOT / "benchmarks")])
    command = [sys.executable, "-m", "sections.host_time", *overrides]
    # Where it is started would be looked in for the package first.
    environment = os.environ | {"PYTHONPATH": path}
    result = subprocess.run(command, cwd=package, env=environment, check=True, capture_output=True, text=True)
    values: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return values


def config(overrides: Sequence[str] = ()) -> DetectionRun:
    """The recipe at tiny widths, in bf16 with checkpointed blocks as it is."""
    return cast("DetectionRun", load_config(_CONFIG, [*_TINY, *overrides]))


def host_ms(world: World, device: torch.device, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Medians of the process's own time by phase in ms, and counts of one micro-batch.

    Args:
        world: One rank.
        device: A CPU.
        overrides: Of the config.
    """
    run = config(overrides)
    engine, _ = build_engine(build_detection_model(run, NUM_CLASSES, network_device="meta"), run, world)
    step = _Step(engine)
    for number in range(_WARM_UP):
        step(number)
    rounds = [step(number) for number in range(_WARM_UP, _WARM_UP + _STEPS)]
    found: dict[str, float] = {phase: median(spent[phase] for spent in rounds) for phase in PHASES}
    found["sum"] = sum(found.values())
    timed = {phase: _Operators() for phase in PHASES}
    for number in range(_TIMED):
        step(_WARM_UP + _STEPS + number, timed)
    if getattr(run.train, "compile", "off") != "blocks":  # older versions know none
        found |= _without_kernels({phase: min(spent[phase] for spent in rounds) for phase in PHASES}, timed)
    with _counting(engine) as counts:
        step(_WARM_UP + _STEPS + _TIMED)
    operators = sum(phase.count for phase in timed.values()) / _TIMED
    return found | counts | {"operators": operators}


def _without_kernels(least: Mapping[str, float], timed: Mapping[str, _Operators]) -> dict[str, float]:
    """The phases' milliseconds at their least, kernels charged as the quickest of all."""
    quickest = min(phase.quickest() for phase in timed.values())
    host = {phase: least[phase] - timed[phase].beyond(quickest) / _TIMED / 1e6 for phase in PHASES}
    host["sum"] = sum(host.values())
    return {_HOST.format(phase): ms for phase, ms in host.items()}


class _Step:
    """A micro-batch with its update, on the same image each time."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._batch = engine, made_up_batch(0, 1, _SIZE_PX)

    def __call__(self, number: int, within: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Milliseconds of this process's processor time by phase, each inside what ``within`` has for it."""
        seed_step(0, number)
        spent: dict[str, float] = {}
        around = within or dict.fromkeys(PHASES, nullcontext())
        with around["forward"]:
            loss = self._timed("forward", spent, lambda: total_loss(self._engine(self._batch)))
        with around["backward"]:
            self._timed("backward", spent, lambda: self._engine.backward(loss))
        with around["update"]:
            self._timed("update", spent, self._engine.step)
        return spent

    def _timed(self, phase: str, spent: dict[str, float], run: Callable[[], Any]) -> Any:
        begun = time.process_time()
        result = run()
        spent[phase] = (time.process_time() - begun) * 1e3
        return result


class _Operators(TorchDispatchMode):
    """Nanoseconds of the process's own time in each operator that reaches torch's dispatcher, by what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self._spent: dict[Any, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        begun = time.process_time_ns()
        result = func(*args, **kwargs)
        spent = time.process_time_ns() - begun
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        self._spent[func, tuple((each.shape, each.dtype) for each in tensors)].append(spent)
        return result

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(map(len, self._spent.values()))

    def quickest(self) -> float:
        """What the quickest took, of those that compute something."""
        return min(min(each) for (func, _), each in self._spent.items() if not func.is_view)

    def beyond(self, quickest: float) -> float:
        """What all together take longer than so many of that."""
        return sum(len(each) * max(min(each) - quickest, 0) for each in self._spent.values())


@contextmanager
def _counting(engine: Any) -> Iterator[Counter[str]]:
    """Counts what DeepSpeed does at modules while entered."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    counts: Counter[str] = Counter()
    for name in ("fetch_sub_module", "release_sub_module"):
        original = getattr(coordinator, name)
        setattr(coordinator, name, _counted(counts, name, original))
    for parameter in engine.module.parameters():
        parameter.all_gather_coalesced = _counted(counts, "gathers", parameter.all_gather_coalesced)
    yield counts


def _counted(counts: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return counted


def _main(overrides: Sequence[str]) -> None:
    torch.set_num_threads(1)
    world = World(0, 1, 0, 1)
    print(json.dumps(host_ms(world, init_distributed(world), overrides)))


if __name__ == "__main__":
    _main(sys.argv[1:])
