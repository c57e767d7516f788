"""What a run's batch, rate and warm-up become on a number of ranks: pure functions, the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from piip_scale.config.run import DataConfig, OptimizerConfig, RunConfig
from piip_scale.data.order import divisors, streams_for
from piip_scale.engine.versions import FROM_WEIGHTS
from piip_scale.errors import ConfigError

_EXPONENTS = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


def accumulation_for(images_per_step: int, micro_batch_size: int, num_ranks: int) -> int:
    """Micro-batches that each rank adds up for a step of so many images.

    Args:
        images_per_step: Images of one optimiser step, over all ranks.
        micro_batch_size: Images of one micro-batch on one rank.
        num_ranks: Data-parallel ranks.

    Raises:
        ConfigError: They do not divide; lists what would.
    """
    at_once = micro_batch_size * num_ranks
    if images_per_step % at_once:
        raise ConfigError(
            "train.images_per_step",
            value=images_per_step,
            rule=f"a multiple of {at_once}, the images that {num_ranks} ranks x data.micro_batch_size="
            f"{micro_batch_size} take at once",
            fix=_what_fits(images_per_step, micro_batch_size, num_ranks),
        )
    return images_per_step // at_once


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
        ConfigError: The ranks cannot make a step of so many images.
    """
    images = images_per_step(config, num_ranks)
    data = _shared_data(config, images, num_ranks)
    accumulation = accumulation_for(images, data.micro_batch_size, num_ranks)
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
    data = config.data
    if images % (data.micro_batch_size * num_ranks) and images % num_ranks == 0:
        refusal = f"{num_ranks} ranks cannot share a step of train.images_per_step={images} images"
        data = _smaller_micro_batches(config, images, num_ranks, refusal, "train")
    return data.model_copy(update={"num_streams": streams_for(data.num_streams, num_ranks)})


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
    if images % num_ranks:
        raise ConfigError(refusal, rule="the ranks divide these", fix=f"resume on {_listed(divisors(images))} ranks")
    data = _smaller_micro_batches(config, images, num_ranks, refusal, "resume")
    train = config.train.model_copy(update={"images_per_step": images, "gradient_accumulation": 1})
    return config.model_copy(update={"train": train, "data": data})


def keep_streams(config: RunConfig, num_streams: int) -> RunConfig:
    """The config whose ``data.num_streams``, where it is ``auto``, is the one that the run to go on with began with."""
    if config.data.num_streams != "auto":
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"num_streams": num_streams})})


def _smaller_micro_batches(config: RunConfig, images: int, num_ranks: int, refusal: str, verb: str) -> DataConfig:
    """The data config with the largest micro-batches that fit and that its own rules allow, as mixup those in pairs.

    Raises:
        ConfigError: Its rules allow none of them; ``refusal`` is what cannot be, and ``verb`` what to do on others.
    """
    sizes = [size for size in divisors(images // num_ranks) if size <= config.data.micro_batch_size]
    rules = []
    for size in sorted(sizes, reverse=True):
        try:
            return type(config.data).model_validate(config.data.model_dump() | {"micro_batch_size": size})
        except ValidationError as error:
            rules.append(error.errors()[0]["msg"].removeprefix("Value error, "))
    raise ConfigError(
        refusal,
        value=sizes,
        rule=f"these micro-batches are not allowed: {rules[0]}",
        fix=f"{verb} on a number of ranks of which each has a share of {images} images that is",
    )


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
    images = images_per_step(config, num_ranks)
    return (
        f"data.micro_batch_size={taken} in place of {asked}: {num_ranks} ranks share the {images} images of "
        f"train.images_per_step; {_what_fits(images, asked, num_ranks)}"
    )


def planned_batch(config: RunConfig, num_ranks: int) -> tuple[RunConfig, str]:
    """The run with steps that these ranks can make, and a line on it where that makes it another recipe.

    Where ranks cannot share ``train.images_per_step`` at all, the next larger number that they can is planned with:
    to train so is for the user to decide.
    """
    images = images_per_step(config, num_ranks)
    if images % num_ranks == 0:
        return config, ""
    larger = (images // num_ranks + 1) * num_ranks
    train = config.train.model_copy(update={"images_per_step": larger, "gradient_accumulation": 1})
    line = (
        f"{num_ranks} ranks cannot share the {images} images of train.images_per_step: planned with {larger}, which is "
        f"another recipe; to keep it take {_listed(divisors(images))} ranks"
    )
    return config.model_copy(update={"train": train}), line


def _scaled(optimizer: OptimizerConfig, ratio: float) -> OptimizerConfig:
    lr = optimizer.lr * ratio ** _EXPONENTS[optimizer.lr_scaling]
    return optimizer.model_copy(update={"lr": lr, "lr_scaling": "none", "reference_images_per_step": None})


def _what_fits(images: int, micro: int, num_ranks: int) -> str:
    alike = divisors(images // micro) if images % micro == 0 else []
    ways = [f"{_listed(alike)} ranks"] if alike else []
    if smaller := [ranks for ranks in divisors(images) if ranks not in alike and images // ranks < micro]:
        ways.append(f"{_listed(smaller)} ranks with micro-batches of {_listed(sorted({images // r for r in smaller}))}")
    if images % num_ranks == 0:
        ways.append(f"data.micro_batch_size {_listed(divisors(images // num_ranks))}")
    at_once = micro * num_ranks
    near = sorted({max(images // at_once, 1) * at_once, (images // at_once + 1) * at_once})
    ways.append(f"train.images_per_step {_listed(near)} (which is another recipe)")
    return f"what fits: {'; or '.join(ways)}"


def _listed(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last
