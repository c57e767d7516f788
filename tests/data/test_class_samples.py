"""Classification's batches: timm's transforms as a function of seed, epoch and sample; mixing against its formula."""

import random

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
from made_sets import write_jpeg
from PIL import Image
from pydantic import ValidationError

from piip_scale.config.classification import ClassificationData, ImageAugmentConfig, MixConfig
from piip_scale.data.packing.pack_classes import pack_folders
from piip_scale.data.packing.packing import PackOptions
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.samples.classification import ClassificationSamples, training_transform
from piip_scale.data.stream import ShardLoader
from piip_scale.world import World

SIZE_PX = 24
AUGMENT = ImageAugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", erase_probability=0.25, mix=MixConfig())
PLAIN = ImageAugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip_probability=0.0)
"""No chance; the images below are square."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    for number in range(24):
        write_jpeg(folder / "images" / "abc"[number % 3] / f"{number}.jpg", 40, 40, number)
    return folder / "images"


@pytest.fixture(scope="module")
def shards(folders):
    pack_folders(folders, folders.parent / "out", how=PackOptions(target_samples=7))
    return ShardSet.open(folders.parent / "out")


def loader(shards, augment, *, rank=0, num_ranks=1, workers=0, accumulation=1, size=4, smoothing=0.1):
    data = {"train_shards": "", "val_shards": "", "num_streams": 2, "micro_batch_size": size, "workers": workers}
    world = World(rank=rank, num_ranks=num_ranks, ranks_per_node=num_ranks, local_rank=rank)
    maker = ClassificationSamples(shards, augment, SIZE_PX, smoothing)
    return ShardLoader(
        shards, ClassificationData(**data, augment=augment), maker, seed=3, world=world, accumulation=accumulation
    )


def assert_same(one, other):
    assert one.infos == other.infos
    assert torch.equal(one.images_BHWC, other.images_BHWC)
    assert torch.equal(one.labels, other.labels)
    assert (one.soft_labels_BK is None) == (other.soft_labels_BK is None)
    assert one.soft_labels_BK is None or torch.equal(one.soft_labels_BK, other.soft_labels_BK)


def test_evaluation_is_torchvisions_resize_and_centre_crop(folders, shards):
    augment = ImageAugmentConfig(eval_crop_share=0.75)
    reference = tv.Compose([tv.Resize(32, tv.InterpolationMode.BICUBIC), tv.CenterCrop(SIZE_PX), tv.PILToTensor()])
    batches = list(loader(shards, augment, size=5).val_batches())
    assert sum(len(batch) for batch in batches) == 25
    by_id = {int(i): shards.notes(n) for n, i in enumerate(shards.image_ids)}
    for batch in batches:
        for image, label, info in zip(batch.images_BHWC, batch.labels, batch.infos, strict=True):
            notes = by_id[info.image_id]
            assert label == notes["label"]
            with Image.open(folders / notes["file_name"]) as photo:
                expected = reference(photo.convert("RGB"))
            # Two JPEG decoders differ by a rounding.
            assert (image.permute(2, 0, 1).int() - expected.int()).abs().max() <= 3


@pytest.mark.parametrize("workers", [1, 2])
def test_training_batches_depend_on_nothing_but_seed_epoch_and_sample(shards, workers):
    alone, others = loader(shards, AUGMENT), loader(shards, AUGMENT, workers=workers)
    first = list(alone.batches(0))
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    for one, other in zip(first, others.batches(0), strict=True):
        assert_same(one, other)
    for one, other in zip(first[2:], alone.batches(0, first_step=2), strict=True):
        assert_same(one, other)
    by_key = {info.key: image for batch in first for info, image in zip(batch.infos, batch.images_BHWC, strict=True)}
    changed = [
        not torch.equal(image, by_key[info.key])
        for batch in alone.batches(1)
        for info, image in zip(batch.infos, batch.images_BHWC, strict=True)
    ]
    assert all(changed)


def test_micro_batches_are_the_same_on_one_rank_and_on_two(shards):
    alone = list(loader(shards, AUGMENT, accumulation=2).batches(0))
    for rank in range(2):
        pairs = zip(alone[rank::2], loader(shards, AUGMENT, rank=rank, num_ranks=2).batches(0), strict=True)
        for one, other in pairs:
            assert_same(one, other)


def test_the_processes_own_chance_goes_on_undisturbed(shards):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    batches = iter(loader(shards, AUGMENT).batches(0))
    next(batches)
    assert drawn() == expected


def mixed_and_plain(shards, mix, smoothing=0.1):
    plain = loader(shards, PLAIN).batches(0)
    mixed = loader(shards, PLAIN.model_copy(update={"mix": mix}), smoothing=smoothing).batches(0)
    return list(zip(mixed, plain, strict=True))


def share_of(mixed, plain, index, smoothing):
    """How much of the soft label is the image's own class, from the classes of the pair."""
    own, other = int(plain.labels[index]), int(plain.labels[len(plain) - 1 - index])
    if own == other:
        return None
    return (float(mixed.soft_labels_BK[index, own]) - smoothing / 3) / (1 - smoothing)


def test_mixup_blends_images_as_it_blends_their_labels(shards):
    shares = set()
    for mixed, plain in mixed_and_plain(shards, MixConfig(mixup_alpha=0.8, cutmix_alpha=0.0)):
        assert torch.allclose(mixed.soft_labels_BK.sum(1), torch.ones(4))
        assert mixed.soft_labels_BK.min() >= 0.1 / 3 - 1e-6
        for index in range(4):
            if (share := share_of(mixed, plain, index, 0.1)) is None:
                continue
            images = plain.images_BHWC.float()
            expected = share * images[index] + (1 - share) * images[3 - index]
            assert (mixed.images_BHWC[index] - expected).abs().max() <= 0.51
            shares.add(round(share, 3))
    assert len(shares) > 1


def test_cutmix_takes_as_much_of_an_image_as_of_its_label(shards):
    found = 0
    for mixed, plain in mixed_and_plain(shards, MixConfig(mixup_alpha=0.0, cutmix_alpha=1.0), smoothing=0.0):
        for index in range(4):
            own, other = plain.images_BHWC[index], plain.images_BHWC[3 - index]
            cut = (mixed.images_BHWC[index] != own).any(-1)
            assert torch.equal(mixed.images_BHWC[index][cut], other[cut])
            if (share := share_of(mixed, plain, index, 0.0)) is not None:
                # Where both images agree by chance nothing seems cut.
                assert 0 <= (1 - share) - cut.float().mean() <= 0.05
                found += 1
    assert found > 3


def test_without_mixing_labels_are_hard(shards):
    batch = next(iter(loader(shards, PLAIN).batches(0)))
    assert batch.soft_labels_BK is None
    assert batch.to("cpu").labels.dtype == torch.int64


def test_erasing_covers_a_part_with_noise_around_the_mean():
    pixels = np.full((40, 40, 3), 255, np.uint8)
    augment = PLAIN.model_copy(update={"erase_probability": 1.0})
    torch.manual_seed(0)
    random.seed(0)
    images = np.stack([training_transform(augment, SIZE_PX)(pixels) for _ in range(200)])
    erased = (images != 255).any(1)
    share = erased.mean((1, 2))
    assert share.max() <= 1 / 3 + 0.05
    assert share.min() >= 0.02 - 0.01
    noise = images.transpose(1, 0, 2, 3)[:, erased].astype(float)
    # Clipping at white takes a little of it away.
    assert np.allclose(noise.mean(1), augment.mean, atol=4)
    assert np.allclose(noise.std(1), augment.std, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"auto_augment": "rand-m9", "color_jitter": 0.4}, "changes colours by itself"),
        ({"auto_augment": "best"}, "must begin as timm's policies do"),
        ({"crop_scale": (0.5, 0.1)}, "0 < low <= high"),
        ({"crop_ratio": (2.0, 1.0)}, "0 < low <= high"),
        ({"mix": {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}}, "both 0"),
        ({"eval_crop_share": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, told):
    with pytest.raises(ValidationError, match=told):
        ImageAugmentConfig(**changes)


def test_mixing_takes_images_in_pairs():
    with pytest.raises(ValidationError, match="must be even"):
        ClassificationData(train_shards="", val_shards="", micro_batch_size=3, augment=AUGMENT)
