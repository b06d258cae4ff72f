"""A tokenizer that ends every prompt in [CPX], the token at which the scorer reads.

Otherwise it is the base's own fast tokenizer: `CPXTokenizer.of(base)` is of the base's class and
saves the same files. [CPX] is not in the vocabulary. Its id is the first that the base does not
use, and only the post-processor adds it, after all other tokens. So no text can contain it: [CPX]
inside a prompt is encoded as ordinary text.

    "Explain tides [CPX]"  ->  the ids of "Explain tides", and the id of [CPX]

A trailing [CPX] is the token, whatever white space follows; one space before it belongs to it. A
prompt without one gets one. In a chat, it follows the rendered template, and a [CPX] at the end of
a message is that message's text.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pliant import loading
from pliant.complexity.post_processor import cpx_post_processor
from pliant.complexity.saved import base_of, saved_scorer
from pliant.errors import InvalidInput, ModelNotFound, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as _Fast
else:
    _Fast = object  # `_kind` combines CPXTokenizer with the class of its base

CPX = "[CPX]"
SAVED = "cpx"  # the key of the token's text in tokenizer_config.json
PAIRS = "text pairs have no place for [CPX]: join them into one prompt"
_SWAPPING = threading.Lock()


class CPXTokenizer(_Fast):
    """A fast tokenizer that ends every prompt in [CPX]; `len` counts it, `vocab_size` does not."""

    cpx_token: str
    cpx_token_id: int

    @classmethod
    def from_pretrained(
        cls, name: str | Path, cpx_token: str | None = None, **options: Any
    ) -> CPXTokenizer:
        """The tokenizer of a model (embedded, a folder, on the hub), of a saved scorer's base, or
        one that `save_pretrained` wrote. `options` go to `AutoTokenizer.from_pretrained`.

        `cpx_token` defaults to the one saved in the folder, or "[CPX]".
        """
        return cls.of(_load(name, options), cpx_token)

    @classmethod
    def of(cls, base: Any, cpx_token: str | None = None) -> CPXTokenizer:
        """A tokenizer like `base`, which is not changed."""
        if isinstance(base, CPXTokenizer):
            base = base.base
        if not isinstance(getattr(base, "_tokenizer", None), Tokenizer):
            raise UnsupportedModel(
                f"{type(base).__name__} is not a fast tokenizer (it has no backend of the "
                "tokenizers library), so no post-processor can append [CPX] to its prompts"
            )
        token = base.init_kwargs.get(SAVED, CPX) if cpx_token is None else cpx_token
        _check_token(token, base)
        return _extended(copy.deepcopy(base), token)

    @property
    def base(self) -> Any:
        """The base's tokenizer, without [CPX]."""
        kind: Any = type(self).__mro__[2]
        plain = kind.__new__(kind)
        ours = ("cpx_token", "cpx_token_id", "_endings")
        own = {name: value for name, value in vars(self).items() if name not in ours}
        vars(plain).update(copy.deepcopy(own))
        plain.init_kwargs.pop(SAVED, None)
        return plain

    def prompt_of(self, text: str) -> str:
        """The text without its trailing [CPX], if it has one."""
        return prompt_of(text, self.cpx_token)

    # --- encoding ---

    def _encode_plus(
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any
    ) -> Any:
        literal = options.pop("cpx_literal", False)  # a rendered chat does not contain the token
        self._refuse(text_pair, options)
        if not literal:
            text = self._without_token(text)
        with self._writing_token(add_special_tokens):
            return super()._encode_plus(text=text, add_special_tokens=True, **options)

    def apply_chat_template(
        self,
        conversation: Any,
        *args: Any,
        tokenize: bool = True,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """As the base's; the ids end in [CPX]. So does the text, if a message ends in the text of
        the token and would be mistaken for it."""
        settings = {**(tokenizer_kwargs or {}), **({"cpx_literal": True} if tokenize else {})}
        rendered = super().apply_chat_template(
            conversation, *args, tokenize=tokenize, tokenizer_kwargs=settings, **options
        )
        if tokenize:
            return rendered
        if isinstance(rendered, str):
            return self._disambiguate(rendered)
        return [*map(self._disambiguate, rendered)]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return int(super().num_special_tokens_to_add(pair)) + 1

    def _switch_to_target_mode(self) -> None:
        raise InvalidInput("text_target: a tokenizer with [CPX] encodes only prompts")

    def _refuse(self, text_pair: Any, options: dict[str, Any]) -> None:
        if text_pair is not None:
            raise InvalidInput(PAIRS)
        if options.get("is_split_into_words"):
            raise InvalidInput("is_split_into_words=True: give the prompt as one text")
        if options.get("sanitize_control_tokens"):
            raise InvalidInput(
                "sanitize_control_tokens=True skips the post-processor, which adds [CPX]"
            )

    def _without_token(self, text: Any) -> Any:
        if isinstance(text, str):
            return self.prompt_of(text)
        if isinstance(text, (list, tuple)):
            if any(isinstance(part, (list, tuple)) for part in text):
                raise InvalidInput(PAIRS)
            return [self.prompt_of(part) if isinstance(part, str) else part for part in text]
        return text

    @contextmanager
    def _writing_token(self, add_special_tokens: bool) -> Iterator[None]:
        """With a post-processor that adds [CPX] last, and the base's tokens only if requested. (All
        tokenizers share a lock: one with a lock of its own could not be copied.)"""
        with _SWAPPING:
            own = self._tokenizer.post_processor
            self._tokenizer.post_processor = self._ending(own, add_special_tokens)
            try:
                yield
            finally:
                self._tokenizer.post_processor = own

    def _ending(self, own: Any, add_special_tokens: bool) -> Any:
        """The post-processor for `own`, built once."""
        state = own.__getstate__() if own is not None else b""
        endings = self.__dict__.setdefault("_endings", {})
        if (state, add_special_tokens) not in endings:
            endings[state, add_special_tokens] = cpx_post_processor(
                own, self.cpx_token, self.cpx_token_id, add_special_tokens
            )
        return endings[state, add_special_tokens]

    def _disambiguate(self, text: str) -> str:
        return text if self.prompt_of(text) == text else f"{text} {self.cpx_token}"

    # --- the vocabulary, and one more ---

    def __len__(self) -> int:
        return self.cpx_token_id + 1

    def get_vocab(self) -> dict[str, int]:
        return {**super().get_vocab(), self.cpx_token: self.cpx_token_id}

    @property
    def all_special_tokens(self) -> list[str]:
        return [*super().all_special_tokens, self.cpx_token]

    def _convert_token_to_id_with_added_voc(self, token: str) -> Any:
        if token == self.cpx_token:
            return self.cpx_token_id
        return super()._convert_token_to_id_with_added_voc(token)

    def _convert_id_to_token(self, index: int) -> Any:
        return self.cpx_token if index == self.cpx_token_id else super()._convert_id_to_token(index)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        if isinstance(ids, int):
            return self._convert_id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._convert_id_to_token(n) for n in map(int, ids) if n not in skipped]

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        """[CPX] comes with the space before it, so that the text encodes to the same ids."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        parts: list[list[int]] = [[]]
        for number in ids:
            if number == self.cpx_token_id:
                parts.append([])
            else:
                parts[-1].append(number)
        texts = [
            super(CPXTokenizer, self)._decode(p, skip_special_tokens, **options) for p in parts
        ]
        if skip_special_tokens:
            return "".join(texts)
        return (f" {self.cpx_token}" if texts[0] else self.cpx_token).join(texts)

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        vocabulary = super().get_vocab()
        for token in new_tokens:
            if str(token) not in vocabulary:
                raise InvalidInput(
                    f"{str(token)!r} would get the id of {self.cpx_token}: add tokens to the "
                    "base's tokenizer, then make this one with CPXTokenizer.of(tokenizer)"
                )
        return int(super()._add_tokens(new_tokens, special_tokens=special_tokens))

    # --- copying and saving ---

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _extended, (self.base, self.cpx_token)

    def train_new_from_iterator(self, *args: Any, **options: Any) -> Any:
        raise InvalidInput("train the base's tokenizer, then make this one with CPXTokenizer.of")


def prompt_of(text: str, cpx_token: str = CPX) -> str:
    """The text without its trailing [CPX], the white space after it and one space before it."""
    stem = text.rstrip()
    return stem.removesuffix(cpx_token).removesuffix(" ") if stem.endswith(cpx_token) else text


def plain_ids(tokenizer: Any, text: str, *, literal: bool = False, **options: Any) -> list[int]:
    """A prompt's ids without the [CPX] at its end, whether the tokenizer adds one or not.

    With `literal` (a rendered chat), a tokenizer without [CPX] encodes a trailing one as text.
    """
    if isinstance(tokenizer, CPXTokenizer):
        return list(tokenizer(text, **options)["input_ids"][:-1])
    return list(tokenizer(text if literal else prompt_of(text), **options)["input_ids"])


def free_id(base: Any) -> int:
    """The id after the largest that the tokenizer uses."""
    vocabulary = base._tokenizer.get_vocab(with_added_tokens=True)
    return max(vocabulary.values(), default=-1) + 1


def _extended(base: Any, token: str) -> CPXTokenizer:
    """A tokenizer with [CPX] that shares the attributes of `base`."""
    kind = _kind(type(base))  # type: ignore[arg-type]
    tokenizer = kind.__new__(kind)
    vars(tokenizer).update(vars(base))
    # Not by assignment: transformers treats `..._token` as an entry of the vocabulary.
    vars(tokenizer).update(cpx_token=token, cpx_token_id=free_id(base))
    tokenizer.init_kwargs = {**tokenizer.init_kwargs, SAVED: token}
    assert isinstance(tokenizer, CPXTokenizer)
    return tokenizer


@cache
def _kind(base: Any) -> Any:
    """A subclass of CPXTokenizer and the base's class, under the latter's name, so that plain
    transformers loads the saved files as the base's tokenizer."""
    return type(base.__name__, (CPXTokenizer, base), {"__module__": base.__module__})


def _check_token(token: Any, base: Any) -> None:
    if not isinstance(token, str) or not token or token != token.strip():
        raise InvalidInput(f"cpx_token={token!r}: give a text without surrounding white space")
    if token in base.get_vocab():
        raise InvalidInput(
            f"cpx_token={token!r} is already a token of {type(base).__name__}, with the id "
            f"{base.get_vocab()[token]}: choose another text, or the tokenizer before it was added"
        )


def _load(name: str | Path, options: dict[str, Any]) -> Any:
    folder = Path(os.path.expanduser(str(name)))
    if (folder / "tokenizer_config.json").is_file() and not (folder / "config.json").is_file():
        return AutoTokenizer.from_pretrained(str(folder), **options)
    try:
        return loading.load_tokenizer(name, **options)
    except ModelNotFound:  # a scorer's folder has no tokenizer; its base does
        saved = saved_scorer(name) if folder.is_dir() or "/" in str(name) else None
        if saved is None:
            raise
        return loading.load_tokenizer(base_of(saved), **options)
