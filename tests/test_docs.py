"""The documentation is true: every block of code in it runs, and what it shows is what comes.

A page's `python` blocks share one namespace and run in order. The lines of a `bash` block are run,
and so are those of a `console` block that begin with `$`; the lines under one are looked for in
what it printed (`...` stands for any others). A block of `yaml` with a command is a recipe, and its
keys are checked. What cannot run here says so by its tag, `text`: of our own commands in it, the
names and options are checked.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import typer
from tests.in_process import pliant as pliant_in_process
from typer.main import get_command

import pliant
from pliant import recipes
from pliant.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *```(?P<tag>[^\n]*)\n(?P<body>.*?)^ *```$", re.MULTILINE | re.DOTALL)
# The packages whose `__all__` the API reference shows.
REFERENCE = [
    "pliant.adapters",
    "pliant.anatomy",
    "pliant.complexity",
    "pliant.data",
    "pliant.experts",
    "pliant.experts.adapting",
    "pliant.gradients",
    "pliant.gradients.audit",
    "pliant.nano",
    "pliant.prefill",
    "pliant.routing",
    "pliant.structure",
    "pliant.survey",
    "pliant.training",
    "pliant.verify",
]
TAGS = {"python", "bash", "console", "yaml", "json", "text"}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    tag: str
    body: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, m.start()) + 1, m["tag"].strip(), m["body"])
        for m in FENCE.finditer(text)
    ]


def blocks_with(*tags: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.tag in tags]


def shown_only(block: Block) -> list[list[str]]:
    """The arguments of our own commands in a block that does not run, with `$` in front or not."""
    lines = block.body.replace("\\\n", " ").splitlines()
    ours = [line.rpartition("| ")[2].strip().removeprefix("$ ") for line in lines]
    return [shlex.split(line)[1:] for line in ours if line.startswith("pliant ")]


def parse(arguments: list[str]) -> None:
    """As the command line would, up to where the command begins."""
    arguments = app.with_default(arguments)
    command: Any = get_command(app.application(*arguments[:2]))
    context = command.make_context("pliant", list(arguments))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is(page: Path) -> None:
    assert [str(block) for block in blocks(page) if block.tag not in TAGS] == []


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.tag == "python" for b in blocks(p))], ids=lambda p: p.name
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.tag == "python":
            # Empty lines in front, so that a traceback names the line of the page.
            code = compile("\n" * block.line + block.body, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            check_printed(block, printed.getvalue())


@pytest.mark.parametrize("block", blocks_with("bash", "console"), ids=str)
def test_commands_run_and_print_what_is_shown(block: Block) -> None:
    for command, shown in commands(block):
        printed = run(command)
        for line in shown:
            assert squeezed(line) in squeezed(printed), f"{block}: {command!r} printed\n{printed}"


@pytest.mark.parametrize("block", [b for b in blocks_with("text") if shown_only(b)], ids=str)
def test_commands_that_are_only_shown_are_spelled_right(block: Block) -> None:
    for words in shown_only(block):
        parse(words)


@pytest.mark.parametrize("block", blocks_with("yaml"), ids=str)
def test_recipes_in_the_text_have_the_right_keys(block: Block, tmp_path: Path) -> None:
    if re.search(r"^command:", block.body, re.MULTILINE):
        (tmp_path / "recipe.yaml").write_text(block.body, encoding="utf-8")
        recipe = recipes.read(tmp_path / "recipe.yaml")
        recipes.bind(recipe, app.command_function(recipe.command))


# The demo takes a minute, and tests/cli/test_demo.py runs it.
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path.stem != "demo")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_the_recipes_that_we_give_run(recipe: Path, tmp_path: Path) -> None:
    """From a copy, for what a recipe writes lies beside it."""
    (tmp_path / "recipes").mkdir()
    copy = shutil.copy(recipe, tmp_path / "recipes")
    assert app.outcome(["run", str(copy)]) == 0


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("recipes/*/*.yaml")), ids=lambda p: p.name)
def test_the_other_recipes_have_the_right_keys(recipe: Path) -> None:
    """Those that need labels of the user's own, or a server; one in the text is the same."""
    content = recipes.read(recipe)
    recipes.bind(content, app.command_function(content.command))
    text = "\n".join(line for line in recipe.read_text().splitlines() if not line.startswith("#"))
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    assert f"recipes/routing/{recipe.name}" not in page or f"```yaml\n{text}\n```" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_documentation_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()


@pytest.mark.parametrize("package", REFERENCE)
def test_the_reference_has_every_public_name(package: str) -> None:
    names = {f"{package}.{name}" for name in import_module(package).__all__}
    assert names - reference_names() == set()


def test_the_reference_has_every_name_of_pliant_itself() -> None:
    """Under the name of its home, or of its first name; of a module, by its functions."""
    homes = {name.rpartition(".")[2] for name in reference_names()}
    homes |= {name.split(".")[1] for name in reference_names() if name.startswith("pliant.route.")}
    first = {pliant.CPXConfig, pliant.CPXTokenizer, pliant.CPXDatasetConfig}
    first.add(pliant.CPXTrainingConfig)
    names = [name for name in pliant.__all__ if not name.startswith("__")]
    missing = [name for name in names if name not in homes]
    assert [name for name in missing if getattr(pliant, name) not in first] == []


def test_every_name_of_the_reference_exists() -> None:
    for name in sorted(reference_names()):
        assert resolve_name(name) is not None, name


# --- the tests above can fail ---------------------------------------------------------------------


def test_a_command_that_is_none_of_ours_is_no_documentation(tmp_path: Path) -> None:
    for line in ("rm -rf /", "pliant doctor ./nowhere", "make nothing-like-this"):
        with pytest.raises(AssertionError):
            list(map(run, [line]))


def test_a_command_with_an_option_that_there_is_not_is_spelled_wrong() -> None:
    parse(["route", "evaluate", "--router", "mine", "--labels", "some.jsonl"])
    for words in (["route", "evaluate", "--rooter", "mine"], ["route", "value"], ["doctor"]):
        with pytest.raises(typer.TyperException):
            parse(words)


def test_what_python_prints_is_held_against_what_is_shown() -> None:
    block = Block(ROOT / "README.md", 1, "python", "print(1 + 1)  # 3\n")
    with pytest.raises(AssertionError):
        check_printed(block, "2\n")
    check_printed(block, "3\n")


def reference_names() -> set[str]:
    """The dotted names on the pages of the API reference: each `:::`, or the members under it."""
    names: set[str] = set()
    for page in sorted((ROOT / "docs" / "reference").glob("*.md")):
        for part in re.split(r"^::: ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            home = part.split()[0]
            members = re.findall(r"^ +- (\w+)$", part, re.MULTILINE)
            names |= {f"{home}.{member}" for member in members} if members else {home}
    return names


def commands(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Each command of a block, and the lines that are shown under it."""
    if block.tag == "bash":
        for line in block.body.splitlines():
            if line.strip() and not line.strip().startswith("#"):
                yield line.strip(), []
        return
    for part in re.split(r"^ *\$ ", block.body, flags=re.MULTILINE)[1:]:
        command, *shown = part.splitlines()
        yield command, [line for line in shown if squeezed(line) not in ("", "...")]


def run(command: str) -> str:
    """Run `pliant ...`; of `make ...`, only that there is such a target; nothing else is ours."""
    program, *words = shlex.split(command, comments=True)
    assert program in ("pliant", "make"), f"{command!r}: tag what cannot run as text"
    if program == "pliant":
        done = pliant_in_process(*words, cwd=ROOT)
    else:
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_printed(block: Block, printed: str) -> None:
    """A comment after a print is what it prints, unless it is a sentence about it."""
    for shown in re.findall(r"print\(.*\)  # (.*)$", block.body, re.MULTILINE):
        assert squeezed(shown) in squeezed(printed), f"{block} printed\n{printed}"


def squeezed(text: str) -> str:
    return " ".join(text.split())
