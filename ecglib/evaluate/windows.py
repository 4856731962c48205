"""Windowed inference: what a network says of whole recordings.

A record is cut into windows as long as the crops of the network's training, overlapping by half. A
classifier's probabilities are averaged over them. A network on frozen encoders carries `encoders`,
`windows` (the seconds of each encoder's windows) and `answer`: each encoder's features are averaged
over its windows, and the mean features are answered. All that scores records goes through
`score_signals`, so that a classifier has the same score wherever it is printed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ecglib.batches import to_millivolts
from ecglib.errors import DataError
from ecglib.records import Records

WINDOWS_TOGETHER = 256  # that go through a network at once
Network = Callable[[Tensor], Tensor]  # windows (n, leads, time) in mV -> (n, outputs)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First samples of overlapping windows that cover `length` samples; the last one is moved back
    to end with them.
    """
    if min(length, window, stride) < 1:
        raise DataError(
            f"Length {length}, window {window} and stride {stride} must be at least one sample "
            "each."
        )
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def record_windows(
    length: int, sampling_rate: float, window_seconds: float, stride_seconds: float | None = None
) -> tuple[list[int], int]:
    """First samples and length of the windows of records of `length` samples, overlapping by half
    unless `stride_seconds` says otherwise. Records shorter than a window are used whole.
    """
    window = max(1, round(window_seconds * sampling_rate))
    stride = max(1, round((stride_seconds or window_seconds / 2) * sampling_rate))
    return window_starts(length, window, stride), min(window, length)


def cut_windows(signals: Tensor, starts: Sequence[int], window: int) -> Tensor:
    """Windows `(n, windows, leads, window)` of signals `(n, leads, time)`."""
    return torch.stack([signals[:, :, start : start + window] for start in starts], dim=1)


@torch.inference_mode()
def mean_over_windows(
    network: Network, signals: Tensor, sampling_rate: float, window_seconds: float
) -> Tensor:
    """Mean of the network's outputs over the windows of signals `(n, leads, time)` in mV, float32
    `(n, outputs)`.
    """
    starts, window = record_windows(signals.shape[2], sampling_rate, window_seconds)
    means = []
    for part in signals.split(max(1, WINDOWS_TOGETHER // len(starts))):
        outputs = network(cut_windows(part, starts, window).flatten(0, 1)).float()
        means.append(outputs.unflatten(0, (len(part), len(starts))).mean(dim=1))
    return torch.cat(means)


@torch.inference_mode()
def score_signals(
    networks: Sequence[Network],
    signals: Tensor,
    sampling_rate: float,
    window_seconds: float,
) -> Tensor:
    """Probabilities `(networks, n, classes)` of signals `(n, leads, time)` in mV.

    Networks are in evaluation mode and on the device of the signals. Those on frozen encoders have
    windows of their own, and several of them share the encoders of the first.
    """
    windows = getattr(networks[0], "windows", ())
    if windows:
        parts = [
            mean_over_windows(encoder, signals, sampling_rate, seconds)
            for encoder, seconds in zip(networks[0].encoders, windows, strict=True)
        ]
        features = torch.cat(parts, dim=1)
        return torch.stack([network.answer(features).float().sigmoid() for network in networks])

    def probabilities(network: Network) -> Network:
        return lambda windows: network(windows).float().sigmoid()

    scored = [
        mean_over_windows(probabilities(network), signals, sampling_rate, window_seconds)
        for network in networks
    ]
    return torch.stack(scored)


def predict_windows(
    network: Network,
    records: Records,
    indices: np.ndarray,
    window_seconds: float = 2.5,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Probabilities of records, float32 `(n, classes)`, as in `score_signals`.

    network maps windows `(b, 12, time)` in mV to logits `(b, classes)`; a module is put in
    evaluation mode meanwhile. Windows overlap by half: 7 of 2.5 s in a record of 10 s. Missing
    samples become 0 mV; a record shorter than the window is used whole.
    """

    def answer(signals: Tensor) -> Tensor:
        return score_signals([network], signals, records.sampling_rate, window_seconds)[0]

    return _each_record(answer, network, records, indices, window_seconds, device)


def encode_windows(
    encoder: Network,
    records: Records,
    indices: np.ndarray,
    window_seconds: float = 2.5,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Features of records, float32 `(n, features)`: their mean over the windows of
    `predict_windows`.
    """

    def answer(signals: Tensor) -> Tensor:
        return mean_over_windows(encoder, signals, records.sampling_rate, window_seconds)

    return _each_record(answer, encoder, records, indices, window_seconds, device)


def _each_record(
    answer: Network,
    network: Network,
    records: Records,
    indices: np.ndarray,
    window_seconds: float,
    device: str | torch.device,
) -> np.ndarray:
    """`answer` to the signals of all records at `indices`, a few at a time."""
    indices = np.arange(len(records))[indices]  # a mask will do as well
    if not len(indices):
        raise DataError("There is no record to predict; check the split.")
    starts, _ = record_windows(records.signals.shape[2], records.sampling_rate, window_seconds)
    together = max(1, WINDOWS_TOGETHER // len(starts))
    answers = []
    with evaluation(network):
        for start in range(0, len(indices), together):
            signals = device_millivolts(records, indices[start : start + together], device)
            answers.append(answer(signals).cpu().numpy())
    return _require_finite(np.concatenate(answers), records.table["record_id"].iloc[indices])


def device_millivolts(
    records: Records, indices: np.ndarray, device: str | torch.device = "cpu"
) -> Tensor:
    """Signals `(n, leads, time)` in mV on the device, missing samples 0.

    The int16 counts travel and are scaled there.
    """
    counts = torch.from_numpy(np.ascontiguousarray(records.signals[indices]))
    return to_millivolts(counts.to(device), records.scale)


@contextmanager
def evaluation(network: Network) -> Iterator[None]:
    """Evaluation mode of a module, and afterwards each of its modules' own mode again."""
    modules = network.modules() if isinstance(network, nn.Module) else ()
    modes = {module: module.training for module in modules}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _require_finite(answers: np.ndarray, record_ids: pd.Series) -> np.ndarray:
    """The answers, or DataError naming the first record whose score is not a number."""
    wrong = np.flatnonzero(~np.isfinite(answers).all(axis=1))
    if len(wrong):
        raise DataError(
            f"The model gives no number for record {record_ids.iloc[wrong[0]]} ({len(wrong)} "
            "records in all); its training has diverged, train it again with a smaller learning "
            "rate."
        )
    return answers
