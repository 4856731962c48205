"""The simulated cohort: the study's embedded data, shaped after PTB-XL, so that a first run needs
no download.

`cohort` draws patients, their records and the statements of a reader; `heart`, `rhythm` and
`recorder` make the signals; `truth` holds the classes and knows where in a record the evidence for
a class lies.
"""

from ecglib.sources.simulate.cohort import BLOCK, simulate_cohort, simulate_records
from ecglib.sources.simulate.heart import PLAIN
from ecglib.sources.simulate.truth import (
    ALL,
    CONDITIONS,
    EVIDENCE,
    RHYTHMS,
    SUPERCLASSES,
    TASKS,
    Simulation,
)

__all__ = [
    "ALL",
    "BLOCK",
    "CONDITIONS",
    "EVIDENCE",
    "PLAIN",
    "RHYTHMS",
    "SUPERCLASSES",
    "TASKS",
    "Simulation",
    "simulate_cohort",
    "simulate_records",
]
