"""The program: both models come out whole, a stop costs little, and a wrong call costs nothing."""

import signal

import pytest
import torch
from tests.processes import Program

from pliant.loading import load
from pliant.nano import NAMES
from pliant.nano.train.__main__ import main
from pliant.nano.train.trainer import Trainer


@pytest.fixture(autouse=True)
def _small_pools(monkeypatch):
    monkeypatch.setattr("pliant.nano.train.trainer._POOL", 512)


def shortest(folder, *more: str) -> list[str]:
    """Two steps for nano-s, six for nano-l."""
    where = ["--out", str(folder / "out"), "--work", str(folder / "work")]
    return ["--shorter", "2000", "--every", "2", "--device", "cpu", *where, *more]


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the program makes when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pliant.nano.train.trainer._POOL", 512)
        main(shortest(folder))
    return folder


def test_both_models_come_out_as_stock_checkpoints(trained):
    small, _ = load(trained / "out" / "nano-s")
    large, tokenizer = load(trained / "out" / "nano-l")
    assert small.dtype == large.dtype == torch.float32
    assert large.num_parameters() >= 4 * small.num_parameters()
    assert type(tokenizer).__name__ in ("PreTrainedTokenizerFast", "TokenizersBackend")
    assert sorted(p.name for p in (trained / "out").iterdir()) == sorted(NAMES)
    modes = {p.stat().st_mode for p in (trained / "out").rglob("*.*") if p.is_file()}
    assert len(modes) == 1, "all may be read by the same people"


def test_what_is_done_is_exported_again_and_not_trained_again(trained, capsys, monkeypatch):
    before = files(trained)
    (trained / "out" / "nano-l" / "config.json").unlink()  # as a kill while exporting may leave it
    monkeypatch.setattr(Trainer, "steps", None)
    main(shortest(trained))
    said = capsys.readouterr()
    assert "nano-l" in said.out and said.err == ""
    assert files(trained) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_stopped_ends_with_the_same_weights(
    trained, tmp_path, monkeypatch, capsys, name
):
    def stop(self, batch):
        if self.step == self.schedule.steps - 1:
            raise KeyboardInterrupt
        return learn(self, batch)

    learn = Trainer._train_step
    if name == "nano-l":
        main(shortest(tmp_path, "--only", "nano-s"))
    monkeypatch.setattr(Trainer, "_train_step", stop)
    with pytest.raises(SystemExit) as end:
        main(shortest(tmp_path))
    assert end.value.code == 130
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("error: interrupted; the same command")
    )
    monkeypatch.setattr(Trainer, "_train_step", learn)
    main(shortest(tmp_path))
    assert files(tmp_path / "out") == files(trained / "out")


@pytest.mark.parametrize("moment", ["_edit", "_put"])
def test_a_stop_while_exporting_leaves_no_half_model_and_is_mended(
    trained, tmp_path, monkeypatch, moment
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"pliant.nano.train.__main__.{moment}", stop)
        with pytest.raises(SystemExit):
            main(shortest(tmp_path, "--only", "nano-s"))
    assert not list((tmp_path / "out").glob("*/config.json")), "what a name is looked up by"
    main(shortest(tmp_path, "--only", "nano-s"))
    assert files(tmp_path / "out" / "nano-s") == files(trained / "out" / "nano-s")


def test_in_a_pipe_progress_is_plain_lines_on_stderr(tmp_path, capsys):
    main(shortest(tmp_path, "--only", "nano-s"))
    said = capsys.readouterr()
    assert said.out == f"nano-s: {tmp_path / 'out' / 'nano-s'}\n"
    assert said.err.startswith("nano-s: 0/2 steps are done\nnano-s: 2/2 loss ")
    assert "\x1b" not in said.err and "\r" not in said.err


def test_new_weights_leave_no_card_of_old_ones(tmp_path):
    folder = tmp_path / "out" / "nano-s"
    folder.mkdir(parents=True)
    for name in ("README.md", "accuracy.json", "notes.txt"):
        (folder / name).write_text(name)
    main(shortest(tmp_path, "--only", "nano-s"))
    assert (folder / "notes.txt").exists()
    assert not (folder / "README.md").exists() and not (folder / "accuracy.json").exists()
    (folder / "README.md").write_text("measured")
    main(shortest(tmp_path, "--only", "nano-s"))  # the same weights again: what is true stays
    assert (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shorter", "0"], "shorter is 0.0"),
        (["--shorter", "nan"], "--shorter: must be a finite number"),
        (["--shorter", "half"], "--shorter"),
        (["--every", "0"], "every is 0"),
        (["--threads", "-1"], "threads is -1"),
        (["--device", "abacus"], "abacus"),
        (["--only", "nano-m"], "nano-m"),
        (["--only", "nano-l"], "nano-l grows from nano-s"),
        (["--work", "{file}/inside"], "{file}"),
        (["--out", "{file}"], "{file}"),
        (["--fast"], "--fast"),
    ],
)
def test_a_wrong_call_costs_one_line_and_no_training(tmp_path, capsys, arguments, said):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as end:
        main(shortest(tmp_path, *(word.format(file=file) for word in arguments)))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said.format(file=file) in line
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_trial_run_is_not_taken_for_the_real_one(trained, capsys):
    """The same --work with other steps: nothing is exported, and the trial's state stays."""
    before = files(trained)
    with pytest.raises(SystemExit) as end:
        main([*shortest(trained), "--shorter", "1000"])
    assert end.value.code == 2 and "steps was 2 and is 5" in capsys.readouterr().err
    assert files(trained) == before


def test_a_killed_run_ends_with_the_same_weights(trained, tmp_path, root):
    """The real program in a process of its own, killed in the middle of the second model."""
    with Program(
        "tests.nano.small_pools", *shortest(tmp_path, "--every", "1"), cwd=root
    ) as running:
        for line in running.stderr:
            if line.startswith("nano-l: 2/6"):
                running.send_signal(signal.SIGKILL)
                break
        assert running.wait(timeout=60) == -signal.SIGKILL
    main(shortest(tmp_path))
    assert files(tmp_path / "out") == files(trained / "out")
