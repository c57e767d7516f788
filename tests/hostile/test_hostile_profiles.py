"""Profiles of sites and variables of the environment that hold anything: taken, or refused in one line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piip_scale.errors import ConfigError, WorldError
from piip_scale.launch.profiles import Profile, load_profile
from piip_scale.world import read_world

quick = settings(max_examples=60, deadline=None)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


def one_line(error):
    assert error.line.isprintable()
    assert len(error.line) < 3000


@quick
@given(field=st.sampled_from(sorted(Profile.model_fields)), value=values)
def test_any_value_in_a_profile_is_taken_or_refused_in_one_line(tmp_path_factory, field, value):
    path = tmp_path_factory.mktemp("profile") / "site.toml"
    text = json.dumps(value) if not isinstance(value, dict) else None
    lines = (
        [f"{field} = {text}"]
        if text
        else [f"[{field}]", *(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items())]
    )
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        profile = load_profile(str(path))
    except ConfigError as error:
        one_line(error)
        return
    # What becomes a line of the script is one.
    assert not [line for line in (*profile.modules, *profile.setup, *profile.srun) if "\n" in line]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"a" * 10_000,
        b"x = " + b"[" * 5000,
        b"x = {" * 2000,
        b"\x00",
        b"a.b.c = 1\na.b = 2",
        b"= 1",
    ],
)
def test_files_that_are_no_profile_are_refused(tmp_path, content):
    (tmp_path / "site.toml").write_bytes(content)
    if not content:
        assert load_profile(str(tmp_path / "site.toml")) == Profile()
        return
    with pytest.raises(ConfigError) as caught:
        load_profile(str(tmp_path / "site.toml"))
    one_line(caught.value)


@pytest.mark.parametrize("name", ["A B", "A;reboot", "A$(reboot)", "", "1A", "A\nB", "PATH=x;y", "Ä"])
def test_names_of_variables_are_no_commands(tmp_path, name):
    (tmp_path / "site.toml").write_text(f"[environment]\n{json.dumps(name)} = 'x'\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no name of a variable"):
        load_profile(str(tmp_path / "site.toml"))


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "", "a\nb", "[red]x", "$(reboot)", "x" * 5000, "absent.toml", "\0.toml"]
)
def test_names_of_profiles_are_no_paths_of_their_own(name):
    with pytest.raises(ConfigError) as caught:
        load_profile(name)
    one_line(caught.value)


@pytest.mark.parametrize(
    "value", ["", "x", "-1", "1.5", "9" * 400, "1\n2", "$(reboot)", "\udcff", "½", "\uff11", " 1 ", "0x10"]
)
@pytest.mark.parametrize(
    "variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID"]
)
def test_ranks_of_the_environment_are_numbers_or_one_line(variable, value):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if variable.startswith("SLURM"):
        environment = {
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "1",
            "SLURM_LOCALID": "0",
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
        }
    try:
        world = read_world(environment | {variable: value})
    except WorldError as error:
        one_line(error)
    else:
        assert 0 <= world.rank < world.num_ranks
