"""How property tests draw their examples: the same ones on every machine, and without a clock."""

from hypothesis import HealthCheck, settings

# A slow or busy machine says nothing about the code, so no example has a deadline.
settings.register_profile(
    "repeatable", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
# `make test-slow` looks for new counterexamples, and prints how to repeat the one it finds.
settings.register_profile("searching", settings.get_profile("repeatable"), derandomize=False, print_blob=True)
settings.load_profile("repeatable")
