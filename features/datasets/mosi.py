"""CMU-MOSI and CMU-MOSEI (Zadeh et al. 2016, 2018): sentiment from -3 to 3 in segments of opinion videos.

    ROOT/Raw/03bSnISJMiM/1.mp4, LISTS/label.csv         segments of video, with their text, as MMSA gives them out
    ROOT/.../{aligned,unaligned}_50.pkl                 MMSA's features instead, with --pickle NAME

The column `mode` holds the official folds: MOSI 1,284 / 229 / 686, MOSEI 16,326 / 1,871 / 4,659. The pickle is read by
an unpickler that knows nothing but arrays; its features become .npy files next to the manifest: `audio`, `vision`, and
`bert`, its vectors of the text, which also stands there as text. They are padded with zeros: `--vectors.trim`.
"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from features.datasets.layout import VIDEO, Layout, Row
from features.errors import CorpusError, one_line

SPLITS = {"train": "train", "valid": "val", "test": "test"}
FEATURES = {"audio": "audio", "vision": "vision", "text": "bert"}
ARRAYS = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("_codecs", "encode"),
}


def read(layout: Layout) -> Iterator[Row]:
    """A row per segment of label.csv: video, text, sentiment; the video that it is cut from is its group."""
    videos = {f"{path.parent.name}/{path.stem}": path for path in layout.files(*VIDEO)}
    for row in layout.table("label.csv"):
        segment = f"{row['video_id']}/{row['clip_id']}"
        yield {
            "clip_id": segment,
            "video": videos.get(segment),
            "text": row["text"],
            "split": _split(row["mode"]),
            "group": row["video_id"],
            "sentiment": float(row["label"]),
        }


def read_pickle(layout: Layout, name: str) -> Iterator[Row]:
    """A row per segment of MMSA's pickle: text, audio_features, vision_features, bert_features, sentiment."""
    content = load_arrays(layout.list_file(name))
    layout.vectors.mkdir(parents=True, exist_ok=True)
    for part, split in SPLITS.items():
        if part not in content:
            raise CorpusError(f"{name} has no part {part!r}; it has {', '.join(map(str, content))}")
        segments = content[part]
        files = {}
        for key, modality in FEATURES.items():
            if key in segments:
                files[modality] = layout.vectors / f"{modality}-{split}.npy"
                np.save(files[modality], np.asarray(segments[key], np.float32))
        for number, segment in enumerate(segments["id"]):
            yield {
                "clip_id": str(segment).replace("$_$", "/"),
                "text": str(segments["raw_text"][number]),
                **{f"{modality}_features": (path, f"#[{number}]") for modality, path in files.items()},
                "split": split,
                "sentiment": float(segments["regression_labels"][number]),
            }


def load_arrays(path: Path) -> Mapping[str, Any]:
    """A pickle of dicts, lists, texts, numbers and NumPy arrays. Raises CorpusError for one that holds anything else:
    a pickle may run any code that it names.
    """
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, ImportError, IndexError) as error:
        raise CorpusError(f"{path} is no pickle of plain arrays: {one_line(error)}") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not an array")
        return super().find_class(module, name)


def _split(mode: str) -> str:
    if mode not in SPLITS:
        raise CorpusError(f"label.csv has the mode {mode!r}; known are {', '.join(SPLITS)}")
    return SPLITS[mode]
