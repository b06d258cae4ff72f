"""A wrong setting is an error that names the nearest one, whichever configuration it is."""

from __future__ import annotations

import ast
import copy
import inspect
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pliant import CPXConfig, CPXTrainingConfig
from pliant.errors import InvalidInput, UnknownSetting
from pliant.experts import SVFConfig
from pliant.gradients import GradientConfig
from pliant.structure import PruneConfig

SOURCE = Path(__file__).parents[1] / "src" / "pliant"


@pytest.mark.parametrize(
    ("config", "wrong", "nearest"),
    [
        (CPXConfig, "outptus", "outputs"),
        (CPXTrainingConfig, "epochs", "num_epochs"),
        (GradientConfig, "ration", "ratio"),
        (PruneConfig, "chanels", "channels"),
        (SVFConfig, "ranks", "rank"),
    ],
)
def test_a_wrong_setting_names_the_nearest(config: Any, wrong: str, nearest: str) -> None:
    message = f"{config.__name__} got an unexpected keyword argument {wrong!r}; did you mean "
    with pytest.raises(UnknownSetting, match=f"{message}.*{nearest!r}") as caught:
        config(**{wrong: 1})
    assert isinstance(caught.value, InvalidInput) and isinstance(caught.value, TypeError)
    assert nearest in inspect.signature(config).parameters


def test_a_configuration_is_copied_as_any_dataclass() -> None:
    config = GradientConfig(ratio=0.5)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    with pytest.raises(UnknownSetting, match="'ratio'"):
        replace(config, ration=1)  # type: ignore[call-arg]


def test_class_variables_are_no_settings() -> None:
    with pytest.raises(UnknownSetting):
        GradientConfig(RETIRED={})  # type: ignore[call-arg]


def test_peft_reads_an_expert_with_settings_of_a_later_version(tmp_path: Path) -> None:
    SVFConfig(rank=3).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"rank": 3', '"rank": 3, "later": 1'))
    with pytest.warns(UserWarning, match="later"):
        assert SVFConfig.from_pretrained(str(tmp_path)).rank == 3


def test_every_configuration_does() -> None:
    classes = [
        node
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    ]
    assert len(classes) > 15
    dataclasses = {c.name: {ast.unparse(d) for d in c.decorator_list} for c in classes}
    assert {name for name, by in dataclasses.items() if "named_settings" not in by} == set()
