"""``piip-scale replay``: one step of a run again, to see what was not finite in it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from piip_scale.errors import CheckpointError, RunError
from piip_scale.text import printable

if TYPE_CHECKING:
    from piip_scale.config.run import RunConfig
    from piip_scale.engine.replay import ReplayedBatch
    from piip_scale.run.bad_steps import BadStep
    from piip_scale.run.run_dir import RunDirectory
    from piip_scale.tasks.trained import Trained


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(replay)


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.", readable=False)],
    step: Annotated[
        int, typer.Argument(metavar="STEP", min=1, help="As metrics.jsonl and bad_steps/ count: 1 is the first.")
    ],
    checkpoint: Annotated[
        int | None,
        typer.Option(min=0, help="Take the weights of this step's checkpoint; default: the newest before STEP."),
    ] = None,
) -> None:
    """Run one step of a run again, alone: its samples, losses and gradient, and what was first not finite.

    The micro-batches of all its ranks are computed one after the other in this process, with the random numbers they
    had; the weights are those of the newest checkpoint before it. Nothing in the run is changed.

    Example: `piip-scale replay runs/mine 1204`
    """
    asked = _find(run, step, checkpoint)
    for line in asked.lines():
        typer.echo(printable(line))
    first = _replay(asked)
    typer.echo(printable(f"first not finite: {first}" if first else "everything was finite"))


@dataclass(frozen=True)
class _Asked:
    """A step of a run, with the weights it is replayed from.

    Attributes:
        run: The run.
        step: As its metrics count.
        bad: What the run wrote of it, where it was not applied.
        trained: Config and weights.
        config: The config on the ranks that the step had.
        num_ranks: These.
    """

    run: RunDirectory
    step: int
    bad: BadStep | None
    trained: Trained
    config: RunConfig
    num_ranks: int

    def lines(self) -> list[str]:
        """What is about to be done."""
        from piip_scale.run.bad_steps import config_sha256

        train, at = self.config.train, self.trained.step
        assert at is not None
        between = self.step - 1 - at
        distance = f"{between} step(s) lie between" if between >= 0 else f"{-between} step(s) too far on"
        lines = [
            f"step {self.step} of {self.run.path}: {self.num_ranks} rank(s) x {train.gradient_accumulation} "
            f"micro-batch(es) of {self.config.data.micro_batch_size}, seed {train.seed}",
            f"weights: the checkpoint of step {at}; {distance}" + ("" if between else ": they are those it had"),
        ]
        if self.bad:
            lines.append(f"the run did not apply it: {self.bad.reason}")
            if self.bad.config_sha256 != config_sha256(self.run):
                lines.append("warning: the run's config has changed since, and what is computed here may differ")
        return lines


def _find(path: Path, step: int, checkpoint: int | None) -> _Asked:
    from piip_scale.checkpoint.store import CheckpointStore
    from piip_scale.engine.batching import scale_to_ranks
    from piip_scale.engine.replay import loading_here
    from piip_scale.engine.resuming import Checkpoint, read_state
    from piip_scale.run.bad_steps import read_bad_step
    from piip_scale.run.run_dir import RunDirectory
    from piip_scale.tasks.trained import find_trained

    run = RunDirectory(path)
    if not run.newest_config.is_file():
        raise RunError("no run's directory", value=str(path), fix="piip-scale jobs lists those there are")
    bad = read_bad_step(run, step)
    _refuse_beyond(run, step, bad)
    trained = find_trained(path, step=_checkpoint_before(run, step) if checkpoint is None else checkpoint)
    assert trained.step is not None
    folder = CheckpointStore(run.checkpoints, keep=1).path(trained.step)
    state = read_state(folder)
    num_ranks = len(bad.ranks) if bad else state.num_ranks
    kept = Checkpoint(folder, state).keep_batches(trained.config, num_ranks)
    return _Asked(run, step, bad, trained, loading_here(scale_to_ranks(kept, num_ranks)), num_ranks)


def _refuse_beyond(run: RunDirectory, step: int, bad: BadStep | None) -> None:
    status = run.status()
    reached = status.step if status else 0
    if bad is None and step > reached:
        raise RunError(
            f"step {step} is beyond what {run.path} has done",
            rule=f"its status tells of {reached} step(s), bad_steps/ of none such",
            fix="name an earlier step",
        )


def _checkpoint_before(run: RunDirectory, step: int) -> int:
    from piip_scale.checkpoint.store import CheckpointStore

    steps = CheckpointStore(run.checkpoints, keep=1).steps()
    before = [found for found in steps if found < step]
    if before:
        return before[-1]
    raise CheckpointError(
        f"no checkpoint before step {step} in {run.checkpoints}",
        rule=f"there are those of {', '.join(map(str, steps)) or 'no step'}",
        fix=f"take another's weights with --checkpoint {steps[0]}" if steps else "lower train.checkpoint_every_steps",
    )


def _replay(asked: _Asked) -> str | None:
    """Prints each micro-batch; returns what was first not finite."""
    from piip_scale.data.reading.opened import OpenedSets
    from piip_scale.engine.fp32_precision import apply_fp32_precision
    from piip_scale.engine.replay import FirstNotFinite, replayed, with_buffers_of_its_own
    from piip_scale.engine.zero.setup import choose_device
    from piip_scale.tasks.kinds import build_task
    from piip_scale.world import World

    config, first, sets = asked.config, FirstNotFinite(), OpenedSets()
    apply_fp32_precision(config.train)
    model = with_buffers_of_its_own(asked.trained.load(config.train.precision, choose_device(World())))
    first.look_at_weights(model)
    norm = 0.0
    task_of = partial(build_task, config, sets=sets)
    for batch in replayed(model, task_of, config, asked.step - 1, asked.num_ranks, first):
        _print(batch, asked.bad)
        norm = batch.grad_norm
    typer.echo(f"gradient norm of the step: {norm:.6g}")
    return first.found


def _print(batch: ReplayedBatch, bad: BadStep | None) -> None:
    losses = ", ".join(f"{name} {value:.6g}" for name, value in batch.losses.items())
    typer.echo(f"rank {batch.rank}, micro-batch {batch.micro}: {losses}; gradient norm so far {batch.grad_norm:.6g}")
    for asked, key in zip(batch.asked_keys, batch.keys, strict=True):
        typer.echo(printable(f"  {key}" + (f" (in the place of {asked}, which is broken)" if key != asked else "")))
    if bad and list(batch.asked_keys) != bad.ranks[batch.rank].keys[batch.micro]:
        typer.echo("  warning: the run had other samples here: sets or config have changed since", err=True)
