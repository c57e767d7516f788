"""The real detectors under ZeRO-3 on two processes whose batches hold objects at different times."""

import queue
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_detectors import SMALL, batch_of, instances, run_config

from piip_scale.config.loading import check_config
from piip_scale.engine.setup import build_engine, init_distributed
from piip_scale.engine.step import seed_step, train_step
from piip_scale.tasks.detectors import build_detection_model
from piip_scale.world import World

NOTHING = instances([])
CROWD = instances([[10, 10, 80, 80]], crowd=[True])
SOME = instances([[10, 12, 60, 70], [70, 30, 150, 120]], [0, 2])
# What rank 0 and rank 1 see in each step.
STEPS = [(NOTHING, SOME), (SOME, NOTHING), (CROWD, SOME), (NOTHING, NOTHING), (SOME, SOME)]
# Tiny models never release a parameter unless made to.
FORCED_RELEASE = {"zero_optimization": {"stage3_max_live_parameters": 100000, "stage3_max_reuse_distance": 0}}


def _config(kind, precision):
    values = run_config(kind, SMALL[kind]).model_dump()
    values["zero"] = {"stage": 3, "persistence_threshold": 0, "deepspeed": FORCED_RELEASE}
    values["train"] = {"steps": len(STEPS), "precision": precision}
    return check_config(values)


def _total(losses):
    return sum(value for name, value in losses.items() if "loss" in name)


def _rank(rank, port, kind, precision, results):
    torch.set_num_threads(1)
    world = World(rank=rank, num_ranks=2, local_rank=rank, ranks_per_node=2, master_port=port)
    init_distributed(world)
    torch.manual_seed(0)
    config = _config(kind, precision)
    model = build_detection_model(config, 3)
    engine, _ = build_engine(model, config, world)
    engine.train()
    steps = [train_step(engine, [batch_of(seen[rank])], i, 0, world) for i, seen in enumerate(STEPS)]
    engine.eval()
    found = model.predict(batch_of(SOME))
    results.put((rank, [(s.grad_norm, _total(s.losses).item(), s.applied) for s in steps], len(found[0].scores)))
    dist.barrier()
    dist.destroy_process_group()


def _run(kind, precision):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    arguments = (port, kind, precision, results)
    processes = [context.Process(target=_rank, args=(rank, *arguments), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        found = dict((rank, rest) for rank, *rest in (results.get(timeout=240) for _ in processes))
    except queue.Empty:
        pytest.fail("a rank failed or hangs")
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    return found


def test_mask_rcnn_equals_plain_gradient_averaging():
    found = _run("mask_rcnn", "fp32")
    torch.manual_seed(0)
    model = build_detection_model(_config("mask_rcnn", "fp32"), 3).train()
    alone = []
    for rank, seen in enumerate(STEPS[0]):
        seed_step(0, 0, rank)
        alone.append(_total(model(batch=batch_of(seen))))
        (alone[-1] / 2).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    for rank, (steps, num_found) in found.items():
        assert steps[0][0] == pytest.approx(norm, rel=1e-4)
        assert steps[0][1] == pytest.approx(alone[rank].item(), rel=1e-5)
        assert all(applied for _, _, applied in steps)
        assert num_found > 0
    assert [step[0] for step in found[0][0]] == [step[0] for step in found[1][0]]


def test_no_batch_makes_the_ranks_of_a_dino_part():
    found = _run("dino", "bf16")
    assert all(applied for steps, _ in found.values() for _, _, applied in steps)
    assert [step[0] for step in found[0][0]] == [step[0] for step in found[1][0]]
