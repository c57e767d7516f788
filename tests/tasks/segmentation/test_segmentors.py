"""Segmentors: mmseg's heads as one leaf, windows that slide, and pixels counted by class."""

import json

import numpy as np
import pytest
import torch
from small_segmentors import CLASSES, batch_of, run_config

from piip_scale.config.segmentation import InferenceConfig, SegmentorConfig
from piip_scale.errors import ConfigError, ModelError
from piip_scale.models.branch import FeatureSpec
from piip_scale.tasks.base import Segmentation
from piip_scale.tasks.mmlab import BaseModule, ConfigDict, DefaultScope
from piip_scale.tasks.segmentation import sliding
from piip_scale.tasks.segmentation.heads_config import plan_segmentor
from piip_scale.tasks.segmentation.metric import SegmentationMetric
from piip_scale.tasks.segmentation.mmlab import MODELS, PixelData, SegDataSample
from piip_scale.tasks.segmentation.model import build_segmentation_model
from piip_scale.tasks.segmentation.sliding import class_scores, label_map

FEATURES = [FeatureSpec(8, stride) for stride in (4, 8, 16, 32)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_segmentation_model(run_config(), len(CLASSES))


@MODELS.register_module()
class MapsAsImages(BaseModule):
    """A backbone whose features are at hand."""

    def forward(self, images):
        return self.maps


def mmsegs_model(model, inference):
    """An ``EncoderDecoder`` of mmseg's own with the same heads."""
    plan = plan_segmentor(SegmentorConfig(overrides=run_config().segmentor.overrides), model.backbone.feature_specs, 4)
    told = {"type": "EncoderDecoder", "backbone": {"type": "MapsAsImages"}, "train_cfg": {}, "test_cfg": inference}
    with DefaultScope.overwrite_default_scope("mmseg"):
        whole = MODELS.build(ConfigDict(told | plan))
    whole.load_state_dict(model.heads.heads.state_dict())
    return whole


def features_of(size_px, channels=(64,) * 4, count=2):
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(count, width, size_px // stride, size_px // stride, generator=generator)
        for width, stride in zip(channels, (4, 8, 16, 32), strict=True)
    )


def test_losses_and_scores_are_mmsegs(model):
    features, labels = features_of(64), batch_of(2).labels_BHW
    expected = mmsegs_model(model, {"mode": "whole"})
    expected.backbone.maps = features
    samples = [SegDataSample(gt_sem_seg=PixelData(data=one[None].long())) for one in labels]
    expected.train()
    model.train()
    torch.manual_seed(3)
    theirs = expected.loss(torch.zeros(2, 3, 64, 64), samples)
    torch.manual_seed(3)
    losses = model.heads(*features, labels_BHW=labels)
    ours = dict(zip(model.heads.loss_names, losses, strict=True))
    assert set(ours) == set(theirs) == {"decode.loss_ce", "decode.acc_seg", "aux.loss_ce", "aux.acc_seg"}
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name].mean(), msg=name)
    expected.load_state_dict(model.heads.heads.state_dict())
    expected.eval()
    model.eval()
    torch.testing.assert_close(model.heads(*features), expected.decode_head(features))


def test_heads_compute_in_float32_and_keep_statistics(model):
    heads = build_segmentation_model(run_config(), 4).heads
    heads.to(torch.bfloat16).train()
    norm = heads.heads.decode_head.bottleneck.bn
    assert norm.weight.dtype == torch.bfloat16
    features = features_of(64)
    losses = heads(*(feature.bfloat16().requires_grad_() for feature in features), labels_BHW=batch_of(2).labels_BHW)
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert norm.running_mean.dtype == torch.float32
    assert norm.num_batches_tracked == 1
    assert norm.running_mean.abs().max() > 0


def test_training_reaches_every_parameter(model):
    model.train()
    losses = model(batch_of(2))
    sum(value for name, value in losses.items() if "loss" in name).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(model.parameter_rules()) == {name for name, _ in model.named_parameters()}
    model.zero_grad()


def test_a_single_image_is_refused_where_it_is_pooled_to_one_pixel(model):
    with pytest.raises(ConfigError, match=r"raise data\.micro_batch_size"):
        model.train()(batch_of(1))


def test_the_mode_must_fit(model):
    with pytest.raises(ModelError):
        model.eval()(batch_of(2))
    with pytest.raises(ModelError):
        model.train().predict(batch_of(2))


def test_predictions_have_the_stored_images_size(model):
    found = model.eval().predict(batch_of(2, stored_px=(50, 77)))
    assert [one.labels_HW.shape for one in found] == [(50, 77)] * 2
    assert all(one.labels_HW.dtype == torch.uint8 and one.labels_HW.max() < 4 for one in found)


@pytest.mark.parametrize("size_px", [(64, 64), (96, 130), (65, 200)])
def test_windows_slide_as_mmsegs(size_px):
    weights = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))

    def scorer(pixels):
        return torch.nn.functional.conv2d(pixels, weights, padding=2)

    crop, stride = (64, 64), (43, 30)
    pixels = torch.randn(2, 3, *size_px, generator=torch.Generator().manual_seed(1))
    from mmseg.models.segmentors import EncoderDecoder

    theirs = EncoderDecoder.__new__(EncoderDecoder)
    torch.nn.Module.__init__(theirs)
    theirs.test_cfg, theirs.out_channels = ConfigDict(mode="slide", crop_size=crop, stride=stride), 4
    theirs.encode_decode = lambda pixels, metas: scorer(pixels)
    expected = theirs.slide_inference(pixels, [{}])
    config = InferenceConfig(mode="slide", crop_px=crop, stride_px=stride)
    ours = class_scores(scorer, pixels, [size_px] * 2, config)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_images_of_one_batch_slide_each_by_its_own_size():
    pixels = torch.zeros(2, 3, 96, 128)
    pixels[0], pixels[1, :, :40, :100] = 1, 2
    config = InferenceConfig(mode="slide", crop_px=(64, 64), stride_px=(48, 48))
    calls = []

    def scorer(pixels):
        calls.append(pixels.shape)
        return pixels

    ours = class_scores(scorer, pixels, [(96, 128), (40, 100)], config)
    assert [tuple(one.shape[1:]) for one in ours] == [(96, 128), (40, 100)]
    assert (ours[0] == 1).all()
    assert (ours[1] == 2).all()
    assert set(calls) == {(2, 3, 64, 64)}


def test_whole_images_score_the_same_whichever_share_their_batch():
    generator = torch.Generator().manual_seed(0)
    sizes_px = [(30, 90), (64, 64), (31, 70)]
    images = [torch.randn(3, *size_px, generator=generator) for size_px in sizes_px]
    calls = []

    def scorer(pixels):
        calls.append(tuple(pixels.shape))
        # Its mean lets every pixel of an input touch every score.
        return pixels + pixels.mean((1, 2, 3), keepdim=True)

    def scores_of(images):
        pixels = torch.zeros(len(images), 3, 96, 128)
        for place, image in zip(pixels, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return class_scores(scorer, pixels, [tuple(image.shape[1:]) for image in images], InferenceConfig(), 32)

    together = scores_of(images)
    assert calls == [(2, 3, 32, 96), (1, 3, 64, 64)]
    for image, found in zip(images, together, strict=True):
        assert found.shape == image.shape
        torch.testing.assert_close(found, scores_of([image])[0])


@pytest.mark.parametrize(
    "config", [InferenceConfig(), InferenceConfig(mode="slide", crop_px=(32, 32), stride_px=(32, 32))]
)
def test_ranks_agree_on_their_calls_before_the_first_of_them(config, monkeypatch):
    """Under ZeRO-3 a call sends messages: a rank that asks after its last call meets those of another's next one."""
    done = []

    def all_reduce(most, _op):
        done.append("agreed")
        most.fill_(5)

    monkeypatch.setattr(sliding, "is_distributed", lambda: True)
    monkeypatch.setattr(sliding.dist, "all_reduce", all_reduce)

    def scorer(pixels):
        done.append("called")
        return pixels

    class_scores(scorer, torch.zeros(2, 3, 64, 64), [(20, 20), (60, 60)], config, 32)
    assert done == ["agreed", *["called"] * 5]


def test_scores_are_scaled_before_the_best_is_taken():
    scores = torch.tensor([[[0.0, 1.0]], [[0.6, 0.0]]])
    assert label_map(scores, (1, 8)).tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]


def test_what_heads_and_features_must_agree_on_follows():
    plan = plan_segmentor(SegmentorConfig(), FEATURES[:3], 7)
    assert (plan["decode_head"]["in_channels"], plan["decode_head"]["in_index"]) == ([8, 8, 8], [0, 1, 2])
    assert (plan["auxiliary_head"]["in_channels"], plan["auxiliary_head"]["in_index"]) == (8, 2)
    assert {head["num_classes"] for head in plan.values()} == {7}
    assert {head["norm_cfg"]["type"] for head in plan.values()} == {"RankBatchNorm"}
    alone = plan_segmentor(SegmentorConfig(overrides={"auxiliary_head": None}), FEATURES, 7)
    assert set(alone) == {"decode_head"}
    group = {"decode_head.norm_cfg": {"type": "GN", "num_groups": 4, "_delete_": True}}
    assert plan_segmentor(SegmentorConfig(overrides=group), FEATURES, 7)["decode_head"]["norm_cfg"]["type"] == "GN"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"decode_head.chanels": 3}, r"segmentor\.overrides\.decode_head\.chanels.*did you mean channels"),
        ({"neck": {}}, r"unknown config key segmentor\.overrides\.neck"),
        ({"decode_head.num_classes": 5}, "the data set has 7 classes"),
        ({"decode_head": None}, "a decode_head there must be"),
    ],
)
def test_overrides_that_mean_nothing_are_refused(overrides, told):
    with pytest.raises(ConfigError, match=told):
        plan_segmentor(SegmentorConfig(overrides=overrides), FEATURES, 7)


def metric_of(pairs):
    metric = SegmentationMetric(CLASSES)
    for number, (found, truth) in enumerate(pairs):
        batch = batch_of(1, stored_px=truth.shape, first_id=number)
        labels = torch.full((1, 40, 40), 255, dtype=torch.uint8)
        labels[0, : truth.shape[0], : truth.shape[1]] = truth
        metric.update(type(batch)(batch.images_BHWC, batch.infos, labels), [Segmentation(number, found)])
    return metric


def test_metric_is_mmsegs():
    from mmseg.evaluation import IoUMetric

    generator = torch.Generator().manual_seed(0)
    pairs = []
    for size in ((30, 20), (11, 40), (40, 40)):
        found, truth = torch.randint(0, 3, (2, *size), dtype=torch.uint8, generator=generator)
        truth[truth == 2] = 255 if size[0] == 11 else 1
        pairs.append((found, truth))
    areas = [IoUMetric.intersect_and_union(found.long(), truth.long(), 4, 255) for found, truth in pairs]
    totals = [sum(parts) for parts in zip(*areas, strict=True)]
    expected = IoUMetric.total_area_to_metrics(*totals)
    ours = metric_of(pairs).compute()
    assert ours["aacc"] == pytest.approx(expected["aAcc"])
    assert ours["miou"] == pytest.approx(np.nanmean(expected["IoU"]))
    assert ours["macc"] == pytest.approx(np.nanmean(expected["Acc"]))
    named = {name.rpartition("/")[2]: value for name, value in ours.items() if name.startswith("per_class/")}
    assert set(named) == set(CLASSES[:3])


def test_an_image_seen_twice_counts_once():
    pair = torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4, 4, dtype=torch.uint8)
    metric = metric_of([pair])
    batch = batch_of(1, stored_px=(4, 4), first_id=0)
    metric.update(batch, [Segmentation(0, pair[0])])
    assert metric.confusion().sum() == 16
    assert metric.confusion()[1, 0] == 16


def test_results_tell_areas(tmp_path):
    found = torch.zeros(10, 10, dtype=torch.uint8)
    found[:3] = 2
    metric_of([(found, found)]).write_results(tmp_path / "found.json")
    (entry,) = json.loads((tmp_path / "found.json").read_text())
    assert entry["image_id"] == 0
    assert entry["classes"] == [
        {"class": CLASSES[0], "area_share": 0.7},
        {"class": CLASSES[2], "area_share": 0.3},
    ]
