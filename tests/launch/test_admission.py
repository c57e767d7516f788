"""What Slurm says of a job before it is sent: at once, once nodes are back, or never; and limits against the lead."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from orders import order

from piip_scale.errors import ConfigError, SlurmError
from piip_scale.launch import queue
from piip_scale.launch.admission import check_admission
from piip_scale.launch.limits import absolute_moment, check_lead, given_limits
from piip_scale.launch.profiles import Profile
from piip_scale.launch.render import option_lines
from piip_scale.launch.submitting import plan_submission

PARTITION = "PartitionName={name} Default={default} QoS={qos} DefaultTime={least} MaxTime={most} Nodes=n[1-3]\n"
NODE = (
    "NodeName={name} NodeAddr={name} CPUTot=8 Gres=gpu:8 ActiveFeatures=ib State={state} Partitions=gpu Reason=maint\n"
)
UNAVAILABLE = "allocation failure: Requested node configuration is not available\n"


class Cluster:
    """Slurm's commands as a test wants them to answer."""

    def __init__(self, states=("IDLE",) * 3, least="NONE", most="UNLIMITED", qos="N/A", walls="", refusal="") -> None:
        self.nodes = "".join(NODE.format(name=f"n{index + 1}", state=state) for index, state in enumerate(states))
        self.partitions = PARTITION.format(name="gpu", default="YES", qos=qos, least=least, most=most)
        self.partitions += PARTITION.format(name="long", default="NO", qos="N/A", least="1-00:00:00", most="UNLIMITED")
        self.walls, self.refusal, self.commands = walls, refusal, []

    def __call__(self, *arguments, prefix="", **_):
        self.commands.append(arguments)
        if arguments[:2] == ("sbatch", "--test-only") and self.refusal:
            raise SlurmError(f"{prefix}: {self.refusal.strip()}")
        answers = {"node": self.nodes, "partition": self.partitions, "qos": self.walls}
        return next((answers[word] for word in arguments if word in answers), "Job 1 to start")


def ask(monkeypatch, cluster, **changes):
    monkeypatch.setattr(queue, "_run", cluster)
    asked = order(**{"options": {}, "ranks_per_node": 1} | changes)
    submission = plan_submission(asked)
    return check_admission(submission.script, submission.specs[0], submission.options)


def refused(monkeypatch, cluster, **changes):
    with pytest.raises((ConfigError, SlurmError)) as caught:
        ask(monkeypatch, cluster, **changes)
    assert "\n" not in caught.value.line
    return caught.value.line


def test_what_slurm_takes_needs_no_word(monkeypatch):
    assert ask(monkeypatch, Cluster()) == []


@pytest.mark.parametrize("state", ["IDLE+DRAIN", "DOWN", "DOWN*", "ALLOCATED+DRAIN", "IDLE*", "MIXED+MAINT"])
def test_nodes_out_of_service_are_a_reason_to_wait(monkeypatch, state):
    (note,) = ask(monkeypatch, Cluster(states=("IDLE", state, state), refusal=UNAVAILABLE))
    assert note.startswith("the job will wait: it needs 2 nodes, and out of service are n2 (")
    assert "(maint)" in note


@pytest.mark.parametrize(
    ("states", "changes"),
    [
        (("IDLE",) * 3, {}),
        (("DOWN",) * 3, {"num_nodes": 4}),
        (("DOWN",) * 3, {"options": {"exclude": "n[1-2]"}}),
        (("DOWN",) * 3, {"options": {"constraint": "h100"}}),
        (("DOWN",) * 3, {"options": {"partition": "long"}}),
        (("DOWN",) * 3, {"options": {"nodelist": "n9"}}),
        (("DOWN",) * 3, {"ranks_per_node": 16}),
    ],
)
def test_what_no_node_in_or_out_of_service_can_give_is_refused(monkeypatch, states, changes):
    line = refused(monkeypatch, Cluster(states=states, refusal=UNAVAILABLE), **changes)
    assert line == "Slurm would refuse the job: allocation failure: Requested node configuration is not available"


def test_a_node_that_was_named_is_the_one_that_is_waited_for(monkeypatch):
    cluster = Cluster(states=("DOWN", "DOWN", "IDLE"), refusal=UNAVAILABLE)
    (note,) = ask(monkeypatch, cluster, options={"nodelist": "n[2-3]"})
    assert "n2 (down" in note
    assert "n1" not in note


def test_other_refusals_are_slurms_own(monkeypatch):
    line = refused(monkeypatch, Cluster(states=("DOWN",) * 3, refusal="invalid partition specified: nope"))
    assert "invalid partition specified: nope" in line


@pytest.mark.parametrize(
    ("cluster", "options", "source"),
    [
        (Cluster(least="00:02:00"), {}, "the default of partition gpu"),
        (Cluster(most="00:05:00"), {}, "the longest of partition gpu"),
        (Cluster(walls="short|00:05:00\n"), {"qos": "short"}, "the longest of QOS short"),
        (Cluster(qos="short", walls="short|00:05:00\n"), {}, "the longest of QOS short"),
        (Cluster(least="00:02:00"), {"partition": "long,gpu"}, "the default of partition gpu"),
    ],
)
def test_a_limit_that_the_site_sets_leaves_time_to_save(monkeypatch, cluster, options, source):
    line = refused(monkeypatch, cluster, options=options)
    assert f"time limit ({source})" in line
    assert "longer than the 300 s before its end" in line
    assert ask(monkeypatch, cluster, options=options, profile=Profile(signal_lead_s=60)) == []
    assert ask(monkeypatch, cluster, options=options | {"time": "1:00:00"}) == []


def test_a_site_without_limits_or_accounts_sets_none(monkeypatch):
    assert ask(monkeypatch, Cluster(), options={"qos": "none", "partition": "long"}) == []

    def without_accounts(*arguments, **more):
        if arguments[0] == "sacctmgr":
            raise SlurmError("sacctmgr is not on this machine")
        return Cluster()(*arguments, **more)

    assert ask(monkeypatch, without_accounts, options={"qos": "any"}) == []


def test_a_limit_down_to_which_slurm_may_shorten_a_job_counts():
    with pytest.raises(ConfigError, match=r"time limit \(--time-min\)"):
        check_lead(given_limits({"time": "1:00:00", "time-min": "5"}), 300)
    check_lead(given_limits({"time": "UNLIMITED"}), 300)


def test_hold_begin_and_dependency_are_of_the_first_job_alone(monkeypatch):
    options = {"hold": True, "begin": "now+1hour", "dependency": "afterok:7", "deadline": "now+2days", "nice": 5}
    cluster = Cluster()
    monkeypatch.setattr(queue, "_run", cluster)
    submission = plan_submission(order(options=options))
    assert not {f"--{name}" for name in ("hold", "begin", "dependency") if f"#SBATCH --{name}" in submission.script}
    assert "#SBATCH --nice=5" in submission.script
    check_admission(submission.script, submission.specs[0], submission.options)
    test = next(command for command in cluster.commands if command[0] == "sbatch")
    assert test == ("sbatch", "--test-only", "--hold", "--begin=now+1hour", "--dependency=afterok:7")


def test_a_deadline_stays_where_it_was_first(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    assert absolute_moment("now+2days", 0.0) == "1970-01-03T00:00:00"
    assert absolute_moment("now+90", 0.0) == "1970-01-01T00:01:30"
    assert absolute_moment("now+1hour", 0.0) == absolute_moment("now+60minutes", 0.0) == "1970-01-01T01:00:00"
    assert absolute_moment("2026-12-01T08:00", 0.0) == "2026-12-01T08:00"
    assert "now+" not in plan_submission(order(options={"deadline": "now+2days"})).script
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("stderr", "is_blamed"),
    [
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", False),
        ("allocation failure: Invalid configuration of licenses", False),
        ("squeue: fatal: Unable to process configuration file", True),
        ("squeue: error: Could not establish a configuration source", True),
        ("squeue: error: ClusterName needs to be specified", True),
    ],
)
def test_only_a_missing_cluster_is_blamed_on_its_configuration(tmp_path, monkeypatch, stderr, is_blamed):
    tool = tmp_path / "squeue"
    tool.write_text(f"#!/bin/sh\necho '{stderr}' >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(SlurmError) as caught:
        queue.queued_jobs()
    assert ("SLURM_CONF" in caught.value.line) == is_blamed


HOSTILE = ("a b", 'a"b', "a\\b", "#x", "$HOME `id`", "%j", "it's", "--wrap=x", "ä=1", "[red]x[/red]")


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("name", ["comment", "constraint", "mail-user", "uenv"])
def test_values_stay_inside_their_option(name, value):
    """As Slurm's reader takes a line apart: one option, whatever its value."""
    script = plan_submission(order(options={name: value})).script
    (line,) = [line for line in script.splitlines() if line.startswith(f"#SBATCH --{name}=")]
    assert line == option_lines({name: value})[0]
    quoted = line.partition("=")[2]
    plain = quoted[1:-1].replace('\\"', '"').replace("\\\\", "\\") if quoted.startswith('"') else quoted
    assert plain == value


@pytest.mark.parametrize("field", ["description", "setup", "environment", "modules", "name"])
def test_profiles_run_no_more_than_they_say(field):
    evil = "x; touch /tmp/owned"
    values = {"description": f"{evil}\ntouch b", "setup": ("true",), "environment": {"A": f'{evil}"$(touch c)`d`'}}
    values["modules"] = (evil,)
    profile = Profile(**({field: values[field]} if field in values else {}))
    changes = {"name": evil} if field == "name" else {}
    script = plan_submission(order(profile=profile, **changes)).script
    lines = [line for line in script.splitlines() if "touch" in line and not line.startswith("#")]
    expected = {"environment": ['export A="x; touch /tmp/owned\\"\\$(touch c)\\`d\\`"']}
    expected["modules"] = ["module load 'x; touch /tmp/owned'"]
    assert lines == expected.get(field, [])
    assert Path("/tmp/owned").exists() is False
