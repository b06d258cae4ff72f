"""What `attach` promises beyond the laws: weights, packing, kept scores, fall-backs, schedules."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    MambaConfig,
    MambaForCausalLM,
)

from pliant.anatomy import run_first
from pliant.anatomy.tiny import tiny_model
from pliant.errors import InvalidInput
from pliant.gradients import GradientConfig, GradientsWarning, attach


@pytest.fixture
def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).train()


def ids(rows: int = 2, length: int = 14) -> Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("engine", ["exact", "sparse"])
def test_a_rows_weight_multiplies_its_tokens_losses(llama: Any, engine: str) -> None:
    x = ids()
    logits = llama(input_ids=x).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none")
    weights = torch.tensor([2.0, 0.5])
    expected = (losses * weights[:, None]).sum() / losses.numel()
    attach(llama, GradientConfig(engine=engine, selection="all"))  # type: ignore[arg-type]
    found = llama(input_ids=x, labels=x, loss_weights=weights).loss
    torch.testing.assert_close(found, expected)


def test_a_tokens_weight_moves_with_its_label(llama: Any) -> None:
    x, weights = ids(1), torch.zeros(1, 14)
    weights[0, 5] = 1.0  # the loss of predicting token 5, from position 4
    expected = F.cross_entropy(llama(input_ids=x).logits[0, 4:5], x[0, 5:6]) / 13
    attach(llama, GradientConfig(engine="exact", selection="all"))
    torch.testing.assert_close(llama(input_ids=x, labels=x, loss_weights=weights).loss, expected)


def test_the_loss_comes_first_as_in_every_output(llama: Any) -> None:
    attach(llama, GradientConfig())
    output = llama(input_ids=ids(), labels=ids())
    assert output[0] is output.loss and list(output)[0] == "loss"
    loss, logits = llama(input_ids=ids(), labels=ids(), return_dict=False)[:2]
    assert loss.dim() == 0 and logits.dim() == 3


@pytest.mark.parametrize("kind", ["bart", "xlnet"])
def test_labels_that_were_shifted_before_are_not_shifted_again(kind: str) -> None:
    model: Any = tiny_model(kind)
    plain = model(input_ids=ids(), labels=ids().flip(1)).loss
    attach(model.train(), GradientConfig(engine="exact", selection="all"))
    for module in model.modules():
        module.training = module is model  # dropout rests
    found = model(input_ids=ids(), labels=ids().flip(1))
    assert found.logits.shape[:2] == (1, 28)
    torch.testing.assert_close(found.loss, plain)


@pytest.mark.parametrize("engine", ["exact", "sparse", "completion"])
def test_a_sequence_that_goes_on_is_trained_in_its_context(llama: Any, engine: str) -> None:
    """Prefix tuning, for one, calls with keys and values that are there already."""
    x = ids()

    def begun() -> Any:
        with torch.no_grad():
            return llama(input_ids=x[:, :6], use_cache=True).past_key_values

    settings: dict[str, Any] = {"engine": engine, "ratio": 0.5, "selection": "uniform"}
    gradients = attach(llama, GradientConfig(**settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientsWarning)
        found = llama(input_ids=x[:, 6:], labels=x[:, 6:], past_key_values=begun())
    logits = llama.eval()(input_ids=x[:, 6:], past_key_values=begun()).logits.flatten(0, 1)
    assert torch.cdist(found.logits[0], logits).amin(1).max() < 1e-4
    assert gradients.engine == "exact"


@pytest.mark.parametrize("labels", [torch.tensor([0, 1]), ids() % 2])
def test_a_loss_that_is_not_of_tokens_stays_the_models_own(llama: Any, labels: Tensor) -> None:
    kind: Any = LlamaForTokenClassification if labels.dim() == 2 else LlamaForSequenceClassification
    llama.config.pad_token_id, llama.config.classifier_dropout = 0, 0.0
    model = kind(llama.config).train()
    plain = model(input_ids=ids(), labels=labels)
    attach(model, GradientConfig())
    with pytest.warns(GradientsWarning, match="nothing is selected"):
        found = model(input_ids=ids(), labels=labels)
    assert torch.equal(found.loss, plain.loss) and torch.equal(found.logits, plain.logits)
    with pytest.raises(InvalidInput, match="loss_weights"):
        model(input_ids=ids(), labels=labels, loss_weights=torch.ones(2))


def test_what_an_encoder_decoder_reads_is_made_of_its_labels_so_nothing_is_chosen() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 97}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
    widths = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, **widths)).train()
    plain = model(input_ids=ids(), labels=ids(2, 9))
    attach(model, GradientConfig())
    with pytest.warns(GradientsWarning, match="its decoder's inputs are made of its labels"):
        found = model(input_ids=ids(), labels=ids(2, 9))
    assert torch.equal(found.loss, plain.loss) and found.logits.shape == plain.logits.shape


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("engine", ["sparse", "completion"])
@pytest.mark.parametrize("by_config", [True, False])
def test_what_is_asked_of_every_position_is_of_every_position(
    llama: Any, engine: str, asked: str, by_config: bool
) -> None:
    llama.set_attn_implementation("eager")
    labels = ids().clone()
    labels[:, :5] = -100
    plain = llama(input_ids=ids(), **{asked: True})[asked.removeprefix("output_")]
    gradients = attach(llama, GradientConfig(engine=engine, ratio=0.3))  # type: ignore[arg-type]
    if by_config:
        setattr(llama.config, asked, True)
    with pytest.warns(GradientsWarning, match="of every position was asked for"):
        found = llama(input_ids=ids(), labels=labels, **({} if by_config else {asked: True}))
    ours = found[asked.removeprefix("output_")]
    assert gradients.engine == "exact" and len(ours) == len(plain)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs)
    llama(input_ids=ids(), labels=labels, **{asked: False})
    assert gradients.engine == engine


def test_of_two_that_are_attached_the_outer_one_acts_and_neither_warns(llama: Any) -> None:
    x = ids()
    settings: dict[str, Any] = {"selection": "topk", "score": "loss"}
    inner = attach(llama, GradientConfig(ratio=0.9, **settings), name="inner")
    outer = attach(llama, GradientConfig(ratio=0.3, **settings), name="outer")
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradientsWarning)
        found = llama(input_ids=x, labels=x)
        with outer.disabled():
            wider = llama(input_ids=x, labels=x)
    assert found.logits.shape[1] == 8 and wider.logits.shape[1] == 24
    assert (outer.telemetry.run.passes, inner.telemetry.run.passes) == (1, 1)


def test_weights_of_another_shape_are_refused(llama: Any) -> None:
    attach(llama, GradientConfig())
    with pytest.raises(InvalidInput, match=r"loss_weights of shape \(3,\)"):
        llama(input_ids=ids(), labels=ids(), loss_weights=[1.0, 1.0, 1.0])


def test_labels_of_another_shape_are_refused(llama: Any) -> None:
    attach(llama, GradientConfig())
    with pytest.raises(InvalidInput, match=r"labels of shape \(2, 3\)"):
        llama(input_ids=ids(), labels=ids()[:, :3])


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "qwen3"])
def test_packed_documents_do_not_see_each_other(kind: str) -> None:
    """Position ids that start again are all that tells them apart, as without selection."""
    model: Any = tiny_model(kind).train()
    one, other = ids(1, 9), ids(1, 12)[:, :7] + 1
    packed = torch.cat([one, other], 1)
    positions = torch.cat([torch.arange(9), torch.arange(7)])[None]
    labels = packed.clone()
    labels[0, 9] = -100
    attach(model, GradientConfig(selection="topk", score="loss", ratio=0.5))
    together = model(input_ids=packed, position_ids=positions, labels=labels)
    chosen = together.logits[0]
    model.eval()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=one).logits[0], model(input_ids=other).logits[0]])
    assert len(chosen) == 7  # ceil(14 / 2)
    nearest = torch.cdist(chosen.detach(), alone).amin(1)
    assert nearest.max() < 1e-4


def test_logits_are_those_of_the_chosen_rows(llama: Any) -> None:
    x = ids()
    whole = llama(input_ids=x).logits
    attach(llama, GradientConfig(selection="topk", score="loss", ratio=0.3))
    found = llama(input_ids=x, labels=x)
    losses = F.cross_entropy(whole[:, :-1].transpose(1, 2), x[:, 1:], reduction="none")
    hardest = losses.topk(4, dim=1).indices.sort(1).values  # ceil(.3 * 13) of each row
    expected = torch.cat([whole[row, at] for row, at in enumerate(hardest)])
    torch.testing.assert_close(found.logits[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_grad", ["detach", "one_hop"])
def test_a_ragged_batchs_gradient_is_that_of_its_rows(llama: Any, kv_grad: str) -> None:
    """Rows with fewer tokens to train have slots to spare, and these must add nothing."""
    x, labels = ids(3, 20), ids(3, 20)
    labels[1, 8:], labels[2, 3:] = -100, -100
    settings: dict[str, Any] = {"selection": "topk", "score": "loss", "kv_grad": kv_grad}
    gradients = attach(llama, GradientConfig(ratio=0.5, **settings))
    together = gradient(llama, llama(input_ids=x, labels=labels, num_items_in_batch=28).loss)
    assert gradients.engine == "sparse"
    alone = [
        gradient(llama, llama(input_ids=i, labels=y, num_items_in_batch=28).loss)
        for i, y in zip(x.split(1), labels.split(1), strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(alone).sum(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("engine", ["exact", "sparse"])
def test_scores_can_come_from_a_layer_below(llama: Any, engine: str) -> None:
    x = ids()
    with torch.no_grad():
        found = run_first(llama, 1, input_ids=x, use_cache=False, resumable=False).normed
        shallow = llama.lm_head(found)[:, :-1].transpose(1, 2)
    hardest = F.cross_entropy(shallow, x[:, 1:], reduction="none").topk(4, dim=1).indices
    settings: dict[str, Any] = {"engine": engine, "selection": "topk", "score": "loss"}
    gradients = attach(llama, GradientConfig(ratio=0.3, exit_layer=1, **settings))
    seen: list[Any] = []
    choose = gradients.selector.chosen
    gradients.selector.chosen = lambda *args: seen.append(choose(*args)) or seen[-1]  # type: ignore
    llama(input_ids=x, labels=x).loss.backward()
    assert torch.equal(seen[0].positions_BK, hardest.sort(1).values)


def test_a_resumed_selector_draws_what_it_would_have_drawn(llama: Any) -> None:
    x = ids()

    def losses(gradients: Any, count: int) -> list[float]:
        return [float(llama(input_ids=x, labels=x).loss.detach()) for _ in range(count)]

    straight = attach(llama, GradientConfig(selection="uniform", ratio=0.3, warmup_steps=3))
    all_of_them = losses(straight, 6)
    straight.detach()
    first = attach(llama, GradientConfig(selection="uniform", ratio=0.3, warmup_steps=3))
    begun, state = losses(first, 2), first.get_extra_state()
    first.detach()
    second = attach(llama, GradientConfig(selection="uniform", ratio=0.3, warmup_steps=3))
    second.set_extra_state(state)
    assert begun + losses(second, 4) == all_of_them
    assert len(set(all_of_them)) > 3  # draws differ from each other


def test_the_curriculum_starts_with_every_token(llama: Any) -> None:
    x = ids()
    gradients = attach(llama, GradientConfig(ratio=0.25, warmup_steps=4))
    ratios = []
    for _ in range(6):
        llama(input_ids=x, labels=x)
        ratios.append(gradients.metrics()["ratio"])
    assert ratios[0] == 1.0 and ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == ratios[-2] == pytest.approx(4 / 13)


@pytest.mark.parametrize("parts", [1, 3])
def test_an_accumulated_step_is_one_step_without_anyone_saying_so(llama: Any, parts: int) -> None:
    """In a plain loop: the weights have changed, so the step is over."""
    gradients = attach(llama, GradientConfig(ratio=0.25, selection="uniform", warmup_steps=4))
    optimizer = torch.optim.AdamW(llama.parameters())
    ratios = []
    for _ in range(4):
        for _ in range(parts):
            (llama(input_ids=ids(), labels=ids()).loss / parts).backward()
        ratios.append(gradients.selector.schedule.ratio())
        optimizer.step()
        optimizer.zero_grad()
    # What came before the first step could be steps of one forward each: later it is known.
    assert ratios[1:] == [0.8125, 0.625, 0.4375]
    assert gradients.get_extra_state()["schedule"] == {"steps": 4, "by_hand": False}


@pytest.mark.parametrize("ratio", [0.6, 0.7])
def test_two_passes_are_made_only_where_they_cost_less_than_one(llama: Any, ratio: float) -> None:
    attach(llama, GradientConfig(ratio=ratio))
    llama(input_ids=ids(), labels=ids())  # the first time it is tried whether it is exact
    passes: list[int] = []
    llama.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    llama(input_ids=ids(), labels=ids())
    assert len(passes) == (2 if ratio == 0.6 else 1)


def test_what_has_no_keys_and_values_falls_back_and_says_so() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2))
    gradients = attach(model.train(), GradientConfig(ratio=0.5))
    with pytest.warns(GradientsWarning, match="'sparse' engine is not exact here"):
        model(input_ids=ids(), labels=ids()).loss.backward()
    assert gradients.engine == "exact"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        model(input_ids=ids(), labels=ids())


def test_dropout_makes_two_passes_differ_so_one_is_made(llama: Any) -> None:
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.2
    gradients = attach(llama, GradientConfig(ratio=0.5))
    with pytest.warns(GradientsWarning, match="dropout would draw anew"):
        llama(input_ids=ids(), labels=ids())
    assert gradients.engine == "exact"


def test_a_routers_auxiliary_loss_sees_every_token() -> None:
    model: Any = tiny_model("mixtral").train()
    x = ids()
    plain = model(input_ids=x, labels=x, output_router_logits=True)
    attach(model, GradientConfig(ratio=0.5, selection="all"))
    with pytest.warns(GradientsWarning, match="auxiliary loss"):
        found = model(input_ids=x, labels=x, output_router_logits=True)
    torch.testing.assert_close(found.loss, plain.loss)
    torch.testing.assert_close(found.aux_loss, plain.aux_loss)


@pytest.mark.parametrize("kv_grad", ["detach", "one_hop", "full"])
def test_keys_and_values_get_as_much_gradient_as_was_asked(llama: Any, kv_grad: str) -> None:
    """Of one chosen token: its own way, one layer's projections more, or all there is."""
    x, labels = ids(1), torch.full((1, 14), -100)
    labels[0, 13] = x[0, 13]
    whole = gradient(llama, llama(input_ids=x, labels=labels).loss)
    settings: dict[str, Any] = {"selection": "uniform", "ratio": 0.5, "kv_grad": kv_grad}
    attach(llama, GradientConfig(**settings))
    found = gradient(llama, llama(input_ids=x, labels=labels).loss)
    near = float(F.cosine_similarity(found, whole, dim=0))
    if kv_grad == "full":
        assert near == pytest.approx(1, abs=1e-5)
    else:
        assert near < 0.9999
    reached = llama.model.embed_tokens.weight.grad.abs().sum(1) > 0
    positions = {int(i) for i in x[0] if reached[int(i)]}
    assert (len(positions) > 2) == (kv_grad == "full")


def test_one_hop_is_the_gradient_of_keys_and_values_with_their_inputs_held(llama: Any) -> None:
    """The last layer's key and value projections get exactly what the whole gradient gives them
    when what they read is held fixed: nothing above them depends on other layers' keys."""
    x, labels = ids(1), torch.full((1, 14), -100)
    labels[0, 13] = x[0, 13]
    last = llama.model.layers[-1].self_attn
    gradient(llama, llama(input_ids=x, labels=labels).loss)
    keys, values = last.k_proj.weight.grad.clone(), last.v_proj.weight.grad.clone()
    attach(llama, GradientConfig(selection="uniform", ratio=0.5, kv_grad="one_hop"))
    gradient(llama, llama(input_ids=x, labels=labels).loss)
    torch.testing.assert_close(last.k_proj.weight.grad, keys, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(last.v_proj.weight.grad, values, rtol=1e-4, atol=1e-7)


def test_checkpointing_of_its_own_changes_no_gradient(llama: Any) -> None:
    x = ids()
    gradients = attach(llama, GradientConfig(ratio=0.4))
    plain = gradient(llama, llama(input_ids=x, labels=x).loss)
    llama.gradient_checkpointing_enable()
    gradients.selector.draws = 0
    again = gradient(llama, llama(input_ids=x, labels=x).loss)
    assert gradients.engine == "sparse"
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-8)


def test_a_layer_to_score_from_must_be_there(llama: Any) -> None:
    with pytest.raises(InvalidInput, match="exit_layer = 4: LlamaForCausalLM has 3"):
        attach(llama, GradientConfig(exit_layer=4))
    assert "forward" not in vars(llama)


def test_any_seed_draws(llama: Any) -> None:
    attach(llama, GradientConfig(seed=2**61))
    assert llama(input_ids=ids(), labels=ids()).loss.isfinite()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "fast"}, "engine = 'fast'"),
        ({"ratio": 0}, "ratio = 0"),
        ({"ratio": 1.5}, "ratio = 1.5"),
        ({"ratio": True}, "ratio = True"),
        ({"selection": "best"}, "selection = 'best'"),
        ({"score": "hardness"}, "score = 'hardness'"),
        ({"kv_grad": True}, "kv_grad = True"),
        ({"mix": 0}, "mix = 0"),
        ({"warmup_steps": -1}, "warmup_steps = -1"),
        ({"score": "excess"}, "score = 'excess': give one of"),
        ({"exit_layer": 0}, "exit_layer = 0"),
        ({"sensitivity": -0.1}, "sensitivity = -0.1"),
        ({"sensitivity": float("nan")}, "sensitivity = nan"),
        ({"dynamic": "no"}, "dynamic = 'no'"),
        ({"seed": "a"}, "seed = 'a'"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_a_setting_that_cannot_be_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput) as error:
        GradientConfig(**settings)
    assert said in str(error.value)


def count_scorings(gradients: Any) -> list[int]:
    """The rows of each scoring from now on."""
    calls: list[int] = []
    score = gradients.selector._scores

    def counted(passage: Any, lesson: Any, *rest: Any) -> Tensor:
        calls.append(len(lesson.valid_BT))
        return score(passage, lesson, *rest)

    gradients.selector._scores = counted
    return calls


def test_a_vocabulary_may_grow_while_it_is_attached(llama: Any) -> None:
    attach(llama, GradientConfig(engine="exact", selection="topk"))
    old = llama.lm_head
    llama.resize_token_embeddings(old.out_features + 30, mean_resizing=False)
    assert llama.lm_head is not old
    ids = torch.randint(old.out_features, old.out_features + 30, (2, 12))
    gradients = llama.pliant.gradients
    loss = llama(input_ids=ids, labels=ids).loss
    loss.backward()
    assert llama.lm_head.weight.grad[old.out_features :].any()
    assert gradients.cost.head == 2.0 * llama.lm_head.weight.numel()
