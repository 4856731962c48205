"""CE-SSL's loss, and F2 compared in pairs."""

import copy

import numpy as np
import pytest
import torch

from ecglib.augment import cutmix, weak_view
from ecglib.batches import CropBatches, SemiBatch, step_generator
from ecglib.encoders import make_encoder
from ecglib.encoders.conv_transformer import ConvTransformer
from ecglib.evaluate.draws import PatientDraws, f2
from ecglib.labels import label_subsets
from ecglib.lora import add_lora, low_rank_layers
from ecglib.records import Records
from ecglib.semisup.ce_ssl import CESSL, first_features
from ecglib.sources.simulate import simulate_records
from ecglib.supervised import Classifier


@pytest.fixture(scope="module")
def records() -> Records:
    return simulate_records(120, seed=3)


def semi_batch(labelled: int = 5, unlabelled: int = 9) -> SemiBatch:
    generator = torch.Generator().manual_seed(1)
    signals, others = (torch.randn(n, 12, 256, generator=generator) for n in (labelled, unlabelled))
    targets = (torch.rand(labelled, 3, generator=generator) < 0.5).float()
    return SemiBatch(
        signals,
        targets,
        torch.arange(labelled),
        step_generator(0, 0),
        others,
        torch.arange(unlabelled),
    )


@pytest.mark.parametrize("unlabelled", [1, 5, 9])
def test_the_loss_is_that_of_the_labelled_part_of_a_joint_batch(unlabelled: int) -> None:
    """With any number of unlabelled records; the published code works with as many as labelled ones
    only.
    """
    torch.manual_seed(0)
    network, batch = ConvTransformer("tinylight", 3).train(), semi_batch(unlabelled=unlabelled)
    generator = step_generator(0, 0)
    signals, targets = cutmix(batch.signals, batch.targets, generator)
    joint = torch.cat([signals, weak_view(batch.unlabelled, generator)])
    logits = copy.deepcopy(network)(joint)[:5].double()
    probabilities = torch.sigmoid(logits)
    wanted = -(targets * probabilities.log() + (1 - targets) * (1 - probabilities).log()).mean()
    assert float(CESSL(network).loss(batch)) == pytest.approx(float(wanted), rel=1e-4)


def test_statistics_come_from_both_and_gradients_flow_through_them() -> None:
    torch.manual_seed(0)
    network, batch = ConvTransformer("tinylight", 3).train(), semi_batch()
    both = torch.cat([batch.signals, batch.unlabelled])
    inner = network.blocks[0].first(both)
    first_features(network, both, 5)
    norm = network.blocks[0].norm1
    torch.testing.assert_close(
        norm.running_mean, 0.1 * inner.mean(dim=(0, 2)), rtol=1e-4, atol=1e-6
    )
    leaf = batch.unlabelled.clone().requires_grad_()
    features = first_features(network, torch.cat([batch.signals, leaf]), 5)
    assert features.shape == (5, 64)
    features.square().sum().backward()
    assert leaf.grad.abs().sum() > 0, "mean and variance of the unlabelled half have gradients"


def test_without_the_norm_unlabelled_records_do_not_matter() -> None:
    torch.manual_seed(0)
    network, losses = ConvTransformer("tinylight", 3).train(), []
    for seed in (0, 1):
        batch = semi_batch()
        batch.unlabelled = torch.randn(9, 12, 256, generator=torch.Generator().manual_seed(seed))
        losses.append(float(CESSL(copy.deepcopy(network), semi_supervised_norm=False).loss(batch)))
    assert losses[0] == losses[1]


def test_an_encoder_with_norms_everywhere_takes_part_too() -> None:
    torch.manual_seed(0)
    network = Classifier(make_encoder("xresnet1d_narrow"), 3).train()
    add_lora(network, 2, 0.2)
    CESSL(network).loss(semi_batch()).backward()
    assert all(
        layer.B.grad is None or layer.B.grad.abs().sum() > 0
        for layer in low_rank_layers(network).values()
    )


def test_paired_f2_against_a_loop() -> None:
    generator = np.random.default_rng(0)
    targets = generator.random((60, 3)) < 0.3
    a, b = ((generator.random((2, 60, 3)) < 0.4).astype(float) for _ in range(2))
    b[1, :, 2] = np.nan  # one model has no threshold for a class
    groups = np.repeat(np.arange(30), 2)

    def slow(chosen: np.ndarray, predicted: np.ndarray) -> float:
        means = []
        for one in predicted:
            values = []
            for c in range(3):
                truth, said = targets[chosen, c], one[chosen, c]
                if truth.any() and not np.isnan(said).any():
                    hits = (truth * said).sum()
                    values.append(
                        5
                        * hits
                        / (5 * hits + (said * ~truth).sum() + 4 * (truth * (1 - said)).sum())
                    )
            means.append(np.mean(values))
        return float(np.mean(means))

    whole = np.arange(60)
    interval = PatientDraws(groups, 200).difference(f2(targets, a), f2(targets, b))
    assert interval.value == pytest.approx(slow(whole, a) - slow(whole, b))
    draws = []
    for seed in range(400):
        patients = np.random.default_rng(seed).integers(30, size=30)
        chosen = np.concatenate([np.flatnonzero(groups == patient) for patient in patients])
        draws.append(slow(chosen, a) - slow(chosen, b))
    assert interval.low == pytest.approx(np.quantile(draws, 0.025), abs=0.05)
    assert interval.high == pytest.approx(np.quantile(draws, 0.975), abs=0.05)


def test_a_rank_pass_uses_the_labelled_batches_alone(records: Records) -> None:
    labelled = label_subsets(records, [0.1], 0)[0.1]
    batches = CropBatches(records, labelled, 6, 2.5, 0)
    assert set(batches(0).indices.tolist()) <= set(range(len(labelled)))
