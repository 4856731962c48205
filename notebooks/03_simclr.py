# %% [markdown]
# # 03 · SimCLR: two views of one heart
#
# **What you will learn.** How a network learns from ECGs without a single label: it must recognise that two distorted
# copies come from the same crop. You write the loss in ten lines, watch the network learn, and see whether a linear
# probe on its features beats one on a network that never learnt anything.
#
# **What it needs.** The records of notebook 00. Only the signals of folds 1–8 are learnt from.
#
# **How long.** About a minute on two CPU cores, seconds on a GPU; longer for real ECGs and larger profiles.

# %% tags=["parameters"]
results = "../results/laptop"  # where notebook 00 left the records, and where results go
fractions = [0.01, 0.1, 1.0]  # shares of the training labels, for the probes at the end
probe_seeds = 5  # label subsets of each probe
encoder = "xresnet1d_narrow"  # or xresnet1d50, the paper's
steps = 150  # the same for every objective
batch_size = 128
crop_seconds = 2.5
learning_rate = 0.003
weight_decay = 0.01
seed = 0
transforms = {  # the same views for every objective, see notebook 01; chosen on folds 8 and 9
    "channel_resize": {"low": 0.5, "high": 2.0},
    "gaussian_noise": {"scale": 0.03},
    "baseline_wander": {"largest": 0.05},
    "time_out": {"low": 0.0, "high": 0.4},
}
options = {"temperature": 0.5, "hidden": 512, "outputs": 64}  # SimCLR's own settings

# %%

from ecgstudy.study import Study

study = Study.open(results)
records = study.records
note = study.name
print(f"{note}: {len(records):,} recordings")

# %% [markdown]
# ## Two views
#
# A crop of a few seconds is distorted twice, independently: each lead made larger or smaller, noise added, the baseline
# bent, a piece blanked out. A cardiologist would give both the same diagnosis. *Which* distortions are allowed is what
# the method knows about ECGs: whatever they change, the network learns to ignore.

# %%
import matplotlib.pyplot as plt

from ecglib.augment import apply, named_transforms
from ecglib.batches import CropBatches

split = records.split
batch = CropBatches(records, split["train"], batch_size, crop_seconds, seed)(step=0)
views = [apply(named_transforms(transforms), batch.signals, batch.generator) for _ in range(2)]
figure, panels = plt.subplots(1, 3, figsize=(11, 2.2), sharey=True, layout="constrained")
for axes, signals, name in zip(panels, [batch.signals, *views], ["crop", "view 1", "view 2"]):
    axes.plot(signals[0, 1])
    axes.set(title=f"{name}, lead II", xlabel="sample")
panels[0].set_ylabel("mV")
plt.close(figure)
figure

# %% [markdown]
# ## The loss
#
# An encoder $f$ and a small projector $g$ turn each view into a vector; only its direction counts. With $N$ records
# there are $2N$ views. For view $i$, its partner $j$ must be more similar than the $2N-2$ others (*NT-Xent*, the
# normalised temperature-scaled cross-entropy):
#
# $$L = -\frac1{2N}\sum_i \log \frac{\exp(s_{ij}/T)}{\sum_{k\ne i}\exp(s_{ik}/T)},\qquad
# s_{ik} = \frac{z_i\cdot z_k}{|z_i||z_k|}.$$

# %%
import torch


def nt_xent_by_hand(z1: torch.Tensor, z2: torch.Tensor, temperature: float) -> torch.Tensor:
    """One view after the other, as the formula says."""
    z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    losses = []
    for i in range(len(z)):
        similarity = z @ z[i] / temperature
        others = torch.arange(len(z)) != i
        partner = (i + len(z1)) % len(z)
        losses.append(torch.logsumexp(similarity[others], dim=0) - similarity[partner])
    return torch.stack(losses).mean()


# %% [markdown]
# The package computes the same with one matrix product. If all views were alike, the partner would be one of $2N-1$
# equal candidates: the loss must be $\log(2N-1)$.

# %%
import math

from ecglib.selfsup.simclr import nt_xent

z1, z2 = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
by_hand, by_package = nt_xent_by_hand(z1, z2, 0.5), nt_xent(z1, z2, 0.5)
assert torch.allclose(by_hand, by_package, atol=1e-5), (by_hand, by_package)
assert math.isclose(
    nt_xent(torch.ones(32, 16), torch.ones(32, 16), 0.5).item(), math.log(63), rel_tol=1e-5
)
print(
    f"by hand {by_hand:.6f}, by the package {by_package:.6f}; all views alike: log 63 = {math.log(63):.4f}"
)

# %% [markdown]
# A trap from published code: instead of leaving the view itself out of the sum, the number $e$ is subtracted. A view's
# similarity to itself is 1, so its term is $e^{1/T}$, which is $e$ only at $T = 1$.

# %%
z = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
wrong = (
    torch.log((z @ z.T / 0.5).exp().sum(dim=1) - math.e) - (z * z.roll(32, 0)).sum(dim=1) / 0.5
).mean()
print(f"with e subtracted at T = 0.5: {wrong:.4f} instead of {by_package:.4f}")

# %% [markdown]
# ## Pretraining, watched
#
# No label is used. To see what happens, a few quantities are measured along the way on 250 training records and 250
# of fold 9: an *online probe* (a linear classifier on the features, scored on fold 9), *alignment* (how far two
# views of a record lie apart), *uniformity* (how evenly records spread over the sphere) and the *effective rank* (in
# how many directions features vary). If all records moved to one point, alignment would be perfect and the rank 1:
# collapse.

# %%
from ecglib.selfsup import Pretraining
from ecgstudy.arms.pretrain import keep_pretrained
from ecgstudy.methods import pretraining

settings = Pretraining(
    encoder=encoder,
    steps=steps,
    batch_size=batch_size,
    crop_seconds=crop_seconds,
    learning_rate=learning_rate,
    weight_decay=weight_decay,
    transforms=transforms,
    options=options,
)
pretrained = study.run(pretraining("simclr", settings, seed))
keep_pretrained(pretrained, results)

# %%
import pandas as pd

from ecgstudy.analysis.training_curves import plot_pretraining
from ecgstudy.results import save_figure

history = pd.DataFrame(pretrained.about["notes"]["history"])
figure = plot_pretraining(history, f"SimCLR: {note}")
save_figure(figure, "simclr_pretraining", results)
figure

# %% [markdown]
# The dotted lines are the values at the start, of the network as it was drawn at random.

# %%
last = history.iloc[-1]
assert last["loss"] < history["loss"].iloc[1], "the loss did not fall"
assert last["effective_rank"] > 2, "the features have collapsed"
print(
    f"loss {history['loss'].iloc[1]:.3f} to {last['loss']:.3f} in {last['seconds']:.0f} s on {study.device}; "
    f"effective rank {last['effective_rank']:.0f} of {pretrained.predictions()['features'].shape[1]}"
)

# %% [markdown]
# ## Did it learn anything that labels need?
#
# The encoder is now frozen. Its features are computed once for each record, and a logistic regression, a *linear
# probe*, is fitted on a share of the labels. The control is the same network before training: random filters are a
# surprisingly strong start, and a method that does not beat them has learnt nothing of use.

# %%
from ecgstudy.analysis.label_curve import frozen_validation
from ecgstudy.arms.pretrain import untrained

control = study.run(untrained(pretrained))
features = {
    "SimCLR": pretrained.predictions()["features"],
    "random": control.predictions()["features"],
}
probed = frozen_validation(records, features, fractions, probe_seeds)
probed.rename(columns="{:.0%}".format).style.format(precision=3).set_caption(
    f"Macro AUROC, fold 9: {note}"
)

# %% [markdown]
# ## Exercise
#
# The temperature decides how much the loss cares for the hardest negatives: each pushes its view away in proportion to
# $\exp(s_{ik}/T)$. Write `hardest_share`: of what all negatives of view 0 push, the share of the few most similar ones.
# Compare $T = 0.5$ with $T = 0.05$ for these `z`.

# %% tags=["given"]
import math

import torch

z = torch.nn.functional.normalize(
    torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=1
)


# %% tags=["solution"]
def hardest_share(z: torch.Tensor, temperature: float, hardest: int = 10) -> torch.Tensor:
    """Share of the `hardest` negatives of view 0; `z` `(2N, size)` holds unit vectors, partners lie N rows apart."""
    similarity = (z @ z[0])[torch.arange(len(z)) % (len(z) // 2) != 0]
    return torch.softmax(similarity / temperature, dim=0).topk(hardest).values.sum()


for temperature in (0.5, 0.05):
    share = hardest_share(z, temperature)
    print(f"T = {temperature}: {share:.0%} of the push comes from 10 of {len(z) - 2} negatives")

# %% tags=["check"]
from ecgtools.answers import number

apart = torch.eye(32).repeat(2, 1)  # partners are equal, all others at right angles
twin = apart.clone()
twin[40] = twin[0]  # one negative of view 0 is equal to it
for tried in (0.5, 0.05):
    even, one = number(hardest_share(apart, tried)), number(hardest_share(twin, tried, 1))
    assert abs(even - 10 / 62) < 1e-5, (
        "64 views, all negatives equally far: 10 of 62, without the view and its partner"
    )
    assert abs(one - 1 / (1 + 61 * math.exp(-1 / tried))) < 1e-5, (
        f"one equal negative among 62 at T = {tried}"
    )
print("right")

# %% [markdown]
# ## What was seen

# %%
for fraction in fractions:
    gain = probed.loc["SimCLR", fraction] - probed.loc["random", fraction]
    reached = probed.loc["SimCLR", fraction]
    print(f"{fraction:.0%} of the labels, fold 9: {reached:.3f}, {gain:+.3f} over random filters")

# %% [markdown]
# Notebook 09 fits and fine-tunes this encoder for every label subset and scores it on fold 10. Written:
# `run_lists/pretrained_encoders/simclr.json`, which names the run below `runs/`, and `figures/simclr_pretraining.svg`.
