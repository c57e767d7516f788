"""Detectors and segmentors of mmlab's own, and checkpoints of them in the layout of the versions before: mmdet 2.25's.

What differs is written down module by module, as the old classes hold them, and not as patterns of names.
"""

from __future__ import annotations

from pathlib import Path

import torch

from piip_scale.config.loading import check_config, config_text
from piip_scale.models.official import from_official
from piip_scale.models.official_config import read_official_config
from piip_scale.models.official_keys import official_name
from piip_scale.tasks.detection.model import PassThroughBackbone
from piip_scale.tasks.mmlab import MODELS, PACKAGE_FOLDER, Config, ConfigDict, DefaultScope
from piip_scale.tasks.segmentation.mmlab import CONFIG_FOLDER
from piip_scale.tasks.segmentation.mmlab import MODELS as MMSEG

VIT = {"depth": 2, "num_heads": 4, "qkv_bias": True, "pretrain_img_size": 32, "interaction_indexes": [[0, 0], [1, 1]]}
BACKBONE = {
    "type": "PIIPTwoBranch",
    "deform_num_heads": 4,
    "with_cffn": True,
    "interact_attn_type": "deform",
    "branch1": VIT | {"embed_dim": 64, "real_size": 64, "pretrained": "deit_base.pth"},
    "branch2": VIT | {"embed_dim": 32, "real_size": 128, "pretrained": "deit_small.pth"},
}
CLASSES = ("disc", "box", "star")
FILES = {
    "mask_rcnn": "_base_/models/mask-rcnn_r50_fpn.py",
    "cascade_mask_rcnn": "_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "dino": "dino/dino-4scale_r50_8xb2-12e_coco.py",
}


def backbone_of(kind: str) -> dict:
    return BACKBONE | ({"is_dino": True} if kind == "dino" else {})


def run_of(kind: str, overrides: dict, classes=(), **data):
    """A run of ours with the same network and heads."""
    heads = {"segmentor": {"overrides": overrides}, "task": "segmentation"} if kind == "upernet" else {}
    network = read_official_config(backbone_of(kind)).config.model_dump()
    return check_config(
        {
            "model": network,
            "data": {"train_shards": "none", "val_shards": "none", "classes": classes, **data},
            "train": {"steps": 1},
        }
        | (heads or {"detector": {"kind": kind, "overrides": overrides}})
    )


def write_run(path: Path, *arguments, **named) -> Path:
    path.write_text(config_text(run_of(*arguments, **named)))
    return path


def _small_rcnn(head: dict) -> None:
    for box in head["bbox_head"] if isinstance(head["bbox_head"], list) else [head["bbox_head"]]:
        box |= {"in_channels": 32, "fc_out_channels": 64, "num_classes": len(CLASSES)}
    for mask in head["mask_head"] if isinstance(head["mask_head"], list) else [head["mask_head"]]:
        mask |= {"in_channels": 32, "conv_out_channels": 32, "num_convs": 1, "num_classes": len(CLASSES)}
    for part in ("bbox", "mask"):
        head[f"{part}_roi_extractor"]["out_channels"] = 32


def theirs(kind: str) -> torch.nn.Module:
    """mmdet's own detector by its own base config, with weights drawn for everything."""
    model = Config.fromfile(Path(PACKAGE_FOLDER) / ".mim" / "configs" / FILES[kind]).model.to_dict()
    model["backbone"] = {"type": PassThroughBackbone.__name__}
    del model["data_preprocessor"]
    if kind == "dino":
        model["neck"]["in_channels"] = [64, 64, 64]
        model["num_queries"], model["test_cfg"]["max_per_img"] = 40, 20
        model["encoder"]["num_layers"], model["decoder"]["num_layers"] = 1, 2
        model["bbox_head"]["num_classes"] = len(CLASSES)
    else:
        model["neck"] |= {"in_channels": [64] * 4, "out_channels": 32}
        model["rpn_head"] |= {"in_channels": 32, "feat_channels": 32}
        model["test_cfg"]["rpn"]["max_per_img"] = 50
        _small_rcnn(model["roi_head"])
    with DefaultScope.overwrite_default_scope("mmdet"):
        return _drawn(MODELS.build(ConfigDict(model)))


def their_segmentor() -> torch.nn.Module:
    model = Config.fromfile(CONFIG_FOLDER / "_base_/models/upernet_r50.py").model.to_dict()
    norm = {"type": "BN", "requires_grad": True}
    model["decode_head"] |= {"in_channels": [64] * 4, "channels": 16, "num_classes": len(CLASSES), "norm_cfg": norm}
    model["auxiliary_head"] |= {"in_channels": 64, "channels": 16, "num_classes": len(CLASSES), "norm_cfg": norm}
    del model["data_preprocessor"]
    model |= {"backbone": {"type": PassThroughBackbone}, "pretrained": None}
    with DefaultScope.overwrite_default_scope("mmseg"):
        return _drawn(MMSEG.build(ConfigDict(model)))


def _drawn(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(5)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        drawn = torch.randn(tensor.shape, generator=generator) * (tensor[0].numel() if tensor.ndim else 1) ** -0.5
        # Scales and variances are positive.
        is_scale = "var" in name or (tensor.ndim == 1 and name.endswith("weight"))
        tensor.copy_(drawn.abs() + 0.5 if is_scale else drawn)
    return model.eval()


def network_weights(kind: str) -> dict[str, torch.Tensor]:
    """Drawn weights of the backbone under the names that golden files of the released code hold for good."""
    official = read_official_config(backbone_of(kind))
    generator = torch.Generator().manual_seed(6)
    state, found = from_official(backbone_of(kind)).state_dict(), {}
    for name, value in state.items():
        key, drawn = official_name(name, official), 0.2 * torch.randn(value.shape, generator=generator)
        # The weights in the sum of branches have no axis there.
        found[f"backbone.{key}"] = drawn.reshape(()) if key in ("w1", "w2") else drawn
    return found


def old_heads(kind: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Neck and heads as mmdet 2.25 and mmseg 0.x hold them."""
    if kind != "dino":
        return dict(model.state_dict())
    found: dict[str, torch.Tensor] = {}

    def hold(name, module):
        found.update({f"{name}.{key}": value for key, value in module.state_dict().items()})

    inside = "bbox_head.transformer"
    hold("neck", model.neck)
    # A head with all of DETR's parts inside; its own branches have kept their names.
    hold("bbox_head", model.bbox_head)
    hold("bbox_head.label_embedding", model.dn_query_generator.label_embedding)
    found[f"{inside}.level_embeds"] = model.level_embed.detach()
    hold(f"{inside}.enc_output", model.memory_trans_fc)
    hold(f"{inside}.enc_output_norm", model.memory_trans_norm)
    hold(f"{inside}.query_embed", model.query_embedding)
    hold(f"{inside}.decoder.norm", model.decoder.norm)
    # nn.Sequential(Linear, ReLU, Linear).
    hold(f"{inside}.decoder.ref_point_head.0", model.decoder.ref_point_head.layers[0])
    hold(f"{inside}.decoder.ref_point_head.2", model.decoder.ref_point_head.layers[1])
    for part in ("encoder", "decoder"):
        for index, layer in enumerate(getattr(model, part).layers):
            # mmcv's BaseTransformerLayer: lists of attentions, of feed-forward networks and of norms.
            attentions = [layer.self_attn] + ([layer.cross_attn] if part == "decoder" else [])
            for number, attention in enumerate(attentions):
                hold(f"{inside}.{part}.layers.{index}.attentions.{number}", attention)
            hold(f"{inside}.{part}.layers.{index}.ffns.0", layer.ffn)
            hold(f"{inside}.{part}.layers.{index}.norms", layer.norms)
    assert len(found) == len(model.state_dict())
    return found


def released(kind: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return network_weights(kind) | old_heads(kind, model)
