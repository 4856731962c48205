"""Batch norm and a leaky rectifier in one step that keeps one tensor instead of two (Rota Bulo et
al. 2018).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.01
SMALLEST_GAIN = 1e-3  # below it the output of batch norm does not tell its input any more


class _NormLeaky(torch.autograd.Function):
    """leaky(batch_norm(x)) in the place of x; the backward pass gets x back from the result."""

    @staticmethod
    def forward(context, x, gain, bias, norm):  # noqa: ANN001, ANN205
        """The result, in a new tensor; x may be freed."""
        running = norm.running_mean, norm.running_var
        y, mean, inverse = torch.native_batch_norm(
            x, gain, bias, *running, True, norm.momentum, norm.eps
        )
        y = F.leaky_relu_(y, SLOPE)
        context.save_for_backward(y, gain, bias, mean, inverse)
        context.epsilon = norm.eps
        return y

    @staticmethod
    def backward(context, gradient):  # noqa: ANN001, ANN205
        """Gradients of x, gain and bias by torch's own backward pass, for the x found again."""
        y, gain, bias, mean, inverse = context.saved_tensors
        scale = 1.0 / (gain * inverse)
        shift = mean - bias * scale
        # The inverse of a leaky rectifier is one with the inverse slope; float32 also where y is
        # bfloat16.
        x = F.leaky_relu(y, 1.0 / SLOPE).to(mean.dtype)
        x = x.mul_(scale[:, None]).add_(shift[:, None]).to(y.dtype)
        inner = torch.ops.aten.leaky_relu_backward(gradient, y, SLOPE, True)
        statistics = None, None, mean, inverse
        gradients = torch.ops.aten.native_batch_norm_backward(
            inner, x, gain, *statistics, True, context.epsilon, [True] * 3
        )
        return *gradients, None


def norm_leaky(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """leaky(norm(x)) with slope 0.01, for `(batch, channels, time)`.

    While training the result alone is kept for the backward pass, not the input of the norm as
    well: half the memory of a convolutional block. Where a gain is too near to 0 to get the input
    back, both are kept as usual.
    """
    trains = norm.training and torch.is_grad_enabled()
    if not trains or bool((norm.weight.abs() < SMALLEST_GAIN).any()):
        return F.leaky_relu_(norm(x), SLOPE)
    norm.num_batches_tracked.add_(1)
    return _NormLeaky.apply(x, norm.weight, norm.bias, norm)
