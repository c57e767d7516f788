"""A detector of seven billion parameters on a CPU: random weights of true sizes, and one image evaluated with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from piip_scale.checkpoint.dtypes import BFLOAT16, DType, of_torch
from piip_scale.checkpoint.safetensors_writer import Entry, SafetensorsWriter, in_file_order
from piip_scale.config import load_config
from piip_scale.tasks.kinds import build_model
from sections.record import table

CONFIG = Path(__file__).parents[2] / "configs" / "coco" / "mask_rcnn_h6b_1024_512.py"
_CLASSES, _BLOCK, _SPREAD = 80, 1 << 24, 0.02
_WIDTH_PX, _HEIGHT_PX = 640, 480
_POLL_S = 0.5
_GIB_KIB, _GIB = 2**20, 2**30


def section() -> str:
    """Writes the weights and the image into a temporary folder, and runs the command; 14 GB of disk."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "h6b.safetensors"
        num_parameters = _write_weights(weights)
        _write_set(Path(folder))
        found = _measure(Path(folder), weights)
        size = weights.stat().st_size / _GIB
    rows = [[f"{num_parameters / 1e9:.2f} B", f"{size:.1f}", *(f"{found[key]:.1f}" for key in _MEASURED)]]
    return (
        f"`piip-scale evaluate configs/coco/{CONFIG.name} h6b.safetensors --coco one.json --images . --precision bf16` "
        f"on a CPU of {os.cpu_count()} cores: one image of {_WIDTH_PX} x {_HEIGHT_PX} px by random weights of the true "
        "sizes, boxes and masks scored. Anonymous memory and mapped pages are the most of each; pages of the file that "
        "memory has no room for are dropped by the system and read again.\n\n"
        f"{table(['parameters', 'file, GiB', *_MEASURED.values()], rows)}"
    )


_MEASURED = {
    "VmHWM": "most resident, GiB",
    "RssAnon": "anonymous, GiB",
    "RssFile": "pages of files, GiB",
    "wall": "seconds in all",
    "cpu": "seconds of CPU",
}


def _write_weights(path: Path) -> int:
    model = build_model(load_config(CONFIG), _CLASSES, network_device="meta")
    state = model.state_dict()
    block = (torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) * _SPREAD).bfloat16()
    entries = in_file_order(Entry(name, tuple(tensor.shape), _stored(tensor)) for name, tensor in state.items())
    with SafetensorsWriter(path, entries, {"format": "pt"}) as writer:
        for entry in entries:
            values = _values(entry, block)
            data: Any = values.view(-1).view(torch.uint8).numpy()
            writer.write(entry.name, 0, memoryview(data))
    return sum(tensor.numel() for tensor in state.values())


def _stored(tensor: torch.Tensor) -> DType:
    return BFLOAT16 if tensor.is_floating_point() else of_torch(tensor.dtype)


def _values(entry: Entry, block: torch.Tensor) -> torch.Tensor:
    dtype, numel = entry.dtype.to_torch(), torch.Size(entry.shape).numel()
    if not entry.dtype.is_floating_point:
        return torch.zeros(numel, dtype=dtype)
    if len(entry.shape) == 1 and entry.name.endswith("weight"):
        return torch.ones(numel, dtype=dtype)
    return block.repeat(-(-numel // len(block)))[:numel]


def _write_set(folder: Path) -> None:
    coarse = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    cv2.imwrite(str(folder / "photo.jpg"), cv2.resize(coarse, (_WIDTH_PX, _HEIGHT_PX)))
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 200, 200], "area": 40000, "iscrowd": 0}
    note["segmentation"] = [[10, 10, 210, 10, 210, 210, 10, 210]]
    image = {"id": 1, "file_name": "photo.jpg", "height": _HEIGHT_PX, "width": _WIDTH_PX}
    categories = [{"id": number + 1, "name": f"class {number}"} for number in range(_CLASSES)]
    root = {"images": [image], "annotations": [note], "categories": categories}
    (folder / "one.json").write_text(json.dumps(root))


def _measure(folder: Path, weights: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "piip_scale.cli.main", "evaluate", str(CONFIG), str(weights)]
    command += ["--coco", "one.json", "--images", ".", "--precision", "bf16", "--set", "data.workers=0"]
    start, most = time.monotonic(), dict.fromkeys(("VmHWM", "RssAnon", "RssFile"), 0.0)
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    watcher = threading.Thread(target=_watch, args=(process, most), daemon=True)
    watcher.start()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    watcher.join()
    assert process.returncode == 0, process.returncode
    return most | {"wall": time.monotonic() - start, "cpu": usage.ru_utime + usage.ru_stime}


def _watch(process: subprocess.Popen[Any], most: dict[str, float]) -> None:
    """Keeps the most of each kind of memory of a process until it ends, in GiB."""
    status = Path(f"/proc/{process.pid}/status")
    while process.returncode is None:
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            return
        for key in most.keys() & lines.keys():
            most[key] = max(most[key], int(lines[key].split()[0]) / _GIB_KIB)
        time.sleep(_POLL_S)
