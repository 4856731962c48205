"""What makes these a study: runs that are kept, the arms that are compared, tables and figures.

In this order it reads well: `runs` (what a run is and where it lies), `code` (which source its key
takes in), `study` (records, results and device; jobs), `arms` (what is computed), `methods` (one
entry for each method), `analysis` (tables, claims and figures made from kept runs), `results`
(where these are written).
"""

__all__ = ["RunSpec", "run_or_load", "table"]  # noqa: F822


def __getattr__(name: str) -> object:
    """The run store's names, imported when asked for: torch takes seconds that not all need."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ecgstudy import runs

    return getattr(runs, name)
