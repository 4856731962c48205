# %% [markdown]
# # 10 · Fusion: do encoders know more together?
#
# **What you will learn.** Every method of notebooks 03–08 learnt something else from the same recordings. You fuse
# their frozen encoders as DVME does, a token an encoder and self-attention over the tokens, and hold it against eight
# simpler ways to use the same features. Then you ask why: how alike the encoders are, which one can be left out, and
# whether other *seeds* of one encoder would have done as well.
#
# **What it needs.** The encoders of notebooks 03–08 and the runs of notebook 09.
#
# **How long.** The `laptop` profile takes about 3 minutes on two CPU cores, half of it for one more pretraining and
# fine-tuning. The fusions themselves are trained from cached features. Finished runs are kept and opened again.

# %% tags=["parameters"]
results = "../results/laptop"  # where the earlier notebooks left records, encoders and runs
fractions = [0.01, 0.1, 1.0]  # shares of the training labels, those of notebook 09
seeds_few = 5  # label subsets at 10 % and below, as in notebook 09
seeds_many = 1  # above
supervised_encoder = "xresnet1d_narrow"  # the encoder trained from scratch that is a member too
width = 64  # of a token
heads = 4
hidden = 128  # units between the tokens and the classes
dropout = 0.1
token_dropout = 0.2  # whole encoders dropped while training
steps = 60  # training steps, the same for every fusion
batch_size = 32
learning_rates = [
    0.0001,
    0.001,
]  # one is chosen on fold 9 for each label subset, as a probe's penalty is
learning_rates_random = [0.001, 0.003]  # where a fusion starts from random weights
left_out_fractions = [0.1]  # where each member is left out once
copies = 2  # pretrainings of one method with other seeds
tuned_fractions = [1.0]  # where the encoders are trained on, too many weights for fewer labels
tuned_steps = 30
tuned_batch_size = 64
tuned_learning_rates = [0.001]  # of the fusion at these fractions, chosen on fold 9
encoder_factor = 0.1  # the encoders' learning rate, in that of the fusion
weight_decay = 0.01  # of the encoders
workers = 2  # trainings side by side, one thread each; 1 on a GPU

# %%
from pathlib import Path

from ecgstudy.arms.pretrain import pretrained_runs
from ecgstudy.study import Study

study = Study.open(results, workers)
records = study.records
pretrained = pretrained_runs(study)
note = f"{records.name}, fold 10{records.caveat}"
print(f"Scores below: {note}\nPretrained: {', '.join(pretrained)}")

# %% [markdown]
# ## The members
#
# Beside the pretrained encoders stand two controls: an encoder that was never trained, and one trained from scratch
# with labels. The latter is another one for each label subset, the one that saw just these labels; otherwise it would
# carry labels into a comparison that must not have them. Each member's features are computed once and kept.

# %%
import pandas as pd

from ecgstudy.arms.fusion import FusionData, as_member, supervised_member
from ecgstudy.arms.pretrain import Encode
from ecgstudy.runs import kept_runs
from ecgstudy.study import label_grid

subsets = label_grid(fractions, seeds_few, seeds_many)
trained = kept_runs("label_efficiency", results, records)  # of notebook 09
learnt = {name: as_member(study, run) for name, run in pretrained.items()}
crop_seconds = max(run.spec.settings["crop_seconds"] for run in pretrained.values())
members = {
    **learnt,
    "random": study.run(Encode("random", supervised_encoder, crop_seconds)),
    "supervised": supervised_member(study, trained, subsets, supervised_encoder),
}
data = FusionData(records, subsets, members)
pd.DataFrame(
    {
        "features": {name: values.shape[2] for name, values in data.features.items()},
        "encoders": {name: len(values) for name, values in data.features.items()},
    }
)

# %% [markdown]
# ## Attention over encoders
#
# Encoder $k$ says $e_k$ of a record. An own matrix brings it to a token of the same width as all others, and each
# token takes from the others what fits it:
#
# $$z_k = \mathrm{LN}(W_k e_k + b_k) + n_k, \qquad A = \mathrm{softmax}\bigl(QK^\top/\sqrt{d_h}\bigr), \qquad
# H = Z + A V W_o.$$
#
# So the mixture depends on the record. The tokens are set side by side, and two layers give the classes.

# %%
import torch

from ecglib.fusion import FusionNetwork, gather

sizes, classes = [values.shape[2] for values in data.features.values()], len(records.classes)
network = FusionNetwork([0], sizes, classes, width=width, heads=heads, hidden=hidden).eval()
few = gather([values[:1] for values in data.features.values()], torch.arange(8)[None])


def attention_by_hand(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `(1, n, members, width)` after they have looked at each other."""
    q, k, v = network.qkv(network.inner_norm(tokens)).chunk(3, dim=3)
    taken = []
    for head in torch.arange(width).chunk(heads):
        scores = (
            torch.einsum("mnid,mnjd->mnij", q[..., head], k[..., head]) / (width / heads) ** 0.5
        )
        taken.append(scores.softmax(dim=3) @ v[..., head])
    return tokens + network.mix(torch.cat(taken, dim=3))


with torch.no_grad():
    tokens = network.tokens(few)
    difference = (attention_by_hand(tokens) - network.mixed(tokens, None, None)).abs().max()
assert difference < 1e-5, difference
print(f"{tokens.shape[2]} tokens of width {tokens.shape[3]}; largest difference {difference:.1e}")

# %% [markdown]
# With so few labels a fusion is not learnt from random weights. So there is a direct path besides: at the start each
# encoder votes with its own linear probe, and the fusion is the *mean of the votes*. Training says where to depart from
# it, and the learning rate, chosen on fold 9, how far. Check: before its first step the network is that mean.

# %%
votes = [data.probes[name] for name in members]
network.start_from(
    torch.cat([vote.weights[:1] for vote in votes], dim=1),
    torch.stack([vote.bias[:1] for vote in votes], dim=1),
)
mean = sum(vote.logits["validation"][0] for vote in votes) / len(votes)
validation = torch.from_numpy(data.split["validation"])[None]
with torch.no_grad():
    start = network(gather([values[:1] for values in data.features.values()], validation))[0]
assert torch.allclose(start, mean, atol=1e-3)
print(
    f"largest difference of a logit from the mean of the probes: {(start - mean).abs().max():.1e}"
)

# %% [markdown]
# ## The comparison
#
# All see the same features, labels and patients. Without training: each encoder alone, the one that is best on fold 9,
# one logistic regression on all features side by side, the mean of the logits. Trained, from the same start, with the
# same steps and the same choice of rates: DVME; attention that is the same for all ($A = 1/K$); a softmax gate; a
# perceptron with as many parameters. And DVME from random weights, without votes.
#
# Note that this is no longer a "linear evaluation": a fusion has the parameters of several probes and a hidden layer.

# %%
from ecglib.fusion import FusionPerceptron, count_parameters, matched_hidden

shape = {"width": width, "heads": heads, "hidden": hidden}
perceptron = FusionPerceptron([0], sizes, classes, hidden=matched_hidden(sizes, classes, **shape))
counts = {
    "probe of one encoder": (sizes[0] + 1) * classes,
    "concatenation + logistic": (sum(sizes) + 1) * classes,
    "DVME": count_parameters(network),
    "matched perceptron": count_parameters(perceptron),
}
assert abs(counts["matched perceptron"] / counts["DVME"] - 1) < 0.02
pd.Series(counts, name="parameters").to_frame().style.format("{:,}")

# %%
import time
from dataclasses import replace

from ecgstudy.arms.fusion import FusionSettings
from ecgstudy.methods import TrainedFusion, fuse, names_of

settings = FusionSettings(
    **shape,
    dropout=dropout,
    token_dropout=token_dropout,
    steps=steps,
    batch_size=batch_size,
    learning_rates=learning_rates,
)
from_random = replace(settings, learning_rates=learning_rates_random)
runs, started = [], time.perf_counter()
for method in (*names_of(TrainedFusion), "best_single", "concatenation", "mean_of_logits"):
    own = from_random if method == "dvme_random_start" else settings
    runs += fuse(study, data, method, own)
for name in members:
    runs += fuse(study, data, "alone", settings, [name])
print(f"{len(runs)} runs in {time.perf_counter() - started:.0f} s")

# %%
from ecgstudy.analysis.summary import seed_summary

from ecgstudy.results import interval_table

CELL = ("method", "members", "protocol", "data", "labels", "fraction")
table = seed_summary(runs, records, cell=CELL)
table["fusion"] = table["method"].where(table["method"] != "alone", "alone: " + table["members"])
shown = interval_table(table, "fusion")
shown.style.set_caption(f"Macro AUROC, frozen encoders, mean over label subsets: {note}")

# %% [markdown]
# ## What DVME gains, paired
#
# The same labels and patients on both sides. Fusion counts as *supported* at a fraction only where DVME is above the
# best single encoder **and** above one logistic regression on everything, both with an interval that excludes zero.

# %%
from ecgstudy.analysis.gains import fusion_gains, plot_gains
from ecgstudy.results import save_figure

gains = fusion_gains([run for run in runs if run.spec.method != "alone"], records)
figure = plot_gains(gains, title=f"What DVME gains in macro AUROC: {note}")
save_figure(figure, "fusion_gains", results)
figure

# %%
supported = {}
for fraction, rows in gains.groupby("fraction"):
    found = rows.set_index("over").loc[["best_single", "concatenation"]]
    supported[fraction] = bool((found["low"] > 0).all())
    word = "supported" if supported[fraction] else "NOT supported"
    told = [
        f"over {row.Index} {row.gain:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
        for row in found.itertuples()
    ]
    print(f"{fraction:4.0%}: fusion is {word}: {'; '.join(told)}")

# %% [markdown]
# ## Diversity or capacity?
#
# Does a fusion gain because encoders differ, or because there are many? Fused are `copies` pretrainings of one method,
# the best on fold 9 at 10 % of the labels, with other seeds; beside them, as many *different* methods, the best ones.

# %%
from ecglib.selfsup import Pretraining
from ecgstudy.methods import pretraining

alone = [
    run for run in runs if run.spec.method == "alone" and run.spec.settings["members"] in learnt
]
looked = seed_summary(alone, records, "validation", CELL)
at = min(fractions, key=lambda fraction: abs(fraction - 0.1))
order = list(looked[looked["fraction"] == at].sort_values("value", ascending=False)["members"])
best = pretrained[order[0]]
same = {order[0]: learnt[order[0]]}
for seed in range(best.spec.seed + 1, best.spec.seed + copies):
    again = study.run(pretraining(order[0], Pretraining.of(best.spec.settings), seed))
    same[f"{order[0]}_seed{seed}"] = as_member(study, again)

# %%
seeds_of_one = fuse(study, FusionData(records, subsets, same), "dvme", settings)
best_ones = fuse(study, data, "dvme", settings, order[:copies])
diversity = seed_summary([*seeds_of_one, *best_ones], records, cell=CELL)
shown = diversity.pivot(index="members", columns="fraction", values="value").rename(
    columns="{:.0%}".format
)
shown.style.format(precision=3).set_caption(f"DVME of {copies} tokens, macro AUROC: {note}")

# %%
differ = fusion_gains([*best_ones, *seeds_of_one], records)
for row in differ.itertuples():
    word = "diversity helps" if row.low > 0 else "diversity harms" if row.high < 0 else "no finding"
    print(
        f"{row.fraction:4.0%}: different methods over other seeds {row.gain:+.3f} [{row.low:+.3f}, {row.high:+.3f}] "
        f"{word}"
    )

# %% [markdown]
# ## Who can be left out?
#
# DVME again without each member. A positive difference: the member helped. The supervised one has already been fitted
# to these labels; its features may look better on them than they are.

# %%
left = [subset for subset in subsets if subset.fraction in left_out_fractions]
fewer = []
for name in members:
    others = [other for other in members if other != name]
    fewer += fuse(study, data, "dvme", settings, others, left)
missing = fusion_gains([run for run in runs if run.spec.method == "dvme"] + fewer, records)
missing["without"] = [
    "".join(set(members) - set(names.split("+"))) for names in missing["over_members"]
]
interval_table(missing, "without", value="gain", form="+.3f")

# %% [markdown]
# ## How alike are the encoders?
#
# Linear CKA compares which records two encoders hold to be alike: with centred features $X$ and $Y$ of the same
# records, $\|Y^\top X\|_F^2 / (\|X^\top X\|_F\,\|Y^\top Y\|_F)$. It is 1 where one is a turned copy of the other.

# %%
from ecglib.fusion import linear_cka
from ecgstudy.analysis.fusion import plot_similarity

pool = {name: values[-1][data.split["train"]] for name, values in data.features.items()}


def cka_by_hand(x: torch.Tensor, y: torch.Tensor) -> float:
    """The same from similarities of records, `(n, n)`, instead of features."""
    first, second = ((z - z.mean(dim=0)).double() for z in (x, y))
    k, m = first @ first.T, second @ second.T
    return float((k * m).sum() / ((k * k).sum() * (m * m).sum()) ** 0.5)


similarity = pd.DataFrame({a: {b: linear_cka(pool[a], pool[b]) for b in pool} for a in pool})
one, other = list(pool)[:2]
assert abs(cka_by_hand(pool[one], pool[other]) - similarity.loc[one, other]) < 1e-6
figure = plot_similarity(similarity, f"Similarity of encoders: {records.name}, training records")
save_figure(figure, "encoder_similarity", results)
figure

# %% [markdown]
# ## What does each token count?
#
# Two answers that need not agree. *Attention* received is how much the tokens take from a member; but a large weight
# on a small value says little. *Gradient × input* is the share that a member has in a class's logit, to first order,
# votes included. Where attention is even and the other is not, attention explains nothing.

# %%
from ecgstudy.analysis.fusion import plot_token_weights

names = {"tokens/attention": "attention received", "tokens/gradient_input": "gradient × input"}
told = [run for run in runs if run.spec.method == "dvme" and run.spec.fraction == at]
kept = [run.predictions() for run in told]
shares = pd.DataFrame(
    [
        {
            "measure": measure,
            "class": label,
            "member": member,
            "share": sum(each[key][row, column] for each in kept) / len(kept),
        }
        for key, measure in names.items()
        for row, label in enumerate(records.classes)
        for column, member in enumerate(members)
    ]
)
totals = (
    shares.groupby(["measure", "class"])["share"].sum().loc[lambda total: total > 0]
)  # 0: no record of a class
assert ((totals - 1).abs() < 1e-4).all(), totals
figure = plot_token_weights(
    shares, f"{at:.0%} of the labels, {records.name}, fold 9{records.caveat}"
)
save_figure(figure, "token_weights", results)
figure

# %% [markdown]
# ## Fine-tuned
#
# From 10 % of the labels on, the encoders are trained too, starting from the frozen fusion of the same labels, with
# `encoder_factor` times its learning rate. The control is the best fine-tuned encoder of notebook 09, chosen on fold
# 9; its steps were more, as printed, for a step of the fusion trains all encoders. The augmentation is that of notebook
# 09.

# %%
from ecglib.supervised import Training
from ecgstudy.arms.fusion import TunedFusion

rates = dict(zip(tuned_fractions, tuned_learning_rates, strict=True))
training = Training(
    encoder="+".join(members),
    steps=tuned_steps,
    batch_size=tuned_batch_size,
    crop_seconds=crop_seconds,
    learning_rate=tuned_learning_rates[0],
    weight_decay=weight_decay,
    transforms=next(
        run.spec.settings["transforms"] for run in trained if "transforms" in run.spec.settings
    ),
)
frozen = dict(zip(subsets, [run for run in runs if run.spec.method == "dvme"], strict=True))
tuned = study.grid(
    TunedFusion(
        subset,
        frozen[subset],
        {name: data.members[name][subset] for name in members},
        replace(training, learning_rate=rates[subset.fraction]),
        encoder_factor,
    )
    for subset in subsets
    if subset.fraction in rates
)

# %%
from ecglib.evaluate.draws import paired_difference
from ecgstudy.analysis.summary import seed_scores

singles = [run for run in trained if run.spec.value("protocol") == "fine-tuned"]
of_singles = seed_summary(singles, records, "validation", ("method", "fraction")).sort_values(
    "value"
)
scores = {
    "DVME": seed_scores(tuned, cell=("fraction",)),
    "frozen": seed_scores(frozen.values(), cell=("fraction",)),
}
targets, patients = records.split_truth("test")
for (fraction,), ours in sorted(scores["DVME"].items()):
    top = of_singles[of_singles["fraction"] == fraction].iloc[-1]["method"]
    single = seed_scores(singles, cell=("method", "fraction"))[top, fraction]
    spent = {
        run.spec.settings["steps"]
        for run in singles
        if (run.spec.method, run.spec.fraction) == (top, fraction)
    }
    controls = {
        "DVME with frozen encoders": scores["frozen"][fraction,],
        f"{top}, {max(spent)} steps": single,
    }
    for name, theirs in controls.items():
        gain = paired_difference(targets, ours, theirs, patients, classes=records.classes)
        print(
            f"{fraction:.0%}, {tuned_steps} steps: over {name} {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        )

# %%
from ecgstudy.results import save_table
from ecgstudy.runs import keep_runs, tidy

keep_runs(runs, "fusion", results)  # for notebook 15
every = [*runs, *seeds_of_one, *best_ones, *fewer, *tuned]
rows = tidy((row for run in every for row in run.rows()), extra=("protocol", "members"))
summary = seed_summary(every, records, cell=CELL)
gains = fusion_gains(every, records)
for filename, frame in {"fusion": rows, "fusion_summary": summary, "fusion_gains": gains}.items():
    save_table(frame, filename, results)
print(f"{len(rows):,} rows of {len(every)} runs")

# %% [markdown]
# ## Exercise
#
# If someone told you for each class which encoder to trust, how much better than the best single encoder could you be?
# At the smallest fraction, put the best encoder of each class on fold 9 into `trusted`, by the name of the metric, and
# the one with the best mean over classes into `single`. Put what trusting gains on fold 10 into `gain`, as a mean over
# classes.

# %% tags=["given"]
from pathlib import Path

import pandas as pd

alone = pd.read_csv(Path(results) / "tables" / "fusion.csv")
alone = alone[(alone["method"] == "alone") & (alone["fraction"] == alone["fraction"].min())]
alone = alone[alone["metric"].str.startswith("auroc:")]

# %% tags=["solution"]
by_class = alone.groupby(["split", "members", "metric"])["value"].mean().unstack()
trusted, single = (
    by_class.loc["validation"].idxmax(),
    by_class.loc["validation"].mean(axis=1).idxmax(),
)
read = by_class.loc["test"]
gain = (
    sum(read.loc[member, metric] for metric, member in trusted.items()) / len(trusted)
    - read.loc[single].mean()
)
print(f"told which to trust {gain:+.3f} over {single}\n{trusted.to_dict()}")

# %% tags=["check"]
from ecgtools.answers import number

scored = {
    (fold, member, metric): float(group["value"].mean())
    for (fold, member, metric), group in alone.groupby(["split", "members", "metric"])
}
names, asked = alone["members"].unique(), alone["metric"].unique()
known = pd.Series(trusted, dtype=object).to_dict()
assert sorted(map(str, known)) == sorted(asked), (
    "`trusted` must name an encoder for each `auroc:CLASS`"
)
best = {metric: max(scored["validation", member, metric] for member in names) for metric in asked}
told = [
    scored.get(("validation", known[metric], metric), 0) >= best[metric] - 1e-9 for metric in asked
]
assert all(told), "`trusted` does not name the best encoder of each class on fold 9"
means = {member: sum(scored["validation", member, metric] for metric in asked) for member in names}
first = isinstance(single, str) and means.get(single, 0) >= max(means.values()) - 1e-9
assert first, "`single` is not the encoder with the best mean over classes on fold 9"
rise = [scored["test", known[metric], metric] - scored["test", single, metric] for metric in asked]
assert abs(number(gain) - sum(rise) / len(rise)) < 1e-9, (
    "`gain` is not the mean difference over classes on fold 10"
)
print("right")

# %% [markdown]
# ## What was seen

# %%
for fraction in fractions:
    cell = table[table["fraction"] == fraction].set_index("fusion")["value"]
    print(
        f"{fraction:4.0%}: DVME {cell['dvme']:.3f}, best single {cell['best_single']:.3f}, concatenation "
        f"{cell['concatenation']:.3f}, mean of logits {cell['mean_of_logits']:.3f}; fusion is "
        f"{'supported' if supported[fraction] else 'NOT supported'}"
    )

# %% [markdown]
# Written: `tables/fusion.csv`, `tables/fusion_summary.csv`, `tables/fusion_gains.csv`, `figures/fusion_gains.svg`,
# `figures/encoder_similarity.svg`, `figures/token_weights.svg`.
