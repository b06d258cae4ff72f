"""The README's table and picture are what the committed results say."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks import gains

ROOT = Path(__file__).parents[1]


def test_the_readme_holds_the_table_of_the_results() -> None:
    assert gains.table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_begins_with_a_figure_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert " ".join(gains.headline().split()) in " ".join(readme.split())


def test_the_readme_shows_the_picture() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"]({gains.PICTURE.relative_to(ROOT)})" in readme
    assert gains.PICTURE.is_file()


def test_another_result_draws_another_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = gains.draw(tmp_path / "now.svg").read_text(encoding="utf-8")
    assert _texts(drawn) == _texts(gains.PICTURE.read_text(encoding="utf-8"))
    figures = gains.figures

    def halved(benchmark: str) -> object:
        measured = figures(benchmark)
        if benchmark == "routing_nano":
            measured[gains.SPLIT]["apgr"]["cpx"]["value"] /= 2
        if benchmark == "quality_cost":
            measured["accuracy"] /= 2
        return measured

    monkeypatch.setattr(gains, "figures", halved)
    assert gains.draw(tmp_path / "halved.svg").read_text(encoding="utf-8") != drawn
    assert gains.table() not in (ROOT / "README.md").read_text(encoding="utf-8")


def _texts(svg: str) -> list[str]:
    """What the picture says; its paths differ in the last digit between builds of matplotlib."""
    return [
        "".join(node.itertext())
        for node in ElementTree.fromstring(svg).iter()
        if "text" in node.tag
    ]
