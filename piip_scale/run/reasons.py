"""What kind of end an error is, for whoever decides whether to start again."""

from __future__ import annotations

from piip_scale.errors import PiipError
from piip_scale.files import IO_REASON, may_pass

COMMUNICATION, DEVICE, EXCEPTION = "communication", "device failure", "exception"
# Of RuntimeErrors, which these libraries raise for everything, only the text shows what went wrong.
_COMMUNICATION_TEXTS = ("gloo", "NCCL", "ProcessGroup")
_DEVICE_TEXTS = (
    "ECC error",
    "hardware stack error",
    "NVLink",
    "unspecified launch failure",
    "device is busy or unavail",
)


def reason_of(error: BaseException) -> str:
    """The kind of an end: our errors' own; of others ``communication``, ``device failure``, a disk's, ``exception``."""
    if isinstance(error, PiipError):
        return error.reason
    if has_lost_contact(error):
        return COMMUNICATION
    if isinstance(error, OSError) and may_pass(error):
        return IO_REASON
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_TEXTS):
        return DEVICE
    return EXCEPTION


def has_lost_contact(error: BaseException) -> bool:
    """Whether a message among ranks failed, so that the rank at the other end may know more."""
    # By name, since this module is read by processes that do not import torch.
    if any(kind.__name__ == "DistError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _COMMUNICATION_TEXTS)
