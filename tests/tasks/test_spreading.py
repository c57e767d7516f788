"""A model on several GPUs, without any: no operator mixes two, and what is found is what one device finds."""

import pytest
import torch
from pretended import noting_current, pretended_gpus
from small_answering import ModelsWeights
from small_detectors import CLASSES, run_config, two_image_batch
from small_detectors import SMALL as SMALL_OF
from small_segmentors import batch_of as segmentation_batch
from small_segmentors import run_config as segmentation_config
from torch._subclasses import FakeTensorMode

from piip_scale.config import load_config
from piip_scale.config.loading import check_config
from piip_scale.config.model import PiipConfig
from piip_scale.data.batch import ClassificationBatch, ImageInfo
from piip_scale.errors import ModelError, WorldError
from piip_scale.models.piip import PIIP
from piip_scale.ops import cells
from piip_scale.tasks import spreading
from piip_scale.tasks.kinds import build_model
from piip_scale.tasks.spreading import Spread, named_devices
from piip_scale.tasks.trained import Trained
from piip_scale.tasks.weights import load_weights

GIB = 1 << 30
GPUS = tuple(torch.device("cuda", index) for index in range(4))
# Triton's kernels need a GPU, and torch chooses another attention for tensors that are wrapped.
PLAIN = {"fused_kernel": "plain", "deform_kernel": "reference", "attention_kernel": "math"}
TOKENS = {"rotary": {}, "position_embedding": False, "class_token": True, "register_tokens": 2}
LARGE = {"resolution_px": 32, "embed_dim": 64, "depth": 4, "num_heads": 4, "layer_scale_init": 0.5} | TOKENS
SMALL = {"kind": "convnext", "resolution_px": 64, "depths": (1, 1), "widths": (32, 32), "blocks_per_stage": (2, 1)}
UNITS = {"num_stages": 2, "num_heads": 2, "gamma_init": 0.3}
SIDE_PX = 64
# Each has a mask.
FEW_OBJECTS = SMALL_OF["mask_rcnn"] | {"test_cfg.rcnn.max_per_img": 3}


class NoWeights:
    """A source of tensors without values."""

    def __init__(self, model):
        state = model.state_dict(keep_vars=True)
        self.name, self.shapes = "none", {name: tuple(value.shape) for name, value in state.items()}

    def read(self, name, dtype, device=None):
        return torch.empty(self.shapes[name], dtype=dtype, device=device)


@pytest.fixture(autouse=True)
def own_cells():
    """Constants are kept by device, and those of devices that are not there must not stay."""
    cells._made.cache_clear()
    yield
    cells._made.cache_clear()


@pytest.fixture
def roomy(monkeypatch):
    """GPUs of which each takes a part of any small model."""
    monkeypatch.setattr(spreading, "room_bytes", lambda device: 100 * GIB)


def features_of_fake_gpus(config, precision, size_px, monkeypatch):
    """The maps of a network whose weights are spread over GPUs that torch itself pretends there to be."""
    current = noting_current(monkeypatch)
    with torch.device("meta"):
        network = PIIP(config)
    network.take_images_of((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    network.set_precision(precision)
    spread = Spread(network.eval(), GPUS)
    assert set(spread.by_name.values()) == set(GPUS)
    with FakeTensorMode(), torch.no_grad():
        load_weights(network, NoWeights(network), spread.by_name)
        spread.settle()
        state = network.state_dict(keep_vars=True)
        assert {name: value.device for name, value in state.items()} == spread.by_name
        features = network(torch.empty(1, 3, size_px, size_px, device=GPUS[0]))
    assert list(dict.fromkeys(current)) == list(GPUS)
    return features


def small_network(**changes):
    return PiipConfig(
        branches=(LARGE | changes, SMALL),
        interaction=UNITS | {"direction": "to_small"},
        **PLAIN,
        pyramid={"kind": "regular", "scales": (1.0, 1.0), "stages": (0, 1)},
    )


@pytest.mark.parametrize("frozen", ["int8", "fp8"])
def test_a_network_crosses_gpus_without_mixing_them(frozen, roomy, monkeypatch):
    config = small_network(frozen_blocks="all", frozen_dtype=frozen)
    features = features_of_fake_gpus(config, torch.bfloat16, SIDE_PX, monkeypatch)
    assert [(map_BCHW.device, map_BCHW.dtype) for map_BCHW in features] == [(GPUS[-1], torch.float32)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coco/mask_rcnn_h6b_1024_512", "foundation/dino_dinov3_7b_frozen_ct_1024_512"])
def test_published_giants_cross_gpus_none_of_which_holds_them(name, monkeypatch):
    monkeypatch.setattr(spreading, "room_bytes", lambda device: 5 * GIB)
    config = load_config(f"configs/{name}.py", [f"model.{key}={value!r}" for key, value in PLAIN.items()]).model
    features = features_of_fake_gpus(config, torch.bfloat16, 1024, monkeypatch)
    assert {map_BCHW.device for map_BCHW in features} == {GPUS[-1]}


def classification():
    values = {
        "task": "classification",
        "model": {"branches": (LARGE | {"frozen_blocks": "all", "frozen_dtype": "fp8"}, SMALL), "interaction": UNITS},
        "classifier": {"separate": False},
        "data": {"train_shards": "a", "val_shards": "b", "classes": CLASSES},
        "train": {"steps": 1},
    }
    images = torch.randint(0, 256, (2, SIDE_PX, SIDE_PX, 3), dtype=torch.uint8)
    infos = tuple(ImageInfo(str(n), n, (SIDE_PX, SIDE_PX), (SIDE_PX, SIDE_PX), (1.0, 1.0)) for n in range(2))
    return check_config(values), ClassificationBatch(images, infos, torch.zeros(2, dtype=torch.long))


CASES = {
    "mask_rcnn": lambda: (run_config("mask_rcnn", FEW_OBJECTS, classes=CLASSES), two_image_batch()),
    "dino": lambda: (run_config("dino", classes=CLASSES), two_image_batch()),
    "segmentation": lambda: (
        segmentation_config(inference={"mode": "slide", "crop_px": (32, 32), "stride_px": (32, 32)}),
        segmentation_batch(1),
    ),
    "classification": classification,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends GPUs where there are none")
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param("mask_rcnn", "fp32", marks=pytest.mark.slow),
        ("dino", "bf16"),
        ("segmentation", "fp32"),
        ("classification", "bf16"),
    ],
)
def test_predictions_of_several_gpus_are_those_of_one_device(name, precision, roomy, monkeypatch):
    torch.manual_seed(0)
    config, batch = CASES[name]()
    config = config.model_copy(update={"model": config.model.model_copy(update=PLAIN)})
    found = trained(config)
    expected = found.load(precision).predict(batch)
    with pretended_gpus(monkeypatch) as current:
        spread = found.load(precision, spread_over=GPUS)
        used = {tensor.device.index for tensor in spread.state_dict().values()}
        results = spread.predict(batch.to(next(spread.parameters()).device))
    # DINO's neck and heads are larger here than all else, which then shares a device.
    assert used == {device.index for device in current} == ({0, 1} if name == "dino" else {0, 1, 2, 3})
    assert list(dict.fromkeys(current)) == list(GPUS[: len(used)])
    assert len(results) == len(batch)
    for one, other in zip(results, expected, strict=True):
        assert_equal(one, other)


def trained(config):
    """A model of random weights, drawn as floats, whatever is stored in 8 bits."""
    count = len(config.data.classes) or 4
    if not config.data.classes:
        config = config.model_copy(update={"data": config.data.model_copy(update={"classes": tuple("abcd"[:count])})})
    return Trained(config, ModelsWeights(build_model(config, count)))


def assert_equal(one, other):
    assert vars(one).keys() == vars(other).keys()
    for name, value in vars(one).items():
        theirs = getattr(other, name)
        assert torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs, name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_find_what_one_finds():
    torch.manual_seed(0)
    config, batch = CASES["dino"]()
    found = trained(config)
    expected, spread = found.load(device="cuda:0"), found.load(spread_over=GPUS[:2])
    assert {parameter.device for parameter in spread.parameters()} == set(GPUS[:2])
    for one, other in zip(spread.predict(batch.to("cuda:0")), expected.predict(batch.to("cuda:0")), strict=True):
        torch.testing.assert_close(one.scores, other.scores)


def test_names_of_devices_that_are_not_there_are_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert named_devices("all") == GPUS[:2]
    assert named_devices(["cuda:1", "cpu"]) == named_devices("cuda:1, cpu") == (GPUS[1], torch.device("cpu"))
    for names in ("cuda:2", "cuda", "gpu0", "", "cpu:0"):
        with pytest.raises(WorldError, match=r"unknown device.*this process has cuda:0, cuda:1, cpu"):
            named_devices(names)
    with pytest.raises(WorldError, match=r"device named twice.*name it once"):
        named_devices("cpu,cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(WorldError, match=r"no GPU to spread over.*--devices cpu"):
        named_devices("all")


def test_one_device_that_is_too_small_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(spreading, "available_memory_bytes", lambda: 1 << 20)
    config, _ = CASES["mask_rcnn"]()
    with pytest.raises(ModelError, match=r"do not fit.*0\.0\d GiB are missing \(cpu takes 0.00 GiB\)"):
        trained(config).load(spread_over=named_devices("cpu"))
