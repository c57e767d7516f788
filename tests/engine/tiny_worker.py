"""A training of the tiny task as a command; with ``--launch N`` it starts N ranks of itself."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from ranks import FORCED_RELEASE, tiny_config
from tiny_task import TinyTask

from piip_scale.engine.local_launch import launch_local
from piip_scale.engine.run_dir import RunDirectory
from piip_scale.engine.worker import train_worker
from piip_scale.errors import DataError, PiipError


class TroubledTask(TinyTask):
    """Does something at a micro-batch of one rank: ``kind:rank:micro``."""

    def __init__(self, *args, trouble: str, slow: float, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.kind, rank, self.at = (trouble or "none:-1:-1").split(":")
        self.mine, self.slow = int(rank) == self.world.rank, slow

    def train_batches(self, epoch: int, first_step: int):
        import time

        for micro, batch in enumerate(super().train_batches(epoch, first_step), start=first_step):
            time.sleep(self.slow)
            if self.mine and epoch * self.batches + micro == int(self.at):
                yield from self.cause(batch)
            yield batch

    def cause(self, batch):
        if self.kind == "raise":
            raise DataError("sample is broken", value="shard_3.tar")
        if self.kind == "crash":
            raise ValueError("an unforeseen\nthing")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "signal":
            os.kill(os.getpid(), signal.SIGUSR2)
        return ()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--launch", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--trouble", default="")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--layer-decay", type=float, default=0.9)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--stage", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()
    run = RunDirectory(args.run_dir)
    if args.launch and "RANK" not in os.environ:
        run.check(resume=args.resume)
        return launch_local(args.launch, [sys.executable, *sys.argv], run, grace_s=5)
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
            "max_skipped_steps": 2,
        },
    )

    def factory(config, world):
        return TroubledTask(config, world, dim=args.dim, trouble=args.trouble, slow=args.slow)

    return train_worker(config, "config = 1\n", run, factory, resume=args.resume, show_progress=False)


if __name__ == "__main__":
    try:
        code = main()
    except PiipError as error:
        print(f"error: {error.line}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
