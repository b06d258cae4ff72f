"""`pliant route label`: a killed job loses nothing, and what failed is asked again."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.processes import Program
from tests.routing.chat_server import chat_server

from pliant import nano
from pliant.cli import app
from pliant.data import Journal, read_rows
from pliant.loading import dtypes
from pliant.routing import Outcomes
from pliant.routing.backends import Answers, Settings
from pliant.routing.labels.label import JUDGE, journal_of, label_cost
from pliant.routing.router_file import ModelEntry

FAST = ("--max-new-tokens", "24")
BOTH = ("--model", "nano-s", "--model", "nano-l")


def questions(folder: Path, n: int) -> Path:
    path = folder / "questions.jsonl"
    rows = [
        {"prompt": q.prompt, "answer": q.answer, "group": q.family, "wording": q.wording}
        for q in nano.questions("dev", n, seed=1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def label(prompts: Path, out: Path, *options: str, json_: bool = False) -> int:
    extra = ("--json",) if json_ else ()
    return app.outcome(
        ["route", "label", "--prompts", str(prompts), "--out", str(out), *options, *extra]
    )


def far(server: Any, *options: str) -> list[str]:
    spec = f"far=openai:m@{server.url}"
    return ["--model", spec, "--cost", "tokens", "--tries", "1", "--concurrency", "1", *options]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- the nano models ------------------------------------------------------------------------------


def test_labels_say_who_is_right_and_at_what_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = questions(tmp_path, 60), tmp_path / "labels.jsonl"
    assert label(prompts, out, *BOTH, *FAST, json_=True) == 0
    said = json.loads(capsys.readouterr().out)
    asked, rows = read_rows(prompts), read_rows(out)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in asked]
    for row in rows:
        for name in ("nano-s", "nano-l"):
            assert row["right"][name] == float(row["answers"][name].strip() == row["answer"])
    outcomes = Outcomes.read(out)
    assert outcomes.models == ("nano-s", "nano-l") and outcomes.unit == "flops"
    assert outcomes.groups is not None and outcomes.wordings is not None
    assert outcomes.strong.mean() > outcomes.weak.mean()
    total = label_cost(out)
    for run in said["models"]:
        assert run["answered"] == run["new"] == 60 and run["failures"] == {}
        assert run["used"]["flops"] == pytest.approx(total[run["name"]].flops)
        column = outcomes.cost[:, outcomes.models.index(run["name"])]
        assert run["used"]["flops"] == pytest.approx(column.sum())


def test_the_last_lines_say_what_they_cost_and_how_many_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = questions(tmp_path, 9), tmp_path / "labels.jsonl"
    assert label(prompts, out, *BOTH, *FAST, "--cost", "tokens") == 0
    *_, labels, tokens, few = capsys.readouterr().out.splitlines()
    used = [used.of("tokens") for used in label_cost(out).values()]
    assert labels.endswith(f"they cost {sum(used):.0f} tokens") and "own tokenizer" in tokens
    assert few.startswith("`pliant route fit` needs 50 labels, so 41 more prompts")


def test_a_killed_job_goes_on_and_loses_no_finished_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = questions(tmp_path, 500), tmp_path / "labels.jsonl"
    line = ["route", "label", "--prompts", str(prompts), "--out", str(out), *BOTH, *FAST]
    journal = journal_of(out)
    with Program("pliant", *line, cwd=tmp_path) as running:
        while not journal.exists() or journal.read_bytes().count(b"answer of") < 50:
            assert running.process.is_alive(), "it ended before it could be killed"
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
        assert running.wait(timeout=60) == -signal.SIGKILL
    assert not out.exists()
    before = {line for line in journal.read_bytes().splitlines(keepends=True) if b"\n" in line}
    kept = sum(b"answer of" in line for line in before)
    assert 50 <= kept < 1000

    assert label(prompts, out, *BOTH, *FAST, json_=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert sum(run["new"] for run in said["models"]) == 1000 - kept - repeated(prompts) * 2
    assert before <= set(journal.read_bytes().splitlines(keepends=True))

    whole = tmp_path / "whole.jsonl"
    assert label(prompts, whole, *BOTH, *FAST) == 0
    assert [r["right"] for r in read_rows(out)] == [r["right"] for r in read_rows(whole)]
    assert [r["answers"] for r in read_rows(out)] == [r["answers"] for r in read_rows(whole)]


def repeated(prompts: Path) -> int:
    texts = [row["prompt"] for row in read_rows(prompts)]
    return len(texts) - len(set(texts))


def test_a_second_run_asks_nothing_and_another_model_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = questions(tmp_path, 20), tmp_path / "labels.jsonl"
    assert label(prompts, out, "--model", "nano-s", *FAST) == 0
    first = out.read_bytes()
    assert label(prompts, out, "--model", "nano-s", *FAST) == 0
    assert out.read_bytes() == first
    capsys.readouterr()
    assert label(prompts, out, *BOTH, *FAST, json_=True) == 0
    assert [run["new"] for run in json.loads(capsys.readouterr().out)["models"]] == [0, 20]


def test_other_settings_do_not_mix_with_answers_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = questions(tmp_path, 5), tmp_path / "labels.jsonl"
    assert label(prompts, out, "--model", "nano-s", *FAST) == 0
    before = journal_of(out).read_bytes()
    assert label(prompts, out, "--model", "nano-s", "--max-new-tokens", "9") == 2
    assert "max_new_tokens=24, not 9" in capsys.readouterr().err
    assert label(prompts, out, "--model", "nano-s=nano-l", *FAST) == 2
    assert "nano-l" in capsys.readouterr().err
    assert journal_of(out).read_bytes() == before


def test_settings_under_which_nothing_was_answered_bind_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = questions(tmp_path, 5), tmp_path / "labels.jsonl"
    with chat_server([500] * 5) as server:
        assert label(prompts, out, *far(server)) == 2
    assert not journal_of(out).exists() and not out.exists()
    (tmp_path / "folder").mkdir()  # a model that there is not
    assert label(prompts, out, "--model", f"a={tmp_path / 'folder'}", "--cost", "tokens") == 2
    assert not journal_of(out).exists()
    assert label(prompts, out, "--model", "nano-s", *FAST) == 0
    with chat_server([500] * 5) as server:
        assert label(prompts, out, *far(server, *FAST)) == 2
    assert label(prompts, out, "--model", "far=nano-l", *FAST) == 0
    capsys.readouterr()


def test_another_verifier_grades_the_same_answers_again(tmp_path: Path) -> None:
    prompts, out = questions(tmp_path, 30), tmp_path / "labels.jsonl"
    assert label(prompts, out, "--model", "nano-s", *FAST) == 0
    exact = [row["right"]["nano-s"] for row in read_rows(out)]
    grade = tmp_path / "grade.py"
    grade.write_text("def wrong(answer, reference):\n    return answer.strip() != reference\n")
    assert label(prompts, out, "--model", "nano-s", *FAST, "--verifier", f"{grade}:wrong") == 0
    assert [row["right"]["nano-s"] for row in read_rows(out)] == [1 - x for x in exact]


def test_samples_make_soft_labels(tmp_path: Path) -> None:
    prompts, out = questions(tmp_path, 30), tmp_path / "labels.jsonl"
    assert label(prompts, out, "--model", "nano-s", *FAST, "--samples", "4") == 0
    rows = read_rows(out)
    assert all(len(row["answers"]["nano-s"]) == 4 for row in rows)
    shares = {row["right"]["nano-s"] for row in rows}
    assert shares <= {0, 0.25, 0.5, 0.75, 1} and shares & {0.25, 0.5, 0.75}
    for row in rows:
        assert row["cost"]["nano-s"] == pytest.approx(row["used"]["nano-s"]["flops"] / 4)


# --- a server that fails --------------------------------------------------------------------------


def test_what_failed_is_reported_and_asked_again_by_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"p{i}", "answer": f"P{i}" if i else "?"} for i in range(6)]
    prompts, out = write(tmp_path / "prompts.jsonl", *rows), tmp_path / "labels.jsonl"
    with chat_server([None, 500, 429, None]) as server:
        assert label(prompts, out, *far(server)) == 0
        said = capsys.readouterr()
        assert "far: 1 x server error; the first: far: the server says 500" in said.err
        assert "far: 1 x busy" in said.err
        assert "2 prompts are without labels; run the same again" in said.err
        assert [row["prompt"] for row in read_rows(out)] == ["p0", "p3", "p4", "p5"]
        assert label(prompts, out, *far(server)) == 0
        assert len(server.bodies) == 8, "only the two that had failed"
        assert capsys.readouterr().err.count("without labels") == 0
    assert [row["right"]["far"] for row in read_rows(out)] == [0, 1, 1, 1, 1, 1]


def test_partial_labels_hold_the_grades_of_the_models_that_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = questions(tmp_path, 6), tmp_path / "labels.jsonl"
    options = [*BOTH[:2], *FAST]
    with chat_server([None, 500, *[None] * 4, 500]) as server:
        assert label(prompts, out, *far(server, *options)) == 0
        assert len(read_rows(out)) == 5
        assert label(prompts, out, *far(server, *options, "--partial")) == 0
        assert len(server.bodies) == 7
    assert "1 labels lack the grade of a model that failed" in capsys.readouterr().err
    rows, outcomes = read_rows(out), Outcomes.read(out)
    assert list(rows[1]["right"]) == list(rows[1]["cost"]) == ["nano-s"]
    assert outcomes.complete.tolist() == [True, False, True, True, True, True]
    assert label_cost(out)["far"].calls == 5 and label_cost(out)["nano-s"].calls == 6


def test_when_all_failed_the_exit_code_is_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write(tmp_path / "p.jsonl", *({"prompt": f"p{i}", "answer": "x"} for i in range(40)))
    out = tmp_path / "labels.jsonl"
    with chat_server([500] * 99) as server:
        assert label(prompts, out, *far(server)) == 2
        assert len(server.bodies) < 30, "a server that is dead is not asked forty times"
    said = capsys.readouterr().err
    assert "not asked" in said and "no prompt could be labelled" in said
    assert not out.exists()


def test_a_wrong_key_ends_at_once_and_stands_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    prompts = write(tmp_path / "p.jsonl", *({"prompt": f"p{i}", "answer": "x"} for i in range(40)))
    with chat_server(wants_key="sk-other") as server:
        options = far(server, "--api-key-env", "far=MY_KEY")
        assert label(prompts, tmp_path / "labels.jsonl", *options) == 2
        assert len(server.bodies) < 4
    with chat_server(wants_key="sk-very-secret") as server:  # nobody has answered: another may
        options = far(server, "--api-key-env", "MY_KEY")
        assert label(prompts, tmp_path / "labels.jsonl", *options) == 0
    printed = capsys.readouterr()
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "sk-very-secret" not in printed.out + printed.err + written


def test_a_judge_grades_once_and_its_verdicts_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The judge's model answers in capitals what it is asked: the last verdict counts."""
    rows = [{"prompt": f"p{i}", "answer": "x"} for i in range(3)]
    prompts, out = write(tmp_path / "p.jsonl", *rows), tmp_path / "labels.jsonl"
    template = ["verifier_option", "template={prompt}{answer} VERDICT: RIGHT"][1]
    with chat_server() as server:
        options = far(server, "--verifier", "judge", "--judge", f"judge=openai:j@{server.url}")
        options += ["--verifier-option", template]
        assert label(prompts, out, *options, json_=True) == 0
        assert len(server.bodies) == 6
        said = json.loads(capsys.readouterr().out)
        assert said["judging"]["calls"] == 3
        assert label(prompts, out, *options) == 0
        assert len(server.bodies) == 6
    assert [row["right"]["far"] for row in read_rows(out)] == [1, 1, 1]
    assert all(row["verifier"] == "judge" for row in read_rows(out))
    spent = label_cost(out)
    assert (spent["far"].calls, spent[JUDGE].calls) == (3, 3)
    assert spent[JUDGE].prompt_tokens == said["judging"]["prompt_tokens"] > 0


def test_a_verdict_that_two_rows_share_is_paid_for_once(tmp_path: Path) -> None:
    """Two models that say the same of one prompt, and the prompt twice: one verdict."""
    rows = [{"prompt": "p", "answer": "x"}] * 2
    prompts, out = write(tmp_path / "p.jsonl", *rows), tmp_path / "labels.jsonl"
    with chat_server() as server:
        judge = ["--verifier", "judge", "--judge", f"judge=openai:j@{server.url}"]
        judge += ["--verifier-option", "template={prompt}{answer} VERDICT: RIGHT"]
        prices = ["--price", "judge=1000,0", "--price", "far=0,1", "--price", "other=0,1"]
        options = far(server, "--model", f"other=openai:m@{server.url}", *judge, *prices)
        assert label(prompts, out, *options) == 0
    spent = label_cost(out)
    asked = len("p" + "P" + " VERDICT: RIGHT")
    assert spent[JUDGE].calls == 1 and spent[JUDGE].usd == pytest.approx(asked * 0.001)


def test_what_a_judge_was_asked_in_vain_is_paid_for_too(tmp_path: Path) -> None:
    """One of two answers gets no verdict, in two tries; the next run tries again, and gets one."""
    rows = [{"prompt": p, "answer": "x"} for p in ("right", "neither")]
    prompts, out = write(tmp_path / "p.jsonl", *rows), tmp_path / "labels.jsonl"
    script: list[Any] = [None, None]  # the two answers
    script += [judged("VERDICT: RIGHT"), judged("so so"), judged("well")]
    with chat_server(script) as server:
        judge = ["--verifier", "judge", "--judge", f"judge=openai:j@{server.url}"]
        judge += ["--verifier-option", "template={prompt}{answer}"]
        options = far(server, *judge)
        assert label(prompts, out, *options) == 0
        assert len(read_rows(out)) == 1 and len(server.bodies) == 5
        assert label_cost(out)[JUDGE].calls == 3
        server.script.append(judged("VERDICT: WRONG"))
        assert label(prompts, out, *options) == 0
    assert label_cost(out)[JUDGE].calls == 4
    assert [row["right"]["far"] for row in read_rows(out)] == [1, 0]


def judged(text: str) -> str:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 2}})


def test_a_router_asks_the_models_as_they_were_asked_for_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their addresses, prices and the names of their keys: nothing is given twice."""
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    rows = [{"prompt": "x" * (i % 90 + 1) + str(i), "answer": "X" * (i % 90 + 1) + str(i)}
            for i in range(220)]  # fmt: skip
    prompts, out = write(tmp_path / "p.jsonl", *rows), tmp_path / "labels.jsonl"
    router = str(tmp_path / "router")
    wrong: list[Any] = [judged("no")] * 40
    with chat_server(wrong) as small, chat_server(wants_key="sk-very-secret") as large:
        options = ["--model", f"small=openai:m@{small.url}", "--price", "small=1,2"]
        options += ["--model", f"large=openai:m@{large.url}", "--price", "large=10,20"]
        options += ["--api-key-env", "large=MY_KEY"]
        assert label(prompts, out, *options) == 0
        fitted = ["fit", "--labels", str(out), "--out", router, "--scorer", "length"]
        assert app.outcome(["route", *fitted, "--goal", "100 % of calls", "--force"]) == 0
        capsys.readouterr()
        assert app.outcome(["route", "ask", "--router", router, "--json", "hello"]) == 0
        reply = json.loads(capsys.readouterr().out)
    assert (reply["model"], reply["text"]) == ("large", "HELLO")
    assert reply["cost"] == pytest.approx((5 * 10 + 2 * 20) / 1e6)
    file = json.loads((tmp_path / "router" / "router.json").read_text())
    assert [model["price"] for model in file["models"]] == [[1, 2], [10, 20]]
    assert [model["key_env"] for model in file["models"]] == [None, "MY_KEY"]
    assert "sk-very-secret" not in json.dumps(file) + out.read_text()


def base_model(folder: Path) -> str:
    """The small nano model without its chat template, as base models have none."""
    model, tokenizer = nano.load("nano-s")
    model.save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_without_a_chat_template_is_asked_as_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A frame around the prompt, and an end of the answer; without them a warning says so."""
    base, prompts = base_model(tmp_path / "base"), tmp_path / "p.jsonl"
    write(prompts, *({"prompt": f"What is {i} + 2?", "answer": str(i + 2)} for i in (3, 5, 2)))
    bare, framed = tmp_path / "bare.jsonl", tmp_path / "framed.jsonl"
    assert label(prompts, bare, "--model", f"base={base}", *FAST) == 0
    assert "base has no chat template" in (said := capsys.readouterr().err)
    assert said.count("--template") == 1
    # This frame is what the chat template would have written.
    frame = ["--template", "<|user|>{prompt}<|assistant|>", "--stop", "4"]
    assert label(prompts, framed, "--model", f"base={base}", *frame, *FAST) == 0
    assert "chat template" not in capsys.readouterr().err
    rows = read_rows(framed)
    assert [row["right"]["base"] for row in rows] == [1.0, 1.0, 0.0], "4 is where answers end"
    assert rows[2]["answers"]["base"] == "" and rows[0]["answers"]["base"] == "5"
    assert rows[0]["reached"]["base"]["prompt_format"] == {"template": frame[1], "stop": ["4"]}
    assert label(prompts, framed, "--model", f"base={base}", *FAST) == 2
    assert "holds answers with template=" in capsys.readouterr().err
    entry = ModelEntry(name="base", cost=0.0, **rows[0]["reached"]["base"])
    ((_, answers),) = entry.open().ask(["What is 3 + 2?"], Settings(24))
    assert isinstance(answers, Answers) and answers.texts == ("5",) and not answers.truncated


def test_a_server_is_sent_the_system_message_and_the_stops(tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", {"prompt": "hello", "answer": "HELLO"})
    with chat_server() as server:
        options = far(server, "--system", "Be brief.", "--stop", "\\n", "--stop", "Q:")
        assert label(prompts, tmp_path / "labels.jsonl", *options) == 0
    (body,) = server.bodies
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert body["stop"] == ["\n", "Q:"]


def test_a_dtype_that_this_cpu_is_slow_in_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, however many models are loaded in it."""
    monkeypatch.setattr(dtypes, "slowdown_of", lambda dtype: 4.0)
    prompts = write(tmp_path / "p.jsonl", {"prompt": "What is 3 + 2?", "answer": "5"})
    for dtype, count in (("bfloat16", 1), ("float32", 0)):
        options = ["--model", "nano-s", "--model", "nano-l", "--dtype", dtype, *FAST]
        assert label(prompts, tmp_path / f"{dtype}.jsonl", *options) == 0
        message = "bfloat16 takes 4.0 times as long as float32 on this CPU: load it in float32"
        assert capsys.readouterr().err.count(message) == count


def test_money_is_counted_by_the_price(tmp_path: Path) -> None:
    prompts = write(tmp_path / "p.jsonl", {"prompt": "hello", "answer": "HELLO"})
    out = tmp_path / "labels.jsonl"
    with chat_server() as server:
        options = ["--model", f"far=openai:m@{server.url}", "--price", "far=1000,10000"]
        assert label(prompts, out, *options) == 0
    (row,) = read_rows(out)
    assert row["unit"] == "usd"
    assert row["cost"]["far"] == pytest.approx(5 * 0.001 + 2 * 0.01)


# --- what is asked --------------------------------------------------------------------------------


def test_messages_and_columns_of_the_users_own_are_kept(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    prompts = write(
        tmp_path / "p.jsonl", {"prompt": talk, "answer": "HELLO", "wording": 2, "mine": [1]}
    )
    with chat_server() as server:
        assert label(prompts, tmp_path / "labels.jsonl", *far(server)) == 0
        assert server.bodies[0]["messages"] == talk
    (row,) = read_rows(tmp_path / "labels.jsonl")
    assert row["messages"] == talk and row["mine"] == [1] and row["wording"] == 2
    assert row["prompt"] == "system: Be brief.\nuser: hello"


def test_prompts_come_from_a_named_column_of_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "HELLO"}]
    prompts = write(tmp_path / "p.jsonl", {"prompt": "not this", "chat": chat, "mine": 1})
    out, columns = tmp_path / "labels.jsonl", ("--messages-column", "chat")
    with chat_server() as server:
        assert label(prompts, out, *far(server), *columns) == 0
        asked = [{"role": "user", "content": "hello"}]
        assert server.bodies[0]["messages"] == asked
        (row,) = read_rows(out)
        assert row["messages"] == asked and row["right"] == {"far": 1} and row["mine"] == 1
        for place, more, said in (
            (out, ("--answer-column", "gold"), "--answer-column and --messages-column: give one"),
            (prompts, (), "it is the file of the prompts"),
        ):
            assert label(prompts, place, *far(server), *columns, *more) == 2
            assert said in capsys.readouterr().err


def test_a_prompt_that_is_none_and_one_without_a_reference_fail_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": p, "answer": a} for p, a in [("a", "A"), (None, "B"), ("c", None)]]
    prompts = write(tmp_path / "p.jsonl", *rows)
    with chat_server() as server:
        assert label(prompts, tmp_path / "labels.jsonl", *far(server)) == 0
    said = capsys.readouterr().err
    assert "1 x prompt refused" in said and "1 x not graded" in said
    assert len(read_rows(tmp_path / "labels.jsonl")) == 1


def test_the_same_prompt_is_asked_once(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": answer} for answer in ("A", "B")]
    prompts, out = write(tmp_path / "p.jsonl", *rows), tmp_path / "labels.jsonl"
    with chat_server() as server:
        assert label(prompts, out, *far(server)) == 0
        assert len(server.bodies) == 1
    assert [row["right"]["far"] for row in read_rows(out)] == [1, 0]
    assert label_cost(out)["far"].calls == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "nano-s", "--model", "nano-s"], "two models are called"),
        (["--model", "nano-x"], "nano-s"),
        (["--model", "nano-s", "--verifier", "exakt"], "did you mean 'exact'"),
        (["--model", "nano-s", "--verifier", "judge"], "--judge MODEL"),
        (["--model", "nano-s", "--judge", "nano-l"], "--verifier judge"),
        (["--model", "nano-s", "--verifier-option", "ignore-kase=true"], "ignore_case"),
        (["--model", "nano-s", "--answer-column", "anwser"], "did you mean 'answer'"),
        (["--model", "nano-s", "--price", "nano-l=1,2"], "no model 'nano-l'"),
        (["--model", "nano-s", "--price", "1,2"], "nano-s=1,2"),
        (["--model", "nano-s", "--cost", "usd"], "nano-s has no price"),
        (["--model", "nano-s", "--cost", "dollars"], "'usd', 'flops', 'tokens', 'ms'"),
        (["--model", "nano-s", "--model", "openai:m@http://127.0.0.1:1/v1"], "--cost tokens"),
        (["--model", "openai:m@http://127.0.0.1:1/v1", "--cost", "flops"], "not known"),
        (["--model", "nano-s", "--samples", "3", "--temperature", "0"], "temperature"),
        (["--model", "nano-s", "--out", "labels.csv"], ".jsonl"),
        (["--model", "nano-s", "--seed", "-5"], "seed=-5"),
        (["--model", "nano-s", "--dtype", "float23"], "'float32'"),
        (["--model", "nano-s", "--template", "Q: "], "needs {prompt}"),
        (["--model", "nano-s", "--seed", "9" * 30], "--seed: must be at most"),
    ],
    ids=lambda value: " ".join(value)[-60:] if isinstance(value, list) else "",
)
def test_a_wrong_option_is_one_line_before_anything_is_asked(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = questions(tmp_path, 3)
    assert label(prompts, tmp_path / "labels.jsonl", *options) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1 and said in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["questions.jsonl"]


def test_a_recipe_can_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions(tmp_path, 5)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "command: route label\nprompts: ./questions.jsonl\nmodel: [nano-s]\n"
        "out: labels.jsonl\nmax_new_tokens: 24\n"
    )
    monkeypatch.chdir("/")
    assert app.outcome(["run", str(recipe)]) == 0
    assert len(read_rows(tmp_path / "labels.jsonl")) == 5


def test_two_jobs_do_not_write_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = questions(tmp_path, 3), tmp_path / "labels.jsonl"
    with Journal(journal_of(out)):
        assert label(prompts, out, "--model", "nano-s") == 2
    assert "another process is writing it" in capsys.readouterr().err
    assert os.path.getsize(journal_of(out)) == 0


# --- nothing is lost, and nothing is everybody's --------------------------------------------------

LABELS = {"prompt": "p", "right": {}, "cost": {}, "unit": "ms", "answers": {}}
FOREIGN = {
    "the prompts": ("questions.jsonl", None, "is the file of the prompts"),
    "a link to them": ("link.jsonl", "link", "is the file of the prompts"),
    "prompts as answers": ("q.jsonl", "q.answers.jsonl", "is the file of the prompts"),
    "other rows": ("labels.jsonl", '{"prompt": "p", "right": 1}\n', "something else than labels"),
    "a text": ("labels.jsonl", "my notes", "something else than labels"),
    "labels alone": ("labels.jsonl", json.dumps(LABELS), "whose answers are not beside it"),
    "other answers": ("labels.answers.jsonl", '{"key": "mine"}\n{"key": "ours', "something else"),
    "one line": ("labels.answers.jsonl", '{"key": "mine"}', "something else"),
    "half a line": ("labels.answers.jsonl", "{", None),
    "text as answers": ("labels.answers.jsonl", "my notes", "something else"),
}


@pytest.mark.filterwarnings("ignore:.*dropped the incomplete last line")
@pytest.mark.parametrize("case", FOREIGN)
def test_no_other_file_is_touched(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = write(tmp_path / "questions.jsonl", {"prompt": "what is 1+1", "answer": "2"})
    name, content, complaint = FOREIGN[case]
    if content == "link":
        (tmp_path / name).symlink_to(prompts)
    elif content == "q.answers.jsonl":
        prompts = prompts.rename(tmp_path / content)
    elif content is not None:
        (tmp_path / name).write_text(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    out = tmp_path / name.replace(".answers", "")
    status = label(prompts, out, "--model", "nano-s", *FAST)
    if complaint is None:  # the rest of a journal that was killed as it began
        assert status == 0
        return
    assert status == 2 and complaint in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_labels_and_answers_are_their_owners(tmp_path: Path) -> None:
    prompts, out = questions(tmp_path, 2), tmp_path / "labels.jsonl"
    assert label(prompts, out, "--model", "nano-s", *FAST) == 0
    for path in (out, journal_of(out)):
        assert path.stat().st_mode & 0o777 == 0o600


def test_what_a_server_breaks_ends_no_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"p{i}", "answer": f"P{i}"} for i in range(5)]
    prompts, out = write(tmp_path / "p.jsonl", *rows), tmp_path / "labels.jsonl"
    surrogate = '{"choices": [{"message": {"content": "\\ud83d"}}]}'
    infinite = '{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": Infinity}}'
    with chat_server([surrogate, "[" * 100_000, infinite]) as server:
        assert label(prompts, out, *far(server)) == 0
    assert len(read_rows(out)) == 2 and "3 x broken reply" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "key", "complaint"),
    [
        ("MY_KEY", "sk-very\nsecret", "MY_KEY holds no API key"),
        ("MY_KEY", "sk-véry-secret", "MY_KEY holds no API key"),
        ("MY_KEY", "", "is not set, or empty"),
        ("sk-very-secret", "", "is it the key itself"),
        ("sk_very_secret", "", "is not set, or empty"),
        ("fur=sk-very-secret", "", "no model 'fur'"),
    ],
)
def test_a_key_that_is_none_is_refused_unseen(
    variable: str,
    key: str,
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", key)
    prompts = write(tmp_path / "p.jsonl", {"prompt": "a", "answer": "A"})
    with chat_server() as server:
        options = far(server, "--api-key-env", variable)
        assert label(prompts, tmp_path / "labels.jsonl", *options) == 2
        assert not server.bodies
    printed = capsys.readouterr().err
    assert complaint in printed and "secret" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("answers", 7), ("answers", []), ("answers", [None]), ("used", "x"), ("cut", "1")],
)
def test_answers_that_somebody_has_edited_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str, value: Any
) -> None:
    prompts = write(tmp_path / "questions.jsonl", {"prompt": "2+2", "answer": "4"})
    with chat_server() as server:
        asked = far(server)
        assert label(prompts, tmp_path / "labels.jsonl", *asked) == 0
        journal = journal_of(tmp_path / "labels.jsonl")
        rows = [json.loads(line) for line in journal.read_text().splitlines()]
        rows[-1][field] = value
        write(journal, *rows)
        before = journal.read_bytes()
        capsys.readouterr()
        assert label(prompts, tmp_path / "labels.jsonl", *asked) == 2
    complained = capsys.readouterr().err
    assert f"{journal}, 'answer of far to " in complained and "bug" not in complained
    assert journal.read_bytes() == before
