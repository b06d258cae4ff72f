"""An export from disk writes what the export in memory does, and survives interruptions."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.structure.pruning.test_prune import llama, text
from torch import Tensor, nn

from pliant import adapters
from pliant.anatomy.tiny import tiny_model
from pliant.errors import (
    AdapterError,
    InvalidInput,
    ModelNotFound,
    PliantError,
    UnsupportedModel,
    WrongBase,
)
from pliant.loading import load_model, load_tokenizer
from pliant.structure import (
    GateConfig,
    PruneConfig,
    Pruned,
    attach,
    attach_skips,
    export,
    export_from_disk,
    prune,
)
from pliant.structure.exporting.disk_export import PLAN, fits_into_memory
from pliant.structure.exporting.disk_model import DiskModel


def saved(model: Any, folder: Path, **options: Any) -> Path:
    """A checkpoint of several files beside what pruned it."""
    model.save_pretrained(folder / "base", max_shard_size="30KB")
    pruned = prune(model, text(), PruneConfig(**options))
    pruned.save(folder / "pruned")
    return folder


def stream(folder: Path, size: str = "20KB", **options: Any) -> Any:
    return export_from_disk(
        folder / "base", [folder / "pruned"], folder / "disk", max_shard_size=size, **options
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: t for file in files for name, t in load_file(file).items()}


def same_checkpoint(ours: Path, theirs: Path) -> bool:
    a, b = tensors(ours), tensors(theirs)
    if a.keys() != b.keys() or not all(torch.equal(a[k], b[k]) for k in a):
        return False
    both = [(folder / "config.json").read_text() for folder in (ours, theirs)]
    return both[0] == both[1]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"heads": 0.5, "channels": 0.25}),  # heads share KV heads
        ("gpt2", {"channels": 0.5}),  # Conv1D, tied embeddings
        ("phi3", {"heads": 0.5, "channels": 0.25}),  # fused query, key and value; gate and up
        ("gemma2", {"channels": 0.5}),  # two kinds of layers
        ("mixtral", {"heads": 0.5}),  # tensors of experts are joined when they are loaded
        ("llama", {"channels": 0.25, "compensate": False, "score": "magnitude"}),
    ],
)
def test_from_disk_and_in_memory_are_equal_tensor_for_tensor(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(name)
    saved(model, tmp_path, **options)
    in_memory = export(model, tmp_path / "memory")
    from_disk = stream(tmp_path)
    assert same_checkpoint(tmp_path / "disk", tmp_path / "memory")
    assert from_disk.as_dict() == in_memory.as_dict()
    assert len(list((tmp_path / "disk").glob("*.safetensors"))) > 5
    assert {path.name for path in tmp_path.iterdir()} == {"base", "pruned", "memory", "disk"}
    assert not (tmp_path / "disk" / PLAN).exists()


def test_a_llama_with_odd_heads_becomes_a_mistral(tmp_path: Path) -> None:
    model = llama()
    saved(model, tmp_path, heads=0.25)
    export(model, tmp_path / "memory")
    assert stream(tmp_path).architecture == "MistralForCausalLM"
    assert same_checkpoint(tmp_path / "disk", tmp_path / "memory")


def test_layers_are_removed_and_other_gates_multiplied_in(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    gates = attach(model, GateConfig(("heads", "channels", "layers")))
    with torch.no_grad():
        gates["layers", 0].zero_()
        gates["heads", 1][:] = torch.linspace(0.5, 1.5, 8)
        for i in range(3):
            gates["channels", i][i : i + 16] = 0
    gates.save_pretrained(tmp_path / "pruned")
    in_memory = export(model, tmp_path / "memory")
    assert stream(tmp_path).as_dict() == in_memory.as_dict()
    assert in_memory.removed == {"channels": 48, "layers": 1}
    assert same_checkpoint(tmp_path / "disk", tmp_path / "memory")


def test_in_bf16_with_a_tokenizer(tmp_path: Path) -> None:
    model = llama().bfloat16()
    saved(model, tmp_path, channels=0.25)
    load_tokenizer("nano-s").save_pretrained(tmp_path / "base")
    assert stream(tmp_path).dtype == "bfloat16"
    assert {t.dtype for t in tensors(tmp_path / "disk").values()} == {torch.bfloat16}
    ours, theirs = (load_tokenizer(tmp_path / name) for name in ("disk", "base"))
    assert ours.chat_template == theirs.chat_template
    assert ours("what is 1+1?") == theirs("what is 1+1?")


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    disk = DiskModel.load(tmp_path / "base", tmp_path / "scratch")
    layers = disk.anatomy.layers
    at_hand: list[int] = []

    def count(*_: Any) -> None:
        full = [all(not p.is_meta for p in layer.parameters()) for layer in layers]
        at_hand.append(sum(full))

    for layer in layers:
        layer.register_forward_hook(count)
    ids = torch.arange(5, 25)[None]
    with disk.running() as running, torch.no_grad():
        assert torch.equal(running(input_ids=ids).logits, model(input_ids=ids).logits)
    assert at_hand == [1, 1, 1]
    assert all(p.is_meta for p in disk.model.parameters())


# --- interruptions -------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stop_at(shard: int) -> Callable[[str, int, int], None]:
    def report(what: str, done: int, total: int) -> None:
        if what == "writing shards" and done == shard:
            raise Stop

    return report


def test_an_interrupted_export_goes_on_at_every_shard(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    saved(model, tmp_path, channels=0.25)
    export(model, tmp_path / "memory")
    unfinished = tmp_path / ".disk.unfinished"
    before: dict[str, int] = {}
    for shard in range(1, 20):
        try:
            stream(tmp_path, report=stop_at(shard))
            break
        except Stop:
            assert not (tmp_path / "disk").exists()
        there = {p.name: p.stat().st_mtime_ns for p in unfinished.glob("*.safetensors")}
        assert len(there) == shard
        assert before.items() <= there.items()  # none was written again
        before = there
    assert shard > 4 and not unfinished.exists()
    assert same_checkpoint(tmp_path / "disk", tmp_path / "memory")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_shard_that_cannot_be_written_is_one_line_and_the_export_goes_on(tmp_path: Path) -> None:
    model = llama()
    saved(model, tmp_path, channels=0.25)
    export(model, tmp_path / "memory")
    with largest_file(5000), pytest.raises(AdapterError, match="cannot be written") as error:
        stream(tmp_path)
    assert "the same command goes on" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "disk").exists()
    stream(tmp_path)
    assert same_checkpoint(tmp_path / "disk", tmp_path / "memory")


def test_an_unfinished_export_of_another_model_is_begun_anew(tmp_path: Path) -> None:
    saved(llama(), tmp_path / "one", channels=0.25)
    other = llama(hidden_size=48)
    saved(other, tmp_path / "two", channels=0.25)
    with pytest.raises(Stop):
        stream(tmp_path / "one", report=stop_at(2))
    (tmp_path / "one" / ".disk.unfinished").rename(tmp_path / "two" / ".disk.unfinished")
    said: list[str] = []
    stream(tmp_path / "two", report=lambda what, done, total: said.append(what))
    assert any("beginning anew" in what for what in said)
    export(other, tmp_path / "two" / "memory")
    assert same_checkpoint(tmp_path / "two" / "disk", tmp_path / "two" / "memory")


def test_somebody_elses_folder_is_left_alone(tmp_path: Path) -> None:
    saved(llama(), tmp_path, channels=0.25)
    (tmp_path / ".disk.unfinished").mkdir()
    (tmp_path / ".disk.unfinished" / "mine").write_text("mine")
    with pytest.raises(InvalidInput, match="no unfinished export"):
        stream(tmp_path)
    assert (tmp_path / ".disk.unfinished" / "mine").read_text() == "mine"


def test_a_checkpoint_that_disagrees_is_not_kept(tmp_path: Path) -> None:
    """One shard of an interrupted export is damaged behind its back."""
    saved(llama(), tmp_path, channels=0.25)
    with pytest.raises(Stop):
        stream(tmp_path, report=stop_at(2))
    shard = min((tmp_path / ".disk.unfinished").glob("*.safetensors"))
    content = load_file(shard)
    save_file({name: t + 1 for name, t in content.items()}, shard, {"format": "pt"})
    with pytest.raises(UnsupportedModel, match="does not agree with the live model"):
        stream(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "pruned"}


# --- bad input -----------------------------------------------------------------------------------


def without_a_tensor(folder: Path) -> None:
    shard = max((folder / "base").glob("*.safetensors"))
    content = load_file(shard)
    content.popitem()
    save_file(content, shard, {"format": "pt"})


def of_another_model(folder: Path) -> None:
    torch.manual_seed(1)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight += 1
    other.save_pretrained(folder / "base", max_shard_size="30KB")


def of_another_shape(folder: Path) -> None:
    llama(intermediate_size=40).save_pretrained(folder / "base", max_shard_size="30KB")


def in_pickles(folder: Path) -> None:
    for file in (folder / "base").glob("*.safetensors"):
        file.unlink()


def without_its_adapters(folder: Path) -> None:
    (folder / "pruned" / "gates" / "pliant.json").unlink()
    (folder / "pruned" / "compensation" / "pliant.json").unlink()


def in_use(folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "disk" / "mine").write_text("mine")


def damaged(folder: Path) -> None:
    weights = next((folder / "pruned" / "compensation").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (without_a_tensor, ModelNotFound, "lacks 1 of its weights"),
        (of_another_model, WrongBase, "the values of .* differ"),
        (of_another_shape, WrongBase, "another base"),
        (in_pickles, InvalidInput, "no safetensors files on disk"),
        (without_its_adapters, AdapterError, "no saved adapter"),
        (in_use, InvalidInput, "name a new folder"),
        (damaged, PliantError, "truncated or damaged"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    spoil: Callable[[Path], None], kind: type[Exception], words: str, tmp_path: Path
) -> None:
    saved(llama(), tmp_path, channels=0.25)
    spoil(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=words) as error:
        stream(tmp_path)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_other_adapters_cannot_be_streamed(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    attach_skips(model).save_pretrained(tmp_path / "pruned")
    with pytest.raises(UnsupportedModel, match="holds a Skips"):
        stream(tmp_path)


# --- saved prunings ------------------------------------------------------------------------------


@pytest.mark.parametrize("compensate", [True, False])
def test_a_saved_pruning_is_loaded_as_it_was(compensate: bool, tmp_path: Path) -> None:
    model = llama()
    pruned = prune(model, text(), PruneConfig(heads=0.5, channels=0.25, compensate=compensate))
    ids = text()[0]
    expected = model(**ids).logits
    pruned.save(tmp_path / "pruned")
    pruned.detach()
    again = Pruned.load(model, tmp_path / "pruned")
    assert torch.equal(model(**ids).logits, expected)
    assert again.as_dict() == pruned.as_dict() and str(again) == str(pruned)
    again.detach()
    other = llama(intermediate_size=40)
    with pytest.raises(WrongBase):
        Pruned.load(other, tmp_path / "pruned")
    assert adapters.attached(other) == {}
    with pytest.raises(AdapterError, match="no saved pruning"):
        Pruned.load(model, tmp_path)


def test_what_is_small_fits_into_memory(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert fits_into_memory(tmp_path) and fits_into_memory("nano-s", "float32")
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.truncate(2**42)  # 4 TiB, of which the disk holds nothing
    assert not fits_into_memory(tmp_path)


def test_the_smaller_model_shares_what_is_not_sliced(tmp_path: Path) -> None:
    """In memory, a tensor that stays as it is is the base's own."""
    from pliant.structure.stock.smaller import with_fewer

    model: nn.Module = llama()
    remaining = {str(i): torch.arange(0, 48, 2) for i in range(3)}
    smaller = next(with_fewer(model, "channels", remaining)).build()
    own = {name: t.data_ptr() for name, t in model.state_dict().items()}
    shared = {name for name, t in smaller.state_dict().items() if t.data_ptr() == own[name]}
    assert own.keys() - shared == {name for name in own if ".mlp." in name}


def test_progress_in_memory(tmp_path: Path) -> None:
    model = load_model("nano-s")
    prune(model, text(), PruneConfig(channels=0.25))
    steps: list[tuple[int, int]] = []
    export(model, tmp_path / "out", report=lambda what, done, total: steps.append((done, total)))
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]
