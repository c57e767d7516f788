"""Orders as a user would give them, on paths that are the same everywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from piip_scale.launch.evaluating import plan_evaluation
from piip_scale.launch.profiles import Container, Profile, load_profile
from piip_scale.launch.spec import JobSpec
from piip_scale.launch.submitting import Order
from piip_scale.launch.sweeps import sweep_points

PYTHON = "/shared/venv/bin/python"
HOSTILE = '/runs/it\'s "50%j" #1 $HOME `id` *'


def order(run_dir="/shared/runs/h6b", profile=None, **changes):
    """An order; ``changes`` are fields of it, or of its job."""
    config = Path("/home/ann/piip_scale/configs/coco/mask_rcnn_h6b_1024_512.py")
    facts = {"config": config, "source_config": config, "run_dir": Path(run_dir), "name": Path(run_dir).name}
    facts |= {"working_dir": Path("/home/ann/piip_scale"), "num_nodes": 2, "ranks_per_node": 8}
    given = {"profile": (profile or Profile()).model_copy(update={"python": PYTHON})}
    given |= {"options": dict((profile or Profile()).sbatch)}
    of_job = {name: value for name, value in changes.items() if name in JobSpec.model_fields and name != "profile"}
    of_order = {name: value for name, value in changes.items() if name not in of_job}
    return Order(job=JobSpec(**facts | of_job), **given | of_order)


def shipped_as(name, asked):
    return replace(asked, job=asked.job.with_facts(profile=name))


def shipped(name, **changes):
    profile = load_profile(name)
    options = dict(profile.sbatch) | changes.pop("options", {})
    return shipped_as(name, order(profile=profile, options=options, **changes))


ORDERS = {
    "plain": lambda: order(options={"partition": "gpu", "time": "24:00:00"}, given_overrides=("train.seed=1",)),
    "infiniband_spares": lambda: shipped("infiniband", spares=1, options={"time": "12:00:00", "exclude": "n[3,7]"}),
    "container": lambda: shipped("container"),
    "no_requeue_chain": lambda: shipped("no_requeue", chain=2),
    "sweep": lambda: shipped(
        "infiniband", points=tuple(sweep_points(["optimizer.lr=1e-4,2e-4", "train.seed=0,1"])), array_limit="%2"
    ),
    "hostile": lambda: order(
        run_dir=HOSTILE,
        name="my 'job' #1",
        working_dir=Path("/home/o'neil/my work"),
        given_overrides=("data.train_shards=it's here", "x=a\nexit 3"),
        profile=Profile(
            modules=("cuda/12.8",),
            setup=("source /opt/site/setup.sh",),
            environment={"CACHE": '${HOME}/a "b" `c` $(d) \\e', "PLAIN": "1"},
        ),
        options={"comment": 'say "hi" \\ #2', "contiguous": True, "exclusive": False},
    ),
}


def evaluation(run_dir="/shared/scores", words=(), profile=None, **changes):
    """An evaluation as it would be sent; ``changes`` are fields of its order, or of its job."""
    asked = order(run_dir=run_dir, profile=profile, **changes)
    return plan_evaluation(asked.job, asked.profile, asked.options, words)


EVALUATIONS = {
    "evaluation": lambda: evaluation(
        words=["--coco", "val.json", "--images", "images"],
        config=Path("/shared/runs/h6b"),
        profile=load_profile("infiniband"),
    ),
    "evaluation_hostile": lambda: evaluation(
        HOSTILE,
        ["--set", "data.val_shards=it's $HOME", "a\n exit 3"],
        name="my 'job' #1",
        working_dir=Path("/home/o'neil/my work"),
    ),
}

APPTAINER = Profile(
    python=PYTHON,
    container=Container(kind="apptainer", image="/images/piip.sif", mounts=("/data", "/a:/b"), options=("--cleanenv",)),
)
