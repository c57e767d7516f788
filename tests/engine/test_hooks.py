import pytest
import torch

from piip_scale.engine import hooks
from piip_scale.engine.hooks import LogSteps, Silence
from piip_scale.engine.interval import Interval
from piip_scale.engine.step import StepResult
from piip_scale.engine.trainer import StepReport
from piip_scale.engine.utilisation import Utilisation, peak_of, peak_tflops
from piip_scale.run.progress_notes import ProgressNotes
from piip_scale.run.run_dir import RunDirectory
from piip_scale.telemetry.tensorboard import step_scalars
from piip_scale.world import World


class Heard(Silence):
    def __init__(self):
        self.losses, self.records = {}, []

    def step(self, record):
        self.losses[record.step] = record.losses["loss"]
        self.records.append(record)


def tell_of(heard, folder, peak_tflops=None):
    utilisation = Utilisation(lambda height, width: height * width * 10**12, peak_tflops)
    return LogSteps(
        heard,
        ProgressNotes(RunDirectory(folder)),
        World(),
        torch.device("cpu"),
        every=2,
        total_steps=5,
        utilisation=utilisation,
        num_broken=lambda: 3,
        interval=Interval(World(), torch.device("cpu"), ["here"], clip_norm=0.0),
    )


def report_of(step, sizes_px=((32, 32),), seconds=1.0):
    result = StepResult({"loss": torch.tensor(1.0)}, {"loss": 1.0}, grad_norm=0.0, applied=True, sizes_px=sizes_px)
    return StepReport(step, result, lr=0.1, seconds=seconds, wait_seconds=0.0)


def test_every_step_that_is_written_tells_means_over_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "mean_over_ranks", lambda values, _: {name: 7.0 for name in values})
    heard = Heard()
    tell = tell_of(heard, tmp_path)
    for step in range(1, 6):
        tell.after_step(report_of(step))
    assert heard.losses == {1: 1.0, 2: 7.0, 3: 1.0, 4: 7.0, 5: 7.0}


def test_broken_samples_are_told_of_all_ranks_together(tmp_path, monkeypatch):
    # Ranks have replaced 3, 5, 0 and 4: the mean that the collective gives is 3.
    monkeypatch.setattr(
        hooks, "mean_over_ranks", lambda values, _: {name: float(value) for name, value in values.items()}
    )
    heard = Heard()
    tell = tell_of(heard, tmp_path)
    tell._world = World(num_ranks=4)
    for step in (1, 2):
        tell.after_step(report_of(step))
    assert [record.broken_samples for record in heard.records] == [None, 12]
    assert "data/broken_samples" not in step_scalars(heard.records[0], 1.0)
    assert step_scalars(heard.records[1], 1.0)["data/broken_samples"] == 12


def test_what_only_written_steps_show_is_read_for_them_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "mean_over_ranks", lambda values, _: {name: 1.0 for name in values})
    monkeypatch.setattr(hooks, "peak_memory_bytes", lambda _: 5)
    heard = Heard()
    tell = tell_of(heard, tmp_path)
    for step in (1, 2):
        tell.after_step(report_of(step))
    tell.at_end(2)
    assert [record.memory_bytes for record in heard.records] == [None, 5]
    assert "memory/peak_gib" not in step_scalars(heard.records[0], 1.0)
    assert RunDirectory(tmp_path).status().step == 2


def test_utilisation_is_the_tasks_flops_over_the_peak(tmp_path):
    sizes_px, seconds = ((32, 32), (64, 96)), 0.5
    heard = Heard()
    tell_of(heard, tmp_path, peak_tflops=2.0).after_step(report_of(1, sizes_px, seconds))
    tell_of(heard, tmp_path).after_step(report_of(1, sizes_px, seconds))
    known, unknown = heard.records
    assert known.images == 2
    assert known.model_tflops == unknown.model_tflops == pytest.approx((32 * 32 + 64 * 96) / seconds)
    assert known.mfu == pytest.approx(known.model_tflops / 2)
    assert unknown.mfu is None


def test_a_size_is_counted_once_and_the_log_names_what_counts():
    asked = []
    use = Utilisation(lambda *size: asked.append(size) or 1, 989.0)
    use.tflops([(32, 32)] * 3, 1.0)
    use.tflops([(32, 32), (64, 32)], 1.0)
    assert asked == [(32, 32), (64, 32)]
    assert use.line.startswith("model TFLOP/s and MFU (of 989 TFLOP/s): the network as far as it is trained, without")
    assert "not known here" in Utilisation(lambda *_: 1, None).line


def test_peaks_are_those_of_the_names_that_cuda_gives():
    peaks = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312}
    assert {name: peak_of(name) for name in peaks} == peaks
    assert peak_of("GeForce GT 710") is None
    assert peak_tflops(torch.device("cpu"), "bf16") is None
