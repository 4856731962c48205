"""A new encoder, a new self-supervised and a new semi-supervised method: a file and an entry each,
and they stand in the label curve, under noise, and among the findings of the report.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tiny_study import ADAPTATION, PRETRAINING, TRAINING

from ecglib.encoders import ENCODERS
from ecglib.records import Records
from ecgstudy.analysis.gains import transfer_gains
from ecgstudy.analysis.label_curve import plot_label_efficiency
from ecgstudy.analysis.robustness import noise_arms, plot_robustness, robustness_table
from ecgstudy.analysis.summary import seed_summary
from ecgstudy.arms.noise import NoiseGrid, score_under_noise
from ecgstudy.arms.pretrain import keep_pretrained, pretrained_runs, untrained
from ecgstudy.arms.semi_supervised import Start
from ecgstudy.arms.supervised import FromScratch
from ecgstudy.arms.transfer import FineTuned, frozen_arms
from ecgstudy.methods import METHODS, SelfSupervised, SemiSupervised, adapted, pretraining
from ecgstudy.runs import Run, keep_runs
from ecgstudy.study import Study, label_grid

PRETEXT, CONSISTENCY = "toy_pretext", "toy_consistency"


@pytest.fixture(scope="module", autouse=True)
def entries():
    """One entry each, taken back at the end."""
    ENCODERS["toy"] = "toy_parts:ToyEncoder"
    METHODS[PRETEXT] = SelfSupervised("Toy pretext", "#123456", "toy_parts:ToyPretext")
    METHODS[CONSISTENCY] = SemiSupervised("Toy consistency", "#654321", "toy_parts:make_toy")
    yield
    del ENCODERS["toy"], METHODS[PRETEXT], METHODS[CONSISTENCY]


@pytest.fixture(scope="module")
def study(records: Records, folder: Path) -> Study:
    return Study(records, folder)


@pytest.fixture(scope="module")
def curve(study: Study) -> list[Run]:
    """What notebook 09 makes of a new pretrained encoder."""
    settings = replace(
        PRETRAINING, encoder="toy", transforms={"gaussian_noise": {"scale": 0.1}}, options={}
    )
    keep_pretrained(study.run(pretraining(PRETEXT, settings)), study.results)
    start = pretrained_runs(study)[PRETEXT]
    subsets = label_grid([0.5, 1.0], 1, 1)
    training = replace(TRAINING, encoder="toy")
    jobs = [
        *frozen_arms(study, start, subsets),
        *frozen_arms(study, study.run(untrained(start)), subsets),
        *(FineTuned(subset, start, training) for subset in subsets),
        *(FromScratch(subset, training) for subset in subsets),
    ]
    runs = study.grid(jobs, progress_bar=False)
    keep_runs(runs, "label_efficiency", study.results)
    return runs


@pytest.fixture(scope="module")
def semi(study: Study) -> list[Run]:
    """What notebook 12 makes of a new semi-supervised method."""
    settings = ADAPTATION
    start = Start("random")
    subsets = label_grid([0.5], 1, 1)
    names = [CONSISTENCY, "ce_ssl", "supervised_cutmix"]
    runs = study.grid(adapted(names[::2], start, subsets, settings), progress_bar=False)
    keep_runs(runs, "semi_supervised", study.results)
    return runs


def texts(figure: Figure) -> str:
    """All that is written in a figure."""
    found = figure.findobj(match=lambda artist: hasattr(artist, "get_text"))
    return " ".join(artist.get_text() for artist in found)


def test_they_stand_in_the_label_curve_with_names_and_colours_of_their_own(curve, study):
    cell = ("method", "encoder", "protocol", "data", "labels", "fraction")
    summary = seed_summary(curve, study.records, cell=cell)
    assert set(summary["encoder"]) == {"toy"} and PRETEXT in set(summary["method"])
    figure = plot_label_efficiency(summary, 96, "A new method")
    assert "Toy pretext" in texts(figure)
    colours = {line.get_color() for axes in figure.axes for line in axes.lines}
    assert "#123456" in colours
    gains = transfer_gains(curve, study.records)
    assert set(gains.loc[gains["method"] == PRETEXT, "over"]) == {"supervised", "random"}


def test_they_stand_under_noise(curve, semi, study):
    studies = ("label_efficiency", "semi_supervised")
    arms = noise_arms(study.results, study.records, studies=studies)
    assert {PRETEXT, CONSISTENCY} <= {run.spec.method for run in arms}
    scores = score_under_noise(study, arms, NoiseGrid(["white"], [0.0], draws=20))
    table = robustness_table(scores)
    assert {PRETEXT, CONSISTENCY} <= set(table["method"])
    assert {"Toy pretext", "Toy consistency"} <= set(
        map(str.strip, texts(plot_robustness(table)).replace(", ", "\n").split("\n"))
    ) or "Toy" in texts(plot_robustness(table))
