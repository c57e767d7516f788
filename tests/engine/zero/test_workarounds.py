"""The table of DeepSpeed's faults: each still stands in its source, and our code and its test exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from pyramid_task import pyramid_config

from piip_scale.engine.zero import deepspeed_api, engine_files
from piip_scale.engine.zero.workarounds import VERSION, WORKAROUNDS, table
from piip_scale.models.piip import PIIP

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("row", WORKAROUNDS, ids=lambda row: row.here[1])
def test_a_fault_is_still_there_and_so_are_what_mends_it_and_its_test(row):
    module, line = row.fault
    # Not imported: the source is what is asked for.
    assert line in Path(importlib.util.find_spec(module).origin).read_text(), f"{row.what}: look whether it still does"
    file, name = row.here
    assert re.search(rf"^ *(class|def) {name}\b", (ROOT / "piip_scale" / file).read_text(), re.MULTILINE)
    file, name = row.test
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_the_page_shows_the_table():
    page = (ROOT / "benchmarks" / "deepspeed.md").read_text()
    assert table() in page, "write piip_scale.engine.zero.workarounds.table() into benchmarks/deepspeed.md"
    assert VERSION.split()[1] == deepspeed_api.TESTED["deepspeed"][1]


def test_no_parameter_is_without_axes():
    with torch.device("meta"):
        model = PIIP(pyramid_config().model)
    assert [name for name, parameter in model.named_parameters() if parameter.ndim == 0] == []


class Engine:
    """Saves as DeepSpeed's does, scripts included."""

    checkpoint_engine = "DeepSpeed's"
    mpu = None

    def _copy_recovery_script(self, path: str) -> None:
        raise AssertionError("a script was copied")

    def zero_nvme_offload_optimizer(self) -> bool:
        return False

    def save_checkpoint(self, folder, tag, client_state, save_latest):
        self._copy_recovery_script(folder)
        self.checkpoint_engine.save({"module": {}} | client_state, f"{folder}/{tag}/model_states.pt")


def test_a_save_leaves_no_scripts_and_the_engine_as_it_was(tmp_path):
    engine = Engine()
    found = engine_files.engine_files(engine, tmp_path, "zero", {"ours": 1}, dict)
    assert found == {"zero/model_states.pt": {"module": {}, "ours": 1}}
    assert engine.checkpoint_engine == "DeepSpeed's"
    assert vars(engine) == {"checkpoint_engine": "DeepSpeed's"}
    with pytest.raises(AssertionError, match="a script was copied"):
        engine._copy_recovery_script("")
