"""A dataclass is a set of options, on a command line and in a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
from annotated_types import Ge, Le
from typer.main import get_command

from pliant import options
from pliant.cli.flags import plain_flags, typer_command, without_underscores
from pliant.errors import InvalidInput
from pliant.options import Flag


@dataclass(frozen=True, kw_only=True)
class Common:
    layers: Annotated[int, Ge(1), Le(9)] = 3
    """Layers of paint."""
    limit: Annotated[int, Ge(1)] | None = None
    """At most so many
    things."""


@dataclass(frozen=True, kw_only=True)
class Paint(Common):
    model: Annotated[str, Flag(positional=True)]
    """What to paint."""
    layers: Annotated[int, Ge(1), Le(9)] = 4
    colour: Literal["red", "light_blue"] = "red"
    weights: Annotated[tuple[float, ...], Flag(aliases=("-w",), metavar="WEIGHT")] = ()
    out: Path = Path("out")
    bias: bool = True
    """Train a bias."""
    save_epochs: bool = False
    secret: Annotated[str, Flag(hidden=True)] = "x"


@dataclass(frozen=True, kw_only=True)
class Frame:
    width: float | None = None

    def __post_init__(self) -> None:
        if self.width == 0:
            raise InvalidInput("--width 0: give some width")


CALLS: list[tuple[Paint, Frame]] = []


def paint(options: Paint, frame: Frame) -> None:
    """Paint a model."""
    CALLS.append((options, frame))


def called(*arguments: str) -> tuple[Paint, Frame]:
    app = typer.Typer(context_settings={"token_normalize_func": without_underscores})
    app.command("paint")(typer_command(paint))
    command = get_command(app)
    with command.make_context("paint", list(arguments)) as context:
        command.invoke(context)
    return CALLS.pop()


def by_name() -> dict[str, options.Option]:
    return {option.name: option for option in options.of(paint)}


def test_fields_are_options_with_type_default_bounds_and_docstring() -> None:
    read = by_name()
    assert list(read)[:3] == ["layers", "limit", "model"]
    assert read["model"].required and read["model"].help == "What to paint."
    assert (read["layers"].default, read["layers"].least, read["layers"].most) == (4, 1, 9)
    assert read["layers"].help == "Layers of paint."  # from the class where it is documented
    assert read["limit"].help == "At most so many things."
    assert read["limit"].optional and read["limit"].type is int and read["limit"].least == 1
    assert read["colour"].choices == ("red", "light_blue")
    assert read["weights"].item_type is float and read["out"].item_type is None
    assert read["width"].optional and read["width"].help == ""


def test_the_command_line_fills_every_class() -> None:
    assert called("nano-s") == (Paint(model="nano-s"), Frame())
    given = ["nano-s", "--layers", "2", "--limit", "5", "-w", "1", "--weights", "2.5", "--no-bias"]
    given += ["--colour", "light_blue", "--out", "a/b", "--width", "0.5", "--save-epochs"]
    assert called(*given) == (
        Paint(
            model="nano-s",
            layers=2,
            limit=5,
            colour="light_blue",
            weights=(1.0, 2.5),
            out=Path("a/b"),
            bias=False,
            save_epochs=True,
        ),
        Frame(width=0.5),
    )


def test_underscores_are_dashes() -> None:
    assert called("m", "--save_epochs")[0].save_epochs


def test_the_seeds_way_to_write_values() -> None:
    seeds = ["m", "--class_weights", "1"]
    assert plain_flags(paint, seeds) == seeds  # what is not ours stays for the parser to refuse
    written = ["--weights", "1", "-2.5", "--bias", "false", "--save_epochs", "true", "--layers=2"]
    found = called("m", *plain_flags(paint, written))[0]
    assert (found.weights, found.bias, found.save_epochs, found.layers) == (
        (1, -2.5),
        False,
        True,
        2,
    )
    for off in (["--save_epochs", "no"], ["--save_epochs=false"], []):
        assert not called("m", *plain_flags(paint, off))[0].save_epochs
    with pytest.raises(InvalidInput, match="bias .*maybe"):
        plain_flags(paint, ["--bias", "maybe"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "model"),
        (["m", "--layers", "two"], "--layers"),
        (["m", "--layers", "10"], "less than or equal to 9"),
        (["m", "--limit", "0"], "--limit"),
        (["m", "--colour", "blue"], "--colour"),
        (["m", "--rate", "1"], "--rate"),
    ],
)
def test_the_command_line_refuses(arguments: list[str], message: str) -> None:
    with pytest.raises(typer.TyperException) as caught:
        called(*arguments)
    assert message in caught.value.format_message()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m", "--width", "nan"], "--width: must be a finite number"),
        (["m", "--width=-inf"], "--width: must be a finite number"),
        (["m", "-w", "1", "-w", "1e999"], "--weights: must be a finite number"),
        (["m", "--limit", str(10**30)], "--limit: must be at most 4,294,967,295"),
        (["a\0b"], "MODEL: must not hold a NUL"),
        (["\udc80"], "MODEL: must be text that UTF-8 can hold"),
        (["m", "--out", "\udcff.html"], "--out: must be text that UTF-8 can hold"),
    ],
)
def test_what_no_command_can_use_is_refused_by_its_flag(arguments: list[str], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        called(*arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", float("nan")), ("limit", 10**30), ("model", "a\0b"), ("model", "\ud800")],
)
def test_nor_does_a_recipe_hold_it(name: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=f"{name}: must"):
        by_name()[name].from_yaml(value)


def test_the_class_checks_what_types_cannot() -> None:
    with pytest.raises(InvalidInput, match="--width 0"):
        called("m", "--width", "0")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("layers", "2", 2),
        ("limit", "none", None),
        ("bias", "no", False),
        ("weights", "1, 2.5", (1.0, 2.5)),
        ("out", "a", Path("a")),
        ("colour", "red", "red"),
        ("model", "none", "none"),
    ],
)
def test_a_text_becomes_a_value(name: str, text: str, value: object) -> None:
    assert by_name()[name].from_text(text) == value


@pytest.mark.parametrize(
    ("name", "text"), [("layers", "0"), ("layers", "many"), ("colour", "blue"), ("bias", "maybe")]
)
def test_a_text_of_another_kind_is_refused(name: str, text: str) -> None:
    with pytest.raises(InvalidInput, match=f"{name} .*and is {text!r}"):
        by_name()[name].from_text(text)


@pytest.mark.parametrize(
    ("name", "value"), [("layers", "2"), ("layers", True), ("model", False), ("weights", [True])]
)
def test_yaml_is_taken_to_the_letter(name: str, value: object) -> None:
    assert by_name()["weights"].from_yaml([1, 2.5]) == (1.0, 2.5)
    assert by_name()["limit"].from_yaml(None) is None
    with pytest.raises(InvalidInput, match=name):
        by_name()[name].from_yaml(value)


def test_named_values_are_read_once_each() -> None:
    assert options.named_values(["a-b=1", "c = x=y"], "--set") == {"a_b": "1", "c": "x=y"}
    for texts in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(InvalidInput, match="--set"):
            options.named_values(texts, "--set")
