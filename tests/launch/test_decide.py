from __future__ import annotations

from dataclasses import replace

import pytest
from histories import NODES, altered, attempt, crash, histories, situation, situations
from hypothesis import given

from piip_scale.launch.decide import CURABLE, INCURABLE, decide, num_stale, sick_nodes, since_verdict


@given(histories(), situations)
def test_done_is_never_started_again(history, now):
    decision = decide([*history, attempt(99, "done")], now)
    assert decision.action == "finish"


@given(histories(), situations)
def test_the_cap_holds_whatever_happens(history, now):
    decision = decide(history, now)
    if num_stale(since_verdict(history)) > now.max_stale_restarts:
        assert decision.action in ("finish", "give_up")


@given(histories(), situations)
def test_a_decision_is_one_line_and_can_be_carried_out(history, now):
    decision = decide(history, now)
    assert decision.why
    assert "\n" not in decision.why
    if decision.action == "restart":
        left = set(now.usable_nodes) - set(decision.exclude)
        assert len(left) >= now.num_nodes
        assert not now.is_ending
    if decision.action == "requeue":
        assert now.has_queue
    assert set(now.bad_nodes) <= set(decision.exclude) or decision.action in ("finish", "give_up")


@given(histories(), situations)
def test_who_asks_for_an_end_gets_one(history, now):
    for asked in ("stop", "cancel"):
        assert decide(history, replace(now, asked=asked)).action == "finish"


@given(histories(), situations)
def test_what_was_before_a_verdict_does_not_count(history, now):
    closed = [*history[:-1], replace(history[-1], decision="give_up")]
    assert decide([*closed, crash(50)], now) == decide([crash(50)], now)


@given(histories(), situations)
def test_names_and_times_do_not_matter(history, now):
    renamed = [
        replace(one, attempt=one.attempt + 5, job_id=one.job_id + 1, started_unix_s=one.started_unix_s * 2)
        for one in history
    ]
    assert decide(renamed, now) == decide(history, now)


@given(histories(), situations)
def test_the_order_of_nodes_does_not_matter(history, now):
    turned = replace(now, usable_nodes=now.usable_nodes[::-1], bad_nodes=now.bad_nodes[::-1])
    assert decide(history, turned) == decide(history, now)


@given(histories(ends=("crashed", "hang")), situations)
def test_a_bad_config_is_never_tried_again(history, now):
    for kind in INCURABLE:
        decision = decide([*history, crash(50, kind)], replace(now, asked=""))
        assert (decision.action, kind in decision.why) == ("give_up", True)


def restarts(history, now=None):
    return decide(history, now or situation()).action == "restart"


@pytest.mark.parametrize("kind", sorted(CURABLE))
def test_what_a_restart_cures_gets_as_many_as_the_cap_allows(kind):
    # Another node each time, so that none is called sick.
    failures = [crash(number, kind, step=5, node=f"m{number}") for number in range(5)]
    assert [restarts(failures[:count]) for count in range(1, 6)] == [True, True, True, False, False]
    last = decide(failures[:4], situation())
    assert last.action == "give_up"
    assert "4 attempts in a row brought no newer checkpoint than step 0" in last.why


def test_restarts_that_get_further_are_not_counted():
    history = [crash(number, first=10 * number, last=10 * number + 10, node=f"m{number}") for number in range(50)]
    assert restarts(history)
    assert num_stale(history) == 0


def test_an_unknown_exception_is_tried_once_more_and_the_same_again_is_a_bug():
    first = crash(0, "exception", line="KeyError: 'boxes' at 0x7f00", step=120)
    again = altered(first, attempt=1, line="KeyError: 'boxes' at 0x7e11")
    elsewhere = altered(first, attempt=1, step=300)
    other = altered(first, attempt=1, line="ValueError: no")
    assert restarts([first])
    for second in (elsewhere, other):
        assert restarts([first, second])
    bug = decide([first, again], situation())
    assert bug.action == "give_up"
    assert "the same failure twice after step 120" in bug.why
    # Also where something else came in between, but not where somebody has seen to it.
    between = attempt(1, "stopped", last=10, cause="time limit")
    assert decide([first, between, replace(again, attempt=2)], situation()).action == "give_up"
    assert restarts([replace(first, decision="give_up"), again])


def test_stops_go_through_the_queue_and_without_one_end():
    for cause in ("time limit", "preemption", "requeue"):
        stopped = attempt(0, "stopped", last=40, cause=cause)
        decision = decide([stopped], situation(is_ending=True))
        assert (decision.action, decision.why) == ("requeue", f"stopped by {cause}, saved at step 40")
    alone = decide([stopped], situation(has_queue=False, is_ending=True))
    assert alone.action == "finish"
    assert "the same command goes on" in alone.why


def test_a_limit_too_short_to_get_anywhere_ends_but_being_preempted_does_not():
    short = [attempt(number, "stopped", cause="time limit") for number in range(4)]
    assert decide(short[:3], situation(is_ending=True)).action == "requeue"
    assert decide(short, situation(is_ending=True)).action == "give_up"
    unlucky = [attempt(number, "stopped", cause="preemption") for number in range(40)]
    assert decide(unlucky, situation(is_ending=True)).action == "requeue"


def test_a_lost_node_is_left_out_and_a_spare_saves_the_queue():
    lost = attempt(0, "lost_node", last=30, node="n2", reason="lost node", line="node n2 was lost")
    here = decide([lost], situation(usable_nodes=("n1", "n3"), bad_nodes=("n2",)))
    assert (here.action, here.exclude) == ("restart", ("n2",))
    # Slurm may think well of it again.
    assert decide([lost], situation(usable_nodes=NODES)).exclude == ("n2",)
    queue = decide([lost], situation(usable_nodes=("n1",), bad_nodes=("n2",)))
    assert (queue.action, queue.exclude) == ("requeue", ("n2",))
    alone = decide([lost], situation(usable_nodes=("n1",), bad_nodes=("n2",), has_queue=False))
    assert alone.action == "give_up"
    assert "2 nodes are needed, 1 can be used" in alone.why


def test_a_node_where_ranks_hang_or_vanish_twice_is_sick_and_hardware_errors_suffice():
    hangs = [attempt(number, "hang", reason="hang", node="n2") for number in range(2)]
    assert sick_nodes(hangs[:1]) == ()
    assert sick_nodes(hangs) == ("n2",)
    assert sick_nodes([altered(one, cause="preemption") for one in hangs]) == ()
    assert sick_nodes([crash(0, "device failure", node="n1")]) == ("n1",)
    assert sick_nodes([crash(number, "exception", node="n1") for number in range(9)]) == ()
    assert decide(hangs, situation()).exclude == ("n2",)


def test_near_the_end_of_the_allocation_a_crash_waits_in_the_queue():
    assert decide([crash()], situation(is_ending=True)).action == "requeue"
    assert decide([crash()], situation(asked="requeue")).action == "requeue"


def test_disks_and_networks_get_time_to_recover():
    failures = [crash(number, "input or output", node=f"m{number}") for number in range(3)]
    pauses = [decide(failures[:count], situation()).pause_s for count in (1, 2, 3)]
    assert pauses[0] == 0
    assert 0 < pauses[1] < pauses[2] <= 300
    assert decide([altered(one, reason="lost rank") for one in failures], situation()).pause_s == 0


def test_nodes_that_fail_their_preflight_send_the_job_elsewhere():
    unfit = attempt(0, "preflight", node="n2", reason="preflight", line="n2: no GPUs")
    decision = decide([unfit], situation(usable_nodes=("n1",), bad_nodes=("n2",)))
    assert (decision.action, decision.exclude) == ("requeue", ("n2",))
    config = altered(unfit, reason="bad config", line="config key a", node="")
    assert decide([config], situation()).action == "give_up"
