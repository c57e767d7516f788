"""Trains a tiny model with DeepSpeed on gloo ranks and saves it in many ways: run by test_zero_reader.py."""

import torch
from torch import nn

from piip_scale.checkpoint.store import CheckpointStore

FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4}}
VARIANTS = {
    "stage0": ({"stage": 0}, {}),
    "stage0_bf16": ({"stage": 0}, {"bf16": {"enabled": True}}),
    "stage1": ({"stage": 1}, {}),
    "stage1_bf16": ({"stage": 1}, {"bf16": {"enabled": True}}),
    "stage1_bf16_fp32_gradients": ({"stage": 1}, {"bf16": {"enabled": True}} | FP32_GRADIENTS),
    "stage1_fp16": ({"stage": 1}, FP16),
    "stage2": ({"stage": 2}, {}),
    "stage2_round_robin": ({"stage": 2, "round_robin_gradients": True}, {}),
    "stage2_bf16": ({"stage": 2}, {"bf16": {"enabled": True}} | FP32_GRADIENTS),
    "stage3": ({"stage": 3, "stage3_param_persistence_threshold": 10}, {}),
    "stage3_bf16": ({"stage": 3, "stage3_param_persistence_threshold": 10}, {"bf16": {"enabled": True}}),
    "stage3_fp16": ({"stage": 3}, FP16),
    "stage3_sub_groups": ({"stage": 3, "sub_group_size": 20}, {"bf16": {"enabled": True}} | FP32_GRADIENTS),
    "stage3_offload": (
        {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
        {"bf16": {"enabled": True}, "zero_force_ds_cpu_optimizer": False},
    ),
}
# DeepSpeed's own tool refuses these: no ZeRO, and a stage 1 whose files do not say so; or reads them wrong: parameters
# dealt to the ranks in turns.
NOT_FOR_THE_ORACLE = ("stage0", "stage0_bf16", "stage1_bf16_fp32_gradients", "stage2_round_robin")


class Net(nn.Module):
    """Two groups, a frozen layer, buffers, one module under two names and one parameter in two modules."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.again = self.stem
        self.back = nn.Linear(5, 7)
        self.back.weight = self.stem.weight
        self.register_buffer("table", torch.arange(5))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.frozen(self.stem(x) + self.back(x)).relu())) * self.scale


def train(rank, deepspeed, zero, more):
    torch.manual_seed(0)
    net = Net()
    dtype = torch.bfloat16 if "bf16" in more else torch.float16 if "fp16" in more else torch.float32
    net = net.to(dtype)
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config | more)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        x = torch.randn(4, 5, generator=generator).to(dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()
    return engine


def live_weights(deepspeed, engine, stage):
    """The state dict as it is in training: fp32 masters where there are any, gathered from all ranks."""
    module = engine.module
    state = {name: value.clone() for name, value in module.state_dict().items()}
    masters = stage > 0
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and masters:
            state[name] = deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                state[name] = parameter.detach().clone()
    return state


def oracle_weights(folder):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="zero")
    return {name: torch.as_tensor(value).clone() for name, value in state.items()}


def save_all(world, device, root):
    """Every variant, trained for three steps and saved on the ranks of ``preloaded.run_ranks``."""
    import deepspeed

    for name, (zero, more) in VARIANTS.items():
        store = CheckpointStore(root / name / "checkpoints", keep=1)
        engine = train(world.rank, deepspeed, zero, more)
        live = live_weights(deepspeed, engine, zero["stage"])
        if world.is_main:
            store.begin(3)
        torch.distributed.barrier()
        engine.save_checkpoint(
            str(store.staging(3)), tag="zero", save_latest=False, client_state={"piip": {"seed": [1, 2]}}
        )
        torch.distributed.barrier()
        if world.is_main:
            path = store.commit(3)
            torch.save(live, root / name / "live.pt")
            if name not in NOT_FOR_THE_ORACLE:
                torch.save(oracle_weights(path), root / name / "oracle.pt")
        engine.destroy()
    torch.distributed.barrier()
