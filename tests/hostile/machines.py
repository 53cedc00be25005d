"""How state machines are run: ``OFTFX_MACHINE_RUNS`` sets how many sequences are tried, other ones every time.

Without it they are few, and always the same.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

RUNS, STEPS = int(os.environ.get("OFTFX_MACHINE_RUNS", "20")), 30


def run(machine):
    """Try random sequences of a machine's rules."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize="OFTFX_MACHINE_RUNS" not in os.environ,
            print_blob=True,
        ),
    )
