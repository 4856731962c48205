"""The report of a run: every executed notebook as a page, an index with the main figures and
tables, one folder that can be moved, zipped and read without a network. Formulas become MathML
beforehand; no page runs a script.
"""

import hashlib
import html
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ecglib.errors import DataError
from ecglib.files import atomic_folder, read_json, short_hash

if TYPE_CHECKING:
    from nbconvert import HTMLExporter
    from nbformat import NotebookNode

TITLE = "How few labelled ECGs does a good classifier need?"
MAIN_NOTEBOOKS = (
    "14_label_efficiency",
    "12_semi_supervised",
    "10_fusion",
    "13_self_evolving",
    "15_snr_robustness",
    "16_saliency",
)
TABLES_FROM = "17_report"  # its tables with a caption are the run's main tables
LARGEST_COPY = 5e6  # bytes; a larger table stays in the results and is named without a link
CAPTIONS = {
    "label_efficiency": "Score against the share of the labels, for each start and each use of an encoder.",
    "label_efficiency_gains": "What pretraining gains over the same encoder from scratch and never trained, paired.",
    "semi_supervised_gains": "What CE-SSL gains over the other methods with few labels, paired.",
    "adaptation_cost": "What each method costs: weights trained, memory and time.",
    "fusion_gains": "What DVME gains over the other fusions and over single encoders, paired.",
    "encoder_similarity": "How alike the frozen encoders' features are.",
    "token_weights": "How much each encoder's token counts in the fusion.",
    "self_evolving": "Score and calibration while recordings without labels arrive in stages.",
    "robustness": "How the score falls as noise grows.",
    "noise_kinds": "The kinds of noise that are added.",
    "saliency_enrichment": "How much of the attribution falls on the waves that a class is read from.",
    "saliency_randomisation": "How the maps change when the weights are made random: a check that they can fail.",
    "saliency_examples": "Where the network looks in single recordings.",
}
STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 0 1rem 3rem; color: #1b1b1b; background: #fff;
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; margin: 1.6em 0 .5em; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; } h3 { font-size: 1.05rem; }
a { color: #0b57a4; }
.notice { background: #fff1cc; border-left: .4rem solid #d98e00; padding: .6rem .8rem;
  margin: 1rem 0; font-weight: 600; }
nav { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; padding: .8rem 0; border-bottom: 1px solid #ddd; }
nav:last-child { border: 0; border-top: 1px solid #ddd; margin-top: 2rem; }
pre, code { font: .85rem/1.45 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { margin: 0; padding: .6rem .8rem; overflow: auto; }
.highlight { background: #f5f7f9; border-radius: 4px; margin: .6rem 0; }
:not(pre) > code { background: #f1f3f5; border-radius: 3px; padding: 0 .2em; }
.output_text pre { max-height: 24rem; border-left: 3px solid #cfd8e0; }
.output_html, .scroll, .output_png, .output_svg, .output_jpeg, figure { overflow-x: auto; margin: .8rem 0; }
.formula { display: block; overflow-x: auto; overflow-y: hidden; padding: .4rem 0; }
math { font-family: "STIX Two Math", "Cambria Math", "Latin Modern Math", "Noto Sans Math",
  "DejaVu Math TeX Gyre", math; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
.text_cell_render table { display: block; overflow-x: auto; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e4e4; }
.facts th, .facts td { text-align: left; white-space: normal; vertical-align: top; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #555; }
figcaption { font-size: .9rem; color: #444; }
.lessons { padding: 0; list-style: none; } .lessons li { margin: 0 0 1rem; } .lessons p { margin: .2rem 0; }
.quiet { color: #666; font-size: .85rem; }
@media (max-width: 40rem) { img { max-width: 40rem; } body { padding: 0 .8rem 2rem; } }
"""
TEMPLATE = """{%- extends 'base.html.j2' -%}
{% block codecell -%}
{%- if 'solution' in cell.metadata.get('tags', []) -%}
<details class="solution"><summary>A solution</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock codecell %}
{% block input -%}
<div class="input_area">{{ cell.source | highlight_code(metadata=cell.metadata) }}</div>
{%- endblock input %}
{% block stream_stderr -%}
<details class="output_text"><summary>Progress</summary><pre>{{ output.text | ansi2html }}</pre></details>
{%- endblock stream_stderr %}
"""
SHOWN_TYPES = [
    "text/html",
    "text/markdown",
    "image/svg+xml",
    "image/png",
    "image/jpeg",
    "text/plain",
]  # no scripts

FORMULA_SPELLINGS = (  # what latex2mathml writes in a way that browsers set badly, and what says the same
    (re.compile(r"\\(?:mathrm|operatorname)\{([^{}\\]*)\}"), r"\\text{\1}"),
    (re.compile(r"\\mathbb\s*\{?1\}?"), "𝟙"),
    (re.compile(r"\\sim\b"), r"\\thicksim"),
    (re.compile(r"\\(begin|end)\{aligned\}"), r"\\\1{align*}"),
)
NAMED_FUNCTION = re.compile(r"(<mi>(?:log|max|min|exp|cos|sin)</mi>)(?=<m(?!o))")
BAR = re.compile(r'<mo(?: stretchy="false")?>&#x0007C;')
PHRASE = r"\b[Nn]otebooks?\s+\d\d\b(?:(?:\s*\([^()<>]*\))?(?:\s*,\s*|\s+(?:and|or|to)\s+|\s*[–-]\s*)\d\d\b(?!\s*%))*"
REFERENCE = re.compile(
    rf"(?P<phrase>{PHRASE})|\b(?P<name>\d\d_[a-z0-9_]+)|\b(?P<file>(?:tables|figures)/[\w.-]*\w)"
)
NUMBER = re.compile(r"(?:[Nn]otebooks?\s+)?\b(\d\d)\b")


@dataclass(frozen=True)
class Lesson:
    """One executed notebook: its name, its cells, what its first cell asks, and what it wrote and
    took, if known.
    """

    name: str
    notebook: "NotebookNode"
    title: str
    question: str
    seconds: float | None
    files: tuple[str, ...]


def write_report(results: Path, names: list[str], profile: str, about: str, root: Path) -> bool:
    """Write `results/report` from these executed notebooks; False where it is there and nothing it
    shows has changed.

    about: the profile's sentence; root: the repository, asked for its commit. Raises DataError
    where an executed notebook is missing or damaged, StorageError where the folder cannot be
    written.
    """
    folder, key = results / "report", report_key(results, names, profile)
    index = folder / "index.html"
    if index.exists() and f'content="{key}"' in index.read_text(encoding="utf-8"):
        return False
    state = read_json(results / "study.json") if (results / "study.json").exists() else {}
    lessons = [read_lesson(results, name, profile, state.get(name, {})) for name in names]
    records = results / "records" / "records.json"
    data = read_json(records) if records.exists() else {}
    notice = data_notice(data.get("about", {}))
    with atomic_folder(folder) as temporary:
        copied = copy_files(results, temporary)
        (temporary / "report.css").write_text(STYLE + code_style(), encoding="utf-8")
        for position, lesson in enumerate(lessons):
            link = reference_linker(lesson.name, names, copied)
            text = page(
                lesson.title, notice, link(notebook_html(lesson)), neighbours(lessons, position)
            )
            (temporary / f"{lesson.name}.html").write_text(text, encoding="utf-8")
        facts = run_facts(results, lessons, data, f"{profile}: {about}", root)
        body = index_body(lessons, facts, results, copied, reference_linker("index", names, copied))
        text = page(TITLE, notice, body, "", f'<meta name="made-from" content="{key}">')
        (temporary / "index.html").write_text(text, encoding="utf-8")
    return True


def report_key(results: Path, names: list[str], profile: str) -> str:
    """Changes with all that the report shows: names, sizes and times of the files, the run's state,
    this module.
    """
    shown = [results / "study.json", results / "records" / "records.json"]
    shown += [
        path
        for part in ("executed", "tables", "figures")
        for path in sorted((results / part).glob("*"))
    ]
    stamps = [
        [str(path.relative_to(results)), path.stat().st_size, path.stat().st_mtime_ns]
        for path in shown
        if path.is_file()
    ]
    return short_hash(
        [hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), names, profile, stamps]
    )


def read_lesson(results: Path, name: str, profile: str, state: dict) -> Lesson:
    """The executed copy of a notebook with its title and its sentence "What you will learn"."""
    import nbformat

    path = results / "executed" / f"{name}.ipynb"
    try:
        notebook = nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise DataError(
            f"{path}: the executed notebook is missing; run `./run_all.sh {profile}`, which executes "
            f"{name} again."
        ) from None
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, UnicodeDecodeError):
        raise DataError(
            f"{path}: not a notebook; delete it and run `./run_all.sh {profile}` again."
        ) from None
    text = "\n\n".join(cell.source for cell in notebook.cells[:1] if cell.cell_type == "markdown")
    title = re.search(r"^# (.+)", text, re.M)
    question = re.search(r"\*\*What you will learn\.\*\*\s*(.+?)(?:\n\s*\n|\Z)", text, re.S)
    return Lesson(
        name,
        notebook,
        title[1] if title else name,
        question[1] if question else "",
        state.get("seconds"),
        tuple(state.get("files", ())),
    )


def data_notice(about: dict) -> str:
    """What the top of each page must say about the records; empty for a complete real data set."""
    if about.get("simulated"):
        return "SIMULATED records: these figures say nothing about patients. They show that the machinery works."
    if about.get("subset"):
        which = f"{about.get('source', 'the data set')}, {about.get('version', 'a part of it')}"
        return f"SUBSET: {which}. These figures are not comparable with published tables."
    return ""


def copy_files(results: Path, folder: Path) -> set[str]:
    """Copy the figures, and the tables that are not too large, into the report; returns their
    relative names.
    """
    copied = set()
    for part, ending in (("figures", ".svg"), ("tables", ".csv")):
        (folder / part).mkdir()
        for path in sorted((results / part).glob(f"*{ending}")):
            if path.stat().st_size <= LARGEST_COPY and not path.name.startswith("."):
                shutil.copy2(path, folder / part / path.name)
                copied.add(f"{part}/{path.name}")
    return copied


def code_style() -> str:
    """The colours of highlighted code."""
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style="default", nobackground=True).get_style_defs(".highlight")


def page(title: str, notice: str, body: str, navigation: str, head: str = "") -> str:
    """A whole page: what it needs of the browser, the notice about the data, the way to its
    neighbours, the body.
    """
    notice = f'<p class="notice">{html.escape(notice)}</p>' if notice else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">{head}
<link rel="icon" href="data:,"><link rel="stylesheet" href="report.css"><title>{html.escape(title)}</title></head>
<body>{navigation}{notice}<main>{body}</main>{navigation}</body></html>
"""


def neighbours(lessons: list[Lesson], position: int) -> str:
    """Links to the notebook before, the index and the notebook after."""
    links = ['<a href="index.html">All notebooks</a>']
    if position > 0:
        links.insert(0, page_link(lessons[position - 1], "← {}"))
    if position + 1 < len(lessons):
        links.append(page_link(lessons[position + 1], "{} →"))
    return f"<nav>{''.join(links)}</nav>"


def page_link(lesson: Lesson, form: str = "{}") -> str:
    """A link to a notebook's page, named by its title."""
    return f'<a href="{lesson.name}.html">{html.escape(form.format(lesson.title))}</a>'


def notebook_html(lesson: Lesson) -> str:
    """The cells of an executed notebook as HTML: solutions and progress folded, figures as data,
    formulas as MathML.
    """
    heading = lesson.title
    for cell in lesson.notebook.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)", cell.source, re.M) or [heading])[-1]
        cell.metadata.setdefault("alt", f"Figure in the part “{heading}”")
    return notebook_exporter().from_notebook_node(lesson.notebook)[0]


@cache
def notebook_exporter() -> "HTMLExporter":
    """Makes the body of a page; made once, since it compiles its template."""
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    settings = Config(
        {
            "NbConvertBase": {"display_data_priority": SHOWN_TYPES},
            "CoalesceStreamsPreprocessor": {"enabled": True},
        }
    )
    return HTMLExporter(
        config=settings,
        template_name="basic",
        raw_template=TEMPLATE,
        filters={"markdown2html": markdown_html},
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )


def markdown_html(source: str) -> str:
    """A markdown cell as HTML, its formulas as MathML."""
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    renderer = IPythonRenderer(escape=False, exclude_anchor_links=True)
    renderer.inline_math = mathml
    renderer.block_math = lambda body: mathml(body, "block")
    renderer.latex_environment = lambda name, body: mathml(
        rf"\begin{{{name}}}{body}\end{{{name}}}", "block"
    )
    return MarkdownWithMath(renderer=renderer).render(source)


def mathml(formula: str, display: str = "inline") -> str:
    """A LaTeX formula as MathML; one that cannot be converted is shown as it was written."""
    from latex2mathml.converter import convert

    written = formula
    for spelling, same in FORMULA_SPELLINGS:
        formula = spelling.sub(same, formula)
    try:
        converted = convert(formula, display=display)
    except (
        Exception
    ):  # of the formula's writer, and of many kinds; the report is worth more than one formula
        converted = "\\"
    if (
        "\\" in converted or "<mi>&</mi>" in converted
    ):  # an unknown command or environment is left as it was
        return f"<code>{html.escape(written)}</code>"
    converted = NAMED_FUNCTION.sub(r'\1<mspace width="0.17em"></mspace>', converted)
    converted = BAR.sub('<mo stretchy="false" lspace="0" rspace="0">&#x0007C;', converted)
    return f'<span class="formula">{converted}</span>' if display == "block" else converted


def reference_linker(own: str, names: list[str], copied: set[str]) -> Callable[[str], str]:
    """A function that links `notebook 09`, `09_probe_and_fine_tune` and `tables/x.csv` in the text
    of some HTML.
    """
    pages = {name: f"{name}.html" for name in names if name != own}
    numbers = {name[:2]: address for name, address in pages.items()}

    def number_link(match: re.Match) -> str:
        address = numbers.get(match[1])
        return f'<a href="{address}">{match[0]}</a>' if address else match[0]

    def reference(match: re.Match) -> str:
        if match["phrase"]:
            return NUMBER.sub(number_link, match[0])
        address = pages.get(match[0]) or (match[0] if match[0] in copied else None)
        return f'<a href="{address}">{match[0]}</a>' if address else match[0]

    def link(text: str) -> str:
        return "".join(
            REFERENCE.sub(reference, part) if is_text else part
            for part, is_text in texts_and_tags(text)
        )

    return link


def texts_and_tags(text: str) -> Iterator[tuple[str, bool]]:
    """The pieces of HTML in order, each with whether it is text that may get links: not in a link,
    style or formula.
    """
    inside = 0
    for piece in re.split(r"(<[^>]*>)", text):
        tag = re.match(r"<(/?)(a|style|script|math|svg|title)\b", piece)
        if tag:
            inside += -1 if tag[1] else 1
        yield piece, not inside and not piece.startswith("<")


def run_facts(
    results: Path, lessons: list[Lesson], data: dict, profile: str, root: Path
) -> dict[str, str]:
    """What the run was, as name and text; what is not recorded is said to be so."""
    from ecgtools.notebooks import minutes

    about = data.get("about", {})
    kind = (
        ", simulated"
        if about.get("simulated")
        else f", {about['version']}"
        if about.get("version")
        else ""
    )
    machines, packages = recorded_machines(results)
    known = [lesson.seconds for lesson in lessons if lesson.seconds is not None]
    ends = [lesson.notebook.metadata.get("papermill", {}).get("end_time") for lesson in lessons]
    ended = max((datetime.fromisoformat(end) for end in ends if end), default=None)
    facts = {
        "Profile": profile,
        "Data": f"{about.get('source', 'records')}{kind}" if about else "",
        "Records": f"{data['shape'][0]:,} of {data['shape'][1]} leads at {data['sampling_rate']:g} Hz; classes "
        f"{', '.join(data['classes'])}"
        if "shape" in data
        else "",
        "Machine": "; ".join(machines),
        "Ended": f"{ended:%Y-%m-%d %H:%M %Z}" if ended else "",
        "Commit": commit(root),
        "Versions": "; ".join(packages),
        "Time": f"{minutes(sum(known))} minutes for {len(known)} of {len(lessons)} notebooks"
        if known
        else "",
    }
    return {name: text or "not recorded" for name, text in facts.items()}


def recorded_machines(results: Path) -> tuple[list[str], list[str]]:
    """The machines and the package versions that the trainings of this run have recorded, each
    once.
    """
    machines, packages = set(), set()
    for path in sorted((results / "runs").glob("*/run.json")):
        run = read_json(path)
        machine = run.get("machine", {})
        if machine:
            machines.add(
                f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:g} GB of memory, "
                f"accelerator: {machine['accelerator']}, {machine['system']}"
            )
        packages.add(
            ", ".join(
                f"{name} {version}" for name, version in sorted(run.get("packages", {}).items())
            )
        )
    return sorted(machines), sorted(packages - {""})


def commit(root: Path) -> str:
    """The repository's commit, and whether files differ from it; empty where `root` is not a git
    repository.
    """

    def git(*arguments: str) -> str:
        try:
            result = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True
            )
        except OSError:  # git is not installed
            return ""
        return result.stdout.strip() if result.returncode == 0 else ""

    top = git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():
        return ""
    return git("rev-parse", "--short=12", "HEAD") + (
        " with local changes" if git("status", "--porcelain") else ""
    )


def index_body(
    lessons: list[Lesson],
    facts: dict[str, str],
    results: Path,
    copied: set[str],
    link: Callable[[str], str],
) -> str:
    """The index: what the run was, the notebooks, the main figures and tables, and every file."""
    rows = "".join(
        f"<tr><th>{name}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items()
    )
    items = "".join(lesson_item(lesson) for lesson in lessons)
    makers = file_makers(lessons, copied)
    figures = "".join(
        figure_part(lesson, makers)
        for name in MAIN_NOTEBOOKS
        for lesson in lessons
        if lesson.name == name
    )
    tables = "".join(main_tables(lesson) for lesson in lessons if lesson.name == TABLES_FROM)
    left = sorted(f"tables/{path.name}" for path in (results / "tables").glob("*.csv"))
    left = [name for name in left if name not in copied]
    parts = [
        f"<h1>{TITLE}</h1>",
        f'<table class="facts">{rows}</table>',
        "<h2>Notebooks</h2>",
        f'<ol class="lessons">{link(items)}</ol>',
        f"<h2>Main figures</h2>{figures}" if figures else "",
        f"<h2>Main tables</h2>{link(tables)}" if tables else "",
        "<h2>Every table and figure</h2>",
        f"<ul>{''.join(file_item(lesson, makers) for lesson in lessons)}</ul>",
        f"<p>Too large for this folder, in the results: {', '.join(left)}.</p>" if left else "",
    ]
    return "\n".join(parts)


def lesson_item(lesson: Lesson) -> str:
    """A notebook of the index: link, time, and what one learns in it."""
    took = "" if lesson.seconds is None else f' <span class="quiet">{lesson.seconds:,.0f} s</span>'
    return f"<li>{page_link(lesson)}{took}{markdown_html(lesson.question)}</li>"


def file_makers(lessons: list[Lesson], copied: set[str]) -> dict[str, str]:
    """The notebook that wrote each copied file, empty where none is known.

    The first that has noted it and names it in a cell (those that ran side by side have noted each
    other's files), else the first that has noted it, else the first that names it.
    """
    sources = {
        lesson.name: "\n".join(cell.source for cell in lesson.notebook.cells) for lesson in lessons
    }
    makers = {}
    for file in sorted(copied):
        noting = [lesson.name for lesson in lessons if file in lesson.files]
        naming = [name for name, source in sources.items() if Path(file).name in source]
        both = [name for name in noting if name in naming]
        makers[file] = (both + noting + naming + [""])[0]
    return makers


def figure_part(lesson: Lesson, makers: dict[str, str]) -> str:
    """The figures of one notebook with captions, and its tables."""
    files = [file for file, maker in makers.items() if maker == lesson.name]
    order = list(CAPTIONS)
    figures = [file for file in files if file.startswith("figures/")]
    figures.sort(
        key=lambda file: order.index(Path(file).stem) if Path(file).stem in CAPTIONS else len(order)
    )
    if not figures:
        return ""
    tables = ", ".join(f'<a href="{file}">{file}</a>' for file in files if file not in figures)
    parts = [f"<h3>{page_link(lesson)}</h3>"]
    for file in figures:
        name = Path(file).stem
        caption = html.escape(CAPTIONS.get(name, name.replace("_", " ").capitalize() + "."))
        parts.append(
            f'<figure><a href="{file}"><img src="{file}" alt="{caption}"></a>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return "".join(parts) + (f'<p class="quiet">Numbers: {tables}</p>' if tables else "")


def main_tables(lesson: Lesson) -> str:
    """The captioned tables among a notebook's outputs."""
    outputs = [output for cell in lesson.notebook.cells for output in cell.get("outputs", [])]
    found = [
        output.data["text/html"]
        for output in outputs
        if "<caption" in output.get("data", {}).get("text/html", "")
    ]
    return f"<p>From {page_link(lesson)}.</p>" + "".join(
        f'<div class="scroll">{table}</div>' for table in found
    )


def file_item(lesson: Lesson, makers: dict[str, str]) -> str:
    """A notebook's copied files as a list entry; empty where it has none."""
    links = [
        f'<a href="{file}">{file}</a>' for file, maker in makers.items() if maker == lesson.name
    ]
    return f"<li>{page_link(lesson)}: {', '.join(links)}</li>" if links else ""
