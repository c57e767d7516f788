"""Activations counted on the meta device against real ones on the CPU, a published formula, and a real peak."""

from __future__ import annotations

import pytest
import torch
from ranks import tiny_config

from piip_scale.config.model import PiipConfig
from piip_scale.engine.rehearsal import rehearse
from piip_scale.models.piip import PIIP

SIZE_PX = 96
# Numbers that only one side has: generators' states, scalars.
TOLERANCE = 0.02


def network_config(*, checkpointed: bool, **branch) -> PiipConfig:
    sizes = {"kind": "vit", "depth": 2, "num_heads": 2, "patch_size_px": 8, "checkpoint_blocks": checkpointed}
    branches = [
        sizes | {"embed_dim": 64, "resolution_px": 64, "drop_path_rate": 0.1} | branch,
        sizes | {"embed_dim": 32, "resolution_px": SIZE_PX},
    ]
    interaction = {"num_stages": 2, "num_heads": 4, "checkpoint_units": checkpointed}
    model = {"branches": branches, "interaction": interaction, "deform_kernel": "reference"}
    return tiny_config(model=model).model


def build(config: PiipConfig, device: str, dtype: torch.dtype) -> tuple[PIIP, torch.Tensor]:
    with torch.device(device):
        network = PIIP(config).train()
        network.set_precision(dtype)
        return network, torch.ones(2, 3, SIZE_PX, SIZE_PX)


def parts_of(network: PIIP) -> dict[str, torch.nn.Module]:
    return {f"branch {index}": branch for index, branch in enumerate(network.branches)} | {
        "interactions": network.interactions
    }


def saved_bytes(network: PIIP, images_BCHW: torch.Tensor) -> int:
    """What autograd keeps, and the output: bytes of every storage once, parameters left out."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = network(images_BCHW)
    for feature in features:
        keep(feature)
    own = {parameter.untyped_storage()._cdata for parameter in (*network.parameters(), *network.buffers())}
    own.add(images_BCHW.untyped_storage()._cdata)
    return sum(storage.nbytes() for place, storage in storages.items() if place not in own)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
@pytest.mark.parametrize(
    "branch", [{}, {"window_size_tokens": (4, 4), "relative_position_bias": True}, {"class_token": True}]
)
def test_what_is_kept_is_what_autograd_saves_on_a_cpu(branch, dtype, checkpointed):
    config = network_config(checkpointed=checkpointed, **branch)
    network, images = build(config, "meta", dtype)
    rehearsed = rehearse(network, parts_of(network), lambda: network(images))
    assert rehearsed.total_bytes == pytest.approx(saved_bytes(*build(config, "cpu", dtype)), rel=TOLERANCE)
    assert rehearsed.peak > rehearsed.total_bytes
    assert not any(parameter.grad is not None for parameter in network.parameters())


def test_the_peak_is_that_of_a_real_backward_pass():
    config = network_config(checkpointed=True)
    meta, real = (build(config, device, torch.float32) for device in ("meta", "cpu"))
    peaks = [rehearse(net, parts_of(net), lambda n=net, x=x: n(x), as_on_gpu=False).peak for net, x in (meta, real)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.05)


def test_checkpointing_moves_activations_from_kept_to_recomputed():
    kept = {}
    for checkpointed in (False, True):
        network, images = build(network_config(checkpointed=checkpointed), "meta", torch.bfloat16)
        kept[checkpointed] = rehearse(network, parts_of(network), lambda n=network, x=images: n(x))
    assert kept[True].kept["branch 0"] < kept[False].kept["branch 0"] / 4
    assert kept[True].total_bytes < kept[True].peak < kept[False].peak


def test_a_transformer_layer_keeps_what_the_literature_says():
    # Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, section 4.1: 34 bytes a
    # token and channel in half precision, of which 2 are for dropout's masks; scores are not kept by fused attention.
    depths, kept = (2, 6), []
    for depth in depths:
        branch = {"kind": "vit", "depth": depth, "num_heads": 4, "embed_dim": 256, "patch_size_px": 8}
        config = tiny_config(
            model={"branches": [branch | {"resolution_px": SIZE_PX}], "interaction": {"num_stages": 1}}
        ).model
        network, images = build(config, "meta", torch.bfloat16)
        kept.append(rehearse(network, {"vit": network.branches[0]}, lambda n=network, x=images: n(x)).kept["vit"])
    tokens = 2 * (SIZE_PX // 8) ** 2
    assert (kept[1] - kept[0]) / (depths[1] - depths[0]) == pytest.approx(32 * tokens * 256, rel=0.1)


def test_kernels_that_run_on_a_gpu_only_keep_their_inputs_here_too():
    config = network_config(checkpointed=False)
    kept = {}
    for kernel in ("reference", "triton"):
        network, images = build(config.model_copy(update={"deform_kernel": kernel}), "meta", torch.bfloat16)
        kept[kernel] = rehearse(network, parts_of(network), lambda n=network, x=images: n(x)).kept["interactions"]
    assert kept["triton"] < kept["reference"]
