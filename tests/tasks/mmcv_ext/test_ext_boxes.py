"""Non-maximum suppression against loops written from the definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piip_scale.tasks import mmcv_ext

mmcv_ext.install()
from mmcv.ops import batched_nms, nms, nms_match, soft_nms  # noqa: E402


def _iou(a, b, offset):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)

    def area(box):
        return (box[2] - box[0] + offset) * (box[3] - box[1] + offset)

    union = area(a) + area(b) - width * height
    return width * height / union if union else 0.0


def _naive_nms(boxes, scores, threshold, offset):
    kept = []
    for index in np.argsort(-scores, kind="stable"):
        if all(_iou(boxes[index], boxes[other], offset) <= threshold for other in kept):
            kept.append(int(index))
    return kept


def _naive_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    scores, left, result = scores.copy(), list(range(len(boxes))), []
    while left:
        best = max(left, key=lambda index: scores[index])
        left.remove(best)
        result.append((best, scores[best]))
        for index in left:
            overlap = _iou(boxes[best], boxes[index], offset)
            if method == "gaussian":
                scores[index] *= np.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                scores[index] *= 1 - overlap if method == "linear" else 0.0
        left = [index for index in left if scores[index] >= min_score]
    return result


def _boxes(seed, count):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (count, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(4, 40, (count, 2))], 1).astype(np.float32)
    # Distinct scores, so that the order is one.
    return boxes, (rng.permutation(count).astype(np.float32) + 1) / (count + 1)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 40), st.sampled_from([0.3, 0.5, 0.7]), st.sampled_from([0, 1]))
def test_nms_is_the_loop(seed, count, threshold, offset):
    boxes, scores = _boxes(seed, count)
    dets, kept = nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold, offset)
    assert kept.tolist() == _naive_nms(boxes, scores, threshold, offset)
    assert torch.equal(dets[:, 4], torch.from_numpy(scores)[kept])


def test_batched_nms_keeps_classes_apart():
    boxes, scores = (torch.from_numpy(array) for array in _boxes(3, 30))
    labels = torch.arange(30) % 3
    _, kept = batched_nms(boxes, scores, labels, {"type": "nms", "iou_threshold": 0.4})
    expected = [
        index
        for label in range(3)
        for index in torch.nonzero(labels == label)[:, 0][
            _naive_nms(boxes[labels == label].numpy(), scores[labels == label].numpy(), 0.4, 0)
        ].tolist()
    ]
    assert sorted(kept.tolist()) == sorted(expected)


def test_nms_takes_half_precision_boxes():
    boxes, scores = _boxes(5, 20)
    halves = torch.from_numpy(boxes).bfloat16()
    _, kept = nms(halves, torch.from_numpy(scores).bfloat16(), 0.5)
    rounded_scores = torch.from_numpy(scores).bfloat16().float().numpy()
    assert kept.tolist() == _naive_nms(halves.float().numpy(), rounded_scores, 0.5, 0)


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 25])
def test_soft_nms_is_the_loop(method, offset, count):
    boxes, scores = _boxes(count + 7, count)
    dets, kept = soft_nms(torch.from_numpy(boxes), torch.from_numpy(scores), 0.3, 0.5, 1e-2, method, offset)
    expected = _naive_soft_nms(boxes, scores, 0.3, 0.5, 1e-2, method, offset)
    assert kept.tolist() == [index for index, _ in expected]
    np.testing.assert_allclose(dets[:, 4].numpy(), [score for _, score in expected], rtol=1e-5)
    np.testing.assert_array_equal(dets[:, :4].numpy(), boxes[kept.numpy()])


def test_nms_match_groups_are_led_by_the_kept_and_partition_the_boxes():
    boxes, scores = _boxes(11, 30)
    groups = nms_match(torch.from_numpy(np.concatenate([boxes, scores[:, None]], 1)), 0.4)
    assert [int(group[0]) for group in groups] == _naive_nms(boxes, scores, 0.4, 0)
    assert sorted(index for group in groups for index in group.tolist()) == list(range(30))
    for group in groups:
        assert all(_iou(boxes[group[0]], boxes[index], 0) >= 0.4 for index in group[1:])
        assert [scores[index] for index in group] == sorted((scores[index] for index in group), reverse=True)
