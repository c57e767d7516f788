"""DeepSpeed's config, decided from the model's sizes and the config: nothing here touches DeepSpeed.

Parameter-inverted sharding: the largest branch holds most of the parameters and runs at the lowest resolution, so
its matrices are gathered on use and released; everything smaller stays whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from piip_scale.config.run import RunConfig
from piip_scale.config.zero import ZeroConfig
from piip_scale.engine.zero.raw_keys import checked_keys, leaves
from piip_scale.errors import ConfigError, ModelError
from piip_scale.models.unit import Unit

_REST = "rest"
BYTES = {"fp32": 4, "bf16": 2}
"""Of an element in a run's precision."""

# Messages of 100 MB in bf16 keep any link busy; a bucket beyond that only holds memory.
BUCKET_ELEMENTS = 50_000_000
# One optimiser step works on so many elements at a time, and needs 4 bytes of gradient for each beside its own state.
_SUB_GROUP_ELEMENTS = 200_000_000
_PLAIN = {
    "data_types.grad_accum_dtype": "fp32",
    "prescale_gradients": False,
    "zero_optimization.reduce_scatter": True,
    "zero_optimization.enable_sanity_checks": False,
}


@dataclass(frozen=True)
class Parameter:
    """One parameter's name and size.

    Attributes:
        name: Its name in ``named_parameters()``.
        numel: Elements.
        is_matrix: Of two axes or more: what costs memory, against biases, norms and scales.
        trainable: Whether it has a gradient and optimiser state.
        is_stored: Whether it has 8 bits an element, whatever the precision.
        unit: Name of the ``Unit`` that it is gathered with, where it is in one.
    """

    name: str
    numel: int
    is_matrix: bool
    trainable: bool
    is_stored: bool = False
    unit: str = ""

    def num_bytes(self, precision: str) -> int:
        """In a run of that precision."""
        return self.numel * (1 if self.is_stored else BYTES[precision])


@dataclass(frozen=True)
class Part:
    """One part of the model, a branch or the heads: what the start report counts.

    Attributes:
        name: The model's name for it.
        parameters: Its parameters; one that two parts share counts in the first.
    """

    name: str
    parameters: tuple[Parameter, ...]

    @property
    def numel(self) -> int:
        """Elements in all."""
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model by part, the largest branch first: all that sharding depends on."""

    parts: tuple[Part, ...]

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every parameter, part by part."""
        return tuple(parameter for part in self.parts for parameter in part.parameters)

    @property
    def numel(self) -> int:
        """Elements in all."""
        return sum(part.numel for part in self.parts)


@dataclass(frozen=True)
class Sharding:
    """The decision, and what led to it.

    Attributes:
        deepspeed: DeepSpeed's config dict.
        threshold: Parameters of at most so many elements stay whole on every rank (stage 3).
        reason: One line on the threshold.
        precision: ``fp32`` or ``bf16``.
        num_ranks: Ranks that share the sharded state.
        zero: What the config says of it.
        averaged: Whether each rank keeps a running average of its trained weights.
        num_replicas: Groups of so many ranks, each of which holds the whole state.
    """

    deepspeed: dict[str, Any]
    threshold: int
    reason: str
    precision: str
    num_ranks: int
    zero: ZeroConfig
    averaged: bool = False
    num_replicas: int = 1

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self.zero.stage

    def shards(self, parameter: Parameter) -> bool:
        """Whether the parameter is kept in slices and gathered for use."""
        return self.stage == 3 and parameter.numel > self.threshold


def measure(model: nn.Module, parts: Mapping[str, nn.Module]) -> Sizes:
    """Reads the sizes of a model off its parts; what no part holds is a part ``rest``.

    Args:
        model: The model, partitioned already or not.
        parts: ``TrainableModel.parts()``.

    Raises:
        ModelError: The model has no parameters, or ``parts`` is empty or names foreign modules.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    units = _units(model)
    seen: set[int] = set()
    found = [Part(name, tuple(_parameters(module, names, units, seen))) for name, module in parts.items()]
    rest = Part(_REST, tuple(_parameters(model, names, units, seen)))
    if not found or not names:
        raise ModelError("the model names no parts or has no parameters", rule="parts() names at least one branch")
    return Sizes((*found, rest) if rest.parameters else tuple(found))


def _units(model: nn.Module) -> dict[int, str]:
    """The unit of each parameter that is in one, by the parameter's identity."""
    units = [(name, module) for name, module in model.named_modules() if isinstance(module, Unit)]
    return {id(parameter): name for name, unit in reversed(units) for parameter in unit.parameters()}


def _parameters(
    module: nn.Module, names: Mapping[int, str], units: Mapping[int, str], seen: set[int]
) -> Iterator[Parameter]:
    for parameter in module.parameters():
        if id(parameter) not in names:
            raise ModelError("parts() names a module outside the model", rule="every part is a submodule of the model")
        if id(parameter) not in seen:
            seen.add(id(parameter))
            shape = getattr(parameter, "ds_shape", parameter.shape)  # zero.Init leaves an empty tensor behind
            yield Parameter(
                names[id(parameter)],
                shape.numel(),
                is_matrix=len(shape) > 1,
                trainable=parameter.requires_grad,
                is_stored=not parameter.is_floating_point(),
                unit=units.get(id(parameter), ""),
            )


def plan_sharding(config: RunConfig, sizes: Sizes, num_ranks: int, ranks_per_node: int | None = None) -> Sharding:
    """Decides DeepSpeed's config from ours.

    Args:
        config: The run.
        sizes: The model's, from ``measure``.
        num_ranks: Data-parallel ranks.
        ranks_per_node: So many of them are on each node; ``None`` has all on one.

    Raises:
        ConfigError: A raw key in ``zero.deepspeed`` is not allowed, or stage and precision, or ranks and
            ``zero.shard_over``, do not go together.
    """
    if config.zero.stage == 0 and config.train.precision == "bf16":
        raise ConfigError(
            "zero.stage=0 with train.precision='bf16'",
            rule="without ZeRO there are no fp32 master weights and gradients beside bf16 ones",
            fix="set zero.stage=1, or train.precision='fp32'",
        )
    threshold, reason = _threshold(config, sizes)
    sharing = shard_ranks(config.zero, num_ranks, ranks_per_node or num_ranks)
    _check_node_partition(config.zero.node_partition, num_ranks, ranks_per_node or num_ranks)
    decided = _decided(config, sizes, threshold, sharing)
    merged = _merged(decided, checked_keys(config.zero.deepspeed, decided, config.zero))
    if sharing < num_ranks:
        _check_replicas_sum(config.zero)
    averaged, replicas = config.train.ema_decay is not None, num_ranks // sharing
    return Sharding(merged, threshold, reason, config.train.precision, sharing, config.zero, averaged, replicas)


def shard_ranks(zero: ZeroConfig, num_ranks: int, ranks_per_node: int) -> int:
    """Ranks that share one copy of the sharded state, by ``zero.shard_over``.

    Args:
        zero: The config's section.
        num_ranks: Data-parallel ranks.
        ranks_per_node: Of each node.

    Raises:
        ConfigError: They cannot be grouped so.
    """
    if zero.shard_over == "all":
        return num_ranks
    size = ranks_per_node if zero.shard_over == "node" else zero.shard_over
    if num_ranks % size or (ranks_per_node % size and size % ranks_per_node):
        raise ConfigError(
            "zero.shard_over",
            value=zero.shard_over,
            rule=f"it divides the {num_ranks} ranks, into parts of their nodes of {ranks_per_node} or whole ones",
            fix="set it to node or all" if zero.shard_over != "node" else "set it to all",
        )
    return size


def _check_node_partition(size: int, num_ranks: int, ranks_per_node: int) -> None:
    if ranks_per_node % size or num_ranks % size:
        raise ConfigError(
            "zero.node_partition",
            value=size,
            rule=f"it divides the {ranks_per_node} ranks of each node",
            fix=f"take {ranks_per_node}, or 1 for none",
        )


def _check_replicas_sum(zero: ZeroConfig) -> None:
    """Refuses raw keys with which DeepSpeed's own gradients and update stay, which know nothing of replicas."""
    for path, value in leaves(zero.deepspeed):
        if path in _PLAIN and value not in ("auto", _PLAIN[path]):
            raise ConfigError(
                f"zero.deepspeed.{path}",
                value=value,
                rule=f"replicas of zero.shard_over={zero.shard_over!r} sum plain gradients",
                fix="leave the key out, or set zero.shard_over to all",
            )


def _threshold(config: RunConfig, sizes: Sizes) -> tuple[int, str]:
    if isinstance(config.zero.persistence_threshold, int):
        # DeepSpeed keeps parameters of AT MOST the threshold; ours says "fewer elements stay whole".
        return max(config.zero.persistence_threshold - 1, 0), "as the config says"
    largest, others = sizes.parts[0], sizes.parts[1:]
    repeated = _repeated_matrices(largest)
    if not repeated:
        return sizes.numel, f"{largest.name} has no matrices to shard"
    smallest = min(repeated)
    shared = sum(p.numel for part in others for p in part.parameters if p.numel >= smallest)
    below = max((p.numel for p in sizes.parameters if p.numel < smallest), default=0)
    also = f", as have {shared:,} elements of other parts" if shared else ""
    reason = f"matrices of {largest.name} have {smallest:,} or more{also}; the next smaller parameter has {below:,}"
    # Half way, in factors, so that neither neighbour is near: the threshold of H6B lies between 6.6 M and 10.2 M.
    return round((below * smallest) ** 0.5), reason


def _repeated_matrices(part: Part) -> list[int]:
    """Sizes of the part's matrices without its embeddings, which come once: those of a size that repeats."""
    counts: dict[int, int] = {}
    for parameter in part.parameters:
        if parameter.is_matrix:
            counts[parameter.numel] = counts.get(parameter.numel, 0) + 1
    repeated = [numel for numel, count in counts.items() if count > 1]
    return repeated or list(counts)


def _decided(config: RunConfig, sizes: Sizes, threshold: int, num_ranks: int) -> dict[str, Any]:
    decided: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_optimization": {
            "stage": config.zero.stage,
            **_zero_keys(config.zero.stage, sizes, threshold),
            **_offload_keys(config.zero, sizes, num_ranks),
        },
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.train.precision == "bf16":
        decided |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": config.zero.reduce_dtype,
        }
    return decided


def _zero_keys(stage: int, sizes: Sizes, threshold: int) -> dict[str, Any]:
    largest = max(parameter.numel for parameter in sizes.parameters)
    bucket = min(sizes.numel, max(largest, BUCKET_ELEMENTS))
    bucket += bucket % 2  # stages 1 and 2 insist on an even one
    if stage == 0:
        return {}
    if stage < 3:
        return {"reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    return {
        "reduce_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_param_persistence_threshold": threshold,
        "sub_group_size": _SUB_GROUP_ELEMENTS,
        # Torch's own: see kept_weights.
        "memory_efficient_linear": False,
    }


def _offload_keys(zero: ZeroConfig, sizes: Sizes, num_ranks: int) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    if zero.offload_optimizer != "none":
        keys["offload_optimizer"] = _place(zero.offload_optimizer)
    if zero.offload_parameters != "none":
        keys["offload_param"] = _place(zero.offload_parameters)
    if "nvme_path" in keys.get("offload_param", {}):
        # A buffer takes one parameter's slice. DeepSpeed would keep a rank's first billion elements in host memory.
        largest = max(parameter.numel for parameter in sizes.parameters)
        keys["offload_param"] |= {"buffer_size": -(-largest // num_ranks), "max_in_cpu": 0}
    if zero.node_partition > 1:
        keys["zero_hpz_partition_size"] = zero.node_partition
    return keys


def _place(place: str) -> dict[str, Any]:
    return {"device": "cpu"} if place == "cpu" else {"device": "nvme", "nvme_path": place}


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
