"""Config of how a run is sharded."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from piip_scale.config.base import Positive, Strict

NonNegative = Annotated[int, Field(ge=0)]


def _place(value: str) -> str:
    if value not in ("none", "cpu") and not value.startswith("/"):
        raise ValueError("must be 'none', 'cpu' or the absolute path of a folder on a local disk")
    return value


Offload = Annotated[str, AfterValidator(_place)]


LAYOUT: dict[str, Any] = {
    "stage": 3,
    "shard_over": "all",
    "node_partition": 1,
    "offload_optimizer": "none",
    "offload_parameters": "none",
}
"""What says who holds what, and what it is where a config does not say."""


class ZeroConfig(Strict):
    """DeepSpeed's sharding.

    Attributes:
        strategy: ``auto`` leaves those of the next keys but ``persistence_threshold`` and ``reduce_dtype`` that are not
            written to a plan, which takes the fastest layout that fits when a run starts, and writes it into the run's
            config.py; resuming keeps that. ``manual`` takes them as they are.
        stage: 0 plain data parallel, 1 optimiser, 2 and gradients, 3 and parameters.
        persistence_threshold: Parameters of fewer elements stay whole on every rank; ``auto`` puts it between the
            largest branch's matrices and the next branch's.
        offload_optimizer: Where master weights and moments live and are updated: ``none`` leaves them on the device,
            ``cpu`` takes host memory, an absolute path a folder on a local NVMe disk (stage 3), one for each run; a
            save then waits until that state is copied into the checkpoint.
        offload_parameters: Where slices of parameters wait for their use, likewise; stage 3 only.
        reduce_dtype: Of the messages that sum gradients over ranks. ``bf16`` halves them and rounds each sum; the sums
            over micro-batches are float32 either way. Only with ``train.precision='bf16'``.
        node_partition: Ranks of a node that between them keep a second copy of the sharded parameters, so that
            gathers of the backward pass stay inside the node (hpZ); 1 keeps none. Stage 3 only.
        shard_over: Ranks that share one copy of parameters, gradients and optimiser state: ``all``, those of each
            ``node``, or so many that follow each other. Each such group is a replica of the others, and the slices of
            its gradients are summed with theirs once a step, not once a micro-batch. Stage 3 only, without offloading.
        network_gbps: Gb/s of a whole node to others, in one direction: what ``auto`` and ``piip-scale plan`` reckon
            with.
        deepspeed: Raw DeepSpeed keys on top, of those that are known to leave numbers and checkpoints as they are; the
            value ``auto`` leaves a key to us.
    """

    strategy: Literal["manual", "auto"] = "manual"
    stage: Literal[0, 1, 2, 3] = 3
    persistence_threshold: Literal["auto"] | NonNegative = "auto"
    offload_optimizer: Offload = "none"
    offload_parameters: Offload = "none"
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    node_partition: Positive = 1
    shard_over: Literal["all", "node"] | Positive = "all"
    network_gbps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 400.0
    deepspeed: dict[str, Any] = {}

    @property
    def open_keys(self) -> tuple[str, ...]:
        """Keys of the layout that are still to be decided."""
        return tuple(key for key in LAYOUT if self.strategy == "auto" and key not in self.model_fields_set)

    def decided(self, other: ZeroConfig) -> ZeroConfig:
        """With what is open as it is in another one."""
        return self.model_copy(update={key: getattr(other, key) for key in self.open_keys})

    @property
    def optimizer_is_on_disk(self) -> bool:
        """Whether master weights and moments live in files of DeepSpeed's."""
        return self.offload_optimizer not in ("none", "cpu")

    @model_validator(mode="after")
    def _stage_can(self) -> ZeroConfig:
        if self.offload_optimizer != "none" and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3: without ZeRO nothing is moved")
        for name, used in (
            ("offload_optimizer to a disk", self.optimizer_is_on_disk),
            ("offload_parameters", self.offload_parameters != "none"),
            ("node_partition", self.node_partition > 1),
            (f"shard_over={self.shard_over!r}", self.shard_over != "all"),
        ):
            if used and self.stage != 3:
                raise ValueError(f"{name} needs stage=3, got stage={self.stage}")
        return self

    @model_validator(mode="after")
    def _replicas_can(self) -> ZeroConfig:
        if self.shard_over == "all":
            return self
        for name, used, why in (
            ("offload_optimizer", self.offload_optimizer != "none", "replicas sum their gradients on the device"),
            ("offload_parameters", self.offload_parameters != "none", "replicas sum their gradients on the device"),
            ("node_partition", self.node_partition > 1, "gathers stay inside the ranks of shard_over without"),
        ):
            if used:
                raise ValueError(
                    f"{name} does not go with shard_over={self.shard_over!r}: {why}; leave one of them out"
                )
        return self
