"""Released encoders: the card's code opens the weights, its figures are those of the table."""

import hashlib
import re

import pandas as pd
import pytest
import torch

from ecglib.errors import DataError
from ecglib.selfsup import Pretraining
from ecgstudy.analysis.model_cards import release_encoders
from ecgstudy.methods import pretraining
from ecgstudy.study import Study

SETTINGS = Pretraining(
    encoder="xresnet1d_narrow",
    steps=2,
    batch_size=8,
    crop_seconds=1.0,
    learning_rate=0.01,
    weight_decay=0.0,
    transforms={"gaussian_noise": {}},
    options={"temperature": 0.5, "hidden": 8, "outputs": 8},
)


@pytest.fixture(scope="module")
def pretrained(records, folder):
    records.about["source"] = "simulated cohort"
    return Study(records, folder).run(pretraining("simclr", SETTINGS))


def summary(method: str) -> pd.DataFrame:
    rows = [
        (method, "frozen", 0.1, 0.8125),
        ("random", "frozen", 0.1, 0.75),
        ("supervised", "supervised", 1.0, 0.9),
    ]
    frame = pd.DataFrame(rows, columns=["method", "protocol", "fraction", "value"])
    return frame.assign(
        encoder="xresnet1d_narrow", low=frame["value"] - 0.01, high=frame["value"] + 0.01
    )


def test_the_cards_own_code_opens_the_weights(pretrained, records, tmp_path, monkeypatch):
    (released,) = release_encoders({"simclr": pretrained}, summary("simclr"), records, tmp_path)
    card = (released / "README.md").read_text()
    signals = torch.from_numpy(records.millivolts([0])[:, :, :100])
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    scope = {"signals": signals}
    monkeypatch.chdir(released)
    exec(code, scope)
    weights = pretrained.weights()
    assert all(
        torch.equal(value, weights[name]) for name, value in scope["encoder"].state_dict().items()
    )
    assert f"-> (batch, {scope['features'].shape[1]})" in card and "(batch, 12, 100) mV" in card
    assert hashlib.sha256((released / "model.safetensors").read_bytes()).hexdigest() in card


def test_the_card_shows_the_tables_figures_and_gaps(pretrained, records, tmp_path):
    release_encoders({"simclr": pretrained}, summary("simclr"), records, tmp_path)
    card = (tmp_path / "simclr" / "README.md").read_text()
    assert "| simclr, frozen | 0.812 [0.802, 0.823] | – |" in card
    assert "| from scratch, supervised | – | 0.900 [0.890, 0.910] |" in card
    assert not re.search(r"\{\w+\}", card), "a field was not filled in"


def test_an_encoder_without_scores_is_named(pretrained, records, tmp_path):
    with pytest.raises(
        DataError, match="no row of byol on xresnet1d_narrow; run notebook 09_probe_and_fine_tune"
    ):
        release_encoders({"byol": pretrained}, summary("simclr"), records, tmp_path)
    assert not (tmp_path / "byol").exists()
