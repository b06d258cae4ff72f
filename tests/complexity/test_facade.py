"""The facade: two things unpacked, the base's own output untouched, rows and head trained alone."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_to_fp32, send_to_device
from accelerate.utils.operations import recursively_apply
from safetensors.torch import load_file
from torch.utils import _pytree as pytree
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.utils import ModelOutput

from pliant.adapters import fingerprint
from pliant.anatomy.tiny import tiny_model
from pliant.complexity import CPXConfig, attach
from pliant.complexity.facade import CPXCausalLM
from pliant.complexity.tokenizer import CPXTokenizer
from pliant.complexity.training.losses import losses
from pliant.errors import InvalidInput, ModelNotFound, UnsupportedModel, WrongBase
from pliant.prefill import prefill
from pliant.structure import GateConfig
from pliant.structure import attach as gate

TEXTS = ["What is 3 + 4? [CPX]", "Say yes.", "Sort these: pear apple fig", "[CPX] Is it? [CPX]"]

PLAIN = ["What is 3 + 4?", "Say yes.", "Sort these: pear apple fig", "[CPX] Is it?"]
"""The same without the token."""


@pytest.fixture(scope="module")
def tokenizer() -> CPXTokenizer:
    return CPXTokenizer.from_pretrained("nano-s")


def new(tokenizer: CPXTokenizer, **options: Any) -> CPXCausalLM:
    model = CPXCausalLM.from_pretrained(
        "nano-s",
        cpx_token_id=tokenizer.cpx_token_id,
        tokenizer_size=len(tokenizer),
        dtype="float32",
        **options,
    )
    with torch.no_grad():  # a new head is zero, and all its logits are
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def trained(tokenizer: CPXTokenizer) -> CPXCausalLM:
    """For tests that change nothing."""
    return new(tokenizer)


def batch(tokenizer: CPXTokenizer, side: str = "left", texts: Any = None) -> Any:
    return tokenizer(texts or TEXTS, return_tensors="pt", padding=True, padding_side=side)


# --- what it returns ---


def test_it_unpacks_to_logits_and_the_base_s_output(trained: CPXCausalLM, tokenizer: Any) -> None:
    logits, outputs = trained(**batch(tokenizer))
    assert logits.shape == (4, 1) and logits.dtype == torch.float32
    assert outputs.logits.shape == (4, 1, trained.base_model.config.vocab_size)
    again = trained(**batch(tokenizer))
    assert again.keys() == {"logits": 0, "outputs": 0}.keys()
    assert torch.equal(again.logits, logits) and again["logits"] is again[0] is again.logits
    assert again[1] is again["outputs"] is again.outputs
    assert isinstance(again, ModelOutput)


def test_it_is_a_dictionary_still(trained: CPXCausalLM, tokenizer: Any) -> None:
    output = trained(**batch(tokenizer), labels=torch.ones(4))
    assert dict(output).keys() == {**output}.keys() == {"loss", "logits", "outputs"}
    assert len(output) == 3 and "logits" in output and output.to_tuple()[1] is output.logits
    assert [value is output[key] for key, value in output.items()] == [True] * 3
    twin = copy.copy(output)
    assert type(twin) is type(output) and twin.logits is output.logits
    again = pickle.loads(pickle.dumps(type(output)(logits=output.logits.detach())))
    assert torch.equal(again.logits, output.logits) and [*again] == [again.logits, None]


def test_it_passes_through_pytree_and_accelerate(trained: CPXCausalLM, tokenizer: Any) -> None:
    output = trained(**batch(tokenizer), labels=torch.ones(4))
    output.outputs.past_key_values = None  # a cache is no tensor: accelerate leaves it as it is
    leaves, spec = pytree.tree_flatten(output)
    assert any(leaf is output.logits for leaf in leaves)
    back = pytree.tree_unflatten(leaves, spec)
    assert type(back) is type(output) and torch.equal(back.logits, output.logits)
    for act in (
        convert_to_fp32,
        lambda data: send_to_device(data, "cpu"),
        lambda data: recursively_apply(lambda t: t.clone(), data),
    ):
        made = act(output)
        assert type(made) is type(output), act
        assert made.keys() == output.keys()
        assert torch.equal(made.logits, output.logits)
        assert torch.equal(made.outputs.logits, output.outputs.logits)
        logits, outputs = made
        assert torch.equal(logits, output.logits) and outputs is made.outputs
    half = recursively_apply(lambda t: t.half(), output)
    assert convert_to_fp32(half).logits.dtype == torch.float32


def test_a_plain_trainer_evaluates_it(trained: CPXCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    """It gathers every output, and the base's cache is none that can be."""
    ids = batch(tokenizer, texts=["1+1", "2+2"])
    rows = [{"input_ids": row, "labels": torch.tensor([1.0])} for row in ids["input_ids"]]
    metrics = Trainer(
        trained,
        TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True),
        eval_dataset=rows,
        compute_metrics=lambda evaluation: {"logits": float(evaluation.predictions.sum())},
    ).evaluate()
    with torch.no_grad():
        logits, _ = trained(**ids)
    assert metrics["eval_logits"] == pytest.approx(float(logits.sum()), abs=1e-4)


def test_a_plain_trainer_saves_the_scorer_alone_and_resumes(tokenizer: Any, tmp_path: Path) -> None:
    """The embeddings of nano-s are tied, and safetensors writes no tensor twice."""
    ids = batch(tokenizer, texts=["1+1", "2+2", "3+3", "4+4"])
    rows = [
        {"input_ids": r, "labels": torch.tensor([i % 2.0])} for i, r in enumerate(ids.input_ids)
    ]

    def train(resume: str | None = None) -> CPXCausalLM:
        model = new(tokenizer)
        fixed: dict[str, Any] = {"max_steps": 3, "save_steps": 1, "learning_rate": 0.03}
        quiet: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
        args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, **fixed, **quiet)
        Trainer(model, args, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    through = train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert saved.keys() == {"scorer.rows", "scorer.head.weight", "scorer.head.bias"}
    resumed = train(str(tmp_path / "checkpoint-1"))
    for name, tensor in through.scorer.state_dict().items():
        assert torch.equal(resumed.scorer.state_dict()[name], tensor), name
        assert not torch.equal(saved[f"scorer.{name}"], tensor), "it went on after the checkpoint"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_base_s_output_is_bit_for_bit_its_own(
    trained: CPXCausalLM, tokenizer: Any, side: str
) -> None:
    base = tokenizer.base
    inputs = base(PLAIN, return_tensors="pt", padding=True, padding_side="left")
    positions = (inputs.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        own = trained.base_model(**inputs, position_ids=positions, logits_to_keep=1)
        _, outputs = trained(**batch(tokenizer, side))
    assert torch.equal(outputs.logits, own.logits)
    assert outputs.past_key_values.get_seq_length() == own.past_key_values.get_seq_length()
    for mine, theirs in zip(
        outputs.past_key_values.layers, own.past_key_values.layers, strict=True
    ):
        seen = inputs.attention_mask.bool()  # what padding left behind is nobody's
        assert torch.equal(mine.keys.transpose(1, 2)[seen], theirs.keys.transpose(1, 2)[seen])
        assert torch.equal(mine.values.transpose(1, 2)[seen], theirs.values.transpose(1, 2)[seen])


@pytest.mark.parametrize("name", ["llama", "mamba", "jamba"])
def test_a_step_on_a_cache_is_the_base_s_own(name: str) -> None:
    base = tiny_model(name)
    model = CPXCausalLM(base, attach(base, CPXConfig()), cpx_token_id=base.config.vocab_size)
    ids = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.classifier.weight.normal_()
        cache = model(ids).outputs.past_key_values
        token = torch.tensor([[7], [8]])
        wanted = base(torch.cat([ids, token], dim=1), logits_to_keep=1).logits
        logits, outputs = model(token, past_key_values=cache)
    assert logits is None, "nothing is scored while the base decodes"
    torch.testing.assert_close(outputs.logits[:, -1], wanted[:, -1], atol=1e-5, rtol=1e-4)


def test_a_step_writes_its_tokens_to_the_cache_and_no_more(
    trained: CPXCausalLM, tokenizer: Any
) -> None:
    inputs = batch(tokenizer, texts=["Is it so?", "Is it?"])
    with torch.no_grad():
        _, outputs = trained(**inputs)
        cache, other = outputs.past_key_values, copy.deepcopy(outputs.past_key_values)
        token = outputs.logits[:, -1].argmax(-1, keepdim=True)
        mask = inputs.attention_mask  # one for each prompt token and, for [CPX], the new token
        step = trained(token, mask, past_key_values=cache)
        own = trained.base_model(token, attention_mask=mask, past_key_values=other)
    assert torch.equal(step.outputs.logits, own.logits)
    assert cache.get_seq_length() == other.get_seq_length() == inputs.input_ids.shape[1]
    for wrong in ({"labels": torch.ones(2)}, {"input_ids": inputs.input_ids}):
        with pytest.raises(InvalidInput, match="whole prompts"):
            trained(**{"input_ids": token, "past_key_values": cache, **wrong})


@pytest.mark.parametrize("layer", [None, 1])
def test_what_the_base_collects_is_returned(tokenizer: Any, layer: int | None) -> None:
    model = new(tokenizer, config=CPXConfig(layer=layer), attn_implementation="eager")
    ids = tokenizer.base("Is it so?", return_tensors="pt").input_ids
    requested = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        own, plain = model.base_model(ids, **requested), model(ids)
        for asked in (["output_hidden_states"], [*requested]):
            logits, outputs = model(ids, **dict.fromkeys(asked, True))
            torch.testing.assert_close(logits, plain.logits)
            for flag in asked:
                name = flag.removeprefix("output_")
                pairs = zip(outputs[name], own[name], strict=True)
                assert all(torch.equal(ours, theirs) for ours, theirs in pairs), name
    assert plain.outputs.hidden_states is None


def test_what_was_collected_one_length_at_a_time_is_refused() -> None:
    base = tiny_model("bart")
    model = CPXCausalLM(base, attach(base, CPXConfig()))
    ids, mask = torch.full((2, 4), 7), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    with pytest.raises(UnsupportedModel, match="no hidden_states in common"):
        model(ids, mask, output_hidden_states=True)


# --- which prompts are scored ---


def test_padding_and_batching_change_nothing(trained: CPXCausalLM, tokenizer: Any) -> None:
    with torch.no_grad():
        left, right = (trained(**batch(tokenizer, side)).logits for side in ("left", "right"))
        alone = torch.cat([trained(**batch(tokenizer, texts=[t])).logits for t in TEXTS])
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(left, alone)
    for prompts in (TEXTS, tokenizer(TEXTS).input_ids, tokenizer.base(PLAIN).input_ids):
        scores = trained.score(prompts)
        torch.testing.assert_close(torch.from_numpy(scores.logits).float(), left)


def test_a_missing_token_is_as_if_it_were_there(trained: CPXCausalLM, tokenizer: Any) -> None:
    inputs = batch(tokenizer.base, texts=["Is it so?", "Is it?"])
    with torch.no_grad():
        without = trained(**inputs).logits
        with_it = trained(**batch(tokenizer, texts=["Is it so?", "Is it? [CPX]"])).logits
    assert torch.equal(without, with_it)


def test_the_token_inside_a_prompt_is_refused(trained: CPXCausalLM, tokenizer: Any) -> None:
    inputs = batch(tokenizer)
    with pytest.raises(InvalidInput, match="before its end"):
        trained(torch.cat([inputs.input_ids, inputs.input_ids], dim=1))
    right = batch(tokenizer, "right")
    with pytest.raises(InvalidInput, match="pass the attention_mask"):
        trained(right.input_ids)
    with pytest.raises(InvalidInput, match="260 embeddings"):
        trained(torch.tensor([[5, 300, 6]]))


def test_a_prompt_without_a_token_is_scored(trained: CPXCausalLM, tokenizer: Any) -> None:
    with torch.no_grad():
        output = trained(**batch(tokenizer, texts=["", "Is it so?", ""]))
    assert output.outputs is None, "the base has no output for an empty prompt"
    torch.testing.assert_close(output.logits.double(), torch.from_numpy(
        trained.score(["", "Is it so?", ""]).logits
    ))  # fmt: skip


def test_text_that_ends_in_the_token_scores_as_without(trained: CPXCausalLM) -> None:
    scores = trained.score(["Is it?", "Is it? [CPX]", "Is it? [CPX]\n", "Is it [CPX]? "]).logits
    assert scores[0] == scores[1] == scores[2] != scores[3]
    chats = [
        [{"role": "user", "content": "Is it?"}],
        [{"role": "user", "content": "Is it? [CPX]"}],
    ]
    plain = trained.base_model, trained.scorer.tokenizer
    assert plain[1] is not None
    wanted = [
        plain[1].apply_chat_template(chat, add_generation_prompt=True)["input_ids"][:-1]
        for chat in chats
    ]
    assert (trained.score(chats).logits == trained.score(wanted).logits).all()
    assert trained.score(chats).logits[0] != trained.score(chats).logits[1]


def test_stored_prefixes_give_the_same_logits(trained: CPXCausalLM, tokenizer: Any) -> None:
    inputs = tokenizer.base(TEXTS[1:3], return_tensors="pt", padding=True)
    prefixes = prefill(trained.base_model, **inputs).split()
    with torch.no_grad():
        output = trained(None, prefixes=prefixes)
        torch.testing.assert_close(output.logits, trained(**inputs).logits)
    assert output.outputs is None


def test_an_early_exit_gives_the_base_s_whole_output(tokenizer: Any) -> None:
    model = new(tokenizer, config=CPXConfig(layer=1))
    whole = new(tokenizer)
    inputs = batch(tokenizer)
    with torch.no_grad():
        early, outputs = model(**inputs)
        late, wanted = whole(**inputs)
        alone = model(**inputs, return_outputs=False)
    assert not torch.allclose(early, late)
    assert torch.equal(outputs.logits, wanted.logits)
    assert alone.outputs is None
    torch.testing.assert_close(alone.logits, early)


# --- training ---


def test_the_seeds_loop_trains_rows_and_head_alone(tokenizer: Any) -> None:
    model = new(tokenizer).train()
    before = fingerprint(model.base_model)
    weights = {n: p.clone() for n, p in model.base_model.state_dict().items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    d = model.base_model.config.hidden_size
    assert sum(p.numel() for p in parameters) == d + d + 1
    optimizer = torch.optim.AdamW(parameters, lr=3e-2)
    inputs, labels = batch(tokenizer), torch.tensor([1, 0, 1, 0])
    loss_fn, seen = torch.nn.BCEWithLogitsLoss(), []
    for _ in range(30):
        optimizer.zero_grad()
        logits, _ = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = loss_fn(logits.squeeze(), labels.float())
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.1 < seen[0]
    assert all(torch.equal(weights[n], p) for n, p in model.base_model.state_dict().items())
    assert fingerprint(model.base_model) == before
    state = sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim())
    assert state == 2 * (d + d + 1), "Adam keeps two numbers for each that is trained"


def test_an_optimizer_of_the_embeddings_is_refused_at_its_first_step(tokenizer: Any) -> None:
    """The seed's upstream trained [CPX] as a row of them; here its group would train nothing."""
    model, other = new(tokenizer).train(), new(tokenizer).train()
    embeddings = model.base_model.get_input_embeddings().weight

    def step(*trained: Any, of: CPXCausalLM = model) -> None:
        optimizer = torch.optim.SGD([{"params": each, "lr": 1e-2} for each in trained])
        of(**batch(tokenizer), labels=torch.ones(4)).loss.backward()
        optimizer.step()

    before = model.classifier.weight.clone()
    with pytest.raises(InvalidInput, match=r"give it model\.scorer\.rows instead"):
        step(model.classifier.parameters(), embeddings)
    assert torch.equal(model.classifier.weight, before), "nothing was changed"
    step(model.classifier.parameters(), model.scorer.rows)
    step(model.classifier.parameters(), model.scorer.rows, embeddings)
    step(other.classifier.parameters(), of=other)
    model.scorer.rows.requires_grad_(False)
    step(model.classifier.parameters(), embeddings)


def test_the_parameters_to_train_are_named(tokenizer: Any) -> None:
    model = new(tokenizer, config=CPXConfig(lora_rank=1))
    scorer = model.scorer
    named = {id(p) for p in model.params_to_train}
    assert {id(scorer.rows), id(scorer.head.weight), id(scorer.head.bias)} < named
    assert named == {id(p) for p in scorer.parameters()}
    gate(model.base_model, GateConfig(("layers",)))  # of another part, and saved by itself
    assert {id(p) for p in model.params_to_train} == named
    scorer.rows.requires_grad_(False)
    assert {id(p) for p in model.params_to_train} == named - {id(scorer.rows)}


def test_a_prefill_by_name_is_forward_without_a_cache(trained: CPXCausalLM, tokenizer: Any) -> None:
    inputs = batch(tokenizer)
    logits, outputs = trained.prefill_forward(**inputs)
    assert torch.equal(logits, trained(**inputs).logits)
    with pytest.raises(InvalidInput, match="takes whole prompts"):
        trained.prefill_forward(inputs["input_ids"], past_key_values=outputs.past_key_values)


def test_labels_give_the_loss(trained: CPXCausalLM, tokenizer: Any) -> None:
    inputs, labels = batch(tokenizer), torch.tensor([1, 0, 1, 0])
    output = trained(**inputs, labels=labels)
    assert torch.equal(output.loss, losses(output.logits, labels).mean())
    assert output[0] is output.loss and [*output] == [output.logits, output.outputs]


def test_rows_can_be_frozen(tokenizer: Any) -> None:
    model = new(tokenizer, is_cpx_token_trainable=False)
    model(**batch(tokenizer), labels=torch.ones(4)).loss.backward()
    assert model.scorer.rows.grad is None and not model.scorer.rows.requires_grad
    assert model.classifier.weight.grad is not None
    assert model.config.is_cpx_token_trainable is False


def test_several_labels_and_settings(tokenizer: Any) -> None:
    model = new(tokenizer, num_labels=3)
    output = model(**batch(tokenizer), labels=torch.tensor([0, 2, 1, 1]))
    assert output.logits.shape == (4, 3) and output.loss.requires_grad
    assert model.config.num_labels == 3 and model.base_model.config.num_labels == 2
    rich = new(tokenizer, config=CPXConfig(rows=2, outputs=("a", "b"), aggregation="attention"))
    assert rich(**batch(tokenizer)).logits.shape == (4, 2)
    with pytest.raises(InvalidInput, match="num_labels=3, and the config has 2"):
        new(tokenizer, num_labels=3, config=CPXConfig(num_labels=2))


def test_the_frozen_base_s_dropout_stays_off() -> None:
    base = tiny_model("gpt2")
    assert base.config.attn_pdrop > 0
    model = CPXCausalLM(base, attach(base, CPXConfig())).train()
    with torch.no_grad():
        model.classifier.weight.normal_()
    ids = torch.randint(5, 100, (2, 9))
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.training and not base.training


# --- saving ---


def test_saved_and_loaded_it_says_the_same(tokenizer: Any, tmp_path: Path) -> None:
    model = new(tokenizer, config=CPXConfig(rows=2, num_labels=2))
    model.save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 20_000
    again = CPXCausalLM.from_pretrained(tmp_path)
    inputs = batch(tokenizer)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.cpx_token_id == tokenizer.cpx_token_id == 260
    assert CPXTokenizer.from_pretrained(tmp_path)("a").input_ids == tokenizer("a").input_ids
    with pytest.raises(InvalidInput, match="leave num_labels and config out"):
        CPXCausalLM.from_pretrained(tmp_path, num_labels=1)
    with pytest.raises(WrongBase):
        CPXCausalLM.from_pretrained(tmp_path, base="nano-l")


def test_a_config_is_read_from_a_scorer_or_begun_for_a_base(tokenizer: Any, tmp_path: Path) -> None:
    config = CPXConfig.from_pretrained("nano-s", num_labels=2, cpx_token="[CPX]", cpx_token_id=260)
    assert config == CPXConfig(num_labels=2)
    new(tokenizer, config=config).save_pretrained(tmp_path)
    assert CPXConfig.from_pretrained(tmp_path) == config
    assert CPXConfig.from_pretrained(tmp_path, outputs=("a", "b")).outputs == ("a", "b")
    with pytest.raises(ModelNotFound, match="did you mean 'nano-s'"):
        CPXConfig.from_pretrained("nano-z")


def test_a_scorer_on_the_hub_is_told_by_its_files(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's cache holds it: what was downloaded once loads without a network."""
    model = new(tokenizer)
    snapshot = tmp_path / "models--somebody--scorer" / "snapshots" / ("0" * 40)
    model.save_pretrained(tmp_path / "scorer")
    shutil.copytree(tmp_path / "scorer", snapshot)
    (tmp_path / "models--somebody--scorer" / "refs").mkdir()
    (tmp_path / "models--somebody--scorer" / "refs" / "main").write_text("0" * 40)
    for module in ("constants", "file_download", "_snapshot_download"):
        where = f"huggingface_hub.{module}.HF_HUB_CACHE"
        monkeypatch.setattr(where, str(tmp_path), raising=False)
    again = CPXCausalLM.from_pretrained("somebody/scorer")
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert len(CPXTokenizer.from_pretrained("somebody/scorer")) == 261
    with pytest.raises(ModelNotFound):
        CPXTokenizer.from_pretrained("somebody/else")


def test_a_base_from_a_folder_is_remembered_on_this_machine_alone(
    tokenizer: Any, tmp_path: Path
) -> None:
    base = tiny_model("gpt2")
    base.save_pretrained(tmp_path / "base")
    model = CPXCausalLM.from_pretrained(tmp_path / "base", num_labels=1)
    assert model.cpx_token_id is None, "it has no tokenizer"
    model.save_pretrained(tmp_path / "scorer")
    for name in ("pliant.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "scorer" / name).read_text(), "it may be shared"
    (tmp_path / "scorer").rename(tmp_path / "moved")
    again = CPXCausalLM.from_pretrained(tmp_path / "moved")
    assert torch.equal(again.scorer.rows, model.scorer.rows)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(InvalidInput, match=r"name the base's folder \(base=..., or --base\)"):
        CPXCausalLM.from_pretrained(tmp_path / "moved")
    CPXCausalLM.from_pretrained(tmp_path / "moved", base=tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "base")
    with pytest.raises(InvalidInput, match="holds no scorer"):
        CPXCausalLM.from_pretrained(tmp_path / "base", base="nano-s")


def test_a_state_dict_holds_what_was_trained(tokenizer: Any) -> None:
    model, other = new(tokenizer), new(tokenizer)
    with torch.no_grad():
        model.scorer.rows.normal_()
    state = model.state_dict()
    assert state.keys() == {"scorer.rows", "scorer.head.weight", "scorer.head.bias"}
    other.load_state_dict(state)
    assert torch.equal(other.scorer.rows, model.scorer.rows)
    whole = {f"base_model.{k}": v + 1 for k, v in model.base_model.state_dict().items()}
    other.load_state_dict(whole | state)  # as earlier versions saved it
    assert torch.equal(other.base_model.lm_head.weight, model.base_model.lm_head.weight + 1)
    with pytest.raises(RuntimeError, match="Missing.*scorer.rows"):
        other.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected.*classifier"):
        other.load_state_dict({**state, "classifier.weight": state["scorer.rows"]})


def test_a_state_dict_holds_what_is_trained_of_the_base(tokenizer: Any) -> None:
    model, other = new(tokenizer), new(tokenizer)
    for each in (model, other):
        each.base_model.lm_head.weight.requires_grad_(True)  # tied: one tensor with two names
    state = model.state_dict()
    trained = "base_model.model.embed_tokens.weight"
    assert [k for k in state if k.startswith("base_model.")] == [trained]
    wrapped = torch.nn.ModuleDict({"module": other})
    wrapped.load_state_dict({f"module.{k}": v for k, v in state.items()})
    del state[trained]
    with pytest.raises(RuntimeError, match="Missing.*embed_tokens"):
        other.load_state_dict(state)


def test_a_copied_model_has_a_scorer_of_its_own(tokenizer: Any) -> None:
    model = new(tokenizer)
    with torch.no_grad():
        model.scorer.rows.normal_()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.scorer.rows.zero_()
    assert model.scorer.rows.any() and twin.base_model.pliant.complexity is twin.scorer


def test_a_change_of_dtype_leaves_what_is_trained_in_fp32(tokenizer: Any) -> None:
    model = new(tokenizer).to(torch.bfloat16)
    assert model.base_model.dtype == torch.bfloat16
    assert {p.dtype for p in model.scorer.parameters()} == {torch.float32}
    assert model(**batch(tokenizer)).logits.dtype == torch.float32


# --- loading ---


def test_generate_is_the_base_s_own_and_scored(trained: CPXCausalLM, tokenizer: Any) -> None:
    options = {"max_new_tokens": 4, "do_sample": False}
    inputs = batch(tokenizer, texts=["Is it so? [CPX]", "What is 3 + 4?"])
    done = trained.generate(**inputs, **options)
    plain = tokenizer.base(["Is it so?", "What is 3 + 4?"], return_tensors="pt", padding=True)
    wanted = trained.base_model.generate(**plain, **options)
    for got, row in zip(done.sequences, wanted, strict=True):
        assert torch.equal(got, row[-len(got) :])
    torch.testing.assert_close(
        torch.from_numpy(done.scores.logits), torch.from_numpy(
            trained.score(["Is it so?", "What is 3 + 4?"]).logits
        ), rtol=1e-4, atol=1e-5
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpx_token_id": 260, "tokenizer_size": 260}, "not the last id"),
        ({"cpx_token_id": 259, "tokenizer_size": 261}, "not the last id"),
        ({"cpx_token_id": 65, "tokenizer_size": 66}, "in the base's vocabulary"),
        ({"cpx_token_id": 65}, "in the base's vocabulary"),
        ({"cpx_token_id": -1}, "is not a token id"),
        ({"cpx_token_id": "[CPX]"}, "is not a token id"),
        ({"num_labels": 0}, "num_labels"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        CPXCausalLM.from_pretrained("nano-s", **options)


def test_nothing_is_resized(trained: CPXCausalLM) -> None:
    assert trained.base_model.get_input_embeddings().num_embeddings == 260
    with pytest.raises(InvalidInput, match="need no resizing"):
        trained.resize_token_embeddings(261)


def test_without_bitsandbytes_a_quantised_base_says_what_to_install(monkeypatch: Any) -> None:
    for bits in (4, 8):
        module = f"transformers.quantizers.quantizer_bnb_{bits}bit"
        monkeypatch.setattr(f"{module}.is_bitsandbytes_available", lambda: False)
        config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        with pytest.raises(InvalidInput, match="pip install -U bitsandbytes") as refusal:
            CPXCausalLM.from_pretrained("nano-s", quantization_config=config)
        assert "\n" not in str(refusal.value)


def test_device_map_is_handed_on(tokenizer: Any, trained: CPXCausalLM, tmp_path: Path) -> None:
    parts = ("embed_tokens", "layers", "norm", "rotary_emb")
    places = {"lm_head": "cpu", **{f"model.{part}": "cpu" for part in parts}}
    places["model.layers"] = "disk"
    model = new(tokenizer, device_map=places, offload_folder=str(tmp_path))
    assert model.base_model.hf_device_map["model.layers"] == "disk"
    with torch.no_grad():
        torch.testing.assert_close(
            model(**batch(tokenizer)).logits, trained(**batch(tokenizer)).logits
        )
    assert new(tokenizer, device_map="auto").base_model.device.type in ("cpu", "cuda")


def test_its_width_is_found_whatever_it_is_called() -> None:
    """hidden_size, n_embd, d_model, dim: where anatomy finds it, not under a list of names."""
    for name in ("llama", "gpt2", "opt", "mpt", "xlnet", "ctrl"):
        base = tiny_model(name)
        model = CPXCausalLM(base, attach(base, CPXConfig()))
        ids = torch.randint(5, 100, (2, 9))
        assert model(ids).logits.shape == (2, 1), name
