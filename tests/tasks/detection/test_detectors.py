"""Each detector on a PIIP network: a training step, batches without objects, precision, and predictions."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from small_detectors import SMALL, batch_of, instances, run_config, two_image_batch

from piip_scale.errors import ConfigError, DataError, ModelError
from piip_scale.tasks.detection.model import DetectionHeads, build_detection_model
from piip_scale.tasks.pixels import network_input

KINDS = ["mask_rcnn", "faster_rcnn", "cascade_mask_rcnn", "dino"]
CROWD = instances([[10, 10, 80, 80], [20, 20, 60, 60]], crowd=[True, True])
NOTHING = instances([])
SOME = instances([[10, 12, 60, 70], [70, 30, 150, 120]], [0, 2])


def _model(kind, seed=0, **config):
    torch.manual_seed(seed)
    return build_detection_model(run_config(kind, **config), num_classes=3).train()


def _step(model, batch):
    losses = model(batch=batch)
    total = sum(value for name, value in losses.items() if "loss" in name)
    total.backward()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_gives_finite_losses_and_every_parameter_a_gradient(kind):
    model = _model(kind)
    losses = _step(model, two_image_batch())
    assert all(value.shape == () and value.dtype == torch.float32 for value in losses.values())
    assert all(torch.isfinite(value) for value in losses.values())
    assert any(name.endswith("loss_bbox") for name in losses)
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    moving = {name.split(".")[1] for name, p in model.heads.named_parameters() if p.grad.any()}
    # DINO's level embedding acts through weights that mmdet starts at zero.
    assert moving == {name for name, _ in model.heads.detector.named_children()} - {"data_preprocessor", "backbone"} - {
        "positional_encoding"
    }


@pytest.mark.parametrize("kind", ["mask_rcnn", "faster_rcnn"])
def test_every_parameter_of_the_heads_moves_in_the_first_step(kind):
    # In a cascade and in DINO some wait: for anchors that fit a tiny image, or behind weights that start at zero.
    model = _model(kind)
    _step(model, two_image_batch())
    assert [name for name, p in model.heads.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "images",
    [(NOTHING, NOTHING), (CROWD, CROWD), (SOME, NOTHING), (NOTHING, CROWD)],
    ids=["none", "crowd", "one", "mix"],
)
def test_batches_without_objects_reach_every_feature(kind, images):
    model = _model(kind)
    losses = _step(model, batch_of(*images))
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.backbone.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_loss_names_do_not_depend_on_the_objects(kind):
    model = _model(kind)
    assert set(model(batch=batch_of(NOTHING, NOTHING))) == set(model(batch=two_image_batch()))


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_lie_in_the_stored_image_best_first(kind):
    model = _model(kind).eval()
    batch = batch_of(SOME, SOME, sizes_px=[(128, 160), (96, 120)])
    for found, info in zip(model.predict(batch), batch.infos, strict=True):
        height, width = info.original_size_px
        assert found.image_id == info.image_id
        assert len(found.boxes_xyxy_px) == len(found.scores) == len(found.labels)
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        assert (found.boxes_xyxy_px >= 0).all()
        assert (found.boxes_xyxy_px <= torch.tensor([width, height, width, height])).all()
        assert set(found.labels.tolist()) <= {0, 1, 2}
        if "mask" in kind:
            assert all(rle["size"] == [height, width] for rle in found.masks_rle)
        else:
            assert found.masks_rle is None


def test_padding_changes_neither_features_seen_nor_places_found():
    alone = batch_of(SOME, size_px=(64, 128), sizes_px=[(64, 128)])
    padded = batch_of(SOME, size_px=(128, 192), sizes_px=[(64, 128)])
    padded.images_BHWC[0, :64, :128] = alone.images_BHWC[0]
    augment = run_config().data.augment
    seen, expected = (network_input(batch, augment.mean, augment.std) for batch in (padded, alone))
    torch.testing.assert_close(seen[:, :, :64, :128], expected)
    assert not seen[:, :, 64:].any()
    assert not seen[:, :, :, 128:].any()


def test_network_input_is_the_normalised_image():
    batch = batch_of(SOME, size_px=(64, 64))
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    expected = ((batch.images_BHWC[0].numpy() - mean) / std).transpose(2, 0, 1)
    augment = run_config().data.augment
    np.testing.assert_allclose(network_input(batch, augment.mean, augment.std)[0].numpy(), expected, atol=1e-5)


class _Oracle(torch.nn.Module):
    """An RPN and a RoI head that know the answer, in pixels of the resized image."""

    def __init__(self, boxes, masks):
        super().__init__()
        self.boxes, self.masks = boxes, masks

    def forward(self, features, samples, mode):
        from mmdet.models.roi_heads.mask_heads import FCNMaskHead
        from mmengine.structures import InstanceData

        head = FCNMaskHead(num_classes=3)
        results = [InstanceData(bboxes=b.clone(), scores=s, labels=lab) for b, s, lab in self.boxes]
        metas = [sample.metainfo for sample in samples]
        test = type("Test", (), {"mask_thr_binary": 0.5})
        found = head.predict_by_feat(self.masks, results, metas, test, rescale=True)
        for sample, instances_found in zip(samples, found, strict=True):
            sample.pred_instances = instances_found
        return samples


def test_boxes_and_masks_map_back_to_the_stored_pixels_under_uneven_padding():
    model = _model("mask_rcnn").eval()
    boxes = [
        (torch.tensor([[10.0, 20, 50, 60], [0, 0, 8, 8]]), torch.tensor([0.3, 0.9]), torch.tensor([1, 2])),
        (torch.tensor([[8.0, 4, 40, 28]]), torch.tensor([0.8]), torch.tensor([0])),
    ]
    full = [torch.full((len(b), 3, 28, 28), 9.0) for b, _, _ in boxes]
    model.heads.detector = _Oracle(boxes, full)
    batch = batch_of(SOME, SOME, size_px=(128, 160), sizes_px=[(128, 160), (64, 96)], scale=0.5)
    first, second = model.predict(batch)
    assert first.labels.tolist() == [2, 1]
    torch.testing.assert_close(first.boxes_xyxy_px, torch.tensor([[0.0, 0, 16, 16], [20, 40, 100, 120]]))
    torch.testing.assert_close(second.boxes_xyxy_px, torch.tensor([[16.0, 8, 80, 56]]))
    mask = coco_mask.decode(second.masks_rle[0])
    expected = np.zeros((128, 192), np.uint8)
    expected[8:56, 16:80] = 1
    assert np.array_equal(mask, expected)


def test_bf16_weights_are_used_in_fp32():
    model = _model("mask_rcnn")
    features = [
        torch.randn(1, s.channels, 128 // s.stride_px, 160 // s.stride_px) for s in model.backbone.feature_specs
    ]
    rounded = _model("mask_rcnn").heads
    rounded.load_state_dict(model.heads.state_dict())
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    halves = _model("mask_rcnn").heads
    halves.load_state_dict(model.heads.state_dict())
    halves.bfloat16()
    from piip_scale.tasks.detection.samples import data_samples

    results = []
    for heads in (rounded, halves):
        torch.manual_seed(5)
        inputs = [feature.clone().requires_grad_() for feature in features]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = heads(*inputs, samples=data_samples(batch_of(SOME), with_masks=True))
        losses.sum().backward()
        results.append((losses.detach(), inputs[0].grad, heads.detector.neck.lateral_convs[0].conv.weight))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[1][0].dtype == torch.float32
    assert results[1][2].grad.dtype == torch.bfloat16
    torch.testing.assert_close(results[0][2].grad, results[1][2].grad.float(), rtol=1e-2, atol=1e-2)


def test_statistics_of_norms_are_kept_under_bf16():
    overrides = SMALL["faster_rcnn"] | {"neck.norm_cfg": {"type": "BN"}}
    model = _model("faster_rcnn", overrides=overrides)
    model.heads.bfloat16()
    before = model.heads.detector.neck.lateral_convs[0].bn.running_mean.clone()
    model(batch=two_image_batch())
    assert not torch.equal(before, model.heads.detector.neck.lateral_convs[0].bn.running_mean)


def test_bf16_network_keeps_heads_in_fp32():
    model = _model("faster_rcnn")
    model.set_precision(torch.bfloat16)
    assert {p.dtype for p in model.heads.parameters()} == {torch.float32}
    losses = _step(model, two_image_batch())
    assert all(torch.isfinite(value) and value.dtype == torch.float32 for value in losses.values())


def test_rules_and_parts_cover_every_parameter_once():
    model = _model("cascade_mask_rcnn")
    names = {name for name, _ in model.named_parameters()}
    rules = model.parameter_rules()
    assert set(rules) == names
    heads = {name: rule for name, rule in rules.items() if name.startswith("heads.")}
    assert {rule.layer_id for rule in heads.values()} == {model.num_layers + 1}
    assert all(not rule.decays for name, rule in heads.items() if name.endswith("bias"))
    assert any(rule.decays for rule in heads.values())
    counted = [id(p) for part in model.parts().values() for p in part.parameters()]
    assert sorted(counted) == sorted(id(p) for p in model.parameters())
    assert next(iter(model.parts())) == "branch 0"
    assert model.heads_module() is model.heads


def test_boxes_alone_do_not_train_a_mask_head():
    boxes_only = instances([[10, 10, 60, 60]], masks=False)
    with pytest.raises(DataError, match=r"image0 has no instance masks.*faster_rcnn"):
        _model("mask_rcnn")(batch=batch_of(boxes_only))
    assert _model("faster_rcnn")(batch=batch_of(boxes_only))
    assert _model("mask_rcnn").eval().predict(batch_of(boxes_only))


def test_too_small_images_for_the_queries_are_said():
    with pytest.raises(ConfigError, match="num_queries=900"):
        _model("dino", overrides={"encoder.num_layers": 1})(batch=two_image_batch())


def test_what_mmdet_cannot_build_is_one_line():
    config = run_config("faster_rcnn", {"neck.type": "NoSuchNeck"}).detector
    with pytest.raises(ConfigError, match="NoSuchNeck") as caught:
        DetectionHeads(config, _model("faster_rcnn").backbone.feature_specs, 3)
    assert "\n" not in str(caught.value)


def test_each_mode_refuses_the_others_work():
    with pytest.raises(ModelError, match="eval mode"):
        _model("faster_rcnn").predict(two_image_batch())
    with pytest.raises(ModelError, match="training mode"):
        _model("faster_rcnn").eval()(batch=two_image_batch())


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_can_be_checked_without_memory(kind):
    with torch.device("meta"):
        model = build_detection_model(run_config(kind, {}), num_classes=3)
        # All but DINO's level embedding, which mmdet makes by a call that knows no devices.
        assert sum(parameter.numel() for parameter in model.parameters() if not parameter.is_meta) <= 4 * 256
        with pytest.raises(ConfigError, match=r"neck\.out_chanels"):
            build_detection_model(run_config(kind, {"neck.out_chanels": 8}), num_classes=3)
