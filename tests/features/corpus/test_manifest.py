"""A manifest of any kind is the same corpus, and what is wrong with one is said in a line that helps."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from features.corpus.manifest import Clip, is_text_file, parse_tasks, read_corpus
from features.corpus.tasks import Task
from features.corpus.validation import validate
from features.errors import CorpusError

GRID = Path(__file__).parents[3].parent / "shared/data/grid/corpus.csv"

ROWS = {
    "clip_id": ["00123", "b", "c", "d"],
    "video": ["clips/1.mp4", None, "clips/3.mp4", "s3://bucket/4.mp4"],
    "audio": [None, "clips/2.wav", None, None],
    "start": [0.5, None, None, 2.0],
    "end": [1.5, None, 3.0, None],
    "group": ["7", "8", "9", "7"],
    "split": ["train", "val", "test", "train"],
    "color": ["red", "blue", None, "red"],
    "digit": [10, 9, 2, None],
    "mood": [0.5, -1.0, None, 2.0],
}


def write(path, **changes):
    table = pa.table({k: v for k, v in {**ROWS, **changes}.items() if v is not None})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        pyarrow.csv.write_csv(table, path)
    return str(path)


@pytest.fixture(params=["corpus.csv", "corpus.parquet"])
def manifest(request, tmp_path):
    return tmp_path / request.param


def test_a_clip_keeps_the_manifests_own_text(manifest):
    corpus = read_corpus(write(manifest))
    first, second, _, last = corpus.clips()
    assert first == Clip(
        "00123",
        "clips/1.mp4",
        None,
        None,
        None,
        0.5,
        1.5,
        "train",
        None,
        "7",
        {"color": "red", "digit": 10, "mood": 0.5},
    )
    assert first.media(corpus.folder) == {"video": str(manifest.parent / "clips/1.mp4")}
    assert second.media(corpus.folder) == {"audio": str(manifest.parent / "clips/2.wav")}
    assert last.media(corpus.folder) == {"video": "s3://bucket/4.mp4"}
    assert corpus.labels == ("color", "digit", "mood")


def test_csv_and_parquet_of_the_same_rows_are_the_same_corpus(tmp_path):
    csv = read_corpus(write(tmp_path / "corpus.csv"))
    parquet = read_corpus(write(tmp_path / "corpus.parquet"))
    (tmp_path / "corpus.csv.gz").write_bytes(gzip.compress((tmp_path / "corpus.csv").read_bytes()))
    assert list(csv.clips()) == list(parquet.clips()) == list(read_corpus(str(tmp_path / "corpus.csv.gz")).clips())
    assert validate(csv) == validate(parquet)


def test_an_empty_text_is_missing_in_csv_and_parquet_alike(tmp_path):
    corpora = [
        read_corpus(write(tmp_path / f"corpus.{kind}", color=["red", "", "blue", "red"])) for kind in ("csv", "parquet")
    ]
    for corpus in corpora:
        assert [clip.labels["color"] for clip in corpus.clips()] == ["red", None, "blue", "red"]
    first, second = (validate(corpus) for corpus in corpora)
    assert first == second and first.tasks[0] == Task("color", "classification", ("blue", "red"))


def test_batches_keep_the_order_and_change_nothing(manifest):
    corpus = read_corpus(write(manifest))
    batches = list(corpus.batches(3))
    assert [b.num_rows for b in batches] == [3, 1]
    assert pa.Table.from_batches(batches).equals(pa.Table.from_batches(corpus.batches()))


@pytest.mark.parametrize("change", [{"color": ["red", "blue", "red", "red"]}, {"end": [1.5, None, 3.5, None]}])
def test_any_change_of_content_changes_the_digest(manifest, change):
    before = validate(read_corpus(write(manifest)), "digit").digest
    assert validate(read_corpus(write(manifest, **change)), "digit").digest != before


def test_a_valid_corpus_is_counted_and_its_tasks_are_typed(manifest):
    summary = validate(read_corpus(write(manifest)))
    assert (summary.rows, summary.splits) == (4, {"train": 2, "val": 1, "test": 1})
    assert summary.tasks == (
        Task("color", "classification", ("blue", "red")),
        Task("digit", "classification", ("2", "9", "10")),
        Task("mood", "regression"),
    )
    assert validate(read_corpus(write(manifest)), "digit:regression").tasks == (Task("digit", "regression"),)


def test_labels_become_targets():
    color, mood = Task("color", "classification", ("2", "10")), Task("mood", "regression")
    assert [color.encode(v) for v in ("10", 2, None)] == [1, 0, None]
    assert [mood.encode(v) for v in (1, 0.5, None, float("nan"))] == [1.0, 0.5, None, None]
    with pytest.raises(CorpusError, match="'color' has no class 'blue'; it has 2, 10"):
        color.encode("blue")


def test_tasks_are_parsed():
    assert parse_tasks("color, mood:sentiment,word:events,at:events@12.5") == [
        ("color", None, 0),
        ("mood", "sentiment", 0),
        ("word", "events", 1),
        ("at", "events", 12.5),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "color:regresion",
            "cannot be of kind 'regresion'; the kinds are classification, regression, sentiment, events",
        ),
        ("mood:regression@5", "'mood': only events have bins; write mood:regression, or mood:events@5"),
        ("word:events@0", "'word' cannot have '0' bins per second; write for example word:events@25"),
        ("word:events@", "cannot have '' bins per second"),
        ("color,,digit", "empty name"),
        ("color,color", "named twice"),
    ],
)
def test_tasks_that_do_not_parse_say_why(text, message):
    with pytest.raises(CorpusError, match=message):
        parse_tasks(text)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("colour", r"no label column 'colour' in .*did you mean 'color'\?\); it has color, digit, mood"),
        ("split", "no label column 'split'"),
        ("color:regression", "'color' cannot be a regression: its column is text"),
        ("mood:classification", "'mood' cannot be a classification: its column holds fractions"),
    ],
)
def test_tasks_that_do_not_fit_say_why(manifest, tasks, message):
    with pytest.raises(CorpusError, match=message):
        validate(read_corpus(write(manifest)), tasks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"clip_id": None, "clip": ["a", "b", "c", "d"]},
            r"no column 'clip_id' \(did you mean 'clip'\?\); it has video",
        ),
        (
            {"split": None, "splits": ["train", "val", "test", "train"]},
            r"no column 'split' \(did you mean 'splits'\?\)",
        ),
        ({"video": None, "audio": None}, "no media column"),
        ({"color": None, "digit": None, "mood": None}, "no label column"),
        ({"clip_id": ["a", "b", "c", "b"]}, "clip_id 'b' is in rows 2 and 4"),
        ({"clip_id": ["a", "b", " ", "d"]}, "row 3 has no clip_id"),
        ({"clip_id": ["a", None, "c", "d"]}, "row 2 has no clip_id"),
        ({"split": ["train", "valid", "test", "train"]}, "clip 'b' has split 'valid'; use train, val or test"),
        ({"split": ["train", "val", None, "train"]}, "clip 'c' has split None"),
        ({"split": ["train"] * 4}, r"has no val and no test clips \(train 4, val 0, test 0\)"),
        ({"group": ["7", "8", "7", "9"]}, "group '7' is in train and in test"),
        ({"fold": [1, 2, 3, 2]}, "group '7' is in fold 1 and in fold 2; keep a group in one fold"),
        ({"audio": [None] * 4}, "clip 'b' has no media"),
        ({"start": [2.0, None, None, 2.0]}, "clip '00123' goes from 2.0 s to 1.5 s"),
        ({"start": [-1.0, None, None, 2.0]}, "clip '00123' goes from -1.0 s"),
        ({"end": [1.5, None, float("inf"), None]}, "clip 'c' goes from None s to inf s"),
        ({"color": pa.nulls(4, pa.string())}, "'color' has no value in any row"),
        ({"mood": [0.5, float("nan"), 1.0, float("-inf")]}, "row 4, column 'mood': -inf cannot be learned; leave"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(manifest, changes, message):
    with pytest.raises(CorpusError, match=message) as caught:
        validate(read_corpus(write(manifest, **changes)))
    assert "\n" not in str(caught.value)


def test_no_group_and_empty_groups_are_fine(manifest):
    assert validate(read_corpus(write(manifest, group=[None, None, "a", None])), "color").rows == 4


def test_a_text_per_clip_is_not_taken_for_classes(tmp_path):
    count = 10_002
    rows = {"clip_id": range(count), "text": ["hi"] * count, "split": ["train", "val", "test"] * (count // 3)}
    pq.write_table(pa.table({**rows, "caption": [f"caption {i}" for i in range(count)]}), tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match="'caption' has more than 10000 classes"):
        validate(read_corpus(str(tmp_path / "c.parquet")))


def test_a_csv_column_has_the_type_that_holds_all_of_it(tmp_path):
    """The first megabyte says integer, a later row says text."""
    rows = [f"{i},v.mp4,train,{i % 5},{i % 3}" for i in range(80_000)]
    rows += ["x,v.mp4,val,unknown,0.5", "007,v.mp4,test,,"]
    (tmp_path / "c.csv").write_text("clip_id,video,split,a,b\n" + "\n".join(rows))
    summary = validate(read_corpus(str(tmp_path / "c.csv")))
    assert summary.tasks == (Task("a", "classification", ("0", "1", "2", "3", "4", "unknown")), Task("b", "regression"))
    *_, last = read_corpus(str(tmp_path / "c.csv")).clips()
    assert (last.clip_id, last.labels) == ("007", {"a": None, "b": None})


@pytest.mark.parametrize(
    ("codes", "tasks"),
    [
        (["001", "01", "1", "1"], (Task("color", "classification", ("001", "01", "1")),)),
        (["0x10", "16", "0", "-5"], (Task("color", "classification", ("-5", "0", "0x10", "16")),)),
        (["+5", "5", "0.5", "5"], (Task("color", "classification", ("+5", "0.5", "5")),)),
        (["007", "7", "0.5", "7"], (Task("color", "classification", ("0.5", "007", "7")),)),
        (["0", "-5", "10", "9"], (Task("color", "classification", ("-5", "0", "9", "10")),)),
        (["0.50", "+.5", "-0", "1e3"], (Task("color", "regression"),)),
    ],
)
def test_a_csv_keeps_labels_apart_that_are_the_same_number_only_by_value(tmp_path, codes, tasks):
    rows = [f"{n},v.mp4,{split},{code}" for n, (split, code) in enumerate(zip(ROWS["split"], codes, strict=True))]
    (tmp_path / "c.csv").write_text("\n".join(["clip_id,video,split,color", *rows]))
    assert validate(read_corpus(str(tmp_path / "c.csv"))).tasks == tasks


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "does not exist; name a .csv"),
        ("empty.csv", "", "is empty"),
        ("notes.txt", "hello", "neither .csv"),
        ("bad.parquet", "no parquet", "does not read"),
        ("ragged.csv", "clip_id,video,split\na,b\n", "Expected 3 columns, got 2"),
        ("twice.csv", "clip_id,video,split,x,x\na,b,train,1,2\n", "'x' more than once"),
        ("header.csv", "clip_id,video,split,x\n", "has no rows"),
        ("late.csv", "clip_id,video,split,start,x\na,b,train,soon,1\n", "column 'start': 'soon' is no number"),
    ],
)
def test_a_manifest_that_cannot_be_read_says_why(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CorpusError, match=message) as caught:
        validate(read_corpus(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_a_folder_of_class_folders_is_a_corpus(tmp_path):
    touch(
        tmp_path, *(f"{label}/{n:02d}.mp4" for label in ("dog", "cat") for n in range(30)), "cat/00.wav", "readme.txt"
    )
    corpus = read_corpus(str(tmp_path))
    summary = validate(corpus)
    assert summary.rows == 60 and summary.tasks == (Task("label", "classification", ("cat", "dog")),)
    assert min(summary.splits.values()) > 0 and summary.splits["train"] > 30
    first = next(corpus.clips())
    assert (first.clip_id, first.video, first.audio) == ("cat/00", "cat/00.mp4", "cat/00.wav")
    assert first.media(corpus.folder)["video"] == str(tmp_path / "cat/00.mp4")
    assert validate(read_corpus(str(tmp_path))).digest == summary.digest


def test_the_files_of_a_clip_need_not_be_neighbours(tmp_path):
    touch(tmp_path, "dog/a.mp4", "dog/a.old.mp4", "dog/a.wav")
    clips = [(clip.clip_id, clip.video, clip.audio) for clip in read_corpus(str(tmp_path)).clips()]
    assert clips == [("dog/a", "dog/a.mp4", "dog/a.wav"), ("dog/a.old", "dog/a.old.mp4", None)]


def test_split_folders_are_the_splits(tmp_path):
    touch(tmp_path, "train/dog/1.mp4", "val/dog/2.mp4", "test/cat/3.mp4")
    clips = list(read_corpus(str(tmp_path)).clips())
    assert [(c.clip_id, c.split, c.labels["label"]) for c in clips] == [
        ("test/cat/3", "test", "cat"),
        ("train/dog/1", "train", "dog"),
        ("val/dog/2", "val", "dog"),
    ]


def test_two_files_of_one_clip_and_modality_are_a_duplicate(tmp_path):
    touch(tmp_path, "dog/1.mp4", "dog/1.avi")
    with pytest.raises(CorpusError, match="clip_id 'dog/1' is in rows 1 and 2"):
        validate(read_corpus(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "message"), [("1.mp4", "1.mp4 lies in no class folder"), ("notes.txt", "has no media")]
)
def test_a_folder_that_is_no_corpus_says_why(tmp_path, name, message):
    touch(tmp_path, name)
    with pytest.raises(CorpusError, match=message):
        read_corpus(str(tmp_path))


@pytest.mark.parametrize("as_uri", [False, True])
def test_paths_and_file_uris_open_alike(manifest, as_uri):
    write(manifest)
    corpus = read_corpus(manifest.as_uri() if as_uri else str(manifest))
    video = next(corpus.clips()).media(corpus.folder)["video"]
    assert video == (manifest.parent.as_uri() if as_uri else str(manifest.parent)) + "/clips/1.mp4"


@pytest.mark.data
@pytest.mark.data
@pytest.mark.skipif(not GRID.is_file(), reason="needs ../shared/data/grid")
def test_grid_is_valid():
    summary = validate(read_corpus(str(GRID)))
    assert summary.splits == {"train": 560, "val": 120, "test": 120}
    assert [len(task.classes) for task in summary.tasks] == [4, 4, 4, 25, 10, 4]


def csv(folder, text, name="corpus.csv"):
    """A manifest of 10 clips with a column `label` for each line of text, which may have more columns before it."""
    head, *lines = text
    splits = ["train"] * 8 + ["val", "test"]
    rows = [f"c{n},c{n}.wav,{splits[n]},{line}" for n, line in enumerate(lines)]
    (folder / name).write_text("\n".join([f"clip_id,audio,split,{head}", *rows]) + "\n")
    return read_corpus(str(folder / name))


NUMBERS = [f"{n / 4}" for n in range(9)]


@pytest.mark.parametrize("name", ["", "Unnamed: 0", "__index_level_0__"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_index_that_pandas_writes_is_left_out_with_a_word(tmp_path, name, kind):
    path = tmp_path / f"corpus.{kind}"
    table = pa.table({name: list(range(4)), **{k: ROWS[k] for k in ("clip_id", "video", "audio", "split", "color")}})
    pq.write_table(table, path) if kind == "parquet" else pyarrow.csv.write_csv(table, path)
    corpus = read_corpus(str(path))
    assert corpus.labels == ("color",)
    assert corpus.notes == (f"column {name!r} is left out: it holds pandas' index",)
    assert [clip.clip_id for clip in corpus.clips()] == ROWS["clip_id"]


def test_another_column_without_a_name_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("clip_id,audio,split,\na,a.wav,train,1\n")
    with pytest.raises(CorpusError, match="column 4 has no name"):
        read_corpus(str(tmp_path / "a.csv"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([*NUMBERS, "unknown"], "row 10, column 'score': 'unknown' is no number; fix it"),
        ([*NUMBERS[:3], "?", *NUMBERS[3:]], r"row 4, column 'score': '\?' is no number"),
        (
            ['"' + n.replace(".", ",") + '"' for n in [*NUMBERS, "7.5"]],
            "row 1, column 'score': '0,0' has a decimal comma",
        ),
    ],
)
def test_the_value_that_spoils_a_column_of_numbers_is_named(tmp_path, values, message):
    with pytest.raises(CorpusError, match=message):
        validate(csv(tmp_path, ["score", *values]))
    (task,) = validate(csv(tmp_path, ["score", *values]), "score:classification").tasks  # unless they are meant
    assert len(task.classes) == 10
    with pytest.raises(CorpusError, match=r"'score' cannot be a regression: its column is text .* is no number"):
        validate(csv(tmp_path, ["score", *values]), "score:regression")


@pytest.mark.parametrize("word", ["NA", "n/a", "-", "none", "NULL", "nan", " ", "<NA>"])
def test_the_usual_words_for_missing_are_missing_and_counted(tmp_path, word):
    for values, kind in ((NUMBERS, "regression"), (["1", "2", "3"] * 3, "classification"), (["a", "b", "c"] * 3, None)):
        report = validate(csv(tmp_path, ["x", *values, word]))
        assert report.tasks[0].kind == (kind or "classification")
        assert "task 'x': 1 of 10 clips have no value" in report.notes
        assert report.tasks[0].classes == (() if kind == "regression" else tuple(sorted(set(values))))


def test_blanks_around_a_value_are_no_part_of_it(tmp_path):
    report = validate(csv(tmp_path, ["x", *(f" {n} " for n in [*NUMBERS, "3"])]))
    assert report.tasks[0].kind == "regression"


def test_whole_floats_are_classes_when_asked_and_a_regression_with_a_word_when_not(tmp_path):
    corpus = csv(tmp_path, ["x", *["0.0", "1.0", "2.0"] * 3, ""])
    report = validate(corpus)
    assert report.tasks[0].kind == "regression" and any("--tasks x:classification" in note for note in report.notes)
    (task,) = validate(corpus, "x:classification").tasks
    assert task.classes == ("0", "1", "2")
    first = next(corpus.declare("x:classification").clips())
    assert task.encode(first.labels["x"]) == 0
    with pytest.raises(CorpusError, match=r"holds fractions \(0.5 in row 1\)"):
        validate(csv(tmp_path, ["x", "0.5", *["1.0"] * 9]), "x:classification")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.large_string())])
def test_text_is_text_whatever_column_it_was_written_as(tmp_path, kind):
    """pandas 3 and polars write large strings, and pandas' categories are a dictionary."""
    columns = {
        "clip_id": ["a", "b", "c", "d"],
        "video": ["a.mp4", "b.mp4", "c.mp4", "d.mp4"],
        "audio": ["-", "b.wav", "n/a", None],
        "split": ["train", "train", "val", "test"],
        "label": [" dog", "cat", "none", "dog"],
        "when": ['[{"start": 0, "end": 1, "label": "x"}]', None, None, None],
    }
    kinds = {name: pa.string() if name in ("video", "clip_id") else kind for name in columns}
    table = pa.table({name: pa.array(values).cast(kinds[name]) for name, values in columns.items()})
    pq.write_table(table, tmp_path / "corpus.parquet")
    corpus = read_corpus(str(tmp_path / "corpus.parquet")).declare("label,when:events")
    clips = list(corpus.clips())
    assert [clip.labels["label"] for clip in clips] == ["dog", "cat", None, "dog"]
    assert [clip.audio for clip in clips] == [None, "b.wav", None, None]
    assert clips[0].labels["when"][0]["label"] == "x" and validate(corpus).tasks[0].classes == ("cat", "dog")


def test_digits_that_no_number_holds_are_text(tmp_path):
    first, second, largest = "1" * 20, "1" * 19 + "2", str(2**63)
    (task,) = validate(csv(tmp_path, ["x", *[first, second, largest, "5", first] * 2])).tasks
    assert (task.kind, set(task.classes)) == ("classification", {first, second, largest, "5"})


def test_a_manifest_without_names_and_with_an_index_of_pandas_reads(tmp_path):
    lines = ["index,video,label", *(f"{n},{n}.mp4,{'ab'[n % 2]}" for n in range(6))]
    (tmp_path / "corpus.csv").write_text("\n".join(lines))
    corpus = read_corpus(str(tmp_path / "corpus.csv")).declare(None)
    assert [clip.clip_id for clip in corpus.clips()] == [f"{n}.mp4" for n in range(6)] and corpus.labels == ("label",)


def test_a_texts_uri_may_have_options():
    assert is_text_file("abfss://c@account/a.txt?credential_kind=cli") and is_text_file("s3://b/a?region=x")
    assert not is_text_file("Did you read https://x.org/robots.txt? Yes.")
    assert not is_text_file("why? a.txt?") and is_text_file("why?.txt")


def test_classes_with_one_clip_each_are_warned_of(tmp_path):
    (note,) = validate(csv(tmp_path, ["x", *["a"] * 7, "b", "c", "d"])).notes
    assert note == "task 'x': 3 of 4 classes have one clip each (b, c, d)"


def test_columns_that_cannot_be_read_are_left_out(tmp_path):
    table = pa.table({**{k: ROWS[k] for k in ("clip_id", "video", "audio", "split", "color")}, "blob": [b"\xff"] * 4})
    pq.write_table(table, tmp_path / "a.parquet")
    corpus = read_corpus(str(tmp_path / "a.parquet"))
    assert validate(corpus).rows == 4 and corpus.notes == ("column 'blob' is left out: it holds bytes",)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.tsv", "a.csv.gz"])
def test_the_delimiter_is_found_whatever_the_ending(tmp_path, delimiter, name):
    rows = [("clip_id", "audio", "split", "mood"), *((f"c{n}", f"{n}.wav", "train", f"{n}.5") for n in range(4))]
    text = "".join(delimiter.join(row) + "\n" for row in rows)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    corpus = read_corpus(str(tmp_path / name))
    assert corpus.labels == ("mood",) and next(corpus.clips()).labels == {"mood": 0.5}


def test_a_folder_says_by_ending_what_it_leaves_out(tmp_path):
    for ending in ("aif", "au", "wma", "mts", "ts", "oga", "mka", "MP4", "txt", "txt", "json"):
        path = tmp_path / "class" / f"{ending}{len(list(tmp_path.rglob('*')))}.{ending}"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "README").touch()
    corpus = read_corpus(str(tmp_path))
    assert sum(1 for _ in corpus.clips()) == 8
    assert corpus.notes[0] == "files left out: 2 .txt, 1 without an ending, 1 .json"
    assert "by a hash of the names" in corpus.notes[1]
    (tmp_path / "clips.csv").touch()
    assert "clips.csv is not read" in read_corpus(str(tmp_path)).notes[1]


def test_each_class_of_a_folder_is_in_each_split_where_it_can_be(tmp_path):
    from features.corpus.folder import split_by_hash

    names = [f"{label}/{n}" for label in "abcdefgh" for n in range(ord(label) - 96)]
    splits = split_by_hash(names, [name[0] for name in names])
    for label in "cdefgh":
        assert {s for s, n in zip(splits, names, strict=True) if n[0] == label} == {"train", "val", "test"}
    many = [f"x/{n}" for n in range(3000)]
    shares = [split_by_hash(many, ["x"] * 3000).count(s) / 3000 for s in ("train", "val", "test")]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


def test_a_question_mark_in_a_local_folder_is_a_character_like_any(tmp_path):
    (tmp_path / "what?").mkdir()
    corpus = csv(tmp_path / "what?", ["x", *"ababababab"])
    assert validate(corpus).rows == 10
    assert next(corpus.clips()).media(corpus.folder)["audio"] == f"{tmp_path}/what?/c0.wav"


@pytest.mark.parametrize("written", ["NFC", "NFD"])
def test_a_name_is_found_in_either_unicode_form(tmp_path, written):
    import unicodedata

    from features.decode.media import open_source

    name = "caf\u00e9.wav"
    (tmp_path / unicodedata.normalize(written, name)).write_bytes(b"x")
    for form in ("NFC", "NFD"):
        assert Path(open_source(f"{tmp_path}/{unicodedata.normalize(form, name)}")).read_bytes() == b"x"


def test_a_file_is_found_where_windows_wrote_the_manifest(tmp_path):
    from features.decode.media import open_source

    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs/a.wav").write_bytes(b"x")
    (tmp_path / "b\\c.wav").write_bytes(b"y")
    for name, content in (("dogs\\a.wav", b"x"), ("b\\c.wav", b"y")):
        assert Path(open_source(f"{tmp_path}/{name}")).read_bytes() == content
