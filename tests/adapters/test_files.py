"""A folder holds all of an adapter or nothing of it, and no folder can harm a model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.minimal_adapter import (
    Scale,
    ScaleConfig,
    Warmup,
    WarmupConfig,
    anatomy_of,
    logits,
    same_anatomy,
    tiny_llama,
    trained,
)
from torch import nn

from pliant.adapters import Adapter, attach, attached, files
from pliant.errors import AdapterError, CorruptFile, PliantError, WrongBase
from pliant.loading import WEIGHTS


def saved(folder: Path, model: nn.Module | None = None, seed: int = 2) -> Scale:
    model = tiny_llama() if model is None else model
    adapter: Scale = trained(attach(model, Scale(model, ScaleConfig()), f"s{seed}"), seed)
    adapter.save_pretrained(folder)
    return adapter


def reindexed(folder: Path, **changes: Any) -> None:
    """Change the index, checksum included, as somebody with bad intentions would."""
    path = folder / files.INDEX
    content = {**json.loads(path.read_text()), **changes}
    del content["checksum"]
    path.write_text(json.dumps({**content, "checksum": files._checksum(content)}))


def reweighted(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change the weights, checksums included."""
    (path,) = folder.glob(files.WEIGHTS)
    tensors = {**safetensors.torch.load_file(path), **changes}
    content = safetensors.torch.save({k: v for k, v in tensors.items() if v is not None})
    path.write_bytes(content)
    reindexed(folder, sha256=hashlib.sha256(content).hexdigest())


# --- save and load -------------------------------------------------------------------------------


def test_saved_and_loaded_agree(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    model = tiny_llama()
    again = Scale.from_pretrained(model, tmp_path, name="again")
    assert torch.equal(logits(model), logits(adapter.base))
    assert again.config == adapter.config == ScaleConfig()
    assert attached(model) == {"again": again}
    again.detach()
    with adapter.disabled():
        assert torch.equal(logits(model), logits(adapter.base))


def test_tensors_are_read_in_the_same_order_by_every_process(tmp_path: Path) -> None:
    saved(tmp_path)
    assert {tuple(files.read(tmp_path).tensors) for _ in range(30)} == {("embeddings", "head")}


def test_state_that_is_no_tensor_is_saved_too(tmp_path: Path) -> None:
    model = tiny_llama()
    warmup = attach(model, Warmup(model, WarmupConfig(steps=9)))
    warmup.done = 7
    warmup.save_pretrained(tmp_path)
    again = Warmup.from_pretrained(tiny_llama(), tmp_path)
    assert (again.done, again.config.steps) == (7, 9)


def test_the_file_names_the_class(tmp_path: Path) -> None:
    saved(tmp_path)
    assert type(Adapter.from_pretrained(tiny_llama(), tmp_path)) is Scale


def test_it_can_be_saved_after_it_was_detached(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "on")
    adapter.detach()
    adapter.save_pretrained(tmp_path / "off")
    files_on = {p.name: p.read_bytes() for p in (tmp_path / "on").iterdir()}
    assert files_on == {p.name: p.read_bytes() for p in (tmp_path / "off").iterdir()}


def test_restore_fills_the_adapter_in_place(tmp_path: Path) -> None:
    adapter = saved(tmp_path)
    model = tiny_llama()
    fresh = attach(model, Scale(model, ScaleConfig()))
    parameter = fresh.embeddings
    fresh.restore(tmp_path)
    assert fresh.embeddings is parameter
    assert torch.equal(parameter, adapter.embeddings)
    other = Scale(model, ScaleConfig(start=2.0))
    with pytest.raises(AdapterError, match="another configuration"):
        other.restore(tmp_path)


class Renamed(Warmup):
    """Its state has another name than it had when it was saved."""

    def __init__(self, model: nn.Module, config: WarmupConfig) -> None:
        super().__init__(model, config)
        self.weight = nn.Parameter(torch.zeros(1))

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.done = state["finished"] if state["done"] == 7 else state["done"]


def test_restoring_a_state_that_it_cannot_load_leaves_it_unchanged(tmp_path: Path) -> None:
    model = tiny_llama()
    adapter = attach(model, Renamed(model, WarmupConfig()))
    adapter.done = 7
    adapter.save_pretrained(tmp_path)
    adapter.done = 5
    with torch.no_grad():
        adapter.weight.fill_(3.0)
    with pytest.raises(CorruptFile, match="cannot be loaded .KeyError: 'finished'"):
        adapter.restore(tmp_path)
    assert (adapter.weight.item(), adapter.done) == (3.0, 5)


def test_an_adapter_that_was_never_attached_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="this Scale was never attached"):
        Scale(tiny_llama(), ScaleConfig()).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


class WithLinear(Scale):
    def __init__(self, model: nn.Module, config: ScaleConfig) -> None:
        super().__init__(model, config)
        self.linear = nn.Linear(2, 2)


def test_an_adapter_that_peft_changed_is_not_saved(tmp_path: Path) -> None:
    import peft

    model = tiny_llama()
    adapter = attach(model, WithLinear(model, ScaleConfig()))
    peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2))
    with pytest.raises(AdapterError, match=r"gained linear\.base_layer.* after it was attached"):
        adapter.save_pretrained(tmp_path)


def test_a_save_is_small_and_its_card_names_its_size(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config._name_or_path = "somebody/tiny-llama"
    saved(tmp_path, model)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 8192
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "somebody/tiny-llama"
    assert card.data.library_name == "pliant"
    assert card.data.tags == ["pliant", "adapter", "minimal"]
    assert "17 trained parameters" in card.text and '"start": 1.0' in card.text


def test_no_file_names_the_folder_of_the_base(tmp_path: Path) -> None:
    base = tmp_path / "home" / "base"
    tiny_llama().save_pretrained(base)
    model = type(tiny_llama()).from_pretrained(base)
    saved(tmp_path / "adapter", model)
    written = b"".join(p.read_bytes() for p in (tmp_path / "adapter").iterdir())
    assert str(tmp_path).encode() not in written


def test_a_card_that_the_user_rewrote_stays(tmp_path: Path) -> None:
    saved(tmp_path)
    card = tmp_path / "README.md"
    before = card.read_text()
    card.write_text("mine")
    saved(tmp_path)
    assert card.read_text() == "mine"
    card.write_text("stale\n" + before.splitlines()[-1])
    saved(tmp_path)
    assert card.read_text() == before


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    saved(tmp_path, seed=2)
    others = {"tokenizer.json", "adapter-mine.safetensors", ".mine.unfinished"}
    for name in others:
        (tmp_path / name).write_text("{}")
    begun = tmp_path / files.UNFINISHED.format(files.INDEX)  # by a save that was killed
    begun.write_text("{")
    second = saved(tmp_path, seed=3)
    again = Scale.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(again.embeddings, second.embeddings)
    assert len(list(tmp_path.glob(files.WEIGHTS))) == 1
    assert not begun.exists()
    assert others <= {path.name for path in tmp_path.iterdir()}


def test_push_to_the_hub_and_load_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies replace the hub's two calls; all code of Pliant runs."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    cache.mkdir()

    def upload(self: Any, *, folder_path: Path, delete_patterns: str, **_: Any) -> str:
        for old in hub.glob(delete_patterns):
            old.unlink()
        shutil.copytree(folder_path, hub, dirs_exist_ok=True)
        return "url"

    def download(repo_id: str, *, allow_patterns: list[str], revision: str) -> str:
        assert (repo_id, revision) == ("me/scale", "main")
        for pattern in allow_patterns:
            for path in hub.glob(pattern):
                shutil.copy(path, cache)
        return str(cache)

    url = type("Url", (), {"repo_id": "me/scale"})()
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: url)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    saved(tmp_path / "first", seed=2).push_to_hub("me/scale")
    second = saved(tmp_path / "second", seed=3)
    assert second.save_pretrained(tmp_path / "second", push_to_hub=True, repo_id="me/scale")
    assert len(list(hub.glob(files.WEIGHTS))) == 1
    again = Scale.from_pretrained(tiny_llama(), "me/scale", revision="main")
    assert torch.equal(again.embeddings, second.embeddings)


def test_flattened_shards_are_not_saved_as_weights(tmp_path: Path) -> None:
    adapter = saved(tmp_path / "whole")
    adapter.head.data = torch.empty(0)  # as ZeRO-3 leaves it between two steps
    with pytest.raises(AdapterError, match="flattened into shards"):
        adapter.save_pretrained(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


# --- killed, or disk full -------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_save_that_fails_at_any_step_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Each call that touches the disk fails once, before it did anything or after (and an `open`
    that fails after has emptied the file)."""
    outcomes = []
    for step in range(40):
        folder = tmp_path / str(step)
        old = saved(folder, seed=2)
        model = tiny_llama()
        new = trained(attach(model, Scale(model, ScaleConfig())), seed=3)
        left = [step]

        def failing(real: Callable[..., Any], left: list[int] = left) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] != -1:
                    return real(*args, **kwargs)
                result = real(*args, **kwargs) if when == "after" else None
                if result is not None and hasattr(result, "close"):
                    result.close()
                raise OSError(28, "No space left on device")

            return call

        with monkeypatch.context() as patched:
            for name in ("open", "replace", "unlink"):
                patched.setattr(Path, name, failing(getattr(Path, name)))
            patched.setattr(os, "fsync", failing(os.fsync))
            try:
                new.save_pretrained(folder)
                done = True
            except AdapterError as error:
                assert "No space left" in str(error)
                done = False
        assert not list(folder.glob(".*"))
        embeddings = Scale.from_pretrained(tiny_llama(), folder).embeddings
        is_new = torch.equal(embeddings, new.embeddings)
        assert is_new if done else is_new or torch.equal(embeddings, old.embeddings)
        outcomes.append((done, is_new))
        if left[0] >= 0:  # nothing was left to fail
            break
    assert set(outcomes) >= {(False, False), (False, True), (True, True)}
    assert outcomes[-1] == (True, True)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.minimal_adapter import *
from pliant.adapters import attach
model = tiny_llama()
adapter = trained(attach(model, Scale(model, ScaleConfig())), seed=3)
for name in ("open", "replace", "unlink"):
    def dying(*args, real=getattr(Path, name), **kwargs):
        left[0] -= 1
        if left[0] == -1 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if left[0] == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(Path, name, dying)
for folder in Path(sys.argv[1]).iterdir():
    when, step = folder.name.split("-")
    left = [int(step)]
    if os.fork() == 0:
        adapter.save_pretrained(folder)
        os._exit(0)
    os.wait()
"""


def test_a_save_that_is_killed_leaves_the_old_or_the_new(tmp_path: Path, root: Path) -> None:
    """Killed before each call that touches the disk, and right after it."""
    old = saved(tmp_path / "before-0", seed=2)
    cases = [f"{when}-{step}" for when in ("before", "after") for step in range(12)]
    for case in cases[1:]:
        shutil.copytree(tmp_path / "before-0", tmp_path / case)
    run = [sys.executable, "-c", KILLED, str(tmp_path)]
    subprocess.run(run, check=True, cwd=root, timeout=300)
    saves = [Scale.from_pretrained(tiny_llama(), tmp_path / case) for case in cases]
    is_old = [torch.equal(save.embeddings, old.embeddings) for save in saves]
    for outcome in (is_old[:12], is_old[12:]):  # old at first, then new
        assert outcome == sorted(outcome, reverse=True)
        assert outcome[0] and not outcome[-1]


# --- damaged and foreign folders-------------------------------------------------------------------


def refuses(folder: Path | str, kind: type[PliantError], message: str, **options: Any) -> None:
    """Loading raises an error of one line and leaves the model unchanged."""
    model = tiny_llama()
    before, expected = anatomy_of(model), logits(model)
    with pytest.raises(kind, match=message) as caught:
        Scale.from_pretrained(model, folder, **options)
    assert "\n" not in str(caught.value)
    assert same_anatomy(anatomy_of(model), before)
    assert torch.equal(logits(model), expected)


def test_a_missing_folder(tmp_path: Path) -> None:
    refuses(tmp_path / "none", AdapterError, "no such folder")
    refuses("./none", AdapterError, "no such folder")
    refuses("somebody/nothing", AdapterError, "no such folder, and no such hub model")
    refuses(tmp_path, CorruptFile, "has no pliant.json")


def test_a_missing_weights_file(tmp_path: Path) -> None:
    saved(tmp_path)
    next(tmp_path.glob(files.WEIGHTS)).unlink()
    refuses(tmp_path, CorruptFile, "missing, although pliant.json names it")


def test_a_single_flipped_bit_in_the_weights(tmp_path: Path) -> None:
    saved(tmp_path)
    (path,) = tmp_path.glob(files.WEIGHTS)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # a valid file, with another sign or exponent in it
    path.write_bytes(content)
    refuses(tmp_path, CorruptFile, "truncated or damaged .its checksum does not match")


def test_somebody_elses_adapter(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], r=2)
    peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    refuses(tmp_path, CorruptFile, "looks like peft's")


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    refuses(tmp_path, CorruptFile, "looks like a model")


def test_an_index_that_is_some_other_json(tmp_path: Path) -> None:
    for content in ("[]", '{"a": 1}', "", "\xff\xfe", "[" * 100_000):
        (tmp_path / files.INDEX).write_text(content, encoding="latin-1")
        refuses(tmp_path, CorruptFile, "not JSON|not written by Pliant")


def test_a_later_format_names_its_writer(tmp_path: Path) -> None:
    saved(tmp_path)
    reindexed(tmp_path, format=2, pliant="9.1")
    refuses(tmp_path, CorruptFile, "format 2, written by Pliant 9.1; .* pip install -U pliant")


def test_an_edited_index(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / files.INDEX
    path.write_text(path.read_text().replace('"start": 1.0', '"start": 3.0'))
    refuses(tmp_path, CorruptFile, "damaged, or edited by hand")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {"start": "one"}}, "start"),
        ({"config": {"later": 1}}, "knows no setting 'later' of ScaleConfig"),
        ({"config": 3}, "has invalid fields .config"),
        ({"base": {}}, "has invalid fields .base"),
        ({"state": {"_extra_state": {}}}, "holds the extra state"),
        ({"weights": "../pliant.json"}, "missing"),
        ({"weights": "/etc/hostname"}, "missing"),
    ],
)
def test_an_index_that_promises_something_else(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    saved(tmp_path)
    reindexed(tmp_path, **changes)
    refuses(tmp_path, CorruptFile, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": torch.ones(3)}, r"head has shape \[3\], and this adapter's has \[1\]"),
        ({"head": torch.tensor([1])}, "head is torch.int64, not torch.float32"),
        ({"head": torch.tensor([float("nan")])}, "head holds NaN"),
        ({"head": torch.tensor([float("-inf")])}, "head holds NaN or infinity"),
        ({"head": None}, "only one of them has .'head'"),
        ({"tail": torch.ones(1)}, "only one of them has .'tail'"),
    ],
)
def test_foreign_weights(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    saved(tmp_path)
    reweighted(tmp_path, **changes)
    refuses(tmp_path, CorruptFile, message)


class Sized(Scale):
    """Its configuration says how large it is."""

    config_class = WarmupConfig

    def __init__(self, model: nn.Module, config: Any) -> None:
        Adapter.__init__(self, model, config)
        self.rows = nn.Parameter(torch.zeros(config.steps, 16, device="cpu"))
        self.linear = nn.Linear(16, config.steps)

    def wire(self, model: nn.Module) -> list[Any]:
        return []


@pytest.mark.parametrize("steps", [10**6, 10**9, 10**12, 10**30])
def test_a_configuration_of_any_size_allocates_nothing(tmp_path: Path, steps: int) -> None:
    model = tiny_llama()
    attach(model, Sized(model, WarmupConfig(steps=9)), "sized").save_pretrained(tmp_path)
    assert Sized.from_pretrained(tiny_llama(), tmp_path).rows.shape == (9, 16)
    reindexed(tmp_path, config={"steps": steps})
    with pytest.raises(CorruptFile, match="far more parameters than the 297 that"):
        Sized.from_pretrained(tiny_llama(), tmp_path)


def test_an_adapter_of_another_class(tmp_path: Path) -> None:
    model = tiny_llama()
    attach(model, Warmup(model, WarmupConfig())).save_pretrained(tmp_path)
    refuses(tmp_path, AdapterError, "holds a Warmup of pliant.warmup, which is no Scale")


def test_another_base_is_named_and_can_be_insisted_on(tmp_path: Path) -> None:
    saved(tmp_path, tiny_llama(seed=9))
    refuses(tmp_path, WrongBase, "LlamaForCausalLM.: the values of .* insist=True")
    forced = Scale.from_pretrained(tiny_llama(), tmp_path, insist=True)
    assert forced.name == "minimal"


def test_an_adapter_of_a_peft_base_loads_on_that_alone(tmp_path: Path) -> None:
    """The other way round as well, but not where an older version left open what was active."""
    lora, other, plain = tiny_lora(1), tiny_lora(2), tiny_llama()
    saved(tmp_path / "of lora", lora)
    saved(tmp_path / "of plain", plain)
    Scale.from_pretrained(tiny_lora(1, "renamed"), tmp_path / "of lora", name="again")
    for model, folder in ((plain, "of lora"), (other, "of lora"), (lora, "of plain")):
        with pytest.raises(WrongBase, match="active PEFT adapters that differ"):
            Scale.from_pretrained(model, tmp_path / folder, name="wrong")
        Scale.from_pretrained(model, tmp_path / folder, name="insisted", insist=True).detach()
    base = json.loads((tmp_path / "of plain" / files.INDEX).read_text())["base"]
    del base["adapters"]
    reindexed(tmp_path / "of plain", base=base)
    for model in (plain, lora):
        Scale.from_pretrained(model, tmp_path / "of plain", name="old")


def tiny_lora(seed: int, name: str = "default") -> nn.Module:
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    base = tiny_llama()
    torch.manual_seed(seed)
    return peft.get_peft_model(base, config, adapter_name=name)


def test_restoring_on_another_base_is_refused_as_loading_is(tmp_path: Path) -> None:
    learned = saved(tmp_path, tiny_llama(seed=9)).embeddings
    model = tiny_llama()
    adapter = attach(model, Scale(model, ScaleConfig()))
    with pytest.raises(WrongBase, match="insist=True"):
        adapter.restore(tmp_path)
    assert torch.equal(adapter.embeddings, torch.ones(16))
    adapter.restore(tmp_path, insist=True)
    assert torch.equal(adapter.embeddings, learned)


def test_a_base_of_another_size_is_refused_even_when_insisted_on(tmp_path: Path) -> None:
    saved(tmp_path, tiny_llama(hidden_size=32))
    refuses(tmp_path, WrongBase, r"lm_head.weight is \[64, 16\] here and \[64, 32\] there; .* more")
    refuses(tmp_path, CorruptFile, r"embeddings has shape \[32\]", insist=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scale]:
    folder = tmp_path_factory.mktemp("good")
    return folder, saved(folder)


@given(data=st.data())
def test_no_damage_yields_another_adapter(good: tuple[Path, Scale], data: st.DataObject) -> None:
    """Truncated anywhere or bits flipped: a clear error, or the very same adapter."""
    folder, adapter = good
    model = adapter.base
    path = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.name != "README.md")))
    content = path.read_bytes()
    before = anatomy_of(model)
    damaged = bytearray(content)
    if data.draw(st.booleans(), "truncated"):
        del damaged[data.draw(st.integers(0, len(damaged) - 1)) :]
    else:
        for bit in data.draw(st.lists(st.integers(0, 8 * len(damaged) - 1), min_size=1)):
            damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        again = Scale.from_pretrained(model, folder, name="again")
        assert torch.equal(again.embeddings, adapter.embeddings)
        assert torch.equal(again.head, adapter.head) and again.config == adapter.config
        again.detach()
    except PliantError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(content)
    assert same_anatomy(anatomy_of(model), before)


def test_the_card_of_an_embedded_base_links_to_no_hub(tmp_path: Path) -> None:
    model = tiny_llama()
    model.config._name_or_path = str(WEIGHTS / "nano-s")
    saved(tmp_path, model)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and "huggingface.co" not in card.text
    assert "An adapter for nano-s" in card.text
