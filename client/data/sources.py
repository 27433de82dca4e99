"""Rows of a source, one dictionary each, with the place that messages name.

A file of JSON lines, `.json` (a list of objects), `.csv` or `.tsv` (with a header) or `.parquet`, a folder
that `datasets` saved (one split), or hub:NAME:SPLIT. Files and folders are read where they lie: no copy goes
into the cache that `datasets` keeps in the user's home. Nothing private is in a message: rows are named by
number.
"""

import csv
import importlib
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import huggingface_hub.constants

from fedmosaic.client.settings import DataSource, HubData
from fedmosaic.privacy.configuration import decode_text, parse_json
from fedmosaic.protos.errors import ConfigurationError

Row = tuple[str, object]
"""Where a row stands ("train.csv, line 3"), and what is there: columns by name if it is sound."""
IN_PYTHON: Final = "examples"
_LONGEST_CELL: Final = 1 << 27
_EXTRA: Final = "pip install 'fedmosaic[datasets]'"
_HUB_ERRORS: Final = (OSError, ValueError, LookupError, RuntimeError, TypeError)


def rows_of(source: DataSource | Iterable[Any], wanted: Iterable[str] | None = None) -> Iterator[Row]:
    """The rows of a source in order; ConfigurationError if unreadable."""
    if isinstance(source, HubData):
        return _dataset_rows(_from_hub(source), str(source), wanted)
    if not isinstance(source, Path):
        return _rows_in_python(source, wanted)
    if source.is_dir():
        return _dataset_rows(_from_folder(source), str(source), wanted)
    kinds = {".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    return kinds.get(source.suffix.lower(), _lines)(source)


def label_of(source: DataSource | Iterable[Any]) -> str:
    """A short name of a source, for messages."""
    if isinstance(source, Path):
        return source.name
    return str(source) if isinstance(source, HubData) else IN_PYTHON


def _text(path: Path) -> str:
    try:
        return decode_text(path.read_bytes())
    except (OSError, ValueError) as error:
        words = str(error)
        if isinstance(error, OSError):
            words = f"{error.strerror}; give a readable file of JSON lines, JSON, CSV or Parquet"
        raise ConfigurationError(f"cannot read the examples in {path}: {words}") from None


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                # Files of Windows that were laid end to end have a byte order mark in the middle, too.
                yield where, parse_json(line.removeprefix("\ufeff"))
            except ValueError as error:
                words = f"{where} is not JSON ({error}); write one JSON object per line"
                raise ConfigurationError(words) from None


def _json(path: Path) -> Iterator[Row]:
    try:
        content = parse_json(_text(path))
    except ValueError as error:
        raise ConfigurationError(
            f"{path} is not JSON ({error}); if every line is an object of its own, call it {path.stem}.jsonl"
        ) from None
    if not isinstance(content, list):
        raise ConfigurationError(f"{path} holds a {type(content).__name__}; write a list of objects")
    yield from ((f"{path}, row {number}", record) for number, record in enumerate(content, 1))


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_CELL)
    tab = path.suffix.lower() == ".tsv"
    reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter="\t" if tab else ",", strict=True)
    try:
        header = next(reader, [])
        if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
            raise ConfigurationError(
                f"{path} has one column, whose name holds a separator; save it with commas, or tabs as .tsv"
            )
        if len(set(header)) < len(header):
            raise ConfigurationError(f"{path} has two columns of one name; give each its own")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if cells and len(cells) != len(header):
                raise ConfigurationError(
                    f"{where} has {len(cells)} cells under {len(header)} columns; put texts that hold a "
                    "separator or a line break in double quotes"
                )
            if cells:
                yield where, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ConfigurationError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Row]:
    arrow = _library("pyarrow.parquet", "Parquet")
    try:
        with arrow.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", _plain(record)
    except (OSError, ValueError, TypeError) as error:
        words = f"cannot read the examples in {path}: {type(error).__name__}; give a whole Parquet file"
        raise ConfigurationError(words) from None


def _from_folder(path: Path) -> Any:
    library = _library("datasets", "a folder")
    if (path / "dataset_dict.json").is_file():
        splits = sorted(found.name for found in path.iterdir() if (found / "state.json").is_file())
        raise ConfigurationError(
            f"{path} holds the splits {', '.join(splits)}; name one of them, such as {path / splits[0]}"
            if splits
            else f"{path} names splits that are not there; save the data set again"
        )
    if not (path / "state.json").is_file():
        raise ConfigurationError(
            f"cannot read the examples in {path}: Is a directory, which `datasets` has not saved; name a file"
        )
    try:
        return library.load_from_disk(str(path))
    except (OSError, ValueError, TypeError, LookupError) as error:
        words = f"cannot read the examples in {path}: {type(error).__name__}; save the data set again"
        raise ConfigurationError(words) from None


def _from_hub(source: HubData) -> Any:
    library = _library("datasets", "a data set of a hub")
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    before, library.config.HF_HUB_OFFLINE = library.config.HF_HUB_OFFLINE, offline
    try:
        return library.load_dataset(source.name, source.subset, split=source.split)
    # Whatever the hub, the network and the readers of the files raise.
    except (*_HUB_ERRORS, library.exceptions.DatasetsError) as error:
        reason = "no hub is asked here" if offline else "the hub cannot be reached, has no such split, or"
        raise ConfigurationError(
            f"{source} cannot be loaded ({type(error).__name__}: {str(error)[:200]}): {reason} its copy in "
            "the cache is missing. Load it once where there is a network, or save it as a folder "
            "(save_to_disk) and name that"
        ) from None
    finally:
        library.config.HF_HUB_OFFLINE = before


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigurationError(
            f"{what} needs the library `datasets` ({_EXTRA}); JSON lines, JSON and CSV need nothing more"
        ) from None


def _dataset_rows(data: Any, label: str, wanted: Iterable[str] | None) -> Iterator[Row]:
    if wanted is not None and data.column_names is not None:
        # Pictures and sound in other columns would be decoded.
        data = data.select_columns([name for name in data.column_names if name in set(wanted)])
    classes = {name: f for name, f in (data.features or {}).items() if hasattr(f, "int2str")}
    for number, record in enumerate(data.with_format(None), 1):
        named = {
            name: classes[name].int2str(value) if name in classes and isinstance(value, int) else value
            for name, value in record.items()
        }
        yield f"{label}, row {number}", _plain(named)


def _rows_in_python(source: Iterable[Any], wanted: Iterable[str] | None) -> Iterator[Row]:
    if isinstance(source, str | bytes | Mapping):
        raise ConfigurationError(
            f"examples is a {type(source).__name__}; hand over a list of dictionaries or one split of a "
            "datasets.DatasetDict, and name files in the settings"
        )
    if hasattr(source, "with_format") and hasattr(source, "column_names"):
        yield from _dataset_rows(source, IN_PYTHON, wanted)
        return
    for number, record in enumerate(source, 1):
        yield f"{IN_PYTHON}, row {number}", _plain(record)


def _plain(record: object) -> object:
    """A row of typed columns: numbers are names where a name is due, which text formats have in quotes."""
    if not isinstance(record, Mapping):
        return record
    return {
        name: str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in record.items()
    }
