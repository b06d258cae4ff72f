"""Asking a causal language model that runs here: batches of like length, plain `generate`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pliant import loading
from pliant.data import chat_ids, has_chat_template
from pliant.errors import InvalidInput, UnsupportedModel
from pliant.routing.backends.costs import Used
from pliant.routing.backends.protocol import Answers, Asked, BackendError, Settings
from pliant.routing.prompts import Prompt, messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Ids = list[int]
Generated = list[list[Ids] | None]
"""Each prompt's samples, without what follows their end; None where memory held none."""

_loaded: WeakValueDictionary[tuple[str, ...], Any] = WeakValueDictionary()
_loading = threading.Lock()


class LocalBackend:
    """One model of `pliant.loading`, loaded when it is first asked."""

    def __init__(
        self,
        name: str,
        model: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        tokens_a_batch: int = 8_192,
        trust_remote_code: bool = False,
    ) -> None:
        loading.resolve(model)  # a name that is none is said at once
        self.name, self._source = name, model
        self._options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        self._room = tokens_a_batch
        self._lock = threading.Lock()  # a model answers one batch at a time
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._pads: bool | None = None

    def ask(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[Asked]:
        ids: dict[int, Ids] = {}
        limit = self.context()
        for i, prompt in enumerate(prompts):
            try:
                ids[i] = self.ids(prompt)
            except InvalidInput as error:
                yield i, BackendError(f"{self.name}: {error}", "prompt refused")
                continue
            if limit is not None and len(ids[i]) >= limit:
                yield i, self._too_long(len(ids.pop(i)), limit)
        for number, rows in enumerate(self._batches(ids, settings)):
            yield from self._batch(rows, [ids[i] for i in rows], settings, number)

    def count(self, prompt: Prompt) -> int:
        return len(self.ids(prompt))

    def context(self) -> int | None:
        config = loading.load_config(
            self._source, trust_remote_code=bool(self._options["trust_remote_code"])
        )
        found = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    def knows(self, unit: str) -> bool:
        return unit != "usd"

    def close(self) -> None:
        """Let go of the model; asking again loads it again."""
        self._model = None

    def greedily(self) -> dict[str, Any]:
        """What `generate` is told beside a length, for the likeliest tokens."""
        unset = {"temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": False, "pad_token_id": self._pad(), **unset}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else generates on this model meanwhile."""
        with self._lock:
            yield

    @property
    def loaded(self) -> PreTrainedModel | None:
        """The model if it is in memory, for whoever asks for it."""
        return self._model if self._model is not None else in_memory(self._source, **self._options)

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            self._model = shared_model(self._source, **self._options)
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(
                self._source, trust_remote_code=bool(self._options["trust_remote_code"])
            )
        return self._tokenizer

    # --- one prompt ------------------------------------------------------------------------------

    def ids(self, prompt: Prompt) -> Ids:
        """The prompt in the frame of the model's chat template; bare where it has none."""
        conversation = messages(prompt)
        if has_chat_template(self.tokenizer):
            ids: Ids = chat_ids(conversation, self.tokenizer)
        else:
            ids = self.tokenizer("\n".join(m["content"] for m in conversation))["input_ids"]
        if not ids:
            raise InvalidInput("an empty prompt has no token to go on from")
        return ids

    def _too_long(self, tokens: int, limit: int) -> BackendError:
        return BackendError(
            f"{self.name}: a prompt of {tokens:,} tokens leaves no room for an answer in its "
            f"context of {limit:,}",
            "prompt too long",
        )

    # --- batches ---------------------------------------------------------------------------------

    def _batches(self, ids: dict[int, Ids], settings: Settings) -> Iterator[list[int]]:
        """Prompts of like length together; of one length, where padding changes the answer."""
        rows: list[int] = []
        for i in sorted(ids, key=lambda i: len(ids[i])):
            length = (len(ids[i]) + settings.max_new_tokens) * settings.samples
            full = (len(rows) + 1) * length > self._room
            longer = bool(rows) and len(ids[i]) != len(ids[rows[0]])
            if rows and (full or (longer and not self._may_pad())):
                yield rows
                rows = []
            rows.append(i)
        if rows:
            yield rows

    def _batch(
        self, rows: list[int], ids: list[Ids], settings: Settings, number: int
    ) -> Iterator[Asked]:
        begun = time.perf_counter()
        with self._lock:
            said = self._halving(ids, settings, settings.seed + number)
        ms = (time.perf_counter() - begun) * 1000 / len(rows)
        for i, prompt, samples in zip(rows, ids, said, strict=True):
            if samples is None:
                tokens = f"a prompt of {len(prompt):,} tokens alone"
                yield i, BackendError(f"{self.name}: no memory for {tokens}", "out of memory")
            else:
                yield i, self.answers(prompt, samples, ms)

    def answers(self, prompt: Ids, samples: list[Ids], ms: float) -> Answers:
        """What was generated to a prompt, counted and read; behind an end nothing counts."""
        ends = self._ends()
        samples = [self._until_end(ids) for ids in samples]
        asked, said = len(prompt) * len(samples), sum(map(len, samples))
        flops = 2.0 * own_parameters(self.model) * (asked + said)
        return Answers(
            tuple(self.tokenizer.batch_decode(samples, skip_special_tokens=True)),
            Used(len(samples), asked, said, ms, flops, None),
            sum(1 for ids in samples if not ids or ids[-1] not in ends),
        )

    def _halving(self, ids: list[Ids], settings: Settings, seed: int) -> Generated:
        """The batch; where the memory does not hold it, its halves one after the other."""
        import torch

        try:
            return self._generate(ids, settings, seed)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(ids) == 1:
            return [None]
        half = len(ids) // 2
        self._room = max(1, self._room // 2)  # the batches to come would fare the same
        first = self._halving(ids[:half], settings, seed)
        return first + self._halving(ids[half:], settings, seed)

    def _generate(self, ids: list[Ids], settings: Settings, seed: int) -> Generated:
        import torch

        longest = max(map(len, ids))
        limit = self.context()
        room = settings.max_new_tokens if limit is None else limit - longest
        how = self.greedily()
        if settings.temperature > 0:
            how |= {"do_sample": True, "temperature": settings.temperature}
            del how["top_p"], how["top_k"]  # the model's own
        with torch.inference_mode(), _seeded(self.model.device, seed, settings.temperature > 0):
            out = self.model.generate(
                **self._padded(ids),
                max_new_tokens=min(settings.max_new_tokens, room),
                num_return_sequences=settings.samples,
                **how,
            )
        new = out[:, longest:].tolist()
        return [new[i : i + settings.samples] for i in range(0, len(new), settings.samples)]

    def _padded(self, ids: list[Ids]) -> dict[str, Any]:
        import torch

        longest = max(map(len, ids))
        rows = [[self._pad()] * (longest - len(row)) + row for row in ids]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
        place = self.model.device
        return {
            "input_ids": torch.tensor(rows, device=place),
            "attention_mask": torch.tensor(mask, device=place),
        }

    def _until_end(self, ids: Ids) -> Ids:
        """Without what follows the first end token, which is kept: it was generated, too."""
        ends = self._ends()
        stop = next((at for at, token in enumerate(ids) if token in ends), len(ids))
        return ids[: stop + 1]

    def _ends(self) -> set[int]:
        found = self.model.generation_config.eos_token_id
        return set() if found is None else {found} if isinstance(found, int) else set(found)

    def _pad(self) -> int:
        found = self.tokenizer.pad_token_id
        return found if found is not None else next(iter(sorted(self._ends())), 0)

    def _may_pad(self) -> bool:
        """Whether a prompt says the same with padding on its left: tried once, not assumed."""
        if self._pads is None:
            with self._lock:
                self._pads = _bears_padding(self.model)
        return self._pads


def own_parameters(model: Any) -> int:
    """Without those of scorers and other things attached: a shared model may bear some."""
    from pliant.adapters import attached

    extra = sum(p.numel() for add_on in attached(model).values() for p in add_on.parameters())
    return int(model.num_parameters()) - extra


def shared_model(source: str, **options: Any) -> Any:
    """A model that all who ask for it at one time share: a scorer and a backend need one copy."""
    with _loading:
        model = in_memory(source, **options)
        if model is None:
            model = loading.load_model(source, **options)
            _loaded[_key(source, options)] = model
        return model


def in_memory(source: str, **options: Any) -> Any:
    """The shared model, if somebody has it loaded."""
    return _loaded.get(_key(source, options))


def _key(source: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    return (loading.resolve(source).location, *(f"{k}={options[k]}" for k in sorted(options)))


def _bears_padding(model: Any) -> bool:
    from pliant.anatomy import Anatomy
    from pliant.prefill.trials import bears_padding

    try:
        return bears_padding(Anatomy.of(model))
    except UnsupportedModel:  # what is unknown is not padded
        return False


class _seeded:
    """Draws that depend on the seed alone, and leave the caller's random state as it was."""

    def __init__(self, device: Any, seed: int, wanted: bool) -> None:
        self._device, self._seed, self._wanted = device, seed, wanted

    def __enter__(self) -> None:
        import torch

        if self._wanted:
            devices = [self._device] if self._device.type == "cuda" else []
            self._fork = torch.random.fork_rng(devices=devices)
            self._fork.__enter__()
            torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        if self._wanted:
            self._fork.__exit__(None, None, None)


def out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)
