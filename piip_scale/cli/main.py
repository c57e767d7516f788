"""The entry of the ``piip-scale`` command: turns errors, and a Ctrl-C at any moment, into one line or an exit code."""

from __future__ import annotations

from piip_scale.cli.endings import in_one_line, without_traceback


def main() -> None:
    """Entry point: exit code 0, or one line on standard error and the error's own code."""
    with without_traceback():
        # Seconds, on a cluster's file system.
        from piip_scale.cli.app import app
    in_one_line(app, "piip-scale")


if __name__ == "__main__":
    main()
