# %% [markdown]
# # 15 · What noise does to each classifier
#
# **What you will learn.** How to add noise to ECGs at an exact signal-to-noise ratio without fooling yourself, and what
# seven kinds of it do to every classifier of this study. You write the ratio out, see how sampling can fold noise to
# where it does not belong, and answer a question: does self-supervised pretraining make a network sturdier, also
# against noise that its augmentation never showed it?
#
# **What it needs.** The runs of notebook 09, and those of 10, 12 and 13 unless `studies` leaves them out.
#
# **How long.** The `laptop` profile takes about 3 minutes on two CPU cores. Finished runs are kept and opened again.

# %% tags=["parameters"]
results = "../results/laptop"  # where the earlier notebooks left records and runs
fraction = 1.0  # share of the labels behind the arms of notebook 09
studies = [
    "label_efficiency",
    "semi_supervised",
    "self_evolving",
    "fusion",
]  # notebooks 09, 12, 13 and 10
methods = []  # none named: all
snr_db = [24, 18, 12, 6, 0, -6]  # beside clean
mains = 50.0  # Hz; 60 in America, for records of 125 Hz or more
limit = 0.05  # macro AUROC that counts as lost
draws = 1000  # patient samples behind each interval
workers = 2  # networks scored side by side, one thread each; 1 on a GPU

# %%
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ecgstudy.study import Study

study = Study.open(results, workers)
records = study.records
rate, test = records.sampling_rate, records.split["test"]
clean = torch.from_numpy(records.millivolts(test))
note = f"{records.name}, fold 10{records.caveat}"
print(f"{note}: {len(test)} records at {rate:g} Hz")

# %% [markdown]
# ## How loud is noise?
#
# With the clean signal $s$ and what was added, $n$, over all leads and samples of a record,
#
# $$\mathrm{SNR} = 10 \log_{10} \frac{\sum s^2}{\sum n^2}\ \mathrm{dB}.$$
#
# So noise of any size is multiplied by $c = \sqrt{\sum s^2 / \sum n^2}\; 10^{-\mathrm{SNR}/20}$. Missing samples do
# not count. Nor does a flat lead, a dead input that stays as it is. Written out, and held against the package, for
# every kind and ratio. Each record's noise comes from its own generator, so that every classifier sees the same.

# %%
import warnings

from ecglib.noise import KINDS, FlatLeadWarning, prepare_noise, record_generator


def ratio_by_hand(clean: np.ndarray, noisy: np.ndarray) -> float:
    """Signal-to-noise ratio of one record `(12, time)` in dB."""
    signal_energy = noise_energy = 0.0
    for lead, noisy_lead in zip(clean.astype(float), noisy.astype(float)):
        there = ~np.isnan(lead)
        if not there.any() or np.ptp(lead[there]) < 0.005:
            continue  # a dead input
        signal_energy += (lead[there] ** 2).sum()
        noise_energy += ((noisy_lead - lead)[there] ** 2).sum()
    return 10 * np.log10(signal_energy / noise_energy)


kinds = [kind for kind in KINDS if kind != "powerline" or mains <= rate / 2]
few, ids = clean[:10], records.table["record_id"].iloc[test[:10]]
errors, drawn = {}, {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", FlatLeadWarning)
    prepare_noise(clean, "lead_loss", rate, torch.Generator())
    told = [str(warning.message) for warning in caught]
    for kind in kinds:
        drawn[kind] = prepare_noise(
            few, kind, rate, [record_generator(0, name, kind) for name in ids], mains=mains
        )
        noisy = {level: drawn[kind].at(level).numpy() for level in snr_db}
        errors[kind] = [
            max(abs(ratio_by_hand(*pair) - level) for pair in zip(few.numpy(), noisy[level]))
            for level in snr_db
        ]
assert max(map(max, errors.values())) < 0.1, errors
print(*(told or ["No record of fold 10 has a flat lead."]))
pd.DataFrame(errors, index=snr_db).T.style.format("{:.0e}").set_caption(
    "Largest error in dB of ten records"
)

# %% [markdown]
# By this definition offsets count, of the signal and of the noise. Had each lead's mean been taken away first, a
# *variance* instead of a mean square, the same recordings at 6 dB would be called cleaner or noisier by what is
# printed. And Einthoven's law, II = I + III, holds for noise too, because all leads are computed from what a few
# electrodes and amplifiers deliver; only contact that is lost lead by lead breaks it.

# %%
from ecglib.noise import measured_snr

moving = (clean - clean.nanmean(dim=2, keepdim=True)).square().nansum(
    dim=(1, 2)
) / clean.square().nansum(dim=(1, 2))
offset = (10 * torch.log10(moving)).quantile(torch.tensor([0.5, 0.05]))
print(
    f"power of {len(test)} signals by variance: median {offset[0]:+.2f} dB, one in twenty below {offset[1]:+.2f} dB"
)
for kind in kinds:
    noisy = drawn[kind].at(6.0)
    differ = (measured_snr(few, noisy, by_variance=True) - measured_snr(few, noisy)).numpy()
    added = (noisy - few)[:, :3].nan_to_num()
    law = (added[:, 1] - added[:, 0] - added[:, 2]).abs().max()
    print(
        f"{kind:17s} by variance {np.median(differ):+5.1f} dB ({differ.min():+5.1f} to {differ.max():+5.1f}); "
        f"II - I - III at most {law:.1e} mV"
    )

# %% [markdown]
# ## The seven kinds
#
# One recording at 6 dB, the lead that each kind hits hardest and the spectrum of what was added. Muscle and mains lie
# where an ECG is weak; electrode motion and shifts lie where it is strong, and no filter takes them out. Lost leads add
# nothing: there, "noise" is the signal that is gone.

# %%
from ecgstudy.analysis.robustness import plot_noise_kinds
from ecgstudy.results import save_figure

shown = {kind: drawn[kind].at(6.0)[0].numpy() for kind in kinds}
figure = plot_noise_kinds(few[0].numpy(), shown, rate, title=f"One ECG at 6 dB, {note}")
save_figure(figure, "noise_kinds", results)
figure

# %% [markdown]
# ## Folded noise
#
# A tone of $f$ Hz, written down at $r$ samples a second, cannot be told from one of $|f - kr|$ Hz for any whole $k$.
# Published code adds mains hum of 50 Hz and its harmonics to records of 100 samples a second: 50 Hz becomes an
# alternating sign or nothing, depending on its phase, and the harmonic of 100 Hz a constant offset. What it calls
# muscle noise is drawn at the record's rate too and holds the whole spectrum, drift included. Here noise is made at 500
# Hz or more, filtered, and then decimated; harmonics above half the rate are left out, and a tone at half the rate is
# moved 0.5 Hz below.

# %%
time = np.arange(round(10 * 100)) / 100
naive = {
    f"{tone} Hz, {turn:g} of a turn later": np.cos(2 * np.pi * (tone * time + turn))
    for tone in (50, 100, 150)
    for turn in (0.0, 0.25)
}
folded = pd.DataFrame(
    {
        "mean": {name: x.mean() for name, x in naive.items()},
        "size": {name: np.sqrt((x**2).mean()) for name, x in naive.items()},
    }
)
beat = torch.sin(2 * torch.pi * 1.2 * torch.arange(1000) / 100).expand(1, 12, -1)
ours = (prepare_noise(beat, "powerline", 100.0, torch.Generator().manual_seed(0)).at(0.0) - beat)[
    0, 1
]
power = np.abs(np.fft.rfft(ours.numpy() * np.hanning(1000))) ** 2
near = power[np.fft.rfftfreq(1000, 0.01) > 48.5].sum() / power.sum()
assert near > 0.99 and abs(ours.mean()) < 0.05 * ours.std()
print(
    f"the package's 50 Hz at 100 Hz: {near:.1%} of its energy lies above 48.5 Hz, offset {ours.mean():+.0e} mV"
)
folded.round(3)

# %% [markdown]
# ## Published levels
#
# The paper tests at six levels of four noises at once, with random sizes, each window of 2.5 s on its own. It fixes
# amplitudes, not a ratio. What ratio do they make on our records? Beside it the median of 400 windows with PTB-XL's
# mean power of 0.056 mV², counted once by other code. Note that the third level and the fourth hardly differ.

# %%
from ecglib.noise import PUBLISHED_LEVELS, published_noise

noted = {1: 2.1, 2: -3.7, 3: -9.6, 4: -9.0, 5: -12.9, 6: -15.6}
window = round(2.5 * rate)
windows = (
    clean[:, :, : clean.shape[2] // window * window]
    .unflatten(2, (-1, window))
    .transpose(1, 2)
    .flatten(0, 1)
)
measured = {}
for level in PUBLISHED_LEVELS:
    noisy = published_noise(windows, level, rate, torch.Generator().manual_seed(level))
    measured[level] = float(measured_snr(windows, noisy).nanmedian())
print(
    f"signal power of these records: median {windows.square().nanmean(dim=(1, 2)).median():.3f} mV²"
)
pd.DataFrame({"measured here (dB)": measured, "PTB-XL's mean power (dB)": noted}).rename_axis(
    "level"
).round(1)

# %% [markdown]
# ## Every classifier under every noise
#
# Fold 10 is read once more, to report; nothing is chosen. A record is scored as its run scored it: the mean over
# windows that overlap by half, of the answers or, where the encoder is frozen, of the features. So without noise each
# classifier has the very score that its run kept. Arms of notebook 09 have seed 0; those of notebooks 12 and 13 were
# trained with few labels, and each row says how many. DVME of notebook 10 asks all its frozen encoders.

# %%
from ecgstudy.analysis.robustness import noise_arms
from ecgstudy.arms.noise import NoiseGrid, arm_of, score_under_noise

arms = noise_arms(results, records, fraction, studies, methods)
grid = NoiseGrid(kinds, snr_db, mains=mains, draws=draws)
scores = score_under_noise(study, arms, grid)

# %%
from ecglib.evaluate.metrics import absent_classes, class_auroc

absent = absent_classes(records.targets[test], records.classes)
kept = [
    np.nanmean(class_auroc(records.targets[test], run.predictions()["test/probabilities"]))
    for run in arms
]
clean_scores = pd.DataFrame([arm_of(run) for run in arms]).assign(auroc=scores.auroc[:, 0])
assert np.abs(clean_scores["auroc"] - kept).max() < 1e-3, "not the scores that the runs kept"
print(f"Absent classes, left out of every mean: {', '.join(absent) or 'none'}")
clean_scores.style.format(precision=3).hide(axis="index").set_caption(
    f"Macro AUROC without noise: {note}"
)

# %% [markdown]
# One trap to look for in the figure: with every lead lost, at 0 dB, nothing can be known and all stand at 0.5. Below it
# the open inputs hold white noise alone, and yet some classifiers rise again. A fixed *ratio* makes noise the louder
# the larger the signal was, so that its size tells something of the heart: the price of any comparison at a fixed SNR.

# %%
from ecgstudy.analysis.robustness import plot_robustness, robustness_table

table = robustness_table(scores)
figure = plot_robustness(table, f"Macro AUROC under noise: {note}")
save_figure(figure, "robustness", results)
figure

# %% [markdown]
# ## Where does each begin to fall?
#
# The ratio at which a classifier has lost `limit` of its own clean macro AUROC, on straight lines between the levels:
# lower is sturdier. *Never* means not down to the lowest level, *before* that it was lost at the highest one. A bad
# classifier has little to lose, so read it beside the clean score. The interval asks again on every patient sample.

# %%
from ecgstudy.results import interval_table, save_table
from ecgstudy.analysis.robustness import threshold_table

thresholds = threshold_table(scores, limit)
save_table(table, "robustness", results)
save_table(thresholds, "robustness_threshold", results)
told = thresholds.pivot(
    index=["protocol", "encoder", "method", "fraction", "clean"], columns="kind", values="told"
)
told.sort_values("clean", ascending=False)[kinds].reset_index().style.hide(axis="index").format(
    {"clean": "{:.3f}", "fraction": "{:.0%}"}
).set_caption(f"SNR at which {limit:g} of the macro AUROC is lost [95 % interval]: {note}")

# %% [markdown]
# ## Does pretraining help beyond its own noise?
#
# The study's augmentation holds noise of some kinds, the *family*; supervised training sees the same augmentation. How
# much more does a pretrained arm lose than the same encoder trained from scratch with the same labels? The mean over
# all ratios, with both on the same patient samples: below zero, pretraining helps. Lost leads stand on neither side:
# hiding a stretch, which the augmentation does too, resembles them, and where all is lost, who knew more loses more.

# %%
from ecgstudy.analysis.robustness import loss_gains, taught_kinds

family = taught_kinds(
    [run for run in arms if run.spec.value("protocol") in ("frozen", "fine-tuned", "supervised")],
    results,
)
outside = [kind for kind in kinds if kind not in (*family, "lead_loss")]
families = {"in the family": family, "outside": outside} | {kind: [kind] for kind in kinds}
differences = loss_gains(scores, families)
save_table(differences, "robustness_differences", results)
print(f"In the family: {', '.join(family) or 'none'}; outside: {', '.join(outside)}")
arm = ["protocol", "method", "encoder"]
cells = interval_table(differences, arm, "family", "gain", "+.3f")
cells[["in the family", "outside"]].style.set_caption(
    f"Loss minus that of supervised training: {note}"
)

# %%
pooled = differences[differences["method"] == "all"]
answers = []
for row in pooled[pooled["family"].isin(["in the family", "outside"])].itertuples():
    word = (
        "helps"
        if row.high < 0
        else "harms"
        if row.low > 0
        else "makes no difference that can be shown"
    )
    answers.append(
        f"{row.protocol} encoders, noise {row.family}: pretraining {word}, loss {row.gain:+.3f} "
        f"[{row.low:+.3f}, {row.high:+.3f}]"
    )
print("\n".join(answers))
pooled.pivot(index="family", columns="protocol", values=["gain", "low", "high"]).round(3)

# %% [markdown]
# ## Exercise
#
# Which kind of noise costs the most, on the mean over all classifiers of the table? Take the level nearest to 0 dB, put
# the mean loss of each kind into `cost`, by its name, and the name of the worst kind into `worst`.

# %% tags=["given"]
from pathlib import Path

import numpy as np
import pandas as pd

measured = pd.read_csv(Path(results) / "tables" / "robustness.csv")
measured = measured[np.isfinite(measured["snr_db"])]  # the rows beside clean

# %% tags=["solution"]
level = min(measured["snr_db"], key=abs)
cost = measured[measured["snr_db"] == level].groupby("kind")["loss"].mean().sort_values()
worst = cost.index[-1]
print(
    f"at {level:g} dB {worst} costs the most, {cost.iloc[-1]:.3f}, {cost.index[0]} the least, {cost.iloc[0]:.3f}"
)

# %% tags=["check"]
from ecgtools.answers import numbers

nearest = measured.loc[measured["snr_db"].abs().idxmin(), "snr_db"]
lost = {}
for line in measured.itertuples():
    lost.setdefault(line.kind, []).extend([line.loss] if line.snr_db == nearest else [])
mean_loss = {kind: sum(values) / len(values) for kind, values in lost.items()}
own = numbers(pd.Series(cost, dtype=object).reindex(list(mean_loss)), (len(mean_loss),))
assert np.allclose(own, list(mean_loss.values()), atol=1e-9), (
    "`cost` is not the mean loss of each kind at this level"
)
largest = isinstance(worst, str) and mean_loss.get(worst, -1) >= max(mean_loss.values()) - 1e-9
assert largest, "`worst` is not the kind with the largest mean loss"
print("right")

# %% [markdown]
# ## What was seen

# %%
names = thresholds["method"] + ", " + thresholds["protocol"]
for kind, rows in thresholds.assign(name=names).groupby("kind", sort=False):
    lost = rows[rows["snr_db"] > -np.inf].sort_values("snr_db", ascending=False)
    first = f"first {lost['name'].iloc[0]}, {lost['told'].iloc[0]}" if len(lost) else "no one"
    print(f"{kind}: {len(lost)} of {len(rows)} classifiers lose {limit:g}; {first}")
print("\n".join(answers))

# %% [markdown]
# Written: `tables/robustness.csv`, `tables/robustness_threshold.csv`, `tables/robustness_differences.csv`,
# `figures/robustness.svg`,
# `figures/noise_kinds.svg`.
