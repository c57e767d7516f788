"""The entry of the ``piip-scale`` command: turns errors, and a Ctrl-C at any moment, into one line or an exit code."""

from __future__ import annotations

from piip_scale.cli.endings import COMMAND, ended_at_once, in_one_line


def main() -> None:
    """Entry point: exit code 0, or one line on standard error and the error's own code."""
    with ended_at_once():
        # Seconds, on a cluster's file system.
        from piip_scale.cli.app import app
    in_one_line(app, COMMAND)


if __name__ == "__main__":
    main()
