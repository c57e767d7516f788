"""Several views of an image: mirrored there and back, and merged as mmdet and mmseg do."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

import piip_scale.tasks.mmlab  # noqa: F401 - stands in for mmcv's compiled ops, which mmdet imports
from piip_scale.data.batch import ClassificationBatch, DetectionBatch, ImageInfo, SegmentationBatch
from piip_scale.errors import ConfigError
from piip_scale.tasks.base import Detections
from piip_scale.tasks.classification.views import predict_views as classes_of_views
from piip_scale.tasks.detection.views import merged
from piip_scale.tasks.detection.views import predict_views as objects_of_views
from piip_scale.tasks.segmentation.views import predict_views as maps_of_views
from piip_scale.tasks.views import Views, mirrored

HEIGHT, WIDTH = 24, 40


def batch_of(kind, *rest):
    """Two images of one size on a larger canvas, each with a bright box."""
    images = torch.zeros(2, 32, 64, 3, dtype=torch.uint8)
    images[0, 3:9, 2:12] = 200
    images[1, 10:20, 30:38] = 200
    infos = [ImageInfo(str(n), n, (HEIGHT, WIDTH), (HEIGHT, WIDTH), (1.0, 1.0)) for n in (1, 2)]
    return kind(images, tuple(infos), *rest)


class Bright:
    """Finds what is bright: a box with its mask, a class of each pixel, and how much of it lies left."""

    def predict(self, batch):
        return [self._object(image.numpy(), info) for image, info in zip(batch.images_BHWC, batch.infos, strict=True)]

    def _object(self, image, info):
        bright = image[:HEIGHT, :WIDTH, 0] > 0
        rows, columns = np.nonzero(bright)
        box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
        rle = coco_mask.encode(np.asfortranarray(bright.astype(np.uint8)))
        rle["counts"] = rle["counts"].decode()
        return Detections(info.image_id, box, torch.tensor([0.9]), torch.zeros(1, dtype=torch.long), [rle])

    def scores(self, batch):
        bright = batch.images_BHWC[:, :HEIGHT, :WIDTH, 0].float() - 100
        return [torch.stack([-one, one]) for one in bright]

    def batch_logits(self, batch):
        left = batch.images_BHWC[:, :HEIGHT, : WIDTH // 2].float().sum((1, 2, 3))
        return torch.stack([left, 1000 - left], 1)


def test_what_a_mirrored_view_shows_lies_where_it_was():
    batch = batch_of(DetectionBatch, ())
    assert torch.equal(mirrored(mirrored(batch)).images_BHWC, batch.images_BHWC)
    assert not mirrored(batch).images_BHWC[:, HEIGHT:].any()
    plain = Bright().predict(batch)
    for one, found in zip(plain, objects_of_views(Bright(), [batch], Views(flip=True)), strict=True):
        assert torch.equal(found.boxes_xyxy_px, one.boxes_xyxy_px)
        assert found.masks_rle == one.masks_rle
    pixels = batch_of(SegmentationBatch, torch.zeros(2, 32, 64, dtype=torch.uint8))
    for found, image in zip(maps_of_views(Bright(), [pixels] * 2, Views((1, 1), True)), batch.images_BHWC, strict=True):
        assert torch.equal(found.labels_HW > 0, image[:HEIGHT, :WIDTH, 0] > 0)


def test_a_classifiers_logits_are_averaged():
    batch = batch_of(ClassificationBatch, torch.zeros(2, dtype=torch.long))
    logits = (Bright().batch_logits(batch) + Bright().batch_logits(mirrored(batch))) / 2
    for found, values in zip(classes_of_views(Bright(), [batch], Views(flip=True)), logits.softmax(1), strict=True):
        assert torch.equal(found.probabilities, values.sort(descending=True).values)


def test_detections_are_merged_as_mmdet_does():
    from mmdet.models.test_time_augs import DetTTAModel
    from mmdet.structures import DetDataSample
    from mmengine.config import ConfigDict
    from mmengine.structures import InstanceData

    rng = torch.Generator().manual_seed(0)
    corners = torch.rand(30, 2, generator=rng) * 60
    boxes = torch.cat([corners, corners + 20 + 20 * torch.rand(30, 2, generator=rng)], 1)
    views, samples = [], []
    for _ in range(3):
        near, scores = boxes + torch.randn(30, 4, generator=rng), torch.rand(30, generator=rng)
        labels = torch.randint(0, 2, (30,), generator=rng)
        views.append(Detections(1, near, scores, labels))
        sample = DetDataSample(metainfo={"ori_shape": (100, 100), "flip": False, "flip_direction": None})
        sample.pred_instances = InstanceData(bboxes=near, scores=scores, labels=labels)
        samples.append(sample)
    for most in (100, 20):
        model = DetTTAModel.__new__(DetTTAModel)
        model.__dict__["tta_cfg"] = ConfigDict(nms={"type": "nms", "iou_threshold": 0.5}, max_per_img=most)
        theirs, mine = model._merge_single_sample(samples).pred_instances, merged(views, most)
        assert len(mine.scores) == len(theirs.scores) > 10
        torch.testing.assert_close(mine.boxes_xyxy_px, theirs.bboxes)
        torch.testing.assert_close(mine.scores, theirs.scores)
        assert torch.equal(mine.labels, theirs.labels)


def test_scales_change_the_size_of_images_and_no_classifiers(tmp_path):
    from piip_scale.config import load_config

    config = load_config("configs/coco/mask_rcnn_deit_b_1024.py")
    half, same = Views((0.5, 1.0)).configs(config)
    assert same is config
    assert half.data.augment.short_edge_px == (round(config.data.augment.short_edge_px[-1] / 2),)
    with pytest.raises(ConfigError, match="one size of its network"):
        Views((0.5,)).configs(load_config("configs/imagenet/augreg_sbl_384_192_128.py"))
