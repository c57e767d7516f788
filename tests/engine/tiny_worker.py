"""A training of the tiny task as a command; with ``--launch N`` it starts N ranks of itself."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
from save_killer import SaveKiller
from tiny_configs import FORCED_RELEASE, tiny_config
from tiny_task import TinyTask

from piip_scale.engine.local_launch import launch_local
from piip_scale.engine.worker import train_worker
from piip_scale.errors import DataError, PiipError
from piip_scale.run.run_dir import RunDirectory


class TroubledTask(TinyTask):
    """Does something at a micro-batch of one rank: ``kind:rank:micro``; a micro ``eval`` is the second of evaluating.

    More troubles are separated by commas.
    """

    def __init__(self, *args, trouble: str, slow: float, slow_evaluation: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.troubles = {}
        for kind, rank, at in (text.split(":") for text in trouble.split(",") if text):
            if int(rank) == self.world.rank:
                self.troubles[at] = kind
        self.slow, self.slow_evaluation = slow, slow_evaluation

    def train_batches(self, epoch: int, first_step: int):
        for micro, batch in enumerate(super().train_batches(epoch, first_step), start=first_step):
            time.sleep(self.slow)
            cause(self.troubles.get(str(epoch * self.batches + micro)))
            yield batch

    def val_batches(self):
        for index, batch in enumerate(super().val_batches()):
            time.sleep(self.slow_evaluation)
            if index == 1:
                cause(self.troubles.get("eval"))
            yield batch


def cause(kind: str | None) -> None:
    if kind == "raise":
        raise DataError("sample is broken", value="shard_3.tar")
    if kind == "crash":
        raise ValueError("an unforeseen\nthing")
    if kind == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "signal":
        os.kill(os.getpid(), signal.SIGUSR2)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while kind == "sleep":
        time.sleep(60)
    if kind == "lock":
        ctypes.PyDLL(None).sleep(600)  # keeps Python's lock meanwhile


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--launch", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--trouble", default="")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--slow-evaluation", type=float, default=0.0)
    parser.add_argument("--hang-minutes", type=float, default=10.0)
    parser.add_argument("--kill-save", default="", help="moment:rank:step")
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--layer-decay", type=float, default=0.9)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--ema-decay", type=float)
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()
    run = RunDirectory(args.run_dir)
    if args.launch and "RANK" not in os.environ:
        run.check(resume=args.resume)
        return launch_local(args.launch, [sys.executable, *sys.argv], run, grace_s=5)
    if args.kill_save:
        moment, rank, step = args.kill_save.split(":")
        SaveKiller(moment, int(step), int(rank))
    config = tiny_config(
        optimizer={"lr": args.lr, "layer_decay": args.layer_decay},
        zero={"stage": args.stage, "deepspeed": FORCED_RELEASE if args.stage == 3 else {}},
        train={
            "steps": args.steps,
            "precision": args.precision,
            "gradient_accumulation": 2,
            "log_every_steps": 1,
            "evaluate_every_steps": 4,
            "checkpoint_every_steps": args.save_every,
            "keep_checkpoints": args.keep,
            "max_skipped_steps": 2,
            "ema_decay": args.ema_decay,
            "hang_minutes": args.hang_minutes,
        },
    )

    def factory(config, world):
        troubles = {"trouble": args.trouble, "slow": args.slow, "slow_evaluation": args.slow_evaluation}
        return TroubledTask(config, world, dim=args.dim, **troubles)

    return train_worker(config, "config = 1\n", run, factory, resume=args.resume, show_progress=False)


if __name__ == "__main__":
    try:
        code = main()
    except PiipError as error:
        print(f"error: {error.line}", file=sys.stderr)
        code = error.exit_code
    # As the command ends: at Python's own end a thread of the communication library now and then takes all down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
