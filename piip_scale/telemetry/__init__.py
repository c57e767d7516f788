"""What a run logs: TensorBoard, JSON lines, the progress bar."""

from piip_scale.telemetry.records import EvaluationRecord, SaveRecord, StepRecord
from piip_scale.telemetry.telemetry import Telemetry
