"""What we count of a detector is what torch's counter sees while it runs."""

import pytest
import small_segmentors
import torch
from small_detectors import CLASSES, SMALL, batch_of, instances, run_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from piip_scale.config.loading import check_config
from piip_scale.errors import ConfigError
from piip_scale.tasks.counting import count_run
from piip_scale.tasks.detection.model import build_detection_model
from piip_scale.tasks.kinds import build_model
from piip_scale.tasks.layer_work import layer_work

# NMS keeps everything, so that heads work on as many boxes as they may.
FULL = {
    "test_cfg.rpn.nms.iou_threshold": 1.0,
    "test_cfg.rpn.min_bbox_size": -1,
    "test_cfg.rcnn.nms.iou_threshold": 1.0,
    "test_cfg.rcnn.score_thr": 0.0,
    "test_cfg.rcnn.max_per_img": 20,
}
PARTS = {
    "mask_rcnn": {
        "neck": "neck",
        "rpn": "rpn_head",
        "box head": "roi_head.bbox_head",
        "mask head": "roi_head.mask_head",
    },
    "faster_rcnn": {"neck": "neck", "rpn": "rpn_head", "box head": "roi_head.bbox_head"},
    "cascade_mask_rcnn": {"neck": "neck", "rpn": "rpn_head"},
    "dino": {"neck": "neck", "encoder": "encoder"},
}


def small_run(kind, overrides=None):
    exact = {} if kind == "dino" else FULL
    config = run_config(kind, SMALL[kind] | exact | (overrides or {}), classes=CLASSES)
    # torch counts the plain formula's products; of fused kernels it knows some only.
    return config.model_copy(update={"model": config.model.model_copy(update={"attention_kernel": "math"})})


def built(config):
    torch.manual_seed(0)
    return build_detection_model(config, len(CLASSES)).eval().requires_grad_(False)


def macs_by_torch(counter, module="Global"):
    flops = sum(counter.get_flop_counts()[module].values())
    assert flops % 2 == 0
    return flops // 2


@pytest.mark.parametrize("size_px", [(128, 160), (99, 150)])
@pytest.mark.parametrize("kind", SMALL)
def test_counts_equal_torchs(kind, size_px):
    config = small_run(kind)
    model = built(config)
    with FlopCounterMode(display=False) as counter:
        found = model.predict(batch_of(instances([]), size_px=size_px))
    assert len(found[0].scores) == 20
    counted = count_run(config, *size_px)
    assert sum(part.macs for part in counted.parts) == macs_by_torch(counter)
    assert sum(part.parameters for part in counted.parts) == sum(p.numel() for p in model.parameters())
    by_name = {part.name: part for part in counted.parts}
    for part, module in PARTS[kind].items():
        assert by_name[part].macs == macs_by_torch(counter, f"DetectionHeads.detector.{module}")
        weights = model.heads.detector.get_submodule(module).parameters()
        assert by_name[part].parameters == sum(p.numel() for p in weights)


def test_dinos_samples_are_those_it_takes(monkeypatch):
    """torch's counter does not see sampling: what mmcv's plain formula is called with is counted here instead."""
    import mmcv.ops.multi_scale_deform_attn as module

    sampled = []
    original = module.multi_scale_deformable_attn_pytorch

    def record(value, shapes, locations, weights):
        # Four corners and the attention's weight, for each channel of a head at each of its locations.
        sampled.append(5 * locations[..., 0].numel() * value.shape[-1])
        return original(value, shapes, locations, weights)

    monkeypatch.setattr(module, "multi_scale_deformable_attn_pytorch", record)
    config = small_run("dino")
    built(config).predict(batch_of(instances([]), size_px=(128, 160)))
    parts = {part.name: part for part in count_run(config, 128, 160).parts}
    assert sampled == [parts["encoder"].sampling_macs, *[parts["decoder"].sampling_macs // 2] * 2]


def test_notes_say_what_heads_work_on():
    parts = {part.name: part.note for part in count_run(small_run("cascade_mask_rcnn"), 128, 160).parts}
    assert parts["box head"] == "at most 50 proposals, 3 stages"
    assert parts["mask head"] == "at most 20 detections, 3 stages"
    parts = {part.name: part.note for part in count_run(small_run("dino"), 128, 160).parts}
    assert parts["decoder"] == "40 queries"


def test_classes_that_nobody_tells_are_those_of_a_public_set():
    untold = small_run("faster_rcnn").model_copy(update={"data": run_config("faster_rcnn").data})
    counted = count_run(untold, 128, 160)
    assert (counted.num_classes, counted.assumed_set) == (80, "COCO")
    told = count_run(small_run("faster_rcnn"), 128, 160)
    assert (told.num_classes, told.assumed_set) == (3, "")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"roi_head.type": "PISARoIHead"}, "heads cannot be counted: got 'PISARoIHead'"),
        ({"neck.conv_cfg": {"type": "DCNv2"}}, "a layer cannot be counted: got 'ModulatedDeformConv2dPack'"),
        ({"test_cfg.rcnn.max_per_img": -1}, "test_cfg.rcnn.max_per_img: got -1"),
    ],
)
def test_what_no_rule_counts_is_refused(overrides, line):
    with pytest.raises(ConfigError) as caught:
        count_run(small_run("mask_rcnn", overrides), 128, 160)
    assert line in caught.value.line
    assert "\n" not in caught.value.line


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4),
        nn.ConvTranspose2d(8, 12, (2, 3), stride=2, groups=2),
        nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Flatten(2), nn.Linear(63, 5)),
    ],
)
def test_layers_count_as_torchs(layer):
    layer = layer.eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        output = layer(torch.zeros(2, 8, 7, 9))
    returned, work = layer_work(layer.to("meta"), torch.empty(2, 8, 7, 9, device="meta"))
    assert returned.shape == output.shape
    assert (work.forward, work.backward) == (macs_by_torch(counter), 0)


@pytest.mark.parametrize("separate", [True, False])
def test_classifiers_are_counted_with_their_heads(separate):
    branches = [
        {"resolution_px": size, "embed_dim": dim, "depth": 2, "num_heads": 2, "class_token": True}
        for size, dim in ((32, 64), (64, 32))
    ]
    values = {
        "task": "classification",
        "model": {
            "branches": branches,
            "interaction": {"num_stages": 2, "num_heads": 2},
            "attention_kernel": "math",
        },
        "classifier": {"separate": separate},
        "data": {"train_shards": "train", "val_shards": "val"},
        "train": {"steps": 1},
    }
    config = check_config(values)
    counted = count_run(config, 64, 96)
    assert (counted.num_classes, counted.assumed_set) == (1000, "ImageNet")
    model = build_model(config, 1000).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.logits(torch.zeros(1, 3, 64, 96))
    assert sum(part.macs for part in counted.parts) == macs_by_torch(counter)
    assert sum(part.parameters for part in counted.parts) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size_px", [(64, 64), (64, 96)])
@pytest.mark.parametrize("overrides", [{}, {"auxiliary_head": None}])
def test_segmentors_are_counted_with_their_heads(size_px, overrides):
    config = small_segmentors.run_config(overrides={"decode_head.channels": 16} | overrides)
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention_kernel": "math"})})
    model = build_model(config, 4).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model.predict(small_segmentors.batch_of(1, size_px=size_px))
    counted = count_run(config, *size_px)
    assert (counted.num_classes, counted.assumed_set) == (150, "ADE20K")
    four = config.model_copy(update={"data": config.data.model_copy(update={"classes": small_segmentors.CLASSES})})
    parts = count_run(four, *size_px).parts
    assert sum(part.macs for part in parts) == macs_by_torch(counter)
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in model.parameters())
    assert ("auxiliary head" in {part.name for part in parts}) == (not overrides)
