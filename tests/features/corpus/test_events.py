"""Events: what a manifest may say of them, what is wrong with one, and the label of each bin."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mediafiles import write_manifest

from features.corpus.events import EVENTS, find_fault
from features.corpus.manifest import read_corpus
from features.corpus.tasks import Task
from features.corpus.validation import validate
from features.errors import CorpusError

DOG = {"start": 0.5, "end": 1.25, "label": "dog"}
CAT = {"start": 1.25, "end": 3.0, "label": "cat"}
SPLITS = ["train", "val", "test"]


def write(path, cells, **columns):
    """A manifest with one row per cell of its column `what`: JSON or text in csv, lists in parquet."""
    rows = {"clip_id": [f"c{n}" for n in range(len(cells))], "video": ["v.mp4"] * len(cells)}
    rows |= {"split": [SPLITS[n % 3] for n in range(len(cells))], **columns, "what": cells}
    if path.suffix == ".parquet":
        pq.write_table(pa.table(rows), path)
        return str(path)
    rows["what"] = [json.dumps(cell) if isinstance(cell, list) else cell for cell in cells]
    return write_manifest(path, [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])


@pytest.fixture(params=["corpus.csv", "corpus.parquet"])
def manifest(request, tmp_path):
    return tmp_path / request.param


def test_events_are_the_same_from_json_from_a_sidecar_file_and_from_parquet(tmp_path):
    cells = [[DOG, CAT], None, [], [DOG]]
    (tmp_path / "sidecars").mkdir()
    (tmp_path / "sidecars" / "c3.json").write_text(json.dumps([DOG]))
    csv = read_corpus(write(tmp_path / "a.csv", [*cells[:3], "sidecars/c3.json"])).declare("what:events")
    parquet = read_corpus(write(tmp_path / "a.parquet", cells))
    assert [clip.labels["what"] for clip in csv.clips()] == cells
    assert list(csv.clips()) == list(parquet.clips())
    assert validate(csv, "what:events") == validate(parquet, "what:events") == validate(parquet)
    assert csv.schema.field("what").type == EVENTS


def test_json_lists_in_a_csv_are_events_without_being_declared(tmp_path):
    cells = [[], None, [DOG, CAT], [DOG]]
    csv, parquet = (read_corpus(write(tmp_path / name, cells)) for name in ("a.csv", "a.parquet"))
    assert validate(csv) == validate(parquet) and validate(csv).tasks[0].kind == "events"
    for other in (["a path.json"], ["7"], ["[sic]"]):  # not all of them: a class, where nothing else is said
        mixed = read_corpus(write(tmp_path / "mixed.csv", [*cells, *other]))
        assert validate(mixed).tasks[0].kind == "classification"


def test_classes_are_sorted_behind_background_whoever_names_it(manifest):
    cells = [[DOG, CAT], [{"start": 0, "end": 1, "label": "background"}], [DOG]]
    corpus = read_corpus(write(manifest, cells))
    assert validate(corpus, "what:events@25").tasks == (Task("what", "events", ("background", "cat", "dog"), 25.0),)


def test_another_order_of_fields_and_more_of_them_are_fine(tmp_path):
    cell = [{"label": 7, "confidence": 0.5, "end": 2, "start": 1}]
    for name in ("a.csv", "a.parquet"):
        corpus = read_corpus(write(tmp_path / name, [cell] * 3)).declare("what:events")
        assert next(corpus.clips()).labels["what"] == [{"start": 1.0, "end": 2.0, "label": "7"}]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ([CAT, DOG], r"event 2 \('dog', 0.5 s to 1.25 s\) begins before the event in front of it; sort them"),
        ([DOG, {**CAT, "start": 1.2}], r"event 2 \('cat', 1.2 s to 3 s\) overlaps the event in front of it"),
        ([{**DOG, "start": -0.1}], r"event 1 \('dog', -0.1 s to 1.25 s\) begins before 0 s"),
        ([{**DOG, "end": 0.5}], "does not end after it begins"),
        ([DOG, {**CAT, "end": 4.01}], r"event 2 \('cat', 1.25 s to 4.01 s\) ends beyond the clip's end"),
        ([{**DOG, "label": " "}], "lacks its start, end or label"),
        ([{**DOG, "end": float("nan")}], "lacks its start, end or label"),
    ],
)
def test_events_that_cannot_be_are_named_by_file_row_and_column(manifest, cell, message):
    uri = write(manifest, [[DOG], [DOG, CAT], cell], start=[1.0] * 3, end=[5.0] * 3)
    with pytest.raises(CorpusError, match=f"{manifest.name}: row 3, column 'what': .*{message}") as caught:
        validate(read_corpus(uri), "what:events")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[{", "its JSON does not parse"),
        ('[["dog", 0, 1]]', r"event 1 is \[\"dog\", 0, 1\]; write {\"start\": seconds"),
        ('[{"start": "soon", "end": 1, "label": "dog"}]', "event 1 is"),
        ('[{"start": 0, "end": 1, "label": null}]', "event 1 is"),
        ("dog", "is neither a JSON list nor a file that reads: .*dog"),
        ("text.json", "file text.json does not parse"),
        ("object.json", "file object.json is no list of events"),
    ],
)
def test_json_that_is_no_list_of_events_is_named_by_file_row_and_column(tmp_path, cell, message):
    (tmp_path / "text.json").write_text("dog from 0 to 1")
    (tmp_path / "object.json").write_text('{"events": []}')
    uri = write(tmp_path / "corpus.csv", [[DOG], cell, [DOG]])
    with pytest.raises(CorpusError, match=f"corpus.csv: row 2, column 'what': {message}") as caught:
        validate(read_corpus(uri), "what:events")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "cells", "task", "message"),
    [
        ("a.parquet", [[DOG]] * 3, "what:classification", "cannot be of kind classification: its column holds events"),
        ("a.parquet", [0.5, 1.5, 2.5], "what:events", "cannot be of kind events: its column holds double"),
        ("a.csv", [[], [], []], "what:events", "has no event in any row"),
    ],
)
def test_a_column_of_another_kind_is_refused(tmp_path, name, cells, task, message):
    with pytest.raises(CorpusError, match=message):
        validate(read_corpus(write(tmp_path / name, cells)), task)


def test_the_row_of_a_fault_counts_rows_in_front_and_those_without_events():
    column = pa.array([None, [], [DOG], [DOG, DOG], [CAT, DOG]], EVENTS)
    assert find_fault(column, np.full(5, np.nan))[0] == 3
    assert find_fault(column.slice(2), np.full(3, np.nan))[0] == 1
    assert find_fault(column.slice(0, 3), np.full(3, np.nan)) is None
    assert find_fault(column.slice(0, 3), np.array([np.nan, np.nan, 1.2]))[0] == 2
    assert find_fault(column.slice(0, 2), np.full(2, np.nan)) is None


def test_a_row_beyond_the_first_batch_has_its_number_in_the_manifest(tmp_path):
    cells = [[DOG]] * 70_000 + [[CAT, DOG]]
    with pytest.raises(CorpusError, match="row 70001, column 'what'"):
        validate(read_corpus(write(tmp_path / "a.parquet", cells)))


WHAT = Task("what", "events", ("background", "cat", "dog"), 2.0)


@pytest.mark.parametrize(
    ("events", "seconds", "bins"),
    [
        ([DOG, CAT], 3.0, [0, 2, 1, 1, 1, 1]),  # middles at 0.25, 0.75, ...: half open, so 1.25 is the cat's
        ([DOG], 2.2, [0, 2, 0, 0]),
        ([DOG], 2.3, [0, 2, 0, 0, 0]),  # rounded to the next bin
        ([CAT], 2.0, [0, 0, 1, 1]),  # what lies beyond the clip is left out
        ([], 1.0, [0, 0]),
        (None, 1.0, [-1, -1]),
        ([DOG], 0.1, [0]),  # one bin at least
        ([{**DOG, "label": "background"}], 1.0, [0, 0]),
    ],
)
def test_a_bin_has_the_class_of_the_event_in_progress_at_its_middle(events, seconds, bins):
    labels = WHAT.encode_events(events, seconds)
    assert labels.tolist() == bins and labels.dtype == np.int16


def test_bins_agree_with_asking_at_every_middle():
    rng = np.random.default_rng(0)
    task = Task("what", "events", ("background", "cat", "dog"), 25.0)
    for _ in range(50):
        edges = np.sort(rng.uniform(0, 4, 6)).round(3)
        events = [{"start": a, "end": b, "label": rng.choice(["cat", "dog"])} for a, b in edges.reshape(3, 2)]
        labels = task.encode_events(events, 4.0)
        for number, label in enumerate(labels):
            at = (number + 0.5) / 25
            asked = next((e["label"] for e in events if e["start"] <= at < e["end"]), "background")
            assert task.classes[label] == asked


def test_an_event_of_no_class_is_refused():
    with pytest.raises(CorpusError, match="'what' has no class 'bird'; it has background, cat, dog"):
        WHAT.encode_events([{"start": 0, "end": 1, "label": "bird"}], 1.0)


def test_sentiment_is_a_number_on_the_scale(tmp_path):
    columns = {"mood": [-3.0, 0.5, None]}
    summary = validate(read_corpus(write(tmp_path / "a.csv", [[DOG]] * 3, **columns)), "mood:sentiment")
    assert summary.tasks == (Task("mood", "sentiment"),)
    columns["mood"][1] = 3.5
    with pytest.raises(CorpusError, match=r"row 2, column 'mood': 3\.5 lies beyond the scale of -3 to 3"):
        validate(read_corpus(write(tmp_path / "a.csv", [[DOG]] * 3, **columns)), "mood:sentiment")
    with pytest.raises(CorpusError, match="'mood' cannot be a sentiment: its column is text"):
        validate(read_corpus(write(tmp_path / "a.csv", [[DOG]] * 3, mood=["good", "bad", ""])), "mood:sentiment")
