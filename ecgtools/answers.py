"""What the check cells of exercises compare: a student's answer as numbers, whatever it is."""

import numpy as np


def number(value: object) -> float:
    """An answer as a float; NaN for what is no single number, so that a comparison with it fails by
    itself.
    """
    return float("nan") if isinstance(value, bool | np.bool_) else float(numbers(value, ()))


def numbers(value: object, shape: tuple[int, ...]) -> np.ndarray:
    """An answer (array, tensor, series, list) as floats of `shape`; all NaN where it is something
    else.
    """
    wrong = np.full(shape, np.nan)
    if isinstance(value, str | bytes | set | dict):
        return wrong
    try:
        value = value.detach().cpu().numpy() if hasattr(value, "detach") else value
        found = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return wrong
    return found if found.shape == shape else wrong
