"""Which device each part of a network is on: arithmetic over bytes, and the order of calls that it rests on."""

from itertools import combinations_with_replacement, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_piip import MIXES, config, image, mix

from piip_scale.config.model import ClassifierConfig
from piip_scale.errors import ModelError
from piip_scale.models.classifier import PiipClassifier
from piip_scale.models.piip import PIIP
from piip_scale.models.placement import place

GIB = 1 << 30
parts = st.lists(st.integers(0, 20), min_size=1, max_size=6)
rooms = st.lists(st.integers(0, 60), min_size=1, max_size=3)


def fullest(part_bytes, room_bytes, places):
    """The share of its room that the fullest device takes; ``None`` where one is too full."""
    taken = [sum(part for part, at in zip(part_bytes, places, strict=True) if at == device) for device in room_bytes]
    if any(each > room for each, room in zip(taken, room_bytes.values(), strict=True)):
        return None
    return max(each / room if room else 0.0 for each, room in zip(taken, room_bytes.values(), strict=True))


@given(parts, rooms)
def test_each_part_is_on_one_device_in_order_and_no_device_is_fuller_than_it_must_be(part_bytes, sizes):
    room_bytes = {f"cuda:{index}": room for index, room in enumerate(sizes)}
    # All placements there are, which arithmetic must not need.
    shares = [
        share
        for places in combinations_with_replacement(room_bytes, len(part_bytes))
        if (share := fullest(part_bytes, room_bytes, places)) is not None
    ]
    if not shares:
        with pytest.raises(ModelError, match="do not fit on the devices"):
            place(part_bytes, room_bytes)
        return
    places = place(part_bytes, room_bytes)
    assert len(places) == len(part_bytes)
    assert all(int(one[5:]) <= int(after[5:]) for one, after in pairwise(places))
    # Rooms are whole bytes.
    assert fullest(part_bytes, room_bytes, places) == pytest.approx(min(shares), abs=1e-9)


def test_what_is_missing_is_said_by_device():
    with pytest.raises(ModelError) as caught:
        place([3 * GIB, 2 * GIB, 2 * GIB], {"cuda:0": 4 * GIB, "cuda:1": 3 * GIB})
    assert caught.value.line == (
        "the model's weights do not fit on the devices: got '7.00 GiB'; 2.00 GiB are missing "
        "(cuda:0 takes 4.00, cuda:1 takes 3.00 GiB); use more devices, emptier ones, or fewer bits"
    )


NETWORKS = {
    **{f"mix {index}": lambda index=index: PIIP(mix(index)) for index in range(len(MIXES))},
    "four branches": lambda: PIIP(config(4)),
    "foundation": lambda: PIIP(config(2, {"direction": "to_small"})),
    "a head a branch": lambda: PiipClassifier(config(2), ClassifierConfig(num_classes=3, separate=True)),
    "one head": lambda: PiipClassifier(mix(0), ClassifierConfig(num_classes=3, separate=False)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_order_of_calls_is_the_one_that_happens_and_holds_all_there_is(name):
    network, called = NETWORKS[name]().eval(), []
    order = [module for modules in network.call_order() for module in modules]
    for module in order:
        module.register_forward_pre_hook(lambda module, _: called.append(module))
    with torch.no_grad():
        network(image(batch=1))
    assert called == order
    held = [name for module in order for name in module.state_dict(keep_vars=True).values()]
    assert sorted(map(id, held)) == sorted(map(id, network.state_dict(keep_vars=True).values()))
