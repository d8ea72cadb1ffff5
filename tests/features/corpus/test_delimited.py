"""Manifests as programs of tables write them: marks, encodings, line ends, blanks, and columns that they add."""

import codecs

import pytest

from features.corpus.manifest import read_corpus
from features.corpus.validation import validate
from features.errors import CorpusError

HEADER = ("clip_id", "audio", "split", "mood")
TABLE = [HEADER, *((f"c{n}", f"é{n}.wav", split, f"{n}.5") for n, split in enumerate(("train", "val", "test")))]


def read(path, table=TABLE, delimiter=",", end="\n", encoding="utf-8", before=b""):
    path.write_bytes(before + "".join(delimiter.join(row) + end for row in table).encode(encoding))
    return read_corpus(str(path))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("encoding", "before"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-8", b"\n"),
    ],
)
def test_however_a_program_saves_a_table_it_is_the_same_corpus(tmp_path, delimiter, end, encoding, before):
    corpus = read(tmp_path / "a.csv", delimiter=delimiter, end=end, encoding=encoding, before=before)
    assert validate(corpus).digest == validate(read(tmp_path / "b.csv")).digest
    assert [clip.audio for clip in corpus.clips()] == ["é0.wav", "é1.wav", "é2.wav"]


@pytest.mark.parametrize(
    ("encoding", "message"), [("utf-16-le", r"a\.csv is no text in UTF-8"), ("latin-1", r"a\.csv .*; save it as UTF-8")]
)
def test_a_table_in_another_encoding_is_refused(tmp_path, encoding, message):
    with pytest.raises(CorpusError, match=message):
        read(tmp_path / "a.csv", encoding=encoding)


def test_blanks_around_a_columns_name_are_no_part_of_it(tmp_path):
    assert validate(read(tmp_path / "a.csv", delimiter=", ")).digest == validate(read(tmp_path / "b.csv")).digest
    with pytest.raises(CorpusError, match="the column 'mood' more than once"):
        read(tmp_path / "a.csv", [(*HEADER, " mood"), *((*row, "1") for row in TABLE[1:])])


@pytest.mark.parametrize("name", ["Unnamed: 0.1", "index", "level_0"])
@pytest.mark.parametrize("values", [("0", "1", "2"), ("7", "12", "3")])
def test_an_index_that_became_a_column_is_left_out_with_a_word(tmp_path, name, values):
    corpus = read(tmp_path / "a.csv", [(name, *HEADER), *((v, *row) for v, row in zip(values, TABLE[1:], strict=True))])
    kept = corpus.declare(None)
    assert kept.labels == ("mood",) and kept.notes == (f"column {name!r} is left out: it holds pandas' index",)


def test_an_index_that_a_task_names_or_that_has_gaps_stays(tmp_path):
    table = [("index", *HEADER), *((v, *row) for v, row in zip("987", TABLE[1:], strict=True))]
    assert "index" in read(tmp_path / "a.csv", table).declare("index:regression").labels
    table[1] = ("", *TABLE[1])
    assert "index" in read(tmp_path / "b.csv", table).declare(None).labels


@pytest.mark.parametrize("values", [("1", "1", "2"), ("a", "b", "c")])
def test_a_column_called_index_that_is_none_is_a_label(tmp_path, values):
    table = [(*HEADER, "index"), *((*row, v) for v, row in zip(values, TABLE[1:], strict=True))]
    assert read(tmp_path / "a.csv", table).declare(None).labels == ("mood", "index")


@pytest.mark.parametrize("names", [("Dog", "dog"), ("caf\u00e9", "cafe\u0301")])
def test_classes_that_look_alike_are_pointed_out(tmp_path, names):
    table = [(*HEADER[:3], "label"), *((*row[:3], names[n % 2]) for n, row in enumerate(TABLE[1:]))]
    report = validate(read(tmp_path / "a.csv", table))
    assert len(report.tasks[0].classes) == 2
    assert any(f"{names[0]!r} and {names[1]!r} are two classes" in note for note in report.notes)


def test_whole_numbers_that_are_too_large_are_no_fractions(tmp_path):
    table = [(*HEADER[:3], "label"), *((*row[:3], f"{2**63 + 4096 * n}.0") for n, row in enumerate(TABLE[1:]))]
    with pytest.raises(CorpusError, match=r"holds numbers that are too large \(9223372036854775808.0 in row 1\)"):
        validate(read(tmp_path / "a.csv", table), "label:classification")
