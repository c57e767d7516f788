import torch

from piip_scale.engine import hooks
from piip_scale.engine.hooks import Silence, Tell
from piip_scale.engine.run_dir import RunDirectory
from piip_scale.engine.step import StepResult
from piip_scale.engine.trainer import StepReport
from piip_scale.world import World


class Heard(Silence):
    def __init__(self):
        self.losses = {}

    def step(self, record):
        self.losses[record.step] = record.losses["loss"]


def test_every_step_that_is_written_tells_means_over_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "mean_over_ranks", lambda losses: {name: 7.0 for name in losses})
    heard = Heard()
    tell = Tell(heard, RunDirectory(tmp_path), World(), torch.device("cpu"), every=2, total_steps=5)
    for step in range(1, 6):
        result = StepResult({"loss": torch.tensor(1.0)}, grad_norm=0.0, applied=True, images=1)
        tell.after_step(StepReport(step, result, lr=0.1, seconds=1.0, wait_seconds=0.0))
    assert heard.losses == {1: 1.0, 2: 7.0, 3: 1.0, 4: 7.0, 5: 7.0}
