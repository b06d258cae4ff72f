"""Imports run one way: a module may import what stands to its right in ORDER, nothing else.

The files are read, not run: an import inside a function or under TYPE_CHECKING counts as any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "pliant"

# From the outside in. Those that share a row do not import each other.
ORDER = [
    {"cli"},
    {"serving"},
    {"adaptive", "attaching", "recipes", "reports", "route", "survey"},
    {"routing"},
    {"complexity", "structure", "experts", "gradients"},
    {"linear", "training", "prefill"},
    {"adapters", "verify", "stats"},
    {"data"},
    {"loading"},
    {"anatomy"},
    {"credentials", "files", "options", "progress"},
    {"errors"},
]
# The same inside the parts, for the files and folders that lie in each.
LAYERS = {
    "adapters": [
        {"adapter", "saving"},
        {"files", "parameters", "stock"},
        {"fingerprint", "hooks", "quantized"},
        {"active_peft", "local_bases"},
    ],
    "anatomy": [
        {"several_depths"},
        {"depth", "lockstep", "roles"},
        {"decoder", "trial"},
        {"anatomy"},
        {"find", "recurrent", "slices"},
        {"blocks"},
        {"cache_copy", "config", "intercept", "modes", "tiny"},
    ],
    "cli": [
        {"demo", "export", "prune", "run", "train"},
        {"expert", "recover"},
        {"app", "doctor", "gradients", "importance", "models", "route", "score"},
        {"training_text"},
        {"doctor_sentences", "flags", "shared_options", "terminal"},
    ],
    "complexity": [
        {"facade"},
        {"plain_loops", "training"},
        {"model"},
        {"export", "prefix_cache"},
        {"stock"},
        {"scorer"},
        {"prompts"},
        {"rows", "scores", "tokenizer"},
        {"config", "post_processor"},
        {"saved"},
    ],
    "gradients": [
        {"selective_run", "trl"},
        {"audit", "facade", "training"},
        {"model"},
        {"selector", "trl_output"},
        {"cautions", "engines"},
        {"telemetry"},
        {"selection"},
        {"config", "labelled_batch"},
    ],
    "loading": [{"fetch"}, {"models"}, {"dtypes", "lora"}, {"hub"}, {"names"}, {"catalogue"}],
    "prefill": [{"prefilled"}, {"forward"}, {"batch"}],
    "routing": [
        {"learning"},
        {"fitting", "router"},
        {"live"},
        {"router_file"},
        {"goals", "judge", "labels", "live_settings", "metrics", "scorers"},
        {"backends", "decision_rule"},
        {"outcomes"},
        {"outcomes_reading"},
        {"prompts", "strict", "units"},
    ],
    "structure": [
        {"facade", "generation_check", "plasticity", "recovery"},
        {"agency", "exporting"},
        {"pruning"},
        {"ranking"},
        {"controller", "skips"},
        {"gates", "stock"},
        {"budget", "entropy", "scaling"},
        {"calibration", "units"},
        {"config"},
    ],
    "experts": [
        {"facade"},
        {"adapting", "lora", "training"},
        {"comparison", "export", "low_rank"},
        {"factors"},
        {"expert"},
        {"folder", "model", "rewards"},
        {"linear", "stacked"},
        {"layer"},
        {"folded", "rows"},
        {"basis", "config", "dequantised", "reward_parts"},
    ],
    "training": [
        {"run"},
        {"folder", "result"},
        {"arguments", "checkpoint", "distributed", "terminal", "texts"},
    ],
    "verify": [
        {"custom", "reward_model", "unit_tests"},
        {"sandbox", "text", "time_limit"},
        {"sandbox_child"},
    ],
}
# The tiny models stand aside: they use little, and no part may come to depend on them.
NANO_MAY_IMPORT = {"loading", "data", "verify", "options", "errors"}
MAY_IMPORT_NANO = {"cli"}
# The only files that may import each other: an adapter saves itself, and saving attaches one.
CIRCLES = [{"adapters.adapter", "adapters.saving"}]
# These name everything by design: the lazy table of public names, and every `python -m ...`.
DOORS = {"__init__", "__main__"}


def test_imports_run_one_way() -> None:
    assert list(wrong_imports(SOURCE)) == []


def test_no_two_files_import_each_other() -> None:
    assert list(circles(SOURCE)) == CIRCLES


def test_folders_inside_a_part_import_one_way() -> None:
    """Files that form no circle may still make one of their folders."""
    allowed = [{name.rpartition(".")[2] for name in circle} for circle in CIRCLES]
    folders = [path.parent for path in SOURCE.rglob("*/__init__.py")]
    tangled = {str(path): found for path in folders if (found := list(folder_circles(path)))}
    assert [circle for found in tangled.values() for circle in found] == allowed, tangled


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_every_import_leads_somewhere(folder: str) -> None:
    """Those inside functions, too, which fail only when they are called."""
    assert list(missing_imports(ROOT / folder, SOURCE)) == []


@pytest.mark.parametrize("part", LAYERS)
def test_imports_run_one_way_inside_a_part(part: str) -> None:
    assert list(wrong_layers(SOURCE, part, LAYERS[part])) == []


@pytest.mark.parametrize("part", LAYERS)
def test_layers_name_only_what_is_there(part: str) -> None:
    names = set().union(*LAYERS[part])
    assert names - {path.stem for path in (SOURCE / part).iterdir()} == set()


def test_core_never_imports_facade() -> None:
    assert list(facade_imports(SOURCE)) == []


def test_only_anatomy_asks_for_the_type_of_a_model() -> None:
    assert list(asks_for_model_type(SOURCE)) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("errors.py", "import pliant.loading"),
        ("anatomy/find.py", "from pliant import loading"),
        ("anatomy/find.py", "from pliant.adapters import attach"),
        ("loading/models.py", "def f():\n    from pliant.nano import path"),
        ("structure/gates.py", "from ..experts import model"),
        ("structure/__init__.py", "from .. import routing"),
        ("adapters.py", "from pliant.training import train"),
        ("training.py", "if TYPE_CHECKING:\n    from pliant.cli import app"),
        ("nano/world.py", "from pliant.anatomy import Anatomy"),
        ("manager.py", "import json"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    _plant(tmp_path, file, line)
    assert len(list(wrong_imports(tmp_path))) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("cli/doctor.py", "from pliant.survey import examine"),
        ("cli/demo.py", "from pliant.nano import questions"),
        ("training.py", "from pliant.adapters import attach"),
        ("structure/gates.py", "from . import config\nfrom ..anatomy import Anatomy"),
        ("nano/world.py", "from pliant.errors import PliantError\nfrom pliant.nano import path"),
        ("anatomy/__init__.py", "from .find import Anatomy"),
        ("loading/models.py", "from pliant import __version__"),
    ],
)
def test_a_right_import_passes(tmp_path: Path, file: str, line: str) -> None:
    _plant(tmp_path, file, line)
    assert list(wrong_imports(tmp_path)) == []


@pytest.mark.parametrize(
    "line",
    [
        "from pliant.structure.gates import b",
        "from pliant.structure import gates",
        "from . import gates",
        "from .gates import b",
        "def f():\n    import pliant.structure.gates",
        "if TYPE_CHECKING:\n    from pliant.structure.gates import b",
    ],
)
def test_a_circle_of_files_is_found(tmp_path: Path, line: str) -> None:
    _plant(tmp_path, "structure/model.py", line)
    _plant(tmp_path, "structure/gates.py", "from pliant.structure import config")
    _plant(tmp_path, "structure/config.py", "")
    assert list(circles(tmp_path)) == []
    _plant(tmp_path, "structure/config.py", "from pliant.structure.model import a")
    assert list(circles(tmp_path)) == [{f"structure.{f}" for f in ("model", "gates", "config")}]


def test_a_circle_through_a_packages_own_file_is_found(tmp_path: Path) -> None:
    _plant(tmp_path, "structure/__init__.py", "from pliant.structure.model import Structure")
    _plant(tmp_path, "structure/model.py", "from pliant.structure import Structure")
    assert list(circles(tmp_path)) == [{"structure", "structure.model"}]


def test_a_circle_of_folders_is_found(tmp_path: Path) -> None:
    """a.x -> b.y and b.z -> a.w is no circle of files."""
    _plant(tmp_path, "structure/a/x.py", "from pliant.structure.b import y")
    _plant(tmp_path, "structure/b/y.py", "")
    _plant(tmp_path, "structure/a/w.py", "")
    assert list(folder_circles(tmp_path / "structure", tmp_path)) == []
    _plant(tmp_path, "structure/b/z.py", "from pliant.structure.a.w import f")
    assert list(circles(tmp_path)) == []
    assert list(folder_circles(tmp_path / "structure", tmp_path)) == [{"a", "b"}]


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        ("import pliant.gates", 0),
        ("def f():\n    from pliant.gates import Gate, head", 0),
        ("from pliant.gates import lazy, anything", 0),
        ("from pliant.gates.head import f, g, CONSTANT", 0),
        ("def f():\n    from pliant.doors import Door", 1),
        ("import pliant.doors", 1),
        ("from pliant.gates.head import h", 1),
    ],
)
def test_an_import_of_nothing_is_found(tmp_path: Path, line: str, faults: int) -> None:
    _plant(tmp_path, "gates/__init__.py", "def __getattr__(name): ...")
    _plant(tmp_path, "gates/head.py", "from math import g\nif g:\n    CONSTANT = 1\ndef f(): ...")
    _plant(tmp_path, "model.py", line)
    assert len(list(missing_imports(tmp_path, tmp_path))) == faults


def test_a_wrong_import_inside_a_part_is_found(tmp_path: Path) -> None:
    layers = [{"model"}, {"gates", "skips"}]
    for file in ("__init__", "model", "skips"):
        _plant(tmp_path, f"structure/{file}.py", "from pliant.structure.gates.head import f")
    _plant(tmp_path, "structure/gates/head.py", "from pliant.structure.gates import mlp")
    (fault,) = wrong_layers(tmp_path, "structure", layers)  # the two of one layer
    assert fault.endswith("skips.py:1: structure.skips may not import structure.gates.head.f")
    _plant(tmp_path, "structure/skips.py", "from pliant.structure import model")
    (fault,) = wrong_layers(tmp_path, "structure", layers)
    assert fault.endswith("skips.py:1: structure.skips may not import structure.model")
    (fault,) = wrong_layers(tmp_path, "structure", [{"model"}, {"gates"}])
    assert "'skips' has no place in LAYERS['structure']" in fault


def test_core_that_imports_facade_is_found(tmp_path: Path) -> None:
    _plant(tmp_path, "gradients/facade/loss.py", "from pliant.gradients.facade import steps")
    _plant(tmp_path, "cli/score.py", "from pliant.gradients.facade import loss")
    assert list(facade_imports(tmp_path)) == []
    _plant(tmp_path, "gradients/engines/exact.py", "from ..facade.loss import CGGRLoss")
    assert len(list(facade_imports(tmp_path))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "if config.model_type == 'llama': pass",
        "kind = getattr(config, 'model_type')",
        "kind = raw['model_type']",
    ],
)
def test_asking_for_the_type_of_a_model_is_found(tmp_path: Path, line: str) -> None:
    _plant(tmp_path, "loading/models.py", line)
    _plant(tmp_path, "anatomy/find.py", line)
    assert len(list(asks_for_model_type(tmp_path))) == 1


def test_the_survey_may_report_the_type_of_a_model_and_not_compare_it(tmp_path: Path) -> None:
    _plant(tmp_path, "survey/examination.py", "report(kind=config.model_type)")
    assert list(asks_for_model_type(tmp_path)) == []
    _plant(tmp_path, "survey/examination.py", "report(config.model_type == 'llama')")
    assert len(list(asks_for_model_type(tmp_path))) == 1


def wrong_imports(source: Path) -> Iterator[str]:
    """One line for each import that runs the wrong way."""
    for path in sorted(source.rglob("*.py")):
        importer = path.relative_to(source).with_suffix("").parts[0]
        if importer in DOORS or path.stem in DOORS - {"__init__"}:
            continue
        if _row(importer) is None and importer != "nano":
            yield f"{path}: {importer!r} has no place in ORDER"
            continue
        for line, imported in _imports(path, source):
            if not _may_import(importer, imported.split(".")[0]):
                yield f"{path}:{line}: {importer} may not import {imported}"


def circles(source: Path) -> Iterator[set[str]]:
    """The sets of files in which each reaches all others by imports."""
    files = {_module(path, source): path for path in sorted(source.rglob("*.py"))}
    graph = {
        name: {_file_of(target, files) for _, target in _imports(path, source)} - {name, ""}
        for name, path in files.items()
        if name  # the lazy table of public names imports nothing
    }
    yield from _circles(graph)


def folder_circles(folder: Path, source: Path = SOURCE) -> Iterator[set[str]]:
    """The same for the files and folders that lie in one folder, whatever lies inside them."""
    package = _module(folder / "__init__.py", source)
    graph: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        child = path.relative_to(folder).with_suffix("").parts[0]
        if child in DOORS:
            continue
        targets = graph.setdefault(child, set())
        for _, target in _imports(path, source):
            if target.startswith(f"{package}."):
                targets.add(target.removeprefix(f"{package}.").split(".")[0])
    yield from _circles({child: targets - {child} for child, targets in graph.items()})


def missing_imports(folder: Path, source: Path) -> Iterator[str]:
    """One line for each import of a module of Pliant, or of a name in one, that is not there."""
    files = {_module(path, source): path for path in source.rglob("*.py")}
    names = {module: _names(path) for module, path in files.items()}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets: list[str] = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            for target in targets:
                if not target.startswith("pliant."):
                    continue
                home, _, name = target.removeprefix("pliant.").rpartition(".")
                inside = names.get(home, set())
                if (f"{home}.{name}" if home else name) in files or name in inside or "*" in inside:
                    continue
                yield f"{path}:{node.lineno}: there is no {target}"


def _names(path: Path) -> set[str]:
    """The names that a module has at its top; "*" if it may make more."""
    names: set[str] = set()
    ahead: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while ahead:
        for node in ast.iter_child_nodes(ahead.pop()):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add("*" if node.name == "__getattr__" else node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            elif isinstance(node, ast.Name):
                names.add(node.id)
            else:
                ahead.append(node)
    return names


def wrong_layers(source: Path, part: str, layers: list[set[str]]) -> Iterator[str]:
    """One line for each import inside a part that does not run down its layers."""
    depth = {name: i for i, layer in enumerate(layers) for name in layer}
    circles = [{name.rpartition(".")[2] for name in circle} for circle in CIRCLES]
    for path in sorted((source / part).rglob("*.py")):
        child = path.relative_to(source / part).with_suffix("").parts[0]
        if child in DOORS:
            continue
        if child not in depth:
            yield f"{path}: {child!r} has no place in LAYERS[{part!r}] of tests/test_imports.py"
            continue
        for line, target in _imports(path, source):
            home, _, inside = target.partition(".")
            other = inside.split(".")[0]
            if home != part or other == child or other not in depth or {child, other} in circles:
                continue
            if depth[child] >= depth[other]:
                yield f"{path}:{line}: {part}.{child} may not import {target}"


def facade_imports(source: Path) -> Iterator[str]:
    """One line for each file of a part that imports the facade of that part from outside of it."""
    for path in sorted(source.rglob("*.py")):
        part, *inside = path.relative_to(source).with_suffix("").parts
        for line, target in _imports(path, source) if "facade" not in inside else ():
            if target.startswith(f"{part}.facade"):
                yield f"{path}:{line}: core may not import {target}"


def _circles(graph: dict[str, set[str]]) -> Iterator[set[str]]:
    """The strongly connected sets of more than one node."""
    reached = {node: _reached(node, graph) for node in graph}
    seen: set[str] = set()
    for node in graph:
        circle = {other for other in reached[node] if node in reached.get(other, ())}
        if circle and node not in seen:
            seen |= circle
            yield circle


def _reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    """The nodes that some path of one step or more leads to."""
    reached: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        node = ahead.pop()
        if node not in reached:
            reached.add(node)
            ahead += graph.get(node, ())
    return reached


def asks_for_model_type(source: Path) -> Iterator[str]:
    """One line for each place that looks at it; the survey may report it, and compare nothing."""
    for path in sorted(source.rglob("*.py")):
        part = path.relative_to(source).parts[0]
        if part == "anatomy":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.Compare, ast.Match, ast.Subscript) if part == "survey" else (ast.Module,)
        for outer in (node for node in ast.walk(tree) if isinstance(node, kinds)):
            for node in filter(_names_model_type, ast.walk(outer)):
                yield f"{path}:{getattr(node, 'lineno', 0)}: only anatomy may look at model_type"


def _names_model_type(node: ast.AST) -> bool:
    return getattr(node, "attr", None) == "model_type" or getattr(node, "value", None) == (
        "model_type"
    )


def _may_import(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if importer == "nano":
        return imported in NANO_MAY_IMPORT
    if imported == "nano":
        return importer in MAY_IMPORT_NANO
    left, right = _row(importer), _row(imported)
    return left is not None and right is not None and left < right


def _row(module: str) -> int | None:
    return next((row for row, modules in enumerate(ORDER) if module in modules), None)


def _imports(path: Path, source: Path) -> Iterator[tuple[int, str]]:
    """The line and the dotted name, within Pliant, of each import of a file."""
    package = ("pliant", *path.relative_to(source).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join((*stem, *([node.module] if node.module else [])))
            names = [f"{start}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pliant" and len(parts) > 1 and not parts[1].startswith("__"):
                yield node.lineno, ".".join(parts[1:])


def _module(path: Path, source: Path) -> str:
    """The dotted name of a file within Pliant; a package's own file has the package's."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _file_of(target: str, files: dict[str, Path]) -> str:
    """The file that an imported name lies in."""
    while target and target not in files:
        target = target.rpartition(".")[0]
    return target


def _plant(source: Path, file: str, text: str) -> None:
    path = source / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
