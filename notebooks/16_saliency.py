# %% [markdown]
# # 16 · Saliency that is measured
#
# **What you will learn.** What an attribution is, and how to find out whether it can be believed. A coloured ECG
# convinces whoever looks at it; here every map must first beat chance, beat the mere height of the signal, depend on
# what the network has learned, and point at a place that is known.
#
# **What it needs.** The runs of notebook 09. On real ECGs also LUDB, where cardiologists marked every wave.
#
# **How long.** The `laptop` profile takes about two and a half minutes of one CPU core. Nothing large is trained.

# %% tags=["parameters"]
results = "../results/laptop"  # where the earlier notebooks left records and networks
data = (
    ""  # folder with ECG files that notebook 00 read; LUDB is also looked for below and beside it
)
ludb = ""  # LUDB's folder; empty: looked for beside the data
records_per_class = 20  # true positives that are attributed, the first ones of each class
records_few = 8  # where many networks or many patches are asked
steps = 8  # of integrated gradients
healthy_records = 300  # normal training records behind the healthy beats
smoothings = [1, 5]  # samples over which relevance is averaged; chosen on fold 9
powers = [1, 2]  # of the relevance; chosen on fold 9
cohort_patients = 400  # simulated patients of the height regressors
cohort_steps = 300
compared_fraction = (
    0.1  # share of the labels at which pretrained networks are compared with supervised ones
)
draws = 1000  # patient samples behind each interval

# %% [markdown]
# ## The idea in ten lines
#
# How would the logit of a class change if one sample of one lead rose by 1 mV? Backpropagation answers for all samples
# of a window at once. This is the oldest attribution, and it must be what the package computes through captum.

# %%
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from ecglib.records import Records
from ecglib.saliency import attribute
from ecgstudy.arms.trained import trained_classifier
from ecgstudy.runs import kept_runs

records = Records.load(Path(results) / "records").labelled
runs = kept_runs("label_efficiency", results, records)
trained = [run for run in runs if run.spec.value("protocol") in ("supervised", "fine-tuned")]
encoder = Counter(run.spec.settings["encoder"] for run in trained).most_common(1)[0][
    0
]  # the one that most arms share
most = max(run.spec.fraction for run in trained)
scored = next(
    run
    for run in trained
    if run.spec.method == "supervised"
    and run.spec.seed == 0
    and run.spec.fraction == most
    and run.spec.settings["encoder"] == encoder
)
network, window = trained_classifier(scored, records, results)


def gradient_of(network, signals, class_index):
    """d logit / d sample."""
    signals = signals.clone().requires_grad_()
    network(signals)[:, class_index].sum().backward()
    return signals.grad


few = torch.from_numpy(
    np.nan_to_num(records.millivolts(np.arange(4)))[:, :, : round(window * records.sampling_rate)]
)
difference = (gradient_of(network, few, 0) - attribute(network, few, 0, "gradient")).abs().max()
assert difference < 1e-5, difference
print(
    f"{scored.spec.method}, {encoder}, {most:.0%} of the labels; largest difference {difference:.1e}"
)

# %% [markdown]
# ## Where is the truth?
#
# A simulated record knows where the evidence for its diagnosis lies: leads, and from which mark to which. Real records
# do not; there the test is LUDB, on which nothing was trained and where each wave of each lead is marked.

# %%
from ecgstudy.analysis.evidence import GROUPS, find_ludb, ground_truth, targets_truth

truth = ground_truth(records, results, find_ludb(*filter(None, (ludb, data)), "../data"))
caveat = (
    records.caveat
    if truth.records.about.get("simulated") or not truth.note
    else f"; trained on {records.name}"
)
note = f"{truth.name}{caveat}"
rate = truth.records.sampling_rate
groups = truth.groups("test")
print(f"{note}: {len(truth.split['test'])} records. {truth.note}")
print({group: len(truth.positions(group)) for group in groups})

# %% [markdown]
# Integrated gradients ask: on the way from a baseline to this record, what raised the logit? A *flat line* is the usual
# baseline, since 0 mV is isoelectric. But a cardiologist compares with a healthy heart. So the second baseline is the
# same record with the mean normal beat of the training folds put in the place of its own median beat.

# %%
from ecglib.saliency import HealthyBeats, attribute_records, fitting_methods, relevance

train, normal = records.split["train"], records.classes.index("NORM")
alone = records.targets.sum(axis=1) == 1
healthy = [place for place in train if records.targets[place, normal] and alone[place]][
    :healthy_records
]
bank = HealthyBeats.of(records, healthy)
ARMS = {
    "gradient": "gradient",
    "integrated gradients": "integrated_gradients",
    "integrated, from healthy": "integrated_gradients",
    "guided Grad-CAM": "guided_gradcam",
    "Grad-CAM": "gradcam",
    "occlusion": "occlusion",
}
ARMS = {arm: method for arm, method in ARMS.items() if method in fitting_methods(network)}


def attributed(
    arm, source, positions, class_index, network=network, window=window, bank=bank, stride=None
):
    """Attribution of one arm to whole records."""
    method = ARMS.get(arm, arm)
    options = {"steps": steps} if method == "integrated_gradients" else {}
    if arm == "integrated, from healthy":
        options["baseline"] = bank.baseline(source.millivolts(positions))
    stride = window if method == "occlusion" else stride
    return attribute_records(
        network, source, positions, class_index, method, window, stride, **options
    )


print(
    f"{len(bank.beats)} healthy beats; methods that fit {encoder}: {', '.join(fitting_methods(network))}"
)

# %% [markdown]
# ## A gate before anything else: wave heights
#
# What does a classifier look at? Nobody knows. So first a network that is taught the *height* of one wave in one lead,
# with a random gain on each lead so that no other lead can tell. If it has learned that (R² above 0.9 on patients it
# never saw), the right place is known, and an attribution that does not point there is of no use.

# %%
import pandas as pd

from ecgstudy.analysis import height_regression
from ecgstudy.analysis import localisation
from ecglib.sources.simulate import simulate_cohort

cohort = simulate_cohort(cohort_patients, seed=1016, sampling_rate=rate)
regressor, asked, r2 = height_regression.height_regressor(cohort, steps=cohort_steps, seconds=2.5)
asked, source = asked[: 2 * records_few], cohort.records
normal_beats = HealthyBeats.of(
    source, np.flatnonzero(source.targets[:, source.classes.index("NORM")])[:50]
)
rows = []
for place, (output, (_, lead)) in enumerate(height_regression.HEIGHTS.items()):
    region = height_regression.wave_region(cohort, asked, output)
    maps = localisation.baseline_maps(source.millivolts(asked), rate)
    maps |= {
        arm: relevance(attributed(arm, source, asked, place, regressor, 2.5, normal_beats, 2.5))
        for arm in ARMS
    }
    found = localisation.measure_rows(
        maps, region, source.table["patient_id"].iloc[asked], rate, draws=draws
    )
    rows += [{"class": f"height of {output} in {lead}", "r2": r2[output], **row} for row in found]
gate = pd.DataFrame(rows)
for output, value in r2.items():
    print(
        f"R2 of {output}: {value:.3f} {'(learned)' if value > 0.9 else 'FAILING: below 0.9, no gate for this wave'}"
    )
shown = gate[gate["measure"] == "enrichment"].pivot_table("low", "attribution", "class", sort=False)
shown.style.format(precision=1).set_caption(
    "Lower limit of mass over chance: SIMULATED patients, known place"
)

# %%
learned = [
    f"height of {output} in {lead}"
    for output, (_, lead) in height_regression.HEIGHTS.items()
    if r2[output] > 0.9
]
passed = [arm for arm in ARMS if len(learned) and (shown.loc[arm, learned] > 1.5).all()]
rejected = [arm for arm in ARMS if arm not in passed] if learned else []
print(
    f"pass the gate (more than 1.5 times chance at every wave learned): {', '.join(passed) or 'none'}; "
    f"FAIL: {', '.join(rejected) or 'none'}"
)
usable = passed or list(ARMS)

# %% [markdown]
# ## The choice, on fold 9
#
# Methods differ, and so does what is scored: the size of the attribution or its positive part, which speaks *for* the
# class, with or without a short average, as it is or squared, which counts its peaks. All of this is chosen on fold 9,
# by the geometric mean of the classes' mass over chance, as these are ratios. Where nothing is marked there (real
# records), the choice follows deletion: whose most relevant patches does the network miss the most?

# %%
from ecglib.evaluate.metrics import choose_thresholds
from ecglib.evaluate.windows import predict_windows

marked = len(truth.split["validation"]) > 0
tuning = truth if marked else targets_truth(records)
kinds = [
    (sign, smoothing, power)
    for sign in ("absolute", "positive")
    for smoothing in smoothings
    for power in powers
]
bars = [
    group for group in ("infarction", "bundle branch block", "ST-T change") if group in groups
] or list(groups)
rows = []
for group in [group for group in bars if group in tuning.groups("validation", 1)]:
    positions = tuning.positions(group, "validation")[
        : records_per_class if marked else records_few
    ]
    region, place = tuning.region(group, positions), records.classes.index(GROUPS[group][0])
    signals = tuning.records.millivolts(positions)
    for arm in [
        arm for arm in usable if arm != "occlusion" or len(usable) == 1
    ]:  # dear, and only scored below
        found = attributed(arm, tuning.records, positions, place)
        for sign, smoothing, power in kinds:
            one = relevance(found, sign, smoothing, power)
            value = (
                np.log(localisation.enrichment(one, region).mean())
                if marked
                else localisation.deletion_area(network, signals, one, place, rate, window).mean()
            )
            rows.append(
                {"arm": arm, "sign": sign, "smoothing": smoothing, "power": power, "value": value}
            )
tuned = (
    pd.DataFrame(rows).groupby(["arm", "sign", "smoothing", "power"], sort=False)["value"].mean()
)
best, *form = tuned.idxmax()
sign, smoothing, power = form
averaged = f", mean of {smoothing}" if smoothing > 1 else ""
chosen = f"chosen: {best}, {sign}{averaged}{', squared' if power > 1 else ''}"
print(f"{chosen} (by {'enrichment' if marked else 'deletion'} on fold 9 of {tuning.name})")
(np.exp(tuned) if marked else tuned).unstack(["sign", "smoothing", "power"]).style.format(
    precision=2
)

# %% [markdown]
# ## The measures, on records that no choice has seen
#
# For each class: true positives, the first ones in their order. Mass is the share of relevance inside the region;
# divided by the region's own share of the record, it is 1 by chance and at most 1 / share. Random numbers, the size of
# the signal itself, its square and a detector of R peaks are scored alike: who does not beat them has explained
# nothing.

# %%
from types import SimpleNamespace

validation = records.split["validation"]
thresholds = choose_thresholds(
    records.targets[validation], scored.predictions()["validation/probabilities"]
)
test = truth.split["test"]
probabilities = np.full((len(truth.records), len(records.classes)), np.nan)
probabilities[test] = predict_windows(network, truth.records, test, window)
patients = truth.records.table["patient_id"].to_numpy()
cases, scores = {}, []
for group in groups:
    place, positives = records.classes.index(GROUPS[group][0]), truth.positions(group)
    hits = positives[probabilities[positives, place] > thresholds[place]]
    positions = (hits if len(hits) >= 3 else positives)[:records_per_class]
    region = truth.region(group, positions)
    signals = truth.records.millivolts(positions)
    kept = {
        arm: attributed(
            arm, truth.records, positions[:records_few] if arm == "occlusion" else positions, place
        )
        for arm in ARMS
    }
    maps = localisation.baseline_maps(signals, rate) | {
        "|departure from healthy|": np.abs(signals - bank.baseline(signals))
    }
    maps |= {arm: relevance(found) for arm, found in kept.items() if arm != "occlusion"}
    maps[chosen] = relevance(kept[best], *form)
    cases[group] = SimpleNamespace(
        place=place, positions=positions, region=region, signals=signals, maps=maps, kept=kept
    )
    shares = localisation.chance_mass(region)
    rows = localisation.measure_rows(maps, region, patients[positions], rate, draws=draws)
    if "occlusion" in ARMS:
        part = {"occlusion": relevance(kept["occlusion"]), "|input|": maps["|input|"][:records_few]}
        extra = localisation.measure_rows(
            part,
            region[:records_few],
            patients[positions[:records_few]],
            rate,
            draws=draws,
        )
        rows += [row for row in extra if row["attribution"] == "occlusion"]
    ceiling = (1 / shares).mean()
    scores += [
        {"class": group, "records": len(positions), "ceiling": ceiling, **row} for row in rows
    ]
    too_few = "" if len(hits) >= 3 else ", too few: all stated ones"
    print(
        f"{group}: {len(hits)} of {len(positives)} found{too_few}; region {np.mean(shares):.1%} of the record"
    )
scores = pd.DataFrame(scores)

# %%
enriched = scores[scores["measure"] == "enrichment"]
from ecgstudy.results import interval_table

names, order = list(pd.unique(enriched["attribution"])), list(pd.unique(enriched["class"]))
wide = interval_table(enriched, "attribution", "class", form=".2f").loc[names, order]
wide.style.set_caption(f"Mass over chance, mean of the records' own ratios: {note}")

# %%
from ecgstudy.analysis.localisation import plot_enrichment
from ecgstudy.results import save_figure

known = (
    enriched
    if enriched["value"].notna().any()
    else gate.query("measure == 'enrichment'").assign(ceiling=80.0)
)
place_known = note if known is enriched else "SIMULATED patients, heights of waves"
figure = plot_enrichment(known, f"Does the attribution point at the evidence? {place_known}")
save_figure(figure, "saliency_enrichment", results)
figure

# %% [markdown]
# All other measures of the chosen method: whether the largest relevance lies within 50 ms of the region; for a region
# of $S$ samples, the share of the $S$ most relevant ones that lie in it; the ROC area; the leads; how few samples carry
# the relevance (Gini). `mass over chance` is the ratio of the mean mass to the mean share of the region: it is lower
# than the mean of the ratios above where small regions score high.

# %%
own = scores[scores["attribution"] == chosen]
interval_table(own, "measure", "class", form=".2f").loc[pd.unique(own["measure"]), order]

# %% [markdown]
# ## True negatives
#
# The same region must not score as high where the disease is absent, else the map shows where hearts beat and not what
# is wrong with this one. Each true positive gets a true negative of nearest heart rate; the region is laid over its
# waves as if it had the other's statements.

# %%
from ecglib.saliency import find_r_peaks

rates = {}
for other, signal in zip(test, truth.records.millivolts(test)):
    peaks = find_r_peaks(np.nan_to_num(signal), rate)
    rates[other] = 60 * rate / np.median(np.diff(peaks)) if len(peaks) > 2 else 70.0
rows = []
for group, case in cases.items():
    positions = case.positions
    stated = truth.stated(group)
    quiet = [
        other
        for other in test
        if not stated[other] and not probabilities[other, case.place] > thresholds[case.place]
    ]
    here = min(len(quiet), len(positions))
    if not here:
        continue
    others = localisation.matched_negatives(rates, positions[:here], np.array(quiet))
    absent = truth.region(group, others, like=positions[:here])
    found = relevance(attributed(best, truth.records, others, case.place), *form)
    present = localisation.enrichment(case.maps[chosen][:here], case.region[:here])
    difference = present - localisation.enrichment(found, absent)
    row = localisation.interval_row(
        "enrichment over true negatives", difference, patients[positions[:here]], draws
    )
    rows.append({"class": group, "records": here, "attribution": chosen, **row})
against = pd.DataFrame(rows)
against[["class", "records", "value", "low", "high", "passes"]].round(2)

# %% [markdown]
# ## Deletion: does the network use what is called relevant?
#
# Patches of one lead and 20 samples are bridged by straight lines, the most relevant first or the least relevant first.
# The area between the two probability curves is 0 for random relevance. Zeros would not do as a fill: 0 mV is what the
# signal shows between beats anyway.

# %%
rows = []
for group in bars:
    case = cases[group]
    few, who = case.signals[:records_few], patients[case.positions[:records_few]]
    areas = {
        name: localisation.deletion_area(network, few, one[:records_few], case.place, rate, window)
        for name, one in case.maps.items()
        if name in (*ARMS, "random", "|input|", chosen)
    }
    if "occlusion" in case.kept:
        areas["occlusion"] = localisation.deletion_area(
            network, few, relevance(case.kept["occlusion"]), case.place, rate, window
        )
    for name, area in areas.items():
        row = localisation.interval_row(
            "deletion area over random", area - areas["random"], who, draws
        )
        row["passes"] = row["passes"] if name != "random" else None
        rows.append({"class": group, "records": len(few), "attribution": name, **row})
deleted = pd.DataFrame(rows)
deleted.pivot_table("value", "attribution", "class", sort=False).style.format(precision=3)

# %% [markdown]
# ## Randomisation: does it depend on what was learned?
#
# The head's weights are drawn anew, then the last layer's too, and so on down to the input. A map that stays as it was
# shows the signal, not the network. Integrated gradients carry the factor $x - b$, which no randomisation changes: |a|
# stays small where nothing happens. The sign is then the fairer question, and both are shown.

# %%
from ecgstudy.analysis.localisation import plot_randomisation

rows, group = [], bars[0]
place, positions = cases[group].place, cases[group].positions
for arm in [arm for arm in ARMS if arm != "occlusion"]:
    first = attributed(arm, truth.records, positions[:records_few], place, stride=window)
    for layer, copy in localisation.randomised_cascade(network):
        again = attributed(arm, truth.records, positions[:records_few], place, copy, stride=window)
        for signed in (False, True):
            value = localisation.mean_interval(
                localisation.rank_correlation(first, again, signed),
                patients[positions[:records_few]],
                draws,
            )
            rows.append({"layer": layer, "attribution": arm, "signed": signed, **value._asdict()})
randomised = pd.DataFrame(rows)
figure = plot_randomisation(randomised, f"Randomised weights, {group}: {note}")
save_figure(figure, "saliency_randomisation", results)
figure

# %% [markdown]
# ## Agreement: the same labels' share, other seeds
#
# Networks of one method from other label subsets and starts: do they point at the same places? The chosen method on
# the same records, at the share of the labels for which notebook 09 has several seeds. Published: 0.41 to 0.65.

# %%
fraction = min(
    (run.spec.fraction for run in trained), key=lambda value: abs(value - compared_fraction)
)
arms = {}
for run in trained:
    if run.spec.fraction == fraction and run.spec.settings["encoder"] == encoder:
        arms.setdefault(run.spec.method, []).append(run)
maps_of, rows = {}, []
for method, members in arms.items():
    for run in sorted(members, key=lambda run: run.spec.seed):
        other, own_window = trained_classifier(run, records, results)
        for group in bars:
            positions = truth.positions(group)[:records_few]
            maps_of[method, run.spec.seed, group] = attributed(
                best,
                truth.records,
                positions,
                cases[group].place,
                other,
                own_window,
                stride=own_window,
            )
for method, group in [(method, group) for method in arms for group in bars]:
    several = [found for key, found in maps_of.items() if (key[0], key[2]) == (method, group)]
    who = patients[truth.positions(group)[:records_few]]
    if len(several) > 1:
        agreed = localisation.mean_interval(localisation.agreement(several), who, draws)
        rows.append(
            {
                "method": method,
                "class": group,
                "seeds": len(several),
                "records": len(who),
                "measure": "agreement of seeds",
                **agreed._asdict(),
                "chance": 0.0,
            }
        )
agreed = pd.DataFrame(rows)
agreed.pivot_table("value", "method", "class", sort=False).style.format(precision=2) if len(
    agreed
) else "one seed only"

# %% [markdown]
# ## Self-supervised against supervised, at matched AUROC
#
# Better classifiers localise better, so a gain in enrichment may be a gain in AUROC only. Each pretrained run is paired
# with the supervised run of nearest macro AUROC on fold 9; difference of enrichment record by record, mean over pairs,
# patients resampled. The hypothesis is that it is 0. The AUROC that is left unmatched stands beside it.

# %%
auroc = {
    (run.spec.method, run.spec.seed): next(
        row["value"]
        for row in run.rows()
        if row["split"] == "validation" and row["metric"] == "macro_auroc"
    )
    for members in arms.values()
    for run in members
}
controls, rows = [run.spec.seed for run in arms["supervised"]], []
for method, group in [
    (method, group) for method in arms if method != "supervised" for group in bars
]:
    positions, pairs, gaps = truth.positions(group)[:records_few], [], []
    region = truth.region(group, positions)
    for run in arms[method]:
        nearest = min(
            controls, key=lambda seed: abs(auroc["supervised", seed] - auroc[method, run.spec.seed])
        )
        two = [
            localisation.enrichment(relevance(maps_of[key], *form), region)
            for key in ((method, run.spec.seed, group), ("supervised", nearest, group))
        ]
        pairs.append(two[0] - two[1])
        gaps.append(auroc[method, run.spec.seed] - auroc["supervised", nearest])
    row = localisation.interval_row(
        "enrichment over supervised", np.mean(pairs, axis=0), patients[positions], draws
    )
    about = {"method": method, "class": group, "seeds": len(pairs), "records": len(positions)}
    rows.append({**about, **row, "auroc_left": np.mean(gaps)})
matched = pd.DataFrame(rows)
matched[["method", "class", "seeds", "value", "low", "high", "auroc_left"]].round(3)

# %% [markdown]
# ## Attention is one method among the others
#
# Attention rollout says what a transformer mixes, here the student of DISTL at notebook 13's last stage. It knows no
# classes and no leads, so it is scored like everything else.

# %%
from ecgstudy.runs import kept_runs

rows = []
if (Path(results) / "run_lists" / "self_evolving.json").exists():
    stages = kept_runs("self_evolving", results, records)
    last = max(
        (run for run in stages if run.spec.method == "distl"),
        key=lambda run: (run.spec.settings["stage"], -run.spec.seed),
    )
    transformer, own_window = trained_classifier(last, records, results)
    for group in bars if "attention_rollout" in fitting_methods(transformer) else []:
        case = cases[group]
        maps = {
            f"{method} ({last.spec.settings['encoder']})": relevance(
                attributed(
                    method, truth.records, case.positions, case.place, transformer, own_window
                )
            )
            for method in ("gradient", "attention_rollout")
        }
        found = localisation.measure_rows(
            maps, case.region, patients[case.positions], rate, draws=draws
        )
        rows += [
            {"class": group, "records": len(case.positions), "method": "distl", **row}
            for row in found
        ]
rolled = pd.DataFrame(rows)
shown = rolled[rolled["measure"] == "enrichment"] if rows else rolled
shown.reindex(columns=["class", "attribution", "value", "low", "high"]).round(2)

# %% [markdown]
# ## Only now, pictures
#
# The first true positive, false positive and false negative of the first class, in the records' order: no one has
# picked them. The shade is the chosen relevance of the network that was scored.

# %%
from ecglib.plot_ecg import plot_attributed_ecgs

group = bars[0]
place, stated = cases[group].place, truth.stated(group)
said, has = probabilities[:, place] > thresholds[place], np.array([bool(codes) for codes in stated])
wanted = {"true positive": said & has, "false positive": said & ~has, "false negative": ~said & has}
if truth.records.classes == records.classes:  # a false positive has no statement of the whole class
    wanted["false positive"] &= truth.records.targets[:, place] == 0
examples = []
for kind, these in wanted.items():
    found = [position for position in test if these[position]][:1]
    if found:
        shade = relevance(attributed(best, truth.records, np.array(found), place), *form)[0]
        record = truth.records.table["record_id"].iloc[found[0]]
        text = f"{kind} for {GROUPS[group][0]}: record {record}, probability {probabilities[found[0], place]:.2f}"
        examples.append((text, truth.records.millivolts(found)[0], shade))
figure = plot_attributed_ecgs(examples, rate, f"{note}; relevance {chosen}", seconds=5.0)
save_figure(figure, "saliency_examples", results)
figure

# %% [markdown]
# ## Exercise
#
# How much of a map lies where the evidence is, compared with chance? Write `mass_over_chance`: the share of the
# relevance inside the region, divided by the region's own share of the record, for each record.

# %% tags=["given"]
import numpy as np


# %% tags=["solution"]
def mass_over_chance(relevance: np.ndarray, region: np.ndarray) -> np.ndarray:
    """One number a record, `(records,)`; relevance (0 or more) and region (boolean) are `(records, leads, time)`."""
    inside = (relevance * region).sum(axis=(1, 2)) / relevance.sum(axis=(1, 2))
    return inside / region.mean(axis=(1, 2))


# %% tags=["check"]
from ecgtools.answers import numbers

painted = np.zeros((3, 2, 50), bool)
painted[:, 0, 10:20] = True  # a tenth of a record
painted[0, 1] = True  # in the first record six tenths
drawn = np.stack([np.ones((2, 50)), 1.0 * painted[1], 1.0 - painted[2]])
three = numbers(mass_over_chance(drawn, painted), (3,))
assert np.allclose(three, [1, 10, 0]), (
    "even relevance is 1, all of it inside a tenth of the record 10, none inside 0"
)
louder = numbers(mass_over_chance(drawn * [[[1]], [[5]], [[0.2]]], painted), (3,))
assert np.allclose(louder, three), (
    "how large the numbers of a map are must not count, nor what other records have"
)
print("right")

# %% [markdown]
# On the first class, paired: does |a| of integrated gradients from a flat line lie there more than the signal's own
# size?


# %%
def enrichment_over(group, name, other):
    """How much more one map enriches the region than another one, record by record."""
    case = cases[group]
    two = [localisation.enrichment(case.maps[each], case.region) for each in (name, other)]
    return localisation.mean_interval(two[0] - two[1], patients[case.positions], draws)


enrichment_over(bars[0], "integrated gradients", "|input|")

# %% [markdown]
# ## What was seen

# %%
from ecgstudy.results import save_table

about = {"truth": truth.name, "method": "supervised", "fraction": most, "seeds": 1}
full = randomised[randomised["layer"] == randomised["layer"].iloc[-1]].copy()
constant = (full[["value", "low", "high"]] == 0).all(
    axis=1
)  # such a map says nothing, so it cannot pass
full["passes"] = (full["value"].abs() < 0.1).where(~constant)
parts = [
    gate.assign(truth="simulated heights", method="regressor"),
    scores.assign(**about),
    against.assign(**about),
    deleted.assign(**about),
    agreed.assign(truth=truth.name, fraction=fraction),
    matched.assign(truth=truth.name, fraction=fraction, attribution=chosen),
    rolled.assign(truth=truth.name),
    full.assign(
        **about,
        measure=np.where(full["signed"], "randomised, signed", "randomised"),
        chance=0.0,
        **{"class": bars[0]},
    ),
]
columns = [
    "truth",
    "method",
    "fraction",
    "seeds",
    "class",
    "records",
    "attribution",
    "measure",
    "value",
    "low",
    "high",
    "chance",
    "passes",
    "ceiling",
    "r2",
    "auroc_left",
]
table = pd.concat(
    [part.reindex(columns=columns).astype(object) for part in parts if len(part)], ignore_index=True
)
save_table(table, "saliency", results)


def bar(sentence, met):
    """One bar of the study with its verdict."""
    print(f"{'met' if met else 'FAILING'}: {sentence}")


simulated = bool(truth.records.about.get("simulated"))
judged = (
    bars
    if simulated
    else [group for group in bars if group == "bundle branch block" and known is enriched]
)
for group in judged:
    mine = scores[(scores["class"] == group) & (scores["attribution"] == chosen)].set_index(
        "measure"
    )
    value, plain = mine.loc["enrichment"], mine.loc["mass over chance"]
    goal = 3.0 if simulated else 1.5
    bar(
        f"{group}: {value['value']:.2f} times chance ({value['low']:.2f} to {value['high']:.2f}), goal {goal:g}, "
        f"at most {mine['ceiling'].iloc[0]:.1f}; all records together {plain['value']:.2f}",
        value["value"] >= goal,
    )
    for other in ("|input|", "|input|²")[: 1 + (power > 1)]:
        over = mine.loc[f"enrichment over {other}"]
        bar(
            f"{group}: {over['value']:+.2f} over {other} ({over['low']:+.2f} to {over['high']:+.2f})",
            over["low"] > 0,
        )
    peaks = enrichment_over(group, chosen, "R peaks")
    bar(
        f"{group}: {peaks.value:+.2f} over R peaks ({peaks.low:+.2f} to {peaks.high:+.2f})",
        peaks.low > 0,
    )
for row in full.itertuples():
    which = f"randomised, {row.attribution}, {'a' if row.signed else '|a|'}"
    if pd.isna(row.passes):
        print(f"void: {which}: the map has become constant")
    else:
        bar(f"{which}: rank correlation {row.value:.2f}, goal below 0.1", row.passes)
better = matched[matched["passes"].astype(bool)]
print(
    f"Pretrained over supervised at matched AUROC: {len(better)} of {len(matched)} intervals above 0"
)

# %% [markdown]
# Written: `tables/saliency.csv`, `figures/saliency_enrichment.svg`, `figures/saliency_randomisation.svg`,
# `figures/saliency_examples.svg`.
