# %% [markdown]
# # 06 · CPC: what will this heart do next?
#
# **What you will learn.** How a network learns from ECGs without a single label, by predicting: from what came so far
# it must pick the piece that follows a moment later out of other pieces of the same record. You write the loss in ten
# lines, see why its published form fills a computer's memory, watch the network learn, and see whether a
# linear probe on its features beats one on a network that never learnt anything.
#
# **What it needs.** The records of notebook 00. Only the signals of folds 1–8 are learnt from.
#
# **How long.** The `laptop` profile takes about 2 minutes on two CPU cores, seconds to minutes on a GPU.

# %% tags=["parameters"]
results = "../results/laptop"  # where notebook 00 left the records, and where results go
fractions = [0.01, 0.1, 1.0]  # shares of the training labels, for the probes at the end
probe_seeds = 5  # label subsets of each probe
encoder = "cpc_lstm_small"  # or s4_small, or cpc_lstm, the paper's
steps = 50  # a third of the others': the online probe falls afterwards, see the figure
batch_size = 128
crop_seconds = 2.5
learning_rate = 0.002  # chosen, like `steps` ahead, on folds 8 and 9
weight_decay = 0.01
seed = 0
transforms = {  # the same views for every objective, see notebook 01; the paper uses none here
    "channel_resize": {"low": 0.5, "high": 2.0},
    "gaussian_noise": {"scale": 0.03},
    "baseline_wander": {"largest": 0.05},
    "time_out": {"low": 0.0, "high": 0.4},
}
options = {
    "steps": 25,
    "negatives": 128,
    "all_horizons": False,
    "reduction": "mean",
}  # CPC's own settings

# %%

from ecgstudy.study import Study

study = Study.open(results)
records = study.records
note = study.name
print(f"{note}: {len(records):,} recordings")

# %% [markdown]
# ## One prediction
#
# The network has two parts. Fully connected layers turn each short piece of the twelve leads into a *latent* $z_t$. A
# recurrent network reads the latents in the order of time and sums up what it has seen as a *context* $c_t$. From
# $c_t$, a linear layer $W$ predicts the latent $k$ pieces later.
#
# Where there are two views, the transforms *say* what does not matter; CPC finds out by itself what lasts long enough
# to be of use later, and the paper distorts nothing. Here each crop is distorted once, like a view of the other
# objectives, so that these differ from CPC in the objective; in the encoder, because a network that predicts must not
# see the future; and in steps and learning rate, chosen on fold 9. `transforms = {}` is the paper's form.

# %%
import torch

from ecglib.batches import CropBatches, step_generator
from ecglib.encoders import make_encoder
from ecglib.selfsup.cpc import CPC, draw_negatives, info_nce

split = records.split
batch = CropBatches(records, split["train"], batch_size, crop_seconds, seed)(step=0)
torch.manual_seed(0)
network = CPC(make_encoder(encoder), **options)
with torch.no_grad():
    latents = network.encoder.latents(batch.signals)  # (batch, time, width)
    context = network.eval().encoder.context(latents)
    predictions = network.predictors[-1](context)
ahead, negatives, piece = options["steps"], options["negatives"], crop_seconds / latents.shape[1]
print(
    f"{latents.shape[1]} latents of {1000 * piece:.0f} ms; {ahead} ahead are {1000 * ahead * piece:.0f} ms"
)

# %% [markdown]
# The wrong answers come from the *same record*. Among pieces of other records it would be enough to recognise the
# patient's amplitudes or the noise of the device; among pieces of its own, only *when* they come tells them apart.

# %%
import matplotlib.pyplot as plt

chosen = draw_negatives(batch_size, latents.shape[1], ahead, negatives, step_generator(seed, 0))
now, trace = latents.shape[1] // 2, batch.signals[0, 1]
figure, axes = plt.subplots(figsize=(11, 2.6), layout="constrained")
axes.plot(torch.arange(len(trace)) / records.sampling_rate, trace, color="black", linewidth=1)
axes.axvspan(0, (now + 1) * piece, color="tab:blue", alpha=0.15, label="seen so far")
axes.axvspan(
    (now + ahead) * piece,
    (now + ahead + 1) * piece,
    color="tab:green",
    alpha=0.7,
    label="to be picked",
)
for number, time in enumerate(chosen[0, now, :10] * piece):
    axes.axvspan(
        time,
        time + piece,
        color="tab:red",
        alpha=0.3,
        label=None if number else "some wrong answers",
    )
axes.set(xlabel="s", ylabel="mV", title=f"One prediction, lead II: {note}")
figure.legend(loc="outside lower center", ncols=3, frameon=False)
plt.close(figure)
figure

# %% [markdown]
# Check: later latents must not reach the context of now, or the task could be solved by looking. (All times share one
# thing: the small encoders first take off each lead's mean over the crop.)

# %%
changed = latents.clone()
changed[:, now + 1 :] = 0.0
with torch.no_grad():
    difference = (network.encoder.context(changed) - context).abs().amax(dim=(0, 2))
assert difference[: now + 1].max() < 1e-4, "the context sees the future"
assert difference[now + 1 :].min() > 1e-4, "the context sees nothing"

# %% [markdown]
# ## The loss
#
# A candidate's score is its dot product with the prediction, and the right one must win against $N$ wrong ones
# $j_1 \dots j_N$ (*InfoNCE*):
#
# $$L_t = -\log\frac{\exp(W c_t\cdot z_{t+k})}{\exp(W c_t\cdot z_{t+k}) + \sum_{n=1}^{N}\exp(W c_t\cdot z_{j_n})}.$$
#
# The paper takes the mean over records and the *sum* over times. The mean over both keeps the learning rate from
# depending on the length of a crop.


# %%
def info_nce_by_hand(
    predictions: torch.Tensor, latents: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """One time after the other, as published; `chosen` `(batch, times, negatives)` says where the wrong ones are."""
    records, losses = torch.arange(len(latents))[:, None], []
    for time in range(latents.shape[1] - ahead):
        places = torch.nn.functional.pad(
            chosen[:, time], (1, 0), value=time + ahead
        )  # the right one first
        candidates = latents[records, places]  # (batch, 1 + negatives, width)
        scores = (candidates * predictions[:, time, None]).sum(dim=2)
        losses.append(torch.logsumexp(scores, dim=1) - scores[:, 0])
    return torch.stack(losses).mean()


# %% [markdown]
# The package computes the same without a loop. If all latents were alike, the right one would be one of $1+N$ equal
# candidates: the loss must be $\log(1+N)$.

# %%
import math

by_hand = info_nce_by_hand(predictions, latents, chosen)
by_package = info_nce(
    predictions, latents, ahead, negatives, step_generator(seed, 0), reduction="mean"
)
alike = info_nce(
    predictions,
    torch.ones_like(latents),
    ahead,
    negatives,
    step_generator(seed, 0),
    reduction="mean",
)
chance = math.log(1 + negatives)
assert torch.allclose(by_hand, by_package, rtol=1e-5), (by_hand, by_package)
assert math.isclose(alike.item(), chance, rel_tol=1e-5)
print(
    f"by hand {by_hand:.6f}, by the package {by_package:.6f}; all latents alike: log {1 + negatives} = {chance:.4f}"
)

# %% [markdown]
# A trap from published code: the loop above. It copies $1+N$ candidates for each time, and training has to keep the
# copies until the gradient is known. But all candidates of a record are among its few latents: the package computes
# *every* score of the record in one matrix product, and then picks out the wanted ones.

# %%
gigabytes = 4e-9  # of a float32
sizes = {"here": (*latents.shape, ahead, negatives), "in the paper": (32, 1000, 512, 12, 128)}
for name, (crops, time, width, k, n) in sizes.items():
    copies = crops * (time - k) * (1 + n) * width * gigabytes
    scores = crops * (time - k) * (time + 1 + n) * gigabytes
    print(
        f"{name}, {crops} crops of {time} latents: {copies:.2f} GB of candidates, or {scores:.3f} GB of scores"
    )

# %% [markdown]
# ## The encoder
#
# The paper's network has four fully connected layers and a two-layer LSTM of 512. Counting its parameters is a cheap
# check that it is the published one. The small one has a latent for every two samples.

# %%
from ecglib.encoders.cpc_lstm import CPCEncoder

published, own = (
    sum(p.numel() for p in model.parameters()) for model in (CPC(CPCEncoder()), network)
)
assert published == 5_261_312
print(f"the paper's: {published:,} parameters; {encoder}: {own:,}")

# %% [markdown]
# An LSTM must take one time after the other. A *state-space* layer, which later work puts in its place, keeps for each
# channel a few numbers $x$ that decay and oscillate, each at its own rate $\lambda$:
# $x_t = e^{\lambda\Delta}x_{t-1} + u_t$. All of it is linear, so the output is also a convolution of the input with
# one fixed response, and an FFT computes that for all times at once. Check: both ways give the same.

# %%
from ecglib.encoders.s4 import StateSpace

layer, signal = StateSpace(width=8, state=8), torch.randn(2, 400, 8)
with torch.no_grad():
    at_once, one_by_one = layer(signal), layer.recurrent(signal)
assert torch.allclose(at_once, one_by_one, atol=1e-3)
print(
    f"largest difference {(at_once - one_by_one).abs().max():.0e} of values up to {at_once.abs().max():.0f}"
)

# %% [markdown]
# ## Pretraining, watched
#
# No label is used. To see what happens, a few quantities are measured along the way on 250 training records and 250
# of fold 9: an *online probe* (a linear classifier on the features, scored on fold 9), *alignment* (how far two
# views of a record lie apart), *uniformity* (how evenly records spread over the sphere) and the *effective rank* (in
# how many directions features vary). If all records moved to one point, alignment would be perfect and the rank 1:
# collapse. CPC never sees two views of one crop, so nothing but its own task brings them together.

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
pretrained = study.run(pretraining("cpc", settings, seed))
keep_pretrained(pretrained, results)

# %%
import pandas as pd

from ecgstudy.analysis.training_curves import plot_pretraining
from ecgstudy.results import save_figure

history = pd.DataFrame(pretrained.about["notes"]["history"])
figure = plot_pretraining(history, f"CPC: {note}")
save_figure(figure, "cpc_pretraining", results)
figure

# %% [markdown]
# The dotted lines are the values at the start, of the network as it was drawn at random. Look at the online probe when
# you raise `steps` to the 600 of the other objectives: with so few recordings CPC goes on getting better at its own
# task while its features get worse for everybody else's. A falling loss is no proof of useful features.

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
    "CPC": pretrained.predictions()["features"],
    "random": control.predictions()["features"],
}
probed = frozen_validation(records, features, fractions, probe_seeds)
probed.rename(columns="{:.0%}".format).style.format(precision=3).set_caption(
    f"Macro AUROC, fold 9: {note}"
)

# %% [markdown]
# A trap from published tables: there, CPC differs from SimCLR and BYOL also by six times as many parameters, crops four
# times as long, and signals divided by each lead's deviation, so nobody can tell which of these won. In the `laptop`
# profile crops, records and transforms are the same for both; the encoder is not. In notebook 09 each method
# therefore stands beside the same encoder trained from scratch. To see what the encoder does, set `encoder` to
# `s4_small` and run again: nothing else changes.

# %% [markdown]
# ## Exercise
#
# Why not predict the very next piece? Let the prediction be "nothing changes": a piece of the raw signal is scored by
# its likeness to the present one. Write `wins_ahead`: how often does the right piece beat another one of its record?
# Others are all its pieces but the present and the right one. Compare 1, 2, 4, 8, 16 and 32 pieces ahead; half of the
# time is chance.

# %% tags=["given"]
from pathlib import Path

import torch

from ecglib.batches import CropBatches
from ecglib.encoders import make_encoder
from ecglib.records import Records

records = Records.load(Path(results) / "records").labelled
batch = CropBatches(records, records.split["train"], batch_size, crop_seconds, seed)(step=0)
with torch.no_grad():
    count = make_encoder(encoder).latents(batch.signals).shape[1]  # latents of a crop
samples = batch.signals.shape[2] // count
piece = crop_seconds / count  # seconds
pieces = (
    batch.signals.unfold(2, samples, samples).transpose(1, 2).flatten(2)
)  # (batch, time, leads x samples)
pieces = torch.nn.functional.normalize(pieces, dim=2)


# %% tags=["solution"]
def wins_ahead(pieces: torch.Tensor, distance: int) -> torch.Tensor:
    """Share of others, over all times, less like the present piece than the one `distance` later; a tie is no win.

    `pieces` `(batch, time, size)` are unit vectors.
    """
    likeness = pieces @ pieces.transpose(1, 2)
    right = likeness.diagonal(distance, dim1=1, dim2=2)[..., None]
    won = right > likeness[:, :-distance]  # never over itself, nor over the present piece
    return won.sum() / (won.numel() - 2 * right.numel())


for distance in (1, 2, 4, 8, 16, 32):
    print(
        f"{distance:2d} ahead, {1000 * distance * piece:3.0f} ms: {wins_ahead(pieces, distance):.0%}"
    )

# %% tags=["check"]
from ecgtools.answers import number

rhythm = torch.eye(4).repeat(3, 1).repeat(2, 1, 1)  # 12 pieces that come again after 4
assert abs(number(wins_ahead(rhythm, 4)) - 0.9) < 1e-5, (
    "4 ahead all is the same: 9 wins and a tie among 10 others"
)
assert abs(number(wins_ahead(rhythm, 2))) < 1e-5, "2 ahead nothing is the same: no win"
onwards = torch.nn.functional.normalize(torch.tril(torch.ones(6, 6)), dim=1)[
    None
]  # each piece a little further
assert abs(number(wins_ahead(onwards, 1)) - 1) < 1e-5, (
    "nothing is more like a piece than the next one here"
)
near, far = number(wins_ahead(pieces, 1)), number(wins_ahead(pieces, 32))
assert 1 >= near > far > 0, "the next piece must be easier to find than one 32 ahead"
print("right")

# %% [markdown]
# ## What was seen

# %%
for fraction in fractions:
    gain = probed.loc["CPC", fraction] - probed.loc["random", fraction]
    print(
        f"{fraction:.0%} of the labels, fold 9: {probed.loc['CPC', fraction]:.3f}, {gain:+.3f} over random filters"
    )

# %% [markdown]
# Notebook 09 fits and fine-tunes this encoder for every label subset and scores it on fold 10. Written:
# `run_lists/pretrained_encoders/cpc.json`, which names the run below `runs/`, and `figures/cpc_pretraining.svg`.
