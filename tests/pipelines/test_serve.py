"""The serve job: clips over HTTP, answered as predict answers them; what is poison costs itself alone."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from mediafiles import numbered, sine, write_media
from models import small_model
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from storefiles import TASKS, make_clips, write_store

from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.store import Store, StoreSpec
from features.store.shards import create_store
from infra.head import free_ports
from infra.screenshot import chromium
from pipelines.answering.clips import ClipAnswerer, clip_of_file
from pipelines.common.errors import JobError
from pipelines.serve import ServeConfig, is_loopback, serve_model
from pipelines.training.trained import open_model

ROOT = Path(__file__).parents[2]
TOKEN = {"Authorization": "Bearer open sesame"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of small pictures and sound, and clips: one that is whole, one that is broken."""
    folder = tmp_path_factory.mktemp("serve")
    written = write_store(folder / "store", make_clips(8, 4, 4))  # its samples are of no use here, its features are
    spec = EncoderSpec(VideoSpec(fps=5, size=4), AudioSpec(mels=8))
    create_store(str(folder / "spec"), StoreSpec(spec.features(), TASKS, {"train": 1}, 4, "x"))
    small_model(folder / "model", written)
    (folder / "model" / "store.json").write_text((folder / "spec" / "store.json").read_text())
    config = (folder / "model" / "config.json").read_text()
    (folder / "model" / "config.json").write_text(config.replace('"rate": 12.5', '"rate": 5.0'))
    assert Store(str(folder / "spec")).spec.features["video"].shape == (4, 4, 3)
    write_media(folder / "loud.mp4", numbered(25), sound=sine(440, 1.0))
    (folder / "broken.mp4").write_bytes((folder / "loud.mp4").read_bytes()[:300] + bytes(500))
    return folder


@pytest.fixture(scope="module")
def server(model):
    """The address of the job, which runs as a person starts it."""
    port = free_ports(1)[0]
    command = ["pipelines/serve.py", "--model", model / "model", "--port", port, "--max-mb", "0.5", "--timeout", "20"]
    with open(model / "log", "w") as log:
        job = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, "SERVE_TOKEN": "open sesame"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + 400
    while "serving " not in (model / "log").read_text():
        assert job.poll() is None and time.monotonic() < end, (model / "log").read_text()
        time.sleep(0.5)
    yield address
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 0, (model / "log").read_text()


def post(server, path, name=None, headers=TOKEN, **content):
    content.setdefault("data", path.read_bytes() if path else None)
    return requests.post(
        f"{server}/predict", params={"name": name or path.name}, headers=headers, timeout=120, **content
    )


@pytest.mark.slow
def test_a_clip_is_answered_as_predict_answers_it(model, server):
    reply = post(server, model / "loud.mp4")
    assert reply.status_code == 200, reply.text
    answerer = ClipAnswerer(open_model("--model", str(model / "model")))
    wanted = answerer.answer(clip_of_file(str(model / "loud.mp4"))).values
    answerer.close()
    answer = reply.json()
    assert answer["label"] == wanted["label"] and answer["mood"] == pytest.approx(wanted["mood"], abs=1e-5)
    assert sum(answer["label_probabilities"].values()) == pytest.approx(1) and set(answer["seconds"]) == {
        "decode",
        "model",
    }


@pytest.mark.slow
def test_what_is_not_taken_is_refused_with_a_reason(model, server):
    assert post(server, model / "loud.mp4", headers={}).status_code == 401
    assert post(server, model / "loud.mp4", headers={"Authorization": "Bearer x"}).status_code == 401
    broken = post(server, model / "broken.mp4")
    assert broken.status_code == 422 and broken.json()["detail"]["error"] == "MediaError"
    assert "/tmp" not in broken.text  # a server's own files are nobody's business
    assert post(server, None, "big.mp4", data=bytes(600_000)).status_code == 413
    assert post(server, model / "loud.mp4", "notes.txt").status_code == 415
    assert post(server, None, "list.mp4", data=b"#EXTM3U\nfile:///etc/passwd").status_code == 415
    assert post(server, None, "none.mp4", data=b"").status_code == 422


@pytest.mark.slow
def test_features_are_answered_and_wrong_ones_named(server):
    def ask(features, duration=1.0):
        return requests.post(
            f"{server}/features", json={"features": features, "duration": duration}, headers=TOKEN, timeout=120
        )

    tokens = np.ones((5, 8)).tolist()
    assert ask({"audio": tokens}).json()["label"] in "ab"
    for wrong in ({"smell": tokens}, {"audio": [[1.0]]}, {"audio": [["x"] * 8]}, {"audio": []}, {}):
        assert ask(wrong).status_code == 422
    for body, status in ((b"{", 422), (b"[]", 422), (bytes(600_000), 413)):
        assert requests.post(f"{server}/features", data=body, headers=TOKEN, timeout=60).status_code == status
    assert requests.post(f"{server}/features", data=b"{}", timeout=60).status_code == 401


@pytest.mark.slow
def test_health_docs_and_a_page_to_try_a_clip_in(model, server):
    assert requests.get(f"{server}/health", timeout=60).json()["status"] == "ok"
    assert requests.get(f"{server}/docs", timeout=60).status_code == 200
    assert "/predict" in requests.get(f"{server}/openapi.json", timeout=60).json()["paths"]
    with chromium() as browser:
        browser.get(server)
        wait = WebDriverWait(browser, 60)
        wait.until(lambda b: "video, audio" in b.find_element(By.ID, "about").text)
        browser.find_element(By.ID, "token").send_keys("open sesame")
        for name, place in (("loud.mp4", "answer"), ("broken.mp4", "error")):
            browser.find_element(By.ID, "clip").send_keys(str(model / name))
            browser.find_element(By.ID, "send").click()
            wait.until(lambda b, place=place: b.find_element(By.ID, place).text)
        assert browser.find_element(By.ID, "answer").text == ""
        browser.find_element(By.ID, "clip").send_keys(str(model / "loud.mp4"))
        browser.find_element(By.ID, "send").click()
        wait.until(lambda b: "label:" in b.find_element(By.ID, "answer").text)
        assert len(browser.find_elements(By.CLASS_NAME, "bar")) == 2


@pytest.mark.slow
def test_under_load_every_clip_is_answered_and_poison_costs_itself(model, server):
    clips = [model / ("broken.mp4" if n % 20 == 10 else "loud.mp4") for n in range(40)]
    started = time.monotonic()

    def ask(clip):
        begin = time.monotonic()
        return clip.name, post(server, clip).status_code, time.monotonic() - begin

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, clips))
    assert [code for name, code, _ in answers] == [422 if clip.name == "broken.mp4" else 200 for clip in clips]
    seconds = sorted(s for _, _, s in answers)
    rate = len(clips) / (time.monotonic() - started)
    print(f"{rate:.1f} clips/s, p50 {seconds[20]:.3f} s, p95 {seconds[37]:.3f} s")


def test_an_open_address_needs_a_token_and_a_lost_model_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("SERVE_TOKEN", raising=False)
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost") and not is_loopback("0.0.0.0")
    with pytest.raises(JobError, match=r"--host 0.0.0.0 is reached by other machines: set SERVE_TOKEN"):
        ServeConfig("m", host="0.0.0.0")
    monkeypatch.setenv("SERVE_TOKEN", "x")
    assert ServeConfig("m", host="0.0.0.0").port == 8000
    with pytest.raises(JobError, match=r"--model .* holds no trained model"):
        serve_model(ServeConfig(str(tmp_path)))
