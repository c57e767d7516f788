"""How a run scales over nodes: steps of as many images on more GPUs, and as many images on each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from piip_scale.config.run import RunConfig
from piip_scale.engine.batching import can_share, images_per_step, larger_steps
from piip_scale.engine.planning.choices import Choice, Chooser
from piip_scale.engine.planning.knobs import none_checkpointed
from piip_scale.engine.planning.memory import GIB

ChooserOf = Callable[[int], Chooser]


@dataclass(frozen=True)
class Scaled:
    """A run on a number of nodes, with steps of some images.

    Attributes:
        written: In the layout that it is written in.
        fastest: In the fastest layout that fits.
        uncheckpointed: The same with nothing computed again; ``None`` where that does not fit, or is so already.
    """

    written: Choice
    fastest: Choice
    uncheckpointed: Choice | None


@dataclass(frozen=True)
class ScalingPoint:
    """A number of nodes.

    Attributes:
        nodes: So many.
        num_ranks: GPUs of them.
        strong: Steps of as many images as on the fewest nodes; ``None`` where GPUs cannot share them.
        weak: As many images on each GPU as there.
    """

    nodes: int
    num_ranks: int
    strong: Scaled | None
    weak: Scaled


def scaling(
    config: RunConfig, numbers: Sequence[int], ranks_per_node: int, chooser_of: ChooserOf
) -> Iterator[ScalingPoint]:
    """The run on each number of nodes.

    Args:
        config: The run; its images of a step are those of the fewest nodes.
        numbers: Of nodes, rising.
        ranks_per_node: GPUs of each.
        chooser_of: The chooser of so many GPUs.

    Raises:
        ConfigError: The run cannot be on the fewest.
    """
    fewest = numbers[0] * ranks_per_node
    images = images_per_step(config, fewest)
    for nodes in numbers:
        ranks = nodes * ranks_per_node
        chooser = chooser_of(ranks)
        strong = _scaled(_with_images(config, images), chooser) if can_share(config, images, ranks) else None
        yield ScalingPoint(nodes, ranks, strong, _scaled(_with_images(config, images * ranks // fewest), chooser))


def _with_images(config: RunConfig, images: int) -> RunConfig:
    train = config.train.model_copy(update={"images_per_step": images, "gradient_accumulation": 1})
    return config.model_copy(update={"train": train})


def _scaled(config: RunConfig, chooser: Chooser) -> Scaled:
    written, fastest = chooser.asked(config), chooser.fastest_layout(config)
    whole = none_checkpointed(fastest.config)
    kept = None if whole.model == fastest.config.model else chooser.asked(whole)
    return Scaled(written, fastest, kept if kept is not None and kept.fits else None)


def scaling_lines(
    config: RunConfig, points: Sequence[ScalingPoint], layout_text: Callable[[RunConfig], str]
) -> list[str]:
    """A table of each kind of scaling, in the fastest layout that fits.

    Args:
        config: The run.
        points: Of ``scaling``.
        layout_text: Names a run's layout.
    """
    lines = ["strong scaling: steps of as many images"]
    lines += _table([(point, point.strong) for point in points], layout_text)
    if apart := [point.num_ranks for point in points if point.strong is None]:
        lines.append(f"to share a step on {apart[-1]} GPUs: {larger_steps(config, apart[-1])}")
    lines.append("weak scaling: as many images on each GPU")
    return lines + _table([(point, point.weak) for point in points], layout_text)


def _table(rows: Sequence[tuple[ScalingPoint, Scaled | None]], layout_text: Callable[[RunConfig], str]) -> list[str]:
    titles = ("nodes", "GPUs", "images", "s a step", "images/s", "of ideal", "as written", "kept", "GiB", "host GiB")
    lines = [_cells(*titles) + "  layout; what bounds it"]
    first: tuple[int, float] | None = None
    for point, scaled in rows:
        if scaled is None:
            lines.append(_cells(str(point.nodes), str(point.num_ranks)) + "  GPUs cannot share a step's images")
            continue
        time, memory = scaled.fastest.time, scaled.fastest.memory
        first = first or (point.num_ranks, time.images_per_s)
        of_ideal = time.images_per_s / first[1] * first[0] / point.num_ranks
        kept = "" if scaled.uncheckpointed is None else f"{scaled.uncheckpointed.time.seconds:.3f}"
        host = memory.host_memory * scaled.fastest.ranks_per_node / GIB
        numbers = (
            *(str(point.nodes), str(point.num_ranks), str(time.images), f"{time.seconds:.3f}"),
            *(f"{time.images_per_s:.1f}", f"{of_ideal:.0%}", f"{scaled.written.time.seconds:.3f}", kept),
            *(f"{memory.total / GIB:.1f}", f"{host:.1f}"),
        )
        fits = "" if scaled.fastest.fits else ", does not fit"
        lines.append(_cells(*numbers) + f"  {layout_text(scaled.fastest.config)}{fits}; {time.bound_by}")
    return lines


def _cells(*texts: str) -> str:
    return "".join(f"{text:>11}" for text in texts)
