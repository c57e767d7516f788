"""Tells of some steps as a training would: run by test_telemetry.py in a process of its own."""

import sys
from pathlib import Path

from piip_scale.errors import RunError
from piip_scale.logging import configure_logging, get_logger
from piip_scale.telemetry import EvaluationRecord, StepRecord, Telemetry
from piip_scale.telemetry.trackers import TrackedRun


def main(run_dir, num_steps, *names):
    configure_logging()
    telemetry = Telemetry(run_dir, total_steps=num_steps)
    telemetry.track(names, TrackedRun(run_dir, "digits"))
    get_logger().info("a message beside the bar")
    try:
        for step in range(1, num_steps + 1):
            losses = {"loss_cls": 1.0 / step, "loss_bbox": 0.25}
            telemetry.step(StepRecord(step, losses, 1e-4, 4, 0.5, 0.1, 1 << 30))
        telemetry.evaluation(num_steps, EvaluationRecord({"box_ap": 0.5}))
    finally:
        telemetry.close()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    except RunError as error:
        print(error.line, file=sys.stderr)
        sys.exit(error.exit_code)
