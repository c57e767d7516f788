"""Other names for a checkpoint's tensors: prefixes that trainers put before a model's own, taken off or mapped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from piip_scale.errors import CheckpointError

_KNOWN = ("module.", "_forward_module.", "model.", "backbone.")
"""What wrappers add: DistributedDataParallel, Lightning, Hugging Face's heads, mmdet's detectors."""


@dataclass(frozen=True)
class Renaming:
    """How names change.

    Attributes:
        strip: Prefixes taken off, one after the other, of the names that have them.
        rename: Pairs of a prefix and what takes its place, after that, one after the other.
    """

    strip: Sequence[str] = ()
    rename: Sequence[tuple[str, str]] = ()

    def apply(self, names: Iterable[str]) -> dict[str, str]:
        """The new name of each.

        Raises:
            CheckpointError: No name has a prefix, or two names would become one, or one empty.
        """
        changed = {name: name for name in names}
        for old, new in [*((prefix, "") for prefix in self.strip), *self.rename]:
            if not old or not any(name.startswith(old) for name in changed.values()):
                raise CheckpointError(
                    "no tensor's name starts so",
                    value=old,
                    rule=f"they are like {next(iter(changed.values()))}",
                    fix="change --strip or --rename",
                )
            changed = {
                name: new + now.removeprefix(old) if now.startswith(old) else now for name, now in changed.items()
            }
        _check(changed)
        return changed


def _check(changed: dict[str, str]) -> None:
    taken: dict[str, str] = {}
    for old, new in changed.items():
        if new in taken:
            raise CheckpointError(
                f"{taken[new]} and {old} would both be called {new}", fix="change --strip or --rename"
            )
        if not new or not new.isprintable() or new == "__metadata__":
            raise CheckpointError(f"{old} would be called", value=new, rule="a name is printable text")
        taken[new] = old


def shared_prefix_note(names: Sequence[str]) -> str:
    """One line where all names start with a prefix that a wrapper put there; empty where none does."""
    found = next((prefix for prefix in _KNOWN if all(name.startswith(prefix) for name in names)), "")
    return f"all names start with {found} (--strip {found} takes it off)" if found else ""
