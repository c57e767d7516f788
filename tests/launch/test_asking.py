"""What a user may ask of a job, and what an error tells where that cannot be meant."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from orders import order

from piip_scale.errors import ConfigError
from piip_scale.launch.options import (
    _OURS,
    ALLOWED,
    check_options,
    options_of_environment,
    parse_options,
    submitting_environment,
    time_limit_s,
)
from piip_scale.launch.profiles import load_profile, profile_names
from piip_scale.launch.submitting import plan_submission
from piip_scale.launch.sweeps import choose_points, split_values, sweep_points
from piip_scale.world import plain_environment


def error_of(function, *arguments):
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    assert "\n" not in caught.value.line
    return caught.value.line


@pytest.mark.parametrize("name", _OURS)
def test_options_that_follow_from_the_run_are_refused_with_what_sets_them(name):
    assert f"--sbatch: option {name}; it follows from {_OURS[name]}" in error_of(
        parse_options, [f"{name}=1"], "--sbatch"
    )


@pytest.mark.parametrize("name", ["partitoin", "x", "", "Time", "gpus_per_node"])
def test_unknown_options_are_told_with_the_valid_ones(name):
    line = error_of(check_options, {name: "1"}, "profile p")
    assert f"profile p: unknown option {name}" in line
    assert ", ".join(ALLOWED) in line


def test_a_near_miss_is_named():
    assert "did you mean partition" in error_of(parse_options, ["partitoin=gpu"], "--sbatch")


@pytest.mark.parametrize("value", ["", "a\nb", 1.5, ["a"], None])
def test_values_are_one_line(value):
    assert "option mem" in error_of(check_options, {"mem": value}, "here")


def test_options_are_read_with_and_without_dashes_and_values():
    found = parse_options(["--mail-type=FAIL", "contiguous", "comment=a=b"], "--sbatch")
    assert found == {"mail-type": "FAIL", "contiguous": True, "comment": "a=b"}


def test_no_variable_of_the_shell_changes_what_the_script_says():
    shell = {"SBATCH_PARTITION": "a", "SBATCH_TIMELIMIT": "5", "SBATCH_REQUEUE": "1", "SLURM_JOB_ID": "7"}
    shell |= {"SLURM_CONF": "/etc/x", "HOME": "/h"}
    # Filters and forms that somebody likes on the screen, a question that scancel asks.
    shell |= {"SQUEUE_STATES": "all", "SQUEUE_PARTITION": "b", "SCANCEL_INTERACTIVE": "1", "SLURM_TIME_FORMAT": "%s"}
    assert submitting_environment(shell) == {"SLURM_CONF": "/etc/x", "HOME": "/h"}
    kept = {"SLURM_CONF": "/etc/x", "HOME": "/h", "SLURM_JOB_ID": "7"}
    assert {name for name in plain_environment(shell) if not name.startswith("SBATCH_")} == kept.keys()
    assert options_of_environment(shell) == {"partition": "a", "time": "5"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("5", 300), ("5:30", 330), ("1:02:03", 3723), ("2-0", 172800), ("1-2:30", 95400), ("1-02:03:04", 93784)),
        *(("UNLIMITED", None), ("", None), ("a", None), ("1:2:3:4", None), ("x-1", None), ("-5", None)),
    ],
)
def test_time_limits_are_read_as_slurm_does(text, seconds):
    assert time_limit_s(text) == seconds


def test_a_limit_leaves_time_to_save():
    for limit in ("5", "0:30"):
        assert "longer than the 300 s before its end" in error_of(plan_submission, order(options={"time": limit}))
    assert "#SBATCH --time=6\n" in plan_submission(order(options={"time": "6"})).script


def profile_error(tmp_path, text):
    path = tmp_path / "site.toml"
    path.write_text(text)
    return error_of(load_profile, str(path))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("moduels = ['a']", ["unknown profile", "site.toml: key moduels", "did you mean modules", "valid keys:"]),
        ("requeue = 'yes'", ["key requeue: got 'yes'", "valid boolean"]),
        ("[sbatch]\npartion = 'a'", ["unknown option partion", "did you mean partition"]),
        ("[sbatch]\nnodes = 2", ["option nodes; it follows from --nodes and --spares"]),
        ("[sbatch]\ntime = 1.5", ["key sbatch: got 1.5"]),
        ("[environment]\n'A B' = '1'", ["'A B' is no name of a variable"]),
        ("[environment]\nA = 1", ["key environment: got 1"]),
        ('setup = ["a\\nb"]', ["each entry is one line"]),
        ("gpu_request = 'all'", ["key gpu_request: got 'all'", "gres"]),
        ("[container]\nkind = 'pyxis'", ["key container.image is missing"]),
        ("[container]\nkind = 'pyxis'\nimage = 'a'", ["container needs python"]),
        ("python = 'p'\n[container]\nkind = 'docker'\nimage = 'a'", ["key container.kind: got 'docker'"]),
        ("x = = 1", ["site.toml cannot be read"]),
    ],
)
def test_profiles_are_checked(tmp_path, text, parts):
    line = profile_error(tmp_path, text)
    for part in parts:
        assert part in line


def test_unknown_profiles_are_told_with_those_there_are(tmp_path):
    line = error_of(load_profile, "infiniban")
    assert "did you mean infiniband" in line
    for name in profile_names():
        assert name in line
    assert "profile file not found" in error_of(load_profile, str(tmp_path / "none.toml"))


def test_a_profile_may_lie_anywhere(tmp_path):
    path = tmp_path / "it's mine.toml"
    path.write_text(
        "modules = ['a/1']\nsignal_lead_s = 60\ngpu_memory_gib = 80\n[sbatch]\n"
        "qos = 'x'\nexclusive = true\nbegin = 2026-12-01T08:00:00"
    )
    profile = load_profile(str(path))
    assert (profile.modules, profile.signal_lead_s, profile.gpu_memory_gib) == (("a/1",), 60, 80.0)
    assert profile.sbatch == {"qos": "x", "exclusive": True, "begin": "2026-12-01T08:00:00"}


def test_a_sweep_is_every_combination():
    points = sweep_points(["optimizer.lr=1e-4,2e-4", "data.augment.crop_px=(64, 64),None"])
    assert [point.overrides for point in points] == [
        ("optimizer.lr=1e-4", "data.augment.crop_px=(64, 64)"),
        ("optimizer.lr=1e-4", "data.augment.crop_px=None"),
        ("optimizer.lr=2e-4", "data.augment.crop_px=(64, 64)"),
        ("optimizer.lr=2e-4", "data.augment.crop_px=None"),
    ]
    assert [point.name for point in points][:2] == ["0-lr=1e-4-crop_px=_64_64", "1-lr=1e-4-crop_px=None"]


@pytest.mark.parametrize("axis", ["lr", "=1", "lr=", "lr=1,,2", " =1"])
def test_axes_that_read_otherwise_are_refused(axis):
    assert "--sweep" in error_of(sweep_points, [axis])


def test_a_sweep_has_limits():
    assert "each key once" in error_of(sweep_points, ["a=1", "a=2"])
    assert "at most 1000" in error_of(sweep_points, [f"{key}=" + ",".join("1" * 11) for key in "abc"])


def test_an_array_chooses_among_the_runs():
    points = sweep_points(["a=" + ",".join(map(str, range(6)))])
    chosen, limit = choose_points(points, "0-1,4%2")
    assert ([point.index for point in chosen], limit) == ([0, 1, 4], "%2")
    assert choose_points(points, "%3") == (points, "%3")
    assert choose_points(points, "") == (points, "")
    for text in ("6", "0-6", "x", "1-", "1,,2", "0%0", "0%x", "3-1", "0-99999999999"):
        assert "--array" in error_of(choose_points, points, text)


VALUES = st.lists(st.text("ab01.-", min_size=1), min_size=1, max_size=4)


@given(st.lists(VALUES, min_size=1, max_size=3))
def test_points_are_numbered_named_apart_and_complete(axes):
    texts = [f"k{index}={','.join(values)}" for index, values in enumerate(axes)]
    points = sweep_points(texts)
    assert len(points) == math.prod(map(len, axes))
    assert [point.index for point in points] == list(range(len(points)))
    assert len({point.name for point in points}) == len(points)
    assert all("/" not in point.name for point in points)


@given(st.lists(st.sampled_from(["1", "(1, 2)", "[1,[2,3]]", "'a,b'", '"x,)"', "{'a': 1, 'b': 2}"]), min_size=1))
def test_commas_inside_values_do_not_split_them(values):
    assert split_values(",".join(values)) == values
