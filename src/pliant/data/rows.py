"""Rows: read and written (JSONL, JSON, CSV, parquet, text, data sets of the hub), and split.

An error about a file names the line; an error about a column names the columns like it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import unicodedata
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pliant.data.formats import Row, standard
from pliant.errors import InvalidInput, did_you_mean
from pliant.files import replacing
from pliant.loading.hub import hub_answers

Columns = Sequence[str] | Mapping[str, str]
FORMATS = (".jsonl", ".json", ".csv", ".parquet")
TEXT_FILES = (".txt", ".text", ".md")


def read_rows(
    source: str | Path,
    columns: Columns = (),
    *,
    split: str | None = None,
    subset: str | None = None,
    limit: int | None = None,
) -> list[Row]:
    """The rows of a file (JSONL, JSON, CSV, text, each also .gz; parquet) or of a data set.

    A data set is a folder or a name on the hub, with its `split` and `subset` (also written
    `name:split`). A text file is one row, its `text`. Every row must have `columns`; a mapping of
    our name to the file's also renames them. Other columns stay as they are. CSV knows text only.
    ShareGPT's conversations become `messages`; `prompt` and `answer`, if they are asked for, are
    read from Alpaca's columns and from conversations, too.
    """
    path = Path(source).expanduser()
    kind = _format_of(path)
    if kind and path.is_file():
        if split or subset:
            raise InvalidInput(f"{path}: a file has no split or subset, only a data set has")
        rows = _numbered_rows(path, kind)
    elif kind:
        raise InvalidInput(f"{path}: there is no such file")
    elif path.is_file():
        names = ", ".join((*FORMATS, *TEXT_FILES))
        raise InvalidInput(f"{path}: its name has no known format: {names}")
    else:
        rows = _data_set(str(source), split, subset)
    return _select_columns(rows, str(source), columns, limit)


def read_prompts(
    source: str | Path,
    columns: Columns = ("prompt",),
    *,
    messages: str | None = None,
    limit: int | None = None,
) -> list[Row]:
    """The rows of `read_rows`; with `messages`, their prompts and answers are those of that column
    of conversations, whatever else the rows have."""
    if messages is None:
        return read_rows(source, columns, limit=limit)
    names = columns if isinstance(columns, Mapping) else {name: name for name in columns}
    asked = {"prompt", "answer"} & names.keys()
    rest = {ours: theirs for ours, theirs in names.items() if ours not in asked}
    rows = []
    for i, row in enumerate(read_rows(source, {**rest, "messages": messages}, limit=limit), 1):
        others = {name: value for name, value in row.items() if name not in asked}
        rows.append(standard(others, asked))
        if missing := asked - rows[-1].keys():
            why = "its last message is not the assistant's" if "answer" in missing else "it is none"
            raise InvalidInput(f"{source}, row {i}: no {min(missing)} in {messages!r}: {why}")
    return rows


def write_rows(
    path: str | Path, rows: Iterable[Mapping[str, Any]], *, private: bool = False
) -> int:
    """Write JSONL or CSV (either also .gz), completely or not at all; returns how many rows.

    A new file that is `private` is readable by its owner alone.
    """
    path = Path(path)
    kind = _format_of(path)
    if kind not in (".jsonl", ".csv"):
        raise InvalidInput(f"{path}: rows are written as .jsonl or .csv, either also .gz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(path, private=private) as file,
            _written_text(file, path.suffix == ".gz") as text,
        ):
            return _write_jsonl(text, rows) if kind == ".jsonl" else _write_csv(text, rows)
    except OSError as error:
        raise InvalidInput(f"{path}: cannot be written ({error.strerror or error})") from error


# --- reading -------------------------------------------------------------------------------------


def _read_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        raw: Any = gzip.open(path)  # noqa: SIM115 (closed with the wrapper around it)
        return io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _format_of(path: Path) -> str:
    """The format in a file's name, without .gz; empty if the name has none."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix.lower() if suffix.lower() in (*FORMATS, *TEXT_FILES) else ""


def _numbered_rows(path: Path, kind: str) -> Iterator[tuple[int, Row]]:
    """The rows of a file, each with its line number."""
    try:
        if kind == ".parquet":
            from pyarrow import parquet

            yield from enumerate(parquet.read_table(path).to_pylist(), 1)
        elif kind == ".csv":
            with _read_text(path) as text:
                yield from _csv_rows(text, path)
        elif kind in TEXT_FILES:
            with _read_text(path) as text:
                yield 1, {"text": text.read().replace("\r\n", "\n").replace("\r", "\n")}
        else:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                yield from json_lines(file, path)  # type: ignore[arg-type]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError) as error:
        raise InvalidInput(f"{path}: cannot be read ({error})") from error
    except ValueError as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{path}: not {kind} ({error})") from error


def json_lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, Row]]:
    for at, line in enumerate(file, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if at == 1 else line
        if at == 1 and line.lstrip().startswith(b"["):  # one JSON array instead of lines
            yield from _json_array(line + file.read(), path)
            return
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{path}, line {at}: not JSON ({error})") from error
        _refuse_half_characters(line, row, f"{path}, line {at}")
        if not isinstance(row, dict):
            raise InvalidInput(f"{path}, line {at}: expected an object, not {_short(row)}")
        yield at, row


def _json_array(content: bytes, path: Path) -> Iterator[tuple[int, Row]]:
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not JSON ({error})") from error
    for at, row in enumerate(rows, 1):
        _refuse_half_characters(content, row, f"{path}, entry {at}")
        if not isinstance(row, dict):
            raise InvalidInput(f"{path}, entry {at}: expected an object, not {_short(row)}")
        yield at, row


def _refuse_half_characters(content: bytes, row: Any, where: str) -> None:
    """A lone surrogate, which JSON can write as an escape, can neither be encoded as tokens nor
    written to a file."""
    if b"\\ud" not in content and b"\\uD" not in content:
        return
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidInput(f"{where}: contains half a character (a lone surrogate)") from None


def _csv_rows(file: IO[str], path: Path) -> Iterator[tuple[int, Row]]:
    limit = csv.field_size_limit(2**31 - 1)  # prompts are longer than the default allows
    try:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row or None in row.values():
                fields = len([x for x in row.values() if x is not None]) + len(row.get(None) or [])
                fields -= None in row
                raise InvalidInput(
                    f"{path}, line {reader.line_num}: {fields} fields, "
                    f"but the first line names {len(reader.fieldnames or [])}"
                )
            yield reader.line_num, row
    except csv.Error as error:
        at = reader.reader.line_num  # DictReader's own number is still the previous row's
        raise InvalidInput(f"{path}, line {at}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _data_set(name: str, split: str | None, subset: str | None) -> Iterator[tuple[int, Row]]:
    """The rows of a folder or a hub data set; `owner/name:split` names the split too."""
    if not split and ":" in name and not Path(name).exists():
        name, split = name.rsplit(":", 1)
    loaded = _load_data_set(name, subset)
    if not split and len(loaded) > 1:
        raise InvalidInput(f"{name}: say which split: {', '.join(loaded)}")
    if split and split not in loaded:
        raise InvalidInput(f"{name}: no split {split!r}{did_you_mean(split, loaded)}")
    yield from enumerate(loaded[split or next(iter(loaded))], 1)


def _load_data_set(name: str, subset: str | None) -> Mapping[str, Iterable[Row]]:
    """The splits of a data set by name."""
    folder = Path(name).expanduser()
    looks_local = name.count("/") > 1 or name.startswith((".", "/", "~")) or _format_of(folder)
    if looks_local and not folder.is_dir():
        raise InvalidInput(f"{name}: there is no such file or folder")
    import datasets

    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(folder)
            return saved if isinstance(saved, dict) else {"train": saved}
        with nullcontext() if folder.is_dir() else _offline_if_unreachable(name):
            loaded: Mapping[str, Iterable[Row]] = datasets.load_dataset(
                str(folder) if folder.is_dir() else name, subset
            )
            return loaded
    except Exception as error:  # its loaders raise errors of any kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, (LookupError, TypeError, AttributeError)):  # of no help to a user
            reason = "it holds no data that the datasets library can read"
        raise InvalidInput(f"{name}: the data set could not be read ({reason})") from error


@contextmanager
def _offline_if_unreachable(name: str) -> Iterator[None]:
    """Ask the hub once: for an unreachable data set, `datasets` tries six times, for 30 seconds."""
    import datasets
    from huggingface_hub import HfApi

    before = datasets.config.HF_HUB_OFFLINE
    if not hub_answers(lambda: HfApi().dataset_info(name, timeout=20)):
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _select_columns(
    rows: Iterable[tuple[int, Row]], source: str, columns: Columns, limit: int | None
) -> list[Row]:
    """The rows with the requested columns, under the requested names."""
    names = columns if isinstance(columns, Mapping) else {name: name for name in columns}
    renamed = {ours: theirs for ours, theirs in names.items() if ours != theirs}
    selected: list[Row] = []
    for at, row in rows:
        where = f"{source}, line {at}" if selected else source
        _check_columns(row, renamed.values(), where)
        rest = {name: x for name, x in row.items() if name not in set(renamed.values())}
        own = {ours: row[theirs] for ours, theirs in renamed.items()}
        selected.append(standard({**rest, **own}, names, f"{source}, line {at}"))
        _check_columns(selected[-1], names, where)
        if limit is not None and len(selected) >= limit:
            break
    if not selected:
        raise InvalidInput(f"{source}: holds no rows")
    return selected


def _check_columns(row: Row, needed: Iterable[str], where: str) -> None:
    for name in needed:
        if name not in row:
            raise InvalidInput(f"{where}: no column {name!r}{did_you_mean(name, row)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


# --- writing -------------------------------------------------------------------------------------


@contextmanager
def _written_text(file: IO[bytes], zipped: bool) -> Iterator[IO[str]]:
    """What writes text to a file, which stays open."""
    raw: Any = gzip.GzipFile(fileobj=file, mode="wb", filename="") if zipped else file
    text = io.TextIOWrapper(raw, encoding="utf-8", newline="")
    yield text
    text.detach()  # closed by the wrapper's end, the file could not be flushed to the disk
    if zipped:
        raw.close()


def _write_jsonl(file: IO[str], rows: Iterable[Mapping[str, Any]]) -> int:
    count = 0
    for row in rows:
        file.write(json.dumps(dict(row), ensure_ascii=False) + "\n")
        count += 1
    return count


def _write_csv(file: IO[str], rows: Iterable[Mapping[str, Any]]) -> int:
    table = [dict(row) for row in rows]
    writer = csv.DictWriter(file, list(dict.fromkeys(name for row in table for name in row)))
    writer.writeheader()
    writer.writerows(table)
    return len(table)


# --- splits, and the texts that they share -------------------------------------------------------


@dataclass(frozen=True)
class Duplicates:
    """Rows of the test set whose text, once `normalised`, is also in the training set."""

    pairs: tuple[tuple[int, int], ...]
    """(row of train, row of test); for each test row its first match."""
    of: int
    """How many rows the test set has."""

    @property
    def test_rows(self) -> tuple[int, ...]:
        return tuple(test for _, test in self.pairs)

    def __bool__(self) -> bool:
        return bool(self.pairs)

    def __str__(self) -> str:
        if not self.pairs:
            return f"none of the {self.of:,} test rows is in the training set"
        share = len(self.pairs) / self.of
        first = ", ".join(f"{test + 1} (= {train + 1})" for train, test in self.pairs[:3])
        more = ", ..." if len(self.pairs) > 3 else ""
        return (
            f"{len(self.pairs):,} of the {self.of:,} test rows ({share:.1%}) are in the training "
            f"set too: rows {first}{more}"
        )


def duplicates(train: Sequence[str], test: Sequence[str]) -> Duplicates:
    """The texts of `test` that are also in `train`, up to case, white space and Unicode forms."""
    first: dict[str, int] = {}
    for i, text in enumerate(train):
        first.setdefault(normalised(text), i)
    matches = ((first.get(normalised(text)), j) for j, text in enumerate(test))
    return Duplicates(tuple((i, j) for i, j in matches if i is not None), len(test))


def normalised(text: str) -> str:
    """The text in Unicode's NFKC form, case folded, each run of white space one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def splits(
    n: int, shares: Sequence[float], seed: int, keys: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """The rows 0..n-1 in random splits of these shares, each split sorted.

    Rows with the same key stay together; the sizes are then as near to the shares as the keys
    allow. Shares that sum to less than 1 leave rows out.
    """
    if not shares or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise InvalidInput(f"shares={tuple(shares)} must be positive and sum to at most 1")
    if keys is not None and len(keys) != n:
        raise InvalidInput(f"{len(keys)} keys for {n} rows")
    blocks: dict[Hashable, list[int]] = {}
    for i in range(n):
        blocks.setdefault(i if keys is None else keys[i], []).append(i)
    order = list(blocks.values())
    random.Random(seed).shuffle(order)
    wanted = [share * n for share in (*shares, max(0.0, 1 - sum(shares)))]
    parts: list[list[int]] = [[] for _ in wanted]
    for rows in order:
        side = max(range(len(wanted)), key=lambda s: wanted[s] - len(parts[s]))
        parts[side] += rows
    return [sorted(part) for part in parts[: len(shares)]]
