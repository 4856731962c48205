# %% [markdown]
# # 02 · The supervised baseline
#
# **What you will learn.** How a convolutional network is trained on ECG labels from scratch, how its score is measured
# honestly, and how that score falls when labels become few. Every later method must beat *this* curve, with the same
# encoder, the same crops and the same number of steps.
#
# **What it needs.** The records of notebook 00.
#
# **How long.** The `laptop` profile takes about 3 minutes on two CPU cores; it uses a GPU where there is one. Finished
# runs are kept and opened again.

# %% tags=["parameters"]
results = "../results/laptop"  # where notebook 00 left the records, and where results go
fractions = [0.01, 0.1, 1.0]  # shares of the training labels
seeds_few = 5  # label subsets at 10 % and below, where luck matters
seeds_many = 1  # above
encoder = "xresnet1d_narrow"  # or xresnet1d50, the paper's
steps_few = 80  # at 10 % of the labels and below, the same for every method
steps_many = 250  # above
batch_size = 32
crop_seconds = 2.5
learning_rate = 0.01
weight_decay = 0.01
dropout = 0.0
transforms = {  # augmentations by name, see notebook 01; chosen on fold 9
    "random_resized_crop": {"low": 0.8},
    "channel_resize": {"low": 0.7, "high": 1.4},
    "gaussian_noise": {"scale": 0.03},
    "baseline_wander": {"largest": 0.05},
    "time_out": {"low": 0.0, "high": 0.4},
}
workers = 2  # trainings side by side, one thread each; 1 on a GPU

# %%
from pathlib import Path

from ecglib.records import Records

everything = Records.load(Path(results) / "records")
records = everything.labelled
print(
    f"{records.name}: {len(records):,} of {len(everything):,} recordings carry a class of {records.about['task']!r}"
)
note = f"{records.name}, fold 10{records.caveat}"
print(f"All scores below: {note}")

# %% [markdown]
# ## The network
#
# `xresnet1d` slides small filters along time. Blocks add what they compute to what came in, so that the gradient finds
# its way through many layers. At the end, the maximum and the mean over time become the features: *was there such a
# wave, and how much of it on average*. One linear layer turns them into one number (a logit) a class.

# %%
import torch

from ecglib.encoders import make_encoder
from ecglib.supervised import Classifier

torch.manual_seed(0)
network = Classifier(make_encoder(encoder), len(records.classes))
window = round(crop_seconds * records.sampling_rate)
print(
    f"{sum(p.numel() for p in network.parameters()):,} parameters, {network.encoder.feature_size} features"
)
network(torch.zeros(2, 12, window)).shape

# %% [markdown]
# The paper's encoder, `xresnet1d50`, has 886,432 parameters. Counting them is a cheap check that a network is the
# published one.

# %%
from ecglib.encoders.xresnet1d import xresnet1d50

assert sum(p.numel() for p in xresnet1d50().parameters()) == 886_432

# %% [markdown]
# ## The loss
#
# A recording may have several classes, so each class $c$ is its own yes-or-no question with probability
# $p_c = \sigma(z_c)$. The loss is the mean negative log-likelihood,
#
# $$L = -\frac1{NC}\sum_{n,c}\; y_{nc}\log p_{nc} + (1 - y_{nc})\log(1 - p_{nc}).$$
#
# Written out, and compared with the one that the package trains with:

# %%
from ecglib.batches import CropBatches
from ecglib.supervised import Supervised

split = records.split
batch = CropBatches(records, split["train"], batch_size, crop_seconds, seed=0)(step=0)


def binary_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of yes-or-no answers."""
    yes = torch.sigmoid(logits)
    return -(targets * torch.log(yes) + (1 - targets) * torch.log(1 - yes)).mean()


network.train()
by_hand = binary_cross_entropy(network(batch.signals), batch.targets).item()
by_package = Supervised(network).loss(batch).item()
assert abs(by_hand - by_package) < 1e-5, (by_hand, by_package)
print(
    f"by hand {by_hand:.6f}, by the package {by_package:.6f}; all answers 0.5 would give log 2 = 0.693147"
)

# %% [markdown]
# ## Check: before training, the score should be about chance
#
# AUROC is the probability that a recording with the class scores above one without it: 0.5 is chance. *Macro* is the
# mean over classes. A 10 s recording is scored as the mean over seven overlapping windows of 2.5 s.

# %%
from ecglib.evaluate.draws import bootstrap_interval
from ecglib.evaluate.windows import predict_windows

untrained = predict_windows(network, records, split["validation"], crop_seconds)
before = bootstrap_interval(
    records.targets[split["validation"]],
    untrained,
    records.table["patient_id"].iloc[split["validation"]],
)
assert 0.3 < before.value < 0.7, before
print(f"untrained, fold 9: {before.value:.3f} [{before.low:.3f}, {before.high:.3f}]")

# %% [markdown]
# ## One training, watched
#
# The learning rate rises for the first tenth of the steps and then falls as a cosine to zero. If the loss does not
# fall, nothing that follows means anything.

# %%
from ecgstudy.analysis.label_curve import plot_label_curve
from ecgstudy.analysis.training_curves import plot_training
from ecgstudy.results import save_figure
from ecglib.supervised import Training
from ecgstudy.analysis.summary import seed_summary
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.runs import tidy
from ecgstudy.study import LabelSubset, Study, label_grid

study = Study.open(results, workers)


def arm(subset: LabelSubset) -> FromScratch:
    """One training from scratch."""
    training = Training(
        encoder=encoder,
        steps=steps_few if subset.fraction <= 0.1 else steps_many,
        batch_size=batch_size,
        crop_seconds=crop_seconds,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        dropout=dropout,
        transforms=transforms,
    )
    return FromScratch(subset, training)


subsets = label_grid(fractions, seeds_few, seeds_many)
first = study.run(arm(LabelSubset(max(fractions), 0, tuple(fractions))))

# %%
import pandas as pd

history = pd.DataFrame(first.about["notes"]["history"])
figure = plot_training(history, f"Supervised training, all labels ({records.name})")
save_figure(figure, "supervised_training", results)
figure

# %%
assert history["loss"].tail(5).mean() < history["loss"].head(1).item(), "the loss did not fall"
last = history.iloc[-1]
print(f"{last['seconds']:.0f} s for {last['step']} steps on {study.device} in {last['precision']}")

# %% [markdown]
# ## The grid: fractions × seeds
#
# A seed chooses the label subset, the start of the network and the order of the batches. Runs that are already on disk
# are opened; the others are computed now. Nothing is chosen on fold 10.

# %%
runs = study.grid([arm(subset) for subset in subsets])

# %%
from ecgstudy.results import save_table

rows = tidy(row for run in runs for row in run.rows())
summary = seed_summary(runs, records)
for name, frame in {"supervised": rows, "supervised_summary": summary}.items():
    save_table(frame, name, results)
summary.style.format(precision=3).set_caption(f"Macro AUROC, mean over seeds: {note}")

# %% [markdown]
# In `supervised.csv` each run has one row a measure: `value` with the patient-bootstrap interval `low`–`high` (2.5 to
# 97.5 %), `n_records` and `n_patients` the *labelled training* data that the run had, `seconds` what it took. In the
# summary, the interval is that of the mean over seeds, and `sd_seeds` the spread between label subsets.

# %%
macro = rows[(rows["metric"] == "macro_auroc") & (rows["split"] == "test")]
curve = macro.drop(columns=["low", "high"]).merge(
    summary[["fraction", "low", "high"]], on="fraction"
)
title = f"Supervised from scratch: {records.name}, fold 10 ({len(split['test'])} recordings)"
figure = plot_label_curve(curve, len(split["train"]), title=title)
save_figure(figure, "supervised", results)
figure

# %% [markdown]
# ## Which classes suffer?

# %%
classes = rows[rows["metric"].str.startswith("auroc:") & (rows["split"] == "test")]
per_class = classes.assign(metric=classes["metric"].str.removeprefix("auroc:"))
by_class = per_class.pivot_table(index="metric", columns="fraction", values="value").rename_axis(
    "class"
)
by_class.rename(columns="{:.0%}".format).style.format(precision=3).set_caption(
    f"AUROC of each class: {note}"
)

# %% [markdown]
# ## Does it decide, not only rank?
#
# AUROC says nothing about thresholds. These measures do: each class has the threshold that maximises $F_2$ on fold 9,
# and the test records are judged by it. Ranking loss and coverage are better when small.

# %%
measures = [
    "ranking_loss",
    "coverage",
    "mean_average_precision",
    "macro_f2",
    "macro_g2",
    "hamming_loss",
]
decisions = rows[rows["metric"].isin(measures) & (rows["split"] == "test")]
measured = decisions.pivot_table(index="metric", columns="fraction", values="value").loc[measures]
measured.rename(columns="{:.0%}".format).style.format(precision=3).set_caption(
    f"Rankings and decisions: {note}"
)

# %% [markdown]
# ## Exercise
#
# How much of the gap between the smallest fraction and all labels is luck of the draw? Put the gap between the two mean
# macro AUROCs into `gap`, and how far the seeds spread at the smallest fraction, as standard deviation of a sample,
# into `spread`. `macro` has one row a run.

# %% tags=["given"]
from pathlib import Path

import pandas as pd

macro = pd.read_csv(Path(results) / "tables" / "supervised.csv")
macro = macro[(macro["metric"] == "macro_auroc") & (macro["split"] == "test")]

# %% tags=["solution"]
few, many = (
    macro[macro["fraction"] == bound]["value"] for bound in macro["fraction"].agg(["min", "max"])
)
gap, spread = many.mean() - few.mean(), few.std()
print(f"gap {gap:.3f}; spread of the seeds at the smallest fraction {spread:.3f}")

# %% tags=["check"]
from ecgtools.answers import number

told = pd.read_csv(Path(results) / "tables" / "supervised_summary.csv").sort_values("fraction")
rise = told["value"].iloc[-1] - told["value"].iloc[0]
assert abs(number(gap) - rise) < 1e-6, (
    "`gap` is not the mean with all labels minus the mean with the fewest"
)
assert abs(number(spread) - told["sd_seeds"].iloc[0]) < 1e-6, (
    "`spread` is not the seeds' deviation with the fewest"
)
print("right")

# %% [markdown]
# ## What was seen

# %%
lines = [
    f"{100 * row.fraction:g} % of the labels: macro AUROC {row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
    for row in summary.itertuples()
]
print(f"{note}, {records.about['task']}, mean over seeds\n" + "\n".join(lines))

# %% [markdown]
# The curve above is the control of the whole study. Written: `tables/supervised.csv`, `tables/supervised_summary.csv`,
# `figures/supervised.svg`, `figures/supervised_training.svg`, and one folder a run below `runs/`.
