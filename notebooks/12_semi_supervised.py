# %% [markdown]
# # 12 · A few labels and many recordings
#
# **What you will learn.** Three ways to let recordings without labels take part in training: through batch norm alone
# (CE-SSL), through labels that the network gives itself (FixMatch and its family), and through a slow copy of the
# network (MixedTeacher). You write the idea of the first two in a few lines, compare twelve methods on the same
# backbone, and set what they reach against what they cost.
#
# **What it needs.** The records of notebook 00 and the backbones of notebook 11.
#
# **How long.** The `laptop` profile takes about 25 minutes on two CPU cores. Finished runs are kept and opened again.

# %% tags=["parameters"]
results = "../results/laptop"  # where notebooks 00 and 11 left records and backbones
label_fractions = [0.05]  # the paper's are 5, 10 and 15 %
seeds = 5  # label subsets of each fraction
backbone = "conv_transformer_small"  # that of notebook 11
start = "simulated"  # the backbone that all methods start from
methods = [
    "ce_ssl",
    "ce_ssl_without_deactivation",
    "ce_ssl_without_allocation",
    "ce_ssl_without_norm",
    "supervised_cutmix",
    "fixmatch",
    "mixed_teacher",
]  # ce_ssl, supervised_cutmix and fixmatch are always needed
steps = 40  # the same for every method
batch_size = 32  # labelled records a step
ratio = 1  # unlabelled records for each labelled one
crop_seconds = 2.5
learning_rate = 0.001  # where every weight is trained, chosen on folds 8 and 9
low_rank_learning_rate = 0.003  # where low-rank pairs are trained, chosen there too
weight_decay = 0.01
rank = 8
share = 0.2  # of the layers that get the full rank, the same for every data set
score = "corrected"  # see notebook 11
deactivation = 0.2
threshold = 0.95  # of FixMatch's confidence
costed = ["ce_ssl", "supervised_cutmix", "fixmatch"]  # whose cost is measured
cost_iterations = 3  # iterations measured for each of them
workers = 2  # trainings side by side, one thread each; 1 on a GPU

# %%
from pathlib import Path

from ecglib.labels import label_subsets
from ecgstudy.arms.starts import kept_starts
from ecgstudy.study import Study

study = Study.open(results, workers)
records = study.records
split = records.split
starts = kept_starts(results)
note = f"{records.name}, fold 10{records.caveat}"
print(f"Scores below: {note}\nBackbones: {', '.join(starts)}, and random")

# %% [markdown]
# ## Batch norm that sees unlabelled records
#
# Batch norm brings every channel $c$ to mean 0 and variance 1, with the mean and variance of the batch. A batch of few
# labelled records tells little about the channel's true spread, and the same few come again and again. CE-SSL lets
# unlabelled records $u$ stand in the batch beside the labelled ones $x$, and drops them afterwards:
#
# $$\mu_c = \operatorname{mean}_{x \cup u,\,t}\, h_c, \qquad \sigma_c^2 = \operatorname{var}_{x \cup u,\,t}\, h_c.$$
#
# There is no pseudo-label, no threshold, no second network. Written out, for any number of unlabelled records:

# %%
import torch

from ecglib.batches import SemiBatches
from ecglib.semisup.ce_ssl import first_features
from ecgstudy.arms.semi_supervised import make_network

labelled = label_subsets(records, label_fractions, seed=0)[label_fractions[0]]
unlabelled = [place for place in split["train"] if place not in set(labelled)]
batches = SemiBatches(records, labelled, unlabelled, batch_size, ratio, crop_seconds, seed=0)
batch = batches(0)
network = make_network(backbone, len(records.classes), 0, starts[start].weights()).train()


def joint_norm(labelled: torch.Tensor, unlabelled: torch.Tensor) -> torch.Tensor:
    """Labelled activations `(n, channels, time)`, normalised by the statistics of both."""
    both = torch.cat([labelled, unlabelled])
    mean, variance = both.mean(dim=(0, 2)), both.var(dim=(0, 2), correction=0)
    return (labelled - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()


first = network.blocks[0].first
with torch.no_grad():
    inner, outer = first(batch.signals), first(batch.unlabelled)
    by_hand = joint_norm(inner, outer)
    layer = torch.nn.BatchNorm1d(inner.shape[1])
    by_torch = layer(torch.cat([inner, outer]))[: len(inner)]
assert torch.allclose(by_hand, by_torch, atol=1e-4)
print(
    f"{len(labelled)} labelled and {len(unlabelled):,} unlabelled records; largest difference "
    f"{(by_hand - by_torch).abs().max():.1e}"
)

# %% [markdown]
# Check: the unlabelled records change the features of the labelled ones, and no unlabelled record reaches the head.

# %%
with torch.no_grad():
    alone = first_features(network, batch.signals, len(batch.signals))
    together = first_features(
        network, torch.cat([batch.signals, batch.unlabelled]), len(batch.signals)
    )
assert together.shape == alone.shape and not torch.allclose(together, alone)
print(
    f"features {tuple(together.shape)}, changed by {(together - alone).norm() / alone.norm():.1%}"
)

# %% [markdown]
# ## Labels that the network gives itself
#
# FixMatch shows an unlabelled record twice. What the network says of a weakly changed view, where it is sure, is the
# label of a strongly changed one. With probability $p_{nc}$ of record $n$ and class $c$, and confidence
# $q_{nc} = \max(p_{nc}, 1 - p_{nc})$,
#
# $$L_u = \frac1{NC} \sum_{n,c} \mathbb 1[q_{nc} \ge \tau]\; \mathrm{BCE}\bigl(z^{\text{strong}}_{nc},
# \mathbb 1[p_{nc} > \tfrac12]\bigr).$$
#
# FlexMatch lowers $\tau$ for classes that are rarely sure, SoftMatch weighs with a bell curve instead of a threshold.

# %%
from ecglib.augment import strong_view, weak_view
from ecglib.semisup.fixmatch import FixedThreshold, pseudo_label_loss


def by_hand_loss(strong: torch.Tensor, sure: torch.Tensor) -> torch.Tensor:
    """FixMatch's loss of logits of strong views, with the probabilities of weak views."""
    passes = torch.maximum(sure, 1 - sure) >= threshold
    said = torch.where(sure > 0.5, strong, -strong)  # the logit of what was said of the weak view
    return (passes * torch.log1p(torch.exp(-said))).mean()


with torch.no_grad():
    sure = torch.sigmoid(network(weak_view(batch.unlabelled, batch.generator)))
    strong = network(strong_view(batch.unlabelled, batch.generator))
weights = FixedThreshold(threshold)(sure, batch.unlabelled_indices)
difference = float(by_hand_loss(strong, sure) - pseudo_label_loss(strong, sure, weights))
assert abs(difference) < 1e-5, difference
print(f"{weights.mean():.0%} of the answers pass at the start, before the head has learnt anything")

# %% [markdown]
# ## Who is split from whom
#
# CE-SSL's paper splits by *record*: the same patient may train and be tested. This study splits by patient, and the
# difference can be counted: if a tenth of these records were drawn for the test at random, how many of them would have
# another record of their patient outside?

# %%
from ecglib.errors import DataError
from ecglib.labels import patients_shared

try:
    shared, leaking = patients_shared(records)
    print(
        f"split by record: {shared:.1f} patients on both sides, {leaking:.1%} of the test records; by patient: none"
    )
except DataError as error:
    print(error)

# %% [markdown]
# ## The grid
#
# All `methods` have the same backbone, start, label subsets, batches, steps and schedule. Those that train every weight
# have one learning rate, those that train low-rank pairs another. *Ablations* take one part of CE-SSL away at a time.
# A linear probe on the frozen backbone stands beside them.

# %%
from ecglib.semisup import Adaptation
from ecgstudy.arms.semi_supervised import Start
from ecgstudy.arms.starts import frozen_start
from ecgstudy.methods import adapted
from ecgstudy.study import label_grid

subsets = label_grid(label_fractions, seeds, seeds)
adaptation = Adaptation(
    backbone=backbone,
    steps=steps,
    batch_size=batch_size,
    crop_seconds=crop_seconds,
    learning_rate=learning_rate,
    low_rank_learning_rate=low_rank_learning_rate,
    weight_decay=weight_decay,
    ratio=ratio,
    rank=rank,
    share=share,
    score=score,
    deactivation=deactivation,
    threshold=threshold,
)


def runs_from(start: Start, names: list[str]) -> list:
    """The runs of some methods from one start, and of the probe, for every label subset."""
    probes = frozen_start(study, start, backbone, crop_seconds, subsets)
    trained = study.grid(adapted(names, start, subsets, adaptation))
    return trained + study.grid(probes, workers=1, progress_bar=False)


runs = runs_from(starts[start], methods)

# %% [markdown]
# ## The table

# %%
from ecgstudy.analysis.summary import seed_summary
from ecgstudy.results import interval_table, save_table

CELL = ("method", "backbone", "start", "data", "labels", "fraction")
summary = seed_summary(runs, records, cell=CELL)
interval_table(summary, "method").style.set_caption(f"Macro AUROC from the {start} start: {note}")

# %% [markdown]
# ## CE-SSL against each, paired
#
# The same labels and the same patients on both sides. A bar that crosses zero is no finding.

# %%
from ecgstudy.analysis.gains import plot_gains, semi_supervised_gains
from ecgstudy.results import save_figure

gains = semi_supervised_gains(runs, records)
save_table(gains, "semi_supervised_gains", results)
figure = plot_gains(gains, panel="metric", colour="fraction", title=f"What CE-SSL gains: {note}")
save_figure(figure, "semi_supervised_gains", results)
figure

# %%
for row in gains[gains["metric"] == "macro_auroc"].itertuples():
    word = "gains" if row.low > 0 else "loses" if row.high < 0 else "no finding"
    print(
        f"{row.fraction:4.0%}, over {row.over}: {row.gain:+.3f} [{row.low:+.3f}, {row.high:+.3f}] {word}"
    )

# %% [markdown]
# ## Which pseudo-labels pass?
#
# The share of the unlabelled (record, class) answers that are sure enough, at the end of training, and of those that
# say yes. Where nearly all pass, the threshold is no filter; where no yes passes, rare classes learn from noes alone.

# %%
import pandas as pd

passed = pd.DataFrame(
    [
        {
            "method": run.spec.method,
            "fraction": run.spec.fraction,
            "passed": run.about["notes"]["history"][-1]["passed"],
            "of the yeses": run.about["notes"]["history"][-1]["passed_positive"],
        }
        for run in runs
        if "passed" in run.about["notes"].get("history", [{}])[-1]
    ]
)
passed.groupby(["method", "fraction"]).mean().style.format("{:.0%}").set_caption(
    "Mean over label subsets"
)

# %% [markdown]
# ## Where should the backbone come from?
#
# Three starts for the same network: random, self-supervised on this study's training signals, and trained with the
# labels of simulated patients (or of `backbone_data` in notebook 11). And a fourth question: what does the simulated
# backbone know of these records without one of their labels?

# %%
others = [Start("random"), *(other for name, other in starts.items() if name != start)]
compared = ["supervised_cutmix", "ce_ssl"]
from_starts = [run for other in others for run in runs_from(other, compared)]
wanted = [run for run in runs if run.spec.method in (*compared, "frozen")]
by_start = seed_summary(wanted + from_starts, records, cell=CELL)
shown = interval_table(by_start, ["start", "method"])
shown.style.set_caption(f"Macro AUROC: {note}")

# %%
from ecglib.evaluate.draws import bootstrap_interval
from ecgstudy.arms.starts import without_real_labels

truth, patients = records.split_truth("test")
try:
    told = without_real_labels(starts["simulated"], records, split["test"])
    none = bootstrap_interval(truth, told, patients, classes=records.classes)
    print(f"without any label of these records: {none.value:.3f} [{none.low:.3f}, {none.high:.3f}]")
except DataError as error:
    print(error)

# %%
from ecgstudy.runs import keep_runs, tidy

keep_runs(runs + from_starts, "semi_supervised", results)  # for the notebooks that follow
rows = tidy((row for run in runs + from_starts for row in run.rows()), extra=("backbone", "start"))
every = seed_summary(runs + from_starts, records, cell=CELL)
for filename, frame in {"semi_supervised": rows, "semi_supervised_summary": every}.items():
    save_table(frame, filename, results)
print(f"{len(rows):,} rows of {len(runs + from_starts)} runs")

# %% [markdown]
# ## What does it cost?
#
# Some methods for a few iterations each in a process of their own, on this machine and this backbone. FlexMatch and
# SoftMatch cost what FixMatch does. `saved_activation_bytes`
# is what must be kept for the backward pass, which is the same on every machine; `stored_bytes` is the file that this
# task needs besides the backbone, or instead of it. At the published size, see `benchmarks/ce_ssl_step.py`.

# %%
from ecgstudy.analysis.cost import plot_cost
from ecgstudy.analysis.cost import measure_apart
from ecgstudy.methods import METHODS

samples = round(crop_seconds * records.sampling_rate)
size = (len(records.classes), samples, cost_iterations, study.device)
costs = pd.DataFrame(
    measure_apart(method, METHODS[method].recipe, adaptation, *size) for method in costed
)
save_table(costs, "adaptation_cost", results)
smallest = summary[summary["fraction"] == label_fractions[0]]
figure = plot_cost(costs, smallest, f"{label_fractions[0]:.0%} of the labels: {note}")
save_figure(figure, "adaptation_cost", results)
figure

# %%
costs.drop(columns=["backbone", "machine"]).style.format(precision=3, thousands=",").hide(
    axis="index"
).set_caption(costs["machine"].iloc[0])

# %% [markdown]
# ## Exercise
#
# CE-SSL has three parts. Which one can be left out at least cost in macro F2 with the fewest labels? The cost is what
# CE-SSL gains over the network without it. Put the name in the column `over` into `part`, the cost into `cost`, and
# whether its interval excludes zero into `sure`.

# %% tags=["given"]
from pathlib import Path

import pandas as pd

compared = pd.read_csv(Path(results) / "tables" / "semi_supervised_gains.csv")
fewest = compared["fraction"].min()

# %% tags=["solution"]
parts = compared[
    compared["over"].str.startswith("ce_ssl_without") & (compared["metric"] == "macro_f2")
]
parts = parts[parts["fraction"] == fewest].sort_values("gain")
part, cost = parts.iloc[0][["over", "gain"]]
sure = bool(parts["low"].iloc[0] > 0 or parts["high"].iloc[0] < 0)
parts[["over", "gain", "low", "high"]].round(3)

# %% tags=["check"]
from ecgtools.answers import number

lines = {
    line.over: line
    for line in compared.itertuples()
    if (line.fraction, line.metric) == (fewest, "macro_f2")
}
costs = {name: line.gain for name, line in lines.items() if name.startswith("ce_ssl_without")}
assert part in list(costs), "`part` is none of CE-SSL's parts: name it as the column `over` does"
assert all(costs[part] <= other for other in costs.values()), "another part costs less in macro F2"
assert abs(number(cost) - costs[part]) < 1e-9, (
    "`cost` is not what CE-SSL gains over the network without this part"
)
outside = not lines[part].low <= 0 <= lines[part].high
assert sure in (True, False) and bool(sure) == outside, (
    "`sure` does not say whether the interval excludes zero"
)
print("right")

# %% [markdown]
# ## What was seen

# %%
for fraction in label_fractions:
    cell = every[every["fraction"] == fraction].sort_values("value")
    top, ours = cell.iloc[-1], cell[(cell["method"] == "ce_ssl") & (cell["start"] == start)].iloc[0]
    print(
        f"{fraction:.0%}: best is {top['method']} from the {top['start']} start, {top['value']:.3f} "
        f"[{top['low']:.3f}, {top['high']:.3f}]; CE-SSL {ours['value']:.3f}"
    )

# %% [markdown]
# Written: `tables/semi_supervised.csv`, `tables/semi_supervised_summary.csv`, `tables/semi_supervised_gains.csv`,
# `tables/adaptation_cost.csv`, `figures/semi_supervised_gains.svg`, `figures/adaptation_cost.svg`.
