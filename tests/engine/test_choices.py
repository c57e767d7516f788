"""Ways to run the same steps, compared by memory and time, and what a recording of a GPU changes."""

from __future__ import annotations

import json
from ast import literal_eval
from dataclasses import replace
from functools import cache

import cv2
import pytest
from tiny_configs import tiny_config
from tiny_task import TinyTask

from piip_scale.cli.options import read_numbers
from piip_scale.cli.scaling_plot import check_picture, plot_scaling
from piip_scale.engine.gpus import GPUS
from piip_scale.engine.layout_choice import layout_line, layout_text
from piip_scale.engine.planning.choices import Chooser
from piip_scale.engine.planning.cluster import Assumptions, Cluster, Link, gpu_cluster
from piip_scale.engine.planning.measured import read_measured
from piip_scale.engine.planning.planner import Planner, predict
from piip_scale.engine.planning.scaling import scaling, scaling_lines
from piip_scale.engine.planning.time_lines import (
    assumption_lines,
    choice_lines,
    fastest_line,
    schedule_line,
    time_lines,
)
from piip_scale.errors import ConfigError, DataError
from piip_scale.models.counting import PartCount
from piip_scale.world import World

GIB = 2**30
COUNTED = ((PartCount("branch 0", 1, 10**9, backward_macs=2 * 10**9),), ())
# Links between nodes so slow that nothing else counts.
SLOW = Cluster(8, 4, 1e12, 1e12, Link(1e10), Link(1e6), peak_flops=2e12)


def outline_of(config):
    return replace(TinyTask(config, World(), dim=64).outline(config), counted=lambda: COUNTED)


@cache
def planner() -> Planner:
    return Planner(outline_of, 80 * GIB, 4)


def run(**sections):
    values = {"data": {"micro_batch_size": 2}, "train": {"steps": 6, "precision": "bf16", "images_per_step": 64}}
    return tiny_config(**values | sections)


def test_where_the_network_is_slow_replicas_win_and_the_line_says_so():
    chooser = Chooser(planner(), SLOW)
    asked, best = chooser.asked(run()), chooser.fastest(run())
    assert (best.config.zero.shard_over, best.config.zero.stage) == ("node", 3)
    assert best.time.seconds == min(each.time.seconds for each in [*chooser.one_by_one(run()), asked, best])
    line = fastest_line(asked, best)
    assert line.startswith("fastest that fits: zero.shard_over='node'")
    assert "the network takes" in line
    assert chooser.fastest_layout(run()).config.zero == best.config.zero
    # What a user wrote stays.
    assert chooser.fastest_layout(run(), ["stage", "offload_optimizer"]).config.zero.shard_over == "all"


def test_every_way_makes_steps_of_as_many_images_and_only_what_can_be_is_named():
    ways = Chooser(planner(), SLOW).one_by_one(run())
    names = [way.name for way in ways]
    assert {"zero.stage=1", "zero.stage=2", "zero.node_partition=4", "zero.offload_optimizer='cpu'"} <= set(names)
    assert [name for name in names if name.startswith("data.")] == [f"data.micro_batch_size={n}" for n in (1, 4, 8)]
    assert "zero.stage=3" not in names
    assert {way.time.images for way in ways} == {64}
    averaged = run(train={"steps": 6, "images_per_step": 64, "ema_decay": 0.9})
    # In float32 whole optimisers are one way more; in bf16 DeepSpeed keeps none by name.
    more = {way.name for way in Chooser(planner(), SLOW).one_by_one(averaged)}
    assert more == {*names, "zero.stage=0"}
    alone = Chooser(Planner(outline_of, 80 * GIB, 1), replace(SLOW, num_ranks=1, ranks_per_node=1)).one_by_one(run())
    assert not any("shard_over" in way.name or "node_partition" in way.name for way in alone)


def test_a_layout_is_named_by_all_that_makes_it_out_of_the_run():
    ways = Chooser(planner(), SLOW).one_by_one(run(zero={"shard_over": "node"}))
    layouts = [way for way in ways if way.name.startswith("zero.")]
    assert {"zero.shard_over='all'", "zero.stage=1, zero.shard_over='all'"} <= {way.name for way in layouts}
    for way in layouts:
        keys = dict(word.removeprefix("zero.").split("=") for word in way.name.split(", "))
        set_so = run(zero={"shard_over": "node"} | {key: literal_eval(value) for key, value in keys.items()})
        assert set_so.zero == way.config.zero


def test_of_stages_that_are_planned_alike_the_one_that_is_measured_faster_is_taken():
    one = run(train={"steps": 6, "precision": "fp32"})
    near = replace(SLOW, outer=SLOW.inner, memory_bytes_per_s=1e9)
    ways = {way.name: way.time.seconds for way in Chooser(planner(), near).one_by_one(one)}
    assert ways["zero.stage=1"] == pytest.approx(ways["zero.stage=2"], rel=1e-9)
    stages = [name for name in ways if name in ("zero.stage=1", "zero.stage=2")]
    assert stages == ["zero.stage=1", "zero.stage=2"]


def test_what_is_hardly_faster_is_named_and_not_urged():
    asked = Chooser(planner(), SLOW).asked(run())
    last = asked.time.phases[-1]
    for gain, said in ((0.005, "as it is, within 1% of zero.stage=1;"), (0.02, "zero.stage=1: ")):
        sooner = replace(last, exposed=last.exposed - gain * asked.time.seconds)
        time = replace(asked.time, phases=(*asked.time.phases[:-1], sooner))
        line = fastest_line(asked, replace(asked, name="zero.stage=1", time=time))
        assert line.startswith(f"fastest that fits: {said}"), line


def test_what_does_not_fit_is_not_chosen():
    small = planner().within(0.0)
    assert Chooser(small, SLOW).fastest(run()) is None
    assert fastest_line(Chooser(small, SLOW).asked(run()), None) == "fastest: none of these fits"
    least = Chooser(small, SLOW).fastest_layout(run())
    layouts = [way for way in Chooser(small, SLOW).one_by_one(run()) if way.name.startswith("zero.")]
    assert least.memory.total == min(way.memory.total for way in [*layouts, least])
    # Saves write from copies in host memory; a host without any holds none of them.
    without_host = Chooser(planner(), SLOW, host_capacity=1.0)
    assert without_host.fastest(run()) is None
    asked = without_host.asked(run())
    best = without_host.fastest(run(train={"steps": 6, "images_per_step": 64, "background_saves": False}))
    assert best is not None
    assert best.memory.host_memory == 0
    line = fastest_line(asked, None, best)
    assert line.startswith(f"fastest: none of these fits; with --set train.background_saves=False: {best.name}, ")
    # Of those that GPUs hold the one that needs least of a host.
    taken = without_host.fastest_layout(run())
    assert taken.memory.fits
    assert taken.memory.host_memory == min(way.memory.host_memory for way in [*without_host.one_by_one(run()), taken])
    assert "which fits into 80.0, but needs" in layout_line(taken, "h100", 400, 80 * GIB)


def test_predicting_is_planning_with_memory_enough():
    assert predict(run(), SLOW, outline_of) == planner().step_time(run(), SLOW)


def test_times_are_lines():
    chooser, gpu = Chooser(planner(), gpu_cluster(GPUS["h100"], 8, 4, 400)), GPUS["h100"]
    asked = chooser.asked(run())
    lines = time_lines(asked.time)
    assert lines[1].startswith("branch 0")
    assert f"a step takes {asked.time.seconds:.3f} s" in lines[-1]
    table = choice_lines(asked, chooser.one_by_one(run()))
    assert table[1].startswith("as it is")
    assert all(line.endswith("fits") for line in table[1:])
    hour = replace(asked.time, phases=(replace(asked.time.phases[0], times=1, compute=36.0),))
    assert schedule_line(hour, 2400) == "2,400 steps take 24.0 h (1.0 days), 192 GPU hours"
    assert schedule_line(hour, 10) == "10 steps take 6.0 min, 0.8 GPU hours"
    assert "--epoch-images" in schedule_line(hour, None)
    assert "fewer images than a step" in schedule_line(hour, 0)
    stated = " ".join(assumption_lines(gpu, gpu_cluster(gpu, 8, 4, 400), 400.0, Assumptions()))
    assert "400 Gb/s a node, which is 100 Gb/s a GPU" in stated
    assert "products reach 65% of the peak" in stated


MACHINE = [
    {"section": "machine", "name": "what it is", "device": "NVIDIA H200", "GiB": 139.7},
    {"section": "machine", "name": "copy of 1 GiB", "GB/s": 4320.0},
    {"section": "backbone", "name": "H6B 1024/512, 1 image, kept", "model TFLOP/s": 400.0},
    {"section": "step", "name": "as the recipe, 1 image", "host forward ms": 60.0, "host backward ms": 105.4},
    {"section": "step", "name": "blocks kept, 1 image", "error": "out of memory"},
]


def test_a_recording_replaces_assumptions_and_says_which(tmp_path):
    (tmp_path / "gpu.jsonl").write_text("\n".join(map(json.dumps, MACHINE)))
    gpu, assumed = read_measured(tmp_path)
    assert (gpu.name, gpu.memory_gib) == ("h200", 139.7)
    assert assumed.memory_share == pytest.approx(0.9)
    assert assumed.operator_s == pytest.approx(1e-5)
    # 60.5 TFLOP and 53 GB between them take as long as at 400 TFLOP/s in all.
    whole = 60.5e12 / (assumed.product_share * 989e12) + 53e9 / 4320e9
    assert whole == pytest.approx(60.5e12 / 400e12)
    lines = assumption_lines(gpu, gpu_cluster(gpu, 8, 8, 400, assumed=assumed), 400.0, assumed)
    assert lines[-1].startswith("measured: memory 4,320 GB/s; products ")
    assert "host takes" not in lines[1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "gpu.jsonl"),
        (json.dumps(MACHINE[0] | {"device": "cpu"}), "a rehearsal measures nothing"),
        ("", "no device"),
        (json.dumps(MACHINE[0] | {"GiB": "many"}), "GiB of machine / what it is is 'many'.* record it on the GPU"),
        (json.dumps(MACHINE[0]) + "\n" + json.dumps(MACHINE[1] | {"GB/s": 0}), "GB/s of machine / copy of 1 GiB is 0"),
        (json.dumps(MACHINE[0]) + "\n" + json.dumps(MACHINE[1])[:-9], "whole; record it on the GPU"),
    ],
)
def test_a_recording_that_is_none_is_one_line(tmp_path, text, why):
    (tmp_path / "gpu.jsonl").write_text(text)
    with pytest.raises(DataError, match=why):
        read_measured(tmp_path / "gpu.jsonl")
    with pytest.raises(DataError, match=r"no such file; record it on the GPU: python benchmarks/gpu\.py"):
        read_measured(tmp_path / "another.jsonl")


def swept(images=64):
    config = run(train={"steps": 6, "precision": "bf16", "images_per_step": images})
    choosers = {ranks: Chooser(planner(), replace(SLOW, num_ranks=ranks)) for ranks in (4, 8, 16, 32)}
    return list(scaling(config, [1, 2, 4, 8], 4, choosers.__getitem__))


def test_strong_scaling_shares_a_step_s_images_and_weak_scaling_adds_as_many():
    points = swept(16)
    assert [point.num_ranks for point in points] == [4, 8, 16, 32]
    assert [point.strong and point.strong.fastest.time.images for point in points] == [16, 16, 16, None]
    assert [point.weak.fastest.time.images for point in points] == [16, 32, 64, 128]
    for point in points:
        assert point.weak.fastest.time.seconds <= point.weak.written.time.seconds
        assert point.weak.uncheckpointed is None
    lines = scaling_lines(run(train={"steps": 6, "images_per_step": 16}), points, layout_text)
    assert sum("cannot share" in line for line in lines) == 1
    assert lines[6] == (
        "to share a step on 32 GPUs: --set train.images_per_step=32 --set optimizer.lr=0.0002, which is another recipe"
    )
    assert sum(line.endswith("shard_over='node'; the network") for line in lines) >= 2
    assert all("100%" in lines[index] for index in (2, 9))


def test_what_is_computed_again_is_compared_with_what_is_kept():
    config = run()
    branches = tuple(branch.model_copy(update={"checkpoint_blocks": True}) for branch in config.model.branches)
    config = config.model_copy(update={"model": config.model.model_copy(update={"branches": branches})})
    (point,) = scaling(config, [2], 4, lambda _: Chooser(planner(), SLOW))
    # A billion multiply-adds an image more, of two images a rank, hidden behind the network at most.
    assert point.weak.uncheckpointed.time.seconds <= point.weak.fastest.time.seconds
    assert point.weak.uncheckpointed.time.parts[0][2] == 0 < point.weak.fastest.time.parts[0][2]


def test_scaling_is_drawn_and_what_cannot_be_drawn_is_one_line(tmp_path):
    points = swept(16)
    plot_scaling(points, "tiny", tmp_path / "scaling.png")
    height, width, _ = cv2.imread(str(tmp_path / "scaling.png")).shape
    assert width > 2 * height > 1000
    check_picture(tmp_path / "scaling.png")
    (tmp_path / "folder.png").mkdir()
    for path, why in (
        ("scaling.xyz", "ends in .png"),
        ("folder.png", "ends in .png"),
        ("no/scaling.png", "its folder"),
    ):
        with pytest.raises(DataError, match=why):
            check_picture(tmp_path / path)


@pytest.mark.parametrize("text", ["0", "1,x", "1;2", "-1", ","])
def test_numbers_of_nodes_are_numbers(text):
    with pytest.raises(ConfigError, match="--sweep"):
        read_numbers(text)
    assert read_numbers(" 4, 1,2,4") == [1, 2, 4]
