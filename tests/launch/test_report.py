"""The report of runs: what it shows of whole and of broken ones, in a browser, and that it stays small."""

from __future__ import annotations

import json
import math
import os
import re

import pytest
from browser import needs_browser, shown
from PIL import Image
from run_files import NOW, steps, write_beat, write_metrics, write_status
from typer.testing import CliRunner

from piip_scale.cli.app import app
from piip_scale.launch.bottleneck import what_limits
from piip_scale.launch.run_curves import read_curves

EVIL = "<script>window.ran=1</script><img src=x onerror='window.ran=1'>\"'&\x1b\udce9"


def step_line(step, **more):
    times = {"time/step_ms": 500.0, "time/data_wait_ms": 20.0, "time/backward_ms": 300.0, "time/forward_ms": 150.0}
    values = {"loss/total": 3 / step, "throughput/images_per_second": 16.0, "memory/peak_gib": 60.0}
    return {"step": step, "kind": "step", **values, "throughput/mfu": 0.4, **times, **more}


def make_run(folder, *, lr=1e-4, lines=()):
    write_status(folder, "running", 41)
    start = {"step": 1, "kind": "start", "start/imports_seconds": 1.0, "total_steps": 100}
    evaluation = {
        "step": 20,
        "kind": "evaluation",
        "eval/box_ap": 0.3,
        "eval/box_ap_s": -1,
        "eval/per_class/box_ap50/cat": 0.125,
        "eval/per_class/box_ap50/dog": 0.75,
    }
    again = [start | {"step": 21}, {"step": 21, "kind": "event", "text": f"resumed {EVIL}"}]
    write_metrics(
        folder, [start, *map(step_line, range(1, 21)), evaluation, *again, *map(step_line, range(21, 42)), *lines]
    )
    (folder / "config.py").write_text(f"model = {{'branches': [{{'depth': 2}}]}}\noptimizer = {{'lr': {lr}}}\n")
    (folder / "environment.json").write_text(json.dumps({"command": ["piip-scale", "train", EVIL]}))
    return folder


def report(*arguments, exit_code=0):
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert done.exit_code == exit_code, done.output
    return str(done.exception) if exit_code else done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / f"one {EVIL}".replace("/", "|"))
    write_beat(first, host="elsewhere", step=41)
    superseded = [{"step": 20, "kind": "superseded"}, step_line(33)]
    (first / "metrics.superseded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in superseded))
    second = make_run(folder / "two", lr=2e-4, lines=[step_line(42, **{"loss/total": "nan"})])
    write_status(second, "failed", 42, f"rank 3 met a loss that is not finite {EVIL}")
    # Of two evaluations the newer; the worst come first, and what is no picture is left out.
    for name, width, ago_s in (("scores", 40, 0), ("before", 50, 100)):
        folder = second / name / "pictures"
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("none")
        for number in range(4):
            for kind in ("best", "worst"):
                Image.new("RGB", (width + number, 30)).save(folder / f"{kind}_{number}.jpg")
        os.utime(folder, (NOW - ago_s, NOW - ago_s))
    out = folder / "out" / "report.html"
    assert "2 run(s)" in report(first, second, "--out", out)
    return out


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_two_runs_on_a_desk_and_on_a_phone(page, tmp_path, dark):
    for frame in shown(page.read_bytes(), tmp_path, dark=dark):
        words = frame["words"]
        assert {"running", "failed"} <= set(words.split())
        assert "41 of 100, 41%" in words
        assert "1, 13 steps done again" in words
        assert "rank 3 met a loss that is not finite <script>" in words
        assert "Computing: loaders keep up, 4% of a step waits for data." in words
        for told in ("waiting for data 4%", "forward 30%", "backward 60%", "A step takes 500 ms."):
            assert told in words
        assert frame["charts"][:3] == ["Loss, total", "box AP", "Images/s, all ranks"]
        assert frame["marks"] > 2
        assert frame["paths"] > 10
        assert frame["images"] == [40, 41, 42, 43, 40, 41]
        assert "1 value(s) not finite, in red" in words
        assert "-1 is no score" in words
        evaluation = words[words.index("Last evaluation") :].split()
        assert evaluation.count("0.300") == evaluation.count("0.125") == 2
        assert evaluation.index("dog") < evaluation.index("cat")
        differs = words[words.index("Where their configs differ") :]
        assert "optimizer.lr" in differs
        assert "model.branches" not in differs


def test_a_run_alone_shows_whether_each_branch_is_used(tmp_path):
    tags = [f"branches/{name}" for name in ("grad_norm_branch_0", "grad_norm_heads", "merging_weight_of_branch_0")]
    used = dict.fromkeys([*tags, "branches/gamma_into_branch_1"], 0.5) | {"run/goodput": 0.9, "run/attempt": 2}
    for name in ("one", "two"):
        make_run(tmp_path / name, lines=[step_line(42, **used)])
    report(tmp_path / "one", "--out", tmp_path / "alone.html")
    report(tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both.html")
    for page, count, is_in_details in (("alone", 1, False), ("both", 2, True)):
        text = (tmp_path / f"{page}.html").read_text()
        details = text.index("<details")
        assert "Goodput: share of all GPU time in steps that stay" in text[:details]
        for title in ("Gradient norm by part", "Interactions&#x27; gammas", "Weight in the merged sum, by branch"):
            assert text.count(f">{title}") == count, title
            assert (text.index(f">{title}") > details) == is_in_details
        assert ">branches<" not in text


def test_what_is_wrong_stays_on_the_card_whatever_happens_next(tmp_path):
    warned = {"warnings": [{"step": 12, "text": f"branch 1 learns nothing {EVIL}"}, {"step": "x"}, 5]}
    saved = {"step": 43, "kind": "event", "text": "saved step_00000043"}
    run = make_run(tmp_path / "run", lines=[step_line(42, **warned), saved])
    write_beat(run, step=42)
    report(run, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    card = text[text.index("<article") : text.index("</article>")]
    assert "step 12: branch 1 learns nothing &lt;script&gt;" in card
    assert "saved step_00000043" in card
    assert text.count('class="warned"') == 1
    # As soon as it is over, which a step says by saying nothing of it.
    make_run(run, lines=[step_line(42, **warned), step_line(43)])
    report(run, "--out", tmp_path / "page.html")
    assert "warned" not in (tmp_path / "page.html").read_text().partition("<body>")[2]


def test_half_a_million_steps_are_a_small_file_and_no_extreme_is_lost(tmp_path):
    run = tmp_path / "long"
    write_status(run, "done", 500_000)
    count = 10_000
    with (run / "metrics.jsonl").open("w") as file:
        for number in range(count):
            loss = 77.0 if number == 7_777 else 1.0 + math.sin(number)
            file.write(f'{{"step": {number * 50 + 50}, "kind": "step", "loss/total": {loss}, "train/lr": {number}}}\n')
        file.write('{"step": 500000, "kind": "st')
    curves = read_curves(run)
    loss = curves.traces["loss/total"]
    assert (loss.high, curves.bad_lines) == (77.0, 1)
    assert sum(span.count for span in loss.spans) == count
    assert sum(span.total for span in curves.traces["train/lr"].spans) == pytest.approx(count * (count - 1) / 2)
    assert (loss.spans[0].first_x, loss.spans[-1].last_x) == (50, 500_000)
    report(run, "--out", tmp_path / "long.html")
    assert (tmp_path / "long.html").stat().st_size < 60_000


def test_broken_runs_are_shown_as_far_as_they_can_be_read(tmp_path):
    empty, odd, bare, nan = (tmp_path / name for name in ("empty", "odd", "bare", "nan"))
    write_status(nan, "failed", 1)
    write_metrics(nan, [{"step": 1, "kind": "step", "loss/total": "nan"}])
    write_status(empty, "failed", 0, "out of memory")
    write_status(bare, "stopped", 3)
    write_metrics(bare, steps(1, 3))
    write_status(odd, "running", 3)
    (odd / "metrics.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n{"step": "x"}\n{"step": 1, "kind": "step", "loss/total": 1e999}\n{"st'
    )
    (odd / "config.py").write_text("import os\nmodel = os.environ\ntrain = {'steps': 3}\nthis is no Python")
    (odd / "environment.json").write_text("[")
    (odd / "metrics.superseded.jsonl").write_text('{"kind": "superseded", "step": 2}\n')
    (odd / "x" / "pictures" / "worst_1.jpg").mkdir(parents=True)
    for out in ("a.html", "b.html"):
        report(tmp_path, "--out", tmp_path / out)
        text = (tmp_path / out).read_text()
    for told in (
        "out of memory",
        "it wrote no metrics",
        "4 line(s) of its metrics",
        "no finite value",
        "lost",
        "stopped",
    ):
        assert told in text
    for alone in (empty, nan):
        report(alone, "--out", tmp_path / "b.html")


def test_what_is_asked_wrongly_is_one_line_and_nothing_is_written_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_status(tmp_path / "run", "done", 3)
    (tmp_path / "report.html").write_text("<p>mine")
    assert "no report is there, but another file" in report("run", exit_code=1)
    assert (tmp_path / "report.html").read_text() == "<p>mine"
    assert "this is a folder" in report("run", "--out", tmp_path, exit_code=1)
    assert "no run's directory, and none in it" in report("run", tmp_path / "none", exit_code=1)
    report("run", "--out", "new/it's.html")
    report("run", "--out", "new/it's.html")


SLOW = {"ranks/slowest": 3.0, "ranks/slowest_node": "n7", "ranks/slowest_own_ms": 80.0, "ranks/fastest_own_ms": 40.0}


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ({}, "Not known"),
        ({"time/step_ms": 100.0}, "Computing"),
        ({"time/step_ms": 100.0, "time/data_wait_ms": 40.0}, "Data: 40%"),
        ({"time/step_ms": 100.0, "time/communication_ms": 60.0, "time/forward_ms": 10.0}, "Communication: for 60%"),
        ({"time/step_ms": 100.0, "time/update_ms": 55.0}, "Update: 55%"),
        (
            {"time/step_ms": 90.0, "time/communication_ms": 50.0} | SLOW,
            "A slow rank: rank 3 on n7 takes 80 ms of its own",
        ),
        ({"time/step_ms": "nan", "time/data_wait_ms": None}, "Not known"),
    ],
)
def test_what_limits_a_step_is_said_by_its_parts(line, verdict):
    assert what_limits([line]).sentences[0].startswith(verdict)


def test_a_step_that_stood_still_says_nothing_of_the_others():
    usual, still = {"time/step_ms": 100.0, "time/data_wait_ms": 40.0}, {"time/step_ms": 80_000.0}
    still["time/communication_ms"] = 79_000.0
    assert what_limits([usual] * 10 + [still]).sentences == what_limits([usual] * 10).sentences
    # Where each stands still that is what there is to say.
    assert what_limits([still] * 10).sentences[0].startswith("Communication: for 99%")


def test_what_limits_a_run_is_what_limits_it_now(tmp_path):
    waits = {"time/data_wait_ms": 400.0}
    make_run(tmp_path / "run", lines=[step_line(step, **waits if step < 80 else {}) for step in range(42, 100)])
    report(tmp_path / "run", "--out", tmp_path / "page.html")
    assert "Computing: loaders keep up, 4% of a step waits" in (tmp_path / "page.html").read_text()


def test_a_steps_parts_come_in_the_order_in_which_they_are_done():
    line = {"time/step_ms": 100.0, "time/update_ms": 5.0, "time/backward_ms": 60.0, "time/forward_ms": 25.0}
    found = what_limits([line | {"time/data_wait_ms": 10.0}])
    assert list(found.shares) == ["waiting for data", "forward", "backward", "update"]
    assert sum(found.shares.values()) == pytest.approx(1.0)


def charted(folder, values, tag="branches/gamma_into_branch_0"):
    """The page of a run alone with these values of a tag, of one step each."""
    run = make_run(folder, lines=[step_line(42 + number, **{tag: value}) for number, value in enumerate(values)])
    report(run, "--out", folder / "page.html")
    return (folder / "page.html").read_text()


def test_values_that_hardly_differ_are_told_apart(tmp_path):
    text = charted(tmp_path / "run", [0.100012, 0.100048])
    figure = text[text.index(">Interactions&#x27; gammas") :].partition("</figure>")[0]
    ticks = re.findall(r'text-anchor="end">([^<]*)<', figure)
    assert len(ticks) == len(set(ticks)) > 2
    assert "branch_0 0.10005" in figure


def test_the_last_value_is_the_last_one_even_if_it_is_no_number(tmp_path):
    text = charted(tmp_path / "run", [0.5, "nan"], tag="loss/total")
    figure = text[text.index(">Loss, total") :].partition("</figure>")[0]
    assert "last nan" in figure
    assert "1 value(s) not finite" in figure


@pytest.mark.parametrize("score", [1.0, 0.99, 0.0])
def test_no_axis_of_scores_goes_beyond_one(tmp_path, score):
    run = make_run(tmp_path / "run", lines=[{"step": 42, "kind": "evaluation", "eval/mask_ap": score}])
    report(run, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    figure = text[text.index(">mask AP<") :].partition("</figure>")[0]
    ticks = [float(tick) for tick in re.findall(r'x="41[^>]*text-anchor="end">([^<]*)<', figure)]
    assert len(ticks) > 1
    assert 0 <= min(ticks) < max(ticks) <= 1


def test_a_class_that_only_one_of_two_runs_has_is_not_one_without_objects(tmp_path):
    for name, scores in (("a", {"cat": 0.25, "dog": -1}), ("b", {"horse": 0.75, "dog": 0.5})):
        values = {f"eval/per_class/box_ap50/{kind}": score for kind, score in scores.items()}
        make_run(tmp_path / name, lines=[{"step": 42, "kind": "evaluation", "eval/per_class/odd": 0.5, **values}])
    report(tmp_path, "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    found = {
        kind: re.findall("<small>([^<]*)<", text[text.index(f"<span>{kind}</span>") :].partition("</li>")[0])
        for kind in ("cat", "dog", "horse")
    }
    assert found == {"cat": ["0.250", "-"], "dog": ["-1", "0.500"], "horse": ["-", "0.750"]}
