"""For all tests: the long ones first, and nothing that hypothesis draws held to a clock, which a busy machine fails."""

from pathlib import Path

from hypothesis import HealthCheck, settings

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

TESTS = Path(__file__).parent
LONG = ("engine", "cli", "tasks")
"""Folders of tests that train: were their files the last to begin, one of two workers would wait for the other."""


def pytest_collection_modifyitems(items):
    """Keeps the order within a folder; ``make test`` has its workers take files in this order."""
    ranks = {folder: rank for rank, folder in enumerate(LONG)}
    items.sort(key=lambda item: ranks.get(item.path.relative_to(TESTS).parts[0], len(LONG)))
