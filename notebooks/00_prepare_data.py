# %% [markdown]
# # 00 · Prepare the data
#
# **What you will learn.** What a 12-lead ECG is as numbers, how files become one table of records, which faults real
# recordings have and what is done about each, and how to split patients so that a score can be trusted.
#
# **What it needs.** Nothing: without a data folder it simulates a cohort. With PTB-XL or your own files it reads those.
#
# **How long.** About 15 seconds on two CPU cores for 3,000 simulated records; reading all of PTB-XL takes a minute.
# No GPU is used.

# %% [markdown]
# ## Parameters
#
# Everything that may differ between a quick look and a full run stands here. `run_all.sh` replaces these values by
# those of a profile in `configs/`.

# %% tags=["parameters"]
data = ""  # folder with ECG files; empty: simulate
results = "../results/laptop"  # where tables, figures and prepared records go
task = "superclass"  # label set
sampling_rate = 100  # Hz
preprocessing = "none"  # or "ce_ssl": the filter and scaling that CE-SSL publishes, at 500 Hz
simulated_patients = 2400
seed = 0
fractions = [0.01, 0.1, 1.0]  # shares of the training labels that later notebooks compare

# %% [markdown]
# ## One type for all sources
#
# Every source ends in the same object: `Records`. It holds the signals as 16-bit counts `(records, leads, time)`, one
# scale (millivolts a count), a table with one row a recording, and 0/1 targets. A simulated cohort is marked as such,
# and every table of this study says on which of the two it was made.

# %%
from pathlib import Path

from ecglib.sources import read_source
from ecglib.sources.simulate import simulate_cohort

if data:
    source = records = read_source(data, task, sampling_rate)
else:
    source = simulate_cohort(simulated_patients, seed, sampling_rate=sampling_rate, task=task)
    records = source.records
version = (
    "simulated" if records.about["simulated"] else records.about.get("version", "no version known")
)
print(f"{records.about['source']}, {version}: {len(records):,} recordings")

# %% [markdown]
# The table: who was recorded, in which fold the patient lies, and what is known beside the signal.

# %%
records.table.head()

# %% [markdown]
# The signals take two bytes a sample. At 100 Hz and 10 s a recording is 24 kB, so all of PTB-XL fits into half a
# gigabyte and can stay on a GPU.

# %%
print(
    f"signals {records.signals.shape}, {records.signals.dtype}, {records.signals.nbytes / 1e6:.0f} MB, "
    f"one count = {1000 * records.scale:g} µV"
)

# %% [markdown]
# ## Check: Einthoven's law
#
# Only eight of the twelve leads are independent. With the electrodes on the right arm, left arm and left leg, lead I is
# $L - R$, II is $F - R$ and III is $F - L$, so that
#
# $$\mathrm{III} = \mathrm{II} - \mathrm{I}, \qquad \mathrm{aVR} = -\tfrac12(\mathrm{I} + \mathrm{II}).$$
#
# If a file has its leads in another order, or if one has a gain of its own, this breaks. It is the cheapest test that a
# reader is right.

# %%
import numpy as np

from ecglib.records import LEADS

lead = {name: position for position, name in enumerate(LEADS)}
sample = records.millivolts(slice(0, 500))
difference = sample[:, lead["III"]] - (sample[:, lead["II"]] - sample[:, lead["I"]])
typical = float(np.abs(difference).mean())
print(f"mean |III - (II - I)| = {1000 * typical:.2f} µV")
assert typical < 0.005, "the limb leads are not in the order I, II, III"

# %% [markdown]
# The package checks this for every record, and more: missing samples, flat or saturated leads, absurd amplitudes. A
# fault is repaired by a stated rule or the recording is left out, and each case is one row of this table. Nothing
# happens silently.

# %%
records.left_out

# %% [markdown]
# After reading, no fault may be left but those that are kept on purpose (a saturated lead is counted, not removed).

# %%
faults = records.validate()
assert set(faults["fault"]) <= {"saturated"}, faults
len(faults)

# %% [markdown]
# ## What the labels are
#
# A recording may have several classes, so each class is its own yes-or-no question. In PTB-XL a cardiologist's
# statement carries a likelihood. The common choice, and ours, is that any statement counts; the stricter rule (50 %
# or more) can be asked for, and both counts are shown so that nobody has to guess.

# %%
import pandas as pd

counts = pd.DataFrame({"records": records.targets.sum(axis=0)}, index=records.classes)
counts["share"] = (counts["records"] / len(records)).round(3)
if "likely_only" in records.about:  # PTB-XL, whose statements carry a likelihood
    counts = counts.join(pd.DataFrame(records.about["class_counts"]).T)
counts

# %%
unlabelled = int((~records.targets.any(axis=1)).sum())
print(
    f"{unlabelled} recordings carry none of these classes: they may be used without labels, but not for scoring."
)

# %% [markdown]
# Which classes come together? The diagonal is 1 by definition; a row tells how often the other classes accompany it.

# %%
import matplotlib.pyplot as plt
import seaborn as sns

from ecgstudy.results import save_figure

together = (records.targets.T.astype(float) @ records.targets) / np.maximum(
    records.targets.sum(axis=0), 1
)[:, None]
figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
sns.heatmap(
    pd.DataFrame(together, records.classes, records.classes),
    annot=len(records.classes) <= 12,
    fmt=".2f",
    cmap="crest",
    vmin=0,
    vmax=1,
    ax=axes,
    cbar_kws={"label": "share of the row's recordings"},
)
axes.set(
    xlabel="also has this class",
    ylabel="recordings of this class",
    title=f"Classes together: {records.about['source']}",
)
save_figure(figure, "classes_together", results)
figure

# %% [markdown]
# ## Patients, not recordings, are split
#
# Two recordings of one heart look alike. If one is trained on and the other tested on, the score measures memory. So a
# patient lies in exactly one of ten folds: **folds 1–8 train, 9 selects, 10 is read once**. `records.split` refuses
# records that break this.

# %%
from ecglib.labels import label_subsets

split = records.split
pd.DataFrame(
    {
        name: {
            "recordings": len(where),
            "patients": records.table["patient_id"].iloc[where].nunique(),
        }
        for name, where in split.items()
    }
).T

# %% [markdown]
# The check, written out: no patient of the test fold appears among the training patients.

# %%
patients = records.table["patient_id"]
crossing = set(patients.iloc[split["train"]]) & set(patients.iloc[split["test"]])
assert not crossing, f"{len(crossing)} patients are trained on and tested on"
len(crossing)

# %% [markdown]
# ## Few labels: nested subsets
#
# The study asks what happens when only 1 % of the training recordings have labels. Three rules make the answer fair:
# the subsets are *nested* (the 1 % lies within the 10 %), made of *whole patients*, and *every method gets the same
# ones*. With few labels luck matters, so there are several subsets, one a seed.

# %%
labelled = records.labelled
subsets = label_subsets(labelled, fractions, seed)
assert all(
    set(subsets[a]) <= set(subsets[b]) for a, b in zip(sorted(fractions), sorted(fractions)[1:])
)
pd.DataFrame(
    {
        f"{100 * fraction:g} %": labelled.targets[where].sum(axis=0)
        for fraction, where in subsets.items()
    },
    index=labelled.classes,
)

# %% [markdown]
# ## Keep the records
#
# The folder is written in one step: a kill in the middle leaves the old one. Later notebooks map it from disk, which
# takes milliseconds. A simulated cohort also keeps onset and offset of every wave, for the notebooks that ask where a
# network looks.
#
# The study learns from millivolts. CE-SSL publishes another form: 1 to 47 Hz, each lead in its own standard deviations,
# zeros up to 12.288 s. Voltages are lost with it, and with them what tells hypertrophy.

# %%
from ecglib.preprocess import preprocess
from ecglib.records import Records

assert preprocessing in ("none", "ce_ssl"), preprocessing
if preprocessing == "ce_ssl":
    source = records = preprocess(records, length=round(12.288 * sampling_rate))
folder = source.save(Path(results) / "records")
again = Records.load(folder)
assert again.fingerprint == records.fingerprint
print(f"fingerprint {again.fingerprint[:16]}: results computed on these records carry it")

# %%
from ecgstudy.results import save_table

tables = {"left_out": records.left_out, "classes": counts.rename_axis("class").reset_index()}
for name, frame in tables.items():
    save_table(frame, name, results)

# %% [markdown]
# ## Exercise
#
# How much would a split by *recording* leak? Shuffle the recordings and take a tenth of them, rounded down, as test
# set. Put the positions of the two parts into `test` and `train`, and the share of test recordings whose patient is
# also trained on into `leaking`.

# %% tags=["given"]
from pathlib import Path

import numpy as np

from ecglib.records import Records

patients = Records.load(Path(results) / "records").table["patient_id"]

# %% tags=["solution"]
shuffled = np.random.default_rng(seed).permutation(len(patients))
test, train = np.split(shuffled, [len(patients) // 10])
leaking = patients.iloc[test].isin(set(patients.iloc[train])).mean()
print(f"{leaking:.1%} of the test recordings would have a twin in training")

# %% tags=["check"]
from ecgtools.answers import number, numbers

tenth, twins = len(patients) // 10, patients.value_counts()
tested, known = numbers(test, (tenth,)), numbers(train, (len(patients) - tenth,))
whole = np.array_equal(np.sort(np.concatenate([tested, known])), np.arange(len(patients)))
assert whole, "`test` must hold a tenth of the positions and `train` all others, each position once"
assert (np.diff(tested) != 1).any(), "the recordings are still in their order: shuffle them first"
inside = patients.iloc[tested.astype(int)].value_counts()
strangers = inside[inside == twins[inside.index]].sum()  # all their recordings lie in the test set
assert abs(number(leaking) - (1 - strangers / tenth)) < 1e-9, (
    "`leaking` is not that share of the test recordings"
)
print("right")

# %% [markdown]
# ## What was seen
#
# Files became one checked table of 16-bit signals; what was repaired or left out stands in `tables/left_out.csv`; no
# patient crosses a fold; label subsets are nested. Written: `records/`, `tables/left_out.csv`, `tables/classes.csv` and
# `figures/classes_together.svg`, all below the results folder.
