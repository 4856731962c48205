# %% [markdown]
# # 07 · DINO: a student, a teacher, and pieces of a record
#
# **What you will learn.** How a network teaches itself: from a short piece of a record the student must say what its
# teacher, a slow copy of itself, says of a long piece. You write the loss in a few lines, see the two ways in which it
# could collapse and what prevents each, and watch the network learn.
#
# **What it needs.** The records of notebook 00. Only the signals of folds 1–8 are learnt from.
#
# **How long.** The `laptop` profile takes about 2 minutes on two CPU cores, seconds to minutes on a GPU.

# %% tags=["parameters"]
results = "../results/laptop"  # where notebook 00 left the records, and where results go
fractions = [0.01, 0.1, 1.0]  # shares of the training labels, for the probes at the end
probe_seeds = 5  # label subsets of each probe
encoder = "xresnet1d_narrow"  # as in notebooks 03 to 05; or vit1d_small, or vit1d, the paper's transformer
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
    "prototypes": 512,
    "hidden": 256,
    "bottleneck": 64,
    "local_views": 2,
}  # DINO's own settings
turnover = 4.0  # how often the teacher is renewed during the run; gives its momentum

# %%

from ecgstudy.study import Study

study = Study.open(results)
records = study.records
note = study.name
print(f"{note}: {len(records):,} recordings")

# %% [markdown]
# ## Pieces of a record
#
# The teacher sees two long pieces of a crop, the student these and some short ones. Pieces are only cut, never
# stretched: rate and intervals stay true. DINO was made for transformers, which read a short stretch of all leads as
# one *token* and are told where in the record each token stands; a piece is then cut between tokens and keeps its
# place. Here, where recordings are few, the convolutions of notebook 03 serve every objective, so that only the
# objective differs; with `encoder = "vit1d_small"` and `crop_seconds = 10.0` you see the transformer.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from ecglib.batches import CropBatches
from ecglib.encoders import make_encoder
from ecglib.selfsup.crops import random_windows, window_length
from ecglib.selfsup.dino import DINO, dino_loss, next_center

split = records.split
batch = CropBatches(records, split["train"], 32, crop_seconds, seed)(step=0)
torch.manual_seed(seed)
model = DINO(make_encoder(encoder), **options)
token = getattr(model.encoder, "patch", 1)
figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
for row, share in enumerate([1.0, *model.crops.shares]):
    length = window_length(batch.signals.shape[2], share, token)
    piece, start = random_windows(batch.signals[:1], length, batch.generator, token)
    seconds = (start.item() + np.arange(length)) / records.sampling_rate
    axes.plot(seconds, piece[0, 1] - 2 * row, linewidth=0.8, color=f"C{(row > 0) + (row > 2)}")
names = ["record", "long", "long"] + ["short"] * (len(model.crops.shares) - 2)
axes.set(
    xlabel="second",
    yticks=[-2 * row for row in range(len(names))],
    yticklabels=names,
    title="lead II",
)
plt.close(figure)
figure

# %% [markdown]
# ## The loss
#
# Behind the encoder a head gives each piece its cosines with $K$ prototypes, as in notebook 05. Made sharp by a
# temperature they are an answer $P$; the teacher's are first *centred*, by the running mean $c$ of its outputs $g$:
#
# $$P_s(b) = \mathrm{softmax}\frac{h(b)}{0.1},\qquad P_t(a) = \mathrm{softmax}\frac{g(a) - c}{0.04},\qquad
# L = -\sum_k P_t(a)_k \log P_s(b)_k,$$
#
# averaged over records and over all pairs of a long piece $a$ for the teacher and another piece $b$ for the student.


# %%
def dino_by_hand(student: list, teacher: list, center: torch.Tensor) -> torch.Tensor:
    """One pair of pieces after the other, as the formula says."""
    aims = [torch.softmax((output - center) / 0.04, dim=1) for output in teacher]
    told = [torch.log_softmax(output / 0.1, dim=1) for output in student]
    pairs = [(aim, told[b]) for a, aim in enumerate(aims) for b in range(len(told)) if a != b]
    return torch.stack([-(aim * answer).sum(dim=1).mean() for aim, answer in pairs]).mean()


student = list(torch.rand(6, 8, 16, generator=torch.Generator().manual_seed(0)))
teacher, center = [told.flip(0) for told in student[:2]], student[5].mean(dim=0)
by_hand, by_package = dino_by_hand(student, teacher, center), dino_loss(student, teacher, center)
assert torch.allclose(by_hand, by_package, atol=1e-5), (by_hand, by_package)
no_opinion = dino_loss([torch.zeros(8, 16)] * 6, teacher, center).item()
assert np.isclose(no_opinion, np.log(16)), no_opinion
print(
    f"by hand {by_hand:.6f}, by the package {by_package:.6f}; without an opinion log 16 = {no_opinion:.4f}"
)

# %% [markdown]
# A trap from published code: the network is kept from the moment when this loss was lowest. But if student and teacher
# give one and the same sure answer for every record, the loss is 0 and nothing is known.

# %%
same_for_all = 10 * torch.eye(16)[torch.zeros(8, dtype=torch.long)]
print(
    f"one sure answer for all: {dino_loss([same_for_all] * 6, [same_for_all] * 2, torch.zeros(16)):.6f}"
)

# %% [markdown]
# ## Centring and sharpening
#
# There are two ways to collapse: one prototype wins for all records, or every answer is even. Centring takes away what
# all answers have in common and prevents the first, but pushes towards the second; the teacher's low temperature
# prevents the second, but pushes towards the first. Together they hold the balance.

# %%
with torch.no_grad():
    outputs = model.teacher_head(model.encoder(batch.signals))
common = next_center(torch.zeros(outputs.shape[1]), [outputs], momentum=0.0)
for name, answers in {
    "neither": torch.softmax(outputs, dim=1),
    "centred": torch.softmax(outputs - common, dim=1),
    "sharpened": torch.softmax(outputs / 0.04, dim=1),
    "both": torch.softmax((outputs - common) / 0.04, dim=1),
}.items():
    spread, winners = (
        torch.special.entr(answers).sum(dim=1).exp().mean(),
        answers.argmax(dim=1).bincount(),
    )
    print(
        f"{name}: an answer spreads over {spread:.0f} prototypes; one wins for {winners.max() / len(answers):.0%}"
    )

# %% [markdown]
# This is the network as drawn at random: whatever record it is shown, it says nearly the same.
#
# ## How slow should the teacher be?
#
# The teacher's weights are a moving average of the student's, as in notebook 04, and the teacher is what is kept. A
# published momentum belongs to the published number of steps. DINO used 0.996; DISTL, for chest X-rays, 0.9995 over
# 6,750 steps of 8 images. In fewer steps such a teacher stays frozen near its random start.

# %%
from ecglib.ema import momentum_at, momentum_for_steps

momentum = momentum_for_steps(steps, turnover)
for start in (0.9995, 0.996, momentum):
    rising = np.array([momentum_at(step / steps, start) for step in range(1, steps + 1)])
    assert np.isclose((1 - rising).sum(), (1 - start) * (steps - 1) / 2), (
        "this sum has a closed form"
    )
    print(
        f"momentum {start:.4g}: the teacher goes {1 - rising.prod():.1%} of the way to a student that stands still"
    )

# %% [markdown]
# ## Pretraining, watched
#
# No label is used. The quantities measured along the way are those of notebook 03, here of the teacher. The loss says
# little: what it asks for changes with the teacher. Look at alignment and effective rank instead.

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
    options={"momentum": momentum, **options},
)
pretrained = study.run(pretraining("dino", settings, seed))
keep_pretrained(pretrained, results)

# %%
import pandas as pd

from ecgstudy.analysis.training_curves import plot_pretraining
from ecgstudy.results import save_figure

history = pd.DataFrame(pretrained.about["notes"]["history"])
figure = plot_pretraining(history, f"DINO: {note}")
save_figure(figure, "dino_pretraining", results)
figure

# %% [markdown]
# The dotted lines are the values at the start, of the network as it was drawn at random.

# %%
last = history.iloc[-1]
assert last["effective_rank"] > 2, "the features have collapsed"
print(
    f"loss {history['loss'].iloc[1]:.3f} to {last['loss']:.3f} in {last['seconds']:.0f} s on {study.device}; "
    f"alignment {history['alignment'].iloc[0]:.2f} to {last['alignment']:.2f}; "
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
    "DINO": pretrained.predictions()["features"],
    "random": control.predictions()["features"],
}
probed = frozen_validation(records, features, fractions, probe_seeds)
probed.rename(columns="{:.0%}".format).style.format(precision=3).set_caption(
    f"Macro AUROC, fold 9: {note}"
)

# %% [markdown]
# ## Exercise
#
# Short pieces make DINO cheap for a transformer. A piece has one token more than it is cut into, `[CLS]`, and attention
# compares each token with each, itself included. Take a record of 10 s in tokens of 0.2 s. Write `cost_of`: how many
# tokens student and teacher read of it, and how many comparisons a block makes. Then compare `model.crops.shares` with a
# student whose pieces are all long.

# %% tags=["given"]
from ecglib.encoders import make_encoder
from ecglib.selfsup.dino import DINO

model = DINO(make_encoder(encoder), **options)


# %% tags=["solution"]
def cost_of(shares: tuple[float, ...]) -> tuple[int, int]:
    """Tokens and comparisons; `shares` of the record are the student's pieces, the teacher sees the first two."""
    whole = round(10.0 / 0.2)
    counts = [1 + round(share * whole) for share in (*shares, *shares[:2])]
    return sum(counts), sum(count**2 for count in counts)


for name, shares in {
    "long and short": model.crops.shares,
    "all long": model.crops.shares[:1] * len(model.crops.shares),
}.items():
    tokens, comparisons = cost_of(shares)
    print(f"{name}: {tokens} tokens, {comparisons:,} comparisons")

# %% tags=["check"]
from ecgtools.answers import numbers

for tried, known in {(1.0, 1.0): [204, 10404], (0.8, 0.8, 0.4): [185, 7165]}.items():
    read, compared = numbers(cost_of(tried), (2,)) == known
    assert read, f"student and teacher read {known[0]} tokens of pieces {tried}, [CLS] included"
    assert compared, (
        f"a block compares {known[1]:,} pairs of tokens of pieces {tried}, each piece by itself"
    )
print("right")

# %% [markdown]
# ## What was seen

# %%
for fraction in fractions:
    gain = probed.loc["DINO", fraction] - probed.loc["random", fraction]
    print(
        f"{fraction:.0%} of the labels, fold 9: {probed.loc['DINO', fraction]:.3f}, {gain:+.3f} over random filters"
    )

# %% [markdown]
# Notebook 09 fits and fine-tunes this encoder for every label subset and scores it on fold 10. Written:
# `run_lists/pretrained_encoders/dino.json`, which names the run below `runs/`, and `figures/dino_pretraining.svg`.
