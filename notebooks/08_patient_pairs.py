# %% [markdown]
# # 08 · Patient pairs: the same heart on another day
#
# **What you will learn.** How a network learns from ECGs without a single label when it must recognise the *patient*
# instead of a distorted copy. You write the loss in ten lines, count for how many patients it can do what it promises,
# test a second task, the order of segments, for shortcuts, and see whether a linear probe on the features beats one on
# a network that never learnt anything.
#
# **What it needs.** The records of notebook 00. Only the signals of folds 1–8 are learnt from.
#
# **How long.** The `laptop` profile takes about 2 minutes on two CPU cores, seconds to minutes on a GPU.

# %% tags=["parameters"]
results = "../results/laptop"  # where notebook 00 left the records, and where results go
fractions = [0.01, 0.1, 1.0]  # shares of the training labels, for the probes at the end
probe_seeds = 5  # label subsets of each probe
encoder = "xresnet1d_narrow"  # or xresnet1d50, the paper's
steps = 150  # the same for every objective
batch_size = 128  # pairs
crop_seconds = 2.5  # at most half a record: most pairs are two pieces of one
learning_rate = 0.003
weight_decay = 0.01
seed = 0
transforms = {  # the same views for every objective, see notebook 01
    "channel_resize": {"low": 0.5, "high": 2.0},
    "gaussian_noise": {"scale": 0.03},
    "baseline_wander": {"largest": 0.05},
    "time_out": {"low": 0.0, "high": 0.4},
}
options = {"temperature": 0.2, "order_weight": 0.1, "segments": 4}  # the method's own settings
probe_steps = 60  # of each network that looks for a shortcut

# %%

from ecgstudy.study import Study

study = Study.open(results)
records = study.records
note = study.name
print(f"{note}: {len(records):,} recordings")

# %% [markdown]
# ## Two recordings of one patient
#
# A patient's second ECG is a better second view than any distortion that we could think of: other electrodes, another
# day, the same heart. But it takes patients who came twice, and these are few: in the subset of PTB-XL on which this
# study is tried, 2 in 100. For all others the pair is two pieces of one recording that do not overlap: honest pairs
# too, but of one day. What this notebook measures is mostly *that*.

# %%

split = records.split
sizes = records.table.iloc[split["train"]]["patient_id"].value_counts()
print(
    f"{(sizes > 1).sum():,} of {len(sizes):,} training patients have several recordings: {(sizes > 1).mean():.1%}"
)
sizes.value_counts().sort_index().rename_axis("recordings").rename("patients").to_frame().T

# %% [markdown]
# From the first batch, a pair from two recordings, if it has one, and a pair from one:

# %%
import matplotlib.pyplot as plt

from ecglib.batches import PatientBatches

batch = PatientBatches(records, split["train"], batch_size, crop_seconds, seed)(step=0)
several = (batch.indices[:batch_size] != batch.indices[batch_size:]).int()
figure, panels = plt.subplots(
    2, 2, figsize=(11, 3.6), sharex=True, sharey="row", layout="constrained"
)
for row, pair in zip(panels, [several.argmax(), several.argmin()], strict=True):
    for axes, signals, name in zip(
        row, batch.signals.chunk(2), ["first crop", "second crop"], strict=True
    ):
        axes.plot(signals[pair, 1])
        axes.set_title(f"{'two recordings' if several[pair] else 'one recording'}, {name}, lead II")
    row[0].set_ylabel("mV")
plt.close(figure)
figure

# %% [markdown]
# ## The loss
#
# As in notebook 03, each of the $2N$ crops must find its partner. A patient comes once a pass, but can stand twice in a
# batch in which one pass ends and the next begins. The other crops of the same patient are no strangers: they are left
# out of the sum. With $p_i$ the patient of crop $i$, and $j$ its partner,
#
# $$L = -\frac1{2N}\sum_i \log \frac{\exp(s_{ij}/T)}{\exp(s_{ij}/T) + \sum_{k:\,p_k\ne p_i}\exp(s_{ik}/T)}.$$

# %%
import torch


def by_formula(
    z1: torch.Tensor, z2: torch.Tensor, patients: torch.Tensor, temperature: float
) -> torch.Tensor:
    """One crop after the other, as the formula says."""
    z, owner = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1), patients.repeat(2)
    losses = []
    for i in range(len(z)):
        similarity = z @ z[i] / temperature
        partner = (i + len(z1)) % len(z)
        candidates = owner != owner[i]
        candidates[partner] = True
        losses.append(torch.logsumexp(similarity[candidates], dim=0) - similarity[partner])
    return torch.stack(losses).mean()


# %% [markdown]
# The package computes the same with one matrix product. Take 16 patients with two pairs each. If all crops were alike,
# the partner would be one of $1 + 64 - 4$ equal candidates: the loss must be $\log 61$. With no patient twice, it is
# the loss of notebook 03.

# %%
import math

from ecglib.selfsup.patient_pairs import patient_nt_xent
from ecglib.selfsup.simclr import nt_xent

z1, z2 = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
patients = torch.arange(16).repeat(2)
by_hand, by_package = by_formula(z1, z2, patients, 0.1), patient_nt_xent(z1, z2, patients, 0.1)
assert torch.allclose(by_hand, by_package, atol=1e-5), (by_hand, by_package)
alike = patient_nt_xent(torch.ones(32, 16), torch.ones(32, 16), patients, 0.1)
assert math.isclose(alike.item(), math.log(61), rel_tol=1e-5)
assert torch.allclose(patient_nt_xent(z1, z2, torch.arange(32), 0.1), nt_xent(z1, z2, 0.1))
print(
    f"by hand {by_hand:.6f}, by the package {by_package:.6f}; all crops alike: log 61 = {math.log(61):.4f}"
)

# %% [markdown]
# A trap from published code: in EchoCLR, where the method comes from (its pairs are two ultrasound videos of one
# examination), the other crops of a patient stay in the sum. With a network that knows its patients fairly well:

# %%
who = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))[patients]
z = torch.nn.functional.normalize(torch.cat([who + 0.5 * z1, who + 0.5 * z2]), dim=1)
owner = patients.repeat(2)
no_rival = torch.eye(64, dtype=torch.bool) | torch.eye(64, dtype=torch.bool).roll(
    32, 0
)  # the crop, and its partner
push = (z @ z.T / 0.1).masked_fill(no_rival, -torch.inf).softmax(dim=1)
print(
    f"{push[owner[:, None] == owner].sum() / 64:.0%} of what pushes a crop away comes from the same patient"
)

# %% [markdown]
# ## A second task: in which order?
#
# A view is cut into segments, these are shuffled, and a linear layer on the features tells which of the $4! = 24$
# orders it sees. To know, a network must understand how a beat goes on, or it must find a shortcut: segments that touch
# fit together at their ends, and a slow drift of the baseline runs on from one to the next. Therefore random gaps lie
# between the segments, each loses its mean, and a taper brings its ends to zero.
#
# Where did the package cut? It tells through a thirteenth "lead": on a parabola, the slope is the place. Check: between
# their tapers, the segments are the signal of that place, minus the mean.

# %%
from ecglib.selfsup.segment_order import (
    all_orders,
    cut_segments,
    describe_segments,
    join_segments,
    segment_sizes,
)

window, segments = batch.signals.shape[2], options.get("segments", 4)
sizes, middle = segment_sizes(window, segments), segment_sizes(window, segments).segment // 2
parabola = torch.arange(window, dtype=torch.float64) ** 2
leads = torch.cat([batch.signals[0], parabola[None]])
pieces = cut_segments(leads[None], torch.Generator().manual_seed(seed), segments)[
    0
]  # (segments, 13, samples)
starts = [round(slope.item() - 1) // 2 - middle for slope in pieces[:, 12].diff()[:, middle]]
for start, piece in zip(starts, pieces, strict=True):
    cut = leads[:, start : start + sizes.segment]
    untouched = slice(sizes.taper, sizes.segment - sizes.taper)
    assert torch.allclose(
        (cut - cut.mean(dim=1, keepdim=True))[:12, untouched], piece[:12, untouched]
    )
assert pieces[..., [0, -1]].abs().max() == 0, "the ends are not at zero"
print(describe_segments(window, records.sampling_rate, segments))

# %%
order = all_orders(segments)[len(all_orders(segments)) * 2 // 3]
joined = join_segments(pieces[None], order[None])[0, 1].unflatten(0, (segments, -1))
figure, panels = plt.subplots(
    1, 3, figsize=(11, 2.6), sharex=True, sharey=True, layout="constrained"
)
panels[0].plot(leads[1], color="black", linewidth=1)
for number, start in enumerate(starts):
    place = order.tolist().index(number)
    panels[0].axvspan(start, start + sizes.segment, color=f"C{number}", alpha=0.3)
    panels[1].plot(start + torch.arange(sizes.segment), pieces[number, 1], color=f"C{number}")
    panels[2].plot(
        place * sizes.segment + torch.arange(sizes.segment), joined[place], color=f"C{number}"
    )
for axes, name in zip(
    panels, ["cut, with gaps", "mean off, ends tapered", "joined in another order"], strict=True
):
    axes.set(title=f"{name}, lead II", xlabel="sample")
panels[0].set_ylabel("mV")
plt.close(figure)
figure

# %% [markdown]
# Does a shortcut remain? Three networks learn the task: one sees the whole view, one only what lies around the joins,
# one only what is slower than 0.5 Hz. If joins or drift alone gave more than half of what the whole view gains above
# chance, the task would hardly be about the heart. No share is given where the whole view itself gains nothing sure.

# %%
import pandas as pd

from ecgstudy.arms.shortcuts import OrderShortcuts
from ecgstudy.results import save_table

probing = study.run(OrderShortcuts(encoder, probe_steps, crop_seconds, segments, seed))
shortcuts = pd.DataFrame(probing.about["notes"]["probes"]).set_index("input")
save_table(
    shortcuts.assign(data=records.name, steps=probe_steps),
    "segment_order_shortcuts",
    results,
    index=True,
)
share = shortcuts["share_of_gain"].drop("whole view")
answer = (
    "too early to tell"
    if share.isna().any()
    else ", ".join(share.index[share > 0.5]) or "none found"
)
print(f"Shortcuts after {probe_steps} steps: {answer}")
caption = f"Orders told rightly, fold 9, after {probe_steps} steps: {note}"
shortcuts.style.format("{:.1%}", na_rep="none").set_caption(caption)

# %% [markdown]
# If only the whole view tells the order, it is read from the waves: a segment shorter than a beat shows which part of
# the beat it holds. If the drift alone tells it too, what is learnt may be how baselines move, which a simulator makes
# smoother than a patient does. If nothing tells it, the steps were too few, or there is nothing to learn: segments
# longer than a beat look alike. A share is a ratio of two small gains, and the views of one record are alike: read it
# with the standard errors beside it.
#
# So the order is a side task, with the small weight `order_weight`; where a shortcut is certain, try 0. EchoCLR gives
# it the weight 1 and shows the shuffled views to the pairs too, which breaks the rhythm. Here pairs see crops in order.

# %% [markdown]
# ## Pretraining, watched
#
# No label is used. To see what happens, a few quantities are measured along the way on 250 training records and 250
# of fold 9: an *online probe* (a linear classifier on the features, scored on fold 9), *alignment* (how far two
# views of a record lie apart), *uniformity* (how evenly records spread over the sphere) and the *effective rank* (in
# how many directions features vary). Alignment is that of two views of one crop, as for all methods, not that of the
# pairs. If all records moved to one point, alignment would be perfect and the rank 1: collapse.

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
pretrained = study.run(pretraining("patient_pairs", settings, seed))
keep_pretrained(pretrained, results)

# %%
from ecgstudy.analysis.training_curves import plot_pretraining
from ecgstudy.results import save_figure

history = pd.DataFrame(pretrained.about["notes"]["history"])
figure = plot_pretraining(history, f"Patient pairs: {note}")
save_figure(figure, "patient_pairs_pretraining", results)
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
    "patient pairs": pretrained.predictions()["features"],
    "random": control.predictions()["features"],
}
probed = frozen_validation(records, features, fractions, probe_seeds)
probed.rename(columns="{:.0%}".format).style.format(precision=3).set_caption(
    f"Macro AUROC, fold 9: {note}"
)

# %% [markdown]
# ## Exercise
#
# Why the gaps and the taper? `touching` are the crops cut into segments that touch, with their ends as they are. For
# each segment, guess as its successor the one that begins closest to where it ends: the mean distance over leads. Write
# `guess_successors`, and put how often the guess is right into `found`; the last segment has no successor.

# %% tags=["given"]
from pathlib import Path

import torch

from ecglib.batches import PatientBatches
from ecglib.records import Records

records = Records.load(Path(results) / "records").labelled
batch = PatientBatches(records, records.split["train"], batch_size, crop_seconds, seed)(step=0)
window, segments = batch.signals.shape[2], options.get("segments", 4)
touching = (
    batch.signals[..., : window // segments * segments].unflatten(2, (segments, -1)).transpose(1, 2)
)


# %% tags=["solution"]
def guess_successors(pieces: torch.Tensor) -> torch.Tensor:
    """For each of the segments `(crops, segments, leads, samples)` the position of another one, `(crops, segments)`."""
    jumps = (
        (pieces[:, None, ..., 0] - pieces[:, :, None, ..., -1]).abs().mean(dim=3)
    )  # (crop, end of, beginning of)
    return jumps.masked_fill(torch.eye(pieces.shape[1], dtype=torch.bool), torch.inf).argmin(dim=2)


found = (guess_successors(touching)[:, :-1] == torch.arange(1, segments)).float().mean()
print(
    f"{found:.0%} of the successors found by the smallest jump; chance is {1 / (segments - 1):.0%}"
)

# %% tags=["check"]
from ecgtools.answers import number, numbers

ramp = torch.arange(40.0).reshape(4, 1, 10).expand(2, 4, 12, 10)  # a line that rises, cut into four
told = numbers(
    guess_successors(ramp[:, [2, 0, 3, 1]]), (2, 4)
)  # in another order: the third begins, the fourth ends
assert (told[:, [0, 1, 3]] == [2, 3, 0]).all(), (
    "on a straight line each successor must be found, in any order"
)
level = torch.tensor([0.0, 1.0, 3.0, 6.0]).reshape(1, 4, 1, 1).expand(2, 4, 12, 10)
assert (numbers(guess_successors(level), (2, 4))[0] == [1, 0, 1, 2]).all(), (
    "a segment cannot be its own successor"
)
hits = sum(
    int(row[place] == place + 1)
    for row in guess_successors(touching)
    for place in range(segments - 1)
)
share_found = hits / (len(touching) * (segments - 1))
assert abs(number(found) - share_found) < 1e-6, (
    "`found` is not that share of all segments but the last ones"
)
print("right")

# %% [markdown]
# ## What was seen

# %%
for fraction in fractions:
    score = probed.loc["patient pairs", fraction]
    gain = score - probed.loc["random", fraction]
    print(f"{fraction:.0%} of the labels, fold 9: {score:.3f}, {gain:+.3f} over random filters")

# %% [markdown]
# Notebook 09 fits and fine-tunes this encoder for every label subset and scores it on fold 10. Written:
# `run_lists/pretrained_encoders/patient_pairs.json`, which names the run below `runs/`, `figures/patient_pairs_pretraining.svg` and
# `tables/segment_order_shortcuts.csv`.
