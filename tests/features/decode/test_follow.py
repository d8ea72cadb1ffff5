"""--video.crop face and mouth: the crop follows a (drawn) face, and where there is none it is the picture's middle."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from drawing import LIPS, draw_face
from mediafiles import noise, rotate, write_media
from storefiles import LABELS, TASKS, make_clip

from features.decode.clip import encode_clip
from features.decode.follow import BYTES, cut, picture_size, place
from features.decode.like import spec_of_store
from features.decode.specs import EncoderSpec, VideoSpec
from features.decode.video import decode_frames
from features.encoders import faces
from features.encoders.faces import Face, find_faces
from features.errors import FeaturesError
from features.store import StoreSpec
from features.store.quality import quality_schema
from features.store.samples import Sample, pack
from features.store.shards import ShardWriter, create_store
from pipelines.extract import print_modalities

DATA = Path(__file__).parents[4] / "shared" / "data"
FPS = 5
WAY = np.linspace(90, 230, 12)  # where the face is, from left to right, in 2.4 s


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """A clip in which a face moves from left to right."""
    path = tmp_path_factory.mktemp("faces") / "moving.mp4"
    return write_media(path, [draw_face(320, 240, x, 110) for x in WAY], fps=FPS)


def offset(values, colour):
    """Where a colour lies in each picture, from its middle, in shares of its side: (N, 2) x and y."""
    near = np.abs(values.astype(int) - colour).max(axis=-1) < 40
    middle = (values.shape[1] - 1) / 2
    return np.array([[(axis.mean() - middle) / values.shape[1] for axis in np.nonzero(p)[::-1]] for p in near])


def test_the_crop_follows_the_face_and_its_mouth(moving):
    face, mouth = (decode_frames(moving, VideoSpec(FPS, 64, crop)) for crop in ("face", "mouth"))
    assert face.values.shape == (12, 64, 64, 3) and face.quality["face_found"] == 1
    inner = slice(2, -2)  # before the first look, and after the last one, it stays
    assert np.abs(offset(mouth.values, LIPS)[inner]).max() < 0.1
    lips = offset(face.values, LIPS)[inner]
    assert np.abs(lips[:, 0]).max() < 0.1 and (lips[:, 1] > 0.05).all()
    whole = decode_frames(moving, VideoSpec(FPS, 64)).values
    assert np.ptp(offset(whole, LIPS)[inner, 0]) > 0.2  # or nothing moved
    lips_of = [(np.abs(v.astype(int) - LIPS).max(axis=-1) < 40).sum() for v in (whole, face.values, mouth.values)]
    assert lips_of == sorted(lips_of)


def test_decoders_and_a_phones_rotation_change_little(moving, tmp_path):
    for decoder in ("decord", "pyav"):
        values = decode_frames(moving, VideoSpec(FPS, 64, "mouth", decoder=decoder)).values
        assert np.abs(offset(values, LIPS)[2:-2]).max() < 0.1
    lying = [np.rot90(draw_face(200, 320, 100, 150)) for _ in range(6)]
    upright = [np.rot90(picture, 3) for picture in lying]
    turned = rotate(write_media(tmp_path / "turned.mp4", lying, fps=FPS), 1)
    a = decode_frames(turned, VideoSpec(FPS, 64, "face"))
    b = decode_frames(write_media(tmp_path / "upright.mp4", upright, fps=FPS), VideoSpec(FPS, 64, "face"))
    assert a.quality["face_found"] == b.quality["face_found"] == 1
    assert np.abs(a.values.astype(float) - b.values).mean() < 3


@pytest.mark.data
@pytest.mark.skipif(not (DATA / "grid").is_dir(), reason="needs ../shared/data/grid")
def test_real_speakers_have_a_mouth_where_it_is_known_to_be():
    path = str(DATA / "grid/clips/bbaf2n.mp4")
    assert decode_frames(path, VideoSpec(2, 32, "mouth")).quality["face_found"] == 1
    mouth = find_faces(decode_frames(path, VideoSpec(2, 250)).values).mouth / 250
    assert (np.abs(mouth - (0.5, 0.695)) < (0.2, 0.225)).all()  # .30 to .70 by .47 to .92 of the picture


def test_without_a_face_it_is_the_middle_and_the_index_says_so(tmp_path):
    path = write_media(tmp_path / "noise.mp4", noise(6, 96, 64), fps=FPS)
    spec = EncoderSpec(VideoSpec(FPS, 32, "face"), None)
    sample = encode_clip(make_clip("0"), {"video": path}, spec)
    assert sample.quality["face_found"] == 0
    middle = decode_frames(path, VideoSpec(FPS, 32, (1 / 6, 0, 5 / 6, 1))).values
    assert np.abs(sample.features["video"].astype(float) - middle).mean() < 12
    assert pa.Table.from_pylist([sample.quality], quality_schema(spec.features()))["face_found"].to_pylist() == [0]
    assert "face_found" not in quality_schema(EncoderSpec(VideoSpec(), None).features()).names
    tiny = decode_frames(write_media(tmp_path / "tiny.mp4", noise(6, 12, 8), fps=FPS), VideoSpec(FPS, 32, "mouth"))
    assert tiny.values.shape == (6, 32, 32, 3) and tiny.quality["face_found"] == 0


def test_the_jobs_last_lines_count_the_videos_without_a_face(tmp_path, capsys):
    spec = StoreSpec(EncoderSpec(VideoSpec(size=4, crop="face"), None).features(), TASKS, {"train": 4}, 4, "x")
    store, picture = create_store(str(tmp_path / "store"), spec), {"video": np.zeros((1, 4, 4, 3), np.uint8)}
    with ShardWriter(store.uri, "train-000000", spec, LABELS) as writer:
        for number, found in enumerate((1.0, 0.0, 0.5, None)):  # the last one has no picture
            quality = {} if found is None else {"face_found": found}
            sample = Sample({} if found is None else picture, 1.0, quality)
            writer.add(make_clip(str(number)), pack(make_clip(str(number)), sample))
        writer.commit()
    print_modalities(store, 4)
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "  crop: a face in 2 of 3 videos; of the others it shows the middle (face_found 0 in the index)"


def test_one_wrong_look_moves_nothing_and_the_window_stays_inside():
    times = np.linspace(0, 10, 11)
    centre = np.tile([50.0, 40.0], (11, 1))
    centre[4] = 150, 80  # somebody else
    side = np.full(11, 20.0)
    side[7] = np.nan  # a look that found none
    centre[7] = np.nan
    window = place(Face(centre, side, centre, side), times, times, "face", 200, 100)
    np.testing.assert_allclose(window.left + window.side / 2, 50)
    np.testing.assert_allclose(window.top + window.side / 2, 40)
    assert window.side == pytest.approx(26)
    edge = np.full((11, 2), 3.0)
    corner = place(Face(edge, side, edge, side), times, times, "face", 200, 100)
    assert (corner.left == 0).all() and (corner.top == 0).all()
    large = place(Face(centre, side * 100, centre, side), times, times, "face", 200, 100)
    assert large.side == 100 and (large.left + 100 <= 200).all()
    picture = np.zeros((1, 100, 200, 3), np.uint8)
    picture[0, 30:50, 40:60] = 255
    tight = place(Face(centre, side / 1.3, centre, side), times, times[:1], "face", 200, 100)
    assert np.median(cut(picture, tight, 8)) > 220


def test_whole_pictures_are_read_smaller_where_they_would_take_much_memory():
    assert picture_size(1920, 1080, 10) == (1920, 1080)
    width, height = picture_size(1920, 1080, 1000)
    assert width / height == pytest.approx(16 / 9, rel=0.01) and 0.98 * BYTES < 3000 * width * height < 1.02 * BYTES


def test_the_detector_is_part_of_the_spec_and_read_back(monkeypatch):
    spec = EncoderSpec(VideoSpec(crop="mouth"), None)
    (feature,) = spec.features().values()
    assert feature.encoder["detector"]["name"] == "mtcnn" and len(feature.encoder["detector"]["weights"]) == 3
    assert spec_of_store(spec.features()) == spec
    monkeypatch.setattr(faces, "weights_id", lambda file: "other")
    with pytest.raises(FeaturesError, match="feature video: detector would be"):
        spec_of_store({"video": feature})
    monkeypatch.setattr(faces.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FeaturesError, match=r"face and mouth need .*pip install 'clcr-pipeline\[encoders\]"):
        spec.features()
