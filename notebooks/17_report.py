# %% [markdown]
# # 17 · The report
#
# **What you will learn.** What the study has found so far, in tables, each beside the figures that papers have printed
# where such figures exist.
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

from ecglib.files import atomic_file, read_json

about = read_json(Path(results) / "records" / "records.json")["about"]
kind = "SIMULATED records: these figures say nothing about patients" if about["simulated"] else "real recordings"
if about.get("subset"):
    kind += f", {about['version']}: not comparable with published tables"
print(f"{about['source']}, label set {about['task']!r}: {kind}")

# %% [markdown]
# ## Which parts of the study are there
#
# A part that has not been run is not filled in: its row says which notebook to run.

# %%
parts = {
    "classes": "00_prepare_data", "left_out": "00_prepare_data", "supervised_summary": "02_supervised_baseline",
    "label_efficiency_summary": "09_probe_and_fine_tune", "label_efficiency_gains": "09_probe_and_fine_tune",
    "fusion_summary": "10_fusion", "fusion_gains": "10_fusion", "labels_needed": "14_label_efficiency",
    "semi_supervised_summary": "12_semi_supervised", "semi_supervised_gains": "12_semi_supervised",
    "adaptation_cost": "12_semi_supervised", "self_evolving_summary": "13_self_evolving",
    "self_evolving_gains": "13_self_evolving",
}  # fmt: skip
found = {name: Path(results) / "tables" / f"{name}.csv" for name in parts}
state = {name: "there" if path.exists() else f"run {parts[name]}" for name, path in found.items()}
status = pd.DataFrame([{"table": name, "notebook": parts[name], "state": state[name]} for name in parts])
status

# %%
missing = status[status["state"] != "there"]
assert missing.empty, f"missing: {', '.join(missing['table'])}; run {', '.join(missing['notebook'].unique())} first"

# %% [markdown]
# ## What was read and what was left out

# %%
left_out = pd.read_csv(found["left_out"], dtype=str)
left_out.groupby(["fault", "action"], as_index=False).size() if len(left_out) else "Every recording was read as it was."

# %% [markdown]
# ## The supervised control
#
# Mean over seeds on fold 10, with the patient-bootstrap interval of that mean.

# %%
supervised = pd.read_csv(found["supervised_summary"])
supervised["origin"] = (
    "simulated" if about["simulated"] else "measured on the subset" if about.get("subset") else "measured"
)
shown = supervised[["method", "data", "labels", "fraction", "value", "low", "high", "seeds", "origin"]]
shown.style.format(precision=3).set_caption(f"Macro AUROC on fold 10: {kind}")

# %% [markdown]
# ## Check: more labels should not hurt
#
# A label curve that falls by more than its interval where labels are added points to a defect, not to a finding.

# %%
curve = supervised.sort_values("fraction")
steps_down = curve["value"].diff().dropna()
widths = (curve["high"] - curve["low"]).iloc[1:]
assert (steps_down > -widths).all(), "the score falls where labels are added: look at the runs before believing this"
print(f"from {100 * curve['fraction'].iloc[0]:g} % to {100 * curve['fraction'].iloc[-1]:g} % of the labels: "
      f"{curve['value'].iloc[0]:.3f} to {curve['value'].iloc[-1]:.3f}")  # fmt: skip

# %% [markdown]
# ## Self-supervised pretraining
#
# Every encoder learnt from the signals of folds 1–8 without labels. *Frozen*: a linear probe on its features;
# *fine-tuned*: trained on from there. The controls are the same encoders from scratch and never trained.

# %%
efficiency = pd.read_csv(found["label_efficiency_summary"])
cells = efficiency.assign(score=[f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in efficiency.itertuples()])
cells = cells.pivot(index=["protocol", "encoder", "method"], columns="fraction", values="score")
cells.rename(columns="{:.0%}".format).style.set_caption(f"Macro AUROC on fold 10, mean over label subsets: {kind}")

# %% [markdown]
# What did not help is a finding as well: these arms do not beat the same encoder trained from scratch, or never
# trained, by more than the paired interval.

# %%
gains = pd.read_csv(found["label_efficiency_gains"])
unsure = gains[gains["low"] <= 0]
print(f"{len(gains) - len(unsure)} of {len(gains)} comparisons show a gain whose interval excludes zero; not so:")
unsure.pivot_table(index=["method", "protocol", "over"], columns="fraction", values="gain").round(3)

# %%
needed = pd.read_csv(found["labels_needed"])
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
fused = pd.read_csv(found["fusion_gains"])
fused = fused[(fused["protocol"] == "frozen") & fused["over"].isin(["best_single", "concatenation"])]
fused["cell"] = [f"{row.gain:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in fused.itertuples()]
for fraction, rows in fused.groupby("fraction"):
    print(f"{fraction:4.0%}: fusion is {'supported' if (rows['low'] > 0).all() else 'NOT supported'}")
fused.pivot(index="over", columns="fraction", values="cell").rename(columns="{:.0%}".format).style.set_caption(
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
printed.assign(origin="published")[["encoder", "pretraining", "protocol", "metric", "mean", "sd", "origin", "source"]]

# %% [markdown]
# ## A few labels and the other recordings without
#
# One backbone, trained further by each method with few labels and all other training records unlabelled; and the same
# from other starts. Beside it what CE-SSL's paper prints for PTB-XL: 19 classes, all its records, 5 % of the labels, a
# backbone of 9.5 million weights pretrained on CODE. Again orientation, not a comparison.

# %%
semi_supervised = pd.read_csv(found["semi_supervised_summary"])
cells = [f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in semi_supervised.itertuples()]
cells = semi_supervised.assign(score=cells).pivot(index=["start", "method"], columns="fraction", values="score")
cells.rename(columns="{:.0%}".format).style.set_caption(f"Macro AUROC on fold 10, mean over label subsets: {kind}")

# %%
against = pd.read_csv(found["semi_supervised_gains"])
against = against.assign(sure=(against["low"] > 0) | (against["high"] < 0))
for metric, rows in against.groupby("metric"):
    print(f"{metric}: {(rows['sure'] & (rows['gain'] > 0)).sum()} of {len(rows)} comparisons favour CE-SSL beyond the "
          f"interval, {(rows['sure'] & (rows['gain'] < 0)).sum()} the other method")  # fmt: skip
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
stages = pd.read_csv(found["self_evolving_summary"])
stages = stages[stages["network"] == "student"]
cells = [f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" for row in stages.itertuples()]
cells = stages.assign(score=cells).pivot(index="method", columns="stage", values="score")
cells.style.set_caption(f"Macro AUROC on fold 10 at each T, {stages['fraction'].iloc[0]:.0%} of the labels: {kind}")

# %%
evolving = pd.read_csv(found["self_evolving_gains"])
students = (evolving["network"] == "student") & (evolving["against_network"] == "student")
last = evolving[students & (evolving["stage"] == evolving["stage"].max())]
for row in last[(last["method"] == "distl") & (last["metric"] == "macro_auroc")].itertuples():
    word = "above" if row.low > 0 else "below" if row.high < 0 else "no finding against"
    print(f"DISTL at T = {row.stage}: {word} {row.against} at T = {row.against_stage}, {row.gain:+.3f} "
          f"[{row.low:+.3f}, {row.high:+.3f}]")  # fmt: skip
paper = pd.read_csv(Path(published) / "distl-echoclr-dvme.csv")
paper = paper[(paper["paper"] == "DISTL") & (paper["metric"] == "AUROC")]
paper.pivot(index="task", columns="setting", values="value").assign(origin="published")

# %% [markdown]
# ## Exercise
#
# From the supervised summary, find the smallest fraction whose interval reaches the mean at all labels.

# %% tags=["solution"]
full = curve["value"].iloc[-1]
enough = curve[curve["high"] >= full]["fraction"].min()
print(f"the interval reaches {full:.3f} from {100 * enough:g} % of the labels on")

# %% [markdown]
# ## What was seen
#
# The tables that exist, each with its origin. The parts of the study that follow add their rows to the first table of
# this notebook. Written: `tables/report_parts.csv`.

# %%
with atomic_file(Path(results) / "tables" / "report_parts.csv") as path:
    status.to_csv(path, index=False)
