"""What ``benchmarks/gpu.py`` recorded of a GPU, in the place of a data sheet's numbers and of assumptions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from piip_scale.engine.gpus import Gpu, gpu_of_device
from piip_scale.engine.planning.cluster import H6B_OPERATORS, Assumptions
from piip_scale.errors import DataError

_GIGA, _TERA = 1e9, 1e12
# PIIP-H6B 1024/512 with one image, nothing computed again: bytes between products (``planning.work``) for each FLOP.
_H6B_MOVED_PER_FLOP = 53e9 / 60.5e12
_RECORD = "record it on the GPU: python benchmarks/gpu.py --out FOLDER machine backbone step"
_Rows = Mapping[tuple[str, str], Mapping[str, Any]]


def read_measured(path: Path) -> tuple[Gpu, Assumptions]:
    """The GPU and the assumptions, as far as the file replaces them.

    Args:
        path: ``gpu.jsonl``, or the folder that holds it.

    Raises:
        DataError: There is no such file, or it is of another form, of a CPU or of a GPU that no table knows.
    """
    rows = _rows(path / "gpu.jsonl" if path.is_dir() else path)
    device = str(rows.get(("machine", "what it is"), {}).get("device", ""))
    gpu = gpu_of_device(device)
    if gpu is None:
        raise DataError(
            f"--measured {path}",
            value=device or "no device",
            rule="a recording of benchmarks/gpu.py on a GPU that --gpu knows; a rehearsal measures nothing",
            fix=_RECORD,
        )
    try:
        gib = _number(rows, ("machine", "what it is"), "GiB")
        return replace(gpu, memory_gib=gib or gpu.memory_gib), _assumptions(gpu, rows)
    except ValueError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> DataError:
    rule = "the gpu.jsonl that benchmarks/gpu.py writes, whole"
    return DataError(f"--measured {path}", value=str(error), rule=rule, fix=_RECORD)


def _rows(path: Path) -> _Rows:
    if not path.is_file():
        raise DataError("--measured", value=str(path), rule="there is no such file", fix=_RECORD)
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {(str(row["section"]), str(row["name"])): row for row in found if "error" not in row}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unusable(path, error) from error


def _number(rows: _Rows, name: tuple[str, str], key: str) -> float | None:
    """What a row says of a key; ``None`` where there is no such row, or it does not say.

    Raises:
        ValueError: That is no positive number.
    """
    value = rows.get(name, {}).get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{key} of {' / '.join(name)} is {value!r}")
    return float(value)


def _assumptions(gpu: Gpu, rows: _Rows) -> Assumptions:
    """Each measured where its rows are there."""
    assumed = Assumptions()
    copy = _number(rows, ("machine", "copy of 1 GiB"), "GB/s")
    memory_share = copy / gpu.memory_gb_s if copy else assumed.memory_share
    changes: dict[str, Any] = {"memory_share": memory_share}
    measured = {"memory": f"{copy:,.0f} GB/s"} if copy else {}
    if rate := _number(rows, ("backbone", "H6B 1024/512, 1 image, kept"), "model TFLOP/s"):
        between = _H6B_MOVED_PER_FLOP / (memory_share * gpu.memory_gb_s * _GIGA)
        products = 1 / max(1 / (rate * _TERA) - between, 1 / (gpu.bf16_tflops * _TERA))
        changes["product_share"] = products / (gpu.bf16_tflops * _TERA)
        measured["products"] = f"{products / _TERA:,.0f} TFLOP/s"
    step = ("step", "as the recipe, 1 image")
    forward, backward = (_number(rows, step, f"host {way} ms") for way in ("forward", "backward"))
    if forward and backward:
        milliseconds = forward + backward
        changes["operator_s"] = milliseconds / 1e3 / H6B_OPERATORS
        measured["host"] = f"{milliseconds:.0f} ms a micro-batch of H6B"
    return replace(assumed, measured=measured, **changes)
