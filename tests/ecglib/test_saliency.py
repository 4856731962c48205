"""Attribution methods against slow references, planted waves, and everything that can be asked
wrongly.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ecglib.encoders import make_encoder
from ecglib.encoders.in_place_norm import norm_leaky
from ecglib.errors import DataError
from ecglib.saliency import (
    METHODS,
    HealthyBeats,
    attribute,
    attribute_records,
    bridged,
    find_r_peaks,
    fitting_methods,
    guided_backpropagation,
    relevance,
)
from ecglib.sources.simulate import simulate_cohort
from ecglib.supervised import Classifier


@pytest.fixture(scope="module")
def cohort():
    return simulate_cohort(60, seed=3)


def classifier(encoder, classes=3):
    torch.manual_seed(0)
    return Classifier(make_encoder(encoder), classes)


def signals(batch=2, time=250, seed=0):
    return torch.randn(batch, 12, time, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """logit c = sum of weight c times the signal, so every gradient is known."""

    def __init__(self, time):
        super().__init__()
        self.weight = nn.Parameter(signals(2, time, seed=5))

    def forward(self, x):
        return torch.einsum("blt,clt->bc", x, self.weight)


def test_gradient_and_integrated_gradients_of_a_linear_network():
    model, x, start = Linear(60), signals(3, 60), signals(3, 60, seed=8)
    np.testing.assert_allclose(
        attribute(model, x, 1, "gradient"), model.weight[1].detach().expand(3, 12, 60)
    )
    for options, base in (({}, torch.zeros_like(x)), ({"baseline": start}, start)):
        found = attribute(model, x, 1, "integrated_gradients", **options)
        torch.testing.assert_close(
            found, (x - base) * model.weight[1].detach(), rtol=1e-4, atol=1e-5
        )


def test_integrated_gradients_sum_to_the_difference_of_logits():
    model, x = classifier("xresnet1d_narrow"), signals()
    found = attribute(model, x, 1, "integrated_gradients", steps=200)
    with torch.no_grad():
        model.eval()
        wanted = (model(x) - model(torch.zeros_like(x)))[:, 1]
    torch.testing.assert_close(found.sum(dim=(1, 2)), wanted, rtol=0.02, atol=0.02)


def test_occlusion_is_the_fall_of_the_logit_patch_by_patch():
    model, x = Linear(50), signals(2, 50)
    found, filled = attribute(model, x, 0, "occlusion"), bridged(x, 20)
    for lead, start in ((0, 0), (3, 20), (11, 40)):  # the last patch has 10 samples
        gone = x.clone()
        gone[:, lead, start : start + 20] = filled[:, lead, start : start + 20]
        with torch.no_grad():
            fall = (model(x) - model(gone))[:, 0]
        torch.testing.assert_close(
            found[:, lead, start : start + 20],
            fall[:, None].expand(2, min(20, 50 - start)),
            rtol=1e-4,
            atol=1e-4,
        )


def test_bridging_keeps_a_straight_line_and_removes_a_wave():
    line = torch.linspace(-1, 2, 100).expand(1, 1, 100)
    torch.testing.assert_close(bridged(line, 20)[:, :, 20:80], line[:, :, 20:80])
    wave = torch.ones(1, 1, 100)
    wave[0, 0, 45:55] += 3.0
    torch.testing.assert_close(bridged(wave, 20), torch.ones(1, 1, 100))


class Rectified(nn.Module):
    """The same small network with its rectifiers written in one of several ways."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(1)
        self.form, self.shared = form, nn.ReLU()
        self.first, self.second, self.last = nn.Linear(24, 16), nn.Linear(16, 16), nn.Linear(16, 2)
        self.modules_of_its_own = nn.ModuleList([nn.ReLU(), nn.ReLU()])

    def rectify(self, x, place):
        forms = {
            "own": self.modules_of_its_own[place],
            "reused": self.shared,
            "function": torch.relu,
            "in place": lambda x: F.relu_(x + 0.0),
            "method": lambda x: x.relu(),
        }
        return forms[self.form](x)

    def forward(self, x):
        inner = self.rectify(self.first(x.flatten(1)), 0)
        return self.last(self.rectify(self.second(inner), 1))


@pytest.mark.parametrize("form", ["own", "reused", "function", "in place", "method"])
def test_guided_backpropagation_however_rectifiers_are_written(form):
    model, x = Rectified(form), signals(4, 2)
    one = model.first(x.flatten(1))
    two = model.second(one.relu())
    back = model.last.weight[1] * (two > 0)
    back = (back.clamp(min=0) @ model.second.weight) * (one > 0)
    wanted = (back.clamp(min=0) @ model.first.weight).view_as(x)
    torch.testing.assert_close(guided_backpropagation(model, x, 1), wanted.detach())


def test_guided_backpropagation_through_the_fused_in_place_norm():
    torch.manual_seed(2)
    norm, x = nn.BatchNorm1d(12).eval(), signals(2, 8)
    norm.running_mean.normal_()
    head = torch.randn(12, 8)

    class Fused(nn.Module):
        def forward(self, x):
            return (norm_leaky(norm, x) * head).sum(dim=(1, 2))[:, None]

    y = norm(x).detach()
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt())[None, :, None]
    wanted = torch.where(y > 0, head, 0.01 * head).clamp(min=0) * scale
    torch.testing.assert_close(guided_backpropagation(Fused(), x, 0), wanted.detach())


@pytest.mark.parametrize(
    "encoder",
    ["xresnet1d_narrow", "conv_transformer_small", "vit1d_small", "cpc_lstm_small", "s4_small"],
)
def test_every_method_that_fits_and_the_sentence_for_the_others(encoder):
    model, x = classifier(encoder).train(), signals(2, 250)
    model.head[0].eval()  # a mode of its own, to be found again
    before = [module.training for module in model.modules()]
    fitting = fitting_methods(model)
    for method in METHODS:
        if method not in fitting:
            with pytest.raises(
                DataError, match=f"{type(model.encoder).__name__} has no .*{method}.*gradient"
            ):
                attribute(model, x, 0, method)
            continue
        found = attribute(model, x, 0, method)
        assert found.shape == x.shape and found.dtype == torch.float32 and found.isfinite().all()
        torch.testing.assert_close(found, attribute(model, x, 0, method))
        if method in ("gradcam", "attention_rollout"):
            assert (found == found[:, :1]).all() and (found >= 0).all()
    assert [module.training for module in model.modules()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    convolutional = encoder in ("xresnet1d_narrow", "conv_transformer_small")
    assert ("gradcam" in fitting) == convolutional
    assert ("attention_rollout" in fitting) == (
        encoder in ("vit1d_small", "conv_transformer_small")
    )


def test_rollout_is_a_share_of_attention_from_the_network_itself():
    model, x = classifier("vit1d_small").eval(), signals(1, 250)
    found = attribute(model, x, 0, "attention_rollout")[0, 0]
    assert 0.4 < float(found.sum()) <= 1.0 + 1e-5  # [CLS] keeps a part
    with torch.no_grad():
        tokens, rolled = model.encoder.tokens(x), torch.eye(11)
        for block in model.encoder.blocks:
            attention = block.attention(tokens)[0].mean(dim=0)
            rolled = 0.5 * (attention + torch.eye(11)) @ rolled
            tokens = block(tokens)
        wanted = 0.5 * (rolled[0] + rolled[1:].mean(dim=0))[1:]
    torch.testing.assert_close(found.view(10, 25).sum(dim=1), wanted, rtol=1e-4, atol=1e-6)


def test_grad_cam_lies_over_a_planted_wave():
    class Detector(nn.Module):
        """Sees what is large in lead 4, by a convolution with steps of 8 samples."""

        def __init__(self):
            super().__init__()
            self.filter = nn.Conv1d(12, 1, 9, stride=8, padding=4, bias=False)
            nn.init.zeros_(self.filter.weight)
            self.filter.weight.data[0, 4] = 1.0

        def forward(self, x):
            return self.filter(x).relu().mean(dim=(1, 2))[:, None]

    x = torch.zeros(1, 12, 240)
    x[0, 4, 158:163] = 1.0
    for method in ("gradcam", "guided_gradcam"):
        found = attribute(Detector(), x, 0, method)
        assert abs(int(found[0].sum(dim=0).argmax()) - 160) <= 4, method
    assert int(found[0].sum(dim=1).argmax()) == 4


def test_records_are_the_mean_over_their_windows(cohort):
    model, records = classifier("xresnet1d_narrow"), cohort.records
    whole = attribute_records(model, records, [3, 1], 0, "gradient", 5.0, 2.5)
    x = torch.from_numpy(records.millivolts([3, 1]))
    one, two, three = (
        attribute(model, x[:, :, start : start + 500], 0, "gradient") for start in (0, 250, 500)
    )
    np.testing.assert_allclose(whole[:, :, :250], one[:, :, :250], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        whole[:, :, 300:400], (one[:, :, 300:400] + two[:, :, 50:150]) / 2, rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(whole[:, :, 750:], three[:, :, 250:], rtol=1e-4, atol=1e-6)


def test_r_peaks_are_where_the_cohort_has_its_qrs(cohort):
    for row in range(5):
        record = cohort.records.table["record_id"].iloc[row]
        waves = cohort.waves[
            (cohort.waves["record_id"] == record) & (cohort.waves["wave"] == "QRS")
        ]
        peaks = find_r_peaks(cohort.records.millivolts([row])[0], 100)
        inside = [
            ((peaks >= onset - 4) & (peaks <= offset + 4)).any()
            for onset, offset in waves[["onset", "offset"]].to_numpy()
        ]
        assert np.mean(inside) > 0.9, record
    assert not len(find_r_peaks(np.zeros((12, 1000)), 100))


def test_the_healthy_baseline_leaves_healthy_beats_and_mends_others(cohort):
    records = cohort.records
    normal = np.flatnonzero(records.targets[:, records.classes.index("NORM")])
    bank = HealthyBeats.of(records, normal)
    flat = np.zeros((1, 12, 1000), np.float32)
    np.testing.assert_array_equal(bank.baseline(flat), flat)  # nothing beats, nothing is changed
    x = records.millivolts(normal[:1])
    alone = HealthyBeats.of(records, normal[:1])
    np.testing.assert_allclose(alone.baseline(x), x, atol=1e-5)  # its own beat departs from nothing
    raised = x.copy()
    peaks = find_r_peaks(x[0], 100)
    for peak in peaks[1:-1]:
        raised[0, 6, peak + 12 : peak + 20] += 0.3
    mended = alone.baseline(raised)
    assert np.abs(mended - x)[0, 6].mean() < 0.25 * np.abs(raised - x)[0, 6].mean()
    with pytest.raises(DataError, match="three whole beats"):
        HealthyBeats.of(
            records.select([0]).from_millivolts(
                flat, 100, records.table.iloc[:1], records.targets[:1], records.classes
            ),
            [0],
        )


def test_relevance_is_a_size_or_a_positive_part():
    a = np.array([[[1.0, -2.0, 3.0]]])
    np.testing.assert_array_equal(relevance(a), [[[1, 2, 3]]])
    np.testing.assert_array_equal(relevance(a, "positive"), [[[1, 0, 3]]])
    np.testing.assert_allclose(
        relevance(a, "positive", 3)[0, 0, 1], 2 / 3
    )  # averaged before the part is taken
    np.testing.assert_allclose(relevance(a, "absolute", 3)[0, 0, 1], 2.0)
    np.testing.assert_array_equal(relevance(a, power=2), [[[1, 4, 9]]])
    np.testing.assert_array_equal(relevance(a, "positive", power=2), [[[1, 0, 9]]])
    np.testing.assert_allclose(
        relevance(a, "positive", 3, 2)[0, 0, 1], 4 / 9
    )  # and squared at the end


def test_bad_input(cohort):
    model, x = classifier("xresnet1d_narrow"), signals()
    for sentence, call in {
        "no attribution method 'lime'; choose one of gradient": lambda: attribute(
            model, x, 0, "lime"
        ),
        "Class 3 does not exist: the network has 3": lambda: attribute(model, x, 3, "gradient"),
        "Class -1 does not exist": lambda: attribute(model, x, -1, "gradient"),
        r"needs signals \(batch, leads, time\), not \(12, 250\)": lambda: attribute(
            model, x[0], 0, "gradient"
        ),
        "no record to attribute": lambda: attribute_records(
            model, cohort.records, [], 0, "gradient", 2.5
        ),
        "'absolute' or 'positive', not 'square'": lambda: relevance(np.zeros((1, 1, 3)), "square"),
        "Smoothing over 0 samples": lambda: relevance(np.zeros((1, 1, 3)), smoothing=0),
        "to the power of 0 is no mass": lambda: relevance(np.zeros((1, 1, 3)), power=0),
    }.items():
        with pytest.raises(DataError, match=sentence):
            call()
