"""The stream of batches: the same whoever makes it, exact on resume, and clear about what is wrong."""

import os
import signal

import numpy as np
import preloaded
import psutil
import pytest
import torch
from made_sets import SHARED, make_coco
from streams import content, loader

from piip_scale.config.detection import AugmentConfig
from piip_scale.data.batch import MASK_SIZE_PX
from piip_scale.data.packing.pack import pack_coco
from piip_scale.errors import DataError


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack_coco(*make_coco(folder, 41), folder / "out", target_samples=9)
    return folder / "out"


@pytest.fixture
def own_packed(tmp_path):
    pack_coco(*make_coco(tmp_path, 20), tmp_path / "out", target_samples=7)
    return tmp_path / "out"


def test_batches_are_as_promised(packed):
    stream = loader(packed)
    batches = list(stream.batches(0))
    assert len(batches) == len(stream) == 10
    for batch in batches:
        assert batch.images_BHWC.shape == (4, 96, 96, 3)
        assert batch.images_BHWC.dtype == torch.uint8
        for image, instances, info in zip(batch.images_BHWC, batch.instances, batch.infos, strict=True):
            height, width = info.size_px
            assert image[height:].sum() == image[:, width:].sum() == 0
            count = len(instances.labels)
            assert instances.boxes_xyxy_px.shape == (count, 4)
            assert instances.boxes_xyxy_px.dtype == torch.float32
            assert instances.mini_masks.shape == (count, MASK_SIZE_PX, MASK_SIZE_PX)
            assert (instances.boxes_xyxy_px >= 0).all()
            assert (instances.boxes_xyxy_px[:, [2, 3]] <= torch.tensor([width, height])).all()
            assert (instances.boxes_xyxy_px[:, 2:] > instances.boxes_xyxy_px[:, :2]).all()
    assert sum(len(i.labels) for batch in batches for i in batch.instances) > 20
    keys = [info.key for batch in batches for info in batch.infos]
    assert len(set(keys)) == 40


def test_workers_change_nothing(packed):
    alone, others = loader(packed), loader(packed, workers=2)
    for one, two in zip(alone.batches(1), others.batches(1), strict=True):
        assert content(one) == content(two)
        assert torch.equal(one.images_BHWC, two.images_BHWC)


def test_resuming_continues_bit_for_bit(packed):
    whole = [content(batch) for batch in loader(packed).batches(2)]
    for first_step in (0, 4, 10):
        assert [content(batch) for batch in loader(packed, workers=1).batches(2, first_step)] == whole[first_step:]
    assert whole != [content(batch) for batch in loader(packed).batches(3)]


def test_every_world_sees_the_same_global_batches(packed):
    steps = [content(batch) for batch in loader(packed).batches(0)]
    for num_ranks in (2, 4):
        streams = [
            loader(packed, rank=rank, num_ranks=num_ranks, micro_batch_size=4 // num_ranks).batches(0)
            for rank in range(num_ranks)
        ]
        for step, batches in zip(steps, zip(*streams, strict=True), strict=True):
            union = {}
            for batch in batches:
                union |= content(batch)
            assert union == step
        for stream in (loader(packed, rank=rank, num_ranks=num_ranks, micro_batch_size=2) for rank in (0, 1)):
            made = [[info.key for info in batch.infos] for batch in stream.batches(1)]
            assert stream.keys(1, range(len(stream))) == made
    # Ranks that share no streams evenly have as many batches each, of more shards.
    assert len({len(loader(packed, rank=rank, num_ranks=5)) for rank in range(5)}) == 1


def test_evaluation_is_whole_and_without_chance(packed):
    streams = [loader(packed, rank=rank, num_ranks=3, workers=rank) for rank in range(3)]
    batches = [list(stream.val_batches()) for stream in streams]
    assert [len(each) for each in batches] == [4, 4, 4]
    infos = [info for each in batches for batch in each for info in batch.infos]
    assert {info.image_id for info in infos} == set(range(100, 141))
    assert len(infos) == 48
    again = list(loader(packed, rank=1, num_ranks=3).val_batches())
    assert [content(batch) for batch in again] == [content(batch) for batch in batches[1]]
    for batch in again:
        assert batch.images_BHWC.shape[1] % 32 == batch.images_BHWC.shape[2] % 32 == 0
        for info, instances in zip(batch.infos, batch.instances, strict=True):
            assert min(info.size_px) == 64 or max(info.size_px) == 100
            truth = [
                note["bbox"]
                for note in streams[0].shards.coco_ground_truth()["annotations"]
                if note["image_id"] == info.image_id
            ]
            truth = np.array(truth).reshape(-1, 4)
            truth[:, 2:] += truth[:, :2]
            back = instances.boxes_xyxy_px.numpy() / np.tile(info.scale_xy, 2)
            assert back == pytest.approx(truth, abs=1e-3)


def test_loading_leaves_the_global_generator_alone(packed):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader(packed, workers=1).batches(0, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_micro_batches_are_the_same_to_the_bit_on_every_world(packed):
    """A resumed run may find other ranks; with as many images a step, it goes on with what it would have seen."""
    alone = list(loader(packed, accumulation=4, micro_batch_size=2).batches(1))
    assert len(alone) == 41 // 8 * 4
    for num_ranks in (2, 4):
        cut = [
            loader(packed, rank=rank, num_ranks=num_ranks, accumulation=4 // num_ranks, micro_batch_size=2).batches(1)
            for rank in range(num_ranks)
        ]
        dealt = [batch for batches in zip(*cut, strict=True) for batch in batches]
        assert [content(batch) for batch in dealt] == [content(batch) for batch in alone]
        assert all(torch.equal(a.images_BHWC, b.images_BHWC) for a, b in zip(dealt, alone, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_lost_and_cut_shards_are_named(own_packed, workers):
    stream, other = loader(own_packed, workers=workers), loader(own_packed, workers=workers)
    os.truncate(own_packed / "shard-000001.tar", 4096)
    with pytest.raises(DataError, match=r"shard-000001.tar ends before byte \d+") as caught:
        list(stream.batches(0))
    assert "\n" not in str(caught.value)
    (own_packed / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar cannot be read: got 'No such file"):
        list(other.batches(0))


def test_killed_worker_is_one_line(packed):
    before = psutil.Process().children()
    batches = loader(packed, workers=1).batches(0)
    next(batches)
    (worker,) = set(psutil.Process().children()) - set(before)
    worker.kill()
    with pytest.raises(DataError, match="a loader process died"):
        list(batches)


def test_leaving_early_leaves_no_process(packed):
    before = psutil.Process().children()
    batches = loader(packed, workers=2).batches(0)
    next(batches)
    children = list(set(psutil.Process().children()) - set(before))
    assert len(children) == 2
    batches.close()
    assert not psutil.wait_procs(children, timeout=240)[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_pinned_where_there_is_a_device(packed, workers):
    for pinned, plain in zip(loader(packed, workers=workers).batches(0), loader(packed).batches(0), strict=True):
        assert pinned.images_BHWC.is_pinned()
        assert all(instances.mini_masks.is_pinned() for instances in pinned.instances)
        assert content(pinned.to("cuda").to("cpu")) == content(plain)


STREAM = """
import signal, sys, time
from piip_scale.config.detection import DetectionData
from piip_scale.data.samples.detection import DetectionSamples
from piip_scale.data.reading.shards import ShardSet
from piip_scale.data.stream import ShardLoader
from piip_scale.world import World
config = DetectionData(train_shards="", val_shards="", workers=2, micro_batch_size=2, num_streams=4)
shards = ShardSet.open(sys.argv[1])
stream = ShardLoader(shards, config, DetectionSamples(shards, config.augment), seed=0, world=World())
{setup}
num_batches = 0
for batch in stream.batches(0):
    num_batches += 1
    print("batch", flush=True)
    time.sleep(0.1)
print("all", num_batches, flush=True)
"""


@pytest.fixture
def started(packed):
    processes = []

    def start(setup=""):
        process = preloaded.Python(["-c", STREAM.format(setup=setup), packed], preexec_fn=os.setsid)
        processes.append(process)
        assert process.next_line() == "batch\n"
        children = psutil.Process(process.pid).children()
        assert len(children) >= 2
        return process, children

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_interrupt_is_the_parents_alone(started):
    # Waiting for its workers, as torch does by itself, would outlast the test.
    process, children = started("import torch; torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 600")
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=240)[1]
    assert error.count("Traceback") == 1
    assert error.strip().endswith("KeyboardInterrupt")
    assert not psutil.wait_procs(children, timeout=240)[1]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_workers_go_on_when_the_job_is_signalled(started, name):
    process, children = started(f"signal.signal(signal.{name}, lambda *_: None)")
    os.killpg(process.pid, getattr(signal, name))
    output, error = process.communicate(timeout=240)
    assert (output.strip().splitlines()[-1], error) == ("all 20", "")
    assert not psutil.wait_procs(children, timeout=240)[1]


def test_signals_that_come_while_workers_start_are_the_parents_too(packed, monkeypatch):
    expected = len(list(loader(packed).batches(0)))

    def set_threads(_):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)

    monkeypatch.setattr("cv2.setNumThreads", set_threads)
    assert len(list(loader(packed, workers=2).batches(0))) == expected


def test_workers_of_a_killed_process_end(started):
    process, children = started()
    process.kill()
    assert not psutil.wait_procs(children, timeout=240)[1]


@pytest.mark.parametrize("name", ["bccd", "nuclei_dsb2018"])
def test_real_sets_stream(tmp_path, name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"the shared data set {name} is not beside the repository")
    pack_coco(SHARED / name / "instances_val.json", SHARED / name / "images", tmp_path / "out", target_mb=1)
    stream = loader(tmp_path / "out", workers=2, augment=AugmentConfig(short_edge_px=(200, 320), max_edge_px=400))
    batches = [*stream.batches(0), *stream.val_batches()]
    assert stream.num_broken == 0
    assert all((i.mini_masks is None) == (name == "bccd") for batch in batches for i in batch.instances)
    assert sum(len(i.labels) for batch in batches for i in batch.instances) > 1500
    # A mask reaches the borders of its own box, whatever was done to both.
    for instances in (i for batch in batches for i in batch.instances if i.mini_masks is not None):
        masks = instances.mini_masks.float()
        assert (masks.amax(dim=(1, 2)) > 127).all()


def test_a_crop_without_jitter_leaves_the_canvas_as_large_as_its_images(packed):
    augment = AugmentConfig(short_edge_px=(40, 50), max_edge_px=60, crop_px=(500, 50), pad_multiple_px=16)
    for batch in loader(packed, augment=augment).batches(0):
        sides = [max(info.size_px[axis] for info in batch.infos) for axis in (0, 1)]
        assert sides[1] <= 50
        assert batch.images_BHWC.shape[1:3] == tuple(-(-side // 16) * 16 for side in sides)
