"""Rows come in whole or with the line of the fault named; a journal loses none to a kill."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.data import Journal, duplicates, normalised, read_rows, splits, write_rows
from pliant.errors import InvalidInput

ROWS = [
    {"prompt": "1 + 1?", "answer": "2"},
    {"prompt": 'say "hi",\n twice', "answer": "hi hi"},
    {"prompt": "ünïcode \N{PILE OF POO}", "answer": ""},
]


def test_pliant_data_needs_no_heavy_library() -> None:
    code = "import sys, pliant.data; print({'numpy', 'datasets', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    assert write_rows(tmp_path / "new" / name, ROWS) == 3
    assert read_rows(tmp_path / "new" / name) == ROWS
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_a_json_array_parquet_and_a_byte_order_mark(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    lines = "\n\n".join(map(json.dumps, ROWS))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    for name in ("a.json", "a.parquet", "a.jsonl"):
        assert read_rows(tmp_path / name) == ROWS


def test_a_folder_is_a_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    write_rows(folder / "train.jsonl", ROWS[:2])
    write_rows(folder / "test.jsonl", ROWS[2:])
    assert read_rows(folder, ["answer"], split="train") == ROWS[:2]
    assert read_rows(f"{folder}:test") == ROWS[2:]
    with pytest.raises(InvalidInput, match="say which split: train, test"):
        read_rows(folder)
    with pytest.raises(InvalidInput, match="did you mean 'train'"):
        read_rows(folder, split="trian")


def test_a_data_set_that_was_saved_is_read(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"a": whole, "b": whole.select([0])}).save_to_disk(tmp_path / "two")
    assert read_rows(tmp_path / "one") == ROWS
    assert read_rows(tmp_path / "two", split="b") == ROWS[:1]


def test_a_name_that_the_hub_does_not_answer_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    with pytest.raises(
        InvalidInput, match="no-such-owner/no-such-set: the data set could not be read"
    ):
        read_rows("no-such-owner/no-such-set:train")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_columns_are_taken_renamed_and_missed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_rows(path, ROWS)
    assert read_rows(path, {"question": "prompt"}, limit=1) == [
        {"question": "1 + 1?", "answer": "2"}
    ]
    with pytest.raises(InvalidInput, match=r"no column 'promt'; did you mean 'prompt'\?"):
        read_rows(path, ["promt"])
    with pytest.raises(InvalidInput, match="no column 'x'; there are prompt, answer"):
        read_rows(path, ["x"])


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": \n', "line 3: not JSON"),
        ("a.jsonl", '{"a": 1}\n[2]\n', r"line 2: expected an object, not \[2\]"),
        ("a.jsonl", '{"a": 1}\n{"b": 1}\n', "line 2: no column 'a'"),
        ("a.jsonl", "", "holds no rows"),
        ("a.json", "[1, 2]", "entry 1: expected an object"),
        ("a.json", "[{", "not JSON"),
        ("a.csv", "a,b\n1,2\n1\n", "line 3: 1 fields, but the first line names 2"),
        ("a.csv", "a,b\n1,2,3,4\n", "line 2: 4 fields, but the first line names 2"),
        ("a.csv", 'a,b\n1,"2', "line 2: not CSV"),
        ("a.csv", "a\n", "holds no rows"),
        ("a.parquet", "no parquet", "not .parquet|cannot be read"),
        ("a.dat", "text", "its name has no known format"),
        ("a.jsonl.gz", "not zipped", "cannot be read"),
    ],
)
def test_a_fault_is_named_with_its_line(
    tmp_path: Path, name: str, content: str, fault: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInput, match=fault) as caught:
        read_rows(tmp_path / name, ["a"])
    assert str(tmp_path / name) in str(caught.value)


def test_a_text_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first\n\nsecond\n")
    assert read_rows(path) == [{"text": "first\n\nsecond\n"}]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="not UTF-8 text"):
        read_rows(path)


def test_text_that_is_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a\n\xff\xfe\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff"}\n')
    for name in ("a.csv", "a.jsonl"):
        with pytest.raises(InvalidInput, match="UTF-8|utf-8"):
            read_rows(tmp_path / name)


def test_a_truncated_gz(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"a": "x" * 1000}).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(InvalidInput, match="cannot be read"):
        read_rows(tmp_path / "a.jsonl.gz")


def test_what_is_not_there_or_cannot_be_written(tmp_path: Path) -> None:
    for name in ("none.jsonl", "none/", "a/b/c", "none.csv:train"):
        with pytest.raises(InvalidInput, match="there is no such file"):
            read_rows(tmp_path / name)
    with pytest.raises(InvalidInput, match="a file has no split"):
        write_rows(tmp_path / "a.jsonl", ROWS)
        read_rows(tmp_path / "a.jsonl", split="train")
    with pytest.raises(InvalidInput, match="written as .jsonl or .csv"):
        write_rows(tmp_path / "a.txt", ROWS)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(TypeError):
        write_rows(tmp_path / "a.jsonl", [{"a": 1}, {"a": object()}])
    assert read_rows(tmp_path / "a.jsonl") == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# --- parts ---------------------------------------------------------------------------------------


def test_duplicates_are_found_by_what_a_reader_sees() -> None:
    train = ["What is 2+2?", "Other", "what  is\n2+2?"]
    full_width = "\N{FULLWIDTH LATIN CAPITAL LETTER W}hat is 2+2?"
    matches = duplicates(train, ["new", full_width, " OTHER ", "STRASSE"])
    assert matches.pairs == ((0, 1), (1, 2))
    assert matches.test_rows == (1, 2)
    assert "2 of the 4 test rows (50.0%)" in str(matches)
    assert not duplicates(train, ["new"])
    assert "none of the 1" in str(duplicates(train, ["new"]))
    assert normalised("Straße") == normalised("STRASSE")


@given(st.integers(1, 300), st.integers(0, 9), st.lists(st.floats(0.05, 0.3), min_size=1))
def test_splits_part_the_rows(n: int, seed: int, shares: list[float]) -> None:
    shares = shares[:3]
    parts = splits(n, shares, seed)
    together = [i for part in parts for i in part]
    assert len(set(together)) == len(together) and set(together) <= set(range(n))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - share * n) <= len(shares) + 1
    assert splits(n, shares, seed) == parts


@given(st.lists(st.sampled_from("abcdefgh"), min_size=8, max_size=80), st.integers(0, 9))
def test_splits_keep_keys_together(keys: list[str], seed: int) -> None:
    a, b = splits(len(keys), (0.5, 0.5), seed, keys)
    assert sorted(a + b) == list(range(len(keys)))
    assert not {keys[i] for i in a} & {keys[i] for i in b}


def test_splits_differ_by_seed_and_check_their_shares() -> None:
    assert splits(50, (0.5,), 0) != splits(50, (0.5,), 1)
    assert splits(50, (0.5,), 0)[0] != list(range(25))
    for bad in ((), (0.5, 0.6), (0.0, 0.5), (-0.1,)):
        with pytest.raises(InvalidInput, match="shares"):
            splits(10, bad, 0)
    with pytest.raises(InvalidInput, match="2 keys for 3 rows"):
        splits(3, (0.5,), 0, ["a", "b"])


# --- the journal ---------------------------------------------------------------------------------


def test_a_journal_takes_up_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "j.jsonl"
    with Journal(path, key="prompt") as journal:
        journal.add(ROWS[0])
    with Journal(path, key="prompt") as journal:
        assert ROWS[0]["prompt"] in journal and ROWS[1]["prompt"] not in journal
        journal.add(ROWS[1])
        journal.add({**ROWS[0], "answer": "two"})
        assert len(journal) == 2
        assert journal.rows() == [{**ROWS[0], "answer": "two"}, ROWS[1]]
    assert len(read_rows(path)) == 3


@pytest.mark.parametrize("torn", ['{"key": 2, "x', "{", '{"key": 2}garbage', "\x00\x00"])
def test_a_torn_last_line_is_dropped_with_a_notice(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"key": 1}\n' + torn)
    with (
        pytest.warns(UserWarning, match=rf"incomplete last line \({len(torn)} bytes"),
        Journal(path) as journal,
    ):
        assert len(journal) == 1
        journal.add({"key": 2})
    assert path.read_text() == '{"key": 1}\n{"key": 2}\n'


@given(st.lists(st.dictionaries(st.text(), st.text(), max_size=3), min_size=1), st.data())
def test_cut_anywhere_only_the_last_row_can_be_lost(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    with Journal(path, key="at") as journal:
        ends = []
        for at, row in enumerate(rows):
            journal.add({**row, "at": at})
            ends.append(path.stat().st_size)
    cut = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, cut)
    if cut in (0, *ends, *(end - 1 for end in ends)):  # nothing torn, or only the end of line
        journal = Journal(path, key="at")
    else:
        with pytest.warns(UserWarning, match="incomplete"):
            journal = Journal(path, key="at")
    assert len(journal) == sum(end - 1 <= cut for end in ends)
    journal.close()


def test_a_damaged_line_inside_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"key": 1}\n{"key": \n{"key": 3}\n')
    with pytest.raises(InvalidInput, match="line 2: not JSON"):
        Journal(path)
    path.write_text('{"key": 1}\n{"other": 2}\n')
    with pytest.raises(InvalidInput, match="line 2: no text or number under 'key'"):
        Journal(path)


def test_a_row_without_its_key_is_refused(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.jsonl") as journal, pytest.raises(InvalidInput, match="'key'"):
        journal.add({"prompt": "?"})


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "j.jsonl"),
        pytest.raises(InvalidInput, match="another process is writing it"),
    ):
        Journal(tmp_path / "j.jsonl")
    Journal(tmp_path / "j.jsonl").close()


def test_threads_may_share_it(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with Journal(tmp_path / "j.jsonl") as journal, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: journal.add({"key": i, "text": "x" * 3000}), range(400)))
    assert sorted(row["key"] for row in read_rows(tmp_path / "j.jsonl")) == list(range(400))


WRITER = """
import sys
from pliant.data import Journal
with Journal(sys.argv[1]) as journal:
    for key in range(10**6):
        if key in journal:
            continue
        journal.add({"key": key, "text": "x" * 5000})
        print(key, flush=True)
"""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_half_a_character_is_refused_where_it_is_read(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": "\U0001f600 \\ud800"}, {"prompt": [{"role": "\ud800"}]}]
    lines = [json.dumps(row) for row in rows]
    text = "\n".join(lines) if name == "rows.jsonl" else f"[{', '.join(lines)}]"
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInput, match=r"(line|entry) 2: contains half a character"):
        read_rows(tmp_path / name)


def test_a_killed_job_has_lost_no_row_that_it_reported(tmp_path: Path) -> None:
    """Twice in a row, at whatever point of a write the kill happens to come."""
    path = tmp_path / "j.jsonl"
    reported: list[int] = []
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WRITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            reported += [int(process.stdout.readline()) for _ in range(200)]
            process.send_signal(signal.SIGKILL)
            reported += [int(line) for line in process.stdout if line.endswith("\n")]
        assert process.returncode == -signal.SIGKILL
    assert reported == sorted(set(reported))  # the first kill may come between a row and its report
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last write may have been torn, or not
        journal = Journal(path)
    with journal:
        keys = {row["key"] for row in journal.rows()}
    assert set(reported) <= keys == set(range(len(keys)))
