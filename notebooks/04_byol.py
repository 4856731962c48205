# %% [markdown]
# # 04 · BYOL: one view predicts the other
#
# **What you will learn.** How a network learns from ECGs without a single label and without telling hearts apart: from
# one view it predicts what a slow copy of itself makes of the other. You write the loss in a few lines, see how slow
# the copy must be, watch the network learn, and make it collapse on purpose.
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
options = {"hidden": 512, "outputs": 64}  # BYOL's own settings
turnover = 4.0  # how often the target is renewed during the run, which gives its momentum

# %%

from ecgstudy.study import Study

study = Study.open(results)
records = study.records
note = study.name
print(f"{note}: {len(records):,} recordings")

# %% [markdown]
# ## Two networks
#
# The *online* network learns: encoder, projector, and a small *predictor* on top. The *target* is a copy of encoder and
# projector that gets no gradient. After each step its weights $\xi$ move a little towards the online weights $\theta$,
#
# $$\xi \leftarrow m\,\xi + (1-m)\,\theta,$$
#
# so they are an average over many past steps (*EMA*, exponential moving average). Views are made as in notebook 03. The
# online network predicts from view 1 what the target makes of view 2, and the reverse; no other record is involved.

# %%
import numpy as np
import torch

from ecglib.augment import apply, named_transforms
from ecglib.batches import Batch, CropBatches
from ecglib.encoders import make_encoder
from ecglib.selfsup.byol import BYOL, byol_loss

split = records.split
batch = CropBatches(records, split["train"], 32, crop_seconds, seed)(step=0)
torch.manual_seed(seed)
model = BYOL(make_encoder(encoder), named_transforms(transforms), **options)
model.loss(batch).backward()
reached = {
    name
    for name, part in model.named_children()
    if any(w.grad is not None for w in part.parameters())
}
assert reached == {"encoder", "projector", "predictor"}, reached  # and not the target

# %% [markdown]
# ## The loss
#
# Only the directions of a prediction $p$ and a projection $z$ count. The loss is the squared distance of the two unit
# vectors, averaged over the $N$ records, and added up for the two directions:
#
# $$L = \frac1N\sum_i \left|\frac{p_i}{|p_i|} - \frac{z_i}{|z_i|}\right|^2 = 2 - \frac2N\sum_i \cos(p_i, z_i).$$
#
# It is 0 for equal directions, 2 for a right angle and 4 for opposite directions.


# %%
def byol_by_hand(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The squared distance of unit vectors, one record after the other; the target is taken as it is."""
    losses = [
        (one / one.norm() - aim / aim.norm()).square().sum() for one, aim in zip(p, z.detach())
    ]
    return torch.stack(losses).mean()


p, z = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
by_hand, by_package = byol_by_hand(p, z), byol_loss(p, z)
assert torch.allclose(by_hand, by_package, atol=1e-5), (by_hand, by_package)
ways = torch.eye(8)
known = [byol_loss(3 * ways, aim).item() for aim in (ways, ways.roll(1, dims=0), -ways)]
assert np.allclose(known, [0, 2, 4], atol=1e-6), known
print(
    f"by hand {by_hand:.6f}, by the package {by_package:.6f}; same, right angle, opposite: {known}"
)

# %% [markdown]
# ## How slow should the copy be?
#
# The momentum rises from $m$ to 1 along a cosine. The published 0.996 belongs to some 23,000 steps. In a shorter
# run much of the random start stays in the target, and the network learns to predict random numbers. What counts is the
# *turnover*, the sum of $1-m$ over the run: about $e^{-\text{turnover}}$ of the start is left at the end.

# %%
import matplotlib.pyplot as plt

from ecglib.ema import average_of, momentum_at, momentum_for_steps, update_average

momentum, progress = momentum_for_steps(steps, turnover), np.arange(1, steps + 1) / steps
figure, axes = plt.subplots(figsize=(5, 2.6), layout="constrained")
for start, name in {0.996: "published", momentum: "sized by the steps"}.items():
    rising = np.array([momentum_at(share, start) for share in progress])
    left = np.cumprod(rising)
    axes.plot(steps * progress, left, label=f"{start:.4g}, {name}")
    assert np.isclose((1 - rising).sum(), (1 - start) * (steps - 1) / 2), (
        "this sum has a closed form"
    )
    print(
        f"m = {start:.4g}, {name}: turnover {(1 - rising).sum():.2f}, {left[-1]:.2%} of the start is left"
    )
axes.set(xlabel="step", ylabel="share of the start\nin the target", ylim=(0, 1.02))
axes.legend(frameon=False)
plt.close(figure)
figure

# %% [markdown]
# A trap from published code: only parameters with `weight` in their name are averaged, so the target's biases, those of
# batch norm included, stay at their start. Here the online network lies 1 away in every parameter and stands still,
# while the target follows for 100 steps.

# %%
from copy import deepcopy

online, ours, published = (
    deepcopy(model.encoder),
    average_of(model.encoder),
    average_of(model.encoder),
)
torch._foreach_add_([parameter.data for parameter in online.parameters()], 1.0)
for _ in range(100):
    update_average(ours, online, 0.95)
    for (name, kept), value in zip(published.named_parameters(), online.parameters()):
        kept.lerp_(value.detach(), 0.05 if "weight" in name else 0.0)
for rule, target in {"every parameter": ours, "published rule": published}.items():
    change = {
        name: value - model.encoder.get_parameter(name) for name, value in target.named_parameters()
    }
    gone = torch.cat([way for name, way in change.items() if name.endswith("bias")]).mean().item()
    assert np.isclose(gone, 1 - 0.95**100 if target is ours else 0.0, atol=1e-4), gone
    print(f"{rule}: the biases have gone {gone:.1%} of their way")

# %% [markdown]
# ## Pretraining, watched
#
# No label is used. The quantities measured along the way are those of notebook 03. Look at the *effective rank*: if all
# records moved to one point, the loss would be perfect and the rank 1. No negatives push them apart.

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
pretrained = study.run(pretraining("byol", settings, seed))
keep_pretrained(pretrained, results)

# %%
import pandas as pd

from ecgstudy.analysis.training_curves import plot_pretraining
from ecgstudy.results import save_figure

history = pd.DataFrame(pretrained.about["notes"]["history"])
figure = plot_pretraining(history, f"BYOL: {note}")
save_figure(figure, "byol_pretraining", results)
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
# ## Why does it not collapse?
#
# One vector for all records would have loss 0. But the gradient does not lead there: it moves only the online side,
# towards a target that still tells records apart. Chen and He (2021) found that the copy need not even be slow, but
# that neither the stopped gradient nor the predictor can go. The exercise removes both.
#
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
    "BYOL": pretrained.predictions()["features"],
    "random": control.predictions()["features"],
}
probed = frozen_validation(records, features, fractions, probe_seeds)
probed.rename(columns="{:.0%}".format).style.format(precision=3).set_caption(
    f"Macro AUROC, fold 9: {note}"
)

# %% [markdown]
# ## Exercise
#
# Make it collapse. Write `Meeting`, a BYOL without a predictor in which the gradient reaches both views. Train it for
# 20 steps with `after_20_steps` and compare it with the real one.

# %% tags=["given"]
from pathlib import Path

import torch

from ecglib.augment import apply, named_transforms
from ecglib.batches import Batch, CropBatches
from ecglib.encoders import make_encoder
from ecglib.records import Records
from ecglib.selfsup.byol import BYOL
from ecglib.train import default_device, fit

records = Records.load(Path(results) / "records").labelled
device = default_device()


def after_20_steps(objective: type[BYOL]) -> tuple[float, float]:
    """The loss after 20 steps, and the mean cosine between projections of *different* records."""
    torch.manual_seed(seed)
    tried = objective(make_encoder(encoder), named_transforms(transforms), **options).to(device)
    batches = CropBatches(records, records.split["train"], 32, crop_seconds, seed, device)
    final = fit(tried, batches, 20, learning_rate=learning_rate, log_every=5)["loss"].iloc[-1]
    with torch.no_grad():
        z = torch.nn.functional.normalize(
            tried.projector(tried.encoder(batches(20).signals)), dim=1
        )
    return float(final), (z @ z.T)[~torch.eye(32, dtype=torch.bool)].mean().item()


# %% tags=["solution"]
class Meeting(BYOL):
    """Both views go through the online network, nothing is predicted, and the gradient reaches both."""

    def loss(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch, 0 where both views have the same direction in every record."""
        views = torch.cat(
            [apply(self.transforms, batch.signals, batch.generator) for _ in range(2)]
        )
        z1, z2 = self.projector(self.encoder(views)).chunk(2)
        return 4.0 - 4.0 * torch.nn.functional.cosine_similarity(z1, z2).mean()


for objective in (BYOL, Meeting):
    loss, alike = after_20_steps(objective)
    print(f"{objective.__name__}: loss {loss:.4f}, mean cosine of different records {alike:.3f}")

# %% tags=["check"]
from ecgtools.answers import number

torch.manual_seed(seed)
first_batches = CropBatches(records, records.split["train"], 32, crop_seconds, seed)
fresh = Meeting(make_encoder(encoder), named_transforms(transforms), **options)
value = fresh.loss(first_batches(0))
assert number(value) > 0 and getattr(value, "requires_grad", False), (
    "`Meeting.loss` must return a loss with a gradient"
)
value.backward()
idle = [weight.grad is None for weight in fresh.predictor.parameters()]
assert all(idle), "the predictor still takes part"
assert all(weight.grad is not None for weight in fresh.projector.parameters()), (
    "the gradient reaches no projection"
)
for weight in [*fresh.target_encoder.parameters(), *fresh.target_projector.parameters()]:
    weight.data.zero_()
assert number(fresh.loss(first_batches(0))) == number(value), "the slow copy still takes part"
left, cosine = after_20_steps(Meeting)
assert left < 0.2 and cosine > 0.95, (
    f"no collapse: loss {left:.2f}, mean cosine of different records {cosine:.2f}"
)
print("right")

# %% [markdown]
# ## What was seen

# %%
for fraction in fractions:
    gain = probed.loc["BYOL", fraction] - probed.loc["random", fraction]
    print(
        f"{fraction:.0%} of the labels, fold 9: {probed.loc['BYOL', fraction]:.3f}, {gain:+.3f} over random filters"
    )

# %% [markdown]
# Notebook 09 fits and fine-tunes this encoder for every label subset and scores it on fold 10. Written:
# `run_lists/pretrained_encoders/byol.json`, which names the run below `runs/`, and `figures/byol_pretraining.svg`.
