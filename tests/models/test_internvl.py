"""Hugging Face's InternVL vision model with random weights, as an independent check of InternViT with qk norm."""

import pytest
import torch

from piip_scale.config.branches import VitBranchConfig
from piip_scale.models.vit import Vit

pytest.importorskip("transformers", reason="transformers is not installed (pip install transformers)")

DIM, DEPTH, HEADS = 48, 3, 4
LAYER_NAMES = {
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "attention.projection_layer": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1.gamma",
    "lambda_2": "ls2.gamma",
}


def translate(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ours = {
        "embedding.proj.weight": theirs["embeddings.patch_embeddings.projection.weight"],
        "embedding.proj.bias": theirs["embeddings.patch_embeddings.projection.bias"],
        "embedding.position": theirs["embeddings.position_embeddings"],
        # Theirs adds the position slot to the class token; ours, as PIIP, does not.
        "class_token.token": theirs["embeddings.cls_token"] + theirs["embeddings.position_embeddings"][:, :1],
    }
    for index in range(DEPTH):
        prefix, layer = f"blocks.{index}.", f"encoder.layer.{index}."
        ours[prefix + "attn.qkv.weight"] = torch.cat([theirs[f"{layer}attention.{p}_proj.weight"] for p in "qkv"])
        for name, value in theirs.items():
            if name.startswith(layer) and "_proj." not in name:
                for old, new in LAYER_NAMES.items():
                    name = name.replace(old, new)
                ours[prefix + name.removeprefix(layer)] = value
    return ours


@pytest.mark.parametrize("size", [64, 96])
def test_internvit_with_qk_norm(size):
    from transformers.models.internvl.modeling_internvl import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=DIM,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * DIM,
        use_qk_norm=True,
        norm_type="rms_norm",
        image_size=[64, 64],
        patch_size=[16, 16],
        attn_implementation="eager",
    )
    theirs = InternVLVisionModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    numbers = {"resolution_px": 64, "pretrain_resolution_px": 64, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
    kind = {"norm": "rmsnorm", "qk_norm": True, "qkv_bias": False, "layer_scale_init": 0.1}
    ours = Vit(VitBranchConfig(class_token=True, position_class_slot=True, **numbers, **kind)).eval()
    ours.load_state_dict(translate(theirs.state_dict()))

    image = torch.randn(2, 3, size, size, generator=generator)
    state = ours.run(ours.embed(image), 0, DEPTH)
    tokens = torch.cat((state.class_token_B1C, state.grid_BHWC.flatten(1, 2)), 1)
    torch.testing.assert_close(tokens, theirs(image).last_hidden_state, atol=2e-5, rtol=1e-5)
