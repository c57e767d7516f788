"""A fault of one rank in an evaluation reaches every rank, in time and as one error; nobody is left in a collective."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_task import NothingWatched

from piip_scale.engine.evaluation import evaluate
from piip_scale.errors import DataError, PiipError
from piip_scale.tasks.base import Detections, Segmentation
from piip_scale.tasks.classification.metric import AccuracyMetric
from piip_scale.tasks.detection.metric import CocoMetric
from piip_scale.tasks.segmentation.metric import SegmentationMetric

SIDE, BATCHES = 8, 3
FULL = {"size": [SIDE, SIDE], "counts": "0P2"}
SHORT = {"size": [SIDE, SIDE], "counts": "01"}


class FaultyMetric:
    """One that fails where it is asked to, and gathers nothing of its own."""

    def __init__(self, place: str, error: Exception) -> None:
        self._place, self._error = place, error

    def update(self, batch, predictions):
        if self._place == f"update {batch.number}":
            raise self._error

    def compute(self):
        return {"ap": 1.0}

    def pr_curves(self):
        return {}


class FaultyTask:
    def __init__(self, place: str, error: Exception) -> None:
        self._place, self._error = place, error

    def build_metric(self):
        if self._place == "metric":
            raise self._error
        return FaultyMetric(self._place, self._error)

    def watched(self):
        return NothingWatched()

    def val_batches(self):
        for number in range(BATCHES):
            if self._place == f"batch {number}":
                raise self._error
            yield SimpleNamespace(number=number, to=lambda device, number=number: SimpleNamespace(number=number))


def fake_engine():
    module = SimpleNamespace(predict=lambda batch: [])
    return SimpleNamespace(module=module, eval=lambda: None, train=lambda: None, zero_optimization_stage=lambda: 0)


def outcome(call):
    """What a call returned, or the line of what it raised and whether another rank reports it."""
    try:
        return call()
    except PiipError as error:
        return error.line, error.is_echo
    except ValueError as error:
        return str(error), False


def metrics_of_evaluation(task, device):
    return evaluate(fake_engine(), task, device, lambda: True).metrics


PLACES = ("metric", *(f"{part} {number}" for number in range(BATCHES) for part in ("batch", "update")), "none")


def every_place(world, device):
    found = {}
    for place in PLACES:
        for kind in (DataError, ValueError):
            task = FaultyTask(place if world.rank == 1 else "none", kind("a mask is broken"))
            found[place, kind.__name__] = outcome(partial(metrics_of_evaluation, task, device))
    return found


def detections(image_id, rle):
    return Detections(image_id, torch.tensor([[0.0, 0, 8, 8]]), torch.ones(1), torch.zeros(1).long(), [rle])


def metrics_of(world):
    note = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 8, 8], "segmentation": FULL}
    truth = {
        "images": [{"id": 1, "height": SIDE, "width": SIDE}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [note],
    }
    boxes = CocoMetric(truth, with_masks=True)
    boxes.update(None, [detections(1, FULL)])
    pixels = SegmentationMetric(["a", "b"])
    info = SimpleNamespace(original_size_px=(1, 2))
    batch = SimpleNamespace(labels_BHW=torch.zeros(1, 1, 2, dtype=torch.uint8), infos=[info])
    pixels.update(batch, [Segmentation(1, torch.zeros(1, 2, dtype=torch.uint8))])
    classes = AccuracyMetric(["a", "b"])
    found = SimpleNamespace(image_id=1, labels=torch.tensor([0, 1]), probabilities=torch.tensor([0.75, 0.25]))
    classes.update(SimpleNamespace(labels=torch.tensor([0])), [found])
    return {"detection": boxes, "segmentation": pixels, "classification": classes}


def on_rank_0_alone(world, _device, folder):
    found = {}
    for name, metric in metrics_of(world).items():
        # A file where the folder should be: on rank 0 alone does anybody meet it.
        found[name] = outcome(lambda metric=metric: metric.write_results(folder / "file" / "results.json"))
    scored = metrics_of(world)["detection"]
    scored._scores = lambda part, results: (_ for _ in ()).throw(ValueError("no scores"))
    found["scores"] = outcome(scored.compute)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    (folder / "file").write_text("")
    return run_ranks(2, both, folder)


def both(world, device, folder):
    return every_place(world, device), on_rank_0_alone(world, device, folder)


def test_a_fault_of_one_rank_reaches_all(found):
    (first, _), (second, _) = found
    for place in PLACES[:-1]:
        assert first[place, "DataError"] == ("a mask is broken", True)
        assert second[place, "DataError"] == ("a mask is broken", False)
        assert first[place, "ValueError"] == ("rank 1: ValueError: a mask is broken", True)
        assert second[place, "ValueError"] == ("a mask is broken", False)
    assert first["none", "DataError"] == second["none", "DataError"] == {"ap": 1.0}


def test_what_rank_0_alone_does_fails_on_all(found):
    (_, first), (_, second) = found
    for name in ("detection", "segmentation", "classification"):
        line, is_echo = first[name]
        assert "results.json" in line
        assert not is_echo
        assert second[name] == (line, True)
    assert first["scores"] == ("no scores", False)
    assert second["scores"] == ("rank 0: ValueError: no scores", True)


def test_a_broken_mask_and_a_label_of_no_class_are_met_before_ranks_meet():
    world = SimpleNamespace(rank=0)
    metrics = metrics_of(world)
    with pytest.raises(DataError, match="mask of a detection"):
        metrics["detection"].update(None, [detections(1, SHORT)])
    info = SimpleNamespace(original_size_px=(1, 1))
    for truth, guess in ((2, 0), (0, 2)):
        batch = SimpleNamespace(labels_BHW=torch.full((1, 1, 1), truth, dtype=torch.uint8), infos=[info])
        with pytest.raises(DataError, match=r"there are 2 classes"):
            metrics["segmentation"].update(batch, [Segmentation(7, torch.full((1, 1), guess, dtype=torch.uint8))])
    assert np.isfinite(metrics["segmentation"].compute()["miou"])
