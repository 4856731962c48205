# %% [markdown]
# # 05 · SwAV: the same place among prototypes
#
# **What you will learn.** How a network learns from ECGs without a single label by sorting them into groups that nobody
# named: from one view it must say to which groups the other belongs. You write the balancing that keeps the groups
# equally full, and the loss; you watch the network learn, and see what a linear probe makes of it.
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
transforms = {  # the same views for every objective, see notebook 01
    "channel_resize": {"low": 0.5, "high": 2.0},
    "gaussian_noise": {"scale": 0.03},
    "baseline_wander": {"largest": 0.05},
    "time_out": {"low": 0.0, "high": 0.4},
}
options = {
    "prototypes": 100,
    "hidden": 512,
    "outputs": 64,
    "queue": 4,
    "views": 2,
}  # SwAV's own settings

# %%

from ecgstudy.study import Study

study = Study.open(results)
records = study.records
note = study.name
print(f"{note}: {len(records):,} recordings")

# %% [markdown]
# ## Prototypes
#
# The projector turns each view into a direction $z$, as in notebook 03. Now there are $K$ more directions to be learnt,
# the *prototypes* $c_k$. A view's scores are its cosines with them, $s_k = z \cdot c_k$: its place among the
# prototypes. Records are compared with these and not with each other, so no pair has to be called different.

# %%
import math

import torch

from ecglib.batches import CropBatches
from ecglib.encoders import make_encoder
from ecglib.selfsup.swav import SwAV, sinkhorn, swav_loss

split = records.split
batch = CropBatches(records, split["train"], batch_size, crop_seconds, seed)(step=0)
torch.manual_seed(seed)
model = SwAV(make_encoder(encoder), batch_size=batch_size, **options)
with torch.no_grad():
    embeddings = model.projector(model.encoder(batch.signals))
    scores = model.prototypes(embeddings)
print(
    f"{scores.shape[0]} records, {scores.shape[1]} prototypes; cosines from {scores.min():.2f} to {scores.max():.2f}"
)

# %% [markdown]
# ## Balanced codes
#
# The *code* $q$ of a view says which share of it belongs to which prototype. With $q = \mathrm{softmax}(s/\epsilon)$
# all records could belong to one prototype, which is easy to predict: collapse. So each prototype must get an equal
# share of the $N$ records. Of all such tables $Q$ ($N$ rows that sum to 1, $K$ columns that sum to $N/K$), the one that
# fits the scores best, while it stays as even as $\epsilon$ asks, has the form
#
# $$Q = \mathrm{diag}(u)\, e^{S/\epsilon}\, \mathrm{diag}(v),$$
#
# and Sinkhorn and Knopp found $u$ and $v$ by scaling columns and rows in turn. Three rounds are enough here.

# %%
import matplotlib.pyplot as plt


def sinkhorn_by_hand(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    """Columns to N / K, then rows to 1, again and again."""
    codes = (scores / epsilon).exp()
    for _ in range(iterations):
        codes = codes / codes.sum(dim=0, keepdim=True) * len(codes) / codes.shape[1]
        codes = codes / codes.sum(dim=1, keepdim=True)
    return codes


codes = sinkhorn(scores, epsilon=0.05, iterations=3)
assert torch.allclose(sinkhorn_by_hand(scores, 0.05, 3), codes, atol=1e-5)
assert torch.allclose(codes.sum(dim=1), torch.ones(len(codes)), atol=1e-5), (
    "each record is given away once"
)
assert torch.allclose(sinkhorn(torch.zeros(6, 4)), torch.tensor(0.25)), (
    "equal scores: everything to everyone"
)

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True, layout="constrained")
for axes, shares, name in zip(
    panels, [torch.softmax(scores / 0.05, dim=1), codes], ["softmax", "balanced"]
):
    usage = shares.sum(dim=0).sort(descending=True).values
    axes.bar(range(len(usage)), usage, width=1)
    axes.axhline(len(scores) / len(usage), color="0.3", linestyle=":")
    axes.set(title=f"{name}, before any training", xlabel="prototype, fullest first")
    print(
        f"{name}: the fullest prototype holds {usage[0]:.2f} of {len(scores)} records, the emptiest {usage[-1]:.2f}"
    )
panels[0].set_ylabel("records in it")
plt.close(figure)
figure

# %% [markdown]
# The dotted line is the equal share. Before training, the directions of all records have much in common, and the
# softmax fills those prototypes that happen to lie there. Balanced codes go by what sets a record apart.
#
# ## The loss
#
# Each view $w$ must predict the code of another view $v$ of the same crop. Codes get no gradient:
#
# $$L = -\frac1{N}\sum_i \sum_k q^v_{ik} \log p^w_{ik}, \qquad p^w = \mathrm{softmax}(s^w/T),$$
#
# averaged over the pairs $v \ne w$, where $v$ is one of the first two views. A view without an opinion pays $\log K$;
# if all records had the same place, balancing would make their codes even, and no answer could pay less.


# %%
def swav_by_hand(scores: torch.Tensor, codes: torch.Tensor, temperature: float) -> torch.Tensor:
    """One pair of views after the other, as the formula says."""
    told = [torch.log_softmax(score / temperature, dim=1) for score in scores]
    pairs = [(code, told[w]) for v, code in enumerate(codes) for w in range(len(scores)) if w != v]
    return torch.stack([-(code * answer).sum(dim=1).mean() for code, answer in pairs]).mean()


views = torch.stack([scores, scores.flip(0), scores.roll(1, dims=0)])
both = torch.stack([sinkhorn(view) for view in views[:2]])
by_hand, by_package = swav_by_hand(views, both, 0.1), swav_loss(views, both, 0.1)
assert torch.allclose(by_hand, by_package, atol=1e-4), (by_hand, by_package)
no_opinion, collapsed = (
    swav_loss(torch.zeros_like(views), both),
    scores[:1].expand(2, *scores.shape),
)
assert math.isclose(no_opinion, math.log(scores.shape[1]), abs_tol=1e-4), no_opinion
assert (
    swav_loss(collapsed, torch.stack([sinkhorn(view) for view in collapsed])) >= no_opinion - 1e-4
)
print(
    f"by hand {by_hand:.6f}, by the package {by_package:.6f}; without an opinion {no_opinion:.4f}"
)

# %% [markdown]
# ## Published size, laptop size
#
# The paper's runs balance 3,000 prototypes over batches of 4,096 records. A code can give no prototype more than its
# equal share $N/K$: in a small batch, 3,000 prototypes would blur every code. Hence few prototypes here, and a *queue*
# of the last batches, which joins the balancing after the first 15 % of the steps.
#
# A trap in names: SwAV is known for *multi-crop*, many short views beside two long ones. The published ECG code makes
# seven full-length views and drops one; a step costs six passes through the encoder. Here there are two views, as many
# as the other objectives have. No checkpoint of the published run was released, so there is nothing to compare with.

# %%
for prototypes in (options["prototypes"], 3000):
    directions = torch.randn(
        prototypes, embeddings.shape[1], generator=torch.Generator().manual_seed(0)
    )
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    full = sinkhorn(unit @ torch.nn.functional.normalize(directions, dim=1).T, iterations=100)
    assert full.max() <= len(full) / prototypes + 1e-3, full.max()
    print(
        f"{prototypes} prototypes, {len(full)} records: the largest share in a code is {full.max():.3f}"
    )

# %% [markdown]
# ## Pretraining, watched
#
# No label is used. The quantities measured along the way are those of notebook 03.

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
    options={"batch_size": batch_size, **options},  # the queue must know the size of a batch
)
pretrained = study.run(pretraining("swav", settings, seed))
keep_pretrained(pretrained, results)

# %%
import pandas as pd

from ecgstudy.analysis.training_curves import plot_pretraining
from ecgstudy.results import save_figure

history = pd.DataFrame(pretrained.about["notes"]["history"])
figure = plot_pretraining(history, f"SwAV: {note}")
save_figure(figure, "swav_pretraining", results)
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
    "SwAV": pretrained.predictions()["features"],
    "random": control.predictions()["features"],
}
probed = frozen_validation(records, features, fractions, probe_seeds)
probed.rename(columns="{:.0%}".format).style.format(precision=3).set_caption(
    f"Macro AUROC, fold 9: {note}"
)

# %% [markdown]
# ## Exercise
#
# The $\epsilon$ decides how sharp codes are. Write two measures of codes: `spread_of`, over how many prototypes a code
# spreads (the exponential of its entropy, as a mean over records), and `fullest_of`, how much the fullest prototype
# holds, in equal shares. Compare $\epsilon$ of 0.5, 0.05 and 0.01 after three rounds.

# %% tags=["given"]
from pathlib import Path

import torch

from ecglib.batches import CropBatches
from ecglib.encoders import make_encoder
from ecglib.records import Records
from ecglib.selfsup.swav import SwAV, sinkhorn

records = Records.load(Path(results) / "records").labelled
batch = CropBatches(records, records.split["train"], batch_size, crop_seconds, seed)(step=0)
torch.manual_seed(seed)
model = SwAV(make_encoder(encoder), batch_size=batch_size, **options)
with torch.no_grad():
    scores = model.prototypes(
        model.projector(model.encoder(batch.signals))
    )  # (records, prototypes)


# %% tags=["solution"]
def spread_of(codes: torch.Tensor) -> torch.Tensor:
    """Over how many prototypes a code `(records, prototypes)` spreads, as a mean over records."""
    return torch.special.entr(codes).sum(dim=1).exp().mean()


def fullest_of(codes: torch.Tensor) -> torch.Tensor:
    """What the fullest prototype holds of all records, in the share that each would get if all got the same."""
    return codes.sum(dim=0).max() * codes.shape[1] / len(codes)


for epsilon in (0.5, 0.05, 0.01):
    tried = sinkhorn(scores, epsilon, iterations=3)
    print(
        f"epsilon = {epsilon}: a code spreads over {spread_of(tried):.1f} prototypes; "
        f"the fullest holds {fullest_of(tried):.2f} shares"
    )

# %% tags=["check"]
from ecgtools.answers import number

single, halves = torch.eye(4).repeat(3, 1), torch.tensor([[0.5, 0.5, 0, 0]]).repeat(12, 1)
mixed = torch.cat([single, torch.full((12, 4), 0.25)])
known = (
    (single, 1, 1),
    (halves, 2, 2),
    (torch.full((12, 4), 0.25), 4, 1),
    (mixed, 2.5, 1),
)  # spread, fullest
for made, wide, full in known:
    assert abs(number(spread_of(made)) - wide) < 1e-5, (
        f"these codes spread over {wide} of 4 prototypes:\n{made}"
    )
    assert abs(number(fullest_of(made)) - full) < 1e-5, (
        f"the fullest prototype holds {full} equal shares:\n{made}"
    )
sharp, soft = (
    number(spread_of(sinkhorn(scores, softness, iterations=3))) for softness in (0.01, 0.5)
)
assert 1 <= sharp < soft <= scores.shape[1] + 1e-3, "a small epsilon must give sharper codes"
print("right")

# %% [markdown]
# ## What was seen

# %%
for fraction in fractions:
    gain = probed.loc["SwAV", fraction] - probed.loc["random", fraction]
    print(
        f"{fraction:.0%} of the labels, fold 9: {probed.loc['SwAV', fraction]:.3f}, {gain:+.3f} over random filters"
    )

# %% [markdown]
# Notebook 09 fits and fine-tunes this encoder for every label subset and scores it on fold 10. Written:
# `run_lists/pretrained_encoders/swav.json`, which names the run below `runs/`, and `figures/swav_pretraining.svg`.
