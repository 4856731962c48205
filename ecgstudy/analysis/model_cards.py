"""Pretrained encoders as files for others: the weights, and beside them a model card.

A card follows Mitchell et al., "Model Cards for Model Reporting" (2019): what it is, data,
measures, limits.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ecglib.errors import DataError
from ecglib.files import atomic_folder
from ecglib.records import LEADS, Records
from ecgstudy.analysis.figures import percent_label
from ecgstudy.results import interval_table
from ecgstudy.runs import MODEL, RESULT, Run

LICENCES = {
    "PTB-XL": "CC BY 4.0, that of PTB-XL (Wagner et al., Sci Data 7:154, 2020), on which they were "
    "trained",
    "simulated cohort": "MIT, that of this repository",
}
CARD = """# {method} on `{settings[encoder]}`

An encoder for 12-lead ECGs, pretrained without labels. It maps an ECG to {size} features, for a
linear probe or for fine-tuning. For research and teaching; not a medical device.

## Use

```python
from ecglib.encoders import make_encoder
from ecglib.checkpoints import load_state, load_tensors

encoder = make_encoder("{settings[encoder]}").eval()
load_state(encoder, load_tensors("model.safetensors")[0], "model.safetensors")
features = encoder(signals)  # (batch, 12, {samples}) mV at {rate:g} Hz -> (batch, {size})
```

Leads in the order {leads}; millivolts, neither filtered nor scaled.
The features of a record are their mean over windows of {settings[crop_seconds]:g} s
(`ecglib.evaluate.encode_windows`).

## Trained on

The signals of folds 1 to 8 of {source}{records.caveat}.
No label was used, and no record of folds 9 and 10. {settings[steps]:,} steps of
{settings[batch_size]} crops took {minutes:.1f} minutes on {machine[cores]} cores of
{machine[processor]}, accelerator: {machine[accelerator]}.
All settings are in `run.json`.

## What it is worth

Macro AUROC of {classes} on fold 10{records.caveat}:
mean over label subsets, 95 % patient-bootstrap interval. Its controls: the same encoder from
scratch and never trained.

{table}

## Limits

{limits}

Scores by sex, age, device or hospital were not measured. What the study found beyond this encoder,
and what did not help, is in the repository's README and notebook 17.

## Licence and origin

The weights: {licence}.
Run {run.spec.key} of the notebook of this method, torch
{run.about[packages][torch]}; SHA-256 of `model.safetensors`:
`{sha256}`. To cite it, see the repository's `CITATION.cff`.
"""
LIMITS = {
    True: "Simulated hearts stand in for patients: the features may miss what only real recordings "
    "hold, and the scores above say nothing about patients.",
    False: "One hospital's recorder and one population. Small, and pretrained on few records: a "
    "start for learning how such encoders behave, not the best one to be had.",
}


def release_encoders(
    pretrained: Mapping[str, Run], summary: pd.DataFrame, records: Records, folder: str | Path
) -> list[Path]:
    """Write weights, settings and model card of each pretrained encoder to `folder/NAME` and return
    these folders.

    summary is `label_efficiency_summary.csv`. DataError where it has no row of an encoder.
    """
    released = []
    for name, run in pretrained.items():
        text = _card(name, run, summary, records)
        released.append(Path(folder) / name)
        with atomic_folder(released[-1]) as temporary:
            for file in (MODEL, RESULT):
                shutil.copyfile(run.folder / file, temporary / file)
            (temporary / "README.md").write_text(text, encoding="utf-8")
    return released


def _card(
    name: str,
    run: Run,
    summary: pd.DataFrame,
    records: Records,
) -> str:
    """The card of one pretrained encoder in Markdown, every figure taken from its run and from
    `summary`.
    """
    settings = run.spec.settings
    source = records.about["source"]
    return CARD.format(
        method=name,
        run=run,
        settings=settings,
        machine=run.about["machine"],
        records=records,
        source=source,
        size=run.predictions()["features"].shape[1],
        samples=round(settings["crop_seconds"] * records.sampling_rate),
        rate=records.sampling_rate,
        leads=", ".join(LEADS),
        minutes=run.about["seconds"] / 60,
        classes=", ".join(records.classes),
        table=_scores(name, settings["encoder"], summary),
        limits=LIMITS[bool(records.about.get("simulated"))],
        licence=LICENCES.get(source, f"that of {source}, on which they were trained"),
        sha256=hashlib.sha256((run.folder / MODEL).read_bytes()).hexdigest(),
    )


def _scores(name: str, encoder: str, summary: pd.DataFrame) -> str:
    """The rows of the encoder and of its controls as a Markdown table, a column per fraction."""
    words = {"supervised": "from scratch", "random": "never trained", name: name}
    own = summary[(summary["encoder"] == encoder) & summary["method"].isin(words)]
    if name not in set(own["method"]):
        raise DataError(
            f"label_efficiency_summary.csv has no row of {name} on {encoder}; run notebook "
            "09_probe_and_fine_tune again."
        )
    own = own.assign(use=own["method"].map(words) + ", " + own["protocol"])
    cells = interval_table(own, "use")
    header = ["use", *map(percent_label, sorted(set(own["fraction"])))]
    rows = [header, ["---"] * len(header), *cells.fillna("–").reset_index().to_numpy()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
