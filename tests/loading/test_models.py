"""A name becomes a model, or one line that says why it does not."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

from pliant import loading
from pliant.errors import InvalidInput, ModelNotFound, SlowDtypeWarning
from pliant.loading import dtypes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint in half precision whose config asks for single, as the embedded ones."""
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=11,
    )
    LlamaForCausalLM(config).half().save_pretrained(tmp_path / "tiny")
    edit_config(tmp_path / "tiny", dtype="float32")
    return tmp_path / "tiny"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_comes_in_the_dtype_that_its_config_names(folder: Path) -> None:
    model = loading.load_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


def test_a_dtype_can_be_asked_for(folder: Path) -> None:
    assert loading.load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    assert loading.load_model(str(folder), dtype=torch.float16, device="cpu").dtype == torch.float16


def test_further_options_reach_transformers(folder: Path) -> None:
    model = loading.load_model(folder, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_settings_of_the_config_can_be_overridden(folder: Path) -> None:
    model = loading.load_model(folder, use_cache=False, rms_norm_eps=0.5, dtype="bfloat16")
    assert (model.config.use_cache, model.config.rms_norm_eps) == (False, 0.5)
    assert model.model.norm.variance_epsilon == 0.5
    assert model.dtype == torch.bfloat16
    config = loading.load_config(folder)
    config.use_cache = False
    assert loading.load_model(folder, config=config).config.use_cache is False


def test_a_folder_is_a_model_only_with_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="without a config.json"):
        loading.resolve(tmp_path)


def test_the_current_folder_can_be_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert loading.load_config(".").hidden_size == 8


@pytest.mark.parametrize(
    "name", ["./none", "/none/at/all", "~/none", "a/b/c", "none/", Path("none")]
)
def test_a_missing_path_is_not_looked_up_on_the_hub(name: str | Path) -> None:
    with pytest.raises(ModelNotFound, match="no such folder"):
        loading.resolve(name)


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "ünï", "\0", "a\nb", "x" * 5000, "a/" + "b" * 500]
)
def test_the_error_for_an_invalid_name_lists_valid_ones(name: str) -> None:
    with pytest.raises(ModelNotFound, match="owner/model"):
        loading.resolve(name)


def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="is a file"):
        loading.resolve(folder / "config.json")


@given(st.text(max_size=40))
def test_any_text_resolves_or_raises_an_error_that_names_it(name: str) -> None:
    try:
        assert loading.resolve(name).name == name
    except ModelNotFound as error:
        assert repr(name) in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "broken config.json"),
        (b'{"a":', "broken config.json"),
        (b"[1]", "no JSON object"),
        (b"\xff\xfe\x00", "broken config.json"),
        (b"[" * 100_000, "broken config.json"),
        (b"{}", "no usable config.*model_type"),
        (b'{"model_type": "llamma"}', "no usable config.*llamma"),
        (b'{"model_type": "llama", "hidden_size": "x"}', "no usable config.*hidden_size"),
    ],
)
def test_a_broken_config_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelNotFound, match=message) as caught:
        loading.load_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_another_kind_of_model_is_named(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFound, match="no causal language model.*T5Config"):
        loading.load_config(tmp_path)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _make_junk(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"junk")


def _remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _lose_one(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))


def _reshape_one(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "no usable weights"),
        (_make_junk, "no usable weights"),
        (
            _remove,
            "no usable weights.*no file named",
        ),
        (_lose_one, r"lacks 1 of its weights \(the first is 'model.norm.weight'\)"),
        (_reshape_one, r"'model.norm.weight' in shape \[3\], but its config expects \[8\]"),
    ],
    ids=["truncated", "junk", "gone", "one lost", "one reshaped"],
)
def test_damaged_weights_are_never_filled_in(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(ModelNotFound, match=message):
        loading.load_model(folder)


def test_a_broken_tokenizer_is_reported(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelNotFound, match="no usable tokenizer"):
        loading.load_tokenizer(folder)


def test_a_missing_tokenizer_is_reported(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="has no tokenizer"):
        loading.load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float23"}, "did you mean 'float32'"),
        ({"device": "gpu"}, "device 'gpu' cannot be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"flash": True}, "flash"),
        ({"use_cache": "perhaps"}, "use_cache"),
    ],
    ids=str,
)
def test_a_wrong_option_is_invalid_input(
    folder: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        loading.load_model(folder, **options)  # type: ignore[arg-type]


def test_half_precision_is_warned_of_where_it_is_slow(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def messages(load: Callable[[], object]) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SlowDtypeWarning)
            load()
        return [str(w.message) for w in caught if w.category is SlowDtypeWarning]

    monkeypatch.setattr(dtypes, "slowdown_of", lambda dtype: 4.0)
    (message,) = messages(lambda: loading.load_model(folder, dtype="float16"))
    assert message.startswith("float16 takes 4.0 times as long as float32 on this CPU")
    assert not messages(lambda: loading.load_model(folder, dtype="float32"))

    def load_to_write() -> None:
        with loading.not_computed_here():
            loading.load_model(folder, dtype="float16")

    assert not messages(load_to_write)
    monkeypatch.setattr(dtypes, "slowdown_of", lambda dtype: 1.2)
    assert not messages(lambda: loading.load_model(folder, dtype="float16"))


@pytest.mark.parametrize("name", [name for name in get_args(loading.Dtype) if name != "auto"])
def test_every_dtype_that_may_be_named_loads(folder: Path, name: str) -> None:
    assert loading.load_model(folder, dtype=name).dtype == getattr(torch, name)


def test_float32_is_as_fast_as_itself_and_others_are_measured() -> None:
    assert loading.slowdown_of(torch.float32) == 1
    assert loading.slowdown_of(torch.bfloat16) > 0


@pytest.mark.parametrize("name", ["a--b", "owner/a..b", "owner/name.", "owner/-name", "a/b.git"])
def test_what_the_hub_calls_no_name_is_none(name: str) -> None:
    with pytest.raises(ModelNotFound, match="is no model name"):
        loading.resolve(name)


def test_an_unreachable_hub_is_reported() -> None:
    with pytest.raises(ModelNotFound, match="is unreachable"):
        loading.load_config("owner/model")


# --- the hub, played by a server on this machine -------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a repository that is missing, gated, or without a config."""

    ERRORS = {
        "missing": (404, "RepoNotFound"),
        "gated": (403, "GatedRepo"),
        "empty": (404, "EntryNotFound"),
        "old": (404, "RevisionNotFound"),
        "down": (418, ""),
    }

    def do_HEAD(self) -> None:
        status, code = self.ERRORS[self.path.split("/")[2]]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_each_answer_of_the_hub_has_its_own_error(hub: str, tmp_path: Path) -> None:
    program = """
from pliant.loading import models as loading, resolve
for name in ("missing", "gated", "empty", "old", "down"):
    try:
        loading._read_config(resolve(f"owner/{name}"), "main")
    except loading.ModelNotFound as error:
        print(error)
"""
    environment = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    missing, gated, empty, old, down = done.stdout.splitlines()
    assert "none on the hub" in missing
    assert "gated" in gated
    assert "has no config.json" in empty
    assert "has no revision 'main'" in old
    assert "is unreachable" in down
