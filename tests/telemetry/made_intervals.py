"""An interval of a run in which all is well, and what a test changes in it."""

from __future__ import annotations

from piip_scale.telemetry.records import IntervalRecord, RankPace


def interval(**changes):
    values = {
        "data_wait_share": 0.125,
        "step_seconds": 0.5,
        "message_seconds": 0.125,
        "padding_share": 0.25,
        "clipped_share": 0.5,
        "slowest": RankPace(3, "n7", 0.375, 0.0),
        "fastest": RankPace(0, "n1", 0.25, 0.0),
        "gpu_utilisation": 0.75,
        "gradient_norms": {"branch 0": 1.5, "heads": 0.5},
        "gammas": {"0": 0.125},
        "merging_weights": {"1": 1.25},
        "attempt": 2,
        "gpu_seconds": 7200.0,
        "useful_gpu_seconds": 1800.0,
    }
    return IntervalRecord(**(values | changes))
