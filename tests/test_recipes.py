"""A recipe is one command with its options; whatever is wrong in it is named, with the line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from pliant import recipes
from pliant.errors import InvalidInput


def paint(
    model: Annotated[str, typer.Argument(help="What to paint.")],
    layers: Annotated[int, typer.Option(min=1, max=9)] = 3,
    rate: float = 0.5,
    out: Path | None = None,
    json: Annotated[bool, typer.Option("--json")] = False,
    names: list[str] | None = None,
) -> None:
    """A command like any other."""


def bound(folder: Path, text: str, *changes: str) -> dict[str, object]:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return recipes.bind(recipes.read(path, changes), paint)


def test_options_become_arguments_and_defaults_stay(tmp_path: Path) -> None:
    found = bound(tmp_path, "command: paint\nmodel: nano-s\nrate: 1\nnames: [a, b]\n")
    assert found == {"model": "nano-s", "rate": 1.0, "names": ["a", "b"]}


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    found = bound(tmp_path, "command: paint\nmodel: ./mine\nout: a/b\n")
    assert found["model"] == str(tmp_path / "mine")
    assert found["out"] == tmp_path / "a" / "b"


def test_an_absolute_path_and_a_hub_name_stay(tmp_path: Path) -> None:
    found = bound(tmp_path, "command: paint\nmodel: owner/model\nout: /x/y\n")
    assert found["model"] == "owner/model"
    assert found["out"] == Path("/x/y")


def test_a_change_is_relative_to_the_shell(tmp_path: Path) -> None:
    found = bound(tmp_path, "command: paint\nmodel: ./a\nout: b\n", "model=./c", "out=d")
    assert (found["model"], found["out"]) == ("./c", Path("d"))


def test_a_change_replaces_an_option(tmp_path: Path) -> None:
    found = bound(tmp_path, "command: paint\nmodel: a\nlayers: 2\n", "layers=4", "json=true")
    assert (found["layers"], found["json"]) == (4, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("command: paint\nmodel: a\nlayer: 2\n", r"line 3: paint has no option 'layer' .*'layers'"),
        ("command: paint\nmodel: a\nzzz: 2\n", r"no option 'zzz' \(there are model, layers"),
        ("command: paint\n", "paint needs 'model'"),
        ("model: a\n", "names its command"),
        ("command: 3\n", "names its command"),
        ("command: paint\nmodel: no\n", "line 2: model .*string.* False"),
        ("command: paint\nmodel: a\nlayers: two\n", "line 3: layers .*integer.*'two'"),
        ("command: paint\nmodel: a\nlayers: 2.5\n", "line 3: layers .*2.5"),
        ("command: paint\nmodel: a\nlayers: 12\n", "line 3: layers .*less than or equal to 9"),
        ("command: paint\nmodel: a\njson: 'yes'\n", "line 3: json .*boolean"),
        ("command: paint\nmodel: a\nmodel: b\n", "line 3: 'model' is given twice"),
        ("command: paint\nmodel: [a\n", "is no YAML: line"),
        ("- command\n", "is no recipe"),
        ("", "is no recipe"),
        ("1: 2\n", "is no recipe"),
        ("command: !!python/object/apply:os.system ['true']\n", "is no YAML"),
        ("{[a]: b}\n", "is no YAML"),
        ("command: paint\nmodel: a\nout: 2001-99-99\nrate: 2001-13-45\n", "rate|is no YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as caught:
        bound(tmp_path, text)
    assert str(tmp_path / "recipe.yaml") in str(caught.value)


@pytest.mark.parametrize("change", ["layers", "=3", "layers=[", "layers=many"])
def test_a_wrong_change_is_named(tmp_path: Path, change: str) -> None:
    with pytest.raises(InvalidInput, match="layers|--set"):
        bound(tmp_path, "command: paint\nmodel: a\n", change)


def test_a_binary_file_is_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00command")
    with pytest.raises(InvalidInput, match="UTF-8"):
        recipes.read(path)


@given(text=st.text(max_size=60) | st.text(alphabet="a:[]{}&*!|>-'\"# \n\t", max_size=60))
def test_no_text_gets_more_than_a_clear_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    try:
        recipes.bind(recipes.read(path), paint)
    except InvalidInput:
        return


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput):
        bound(tmp_path, "command: " + "[" * 50_000)
