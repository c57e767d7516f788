"""Running the command as a user does, and what an error must look like."""

from __future__ import annotations

import os
import sys

import preloaded

CONFIG = """
model = dict(
    branches=[
        dict(resolution_px=32, embed_dim=64, depth=2, num_heads=4, patch_size_px=8, pretrain_resolution_px=32),
        dict(resolution_px=64, embed_dim=32, depth=2, num_heads=4, patch_size_px=8, pretrain_resolution_px=64),
    ],
    interaction=dict(num_stages=2, num_heads=4, gamma_init=0.1, drop_path_rate=0.1),
    pyramid=dict(scales=(2.0, 1.0, 0.5)),
)
detector = dict(
    kind="mask_rcnn",
    overrides=dict(
        neck=dict(out_channels=32, num_outs=3),
        rpn_head=dict(feat_channels=32, anchor_generator=dict(scales=[6], ratios=[1.0])),
        roi_head=dict(bbox_head=dict(fc_out_channels=64), mask_head=dict(num_convs=1, conv_out_channels=16)),
        train_cfg=dict(rpn_proposal=dict(nms_pre=50, max_per_img=20), rcnn=dict(sampler=dict(num=16))),
        test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(max_per_img=10)),
    ),
)
data = dict(
    train_shards="{shards}/train",
    val_shards="{shards}/val",
    augment=dict(short_edge_px=(64,), max_edge_px=64, pad_multiple_px=32),
    micro_batch_size=2,
    num_streams=2,
    workers=1,
)
optimizer = dict(lr=1e-3, clip_grad_norm=1.0)
schedule = dict(warmup_steps=2)
train = dict(steps=6, precision="fp32", log_every_steps=2, evaluate_every_steps=6, checkpoint_every_steps=4)
"""


OPERATIONS = "operations.txt"
"""Beside the run of ``trained``: what its processes asked of the disk that the sets are on."""


def command(*arguments):
    return [sys.executable, "-m", "piip_scale.cli.main", *map(str, arguments)]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def piip_scale(*arguments, timeout=240, cwd=None, preexec_fn=None, **variables):
    """Runs the command to its end."""
    settings = {"timeout": timeout, "cwd": cwd, "preexec_fn": preexec_fn}
    return preloaded.run(command(*arguments)[1:], env=environment() | variables, **settings)


def started(*arguments):
    """The command while it runs."""
    return preloaded.Python(command(*arguments)[1:], env=environment())


def without_slurm(*arguments, cwd=None):
    """Runs the command to its end as on a laptop: Slurm's are not there, nor any other."""
    return piip_scale(*arguments, cwd=cwd, PATH="/nonexistent")


def succeeded(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def failed_in_one_line(done, *parts, code=2):
    """The error is reported once, on one line that holds every part, without a traceback."""
    errors = [line for line in done.stderr.splitlines() if "piip-scale: error:" in line]
    assert len(errors) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert done.returncode == code
    for part in parts:
        assert part in errors[0]
    return errors[0]
