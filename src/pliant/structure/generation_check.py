"""Does a model generate, with gates on its heads, and with a share of its heads pruned?

The counterpart of the seed's `scripts/test_model_generation.py`: load a baseline, attach gates,
generate, prune, generate again. It also compares logits with the baseline's, bit for bit, before
the pruning and after it is undone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant import loading
from pliant.errors import InvalidInput, PliantError, check_choice, check_whole, named_settings
from pliant.structure.entropy import attention_entropy
from pliant.structure.gates import Gates, attach
from pliant.structure.units import Site

Strategy = Literal["random", "magnitude", "entropy"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
PRUNED = 0.001
"""The gate of a pruned head, as the seed's page sets it."""


@named_settings
@dataclass(frozen=True)
class CheckConfig:
    """How to prune, and what to generate."""

    pruning: float = 0.5
    """The share of all heads to prune."""
    strategy: Strategy = "random"
    """Which heads go: "random" ones, those with the smallest output weights ("magnitude"), or those
    that spread their attention most evenly over the prompt ("entropy")."""
    prompt: str = "The future of AI is"
    """What to continue."""
    max_length: int = 30
    """Tokens of the prompt and its continuation together, as in `generate`."""
    seed: int = 0
    """Of random pruning."""

    def __post_init__(self) -> None:
        if not 0 < self.pruning < 1:
            raise InvalidInput(f"pruning = {self.pruning!r}: give a share between 0 and 1")
        check_choice("strategy", self.strategy, STRATEGIES)
        check_whole("max_length", self.max_length, 2)


@dataclass(frozen=True)
class CheckResult:
    """One row of the table: either what was seen, or the `reason` why the model cannot be used."""

    model: str
    architecture: str = ""
    heads: int = 0
    generates: bool = False
    """With gates at 1, it generates the tokens of the baseline."""
    identical: bool = False
    """With gates at 1, the logits are the baseline's, bit for bit."""
    pruned: int = 0
    """How many heads were pruned."""
    pruned_generates: bool = False
    """Pruned, its logits are finite and differ from the baseline's, and it generates."""
    unchanged: int = 0
    """How many tokens the pruned model generates before the first that the baseline does not."""
    new_tokens: int = 0
    """How many tokens the baseline generates."""
    restored: bool = False
    """Detached, the logits are the baseline's again, bit for bit."""
    text: str = ""
    pruned_text: str = ""
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.generates and self.identical and self.pruned_generates and self.restored

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        if self.reason:
            return f"{self.model}: {self.reason}"
        verdict = "works" if self.ok else "fails"
        return (
            f"{self.model} ({self.architecture}) {verdict} with gates; with {self.pruned} of "
            f"{self.heads} heads pruned, the first {self.unchanged} of {self.new_tokens} generated "
            "tokens stay the same."
        )


def check_generation(
    model_name: str, config: CheckConfig | None = None, device: str | None = None
) -> CheckResult:
    """Load a model and run the whole check; a model that cannot be used is a result, no error."""
    config = config or CheckConfig()
    try:
        return _checked(model_name, config, device)
    except PliantError as error:
        return CheckResult(model_name, reason=str(error))
    except Exception as error:  # a table of many models does not end with the first broken one
        first = (str(error).splitlines() or [""])[0]
        return CheckResult(model_name, reason=f"{type(error).__name__}: {first}")


def _checked(model_name: str, config: CheckConfig, device: str | None) -> CheckResult:
    model = loading.load_model(model_name, device=device)
    tokenizer = loading.load_tokenizer(model_name)
    inputs = tokenizer(config.prompt, return_tensors="pt").to(model.device)
    batch = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    prompt = batch["input_ids"].shape[1]
    if prompt >= config.max_length:
        raise InvalidInput(f"the prompt has {prompt} tokens: max_length must be above that")
    generate = _generator(batch, config.max_length, tokenizer)
    before, tokens = _logits(model, batch), generate(model)

    gates = attach(model)
    identical = _same_bits(_logits(model, batch), before)
    gated_tokens = generate(model)
    every, chosen = heads_of(gates), choose_heads(gates, config, batch)
    prune(gates, chosen)
    pruned, pruned_tokens = _logits(model, batch), generate(model)
    gates.detach()
    acts = _finite(pruned) and not _same_bits(pruned, before)
    return CheckResult(
        model=model_name,
        architecture=_architecture(model),
        heads=len(every),
        generates=torch.equal(gated_tokens, tokens) and len(tokens) > prompt,
        identical=identical,
        pruned=len(chosen),
        pruned_generates=acts and len(pruned_tokens) > prompt,
        unchanged=_common(tokens, pruned_tokens) - prompt,
        new_tokens=len(tokens) - prompt,
        restored=_same_bits(_logits(model, batch), before),
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        pruned_text=tokenizer.decode(pruned_tokens, skip_special_tokens=True),
    )


# --- pruning -------------------------------------------------------------------------------------

Head = tuple[Site, int]


def choose_heads(gates: Gates, config: CheckConfig, batch: dict[str, Tensor]) -> list[Head]:
    """The heads to prune: the share `config.pruning` of all, over all layers."""
    heads, sites = heads_of(gates), gates.sites
    count = int(len(heads) * config.pruning)
    if not count:
        raise InvalidInput(f"pruning = {config.pruning}: the model has only {len(heads)} heads")
    if config.strategy == "random":
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(heads), generator=generator)
    elif config.strategy == "magnitude":
        order = torch.cat([_output_norms(site) for site in sites]).argsort(stable=True)
    else:
        entropies = attention_entropy(gates.anatomy, sites, batch)
        entropy = torch.cat([entropies[site.key].cpu() for site in sites])
        order = entropy.argsort(descending=True, stable=True)
    return [heads[i] for i in order[:count].tolist()]


@torch.no_grad()
def prune(gates: Gates, heads: list[Head]) -> None:
    for site, head in heads:
        gates["heads", site.layer, site.block][head] = PRUNED


def heads_of(gates: Gates) -> list[Head]:
    return [(site, head) for site in gates.sites for head in range(site.count)]


def _output_norms(site: Site) -> Tensor:
    """The norm of each head's slice of the output projection."""
    weight = site.module.weight
    if not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dim() == 2):
        raise InvalidInput(
            "strategy = 'magnitude': the weights of this model are packed (quantised): give random "
            "or entropy"
        )
    by_input = weight.detach().float().cpu().movedim(site.axis, 0)
    return by_input.reshape(site.count, -1).norm(dim=1)


# --- comparison ----------------------------------------------------------------------------------


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**batch, use_cache=False).logits
    return logits


def _generator(
    batch: dict[str, Tensor], length: int, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Any], Tensor]:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Up to this length even if the model would end before: one token would show little.
    settings = {"do_sample": False, "min_length": length, "max_length": length, "pad_token_id": pad}

    @torch.no_grad()
    def generate(model: Any) -> Tensor:
        """The tokens of the prompt and its greedy continuation."""
        tokens: Tensor = model.generate(**batch, **settings)[0]
        return tokens

    return generate


def _architecture(model: Any) -> str:
    name = type(model).__name__
    for end in ("ForCausalLM", "LMHeadModel"):
        name = name.removesuffix(end)
    return name


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _common(a: Tensor, b: Tensor) -> int:
    """The length of the common beginning."""
    n = min(len(a), len(b))
    different = (a[:n] != b[:n]).nonzero()
    return int(different[0]) if len(different) else n
