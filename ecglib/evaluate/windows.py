"""Windowed inference: what a network says of whole recordings."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch

from ecglib.batches import to_millivolts
from ecglib.errors import DataError
from ecglib.records import Records


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First samples of overlapping windows that cover `length` samples; the last one is moved back
    to end with them.
    """
    if min(length, window, stride) < 1:
        raise DataError(
            f"Length {length}, window {window} and stride {stride} must be at least one sample each."
        )
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def predict_windows(
    encode: Callable[[torch.Tensor], torch.Tensor],
    records: Records,
    indices: np.ndarray,
    window_seconds: float = 2.5,
    stride_seconds: float = 1.25,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Mean of the sigmoid outputs over overlapping windows, float32 `(n, classes)`: 7 windows for a
    10 s record.

    encode maps windows `(b, 12, time)` in mV to logits `(b, classes)`; a module is put in
    evaluation mode meanwhile. Missing samples become 0 mV; a record shorter than the window is used
    whole. batch_size counts windows.
    """
    return _mean_over_windows(
        encode, torch.sigmoid, records, indices, window_seconds, stride_seconds, batch_size, device
    )


def encode_windows(
    encode: Callable[[torch.Tensor], torch.Tensor],
    records: Records,
    indices: np.ndarray,
    window_seconds: float = 2.5,
    stride_seconds: float = 1.25,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Features of each record, float32 `(n, features)`: their mean over the windows of
    `predict_windows`.
    """
    return _mean_over_windows(
        encode,
        lambda features: features,
        records,
        indices,
        window_seconds,
        stride_seconds,
        batch_size,
        device,
    )


def _mean_over_windows(
    encode: Callable[[torch.Tensor], torch.Tensor],
    finish: Callable[[torch.Tensor], torch.Tensor],
    records: Records,
    indices: np.ndarray,
    window_seconds: float,
    stride_seconds: float,
    batch_size: int,
    device: str | torch.device,
) -> np.ndarray:
    """Mean of `finish(encode(window))` over each record's windows, a few records at a time."""
    window, stride = (
        max(1, round(seconds * records.sampling_rate))
        for seconds in (window_seconds, stride_seconds)
    )
    starts = window_starts(records.signals.shape[2], window, stride)
    indices, together = (
        np.arange(len(records))[indices],
        max(1, batch_size // len(starts)),
    )  # a mask will do as well
    if not len(indices):
        raise DataError("There is no record to predict; check the split.")
    was_training = getattr(encode, "training", False)
    if was_training:
        encode.eval()
    parts = []
    try:
        with torch.inference_mode():
            for start in range(0, len(indices), together):
                # The int16 counts travel and are scaled on the device.
                counts = torch.from_numpy(
                    np.ascontiguousarray(records.signals[indices[start : start + together]])
                )
                signals = to_millivolts(counts.to(device), records.scale)
                windows = torch.stack(
                    [signals[:, :, first : first + window] for first in starts], dim=1
                )
                outputs = finish(encode(windows.flatten(0, 1)).float())
                parts.append(
                    outputs.unflatten(0, (len(counts), len(starts))).mean(dim=1).cpu().numpy()
                )
    finally:
        if was_training:
            encode.train()
    return _require_finite(np.concatenate(parts), records.table["record_id"].iloc[indices])


def _require_finite(probabilities: np.ndarray, record_ids: pd.Series) -> np.ndarray:
    """The probabilities, or DataError naming the first record whose score is not a number."""
    wrong = np.flatnonzero(~np.isfinite(probabilities).all(axis=1))
    if len(wrong):
        raise DataError(
            f"The model gives no number for record {record_ids.iloc[wrong[0]]} ({len(wrong)} records in all); "
            "its training has diverged, train it again with a smaller learning rate."
        )
    return probabilities
