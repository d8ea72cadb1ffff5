"""Texts as hidden layers of a real encoder: what transformers itself gives, token by token, layer by layer."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from storefiles import make_clip

from features.corpus.manifest import is_text_file, read_corpus
from features.decode import text
from features.decode.isolation import IsolatedEncoder
from features.decode.specs import EncoderSpec, TextSpec, VideoSpec
from features.encoders import hub
from features.errors import FeaturesError, MediaError

ROOT = Path(__file__).parents[3]
WORDS = "It was a very good film, and nobody fell asleep."


@pytest.fixture(scope="module")
def feature():
    return text.find_feature(TextSpec())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The folder of another encoder: four layers of 16 numbers, with random weights."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(hub.packaged())
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reference(words, folder=None):
    """Every hidden state of a text by transformers alone: (layers + 1, T, D)."""
    from transformers import AutoModel, AutoTokenizer

    folder = folder or hub.packaged()
    tokens = AutoTokenizer.from_pretrained(folder)(words, return_tensors="pt")
    with torch.no_grad():
        return torch.cat(AutoModel.from_pretrained(folder).eval()(**tokens, output_hidden_states=True).hidden_states)


def test_the_tokens_are_an_early_a_middle_and_the_last_layer(feature):
    assert (feature.shape, feature.dtype, feature.rate) == ((3, 384), "float16", 0.0)
    values = text.encode_text(WORDS, TextSpec(), feature).values
    assert values.dtype == np.float16 and values.shape[1:] == (3, 384)
    hidden = reference(WORDS)
    assert len(hidden) == 7 and hidden.shape[1] == len(values)
    np.testing.assert_allclose(values, hidden[[2, 4, 6]].transpose(0, 1).numpy(), rtol=2e-3, atol=2e-3)


def test_other_layers_and_lengths_can_be_asked_for():
    spec = TextSpec(layers=(1, 6), max_tokens=5)
    feature = text.find_feature(spec)
    values = text.encode_text(WORDS, spec, feature).values
    assert feature.shape == (2, 384) and values.shape == (5, 2, 384)
    short = reference("It was a")  # five tokens with the two special ones: the rest of the text was never seen
    np.testing.assert_allclose(values, short[[1, 6]].transpose(0, 1).numpy(), rtol=2e-3, atol=2e-3)


def test_a_local_folder_is_an_encoder_and_its_weights_are_its_name(other, feature, tmp_path):
    spec = TextSpec(encoder=str(other))
    mine = text.find_feature(spec)
    assert mine.shape == (3, 16) and mine.encoder["layers"] == [1, 3, 4]
    values = text.encode_text(WORDS, spec, mine).values
    np.testing.assert_allclose(values, reference(WORDS, other)[[1, 3, 4]].transpose(0, 1).numpy(), rtol=2e-3, atol=2e-3)
    assert mine.encoder["weights"] != feature.encoder["weights"] and str(other) not in str(mine.encoder)
    (tmp_path / "moved").symlink_to(other)
    assert text.find_feature(TextSpec(encoder=str(tmp_path / "moved"))) == mine, "where it lies means nothing"


def test_the_form_of_other_modalities_names_the_same_encoder(other):
    plain, form = TextSpec(encoder=str(other)), TextSpec(encoder=f"hf:{other}")
    assert text.find_feature(form) == text.find_feature(plain)
    values = [text.encode_text(WORDS, spec, text.find_feature(plain)).values for spec in (plain, form)]
    np.testing.assert_array_equal(*values)
    assert hub.parts("hf:bert-base-uncased@main") == ("bert-base-uncased", "main")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (TextSpec(encoder="/no/such/folder"), "--text.encoder /no/such/folder does not load"),
        (TextSpec(layers=(7,)), "--text.layers 7: the encoder has 6 layers"),
    ],
)
def test_an_encoder_that_cannot_be_used_is_named(spec, reason):
    with pytest.raises(FeaturesError, match=reason):
        text.find_feature(spec)


def test_wrong_options_are_refused():
    for wrong in ({"layers": (3, 1)}, {"layers": (0, 1)}, {"layers": (2, 2)}, {"max_tokens": 2}):
        with pytest.raises(ValueError, match="--text"):
            TextSpec(**wrong)


def test_without_the_package_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FeaturesError, match=r"pip install 'clcr-pipeline\[text\]', or leave text out by --modalities"):
        text.find_feature(TextSpec())


def test_a_text_is_a_file_where_it_looks_like_one(tmp_path, feature):
    (tmp_path / "talk one.txt").write_text(WORDS)
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "blank.txt").write_text(" \n")
    rows = f'clip_id,text,split,label\n1,{tmp_path.name}/x,train,a\n2,"{WORDS}",train,a\n3,talk one.txt,train,a\n'
    (tmp_path / "corpus.csv").write_text(rows)
    literal, plain, file = read_corpus(str(tmp_path / "corpus.csv")).clips()
    assert literal.media("x") == plain.media("x") == {} and file.media(str(tmp_path)).keys() == {"text"}
    assert (
        is_text_file("s3://bucket/1") and not is_text_file("see a.txt\nand b.txt") and not is_text_file("https://x.y")
    )
    from_file = text.encode_text(file.media(str(tmp_path))["text"], TextSpec(), feature)
    np.testing.assert_array_equal(from_file.values, text.encode_text(WORDS, TextSpec(), feature).values)
    for name, reason in (("gone.txt", "does not exist"), ("latin.txt", "is no UTF-8 text"), ("blank.txt", "is blank")):
        with pytest.raises(MediaError, match=reason):
            text.encode_text(str(tmp_path / name), TextSpec(), feature)


@pytest.mark.slow
def test_a_decoding_process_without_text_does_not_load_the_language_library():
    code = (
        "import sys, features.decode.isolation, features.decode.clip; from features.decode.clip import prepare\n"
        "from features.decode.specs import EncoderSpec, VideoSpec\n"
        "prepare(EncoderSpec(VideoSpec(), None))\n"
        "print(*sorted({'transformers', 'tokenizers', 'torchvision', 'PIL', 'sentence_transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    assert EncoderSpec(VideoSpec(), None).features().keys() == {"video"}


FROM_HUB = """
import sys
from pathlib import Path
from features.decode.like import spec_of_store
from features.decode.specs import TextSpec
from features.decode.text import encode_text, find_feature
from features.errors import FeaturesError
from pipelines.common.networks import resolved
spec = resolved("text", TextSpec(encoder="someone/tiny"))
feature = find_feature(spec)
Path(sys.argv[1]).write_text("f" * 40)  # the branch moves on
again = spec_of_store({"text": feature}).text
for found in spec, again:
    print(found.encoder, feature.encoder["weights"], encode_text("one word", found, feature).values.shape)
try:
    resolved("text", TextSpec(encoder="someone/else"))
except FeaturesError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_name_on_the_hub_is_named_by_its_commit(other, tmp_path):
    """The hub's cache holds it, as after a download; the network is off."""
    folder, commit = tmp_path / "hub/models--someone--tiny", "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    shutil.copytree(other, folder / "snapshots" / commit)
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    code = [sys.executable, "-c", FROM_HUB, str(folder / "refs/main")]
    done = subprocess.run(code, capture_output=True, text=True, cwd=ROOT, env=env)
    *same, elsewhere = done.stdout.strip().splitlines()
    assert same == 2 * [f"someone/tiny@{commit} someone/tiny@{commit} (4, 3, 16)"], done.stderr
    assert re.match("--text.encoder someone/else does not load: .* NAME@COMMIT of one that is in", elsewhere)


@pytest.mark.slow
def test_the_network_is_no_clips_cost_and_loads_once(feature):
    """A clip may take 50 MB: far less than it takes to load the library and the weights."""
    spec = EncoderSpec(None, None, text=TextSpec(), declared={"text": feature})
    encoder = IsolatedEncoder(spec, timeout=10.0, memory_gb=0.05)
    try:
        clips = [replace(make_clip(str(n)), text=f"word {n}", video=None) for n in range(20)]
        outcomes = [outcome for _, outcome in encoder.encode((clip, {}) for clip in clips)]
        assert [outcome.tokens for outcome in outcomes] == [{"text": 4}] * 20
        loaded = next(iter(encoder.encode([(clips[0], {})])))[1]
        assert loaded == outcomes[0]
    finally:
        encoder.close()


@pytest.mark.slow
def test_a_network_that_is_gone_on_a_worker_stops_the_job_in_one_line(feature, tmp_path):
    spec = EncoderSpec(None, None, text=TextSpec(encoder=str(tmp_path / "gone")), declared={"text": feature})
    with pytest.raises(FeaturesError, match=r"^on .*: --text\.encoder .*gone does not load"):
        list(IsolatedEncoder(spec, timeout=5).encode([(make_clip("1"), {})]))
