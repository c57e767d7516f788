"""Overrides merge in mmdet's terms, and what mmdet would not read is refused by name."""

import pytest
from small_detectors import plan

from piip_scale.errors import ConfigError


def test_dotted_and_nested_keys_say_the_same():
    dotted = plan("mask_rcnn", {"rpn_head.anchor_generator.scales": [4], "rpn_head.feat_channels": 32})
    nested = plan("mask_rcnn", {"rpn_head": {"anchor_generator": {"scales": [4]}, "feat_channels": 32}})
    mixed = plan("mask_rcnn", {"rpn_head": {"anchor_generator.scales": [4]}, "rpn_head.feat_channels": 32})
    assert dotted == nested == mixed
    assert dotted.model["rpn_head"]["anchor_generator"]["scales"] == [4]
    assert dotted.model["rpn_head"]["anchor_generator"]["ratios"] == [0.5, 1.0, 2.0]


def test_a_dict_goes_onto_every_entry_of_a_list_or_onto_the_one_named():
    model = plan("cascade_mask_rcnn", {"roi_head.bbox_head.fc_out_channels": 64}).model
    assert [head["fc_out_channels"] for head in model["roi_head"]["bbox_head"]] == [64, 64, 64]
    model = plan("cascade_mask_rcnn", {"roi_head.bbox_head.1.fc_out_channels": 64}).model
    assert [head["fc_out_channels"] for head in model["roi_head"]["bbox_head"]] == [1024, 64, 1024]
    with pytest.raises(ConfigError, match="entries 0 to 2"):
        plan("cascade_mask_rcnn", {"roi_head.bbox_head.3.fc_out_channels": 64})


def test_delete_replaces():
    neck = {"_delete_": True, "type": "ChannelMapper", "out_channels": 32, "num_outs": 4}
    assert plan("faster_rcnn", {"neck": neck}).model["neck"] == {
        "type": "ChannelMapper",
        "out_channels": 32,
        "num_outs": 4,
        "in_channels": [8, 8, 8, 8],
    }


@pytest.mark.parametrize(
    ("kind", "key", "nearest"),
    [
        ("mask_rcnn", "rpn_head.anchor_generator.scale", "scales"),
        ("mask_rcnn", "roi_head.bbox_head.fc_out_chanels", "fc_out_channels"),
        ("mask_rcnn", "test_cfg.rcnn.score_thresh", "score_thr"),
        ("mask_rcnn", "rpn_heads", "rpn_head"),
        ("mask_rcnn", "train_cfg.rpn_proposal.nms.iou_thr", "iou_threshold"),
        ("cascade_mask_rcnn", "roi_head.bbox_head.0.num_clases", "num_classes"),
        ("dino", "encoder.num_layer", "num_layers"),
        ("dino", "encoder.layer_cfg.self_attn_cfg.num_point", "num_points"),
        ("dino", "num_query", "num_queries"),
    ],
)
def test_an_unknown_key_names_itself_and_the_nearest(kind, key, nearest):
    with pytest.raises(ConfigError) as caught:
        plan(kind, {key: 1})
    assert f"detector.overrides.{key.replace('.0.', '.')}" in caught.value.problem
    assert nearest in caught.value.fix
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("mask_rcnn", "neck.norm_cfg", {"type": "GN", "num_groups": 8}),  # FPN's, though the base config has none
        ("mask_rcnn", "roi_head.bbox_head.num_shared_fcs", 1),  # of a class further up
        ("mask_rcnn", "train_cfg.rcnn.soft_mask_target", True),
        ("mask_rcnn", "test_cfg.rcnn.nms.type", "soft_nms"),
        ("dino", "decoder.layer_cfg.cross_attn_cfg.num_points", 2),
    ],
)
def test_what_mmdet_reads_is_allowed_though_its_base_config_leaves_it_out(kind, key, value):
    node = plan(kind, {key: value}).model
    for part in key.split("."):
        node = node[part]
    assert node == value
