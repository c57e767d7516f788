"""The average of the weights: against torch's and timm's own, in every ZeRO stage, saved, resumed and used."""

from __future__ import annotations

import shutil

import pytest
import torch
from ranks import FORCED_RELEASE, run_ranks, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from tiny_task import TinyModel, TinyTask, make_batch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from piip_scale.checkpoint.averages import AVERAGE
from piip_scale.checkpoint.convert import ConvertOptions, convert
from piip_scale.checkpoint.zero_reader import ZeroCheckpoint
from piip_scale.engine.checkpointing import Checkpointer
from piip_scale.engine.ema import build_average
from piip_scale.engine.evaluation import evaluate
from piip_scale.engine.resuming import find_checkpoint
from piip_scale.engine.step import train_step
from piip_scale.engine.zero.setup import build_engine, build_model
from piip_scale.errors import CheckpointError, ConfigError
from piip_scale.world import World

DECAY = 0.8
STEPS = 3
VARIANTS = {
    "0": (0, "fp32"),
    "1": (1, "fp32"),
    "1, bf16": (1, "bf16"),
    "2": (2, "bf16"),
    "3": (3, "fp32"),
    "3, bf16": (3, "bf16"),
}


class Run:
    """A small training with averages, and torch's and timm's beside it on the gathered masters."""

    def __init__(self, world, variant, folder, *, source=None, warmup=False) -> None:
        stage, precision = VARIANTS[variant]
        config = tiny_config(
            optimizer={"lr": 1e-2},
            zero={"stage": stage, "deepspeed": FORCED_RELEASE if stage == 3 else {}},
            data={"micro_batch_size": 4 // world.num_ranks},
            train={"precision": precision, "ema_decay": DECAY, "ema_warmup": warmup},
        )
        self.world = world
        self.task = TinyTask(config, world)
        self.engine, _ = build_engine(build_model(self.task, 0), config, world)
        self.checkpointer = Checkpointer(self.engine, folder, config, world, 6)
        found = find_checkpoint(source) if source else None
        self.step = found.resume(self.engine, self.checkpointer.describe(0)) if found else 0
        self.average = build_average(self.engine, config.train, self.checkpointer, found)
        self.twin = self.gathered(TinyModel())
        self.torchs = AveragedModel(self.twin, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        self.torchs.update_parameters(self.twin)
        self.timms = ModelEmaV3(self.twin, decay=DECAY, use_warmup=True)

    def gathered(self, twin: TinyModel) -> TinyModel:
        """The twin with the engine's masters."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.engine.module.named_parameters():
            whole = parameter if self.engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param(parameter)
            twin.get_parameter(name).data.copy_(whole)
        return twin

    def train(self, steps: int) -> None:
        for _ in range(steps):
            size = 4 // self.world.num_ranks
            batch = make_batch(self.step * self.world.num_ranks + self.world.rank, size)
            assert train_step(self.engine, [batch], self.step, 0, self.world).applied
            self.step += 1
            self.average.update()
            self.torchs.update_parameters(self.gathered(self.twin))
            self.timms.update(self.twin, step=self.step)

    def save(self) -> None:
        self.checkpointer.save(self.step)
        self.checkpointer.finish()


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone().numpy() for name, parameter in model.named_parameters()}


def averaged(world, device, root):
    found = {}
    for variant in VARIANTS:
        run = Run(world, variant, root / variant)
        run.train(STEPS)
        run.save()
        found[variant] = weights_of(run.torchs.module)
    warm = Run(world, "3", root / "warm", warmup=True)
    warm.train(STEPS)
    warm.save()
    return found | {"warm": weights_of(warm.timms.module)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def references(root):
    return run_ranks(2, averaged, root)[0]


def checkpoint(root, variant):
    return root / variant / f"step_{STEPS:08d}"


@pytest.mark.parametrize("variant", [*VARIANTS, "warm"])
def test_averages_are_those_of_torch_and_timm_on_whole_weights(root, references, variant):
    saved, weights = ZeroCheckpoint(checkpoint(root, variant), averaged=True), ZeroCheckpoint(checkpoint(root, variant))
    assert saved.num_updates == STEPS
    assert list(saved) == list(weights)
    for name, value in references[variant].items():
        torch.testing.assert_close(saved[name], torch.from_numpy(value), rtol=1e-6, atol=1e-7)
    assert sum(not torch.allclose(saved[name], weights[name].float(), atol=1e-4) for name in saved) > 10


def on_one_rank(world, device, root):
    """Each checkpoint resumed and saved again at once; and what evaluation sees of the averages."""
    found = {}
    for variant in ("1, bf16", "2", "3", "3, bf16"):
        run = Run(world, variant, root / variant / "again", source=root / variant)
        run.save()
        found[variant] = seen_by_evaluation(run, device)
    return found


def seen_by_evaluation(run, device) -> list[dict[str, float]]:
    """Metrics before, with and after the averages; the masters are the same bits before and after."""
    masters = weights_of(run.gathered(TinyModel()))
    metrics = [evaluate(run.engine, run.task, device, lambda: True).metrics]
    with run.average.in_place():
        metrics.append(evaluate(run.engine, run.task, device, lambda: True).metrics)
    metrics.append(evaluate(run.engine, run.task, device, lambda: True).metrics)
    again = weights_of(run.gathered(TinyModel()))
    assert all((again[name] == value).all() for name, value in masters.items())
    return metrics


@pytest.fixture(scope="module")
def resumed(root, references):
    return run_ranks(1, on_one_rank, root)[0]


@pytest.mark.parametrize("variant", ["1, bf16", "2", "3", "3, bf16"])
def test_averages_are_resumed_on_other_ranks_and_seen_by_evaluation(root, resumed, variant):
    written = ZeroCheckpoint(checkpoint(root, variant), averaged=True)
    again = ZeroCheckpoint(root / variant / "again" / f"step_{STEPS:08d}", averaged=True)
    assert again.num_updates == written.num_updates
    assert all(torch.equal(again[name], value) for name, value in written.items())
    before, inside, after = (metrics["mean_score"] for metrics in resumed[variant])
    assert before == after
    precision = VARIANTS[variant][1]
    assert inside == pytest.approx(score(written), rel=1e-5 if precision == "fp32" else 0.02)
    assert abs(inside - before) > abs(before) * 0.05


def score(weights) -> float:
    """The tiny task's metric, of a plain model in fp32."""
    model = TinyModel().eval()
    model.load_state_dict(dict(weights))
    batches = TinyTask(tiny_config(), World()).val_batches()
    with torch.no_grad():
        return torch.cat([found.scores for batch in batches for found in model.predict(batch)]).mean().item()


def test_convert_writes_the_averages(root, references, tmp_path):
    report = convert(checkpoint(root, "3, bf16"), tmp_path / "ema.safetensors", ConvertOptions(averaged=True))
    found = load_file(tmp_path / "ema.safetensors")
    assert report.step == STEPS
    for name, value in references["3, bf16"].items():
        torch.testing.assert_close(found[name], torch.from_numpy(value), rtol=1e-6, atol=1e-7)
    with safe_open(tmp_path / "ema.safetensors", "pt") as file:
        assert file.metadata()["averaged"] == "true"


def test_a_checkpoint_without_averages_says_so(root, references, tmp_path):
    folder = tmp_path / "step_00000003"
    shutil.copytree(checkpoint(root, "3"), folder, ignore=shutil.ignore_patterns(AVERAGE))
    with pytest.raises(CheckpointError, match=r"no files of averaged weights; a run with train\.ema_decay writes 2"):
        ZeroCheckpoint(folder, averaged=True)


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"train": {"ema_warmup": True}}, "ema_warmup needs ema_decay"),
        ({"train": {"ema_decay": 1.0}}, "less than 1"),
        ({"train": {"ema_decay": 0.0}}, "greater than 0"),
        (
            {"train": {"ema_decay": 0.9}, "zero": {"offload_optimizer": "/nvme"}},
            "ema_decay=0.9 averages weights in memory",
        ),
    ],
)
def test_averages_that_cannot_be_meant_are_refused(sections, told):
    with pytest.raises(ConfigError, match=told):
        tiny_config(**sections)
