"""The study's findings in one table: what papers claim, what they print, what was measured here,
and whether it agrees.

The claims stand in `claims.csv`: the rows of a table in which each is measured (a query), its
system and words with columns of such a row, what papers print of it, and -1 where less is better.
Every figure is taken from the tables of the notebooks and from `data/published/`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ecglib.errors import DataError

# Table -> the notebook that writes it. The report needs them all.
PARTS = {
    "classes": "00_prepare_data",
    "left_out": "00_prepare_data",
    "supervised_summary": "02_supervised_baseline",
    "label_efficiency_summary": "09_probe_and_fine_tune",
    "label_efficiency_gains": "09_probe_and_fine_tune",
    "fusion_summary": "10_fusion",
    "fusion_gains": "10_fusion",
    "semi_supervised_summary": "12_semi_supervised",
    "semi_supervised_gains": "12_semi_supervised",
    "adaptation_cost": "12_semi_supervised",
    "self_evolving_summary": "13_self_evolving",
    "self_evolving_gains": "13_self_evolving",
    "labels_needed": "14_label_efficiency",
    "robustness": "15_snr_robustness",
    "robustness_threshold": "15_snr_robustness",
    "robustness_differences": "15_snr_robustness",
    "saliency": "16_saliency",
}
CLAIMS = Path(__file__).with_name("claims.csv")
NEAR = 0.1  # of the labels, the share at which all parts of the study meet


def report_tables(results: str | Path) -> dict[str, pd.DataFrame]:
    """Every table of `PARTS` by its name; DataError naming those that are missing and the notebooks
    to run.
    """
    found = {name: Path(results) / "tables" / f"{name}.csv" for name in PARTS}
    missing = [name for name, path in found.items() if not path.exists()]
    if missing:
        notebooks = list(dict.fromkeys(PARTS[name] for name in missing))
        raise DataError(
            f"{results}: the report lacks the tables {', '.join(missing)}; run "
            f"{', '.join(notebooks)} first."
        )
    return {name: pd.read_csv(path) for name, path in found.items()}


def verdict(low: float, high: float) -> str:
    """What a paired interval of a gain says about a claim that there is one."""
    return "agrees" if low > 0 else "the opposite" if high < 0 else "no finding"


def nearest(fractions: pd.Series, near: float = NEAR) -> float:
    """The fraction nearest to `near`."""
    return min(fractions.unique(), key=lambda fraction: abs(fraction - near))


def main_fractions(fractions: pd.Series) -> pd.Series:
    """Which of the fractions are the smallest, the one nearest to 10 % or the largest."""
    return fractions.isin((fractions.min(), nearest(fractions), fractions.max()))


def systems(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every system of the study with its macro AUROC on fold 10, at that fraction of each part
    nearest to 10 %.

    Columns part, method, form (protocol, start or stage), network, fraction, value, low, high,
    seeds.
    """
    stages = tables["self_evolving_summary"].query("network == 'student' and stage == stage.max()")
    fused = tables["fusion_summary"].query("method != 'alone'")
    members = fused["members"].str.count(r"\+") + 1
    fused = fused.assign(members=members.astype(str) + " encoders")[members == members.max()]
    frames = {
        "self-supervised": tables["label_efficiency_summary"],
        "fusion": fused,
        "semi-supervised": tables["semi_supervised_summary"],
        "self-evolving": stages.assign(form="T = " + stages["stage"].astype(str)),
    }
    names = {"protocol": "form", "start": "form"}
    names |= dict.fromkeys(("encoder", "members", "backbone"), "network")
    kept = [
        frame[frame["fraction"] == nearest(frame["fraction"])]
        .rename(columns=names)
        .assign(part=part)
        for part, frame in frames.items()
    ]
    columns = ["part", "method", "form", "network", "fraction", "value", "low", "high", "seeds"]
    return pd.concat([frame.reindex(columns=columns) for frame in kept], ignore_index=True)


def _printed_self_supervised(row: Mapping, folder: Path) -> tuple[float, str]:
    """Mehari & Strodthoff on PTB-XL: the method minus its control, with all labels."""
    printed = pd.read_csv(folder / "ecg-selfsupervised.csv").query("task == 'PTB-XL all'")
    printed = printed.drop_duplicates(["encoder", "pretraining", "protocol"])
    frozen = row["protocol"] == "frozen"
    own = printed[printed["protocol"] == ("linear" if frozen else "fine-tuned")]
    own = own[own["pretraining"].str.lower().str.startswith(f"{row['method']} (")]
    control = "linear (random frozen)" if frozen else "supervised"
    control = printed.query("pretraining == 'none' and protocol == @control")
    pairs = own.merge(control, on="encoder")
    if not len(pairs):
        return np.nan, "none known"
    gain = pairs["mean_x"].iloc[0] - pairs["mean_y"].iloc[0]
    return gain, "Mehari & Strodthoff 2022, PTB-XL all"


CE_SSL_TABLES = {  # table and name of each comparator in CE-SSL's paper
    "fixmatch": ("S8", "FixMatch"),
    "fixmatch_lora": ("S8", "FixMatch + LoRA r=16"),
    "fixmatch_dylora": ("S8", "FixMatch + DyLoRA r=16"),
    "fixmatch_adalora": ("S8", "FixMatch + AdaLoRA r=16"),
    "ce_ssl_without_deactivation": ("S11", "w/o random deactivation"),
    "ce_ssl_without_allocation": ("S11", "w/o rank allocation"),
    "ce_ssl_without_norm": ("S11", "w/o semi-supervised BN"),
}


def _printed_semi_supervised(row: Mapping, folder: Path) -> tuple[float, str]:
    """CE-SSL minus the comparator, for 5 % of PTB-XL's labels."""
    if row["over"] not in CE_SSL_TABLES:
        return np.nan, "none known"
    table, other = CE_SSL_TABLES[row["over"]]
    printed = pd.read_csv(folder / "ce-ssl.csv").query(
        "dataset == 'PTB-XL' and metric == 'macro AUC' and table == @table"
    )
    means = printed.set_index("method")["mean"]
    own = means["CE-SSL r=16" if table == "S8" else "CE-SSL"]
    return own - means[other], f"CE-SSL's table {table}, PTB-XL, 5 %"


def _printed_self_evolving(row: Mapping, folder: Path) -> tuple[float, str]:
    """DISTL's last stage minus its first, in the first of its tasks."""
    printed = pd.read_csv(folder / "distl-echoclr-dvme.csv")
    printed = printed.query("paper == 'DISTL' and metric == 'AUROC'")
    task = printed["task"].iloc[0]
    means = printed[printed["task"] == task].set_index("setting")["value"]
    return means["T=3"] - means["T=0"], f"DISTL, {task}"


PRINTED = {  # by the name in `claims.csv`
    "self_supervised": _printed_self_supervised,
    "semi_supervised": _printed_semi_supervised,
    "self_evolving": _printed_self_evolving,
}


def findings(
    tables: Mapping[str, pd.DataFrame], published: str | Path, origin: str
) -> pd.DataFrame:
    """One row per claim: the gain that papers print, NaN where none is known, and the gain here
    with its paired interval.

    Gains are in macro AUROC; where a claim is about relevance, in multiples of chance.

    `labels` is the share of the labels here, `origin` says what the figures here are: simulated, or
    measured. The papers' data, classes and sizes are others: a sign can agree or not, a size cannot
    be compared.
    """
    claims = pd.read_csv(CLAIMS, keep_default_na=False)
    findings = []
    for name, own in claims.groupby("table", sort=False):
        for claim in own.itertuples():
            for place, row in tables[name].query(claim.rows).to_dict("index").items():
                finding = _finding(claim, row, Path(published))
                findings.append({"table": name, "place": place, **finding})
    frame = pd.DataFrame(findings)
    # In the order of the tables, and of their rows.
    frame["table"] = pd.Categorical(frame["table"], claims["table"].unique())
    frame = frame.sort_values(["table", "place"], kind="stable", ignore_index=True)
    verdicts = [verdict(row.low, row.high) for row in frame.itertuples()]
    return frame.drop(columns=["table", "place"]).assign(origin=origin, verdict=verdicts)


def _finding(claim: NamedTuple, row: Mapping, folder: Path) -> dict:
    """The finding of one row of the table in which a claim is measured."""
    texts = row | {"over": str(row.get("over")).replace("_", " ")}
    published, source = np.nan, "none known"
    if claim.published:
        published, source = PRINTED[claim.published](row, folder)
    low, high = sorted((claim.sign * row["low"], claim.sign * row["high"]))
    return {
        "system": claim.system.format(**texts),
        "claim": claim.claim.format(**texts),
        "labels": row.get("fraction", np.nan),
        "published": published,
        "source": source,
        "here": claim.sign * row.get("gain", row.get("value")),
        "low": low,
        "high": high,
    }


def shown_findings(rows: pd.DataFrame) -> pd.DataFrame:
    """The findings as a table for reading: gains with their intervals as text, shares of labels in
    per cent.
    """
    here = [f"{row.here:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in rows.itertuples()]
    shown = rows.assign(
        published=rows["published"].map("{:+.3f}".format, na_action="ignore").fillna("–"),
        here=here,
        labels=rows["labels"].map("{:.0%}".format, na_action="ignore").fillna("–"),
    )
    return shown[["system", "claim", "labels", "published", "source", "here", "origin", "verdict"]]
