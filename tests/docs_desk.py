"""A folder where everything lies that the pages' commands name, and what stands for ranks, nodes and Slurm there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch
from run_files import job, make_spec, write_status
from zero_files import flat_parts_stage3, write_checkpoint

from piip_scale.checkpoint.averages import AVERAGE, UPDATES
from piip_scale.checkpoint.origin import STATE_FILE
from piip_scale.checkpoint.store import CheckpointStore
from piip_scale.config import load_config
from piip_scale.config.loading import config_text
from piip_scale.data.packing.pack import pack_coco
from piip_scale.demo.scenes import write_scenes
from piip_scale.engine.checkpointing import TrainingState

VOC = """<annotation><filename>{name}.jpg</filename><size><width>64</width><height>64</height><depth>3</depth></size>
<object><name>digit</name><difficult>0</difficult>
<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>40</xmax><ymax>50</ymax></bndbox></object></annotation>"""
# The same recipes with two blocks a branch: what ranks, sets and options come to is the whole network's.
_TWO_BLOCKS = (
    *("model.branches.0.depth=2", "model.branches.1.depth=2", "model.branches.1.blocks_per_stage=()"),
    "model.interaction.num_stages=2",
)
CUT = dict.fromkeys(("mask_rcnn_h6b_1024_512.py", "upernet_h6b_512_256.py"), _TWO_BLOCKS)


def lay_out(desk: Path, root: Path) -> None:
    """Fills a folder with images, annotations, sets, and links to what the repository has."""
    scenes = write_scenes(desk, num_train=4, num_val=2, size_px=64, seed=0)
    for split, source in (("train", scenes.train), ("val", scenes.val)):
        pack_coco(source, scenes.images, desk / "more_shards" / split, workers=1)
    shutil.copy(scenes.train, desk / "train.json")
    shutil.copy(scenes.val, desk / "val.json")
    for name in ("configs", "launch"):
        (desk / name).symlink_to(root / name)
    photos = sorted(path for path in scenes.images.iterdir() if path.name.startswith("train"))
    shutil.copy(photos[0], desk / "photo.jpg")
    foreign = {f"module.{name}.weight": torch.ones(3) for name in ("backbone", "head")}
    write_checkpoint(desk / "other" / "checkpoint-500" / "global_step500", 3, 2, [foreign], {}, {})
    _lay_out_voc(desk, photos)
    _lay_out_maps(desk, photos)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (desk / "imagenet" / split / label).mkdir(parents=True)
            shutil.copy(photos[0], desk / "imagenet" / split / label)
    (desk / "list.txt").write_text("".join(f"images/{photo.name} {i % 2}\n" for i, photo in enumerate(photos)))
    (desk / "names.txt").write_text("first\nsecond\n")


def _lay_out_voc(desk: Path, photos: list[Path]) -> None:
    folder = desk / "VOC2012"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for photo in photos:
        shutil.copy(photo, folder / "JPEGImages")
        (folder / "Annotations" / f"{photo.stem}.xml").write_text(VOC.format(name=photo.stem))
    (folder / "ImageSets" / "Main" / "train.txt").write_text("".join(f"{photo.stem}\n" for photo in photos))
    (desk / "voc_names.txt").write_text("digit\n")


def _lay_out_maps(desk: Path, photos: list[Path]) -> None:
    for images, maps, of in (
        ("images", "maps/train", [p for p in (desk / "images").iterdir()]),
        ("ADE/images/training", "ADE/annotations/training", photos),
    ):
        for folder in (images, maps):
            (desk / folder).mkdir(parents=True, exist_ok=True)
        for photo in of:
            if not (desk / images / photo.name).exists():
                shutil.copy(photo, desk / images)
            cv2.imwrite(str(desk / maps / f"{photo.stem}.png"), np.ones((64, 64), np.uint8))


def leave_a_run(config: Path, overrides: Sequence[str], run_dir: Path) -> None:
    """What training would have left after a step: its config, and a sharded checkpoint of untrained weights."""
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.tasks.classes import with_classes
    from piip_scale.tasks.kinds import build_model

    resolved = with_classes(load_config(config, overrides), OpenedSets())
    model = build_model(resolved, len(resolved.data.classes))
    weights = {name: value.detach() for name, value in model.named_parameters()}
    store = CheckpointStore(run_dir / "checkpoints", keep=1)
    staging = store.begin(1)
    write_checkpoint(staging / "zero", 3, 2, [weights], {}, dict(model.named_buffers()))
    (staging / AVERAGE).mkdir()
    state = TrainingState(1, 2, 3, "fp32", 16, 1, {}, [], {}, resolved.model_dump(mode="json"))
    (staging / STATE_FILE).write_text(json.dumps(asdict(state)))
    for rank, flat in enumerate(flat_parts_stage3(list(weights.values()), 2)):
        torch.save({AVERAGE: [flat], UPDATES: 1}, staging / AVERAGE / f"rank_{rank:05d}.pt")
    store.commit(1)
    (run_dir / "config.py").write_text(config_text(resolved))
    make_spec(run_dir.absolute())
    (run_dir / "job" / "log-12.txt").write_text("step 1\n")


@dataclass
class Elsewhere:
    """Slurm, ranks and nodes, which a command would ask or start; in their place, what it asked.

    Attributes:
        asked: One entry for each.
        queue: Jobs that wait or run.
    """

    asked: list[str] = field(default_factory=list)
    queue: list = field(default_factory=list)

    def install(self, monkeypatch, run_dir: Path, *, done: bool) -> None:
        """A job that runs, or is done; in place of everything that leaves this process, a note.

        Sets have as many images as a step of a large recipe takes: a set on the desk has a few.
        """
        from piip_scale.launch.checking import Check

        make_spec(run_dir)
        write_status(run_dir, "done" if done else "running", 4)
        (run_dir / "job" / "log-12.txt").write_text("step 4\n")
        self.queue += [] if done else [job(run_dir)]
        check = Check(("here",), line="1 node")
        for name, value in {
            "piip_scale.engine.local_launch.launch_local": 0,
            "piip_scale.cli.train._train_here": 0,
            "piip_scale.launch.supervisor.Supervisor.run": 0,
            "piip_scale.launch.checking.check_nodes": check,
            # Weights of gigabytes that no test has.
            "piip_scale.models.pretrained.check_pretrained": None,
            "piip_scale.cli.jobs.has_slurm": True,
            "piip_scale.cli.jobs.queued_jobs": self.queue,
            "piip_scale.launch.queue.signal_batch": None,
        }.items():
            monkeypatch.setattr(name, self._noting(name.rpartition(".")[2], value))
        monkeypatch.setattr("os._exit", self._exit)
        monkeypatch.setattr("piip_scale.data.reading.shards.ShardSet.__len__", lambda _: 1 << 12)

    def _noting(self, name: str, value: object):
        def call(*_arguments, **_named):
            self.asked.append(name)
            return value

        return call

    @staticmethod
    def _exit(code: int) -> None:
        raise SystemExit(code)
