import cv2
import numpy as np
import pytest
import torch

from piip_scale.ops.resize import resize_image, resize_map, resize_position


def opencv(map_HW: np.ndarray, height: int, width: int, how: int) -> np.ndarray:
    return cv2.resize(map_HW, (width, height), interpolation=how)


@pytest.mark.parametrize("size", [(5, 9), (12, 4)])
def test_maps_agree_with_opencv(size):
    values = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    ours = resize_map(torch.from_numpy(values)[None, None], *size)[0, 0].numpy()
    np.testing.assert_allclose(ours, opencv(values, *size, cv2.INTER_LINEAR), atol=1e-5)


@pytest.mark.parametrize("size", [(5, 9), (12, 4)])
def test_positions_agree_with_opencv(size):
    values = np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)
    ours = resize_position(torch.from_numpy(values).reshape(1, 36, 1), 6, *size)[0, ..., 0].numpy()
    np.testing.assert_allclose(ours, opencv(values, *size, cv2.INTER_CUBIC), atol=1e-4)


def test_bilinear_positions_agree_with_opencv():
    values = np.random.default_rng(2).normal(size=(6, 6)).astype(np.float32)
    ours = resize_position(torch.from_numpy(values).reshape(1, 36, 1), 6, 5, 9, "bilinear")[0, ..., 0].numpy()
    np.testing.assert_allclose(ours, opencv(values, 5, 9, cv2.INTER_LINEAR), atol=1e-5)


def test_a_position_embedding_on_its_own_grid_is_itself():
    position = torch.randn(1, 9, 4)
    torch.testing.assert_close(resize_position(position, 3, 3, 3).flatten(1, 2), position)


def test_an_image_keeps_the_exact_factor_where_its_size_is_rounded():
    # 10 columns at 0.45 are 4; a ramp sampled at the exact factor rises by 1 / 0.45 a column, not by 10 / 4.
    ramp = torch.arange(10.0).expand(1, 1, 10, 10)
    small = resize_image(ramp, 0.45)
    assert small.shape == (1, 1, 4, 4)
    assert (small[0, 0, 0, 2] - small[0, 0, 0, 1]).item() == pytest.approx(1 / 0.45, rel=1e-5)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_an_image_is_never_enlarged(scale):
    image = torch.randn(1, 3, 8, 8)
    assert resize_image(image, scale) is image


def test_half_precision_is_resized_in_float32():
    image = torch.randn(1, 3, 16, 16).bfloat16()
    assert resize_map(image, 4, 4).dtype == torch.float32
    assert torch.equal(resize_image(image, 0.5), resize_image(image.float(), 0.5).bfloat16())
    position = torch.randn(1, 16, 8).bfloat16()
    assert torch.equal(resize_position(position, 4, 7, 5), resize_position(position.float(), 4, 7, 5).bfloat16())
