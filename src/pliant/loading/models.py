"""Loading what a name leads to: the config, the tokenizer and the model, in eval mode.

Every part of Pliant loads models through this module, so all of them accept the same names and
raise the same error of one line when a name is no model.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant.errors import InvalidInput, ModelNotFound, without_password
from pliant.loading import catalogue, hub, lora
from pliant.loading.dtypes import check_dtype, warn_if_slow
from pliant.loading.names import Source, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "*token*", "*vocab*", "*.model", "merges.txt")
GGUF_MAGIC = b"GGUF"
_ABSENT = ("missing_entries", "connection_errors")
# transformers unpacks every weight of a GGUF file, but leaves these marks of a quantised model on
# the result, which then can neither be saved nor trained.
QUANTIZED = ("hf_quantizer", "quantization_method", "quantization_config", "_is_quantized")


def load(
    name: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in eval mode, and its tokenizer.

    A GGUF file is named by its path, by its folder, or as `gguf_file` in a folder or hub repository
    with several; its weights become dense. A LoRA's folder is its base, with the LoRA merged in
    memory. `dtype="auto"` is the checkpoint's own dtype, float32 for GGUF. Further options
    (device_map, attn_implementation, or a setting of the model's config such as `use_cache=False`)
    go to `AutoModelForCausalLM.from_pretrained` as they are.
    """
    source: dict[str, Any] = {"gguf_file": gguf_file, "revision": revision}
    source["trust_remote_code"] = trust_remote_code
    model = load_model(name, dtype=dtype, device=device, **source, **options)
    return model, load_tokenizer(name, **source)


def load_model(
    name: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load the model alone; a checkpoint without some of its weights raises `ModelNotFound`.

    Warns (`SlowDtypeWarning`) of a model on this CPU in half precision, where that is much slower
    than float32.
    """
    source = _readable(name, gguf_file, revision)
    if source.kind == "lora":
        given = {"revision": _of_base(source, revision), **options}
        given["trust_remote_code"] = trust_remote_code
        base = lora.of_base(source, partial(load_model, dtype=dtype, device=device, **given))
        with _one_line(source, "LoRA"):
            return lora.merged(source, base)
    from transformers import AutoModelForCausalLM

    check_dtype(dtype)
    place = torch_device(device)
    load_config(name, gguf_file=gguf_file, revision=revision, trust_remote_code=trust_remote_code)
    with _one_line(source, "weights"):
        model, report = AutoModelForCausalLM.from_pretrained(
            source.location,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **{"ignore_mismatched_sizes": True, **source.options, **options},
        )
    _refuse_gaps(source, report)
    if source.gguf:
        model.is_quantized = False
        for holder in (model, model.config):
            for mark in QUANTIZED:
                vars(holder).pop(mark, None)
    if place is not None:
        model = model.to(place)
    warn_if_slow(model)
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_tokenizer(
    name: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone; `options` go to `AutoTokenizer.from_pretrained`."""
    source = _readable(name, gguf_file, revision)
    if source.kind == "lora" and not _has_tokenizer(source):
        given = {"revision": _of_base(source, revision), **options}
        given["trust_remote_code"] = trust_remote_code
        tokenizer_of_base: PreTrainedTokenizerBase
        tokenizer_of_base = lora.of_base(source, partial(load_tokenizer, **given))
        return tokenizer_of_base
    _refuse_no_tokenizer(source)
    from transformers import AutoTokenizer

    with _one_line(source, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.location,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **source.options,
            **options,
        )
    return tokenizer


def load_encoder(
    name: str | Path, *, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text encoder such as BERT, in eval mode and float32, and its tokenizer."""
    from transformers import AutoModel

    source, place = _readable(name, None), torch_device(device)
    if source.gguf or source.kind == "lora":
        raise ModelNotFound(f"{source} is no text encoder: name a folder with a config.json")
    tokenizer = load_tokenizer(name)
    with _one_line(source, "weights"):
        model, report = AutoModel.from_pretrained(
            source.location, output_loading_info=True, ignore_mismatched_sizes=True
        )
    # Encoders are often saved without the layer that BERT's classifier puts on its first token.
    unread = {key for key in report["missing_keys"] if key.startswith("pooler.")}
    _refuse_gaps(source, {**report, "missing_keys": set(report["missing_keys"]) - unread})
    encoder: PreTrainedModel = model.float().eval()
    return encoder if place is None else encoder.to(place), tokenizer


def read_json(name: str | Path, file: str) -> Any:
    """The content of a JSON file beside a model's weights, here or on the hub; None if it has no
    such file."""
    from transformers.utils import cached_file

    source = resolve(name)
    offline = source.kind == "hub" and hub.is_offline(source, file)
    with _one_line(source, file):
        quiet = {f"_raise_exceptions_for_{what}": False for what in _ABSENT}
        path = cached_file(source.location, file, local_files_only=offline, **quiet)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def is_encoder(name: str | Path) -> bool:
    """Whether a name leads to a text encoder, not to a causal language model.

    By its catalogue entry, by the modules of sentence-transformers beside it, or by the class that
    it was saved from: `AutoModelForCausalLM` would load BERT as well.
    """
    source = _readable(name, None)
    if source.kind == "fetched":
        return catalogue.entry(source.name).kind == "text encoder"
    if source.gguf or source.kind in ("embedded", "lora"):
        return False
    classes = _read_config(source, None).get("architectures") or [""]
    is_causal = str(classes[0]).endswith(("ForCausalLM", "LMHeadModel"))
    return not is_causal or read_json(name, "modules.json") is not None


def load_config(
    name: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """Load the config of a causal language model, and nothing else."""
    source = _readable(name, gguf_file, revision)
    if source.kind == "lora":
        of_base = _of_base(source, revision)
        ask = partial(load_config, revision=of_base, trust_remote_code=trust_remote_code)
        config_of_base: PretrainedConfig = lora.of_base(source, ask)
        return config_of_base
    if source.kind == "fetched" and (kind := catalogue.entry(source.name).kind) == "text encoder":
        raise ModelNotFound(f"{source} is a {kind}, not a causal language model")
    raw = {} if source.gguf else _read_config(source, revision)
    with collector_paused():  # this takes seconds, so names are checked first
        from transformers import AutoConfig, PreTrainedModel  # noqa: F401

    with _one_line(source, "config"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source.location,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **source.options,
        )
    if not _is_causal(config, raw):
        raise ModelNotFound(
            f"{source} is no causal language model: transformers has no "
            f"AutoModelForCausalLM for {type(config).__name__}"
        )
    return config


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector: for imports, which leave little garbage.

    The collector searches all that has been imported, again and again as that grows: a sixth of the
    time that torch and transformers take.
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def torch_device(device: str | torch.device | None) -> torch.device | None:
    """The device, after an empty tensor was created on it; `InvalidInput` if that fails."""
    import torch

    if device is None:
        return None
    try:
        if torch.device(device).type == "meta":
            raise InvalidInput("device 'meta' cannot be used: it holds no numbers")
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InvalidInput(f"device {str(device)!r} cannot be used: {_gist(error)}") from error


def _of_base(lora: Source, revision: str | None) -> str | None:
    """The revision of its base: that of a LoRA on the hub is its own."""
    return None if lora.name_on_hub else revision


def _readable(name: str | Path, gguf_file: str | None, revision: str | None = None) -> Source:
    """Where the name leads; an error if that is a GGUF file and cannot be read."""
    source = resolve(name, gguf_file)
    if not source.gguf:
        return hub.with_lora(source, revision)
    if find_spec("gguf") is None:
        raise InvalidInput(f"{source} is a GGUF file: reading it needs pip install 'pliant[gguf]'")
    if source.kind != "hub":
        with (Path(source.location) / source.gguf).open("rb") as file:
            if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
                raise ModelNotFound(
                    f"{source} is no GGUF file (it does not begin with {GGUF_MAGIC!r})"
                )
    return source


def _read_config(source: Source, revision: str | None) -> dict[str, Any]:
    """The content of config.json, with separate errors for downloading and for parsing it."""
    path = Path(source.location) / "config.json"
    if source.kind == "hub":
        path = hub.fetch_config(source, revision)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelNotFound(f"{source} has a broken config.json: {_gist(error)}") from error
    if not isinstance(raw, dict):
        raise ModelNotFound(f"{source} has a broken config.json: it holds no JSON object")
    return raw


def _is_causal(config: PretrainedConfig, raw: dict[str, Any]) -> bool:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    own_code = raw.get("auto_map")
    if isinstance(own_code, dict) and AutoModelForCausalLM.__name__ in own_code:
        return True
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _refuse_gaps(source: Source, report: dict[str, Any]) -> None:
    """A model would run with random weights in place of those that its checkpoint lacks."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelNotFound(
            f"{source} lacks {len(missing)} of its weights (the first is {missing[0]!r}): "
            "is it the checkpoint of another kind of model?"
        )
    for name, stored, expected in sorted(report["mismatched_keys"], key=str):
        raise ModelNotFound(
            f"{source} holds {name!r} in shape {list(stored)}, but its config expects "
            f"{list(expected)}"
        )


def _refuse_no_tokenizer(source: Source) -> None:
    """Some versions of transformers create an empty tokenizer if the folder has none."""
    if source.kind != "hub" and not source.gguf and not _has_tokenizer(source):
        raise ModelNotFound(f"{source} has no tokenizer (looked for {TOKENIZER_FILES[0]}, ...)")


def _has_tokenizer(source: Source) -> bool:
    return any(path for kind in TOKENIZER_FILES for path in Path(source.location).glob(kind))


@contextmanager
def _one_line(source: Source, what: str) -> Iterator[None]:
    """Turn any error of the libraries into one line; the original is its `__cause__`."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (ModelNotFound, InvalidInput, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing it
            raise
        # The config was valid, so a type error is about the options that were passed on (a config's
        # setting among them), and an import error about a package that they need (bitsandbytes).
        if what == "weights" and isinstance(error, (TypeError, ImportError, StrictDataclassError)):
            raise InvalidInput(
                f"{source} cannot be loaded with these options: {_gist(error)}"
            ) from error
        raise ModelNotFound(f"{source} has no usable {what}: {_gist(error)}") from error


def _gist(error: BaseException) -> str:
    """A library's message on one line, truncated."""
    text = without_password(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
