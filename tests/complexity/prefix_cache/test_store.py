"""Stored prefixes: in files that survive an interruption, never used for what they are not of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.minimal_adapter import Scale, ScaleConfig, tiny_llama
from torch import Tensor

from pliant import adapters
from pliant.complexity import Complexity, CPXConfig, attach
from pliant.complexity.prefix_cache import disk, policy
from pliant.complexity.prefix_cache.disk import folder_of, open_files, write_files
from pliant.complexity.prefix_cache.policy import choose_storage, store
from pliant.complexity.prefix_cache.store import in_memory
from pliant.complexity.training.train_module import TrainModule
from pliant.errors import AdapterError


@pytest.fixture
def ids() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    lengths = (7, 3, 11, 4, 4, 9, 6, 2)
    return [torch.randint(0, 60, (n,), generator=generator) for n in lengths]


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "TOKENS", 12)


def scorer(**changes: Any) -> Complexity:
    return attach(tiny_llama(**changes).requires_grad_(False), CPXConfig())


class Counted:
    """The base, and how many prompts it was asked for; it may die on the way."""

    def __init__(self, scorer: Complexity, dies_after: int = 10**9) -> None:
        self.module = TrainModule(scorer)
        self.prompts = 0
        self.dies_after = dies_after

    def __call__(self, input_ids: Tensor, mask: Tensor) -> Any:
        if self.prompts >= self.dies_after:
            raise KeyboardInterrupt
        self.prompts += len(input_ids)
        return self.module.scorer.prefilled(input_ids, mask)


def test_an_interrupted_store_goes_on(ids: list[Tensor], tmp_path: Path) -> None:
    base = scorer()
    with pytest.raises(KeyboardInterrupt):
        write_files(tmp_path, Counted(base, dies_after=4), ids)
    done = len(list(tmp_path.glob("*.safetensors")))
    assert done and not list(tmp_path.glob(".*"))
    with pytest.raises(AdapterError, match="missing or incomplete"):
        open_files(tmp_path, ids)
    rest = Counted(base)
    write_files(tmp_path, rest, ids)
    assert 0 < rest.prompts < len(ids)
    whole, mapped = in_memory(Counted(base), ids), open_files(tmp_path, ids)
    for one, other in zip(
        whole.batch(range(8)).tensors, mapped.batch(range(8)).tensors, strict=True
    ):
        assert torch.allclose(one[:, :, -2:], other[:, :, -2:], atol=1e-6)
    again = Counted(base)
    write_files(tmp_path, again, ids)
    assert again.prompts == 0


def test_a_torn_file_is_written_again(ids: list[Tensor], tmp_path: Path) -> None:
    base = scorer()
    write_files(tmp_path, Counted(base), ids)
    torn = sorted(tmp_path.glob("*.safetensors"))[1]
    torn.write_bytes(torn.read_bytes()[:-8])
    again = Counted(base)
    write_files(tmp_path, again, ids)
    assert 0 < again.prompts < len(ids) and len(open_files(tmp_path, ids)) == len(ids)


def test_two_processes_write_one_folder(ids: list[Tensor], tmp_path: Path) -> None:
    base = scorer()
    first, second = Counted(base), Counted(base)
    write_files(tmp_path, first, ids, share=(0, 2))
    write_files(tmp_path, second, ids, share=(1, 2))
    assert first.prompts and second.prompts and first.prompts + second.prompts == len(ids)
    assert len(open_files(tmp_path, ids)) == len(ids)


def test_the_folder_is_of_this_base_and_these_prompts(ids: list[Tensor], tmp_path: Path) -> None:
    base = scorer()
    here = folder_of(tmp_path, base, ids)
    assert folder_of(tmp_path, scorer(), ids) == here
    with torch.no_grad():
        base.rows.add_(1.0)  # what is trained is not what prefixes depend on
    attach(base.base, CPXConfig(), name="beside")  # nor is another scorer, which acts when asked
    assert folder_of(tmp_path, base, ids) == here
    others = [scorer(seed=1), scorer(rope_theta=500.0)]
    others.append(attach(tiny_llama().bfloat16(), CPXConfig()))
    others.append(attach(tiny_llama(), CPXConfig(layer=1)))
    adapted = scorer()
    adapters.attach(adapted.base, Scale(adapted.base, ScaleConfig()))
    folders = [folder_of(tmp_path, other, ids) for other in [*others, adapted]]
    folders += [folder_of(tmp_path, base, ids[::-1]), folder_of(tmp_path, base, ids[1:])]
    assert len({here, *folders}) == 8


def test_another_active_peft_adapter_is_another_base(ids: list[Tensor], tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    lora = peft.get_peft_model(tiny_llama(), config, adapter_name="a")
    lora.add_adapter("b", config)
    on_lora = attach(lora, CPXConfig())
    folders = []
    for name in ("a", "b"):
        lora.set_adapter(name)
        folders.append(folder_of(tmp_path, on_lora, ids))
    with lora.disable_adapter():
        folders.append(folder_of(tmp_path, on_lora, ids))
    assert len({*folders}) == 3


def test_an_edit_of_one_value_anywhere_is_another_base(ids: list[Tensor], tmp_path: Path) -> None:
    base = scorer()
    here = folder_of(tmp_path, base, ids)
    changed = [p for _, p in base.base_parameters()]
    generator = torch.Generator().manual_seed(0)
    for p in changed:
        at = int(torch.randint(p.numel(), (1,), generator=generator))
        value = p.data.view(-1)[at].clone()
        p.data.view(-1)[at] = torch.nextafter(value, torch.tensor(9.0))
        assert folder_of(tmp_path, base, ids) != here
        p.data.view(-1)[at] = value
    assert folder_of(tmp_path, base, ids) == here


def choose(ids: list[Tensor], folder: Path, uses: int = 10, **changes: Any) -> policy.Storage:
    module = TrainModule(scorer())
    return choose_storage(ids, uses, module.scorer.prefilled, folder=folder, **changes)


def test_bytes_are_known_before(ids: list[Tensor], tmp_path: Path) -> None:
    storage = choose(ids, tmp_path)
    module = TrainModule(scorer())
    prefixes = store(storage, module.scorer, ids, module.scorer.prefilled, folder=tmp_path)
    assert storage.where == "memory" and "fit into memory" in storage.why
    assert prefixes is not None and prefixes.bytes == storage.bytes


def test_used_once_nothing_is_stored(ids: list[Tensor], tmp_path: Path) -> None:
    assert choose(ids, tmp_path, uses=1).where == "recompute"
    assert choose(ids, tmp_path, uses=1, wanted="disk").where == "disk"


@pytest.mark.parametrize(("seconds", "where"), [(1e-9, "disk"), (1e9, "recompute")])
def test_without_memory_a_measurement_decides(
    ids: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, where: str
) -> None:
    monkeypatch.setattr(policy, "free_memory", lambda: 10)
    storage = choose(ids, tmp_path)
    assert storage.where in ("disk", "recompute") and "recomputed" in storage.why
    monkeypatch.setattr(policy, "_disk_seconds", lambda *_: (seconds, seconds))
    assert choose(ids, tmp_path).where == where
    monkeypatch.setattr(policy, "_free_disk", lambda _: 10)
    assert "nor onto the disk" in choose(ids, tmp_path).why
    assert not list(tmp_path.iterdir())


def test_more_processes_need_more_memory(
    ids: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = choose(ids, tmp_path).bytes
    monkeypatch.setattr(policy, "free_memory", lambda: 3 * size)
    assert choose(ids, tmp_path).where == "memory"
    assert choose(ids, tmp_path, processes=2).where != "memory"
