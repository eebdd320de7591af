"""The documents agree with the code: links, files, equations, commands, and every number has its source."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

import arcflow
from arcflow import cli
from arcflow.system import records
from benchmarks.readme_table import PAGES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py"), *DOCUMENTS])


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
        assert "://" in target or (document.parent / target).exists(), target


def test_python_in_documents_compiles_and_names_exist() -> None:
    for document in DOCUMENTS:
        for block in re.findall(r"```python\n(.*?)```", document.read_text("utf-8"), re.DOTALL):
            compile(block, document.name, "exec")
            for name in re.findall(r"arcflow\.(\w+)\(", block):
                assert name in arcflow.__all__


def test_equations_that_the_code_cites_are_there() -> None:
    numbered = set(re.findall(r"\((\d+)\)$", read("docs/math.md"), re.MULTILINE))
    cited = set()
    for source in ROOT.glob("src/**/*.py"):
        for span in re.findall(r"eqs?\. ([\d, and-]+)", source.read_text("utf-8")):
            cited |= set(re.findall(r"\d+", span))
    assert {"1", "2", "3", "4", "5"} <= numbered
    assert cited - {"6", "7", "8", "9"} <= numbered, "equations of the paper itself are cited with its arXiv number"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_exist(document) -> None:
    text = document.read_text("utf-8")
    lines = [line for line in text.splitlines() if line.startswith("    arcflow ")]
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if span.startswith("arcflow ")]
    for command in [*lines, *spans]:
        words = command.split("#")[0].split()[1:]
        assert cli.did_you_mean(words) is None, command
        for option in re.findall(r"--([\w-]+)[ =]?", command.split("#")[0]):
            name = option.replace("-", "_")
            assert name in COMMAND_WORDS or name.removeprefix("no_") in COMMAND_WORDS, command


FILES = [
    p
    for p in (ROOT / "src/arcflow").rglob("*.py")
    if "commands" in p.parts or p.name in ("config.py", "request.py", "options.py")
]
COMMANDS = "".join(path.read_text("utf-8") for path in FILES)
RENAMED = set(re.findall(r'arg\(name="(\w+)"', COMMANDS))
COMMAND_WORDS = set(re.findall(r"    (\w+):", COMMANDS)) | RENAMED | {"config", "data", "help", "help_all"}


def test_the_guide_to_a_new_family_has_every_field() -> None:
    from arcflow.families.family import Family

    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", read("docs/families.md"), re.MULTILINE)))
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(Family))


def test_sources_are_ascii() -> None:
    for source in SOURCES:
        assert source.read_text("utf-8").isascii(), source


def test_the_changelog_knows_the_version() -> None:
    assert f"## {arcflow.__version__}" in read("CHANGELOG.md")
    assert f'version = "{arcflow.__version__}"' in read("pyproject.toml")


@pytest.mark.parametrize(("recipe", "name"), [("world", "shipped"), ("world-one", "one"), ("world-quick", "demo")])
def test_what_a_recipe_is_expected_to_reach_was_measured(recipe, name) -> None:
    from arcflow.commands.recipes import EXPECTED
    from arcflow.evaluation.results import Evaluation

    results = records.read(Evaluation, RESULTS / f"{name}.json")
    own = results.rows[results.own]
    expected, rests_on = EXPECTED[recipe]
    assert expected.startswith(f"distance {own.mse_to_teacher:.3f}, {own.right:.1%} right".replace("%", " %"))
    assert rests_on.startswith(f"{own.prompts} held-out captions")


@pytest.mark.parametrize(("name", "page"), PAGES.items())
def test_numbers_of_the_small_model_are_those_of_a_run(name, page) -> None:
    from arcflow.evaluation.results import Evaluation
    from arcflow.reports.side_by_side import markdown_table
    from benchmarks.readme_table import put

    stored, text = ROOT / "benchmarks" / "results" / f"{name}.json", read(page)
    content = markdown_table(records.read(Evaluation, stored)) if stored.exists() else "Not measured yet."
    assert put(text, f"results:{name}", content) == text


def test_numbers_of_the_server_are_those_of_a_run() -> None:
    from benchmarks.readme_table import put
    from benchmarks.serving import Measured, table

    measured = table(records.read(Measured, RESULTS / "serving.json"))
    assert put(read("docs/serving.md"), "results:serving", measured) == read("docs/serving.md")


def test_the_committed_tables_are_those_of_their_results() -> None:
    from arcflow.comparison.results import Comparison
    from arcflow.reports.comparison import markdown_ranking

    stored = [path for path in RESULTS.glob("*.json") if "rows" in json.loads(path.read_text("utf-8"))]
    assert stored
    for path in stored:
        ranking = markdown_ranking(records.read(Comparison, path)) + "\n"
        text = path.with_suffix(".md").read_text("utf-8")
        assert text.startswith(ranking)
        assert text == ranking or path.stem == "digits"  # behind which stands how far it agrees with the first bench


def test_the_page_of_claims_is_that_of_the_committed_results(tmp_path, monkeypatch) -> None:
    from arcflow.reports.claims import write_claims

    monkeypatch.chdir(ROOT)
    page = write_claims(Path("benchmarks/results"), tmp_path / "claims.md").read_text("utf-8")
    assert page == read("docs/claims.md")


def test_the_pins_cover_every_dependency() -> None:
    import tomllib

    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    names = {re.split(r"[^A-Za-z0-9_-]", line)[0].lower().replace("_", "-") for line in wanted} - {"arcflow"}
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in read("constraints.txt").splitlines() if "==" in line
    }
    assert names <= pinned
    assert "torchvision" not in pinned and not any(name.startswith("nvidia") for name in pinned)
