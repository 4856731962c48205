# %% [markdown]
# # 01 · Look at ECGs
#
# **What you will learn.** To read the twelve traces as a cardiologist sees them, what the classes of this study look
# like, where the energy of an ECG lies in frequency, and what each augmentation does to a signal and to its label.
#
# **What it needs.** The records of notebook 00.
#
# **How long.** About 15 seconds on two CPU cores. No GPU is used.

# %% tags=["parameters"]
results = "../results/laptop"  # where notebook 00 left the records
examples_seed = 1  # which example of each class is shown
records_looked_at = 400  # for averages

# %%
from pathlib import Path

import numpy as np

from ecglib.records import LEADS, Records

records = Records.load(Path(results) / "records")
origin = records.about["source"]
print(f"{len(records):,} recordings: {origin}")

# %% [markdown]
# ## One ECG on paper
#
# ECG paper runs at 25 mm/s and shows 10 mm for 1 mV. A small square is 40 ms by 0.1 mV, a large one 200 ms by 0.5 mV.
# The rectangle at the left is the calibration pulse: 1 mV for 200 ms. The upper rows show 2.5 s of each lead one
# after the other, the lowest row is lead II throughout.

# %%
from ecglib.plot_ecg import plot_ecg
from ecgstudy.results import save_figure

generator = np.random.default_rng(examples_seed)


def example_of(class_name: str) -> int:
    """Position of a recording with this class and no other, or with this class where none is alone."""
    column = records.classes.index(class_name)
    has = records.targets[:, column] == 1
    alone = has & (records.targets.sum(axis=1) == 1)
    return int(generator.choice(np.flatnonzero(alone if alone.any() else has)))


present = [name for name, count in zip(records.classes, records.targets.sum(axis=0)) if count]
first = "NORM" if "NORM" in present else present[0]
index = example_of(first)
figure = plot_ecg(
    records.millivolts([index])[0],
    records.sampling_rate,
    f"{first}, record {records.table['record_id'][index]}, {origin}",
)
save_figure(figure, "ecg_first", results)
figure

# %% [markdown]
# ## Check: the paper's speed
#
# Drawings mislead when their scale is wrong. Ten seconds at 25 mm/s are 250 mm of trace, so the drawing of a 10 s
# record must be at least that wide. (1 inch is 25.4 mm.)

# %%
width = figure.get_size_inches()[0] * 25.4
seconds = records.signals.shape[2] / records.sampling_rate
assert width >= 25 * seconds
print(f"{seconds:g} s of ECG on {width:.0f} mm of paper")

# %% [markdown]
# ## The other classes
#
# One example each. Look for: *CD*, conduction disturbance: the QRS complex is broad or notched. *HYP*, hypertrophy:
# tall R waves in V5–V6 and deep S waves in V1–V2. *MI*, infarction: Q waves and raised or inverted segments in
# neighbouring leads. *STTC*: the part after the QRS complex is lowered, raised or inverted.

# %%
from IPython.display import display

for name in [name for name in present if name != first][:4]:
    index = example_of(name)
    title = f"{name}, record {records.table['record_id'][index]}, {origin}"
    display(plot_ecg(records.millivolts([index])[0], records.sampling_rate, title))

# %% [markdown]
# One example proves little: an infarct may be old and faint, and a normal ECG may look odd. The next cells look at
# many.
#
# ## How large are ECGs?
#
# The range (largest minus smallest value) of each lead, as median and middle half over recordings. Chest leads V2–V4
# lie nearest to the heart and are the largest.

# %%
import pandas as pd

some = np.sort(generator.permutation(len(records))[:records_looked_at])
signals = np.nan_to_num(records.millivolts(some))
span = pd.DataFrame(np.ptp(signals, axis=2), columns=LEADS)
sizes = span.quantile([0.25, 0.5, 0.75]).T.round(2).add_prefix("quantile ")
sizes

# %% [markdown]
# ## Finding beats
#
# The QRS complex is the steepest part of a beat. Squaring the slope of a lead and looking for peaks at least 250 ms
# apart finds it: enough for a heart rate, and for a check of the data.

# %%
from scipy.signal import find_peaks


def beats(lead: np.ndarray, rate: float) -> np.ndarray:
    """Sample positions of the QRS complexes of one lead `(time,)`."""
    steepness = np.convolve(
        np.gradient(lead) ** 2, np.ones(round(0.1 * rate)) / round(0.1 * rate), "same"
    )
    return find_peaks(
        steepness, height=0.25 * np.quantile(steepness, 0.99), distance=round(0.25 * rate)
    )[0]


intervals = [np.diff(beats(signal[LEADS.index("II")], records.sampling_rate)) for signal in signals]
rates = np.array(
    [60 * records.sampling_rate / np.median(gaps) for gaps in intervals if len(gaps) > 2]
)
low, middle, high = np.quantile(rates, [0.05, 0.5, 0.95])
print(f"heart rate: median {middle:.0f}/min, 5 to 95 % of recordings: {low:.0f} to {high:.0f}")
assert 50 < middle < 100, "the sampling rate or the beat finder is wrong"

# %% [markdown]
# ## Where the energy lies
#
# The power spectrum, averaged over recordings. Almost everything lies below 25 Hz, which is why 100 Hz suffices for
# most diagnoses; a peak near 50 or 60 Hz would be the mains, and power below 0.5 Hz is breathing and moving
# electrodes.

# %%
import matplotlib.pyplot as plt
from scipy.signal import welch

frequency, power = welch(
    signals[:, LEADS.index("II")], records.sampling_rate, nperseg=min(512, signals.shape[2])
)
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.semilogy(frequency, np.median(power, axis=0), label="median recording")
axes.fill_between(
    frequency, *np.quantile(power, [0.1, 0.9], axis=0), alpha=0.25, label="10 to 90 % of recordings"
)
axes.set(xlabel="Frequency (Hz)", ylabel="Power (mV²/Hz)", title=f"Spectrum of lead II: {origin}")
axes.legend(frameon=False)
save_figure(figure, "spectrum", results)
figure

# %%
below = power[:, frequency < 25].sum() / power.sum()
print(f"{below:.1%} of the power of lead II lies below 25 Hz")

# %% [markdown]
# ## Augmentations
#
# An augmentation is a change that should not change the diagnosis. Each works on a whole batch at once; here each is
# applied to the same 2.5 s of one record (lead II). The grey trace is the original.

# %%
import torch

from ecglib.augment import TRANSFORMS

window = round(2.5 * records.sampling_rate)
original = torch.from_numpy(signals[:1, :, :window])
figure, grid = plt.subplots(5, 2, figsize=(10, 9), sharex=True, layout="constrained")
for axes, (name, transform) in zip(grid.flat, TRANSFORMS.items()):
    changed = transform(original, torch.Generator().manual_seed(7))
    for values, style in ((original, {"color": "0.7"}), (changed, {"color": "C0", "linewidth": 1})):
        axes.plot(np.arange(window) / records.sampling_rate, values[0, LEADS.index("II")], **style)
    axes.set_title(name.replace("_", " "), fontsize=10)
figure.supxlabel("Time (s)")
figure.supylabel("Lead II (mV)")
save_figure(figure, "augmentations", results)
figure

# %% [markdown]
# Powerline noise leaves no trace at 100 Hz: the mains tone lies at or above half the sampling rate and would alias,
# so it is left out. The published code adds it all the same, where it turns into an alternating sign.
#
# Not every change is harmless. A gain per lead (*channel resize*) changes the voltages by which hypertrophy is defined
# and breaks Einthoven's law; a time warp changes rate and intervals. Check it:

# %%
resized = TRANSFORMS["channel_resize"](original, torch.Generator().manual_seed(7))
before, after = (float((x[0, 2] - (x[0, 1] - x[0, 0])).abs().mean()) for x in (original, resized))
print(f"mean |III - (II - I)|: {before:.4f} mV before, {after:.4f} mV after")
assert after > 0.005, "channel resize should break Einthoven's law"

# %% [markdown]
# ## Exercise
#
# Sokolow and Lyon: hypertrophy of the left ventricle is likely where the S wave of V1 and the larger R wave of V5 and
# V6 together exceed 3.5 mV. Waves are measured from the baseline, for which the median of a lead will do. Write
# `sokolow_lyon`, which returns this voltage for each recording, and compare hypertrophy with the rest.

# %% tags=["given"]
from pathlib import Path

import numpy as np
import pandas as pd

from ecglib.records import LEADS, Records

records = Records.load(Path(results) / "records")
some = np.arange(min(len(records), records_looked_at))
signals = np.nan_to_num(records.millivolts(some))


# %% tags=["solution"]
def sokolow_lyon(signals: np.ndarray) -> np.ndarray:
    """S of V1 plus the larger R of V5 and V6 in mV, `(records,)`, from signals in mV, `(records, leads, time)`."""
    centred = signals - np.median(signals, axis=2, keepdims=True)
    deep_s = -np.quantile(centred[:, LEADS.index("V1")], 0.005, axis=1)
    tall_r = np.quantile(centred[:, LEADS.index("V5") : LEADS.index("V6") + 1], 0.995, axis=2).max(
        axis=1
    )
    return deep_s + tall_r


voltage = pd.Series(sokolow_lyon(signals), name="voltage (mV)")
labels = pd.Series(
    np.where(records.targets[some, records.classes.index("HYP")] == 1, "HYP", "other")
    if "HYP" in records.classes
    else "all",
    name="class",
)
voltage.groupby(labels).describe()[["count", "25%", "50%", "75%"]].round(2)

# %% tags=["check"]
from ecgtools.answers import numbers

drawn, beat = np.zeros((3, 12, 1000)), np.arange(1000) % 100  # three recordings, a beat a second
for name, depths, when in (
    ("V1", [-1.2, -0.5, -1.2], 10),
    ("V5", [2.0, 3.0, 0.4], 20),
    ("V6", [2.5, 1.0, 0.3], 20),
    ("V1", [0.9] * 3, 30),
    ("V2", [-3.0] * 3, 10),
    ("V5", [-0.8] * 3, 40),
):
    drawn[:, LEADS.index(name), (beat >= when) & (beat < when + 4)] = np.array(depths)[:, None]
baselines = np.linspace(-1, 1, 12)[:, None]
found, shifted = numbers(sokolow_lyon(drawn), (3,)), numbers(sokolow_lyon(drawn + baselines), (3,))
assert np.allclose(found, [3.7, 3.5, 1.6], atol=0.05), (
    "S waves of 1.2, 0.5, 1.2 mV with R waves of 2.5, 3.0, 0.4 mV"
)
assert np.allclose(shifted, found, atol=0.05), (
    "the leads' baselines change the voltage: measure from the medians"
)
print("right")

# %% [markdown]
# ## What was seen
#
# Amplitudes of a millivolt or two, most of the power below 25 Hz, heart rates where they should be, and classes that
# are a matter of a few tenths of a millivolt or of some tens of milliseconds in some of the leads. Written:
# `figures/ecg_first.svg`, `figures/spectrum.svg`, `figures/augmentations.svg`.
