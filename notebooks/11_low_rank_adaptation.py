# %% [markdown]
# # 11 · Low-rank adaptation: one network, many hospitals
#
# **What you will learn.** How a pretrained network is adapted to a new task by a small difference of its weights, how
# that difference is left out at random while it learns, and how one look at the labels decides which layers get more of
# it. You write the layer in ten lines, count what is trained, and store an adapter without its backbone. Before that
# you pretrain two backbones for which nobody had to read an ECG.
#
# **What it needs.** The records of notebook 00. Fold 10 is not used. Notebook 12 starts from the backbones.
#
# **How long.** The `laptop` profile takes about 2 minutes on two CPU cores, seconds to minutes on a GPU.

# %% tags=["parameters"]
results = "../results/laptop"  # where notebook 00 left the records, and where results go
fractions = [0.01, 0.1, 1.0]  # shares of the training labels, for the probes
probe_seeds = 5  # label subsets of each probe
backbone = "conv_transformer_small"  # or conv_transformer, the paper's
backbone_data = ""  # folder of CODE-15 %, which the paper pretrains on; empty: simulate a cohort
cohort_patients = 1500  # simulated, each of them labelled for nothing
cohort_seed = 1  # the study's own simulated records have the seed 0
backbone_steps = 300  # on the simulated cohort
backbone_batch = 64
swav_steps = 100  # on the study's own signals
swav_batch = 128
crop_seconds = 2.5
learning_rate = 0.003
weight_decay = 0.01
seed = 0
rank = 8
share = 0.2  # of the layers, those that get the full rank; the others get half
deactivation = 0.2  # the paper's
labelled_share = 0.1  # of the training labels, for the adapter and for the importance of layers
adapter_batch = 64
adapter_steps = 50
transforms = {  # on the simulated cohort: what leaves a label as it is
    "channel_resize": {"low": 0.7, "high": 1.4},
    "gaussian_noise": {"scale": 0.03},
    "baseline_wander": {"largest": 0.05},
    "time_out": {"low": 0.0, "high": 0.4},
}
views = {  # for SwAV, see notebook 05
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
from pathlib import Path

from ecglib.labels import label_subsets
from ecgstudy.study import Study

study = Study.open(results)
records = study.records
split = records.split
note = f"{records.name}{records.caveat}"
print(f"{note}: {len(records):,} recordings")

# %% [markdown]
# ## Why not train everything?
#
# Many hospitals have ECGs, each with its own patients and its own list of findings, and few labels. One network can be
# pretrained for all of them. If each then trains all weights, each keeps a whole copy, and a handful of labels must
# hold millions of weights in check. The network of CE-SSL (Zhou et al. 2024), which this notebook follows:

# %%
import torch

from ecglib.encoders.conv_transformer import ConvTransformer

with torch.device("meta"):  # shapes without numbers, enough to count
    published = ConvTransformer("base", classes=18)
weights = sum(parameter.numel() for parameter in published.parameters())
assert round(weights / 1e6, 3) == 9.505, weights
print(f"{weights:,} weights, {4 * weights / 1e6:.0f} MB for each copy")
print(f"5 % of the labels here: {round(0.05 * len(split['train']))} records, {note}")

# %% [markdown]
# ## A backbone from labels that cost nothing
#
# CE-SSL pretrains on CODE, a large collection of ECGs that doctors have read; `backbone_data` takes the folder of its
# public part, CODE-15 %. Here is a source without a download: in the simulated cohort the labels are free. A network
# learns its 20 statements from patients who never lived. The question is what of this holds for real hearts.
#
# Where the study's own records are simulated too, the cohort must be other patients. Even so both come from one
# simulator: *simulated to simulated* flatters, and says nothing about real hearts.

# %%
from ecglib.sources import read_source
from ecglib.sources.simulate import simulate_records

if backbone_data:
    cohort = read_source(backbone_data, sampling_rate=round(records.sampling_rate))
else:
    assert not records.about["simulated"] or records.about["seed"] != cohort_seed, (
        "the cohort would be the study's own"
    )
    cohort = simulate_records(cohort_patients, cohort_seed, records.sampling_rate, task="all")
print(f"{cohort.name}: {len(cohort):,} recordings, {', '.join(cohort.classes)}")

# %% [markdown]
# The training is that of notebook 02. It scores itself on the cohort's own folds, where a rare statement may be absent;
# the warning about that is of no interest here.

# %%
import warnings

from ecglib.evaluate.metrics import AbsentClassWarning
from ecglib.supervised import Training
from ecgstudy.arms.semi_supervised import Start
from ecgstudy.arms.starts import keep_start
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.study import LabelSubset

training = Training(
    encoder=backbone,
    steps=backbone_steps,
    batch_size=backbone_batch,
    crop_seconds=crop_seconds,
    learning_rate=learning_rate,
    weight_decay=weight_decay,
    transforms=transforms,
)
device = study.device
everything = LabelSubset(1.0, seed, (1.0,))
with warnings.catch_warnings():
    warnings.simplefilter("ignore", AbsentClassWarning)
    trained_on_cohort = Study(cohort, study.results, device)
    simulated = trained_on_cohort.run(FromScratch(everything, training, "backbone"))
start = Start("simulated", simulated)
keep_start(start, results)

# %% [markdown]
# ## A backbone from signals alone
#
# The other source is the study itself. The same network learns from the signals of folds 1 to 8 without their labels,
# by SwAV, as in notebook 05. These are the right hearts, but there are far fewer of them.

# %%
from ecglib.selfsup import Pretraining
from ecgstudy.methods import pretraining

swav = Pretraining(
    encoder=backbone,
    steps=swav_steps,
    batch_size=swav_batch,
    crop_seconds=crop_seconds,
    learning_rate=learning_rate,
    weight_decay=weight_decay,
    transforms=views,
    options={"batch_size": swav_batch, **options},  # the queue must know the size of a batch
)
self_supervised = study.run(pretraining("swav", swav, seed))
keep_start(Start("self_supervised", self_supervised), results)

# %%
import pandas as pd

stated, sorted_out = (
    pd.DataFrame(run.about["notes"]["history"]) for run in (simulated, self_supervised)
)
assert stated["loss"].iloc[-1] < stated["loss"].iloc[0], "the loss on the cohort did not fall"
assert sorted_out["effective_rank"].iloc[-1] > 2, "SwAV's features have collapsed"
for name, history in {"simulated labels": stated, "SwAV": sorted_out}.items():
    print(
        f"{name}: loss {history['loss'].dropna().iloc[0]:.3f} to {history['loss'].iloc[-1]:.3f} "
        f"in {history['seconds'].iloc[-1]:.0f} s"
    )

# %% [markdown]
# ## Real hearts, without one real label
#
# The network knows statements such as anterior infarction, the study asks for superclasses such as MI. A superclass is
# as likely as that at least one of its statements holds, if they were independent: $1 - \prod_s (1 - p_s)$. So the
# network can be asked about fold 9 at once, before it has seen any label of the study.
#
# Your own classes may have no simulated statement. Then this question is skipped, and the reason is printed.

# %%
from ecglib.errors import DataError
from ecglib.evaluate.metrics import class_auroc, macro_auroc
from ecgstudy.arms.starts import without_real_labels

unseen, asked = "not asked", split["validation"]
try:
    answers = without_real_labels(start, records, asked, device)
    unseen = f"{macro_auroc(records.targets[asked], answers, records.classes):.3f}"
    each = zip(records.classes, class_auroc(records.targets[asked], answers), strict=True)
    print(f"macro AUROC {unseen}; " + ", ".join(f"{name} {value:.3f}" for name, value in each))
    print(f"fold 9 without one label of the study: {note}")
except DataError as error:
    print(error)

# %% [markdown]
# And with some labels? A linear probe on the frozen features of each start, beside the same network never trained.

# %%
from ecgstudy.analysis.label_curve import frozen_validation
from ecgstudy.arms.pretrain import Encode, untrained

encoded = Encode("encoded", backbone, crop_seconds, 0, simulated, start.settings())
runs = {
    "random": study.run(untrained(self_supervised)),
    "self-supervised": self_supervised,
    "simulated labels": study.run(encoded),
}
features = {name: run.predictions()["features"] for name, run in runs.items()}
probed = frozen_validation(records, features, fractions, probe_seeds)
probed.rename(columns="{:.0%}".format).style.format(precision=3).set_caption(
    f"Macro AUROC, fold 9: {note}"
)

# %% [markdown]
# ## A difference of low rank
#
# Now the hospital's own labels. The weight $W_0$ of a layer stays as it is. What is learnt is a difference, and it is
# kept small by its form (LoRA, Hu et al. 2022):
#
# $$W = W_0 + BA,\qquad B \in \mathbb{R}^{m\times r},\quad A \in \mathbb{R}^{r\times n}.$$
#
# The difference can move the output in $r$ directions only. A whole $m \times n$ matrix has $mn$ numbers, the pair has
# $r(m+n)$. A convolution is a matrix too: a row for each output, and a column for each input at each place of its
# kernel.

# %%
from ecglib.lora import LowRankLayer


def by_formula(
    layer: torch.nn.Module, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """A linear layer or a convolution with the weight W0 + BA."""
    weight = layer.weight + (b @ a).view_as(layer.weight)
    if isinstance(layer, torch.nn.Linear):
        return torch.nn.functional.linear(x, weight, layer.bias)
    return torch.nn.functional.conv1d(x, weight, layer.bias, layer.stride, layer.padding)


torch.manual_seed(seed)
for layer, x in (
    (torch.nn.Linear(6, 10), torch.randn(3, 6)),
    (torch.nn.Conv1d(12, 8, 9, stride=4, padding=4), torch.randn(3, 12, 50)),
):
    adapted = LowRankLayer(layer, rank=2)
    torch.nn.init.normal_(adapted.B)
    difference = (by_formula(layer, adapted.A, adapted.B, x) - adapted(x)).abs().max().item()
    assert difference < 1e-5, difference
    print(
        f"{type(layer).__name__}: A {tuple(adapted.A.shape)}, B {tuple(adapted.B.shape)}, apart by {difference:.0e}"
    )

# %% [markdown]
# The package never forms $BA$: it adds $B(Ax)$ to what the frozen layer gives, two thin products instead of a thick
# one. The layer that makes queries, keys and values at once gets a pair for each of the three.
#
# What a pair saves depends on the shape of its layer:

# %%
from ecglib.lora import adaptable_layers

shapes = {
    name: (len(layer.weight), layer.weight[0].numel())
    for name, layer in adaptable_layers(published).items()
}
rows = {}
for name in (
    "blocks.0.first",
    "blocks.0.second",
    "blocks.0.shortcut",
    "transformer.0.mlp.0",
    "head.0",
):
    m, n = shapes[name]
    rows[name] = {
        "matrix": f"{m} x {n}",
        "whole": m * n,
        "rank 16": 16 * (m + n),
        "share": 16 * (m + n) / (m * n),
    }
pd.DataFrame(rows).T.style.format({"whole": "{:,}", "rank 16": "{:,}", "share": "{:.0%}"})

# %% [markdown]
# ## Check: at the start nothing changes
#
# $A$ starts at random and $B$ at zero, so the adapted network gives exactly the answers of its backbone. If one answer
# moved, the adaptation would not start from what was learnt before.

# %%
from ecglib.batches import CropBatches
from ecglib.lora import add_lora, trainable_parameters
from ecgstudy.arms.semi_supervised import make_network

pretrained = start.weights()
signals = CropBatches(records, split["train"], 16, crop_seconds, seed)(step=0).signals
network = make_network(backbone, len(records.classes), seed, pretrained).eval()
before = network(signals)
add_lora(network, rank, deactivation)
assert torch.equal(network(signals), before), "the low-rank layers changed an answer"
print(f"{before.numel()} answers, none of them changed")

# %% [markdown]
# ## What is trained
#
# The pairs, every bias, and the last linear layer, which belongs to the task. All else is frozen: the weights $W_0$,
# the gains of the norms, and the matrix behind attention, which gets no pair either.

# %%


def kind(name: str, parameter: torch.nn.Parameter) -> str:
    """Which line of the count a parameter belongs to."""
    last = name.rpartition(".")[2]
    if not parameter.requires_grad:
        return "frozen"
    return "low-rank pairs" if last in ("A", "B") else "biases" if last == "bias" else "last layer"


counts = pd.Series(
    dict.fromkeys(["frozen", "low-rank pairs", "biases", "last layer"], 0), name="numbers"
)
for name, parameter in network.named_parameters():
    counts[kind(name, parameter)] += parameter.numel()
trained = sum(parameter.numel() for parameter in trainable_parameters(network))
assert trained == counts.drop("frozen").sum()
print(
    f"{backbone} at rank {rank}: {trained:,} of {counts['frozen'] + counts['last layer'] + counts['biases']:,}"
)
counts.to_frame().style.format("{:,}")

# %% [markdown]
# Counting is a cheap check that the method is the published one. The paper prints, for its base backbone with 18
# classes, 0.222, 0.413, 0.795 and 1.559 million trained numbers at rank 4, 8, 16 and 32.

# %%
for tried, millions in {4: 0.222, 8: 0.413, 16: 0.795, 32: 1.559}.items():
    with torch.device("meta"):
        count = sum(
            p.numel()
            for p in trainable_parameters(add_lora(ConvTransformer("base", classes=18), tried))
        )
    assert round(count / 1e6, 3) == millions, (tried, count)
    print(f"rank {tried:2}: {count:9,} trained, {count / weights:.1%} of the network")

# %% [markdown]
# ## Left out at random
#
# With few labels even a small difference can learn them by heart. In each forward pass of the training a coin is tossed
# for each layer, and with the probability $p$ its whole pair is left out:
#
# $$\text{training: } W = W_0 + \delta\,BA,\quad \delta \sim \mathrm{Bernoulli}(1-p);\qquad
# \text{test: } W = W_0 + (1-p)\,BA.$$
#
# The second weight is the mean of the first, since $\mathbb{E}[\delta] = 1 - p$. No layer can rely on the differences
# of the others. The first layer of the head is spared. Does the coin of the package fall as the formula says?

# %%
torch.manual_seed(seed)
coin = LowRankLayer(torch.nn.Linear(6, 10), rank=2)
torch.nn.init.normal_(coin.B)
coin.deactivation, x, tosses = deactivation, torch.randn(1, 6), 2000
without = coin.base(x)
kept = sum(not torch.equal(coin(x), without) for _ in range(tosses)) / tosses
assert abs(kept - (1 - deactivation)) < 4 * (deactivation * (1 - deactivation) / tosses) ** 0.5, (
    kept
)
torch.testing.assert_close(coin.eval()(x) - without, (1 - deactivation) * (x @ coin.A.T @ coin.B.T))
print(
    f"the pair was there in {kept:.1%} of {tosses} passes; in the test it counts {1 - deactivation:.0%}"
)

# %% [markdown]
# A layer that was left out gets no gradient. It is not updated in this step, and nothing has to be kept for it. To know
# how the coin falls, one layer gets $p = 1$ for a moment.

# %%
from ecglib.lora import low_rank_layers

layers = low_rank_layers(network)
left_out, present = layers["blocks.0.second"], layers["head.0"]
left_out.deactivation = 1.0
network.train()(signals).square().mean().backward()
assert left_out.A.grad is None and left_out.B.grad is None, (
    "a gradient reached a layer that was left out"
)
assert left_out.base.bias.grad is not None and present.B.grad is not None
left_out.deactivation = deactivation
network.zero_grad(set_to_none=True)
print("left out: no gradient for A and B, but one for the bias; present: a gradient for B")

# %% [markdown]
# ## A few steps on the labels
#
# So far every $B$ is zero. A few steps on a small label subset give an adapter to look at; how good it can get is the
# matter of notebook 12. Check: the backbone must come out of it as it went in, to the last bit.

# %%
from ecglib.lora import backbone_checksum
from ecglib.supervised import Supervised
from ecglib.train import fit

labelled = label_subsets(records, [labelled_share], seed)[labelled_share]
batches = CropBatches(records, labelled, adapter_batch, crop_seconds, seed, device)
network = add_lora(
    make_network(backbone, len(records.classes), seed, pretrained), rank, deactivation
).to(device)
checksum = backbone_checksum(network)
history = fit(
    Supervised(network),
    batches,
    adapter_steps,
    learning_rate=learning_rate,
    weight_decay=weight_decay,
    seed=seed,
)
network.cpu().eval()
assert backbone_checksum(network) == checksum, "the frozen weights have changed"
print(
    f"{len(labelled)} labels, loss {history['loss'].iloc[0]:.3f} to {history['loss'].iloc[-1]:.3f}; "
    f"backbone unchanged, checksum {checksum[:12]}"
)

# %% [markdown]
# When training has ended, $W_0 + (1-p)\,BA$ can be written into each layer. The merged network is an ordinary one: it
# costs nothing more to use, and it must give the same answers. So must two evaluations of the unmerged one.

# %%
import copy

from ecglib.lora import merge_lora

with torch.inference_mode():
    first, second = network(signals), network(signals)
    merged = merge_lora(copy.deepcopy(network))
    torch.testing.assert_close(merged(signals), first, rtol=1e-4, atol=1e-4)
    apart = (merged(signals) - first).abs().max()
assert torch.equal(first, second), "a coin is tossed in evaluation"
assert not low_rank_layers(merged)
print(f"two evaluations are equal; merged and unmerged differ by {apart:.0e} at most")

# %% [markdown]
# A trap from published code: the coin is tossed in evaluation as well, since the layer asks whether deactivation is on,
# and not whether the network is training. Then the validation score that chooses the checkpoint is drawn from a random
# network. Ten evaluations of one and the same network on fold 9, with the coin left on:

# %%
import numpy as np

from ecglib.evaluate.windows import predict_windows


def answers_on_fold_9() -> np.ndarray:
    """Probabilities of `network` as it is now: its `forward` alone is not put in evaluation mode."""
    return predict_windows(network.forward, records, asked, crop_seconds, device)


network.to(device)
evaluations = [answers_on_fold_9()]
for layer in low_rank_layers(network).values():
    layer.train()
torch.manual_seed(seed)
evaluations += [answers_on_fold_9() for _ in range(10)]
assert any((again != evaluations[1]).any() for again in evaluations[2:]), "the coin was not tossed"
steady, *tossed = (macro_auroc(records.targets[asked], one, records.classes) for one in evaluations)
print(
    f"macro AUROC, fold 9: {steady:.4f} with the coin off, {min(tossed):.4f} to {max(tossed):.4f} with the coin on"
)

# %% [markdown]
# ## Which layers deserve more?
#
# Not every layer needs the same rank. Before anything is trained, one pass over the labelled batches measures how much
# the loss would feel a change of each weight $W_0$. The gradient $G$ of $W_0$ itself is never computed. But as $B = 0$,
# there is the gradient $GA^\top$ of $B$, and $A$ turns it back into the shape of the weight:
#
# $$G' = \frac{\partial L}{\partial B}A = G A^\top A,\qquad
# I = \mathrm{mean}\big[(W_0 \odot G')^2\big].$$
#
# The layers with the largest $I$ get the full rank, the others half of it. By hand, for one layer and one batch:

# %%
from ecglib.ranks import importance, ranks_by_importance

network = make_network(backbone, len(records.classes), seed, pretrained).to(device)
batch, name = batches(0), "transformer.0.mlp.0"
torch.manual_seed(seed)
probe = add_lora(copy.deepcopy(network), rank).train()
torch.nn.functional.binary_cross_entropy_with_logits(probe(batch.signals), batch.targets).backward()
layer = probe.get_submodule(name)
by_hand = (layer.base.weight * (layer.B.grad @ layer.A)).square().mean().item()
by_package = importance(network, [batch], rank, seed).loc[name, "published"]
assert abs(by_hand / by_package - 1) < 1e-3, (by_hand, by_package)
print(f"{name}: by hand {by_hand:.3e}, by the package {by_package:.3e}")

# %% [markdown]
# A trap: this score is not fair. On average $A^\top A$ is $r\sigma^2$ times the unit matrix, with $\sigma$ the standard
# deviation from which $A$ was drawn. In published code it is 0.02, but $1/\sqrt{3n}$ in the layer of queries, keys and
# values. The score grows with $\sigma^4$, so this layer is favoured $(\sigma_{qkv}/0.02)^4$ times by its random start
# alone. The *corrected* score divides $G'$ by $r\sigma^2$, and stands for $G$ itself in every layer.

# %%
passes = max(len(labelled) // adapter_batch, 1)
scores = importance(network, (batches(step) for step in range(passes)), rank, seed)
ratio = scores["published"] / scores["corrected"]
favour = ratio["transformer.0.qkv"] / ratio["transformer.0.mlp.0"]
expected = ((1 / (3 * network.feature_size)) ** 0.5 / 0.02) ** 4
assert abs(favour / expected - 1) < 1e-6, (favour, expected)
print(
    f"the published score favours qkv {favour:.1f} times at a width of {network.feature_size}, "
    f"{((1 / (3 * 256)) ** 0.5 / 0.02) ** 4:.1f} times at the published width of 256"
)

# %%
from ecgstudy.results import save_table

ranks = pd.DataFrame(
    {score: ranks_by_importance(scores[score].to_dict(), rank, share) for score in scores}
)
table = scores.join(ranks.add_prefix("rank_")).rename_axis("layer")
save_table(table, "ranks", results, index=True)
table.style.format({"published": "{:.1e}", "corrected": "{:.1e}"}).set_caption(
    f"Importance and rank of each layer, {passes} batches of labels: {note}"
)

# %%
from ecgstudy.analysis.cost import plot_ranks
from ecgstudy.results import save_figure

figure = plot_ranks(scores, ranks, f"Importance of each layer before training: {note}")
save_figure(figure, "ranks", results)
figure

# %% [markdown]
# Filled layers get the full rank. Look at `qkv`: in the left panel its wide start alone moves it far to the right. The
# panels have different scales, so compare the order of the layers, not their values.

# %% [markdown]
# ## The adapter alone
#
# A hospital stores only what its training changed, without the backbone: pairs, biases, last layer, and the running
# statistics of the norms. The file carries the ranks, $p$, and a checksum of the backbone on which it was trained.

# %%
from ecglib.lora import adapter_state, save_adapter

allocated = add_lora(network, ranks["corrected"].to_dict(), deactivation)
fit(
    Supervised(allocated),
    batches,
    adapter_steps,
    learning_rate=learning_rate,
    weight_decay=weight_decay,
    seed=seed,
)
path = save_adapter(allocated.cpu().eval(), Path(results) / "adapters" / "notebook_11.safetensors")
whole = sum(value.nbytes for value in merge_lora(copy.deepcopy(allocated)).state_dict().values())
print(
    f"adapter {path.stat().st_size / 1e3:,.0f} kB, the whole network {whole / 1e3:,.0f} kB: "
    f"{path.stat().st_size / whole:.0%}"
)
with torch.device("meta"):
    base = add_lora(
        ConvTransformer("base", classes=18),
        ranks_by_importance(dict.fromkeys(shapes, 0.0), 16, share),
    )
stored = 4 * sum(value.numel() for value in adapter_state(base).values())
print(
    f"the base backbone at rank 16 and 8: {stored / 1e6:.1f} MB beside {4 * weights / 1e6:.0f} MB"
)

# %% [markdown]
# Loaded onto the same backbone, it must give the same answers. On another backbone the same numbers would be noise, and
# nobody would notice: every shape fits. Therefore the checksum is compared, and the adapter refused.

# %%
from ecglib.lora import load_adapter

again = load_adapter(make_network(backbone, len(records.classes), seed, pretrained), path).eval()
with torch.inference_mode():
    assert torch.equal(again(signals), allocated(signals)), (
        "the adapter did not come back as it was"
    )
other = make_network(
    backbone, len(records.classes), seed, Start("self_supervised", self_supervised).weights()
)
refused = None
try:
    load_adapter(other, path)
except DataError as error:
    refused = error
assert refused is not None, "an adapter landed on another backbone"
print(refused)

# %% [markdown]
# ## Exercise
#
# A pair is not always smaller than its matrix, as the table of sizes has shown. From which rank on does the pair of the
# first `shortcut` hold more numbers than the matrix itself? Put it into `larger`. And from which rank on can the pair
# be any difference whatever? Put that into `anything`.

# %% tags=["given"]
from pathlib import Path

import torch

from ecglib.lora import adaptable_layers
from ecglib.records import Records
from ecgstudy.arms.semi_supervised import make_network

records = Records.load(Path(results) / "records").labelled
shortcut = adaptable_layers(make_network(backbone, len(records.classes), seed))[
    "blocks.0.shortcut"
].weight
print(f"weight {tuple(shortcut.shape)}: (outputs, inputs, places of the kernel)")

# %% tags=["solution"]
m, n = len(shortcut), shortcut[0].numel()
larger, anything = m * n // (m + n) + 1, min(m, n)
print(
    f"{m} x {n} is {m * n} numbers, a pair has {m + n} for each rank: more from rank {larger} on; "
    f"any difference from rank {anything} on"
)

# %% tags=["check"]
from ecgtools.answers import number

matrix = shortcut.detach().flatten(1)
sizes = [
    shared * sum(matrix.shape) for shared in range(1, matrix.numel() + 2)
]  # of a pair, from rank 1 on
expected = next(shared for shared, size in enumerate(sizes, start=1) if size > matrix.numel())
assert number(larger) == expected, "`larger` is not the first rank whose pair outweighs the matrix"
full = torch.linalg.matrix_rank(
    torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))
).item()
assert number(anything) == full, "`anything` is not the rank that a matrix of this shape can have"
print("right")

# %% [markdown]
# ## What was seen

# %%
print(f"fold 9, {note}")
print(f"without one label of the study: {unseen}")
for fraction in fractions:
    told = ", ".join(f"{name} {value:.3f}" for name, value in probed[fraction].items())
    print(f"linear probe with {fraction:.0%} of the labels: {told}")
changed = ranks.index[ranks["published"] != ranks["corrected"]]
print(
    f"{trained:,} numbers trained at rank {rank}; the corrected score changes the rank of "
    f"{', '.join(changed) or 'no layer'}"
)

# %% [markdown]
# Notebook 12 trains from these backbones with few labels and many unlabelled ECGs. Written: `run_lists/pretrained_backbones/simulated.json`
# and `run_lists/pretrained_backbones/self_supervised.json`, which name the runs below `runs/`, `adapters/notebook_11.safetensors`,
# `tables/ranks.csv` and `figures/ranks.svg`.
