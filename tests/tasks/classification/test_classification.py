"""Classification as a task: loss and accuracy against plain formulas, released weights, single images, two ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_sets import write_jpeg
from ranks import FORCED_RELEASE, run_ranks
from safetensors import safe_open
from safetensors.torch import save_file
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.config.loading import check_config
from piip_scale.data.batch import ClassificationBatch, ImageInfo
from piip_scale.data.images import read_photo
from piip_scale.data.packing.pack_classes import pack_folders
from piip_scale.errors import DataError, ModelError
from piip_scale.models.official import from_official
from piip_scale.models.official_config import read_official_config
from piip_scale.tasks.classification.metric import AccuracyMetric
from piip_scale.tasks.classification.model import Classification
from piip_scale.tasks.classification.prediction import ClassPredictor
from piip_scale.tasks.classification.task import ClassificationTask
from piip_scale.tasks.detection.task import DetectionTask
from piip_scale.tasks.kinds import build_model, build_predictor, load_model
from piip_scale.tasks.pixels import network_input
from piip_scale.world import World

CLASSES = tuple("abcdefg")
SIDE_PX = 32
BRANCH = {"kind": "vit", "depth": 2, "num_heads": 2, "patch_size_px": 8}
GOLDEN = Path(__file__).parents[4] / "shared" / "reference" / "golden" / "cls_3branch_separate_head.safetensors"


def run_config(*, shards="", separate=True, **sections):
    branches = [BRANCH | {"resolution_px": px, "pretrain_resolution_px": px, "embed_dim": dim} for px, dim in SIZES]
    values = {
        "task": "classification",
        "model": {"branches": branches, "interaction": {"num_stages": 2, "num_heads": 2, "gamma_init": 0.1}},
        "classifier": {"separate": separate, "label_smoothing": 0.1},
        "data": {"train_shards": str(shards), "val_shards": str(shards), "classes": list(CLASSES), "workers": 0},
        "train": {"steps": 2, "precision": "fp32"},
    }
    return check_config({**values, **{name: values.get(name, {}) | keys for name, keys in sections.items()}})


SIZES = ((16, 64), (SIDE_PX, 32))


def batch_of(size=4, seed=0, soft=False):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, SIDE_PX, SIDE_PX, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, len(CLASSES), (size,), generator=generator)
    side = (SIDE_PX, SIDE_PX)
    infos = tuple(ImageInfo(str(i), seed * 100 + i, side, side, (1.0, 1.0)) for i in range(size))
    soft_labels = torch.rand(size, len(CLASSES), generator=generator).softmax(1) if soft else None
    return ClassificationBatch(images, infos, labels, soft_labels)


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return build_model(config, len(CLASSES))


@pytest.mark.parametrize("separate", [True, False])
def test_losses_are_timms(separate):
    model, augment = model_of(run_config(separate=separate)).train(), run_config().data.augment
    hard, soft = batch_of(), batch_of(soft=True)
    logits = model.logits(network_input(hard, augment.mean, augment.std))
    assert model(hard)["loss_cls"].item() == pytest.approx(LabelSmoothingCrossEntropy(0.1)(logits, hard.labels).item())
    expected = SoftTargetCrossEntropy()(logits, soft.soft_labels_BK).item()
    assert model(soft)["loss_cls"].item() == pytest.approx(expected)
    model(hard)["loss_cls"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(model.parameter_rules()) == {name for name, _ in model.named_parameters()}
    parts = [id(p) for part in model.parts().values() for p in part.parameters()]
    assert sorted(parts) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize("separate", [True, False])
def test_head_computes_in_float32_whatever_it_is_kept_in(separate):
    model, grids = model_of(run_config(separate=separate)), [torch.randn(2, n, n, d) for n, d in ((2, 64), (4, 32))]
    model.set_precision(torch.bfloat16)
    assert {p.dtype for p in model.head.parameters()} == {torch.float32}
    assert {p.dtype for p in model.branches.parameters()} == {torch.bfloat16}
    rounded = [grid.bfloat16() for grid in grids]
    model.head.to(torch.bfloat16)
    kept = model.head(*rounded)
    assert kept.dtype == torch.float32
    assert torch.equal(kept, model.head.float()(*(grid.float() for grid in rounded)))


def test_predictions_are_the_softmax_best_first():
    config = run_config()
    model, batch = model_of(config), batch_of()
    with pytest.raises(ModelError, match="eval mode"):
        model.predict(batch)
    augment = config.data.augment
    probabilities = model.eval().logits(network_input(batch, augment.mean, augment.std)).softmax(1)
    with pytest.raises(ModelError, match="training mode"):
        model(batch)
    for found, expected, info in zip(model.predict(batch), probabilities, batch.infos, strict=True):
        order = expected.argsort(descending=True)[:5]
        assert found.image_id == info.image_id
        assert torch.equal(found.labels, order)
        assert torch.allclose(found.probabilities, expected[order])


def guesses(rows, first_id=0):
    values = torch.linspace(0.9, 0.1, 5)
    return [Classification(first_id + i, torch.tensor(row), values) for i, row in enumerate(rows)]


def labelled(labels, first_id=0):
    infos = tuple(ImageInfo(str(i), first_id + i, (1, 1), (1, 1), (1.0, 1.0)) for i in range(len(labels)))
    return ClassificationBatch(torch.zeros(len(labels), 1, 1, 3, dtype=torch.uint8), infos, torch.tensor(labels))


def test_accuracy_is_a_plain_count(tmp_path):
    rng = np.random.default_rng(0)
    rows, labels = [rng.permutation(7)[:5].tolist() for _ in range(60)], rng.integers(0, 7, 60).tolist()
    metric = AccuracyMetric(CLASSES)
    for start in range(0, 60, 20):
        metric.update(labelled(labels[start : start + 20], start), guesses(rows[start : start + 20], start))
    first = sum(row[0] == label for row, label in zip(rows, labels, strict=True)) / 60
    among = sum(label in row for row, label in zip(rows, labels, strict=True)) / 60
    assert 0 < first < among < 1
    assert metric.compute() == {"top1_accuracy": first, "top5_accuracy": among}
    metric.update(labelled([0, 0]), guesses([[0, 1, 2, 3, 4]] * 2))
    assert metric.compute()["top1_accuracy"] == first
    metric.write_results(tmp_path / "all.json")
    written = json.loads((tmp_path / "all.json").read_text())
    assert [entry["image_id"] for entry in written] == list(range(60))
    assert [CLASSES.index(entry["guesses"][0]) for entry in written] == [row[0] for row in rows]
    assert [CLASSES.index(entry["class"]) for entry in written] == labels
    few = AccuracyMetric("abc")
    few.update(labelled([1]), guesses([[1, 0, 2]])[:1])
    assert few.compute() == {"top1_accuracy": 1.0}


def _accuracy_rank(world, _device):
    metric = AccuracyMetric(CLASSES)
    rows = [[0, 1, 2, 3, 4], [1, 0, 2, 3, 4]]
    # Both ranks see image 2, as at the padded end of a set.
    metric.update(labelled([0, 0, 5][world.rank :][:2], world.rank), guesses(rows[world.rank :] * 2, world.rank)[:2])
    return metric.compute()


def _train_rank(world, _device, precision):
    from piip_scale.engine.step import train_step
    from piip_scale.engine.zero.setup import build_engine

    zero = {"stage": 3, "persistence_threshold": 0, "deepspeed": FORCED_RELEASE}
    config = run_config(separate=False, train={"precision": precision}, zero=zero)
    engine, _ = build_engine(model_of(config), config, world)
    steps = [train_step(engine, [batch_of(seed=10 * step + world.rank)], step, 0, world) for step in range(2)]
    engine.eval()
    found = engine.module.predict(batch_of())
    return [step.losses["loss_cls"].item() for step in steps], [step.grad_norm for step in steps], len(found)


def _rank(world, device):
    return _accuracy_rank(world, device), {kind: _train_rank(world, device, kind) for kind in ("fp32", "bf16")}


@pytest.fixture(scope="module")
def two_ranks():
    """What each of two processes found: starting them costs more than what they do."""
    return run_ranks(2, _rank)


def test_two_ranks_count_an_image_once(two_ranks):
    # Images 0, 1 and 2 of classes 0, 0 and 5; the guesses 0, 1 and 1.
    assert [accuracy for accuracy, _ in two_ranks] == [{"top1_accuracy": 1 / 3, "top5_accuracy": 2 / 3}] * 2


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_zero_3_equals_plain_gradient_averaging(two_ranks, precision, tolerance):
    found = [trained[precision] for _, trained in two_ranks]
    model = model_of(run_config(separate=False)).train()
    alone = [model(batch_of(seed=rank))["loss_cls"] for rank in range(2)]
    (sum(alone) / 2).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    for loss, (losses, norms, num_found) in zip(alone, found, strict=True):
        assert losses[0] == pytest.approx(loss.item(), rel=tolerance)
        assert norms[0] == pytest.approx(norm, rel=10 * tolerance)
        assert num_found == 4
    assert found[0][1] == found[1][1]


@pytest.fixture
def released(tmp_path):
    """A released classifier's checkpoint, its weights made up, and the command that imports it."""
    if not GOLDEN.is_file():
        pytest.skip("the golden files are not beside the checkout (shared/reference)")
    with safe_open(GOLDEN, "pt") as file:
        backbone = json.loads(file.metadata()["config"])
        weights = {key.removeprefix("weight."): file.get_tensor(key) for key in file.keys() if "weight." in key[:7]}  # noqa: SIM118
    # As the released training script saves it.
    torch.save({"model": weights, "epoch": 3}, tmp_path / "released.pth")
    (tmp_path / "backbone.json").write_text(json.dumps(backbone))
    paths = [tmp_path / name for name in ("released.pth", "backbone.json", "out.safetensors")]
    arguments = ["weights", "import", paths[0], "--backbone", paths[1], "--out", paths[2]]
    return backbone, weights, CliRunner().invoke(app, list(map(str, arguments))), paths[2]


def test_an_imported_released_classifier_predicts_as_the_released_network(released):
    backbone, weights, result, path = released
    assert result.exit_code == 0, result.exception
    official = read_official_config(backbone)
    names = [f"class {number}" for number in range(official.head.num_classes)]
    values = run_config(separate=official.head.separate, data={"classes": names}).model_dump()
    config = check_config(values | {"model": official.config.model_dump()})
    model, theirs = load_model(config, path), from_official(backbone, weights)
    image = torch.randn(2, 3, *(2 * [official.config.branches[-1].resolution_px]))
    with torch.no_grad():
        assert torch.equal(model.logits(image), theirs(image))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    for number in range(14):
        write_jpeg(folder / "images" / CLASSES[number % 7] / f"{number}.jpg", 30 + number, 50, number)
    pack_folders(folder / "images", folder / "shards")
    return folder


def test_files_are_predicted_like_shards(shards, tmp_path):
    config = run_config(shards=shards / "shards", data={"micro_batch_size": 7})
    save_file(model_of(config).state_dict(), tmp_path / "w.safetensors")
    model = load_model(config, tmp_path / "w.safetensors")
    task = ClassificationTask(config, World())
    predictor = build_predictor(config, model, None)
    notes = {int(number): task.val_set.notes(n) for n, number in enumerate(task.val_set.image_ids)}
    metric, right = task.build_metric(), 0
    for batch in task.val_batches():
        theirs = model.predict(batch)
        metric.update(batch, theirs)
        for found in theirs:
            path = shards / "images" / notes[found.image_id]["file_name"]
            mine = predictor.predict(read_photo(path), found.image_id)
            assert torch.equal(mine.labels, found.labels)
            assert torch.allclose(mine.probabilities, found.probabilities, atol=1e-5)
            entry = predictor.entry(mine)["classes"]
            assert [CLASSES.index(guess["class"]) for guess in entry] == found.labels.tolist()
            assert predictor.summary(mine).startswith(entry[0]["class"])
            right += entry[0]["class"] == path.parent.name
    assert metric.compute()["top1_accuracy"] == right / 14


def test_only_what_is_probable_is_drawn():
    config, pixels = run_config(), np.full((40, 60, 3), 255, np.uint8)
    found = guesses([[0, 1, 2, 3, 4]])[0]
    changed = []
    for min_score in (0.0, 0.6, 0.95):
        picture = ClassPredictor(model_of(config).eval(), config, CLASSES, min_score).draw(pixels, found)
        changed.append(int((np.asarray(picture) != 255).any(-1).sum()))
    assert changed[0] > changed[1] > changed[2] == 0


def test_a_set_for_another_task_is_one_clear_line(shards):
    from small_detectors import SMALL
    from small_detectors import run_config as detection_config

    values = detection_config("faster_rcnn", SMALL["faster_rcnn"]).model_dump()
    values["data"] |= {"val_shards": str(shards / "shards"), "train_shards": str(shards / "shards"), "classes": ()}
    with pytest.raises(DataError, match="packed for classification; this needs a set for detection"):
        DetectionTask(check_config(values), World())
