"""Optimiser state and parameters on a disk: the same numbers, saved, resumed and read like any others."""

from __future__ import annotations

import fcntl
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from plain_aio import SMALL_SLICES, use_plain_aio
from pyramid_task import PyramidTask, network, pyramid_config
from ranks import FORCED_RELEASE, run_ranks, tiny_config
from resumed_run import train_to_end
from test_resuming import assert_same_content, content
from tiny_task import TinyTask, make_batch

from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.engine.batch_stream import BatchStream
from piip_scale.engine.batching import scale_to_ranks
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.resuming import find_checkpoint
from piip_scale.engine.step import train_step
from piip_scale.engine.zero import disk_offload
from piip_scale.engine.zero.disk_offload import is_on_disk, prepare_disks
from piip_scale.engine.zero.extensions import load_extension, missing_tools
from piip_scale.engine.zero.setup import build_engine, build_model, give_blanks, give_weights
from piip_scale.errors import CheckpointError, ConfigError, KernelError

STEPS, SAVED_AT, IMAGES = 4, 2, 4
# Of the large branch; DeepSpeed's own I/O needs the other.
WIDTH, LARGE_WIDTH = 64, 512
# What stays in memory, and the variants on a disk that have to give its bits.
PAIRS = {
    "optimizer": ("fp32", "optimizer in memory", {"offload_optimizer": True}),
    "parameters": ("fp32", "whole", {"offload_parameters": True}),
    "both": ("bf16", "optimizer in memory, bf16", {"offload_optimizer": True, "offload_parameters": True}),
}
REFERENCES = {
    "whole": ("fp32", {}),
    "optimizer in memory": ("fp32", {"offload_optimizer": "cpu"}),
    "optimizer in memory, bf16": ("bf16", {"offload_optimizer": "cpu"}),
}


class WideTask(TinyTask):
    """Has slices that are moved and smaller ones; one of the wide ones is not trained."""

    def build_model(self):
        model = super().build_model()
        model.large.blocks[0].up.requires_grad_(False)
        return model


def config_of(zero: dict, precision: str, disk: Path, width=WIDTH, **more):
    zero = {name: str(disk) if place is True else place for name, place in zero.items()}
    raw = FORCED_RELEASE | (SMALL_SLICES if width == WIDTH else {})
    return tiny_config(
        data={"micro_batch_size": 1},
        optimizer={"lr": 1e-3, "layer_decay": 0.8, "clip_grad_norm": 0.5},
        zero={"deepspeed": raw} | zero | more,
        train={"steps": STEPS, "images_per_step": IMAGES, "precision": precision},
    )


def go_on(world, device, config, source, saves, width=WIDTH) -> list[dict]:
    """Trains to the end from the newest checkpoint of ``source``, or from the start; saves into folders by step."""
    trace, engine = train_to_end(world, device, config, source, saves, partial(WideTask, dim=width))
    if config.zero.optimizer_is_on_disk:
        assert {is_on_disk(engine, index) for index in range(len(engine.optimizer.fp16_groups))} == {True, False}
    return trace


def on_two(world, device, root, width):
    """Each variant from start to end, and again from its checkpoint; and what each should be."""
    if width == WIDTH:
        use_plain_aio()
    found = {}
    for name, (precision, zero) in REFERENCES.items():
        config = config_of(zero, precision, root, width)
        found[name] = go_on(world, device, config, None, {STEPS: root / name}, width)
    for name, (precision, _, zero) in PAIRS.items():
        config, folder = config_of(zero, precision, root / "disk", width), root / name
        found[name] = go_on(world, device, config, None, {s: folder / str(s) for s in (SAVED_AT, STEPS)}, width)
        resumed = go_on(world, device, config, folder / str(SAVED_AT), {STEPS: folder / "resumed"}, width)
        found[f"{name}, resumed"] = resumed
    if width == WIDTH:
        found["network"] = whole_network(world, root)
    return found


def whole_network(world, root) -> dict[str, list[float]]:
    """A network that is drawn on the meta device and cut at once, a block of it frozen; then from its checkpoint."""

    def begin(give, zero):
        config = pyramid_config(
            network({"frozen_blocks": 1}),
            optimizer={"lr": 1e-3},
            zero={"deepspeed": FORCED_RELEASE | SMALL_SLICES} | zero,
            train={"precision": "bf16"},
        )
        engine, _ = build_engine(build_model(PyramidTask(config, world), 0), config, world, give=give)
        return engine, Checkpointer(engine, root / "network", config, world, STEPS)

    def norms(engine, first, last):
        batches = [make_batch(step * 2 + world.rank, 1) for step in range(first, last)]
        return [train_step(engine, [batch], step, 0, world).grad_norm for step, batch in enumerate(batches, first)]

    both = {"offload_optimizer": str(root / "disk"), "offload_parameters": str(root / "disk")}
    expected = norms(begin(give_weights, {"offload_optimizer": "cpu"})[0], 0, STEPS)
    engine, checkpointer = begin(give_weights, both)
    assert any(p.ds_tensor.final_location == "nvme" and not p.requires_grad for p in engine.module.parameters())
    found = norms(engine, 0, SAVED_AT)
    checkpointer.save(SAVED_AT)
    checkpointer.finish()
    found += norms(engine, SAVED_AT, STEPS)
    again, checkpointer = begin(give_blanks, both)
    find_checkpoint(root / "network").resume(again, checkpointer.describe(0))
    return {"in memory": expected, "on disk": found, "resumed": norms(again, SAVED_AT, STEPS)}


def on_one(world, device, root):
    """Each variant from the checkpoint of two ranks, with nothing on a disk; saved again at once and at the end."""
    found = {"residents": residents(world, device, root / "disk")}
    for name, (precision, *_) in PAIRS.items():
        folders = {SAVED_AT: root / name / "again", STEPS: root / name / "on one"}
        found[name] = go_on(world, device, config_of({}, precision, root), root / name / str(SAVED_AT), folders)
    return found


def residents(world, device, disk) -> tuple[float, int]:
    """A step with more wide residents than DeepSpeed has buffers; and how many parameters are on the disk."""
    use_plain_aio()
    config = config_of({"offload_parameters": True}, "fp32", disk, persistence_threshold=4 * WIDTH**2 + 1)
    config = scale_to_ranks(config, world.num_ranks)
    task = WideTask(config, world, dim=WIDTH, depth=4, batches=4)
    engine, _ = build_engine(build_model(task, 0), config, world)
    result = train_step(engine, BatchStream(task, config.train, device).step(0), 0, 0, world)
    return result.grad_norm, sum(p.ds_tensor.final_location == "nvme" for p in engine.module.parameters())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "disk").mkdir()
    return folder


@pytest.fixture(scope="module")
def found(root):
    return run_ranks(2, on_two, root, WIDTH, timeout_s=500)[0]


@pytest.fixture(scope="module")
def alone(root, found):
    return run_ranks(1, on_one, root)[0]


def assert_same_runs(root, found, names) -> None:
    for name in names:
        reference = PAIRS[name][1]
        for step, expected in zip(found[name], found[reference], strict=True):
            # With parameters on a disk DeepSpeed sums the norm, in float64, sub-group by sub-group.
            assert step == expected | {"norm": pytest.approx(expected["norm"], rel=1e-12)}
        assert_same_content(root / name / str(STEPS), root / reference)
        assert found[f"{name}, resumed"] == found[name][SAVED_AT:]
        assert_same_content(root / name / "resumed", root / name / str(STEPS))


@pytest.mark.parametrize("name", PAIRS)
def test_a_disk_changes_no_bit_of_a_run_that_is_resumed_or_not(root, found, name):
    assert_same_runs(root, found, [name])


def test_a_network_that_is_cut_while_it_is_built_changes_no_bit_either(found):
    norms = found["network"]
    assert norms["on disk"] == norms["in memory"]
    assert norms["resumed"] == norms["on disk"][SAVED_AT:]


def test_a_run_leaves_a_disk_and_half_its_ranks(root, found, alone):
    for name, (precision, _, _) in PAIRS.items():
        assert_same_content(root / name / "again", root / name / str(SAVED_AT))
        tolerance = {"fp32": 1e-5, "bf16": 1e-2}[precision]
        for here, there in zip(alone[name], found[name][SAVED_AT:], strict=True):
            assert here == pytest.approx(there, rel=tolerance)


def test_a_checkpoint_holds_raw_files_and_frozen_weights_as_they_were(root, found):
    folder = root / "both" / str(STEPS)
    assert len(list(folder.rglob("offloaded_tensors/rank*/exp_avg-*.swp"))) >= 2
    first, last = content(root / "both" / str(SAVED_AT)), content(folder)
    name = "large.blocks.0.up.weight"
    assert torch.equal(first[name], last[name])
    # As torch draws them, from -1/sqrt(width) to 1/sqrt(width).
    assert last[name].float().std() == pytest.approx((3 * WIDTH) ** -0.5, rel=0.02)


def test_a_checkpoint_whose_raw_files_are_lost_says_which(root, found, tmp_path):
    shutil.copytree(root / "optimizer" / str(STEPS), tmp_path / "copy")
    folder = next((tmp_path / "copy").glob("step_*"))
    victim = next(folder.rglob("rank00/exp_avg-*.swp"))
    victim.unlink()
    with pytest.raises(CheckpointError, match=f"{victim.name} is not there or too short"):
        ZeroCheckpoint(folder)


def test_residents_stay_in_memory(alone):
    norm, num_on_disk = alone["residents"]
    assert norm > 0
    assert num_on_disk == 0


@pytest.mark.slow  # compiles for minutes, once on a machine
def test_the_same_with_deepspeeds_own_disk_io(root):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if missing := missing_tools():
        pytest.skip(f"DeepSpeed's disk I/O is compiled: no {' and no '.join(missing)}")
    if not AsyncIOBuilder().is_compatible():
        pytest.skip("DeepSpeed's disk I/O needs libaio (libaio-dev)")
    folder = root / "own"
    (folder / "disk").mkdir(parents=True)
    load_extension(AsyncIOBuilder(), "zero.offload_optimizer")
    assert_same_runs(folder, run_ranks(2, on_two, folder, LARGE_WIDTH, timeout_s=500)[0], PAIRS)


def test_a_folder_serves_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(disk_offload.dist, "get_rank", lambda: 0)
    with (tmp_path / "rank_0.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"zero\.offload_optimizer='.*' is in use by another run") as caught:
            prepare_disks(tiny_config(zero={"offload_optimizer": str(tmp_path)}).zero)
    assert "\n" not in caught.value.line


class Builder:
    name = "some_op"

    def __init__(self, load) -> None:
        self._load = load

    def load(self, verbose):
        return self._load()


@pytest.fixture
def extensions(tmp_path, monkeypatch):
    if missing := missing_tools():
        pytest.skip(f"no {' and no '.join(missing)}")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def test_an_extension_that_does_not_compile_is_one_line(extensions):
    def load():
        raise RuntimeError("Error building extension 'some_op': [1/2] c++ ...\nfatal error\n")

    with pytest.raises(KernelError, match=r"zero.x='/y' needs DeepSpeed's some_op.*change zero.x") as caught:
        load_extension(Builder(load), "zero.x='/y'")
    assert "\n" not in caught.value.line


def test_a_lock_that_a_killed_compilation_left_is_removed(extensions):
    left = extensions / "some_op" / "lock"
    left.parent.mkdir()
    left.touch()
    assert load_extension(Builder(lambda: not left.exists()), "zero.x") is True


def test_without_a_compiler_nothing_is_tried(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("piip_scale.engine.zero.extensions.shutil.which", lambda _: None)
    with pytest.raises(KernelError, match="no c\\+\\+ and no ninja"):
        load_extension(Builder(None), "zero.x")
