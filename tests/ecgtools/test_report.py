"""The report: every link and image lies in the folder or exists as an anchor, formulas are MathML,
nothing asks for a network, and a browser, where there is one, shows every page without a complaint.
"""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ecglib.errors import DataError
from ecgtools import report
from ecgtools import runner as study
from ecgtools.environment import ROOT
from ecgtools.notebooks import notebook_sources, read_notebook

NAMES = ["00_first", "09_probe", "17_report"]
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
    "gg=="
)
SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><rect width="40" '
    'height="20"/></svg>'
)
FORMULA = r"$$\begin{aligned} a &= \mathbb{R} \\ b &= \text{if } \tfrac12 \end{aligned}$$"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Every page of the report in a frame of a phone's width; what is wrong with one is written into the
# title.
PROBE = """<!DOCTYPE html><meta charset="utf-8"><title>unfinished</title><body><script>
const pages = PAGES, wrong = [];
function look(frame, page) {
  const inner = frame.contentDocument, width = inner.documentElement.scrollWidth;
  if (width > 360) wrong.push(page + " is " + width + " px wide");
  for (const image of inner.images) {
    if (!image.naturalWidth) wrong.push(page + " lacks " + image.src.slice(-60));
  }
  for (const formula of inner.querySelectorAll("math")) {
    if (!formula.getBoundingClientRect().width) wrong.push(page + " has an empty formula");
  }
}
function next() {
  const page = pages.shift();
  if (!page) { document.title = "checked: " + JSON.stringify(wrong); return; }
  const frame = document.createElement("iframe");
  frame.style = "width: 360px; height: 800px; border: 0";
  frame.onload = () => {
    frame.contentDocument.querySelectorAll("details").forEach(details => { details.open = true; });
    look(frame, page); frame.remove(); next();
  };
  frame.src = page;
  document.body.append(frame);
}
next();
</script>"""


class Page(HTMLParser):
    """The ids, addresses, formulas, scripts and visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.code, self.text = 0, ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append(tag)
        self.code += tag in ("pre", "code", "style")
        for name, value in attributes:
            self.attributes.append((name, value or ""))
            self.ids += [value] if name == "id" else []
            self.addresses += [value] if name in ("href", "src") else []

    def handle_endtag(self, tag: str) -> None:
        self.code -= tag in ("pre", "code", "style")

    def handle_data(self, data: str) -> None:
        self.text += "" if self.code else data


def check_folder(folder: Path) -> dict[str, Page]:
    """Assert what must hold for every page of a report; returns the pages."""
    pages = {path.name: Page(path) for path in folder.glob("*.html")}
    for name, page in pages.items():
        assert ("name", "viewport") in page.attributes, name
        assert not {"script", "iframe", "object", "embed"} & set(page.tags), name
        assert not [value for attribute, value in page.attributes if attribute.startswith("on")], (
            name
        )
        assert "$$" not in page.text, name
        assert len(page.ids) == len(set(page.ids)), f"{name} has an id twice"
        for address in page.addresses:
            if address.startswith("data:"):
                continue
            file, _, anchor = unquote(address).partition("#")
            target = (folder / file).resolve() if file else folder / name
            assert not re.match(r"\w+:|/", address) and target.is_relative_to(folder.resolve()), (
                f"{name}: {address}"
            )
            assert target.is_file(), f"{name}: {address}"
            assert not anchor or anchor in pages[target.name].ids, f"{name}: {address}"
    assert "http" not in (folder / "report.css").read_text()
    return pages


def executed_notebook(
    name: str, learn: str, *cells: nbformat.NotebookNode
) -> nbformat.NotebookNode:
    first = new_markdown_cell(
        f"# {name[:2]} · The {name[3:]}\n#\n\n**What you will learn.** {learn}\n\n**How long.** No."
    )
    notebook = new_notebook(cells=[first, *cells], metadata={"language_info": {"name": "python"}})
    notebook.metadata["papermill"] = {
        "end_time": f"2026-01-{name[:2]}T10:00:00+00:00" if name != "00_first" else None
    }
    return notebook


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder as three tiny notebooks leave it."""
    folder = tmp_path / "results"
    for part in ("executed", "tables", "figures", "records", "runs/run"):
        (folder / part).mkdir(parents=True)
    table = new_output(
        "execute_result", {"text/html": "<table><caption>Main</caption><tr><td>1</td></tr></table>"}
    )
    figure = new_output("display_data", {"image/png": PNG, "text/plain": "<Figure>"})
    script = new_output(
        "display_data", {"application/javascript": "alert(1)", "text/plain": "plain"}
    )
    progress = [new_output("stream", name="stderr", text=f"\r {part} %") for part in (0, 50, 100)]
    solution = new_code_cell("2 + 2  # see notebook 00", metadata={"tags": ["solution"]})
    cells = {
        "00_first": [
            new_markdown_cell(f"## Sums\n\nHere $x_i < 2$ and\n\n{FORMULA}"),
            new_code_cell("1", outputs=[figure]),
        ],
        "09_probe": [
            new_markdown_cell(
                "See notebooks 00 (first) and 17, notebook 42, `00_first`, `tables/small.csv`."
            ),
            new_code_cell("x", outputs=progress),
            solution,
            new_code_cell("y", outputs=[script]),
        ],
        "17_report": [new_code_cell("table", outputs=[table])],
    }
    for name in NAMES:
        text = nbformat.writes(
            executed_notebook(name, f"What *{name}* asks of notebook 00.", *cells[name])
        )
        (folder / "executed" / f"{name}.ipynb").write_text(text)
    (folder / "tables" / "small.csv").write_text("a\n1\n")
    (folder / "tables" / "large.csv").write_text("a\n" * int(report.LARGEST_COPY))
    (folder / "figures" / "small.svg").write_text(SVG)
    machine = {
        "processor": "A processor",
        "cores": 2,
        "memory_gb": 8.0,
        "accelerator": "none",
        "system": "Linux",
    }
    run = {"machine": machine, "packages": {"torch": "2.13.0"}}
    (folder / "runs" / "run" / "run.json").write_text(json.dumps(run))
    state = {
        "00_first": {
            "seconds": 61.0,
            "files": ["figures/small.svg", "tables/small.csv"],
            "key": "k",
        }
    }
    (folder / "study.json").write_text(json.dumps(state))
    describe(folder, simulated=True, source="simulated cohort")
    return folder


def describe(results: Path, **about: object) -> None:
    data = {"about": about, "classes": ["A", "B"], "shape": [30, 12, 1000], "sampling_rate": 100.0}
    (results / "records" / "records.json").write_text(json.dumps(data))


def write(results: Path) -> bool:
    return report.write_report(results, NAMES, "smoke", "a few seconds", results.parent)


def text_of(results: Path, name: str) -> str:
    return (results / "report" / f"{name}.html").read_text(encoding="utf-8")


def test_pages_links_and_formulas_hold_in_a_moved_folder(results: Path, tmp_path: Path) -> None:
    assert write(results)
    moved = tmp_path / "elsewhere"
    shutil.move(results / "report", moved)
    pages = check_folder(moved)
    assert set(pages) == {"index.html", *(f"{name}.html" for name in NAMES)}
    first = pages["00_first.html"]
    assert (
        first.tags.count("math") == 2
        and "mtable" in first.tags
        and f"data:image/png;base64,{PNG}" in first.addresses
    )
    assert (
        "index.html" in first.addresses and "09_probe.html" in first.addresses
    )  # the index and the next
    links = pages["09_probe.html"].addresses
    assert {"00_first.html", "17_report.html", "tables/small.csv", "index.html"} <= set(links)
    assert (
        links.count("00_first.html") >= 5
    )  # twice as the page before, and in the text, the code and the question
    assert "notebook 42" in pages["09_probe.html"].text and not any(
        "42" in address for address in links
    )


def test_a_file_belongs_to_the_notebook_that_names_it(results: Path) -> None:
    """Notebooks that ran side by side have each noted the files of both."""
    both = {
        name: {"files": ["figures/small.svg", "tables/small.csv"]}
        for name in ("00_first", "09_probe")
    }
    (results / "study.json").write_text(json.dumps(both))
    lessons = [report.read_lesson(results, name, "smoke", both.get(name, {})) for name in NAMES]
    makers = report.file_makers(
        lessons, {"figures/small.svg", "tables/small.csv", "tables/other.csv"}
    )
    assert makers == {
        "figures/small.svg": "00_first",
        "tables/other.csv": "",
        "tables/small.csv": "09_probe",
    }


def test_index_tells_the_run_and_shows_its_figures_and_tables(results: Path) -> None:
    write(results)
    index = Page(results / "report" / "index.html")
    for words in (
        "smoke: a few seconds",
        "30 of 12 leads at 100 Hz; classes A, B",
        "A processor, 2 cores",
        "torch 2.13.0",
        "2026-01-17 10:00 UTC",
        "1:01 minutes for 1 of 3 notebooks",
        "61 s",
        "Main",
        "What 09_probe asks",
        "Too large for this folder, in the results: tables/large.csv",
    ):
        assert words in index.text, words
    assert "Commitnot recorded" in index.text  # the folder is no git repository
    assert {"figures/small.svg", "tables/small.csv"} <= set(
        index.addresses
    ) and "table" in index.tags
    assert not (results / "report" / "tables" / "large.csv").exists()
    (results / "executed" / "17_report.ipynb").rename(
        results / "executed" / "14_label_efficiency.ipynb"
    )
    state = {"14_label_efficiency": {"seconds": 1.0, "files": ["figures/label_efficiency.svg"]}}
    (results / "study.json").write_text(json.dumps(state))
    (results / "figures" / "label_efficiency.svg").write_text(SVG)
    report.write_report(results, ["14_label_efficiency"], "smoke", "", results)
    text = text_of(results, "index")
    assert re.search(r'alt="Score against[^>]*src="figures/label_efficiency.svg"', text)
    assert text.index("Main figures") < text.index("Score against")


def test_every_page_says_what_the_records_are(results: Path) -> None:
    for about, words in (
        ({"simulated": True}, "SIMULATED records"),
        ({"subset": True, "source": "PTB-XL"}, "SUBSET: PTB-XL"),
        ({"source": "PTB-XL"}, None),
    ):
        describe(results, **about)
        assert write(results)
        for page in (results / "report").glob("*.html"):
            notice = re.search(r'<p class="notice">(.*?)</p>', page.read_text())
            assert words in notice[1] if words else notice is None, page


def test_solutions_and_progress_are_folded_and_scripts_left_out(results: Path) -> None:
    write(results)
    text = text_of(results, "09_probe")
    assert "A solution</summary>" in text and "alert(1)" not in text and "plain" in text
    assert re.search(r"Progress</summary><pre>\s*100 %", text) and "50 %" not in text


def test_it_is_written_again_only_where_something_changed(results: Path) -> None:
    assert write(results) and not write(results)
    (results / "tables" / "small.csv").write_text("a\n1\n2\n")
    assert (
        write(results) and (results / "report" / "tables" / "small.csv").read_text() == "a\n1\n2\n"
    )
    (results / "report" / "index.html").unlink()
    assert write(results) and not write(results)


def test_a_missing_or_damaged_notebook_is_told_and_the_old_report_stays(results: Path) -> None:
    write(results)
    before = text_of(results, "index")
    path = results / "executed" / "09_probe.ipynb"
    path.write_text("{")
    with pytest.raises(
        DataError, match=r"09_probe.ipynb: not a notebook; delete it and run `./run_all.sh smoke`"
    ):
        write(results)
    path.unlink()
    with pytest.raises(DataError, match=r"09_probe.ipynb: .* is missing; run `./run_all.sh smoke`"):
        write(results)
    assert text_of(results, "index") == before and not list(results.glob(".report*"))


def test_formulas_become_mathml_and_a_wrong_one_is_shown_as_written() -> None:
    assert "<mtext>I</mtext>" in report.mathml(r"\mathrm{I} + \mathrm{II}")
    assert 'class="formula"' in report.mathml("x", "block") and "<mn>𝟙</mn>" in report.mathml(
        r"\mathbb 1[a]"
    )
    for wrong in (r"\frac{", r"\nosuch{x} < 1", "x^", r"\begin{nosuch} a & b \end{nosuch}"):
        assert report.mathml(wrong) == f"<code>{html.escape(wrong)}</code>"


@pytest.mark.parametrize("source", notebook_sources(ROOT / "notebooks"), ids=lambda path: path.stem)
def test_every_formula_of_the_notebooks_can_be_converted(source: Path) -> None:
    for cell in read_notebook(source).cells:
        if cell.cell_type == "markdown":
            plain = re.sub(
                r"<math.*?</math>|<code>[^\\<]*</code>|<[^>]*>",
                "",
                report.markdown_html(cell.source),
                flags=re.S,
            )
            assert "\\" not in plain and "$" not in plain, plain


def test_the_run_writes_it_after_the_last_notebook(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    root = tmp_path / "repository"
    for name, text in {"notebooks/00_one.py": "0", "notebooks/01_two.py": "1"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cells = (
            f'# %% [markdown]\n# # Number {text}\n\n# %% tags=["parameters"]\nresults = ""\n\n# '
            f"%%\n{text}\n"
        )
        (root / name).write_text(cells)
    (root / "configs").mkdir()
    (root / "configs" / "smoke.yaml").write_text("about: a few seconds\n")
    index = root / "results" / "smoke" / "report" / "index.html"
    study.run_study("smoke", root=root, last="00_one")
    assert not index.parent.exists()
    study.run_study("smoke", root=root)
    assert "The report, written in" in capfd.readouterr().err and set(
        check_folder(index.parent)
    ) == {"index.html", "00_one.html", "01_two.html"}
    study.run_study("smoke", root=root)
    assert "nothing in it has changed" in capfd.readouterr().err
    source = root / "notebooks" / "01_two.py"
    source.write_text(source.read_text().replace("# # Number 1", "# # Number one"))
    study.run_study("smoke", root=root)
    assert "written in" in capfd.readouterr().err and "Number one" in index.read_text()


def test_the_last_smoke_run_makes_a_sound_report(tmp_path: Path) -> None:
    smoke = ROOT / "results" / "smoke"
    names = sorted(path.stem for path in (smoke / "executed").glob("*.ipynb"))
    if not names:
        pytest.skip("no notebook of the smoke profile has been executed here")
    results = tmp_path / "smoke"
    for part in ("executed", "tables", "figures"):
        shutil.copytree(smoke / part, results / part)
    report.write_report(results, names, "smoke", "", ROOT)
    pages = check_folder(results / "report")
    assert len(pages) == len(names) + 1
    size = sum(path.stat().st_size for path in (results / "report").rglob("*") if path.is_file())
    assert size < 30e6
    look_in_a_browser(results / "report")


def test_a_browser_shows_every_page(results: Path) -> None:
    write(results)
    look_in_a_browser(results / "report", needed=True)


def look_in_a_browser(folder: Path, needed: bool = False) -> None:
    """Open every page in a headless browser, 360 px wide: no complaint, no missing image, no
    sideways scrolling.
    """
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        if needed:
            pytest.skip("no Chromium is installed here")
        return
    pages = sorted(path.name for path in folder.glob("*.html"))
    probe = folder / "probe.html"
    probe.write_text(PROBE.replace("PAGES", json.dumps(pages)))
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--window-size=360,800",
        "--enable-logging=stderr",
        "--virtual-time-budget=60000",
        f"--user-data-dir={folder.parent / 'browser'}",
        "--dump-dom",
        probe.as_uri(),
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
    title = re.search(r"<title>(.*?)</title>", shown.stdout)
    wrong = [title[1] if title else "no title"] + [
        line for line in shown.stderr.splitlines() if "CONSOLE" in line
    ]
    assert wrong == ["checked: []"], wrong
    probe.unlink()


def test_the_browser_finds_what_is_wrong(results: Path) -> None:
    write(results)
    page = results / "report" / "00_first.html"
    faults = (
        '<div style="width: 500px">wide</div><img src="nowhere.png" '
        'alt=""><script>console.error("hear")</script>'
    )
    page.write_text(page.read_text().replace("</main>", f"{faults}</main>"))
    with pytest.raises(
        AssertionError,
        match=r"(?s)00_first.html is 5\d\d px wide.*lacks .*nowhere.png.*CONSOLE.*hear",
    ):
        look_in_a_browser(results / "report", needed=True)
