import errno
import pickle
import subprocess
import sys

import pytest
import torch

from piip_scale.errors import CheckpointError, ConfigError, DataError, HangError, ModelError, RunError
from piip_scale.files import disk_errors
from piip_scale.run.reasons import reason_of


def disk(number, kind=CheckpointError):
    with pytest.raises(kind) as caught, disk_errors(kind, "save"):
        raise OSError(number, "no")
    return caught.value


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConfigError("x"), "bad config"),
        (DataError("x"), "bad data"),
        (ModelError("x"), "bad model"),
        (HangError("x"), "hang"),
        (RunError("x"), "error"),
        (torch.distributed.DistNetworkError("connection refused"), "communication"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), "communication"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3384, unhandled system error"), "communication"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "device failure"),
        (OSError(errno.EIO, "Input/output error"), "input or output"),
        (OSError(errno.ESTALE, "Stale file handle"), "input or output"),
        (FileNotFoundError(errno.ENOENT, "a.tar"), "exception"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "exception"),
        (KeyError("boxes"), "exception"),
        (disk(errno.ENOSPC), "input or output"),
        (disk(errno.EACCES), "error"),
        (disk(errno.ENOENT, DataError), "bad data"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_errors_kind(error, reason):
    assert reason_of(error) == reason
    # As it arrives from another rank, or from a loader's process.
    if isinstance(error, RunError | CheckpointError | DataError):
        assert reason_of(pickle.loads(pickle.dumps(error))) == reason


def test_files_of_a_run_are_read_without_torch():
    code = (
        "import sys, piip_scale.run.run_dir, piip_scale.run.heartbeat, piip_scale.checkpoint.store;"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.strip() == "False"
