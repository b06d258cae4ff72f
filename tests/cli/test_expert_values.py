"""`pliant expert list | show | merge | export-lora`, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.experts.models import with_experts
from tests.minimal_adapter import tiny_llama

from pliant.cli import app
from pliant.experts.expert import Expert
from pliant.loading import load


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of nano-s, and one of another base."""
    folder = tmp_path_factory.mktemp("experts")
    model = with_experts("math", "code", model=load("nano-s")[0], parts="mlp", rank=8)
    for name in ("math", "code"):
        Expert.of(model, name).save(folder / name)
    Expert.of(with_experts("other", model=tiny_llama().eval()), "other").save(folder / "other")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command printed."""
    code = app.outcome([str(word) for word in ("expert", *arguments)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line of a command that ends with exit code 2."""
    code = app.outcome([str(word) for word in ("expert", *arguments)])
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.count("error: ") == 1, (code, out, err)
    return err


class TestList:
    def test_a_line_for_each(self, experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = run(capsys, "list", experts)
        line = next(line for line in text.splitlines() if line.startswith("math"))
        assert line.split()[:2] == ["math", "nano-s"]
        assert " 72 " in line and " 8 " in line and " 0-2 " in line
        assert line.endswith("down_proj, gate_proj, up_proj")
        assert "LlamaForCausalLM" in text

    def test_as_json(self, experts: Path, capsys: pytest.CaptureFixture[str]) -> None:
        content = json.loads(run(capsys, "list", experts, "--json"))
        by_name = {row["name"]: row for row in content["experts"]}
        assert list(by_name) == ["code", "math", "other"]
        math = Expert.load(experts / "math")
        assert by_name["math"]["norm"] == pytest.approx(math.norm())
        assert by_name["math"]["bytes"] == (
            (experts / "math" / "adapter_model.safetensors").stat().st_size
        )
        alone = json.loads(run(capsys, "list", experts / "math", "--json"))
        assert [row["name"] for row in alone["experts"]] == ["math"]

    def test_broken_experts_are_named_beside_the_others(
        self, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Expert.load(experts / "math").save(tmp_path / "good")
        Expert.load(experts / "math").save(tmp_path / "bad")
        (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"x")
        for name, config in {"deep": "[" * 100_000, "list": "[]"}.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "adapter_config.json").write_text(config)
        (tmp_path / "lora").mkdir()
        (tmp_path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        content = json.loads(run(capsys, "list", tmp_path, "--json"))
        assert [row["name"] for row in content["experts"]] == ["good"]
        bad, deep, empty = content["unreadable"]
        assert "bad" in bad and "damaged" in bad
        assert "deep" in deep and "list" in empty
        assert "bad" in run(capsys, "list", tmp_path)

    def test_nothing_to_list(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "holds no expert" in refused(capsys, "list", tmp_path)
        assert "no such folder" in refused(capsys, "list", tmp_path / "nowhere")


class TestShow:
    def test_a_table_by_layer_and_projection(
        self, experts: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        text = run(capsys, "show", experts / "math")
        head, *rows = text.splitlines()[1:5]
        assert head.split() == ["layer", "mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
        assert [row.split()[0] for row in rows] == ["0", "1", "2"]
        d = Expert.load(experts / "math").changes["model.layers.1.mlp.up_proj"]
        assert rows[1].split()[3] == f"{float(d.square().mean().sqrt()):.3g}"

    def test_where_two_differ(
        self, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        picture = tmp_path / "pictures" / "differences.html"
        math, code = experts / "math", experts / "code"
        text = run(capsys, "show", math, "--with", code, "--heatmap", picture)
        assert "math and code differ by" in text
        page = picture.read_text()
        assert "where they differ" in page and "<svg" in page and "projection" in page
        assert not [p for p in picture.parent.iterdir() if p != picture]
        content = json.loads(run(capsys, "show", math, "--with", code, "--json"))
        own, other = Expert.load(math), Expert.load(code)
        assert content["distance"] == pytest.approx(own.distance(other))
        assert content["cosine"] == pytest.approx(own.cosine(other))

    def test_relative_to_the_weights_of_a_base(
        self, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        picture = tmp_path / "math.svg"
        text = run(capsys, "show", experts / "math", "--base", "nano-s", "--heatmap", picture)
        assert "relative to the weight" in text and "%" in text.splitlines()[2]
        assert picture.read_text().lstrip().startswith("<?xml")

    def test_refusals(
        self, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        math = experts / "math"
        assert "no such folder" in refused(capsys, "show", "nowhere")
        assert "different bases" in refused(capsys, "show", math, "--with", experts / "other")
        png = tmp_path / "map.png"
        assert ".html or .svg" in refused(capsys, "show", math, "--heatmap", png)
        assert "another base" in refused(capsys, "show", math, "--base", "nano-l")
        assert not list(tmp_path.iterdir())


class TestLeaving:
    def test_merge(self, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "merged"
        text = run(capsys, "merge", experts / "math", "--base", "nano-s", "--out", out)
        assert "a stock LlamaForCausalLM" in text
        merged, tokenizer = load(out)
        assert tokenizer.chat_template
        live = Expert.load(experts / "math").apply(load("nano-s")[0])
        ids = torch.arange(12)[None] + 5
        with torch.no_grad():
            assert torch.allclose(merged(ids).logits, live(ids).logits, atol=1e-4)

    def test_export_lora(
        self, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "lora"
        text = run(capsys, "export_lora", experts / "math", "--budget", 3000, "--out", out)
        assert "weight" in text.splitlines()[1] and "of the energy" in text
        assert (out / "adapter_config.json").is_file()
        content = json.loads(
            run(
                capsys,
                "export-lora",
                experts / "math",
                "--rank",
                8,
                "--out",
                tmp_path / "x",
                "--json",
            )
        )
        assert content["energy"] == pytest.approx(1) and content["logit_difference"] < 1e-4

    @pytest.mark.parametrize("command", ["merge", "export-lora"])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{math}"], "give --out"),
            (["nowhere", "--out", "{out}"], "no such folder"),
            (["{other}", "--out", "{out}"], "does not say what its base is"),
            (["{math}", "--base", "nano-l", "--out", "{out}"], "another base"),
            (["{math}", "--base", "./nowhere", "--out", "{out}"], "no such folder"),
            (["{math}", "--out", "{math}"], "exists already"),
            (["{math}", "--device", "abacus", "--out", "{out}"], "cannot be used"),
        ],
        ids=["out", "expert", "nameless", "other-base", "no-base", "full", "device"],
    )
    def test_refusals(
        self,
        command: str,
        arguments: list[str],
        message: str,
        experts: Path,
        tmp_path: Path,
        tmp_path_factory: pytest.TempPathFactory,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        # Without the notes of where bases are: another test's may be the nameless one.
        monkeypatch.setenv("PLIANT_BASES", str(tmp_path_factory.mktemp("bases")))
        places = {"math": experts / "math", "other": experts / "other", "out": tmp_path / "out"}
        filled = [word.format(**places) for word in arguments]
        size = ["--rank", "2"] if command == "export-lora" else []
        assert message in refused(capsys, command, *filled, *size)
        assert not list(tmp_path.iterdir())

    def test_a_size_is_needed(
        self, experts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        lora = ["export-lora", experts / "math", "--out", tmp_path / "x"]
        assert "give --rank" in refused(capsys, *lora)
        assert "give --rank" in refused(capsys, *lora, "--rank", 2, "--budget", 100)
        assert "budget = 5: one rank" in refused(capsys, *lora, "--budget", 5)
        assert "shard size" in refused(
            capsys, "merge", experts / "math", "--out", tmp_path / "x", "--shard-size", "big"
        )
        assert not list(tmp_path.iterdir())
