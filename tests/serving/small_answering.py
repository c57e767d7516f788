"""A small detector with random weights that answers questions, for tests of the server and of its page."""

import torch
from small_detectors import CLASSES, run_config

from piip_scale.serving.answering import Answering
from piip_scale.tasks.kinds import build_model
from piip_scale.tasks.trained import Trained


class ModelsWeights:
    """A model's own tensors as a source of weights."""

    def __init__(self, model) -> None:
        self.name, self._state = "model", model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def read(self, name, dtype, device=None):
        return self._state[name].to(device, dtype)


def small_answering(max_pixels):
    config = run_config(
        classes=CLASSES,
        augment={"short_edge_px": (96,), "max_edge_px": 128, "pad_multiple_px": 64},
    )
    torch.manual_seed(0)
    return Answering(Trained(config, ModelsWeights(build_model(config, len(CLASSES))), 7), max_pixels)
