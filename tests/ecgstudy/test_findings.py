"""The report's tables: verdicts follow the intervals, published gains are differences of printed
figures.
"""

import numpy as np
import pandas as pd
import pytest

from ecglib.errors import DataError
from ecgstudy.analysis.claims import (
    PARTS,
    findings,
    main_fractions,
    report_tables,
    shown_findings,
    systems,
    verdict,
)
from ecgtools.environment import ROOT

PUBLISHED = ROOT / "data" / "published"


def gains(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns)


@pytest.fixture
def tables() -> dict[str, pd.DataFrame]:
    """Made-up gains, one of each kind, so that every claim has a row whose verdict is known
    beforehand.
    """
    arms = gains(
        method=["simclr", "simclr", "simclr", "random"],
        encoder="xresnet1d_narrow",
        protocol=["fine-tuned", "frozen", "frozen", "frozen"],
        fraction=[1.0, 1.0, 0.1, 0.1],
        over=["supervised", "random", "random", "supervised"],
        gain=[0.01, -0.02, 0.0, 0.3],
        low=[0.005, -0.03, -0.01, 0.2],
        high=[0.015, -0.01, 0.01, 0.4],
    )
    semi = gains(
        method="ce_ssl",
        over=["fixmatch", "supervised"],
        fraction=0.05,
        metric="macro_auroc",
        gain=[0.02, -0.01],
        low=[0.01, -0.02],
        high=[0.03, 0.005],
    )
    stages = gains(
        method="distl",
        network="student",
        stage=3,
        fraction=0.1,
        over_network="student",
        over=["supervised", "fixmatch", "oracle"],
        over_stage=[0, 3, 3],
        metric="macro_auroc",
        gain=[0.03, 0.02, -0.03],
        low=[0.02, -0.01, -0.05],
        high=[0.04, 0.05, -0.01],
    )
    fusion = gains(
        over=["best_single", "concatenation", "alone"],
        over_protocol="frozen",
        fraction=0.1,
        gain=[0.01, -0.01, 0.2],
        low=[0.002, -0.02, 0.1],
        high=[0.02, -0.005, 0.3],
    )
    noise = gains(
        method=["all", "all", "byol"],
        protocol="frozen",
        family=["in the family", "outside", "outside"],
        gain=[-0.02, 0.01, 0.3],
        low=[-0.03, -0.01, 0.2],
        high=[-0.01, 0.02, 0.4],
    )
    relevance = gains(
        method=["supervised", "supervised", "byol"],
        fraction=[1.0, 1.0, 0.1],
        value=[2.0, 9.0, -1.0],
        attribution=["chosen: gradient", "random", "chosen: gradient"],
        low=[1.0, 8.0, -2.0],
        measure=["enrichment over |input|"] * 2 + ["enrichment over supervised"],
        high=[3.0, 10.0, -0.5],
    )
    relevance["class"] = "infarction"
    scores = {"value": 0.8, "low": 0.7, "high": 0.9, "seeds": 5}
    arm = gains(
        method=["simclr", "swav"], protocol="frozen", encoder="a", fraction=[0.1, 1.0], **scores
    )
    fused = gains(
        method=["dvme", "dvme", "alone"],
        over_protocol="frozen",
        members=["a+b+c", "a+b", "a"],
        fraction=0.1,
        **scores,
    )
    semi_arm = gains(method=["ce_ssl"], start="simulated", backbone="b", fraction=0.05, **scores)
    stage = gains(
        method=["distl", "distl"], network=["student", "teacher"], stage=3, fraction=0.1, **scores
    )
    return {
        "label_efficiency_gains": arms,
        "semi_supervised_gains": semi,
        "self_evolving_gains": stages,
        "fusion_gains": fusion,
        "robustness_differences": noise,
        "saliency": relevance,
        "label_efficiency_summary": arm,
        "fusion_summary": fused,
        "semi_supervised_summary": semi_arm,
        "self_evolving_summary": stage,
    }


def test_a_verdict_needs_an_interval_without_zero():
    assert [verdict(0.01, 0.02), verdict(-0.02, -0.01), verdict(-0.01, 0.01)] == [
        "agrees",
        "the opposite",
        "no finding",
    ]


def test_published_gains_are_differences_of_the_printed_figures(tables):
    claims = findings(tables, PUBLISHED, "simulated").set_index(["system", "claim"])
    printed = claims["published"]
    assert printed["simclr", "fine-tuned, above training from scratch"] == pytest.approx(
        0.927 - 0.924
    )
    frozen = claims.loc[("simclr", "frozen, above the same encoder never trained")].set_index(
        "labels"
    )
    assert frozen.loc[1.0, "published"] == pytest.approx(0.883 - 0.721) and np.isnan(
        frozen.loc[0.1, "published"]
    )
    assert printed["ce_ssl", "above fixmatch"] == pytest.approx(0.901 - 0.882)
    assert np.isnan(printed["ce_ssl", "above supervised"])
    assert printed["distl", "at T = 3 above T = 0"] == pytest.approx(0.974 - 0.948)


def test_every_claim_has_its_verdict_and_origin(tables):
    claims = findings(tables, PUBLISHED, "simulated")
    told = dict(zip(claims["system"] + ": " + claims["claim"], claims["verdict"]))
    assert told["simclr: fine-tuned, above training from scratch"] == "agrees"
    assert (
        told["ce_ssl: above supervised"] == told["distl: at T = 3 above fixmatch"] == "no finding"
    )
    assert told["dvme: above one logistic regression on all features"] == "the opposite"
    noise = "loses less than training from scratch under noise like the augmentation's"
    assert told[f"pretraining: frozen, {noise}"] == "agrees"
    assert (
        told["byol: relevance in the evidence, above supervised at equal AUROC: infarction"]
        == "the opposite"
    )
    assert (claims["system"] == "supervised").sum() == 1, "baselines of relevance are no claims"
    assert set(claims["origin"]) == {"simulated"}
    assert "random" not in set(claims["system"]), "a control is no claim"
    assert not claims["claim"].str.contains("oracle").any(), "nobody claims to beat all labels"


def test_the_table_for_reading_shows_what_is_unknown_as_unknown(tables):
    shown = shown_findings(findings(tables, PUBLISHED, "simulated"))
    row = shown[(shown["system"] == "ce_ssl") & (shown["claim"] == "above supervised")].iloc[0]
    assert (row["published"], row["here"], row["labels"]) == ("–", "-0.010 [-0.020, +0.005]", "5%")


def test_each_system_has_one_row_at_the_fraction_next_to_a_tenth(tables):
    rows = systems(tables)
    assert list(rows["part"]) == ["self-supervised", "fusion", "semi-supervised", "self-evolving"]
    assert list(rows["fraction"]) == [0.1, 0.1, 0.05, 0.1]
    assert rows.loc[1, "network"] == "3 encoders", "fusions of fewer members are ablations"
    assert rows.loc[3, "form"] == "T = 3" and rows.loc[3, "network"] == "student"


def test_few_a_tenth_and_all():
    fractions = pd.Series([0.01, 0.02, 0.05, 0.1, 0.25, 1.0])
    assert list(fractions[main_fractions(fractions)]) == [0.01, 0.1, 1.0]


def test_missing_tables_are_named_with_the_notebooks_to_run(tmp_path):
    (tmp_path / "tables").mkdir()
    for name in set(PARTS) - {"fusion_gains", "fusion_summary", "saliency"}:
        (tmp_path / "tables" / f"{name}.csv").write_text("a\n1\n")
    with pytest.raises(
        DataError,
        match="lacks the tables fusion_summary, fusion_gains, saliency; run 10_fusion, 16_s",
    ):
        report_tables(tmp_path)
