"""Checkpoints that DeepSpeed itself writes here, in the folders of each trainer, converted and compared."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from piip_scale.checkpoint.convert import ConvertOptions, convert
from piip_scale.world import World
from sections.processes import run_ranks
from sections.record import table

_STEPS = 3
_BF16: dict[str, Any] = {"bf16": {"enabled": True}}
_FP16: dict[str, Any] = {"fp16": {"enabled": True}}
_FP32_GRADIENTS: dict[str, Any] = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


@dataclass(frozen=True)
class Row:
    """A checkpoint.

    Attributes:
        source: In whose folder it lies.
        tag: DeepSpeed's tag, with the folders that the trainer puts around it.
        given: What convert is given.
        num_ranks: That write it.
        zero: DeepSpeed's ``zero_optimization``.
        more: Other keys of DeepSpeed's config.
        saving: Options of ``save_checkpoint``.
        what: What is peculiar.
    """

    source: str
    tag: str
    given: str
    num_ranks: int
    zero: dict[str, Any]
    more: dict[str, Any]
    saving: dict[str, Any]
    what: str = ""


def _row(
    source: str,
    tag: str,
    given: str,
    ranks: int,
    stage: int,
    more: dict[str, Any] | None = None,
    what: str = "",
    zero: dict[str, Any] | None = None,
    **saving: Any,
) -> Row:
    return Row(source, tag, given, ranks, {"stage": stage, **(zero or {})}, more or {}, saving, what)


_TAG = "global_step3"
ROWS = [
    _row("DeepSpeed, folder with latest", _TAG, ".", 1, 0),
    _row("DeepSpeed, tag", _TAG, _TAG, 2, 0, _BF16),
    _row("DeepSpeed, tag", _TAG, _TAG, 2, 0, _FP16),
    _row("DeepSpeed, its latest", _TAG, "latest", 2, 1),
    _row("released PIIP", f"iter_3/{_TAG}", "iter_3", 3, 1, _BF16),
    _row("released PIIP", f"iter_3/{_TAG}", "iter_3", 2, 1, _FP16),
    _row("DeepSpeed, tag", _TAG, _TAG, 2, 1, _BF16 | _FP32_GRADIENTS, "fp32 gradients"),
    _row("mmengine", "iter_3.pth", "iter_3.pth", 3, 2),
    _row("Accelerate", "pytorch_model", "pytorch_model", 2, 2, _BF16),
    _row("Accelerate", "pytorch_model", "pytorch_model", 3, 2, _FP16, "loss scaler"),
    _row("DeepSpeed, folder with latest", _TAG, ".", 3, 2, None, "round robin", {"round_robin_gradients": True}),
    _row("Hugging Face's Trainer", f"checkpoint-3/{_TAG}", "checkpoint-3", 1, 3),
    _row("Hugging Face's Trainer", f"checkpoint-3/{_TAG}", "checkpoint-3", 3, 3, _BF16),
    _row("Lightning", "x.ckpt/checkpoint", "x.ckpt", 2, 3, _BF16, "names start with _forward_module."),
    _row("DeepSpeed, tag", _TAG, _TAG, 2, 3, _FP16, "loss scaler"),
    _row("DeepSpeed, tag", _TAG, _TAG, 3, 3, _BF16, "several flat groups", {"sub_group_size": 20}),
    _row("DeepSpeed, tag", _TAG, _TAG, 2, 3, _BF16, "frozen left out", exclude_frozen_parameters=True),
]
_TEXT = (
    "A small network (frozen, tied and twice registered parameters, buffers, uneven sizes) trained three steps and "
    "saved by DeepSpeed on gloo ranks, its files in the folders each trainer makes, converted to fp32 and compared "
    "with the model's state at that moment bit for bit: fp32 masters where ZeRO keeps any by name, else the weights as "
    "they are."
)


class _Net(nn.Module):
    """Two layers trained, one frozen, buffers, one module under two names, one parameter in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.frozen, self.norm, self.head = (
            nn.Linear(5, 7),
            nn.Linear(7, 7),
            nn.BatchNorm1d(7),
            nn.Linear(7, 3),
        )
        self.frozen.requires_grad_(False)
        self.again, self.back = self.stem, nn.Linear(5, 7)
        self.back.weight = self.stem.weight
        self.register_buffer("table", torch.arange(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Three numbers a row."""
        out: torch.Tensor = self.head(self.norm(self.frozen(self.stem(x) + self.back(x)).relu()))
        return out


class _Wrapped(nn.Module):
    """As Lightning wraps a model."""

    def __init__(self) -> None:
        super().__init__()
        self._forward_module = _Net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As of the model."""
        out: torch.Tensor = self._forward_module(x)
        return out


def section() -> str:
    """A row a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for num_ranks in sorted({row.num_ranks for row in ROWS}):
            run_ranks(num_ranks, save_all, root)
        rows = [_compared(root / str(index), row) for index, row in enumerate(ROWS)]
    head = ["folder of", "given", "stage", "ranks", "weights", "", "tensors", "equal"]
    return f"{_TEXT}\n\n{table(head, rows)}"


def save_all(world: World, _device: torch.device, root: Path) -> None:
    """All checkpoints of this number of ranks, and beside each the model's state dict."""
    for index, row in enumerate(ROWS):
        if row.num_ranks == world.num_ranks:
            _save(world, root / str(index), row)


def _save(world: World, folder: Path, row: Row) -> None:
    import deepspeed

    torch.manual_seed(0)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(_kind(row), torch.float32)
    model = (_Wrapped() if row.source == "Lightning" else _Net()).to(dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": row.zero, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=1e-2), config=config | row.more
    )
    for _ in range(_STEPS):
        engine.backward(engine(torch.randn(4, 5).to(dtype)).float().square().mean())
        engine.step()
    state = _state(deepspeed, engine, row.zero["stage"])
    tag = folder / row.tag
    engine.save_checkpoint(str(tag.parent), tag=tag.name, **row.saving)
    if world.is_main:
        torch.save(state, folder / "state.pt")
    engine.destroy()


def _state(deepspeed: Any, engine: Any, stage: int) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad and stage:
            state[name] = deepspeed.utils.safe_get_full_fp32_param(parameter).clone()
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                state[name] = parameter.detach().clone()
    return state


def _kind(row: Row) -> str:
    return next((kind for kind in ("bf16", "fp16") if kind in row.more), "fp32")


def _compared(folder: Path, row: Row) -> list[object]:
    out = folder / "out.safetensors"
    convert(folder / row.given, out, ConvertOptions(verify=True))
    read, state = load_file(out), torch.load(folder / "state.pt")
    wanted = {name: value for name, value in state.items() if not (row.saving and "frozen" in name)}
    equal = read.keys() == wanted.keys() and all(torch.equal(read[n].double(), wanted[n].double()) for n in wanted)
    cells = [row.source, f"`{row.given}`", row.zero["stage"], row.num_ranks, _kind(row), row.what, len(read)]
    return [*cells, "yes" if equal else "NO"]
