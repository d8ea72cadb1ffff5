"""Manifests as text, in UTF-8 or UTF-16: columns apart by commas, semicolons, tabs or bars; known: names of ours."""

import codecs
from collections.abc import Collection, Iterator
from csv import Error as CsvError
from csv import Sniffer, reader

import pyarrow as pa
from pyarrow import csv
from pyarrow.fs import FileSystem

from features.errors import CorpusError

HEADER = 65_536  # bytes among which the first line ends
DELIMITERS = ",;\t|"


def csv_batches(filesystem: FileSystem, path: str, known: Collection[str]) -> Iterator[pa.RecordBatch]:
    """Every column as text: types guessed from the first block would turn 00123 into 123, and break off later."""
    reading, parse = _csv_layout(filesystem, path, known)
    with filesystem.open_input_stream(path) as stream, csv.open_csv(stream, reading, parse) as opened:
        names = opened.schema.names
    text = csv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    parse.newlines_in_values = True
    with filesystem.open_input_stream(path) as stream, csv.open_csv(stream, reading, parse, text) as opened:
        for batch in opened:
            yield batch.rename_columns([name.strip() for name in names])


def csv_header(filesystem: FileSystem, path: str, known: Collection[str]) -> list[str]:
    """The names of the columns, without blanks around them."""
    reading, parse = _csv_layout(filesystem, path, known)
    with filesystem.open_input_stream(path) as stream, csv.open_csv(stream, reading, parse) as opened:
        return [name.strip() for name in opened.schema.names]


def _csv_layout(filesystem: FileSystem, path: str, known: Collection[str]) -> tuple[csv.ReadOptions, csv.ParseOptions]:
    """How a csv is written: in UTF-8, or in UTF-16 with a mark; and what separates its columns.

    A comma where that gives a column that we know, else what Python's sniffer takes the header for.
    """
    with filesystem.open_input_stream(path) as stream:
        begin = stream.read(HEADER)
    encoding = "utf-16" if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    text = begin.decode(encoding, errors="replace").lstrip("\ufeff")
    header = next((line for line in text.splitlines() if line.strip()), "")
    if "\0" in header:
        raise CorpusError(f"{path} is no text in UTF-8; save it as such")
    return csv.ReadOptions(encoding=encoding), csv.ParseOptions(delimiter=_delimiter(header, known))


def _delimiter(header: str, known: Collection[str]) -> str:
    try:
        if any(name.strip() in known for name in next(reader([header]), ())):
            return ","
        return Sniffer().sniff(header, DELIMITERS).delimiter
    except CsvError:
        return ","
