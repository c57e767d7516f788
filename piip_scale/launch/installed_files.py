"""Where the batch script, the profiles and the shell scripts lie: beside the package, or where pip put them."""

from __future__ import annotations

import sys
from pathlib import Path

from piip_scale.errors import RunError

# A checkout first: what is edited there is what is meant.
_PLACES = (Path(__file__).parents[2] / "launch", Path(sys.prefix) / "share" / "piip-scale" / "launch")


def launch_folder() -> Path:
    """The folder of the batch script and the profiles.

    Raises:
        RunError: The package is installed without it.
    """
    for place in _PLACES:
        if (place / "train.sbatch").is_file():
            return place
    raise RunError(
        "the batch script launch/train.sbatch is not installed",
        rule=f"it lies in {' or '.join(map(str, _PLACES))}",
        fix="install the package again, or from a checkout with pip install -e",
    )
