"""For all tests: nothing that hypothesis draws is held to a clock, which a busy machine would fail."""

from hypothesis import HealthCheck, settings

settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
