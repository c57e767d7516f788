import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_saver import content, save

from piip_scale.checkpoint.store import MANIFEST, CheckpointStore, checksum, num_bytes, read_step, resolve_checkpoint
from piip_scale.errors import CheckpointError

SAVER = Path(__file__).with_name("store_saver.py")


def assert_whole(store, path):
    store.validate(path)
    step = read_step(path)
    assert path.name == f"step_{step:08d}"
    for name in ("a.pt", "inner/b.pt"):
        assert (path / name).read_bytes() == content(step, name)


def test_a_save_is_hidden_until_committed(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    folder = store.begin(120)
    (folder / "a.pt").write_bytes(b"x")
    assert folder == store.staging(120)
    assert store.latest() is None
    assert store.steps() == []
    path = store.commit(120)
    assert path.name == "step_00000120"
    assert store.latest() == path
    assert (store.folder / "latest").read_text() == "step_00000120\n"
    assert not folder.exists()


def test_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20, 30, 40):
        save(store, step)
    assert store.steps() == [30, 40]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000030", "step_00000040"]
    assert_whole(store, store.latest())


def test_milestones_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2, milestone_every=20)
    for step in (10, 20, 30, 40, 50, 60, 70):
        save(store, step)
    assert store.steps() == [20, 40, 60, 70]
    store.milestone_every = 0
    save(store, 80)
    assert store.steps() == [70, 80]


def test_parts_are_committed_as_their_ranks_found_them(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    staging = store.begin(3)
    for rank in range(3):
        assert store.finished_ranks(3) == rank
        (staging / f"{rank}.pt").write_bytes(bytes(rank))
        store.finish_part(3, rank, [f"{rank}.pt"])
    (staging / "more").write_bytes(b"in no part")
    path = store.commit(3)
    store.validate(path)
    assert sorted(p.name for p in path.iterdir()) == ["0.pt", "1.pt", "2.pt", MANIFEST, "more"]
    assert num_bytes(path) == 0 + 1 + 2 + 10


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_a_part_that_is_not_what_its_rank_wrote_is_not_committed(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep=2)
    older = save(store, 2)
    staging = store.begin(3)
    (staging / "a.pt").write_bytes(b"abc")
    store.finish_part(3, 0, ["a.pt"])
    os.truncate(staging / "a.pt", 1) if damage == "cut short" else (staging / "a.pt").unlink()
    with pytest.raises(CheckpointError, match=r"a\.pt .*it was saved with 3 bytes"):
        store.commit(3)
    assert store.steps() == [2]
    assert store.latest() == older


@pytest.mark.parametrize("damage", ["truncate", "remove", "grow", "no manifest", "broken manifest", "foreign manifest"])
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, damage, caplog):
    store = CheckpointStore(tmp_path, keep=3)
    older, newer = save(store, 1), save(store, 2)
    victim = newer / "inner/b.pt"
    if damage == "truncate":
        os.truncate(victim, 10)
    elif damage == "remove":
        victim.unlink()
    elif damage == "grow":
        victim.write_bytes(victim.read_bytes() + b"x")
    else:
        victim = newer / MANIFEST
        if damage == "no manifest":
            victim.unlink()
        else:
            victim.write_text(
                "{" if damage == "broken manifest" else json.dumps({"format": 1, "step": "x", "files": {}})
            )
    assert store.latest() == older
    assert str(victim) in caplog.text
    with pytest.raises(CheckpointError) as caught:
        store.validate(newer)
    assert str(victim) in caught.value.line
    assert "\n" not in caught.value.line


def test_pruning_never_counts_a_damaged_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    save(store, 1)
    (save(store, 2) / "a.pt").unlink()
    save(store, 3)
    assert store.steps() == [1, 2, 3]
    save(store, 4)
    assert store.steps() == [3, 4]


def test_a_changed_byte_is_found_by_validate(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    victim = save(store, 1) / "a.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert store.latest() is not None
    with pytest.raises(CheckpointError, match=r"a\.pt was changed after it was saved"):
        store.validate(victim.parent)


def test_both_ends_of_a_large_file_are_checked(tmp_path):
    file = tmp_path / "large"
    file.touch()
    os.truncate(file, 200 << 20)  # sparse, so it costs no disk
    sums = {checksum(file)}
    for offset in (0, (200 << 20) - 1):
        with file.open("r+b") as handle:
            handle.seek(offset)
            handle.write(b"x")
        sums.add(checksum(file))
    assert len(sums) == 3


def test_a_step_is_saved_once(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    path = save(store, 5)
    with pytest.raises(CheckpointError, match="step 5 already has a checkpoint"):
        store.begin(5)
    os.truncate(path / "a.pt", 1)
    assert_whole(store, save(store, 5))


def test_latest_names_a_whole_checkpoint_for_people(tmp_path):
    store = CheckpointStore(tmp_path, keep=5)
    (save(store, 9) / "a.pt").unlink()
    save(store, 4)
    assert (tmp_path / "latest").read_text() == "step_00000004\n"


def test_committing_nothing_is_refused(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.begin(1)
    with pytest.raises(CheckpointError, match="nothing was written"):
        store.commit(1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", "latest", "step_00000002"])
def test_resolving_what_a_user_types(tmp_path, name):
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    save(store, 1)
    newest = save(store, 2)
    assert resolve_checkpoint(store.folder / name) == newest
    assert resolve_checkpoint(tmp_path) == newest
    assert resolve_checkpoint(store.folder / "step_00000001").name == "step_00000001"


def test_resolving_nothing_says_where_it_looked(tmp_path):
    with pytest.raises(CheckpointError, match=f"no whole checkpoint in {tmp_path}"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*absent"):
        resolve_checkpoint(tmp_path / "absent")


@settings(max_examples=40, deadline=None)
@given(
    keep=st.integers(1, 4),
    actions=st.lists(st.tuples(st.sampled_from(["save", "abort", "damage", "clean"]), st.integers(0, 12)), max_size=25),
)
def test_laws_of_any_history(tmp_path_factory, keep, actions):
    """`latest` is the newest undamaged step of a model that is a plain set of steps."""
    store = CheckpointStore(tmp_path_factory.mktemp("store"), keep)
    whole = set()
    for action, step in actions:
        if action == "save" and step not in whole:
            save(store, step)
            whole = set(sorted(whole | {step})[-keep:])
        elif action == "abort":
            if step not in whole:
                (store.begin(step) / "half").write_bytes(b"x")
        elif action == "damage" and whole:
            victim = sorted(whole)[step % len(whole)]
            os.truncate(store.folder / f"step_{victim:08d}" / "a.pt", 3)
            whole.remove(victim)
        elif action == "clean":
            store.clean()
            assert not [p for p in store.folder.iterdir() if p.name.startswith(".")]
        newest = store.latest()
        assert (None if newest is None else read_step(newest)) == max(whole, default=None)
        if newest is not None:
            assert_whole(store, newest)


def test_killed_at_every_operation_of_a_save(tmp_path):
    """A forked child is killed before its n-th change to the disk, for every n there is."""
    done = subprocess.run([sys.executable, SAVER, "each", tmp_path], timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    moments = json.loads(done.stdout)
    assert len(moments) > 15
    for moment in moments:
        store = CheckpointStore(Path(moment["folder"]), keep=2)
        newest = store.latest()
        assert read_step(newest) in (2, 3), moment
        assert_whole(store, newest)
        store.clean()
        assert_whole(store, store.latest())
        assert store.latest() == newest
        assert_whole(store, save(store, 4))
        assert all(p.name == "latest" or p.name.startswith("step_") for p in store.folder.iterdir())
    assert {moment["committed"] for moment in moments} == {True, False}


def test_either_of_two_ranks_killed_at_every_operation_of_a_save(tmp_path):
    done = subprocess.run(
        [sys.executable, SAVER, "each of two ranks", tmp_path], timeout=240, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    moments = json.loads(done.stdout)
    assert len(moments) > 30
    for moment in moments:
        store = CheckpointStore(Path(moment["folder"]), keep=2, milestone_every=4)
        newest = store.latest()
        assert read_step(newest) == (7 if moment["committed"] else 6), moment
        assert_whole(store, newest)
        store.clean()
        assert_whole(store, store.path(4))
        assert_whole(store, save(store, 8))
        assert store.steps()[0] == 4
        assert all(p.name == "latest" or p.name.startswith("step_") for p in store.folder.iterdir()), moment
    assert {moment["committed"] for moment in moments} == {True, False}


def test_killed_at_random_moments_of_endless_saving(tmp_path):
    rng = random.Random(0)
    store = CheckpointStore(tmp_path, keep=2)
    last = 0
    for _ in range(12):
        process = subprocess.Popen([sys.executable, SAVER, "endless", tmp_path], stdout=subprocess.PIPE, text=True)
        reported = int(process.stdout.readline())
        time.sleep(rng.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.stdout.read().split())])
        process.wait(timeout=240)
        newest = store.latest()
        assert read_step(newest) >= reported > last
        assert_whole(store, newest)
        last = reported


@pytest.mark.parametrize(
    ("disk", "remount", "message"),
    [
        ("size=40k", "true", "No space left on device"),  # refuses the ranks' own files
        ("size=48k", "true", "cannot save checkpoint .*: No space left on device.*; free some space"),  # the manifest
        ("size=48k", "mount -o remount,ro", "cannot begin a checkpoint .*: Read-only file system .*; choose a folder"),
    ],
)
def test_a_disk_that_refuses(tmp_path, disk, remount, message):
    """A really full and a really read-only disk, in a mount namespace of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("needs user namespaces to mount a small disk")
    python, saver, folder = (shlex.quote(str(path)) for path in (sys.executable, SAVER, tmp_path))
    remount = remount if remount == "true" else f"{remount} {folder}"
    once = f"{python} {saver} once {folder}"
    script = f"mount -t tmpfs -o {disk} none {folder} && {once} 1 && {remount}; {once} 2; echo $?; ls -A {folder}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=240)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr)
    assert done.stdout.split() == ["step_00000001", "2", "latest", "step_00000001"]
