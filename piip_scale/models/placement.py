"""Which device each part of a network is on, where one does not hold them all: arithmetic over bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from piip_scale.errors import ModelError

_GIB = 1 << 30
# Halves the uncertainty of how full devices must be so often: to less than a byte.
_HALVINGS = 50


def place(part_bytes: Sequence[int], room_bytes: Mapping[str, int]) -> list[str]:
    """The device of each part: neighbours share one, devices come in their order, each as full as the others must be.

    What parts hand on crosses from each device to the next one only, and never back. Of all such placements it is one
    whose fullest device, as a share of its room, is the least full.

    Args:
        part_bytes: Weights of each part, in the order of calls.
        room_bytes: Most weights that each device takes, by its name.

    Returns:
        A device's name for each part.

    Raises:
        ModelError: The parts do not fit.
    """
    best = _filled(part_bytes, room_bytes)
    if len(best) < len(part_bytes):
        missing = sum(part_bytes[len(best) :])
        rooms = ", ".join(f"{device} takes {room / _GIB:.2f}" for device, room in room_bytes.items())
        raise ModelError(
            "the model's weights do not fit on the devices",
            value=f"{sum(part_bytes) / _GIB:.2f} GiB",
            rule=f"{missing / _GIB:.2f} GiB are missing ({rooms} GiB)",
            fix="use more devices, emptier ones, or fewer bits",
        )
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        found = _filled(part_bytes, {device: int(room * share) for device, room in room_bytes.items()})
        if len(found) == len(part_bytes):
            best, high = found, share
        else:
            low = share
    return best


def _filled(part_bytes: Sequence[int], room_bytes: Mapping[str, int]) -> list[str]:
    """The devices of as many first parts as fit, where each device takes what it can before the next one is begun."""
    devices: list[str] = []
    for device, room in room_bytes.items():
        while len(devices) < len(part_bytes) and part_bytes[len(devices)] <= room:
            room -= part_bytes[len(devices)]
            devices.append(device)
    return devices
