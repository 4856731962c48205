"""The study's findings in one table: what papers claim, what they print, what was measured here,
and whether it agrees.

Every figure is taken from the tables of the notebooks and from `data/published/`; nothing is typed
in.
"""

from collections.abc import Mapping
from pathlib import Path

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
NEAR = 0.1  # of the labels, the share at which all parts of the study meet
COLUMNS = [
    "system",
    "claim",
    "labels",
    "published",
    "source",
    "here",
    "low",
    "high",
    "origin",
    "verdict",
]


def report_tables(results: str | Path) -> dict[str, pd.DataFrame]:
    """Every table of `PARTS` by its name; DataError naming those that are missing and the notebooks
    to run.
    """
    found = {name: Path(results) / "tables" / f"{name}.csv" for name in PARTS}
    missing = [name for name, path in found.items() if not path.exists()]
    if missing:
        notebooks = list(dict.fromkeys(PARTS[name] for name in missing))
        raise DataError(
            f"{results}: the report lacks the tables {', '.join(missing)}; run {', '.join(notebooks)} first."
        )
    return {name: pd.read_csv(path) for name, path in found.items()}


def verdict(low: float, high: float) -> str:
    """What a paired interval of a gain says about a claim that there is one."""
    return "agrees" if low > 0 else "the opposite" if high < 0 else "no finding"


def nearest(fractions: pd.Series, near: float = NEAR) -> float:
    """The fraction nearest to `near`."""
    return min(fractions.unique(), key=lambda fraction: abs(fraction - near))


def looked_at(gains: pd.DataFrame) -> pd.DataFrame:
    """The rows at the fewest labels, at the fraction nearest to 10 % and at the most."""
    fractions = gains["fraction"]
    return gains[fractions.isin((fractions.min(), nearest(fractions), fractions.max()))]


def systems(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Every system of the study with its macro AUROC on fold 10, at that fraction of each part
    nearest to 10 %.

    Columns part, method, form (protocol, start or stage), network, fraction, value, low, high,
    seeds.
    """
    stages = tables["self_evolving_summary"]
    stages = stages[(stages["network"] == "student") & (stages["stage"] == stages["stage"].max())]
    fused = tables["fusion_summary"]
    members = fused["members"].str.count(r"\+") + 1
    fused = fused.assign(members=members.astype(str) + " encoders")
    fused = fused[(fused["method"] != "alone") & (members == members.max())]
    frames = {
        "self-supervised": tables["label_efficiency_summary"].rename(
            columns={"protocol": "form", "encoder": "network"}
        ),
        "fusion": fused.rename(columns={"protocol": "form", "members": "network"}),
        "semi-supervised": tables["semi_supervised_summary"].rename(
            columns={"start": "form", "backbone": "network"}
        ),
        "self-evolving": stages.assign(form="T = " + stages["stage"].astype(str)),
    }
    kept = []
    for part, frame in frames.items():
        kept.append(frame[frame["fraction"] == nearest(frame["fraction"])].assign(part=part))
    columns = ["part", "method", "form", "network", "fraction", "value", "low", "high", "seeds"]
    return pd.concat(kept, ignore_index=True)[columns]


def findings(
    tables: Mapping[str, pd.DataFrame], published: str | Path, origin: str
) -> pd.DataFrame:
    """A row a claim: the gain that papers print, NaN where none is known, and the gain here with
    its paired interval.

    Gains are in macro AUROC; where a claim is about relevance, in multiples of chance.

    `labels` is the share of the labels here, `origin` says what the figures here are: simulated, or
    measured. The papers' data, classes and sizes are others: a sign can agree or not, a size cannot
    be compared.
    """
    folder = Path(published)
    rows = [
        *_self_supervised(
            tables["label_efficiency_gains"], pd.read_csv(folder / "ecg-selfsupervised.csv")
        ),
        *_semi_supervised(tables["semi_supervised_gains"], pd.read_csv(folder / "ce-ssl.csv")),
        *_self_evolving(
            tables["self_evolving_gains"], pd.read_csv(folder / "distl-echoclr-dvme.csv")
        ),
        *_fusion(tables["fusion_gains"]),
        *_robustness(tables["robustness_differences"]),
        *_saliency(tables["saliency"]),
    ]
    return pd.DataFrame(rows).assign(origin=origin)[COLUMNS]


def _row(
    system: str, claim: str, ours: pd.Series, published: float = np.nan, source: str = "none known"
) -> dict:
    """One finding; `ours` has fraction, gain, low and high."""
    return {
        "system": system,
        "claim": claim,
        "labels": ours["fraction"],
        "published": published,
        "source": source,
        "here": ours["gain"],
        "low": ours["low"],
        "high": ours["high"],
        "verdict": verdict(ours["low"], ours["high"]),
    }


def _self_supervised(gains: pd.DataFrame, printed: pd.DataFrame) -> list[dict]:
    """Fine-tuned with all labels against from scratch; frozen with few and with all labels against
    never trained.
    """
    gains = looked_at(gains[gains["method"] != "random"])
    printed = printed[printed["task"] == "PTB-XL all"].drop_duplicates(
        ["encoder", "pretraining", "protocol"]
    )
    means = printed.set_index(["encoder", "pretraining", "protocol"])["mean"]
    rows = []
    for row in gains.sort_values(["method", "encoder", "protocol", "fraction"]).to_dict("records"):
        frozen = row["protocol"] == "frozen"
        wanted = (row["over"] == "random") if frozen else row["fraction"] == gains["fraction"].max()
        if row["over"] == "supervised" and frozen and row["fraction"] == gains["fraction"].min():
            rows.append(
                _row(
                    row["method"], "frozen, above training from scratch with the fewest labels", row
                )
            )
        if not wanted:
            continue
        control, protocol = (
            ("linear (random frozen)", "linear") if frozen else ("supervised", "fine-tuned")
        )
        claim = f"{row['protocol']}, above {'the same encoder never trained' if frozen else 'training from scratch'}"
        there = [
            key
            for key in means.index
            if key[1].lower().startswith(f"{row['method']} (")
            and key[2] == protocol
            and (key[0], "none", control) in means.index
        ]
        if there and row["fraction"] == gains["fraction"].max():
            gain = means[there[0]] - means[there[0][0], "none", control]
            rows.append(
                _row(row["method"], claim, row, gain, "Mehari & Strodthoff 2022, PTB-XL all")
            )
        else:
            rows.append(_row(row["method"], claim, row))
    return rows


def _semi_supervised(gains: pd.DataFrame, printed: pd.DataFrame) -> list[dict]:
    """CE-SSL against every other method, at the fewest labels; published for 5 % of PTB-XL's
    labels.
    """
    names = {
        "fixmatch": ("S8", "FixMatch"),
        "fixmatch_lora": ("S8", "FixMatch + LoRA r=16"),
        "fixmatch_dylora": ("S8", "FixMatch + DyLoRA r=16"),
        "fixmatch_adalora": ("S8", "FixMatch + AdaLoRA r=16"),
        "ce_ssl_without_deactivation": ("S11", "w/o random deactivation"),
        "ce_ssl_without_allocation": ("S11", "w/o rank allocation"),
        "ce_ssl_without_norm": ("S11", "w/o semi-supervised BN"),
    }
    printed = printed[(printed["dataset"] == "PTB-XL") & (printed["metric"] == "macro AUC")]
    means = printed.set_index(["table", "method"])["mean"]
    ours = gains[
        (gains["metric"] == "macro_auroc") & (gains["fraction"] == gains["fraction"].min())
    ]
    rows = []
    for row in ours.to_dict("records"):
        claim = f"above {row['over'].replace('_', ' ')}"
        if row["over"] in names:
            table, other = names[row["over"]]
            own = means[table, "CE-SSL r=16" if table == "S8" else "CE-SSL"]
            rows.append(
                _row(
                    "ce_ssl",
                    claim,
                    row,
                    own - means[table, other],
                    f"CE-SSL's table {table}, PTB-XL, 5 %",
                )
            )
        else:
            rows.append(_row("ce_ssl", claim, row))
    return rows


def _self_evolving(gains: pd.DataFrame, printed: pd.DataFrame) -> list[dict]:
    """DISTL's student at the last T against its start and against every other arm at the same T."""
    students = (gains["network"] == "student") & (gains["over_network"] == "student")
    last = gains[students & (gains["method"] == "distl") & (gains["metric"] == "macro_auroc")]
    last = last[last["stage"] == last["stage"].max()]
    figures = printed[(printed["paper"] == "DISTL") & (printed["metric"] == "AUROC")]
    task = figures["task"].iloc[0]
    figures = figures[figures["task"] == task].set_index("setting")["value"]
    rows = []
    for row in last.to_dict("records"):
        if row["over_stage"] == 0:
            gain = figures["T=3"] - figures["T=0"]
            rows.append(
                _row("distl", f"at T = {row['stage']} above T = 0", row, gain, f"DISTL, {task}")
            )
        elif row["over_stage"] == row["stage"] and row["over"] != "oracle":
            rows.append(
                _row("distl", f"at T = {row['stage']} above {row['over'].replace('_', ' ')}", row)
            )
    return rows


def _fusion(gains: pd.DataFrame) -> list[dict]:
    """DVME on frozen encoders against the best single one and against one logistic regression on
    everything.
    """
    names = {
        "best_single": "the best single encoder",
        "concatenation": "one logistic regression on all features",
    }
    frozen = looked_at(gains)
    frozen = frozen[(frozen["over_protocol"] == "frozen") & frozen["over"].isin(names)]
    return [_row("dvme", f"above {names[row['over']]}", row) for row in frozen.to_dict("records")]


def _robustness(differences: pd.DataFrame) -> list[dict]:
    """Pretrained encoders against supervised ones: how much less macro AUROC noise costs them, all
    methods together.
    """
    pooled = differences[
        (differences["method"] == "all") & differences["family"].isin(["in the family", "outside"])
    ]
    words = {"in the family": "like the augmentation's", "outside": "of other kinds"}
    rows = []
    for row in pooled.to_dict("records"):
        ours = {
            "fraction": np.nan,
            "gain": -row["gain"],
            "low": -row["high"],
            "high": -row["low"],
        }
        claim = f"{row['protocol']}, loses less than training from scratch under noise {words[row['family']]}"
        rows.append(_row("pretraining", claim, ours))
    return rows


def _saliency(table: pd.DataFrame) -> list[dict]:
    """Where the relevance lies, in multiples of chance: over the signal's own size, and over
    supervised networks.
    """
    measures = {
        "enrichment over |input|": "relevance in the evidence, above |input|",
        "enrichment over |input|²": "relevance in the evidence, above |input|²",
        "enrichment over supervised": "relevance in the evidence, above supervised at equal AUROC",
    }
    chosen = table["attribution"].astype(str).str.startswith("chosen") & table["value"].notna()
    rows = []
    for row in table[chosen & table["measure"].isin(measures)].to_dict("records"):
        ours = {
            "fraction": row["fraction"],
            "gain": row["value"],
            "low": row["low"],
            "high": row["high"],
        }
        rows.append(_row(row["method"], f"{measures[row['measure']]}: {row['class']}", ours))
    return rows


def shown_findings(rows: pd.DataFrame) -> pd.DataFrame:
    """The findings as a table for reading: gains with their intervals as text, shares of labels in
    per cent.
    """
    published = [f"{value:+.3f}" if np.isfinite(value) else "–" for value in rows["published"]]
    here = [f"{row.here:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for row in rows.itertuples()]
    shares = [f"{value:.0%}" if np.isfinite(value) else "–" for value in rows["labels"]]
    shown = rows.assign(published=published, here=here, labels=shares)
    return shown[["system", "claim", "labels", "published", "source", "here", "origin", "verdict"]]
