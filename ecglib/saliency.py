"""Attribution: how much each lead and sample of an ECG speaks for a class, by the network that was
scored.

captum does the work wherever it has the method; it is imported where it is used. Attributions are
signed where the method is: positive speaks for the class. What is said of them is measured by
`ecgstudy.analysis.localisation`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ecglib.encoders.conv_transformer import ConvBlock
from ecglib.encoders.transformer import TransformerBlock
from ecglib.encoders.xresnet1d import Bottleneck
from ecglib.errors import DataError
from ecglib.evaluate.windows import (
    WINDOWS_TOGETHER,
    cut_windows,
    device_millivolts,
    evaluation,
    record_windows,
)
from ecglib.records import Records

STEPS = 16  # points of the path of integrated gradients
PATCH = 20  # samples of one lead that are occluded together
COARSEST = 16  # samples that a step of a Grad-CAM map may stand for: about a QRS at 100 Hz
BEFORE, AFTER = 0.4, 0.6  # seconds of a beat about its R peak


def attribute(
    model: nn.Module, signals: Tensor, class_index: int, method: str, **options: object
) -> Tensor:
    """Attribution of logit `class_index` to `signals (batch, leads, time)` in mV: float32 of the
    same shape.

    `model` maps signals to logits `(batch, classes)`; it is put in evaluation mode meanwhile.
    `method` is one of `METHODS`; options are its keywords. DataError where there is no such method
    or class, or where the network lacks the layer that the method looks at.
    """
    if method not in METHODS:
        raise DataError(
            f"There is no attribution method {method!r}; choose one of {', '.join(METHODS)}."
        )
    if signals.ndim != 3 or not signals.numel():
        raise DataError(
            f"Attribution needs signals (batch, leads, time), not {tuple(signals.shape)}."
        )
    fitting = fitting_methods(model)
    if method not in fitting:
        name = type(getattr(model, "encoder", model)).__name__
        raise DataError(
            f"{name} has no {LAYERS[method]}, which {method} looks at; for this network choose one "
            f"of {', '.join(fitting)}."
        )
    place = next(iter(model.parameters()), signals).device
    # cuDNN's LSTM has no gradient in evaluation.
    with evaluation(model), torch.backends.cudnn.flags(enabled=False):
        inputs = signals.detach().to(place, torch.float32)
        with torch.no_grad():
            classes = model(inputs[:1]).shape[1]
        if not 0 <= class_index < classes:
            raise DataError(
                f"Class {class_index} does not exist: the network has {classes} classes, counted "
                "from 0."
            )
        found = METHODS[method](model, inputs, int(class_index), **options)
    return found.detach().float().to(signals.device)


def fitting_methods(model: nn.Module) -> tuple[str, ...]:
    """Names of the methods for which `model` has the layers."""
    convolutional = bool(_convolutional_stages(model))
    smooth = bool(_of_type(model, (nn.GELU, nn.SiLU, nn.LSTM)))
    fits = {
        "gradcam": convolutional,
        "guided_gradcam": convolutional and not smooth,
        "attention_rollout": bool(_of_type(model, TransformerBlock)),
    }
    return tuple(method for method in METHODS if fits.get(method, True))


def attribute_records(
    network: nn.Module,
    records: Records,
    indices: Sequence[int] | np.ndarray,
    class_index: int,
    method: str,
    window_seconds: float,
    stride_seconds: float | None = None,
    baseline: np.ndarray | None = None,
    **options: object,
) -> np.ndarray:
    """Attribution to whole records, float32 `(n, 12, time)` in the order of `indices`: the mean
    over their windows.

    A record's windows overlap by half, as where networks are scored, or begin every
    `stride_seconds`. `baseline` are the signals `(n, 12, time)` in mV from which integrated
    gradients start. Missing samples become 0 mV. DataError as `attribute`, and where there is no
    record.
    """
    indices = np.arange(len(records))[indices]  # a mask will do as well
    if not len(indices):
        raise DataError("There is no record to attribute; choose a class or a split that has some.")
    time = records.signals.shape[2]
    starts, window = record_windows(time, records.sampling_rate, window_seconds, stride_seconds)
    together = max(1, WINDOWS_TOGETHER // len(starts))
    parts = []
    for first in range(0, len(indices), together):
        signals = device_millivolts(records, indices[first : first + together])
        if baseline is not None:
            part = torch.from_numpy(np.asarray(baseline[first : first + together], np.float32))
            options["baseline"] = cut_windows(part, starts, window).flatten(0, 1)
        windows = cut_windows(signals, starts, window)
        found = attribute(network, windows.flatten(0, 1), class_index, method, **options)
        parts.append(_back_in_place(found.view_as(windows), starts, time))
    return torch.cat(parts).numpy()


def _back_in_place(found: Tensor, starts: Sequence[int], time: int) -> Tensor:
    """Windows `(n, windows, leads, window)` back in their places, `(n, leads, time)`: the mean
    where they overlap.
    """
    total = torch.zeros(found.shape[0], found.shape[2], time)
    times = torch.zeros(time)
    for place, start in enumerate(starts):
        here = slice(start, start + found.shape[3])
        total[:, :, here] += found[:, place]
        times[here] += 1
    return total / times.clamp(min=1)


def relevance(
    attribution: np.ndarray, sign: str = "absolute", smoothing: int = 1, power: int = 1
) -> np.ndarray:
    """What is scored, never negative: |a|, or the positive part of a, as mean over `smoothing`
    samples in time.

    With the positive sign, a is averaged before its part is taken, so that what alternates cancels.
    With a `power` of 2 it is squared at the end: its energy, which counts the peaks and hardly the
    floor between them.
    """
    from scipy.ndimage import uniform_filter1d

    if sign not in ("absolute", "positive"):
        raise DataError(f"Relevance is 'absolute' or 'positive', not {sign!r}.")
    if smoothing < 1:
        raise DataError(f"Smoothing over {smoothing} samples does not exist; give 1 for none.")
    if power < 1:
        raise DataError(
            f"Relevance to the power of {power} is no mass; give 1, or 2 for its energy."
        )
    values = np.abs(attribution) if sign == "absolute" else attribution
    return np.maximum(uniform_filter1d(values, smoothing, axis=-1, mode="nearest"), 0.0) ** power


def find_r_peaks(millivolts: np.ndarray, sampling_rate: float) -> np.ndarray:
    """Samples of the R peaks of one record `(12, time)`: where the 5-20 Hz energy of all leads
    together is largest.

    The threshold follows the record, and two peaks lie at least 0.3 s apart. Empty where nothing
    beats.
    """
    from scipy.signal import butter, find_peaks, sosfiltfilt

    filled = np.nan_to_num(millivolts)
    sections = butter(2, (5, 20), "bandpass", fs=sampling_rate, output="sos")
    width = max(1, round(0.08 * sampling_rate))
    energy = np.convolve(
        np.abs(sosfiltfilt(sections, filled, axis=1)).sum(axis=0), np.ones(width) / width, "same"
    )
    threshold = max(0.35 * float(np.quantile(energy, 0.98)), 1e-6)
    return find_peaks(energy, height=threshold, distance=round(0.3 * sampling_rate))[0]


@dataclass
class HealthyBeats:
    """Median beats of healthy records: what integrated gradients may start from instead of a flat
    line.

    beats `(n, 12, samples)` in mV about each lead's median, from `BEFORE` to `AFTER` seconds about
    the R peak; rates in beats a minute `(n,)`.
    """

    beats: np.ndarray
    rates: np.ndarray
    sampling_rate: float

    @classmethod
    def of(cls, records: Records, indices: Sequence[int] | np.ndarray) -> "HealthyBeats":
        """The beats of the records at `indices`, which must be healthy ones of the training folds.

        DataError where none of them shows a beat.
        """
        signals, rate = np.nan_to_num(records.millivolts(indices)), records.sampling_rate
        found = [median_beat(signal, rate)[:2] for signal in signals]
        kept = [(beat, beats_a_minute) for beat, beats_a_minute in found if beat is not None]
        if not kept:
            raise DataError(
                "No healthy record shows three whole beats; give more records without a finding."
            )
        beats, rates = zip(*kept)
        return cls(np.stack(beats), np.array(rates), rate)

    def baseline(self, millivolts: np.ndarray, nearest: int = 100) -> np.ndarray:
        """The records `(n, 12, time)` with a healthy heart, float32: in each beat what is departed
        from is put back.

        The departure is the record's median beat less the mean beat of the `nearest` healthy
        records by heart rate, so noise, drift and what differs from beat to beat stay. A record
        without three whole beats stays as it is.
        """
        filled = np.nan_to_num(np.asarray(millivolts, np.float32))
        return np.stack([self._mended(signal, nearest) for signal in filled])

    def _mended(self, signal: np.ndarray, nearest: int) -> np.ndarray:
        """The baseline of one record."""
        beat, rate, peaks = median_beat(signal, self.sampling_rate)
        if beat is None:
            return signal
        closest = np.argsort(np.abs(self.rates - rate), kind="stable")[:nearest]
        length = beat.shape[1]
        ramp = np.arange(1, length + 1) / max(2, length // 20)
        # The departure rises and ends softly.
        departure = (beat - self.beats[closest].mean(axis=0)) * np.minimum(
            1.0, np.minimum(ramp, ramp[::-1])
        )
        starts = peaks - round(BEFORE * self.sampling_rate)
        # Where the stretches of two beats overlap, each has its half.
        borders = (starts[:-1] + starts[1:] + length) // 2
        firsts = np.maximum(starts, np.r_[0, borders])
        ends = np.minimum(starts + length, signal.shape[1])
        lasts = np.minimum(ends, np.r_[borders, signal.shape[1]])
        result = signal.copy()
        for start, first, last in zip(starts, firsts, lasts, strict=True):
            result[:, first:last] -= departure[:, first - start : last - start]
        return result


def median_beat(
    signal: np.ndarray, sampling_rate: float
) -> tuple[np.ndarray | None, float, np.ndarray]:
    """Median beat of one record `(12, time)` about each lead's median, beats a minute, and its R
    peaks.

    The beat is None where fewer than three lie wholly inside the record.
    """
    peaks = find_r_peaks(signal, sampling_rate)
    before, after = round(BEFORE * sampling_rate), round(AFTER * sampling_rate)
    whole = peaks[(peaks >= before) & (peaks + after <= signal.shape[1])]
    if len(whole) < 3:
        return None, float("nan"), peaks
    level = np.median(signal, axis=1, keepdims=True)
    beats = np.stack([signal[:, peak - before : peak + after] for peak in whole]) - level
    return np.median(beats, axis=0), 60 * sampling_rate / float(np.median(np.diff(peaks))), peaks


def gradient(model: nn.Module, signals: Tensor, class_index: int) -> Tensor:
    """d logit / d sample, in logits per mV (Simonyan et al. 2014), with its sign."""
    return _captum().Saliency(model).attribute(signals.requires_grad_(), class_index, abs=False)


def integrated_gradients(
    model: nn.Module,
    signals: Tensor,
    class_index: int,
    steps: int = STEPS,
    baseline: Tensor | None = None,
) -> Tensor:
    """(x - b) times the mean gradient on the straight way from b to x (Sundararajan et al. 2017),
    in logits.

    Without a `baseline` b `(batch, leads, time)` it is flat: 0 mV in all leads, the isoelectric
    line. That is no healthy heart: where a wave is lost, nothing differs from it and nothing is
    attributed. `HealthyBeats` gives one.
    """
    return (
        _captum()
        .IntegratedGradients(model)
        .attribute(
            signals,
            None if baseline is None else baseline.to(signals),
            class_index,
            n_steps=steps,
            internal_batch_size=max(WINDOWS_TOGETHER, len(signals)),
        )
    )


def gradcam(model: nn.Module, signals: Tensor, class_index: int) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017): the channels of a convolutional stage weighted by their
    mean gradient.

    The stage is the last one whose steps stand for at most `COARSEST` samples. Its map knows no
    leads: all get the same.
    """
    return _class_activation(model, signals, class_index).expand(signals.shape)


def guided_gradcam(model: nn.Module, signals: Tensor, class_index: int) -> Tensor:
    """Grad-CAM times guided backpropagation (Springenberg et al. 2015): where, and which leads."""
    guided = guided_backpropagation(model, signals, class_index)
    return _class_activation(model, signals, class_index) * guided


def guided_backpropagation(model: nn.Module, signals: Tensor, class_index: int) -> Tensor:
    """Gradient that rectifiers let through only where it is positive.

    captum's changes the backward pass of `nn.ReLU` modules alone; here functions, in-place and
    leaky rectifiers are guided as well.
    """
    with _GuidedRectifiers():
        return gradient(model, signals.detach(), class_index)


@torch.no_grad()
def occlusion(model: nn.Module, signals: Tensor, class_index: int) -> Tensor:
    """Fall of the logit when `PATCH` samples of one lead are drawn as a straight line (Zeiler &
    Fergus 2014).

    A fill with zeros would leave isoelectric stretches as they are and cut steps into the others.
    """
    return (
        _captum()
        .Occlusion(model)
        .attribute(
            signals,
            (1, PATCH),
            (1, PATCH),
            bridged(signals, PATCH),
            class_index,
            perturbations_per_eval=max(1, WINDOWS_TOGETHER // len(signals)),
        )
    )


@torch.no_grad()
def attention_rollout(model: nn.Module, signals: Tensor, class_index: int) -> Tensor:
    """Product over the blocks of (attention + identity) / 2, mean over heads (Abnar & Zuidema
    2020).

    Read from `model` itself while it answers: mean over its tokens of what each takes from each
    piece of the signal. It knows neither classes nor leads: all get the same.
    """
    blocks = _of_type(model, TransformerBlock)
    activation = _captum().LayerActivation(model, blocks)
    entering = activation.attribute(signals, attribute_to_layer_input=True)
    identity = torch.eye(entering[0].shape[1], device=signals.device)
    rolled = identity
    for block, tokens in zip(blocks, entering, strict=True):
        attention = block.attention(tokens).float().mean(dim=1)
        rolled = 0.5 * (attention + identity) @ rolled
    taken, time = rolled.mean(dim=1), signals.shape[2]  # (batch, tokens)
    if any(hasattr(module, "class_token") for module in model.modules()):
        # Half of the features is [CLS], half the mean of the patches; [CLS] itself is no place in
        # the signal.
        taken = (0.5 * (rolled[:, 0] + rolled[:, 1:].mean(dim=1)))[:, 1:]
    samples = -(-time // taken.shape[1])
    return taken.repeat_interleave(samples, dim=1)[:, None, :time].expand(signals.shape) / samples


METHODS: dict[str, Callable[..., Tensor]] = {
    "gradient": gradient,
    "integrated_gradients": integrated_gradients,
    "guided_gradcam": guided_gradcam,
    "gradcam": gradcam,
    "occlusion": occlusion,
    "attention_rollout": attention_rollout,
}
LAYERS = {
    "gradcam": "convolution over time",
    "attention_rollout": "attention",
    "guided_gradcam": "convolution over time with rectifiers throughout",
}


def bridged(signals: Tensor, patch: int) -> Tensor:
    """Each run of `patch` samples replaced by the straight line between the samples beside it,
    `(..., time)`.

    At the ends of the signal, where there is a sample on one side alone, the line is level.
    """
    time = torch.arange(signals.shape[-1], device=signals.device)
    first = time // patch * patch
    before, after = first - 1, (first + patch).clamp(max=len(time))
    left = signals[..., torch.where(before >= 0, before, after.clamp(max=len(time) - 1))]
    right = signals[..., torch.where(after < len(time), after, before.clamp(min=0))]
    return left + (right - left) * ((time - before) / (after - before))


def _class_activation(model: nn.Module, signals: Tensor, class_index: int) -> Tensor:
    """Rectified Grad-CAM map over time, `(batch, 1, time)`."""
    layer = _cam_layer(model, signals[:1])
    cam = _captum().LayerGradCam(model, layer)
    coarse = cam.attribute(signals, class_index, relu_attributions=True).detach()
    coarse = coarse.flatten(1)[:, None]  # (batch, 1, steps)
    # A kernel is centred on its step's first sample, which stretching to the whole time would miss
    # by half a step.
    step, time = -(-signals.shape[2] // coarse.shape[2]), torch.arange(signals.shape[2])
    fine = step * (coarse.shape[2] - 1) + 1
    stretched = F.interpolate(coarse, fine, mode="linear", align_corners=True)
    return stretched[:, :, time.clamp(max=fine - 1)]


def _cam_layer(model: nn.Module, signals: Tensor) -> nn.Module:
    """The last convolutional stage whose output has a step for each `COARSEST` samples or fewer,
    else the first.
    """
    stages = _convolutional_stages(model)
    outputs = _captum().LayerActivation(model, stages).attribute(signals)
    steps = [output.shape[-1] for output in outputs]
    fine = [place for place, count in enumerate(steps) if count * COARSEST >= signals.shape[2]]
    return stages[fine[-1] if fine else 0]


def _convolutional_stages(model: nn.Module) -> list[nn.Module]:
    """The blocks of a convolutional encoder, else its convolutions that reach over time."""
    blocks = _of_type(model, (Bottleneck, ConvBlock))
    convolutions = _of_type(model, (nn.Conv1d, nn.Conv2d))
    return blocks or [layer for layer in convolutions if layer.kernel_size[-1] > 1]


def _captum() -> ModuleType:
    """captum's methods, imported at their first use and without what its progress bars say about
    Jupyter's widgets.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import captum.attr
    return captum.attr


def _of_type(model: nn.Module, types: type | tuple[type, ...]) -> list[nn.Module]:
    """The modules of these types inside `model`."""
    return [module for module in model.modules() if isinstance(module, types)]


class _Guided(torch.autograd.Function):
    """A rectifier whose backward pass lets only positive gradients through."""

    @staticmethod
    def forward(context, x, slope):  # noqa: ANN001, ANN205
        """x where it is positive, else x times the slope."""
        context.save_for_backward(x)
        context.slope = slope
        return F.leaky_relu(x, slope)

    @staticmethod
    def backward(context, gradient):  # noqa: ANN001, ANN205
        """The positive part of the usual gradient."""
        (x,) = context.saved_tensors
        return torch.where(x > 0, gradient, context.slope * gradient).clamp(min=0), None


class _GuidedRectifiers(TorchFunctionMode):
    """Within it every rectifier is guided: modules, functions and in-place ones alike."""

    PLAIN = {torch.relu, torch.relu_, F.relu, Tensor.relu, Tensor.relu_}
    LEAKY = {F.leaky_relu, F.leaky_relu_, torch._C._nn.leaky_relu, torch._C._nn.leaky_relu_}

    def __torch_function__(self, function, types, arguments=(), keywords=None):  # noqa: ANN001, ANN204
        keywords = keywords or {}
        if function in self.PLAIN:
            return _Guided.apply(arguments[0], 0.0)
        if function in self.LEAKY:
            slope = arguments[1] if len(arguments) > 1 else keywords.get("negative_slope", 0.01)
            return _Guided.apply(arguments[0], slope)
        return function(*arguments, **keywords)
