"""DeepSpeed's keys that a run may not set: those that a field of ours decides, and those that are refused, and why."""

from __future__ import annotations

from typing import Any

_HEADS = "heads_module() of the model"
_BATCH = "data.micro_batch_size"
_Z = "zero_optimization."

OWNED = {
    f"{_Z}stage": "zero.stage",
    f"{_Z}stage3_param_persistence_threshold": "zero.persistence_threshold",
    f"{_Z}param_persistence_threshold": "zero.persistence_threshold",
    f"{_Z}stage3_model_persistence_threshold": "zero.persistence_threshold",
    f"{_Z}model_persistence_threshold": "zero.persistence_threshold",
    "bf16.enabled": "train.precision",
    "bfloat16.enabled": "train.precision",
    "fp16": "train.precision",
    "torch_autocast": "train.precision",
    "data_types.param_dtype": "train.precision",
    "data_types.buffer_dtype": "train.precision",
    "data_types.keep_in_fp32_modules": "train.precision",
    "communication_data_type": "zero.reduce_dtype",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "managed_gradient_accumulation": "train.gradient_accumulation",
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_clipping": "optimizer.clip_grad_norm",
    f"{_Z}stage3_module_granularity_threshold": _HEADS,
    f"{_Z}module_granularity_threshold": _HEADS,
    f"{_Z}leaf_module": _HEADS,
    f"{_Z}offload_optimizer.device": "zero.offload_optimizer",
    f"{_Z}offload_optimizer.nvme_path": "zero.offload_optimizer",
    f"{_Z}cpu_offload": "zero.offload_optimizer",
    f"{_Z}offload_param.device": "zero.offload_parameters",
    f"{_Z}offload_param.nvme_path": "zero.offload_parameters",
    f"{_Z}offload_param.buffer_size": "zero.offload_parameters",
    f"{_Z}offload_param.max_in_cpu": "zero.offload_parameters",
    f"{_Z}cpu_offload_param": "zero.offload_parameters",
    f"{_Z}zero_hpz_partition_size": "zero.node_partition",
    "zero_force_ds_cpu_optimizer": "optimizer",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "activation_checkpointing": "checkpoint_blocks of a branch",
}
"""Keys, and sections of keys, that a field of ours decides, with the field to set instead."""

_SAVES = "checkpoints are written and read by the run itself, not by DeepSpeed"
_METRICS = "the run writes its metrics itself, to metrics.jsonl and TensorBoard"
_RANKS = "all ranks are data parallel"
_QUANTISED = "it rounds weights or gradients to fewer bits, which nobody has measured here"
_NORM = "a step whose gradient is not finite must change nothing"
_MASTERS = "master weights and moments are fp32, in memory and in checkpoints"
_UNTRIED = "nobody has tried it with this training"
_GONE = "it has been removed from DeepSpeed"

REFUSED: dict[str, tuple[Any, str]] = {
    f"{_Z}round_robin_gradients": (False, "it orders parameters by its own rule, and a run would resume into others"),
    f"{_Z}elastic_checkpoint": (False, "its checkpoints cannot be resumed; ours resume on any ranks without it"),
    # Seen with DeepSpeed 0.19.8: __avg_scatter_contiguous_grads divides by it and by the ranks.
    "gradient_predivide_factor": (
        1.0,
        "in stage 3, gradients come out divided by it where it equals the number of ranks",
    ),
    f"{_Z}legacy_stage1": (False, _UNTRIED),
    f"{_Z}parameter_alignment": (False, "it pads between parameters, where a run's checkpoints have none"),
    f"{_Z}load_from_fp32_weights": (True, _SAVES),
    f"{_Z}pipeline_loading_checkpoint": (False, _SAVES),
    f"{_Z}stage3_gather_16bit_weights_on_model_save": (False, _SAVES),
    f"{_Z}gather_16bit_weights_on_model_save": (False, _SAVES),
    f"{_Z}stage3_gather_fp16_weights_on_model_save": (False, _SAVES),
    f"{_Z}compute_grad_norm": (True, _NORM),
    f"{_Z}zero_quantized_weights": (False, _QUANTISED),
    f"{_Z}zero_quantized_nontrainable_weights": (False, _QUANTISED),
    f"{_Z}zero_quantized_gradients": (False, _QUANTISED),
    f"{_Z}override_module_apply": (True, "the model is built before DeepSpeed sees it"),
    f"{_Z}save_muon_momentum_buffer_in_memory": (False, "the optimiser is AdamW"),
    f"{_Z}zenflow": (None, _UNTRIED),
    f"{_Z}cpu_offload_use_pin_memory": (None, "DeepSpeed calls it offload_optimizer.pin_memory now"),
    f"{_Z}offload_optimizer.pipeline_read": (False, _UNTRIED),
    f"{_Z}offload_optimizer.pipeline_write": (False, _UNTRIED),
    f"{_Z}offload_optimizer.fast_init": (False, _UNTRIED),
    f"{_Z}offload_optimizer.ratio": (1.0, _UNTRIED),
    f"{_Z}offload_optimizer.super_offload": (False, _UNTRIED),
    f"{_Z}offload_optimizer.cpuadam_cores_perc": (0.8, "the optimiser is torch's AdamW"),
    f"{_Z}mics_shard_size": (-1, "MiCS ZeRO-3 sharding has been removed from DeepSpeed; see zero.shard_over"),
    f"{_Z}mics_hierarchical_params_gather": (False, "MiCS ZeRO-3 sharding has been removed from DeepSpeed"),
    f"{_Z}zeropp_loco_param": (None, _GONE),
    "gradient_allreduce_op": ("mean", "losses are means over all images; a sum is not supported with ZeRO stage 3"),
    "disable_allgather": (False, "it does nothing under ZeRO"),
    "disable_python_gc": (False, _UNTRIED),
    "bf16.check_grad_overflow": (True, _NORM),
    "bf16.immediate_grad_update": (False, _UNTRIED),
    "bf16.bf16_master_weights_and_grads": (False, _MASTERS),
    "bf16.bf16_optimizer_states": (False, _MASTERS),
    "aio.use_gds": (False, _UNTRIED),
    "checkpoint.load_universal": (False, _SAVES),
    "checkpoint.use_node_local_storage": (False, _SAVES),
    "checkpoint.parallel_write": (None, _SAVES),
    "checkpoint.writer": (None, _SAVES),
    "checkpoint.checkpoint_serialization": (True, _SAVES),
    "datastates_ckpt": (None, _SAVES),
    "tensorboard": (None, _METRICS),
    "wandb": (None, _METRICS),
    "csv_monitor": (None, _METRICS),
    "comet": (None, _METRICS),
    "flops_profiler": (None, "the run counts its operations exactly: see `piip-scale count`"),
    "seq_parallel_communication_data_type": ("fp32", _RANKS),
    "sequence_parallel_size": (1, _RANKS),
    "tensor_parallel": (None, _RANKS),
    "expert_parallel": (None, _RANKS),
    "use_data_before_expert_parallelism": (False, _RANKS),
    "pipeline": (None, _RANKS),
    "hybrid_engine": (None, "it is for generating text"),
    "weight_quantization": (None, _QUANTISED),
    "data_efficiency": (None, "the order of the data is data.*'s"),
    "dataloader_drop_last": (False, "the run has its own loader"),
    "compile": (None, _UNTRIED),
    "autotuning": (None, "`piip-scale plan` chooses sizes"),
    "vocabulary_size": (None, "there is none"),
    **dict.fromkeys(
        (
            "nebula",
            "compression_training",
            "amp",
            "quantize_training",
            "sparse_gradients",
            "eigenvalue",
            "sparse_attention",
            "elasticity",
            "graph_harvesting",
            "curriculum_learning",
            "progressive_layer_drop",
        ),
        (None, _GONE),
    ),
}
"""Keys, and sections of keys, that are refused: DeepSpeed's default, which may stand, and the reason."""
