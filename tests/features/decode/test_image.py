"""Still images as a grid of regions, and pictures through ResNet-18: the same numbers as the parts they are made of."""

import numpy as np
import pytest
import torch
from mediafiles import damage, numbered, write_media
from PIL import Image
from safetensors.torch import save_file

from features.corpus.manifest import Clip
from features.decode.clip import encode_clip
from features.decode.image import decode_image, encode_image, load_resnet18
from features.decode.specs import EncoderSpec, ImageSpec, VideoSpec
from features.encoders import Asked
from features.encoders.running import runner_alone
from features.errors import FeaturesError, MediaError

COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [90, 90, 90]]], np.uint8)  # 2 x 2


@pytest.fixture
def quarters(tmp_path):
    """A picture of four plain quarters, 80 x 40 pixels."""
    Image.fromarray(COLOURS.repeat(20, axis=0).repeat(40, axis=1)).save(tmp_path / "quarters.png")
    return tmp_path / "quarters.png"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A state dict of ResNet-18 with random weights and a head of seven classes."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    state = resnet18(num_classes=7).state_dict()
    folder = tmp_path_factory.mktemp("weights")
    torch.save(state, folder / "resnet.pth")
    save_file(state, folder / "resnet.safetensors")
    return folder / "resnet.pth"


def test_a_token_is_the_pixels_of_its_region_row_by_row(quarters):
    encoded = encode_image(str(quarters), ImageSpec(size=16, grid=2))
    assert encoded.values.shape == (4, 3 * 8 * 8) and encoded.values.dtype == np.uint8 and encoded.duration == 0
    regions = encoded.values.reshape(4, 8, 8, 3)[:, 2:6, 2:6]  # within, for scaling mixes the edges
    assert (regions == COLOURS.reshape(4, 1, 1, 3)).all()
    whole = encode_image(str(quarters), ImageSpec(size=16, grid=1)).values.reshape(16, 16, 3)
    np.testing.assert_array_equal(whole, decode_image(str(quarters), 16))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp", "a.gif"])
def test_every_usual_format_is_read(tmp_path, name):
    Image.new("RGB", (50, 30), (200, 40, 90)).save(tmp_path / name)
    pixels = decode_image(str(tmp_path / name), 8)
    assert pixels.shape == (8, 8, 3) and np.abs(pixels.astype(int) - (200, 40, 90)).max() <= 8


def test_what_is_transparent_is_white_and_a_turned_phone_is_turned_back(tmp_path):
    Image.new("RGBA", (10, 10), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (decode_image(str(tmp_path / "clear.png"), 4) == 255).all()
    picture, exif = Image.fromarray(COLOURS.repeat(16, axis=0).repeat(16, axis=1)), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    turned = encode_image(str(tmp_path / "turned.png"), ImageSpec(size=16, grid=2)).values.reshape(4, 8, 8, 3)
    assert (turned[:, 3, 3].reshape(2, 2, 3) == np.rot90(COLOURS, -1)).all()


@pytest.mark.parametrize(("name", "order"), [("grey.png", "<"), ("grey.tif", "<"), ("grey.tif", ">")])
def test_grey_of_16_bits_is_scaled_to_8(tmp_path, name, order):
    grey = np.array([[0, 0x40FF], [0x8000, 0xFFFF]], f"{order}u2").repeat(16, axis=0).repeat(16, axis=1)
    Image.fromarray(grey).save(tmp_path / name)
    pixels = decode_image(str(tmp_path / name), 32)
    assert pixels[4::24, 4::24].tolist() == [[[0] * 3, [0x40] * 3], [[0x80] * 3, [255] * 3]]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_whose_white_is_not_known_is_a_named_failure(tmp_path, kind):
    Image.fromarray(np.ones((8, 8), kind)).save(tmp_path / "x.tif")
    with pytest.raises(MediaError, match=r"x\.tif: no telling which value is white \(mode [IF]\); save it as PNG"):
        decode_image(str(tmp_path / "x.tif"), 8)


@pytest.mark.parametrize("kind", ["text", "cut", "missing", "empty"])
def test_a_damaged_image_is_a_named_failure(tmp_path, quarters, kind):
    path = tmp_path / "x.png"
    if kind != "missing":
        path.write_bytes({"text": b"no image", "cut": quarters.read_bytes()[:60], "empty": b""}[kind])
    with pytest.raises(MediaError, match=r"x\.png") as failure:
        encode_image(str(path), ImageSpec())
    assert failure.value.stage == ("image" if kind in ("text", "cut") else "open")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif"])
def test_damage_of_any_kind_is_a_named_failure_or_a_picture(tmp_path, name):
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (60, 60, 3), np.uint8)).save(tmp_path / name)
    whole, failed = (tmp_path / name).read_bytes(), 0
    for number in range(100):
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(damage(whole, generator))
        try:
            assert encode_image(str(path), ImageSpec(size=16)).values.shape == (16, 48)
        except MediaError as failure:
            assert path.name in str(failure) and failure.stage in ("open", "image")
            failed += 1
    assert failed > 10


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_regions_by_resnet_average_to_its_own_global_vector(quarters, weights, ending):
    from torchvision.models import resnet18
    from torchvision.transforms.functional import normalize

    spec = ImageSpec("resnet18", str(weights.with_suffix(f".{ending}")), size=128, grid=4)
    tokens = encode_image(str(quarters), spec).values
    assert tokens.shape == (16, 512) and tokens.dtype == np.float16
    net = resnet18(num_classes=7)
    net.load_state_dict(torch.load(weights))
    net.fc = torch.nn.Identity()
    pixels = torch.from_numpy(decode_image(str(quarters), 128).copy()).permute(2, 0, 1) / 255
    with torch.no_grad():
        vector = net.eval()(normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None])[0]
    np.testing.assert_allclose(tokens.mean(axis=0), vector.numpy(), rtol=2e-3, atol=2e-3)


def embed_frames(frames, weights):
    """Frames through ResNet-18, as a decoding process has them."""
    return runner_alone(Asked("resnet18", "video", weights)).one(frames)


def test_a_frames_vector_does_not_depend_on_the_frames_beside_it(weights):
    frames = np.random.default_rng(0).integers(0, 256, (35, 32, 32, 3), np.uint8)
    together = embed_frames(frames, str(weights))
    assert together.shape == (35, 512) and together.dtype == np.float16
    np.testing.assert_allclose(embed_frames(frames[20:21], str(weights)), together[20:21], atol=2e-3)
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_a_videos_frames_are_stored_as_vectors_with_their_rate(tmp_path, weights):
    path = write_media(tmp_path / "clip.mp4", numbered(25))
    clip = Clip("1", path, None, None, None, None, None, "train", None, None)
    pixels = encode_clip(clip, {"video": path}, EncoderSpec(VideoSpec(size=32), None))
    spec = EncoderSpec(VideoSpec(size=32, encoder="resnet18", weights=str(weights)), None)
    sample, feature = encode_clip(clip, {"video": path}, spec), spec.features()["video"]
    np.testing.assert_array_equal(sample.features["video"], embed_frames(pixels.features["video"], str(weights)))
    assert (feature.shape, feature.dtype, feature.rate) == ((512,), "float16", 12.5)
    assert sample.duration == 1.0 and sample.quality == pixels.quality


def test_a_store_names_weights_by_their_content_and_pixels_as_it_always_did(weights, tmp_path):
    copy = tmp_path / "elsewhere.pth"
    copy.write_bytes(weights.read_bytes())
    one, two = (EncoderSpec(VideoSpec(encoder="resnet18", weights=str(w)), None).features() for w in (weights, copy))
    assert one == two and str(weights) not in str(one)
    assert EncoderSpec(VideoSpec(), None).features()["video"].encoder.keys() == {
        "name", "fps", "size", "crop", "decoder", "sampling", "quality"
    }  # fmt: skip


def test_weights_that_are_none_are_named(tmp_path):
    (tmp_path / "junk.pth").write_bytes(b"junk")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("junk.pth", "other.pth", "gone.pth", "IMAGENET9"):
        with pytest.raises(FeaturesError, match=rf"weights .*{name} are none of ResNet-18's: .*IMAGENET1K_V1"):
            load_resnet18(str(tmp_path / name))


def test_options_that_do_not_fit_together_are_refused():
    for wrong in ({"encoder": "resnet18"}, {"weights": "x.pth"}):
        with pytest.raises(ValueError, match=r"--image\.encoder resnet18 and --image.weights belong together"):
            ImageSpec(**wrong)
        with pytest.raises(ValueError, match=r"--video\.encoder resnet18 and --video.weights belong together"):
            VideoSpec(**wrong)
    for wrong in ({"size": 65}, {"grid": 0}, {"size": 2}):
        with pytest.raises(ValueError, match=r"--image\.size"):
            ImageSpec(**wrong)


def test_torchvisions_name_takes_the_weights_that_its_cache_holds(tmp_path, weights, monkeypatch):
    from torchvision.models import ResNet18_Weights

    cached = tmp_path / "hub/checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    cached.write_bytes(weights.read_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    named, file = load_resnet18("IMAGENET1K_V1"), load_resnet18(str(weights))
    load_resnet18.cache_clear()
    assert all(torch.equal(named.state_dict()[name], value) for name, value in file.state_dict().items())
    assert ImageSpec("resnet18", "IMAGENET1K_V1").weights in str(
        EncoderSpec(None, None, image=ImageSpec("resnet18", "IMAGENET1K_V1")).features()["image"]
    )
