"""A branch sees its image in the pixel statistics of its own pretraining, as if that alone had normalised it."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.transforms.v2.functional import normalize

from piip_scale.config.foundation_presets import FOUNDATION_PRESETS
from piip_scale.config.loading import check_config
from piip_scale.config.model import PiipConfig
from piip_scale.errors import ModelError
from piip_scale.models.piip import PIIP
from piip_scale.ops.resize import resize_image
from piip_scale.registry import row_of
from piip_scale.serving.onnx_export import _Static
from piip_scale.tasks.released_export import _refuse_our_own

RUN = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}
OWN = {"mean": (127.5, 120.0, 110.0), "std": (127.5, 60.0, 70.0)}
VIT = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size_px": 8}
UNIT = {"num_stages": 1, "num_heads": 2, "gamma_init": 0.5}
PIXELS = torch.randint(256, (2, 3, 48, 64), generator=torch.Generator().manual_seed(1)).float()


def network(large=None, small=None, told=RUN):
    torch.manual_seed(0)
    branches = (VIT | {"resolution_px": 32} | (large or {}), VIT | {"resolution_px": 64} | (small or {}))
    model = PIIP(PiipConfig(branches=branches, interaction=UNIT, pyramid={"scales": (1.0,)})).eval()
    if told:
        model.take_images_of(**told)
    return model


def normalised(statistics):
    return normalize(PIXELS, statistics["mean"], statistics["std"])


@pytest.mark.parametrize("index", [0, 1])
def test_a_branch_sees_what_its_own_normalisation_makes(index):
    model = network(**{("large", "small")[index]: OWN})
    for branch, scale in enumerate((0.5, 1.0)):
        expected = resize_image(normalised(OWN if branch == index else RUN), scale)
        torch.testing.assert_close(model._image_of(branch, normalised(RUN)), expected, atol=1e-5, rtol=0)


def test_a_network_whose_branches_have_other_statistics_is_that_of_a_run_with_these():
    ours, theirs = network(OWN, OWN), network(told=OWN)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    with torch.no_grad():
        for found, expected in zip(ours(normalised(RUN)), theirs(normalised(OWN)), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        plain = network(told=None)(normalised(RUN))
        # The run's own, said again, and none: nothing is computed.
        assert network(RUN)._recolourings == network()._recolourings == [None, None]
        assert all(map(torch.equal, network(RUN)(normalised(RUN)), plain))


def test_padding_is_the_runs_mean_colour_in_a_branchs_statistics():
    model = network(large=OWN)
    mean = torch.tensor(RUN["mean"]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    found = model._recolourings[0](torch.zeros(1, 3, 8, 8))
    torch.testing.assert_close(found, normalize(mean, OWN["mean"], OWN["std"]), atol=1e-6, rtol=0)


def run_config(branch=None, **augment):
    return check_config(
        {
            "task": "classification",
            "model": {"branches": (VIT | {"resolution_px": 64} | (branch or {}),), "interaction": UNIT},
            "data": {"train_shards": "", "val_shards": "", "augment": augment, "micro_batch_size": 2},
            "train": {"steps": 1},
        }
    )


def test_an_exported_graph_has_them_and_released_names_cannot():
    outputs = []
    for config in (run_config(OWN, **RUN), run_config(**OWN)):
        torch.manual_seed(0)
        model = row_of("classification").load("model")(config, 3).eval()
        with torch.no_grad():
            outputs += _Static(model, config)(PIXELS.permute(0, 2, 3, 1).byte())
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)
    weights = SimpleNamespace(name="mine", shapes={})
    _refuse_our_own(run_config(OWN, **OWN), weights)
    with pytest.raises(ModelError, match=r"branches.0.mean=\(127.5, 120.0, 110.0\) is not data.augment.mean"):
        _refuse_our_own(run_config(OWN, **RUN), weights)


def test_half_of_them_and_images_of_unknown_ones_are_refused():
    with pytest.raises(ValueError, match="belong together: set both, or leave both out"):
        network({"mean": OWN["mean"]})
    with pytest.raises(ModelError, match=r"branch 1 has pixel statistics of its own.*call take_images_of first"):
        network(small=OWN, told=None)(normalised(RUN))


def test_every_foundation_preset_says_its_own():
    assert all(preset["mean"] and preset["std"] for preset in FOUNDATION_PRESETS.values())
