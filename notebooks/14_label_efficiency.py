# %% [markdown]
# # 14 · How many labels are enough?
#
# **What you will learn.** How to read a label-efficiency curve, and how to answer the question of this study with an
# interval: with how many labels does a pretrained network reach what supervised training reaches with all of them?
#
# **What it needs.** The tables and runs of notebook 09.
#
# **How long.** About a minute. Nothing is trained.

# %% tags=["parameters"]
results = "../results/laptop"  # where notebook 09 left its tables and runs
draws = 1000  # patient samples behind each interval

# %%
from pathlib import Path

import pandas as pd

from ecglib.records import Records

records = Records.load(Path(results) / "records").labelled
split = records.split
note = f"{records.name}, fold 10{records.caveat}"
summary = pd.read_csv(Path(results) / "tables" / "label_efficiency_summary.csv")
fractions = sorted(summary["fraction"].unique())
print(
    f"{note}: {len(summary)} arms and fractions, {summary['seeds'].min()} to {summary['seeds'].max()} subsets each"
)

# %% [markdown]
# ## The curves
#
# Left: encoders as they are, with a linear probe. Right: the same encoders, everything trained. The black line is the
# control, the same network trained from scratch with the same augmentation and number of steps; the grey one was never
# trained at all. The horizontal axis is logarithmic: each step to the right costs a cardiologist many hours.

# %%
from ecgstudy.analysis.label_curve import plot_label_efficiency
from ecgstudy.results import save_figure

figure = plot_label_efficiency(summary, len(split["train"]), f"Label efficiency: {note}")
save_figure(figure, "label_efficiency", results)
figure

# %% [markdown]
# ## "x % of the labels suffice"
#
# Take the level that supervised training reaches with *all* labels, and ask where each curve first crosses it. Between
# two fractions the curve is taken as straight over the logarithm of the fraction. The test patients are a sample, so
# the question is asked again on a thousand samples of them: the interval holds the middle 95 % of the answers.
#
# On a toy curve that rises from 0.70 at 1 % to 0.90 at 100 %, a level of 0.80 lies halfway in the logarithm: at 10 %.

# %%
from ecglib.evaluate.draws import first_reached

assert abs(first_reached([0.01, 1.0], [0.70, 0.90], 0.80) - 0.1) < 1e-9
assert first_reached([0.01, 1.0], [0.70, 0.90], 0.95) == float("inf"), (
    "a level never reached takes infinitely many"
)
first_reached([0.01, 1.0], [0.70, 0.90], 0.80)

# %%
from ecgstudy.results import save_table
from ecgstudy.analysis.label_curve import labels_needed_table
from ecgstudy.runs import kept_runs

runs = kept_runs("label_efficiency", results, records)
needed = labels_needed_table(runs, records, draws)
save_table(needed, "labels_needed", results)
needed.style.format(precision=3).hide(axis="index").set_caption(
    f"Share of the labels needed: {note}"
)

# %% [markdown]
# `inf` means that the level is not reached with all labels, in the measured data (`needed`) or in more than 2.5 % of
# the patient samples (`high`). The level is that of the same encoder trained from scratch with all labels.

# %%


def in_words(row) -> str:
    """The answer as a sentence."""
    arm = f"{row.method} ({row.encoder}, {row.protocol})"
    if row.needed == float("inf"):
        return f"{arm} does not reach the supervised level of {row.goal:.3f}."
    high = "not reached" if row.high == float("inf") else f"{row.high:.0%}"
    return f"{arm}: {row.needed:.0%} of the labels suffice for {row.goal:.3f} (interval {row.low:.0%} to {high})."


print("\n".join(in_words(row) for row in needed.itertuples()))

# %% [markdown]
# ## The gain over training from scratch
#
# The same labels, the same patients, the same encoder: what is left is the start. A bar that crosses zero is no
# finding.

# %%
from ecgstudy.analysis.gains import plot_gains

gains = pd.read_csv(Path(results) / "tables" / "label_efficiency_gains.csv")
figure = plot_gains(
    gains[gains["over"] == "supervised"],
    row="arm",
    colour="protocol",
    title=f"Gain over supervised training from scratch: {note}",
)
save_figure(figure, "label_efficiency_gains", results)
figure

# %% [markdown]
# ## Check: nested subsets
#
# A curve is only fair if a larger label set contains each smaller one, and no test patient is among them.

# %%
kept = {
    run.spec.fraction: set(run.predictions()["labelled"].tolist())
    for run in runs
    if run.spec.seed == 0 and run.spec.value("protocol") == "supervised"
}
patients = records.table["patient_id"]
tested = set(patients.iloc[split["test"]])
for smaller, larger in zip(fractions, fractions[1:]):
    assert kept[smaller] <= kept[larger], (smaller, larger)
assert not tested & set(patients.iloc[sorted(kept[fractions[-1]])])
print(" ⊂ ".join(f"{len(kept[fraction])} records" for fraction in fractions))

# %% [markdown]
# ## Exercise
#
# A colleague can pay for 5 % of the labels. What does the choice of method and protocol gain or cost? Put the largest
# fraction up to 5 %, or the smallest there is, into `affordable`. At this fraction, put what each arm has over the same
# encoder trained from scratch, in macro AUROC, into `gain`, by `(method, encoder, protocol)`; and how many arms lie
# below it into `below`.

# %% tags=["given"]
from pathlib import Path

import pandas as pd

curves = pd.read_csv(Path(results) / "tables" / "label_efficiency_summary.csv")
shares = sorted(curves["fraction"].unique())

# %% tags=["solution"]
affordable = max(share for share in shares if share <= 0.05 or share == shares[0])
choice = curves[curves["fraction"] == affordable].set_index(["method", "encoder", "protocol"])[
    "value"
]
scratch = choice.xs("supervised", level="protocol").droplevel("method")
pretrained = choice.drop(index="supervised", level="protocol")
gain = (pretrained - scratch.reindex(pretrained.index, level="encoder")).sort_values(
    ascending=False
)
below = int((gain < 0).sum())
print(
    f"{100 * affordable:g} % of the labels: {below} of {len(gain)} arms lie below training from scratch"
)
gain.head(8).round(3)

# %% tags=["check"]
from ecgtools.answers import number

within = [share for share in shares if share <= 0.05] or shares[:1]
assert number(affordable) == within[-1], (
    "`affordable` is not the largest fraction that 5 % of the labels pay for"
)
paired = pd.read_csv(Path(results) / "tables" / "label_efficiency_gains.csv")
paired = paired[(paired["over"] == "supervised") & (paired["fraction"] == within[-1])]
told = dict(gain) if hasattr(gain, "keys") else {}
for line in paired.itertuples():
    own = number(told.get((line.method, line.encoder, line.protocol)))
    assert abs(own - line.gain) < 1e-6, (
        f"`gain` is wrong or missing for {line.method}, {line.encoder}, {line.protocol}"
    )
assert number(below) == (paired["gain"] < 0).sum(), (
    "`below` is not the number of arms below training from scratch"
)
print("right")

# %% [markdown]
# ## What was seen

# %%
for fraction in fractions:
    cell = summary[summary["fraction"] == fraction].sort_values("value")
    top, control = cell.iloc[-1], cell[cell["protocol"] == "supervised"].iloc[-1]
    best = f"{top['method']}, {top['protocol']} {top['value']:.3f}"
    print(f"{fraction:4.0%}: {best}; from scratch {control['value']:.3f}")

# %% [markdown]
# Written: `tables/labels_needed.csv`, `figures/label_efficiency.svg`, `figures/label_efficiency_gains.svg`.
