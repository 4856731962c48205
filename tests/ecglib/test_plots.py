"""ECGs on paper: true size, nothing on top of anything else."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from ecglib.errors import DataError
from ecglib.plot_ecg import plot_attributed_ecgs, plot_ecg
from ecglib.records import LEADS

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "ptb-xl-subset"


def make_ecg(seconds: float = 10.0, rate: int = 100, height: float = 1.2) -> np.ndarray:
    """Twelve leads of narrow beats, one each 0.8 s, in mV."""
    time = np.arange(round(seconds * rate)) / rate
    beat = np.exp(-0.5 * (((time % 0.8) - 0.4) / 0.015) ** 2)
    return np.outer(np.linspace(-1, 1, 12), beat) * height


def traces(figure: Figure) -> list[np.ndarray]:
    """Each drawn line as points `(n, 2)` in mm, the calibration pulses included."""
    return [line.get_xydata() for line in figure.axes[0].lines]


def boxes(figure: Figure) -> dict[str, np.ndarray]:
    """Each text's box ((left, bottom), (right, top)) in mm."""
    figure.draw_without_rendering()
    to_paper = figure.axes[0].transData.inverted()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    return {
        f"{text.get_text()} {n}": to_paper.transform(text.get_window_extent())
        for n, text in enumerate(texts)
    }


def require_clear(figure: Figure) -> None:
    """No text on another text, on a trace or outside the paper."""
    found = list(boxes(figure).items())
    _, width, _, height = figure.axes[0].axis()
    for place, (name, ((left, bottom), (right, top))) in enumerate(found):
        assert left > 0 and bottom > 0 and right < width and top < height, name
        for other, ((left2, bottom2), (right2, top2)) in found[place + 1 :]:
            assert right <= left2 or right2 <= left or top <= bottom2 or top2 <= bottom, (
                name,
                other,
            )
        for points in traces(figure):
            x, y = points.T
            assert not ((x > left + 0.1) & (x < right) & (y > bottom + 0.1) & (y < top)).any(), name


@pytest.mark.parametrize(("layout", "names"), [("standard", 13), ("rows", 12)])
def test_paper_has_true_size_and_all_leads(layout, names):
    figure = plot_ecg(make_ecg(), 100.0, layout=layout)
    axes = figure.axes[0]
    size = figure.get_size_inches() * 25.4
    assert np.allclose(
        size, (axes.get_xlim()[1], axes.get_ylim()[1])
    ) and axes.get_position().bounds == (0, 0, 1, 1)
    pulse = traces(figure)[0]
    assert (
        np.ptp(pulse[:, 1]) == 10 and np.ptp(pulse[(pulse[:, 1] == pulse[:, 1].max()), 0]) == 5
    )  # 1 mV and 0.2 s
    written = [text.get_text() for text in axes.texts]
    assert set(LEADS) <= set(written) and sum(name in LEADS for name in written) == names
    whole = traces(figure)[-1]  # the last row is ten seconds long in both layouts
    assert np.isclose(np.ptp(whole[:, 0]), 9.99 * 25) and whole[0, 0] == 15
    require_clear(figure)


def test_trace_has_true_height_and_gaps_stay_open():
    ecg = make_ecg()
    ecg[:, 300:400] = np.nan
    ecg[4] = np.nan
    figure = plot_ecg(ecg, 100.0, layout="rows")
    drawn = traces(figure)
    assert np.isclose(
        np.nanmax(drawn[1][:, 1]) - np.nanmin(drawn[1][:, 1]), 12, atol=0.01
    )  # lead I: 1.2 mV
    assert np.isnan(drawn[1][300:400, 1]).all() and np.isnan(drawn[9][:, 1]).all()
    require_clear(figure)


@pytest.mark.parametrize("layout", ["standard", "rows"])
@pytest.mark.parametrize("height", [0.0, 6.0, 30.0])
def test_large_amplitudes_keep_clear_and_halve_the_gain(layout, height):
    figure = plot_ecg(make_ecg(height=height), 100.0, "A title", layout=layout)
    require_clear(figure)
    ranges = [(points[:, 1].min(), points[:, 1].max()) for points in traces(figure)]
    rows = 12 if layout == "rows" else 4
    assert figure.get_size_inches()[1] * 25.4 <= 430
    scale = next(text.get_text() for text in figure.axes[0].texts if "mm/mV" in text.get_text())
    assert ("10 mm/mV" in scale) == (height < 6.0 or (height == 6.0 and layout == "standard"))
    if layout == "rows":
        tops = sorted(ranges[1::2])
        assert (
            all(lower[1] <= upper[0] for lower, upper in zip(tops, tops[1:], strict=False))
            and len(tops) == rows
        )


@pytest.mark.parametrize("seconds", [0.2, 2.5, 7.0, 30.0])
def test_other_lengths_and_long_titles_fit(seconds):
    marks = pd.DataFrame(
        {"wave": ["P", "QRS", "T"], "onset": [0.1, 0.3, 0.5], "offset": [0.2, 0.4, 0.8]}
    )
    figure = plot_ecg(
        make_ecg(seconds), 100.0, "A title that goes on and on " * 8, marks, layout="rows"
    )
    require_clear(figure)


def test_marks_lie_at_their_time_on_their_lead():
    rows = [("V1", "QRS", 1.0, 1.1), ("V1", "T", 1.3, 1.5), ("II", "P", 9.9, 12.0)]
    marks = pd.DataFrame(rows, columns=["lead", "wave", "onset", "offset"])
    figure = plot_ecg(make_ecg(), 100.0, marks=marks, layout="rows")
    bands = [patch for patch in figure.axes[0].patches if patch.get_height() == 10]
    assert len(bands) == 3
    found = sorted((round(band.get_x(), 3), round(band.get_width(), 3)) for band in bands)
    assert found == [(40, 2.5), (47.5, 5), (262.5, 2.25)]
    with pytest.raises(DataError, match="'offset'"):
        plot_ecg(make_ecg(), 100.0, marks=marks.drop(columns="offset"))


def test_attributed_ecgs_stand_below_each_other_with_their_relevance_as_shade():
    relevance = np.zeros((12, 1000))
    relevance[6, 100:110] = 2.0  # V1, which is drawn from 5 s on
    relevance[1, 300:303] = 1.0  # II, at 3 s in the rhythm strip alone
    figure = plot_attributed_ecgs(
        [("one", make_ecg(), relevance), ("two", make_ecg(7.0), relevance[:, :700])], 100.0
    )
    require_clear(figure)
    axes = figure.axes[0]
    assert len(axes.images) == 2 * 13 and axes.get_xlim() == (0, 270)
    texts = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert texts["one"] > texts["two"]
    shaded = [image.get_array()[0, :, 3] for image in axes.images[:13]]
    assert [place for place, shade in enumerate(shaded) if shade.any()] == [12]
    assert np.flatnonzero(shaded[12]).tolist() == [300, 301, 302]
    with pytest.raises(DataError, match="no example to draw"):
        plot_attributed_ecgs([], 100.0)


def test_bad_ecgs_are_one_sentence():
    ecg = make_ecg()
    for signals, rate, layout, message in [
        (ecg[:11], 100, "rows", "needs 12 leads"),
        (ecg, 0, "rows", "0 Hz and 10.0 s cannot be drawn"),
        (ecg, 100, "round", "'round'"),
        (ecg[None], 100, "rows", "take one record"),
    ]:
        with pytest.raises(DataError, match=message):
            plot_ecg(signals, rate, layout=layout)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real records are not here")
def test_real_records_are_drawn_clear_of_each_other():
    wfdb = pytest.importorskip("wfdb")
    names = pd.read_csv(REAL / "ptbxl_database.csv")["filename_lr"]
    for name in names.iloc[[0, 7, 50, 145]]:  # 50 and 145 have leads of 15 mV and 13 mV
        require_clear(plot_ecg(wfdb.rdrecord(str(REAL / name)).p_signal.T, 100.0, name))
