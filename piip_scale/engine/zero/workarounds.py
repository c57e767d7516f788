"""Faults and limits of DeepSpeed met while training with it, and what stands here instead.

A row's ``fault`` is a line of that version's source: ``tests/engine/zero/test_workarounds.py`` fails where the line is
gone, which is the time to look whether the row's code can go too. Its ``test`` fails where our code is gone and the
fault is not. ``benchmarks/deepspeed.md`` shows the table.
"""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "deepspeed 0.19.8"


@dataclass(frozen=True)
class Workaround:
    """One fault.

    Attributes:
        what: What DeepSpeed does, as the end of "this version".
        fault: The module in which it does, and a line there.
        here: What does it right, as file in the package and name in it.
        test: The test of that, as file and function.
    """

    what: str
    fault: tuple[str, str]
    here: tuple[str, str]
    test: tuple[str, str]


_PARTITION, _OFFLOAD = "deepspeed.runtime.zero.partition_parameters", "deepspeed.runtime.zero.parameter_offload"
_COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator"
_STAGE3, _ENGINE, _GROUPS = "deepspeed.runtime.zero.stage3", "deepspeed.runtime.engine", "deepspeed.utils.groups"
_SETUP, _BUILDING, _DISK = "engine/zero/setup.py", "engine/zero/building.py", "engine/zero/disk_offload.py"
_HOOKS = "engine/zero/unit_hooks.py"
_T_SETUP, _T_BUILDING = "engine/zero/test_setup.py", "engine/zero/test_building.py"
_T_DISK, _T_RESUMING = "engine/zero/test_disk_offload.py", "engine/test_resuming.py"
_T_UPDATE = "engine/zero/test_update.py"
_T_CELLS = "engine/test_resume_cells.py"

WORKAROUNDS = (
    Workaround(
        "cannot broadcast a parameter without axes, so merging weights have shape (1,)",
        (_PARTITION, "dist.broadcast(param.data.view(torch.uint8), 0, group=param.ds_process_group)"),
        ("models/merging.py", "MergePart"),
        ("engine/zero/test_workarounds.py", "test_no_parameter_is_without_axes"),
    ),
    Workaround(
        "never reduces the gradients of a leaf that returns a dict, so such a leaf is refused",
        (_OFFLOAD, "warning_msg_fn=_bwd_hook_unexpected_inputs_msg"),
        (_SETUP, "_check_leaf_output"),
        (_T_SETUP, "test_each_refusal_is_one_line_that_names_the_difference"),
    ),
    Workaround(
        "counts a call for each tensor that a module returns, and parts from ranks where there are fewer",
        (_OFFLOAD, "sub_module.applied_pre_backward_ref_cnt -= 1"),
        (_HOOKS, "hook_units"),
        ("engine/test_equality.py", "test_a_rank_without_boxes_neither_hangs_nor_changes_the_gradient"),
    ),
    Workaround(
        "gathers resident parameters by one message each, after an update",
        (_STAGE3, "self.persistent_parameters[0].all_gather(self.persistent_parameters)"),
        (_SETUP, "_gather_residents_together"),
        (_T_SETUP, "test_residents_travel_once_a_step_together_and_sharded_ones_twice"),
    ),
    Workaround(
        "leaves residents away at the start and after a step that was not applied",
        (_STAGE3, "#Gathering persisting parameters"),
        (_SETUP, "gather_residents"),
        ("engine/test_equality.py", "test_a_step_with_nan_on_one_rank_changes_nothing_on_any"),
    ),
    Workaround(
        "gathers residents from hpZ's second copy, that of before the update",
        (_PARTITION, "use_secondary_tensor = params[0].ds_secondary_tensor is not None"),
        (_SETUP, "_gather_coalesced"),
        ("engine/test_equality.py", "test_a_second_copy_on_every_two_of_four_ranks_changes_no_number"),
    ),
    Workaround(
        "drops hpZ's second copies of trained parameters only, so frozen ones computed with what stood there before a "
        "resume",
        (_STAGE3, "for fpg in self.fp16_groups:"),
        ("engine/zero/partitions.py", "_drop_second_copies"),
        (_T_CELLS, "test_going_on_is_the_run_without_a_break"),
    ),
    Workaround(
        "hooks every module, 0.5 ms each, and gathers and releases what each owns by itself",
        (_OFFLOAD, "self.forward_hooks.append(module.register_forward_pre_hook(_pre_forward_module_hook))"),
        (_HOOKS, "hook_units"),
        ("engine/zero/test_unit_hooks.py", "test_only_the_block_itself_is_hooked"),
    ),
    Workaround(
        "puts a linear layer of its own in the place of torch's, lest gathered weights be kept: Python, and the bias "
        "in a pass of its own",
        (_PARTITION, "torch.nn.functional.linear = zero3_linear_wrap"),
        ("engine/zero/kept_weights.py", "keeping_parameters"),
        (
            "engine/zero/test_kept_weights.py",
            "test_matrices_can_go_and_come_back_and_gradients_are_those_of_the_plain_call",
        ),
    ),
    Workaround(
        "cuts all residents before each update and makes them whole again behind it, 0.1 ms each",
        (_OFFLOAD, "self.get_param_coordinator().release_and_reset_all(self.module)"),
        ("engine/zero/residents.py", "Residents"),
        ("engine/zero/test_residents.py", "test_residents_stay_where_they_are_and_are_what_their_slices_are"),
    ),
    Workaround(
        "tells every module when a pass begins and ends, and looks up parameters in Python, to gather what is read",
        (_ENGINE, "module._parameters._in_forward = True"),
        (_HOOKS, "_look_up_plainly"),
        ("engine/zero/test_unit_hooks.py", "test_no_module_is_told_of_a_pass"),
    ),
    Workaround(
        "counts at each gradient how many are still to come",
        (_STAGE3, "current_expected = count_used_parameters_in_backward("),
        ("engine/zero/gradients.py", "attach"),
        (_T_UPDATE, "test_a_gradient_calls_nothing_of_deepspeeds"),
    ),
    Workaround(
        "formats lines about each parameter that it fetches or releases, asks for its rank, and drops them",
        (_PARTITION, 'print_rank_0(f"Before Partitioning Param {param.ds_id}", force=False)'),
        ("engine/zero/deepspeed_api.py", "_quiet_hot_paths"),
        ("engine/zero/test_deepspeed_api.py", "test_lines_that_nobody_asked_for_cost_nothing_and_others_are_said"),
    ),
    Workaround(
        "formats the numbers of all parameters at start, and drops the line",
        (_STAGE3, 'print_rank_0(f"initialized {__class__.__name__} with args: {locals()}", force=False)'),
        ("engine/zero/deepspeed_api.py", "_quiet_hot_paths"),
        ("engine/zero/test_deepspeed_api.py", "test_no_parameter_is_written_out_at_start"),
    ),
    Workaround(
        "updates sub-group by sub-group, each with a message for its norm, a copy of its gradients and a step through "
        "all optimiser groups",
        (_STAGE3, "for sub_group_id, group in enumerate(self.fp16_groups):"),
        ("engine/zero/update.py", "Update"),
        (_T_UPDATE, "test_every_group_is_visited_once_in_an_update"),
    ),
    Workaround(
        "casts gradients into a bucket, concatenates and divides them: up to 32 bytes a parameter and micro-batch",
        ("deepspeed.runtime.comm.coalesced_collectives", "tensor_partition_flat_buffer.div_(world_sz)  # pre-divide"),
        ("engine/zero/gradients.py", "GradientSums"),
        (_T_UPDATE, "test_a_gradient_is_read_once_and_written_once"),
    ),
    Workaround(
        "has the host wait for the device at the end of each micro-batch",
        (_STAGE3, "self.reduce_and_partition_stream.synchronize()"),
        ("engine/zero/gradients.py", "Lane"),
        (_T_UPDATE, "test_streams_wait_for_each_other_and_gradients_are_held_until_their_message_is_past"),
    ),
    Workaround(
        "keeps the groups of ranks of an engine for those that are built without any later in the process",
        (_ENGINE, "groups.mpu = self.mpu"),
        (_SETUP, "_initialize"),
        ("engine/test_layouts.py", "test_a_run_goes_on_in_any_layout"),
    ),
    Workaround(
        "counts all batches of an evaluation as one pass, unless reset",
        (_OFFLOAD, "self.fwd_pre_hook = self.module.register_forward_pre_hook(_start_of_forward_hook)"),
        ("engine/zero/deepspeed_api.py", "begin_pass"),
        (_T_SETUP, "test_evaluation_under_zero_3_sees_the_current_weights"),
    ),
    Workaround(
        "converts whole parameters only, and sends rank 0's to all",
        (_PARTITION, "dist.broadcast(param.data.view(torch.uint8), 0, group=param.ds_process_group)"),
        (_BUILDING, "Cutter"),
        (_T_BUILDING, "test_a_rank_reads_no_more_than_it_keeps"),
    ),
    Workaround(
        "neither casts nor moves a model that has cut parameters",
        (_ENGINE, "if not (self.dont_change_device or is_zero_init_model):"),
        (_BUILDING, "settle"),
        (_T_BUILDING, "test_ranks_together_hold_what_one_process_would"),
    ),
    Workaround(
        "resumes on the same ranks and stage only, and over universal checkpoints gives all groups the first one's "
        "settings, shares a step counter and loses frozen parameters",
        (_ENGINE, "self.load_universal_checkpoint"),
        ("engine/zero/restoring.py", "restore"),
        (_T_RESUMING, "test_one_rank_goes_on_where_two_were"),
    ),
    Workaround(
        "copies two scripts into each checkpoint",
        (_ENGINE, "def _copy_recovery_script(self, save_path):"),
        ("engine/zero/engine_files.py", "_instead_of_writing"),
        ("engine/zero/test_workarounds.py", "test_a_save_leaves_no_scripts_and_the_engine_as_it_was"),
    ),
    Workaround(
        "passes over unknown top-level keys of its config, and takes keys that change what checkpoints mean",
        ("deepspeed.runtime.config", "_REMOVED_TOP_LEVEL_CONFIG_KEYS"),
        ("engine/zero/raw_keys.py", "checked_keys"),
        ("engine/zero/test_raw_keys.py", "test_each_refused_key_is_refused_with_its_reason_and_its_default_may_stand"),
    ),
    Workaround(
        "refuses bf16 without ZeRO late, when ranks have begun",
        (_ENGINE, 'raise NotImplementedError(f"unsupported mix of {model_dtype=} and {grad_accum_dtype=}")'),
        ("engine/zero/plan.py", "plan_sharding"),
        ("engine/zero/test_zero_plan.py", "test_bf16_without_zero_has_no_master_weights"),
    ),
    Workaround(
        "makes groups of ranks with torch's own limits",
        (_GROUPS, "group = dist.new_group(ranks)"),
        ("engine/zero/deepspeed_api.py", "set_group_timeouts"),
        ("engine/zero/test_deepspeed_api.py", "test_every_group_gets_the_limit_with_either_name_of_torch"),
    ),
    Workaround(
        "compiles an extension on CPUs at its first use, and dies without a compiler",
        ("deepspeed.comm.torch", "shm_cpp_module = builder.load()"),
        ("engine/zero/deepspeed_api.py", "load"),
        (_T_SETUP, "test_evaluation_under_zero_3_sees_the_current_weights"),
    ),
    Workaround(
        "waits for ever for a lock that a killed compilation left (torch does)",
        ("torch.utils.file_baton", "while os.path.exists(self.lock_file_path):"),
        ("engine/zero/extensions.py", "load_extension"),
        (_T_DISK, "test_a_lock_that_a_killed_compilation_left_is_removed"),
    ),
    Workaround(
        "never loads moments, step counters and what is too small for the disk, where the optimiser is on one",
        (_ENGINE, "if load_zero_checkpoint and not self.zero_nvme_offload_optimizer():"),
        ("engine/zero/partitions.py", "partitions_in_memory"),
        (_T_DISK, "test_a_disk_changes_no_bit_of_a_run_that_is_resumed_or_not"),
    ),
    Workaround(
        "saves one element of a frozen parameter that is on a disk",
        (_ENGINE, "return param.ds_tensor.detach().cpu() if hasattr(param, 'ds_id') else param.detach().cpu()"),
        ("engine/zero/engine_files.py", "engine_files"),
        (_T_DISK, "test_a_checkpoint_holds_raw_files_and_frozen_weights_as_they_were"),
    ),
    Workaround(
        "takes bf16 for parameters of any type on a CPU (precedence of `or` and `if`)",
        (_PARTITION, "self.dtype = dtype or torch.float16 if get_accelerator().is_fp16_supported("),
        (_DISK, "_set_dtype"),
        (_T_DISK, "test_a_disk_changes_no_bit_of_a_run_that_is_resumed_or_not"),
    ),
    Workaround(
        "reads a parameter from a disk twice at once where forward turns into backward, which an assertion ends",
        (_COORDINATOR, "swap_in_params[0].nvme_swapper.swap_in(swap_in_params, async_op=True)"),
        (_DISK, "read_once"),
        (_T_DISK, "test_a_disk_changes_no_bit_of_a_run_that_is_resumed_or_not"),
    ),
    Workaround(
        "puts residents on a disk too, each of which keeps one of five buffers for good",
        (_PARTITION, "buffer = self.param_swapper.get_buffer(param, partition_size)"),
        (_DISK, "_begin_without_residents"),
        (_T_DISK, "test_residents_stay_in_memory"),
    ),
    Workaround(
        "keeps the first billion elements of parameters on a disk in host memory",
        ("deepspeed.runtime.zero.offload_config", "max_in_cpu: int = Field(pp_int(1e9), ge=0)"),
        ("engine/zero/plan.py", "_offload_keys"),
        ("engine/zero/test_zero_plan.py", "test_a_field_of_ours_is_what_deepspeed_calls_it"),
    ),
    Workaround(
        "names files on a disk after ranks only, so that two runs write into each other's",
        ("deepspeed.runtime.swap_tensor.partitioned_param_swapper", "f'rank{dist.get_rank()}')"),
        (_DISK, "_hold"),
        (_T_DISK, "test_a_folder_serves_one_run_at_a_time"),
    ),
)


def table() -> str:
    """The rows as Markdown."""
    lines = [f"| what {VERSION} does | where in it | instead, here | tested by |", "| --- | --- | --- | --- |"]
    for row in WORKAROUNDS:
        cells = (row.what, f"`{row.fault[0]}`", f"`{row.here[1]}` in `{row.here[0]}`", f"`{row.test[1]}`")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
