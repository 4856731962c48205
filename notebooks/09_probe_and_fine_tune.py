# %% [markdown]
# # 09 · Frozen or fine-tuned: what each encoder is worth
#
# **What you will learn.** Two ways to use a pretrained encoder when labels are few. *Frozen*: compute its features once
# and fit a linear probe on them. *Fine-tuned*: train everything, gently. Both are scored for every method and several
# shares of the labels, beside two controls with the same encoder: trained from scratch, and never trained at all.
#
# **What it needs.** The encoders of notebooks 03–08.
#
# **How long.** The `laptop` profile takes about 5 minutes on two CPU cores, nearly all of it for fine-tuning; probing
# takes seconds. Finished runs are kept and opened again.

# %% tags=["parameters"]
results = "../results/laptop"  # where the earlier notebooks left records and encoders
fractions = [0.01, 0.1, 1.0]  # shares of the training labels
tuned_fractions = [0.1, 1.0]  # those of them at which encoders are fine-tuned
seeds_few = 5  # label subsets at 10 % and below, where luck matters
seeds_many = 1  # above
steps_few = 80  # training steps at 10 % of the labels and below, the same for every arm
steps_many = 250  # above
batch_size = 32
weight_decay = 0.01
dropout = 0.0
transforms = {  # the augmentation of notebook 02, for every arm
    "random_resized_crop": {"low": 0.8},
    "channel_resize": {"low": 0.7, "high": 1.4},
    "gaussian_noise": {"scale": 0.03},
    "baseline_wander": {"largest": 0.05},
    "time_out": {"low": 0.0, "high": 0.4},
}
learning_rates = {  # from scratch; fine-tuned with few and with many labels; for each encoder, chosen on folds 8 and 9
    "xresnet1d_narrow": [0.01, 0.002, 0.01],
    "cpc_lstm_small": [0.003, 0.001, 0.003],
    "vit1d_small": [0.002, 0.0005, 0.002],
    "s4_small": [0.003, 0.001, 0.003],  # those of cpc_lstm_small
}
layer_factor = 0.8  # each layer learns this much slower than the one above it, when fine-tuned
workers = 2  # trainings side by side, one thread each; 1 on a GPU

# %%
from pathlib import Path

from ecgstudy.arms.pretrain import pretrained_runs
from ecgstudy.study import Study

study = Study.open(results, workers)
records = study.records
split = records.split
pretrained = pretrained_runs(study)
note = f"{records.name}, fold 10{records.caveat}"
print(f"All scores below: {note}\nPretrained: {', '.join(pretrained)}")

# %% [markdown]
# ## A linear probe
#
# With frozen features $x$, each class $c$ has its own logistic regression with weights $w_c$ and an L2 penalty
# $\lambda$ that keeps them small when labels are few:
#
# $$\min_{w_c, b_c}\; \sum_n \log\bigl(1 + e^{-s_{nc}(w_c\cdot x_n + b_c)}\bigr) + \tfrac{\lambda}{2}|w_c|^2,
# \qquad s_{nc} = \pm 1.$$
#
# A study has many of them: methods × fractions × subsets × classes × penalties. `ecglib.probe` fits all of an encoder's
# probes together. It must find what scikit-learn finds one by one:

# %%
import numpy as np
from sklearn.linear_model import LogisticRegression

from ecglib.labels import label_subsets
from ecglib.probe import fit_probes, standardise

method = next(iter(pretrained))
raw = pretrained[method].predictions()["features"]
features = standardise(raw, raw[split["train"]])
subset = label_subsets(records, fractions, seed=0)[
    max(fraction for fraction in fractions if fraction <= 0.1)
]
ours = fit_probes(features, records.targets, [subset], [10.0])
common = int(records.targets[subset].sum(axis=0).argmax())
theirs = LogisticRegression(C=1 / 10.0, tol=1e-8, max_iter=5000)
theirs.fit(features[subset].numpy(), records.targets[subset, common])
difference = np.abs(ours.weights[0, 0, common].numpy() - theirs.coef_[0]).max()
assert difference < 1e-4, difference
print(
    f"class {records.classes[common]}, {len(subset)} records: largest difference of a weight {difference:.1e}"
)

# %% [markdown]
# Before the fit, features are standardised with the unlabelled training records and each record's are brought to the
# same length: with 20 labels, a single loud recording would otherwise turn the plane. The penalty is chosen on fold 9,
# for each label subset.

# %%
from ecgstudy.arms.pretrain import untrained
from ecgstudy.study import label_grid

subsets = label_grid(fractions, seeds_few, seeds_many)
controls = study.grid([untrained(run) for run in pretrained.values()], progress_bar=False)
starts = dict(pretrained)
starts |= {f"random {control.spec.value('encoder')}": control for control in controls}
encoders = sorted({run.spec.value("encoder") for run in pretrained.values()})

# %%
import time

from ecgstudy.arms.transfer import frozen_arms

started = time.perf_counter()
probes = [arm for start in starts.values() for arm in frozen_arms(study, start, subsets)]
frozen = study.grid(probes, workers=1, progress_bar=False)
print(f"{len(frozen)} probes' scores with intervals in {time.perf_counter() - started:.0f} s")

# %%
from ecgstudy.analysis.summary import seed_summary

CELL = ("method", "encoder", "protocol", "data", "labels", "fraction")
frozen_summary = seed_summary(frozen, records, cell=CELL)
shown = frozen_summary.pivot_table(index=["encoder", "method"], columns="fraction", values="value")
shown.rename(columns="{:.0%}".format).style.format(precision=3).set_caption(
    f"Frozen, macro AUROC: {note}"
)

# %% [markdown]
# ## Fine-tuning
#
# Training everything from a pretrained start can only help if it does not destroy what the start knows. Two guards: the
# head starts as the probe of the same labels, so that the first gradients are sensible, and the learning rate falls
# from layer to layer towards the input. Here is what one step changes, for each layer of one encoder:

# %%
import pandas as pd

from ecglib.encoders import make_encoder
from ecglib.supervised import Classifier
from ecgstudy.arms.transfer import layerwise_groups

name = pretrained[method].spec.settings["encoder"]
network = Classifier(make_encoder(name), len(records.classes), dropout)
groups = pd.DataFrame(
    {
        "learning_rate_factor": group["learning_rate_factor"],
        "parameters": sum(p.numel() for p in group["params"]),
    }
    for group in layerwise_groups(network, weight_decay, layer_factor)
)
assert groups["parameters"].sum() == sum(p.numel() for p in network.parameters()), (
    "a layer would never be trained"
)
groups.groupby("learning_rate_factor", sort=False)["parameters"].sum()

# %% [markdown]
# The settings of one training: crops are as long as the encoder's pretraining had them, and the rate depends on the
# encoder, on the number of labels and on whether the start is random.

# %%
from ecglib.supervised import Training

windows = {run.spec.value("encoder"): run.spec.value("crop_seconds") for run in pretrained.values()}


def training(encoder: str, fraction: float, fine_tuned: bool) -> Training:
    """Settings of one training with a share of the labels."""
    few = fraction <= 0.1
    from_scratch, tuned_few, tuned_many = learning_rates[encoder]
    tuned = tuned_few if few else tuned_many
    return Training(
        encoder=encoder,
        steps=steps_few if few else steps_many,
        batch_size=batch_size,
        crop_seconds=windows[encoder],
        learning_rate=tuned if fine_tuned else from_scratch,
        weight_decay=weight_decay,
        dropout=dropout,
        transforms=transforms,
        layer_factor=layer_factor if fine_tuned else 1.0,
    )


# %% [markdown]
# Check: before its first step, the fine-tuned network must answer exactly as the probe does. Both are linear in the
# features, and the probe's features are the mean over windows, so the mean logit over windows is the probe's logit.

# %%
from ecglib.evaluate.windows import encode_windows
from ecglib.probe import probe_layer
from ecgstudy.arms.transfer import start_classifier

settings = training(name, min(fractions), fine_tuned=True)
classifier = start_classifier(records, subset, pretrained[method], settings, 0)
weights, bias = probe_layer(raw, records.targets, subset, split)
window = pretrained[method].spec.settings["crop_seconds"]
logits = encode_windows(classifier, records, split["validation"][:32], window)
by_probe = raw[split["validation"][:32]] @ weights.T.numpy() + bias.numpy()
assert np.allclose(logits, by_probe, atol=1e-2), np.abs(logits - by_probe).max()
print(f"largest difference of a logit: {np.abs(logits - by_probe).max():.1e}")

# %% [markdown]
# ## The grid
#
# Every arm has the same augmentation, batches and number of steps for the same labels; the control trains the same
# network from random weights. A pretraining is one more use of the *unlabelled* signals, not of more labels.

# %%
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.arms.transfer import FineTuned

arms = [
    FromScratch(subset, training(encoder, subset.fraction, fine_tuned=False))
    for encoder in encoders
    for subset in subsets
]
arms += [
    FineTuned(
        subset, start, training(start.spec.value("encoder"), subset.fraction, fine_tuned=True)
    )
    for start in pretrained.values()
    for subset in subsets
    if subset.fraction in tuned_fractions
]
trained = study.grid(arms)

# %% [markdown]
# ## The table
#
# `label_efficiency.csv` has one row a run and measure, with the columns of `supervised.csv` and two more: `encoder`,
# and `protocol` (frozen, fine-tuned, or supervised from scratch).

# %%
from ecgstudy.results import interval_table, save_table
from ecgstudy.runs import keep_runs, tidy

runs = frozen + trained
keep_runs(runs, "label_efficiency", results)  # for the notebooks that follow
rows = tidy((row for run in runs for row in run.rows()), extra=("encoder", "protocol"))
summary = seed_summary(runs, records, cell=CELL)
save_table(rows, "label_efficiency", results)
save_table(summary, "label_efficiency_summary", results)
shown = interval_table(summary, ["protocol", "encoder", "method"])
shown.style.set_caption(f"Macro AUROC, mean over seeds: {note}")

# %% [markdown]
# ## Gains, paired
#
# Intervals that overlap do not show that two arms are alike: both were measured on the same patients. So the
# *difference* is drawn, patient sample by patient sample. Each arm is compared with training the same encoder from
# scratch, and each frozen arm also with the same encoder never trained.

# %%
from ecgstudy.analysis.gains import transfer_gains

gains = transfer_gains(runs, records)
save_table(gains, "label_efficiency_gains", results)
few = gains[gains["fraction"].isin([min(fractions), 0.1, max(fractions)])]
few.style.format(precision=3).hide(axis="index").set_caption(f"Gain in macro AUROC, paired: {note}")

# %%
over_random = gains[gains["over"] == "random"]
lacking = over_random[over_random["gain"] <= 0]
for row in lacking.itertuples():
    print(
        f"NOT better than random filters: {row.method}, frozen, {row.fraction:.0%} of the labels ({row.gain:+.3f})"
    )
print(
    f"{len(over_random) - len(lacking)} of {len(over_random)} frozen arms beat the same encoder never trained"
)

# %% [markdown]
# ## Did anything collapse?

# %%
collapse = pd.DataFrame(
    [
        {
            "method": name,
            "encoder": run.spec.settings["encoder"],
            "features": run.predictions()["features"].shape[1],
            "effective_rank": run.about["notes"]["effective_rank"],
        }
        for name, run in pretrained.items()
    ]
)
assert (collapse["effective_rank"] > 2).all(), (
    "the features of an encoder vary in hardly more than one direction"
)
collapse.style.format(precision=1).hide(axis="index")

# %% [markdown]
# ## Exercise
#
# Which class gains most from pretraining at the smallest fraction? Choose the pretrained frozen arm by its macro AUROC
# on fold 9, as a mean over label subsets, and put `(method, encoder)` into `arm`. Put what each class gains on fold 10
# over the same encoder trained from scratch into `gain`, by the name of the class, and the class into `most`.

# %% tags=["given"]
from pathlib import Path

import numpy as np
import pandas as pd

table = pd.read_csv(Path(results) / "tables" / "label_efficiency.csv")
table = table[(table["fraction"] == table["fraction"].min())]
own_classes = [metric for metric in table["metric"].unique() if metric.startswith("auroc:")]

# %% tags=["solution"]
means = (
    table.groupby(["protocol", "split", "method", "encoder", "metric"])["value"].mean().unstack()
)
arm = means.loc["frozen", "validation"].drop(index="random")["macro_auroc"].idxmax()
gain = (means.loc["frozen", "test", *arm] - means.loc["supervised", "test", "supervised", arm[1]])[
    own_classes
]
gain = gain.rename(lambda metric: metric.removeprefix("auroc:")).sort_values()
most = gain.idxmax()
print(f"{arm}: {most} gains most\n{gain.round(3).to_dict()}")

# %% tags=["check"]
from ecgtools.answers import numbers

scored = {}
for row in table.itertuples():
    scored.setdefault((row.protocol, row.split, row.metric, row.method, row.encoder), []).append(
        row.value
    )
scored = {key: np.mean(values) for key, values in scored.items()}
ranked = {
    key[3:]: value
    for key, value in scored.items()
    if key[:3] == ("frozen", "validation", "macro_auroc")
}
top = max(value for candidate, value in ranked.items() if candidate[0] != "random")
best = isinstance(arm, tuple) and arm[:1] != ("random",) and ranked.get(arm, 0) >= top - 1e-9
assert best, "`arm` is not the pretrained frozen arm with the highest macro AUROC on fold 9"
true = {
    metric.removeprefix("auroc:"): scored["frozen", "test", metric, *arm]
    - scored["supervised", "test", metric, "supervised", arm[1]]
    for metric in own_classes
}
told = numbers(pd.Series(gain, dtype=object).reindex(list(true)), (len(true),))
assert np.allclose(told, list(true.values()), equal_nan=True), (
    "`gain` is not that of the frozen arm on fold 10"
)
largest = isinstance(most, str) and true.get(most, -1) >= np.nanmax(list(true.values())) - 1e-9
assert largest, "`most` is not the class with the largest gain"
print("right")

# %% [markdown]
# ## What was seen

# %%
for fraction in (min(fractions), max(fractions)):
    cell = summary[summary["fraction"] == fraction].sort_values("value")
    top, control = cell.iloc[-1], cell[cell["protocol"] == "supervised"].iloc[-1]
    print(
        f"{fraction:.0%} of the labels: best is {top['method']}, {top['protocol']}, {top['value']:.3f} "
        f"[{top['low']:.3f}, {top['high']:.3f}]; best from scratch {control['value']:.3f}"
    )

# %% [markdown]
# Notebook 14 draws these tables as curves and asks how many labels each method needs. Written:
# `tables/label_efficiency.csv`, `tables/label_efficiency_summary.csv`, `tables/label_efficiency_gains.csv`.
