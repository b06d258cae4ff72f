"""Choosing experts for prompts: three strategies, and answers with a mixture for each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.experts.adapting_models import nano_with_experts, questions
from tests.experts.models import with_experts

from pliant import nano
from pliant.anatomy.tiny import tiny_model
from pliant.errors import CorruptFile, InvalidInput, UnsupportedModel, WrongBase
from pliant.experts.adapting import (
    ByClassifier,
    ByPrompt,
    ClassifierConfig,
    FewShot,
    FewShotConfig,
    PromptConfig,
    Shot,
    check_split,
    generate,
    load_experts,
    save_mixture,
    shots_of,
    split_shots,
)
from pliant.experts.adapting.classifier import Head
from pliant.experts.adapting.few_shot import Layout, likelihood_of, likelihoods, rewards
from pliant.experts.adapting.shared_prefill import SharedPrefill
from pliant.experts.adapting.strategy import Strategy, name_of
from pliant.experts.model import svf_layers
from pliant.linear import Linear
from pliant.verify import verifier

PROMPTS = ["sort: dcab", "17+4", "what is 23+58?", "reverse of abc"]
MIXTURES: list[Any] = [
    {"words": 1.0},
    {},
    {"sums": 0.5, "words": -1.0},
    {"words": [0.0, 1.0, -9.0]},
]
SETTINGS: dict[str, Any] = {"max_new_tokens": 8}


class TestAnswers:
    @pytest.mark.parametrize("first_layer", [0, 2])
    def test_many_mixtures_in_a_batch_are_as_one_at_a_time(self, first_layer: int) -> None:
        model, tokenizer = nano_with_experts(first_layer)
        together = generate(model, tokenizer, PROMPTS, MIXTURES, **SETTINGS)
        for prompt, mixture, answer in zip(PROMPTS, MIXTURES, together, strict=True):
            assert generate(model, tokenizer, [prompt], [mixture], **SETTINGS) == [answer]
        base = generate(model, tokenizer, PROMPTS, [{}] * 4, **SETTINGS)
        assert base == nano.ask(nano.load("nano-s")[0], tokenizer, PROMPTS)
        assert together != base

    def test_a_mixture_of_experts_as_base_answers_alike(self) -> None:
        torch.manual_seed(0)
        base, (_, tokenizer) = tiny_model("mixtral").eval(), nano.load("nano-s")
        base.resize_token_embeddings(len(tokenizer))
        model = with_experts("words", "sums", model=base)
        mixtures = MIXTURES[:3]
        together = generate(model, tokenizer, PROMPTS[:3], mixtures, **SETTINGS)
        for prompt, mixture, answer in zip(PROMPTS, mixtures, together, strict=False):
            assert generate(model, tokenizer, [prompt], [mixture], **SETTINGS) == [answer]

    def test_messages_are_prompts_too(self) -> None:
        model, tokenizer = nano_with_experts()
        asked = [{"role": "user", "content": PROMPTS[0]}]
        assert generate(model, tokenizer, [asked], [{}]) == generate(
            model, tokenizer, PROMPTS[:1], [{}]
        )

    def test_what_does_not_fit_is_refused(self) -> None:
        model, tokenizer = nano_with_experts()
        with pytest.raises(InvalidInput, match="1 mixtures for 2 prompts"):
            generate(model, tokenizer, PROMPTS[:2], [{}])
        with pytest.raises(InvalidInput, match="no expert 'wrods'; did you mean 'words'"):
            generate(model, tokenizer, PROMPTS[:1], [{"wrods": 1.0}])
        with pytest.raises(InvalidInput, match=r"prompts is one prompt"):
            generate(model, tokenizer, "abcd", [{}] * 4)
        with pytest.raises(InvalidInput, match="has no experts"):
            generate(nano.load("nano-s")[0], tokenizer, PROMPTS, [{}] * 4)

    @pytest.mark.parametrize(
        ("mixture", "name"),
        [
            ({}, "base"),
            ({"a": 1.0}, "a"),
            ({"a": -1.0, "b": 0.25}, "-a + 0.25 b"),
            ({"a": [0.0, 1.0], "b": -0.5}, "0.5 a - 0.5 b"),
        ],
    )
    def test_mixtures_have_names(self, mixture: Any, name: str) -> None:
        assert name_of(mixture) == name


class TestClassifier:
    def fitted(self, first_layer: int = 0, **options: Any) -> ByClassifier:
        model, tokenizer = nano_with_experts(first_layer)
        known = questions("train", 24, ["sort", "add", "largest"])
        expert = {"sort": "words", "add": "sums", "largest": None}
        return ByClassifier.fit(
            model,
            tokenizer,
            [q.prompt for q in known],
            [expert[q.family] for q in known],
            ClassifierConfig(**options),
        )

    @pytest.mark.parametrize("first_layer", [0, 2])
    def test_it_learns_which_expert_a_prompt_needs(self, first_layer: int) -> None:
        strategy = self.fitted(first_layer)
        assert strategy.fitted is not None and strategy.fitted.accuracy >= 0.9
        asked = questions("dev", 12, ["sort", "add", "largest"])
        right = {"sort": {"words": 1.0}, "add": {"sums": 1.0}, "largest": {}}
        choices = strategy.adapt([q.prompt for q in asked])
        hits = sum(m == right[q.family] for m, q in zip(choices, asked, strict=True))
        assert hits >= 0.9 * len(asked)

    def test_a_choice_in_the_prefill_is_the_same_and_costs_no_forward(self) -> None:
        strategy = self.fitted(2)
        assert strategy.shares_prefill
        forwards = []
        layer = strategy.anatomy.layers[0]
        hook = layer.register_forward_hook(lambda *_: forwards.append(1))
        answers = strategy.answer(PROMPTS, **SETTINGS)
        shared = len(forwards)
        choices = strategy.choose(PROMPTS)
        texts = generate(
            strategy.model, strategy.tokenizer, PROMPTS, [c.mixture for c in choices], **SETTINGS
        )
        hook.remove()
        assert [a.text for a in answers] == texts
        assert [a.choice.mixture for a in answers] == [c.mixture for c in choices]
        assert {a.choice.name for a in answers} == {"words", "sums"}
        assert len(forwards) - shared > shared  # another forward for the choice
        assert not any(layer.rows for _, layer in svf_layers(strategy.model))

    @pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss"])
    def test_other_models_choose_in_the_prefill_too(self, name: str) -> None:
        torch.manual_seed(0)
        base, (_, tokenizer) = tiny_model(name).eval(), nano.load("nano-s")
        base.resize_token_embeddings(len(tokenizer))
        projections = ["c_attn", "c_fc"] if name == "gpt2" else ["q_proj", "v_proj"]
        options: dict[str, Any] = {"target_modules": projections, "layers_to_transform": [1]}
        model = with_experts("words", "sums", model=base, **options).requires_grad_(False)
        size = base.get_input_embeddings().weight.shape[1]
        weight = np.random.default_rng(0).normal(size=(size, 2))
        linear = Linear(weight, np.zeros(2), logistic=True)
        head = Head(("words", "sums"), 1, np.zeros(size), np.ones(size), linear)
        strategy = ByClassifier(model, tokenizer, head, ClassifierConfig(threshold=0.5))
        assert strategy.shares_prefill
        answers, choices = strategy.answer(PROMPTS, **SETTINGS), strategy.choose(PROMPTS)
        mixtures = [choice.mixture for choice in choices]
        assert [answer.choice.mixture for answer in answers] == mixtures
        assert answers[0].choice.scores == pytest.approx(dict(choices[0].scores), abs=1e-4)
        texts = generate(model, tokenizer, PROMPTS, mixtures, **SETTINGS)
        assert [answer.text for answer in answers] == texts

    def test_beams_share_their_prompts_expert(self) -> None:
        strategy = self.fitted(2)
        beams = strategy.answer(PROMPTS, num_beams=2, **SETTINGS)
        mixtures = [answer.choice.mixture for answer in beams]
        assert mixtures == strategy.adapt(PROMPTS)

    def test_below_the_threshold_the_base_answers(self) -> None:
        choices = self.fitted(threshold=1.0).choose(PROMPTS)
        assert {choice.name for choice in choices} == {"base"}
        assert "below 1.00" in choices[0].reason

    def test_saved_and_loaded_it_chooses_the_same(self, tmp_path: Path) -> None:
        strategy = self.fitted(threshold=0.4)
        strategy.save_pretrained(tmp_path)
        model, tokenizer = nano_with_experts()
        again = ByClassifier.from_pretrained(model, tokenizer, tmp_path)
        assert again.config == strategy.config and again.fitted == strategy.fitted
        before, after = strategy.choose(PROMPTS), again.choose(PROMPTS)
        assert [c.mixture for c in before] == [c.mixture for c in after]
        assert before[0].scores == pytest.approx(dict(after[0].scores), abs=1e-5)

    def test_files_of_another_base_or_kind_are_refused(self, tmp_path: Path) -> None:
        self.fitted().save_pretrained(tmp_path)
        _, tokenizer = nano_with_experts()
        other = with_experts("words", "sums", model=nano.load("nano-l")[0])
        with pytest.raises(WrongBase, match="fitted on another base"):
            ByClassifier.from_pretrained(other, tokenizer, tmp_path)
        index = tmp_path / "pliant.json"
        index.write_text(index.read_text()[:-9])
        with pytest.raises(CorruptFile):
            ByClassifier.from_pretrained(other, tokenizer, tmp_path)

    @pytest.mark.parametrize(
        ("experts", "message"),
        [
            (["words"], "1 experts for 2 prompts"),
            (["words", "law"], "no expert 'law'"),
            ([None, "base"], "nothing to classify"),
        ],
    )
    def test_bad_labels_are_refused(self, experts: Any, message: str) -> None:
        model, tokenizer = nano_with_experts()
        with pytest.raises(InvalidInput, match=message):
            ByClassifier.fit(model, tokenizer, PROMPTS[:2], experts)


class TestPrompt:
    LABELS = {"words": "sorting letters", "sums": "adding numbers"}

    def test_it_compares_labels_and_none_is_the_base(self) -> None:
        model, tokenizer = nano_with_experts()
        strategy = ByPrompt(model, tokenizer, self.LABELS)
        choice = strategy.choose(PROMPTS[:1])[0]
        assert set(choice.scores) == {"words", "sums", "base"}
        assert sum(choice.scores.values()) == pytest.approx(1)
        best = max(choice.scores, key=lambda name: choice.scores[name])
        assert choice.mixture == ({} if best == "base" else {best: 1.0})

    def test_a_question_without_content_has_no_favourite(self) -> None:
        model, tokenizer = nano_with_experts()
        strategy = ByPrompt(model, tokenizer, self.LABELS)
        scores = strategy.log_probabilities(["N/A", "...", "?"]) - strategy.prior
        assert np.allclose(scores.mean(0), 0, atol=1e-6)

    @pytest.mark.parametrize("labels", [{"words": "b", "sums": "a"}, LABELS])
    def test_a_label_has_the_probability_of_its_tokens(self, labels: Any) -> None:
        """In one forward, if their first tokens differ; the experts are off meanwhile."""
        model, tokenizer = nano_with_experts()
        strategy = ByPrompt(model, tokenizer, labels)
        scores = strategy.log_probabilities(PROMPTS)
        ids = [[*tokenizer_ids(tokenizer, prompt), *strategy.suffix] for prompt in PROMPTS]
        base = nano.load("nano-s")[0]
        for row, each in enumerate(ids):
            for column, label in enumerate(strategy.label_ids):
                label = label[:1] if strategy.reads_one_token else label
                with torch.no_grad():
                    logits = base(torch.tensor([each + label])).logits[0].log_softmax(-1)
                own = [float(logits[len(each) - 1 + i, t]) for i, t in enumerate(label)]
                assert scores[row, column] == pytest.approx(np.mean(own), abs=1e-4)

    @pytest.mark.parametrize("labels", [{"words": "b", "sums": "a"}, LABELS])
    @pytest.mark.parametrize("expert", [None, "words"])
    def test_labels_are_read_on_the_answers_prefill(self, labels: Any, expert: Any) -> None:
        """The layers before the experts see each question once; the answers are the same."""
        model, tokenizer = nano_with_experts(2)
        strategy = ByPrompt(model, tokenizer, labels, PromptConfig(expert=expert))
        plain = ByPrompt(model, tokenizer, labels, PromptConfig(expert=expert))
        choices = strategy.choose(PROMPTS)  # computes the prior, too
        mixtures = [choice.mixture for choice in choices]
        texts = generate(model, tokenizer, PROMPTS, mixtures, **SETTINGS)
        seen: list[int] = []
        mlp = strategy.anatomy.layers[0].mlp
        hook = mlp.register_forward_hook(
            lambda m, args, out: seen.append(args[0].shape[:2].numel())
        )
        answers = strategy.answer(PROMPTS, **SETTINGS)
        shared = sum(seen)
        plain.prior  # noqa: B018
        seen.clear()
        Strategy.answer(plain, PROMPTS, **SETTINGS)
        hook.remove()
        assert strategy.shares_prefill and [a.text for a in answers] == texts
        for answer, choice in zip(answers, choices, strict=True):
            assert answer.choice.scores == pytest.approx(dict(choice.scores), abs=1e-4)
        longest = max(len(tokenizer_ids(tokenizer, prompt)) for prompt in PROMPTS)
        saved = len(PROMPTS) * (longest - 1)
        copies = 1 if strategy.reads_one_token else len(strategy.label_ids)
        assert sum(seen) - shared >= saved * copies
        assert not any(layer.rows for _, layer in svf_layers(model))

    @pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss", "mamba"])
    def test_other_models_answer_alike_on_a_shared_prefill(self, name: str) -> None:
        torch.manual_seed(0)
        base, (_, tokenizer) = tiny_model(name).eval(), nano.load("nano-s")
        base.resize_token_embeddings(len(tokenizer))
        named = {"gpt2": ["c_attn", "c_fc"], "mamba": ["in_proj"]}
        options: dict[str, Any] = {"target_modules": named.get(name, ["q_proj", "v_proj"])}
        options["layers_to_transform"] = [1]
        model = with_experts("words", "sums", model=base, **options).requires_grad_(False)
        strategy = ByPrompt(model, tokenizer, self.LABELS)
        answers, choices = strategy.answer(PROMPTS, **SETTINGS), strategy.choose(PROMPTS)
        for answer, choice in zip(answers, choices, strict=True):
            assert answer.choice.scores == pytest.approx(dict(choice.scores), abs=1e-4)
        mixtures = [answer.choice.mixture for answer in answers]
        texts = generate(model, tokenizer, PROMPTS, mixtures, **SETTINGS)
        assert [answer.text for answer in answers] == texts

    def test_beams_and_instructions_prefill_once_more(self) -> None:
        model, tokenizer = nano_with_experts(2)
        beams = ByPrompt(model, tokenizer, self.LABELS).answer(PROMPTS, num_beams=2, **SETTINGS)
        mixtures = [answer.choice.mixture for answer in beams]
        texts = generate(model, tokenizer, PROMPTS, mixtures, num_beams=2, **SETTINGS)
        assert [answer.text for answer in beams] == texts
        listed = PromptConfig(instruction="one of\n{labels}")
        assert not ByPrompt(model, tokenizer, self.LABELS, listed).shares_prefill
        assert not ByPrompt(*nano_with_experts(), self.LABELS).shares_prefill

    def test_a_short_batch_is_prefilled_twice(self) -> None:
        strategy = ByPrompt(*nano_with_experts(2), self.LABELS)
        with pytest.MonkeyPatch.context() as context:
            context.setattr(SharedPrefill, "of", lambda *_: pytest.fail("it was shared"))
            (answer,) = strategy.answer(PROMPTS[1:2], **SETTINGS)
        (choice,) = strategy.choose(PROMPTS[1:2])
        assert answer.choice == choice

    def test_an_expert_may_classify(self) -> None:
        model, tokenizer = nano_with_experts()
        plain = ByPrompt(model, tokenizer, {"words": "words"})
        config = PromptConfig(expert="sums")
        trained = ByPrompt(model, tokenizer, {"words": "words"}, config)
        assert "sums" not in trained.labels
        assert not np.allclose(
            plain.log_probabilities(PROMPTS), trained.log_probabilities(PROMPTS), atol=1e-3
        )

    def test_an_instruction_lists_the_labels(self) -> None:
        model, tokenizer = nano_with_experts()
        config = PromptConfig(instruction="one of\n{labels}")
        strategy = ByPrompt(model, tokenizer, self.LABELS, config)
        (asked,) = strategy._asked([[{"role": "user", "content": "17+4"}]])
        assert asked[0]["content"] == (
            "one of\n- sorting letters\n- adding numbers\n- something else\n\n17+4"
        )

    def test_labels_must_differ_and_name_experts(self) -> None:
        model, tokenizer = nano_with_experts()
        with pytest.raises(InvalidInput, match="must differ"):
            ByPrompt(model, tokenizer, {"words": "x", "sums": "x"})
        with pytest.raises(InvalidInput, match="no expert 'law'"):
            ByPrompt(model, tokenizer, {"law": "law"})


class TestFewShot:
    SHOTS = [Shot(q.prompt, q.answer) for q in questions("train", 4, ["sort", "add"])]
    QUICK = FewShotConfig(population=8, iterations=3, warm_start=2)

    @pytest.mark.parametrize("scope", ["global", "block", "layer"])
    def test_all_candidates_at_once_are_as_merging_each(self, scope: Any) -> None:
        model, tokenizer = nano_with_experts()
        config = FewShotConfig(scope=scope, blocks=2)
        layout = Layout.of(model, ("words", "sums"), config)
        assert layout.size == 2 * {"global": 1, "block": 2, "layer": 3}[scope]
        likelihood = likelihood_of(model, tokenizer, self.SHOTS, layout.names)
        candidates = np.random.default_rng(0).normal(0.5, 0.5, (5, layout.size))
        at_once = likelihoods(likelihood, layout)(candidates).values
        one_by_one = [merged(model, likelihood, layout, each) for each in candidates]
        assert np.allclose(at_once, one_by_one, atol=1e-5)
        assert np.ptp(at_once) > 0.01

    def test_a_search_is_better_than_base_experts_and_average(self) -> None:
        model, tokenizer = nano_with_experts()
        strategy = FewShot.fit(model, tokenizer, self.SHOTS, self.QUICK)
        layout = Layout.of(model, strategy.experts, self.QUICK)
        score = likelihoods(likelihood_of(model, tokenizer, self.SHOTS, layout.names), layout)
        known = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]
        assert strategy.result is not None
        penalty = self.QUICK.l1 * np.abs(strategy.result.best).sum()
        for each, value in zip(known, score(np.array(known)).values, strict=True):
            cost = self.QUICK.l1 * np.abs(each).sum()
            assert strategy.result.value - penalty >= value - cost - 1e-6
        assert strategy.adapt(["1+1", "2+2"]) == [strategy.mixture] * 2

    def test_rewards_count_and_likelihood_decides_between_equals(self) -> None:
        model, tokenizer = nano_with_experts()
        layout = Layout.of(model, ("words", "sums"), self.QUICK)
        likelihood = likelihood_of(model, tokenizer, self.SHOTS, layout.names)
        score = rewards(
            model, tokenizer, self.SHOTS, verifier("exact"), likelihood, layout, self.QUICK
        )
        candidates = np.array([[0.0, 0.0], [1.0, 0.0], [-20.0, 20.0]])
        scores = score(candidates)
        for row, mixture in enumerate(map(layout.mixture, candidates.tolist())):
            answers = generate(
                model, tokenizer, [s.prompt for s in self.SHOTS], [mixture] * len(self.SHOTS)
            )
            right = [a.strip() == s.answer for a, s in zip(answers, self.SHOTS, strict=True)]
            assert scores.values[row] == pytest.approx(np.mean(right))
        assert scores.tie_breaks is not None
        assert np.allclose(scores.tie_breaks, likelihoods(likelihood, layout)(candidates).values)
        found = FewShot.fit(model, tokenizer, self.SHOTS, self.QUICK, reward=verifier("exact"))
        assert found.result is not None and found.result.value >= scores.values.max()

    def test_a_shot_is_never_tested(self) -> None:
        model, tokenizer = nano_with_experts()
        test = ["something else", f" {self.SHOTS[1].prompt.upper()}  "]
        with pytest.raises(InvalidInput, match=r"1 of the 2 test prompts are shots too \(shot 2"):
            FewShot.fit(model, tokenizer, self.SHOTS, self.QUICK, test=test)
        check_split(self.SHOTS, ["something else"])

    def test_rows_are_split_with_their_copies_on_one_side(self) -> None:
        rows = [{"prompt": f"Question {i // 2}", "answer": str(i)} for i in range(20)]
        shots, test = split_shots(rows, 6)
        assert len(shots) == 6 and len(test) == 14
        check_split(shots_of(shots), [row["prompt"] for row in test])
        with pytest.raises(InvalidInput, match="leave none to test on"):
            split_shots(rows, 20)

    @pytest.mark.parametrize(
        ("row", "message"),
        [({"prompt": "a"}, "shot 0 has no 'answer'"), ({"prompt": "a", "answer": ""}, "empty")],
    )
    def test_shots_need_an_answer(self, row: Any, message: str) -> None:
        with pytest.raises(InvalidInput, match=message):
            shots_of([row])


class TestFolders:
    @pytest.mark.parametrize("mixture", [MIXTURES[2], {"words": [0.0, 1.0, -2.0]}])
    def test_a_saved_mixture_is_an_expert(self, mixture: Any, tmp_path: Path) -> None:
        model, tokenizer = nano_with_experts()
        save_mixture(model, mixture, tmp_path / "mixed")
        again = load_experts(nano.load("nano-s")[0], [tmp_path / "mixed"])
        texts = generate(again, tokenizer, PROMPTS, [{"mixed": 1.0}] * 4, **SETTINGS)
        assert texts == generate(model, tokenizer, PROMPTS, [mixture] * 4, **SETTINGS)
        assert set(model.peft_config) == {"words", "sums"}
        with pytest.raises(InvalidInput, match="exists already"):
            save_mixture(model, mixture, tmp_path / "mixed")
        with pytest.raises(InvalidInput, match="base itself"):
            save_mixture(model, {}, tmp_path / "other")

    def test_experts_of_different_bases_are_refused(self, tmp_path: Path) -> None:
        model, _ = nano_with_experts()
        model.save_pretrained(tmp_path / "small")
        with_experts("large", model=nano.load("nano-l")[0]).save_pretrained(tmp_path / "large")
        base = nano.load("nano-s")[0]
        kinds = [type(module) for module in base.modules()]
        with pytest.raises(WrongBase, match=r"large/large: the expert was trained on another base"):
            load_experts(base, [tmp_path / "small", tmp_path / "large"])
        assert [type(module) for module in base.modules()] == kinds
        loaded = load_experts(base, [tmp_path / "small"])
        assert set(loaded.peft_config) == {"words", "sums"}

    def test_what_is_no_expert_is_refused(self, tmp_path: Path) -> None:
        base = nano.load("nano-s")[0]
        with pytest.raises(InvalidInput, match="no expert here"):
            load_experts(base, [tmp_path])
        with pytest.raises(InvalidInput, match="there are no experts"):
            load_experts(base, [])

    def test_a_damaged_file_is_refused_before_the_base_is_touched(self, tmp_path: Path) -> None:
        model, _ = nano_with_experts()
        model.save_pretrained(tmp_path)
        (tmp_path / "words" / "adapter_model.safetensors").write_bytes(b"cut short")
        base = nano.load("nano-s")[0]
        kinds = [type(module) for module in base.modules()]
        with pytest.raises(CorruptFile, match="words.*truncated or damaged"):
            load_experts(base, [tmp_path])
        assert [type(module) for module in base.modules()] == kinds

    def test_an_expert_with_a_module_trained_as_a_whole_is_refused(self, tmp_path: Path) -> None:
        whole = with_experts("math", model=nano.load("nano-s")[0], modules_to_save=["lm_head"])
        whole.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModel, match="trained as a whole"):
            load_experts(nano.load("nano-s")[0], [tmp_path])


def merged(model: Any, likelihood: Any, layout: Layout, candidate: Any) -> float:
    """The likelihood of the shots with one candidate merged into the weights."""
    weights = layout.weights(torch.from_numpy(candidate[None]).float())
    model.base_model.add_weighted_adapter(list(layout.names), [0.0] * len(layout.names), "one")
    with torch.no_grad():
        for _, layer in svf_layers(model):
            at = weights if weights.dim() == 2 else weights[layer.layer_index]
            d = layer.changes()
            for k, name in enumerate(layout.names):
                d["one"] += at[0, k] * d[name]
    model.set_adapter("one")
    model.merge_adapter()
    value = float(likelihood().mean())
    model.unmerge_adapter()
    model.delete_adapter("one")
    model.requires_grad_(False)
    return value


def tokenizer_ids(tokenizer: Any, prompt: str) -> list[int]:
    from pliant.data import chat_ids

    return chat_ids([{"role": "user", "content": prompt}], tokenizer)
