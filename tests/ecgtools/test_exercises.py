"""Every exercise: made from its lesson, without its solution; the check takes that and refuses
plausible others.
"""

import ast
import builtins
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ecglib.errors import DataError
from ecgtools import exercises
from ecgtools import runner as study
from ecgtools.answers import number, numbers
from ecgtools.environment import ROOT
from ecgtools.exercises import Exercise, exercise_notebook, read_exercise, stub, used
from ecgtools.notebooks import assigned, notebook_sources, read_notebook, tags

FOLDER = ROOT / "notebooks"
LESSONS = notebook_sources(FOLDER)
SMOKE = ROOT / "results" / "smoke"
TAGS = {"given", "solution", "check"}
COSTLY = re.compile(
    r"run_or_load|run_grid|supervised_run|atomic_file|save_\w+\(|keep_\w+\(|\.to_csv|fuse\(|evolve\("
)

each_lesson = pytest.mark.parametrize("source", LESSONS, ids=lambda source: source.stem)


# What a student might plausibly write: pieces of code that take the place of the solution, or
# follow it.
WRONG = {
    "00_prepare_data": [
        "leaking = 100 * leaking + 1",
        "leaking = 1 - leaking",
        "test, train = train, test",
        "test = np.arange(len(test)); train = np.arange(len(test), len(patients))",
        "leaking = int(leaking * len(test)) + 1",
        "test = test[1:]",
    ],
    "01_look_at_ecgs": [
        "right = sokolow_lyon\nsokolow_lyon = lambda signals: 1000 * right(signals)",
        "sokolow_lyon = lambda signals: signals[:, 10:12].max(axis=(1, 2)) - signals[:, "
        "6].min(axis=1)",
        "sokolow_lyon = lambda signals: signals[:, 10].max(axis=1) - signals[:, 6].min(axis=1)",
        "sokolow_lyon = lambda signals: signals[:, 11].max(axis=1) - signals[:, 7].min(axis=1)",
        "sokolow_lyon = lambda signals: signals[:, 10:].max(axis=2).mean(1) - signals[:, 6].min(1)",
        "sokolow_lyon = lambda signals: np.abs(signals[:, [6, 10]]).max(axis=2).sum(axis=1)",
    ],
    "02_supervised_baseline": [
        "gap = -gap",
        "gap = 100 * gap",
        "spread = few.std(ddof=0)",
        "spread = few.var()",
        "spread = many.mean()",
        "gap, spread = spread, gap",
    ],
    "03_simclr": [
        "hardest_share = lambda z, t, hardest=10: torch.softmax(z @ z[0] / t, "
        "0).topk(hardest).values.sum()",
        "hardest_share = lambda z, t, k=10: torch.softmax((z @ z[0])[1:] / t, "
        "0).topk(k).values.sum()",
        "right = hardest_share\nhardest_share = lambda z, t, hardest=10: right(z, 1 / t, hardest)",
        "right = hardest_share\nhardest_share = lambda z, t, hardest=10: 100 * right(z, t, "
        "hardest)",
        "right = hardest_share\nhardest_share = lambda z, t, hardest=10: right(z, t, hardest + 1)",
    ],
    "04_byol": [
        "Meeting = BYOL",
        "class Meeting(Meeting):\n    loss = lambda self, batch: Meeting.__base__.loss(self, "
        "batch).detach()",
        "class Meeting(Meeting):\n    loss = lambda self, batch: "
        "(self.projector(self.encoder(batch.signals))"
        " - self.target_projector(self.target_encoder(batch.signals))).square().mean()",
        "class Meeting(Meeting):\n    loss = lambda self, batch: 8.1 - "
        "Meeting.__base__.loss(self, batch)",
    ],
    "05_swav": [
        "spread_of = lambda codes: torch.special.entr(codes).sum(dim=0).exp().mean()",
        "spread_of = lambda codes: torch.special.entr(codes).sum(dim=1).mean()",
        "spread_of = lambda codes: torch.special.entr(codes).sum(dim=1).mean().exp()",
        "fullest_of = lambda codes: codes.sum(dim=1).max() * codes.shape[1] / len(codes)",
        "fullest_of = lambda codes: codes.sum(dim=0).max()",
        "fullest_of = lambda codes: codes.max()",
    ],
    "06_cpc": [
        "right = wins_ahead\nwins_ahead = lambda pieces, distance: right(pieces, distance + 1)",
        "right = wins_ahead\nwins_ahead = lambda pieces, distance: 100 * right(pieces, distance)",
        "right = wins_ahead\nwins_ahead = lambda pieces, distance: 1 - right(pieces, distance)",
        "right = wins_ahead\nwins_ahead = lambda pieces, distance: right(pieces.transpose(1, 2), "
        "distance)",
        "right = wins_ahead\nwins_ahead = lambda pieces, distance: right(pieces, distance) * "
        "(pieces.shape[1] - 2) / pieces.shape[1]",
    ],
    "07_dino": [
        "cost_of = lambda shares: (sum(1 + round(50 * s) for s in shares), 0)",
        "cost_of = lambda shares: (sum(round(50 * s) for s in (*shares, *shares[:2])), 0)",
        "right = cost_of\ncost_of = lambda shares: (right(shares)[0], right(shares)[0] ** 2)",
        "right = cost_of\ncost_of = lambda shares: right(shares)[::-1]",
    ],
    "08_patient_pairs": [
        "found = 100 * found",
        "found = 1 - found",
        "found = (guess_successors(touching) == (torch.arange(segments) + 1)).float().mean()",
        "right = guess_successors\nguess_successors = lambda pieces: right(pieces) + 1",
        "right = guess_successors\nguess_successors = lambda pieces: right(pieces.flip(3))",
        "guess_successors = lambda pieces: (pieces[:, None, ..., 0] - pieces[:, :, None, ..., -1])"
        ".abs().mean(dim=3).argmin(dim=2)",
        "guess_successors = lambda pieces: torch.arange(1, 5).expand(len(pieces), 4)",
    ],
    "09_probe_and_fine_tune": [
        "arm = arm[::-1]",
        "gain = -gain",
        "gain = 100 * gain",
        "most = gain.idxmin()",
        "gain = gain.to_numpy()",
        "arm = arm[0]",
        "arm = ('random', arm[1])",
        "gain = means.loc['frozen', 'validation', *arm] - means.loc['supervised', "
        "'validation', 'supervised', arm[1]]",
    ],
    "10_fusion": [
        "trusted = by_class.loc['validation'].idxmin()",
        "single = by_class.loc['validation'].mean(axis=1).idxmin()",
        "gain = -gain - 0.01",
        "gain = 100 * gain + 1",
        "trusted = trusted.to_numpy()",
        "looked = by_class.loc['validation']\ngain = looked.max().mean() - "
        "looked.loc[single].mean() + 1e-6",
    ],
    "11_low_rank_adaptation": [
        "larger = larger - 1",
        "larger = larger + 1",
        "anything = anything + 1",
        "anything = max(m, n)",
        "larger, anything = anything, larger",
        "larger = m * n / (m + n)",
    ],
    "12_semi_supervised": [
        "part = parts['over'].iloc[-1]",
        "cost = -cost - 1e-6",
        "sure = not sure",
        "cost = 100 * cost + 1e-6",
        "part = 'ce_ssl'",
        "part = part.removeprefix('ce_ssl_')",
    ],
    "13_self_evolving": [
        "ranked = ranked[::-1]",
        "ranked = ranked[1:]",
        "worse_stated = [*worse_stated, 'distl']",
        "worse_stated = list(set(ranked) - set(worse_stated))",
        "ranked = by_arm['gain']",
    ],
    "14_label_efficiency": [
        "affordable = 100 * affordable",
        "gain = -gain - 1e-3",
        "gain = 100 * gain + 1e-3",
        "below = len(gain) - below + 100",
        "gain = choice - choice.max() - 1e-3",
        "gain = gain.iloc[1:]",
        "affordable = shares[-1]",
    ],
    "15_snr_robustness": [
        "cost = -cost - 1e-6",
        "worst = cost.index[0]",
        "cost = 100 * cost + 1e-6",
        "worst = 1",
        "cost = measured.groupby('kind')['loss'].mean() + 1e-6",
        "cost = cost.iloc[1:]",
    ],
    "16_saliency": [
        "mass_over_chance = lambda a, s: (a * s).sum(axis=(1, 2)) / a.sum(axis=(1, 2))",
        "mass_over_chance = lambda a, s: (a * s).sum() / a.sum() / s.mean()",
        "mass_over_chance = lambda a, s: (a * s).mean(axis=(1, 2)) / s.mean(axis=(1, 2))",
        "right = mass_over_chance\nmass_over_chance = lambda a, s: 100 * right(a, s)",
        "mass_over_chance = lambda a, s: (a * s).max(axis=(1, 2)) / s.mean(axis=(1, 2))",
    ],
    "17_report": [
        "enough = 100 * enough",
        "enough = full",
        "enough = curve['fraction'].max() + 1",
        "enough = 0.0",
    ],
}


@cache
def exercise_of(source: Path) -> Exercise:
    """The exercise, read once, or a skip for a lesson that is still without one."""
    if source not in exercises.lessons_with_exercise(FOLDER):
        pytest.skip(f"{source.stem} has no check cell yet")
    return read_exercise(source)


def bound(source: str) -> set[str]:
    """Names that a piece of code assigns or defines."""
    return set(assigned(ast.parse(source)))


def imported(source: str) -> set[str]:
    """Names that a piece of code imports."""
    nodes = [node for node in ast.walk(ast.parse(source)) if hasattr(node, "names")]
    return {(alias.asname or alias.name).split(".")[0] for node in nodes for alias in node.names}


def read_first(source: str) -> set[str]:
    """Names that code takes from before: those read by a statement before any has assigned them."""
    found: set[str] = set()
    known: set[str] = set()
    for statement in ast.parse(source).body:
        value = statement.value if isinstance(statement, ast.Assign) else None
        own = set() if value else set(assigned(statement))
        found |= used(ast.unparse(value or statement)) - own - known
        known |= set(assigned(statement))
    return found


def test_written_exercises_agree_with_the_lessons() -> None:
    assert exercises.write_exercises(FOLDER, check=True) == [], "run `./run_all.sh pair`"
    written = {path.stem for path in (FOLDER / exercises.FOLDER).glob("[0-9][0-9]_*.ipynb")}
    assert written == {source.stem for source in exercises.lessons_with_exercise(FOLDER)}


def test_every_finished_exercise_has_wrong_answers_here() -> None:
    assert set(WRONG) == {source.stem for source in exercises.lessons_with_exercise(FOLDER)}


@each_lesson
def test_no_solution_leaks(source: Path) -> None:
    exercise = exercise_of(source)
    sources = [cell.source for cell in exercise_notebook(exercise).cells]
    shown = {line.strip() for text in sources for line in text.splitlines()}
    offered = {line.strip() for line in exercise.stub.splitlines()}  # signatures and docstrings
    lines = [line.strip() for line in exercise.solution.splitlines()]
    lines = [line for line in lines if len(line) > 20 and line not in offered]
    assert lines, "an exercise with nothing to write"
    assert not [line for line in lines if line in shown]
    assert not [line for line in lines if any(line in text for text in sources)]


@each_lesson
def test_what_is_prepared_is_cheap_and_writes_nothing(source: Path) -> None:
    exercise = exercise_of(source)
    for cell in [exercise.given, exercise.check]:
        assert not COSTLY.search(cell), cell


@each_lesson
def test_exercise_does_not_disturb_the_end_of_its_lesson(source: Path) -> None:
    exercise_of(source)
    cells = read_notebook(source).cells
    (last,) = [place for place, cell in enumerate(cells) if "check" in tags(cell)]
    own = "\n".join(cell.source for cell in cells[: last + 1] if TAGS & {*tags(cell)})
    after = "\n".join(cell.source for cell in cells[last + 1 :] if cell.cell_type == "code")
    assert not bound(own) & read_first(after), "the last cells would see the exercise's values"


@each_lesson
def test_its_cells_stand_alone(source: Path) -> None:
    exercise = exercise_of(source)
    own = "\n".join([exercise.parameters, exercise.given, exercise.solution, exercise.check])
    local = {node.arg for node in ast.walk(ast.parse(own)) if isinstance(node, ast.arg)}
    local |= {node.id for node in ast.walk(ast.parse(own)) if not is_read(node)}
    assert not used(own) - local - bound(own) - imported(own) - set(dir(builtins))


def is_read(node: ast.AST) -> bool:
    """Whether a node is anything but a name that is assigned."""
    return not isinstance(node, ast.Name) or isinstance(node.ctx, ast.Load)


@each_lesson
def test_notebook_is_as_promised(source: Path) -> None:
    exercise = exercise_of(source)
    notebook = exercise_notebook(exercise)
    assert f"(../{source.name.replace('.py', '.ipynb')})" in notebook.cells[0].source
    assert '"../results' not in exercise.parameters and '"../data' not in exercise.parameters
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    assert tags[-2:] == ["answer", "check"] and "solution" not in tags
    assert "= ..." in exercise.stub or "...  #" in exercise.stub
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    asserts = [node for node in ast.walk(ast.parse(exercise.check)) if isinstance(node, ast.Assert)]
    assert asserts and all(node.msg is not None for node in asserts), (
        "each assertion needs its sentence"
    )


@pytest.fixture(scope="module")
def parameters() -> Iterator[dict[str, dict]]:
    """The parameters of the smoke profile by lesson; its results must stay as they are."""
    steps = study.plan(ROOT, study.read_config(ROOT / "configs" / "smoke.yaml"), None, SMOKE)
    before = study.written_files(SMOKE)
    yield {step.name: step.parameters for step in steps}
    assert study.written_files(SMOKE) == before, "an exercise wrote into the results"


def begun(exercise: Exercise, parameters: dict) -> dict:
    """The names after the cells before the answer, with the parameters of a profile."""
    own = {name: value for name, value in parameters.items() if name in bound(exercise.parameters)}
    if "results" in own:
        own["results"] = os.path.relpath(SMOKE, FOLDER / exercises.FOLDER)
    names: dict = {"display": print}
    exec(exercise.parameters, names)
    names.update(own)
    exec(exercise.given, names)
    return names


@each_lesson
def test_check_passes_on_the_solution_alone(
    source: Path, parameters: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    exercise = exercise_of(source)
    if (
        "results" in exercise.parameters
        and not (SMOKE / "executed" / f"{source.stem}.ipynb").exists()
    ):
        pytest.skip(f"{source.stem} has not been run in results/smoke; run `./run_all.sh smoke`")
    monkeypatch.chdir(FOLDER / exercises.FOLDER)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.set_num_threads(1)
    names = begun(exercise, parameters[source.stem])
    solved = dict(names)
    exec(exercise.solution, solved)
    exec(exercise.check, dict(solved))
    assert capsys.readouterr().out.endswith("right\n")
    nothing = exercise.stub.replace("= ...", "= None").replace("...  #", "return None  #")
    for answer in (exercise.stub, nothing):
        assert_refused(exercise, dict(names), answer)
    for answer in WRONG[source.stem]:
        assert_refused(exercise, dict(solved), answer)


def assert_refused(exercise: Exercise, names: dict, answer: str) -> None:
    """The check refuses an answer with one of its own sentences."""
    exec(answer, names)
    with pytest.raises(AssertionError) as refused:
        exec(exercise.check, names)
    assert str(refused.value), answer


LESSON = '''# %% [markdown]
# # 07 · A lesson

# %% tags=["parameters"]
results = "../results/laptop"  # where
size = 3
other = 4

# %%
unneeded = other

# %% [markdown]
# ## Exercise
#
# Add them up into `total`, and write `double`.

# %% tags=["given"]
import math

values = [size, 5]
values[0] = math.floor(2.5)

# %% tags=["solution"]
def double(value: float) -> float:
    """Twice a value."""
    return value + value


helper = sum(values)
total = float(helper)

# %% tags=["check"]
assert total == 7 and double(2) == 4, "the sum of all values"
'''


def lesson(folder: Path, old: str = "", new: str = "") -> Path:
    """A lesson on disk, with a change."""
    assert old in LESSON
    path = folder / "07_lesson.py"
    path.write_text(LESSON.replace(old, new) if old else LESSON)
    return path


def test_parameters_stub_and_paths(tmp_path: Path) -> None:
    exercise = read_exercise(lesson(tmp_path))
    assert exercise.title == "07 · A lesson"
    assert exercise.parameters == "size = 3"
    assert exercise.given == ("import math\n\nvalues = [size, 5]\nvalues[0] = math.floor(2.5)")
    assert exercise.stub == (
        'def double(value: float) -> float:\n    """Twice a value."""\n    ...  # your code here'
        "\n\n\ntotal = ...  # your code here"
    )
    needs_results = lesson(tmp_path, "values = [size, 5]", "values = [size, 5, results]")
    exercise = read_exercise(needs_results)
    assert exercise.parameters == 'results = "../../results/laptop"  # where\nsize = 3'
    cells = exercise_notebook(exercise).cells
    assert "run `./run_all.sh` first, or at least notebook 00" in cells[0].source
    assert [cell.source for cell in cells[1:5]] == [
        exercise.parameters,
        exercise.text,
        exercise.given,
        exercise.stub,
    ]


@pytest.mark.parametrize(
    "tag, said",
    [
        ("check", "0 cells are `check`"),
        ("solution", "0 cells are `solution`"),
        ("given", "0 cells are `given`"),
    ],
)
def test_lesson_without_a_part(tag: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        read_exercise(lesson(tmp_path, f'tags=["{tag}"]', 'tags=["another"]'))


def test_lesson_that_asks_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match="07_lesson.py: the check uses no name that the solution assigns"
    ):
        read_exercise(lesson(tmp_path, "total == 7 and double(2) == 4", "values"))


def test_written_once_and_checked(tmp_path: Path) -> None:
    source = lesson(tmp_path)
    written = tmp_path / "exercises" / "07_lesson.ipynb"
    assert exercises.write_exercises(tmp_path, check=True) == [written] and not written.exists()
    assert exercises.write_exercises(tmp_path) == [written] and written.exists()
    assert exercises.write_exercises(tmp_path) == []
    assert "solution" not in written.read_text() and "value + value" not in written.read_text()
    source.write_text(LESSON.replace("the sum of all values", "another sentence"))
    assert exercises.write_exercises(tmp_path, check=True) == [written]


def test_class_stub_keeps_methods_without_their_bodies() -> None:
    solution = (
        'class A(B):\n    """A class."""\n\n'
        '    def f(self, x):\n        """Docs."""\n        return x + 1\n'
    )
    made = stub(solution, {"A"})
    assert "return" not in made and made.count("...") == 1
    assert bound(made) == {"A"}


@pytest.mark.parametrize(
    "source, read, names",
    [
        ("x = y", {"y"}, ["x"]),
        ("x += y", {"y"}, ["x"]),
        ("for i in range(n): total = i", {"range", "n", "i"}, ["i", "total"]),
        ("a = [i * k for i in xs if i]", {"i", "k", "xs"}, ["a"]),
        ("a = {k: v for k, v in b.items()}", {"b", "k", "v"}, ["a"]),
        ("def f(a, b=c) -> T:\n    d = a + e\n    return d", {"a", "c", "d", "e", "T"}, ["f"]),
        ("f = lambda x: x + y", {"x", "y"}, ["f"]),
        ("class A(B):\n    def f(self):\n        return g(self)", {"B", "g", "self"}, ["A"]),
        ("with open(p) as file:\n    text = 1", {"open", "p"}, ["file", "text"]),
        ("import a.b as c\nfrom f import g", set(), []),
        ("x.a.b[0] = 1", {"x"}, []),
        ("x, (y, *z) = w", {"w"}, ["x", "y", "z"]),
    ],
)
def test_names(source: str, read: set, names: list) -> None:
    assert (used(source), list(assigned(ast.parse(source)))) == (read, names)


@pytest.mark.parametrize(
    "value", [..., None, "3", "abc", [1, 2], {}, {1: 2}, True, np.zeros(2), torch.zeros(2), print]
)
def test_what_is_no_number(value: object) -> None:
    assert np.isnan(number(value))


def test_numbers_of_any_kind() -> None:
    assert (
        number(np.float32(2))
        == number(torch.tensor(2.0, requires_grad=True))
        == number(2)
        == number(2.0)
        == 2
    )
    assert (
        numbers([[1, 2]], (1, 2)).tolist()
        == numbers(torch.tensor([[1, 2]]), (1, 2)).tolist()
        == [[1, 2]]
    )
    assert np.isnan(numbers([1, 2], (3,))).all() and numbers([1, 2], (3,)).shape == (3,)
