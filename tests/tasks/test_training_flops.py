"""What a task's training is counted as is what autograd computes, heads included, whatever is frozen."""

import math

import pytest
import small_detectors
import small_segmentors
import torch
from torch.utils.flop_counter import FlopCounterMode

from piip_scale.config.loading import check_config
from piip_scale.tasks.counting import count_run, head_flops, network_flops
from piip_scale.tasks.kinds import build_model

# As many proposals as the samplers draw: random boxes are all negative, and no mask is trained.
SAMPLED = {"train_cfg.rpn_proposal.nms.iou_threshold": 1.0, "train_cfg.rcnn.sampler.num": 16}


def grouped_backward(grad_shape, x_shape, weight_shape, _b, _s, _p, _d, transposed, _o, _g, mask, out_shape):
    """torch's own rule takes a grouped convolution for a full one."""
    cells = (x_shape if transposed else grad_shape)[2:]
    return 2 * x_shape[0] * math.prod(cells) * math.prod(weight_shape) * (mask[0] + mask[1])


def flops_by_torch(model, batch):
    mapping = {torch.ops.aten.convolution_backward: grouped_backward}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        losses = model.train()(batch)
        sum(loss for name, loss in losses.items() if "loss" in name).backward()
    return counter.get_total_flops()


def frozen(config, blocks):
    branches = (config.model.branches[0].model_copy(update={"frozen_blocks": blocks}), *config.model.branches[1:])
    network = config.model.model_copy(update={"branches": branches, "attention_kernel": "math"})
    data = config.data.model_copy(update={"micro_batch_size": 1})
    return config.model_copy(update={"model": network, "data": data})


def counted_of(config, num_classes, size_px):
    """By our count, without the samples of deformable attention, which torch's counter does not see."""
    classes = tuple(str(label) for label in range(num_classes))
    named = config.model_copy(update={"data": config.data.model_copy(update={"classes": classes})})
    parts = count_run(named, *size_px, training=True).parts
    whole = network_flops(config, num_classes, *size_px) + head_flops(config, num_classes, *size_px)
    assert whole == sum(part.training_flops for part in parts)
    return whole - 2 * 3 * sum(part.sampling_macs for part in parts)


@pytest.mark.parametrize("blocks", [0, 1, "all"])
def test_a_detector(blocks):
    overrides = small_detectors.SMALL["faster_rcnn"] | SAMPLED
    config = frozen(small_detectors.run_config("faster_rcnn", overrides), blocks)
    torch.manual_seed(0)
    batch = small_detectors.batch_of(small_detectors.instances([[10, 12, 60, 70], [70, 30, 150, 120]]))
    assert counted_of(config, 3, (128, 160)) == flops_by_torch(build_model(config, 3), batch)


@pytest.mark.parametrize("blocks", [0, "all"])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_segmentor(blocks, auxiliary):
    overrides = {"decode_head.channels": 16, "auxiliary_head.channels": 16} if auxiliary else {"auxiliary_head": None}
    config = frozen(small_segmentors.run_config(overrides=overrides), blocks)
    model = build_model(config, 4)
    # Of one image batch norms of pooled maps have nothing to normalise.
    assert 2 * counted_of(config, 4, (64, 64)) == flops_by_torch(model, small_segmentors.batch_of(2))


@pytest.mark.parametrize("blocks", [0, 3, "all"])
def test_a_classifier_has_no_pyramid(blocks):
    from piip_scale.data.batch import ClassificationBatch

    branches = [
        {"resolution_px": size, "embed_dim": dim, "depth": 4, "num_heads": 2, "class_token": True}
        for size, dim in ((32, 64), (64, 32))
    ]
    values = {
        "task": "classification",
        "model": {"branches": branches, "interaction": {"num_stages": 2, "num_heads": 2}},
        "data": {"train_shards": "train", "val_shards": "val"},
        "train": {"steps": 1},
    }
    config = frozen(check_config(values), blocks)
    infos = small_segmentors.batch_of(2).infos
    batch = ClassificationBatch(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), infos, torch.tensor([0, 1]))
    assert 2 * counted_of(config, 5, (64, 64)) == flops_by_torch(build_model(config, 5), batch)
    names = [part.name for part in count_run(config, 64, 64, training=True).parts]
    assert names == ["branch 0", "branch 1", "interaction 0", "interaction 1", "head"]


@pytest.mark.parametrize("kind", small_detectors.SMALL)
def test_every_detectors_heads_have_a_count_of_training(kind):
    config = small_detectors.run_config(kind)
    evaluated = {part.name: part for part in count_run(config, 128, 160).parts}
    trained = {part.name: part for part in count_run(config, 128, 160, training=True).parts}
    assert list(trained) == list(evaluated)
    assert {part.backward_macs for part in evaluated.values()} == {0}
    neck = trained["neck"]
    assert neck.backward_macs == 2 * neck.macs
