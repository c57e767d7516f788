"""What ``benchmarks/gpu.py`` recorded of a GPU, in the place of a data sheet's numbers and of assumptions."""

from __future__ import annotations

import json
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
            fix="record it there: python benchmarks/gpu.py --out FOLDER machine backbone step",
        )
    gib = rows[("machine", "what it is")].get("GiB")
    return replace(gpu, memory_gib=gib or gpu.memory_gib), _assumptions(gpu, rows)


def _rows(path: Path) -> _Rows:
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {(str(row["section"]), str(row["name"])): row for row in found if "error" not in row}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"--measured {path}", value=str(error), rule="the gpu.jsonl that benchmarks/gpu.py writes"
        ) from error


def _assumptions(gpu: Gpu, rows: _Rows) -> Assumptions:
    """Each measured where its rows are there."""
    assumed = Assumptions()
    copy = rows.get(("machine", "copy of 1 GiB"), {}).get("GB/s")
    memory_share = copy / gpu.memory_gb_s if copy else assumed.memory_share
    changes: dict[str, Any] = {"memory_share": memory_share}
    measured = {"memory": f"{copy:,.0f} GB/s"} if copy else {}
    if rate := rows.get(("backbone", "H6B 1024/512, 1 image, kept"), {}).get("model TFLOP/s"):
        between = _H6B_MOVED_PER_FLOP / (memory_share * gpu.memory_gb_s * _GIGA)
        products = 1 / max(1 / (rate * _TERA) - between, 1 / (gpu.bf16_tflops * _TERA))
        changes["product_share"] = products / (gpu.bf16_tflops * _TERA)
        measured["products"] = f"{products / _TERA:,.0f} TFLOP/s"
    step = rows.get(("step", "as the recipe, 1 image"), {})
    if "host forward ms" in step and "host backward ms" in step:
        milliseconds = step["host forward ms"] + step["host backward ms"]
        changes["operator_s"] = milliseconds / 1e3 / H6B_OPERATORS
        measured["host"] = f"{milliseconds:.0f} ms a micro-batch of H6B"
    return replace(assumed, measured=measured, **changes)
