"""A recipe is one command with its options; whatever is wrong in it is named, with the line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from annotated_types import Ge, Le
from hypothesis import given
from hypothesis import strategies as st

from pliant import recipes
from pliant.errors import InvalidInput
from pliant.options import Flag


@dataclass(frozen=True)
class Paint:
    model: Annotated[str, Flag(positional=True)]
    """What to paint."""
    layers: Annotated[int, Ge(1), Le(9)] = 3
    rate: float = 0.5
    out: Path | None = None
    json: bool = False
    names: tuple[str, ...] = ()


def paint(options: Paint) -> None:
    """A command like any other."""


def bound(folder: Path, text: str, *changes: str) -> Paint:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    options = recipes.bind(recipes.read(path, changes), paint)["options"]
    assert isinstance(options, Paint)
    return options


def test_options_become_arguments_and_defaults_stay(tmp_path: Path) -> None:
    options = bound(tmp_path, "command: paint\nmodel: nano-s\nrate: 1\nnames: [a, b]\n")
    assert options == Paint("nano-s", rate=1.0, names=("a", "b"))


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    options = bound(tmp_path, "command: paint\nmodel: ./mine\nout: a/b\n")
    assert options.model == str(tmp_path / "mine")
    assert options.out == tmp_path / "a" / "b"


def test_an_absolute_path_and_a_hub_name_stay(tmp_path: Path) -> None:
    options = bound(tmp_path, "command: paint\nmodel: owner/model\nout: /x/y\n")
    assert options.model == "owner/model"
    assert options.out == Path("/x/y")


def test_a_change_is_relative_to_the_shell(tmp_path: Path) -> None:
    options = bound(tmp_path, "command: paint\nmodel: ./a\nout: b\n", "model=./c", "out=d")
    assert (options.model, options.out) == ("./c", Path("d"))


def test_a_change_replaces_an_option(tmp_path: Path) -> None:
    options = bound(tmp_path, "command: paint\nmodel: a\nlayers: 2\n", "layers=4", "json=true")
    assert (options.layers, options.json) == (4, True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "command: paint\nmodel: a\nlayer: 2\n",
            r"paint has no option 'layer'; .*'layers'",
        ),
        ("command: paint\nmodel: a\nzzz: 2\n", r"no option 'zzz'; there are model, layers"),
        ("command: paint\n", "paint needs 'model'"),
        ("model: a\n", "names its command"),
        ("command: 3\n", "names its command"),
        ("command: paint\nmodel: no\n", "line 2: model .*string.* False"),
        ("command: paint\nmodel: a\nlayers: two\n", "line 3: layers .*integer.*'two'"),
        ("command: paint\nmodel: a\nlayers: 2.5\n", "line 3: layers .*2.5"),
        ("command: paint\nmodel: a\nlayers: 12\n", "line 3: layers .*less than or equal to 9"),
        ("command: paint\nmodel: a\njson: 'yes'\n", "line 3: json .*boolean"),
        ("command: paint\nmodel: a\nmodel: b\n", "line 3: 'model' is given twice"),
        ("command: paint\nmodel: [a\n", "is not YAML: line"),
        ("- command\n", "is not a recipe"),
        ("", "is not a recipe"),
        ("1: 2\n", "is not a recipe"),
        ("command: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("{[a]: b}\n", "is not YAML"),
        ("command: paint\nmodel: a\nout: 2001-99-99\nrate: 2001-13-45\n", "rate|is not YAML"),
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


def test_a_device_is_no_recipe() -> None:
    with pytest.raises(InvalidInput, match="/dev/full is a device: give a file"):
        recipes.read(Path("/dev/full"))  # it never ends


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
