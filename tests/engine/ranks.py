"""Real processes that talk over gloo, and configs for what they run."""

from __future__ import annotations

from preloaded import run_ranks as run_ranks
from tiny_configs import FORCED_RELEASE as FORCED_RELEASE
from tiny_configs import tiny_config as tiny_config
