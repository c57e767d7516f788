"""Our forms of mmdet's parts give what mmdet's give, and have the host wait for the device less."""

from __future__ import annotations

import device_waits
import pytest
import torch
from small_detectors import batch_of, instances

from piip_scale.tasks.detection import heads_config
from piip_scale.tasks.mmlab import TASK_UTILS

# Of a micro-batch of two images with three objects each. ``device_waits.py`` prints where, and for more images.
BOUNDS = {"mask_rcnn": 17, "cascade_mask_rcnn": 56, "dino": 2}


@pytest.mark.parametrize("kind", BOUNDS)
def test_waits_for_the_device_are_bounded_and_none_is_the_networks_or_our_own_code(kind):
    model = device_waits.detector(kind)
    found = device_waits.waits_of(model, 2)
    assert found.number <= BOUNDS[kind], found.sites
    assert not [site for site in found.sites if any(name in site for name in ("samples.py", "pixels.py", "models/"))]


def test_more_objects_do_not_make_more_waits():
    model = device_waits.detector("mask_rcnn")
    few, many = ([[4 * i, 4 * i, 4 * i + 40, 4 * i + 40] for i in range(number)] for number in (2, 12))
    assert waits_with(model, few) == waits_with(model, many)


def waits_with(model, boxes) -> int:
    torch.manual_seed(0)
    with device_waits.Waits() as waits:
        model(batch_of(instances(boxes)))
    return waits.number


def losses_and_gradients(kind, monkeypatch, changed: bool):
    if not changed:
        monkeypatch.setattr(heads_config, "with_few_waits", lambda model: model)
    model = device_waits.detector.__wrapped__(kind)
    monkeypatch.undo()
    batch = batch_of(
        instances([[10, 12, 60, 70], [70, 30, 150, 120], [12, 12, 60, 70]], [0, 2, 1], [False, False, False]),
        instances([[20, 20, 52, 48], [0, 0, 128, 128]], [1, 0], [False, True]),
        instances([]),
    )
    torch.manual_seed(0)
    losses = model(batch)
    sum(value for name, value in losses.items() if "loss" in name).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", BOUNDS)
def test_losses_and_gradients_are_mmdets_own_bit_for_bit(kind, monkeypatch):
    ours, theirs = (losses_and_gradients(kind, monkeypatch, changed) for changed in (True, False))
    for found, expected in zip(ours, theirs, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("options", [{}, {"gt_max_assign_all": False}, {"match_low_quality": False}])
@pytest.mark.parametrize("negative", [0.3, (0.1, 0.4)])
def test_boxes_are_matched_as_by_mmdet(options, negative):
    values = {"pos_iou_thr": 0.7, "neg_iou_thr": negative, "min_pos_iou": 0.3} | options
    ours, theirs = (TASK_UTILS.build({"type": name} | values) for name in ("FewWaitsMaxIoUAssigner", "MaxIoUAssigner"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        # Coarse, so that objects share their best box, and boxes are equally good.
        overlaps = torch.randint(-1, 9, (4, 12), generator=generator) / 8
        found, expected = (one.assign_wrt_overlaps(overlaps, torch.arange(4)) for one in (ours, theirs))
        for name in ("gt_inds", "max_overlaps", "labels"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
