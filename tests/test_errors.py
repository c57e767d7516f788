import inspect
import multiprocessing
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piip_scale import errors
from piip_scale.errors import CheckpointError, ConfigError, Interrupted, PiipError, RunError

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PiipError)]
TEXTS = st.text(max_size=30)


def test_value_rule_and_fix_in_one_line():
    error = ConfigError("model.depth", value=0, rule="it is positive", fix="set 1 or more")
    assert str(error) == error.line == "model.depth: got 0; it is positive; set 1 or more"
    assert ConfigError("file absent").line == "file absent"
    assert ConfigError("a", value=False, fix="b").line == "a: got False; b"


@given(problem=TEXTS, value=TEXTS | st.integers() | st.none(), rule=TEXTS, fix=TEXTS)
def test_always_one_line(problem, value, rule, fix):
    line = PiipError(problem, value=value, rule=rule, fix=fix).line
    assert len(line.splitlines()) <= 1
    assert "  " not in line


@given(kind=st.sampled_from(KINDS), value=TEXTS | st.lists(st.integers()) | st.none(), fix=TEXTS)
def test_survives_pickling(kind, value, fix):
    error = kind("problem", value=value, rule="rule", fix=fix)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (again.line, again.args) == (error.line, error.args)
    assert (again.problem, again.rule, again.fix) == (error.problem, error.rule, error.fix)
    assert pickle.loads(pickle.dumps(again)).line == error.line


def fail(_):
    raise CheckpointError("model.pt is missing", value=3, fix="copy it")


def test_reaches_the_parent_from_a_worker():
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(CheckpointError) as caught:
        pool.map(fail, [0])
    assert caught.value.line == "model.pt is missing: got 3; copy it"


def test_an_unpicklable_value_still_reaches_the_parent():
    error = pickle.loads(pickle.dumps(ConfigError("hook", value=lambda: 0, rule="it is a name")))
    assert error.line.startswith("hook: got <function")
    assert error.line.endswith("; it is a name")


def test_exit_codes_tell_how_it_ended():
    assert {kind.__name__: kind.exit_code for kind in KINDS} == {
        "PiipError": 2,
        "ConfigError": 2,
        "WorldError": 2,
        "KernelError": 2,
        "ModelError": 2,
        "DataError": 2,
        "FetchError": 2,
        "CheckpointError": 2,
        "RunError": 1,
        "SlurmError": 1,
        "HangError": 1,
        "DeviceMemoryError": 1,
        "LostRankError": 1,
        "Interrupted": 130,
    }
    assert issubclass(Interrupted, RunError)
