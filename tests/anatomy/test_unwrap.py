"""unwrap finds the model inside every wrapper, in any order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from pliant import Anatomy, adapters
from pliant.adapters.fingerprint import fingerprint
from pliant.anatomy.find import unwrap
from pliant.anatomy.tiny import tiny_model


class Engine(nn.Module):
    """Holds a model as DeepSpeed's engine does: as its only module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.steps = 0


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": torch.compile,
    "data_parallel": nn.DataParallel,
    "ddp": nn.parallel.DistributedDataParallel,
    "engine": Engine,
    "peft": lora,
}


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("names", list(itertools.permutations(WRAPPERS, 2)), ids="-".join)
def test_wrappers_in_any_order(names: tuple[str, ...]) -> None:
    model = wrapped = tiny_model("llama")
    for name in names:
        wrapped = WRAPPERS[name](wrapped)
    assert unwrap(wrapped) is model
    assert Anatomy.of(wrapped).model is model
    assert fingerprint(wrapped) == fingerprint(model)


def test_all_of_them_at_once() -> None:
    model = tiny_model("llama")
    wrapped = Engine(nn.parallel.DistributedDataParallel(torch.compile(lora(model))))
    assert unwrap(wrapped) is model
    assert adapters.attached(wrapped) == {}


def test_fsdp_version_1() -> None:
    model = tiny_model("llama")
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert unwrap(wrapped) is model
    assert unwrap(torch.compile(wrapped)) is model


def test_fsdp_version_2_wraps_nothing() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = tiny_model("llama")
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    assert unwrap(model) is model


def test_a_prompt_tuned_model() -> None:
    model = tiny_model("llama")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert unwrap(get_peft_model(model, config)) is model


def test_a_model_without_wrappers() -> None:
    model = tiny_model("gpt2")
    assert unwrap(model) is model
    assert unwrap(nn.Sequential(nn.Linear(2, 2))) is not None
