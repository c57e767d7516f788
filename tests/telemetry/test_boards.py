"""What TensorBoard's own pages show beside curves: pictures, precision by recall, hyperparameters."""

import io
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
from tensorboard.backend.event_processing import data_provider, plugin_event_accumulator, plugin_event_multiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups
from tensorboard.plugins.pr_curve.pr_curves_plugin import PrCurvesPlugin
from tensorboard.util.tensor_util import make_ndarray
from test_telemetry import curves, lines, record

from piip_scale.launch.run_pictures import last_pictures
from piip_scale.run.run_dir import RunDirectory
from piip_scale.telemetry import EvaluationRecord, Telemetry


def jpeg(grey):
    content = io.BytesIO()
    PIL.Image.new("L", (40, 20), grey).convert("RGB").save(content, format="JPEG")
    return content.getvalue()


def evaluation(value):
    curve = np.stack([np.arange(101)[::-1], np.ones(101), np.arange(101), np.full(101, value), np.linspace(1, 0, 101)])
    metrics = {"box_ap": value, "box_ap_l": -1.0, "per_class/box_ap50/a/b": value}
    return EvaluationRecord(metrics, {"box": curve, "box/a/b": curve}, {"image 7": jpeg(round(255 * value))})


def test_pictures_curves_and_classes_of_evaluations_are_there_once(tmp_path):
    """As TensorBoard reads them, of a run that was killed and one that had ended before it was resumed."""
    for first, values in ((0, {2: 0.2, 4: 0.4}), (3, {4: 0.5, 6: 0.6}), (6, {6: 0.7})):
        telemetry = Telemetry(tmp_path, total_steps=6, first_step=first, stream=io.StringIO())
        for step, value in values.items():
            telemetry.evaluation(step, evaluation(value))
        telemetry.close()
    wanted = {2: 0.2, 4: 0.5, 6: 0.6}
    read = curves(tmp_path)
    assert {"eval/box_ap", "per_class/box_ap50/a/b"} == {tag for tag in read if not tag.startswith("0_overview")}
    for points in read.values():
        assert dict(points) == pytest.approx(wanted)
        assert len(points) == 3
    assert [line["eval/per_class/box_ap50/a/b"] for line in lines(tmp_path)] == [*wanted.values()]
    # The server's own reader: the older one keeps tensors that were superseded.
    events = plugin_event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"), tensor_size_guidance={})
    events.Reload()
    for one in events.Tensors("truth_beside_found/image 7"):
        assert list(one.tensor_proto.string_val) == [b"40", b"20", jpeg(round(255 * wanted[one.step]))]
    tags = ("truth_beside_found/image 7", "pr/box")
    assert [[one.step for one in events.Tensors(tag)] for tag in tags] == [[*wanted]] * 2
    plugin = PrCurvesPlugin(SimpleNamespace(data_provider=None, sampling_hints=None))
    for one in events.Tensors("pr/box"):
        shown = plugin._make_pr_entry(one.step, one.wall_time, make_ndarray(one.tensor_proto))
        assert shown["precision"] == pytest.approx([wanted[one.step]] * 101)
        assert shown["recall"] == pytest.approx(shown["thresholds"][::-1])
        assert shown["false_negatives"] == [*range(101)]
    assert [one.step for one in events.Tensors("pr_per_class/box/a/b")] == [*wanted]
    metadata = events.SummaryMetadata("pr/box")
    assert metadata.plugin_data.plugin_name == "pr_curves"


def test_pictures_of_the_newest_evaluation_are_files_that_the_report_finds(tmp_path):
    telemetry = Telemetry(tmp_path, total_steps=6, stream=io.StringIO())
    for step, keys in ((2, ("a/../b", "c d", "e" * 200)), (4, ("a/../b", "f"))):
        telemetry.evaluation(step, EvaluationRecord({"box_ap": 0.5}, {}, {key: jpeg(10 * step) for key in keys}))
    telemetry.evaluation(6, EvaluationRecord({"box_ap": 0.5}))
    telemetry.close()
    found = last_pictures(tmp_path)
    assert [picture.name for picture in found] == [
        f"last_evaluation/pictures/{name}.jpg" for name in ("1_a_.._b", "2_f")
    ]
    assert {picture.content for picture in found} == {jpeg(40)}
    RunDirectory(tmp_path).start_over()
    assert last_pictures(tmp_path) == []


def sessions(folder):
    """Hyperparameters and metrics by run, as the plugin's own page has them."""
    events = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder))
    events.Reload()
    provider = data_provider.MultiplexerDataProvider(events, str(folder))
    context, asked = backend_context.Context(TBContext(data_provider=provider)), RequestContext()
    told = get_experiment.Handler(asked, context, "", api_pb2.GetExperimentRequest()).run()
    metrics = [api_pb2.ColParams(metric=one.name) for one in told.metric_infos]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, col_params=metrics, allowed_statuses=range(4)
    )
    found = list_session_groups.Handler(asked, context, "", request).run()
    return [one.name for one in told.hparam_infos], [one.name.tag for one in told.metric_infos], found.session_groups


def test_runs_of_a_sweep_are_sessions_of_their_settings_and_last_metrics(tmp_path):
    for name, lr in (("a", 0.1), ("b", 0.2)):
        for first, last in ((0, 2), (2, 4)):
            telemetry = Telemetry(tmp_path / name, total_steps=4, first_step=first, stream=io.StringIO())
            telemetry.describe(first, {}, {"optimizer.lr": lr, "train.compile": "off", "model.x": (1, 2)})
            telemetry.step(record(last))
            telemetry.evaluation(last, evaluation(lr * last))
            telemetry.close("done" if name == "a" and last == 4 else "stopped")
    keys, metrics, groups = sessions(tmp_path)
    assert sorted(keys) == ["model.x", "optimizer.lr", "train.compile"]
    # The page shows the first five: those of the overview.
    assert all(tag.startswith("0_overview/") for tag in metrics[:5])
    assert len(groups) == 2
    for group, lr, status in zip(groups, (0.1, 0.2), (api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN), strict=True):
        assert group.hparams["optimizer.lr"].number_value == lr
        assert group.hparams["model.x"].string_value == "(1, 2)"
        (session,) = group.sessions
        assert session.status == status
        values = {one.name.tag: (one.value, one.training_step) for one in session.metric_values}
        assert values["0_overview/box_ap"] == (pytest.approx(4 * lr), 4)
