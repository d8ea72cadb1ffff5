"""`python -m features.store verify` finds whatever is not as the index says, names it, and passes what is whole."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storefiles import FEATURES, make_clip, make_clips, make_sample, make_spec, shards_of, write_shard, write_store

from features.store import Feature, Store
from features.store.__main__ import main
from features.store.samples import Sample, pack
from features.store.shards import Failure, ShardWriter, create_store, sweep_litter
from features.store.verify import check_sample, planned_rows, verify

STRANGE_IDS = ["a.b.c", "../up", "grüße/Ωμέγα 猫", "100%2E", "sp ace", "x" * 300 + ".é"]


@pytest.fixture
def copy(store, tmp_path):
    """A store of ten shards that a test may damage."""
    shutil.copytree(store.path, tmp_path / "copy")
    return tmp_path / "copy"


def problems(folder, **options):
    found = []
    verdict = verify(Store(str(folder)), found.append, **options)
    assert verdict.problems == len(found)
    return [str(problem) for problem in found]


def edit_part(path, change):
    """Write a part again with its rows, a list of dicts, changed."""
    table = pq.read_table(path)
    rows = table.to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows) or rows, schema=table.schema), path)


def set_cell(path, row, column, value):
    edit_part(path, lambda rows: rows[row].update({column: value}))


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("fast", [False, True])
def test_a_whole_store_has_no_problem_and_every_row_is_counted(store, fast):
    seen = []
    verdict = verify(store, pytest.fail, fast, progress=lambda verdict: seen.append(verdict.done))
    assert verdict.indexed == store.spec.splits and verdict.failed == {"train": 0, "val": 0, "test": 0}
    assert seen == list(range(1, 12)) and verdict.shards == 11
    assert verdict.nbytes == (0 if fast else sum(store.index()["nbytes"].to_pylist()))


def test_the_plan_covers_every_row_of_the_manifest(store):
    plan = planned_rows(store.spec)
    assert plan == {name: len(rows) for name, rows in shards_of(make_clips(29, 3, 5), 4)}


def test_strange_clip_ids_and_shards_of_failures_alone_are_fine(tmp_path):
    clips = [make_clip(name) for name in STRANGE_IDS] + [make_clip("gone", "val")]
    spec = make_spec(clips)
    create_store(str(tmp_path), spec)
    for name, rows in shards_of(clips[:-1], 4):
        write_shard(tmp_path, name, rows, spec)
    with ShardWriter(str(tmp_path), "val-000000", spec, pa.schema([])) as writer:
        writer.fail(clips[-1], Failure("open", "MediaError", "gone"))
        writer.commit()
    lacking = "index/val-000000.parquet: lacks the columns label_label, label_mood"
    assert problems(tmp_path) == [lacking]  # of this writer, which was given no label columns


def test_no_flipped_bit_of_a_clips_bytes_goes_unnoticed(store):
    """In headers, payloads, and what pads them."""
    row, random = store.index("train").to_pylist()[1], np.random.default_rng(0)
    with store.fs.open_input_file(f"{store.path}/shards/{row['shard']}.tar") as tar:
        stretch = tar.read_at(row["nbytes"], row["offset"])
    assert list(check_sample(stretch, row, store.spec)) == []
    for position in range(len(stretch)):
        damaged = bytearray(stretch)
        damaged[position] ^= 1 << int(random.integers(8))
        assert list(check_sample(bytes(damaged), row, store.spec)), position


def test_damage_in_the_middle_of_a_tar_names_clip_row_and_tar(copy):
    row = pq.read_table(copy / "index/train-000002.parquet").to_pylist()[3]
    flip(copy / "shards/train-000002.tar", row["offset"] + row["nbytes"] - 512)
    (line,) = problems(copy)
    assert line.startswith(f"index/train-000002.parquet row 3: {row['clip_id']} in shards/train-000002.tar: ")
    assert "the sha256 of its bytes is" in line and row["sha256"] in line
    assert problems(copy, fast=True) == []  # which reads no byte of a tar


@pytest.mark.parametrize("fast", [False, True])
def test_an_offset_that_is_wrong_is_named(copy, fast):
    path = copy / "index/train-000001.parquet"
    offset = pq.read_table(path)["offset"][2].as_py()
    set_cell(path, 2, "offset", offset + 512)
    found = problems(copy, fast=fast)
    assert f"shards/train-000001.tar: bytes {offset} to {offset + 512} belong to no row of" in "\n".join(found)
    assert any("parquet row 3: offset" in line and "inside another clip" in line for line in found)
    assert fast or any("parquet row 2: clip/6.v1 in" in line for line in found)


@pytest.mark.parametrize(("column", "value"), [("offset", -512), ("offset", 10**9), ("nbytes", 0), ("nbytes", 2**40)])
def test_a_place_outside_the_tar_is_named(copy, column, value):
    set_cell(copy / "index/train-000001.parquet", 1, column, value)
    assert any("train-000001.parquet row 1:" in line and "do not lie within" in line for line in problems(copy))


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("sha256", "0" * 64, "the index says 0000"),
        ("clip_id", "another", "hold clip%2F5%2Ev1.audio.npy, clip%2F5%2Ev1.json"),
        ("tokens_video", 9, "index and store.json say uint8 [9, 4, 4, 3]"),
        ("tokens_audio", 0, "hold clip%2F5%2Ev1.audio.npy"),
        ("duration", 99.0, "duration is 0.75 in the tar, 99.0 in the index"),
        ("label_label", "a", "labels is {'label': 'b'"),
        ("split", "val", "split is 'val', the file is of 'train'"),
        ("shard", "train-000009", "shard is 'train-000009', the file is of 'train-000001'"),
    ],
)
def test_a_row_that_says_something_else_than_the_tar_is_named(copy, column, value, words):
    set_cell(copy / "index/train-000001.parquet", 1, column, value)
    assert any("index/train-000001.parquet row 1: " in line and words in line for line in problems(copy))


def test_arrays_of_another_shape_than_the_spec_says_are_named(tmp_path):
    clips = make_clips(3)
    spec = make_spec(clips)
    with ShardWriter(str(tmp_path), "train-000000", create_store(str(tmp_path), spec).spec, pa.schema([])) as writer:
        for number, clip in enumerate(clips):
            video = make_sample(number).features["video"]
            writer.add(
                clip, pack(clip, Sample({"video": video.astype(np.float32) if number == 1 else video[:, :2]}, 1.0))
            )
        writer.schema = writer.schema.append(pa.field("label_label", pa.string()))
        writer.schema = writer.schema.append(pa.field("label_mood", pa.float64()))
        writer.commit()
    found = problems(tmp_path)
    assert "row 1: clip/1.v1 in shards/train-000000.tar: video is float32 [2, 4, 4, 3]; index and" in found[1]
    assert [f"row {n}: clip/{n}.v1" in line for n, line in enumerate(found)] == [True] * 3
    assert "video is uint8 [1, 2, 4, 3]; index and store.json say uint8 [1, 4, 4, 3]" in found[0]


@pytest.mark.parametrize("folder", ["index", "failures", "shards"])
@pytest.mark.parametrize("fast", [False, True])
def test_a_part_that_is_gone_is_named(copy, folder, fast):
    name = f"{folder}/train-000003.{'tar' if folder == 'shards' else 'parquet'}"
    (copy / name).unlink()
    assert any(line.startswith(f"{name}: is missing") for line in problems(copy, fast=fast))


@pytest.mark.parametrize("folder", ["index", "failures"])
def test_a_part_that_does_not_read_is_named(copy, folder):
    path = copy / folder / "train-000003.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    assert any(line.startswith(f"{folder}/train-000003.parquet: does not read: ") for line in problems(copy))


@pytest.mark.parametrize("fast", [False, True])
def test_a_tar_that_is_cut_or_longer_is_named(copy, fast):
    tar = copy / "shards/train-000004.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    assert any("train-000004.parquet row 3" in line for line in problems(copy, fast=fast))
    tar.write_bytes(whole + whole)
    assert f"shards/train-000004.tar: has {2 * len(whole)} bytes" in problems(copy, fast=fast)[0]


def test_what_hides_behind_the_last_clip_or_between_clips_is_named(copy):
    tar = copy / "shards/train-000004.tar"
    flip(tar, tar.stat().st_size - 1)
    assert [line.split(":")[0] for line in problems(copy)] == ["shards/train-000004.tar"]
    edit_part(copy / "index/train-000000.parquet", lambda rows: rows[:1] + rows[2:])
    found = "\n".join(problems(copy))
    assert "shards/train-000000.tar: bytes" in found and "belong to no row of index/train-000000.parquet" in found
    assert "index/train-000000.parquet: 3 indexed + 0 failed of the 4 rows planned" in found


@pytest.mark.parametrize("fast", [False, True])
def test_a_clip_that_is_there_twice_is_named_with_both_places(tmp_path, fast):
    clips = make_clips(9)
    clips[7] = clips[1]
    write_store(tmp_path, clips)
    (line,) = problems(tmp_path, fast=fast)
    assert line == "index/train-000001.parquet row 3: clip/1.v1 is also in index/train-000000.parquet row 1"


def test_a_clip_that_is_both_indexed_and_failed_is_named(tmp_path):
    write_store(tmp_path, make_clips(4, 1))
    failed = {"clip_id": "clip/2.v1", "split": "val", "stage": "open", "error": "E", "message": "m", "attempts": 1}
    edit_part(tmp_path / "failures/val-000000.parquet", lambda rows: [failed])
    found = problems(tmp_path)
    assert "index/val-000000.parquet: 1 indexed + 1 failed of the 1 rows planned" in found
    assert "failures/val-000000.parquet row 0: clip/2.v1 is also in index/train-000000.parquet row 2" in found


@pytest.mark.parametrize(
    "litter",
    ["shards/train-000001.tar.0af.tmp", "index/train-000099.parquet", "failures/note.txt", "shards/deep/er.tar",
     "store.json.1.tmp", "plan/x.1.tmp"],
)  # fmt: skip
def test_litter_is_named_and_a_persons_own_file_beside_the_store_is_not(copy, litter):
    (copy / litter).parent.mkdir(exist_ok=True)
    (copy / litter).write_bytes(b"left")
    (copy / "README.md").write_text("mine")
    (copy / "plan").mkdir(exist_ok=True)
    (copy / "plan/train.parquet").write_bytes(b"an extract job's own")
    (line,) = problems(copy)
    assert line.startswith(f"{litter}: is litter")


def test_what_verify_calls_litter_is_what_the_next_run_sweeps(copy):
    for name in ("shards/train-000001.tar.0af.tmp", "index/train-000002.parquet.1.tmp", "shards/x.tar"):
        (copy / name).write_bytes(b"left")
    assert len(problems(copy)) == 3 == sweep_litter(Store(str(copy)))
    assert problems(copy) == []


def test_a_lock_that_was_left_is_named(copy):
    (copy / "lock.json").write_text("{}")
    assert [line.split(":")[0] for line in problems(copy)] == ["lock.json"]


def test_a_spec_that_was_edited_is_named(copy):
    path = copy / "store.json"
    spec = json.loads(path.read_text())
    path.write_text(
        json.dumps({**spec, "features": {**spec["features"], "audio": {**spec["features"]["audio"], "rate": 25}}})
    )
    (line,) = problems(copy, fast=True)
    assert line.startswith(f"store.json: its fingerprint {spec['fingerprint']} is not that of its content")


def test_more_rows_planned_than_are_there_is_named(copy):
    spec = Store(str(copy)).spec
    grown = make_spec(make_clips(29, 3, 5), splits={**spec.splits, "val": 6})
    (copy / "store.json").write_text(json.dumps(grown.to_dict()))
    found = problems(copy)
    assert "index/val-000000.parquet: 3 indexed + 0 failed of the 4 rows planned" in found
    assert {"index/val-000001.parquet: is missing", "failures/val-000001.parquet: is missing"} <= set(found)


def test_an_index_without_the_columns_of_the_spec_is_named(copy):
    text = Feature((7,), "float32", 1.0, {"name": "words"})
    (copy / "store.json").write_text(
        json.dumps(make_spec(make_clips(29, 3, 5), features={**FEATURES, "text": text}).to_dict())
    )
    assert problems(copy) == [
        f"index/{name}.parquet: lacks the columns tokens_text, uri_text" for name in Store(str(copy)).spec.shards()
    ]


def test_the_command_line_counts_all_problems_prints_some_and_exits_1(copy, capsys):
    assert main(["verify", str(copy)]) == 0
    assert "37 rows = 37 indexed + 0 failed" in capsys.readouterr().out
    for name in ("train-000001", "train-000005", "val-000000"):
        flip(copy / f"shards/{name}.tar", 700)
    assert main(["verify", str(copy), "--show", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[:25] for line in lines[:2]] == ["index/train-000001.parquet"[:25], "index/train-000005.parquet"[:25]]
    assert any(line.startswith("3 problems, 1 of them not shown") for line in lines)
    assert not any("val-000000.parquet row" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "Expected one of {verify, inspect}"),
        (["verify"], 2, "STORE"),
        (["verify", "x", "--fsat"], 2, "--fsat"),
        (["verify", "x", "--threads", "many"], 2, "--threads"),
        (["verify", "x", "--threads", "0"], 1, "--threads 0: must be 1 or more"),
        (["verify", "/no/store"], 1, "no feature store at /no/store"),
        (["verify", "nope://x"], 1, "nope://x cannot be opened"),
        (["inspect", "/no/store"], 1, "no feature store at /no/store"),
        (["inspect", "x", "--clips", "3"], 1, "--sheet F.png"),
        (["inspect", "x", "--sheet", "x.jpg"], 1, "x.jpg: the picture is a PNG"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_line(arguments, code, words, capsys):
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
