"""How good a classifier is and how sure that is: measures, draws of patients, windows over whole
recordings.
"""

from ecglib.evaluate.draws import Interval, PatientDraws, bootstrap_interval, paired_difference
from ecglib.evaluate.metrics import choose_thresholds, macro_auroc, ranking_report
from ecglib.evaluate.windows import encode_windows, predict_windows

__all__ = [
    "Interval",
    "PatientDraws",
    "bootstrap_interval",
    "choose_thresholds",
    "encode_windows",
    "macro_auroc",
    "paired_difference",
    "predict_windows",
    "ranking_report",
]
