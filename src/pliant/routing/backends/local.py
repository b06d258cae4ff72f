"""The backend of a model on this machine: batches of similar length, plain `generate`."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from pliant import loading
from pliant.data import chat_ids, has_chat_template, ordinary_text
from pliant.errors import InvalidInput, UnsupportedModel, check_whole
from pliant.routing.backends.protocol import (
    Answers,
    Backend,
    BackendError,
    BackendWarning,
    PromptFormat,
    Result,
    Settings,
    Used,
)
from pliant.routing.prompts import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from pliant.complexity import Complexity, Scores

PLAIN = PromptFormat()
Ids = list[int]
Generated = list[list[Ids] | None]
"""Each prompt's samples, up to their end token; None if even one sample exceeded the memory."""

_loaded: WeakValueDictionary[tuple[str, ...], Any] = WeakValueDictionary()
_loading = threading.Lock()


class LocalModel:
    """A model of `pliant.loading` and its tokenizer, loaded on first use.

    Those who name one model with the same options, such as a scorer and a backend, share one copy.
    """

    def __init__(
        self,
        source: str,
        *,
        device: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        loading.resolve(source)  # so that an unknown name fails at once
        loading.check_dtype(dtype)
        self._source, self._trusted = source, trust_remote_code
        self._options: dict[str, Any] = {
            "device": device,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
        }
        self._model: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def loaded(self) -> PreTrainedModel | None:
        """The model, if it is in memory."""
        return self._model if self._model is not None else _loaded.get(self._key())

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            with _loading:
                self._model = _loaded.get(self._key())
                if self._model is None:
                    self._model = loading.load_model(self._source, **self._options)
                    _loaded[self._key()] = self._model
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            self._tokenizer = loading.load_tokenizer(self._source, trust_remote_code=self._trusted)
        return self._tokenizer

    def _key(self) -> tuple[str, ...]:
        place = loading.resolve(self._source)
        return (place.location, place.gguf, *map(str, self._options.values()))


class LocalBackend(LocalModel):
    """A local model that answers prompts."""

    def __init__(
        self,
        name: str,
        model: str,
        *,
        tokens_a_batch: int = 8_192,
        batch_size: int | None = None,
        prompt_format: PromptFormat = PLAIN,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if batch_size is not None:
            check_whole("batch_size", batch_size, 1)
        self.name, self._batch_tokens, self._batch_size = name, tokens_a_batch, batch_size
        self.prompt_format, self._cautioned = prompt_format, False
        self._exclusive = threading.Lock()  # while it is held, this generates nothing else
        self._pads: bool | None = None

    def ask(self, prompts: Sequence[Prompt], settings: Settings) -> Iterator[Result]:
        ids: dict[int, Ids] = {}
        limit = self.context()
        self._caution()
        for i, prompt in enumerate(prompts):
            try:
                ids[i] = self.ids(prompt)
            except InvalidInput as error:
                yield i, BackendError(f"{self.name}: {error}", "prompt refused")
                continue
            if limit is not None and len(ids[i]) >= limit:
                tokens = f"a prompt of {len(ids.pop(i)):,} tokens"
                message = f"{tokens} leaves no room for an answer in its context of {limit:,}"
                yield i, BackendError(f"{self.name}: {message}", "prompt too long")
        for number, rows in enumerate(self._batches(ids, settings)):
            yield from self._batch(rows, [ids[i] for i in rows], settings, number)

    def count(self, prompt: Prompt) -> int:
        return len(self.ids(prompt))

    def context(self) -> int | None:
        config = loading.load_config(self._source, trust_remote_code=self._trusted)
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def knows(self, unit: str) -> bool:
        return unit != "usd"

    def close(self) -> None:
        """Release the model; the next `ask` loads it again."""
        self._model = None

    def answer_after_scoring(
        self,
        reader: Complexity,
        prompt: Prompt,
        longest: int,
        decide: Callable[[Scores], Settings | None],
    ) -> Answers | None:
        """The answer that continues from the prefill in which `reader`, on this model, scores the
        prompt: the first part of the answer's own cost.

        `decide` is called once after scoring. It returns the settings, or None if another model
        answers: then, and where they are not greedy, the prefill is discarded and None returned.
        """
        ids, limit = self.ids(prompt), self.context()
        most = longest if limit is None else min(longest, limit - len(ids))
        if most < 1:
            raise InvalidInput(f"{self.name}: the prompt fills the context, so no answer fits")
        stop = _at_most(len(ids))

        def leaves(scores: Scores) -> list[bool]:
            settings = decide(scores)
            if settings is None or settings.temperature > 0 or settings.max_new_tokens > longest:
                return [True]
            stop.limit = settings.max_new_tokens
            return [False]

        options = {"max_new_tokens": most, "stopping_criteria": [stop], **self._greedy_options()}
        begun = time.perf_counter()
        try:
            with self._exclusive:
                output = reader.generate([ids], leave_above=leaves, **options)
        except RuntimeError as error:
            if out_of_memory(error):
                return None  # `ask` retries with less memory
            raise
        if output.left[0]:
            return None
        tokens: list[int] = output.sequences[0].tolist()[len(ids) :]  # type: ignore[union-attr]
        return self._answers(ids, [tokens], (time.perf_counter() - begun) * 1000)

    def ids(self, prompt: Prompt) -> Ids:
        """The prompt in the model's chat template, or as plain text if it has none."""
        if has_chat_template(self.tokenizer):
            ids: Ids = chat_ids(self.prompt_format.messages(prompt), self.tokenizer)
        else:
            clean = partial(ordinary_text, tokenizer=self.tokenizer)
            ids = self.tokenizer(self.prompt_format.text(prompt, clean))["input_ids"]
        if not ids:
            raise InvalidInput("the prompt is empty: there is no token to continue from")
        return ids

    def _caution(self) -> None:
        """Warn, once, where the model will answer worse than it could."""
        framed = has_chat_template(self.tokenizer) or self.prompt_format.template is not None
        if not self._cautioned and not framed:
            warnings.warn(
                f"{self.name} has no chat template: it is asked the bare prompt, and a base model "
                "may go on with questions of its own, so that its answers count as wrong. Frame "
                'them (--template "Question: {prompt}\\nAnswer:", --system), and say where an '
                'answer ends (--stop "\\n")',
                BackendWarning,
                stacklevel=2,
            )
        self._cautioned = True

    # --- batches ---------------------------------------------------------------------------------

    def _batches(self, ids: dict[int, Ids], settings: Settings) -> Iterator[list[int]]:
        """Rows of similar length; of equal length, if padding changes the model's answers.

        The first batch is one row, and each may have twice the rows of the one before, up to the
        limits: on a slow machine the first answers are there early, and a kill loses few.
        """
        rows, most = list[int](), 1
        for i in sorted(ids, key=lambda i: len(ids[i])):
            length = (len(ids[i]) + settings.max_new_tokens) * settings.samples
            full = (len(rows) + 1) * length > self._batch_tokens or len(rows) >= most
            longer = bool(rows) and len(ids[i]) != len(ids[rows[0]])
            if rows and (full or (longer and not self._tolerates_padding())):
                yield rows
                rows, most = [], min(2 * most, self._batch_size or 2 * most)
            rows.append(i)
        if rows:
            yield rows

    def _batch(
        self, rows: list[int], ids: list[Ids], settings: Settings, number: int
    ) -> Iterator[Result]:
        begun = time.perf_counter()
        with self._exclusive:
            generated = self._generate_halving(ids, settings, settings.seed + number)
        ms = (time.perf_counter() - begun) * 1000 / len(rows)
        for i, prompt, samples in zip(rows, ids, generated, strict=True):
            if samples is None:
                tokens = f"a prompt of {len(prompt):,} tokens alone"
                yield i, BackendError(f"{self.name}: out of memory for {tokens}", "out of memory")
            else:
                yield i, self._answers(prompt, samples, ms)

    def _answers(self, prompt: Ids, samples: list[Ids], ms: float) -> Answers:
        """A prompt's samples, decoded up to their end tokens, with what they used."""
        ends, stop = self._ends(), self.prompt_format
        samples = [self._until_end(ids) for ids in samples]
        prompt_tokens, answer_tokens = len(prompt) * len(samples), sum(map(len, samples))
        flops = 2.0 * own_parameters(self.model) * (prompt_tokens + answer_tokens)
        texts = self.tokenizer.batch_decode(samples, skip_special_tokens=True)
        stops = [stop.end_of(text) for text in texts]
        ended = [bool(ids) and ids[-1] in ends for ids in samples]
        return Answers(
            tuple(text[:at] for text, at in zip(texts, stops, strict=True)),
            Used(len(samples), prompt_tokens, answer_tokens, ms, flops, None),
            sum(at is None and not end for at, end in zip(stops, ended, strict=True)),
        )

    def _generate_halving(self, ids: list[Ids], settings: Settings, seed: int) -> Generated:
        """Generate the batch; if it exceeds the memory, its halves one after the other."""
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
        self._batch_tokens = max(1, self._batch_tokens // 2)  # later batches would fail as well
        first = self._generate_halving(ids[:half], settings, seed)
        return first + self._generate_halving(ids[half:], settings, seed)

    def _generate(self, ids: list[Ids], settings: Settings, seed: int) -> Generated:
        import torch

        from pliant.data.collate import pad_rows

        longest, limit = max(map(len, ids)), self.context()
        ids_BT, mask_BT = pad_rows(ids, self._pad(), side="left")
        new_tokens, sampling = settings.max_new_tokens, settings.temperature > 0
        device, options = self.model.device, self._greedy_options()
        if sampling:
            options |= {"do_sample": True, "temperature": settings.temperature}
            del options["top_p"], options["top_k"]  # keep the model's own
        # The seed is for this call alone: the caller's random state is restored.
        devices = [device] if device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices, enabled=sampling):
            if sampling:
                torch.manual_seed(seed)
            out = self.model.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                max_new_tokens=new_tokens if limit is None else min(new_tokens, limit - longest),
                num_return_sequences=settings.samples,
                **options,
            )
        new = out[:, longest:].tolist()
        return [new[i : i + settings.samples] for i in range(0, len(new), settings.samples)]

    def _greedy_options(self) -> dict[str, Any]:
        """The options of `generate` for greedy decoding, without a length."""
        unset = {"temperature": None, "top_p": None, "top_k": None}
        stop = list(self.prompt_format.stop)
        stops = {"stop_strings": stop, "tokenizer": self.tokenizer} if stop else {}
        return {"do_sample": False, "pad_token_id": self._pad(), **unset, **stops}

    def _until_end(self, ids: Ids) -> Ids:
        """Up to and including the first end token, since that was generated as well."""
        ends, pad = self._ends(), self._pad()
        stop = next((at for at, token in enumerate(ids) if token in ends), len(ids))
        ids = ids[: stop + 1]
        while self.prompt_format.stop and pad not in ends and ids and ids[-1] == pad:
            ids = ids[:-1]  # after a stop of its own, while others of its batch went on
        return ids

    def _ends(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else next(iter(sorted(self._ends())), 0)

    def _tolerates_padding(self) -> bool:
        """Whether padding on the left leaves the model's answers as they are; tried out once."""
        from pliant.anatomy import Anatomy
        from pliant.prefill.forward import supports_padding

        if self._pads is None:
            with self._exclusive:
                try:
                    self._pads = supports_padding(Anatomy.of(self.model))
                except UnsupportedModel:
                    self._pads = False
        return self._pads


def backend_with(model: Any, backends: Mapping[str, Backend]) -> tuple[str, LocalBackend] | None:
    """The backend whose copy in memory is this very model, and its name."""
    for name, backend in backends.items():
        if not isinstance(backend, LocalBackend) or backend.prompt_format != PLAIN:
            continue  # a scorer reads the prompt as it is, so a framed one has another prefill
        if backend.loaded is model:
            return name, backend
    return None


def own_parameters(model: Any) -> int:
    """The model's parameters without those of attached adapters."""
    from pliant.adapters import attached

    extra = sum(p.numel() for add_on in attached(model).values() for p in add_on.parameters())
    return int(model.num_parameters()) - extra


def out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)


def _at_most(prompt: int) -> Any:
    """A limit on the answer's length that is set after the run has begun."""
    import torch
    from transformers import StoppingCriteria

    class AtMost(StoppingCriteria):
        limit = 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            done = input_ids.shape[1] - prompt >= self.limit
            return torch.full((len(input_ids),), done, device=input_ids.device)

    return AtMost()
