import pytest
from hypothesis import given
from hypothesis import strategies as st

from piip_scale.telemetry.meters import RateMeter, duration_text

STEPS = st.lists(st.tuples(st.integers(1, 64), st.floats(0.01, 10), st.floats(0, 1)), min_size=1, max_size=30)


@given(steps=STEPS, window=st.integers(1, 10))
def test_only_the_window_counts(steps, window):
    meter = RateMeter(window)
    for images, seconds, wait in steps:
        meter.add(images, seconds, wait * seconds)
    recent = steps[-window:]
    seconds = sum(s for _, s, _ in recent)
    assert meter.rate == pytest.approx(sum(i for i, _, _ in recent) / seconds)
    assert meter.seconds_per_step == pytest.approx(seconds / len(recent))
    assert meter.waiting_share == pytest.approx(sum(s * w for _, s, w in recent) / seconds)
    rates = [i / s for i, s, _ in recent]
    assert min(rates) * 0.999 <= meter.rate <= max(rates) * 1.001


def test_nothing_seen_is_no_rate():
    meter = RateMeter()
    assert (meter.rate, meter.seconds_per_step, meter.waiting_share) == (0, 0, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1:00"),
        (725, "12:05"),
        (12000, "3:20:00"),
        (86400 * 2 + 5 * 3600, "2 d 05:00"),
    ],
)
def test_durations(seconds, text):
    assert duration_text(seconds) == text
