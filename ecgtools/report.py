"""The report of a run: every executed notebook as a page, an index with the main figures and
tables, one folder that can be moved, zipped and read without a network. Formulas become MathML
beforehand; no page runs a script.
"""

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

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_notebook

from ecglib.errors import DataError
from ecglib.files import atomic_folder, read_json, short_hash
from ecgtools.notebooks import minutes

if TYPE_CHECKING:
    from nbconvert import HTMLExporter

HERE = Path(__file__).resolve().parent
TITLE = "How few labelled ECGs does a good classifier need?"
LARGEST_COPY = 5e6  # bytes; a larger table stays in the results and is named without a link
IMAGES = ["image/svg+xml", "image/png", "image/jpeg"]
SHOWN_TYPES = ["text/html", "text/markdown", *IMAGES, "text/plain"]  # no scripts
# What latex2mathml writes in a way that browsers set badly, and what says the same.
FORMULA_SPELLINGS = (
    (re.compile(r"\\(?:mathrm|operatorname)\{([^{}\\]*)\}"), r"\\text{\1}"),
    (re.compile(r"\\mathbb\s*\{?1\}?"), "𝟙"),
    (re.compile(r"\\sim\b"), r"\\thicksim"),
    (re.compile(r"\\(begin|end)\{aligned\}"), r"\\\1{align*}"),
)
NAMED_FUNCTION = re.compile(r"(<mi>(?:log|max|min|exp|cos|sin)</mi>)(?=<m(?!o))")
BAR = re.compile(r'<mo(?: stretchy="false")?>&#x0007C;')
BETWEEN = r"(?:\s*\([^()<>]*\))?(?:\s*,\s*|\s+(?:and|or|to)\s+|\s*[–-]\s*)"  # two numbers
PHRASE = rf"\b[Nn]otebooks?\s+\d\d\b(?:{BETWEEN}\d\d\b(?!\s*%))*"
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
    notebook: NotebookNode
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
    state = read_if_there(results / "study.json")
    lessons = [read_lesson(results, name, profile, state.get(name, {})) for name in names]
    data = read_if_there(results / "records" / "records.json")
    facts = run_facts(results, lessons, data, f"{profile}: {about}", root)
    shared = {"notice": data_notice(data.get("about", {})), "key": key}
    with atomic_folder(folder) as temporary:
        copied = copy_files(results, temporary)
        style = (HERE / "report.css").read_text(encoding="utf-8") + code_style()
        (temporary / "report.css").write_text(style, encoding="utf-8")
        index = index_page(results, lessons, facts, copied)
        for page in [*notebook_pages(lessons), index]:
            name, notebook = page.pop("name"), page.pop("notebook")
            text, _ = exporter().from_notebook_node(notebook, {"page": page | shared})
            linked = reference_linker(name, names, copied)(text)
            (temporary / f"{name}.html").write_text(linked, encoding="utf-8")
    return True


def read_if_there(path: Path) -> dict:
    """A JSON file, empty where there is none."""
    return read_json(path) if path.exists() else {}


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
    own = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("report.*"))]
    return short_hash([own, names, profile, stamps])


def read_lesson(results: Path, name: str, profile: str, state: dict) -> Lesson:
    """The executed copy of a notebook with its title and its sentence "What you will learn"."""
    path = results / "executed" / f"{name}.ipynb"
    try:
        notebook = nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise DataError(
            f"{path}: the executed notebook is missing; run `./run_all.sh {profile}`, which "
            "executes "
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
        return (
            "SIMULATED records: these figures say nothing about patients. They show that the "
            "machinery works."
        )
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


def notebook_pages(lessons: list[Lesson]) -> Iterator[dict]:
    """What the template needs for the page of each lesson."""
    for before, lesson, after in zip([None, *lessons], lessons, [*lessons[1:], None], strict=False):
        heading = lesson.title
        for cell in lesson.notebook.cells:
            if cell.cell_type == "markdown":
                heading = (re.findall(r"^#+ (.+)", cell.source, re.M) or [heading])[-1]
            cell.metadata.setdefault("alt", f"Figure in the part “{heading}”")
        yield vars(lesson) | {"before": before, "after": after}


def index_page(
    results: Path, lessons: list[Lesson], facts: dict[str, str], copied: set[str]
) -> dict:
    """What the template needs for the index: what the run was, the notebooks and their files."""
    makers = file_makers(lessons, copied)
    files = {name: [file for file in makers if makers[file] == name] for name in makers.values()}
    left = {f"tables/{path.name}" for path in (results / "tables").glob("*.csv")} - copied
    contents = {"facts": facts, "lessons": lessons, "files": files, "left": sorted(left)}
    return {"name": "index", "title": TITLE, "notebook": new_notebook(), "contents": contents}


@cache
def exporter() -> "HTMLExporter":
    """Makes a page; made once, since it compiles its template."""
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
        raw_template=(HERE / "report.html.j2").read_text(encoding="utf-8"),
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
    except Exception:  # of many kinds; the report is worth more than one formula
        converted = "\\"
    # An unknown command or environment is left as it was.
    if "\\" in converted or "<mi>&</mi>" in converted:
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
    about = data.get("about", {})
    kind = "simulated" if about.get("simulated") else about.get("version", "")
    source = ", ".join(filter(None, [about.get("source", "records"), kind]))
    machines, packages = recorded_machines(results)
    known = [lesson.seconds for lesson in lessons if lesson.seconds is not None]
    ends = [lesson.notebook.metadata.get("papermill", {}).get("end_time") for lesson in lessons]
    ended = max((datetime.fromisoformat(end) for end in ends if end), default=None)
    facts = {
        "Profile": profile,
        "Data": source if about else "",
        "Records": described(data) if "shape" in data else "",
        "Machine": "; ".join(machines),
        "Ended": f"{ended:%Y-%m-%d %H:%M %Z}" if ended else "",
        "Commit": commit(root),
        "Versions": "; ".join(packages),
        "Time": f"{minutes(sum(known))} minutes for {len(known)} of {len(lessons)} notebooks"
        if known
        else "",
    }
    return {name: text or "not recorded" for name, text in facts.items()}


def described(data: dict) -> str:
    """Number, leads, rate and classes of the records."""
    number, leads, _ = data["shape"]
    rate, classes = data["sampling_rate"], ", ".join(data["classes"])
    return f"{number:,} of {leads} leads at {rate:g} Hz; classes {classes}"


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
                f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:g} GB "
                "of memory, "
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
        makers[file] = next(iter(both + noting + naming), "")
    return makers
