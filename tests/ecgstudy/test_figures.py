"""Figures of the study: one look, and the numbers drawn are those of the table."""

import numpy as np
import pandas as pd
import pytest

from ecglib.errors import DataError
from ecgstudy.analysis.cost import COSTS, plot_cost, plot_ranks
from ecgstudy.analysis.figures import method_colours, method_label
from ecgstudy.analysis.fusion import plot_similarity, plot_token_weights
from ecgstudy.analysis.gains import plot_gains
from ecgstudy.analysis.label_curve import plot_label_curve, plot_label_efficiency
from ecgstudy.analysis.robustness import plot_robustness
from ecgstudy.analysis.self_evolving import plot_stages
from ecgstudy.analysis.training_curves import plot_training
from ecgstudy.methods import METHODS
from ecgstudy.results import save_figure


def make_table() -> pd.DataFrame:
    """Two methods, three fractions, three seeds."""
    rows = [
        (
            method,
            fraction,
            seed,
            0.7 + 0.1 * fraction + 0.02 * seed + lift,
            0.65 + lift,
            0.85 + lift,
        )
        for method, lift in (("Supervised", 0.0), ("SimCLR", 0.05))
        for fraction in (0.01, 0.1, 1.0)
        for seed in range(3)
    ]
    return pd.DataFrame(rows, columns=["method", "fraction", "seed", "value", "low", "high"])


def test_label_curve_draws_the_means_and_names_its_axes():
    figure = plot_label_curve(make_table(), training_records=2010)
    axes = figure.axes[0]
    lines = {bar.get_label(): bar.lines[0] for bar in axes.containers}
    assert (
        list(lines)
        == ["Supervised", "SimCLR"]
        == [text.get_text() for text in axes.get_legend().get_texts()]
    )
    assert np.allclose(lines["SimCLR"].get_ydata(), 0.77 + 0.1 * np.array([0.01, 0.1, 1]))
    assert np.allclose(lines["SimCLR"].get_xdata(), [0.01, 0.1, 1], rtol=0.05)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "1 %\n20",
        "10 %\n201",
        "100 %\n2,010",
    ]
    assert axes.get_xscale() == "log" and "95 %" in axes.get_ylabel()
    assert "number of labelled records" in axes.get_xlabel()


def test_label_curve_refuses_a_wrong_table():
    with pytest.raises(DataError, match="'low'"):
        plot_label_curve(make_table().drop(columns="low"))
    with pytest.raises(DataError, match="no row"):
        plot_label_curve(make_table().iloc[:0])


def test_training_shows_each_loss():
    history = pd.DataFrame(
        {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "learning_rate": [0.0, 1.0, 0.0]}
    )
    history["validation_loss"] = [np.nan, 2.5, np.nan]
    above, below = plot_training(history).axes
    assert [text.get_text() for text in above.get_legend().get_texts()] == [
        "training loss",
        "validation loss",
    ]
    assert len(below.lines[0].get_xdata()) == 3 and below.get_xlabel() == "Step (mini-batches)"


def make_ranks() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of five layers by two ways to score, and the ranks of the two best of each."""
    layers = [
        "blocks.0.first",
        "blocks.0.second",
        "transformer.0.qkv",
        "transformer.0.mlp.0",
        "head.0",
    ]
    scores = pd.DataFrame(
        {"published": [1e-9, 3e-9, 1e-6, 2e-9, 1e-5], "corrected": [1e-5, 3e-5, 2e-6, 2e-5, 1e-1]}
    )
    return scores.set_axis(layers), scores.rank().gt(3).astype(int).add(1).mul(4).set_axis(layers)


def test_ranks_fill_the_layers_that_get_the_full_one_in_the_order_of_the_network():
    scores, ranks = make_ranks()
    figure = plot_ranks(scores, ranks, "Importance")
    assert [axes.get_title() for axes in figure.axes] == list(scores)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(scores.index)
    for axes, score in zip(figure.axes, scores, strict=True):
        assert axes.get_xscale() == "log" and axes.yaxis_inverted(), "the first layer stands on top"
        dots = {float(line.get_ydata()[0]): line for line in axes.lines}
        assert [float(dots[place].get_xdata()[0]) for place in range(5)] == list(scores[score])
        filled = [
            name
            for place, name in enumerate(scores.index)
            if dots[place].get_markerfacecolor() != "white"
        ]
        assert filled == list(ranks.index[ranks[score] == 8]) and len(filled) == 2
        assert (
            dots[0].get_color() == dots[1].get_color() != dots[2].get_color() == dots[3].get_color()
        )
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == ["blocks", "transformer", "head", "rank 8", "rank 4"]


def test_ranks_of_many_layers_keep_their_names_apart():
    names = [f"transformer.{block}.mlp.{layer}" for block in range(12) for layer in (0, 2)]
    scores = pd.DataFrame({"published": np.geomspace(1e-9, 1e-5, 24)}, index=names)
    figure = plot_ranks(scores, pd.DataFrame({"published": 8}, index=names))
    figure.draw_without_rendering()
    boxes_of_names = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert all(
        upper.y0 > lower.y1
        for upper, lower in zip(boxes_of_names, boxes_of_names[1:], strict=False)
    )
    assert min(box.x0 for box in boxes_of_names) >= 0


def test_ranks_refuse_a_wrong_table():
    scores, ranks = make_ranks()
    with pytest.raises(DataError, match="'corrected'"):
        plot_ranks(scores, ranks.drop(columns="corrected"))
    with pytest.raises(DataError, match="no row"):
        plot_ranks(scores.iloc[:0], ranks.iloc[:0])


def test_saved_figures_are_equal_to_the_byte(tmp_path):
    first, second = (
        save_figure(plot_label_curve(make_table()), name, tmp_path) for name in ("a", "deeper/b")
    )
    assert first.read_bytes() == second.read_bytes() and first.read_bytes().startswith(b"<?xml")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["a.svg", "deeper"]
    with pytest.raises(DataError, match="SVG"):
        save_figure(plot_label_curve(make_table()), "a.png", tmp_path)


def test_gains_have_a_row_an_arm_and_are_filled_where_sure():
    rows = [
        (method, encoder, protocol, fraction, gain, gain - 0.02, gain + 0.02)
        for method, encoder in (("byol", "a"), ("random", "a"), ("random", "b"))
        for protocol in ("frozen", "fine-tuned")
        for fraction, gain in ((0.01, 0.05), (1.0, 0.01))
    ]
    gains = pd.DataFrame(
        rows, columns=["method", "encoder", "protocol", "fraction", "gain", "low", "high"]
    )
    few, many = plot_gains(gains, row="arm", colour="protocol").axes
    assert [text.get_text() for text in few.get_yticklabels()] == [
        "never trained, b",
        "never trained, a",
        "BYOL, a",
    ]
    filled = [
        line.get_markerfacecolor() != "white" for line in few.lines if line.get_marker() == "o"
    ]
    hollow = [
        line.get_markerfacecolor() == "white" for line in many.lines if line.get_marker() == "o"
    ]
    assert len(filled) == len(hollow) == 6 and all(filled) and all(hollow)
    with pytest.raises(DataError, match="encoder"):
        plot_gains(gains.drop(columns="encoder"), row="arm")


def test_one_methods_gains_have_a_panel_a_measure():
    rows = [
        (other, fraction, metric, 0.03, 0.01, 0.05)
        for metric in ("macro_auroc", "macro_f2")
        for other in ("fixmatch", "mixed_teacher")
        for fraction in (0.05, 0.1)
    ]
    gains = pd.DataFrame(rows, columns=["over", "fraction", "metric", "gain", "low", "high"])
    panels = plot_gains(gains, panel="metric", colour="fraction").axes
    assert [axes.get_title() for axes in panels] == ["macro auroc", "macro f2"]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == [
        "MixedTeacher",
        "FixMatch",
    ]
    assert all(
        len([line for line in axes.lines if line.get_marker() == "o"]) == 4 for axes in panels
    )
    with pytest.raises(DataError, match="over"):
        plot_gains(gains.drop(columns="over"))


def test_fusion_gains_have_a_panel_a_fraction():
    rows = [
        (over, fraction, 0.01, low, 0.05)
        for over in ("best_single", "softmax_gate")
        for fraction, low in ((0.1, 0.001), (0.01, -0.02))
    ]
    gains = pd.DataFrame(rows, columns=["over", "fraction", "gain", "low", "high"])
    few, many = plot_gains(gains).axes
    assert (few.get_title(), many.get_title()) == ("1 % of the labels", "10 % of the labels")
    assert [text.get_text() for text in few.get_yticklabels()] == [
        "softmax gate",
        "best single encoder",
    ]
    faces = [
        {line.get_markerfacecolor() for line in axes.lines if line.get_marker() == "o"}
        for axes in (few, many)
    ]
    assert faces[0] == {"white"} and "white" not in faces[1]
    with pytest.raises(DataError, match="over"):
        plot_gains(gains.drop(columns="over"))


def test_similarity_shows_every_number():
    names = ["byol", "patient_pairs"]
    axes = plot_similarity(pd.DataFrame([[1.0, 0.25], [0.25, 1.0]], names, names)).axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["0.25", "0.25", "1.00", "1.00"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["BYOL", "patient pairs"]
    with pytest.raises(DataError, match="byol"):
        plot_similarity(pd.DataFrame([[1.0]], ["byol"], ["swav"]))


def test_token_weights_have_a_panel_a_measure_and_a_dot_a_class():
    rows = [
        (measure, name, member, share)
        for measure in ("attention", "gradient x input")
        for name in "AB"
        for member, share in (("byol", 0.7), ("swav", 0.3))
    ]
    weights = pd.DataFrame(rows, columns=["measure", "class", "member", "share"])
    panels = plot_token_weights(weights).axes
    assert [axes.get_title() for axes in panels] == ["attention", "gradient x input"]
    assert [text.get_text() for text in panels[0].get_yticklabels()] == ["SwAV", "BYOL"]
    dots = [line for line in panels[0].lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[0.7, 0.3]] * 2
    with pytest.raises(DataError, match="share"):
        plot_token_weights(weights.drop(columns="share"))


def test_cost_has_a_panel_a_cost_and_a_look_a_method():
    methods = ["ce_ssl", "ce_ssl_without_norm", "fixmatch", "fixmatch_lora", "unmeasured"]
    costs = pd.DataFrame({"method": methods[:4], **{name: [1e6, 2e6, 3e6, 4e6] for name in COSTS}})
    summary = pd.DataFrame({"method": methods, "value": 0.8, "low": 0.7, "high": 0.9})
    figure = plot_cost(costs, summary)
    assert [axes.get_xlabel() for axes in figure.axes] == [name for name, _ in COSTS.values()]
    points = [container.lines[0] for container in figure.axes[0].containers]
    looks = {(str(line.get_color()), line.get_marker()) for line in points}
    assert len(points) == len(looks) == 4
    assert {line.get_color() for line in points} == {METHODS[name].colour for name in methods[:4]}
    with pytest.raises(DataError, match="stored_bytes"):
        plot_cost(costs.drop(columns="stored_bytes"), summary)


def test_stages_have_a_line_an_arm_and_the_teacher_is_dashed():
    arms = [("distl", "student"), ("supervised", "student"), ("distl", "teacher")]
    rows = [(*arm, stage, 0.7 + 0.01 * stage, 0.6, 0.8, 0.1) for arm in arms for stage in (2, 0, 1)]
    summary = pd.DataFrame(
        rows, columns=["method", "network", "stage", "value", "low", "high", "calibration_error"]
    )
    figure = plot_stages(summary)
    left, right = figure.axes
    assert [line.get_linestyle() for line in right.lines] == ["-", "-", "--"]
    assert (
        right.lines[1].get_color() == "black"
        and right.lines[0].get_color() == right.lines[2].get_color()
    )
    assert all(list(line.get_xdata()) == [0, 1, 2] for line in right.lines)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["DISTL", "supervised", "DISTL, teacher"]
    assert [len(bars.get_segments()) for bars in left.collections] == [3, 2], (
        "the common start has one bar"
    )
    with pytest.raises(DataError, match="calibration_error"):
        plot_stages(summary.drop(columns="calibration_error"))


def test_methods_have_a_label_and_a_colour_of_their_own_even_new_ones():
    names = ["supervised", "random", "simclr", "ce_ssl", "my_method", "mine_too", "oracle"]
    colours = method_colours(names)
    assert colours["supervised"] == "black" and colours["random"] == colours["oracle"] == "0.6"
    others = [colours[name] for name in names[2:6]]
    assert len(set(others)) == 4 and not {"black", "0.6"} & set(others)
    assert len(set(method_colours(f"method_{place}" for place in range(30)).values())) == 30
    assert (method_label("ce_ssl"), method_label("my_method")) == ("CE-SSL", "my method")


def test_more_encoders_than_line_styles_and_markers_can_be_drawn():
    encoders = [f"encoder {place}" for place in range(12)]
    summary = pd.DataFrame({"encoder": encoders, "value": 0.8, "low": 0.7, "high": 0.9})
    summary = summary.assign(method="supervised", protocol="supervised", fraction=1.0)
    figure = plot_label_efficiency(summary, 100)
    assert [len(axes.containers) for axes in figure.axes] == [12, 12]
    table = summary.assign(kind="white", snr_db=np.inf, auroc=0.8)
    table = pd.concat([table, table.assign(snr_db=6.0, auroc=0.7)])
    assert len(plot_robustness(table).axes[0].lines) == 12 + 1


def test_a_long_title_stays_inside_a_narrow_figure():
    names = ["a", "b"]
    table = pd.DataFrame(np.eye(2), index=names, columns=names)
    title = (
        "Similarity of encoders on the training records of a data set with a long name, simulated"
    )
    figure = plot_similarity(table, title)
    figure.draw_without_rendering()
    written = [text for text in figure.texts if text.get_text() == figure.get_suptitle()]
    (box,) = (text.get_window_extent() for text in written)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert figure.get_suptitle().replace("\n", " ") == title
