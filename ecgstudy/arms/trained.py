"""The network behind a finished run, so that noise and saliency ask the very network that was
scored.
"""

from pathlib import Path
from pkgutil import resolve_name

import torch
from torch import nn

from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.probe import chosen_probes, standardise, unit_length
from ecglib.records import Records
from ecgstudy.arms.fusion import EncodersAndHead, fused_classifier
from ecgstudy.runs import Run, find_run


def trained_classifier(run: Run, records: Records, results: str | Path) -> tuple[nn.Module, float]:
    """The network behind `run` in evaluation mode, and the seconds of its windows, where frozen
    encoders have several the longest.

    It maps `(batch, leads, time)` mV to logits `(batch, classes)` of `records`, those that the run
    was made on. How it is put together, and from which other runs below `results`, the job's
    `rebuild` says. DataError where the run keeps no network, or is about other records.
    """
    if run.spec.data_key != records.fingerprint:
        raise DataError(
            f"{run.folder.name}: was made on other records; open the records of its study."
        )
    rebuild = run.about["notes"].get("rebuild")
    if not rebuild:
        raise DataError(
            f"{run.folder.name}: keeps no network of its own; choose a run of an encoder that was "
            "trained."
        )
    network = resolve_name(rebuild)(run, records, results).eval()
    windows = getattr(network, "windows", ()) or (run.spec.settings["crop_seconds"],)
    return network, max(windows)


def probed_encoder(run: Run, records: Records, results: Path) -> EncodersAndHead:
    """Encoder and probe of a frozen run. The probe is fitted again, which takes less than keeping
    it would.

    It answers for a window; of a record `score_signals` probes the mean features, as the run did.
    """
    start = needed_run(run, "pretraining", run.spec.settings["pretraining"], results)
    settings = start.spec.settings
    encoder = start.load(make_encoder(settings["encoder"]))
    features = torch.from_numpy(start.predictions()["features"]).double()
    split = records.split
    reference = features[split["train"]]
    prepared = unit_length(standardise(features, reference))
    own = {"own": run.predictions()["labelled"]}
    probe = chosen_probes(prepared, records.targets, own, split, classes=records.classes)
    head = nn.Linear(features.shape[1], len(records.classes))
    head.load_state_dict({"weight": probe.weights[0], "bias": probe.bias[0]})
    return EncodersAndHead([encoder], head, [reference], (settings["crop_seconds"],))


def fused_encoders(run: Run, records: Records, results: Path) -> EncodersAndHead:
    """The members' encoders and their fusion. Each encoder has the windows of its own pretraining;
    the network answers for windows as long as the longest of them.
    """
    keys = run.spec.settings["member_keys"]
    names = run.spec.settings["members"].split("+")
    members = [needed_run(run, f"member {name}", keys[name], results) for name in names]
    network = fused_classifier(run, members, records)
    network.windows = tuple(member.spec.settings["crop_seconds"] for member in members)
    return network


def needed_run(run: Run, what: str, key: str, results: str | Path) -> Run:
    """The run of that key, on which `run` stands; DataError where it is gone."""
    found = find_run(key, results)
    if found is None:
        raise DataError(
            f"{run.folder.name}: its {what} {key} is gone; run the notebook of {run.spec.method} "
            "again."
        )
    return found
