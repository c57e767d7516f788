"""What a run's batch, rate and warm-up become on a number of ranks: pure functions, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from pydantic import ValidationError

from piip_scale.config.run import DataConfig, OptimizerConfig, RunConfig
from piip_scale.data.order import divisors, streams_for
from piip_scale.engine.versions import FROM_WEIGHTS
from piip_scale.errors import ConfigError

_EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


def images_per_step(config: RunConfig, num_ranks: int) -> int:
    """Images of one optimiser step of a run, over all ranks."""
    at_once = config.data.micro_batch_size * num_ranks
    return config.train.images_per_step or at_once * config.train.gradient_accumulation


def scale_to_ranks(config: RunConfig, num_ranks: int) -> RunConfig:
    """The config with every rule that depends on the number of ranks applied, and so replaced by its result.

    ``train.gradient_accumulation`` follows from ``train.images_per_step``. Micro-batches of which the ranks cannot make
    such a step shrink to the next smaller size that can. ``data.num_streams`` is decided. With
    ``optimizer.lr_scaling``, ``lr`` and ``schedule.warmup_steps`` are meant at ``reference_images_per_step``: the rate
    is multiplied by the ratio of images, or its root, and warm-up takes as many images as there. What is already scaled
    stays as it is.

    Args:
        config: The run.
        num_ranks: Data-parallel ranks.

    Raises:
        ConfigError: The ranks cannot make a step of so many images; names what to set.
    """
    images = images_per_step(config, num_ranks)
    data = _shared_data(config, images, num_ranks)
    accumulation = images // (data.micro_batch_size * num_ranks)
    train = config.train.model_copy(update={"images_per_step": None, "gradient_accumulation": accumulation})
    config = config.model_copy(update={"train": train, "data": data})
    reference = config.optimizer.reference_images_per_step
    if reference is None:
        return config
    warmup = round(config.schedule.warmup_steps * reference / images)
    schedule = config.schedule.model_copy(update={"warmup_steps": warmup})
    optimizer = _scaled(config.optimizer, images / reference)
    return config.model_copy(update={"schedule": schedule, "optimizer": optimizer})


def _shared_data(config: RunConfig, images: int, num_ranks: int) -> DataConfig:
    """The data config with streams decided, and micro-batches of which ranks can make a step of so many images."""
    try:
        data = _sharing(config.data, images, num_ranks)
    except ValueError as error:
        larger = _next_images(config, num_ranks)
        raise ConfigError(
            f"{num_ranks} ranks cannot share the {images} images of train.images_per_step",
            rule=_rule(error),
            fix=" or ".join([*_ranks_for(config, images, "take"), f"pass {_other_recipe(config, images, larger)}"]),
        ) from error
    return data.model_copy(update={"num_streams": streams_for(data.num_streams, num_ranks)})


def can_share(config: RunConfig, images: int, num_ranks: int) -> bool:
    """Whether ranks can make steps of so many images."""
    try:
        _sharing(config.data, images, num_ranks)
    except ValueError:
        return False
    return True


def with_micro_batch(data: DataConfig, size: int) -> DataConfig:
    """The data config with micro-batches of so many images.

    Raises:
        ValidationError: Its own rules do not allow them, as mixup those that are odd.
    """
    if size == data.micro_batch_size:
        return data
    return type(data).model_validate(data.model_dump() | {"micro_batch_size": size})


def _sharing(data: DataConfig, images: int, num_ranks: int) -> DataConfig:
    """The data config with the largest micro-batches of which ranks can make a step of so many images.

    Raises:
        ValueError: There are none that its own rules allow; with the rule.
    """
    if images % num_ranks:
        raise ValueError(f"each takes as many, so these are a multiple of {num_ranks}")
    sizes = [size for size in divisors(images // num_ranks) if size <= data.micro_batch_size]
    for size in reversed(sizes):
        with suppress(ValidationError):
            return with_micro_batch(data, size)
    return with_micro_batch(data, sizes[-1])


def _rule(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        return error.errors()[0]["msg"].removeprefix("Value error, ")
    return str(error)


def _next_images(config: RunConfig, num_ranks: int) -> int:
    """The fewest images of a step, and no fewer than the run's, that ranks can share."""
    share, size = -(-images_per_step(config, num_ranks) // num_ranks), config.data.micro_batch_size
    # One of so many is a multiple of the micro-batch as it is.
    return next(n * num_ranks for n in range(share, share + size) if can_share(config, n * num_ranks, num_ranks))


def _ranks_for(config: RunConfig, images: int, verb: str) -> list[str]:
    """What to do on other numbers of ranks: those that can share a step's images, if any can."""
    ranks = [number for number in divisors(images) if can_share(config, images, number)]
    return [f"{verb} {_listed(ranks)} ranks"] if ranks else []


def _with_images(config: RunConfig, images: int, larger: int) -> RunConfig:
    """The run with larger steps, its rate grown as they are, as that of the published recipes is."""
    train = config.train.model_copy(update={"images_per_step": larger, "gradient_accumulation": 1})
    optimizer = config.optimizer
    if optimizer.reference_images_per_step is None:
        # As short as it is told, so that what is planned is what is passed.
        optimizer = optimizer.model_copy(update={"lr": float(f"{optimizer.lr * larger / images:.6g}")})
    return config.model_copy(update={"train": train, "optimizer": optimizer})


def larger_steps(config: RunConfig, num_ranks: int) -> str:
    """What to set for the fewest images of a step, and no fewer than the run's, that ranks can share."""
    return _other_recipe(config, images_per_step(config, num_ranks), _next_images(config, num_ranks))


def _other_recipe(config: RunConfig, images: int, larger: int) -> str:
    """What to set for larger steps, as a user would write it."""
    keys = f"--set train.images_per_step={larger}"
    changed = _with_images(config, images, larger).optimizer
    rate = "" if changed == config.optimizer else f" --set optimizer.lr={changed.lr:g}"
    return f"{keys}{rate}, which is another recipe"


def keep_images_per_step(config: RunConfig, images: int, num_ranks: int) -> RunConfig:
    """The config whose steps have so many images on these ranks, as those of the run to go on with had.

    Micro-batches keep their size where that divides, since it is what memory was found to hold, and shrink to the
    next smaller one that does where not; accumulation makes up for it. Micro-batches that keep their size are the very
    same ones (see ``data.order``), and the run goes on as it would have, but for rounding.

    Args:
        config: The run as it was asked for.
        images: Images of a step so far.
        num_ranks: Ranks there are now.

    Raises:
        ConfigError: The config asks for steps of other images outright, or the ranks cannot share them; lists which
            can.
    """
    asked = config.train.images_per_step
    if asked not in (None, images):
        raise ConfigError(
            "train.images_per_step",
            value=asked,
            rule=f"the run to resume has steps of {images} images",
            fix=f"leave it out, or train a new run from its weights: {FROM_WEIGHTS}",
        )
    if images_per_step(config, num_ranks) == images:
        return config
    refusal = f"{num_ranks} ranks cannot go on with a run whose steps have {images} images"
    try:
        data = _sharing(config.data, images, num_ranks)
    except ValueError as error:
        raise ConfigError(refusal, rule=_rule(error), fix="".join(_ranks_for(config, images, "resume on"))) from error
    train = config.train.model_copy(update={"images_per_step": images, "gradient_accumulation": 1})
    return config.model_copy(update={"train": train, "data": data})


def keep_streams(config: RunConfig, num_streams: int) -> RunConfig:
    """The config whose ``data.num_streams``, where it is ``auto``, is the one that the run to go on with began with."""
    if config.data.num_streams != "auto":
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"num_streams": num_streams})})


def batch_line(config: RunConfig, num_ranks: int) -> str:
    """One line for the start report: the images of a step, and the rate where a rule made it."""
    scaled = scale_to_ranks(config, num_ranks)
    line = (
        f"{images_per_step(config, num_ranks)} images a step: {num_ranks} ranks x {scaled.data.micro_batch_size} x "
        f"{scaled.train.gradient_accumulation} accumulated"
    )
    if config.optimizer.reference_images_per_step is None:
        return line
    return (
        f"{line}; lr {scaled.optimizer.lr:.4g} and warm-up of {scaled.schedule.warmup_steps} steps, from "
        f"{config.optimizer.lr:.4g} and {config.schedule.warmup_steps} at "
        f"{config.optimizer.reference_images_per_step} images ({config.optimizer.lr_scaling})"
    )


def shrunk_line(config: RunConfig, num_ranks: int) -> str:
    """One line where micro-batches become smaller on these ranks, and what else there is to choose; empty elsewhere."""
    asked, taken = config.data.micro_batch_size, scale_to_ranks(config, num_ranks).data.micro_batch_size
    if taken == asked:
        return ""
    images, at_once = images_per_step(config, num_ranks), asked * num_ranks
    alike = f"take {_listed(divisors(images // asked))} ranks or " if images % asked == 0 else ""
    larger = -(-images // at_once) * at_once
    return (
        f"data.micro_batch_size={taken} in place of {asked}: {num_ranks} ranks share the {images} images of "
        f"train.images_per_step; to keep {asked} {alike}pass {_other_recipe(config, images, larger)}"
    )


def planned_batch(config: RunConfig, num_ranks: int) -> tuple[RunConfig, str]:
    """The run with steps that these ranks can make, and a line on it where that makes it another recipe.

    Where ranks cannot share ``train.images_per_step``, the next larger number that they can is planned with: to train
    so is for the user to decide.
    """
    images, larger = images_per_step(config, num_ranks), _next_images(config, num_ranks)
    if larger == images:
        return config, ""
    line = (
        f"{num_ranks} ranks cannot share the {images} images of train.images_per_step: planned with "
        f"{_other_recipe(config, images, larger)}"
    )
    return _with_images(config, images, larger), "; ".join([line, *_ranks_for(config, images, "to keep it take")])


def _scaled(optimizer: OptimizerConfig, ratio: float) -> OptimizerConfig:
    lr = optimizer.lr * ratio ** _EXPONENTS[optimizer.lr_scaling]
    return optimizer.model_copy(update={"lr": lr, "lr_scaling": "none", "reference_images_per_step": None})


def _listed(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
