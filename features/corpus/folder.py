"""A folder of class folders as a corpus: ROOT/CLASS/clip.mp4, or ROOT/train/CLASS/clip.mp4."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import pyarrow as pa
from pyarrow.fs import FileSelector, FileSystem, FileType

from features.errors import CorpusError

SPLITS = ("train", "val", "test")
SHARES = (0.7, 0.8, 1.0)  # up to which share of all hashes a clip goes to each split
VIDEO = "mp4 m4v mov avi mkv webm mpg mpeg flv f4v 3gp 3g2 ogv wmv asf ts mts m2ts mxf vob divx h264 hevc"
AUDIO = "wav flac mp3 m4a aac ogg oga opus aif aiff au wma mka amr ac3 caf"
IMAGE = "jpg jpeg png webp bmp tif tiff gif"
TABLES = ("csv", "tsv", "parquet", "pq")  # endings of what may be a manifest
SUFFIXES = {
    ending: modality
    for modality, endings in (("video", VIDEO), ("audio", AUDIO), ("image", IMAGE))
    for ending in endings.split()
}


def folder_table(filesystem: FileSystem, root: str, uri: str) -> tuple[pa.Table, tuple[str, ...]]:
    """The rows of a folder of class folders, sorted, and notes on what is left out.

    A clip's video, sound and image may lie side by side. Raises CorpusError where there is no medium, or one in no
    class folder.
    """
    files = filesystem.get_file_info(FileSelector(root, recursive=True))
    paths = sorted(f.path[len(root.rstrip("/")) + 1 :] for f in files if f.type == FileType.File)
    paths = [p for p in paths if not any(part.startswith(".") for part in p.split("/"))]
    others = Counter(_ending(p) for p in paths if _ending(p) not in SUFFIXES)
    tables = [p for p in paths if "/" not in p and _ending(p) in TABLES]
    paths = [p for p in paths if _ending(p) in SUFFIXES]
    if not paths:
        raise CorpusError(f"corpus {uri} has no media file ({', '.join(SUFFIXES)}) below it")
    split_folders = {p.split("/")[0] for p in paths} <= set(SPLITS)
    rows: dict[str, list] = {name: [] for name in ("clip_id", "video", "audio", "image", "split", "label")}
    row_of: dict[str, int] = {}  # by clip_id: a.old.mp4 sorts between a.mp4 and a.wav
    for path in paths:
        clip_id = path.rpartition(".")[0]
        folders = clip_id.split("/")[:-1]
        if len(folders) < 1 + split_folders:
            where = "ROOT/SPLIT/CLASS/" if split_folders else "ROOT/CLASS/"
            raise CorpusError(f"corpus {uri}: {path} lies in no class folder; put it in {where} or name a manifest")
        modality = SUFFIXES[_ending(path)]
        row = row_of.get(clip_id)
        if row is None or rows[modality][row] is not None:
            row = row_of[clip_id] = len(rows["clip_id"])
            split = folders[0] if split_folders else None
            for name, value in {"clip_id": clip_id, "split": split, "label": folders[split_folders]}.items():
                rows[name].append(value)
            for name in ("video", "audio", "image"):
                rows[name].append(None)
        rows[modality][row] = path
    if not split_folders:
        rows["split"] = split_by_hash(rows["clip_id"], rows["label"])
    table = pa.table({name: pa.array(values, pa.string()) for name, values in rows.items()})
    left_out = ", ".join(
        f"{count} {'.' * bool(ending)}{ending or 'without an ending'}" for ending, count in others.most_common()
    )
    notes = [f"files left out: {left_out}"] if others else []
    if tables:
        notes.append(f"{', '.join(tables)} is not read; a manifest is given itself, as --corpus")
    if not split_folders:
        notes.append(
            "split 70 / 10 / 20 by a hash of the names; a manifest with a column 'group' keeps speakers in one"
        )
    return table, tuple(notes)


def _ending(path: str) -> str:
    name = path.rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""


def hash_split(key: str) -> str:
    """The split that a hash of a clip's or a group's name gives it: 70 / 10 / 20."""
    return _split_at(_share(key))


def _split_at(value: float) -> str:
    return next(split for split, share in zip(SPLITS, SHARES, strict=True) if value < share)


def _share(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def split_by_hash(clip_ids: Sequence[str], classes: Sequence[str]) -> list[str]:
    """A split for each clip: 70 / 10 / 20 by a hash of its id.

    A class of three clips or more has one in each split: the one whose hash is nearest changes its split.
    """
    hashes = [_share(clip_id) for clip_id in clip_ids]
    splits = [_split_at(value) for value in hashes]
    members = defaultdict(list)
    for row, name in enumerate(classes):
        members[name].append(row)
    for rows in members.values():
        for split, upper in zip(SPLITS, SHARES, strict=True):
            counts = Counter(splits[row] for row in rows)
            if counts[split] or len(rows) < len(SPLITS):
                continue
            spare = [row for row in rows if counts[splits[row]] > 1]
            splits[min(spare, key=lambda row: (abs(hashes[row] - upper), clip_ids[row]))] = split
    return splits
