import json
from pathlib import Path
from typing import Any

import pytest

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of facts read off the released code."""
    if not REFERENCE.is_dir():
        pytest.skip(f"the reference material is not beside the checkout ({REFERENCE.parent.name}/{REFERENCE.name})")
    return REFERENCE


@pytest.fixture(scope="session")
def released_backbones(reference) -> dict[str, Any]:
    """``model.backbone`` of every released config."""
    return json.loads((reference / "released_backbones.json").read_text())
