"""Writes files in DeepSpeed's ZeRO layout from whole tensors: a small twin of the reader, written from the format."""

import math

import torch


def flat_parts_stage3(tensors, num_ranks):
    """Each tensor padded to a multiple of the ranks and dealt out; a rank's parts lie end to end."""
    parts = [[] for _ in range(num_ranks)]
    for tensor in tensors:
        size = math.ceil(tensor.numel() / num_ranks)
        padded = torch.full((size * num_ranks,), math.nan, dtype=tensor.dtype)
        padded[: tensor.numel()] = tensor.flatten()
        for rank, part in enumerate(padded.split(size) if size else [padded] * num_ranks):
            parts[rank].append(part)
    return [torch.cat(of_rank) if of_rank else torch.empty(0) for of_rank in parts]


def flat_parts_stage12(tensors, num_ranks, trimmed):
    """All tensors end to end, padded to twice the ranks and cut; ``trimmed`` drops the padding as stages 1, 2 do."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]) if tensors else torch.empty(0)
    size = 2 * num_ranks * math.ceil(flat.numel() / (2 * num_ranks)) // num_ranks
    padded = torch.full((size * num_ranks,), math.nan)
    padded[: flat.numel()] = flat
    parts = list(padded.split(size)) if size else [padded] * num_ranks
    if trimmed:
        keep = size - (padded.numel() - flat.numel())
        parts[-1] = parts[-1][: max(keep, 0)]
    return parts


def write_checkpoint(folder, stage, num_ranks, groups, frozen, buffers, trimmed=True, sub_groups=None):
    """Writes model and optimiser files.

    Args:
        groups: One dict of trained fp32 tensors per parameter group.
        frozen, buffers: Tensors by name.
        sub_groups: Stage 3: parameters per flat tensor; one tensor per group where not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for group in groups for name in group]
    whole = stage != 3
    module = {name: (t.bfloat16() if whole else torch.empty(0)) for g in groups for name, t in g.items()}
    module |= {name: (tensor if whole else torch.empty(0)) for name, tensor in frozen.items()} | buffers
    shared = {
        "module": module,
        "buffer_names": list(buffers),
        "param_shapes": [{name: tensor.shape for name, tensor in group.items()} for group in groups],
        "frozen_param_shapes": {name: tensor.shape for name, tensor in frozen.items()},
        "shared_params": {},
        "dp_world_size": num_ranks,
        "mp_world_size": 1,
    }
    flat_of_group = _flat_groups(stage, num_ranks, groups, trimmed, sub_groups or len(names))
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    frozen_parts = {name: flat_parts_stage3([tensor], num_ranks) for name, tensor in frozen.items()}
    for rank in range(num_ranks):
        state = {"zero_stage": stage, "partition_count": num_ranks, key: [parts[rank] for parts in flat_of_group]}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3:
            fragments = {name: parts[rank] for name, parts in frozen_parts.items()}
            content = shared | {"frozen_param_fragments": fragments}
            torch.save(content, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    if stage != 3:
        torch.save(shared | {"frozen_param_fragments": frozen}, folder / "mp_rank_00_model_states.pt")


def _flat_groups(stage, num_ranks, groups, trimmed, sub_groups):
    if stage != 3:
        return [flat_parts_stage12(list(group.values()), num_ranks, trimmed) for group in groups]
    flat = []
    for group in groups:
        tensors = list(group.values())
        flat += [flat_parts_stage3(tensors[i : i + sub_groups], num_ranks) for i in range(0, len(tensors), sub_groups)]
    return flat
