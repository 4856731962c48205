"""The same classifier has one score on the same records in every table of the smoke profile."""

from collections import defaultdict
from collections.abc import Iterator

import pandas as pd
import pytest

from ecgtools.environment import ROOT

TABLES = ROOT / "results" / "smoke" / "tables"
NAMES = (
    *("label_efficiency", "semi_supervised", "self_evolving", "fusion", "robustness"),
    *("robustness_threshold", "label_efficiency_summary", "semi_supervised_summary"),
    *("self_evolving_summary", "fusion_summary", "systems"),
)


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    """The tables of the last smoke run, which `test_notebooks.py` completes where it was cut."""
    lacking = [name for name in NAMES if not (TABLES / f"{name}.csv").exists()]
    if lacking:
        pytest.skip(f"{lacking[0]}.csv is not there; run `./run_all.sh smoke`")
    return {name: pd.read_csv(TABLES / f"{name}.csv") for name in NAMES}


def arms(tables: dict[str, pd.DataFrame]) -> Iterator[tuple[str, tuple, float]]:
    """Table, classifier (method, how it was trained, encoder, fraction, seed) and macro AUROC."""
    for name in ("label_efficiency", "semi_supervised", "self_evolving", "fusion"):
        table = tables[name].query("split == 'test' and metric == 'macro_auroc'")
        if name == "semi_supervised":
            table = table.assign(protocol=table["start"] + " start", encoder=table["backbone"])
            table = table[table["method"] != "frozen"]
        if name == "self_evolving":
            table = table[table["network"] == "student"]
            protocol = "stage" + table["stage"].astype(str)
            table = table.assign(protocol=protocol, encoder="vit1d_small")
        if name == "fusion":
            many = (table["members"].str.count(r"\+") + 1).astype(str) + " encoders"
            largest = table[
                table["members"].str.count(r"\+") == table["members"].str.count(r"\+").max()
            ]
            table = largest.assign(encoder=many)
        for row in table.itertuples():
            yield name, (row.method, row.protocol, row.encoder, row.fraction, row.seed), row.value
    for name, column in (("robustness", "auroc"), ("robustness_threshold", "clean")):
        table = tables[name]
        clean = table[table["snr_db"] == float("inf")] if name == "robustness" else table
        for row in clean.itertuples():
            arm = (row.method, row.protocol, row.encoder, row.fraction, row.seed)
            yield name, arm, getattr(row, column)


def test_a_classifier_has_one_score_wherever_it_is_printed(tables):
    scores: dict[tuple, dict[str, set]] = defaultdict(lambda: defaultdict(set))
    for name, arm, value in arms(tables):
        scores[arm][name].add(value)
    compared = 0
    for arm, by_table in scores.items():
        values = [value for found in by_table.values() for value in found]
        compared += len(by_table) > 1
        assert max(values) - min(values) < 1e-6, f"{arm} is scored {dict(by_table)}"
    noisy = {tuple(row) for row in tables["robustness"][["method", "protocol", "encoder"]].values}
    assert compared == len(noisy), "every classifier under noise stands in the table of its study"


def test_a_frozen_encoder_alone_in_the_fusion_is_the_one_of_the_label_curve(tables):
    test = "split == 'test' and metric == 'macro_auroc'"
    alone = tables["fusion"].query(f"{test} and method == 'alone'")
    frozen = tables["label_efficiency"].query(f"{test} and protocol == 'frozen'")
    both = alone.merge(
        frozen, left_on=["members", "fraction", "seed"], right_on=["method", "fraction", "seed"]
    )
    both = both[~both["members"].isin(["random", "supervised"])]
    assert len(both) and (both["value_x"] - both["value_y"]).abs().max() < 1e-6


def test_summaries_say_what_the_runs_say(tables):
    for name, key in {
        "label_efficiency": ["method", "encoder", "protocol", "fraction"],
        "semi_supervised": ["method", "backbone", "start", "fraction"],
        "fusion": ["method", "members", "protocol", "fraction"],
    }.items():
        runs = tables[name].query("split == 'test' and metric == 'macro_auroc'")
        means = runs.groupby(key)["value"].mean()
        summary = tables[f"{name}_summary"].set_index(key)["value"]
        assert (means - summary).abs().max() < 1e-9, name


def test_the_systems_of_the_report_are_those_of_the_summaries(tables):
    curve = tables["label_efficiency_summary"]
    shown = tables["systems"].query("part == 'self-supervised'")
    for row in shown.itertuples():
        own = curve.query(
            "method == @row.method and protocol == @row.form and encoder == @row.network "
            "and fraction == @row.fraction"
        )
        assert own["value"].tolist() == pytest.approx([row.value], abs=1e-9)
