import io
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_intervals import interval
from sections.file_operations import count_operations
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from piip_scale.run.run_dir import RunDirectory
from piip_scale.telemetry import EvaluationRecord, SaveRecord, StepRecord, Telemetry, progress
from piip_scale.telemetry.jsonl import JsonLines, superseded_path
from piip_scale.telemetry.memory import memory_now_bytes, peak_memory_bytes

WRITER = Path(__file__).with_name("metrics_writer.py")


def record(step, **changes):
    values = {
        "step": step,
        "losses": {"loss_cls": 1.0 / step, "loss_bbox": 0.25, "acc": 90.0},
        "lr": 1e-4 * step,
        "images": 4,
        "step_seconds": 0.5,
        "data_wait_seconds": 0.125,
        "forward_seconds": 0.0625,
        "backward_seconds": 0.25,
        "memory_bytes": 3 << 30,
        "num_ranks": 2,
        "memory_now_bytes": {"host": 2 << 30},
        "grad_norm": 2.0,
        "interval": interval(),
    }
    return StepRecord(**(values | changes))


def curves(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def write_steps(run_dir, first, last, **options):
    told = io.StringIO()
    telemetry = Telemetry(run_dir, total_steps=6, first_step=first, stream=told, **options)
    for step in range(first + 1, last + 1):
        telemetry.step(record(step))
    telemetry.evaluation(last, EvaluationRecord({"box_ap": 0.5}))
    telemetry.event(last, "saved checkpoint")
    telemetry.close()
    return told.getvalue()


def test_a_save_is_metrics_and_a_line(tmp_path):
    told = io.StringIO()
    telemetry = Telemetry(tmp_path, total_steps=6, stream=told)
    telemetry.save(SaveRecord(3, "step_00000003", stall_seconds=0.25, write_seconds=2.5, num_bytes=3 << 30))
    telemetry.close()
    values = {"checkpoint/stall_seconds": 0.25, "checkpoint/write_seconds": 2.5, "checkpoint/gib": 3.0}
    assert curves(tmp_path) == {tag: [(3, value)] for tag, value in values.items()}
    saved, event = lines(tmp_path)
    assert saved == {"step": 3, "kind": "checkpoint"} | values
    assert event["text"] in told.getvalue()
    assert event["text"] == "saved step_00000003: 3.00 GiB, stood still 0.25 s, written 2.50 s later"


def test_events_read_back(tmp_path):
    write_steps(tmp_path, 0, 3)
    read = curves(tmp_path)
    steps = (1, 2, 3)
    wanted = {
        "loss/loss_cls": [(s, 1 / s) for s in steps],
        "loss/loss_bbox": [(s, 0.25) for s in steps],
        "loss/total": [(s, 1 / s + 0.25) for s in steps],
        "train/acc": [(s, 90.0) for s in steps],
        "train/lr": [(s, 1e-4 * s) for s in steps],
        "train/grad_norm": [(s, 2.0) for s in steps],
        "throughput/images_per_second": [(s, 8.0) for s in steps],
        "throughput/images_per_second_per_rank": [(s, 4.0) for s in steps],
        "memory/host_gib": [(s, 2.0) for s in steps],
        "time/step_ms": [(s, 500.0) for s in steps],
        "time/data_wait_ms": [(s, 125.0) for s in steps],
        "time/forward_ms": [(s, 62.5) for s in steps],
        "time/backward_ms": [(s, 250.0) for s in steps],
        "time/update_ms": [(s, 62.5) for s in steps],
        "memory/peak_gib": [(s, 3.0) for s in steps],
        "time/communication_ms": [(s, 125.0) for s in steps],
        "data/padding_share": [(s, 0.25) for s in steps],
        "train/clipped_share": [(s, 0.5) for s in steps],
        "throughput/gpu_utilisation": [(s, 0.75) for s in steps],
        "ranks/slowest": [(s, 3.0) for s in steps],
        "ranks/slowest_own_ms": [(s, 375.0) for s in steps],
        "ranks/fastest": [(s, 0.0) for s in steps],
        "ranks/fastest_own_ms": [(s, 250.0) for s in steps],
        "branches/grad_norm_branch_0": [(s, 1.5) for s in steps],
        "branches/grad_norm_heads": [(s, 0.5) for s in steps],
        "branches/gamma_into_branch_0": [(s, 0.125) for s in steps],
        "branches/merging_weight_of_branch_1": [(s, 1.25) for s in steps],
        "run/attempt": [(s, 2.0) for s in steps],
        "run/goodput": [(s, 0.25) for s in steps],
        "run/gpu_hours": [(s, 2.0) for s in steps],
        "run/useful_gpu_hours": [(s, 0.5) for s in steps],
        "0_overview/communication_share": [(s, 0.25) for s in steps],
        "eval/box_ap": [(3, 0.5)],
        "0_overview/loss": [(s, 1 / s + 0.25) for s in steps],
        "0_overview/images_per_second": [(s, 8.0) for s in steps],
        "0_overview/data_wait_share": [(s, 0.25) for s in steps],
        "0_overview/grad_norm": [(s, 2.0) for s in steps],
        "0_overview/box_ap": [(3, 0.5)],
    }
    assert lines(tmp_path)[0]["ranks/slowest_node"] == "n7"
    # TensorBoard opens the group whose name comes first.
    assert min(read).startswith("0_overview/")
    assert read.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert read[tag] == [(s, pytest.approx(v, rel=1e-6)) for s, v in points], tag


def test_a_steps_curves_are_one_event_for_its_file_is_opened_for_each(tmp_path):
    telemetry = Telemetry(tmp_path, total_steps=6, stream=io.StringIO())
    telemetry._board._writer.flush()
    with count_operations(tmp_path) as operations:
        for step in (1, 2, 3):
            telemetry.step(record(step))
        telemetry.close()
    assert operations == {"open": 3}


def test_a_resumed_run_writes_over_what_its_checkpoint_did_not_see(tmp_path):
    write_steps(tmp_path, 0, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "ki')
    write_steps(tmp_path, 2, 6)
    for tag, points in curves(tmp_path).items():
        wanted = [6] if tag.endswith("box_ap") else [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in points] == wanted, tag
    assert [(line["step"], line["kind"]) for line in lines(tmp_path)] == [
        *((step, "step") for step in (1, 2, 3, 4, 5, 6)),
        (6, "evaluation"),
        (6, "event"),
    ]


def test_every_nth_step_is_logged_with_the_rate_of_all(tmp_path):
    telemetry = Telemetry(tmp_path, total_steps=5, show_progress=False, log_every_steps=2)
    for step, seconds in enumerate((1.0, 3.0, 1.0, 1.0, 2.0), start=1):
        telemetry.step(record(step, step_seconds=seconds))
    telemetry.close()
    logged = [(line["step"], line["throughput/images_per_second"]) for line in lines(tmp_path)]
    assert logged == [(2, 2.0), (4, 4.0), (5, pytest.approx(8 / 3))]


def test_lines_are_json_even_where_a_loss_is_not_a_number(tmp_path):
    telemetry = Telemetry(tmp_path, total_steps=1, show_progress=False)
    telemetry.step(record(1, losses={"loss": float("nan")}, grad_norm=None))
    telemetry.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["loss/loss"] == "nan"
    assert "train/grad_norm" not in read


@given(steps=st.lists(st.integers(0, 20), max_size=12), first=st.integers(0, 20), cut=st.integers(0, 30))
def test_law_of_resumed_lines(tmp_path_factory, steps, first, cut):
    """Whatever was written and wherever a kill cut it, whole lines up to the resumed step stay, and no others."""
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    writer = JsonLines(path)
    for step in steps:
        writer.write(step, "step", {"value": step / 7})
    writer.close()
    text = path.read_text()
    whole = text[: max(len(text) - cut, 0)]
    path.write_text(whole)
    resumed = JsonLines(path, first_step=first)
    resumed.write(first + 1, "step", {})
    resumed.close()
    read = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    complete = [json.loads(line)["step"] for line in whole.splitlines() if line.endswith("}")]
    assert read == [step for step in complete if step <= first] + [first + 1]
    # Nothing is erased: what is no longer in the file is in the other.
    aside = superseded_path(path)
    moved = aside.read_text().splitlines() if aside.exists() else []
    stayed = path.read_text().splitlines()[:-1]
    assert sorted(stayed + [line for line in moved if '"superseded"' not in line]) == sorted(whole.splitlines())


def test_superseded_lines_are_where_a_run_directory_looks_for_them(tmp_path):
    run = RunDirectory(tmp_path)
    assert superseded_path(run.metrics) == run.superseded_metrics


def test_plain_lines_where_there_is_no_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 0.0)
    told = write_steps(tmp_path, 0, 6).splitlines()
    first = "step 1/6  8.00 images/s  loss 1.250 (cls 1.000  bbox 0.250)  lr 1.0e-04  data wait 25%  left 2 s"
    assert told[0] == first
    # Those between came within ten seconds.
    assert told[1].startswith("step 6/6  8.00 images/s")
    assert told[2:] == ["step 6  box_ap 0.500", "step 6  saved checkpoint"]


def test_without_progress_only_steps_are_hidden(tmp_path):
    told = write_steps(tmp_path, 0, 6, show_progress=False).splitlines()
    assert told == ["step 6  box_ap 0.500", "step 6  saved checkpoint"]


def test_a_log_of_a_week_has_no_more_lines_than_somebody_can_scroll(tmp_path, monkeypatch):
    told, clock_s = io.StringIO(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock_s[0])
    line = progress.ProgressLine(60 * 24 * 7, 0, told)
    pauses_s, before_s = [], 0.0
    for minute in range(60 * 24 * 7):
        clock_s[0] = 60.0 * minute
        if line.step(record(minute + 1)) or told.tell():
            pauses_s.append(clock_s[0] - before_s)
            before_s = clock_s[0]
            told.truncate(0)
            told.seek(0)
    assert 1000 < len(pauses_s) < 2000
    assert max(pauses_s) == 600
    assert pauses_s[:100] == [0.0] + 99 * [60.0]


def shown_events(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    text = events.Tensors("events/text_summary")[-1].tensor_proto.string_val[0].decode()
    return [line.strip() for line in text.splitlines()]


def test_the_start_is_shown_as_it_stands(tmp_path):
    telemetry = Telemetry(tmp_path, total_steps=4, stream=io.StringIO())
    telemetry.describe(0, {"config": "a = dict(\n    b=*1*)", "command": "piip-scale train x.py"})
    telemetry.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    text = {tag: events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0] for tag in ("config", "command")}
    assert text == {"config": b"    a = dict(\n        b=*1*)", "command": b"    piip-scale train x.py"}


def test_charts_by_question_name_curves_that_are_written(tmp_path):
    write_steps(tmp_path, 0, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Is it healthy?", "Is it fast?"]
    patterns = {tag for category in layout.category for chart in category.chart for tag in chart.multiline.tag}
    written = curves(tmp_path)
    idle = {pattern for pattern in patterns if not any(re.match(pattern, tag) for tag in written)}
    # What only a known GPU and a save give.
    assert idle == {"throughput/mfu", "checkpoint/stall_seconds"}


def test_memory_now_is_no_more_than_its_peak():
    device = torch.device("cpu")
    # Beyond what the kernel, which counts on each core by itself, may be wrong by.
    block = bytearray(b"x") * (64 << 20)
    del block
    assert 0 < memory_now_bytes(device)["host"] <= peak_memory_bytes(device)


def test_the_newest_text_shows_what_happened_so_far_also_before_a_failure_and_after(tmp_path):
    told = io.StringIO()
    telemetry = Telemetry(tmp_path, total_steps=40, stream=told)
    for step in range(1, 21):
        telemetry.event(step, f"saved *step_{step}*")
    telemetry.ending(20, "failed: sample is broken:\nshard_3.tar")
    telemetry.close()
    assert "broken" not in told.getvalue()
    happened = ["step 20  failed: sample is broken: shard_3.tar"]
    happened += [f"step {step}  saved *step_{step}*" for step in range(20, 0, -1)]
    assert shown_events(tmp_path) == happened
    telemetry = Telemetry(tmp_path, total_steps=40, first_step=12, stream=told)
    telemetry.event(12, "resumed")
    telemetry.close()
    assert shown_events(tmp_path) == ["step 12  resumed", *happened[9:]]


def test_one_redrawn_line_on_a_terminal(tmp_path):
    main, side = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160"}
    command = [sys.executable, WRITER, tmp_path, "20"]
    process = subprocess.Popen(command, stderr=side, env=environment)
    os.close(side)
    shown = b""
    while True:
        try:
            read = os.read(main, 4096)
        except OSError:  # Linux's way of saying that the other side is closed
            break
        if not read:
            break
        shown += read
    assert process.wait(timeout=240) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "20/20" in text
    assert "8.00 images/s  loss 0.300 (bbox 0.250  cls 0.050)" in text
    assert "step 20  box_ap 0.5" in text
    # A line of its own, above the bar and not in its middle.
    assert "a message beside the bar" in [line.strip() for line in re.split(r"[\r\n]+", text)]


@pytest.mark.parametrize("full", ["", "run/tensorboard"])
def test_a_full_disk_ends_in_one_line(tmp_path, full):
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs user namespaces to mount a small disk")
    (tmp_path / full).mkdir(parents=True, exist_ok=True)
    writing = shlex.join(map(str, (sys.executable, WRITER, tmp_path / "run", 100000)))
    script = f"mount -t tmpfs -o size=64k none {shlex.quote(str(tmp_path / full))} && {writing}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if not line.startswith(("step ", "a message"))]
    fix = "free some space on that disk, then start again"
    assert told == [f"cannot write metrics in {tmp_path}/run: No space left on device; {fix}"]


def test_memory_of_this_process():
    code = (
        "from piip_scale.telemetry.memory import peak_memory_bytes as peak; before = peak()\n"
        "block = bytearray(b'x') * (256 << 20); print(peak() - before); del block; print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    held, after = map(int, done.stdout.split())
    assert 0.9 * (256 << 20) < held < 1.2 * (256 << 20)
    assert after > 0.99 * held  # the kernel counts in batches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_the_device():
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    before, block = torch.cuda.memory_allocated(device), torch.ones(64 << 20, dtype=torch.uint8, device=device)
    assert peak_memory_bytes(device) - before == block.numel()
