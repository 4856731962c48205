"""Measures of localisation against closed forms and slow references; regions against the wave
marks.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from ecglib.encoders import make_encoder
from ecglib.errors import DataError
from ecglib.records import LEADS
from ecglib.saliency import attribute_records
from ecglib.sources.simulate import simulate_cohort
from ecglib.supervised import Classifier
from ecgstudy.analysis import evidence, height_regression, localisation
from ecgstudy.analysis.evidence import Region

LUDB = Path(__file__).resolve().parents[3] / "shared" / "data" / "ludb"


@pytest.fixture(scope="module")
def cohort():
    return simulate_cohort(240, seed=4)


@pytest.fixture
def region():
    mask = np.zeros((3, 12, 100), bool)
    mask[:, 2:4, 30:50] = True
    return mask


def test_relevance_inside_and_uniform_relevance_have_known_measures(region):
    uniform, inside = np.ones(region.shape), region.astype(float)
    share = 2 * 20 / 1200
    for name, chance, all_inside in (
        ("mass", share, 1.0),
        ("enrichment", 1.0, 1 / share),
        ("rank_accuracy", share, 1.0),
        ("localisation_auc", 0.5, 1.0),
        ("lead_mass", 2 / 12, 1.0),
        ("lead_enrichment", 1.0, 6.0),
        ("pointing_game", 2 * 30 / 1200, 1.0),
        ("gini", 0.0, 1 - share),
    ):
        for relevance, wanted in ((uniform, chance), (inside, all_inside)):
            found = localisation.measure(relevance, Region(region), 100)[name]
            np.testing.assert_allclose(found, wanted, atol=1e-9, err_msg=name)
    chances = localisation.chances(Region(region), 100)
    assert chances["pointing_game"] == pytest.approx(0.05) and chances[
        "lead_mass"
    ] == pytest.approx(1 / 6)


def test_measures_against_slow_references(region):
    generator = np.random.default_rng(0)
    relevance = generator.integers(0, 6, region.shape).astype(float)  # with many ties
    found = localisation.measure(relevance, Region(region), 100)
    for row in range(3):
        flat, hits = relevance[row].ravel(), region[row].ravel()
        assert found["localisation_auc"][row] == pytest.approx(roc_auc_score(hits, flat))
        assert found["mass"][row] == pytest.approx(flat[hits].sum() / flat.sum())
        assert found["gini"][row] == pytest.approx(
            np.abs(flat[:, None] - flat[None]).sum() / (2 * len(flat) ** 2 * flat.mean())
        )
        shuffled = []
        for _ in range(200):  # ties broken at random
            order = np.lexsort((generator.random(len(flat)), -flat))[: hits.sum()]
            shuffled.append(hits[order].mean())
        assert found["rank_accuracy"][row] == pytest.approx(np.mean(shuffled), abs=0.02)


def test_what_is_not_counted_has_no_say(region):
    relevance, counted = np.ones(region.shape), np.zeros((3, 1, 100), bool)
    relevance[:, :, :25] = 50.0
    counted[:, :, 25:75] = True
    region = Region(region, counted)
    assert localisation.enrichment(relevance, region) == pytest.approx(1.0)
    found = localisation.measure(relevance, region, 100)
    assert found["mass"] == pytest.approx(40 / 600)
    assert found["enrichment"] == pytest.approx(1.0)
    assert found["pointing_game"] == pytest.approx(60 / 600)
    assert (region[1:].counted == counted[1:]).all() and len(region[1:].evidence) == 2


def test_the_pointing_game_forgives_50_ms_and_no_more(region):
    for sample, hit in ((25, 1.0), (24, 0.0), (54, 1.0), (55, 0.0)):
        relevance = np.zeros(region.shape)
        relevance[:, 2, sample] = 1.0
        found = localisation.measure(relevance, Region(region), 100)
        np.testing.assert_array_equal(found["pointing_game"], hit)


def test_no_evidence_and_no_relevance_give_no_number(region):
    region[1] = False
    relevance = np.ones(region.shape)
    relevance[2] = 0
    found = localisation.measure(relevance, Region(region), 100)
    assert np.isnan(found["mass"]).tolist() == [False, True, True]
    assert np.isnan(found["localisation_auc"]).tolist() == [False, True, False]
    rows = localisation.measure_rows(
        {"random": relevance, "|input|": relevance},
        Region(np.zeros_like(region)),
        list("abc"),
        100,
        draws=20,
    )
    assert np.isnan(next(row["value"] for row in rows if row["measure"] == "mass"))
    with pytest.raises(DataError, match="A mask is bool"):
        Region(region.astype(int))


def test_random_relevance_is_at_chance_on_the_cohort(cohort):
    truth = evidence.simulated_truth(cohort)
    positions = truth.positions("infarction")
    region = truth.region("infarction", positions)
    maps = localisation.baseline_maps(cohort.records.millivolts(positions), 100)
    rows = localisation.measure_rows(maps, region, positions, 100, draws=100)
    table = pd.DataFrame(rows).set_index(["attribution", "measure"])
    assert table.loc[("random", "enrichment"), "value"] == pytest.approx(1.0, abs=0.02)
    assert not table.loc[("random", "enrichment"), "passes"]
    assert table.loc[("R peaks", "enrichment"), "low"] > 1.0  # a QRS lies in the region
    assert ("random", "enrichment over |input|") in table.index


def test_simulated_regions_are_the_cohorts_own_and_can_be_laid_over_others(cohort):
    truth = evidence.simulated_truth(cohort)
    positions = truth.positions("bundle branch block")
    mask = truth.region("bundle branch block", positions).mask
    for row, place in enumerate(positions):
        codes = truth.stated("bundle branch block")[place]
        wanted = np.any([cohort.evidence([place], code)[0] for code in codes], axis=0)
        np.testing.assert_array_equal(mask[row], wanted)
    fold = cohort.records.table["fold"].to_numpy()
    assert (fold[positions] == 10).all() and (
        fold[truth.positions("infarction", "validation")] == 9
    ).all()
    others = np.array(
        [place for place in truth.split["test"] if not truth.stated("bundle branch block")[place]][
            :2
        ]
    )
    assert not truth.region("bundle branch block", others).mask.any()
    as_if = truth.region("bundle branch block", others, like=positions[:2]).mask
    assert as_if.any(axis=(1, 2)).all()
    np.testing.assert_array_equal(as_if.any(axis=2), mask[:2].any(axis=2))  # the same leads


def test_beats_of_a_lead_pair_p_before_and_t_behind():
    marks = pd.DataFrame(
        {
            "record_id": "1",
            "lead": "II",
            "wave": ["T", "P", "QRS", "T", "QRS", "P"],
            "onset": [5, 40, 50, 70, 150, 240],
            "peak": [8, 43, 54, 75, 154, 243],
            "offset": [12, 46, 58, 80, 158, 246],
        }
    )
    beats = evidence.lead_beats(
        marks.astype({name: "Int64" for name in ("onset", "peak", "offset")})
    )
    assert beats["QRS onset"].tolist() == [50, 150]
    assert beats["P onset"].iloc[0] == 40 and np.isnan(beats["P onset"].iloc[1])
    assert beats["T offset"].iloc[0] == 80 and np.isnan(beats["T offset"].iloc[1])


@pytest.mark.skipif(not LUDB.exists(), reason="LUDB is not here")
def test_ludb_regions_follow_the_marks():
    truth = evidence.ludb_truth(LUDB, 100)
    positions = truth.positions("bundle branch block")[:4]
    region = truth.region("bundle branch block", positions)
    assert 0.05 < localisation.chance_mass(region).mean() < 0.3
    assert not (region.mask & ~region.counted).any()
    region = truth.region("hypertrophy", truth.positions("hypertrophy")[:3])
    leads = region.mask.any(axis=(0, 2))
    assert {lead for lead, here in zip(LEADS, leads, strict=True) if here} == {
        "I",
        "aVL",
        "V1",
        "V2",
        "V5",
        "V6",
    }
    with pytest.raises(DataError, match="LUDB: no validation record has a statement of infarction"):
        truth.positions("infarction", "validation")


def test_truth_of_records_without_marks_and_bad_questions(cohort, tmp_path):
    records = cohort.records
    truth = evidence.targets_truth(records)
    positions = truth.positions("infarction")
    assert (records.targets[positions, records.classes.index("MI")] == 1).all()
    assert not truth.region("infarction", positions).mask.any() and "download ludb" in truth.note
    with pytest.raises(DataError, match="no group 'AFIB' of statements; choose one of infarction"):
        truth.positions("AFIB")
    healthy = records.select(np.flatnonzero(records.targets[:, records.classes.index("MI")] == 0))
    with pytest.raises(DataError, match="no test record has a statement of infarction"):
        evidence.targets_truth(healthy).positions("infarction")
    assert evidence.find_ludb("", tmp_path) is None
    (tmp_path / "ludb").mkdir()
    (tmp_path / "ludb" / "ludb.csv").touch()
    assert evidence.find_ludb(tmp_path) == tmp_path / "ludb"
    assert evidence.find_ludb(tmp_path / "ptb-xl") == tmp_path / "ludb"


class Planted(nn.Module):
    """Looks at the samples 100 to 119 of lead 7 alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(4.0))

    def forward(self, x):
        return (self.weight * x[:, 7, 100:120].mean(dim=1))[:, None]


def test_deletion_finds_a_planted_wave_and_random_relevance_does_not():
    signals = np.zeros((6, 12, 240), np.float32)
    signals[:, 7, 102:118] = 2.0  # gone when the patch is bridged
    true, generator = np.zeros(signals.shape), np.random.default_rng(1)
    true[:, 7, 100:120] = 1.0
    area = localisation.deletion_area(Planted(), signals, true, 0, 100, 2.4)
    chance = localisation.deletion_area(
        Planted(), signals, generator.random(signals.shape), 0, 100, 2.4
    )
    reverse = localisation.deletion_area(Planted(), signals, -true, 0, 100, 2.4)
    assert (area > 0.35).all() and abs(chance.mean()) < 0.25 and (reverse < -0.35).all()


def test_randomisation_goes_from_the_head_down_and_changes_the_map(cohort):
    torch.manual_seed(0)
    network = Classifier(make_encoder("xresnet1d_narrow"), 2).eval()
    for norm in [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]:
        nn.init.normal_(norm.weight, 1.0, 0.3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    copies = localisation.randomised_cascade(network, seed=1)
    assert [name for name, _ in copies] == [
        "head",
        "layer 5",
        "layer 4",
        "layer 3",
        "layer 2",
        "layer 1",
    ]
    changed = [
        {name for name, value in copy.state_dict().items() if not torch.equal(value, before[name])}
        for _, copy in copies
    ]
    assert changed[0] and all(name.startswith("head") for name in changed[0])
    assert all(fewer < more for fewer, more in zip(changed, changed[1:]))
    assert {name.split(".")[1] for name in changed[-1] if name.startswith("encoder")} == {
        "stem",
        "stages",
    }
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    maps = [
        attribute_records(model, cohort.records, np.arange(4), 0, "gradient", 2.5, 2.5)
        for model in (network, copies[-1][1])
    ]
    assert np.abs(localisation.rank_correlation(*maps)).mean() < 0.1
    np.testing.assert_allclose(localisation.rank_correlation(maps[0], 3 * maps[0]), 1.0)
    np.testing.assert_allclose(localisation.rank_correlation(maps[0], -maps[0], signed=True), -1.0)
    np.testing.assert_array_equal(localisation.rank_correlation(maps[0], 0 * maps[0]), 0.0)
    assert localisation.agreement([maps[0], maps[0], 2 * maps[0]]) == pytest.approx(1.0)
    with pytest.raises(DataError, match="two networks"):
        localisation.agreement(maps[:1])


def test_negatives_are_matched_by_heart_rate_and_used_once():
    rates = {0: 60.0, 1: 100.0, 2: 99.0, 3: 61.0, 4: 150.0}
    assert localisation.matched_negatives(
        rates, np.array([0, 1]), np.array([2, 3, 4])
    ).tolist() == [3, 2]
    assert localisation.matched_negatives(rates, np.array([0, 3]), np.array([1, 2])).tolist() == [
        2,
        1,
    ]
    with pytest.raises(DataError, match="take fewer records"):
        localisation.matched_negatives(rates, np.array([0, 1, 2]), np.array([3]))


def test_intervals_resample_patients_and_leave_out_what_is_missing():
    values, patients = np.array([1.0, 1.0, 3.0, np.nan]), list("aabb")
    found = localisation.mean_interval(values, patients, draws=400)
    assert (
        found.value == pytest.approx(5 / 3)
        and found.low == pytest.approx(1.0)
        and found.high == pytest.approx(3.0)
    )
    assert found == localisation.mean_interval(values, patients, draws=400)
    assert np.isnan(localisation.mean_interval(values[3:], patients[3:]).value)


def test_heights_are_measured_where_the_marks_say(cohort):
    heights = height_regression.wave_heights(cohort)
    assert heights.shape == (len(cohort.records), 3)
    signal = cohort.records.millivolts([0])[0]
    beats = cohort.beats[cohort.records.table["record_id"].iloc[0]]
    normal = beats[beats["kind"] == "normal"][["QRS onset", "QRS offset"]].dropna().to_numpy(int)
    tops = [
        signal[LEADS.index("V5"), a : b + 1].max() - signal[LEADS.index("V5"), a] for a, b in normal
    ]
    assert heights[0, 1] == pytest.approx(np.median(tops))
    mask = height_regression.wave_region(cohort, np.array([0]), "R").mask
    assert mask[0].any(axis=1).nonzero()[0].tolist() == [LEADS.index("V5")]
    assert mask.sum() == sum(b - a + 1 for a, b in normal)


def test_a_height_regressor_is_repeatable_and_needs_records(cohort):
    first, again = (
        height_regression.height_regressor(cohort, steps=2, batch_size=4)[2] for _ in range(2)
    )
    assert first.equals(again) and list(first.index) == ["P", "R", "T"]
    with pytest.raises(DataError, match="too few to teach"):
        height_regression.height_regressor(simulate_cohort(1, seed=0), steps=1)
