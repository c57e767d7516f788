"""Windows, rotary positions and registers beside full attention: one block, forward and backward, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from piip_scale.geometry import Grid
from sections.record import table
from sections.windowed_blocks import PreparedBlock, WindowedBlock

_GRIDS: tuple[Grid, ...] = ((32, 32), (64, 64), (50, 37))
_WINDOWS = (0, 14, 16, 24)
_WARM_UP, _ROUNDS = 2, 12
_HEADER = (
    "cells",
    "attention",
    "rotary",
    "GMACs forward",
    "forward, ms",
    "backward, ms",
    "both, of full attention",
    "both, of no rotary",
    "tables, ms a batch",
    "kept, MB",
)


def section() -> str:
    """The table of every grid, window and way of telling positions."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row for grid in _GRIDS for row in _rows(grid)]
    finally:
        torch.set_num_threads(threads)
    text = (
        "One block of DINOv3 S (384 channels, 6 heads, a class token and 4 registers that windows see and that see the "
        "whole image) on one image in float32, by the process's own time on one thread: all blocks of a grid in turns, "
        f"the least of {_ROUNDS}. Grids that no window divides are padded, and the padding is computed and counted. "
        "Tables of rotary positions are made once for a batch and serve all blocks of a branch. Kept is what one image "
        "leaves for the backward pass, output included, in float32, by the rehearsal that `plan` rests on."
    )
    return f"{text}\n\n{table(_HEADER, rows)}"


def _rows(grid: Grid) -> list[list[object]]:
    cases = [WindowedBlock(grid, window, rotary) for window in _WINDOWS for rotary in (False, True)]
    spent = {case: each for case, each in zip(cases, _spent(cases), strict=True)}
    both = {case: forward + backward for case, (forward, backward, _) in spent.items()}
    rows: list[list[object]] = []
    for case, (forward, backward, tables) in spent.items():
        full, plain = WindowedBlock(grid, 0, case.rotary), WindowedBlock(grid, case.window, False)
        rows.append(
            [
                f"{grid[0]} x {grid[1]}",
                f"windows of {case.window}" if case.window else "full",
                "yes" if case.rotary else "no",
                f"{case.macs() / 1e9:.2f}",
                f"{forward:.1f}",
                f"{backward:.1f}",
                f"{both[case] / both[full]:.2f}",
                f"{both[case] / both[plain]:.2f}",
                f"{tables:.2f}" if case.rotary else "",
                f"{case.kept_bytes(torch.float32) / 1e6:.1f}",
            ]
        )
    return rows


def _spent(cases: list[WindowedBlock]) -> list[tuple[float, float, float]]:
    """Milliseconds of each forward pass, backward pass and of its tables, the least over rounds of all of them."""
    blocks = [PreparedBlock(case, torch.device("cpu"), torch.float32) for case in cases]
    rounds = [[_timed_block(block) for block in blocks] for _ in range(_WARM_UP + _ROUNDS)][_WARM_UP:]
    return [
        tuple(min(each[index][part] for each in rounds) for part in range(3))  # type: ignore[misc]
        for index in range(len(blocks))
    ]


def _timed_block(block: PreparedBlock) -> tuple[float, float, float]:
    tables, _ = _timed(block.make_turns)
    forward, output = _timed(block)
    backward, _ = _timed(lambda: block.backward(output))
    return forward, backward, tables


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time()
    result = run()
    return (time.process_time() - begun) * 1e3, result
