"""The same bits from run to run: where they come by themselves, and what it takes where they do not."""

from __future__ import annotations

import os

import torch

from piip_scale.config.run import TrainConfig
from piip_scale.errors import ConfigError

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")


def apply_determinism(train: TrainConfig) -> None:
    """Restricts torch to deterministic kernels where the config wants it; before this process uses a GPU.

    Raises:
        ConfigError: The environment lets cuBLAS choose its workspaces, which then depend on the moment.
    """
    if not train.deterministic:
        return
    # cuBLAS reads it when its first handle is made.
    workspace = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ConfigError(
            f"train.deterministic=True with {_WORKSPACE}",
            value=workspace,
            rule=f"cuBLAS is deterministic with {' or '.join(_WORKSPACES)}",
            fix="unset the variable",
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def determinism_lines(train: TrainConfig, device: torch.device) -> list[str]:
    """What the start report says of it."""
    if train.deterministic:
        return ["deterministic: runs on the same ranks and devices give the same bits; kernels that cannot are refused"]
    if device.type == "cuda":
        return ["not deterministic: on a GPU last digits change from run to run; train.deterministic=True holds them"]
    return []
