"""The supervised control on real ECGs learns, and its loss is the formula's."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ecglib.batches import CropBatches
from ecglib.encoders import make_encoder
from ecglib.evaluate.metrics import macro_auroc
from ecglib.evaluate.windows import predict_windows
from ecglib.sources.ptbxl import read_ptbxl
from ecglib.supervised import Classifier, Supervised, Training, new_classifier, train_classifier

PTB_XL = Path(__file__).resolve().parents[3] / "shared" / "data" / "ptb-xl-subset"


def test_loss_equals_a_slow_numpy_version():
    from toolkit import labelled_records

    records = labelled_records()
    torch.manual_seed(0)
    objective = Supervised(Classifier(make_encoder("xresnet1d_narrow"), 2))
    batch = CropBatches(records, np.arange(60), 8, 1.0, 0)(0)
    ours = objective.loss(batch).item()
    logits, targets = (
        objective.classifier(batch.signals).detach().numpy().astype(float),
        batch.targets.numpy(),
    )
    slow = [
        -(np.log(1 / (1 + np.exp(-z))) if y else np.log(1 - 1 / (1 + np.exp(-z))))
        for row, truth in zip(logits, targets)
        for z, y in zip(row, truth)
    ]
    assert ours == pytest.approx(np.mean(slow), rel=1e-5)


@pytest.mark.skipif(not PTB_XL.is_dir(), reason="the real ECGs are not here")
def test_sixty_steps_on_real_ecgs_beat_chance_by_far():
    records = read_ptbxl(PTB_XL)
    records = records.labelled
    split = records.split
    training = Training(
        encoder="xresnet1d_narrow",
        steps=60,
        batch_size=32,
        crop_seconds=2.5,
        learning_rate=3e-3,
        weight_decay=0.01,
    )
    classifier = new_classifier(records, 0, training)
    history = train_classifier(classifier, records, split["train"], 0, training)
    scores = predict_windows(classifier, records, split["validation"])
    assert macro_auroc(records.targets[split["validation"]], scores, records.classes) > 0.75
    assert history[-1]["step"] == 60
