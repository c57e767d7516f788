"""What a training step is counted as is what autograd computes, seen by torch's counter, whatever is frozen."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from piip_scale.config.model import ClassifierConfig, PiipConfig
from piip_scale.models.classifier import PiipClassifier
from piip_scale.models.counting import count_network
from piip_scale.models.piip import PIIP

LARGE = {"resolution_px": 32, "embed_dim": 64, "depth": 4, "num_heads": 4, "pretrain_resolution_px": 64}
SMALL = LARGE | {"resolution_px": 64, "embed_dim": 32, "depth": 2}
CONVNEXT = {"kind": "convnext", "resolution_px": 64, "depths": (1, 2, 1, 1), "widths": (16, 32, 32, 64)}
CONVNEXT |= {"blocks_per_stage": (4, 4)}
UNIT = {"num_stages": 2, "num_heads": 4}
TO_SMALL = UNIT | {"direction": "to_small"}
REGULAR = {"kind": "regular", "scales": (1.0, 1.0), "stages": (0, 1)}
BARE = UNIT | {"projection": False, "norm": "none"}
NETWORKS = {
    "nothing frozen": ((LARGE, SMALL), UNIT),
    "embedding and a block": ((LARGE | {"frozen_blocks": 1}, SMALL), UNIT),
    "a stage": ((LARGE | {"frozen_blocks": 2}, SMALL), UNIT),
    "into the second stage": ((LARGE | {"frozen_blocks": 3}, SMALL), UNIT),
    "a branch": ((LARGE | {"frozen_blocks": "all"}, SMALL), UNIT),
    "both branches": ((LARGE | {"frozen_blocks": "all"}, SMALL | {"frozen_blocks": "all"}), UNIT),
    "no norms nor projections": ((LARGE | {"frozen_blocks": "all"}, SMALL, SMALL), BARE),
    "frozen cross attention": ((LARGE, SMALL | {"frozen_blocks": "all"}), BARE | {"attention": "cross"}),
    "convnext": ((LARGE, CONVNEXT | {"frozen_blocks": 2}), UNIT),
    "frozen convnext": ((LARGE, CONVNEXT | {"frozen_blocks": "all"}), UNIT),
    "one branch": ((LARGE,), UNIT),
    "one branch, half frozen": ((LARGE | {"frozen_blocks": 2},), UNIT),
    "one frozen branch": ((LARGE | {"frozen_blocks": "all"},), UNIT),
    "to small": ((LARGE, SMALL), TO_SMALL),
    "to small from a frozen branch": ((LARGE | {"frozen_blocks": "all"}, SMALL), TO_SMALL),
    "to small from two frozen branches": (
        (LARGE | {"frozen_blocks": "all"}, SMALL | {"frozen_blocks": "all"}, SMALL),
        BARE | {"direction": "to_small", "attention": "cross"},
    ),
    "to small convnext": ((LARGE | {"frozen_blocks": "all"}, CONVNEXT | {"frozen_blocks": "all"}, CONVNEXT), TO_SMALL),
    "lora": ((LARGE | {"lora": {"rank": 4}, "window_size_tokens": (0, 3, 3, 0), "resolution_px": 48}, SMALL), TO_SMALL),
    "lora of feed-forwards above a frozen block": (
        (
            LARGE | {"lora": {"rank": 4, "targets": ("mlp",)}, "frozen_blocks": 1},
            SMALL | {"lora": {"targets": ("proj",)}},
        ),
        UNIT,
    ),
    "skipped paths": (
        (LARGE | {"drop_path_rate": 0.5, "drop_path_mode": "skip", "frozen_blocks": 1}, SMALL),
        UNIT | {"drop_path_rate": 0.3, "drop_path_mode": "skip"},
    ),
}


def grouped_backward(grad_shape, x_shape, weight_shape, _b, _s, _p, _d, transposed, _o, _g, mask, out_shape):
    """torch's own rule takes a grouped convolution for a full one."""
    cells = (x_shape if transposed else grad_shape)[2:]
    return 2 * x_shape[0] * math.prod(cells) * math.prod(weight_shape) * (mask[0] + mask[1])


def training_flops(run, batch):
    """By torch, of one image."""
    mapping = {torch.ops.aten.convolution_backward: grouped_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        sum(output.float().sum() for output in run()).backward()
    return counter.get_total_flops() / batch


def counted(parts):
    return sum(2 * (part.macs + part.backward_macs) - 4 * part.sampling_macs for part in parts)


def network(branches, unit, **more):
    return PiipConfig(branches=branches, interaction=unit, attention_kernel="math", **more)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_training_step_counts_as_autograd_computes_it(name):
    branches, unit = NETWORKS[name]
    config = network(branches, unit, pyramid=REGULAR if "convnext" in name else {})
    with torch.device("meta"):
        model, images = PIIP(config).train(), torch.empty(4, 3, 64, 96)
    parts = count_network(config, 64, 96, training_batch=4)
    assert counted(parts) == pytest.approx(training_flops(lambda: model(images), 4), abs=8)


@pytest.mark.parametrize("frozen", [0, 3, "all"])
@pytest.mark.parametrize("separate", [True, False])
def test_a_classifier_has_no_pyramid_to_count(separate, frozen):
    config = network((LARGE | {"frozen_blocks": frozen}, SMALL), UNIT)
    head = ClassifierConfig(num_classes=10, separate=separate)
    model, images = PiipClassifier(config, head).train(), torch.zeros(2, 3, 64, 64)
    parts = count_network(config, 64, 64, head, training_batch=2)
    assert counted(parts) == training_flops(lambda: [model.logits(images)], 2)


def test_checkpointed_blocks_count_once():
    plain = network((LARGE, SMALL), UNIT)
    again = network((LARGE | {"checkpoint_blocks": True}, SMALL), UNIT | {"checkpoint_units": True})
    assert count_network(plain, 64, 64, training_batch=2) == count_network(again, 64, 64, training_batch=2)


def test_an_evaluation_has_no_backward_pass():
    config = network((LARGE, SMALL), UNIT)
    assert {part.backward_macs for part in count_network(config, 64, 64)} == {0}
