"""UTD-MHAD (Chen, Jafari & Kehtarnavaz 2015): 8 subjects do 27 actions four times, before a Kinect and with a sensor.

    ROOT/RGB/a1_s1_t1_color.avi              the picture
    ROOT/Depth/a1_s1_t1_depth.mat            `d_depth` (240, 320, T) in mm: the picture where there are no RGB files
    ROOT/Skeleton/a1_s1_t1_skeleton.mat      `d_skel` (20 joints, 3, T) in metres, 30 Hz
    ROOT/Inertial/a1_s1_t1_inertial.mat      `d_iner` (T, 6): g and degrees per second, 50 Hz

861 clips: 27 x 8 x 4 without the three that the authors found corrupt. The split is the paper's cross-subject protocol,
odd subjects for training and even ones for the test; subject 7 is held out of train for validation. `fold` leaves one
subject out. Skeletons and sensors become .npy files in the folder named as the manifest, and depth becomes mp4 there
(brightness: 0 at 4 m and beyond or unknown, 255 at 1.5 m). Not run on an official download.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from features.datasets.layout import VIDEO, Layout, Row
from features.errors import CorpusError, one_line

ACTIONS = (
    "swipe_left", "swipe_right", "wave", "clap", "throw", "arm_cross", "basketball_shoot", "draw_x", "draw_circle_cw",
    "draw_circle_ccw", "draw_triangle", "bowling", "boxing", "baseball_swing", "tennis_swing", "arm_curl",
    "tennis_serve", "push", "knock", "catch", "pickup_throw", "jog", "walk", "sit_to_stand", "stand_to_sit", "lunge",
    "squat",
)  # fmt: skip
SUBJECTS, TRIALS = range(1, 9), range(1, 5)
CORRUPT = ("a8_s1_t4", "a23_s6_t4", "a27_s8_t4")
VAL = 7
JOINTS, CHANNELS = 20, 6
DEPTH_FPS, NEAR, FAR = 30, 1500, 4000  # frames per second, mm


def read(layout: Layout) -> Iterator[Row]:
    """A row per clip: video, skeleton_features, inertial_features, action; the subject is its group."""
    colors, mats = layout.media(*VIDEO), layout.media("mat")
    pictures = colors or any(name.endswith("_depth") for name in mats)
    for subject in SUBJECTS:
        for number, action in enumerate(ACTIONS, 1):
            for name in (f"a{number}_s{subject}_t{trial}" for trial in TRIALS):
                if name not in CORRUPT:
                    depth = mats.get(f"{name}_depth")
                    video = colors.get(f"{name}_color")
                    if not colors and depth:
                        video = write_depth(depth, layout.vectors / f"{name}_depth.mp4")
                    yield {
                        "clip_id": name,
                        **({"video": video} if pictures else {}),
                        "skeleton_features": _skeleton(mats.get(f"{name}_skeleton"), layout.vectors),
                        "inertial_features": _inertial(mats.get(f"{name}_inertial"), layout.vectors),
                        "split": "test" if subject % 2 == 0 else "val" if subject == VAL else "train",
                        "fold": subject - 1,
                        "group": f"s{subject}",
                        "action": action,
                    }


def _skeleton(source: Path | None, folder: Path) -> Path | None:
    if source is None:
        return None
    joints = _array(source, "d_skel", (JOINTS, 3, -1))
    return _write(np.moveaxis(joints, -1, 0).reshape(-1, JOINTS * 3), folder / f"{source.stem}.npy")


def _inertial(source: Path | None, folder: Path) -> Path | None:
    return source and _write(_array(source, "d_iner", (-1, CHANNELS)), folder / f"{source.stem}.npy")


def _write(values: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values.astype(np.float32))
    return path


def write_depth(source: Path, path: Path) -> Path:
    """Write the depth of a .mat file, in mm, as brightness in mp4; returns its path. One thread, for the same bytes."""
    depth = _array(source, "d_depth", (-1, -1, -1)).astype(np.float32)
    brightness = np.where(depth > 0, np.clip((FAR - depth) / (FAR - NEAR), 0, 1) * 255, 0).round().astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        options = {"crf": "18", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=DEPTH_FPS, options=options)
        stream.height, stream.width = depth.shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in np.moveaxis(brightness, -1, 0):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="gray")))
        container.mux(stream.encode(None))
    return path


def _array(source: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The one array of an official file. Raises CorpusError where it is not there, or has another shape."""
    try:
        values = loadmat(source, variable_names=[name])[name]
    except (OSError, ValueError, KeyError, NotImplementedError, MatReadError, zlib.error) as error:
        raise CorpusError(f"{source} is no MATLAB file with {name}: {one_line(error)}") from error
    if values.ndim != len(shape) or any(want not in (-1, n) for want, n in zip(shape, values.shape, strict=True)):
        raise CorpusError(f"{source}: {name} has shape {values.shape}, not {shape} (-1 is any)")
    return values
