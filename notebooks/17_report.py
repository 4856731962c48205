# %% [markdown]
# # 17 · The report
#
# **What you will learn.** What the study has found, in tables, beside the figures that papers have printed where such
# figures exist: which claims agree, which do not, and which could not be told.
#
# **What it needs.** The tables of the notebooks before it. A missing table is named with the notebook that makes it.
#
# **How long.** A few seconds. No GPU is used.

# %% tags=["parameters"]
results = "../results/laptop"  # where the tables lie
published = "../data/published"  # figures printed in papers, one a row, with their source

# %%
from pathlib import Path

import pandas as pd

from ecglib.files import read_json
from ecgstudy.results import interval_table, save_table

about = read_json(Path(results) / "records" / "records.json")["about"]
kind = (
    "SIMULATED records: these figures say nothing about patients"
    if about["simulated"]
    else "real recordings"
)
if about.get("subset"):
    kind += f", {about['version']}: not comparable with published tables"
print(f"{about['source']}, label set {about['task']!r}: {kind}")

# %% [markdown]
# ## Which parts of the study are there
#
# A part that has not been run is not filled in: its row says which notebook to run.

# %%
from ecgstudy.analysis.claims import PARTS, report_tables

there = {name: (Path(results) / "tables" / f"{name}.csv").exists() for name in PARTS}
status = pd.DataFrame(
    {
        "table": list(PARTS),
        "notebook": list(PARTS.values()),
        "state": ["there" if there[name] else f"run {PARTS[name]}" for name in PARTS],
    }
)
status

# %%
tables = report_tables(results)  # stops here with the notebooks to run, where a table is missing
origin = (
    "simulated"
    if about["simulated"]
    else "reproduced on the subset"
    if about.get("subset")
    else "measured"
)
print(f"{len(tables)} tables; figures of this run are {origin}")

# %% [markdown]
# ## What was read and what was left out

# %%
left_out = tables["left_out"]
left_out.groupby(["fault", "action"], as_index=False).size() if len(
    left_out
) else "Every recording was read as it was."

# %% [markdown]
# ## The supervised control
#
# Mean over seeds on fold 10, with the patient-bootstrap interval of that mean.

# %%
supervised = tables["supervised_summary"].assign(origin=origin)
shown = supervised[
    ["method", "data", "labels", "fraction", "value", "low", "high", "seeds", "origin"]
]
shown.style.format(precision=3).set_caption(f"Macro AUROC on fold 10: {kind}")

# %% [markdown]
# ## Check: more labels should not hurt
#
# A label curve that falls by more than its interval where labels are added points to a defect, not to a finding.

# %%
curve = supervised.sort_values("fraction")
steps_down = curve["value"].diff().dropna()
widths = (curve["high"] - curve["low"]).iloc[1:]
assert (steps_down > -widths).all(), (
    "the score falls where labels are added: look at the runs before believing this"
)
print(
    f"from {100 * curve['fraction'].iloc[0]:g} % to {100 * curve['fraction'].iloc[-1]:g} % of the labels: "
    f"{curve['value'].iloc[0]:.3f} to {curve['value'].iloc[-1]:.3f}"
)

# %% [markdown]
# ## Every system of the study
#
# One row each, at the fraction of its part that is nearest to 10 % of the labels. Networks, starts and pretraining data
# differ between the parts: within a part rows are comparable, across parts they tell what a whole recipe reaches.

# %%
from ecgstudy.analysis.claims import systems

rows = systems(tables).assign(origin=origin)
save_table(rows, "systems", results)
rows.style.format(precision=3).format("{:.0%}", subset=["fraction"]).hide(axis="index").set_caption(
    f"Macro AUROC on fold 10: {kind}"
)

# %% [markdown]
# ## Claims, and what was found
#
# A claim of a paper is a gain of one arm over another. Beside each published gain stands the gain here, with the
# paired interval. Data, classes and sizes differ, so only the sign can agree: `agrees` where the interval lies above
# zero, `the opposite` where it lies below, `no finding` where it holds zero. Claims without a published figure are the
# study's own.

# %%
from ecgstudy.analysis.claims import findings, shown_findings

claims = findings(tables, published, origin)
save_table(claims, "findings", results)
shown_findings(claims).style.hide(axis="index").set_caption(
    f"Published gains, and gains here: {kind}"
)

# %% [markdown]
# What did not replicate, and what was not found:

# %%
for row in claims[claims["verdict"] != "agrees"].itertuples():
    printed = "" if pd.isna(row.published) else f", published {row.published:+.3f}"
    labels = "" if pd.isna(row.labels) else f", {row.labels:.0%} of the labels"
    print(
        f"{row.verdict}: {row.system}, {row.claim}{labels}: {row.here:+.3f} "
        f"[{row.low:+.3f}, {row.high:+.3f}]{printed}"
    )
known = claims[claims["published"].notna()]
agreeing = (known["verdict"] == "agrees").sum()
print(
    f"\n{agreeing} of {len(known)} claims with a published figure agree in sign beyond the interval; of the "
    f"{len(claims) - len(known)} others {(claims['verdict'] == 'agrees').sum() - agreeing} are found"
)

# %% [markdown]
# ## Self-supervised pretraining
#
# Every encoder learnt from the signals of folds 1–8 without labels. *Frozen*: a linear probe on its features;
# *fine-tuned*: trained on from there. The controls are the same encoders from scratch and never trained.

# %%
cells = interval_table(tables["label_efficiency_summary"], ["protocol", "encoder", "method"])
cells.style.set_caption(f"Macro AUROC on fold 10, mean over label subsets: {kind}")

# %%
needed = tables["labels_needed"]
needed.style.format(precision=3).hide(axis="index").set_caption(
    f"Share of the labels with which an arm reaches the same encoder trained from scratch with all labels: {kind}"
)

# %% [markdown]
# ## Fusion of frozen encoders
#
# DVME fuses all encoders by attention. It counts as supported where it is above the best single encoder, chosen on fold
# 9, and above one logistic regression on all features, with paired intervals that exclude zero. DVME's paper prints
# gains of pretraining over supervised starts; what the fusion itself adds could not be recovered from it.

# %%
fused = tables["fusion_gains"]
fused = fused[
    (fused["over_protocol"] == "frozen") & fused["over"].isin(["best_single", "concatenation"])
]
for fraction, rows in fused.groupby("fraction"):
    print(
        f"{fraction:4.0%}: fusion is {'supported' if (rows['low'] > 0).all() else 'NOT supported'}"
    )
interval_table(fused, "over", value="gain", form="+.3f").style.set_caption(
    f"What DVME gains in macro AUROC on fold 10: {kind}"
)

# %% [markdown]
# ## Beside it: what papers print
#
# PTB-XL with 71 statements and all its recordings, pretrained on corpora twice that size. Data and label set differ
# from ours, so this is orientation, not a comparison.

# %%
printed = pd.read_csv(Path(published) / "ecg-selfsupervised.csv")
printed = printed[printed["task"] == "PTB-XL all"]
printed.assign(origin="published")[
    ["encoder", "pretraining", "protocol", "metric", "mean", "sd", "origin", "source"]
]

# %% [markdown]
# ## A few labels and the other recordings without
#
# One backbone, trained further by each method with few labels and all other training records unlabelled; and the same
# from other starts. Beside it what CE-SSL's paper prints for PTB-XL: 19 classes, all its records, 5 % of the labels, a
# backbone of 9.5 million weights pretrained on CODE. Again orientation, not a comparison.

# %%
cells = interval_table(tables["semi_supervised_summary"], ["start", "method"])
cells.style.set_caption(f"Macro AUROC on fold 10, mean over label subsets: {kind}")

# %%
paper = pd.read_csv(Path(published) / "ce-ssl.csv")
paper = paper[paper["table"].isin(["S8", "S11"]) & (paper["dataset"] == "PTB-XL")]
paper = paper[paper["metric"].isin(["macro AUC", "MAP", "macro F2", "time/iter", "params"])]
paper.pivot(index=["table", "method"], columns="metric", values="mean").assign(origin="published")

# %% [markdown]
# ## A network that keeps learning
#
# DISTL from a few labels on, while records without labels arrive in stages; each arm at each stage, the student's
# scores. Beside it what the paper prints, for X-rays of the chest: orientation, not a comparison.

# %%
stages = tables["self_evolving_summary"]
stages = stages[stages["network"] == "student"]
interval_table(stages, "method", "stage").style.set_caption(
    f"Macro AUROC on fold 10 at each T, {stages['fraction'].iloc[0]:.0%} of the labels: {kind}"
)

# %%
paper = pd.read_csv(Path(published) / "distl-echoclr-dvme.csv")
paper = paper[(paper["paper"] == "DISTL") & (paper["metric"] == "AUROC")]
paper.pivot(index="task", columns="setting", values="value").assign(origin="published")

# %% [markdown]
# ## Under noise
#
# Every classifier on the same noisy records of fold 10: the SNR at which it has lost 0.05 of its own macro AUROC. Lower
# is sturdier; *never*: not down to the lowest SNR that was tried.

# %%
limits = tables["robustness_threshold"]
cells = (
    limits["told"].str.split(" [", regex=False).str[0]
)  # without the intervals, which notebook 15 shows
cells = limits.assign(cell=cells, fraction=limits["fraction"].map("{:.0%}".format))
cells = cells.pivot(
    index=["method", "protocol", "encoder", "fraction"], columns="kind", values="cell"
)
cells.style.set_caption(f"SNR of a loss of {limits['limit'].iloc[0]:g}: {kind}")

# %% [markdown]
# ## Explanations
#
# Relevance where the evidence is known, divided by chance: the attribution that was chosen on fold 9, and four maps
# that know nothing of the network.

# %%
measured = tables["saliency"]
measured = measured[(measured["measure"] == "enrichment") & (measured["method"] == "supervised")]
flat = ["random", "|input|", "|input|²", "R peaks"]
known = measured["attribution"].str.startswith("chosen") | measured["attribution"].isin(flat)
measured = measured[known & measured["value"].notna()]
interval_table(measured, ["truth", "attribution"], "class", form=".2f").style.set_caption(
    "Mass over chance, mean of the records' own ratios, one network trained with labels alone"
)

# %% [markdown]
# ## The encoders, to take away
#
# Weights, settings and a *model card* for each pretrained encoder: what it was trained on, what it is worth beside its
# controls, what it must not be used for, and the lines that open it.

# %%
from ecgstudy.analysis.model_cards import release_encoders
from ecgstudy.arms.pretrain import pretrained_runs
from ecgstudy.study import Study

study = Study.open(results)
released = release_encoders(
    pretrained_runs(study),
    tables["label_efficiency_summary"],
    study.records,
    Path(results) / "encoders",
)
print((released[0] / "README.md").read_text().split("## Limits")[0])

# %% [markdown]
# ## Exercise
#
# With how few labels could supervised training be as good as with all? From `curve`, put the smallest fraction whose
# interval reaches the mean at all labels into `enough`.

# %% tags=["given"]
from pathlib import Path

import pandas as pd

curve = pd.read_csv(Path(results) / "tables" / "supervised_summary.csv").sort_values("fraction")

# %% tags=["solution"]
full = curve["value"].iloc[-1]
enough = curve[curve["high"] >= full]["fraction"].min()
print(f"the interval reaches {full:.3f} from {100 * enough:g} % of the labels on")

# %% tags=["check"]
from ecgtools.answers import number

reaching = {line.fraction: line.high >= curve["value"].iat[-1] for line in curve.itertuples()}
assert number(enough) in reaching, "`enough` is none of the measured fractions"
assert reaching[number(enough)], (
    "the interval of this fraction does not reach the mean at all labels"
)
assert not any(there for share, there in reaching.items() if share < number(enough)), (
    "a smaller fraction reaches it"
)
print("right")

# %% [markdown]
# ## What was seen
#
# Every system with its row, every claim with its verdict, each figure with its origin: published, reproduced on a
# subset, or simulated. Written: `tables/report_parts.csv`, `tables/systems.csv`, `tables/findings.csv`, and a folder
# with weights and model card for each encoder in `encoders/`.

# %%
save_table(status, "report_parts", results)
