"""The released recipes, and networks written out number by number to compare them with ours."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from released_state import to_released

from piip_scale.config.model import PiipConfig
from piip_scale.models.released import from_released
from piip_scale.models.trunk import Trunk

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT.parent / "shared" / "reference"


@cache
def _content(file):
    return json.loads((REFERENCE / file).read_text())


def read(file):
    if not REFERENCE.is_dir():
        pytest.skip(f"the reference material is not beside the checkout ({REFERENCE.parent.name}/{REFERENCE.name})")
    return _content(file)


def expanded(config: PiipConfig):
    """Every number of a network; what is left to be divided evenly is divided."""
    values = config.model_dump()
    for index, branch in enumerate(values["branches"]):
        branch["blocks_per_stage"] = config.geometry.blocks_per_stage[index]
        del branch["pretrained"]
    if len(config.branches) == 1:
        # Only ratios between branches matter, and released baselines leave the size out.
        del values["branches"][0]["resolution_px"]
    return values


def given_branches(backbone):
    """The dicts the released code builds branches from: the fourth from the third's."""
    names = sorted(name for name in backbone if name.startswith("branch"))
    return [backbone[name] for name in [*names[:3], *names[2:3] * (len(names) == 4)]] or [backbone]


def there_and_back(model):
    """A model's tensors by their released names and back are themselves; a number stands for each one's values."""
    tagged = {
        name: torch.tensor(float(index)).expand(value.shape)
        for index, (name, value) in enumerate(model.state_dict().items())
    }
    network = (model if isinstance(model, Trunk) else model.backbone).config
    back = from_released(to_released(tagged, network), tagged, network)
    assert back.keys() == tagged.keys()
    for name, value in tagged.items():
        assert back[name].shape == value.shape
        assert back[name].flatten()[0] == value.flatten()[0]
