"""Configs of tiny runs; the model section is never built, the tiny task ignores it."""

from __future__ import annotations

from piip_scale.config.loading import check_config
from piip_scale.config.run import RunConfig

_BRANCH = {"kind": "vit", "embed_dim": 32, "depth": 2, "num_heads": 2}
FORCED_RELEASE = {"zero_optimization": {"stage3_max_live_parameters": 100000, "stage3_max_reuse_distance": 0}}


def tiny_config(**sections) -> RunConfig:
    """A run's config; the model section is never built, the tiny task ignores it."""
    values = {
        "model": {"branches": [_BRANCH | {"resolution_px": 32}], "interaction": {"num_stages": 2}},
        "detector": {"kind": "mask_rcnn"},
        "data": {"train_shards": "train", "val_shards": "val", "micro_batch_size": 2, "num_streams": 48},
        "schedule": {"warmup_steps": 2},
        "train": {"steps": 6, "precision": "fp32"},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    return check_config(values)
