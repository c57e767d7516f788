"""What DeepSpeed would write into a checkpoint, caught before it reaches the disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from piip_scale.checkpoint.swapped import SWAPPED
from piip_scale.engine.zero.deepspeed_api import Engine
from piip_scale.engine.zero.disk_offload import swapped_files
from piip_scale.engine.zero.partitions import frozen_parts
from piip_scale.engine.zero.replicas import saves_slices
from piip_scale.errors import CheckpointError
from piip_scale.files import disk_errors

_NOTHING = torch.empty(0)


def engine_files(
    engine: Engine,
    folder: Path,
    tag: str,
    client_state: Mapping[str, Any],
    copy: Callable[[object], Any],
    left_out: Collection[str] = (),
) -> dict[str, Any]:
    """This rank's files of a DeepSpeed checkpoint. Collective; writes none of them but offloaded state on disks.

    Args:
        engine: The engine.
        folder: Where the checkpoint is to be.
        tag: The folder in it for DeepSpeed's files.
        client_state: Merged into DeepSpeed's own state.
        copy: Makes what is written of a file's content: DeepSpeed's tensors change with the next step.
        left_out: Names of frozen parameters whose values are not written.

    Returns:
        Contents for ``torch.save`` by path inside ``folder``; none on ranks whose slices a replica's saves.

    Raises:
        CheckpointError: The disk refuses what DeepSpeed copies from another: optimiser state that lives on a disk.
    """
    catch = _Catch(engine, copy, left_out)
    with disk_errors(CheckpointError, f"write checkpoint {folder}"), _instead_of_writing(engine, catch):
        engine.save_checkpoint(str(folder), tag=tag, client_state=dict(client_state), save_latest=False)
    return {str(path.relative_to(folder)): content for path, content in catch.files.items()}


class _Catch:
    """Stands in for DeepSpeed's checkpoint engine, with the methods that deepspeed 0.19.8 calls while it saves."""

    def __init__(self, engine: Engine, copy: Callable[[object], Any], left_out: Collection[str]) -> None:
        self.files: dict[Path, Any] = {}
        self._engine, self._copy, self._left_out = engine, copy, set(left_out)

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        if not saves_slices(self._engine):
            return
        state = state_dict | self._off_disk(state_dict)
        # By name, so that the model's order stays.
        for key in ("module", "frozen_param_fragments") if self._left_out else ():
            if state.get(key):
                state[key] = {n: _NOTHING if n in self._left_out else v for n, v in state[key].items()}
        self.files[Path(path)] = self._copy(state)

    def fragment(self, parameter: Any) -> Tensor:
        """In the place of DeepSpeed's own, which copies each frozen parameter to the host first."""
        if self._engine.param_names[parameter] in self._left_out:
            return _NOTHING
        part: Tensor = getattr(parameter, "ds_tensor", parameter)
        return part.detach().cpu()

    def _off_disk(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What deepspeed 0.19.8 leaves out of a file where the tensors are on a disk."""
        if self._engine.zero_nvme_offload_optimizer() and "optimizer_state_dict" in state_dict:
            return {SWAPPED: swapped_files(self._engine)}
        if state_dict.get("frozen_param_fragments") and self._engine.zero_optimization_stage() == 3:
            held = ((p.name, data) for p, data in frozen_parts(self._engine) if p.name not in self._left_out)
            return {"frozen_param_fragments": {name: data.clone() for name, data in held}}
        return {}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are made by who writes into them."""

    def create(self, info: object) -> None:
        """Nothing is begun here."""

    def commit(self, info: object) -> None:
        """Nothing is done here."""

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True


@contextlib.contextmanager
def _instead_of_writing(engine: Engine, catch: _Catch) -> Iterator[None]:
    writer = engine.checkpoint_engine
    engine.checkpoint_engine = catch
    # deepspeed 0.19.8 puts two scripts into each checkpoint, from this thread; `convert` does what they do.
    engine._copy_recovery_script = lambda path: None
    engine._get_param_fragment_func = catch.fragment
    try:
        yield
    finally:
        engine.checkpoint_engine = writer
        del engine._copy_recovery_script, engine._get_param_fragment_func
