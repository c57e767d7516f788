"""What the layouts' benchmark makes of its measurements: rates, and who was right."""

from __future__ import annotations

import pytest
from sections.network_layouts import CALIBRATED, Measured, Predictions, Rates, Setting, report

RATES = Rates(slowness=1.5, message_s=4e-3, byte_s=3e-9)
OTHER = Setting(2, 2, 150)


class Known(Predictions):
    """Of ranks whose rates are known."""

    def __init__(self):
        self._planners = {}
        self.rates = RATES


@pytest.fixture(scope="module")
def known():
    return Known()


def test_rates_are_found_in_steps_that_they_made(known):
    found = Predictions({layout: known.seconds(CALIBRATED, layout) for layout in CALIBRATED.layouts})
    assert found.rates == pytest.approx(RATES, rel=1e-3)


def test_a_report_says_how_many_are_close_and_whose_pick_is_the_fastest(known):
    steps = {(of, layout): known.seconds(of, layout) for of in (CALIBRATED, OTHER) for layout in of.layouts}
    # One layout takes half as long as any plan can know, and is then the fastest.
    steps[OTHER, "stage=3"] = min(steps.values()) / 2
    text = report({key: Measured(seconds, 0.0) for key, seconds in steps.items()})
    assert f"Of {len(steps)} step times {len(steps) - 1} are predicted within 20%" in text
    assert "The layout that is predicted to be the fastest is it in 1 of 2 settings" in text
