import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from piip_scale.config.run import ScheduleConfig
from piip_scale.engine.schedule import lr_factor


def torch_factors(scheduler_of, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, factors = scheduler_of(optimizer), []
    for _ in range(total):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return factors


def ours(total: int, **kwargs) -> list[float]:
    schedule = ScheduleConfig(**kwargs)
    return [lr_factor(schedule, step, total) for step in range(total)]


def test_cosine_is_torchs():
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0.1), 50)
    assert ours(50, kind="cosine", warmup_steps=0, final_ratio=0.1) == pytest.approx(expected, rel=1e-6)


def test_poly_is_torchs():
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 50, power=0.9), 50)
    assert ours(50, kind="poly", warmup_steps=0, power=0.9) == pytest.approx(expected, rel=1e-6)
    assert ours(50, kind="poly", warmup_steps=0, final_ratio=0.2)[25] == pytest.approx(0.6)


def test_steps_are_torchs():
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [40, 55], gamma=0.1), 60)
    assert ours(60, kind="step", warmup_steps=0, milestones=(40 / 60, 55 / 60)) == pytest.approx(expected)


def test_warmup_is_torchs():
    expected = torch_factors(lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.25, total_iters=8), 20)
    assert ours(20, kind="constant", warmup_steps=8, warmup_ratio=0.25) == pytest.approx(expected)


@given(
    kind=st.sampled_from(["constant", "step", "cosine", "poly"]),
    warmup=st.integers(0, 30),
    total=st.integers(1, 200),
    step=st.integers(0, 400),
)
def test_the_factor_stays_between_nothing_and_the_base_rate(kind, warmup, total, step):
    factor = lr_factor(ScheduleConfig(kind=kind, warmup_steps=warmup), step, total)
    assert 0.0 <= factor <= 1.0
