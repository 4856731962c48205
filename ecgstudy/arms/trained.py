"""The network behind a finished run, so that noise and saliency ask the very network that was
scored.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ecglib.checkpoints import load_state
from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.probe import chosen_probes, feature_scale, standardise, unit_length
from ecglib.records import Records
from ecglib.supervised import Training, new_classifier
from ecgstudy.arms.fusion import fused_classifier
from ecgstudy.arms.semi_supervised import make_network
from ecgstudy.runs import MODEL, Run, find_run


class ProbedEncoder(nn.Module):
    """A frozen encoder and its linear probe as one network: `(batch, leads, time)` mV -> logits
    `(batch, classes)`.

    It answers for a window; of a record `score_signals` probes the mean features, as the run did.
    """

    def __init__(
        self, encoder: nn.Module, seconds: float, reference: Tensor, weights: Tensor, bias: Tensor
    ) -> None:
        """`seconds` of the encoder's windows; `reference (n, d)` are the features by whose mean and
        deviation the probe's were standardised.
        """
        super().__init__()
        self.encoder, self.windows = encoder, (seconds,)
        mean, deviation = feature_scale(reference)
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", deviation.float())
        self.head = nn.Linear(encoder.feature_size, len(bias))
        with torch.no_grad():
            self.head.weight.copy_(weights)
            self.head.bias.copy_(bias)

    @property
    def encoders(self) -> list[nn.Module]:
        """The encoder whose features are answered."""
        return [self.encoder]

    def answer(self, features: Tensor) -> Tensor:
        """Logits `(n, classes)` of features `(n, d)`."""
        return self.head(unit_length((features - self.mean) / self.deviation))

    def forward(self, signals: Tensor) -> Tensor:
        return self.answer(self.encoder(signals).float())


def trained_classifier(run: Run, records: Records, results: str | Path) -> tuple[nn.Module, float]:
    """The network that `run` kept, in evaluation mode, and the seconds of its windows.

    It maps `(batch, leads, time)` mV to logits `(batch, classes)` of `records`, those that the run
    was made on. A frozen run's network is put together from its pretraining below `results` and its
    probe, that of a frozen DVME from its members. DataError where the run keeps no network, or is
    about other records.
    """
    settings = run.spec.settings
    if run.spec.data_key != records.fingerprint:
        raise DataError(
            f"{run.folder.name}: was made on other records; open the records of its study."
        )
    if "pretraining" in settings and settings.get("protocol") == "frozen":
        return _probed(run, records, results)
    if run.spec.method == "dvme" and settings["protocol"] == "frozen":
        return _fused(run, records, results)
    if not (run.folder / MODEL).exists() or not {"backbone", "encoder"} & set(settings):
        raise DataError(
            f"{run.folder.name}: keeps no network of its own; choose a run of an encoder that was trained."
        )
    weights = run.weights()
    if "backbone" in settings:
        network = make_network(settings["backbone"], len(records.classes), run.spec.seed)
    else:
        network = new_classifier(records, run.spec.seed, Training.of(settings))
        if "stage" in settings:
            if run.spec.method == "dino" and settings["stage"]:
                raise DataError(
                    f"{run.folder.name}: keeps what goes on to the next stage, not the network that was "
                    "fine-tuned to be scored; choose another arm."
                )
            # Beside the student it keeps what the next stage goes on from.
            weights = {
                name.removeprefix("network."): value
                for name, value in weights.items()
                if name.startswith("network.")
            }
    load_state(network, weights, run.folder / MODEL)
    return network.eval(), settings["crop_seconds"]


def _probed(run: Run, records: Records, results: str | Path) -> tuple[nn.Module, float]:
    """Encoder and probe of a frozen run. The probe is fitted again, which takes less than keeping
    it would.
    """
    pretrained = _needed(run, "pretraining", run.spec.settings["pretraining"], results)
    encoder = make_encoder(pretrained.spec.settings["encoder"])
    load_state(encoder, pretrained.weights(), pretrained.folder / MODEL)
    features = torch.from_numpy(pretrained.predictions()["features"]).double()
    split = records.split
    reference = features[split["train"]]
    prepared, labelled = (
        unit_length(standardise(features, reference)),
        run.predictions()["labelled"],
    )
    probes, chosen = chosen_probes(
        prepared, records.targets, {"its own": labelled}, split, classes=records.classes
    )
    seconds = pretrained.spec.settings["crop_seconds"]
    network = ProbedEncoder(
        encoder, seconds, reference, probes.weights[0, chosen[0]], probes.bias[0, chosen[0]]
    )
    return network.eval(), seconds


def _fused(run: Run, records: Records, results: str | Path) -> tuple[nn.Module, float]:
    """The members' encoders and their fusion. Each encoder has the windows of its own pretraining;
    the network answers for windows as long as the longest of them.
    """
    keys = run.spec.settings["member_keys"]
    members = [
        _needed(run, f"member {name}", keys[name], results)
        for name in run.spec.settings["members"].split("+")
    ]
    network = fused_classifier(run, members, records)
    network.windows = tuple(member.spec.settings["crop_seconds"] for member in members)
    return network.eval(), max(network.windows)


def _needed(run: Run, what: str, key: str, results: str | Path) -> Run:
    """The run of that key, on which `run` stands."""
    found = find_run(key, results)
    if found is None:
        raise DataError(
            f"{run.folder.name}: its {what} {key} is gone; run the notebook of {run.spec.method} again."
        )
    return found
