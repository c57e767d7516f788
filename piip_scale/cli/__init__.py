"""The ``piip-scale`` command."""
