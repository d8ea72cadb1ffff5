"""The serve job: clips over HTTP, answered as predict answers them; what is poison costs itself alone."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import uvicorn
from fastapi import HTTPException, Request
from mediafiles import numbered, sine, write_media
from models import small_model
from ray import serve
from ray.exceptions import RayActorError
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from storefiles import TASKS, make_clips, write_store

import clcr
from features.decode.specs import AudioSpec, EncoderSpec, VideoSpec
from features.store import Store, StoreSpec
from features.store.shards import create_store
from infra.head import free_ports
from infra.screenshot import chromium
from pipelines.answering.clips import Answer, ClipAnswerer, Decoded, answer_features, clip_of_file, make_clip
from pipelines.answering.replica import Replica
from pipelines.answering.service import Door, Limits, make_app, parse_features, receive
from pipelines.answering.shared_pass import SharedPass
from pipelines.common.errors import JobError
from pipelines.serve import ServeConfig, is_loopback, listen, retry_dead, running_replicas, serve_model
from pipelines.training.trained import open_model
from tests.benchmarks.serving import kill_replica

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
    """The address of the service, with a replica in this process: what Ray adds is tested below."""
    trained = open_model("--model", str(model / "model"))
    replica = Replica(trained, 20.0, 2.0, {})
    port = free_ports(1)[0]

    async def ask(method, *arguments):
        return await getattr(replica, method)(*arguments)

    limits = Limits(max_mb=0.5, timeout=20.0, token="open sesame")
    running = uvicorn.Server(uvicorn.Config(make_app(trained, ask, limits), port=port, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    running.should_exit = True
    thread.join(60)
    replica.answerer.close()


def post(server, path, name=None, headers=TOKEN, **content):
    content.setdefault("data", path.read_bytes() if path else None)
    return requests.post(
        f"{server}/predict", params={"name": name or path.name}, headers=headers, timeout=120, **content
    )


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
def test_when_a_replica_is_killed_every_clip_is_answered_and_poison_costs_itself(model):
    port = free_ports(1)[0]
    command = ["pipelines/serve.py", "--model", model / "model", "--port", port, "--replicas", 2]
    environment = {**os.environ, "SERVE_TOKEN": "open sesame"}
    with open(model / "log", "w") as log:
        job = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    end = time.monotonic() + 400
    while "serving " not in (model / "log").read_text():
        assert job.poll() is None and time.monotonic() < end, (model / "log").read_text()
        time.sleep(0.5)
    clips = [model / ("broken.mp4" if n % 20 == 10 else "loud.mp4") for n in range(40)]
    with ThreadPoolExecutor(8) as clients:
        replies = [clients.submit(post, f"http://127.0.0.1:{port}", clip) for clip in clips]
        wait(replies[:10])
        killed = kill_replica(job.pid)
        answers = [reply.result().status_code for reply in replies]
    assert killed and answers == [422 if clip.name == "broken.mp4" else 200 for clip in clips]
    with pytest.raises(JobError, match=rf"--port {port}: .*in use"):
        listen(ServeConfig("m", port=port))
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 0, (model / "log").read_text()


@pytest.mark.slow
def test_two_jobs_on_a_cluster_leave_each_other_their_replicas(model, shared_ray, monkeypatch):
    monkeypatch.setattr("pipelines.serve.own_cluster", lambda: False)
    trained, features = open_model("--model", str(model / "model")), {"audio": np.ones((5, 8), np.float32)}
    config = ServeConfig(str(model / "model"))
    try:
        with running_replicas(config, trained, {}) as first:
            with running_replicas(config, trained, {}) as second:
                answers = [each.features.remote(features, 1.0).result(timeout_s=120) for each in (first, second)]
            answers.append(first.features.remote(features, 1.0).result(timeout_s=120))
        assert [status for status, _ in answers] == [200] * 3
        assert not serve.status().applications
    finally:
        serve.shutdown()


def test_requests_that_arrive_while_a_pass_runs_share_the_next_and_errors_stay_apart():
    passes, first = [], threading.Event()

    def run(items):
        passes.append(list(items))
        if len(passes) == 1:
            first.wait(60)
        if "poison" in items:
            raise ValueError("poison")
        return [item.upper() for item in items]

    async def ask():
        forward = SharedPass(run, most=3)
        calls = [asyncio.create_task(forward("a"))]
        while not passes:
            await asyncio.sleep(0.001)
        calls += [asyncio.create_task(forward(item)) for item in ("b", "poison", "d", "e")]
        await asyncio.sleep(0)
        first.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(ask())
    assert [str(answer) for answer in answers] == ["A", "B", "poison", "D", "E"]
    assert passes == [["a"], ["b", "poison", "d"], ["b"], ["poison"], ["d"], ["e"]]


@pytest.mark.parametrize("most", [1, 3])
def test_requests_that_are_cancelled_leave_those_that_share_their_passes_the_answers(most):
    passes, gate = [], threading.Semaphore(0)

    def run(items):
        passes.append(items)
        assert gate.acquire(timeout=60)
        if "x" in items:
            raise ValueError("x")
        return [item.upper() for item in items]

    async def ask():
        forward = SharedPass(run, most)
        calls = [asyncio.create_task(forward(item)) for item in "axcde"]
        while not passes:
            await asyncio.sleep(0.001)
        for call in calls[:2]:  # the first pass is under way, with `most` of them
            call.cancel()
        gate.release(9)
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)

    *cancelled, third, fourth, fifth = asyncio.run(ask())
    assert [type(each) for each in cancelled] == [asyncio.CancelledError] * 2
    assert (third, fourth, fifth) == ("C", "D", "E") and passes[0] == list("axc")[:most]


def test_clips_that_hang_hold_up_no_forward_pass(model, monkeypatch):
    end = threading.Event()
    monkeypatch.setattr(ClipAnswerer, "start", lambda self: self)
    replica = Replica(open_model("--model", str(model / "model")), 20.0, 2.0, {})
    monkeypatch.setattr(replica.answerer, "decode", lambda clip: end.wait(60) and Answer(clip.clip_id))

    async def ask():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        hanging = [asyncio.create_task(replica.media("a.mp4", b"x")) for _ in range(3)]
        await asyncio.sleep(0.1)
        status, _ = await asyncio.wait_for(replica.features({"audio": np.ones((5, 8), np.float32)}, 1.0), 30)
        assert not any(call.done() for call in hanging)
        end.set()
        await asyncio.gather(*hanging, return_exceptions=True)
        return status

    assert asyncio.run(ask()) == 200


def test_a_body_that_stops_arriving_gives_its_place_back():
    async def ask():
        request = Request({"type": "http"}, asyncio.Event().wait)
        with pytest.raises(HTTPException, match=r"did not arrive within 0\.2 s") as refused:
            await asyncio.wait_for(receive(request, Limits(max_mb=0.05, timeout=0.1)), 30)
        return refused.value.status_code

    assert asyncio.run(ask()) == 408


def test_a_request_passes_with_others_as_it_passes_alone(model):
    network = open_model("--model", str(model / "model")).model
    rng = np.random.default_rng(0)
    several = [Decoded(make_clip(f"{n}"), {"audio": rng.random((n, 8), np.float32)}, 1.0) for n in (3, 9, 5)]
    together = answer_features(network, several).to_pylist()
    for decoded, row in zip(several, together, strict=True):
        (alone,) = answer_features(network, [decoded]).to_pylist()
        assert alone["clip_id"] == row["clip_id"] and alone["mood"] == pytest.approx(row["mood"], abs=1e-5)
        assert alone["label_probabilities"] == pytest.approx(row["label_probabilities"], abs=1e-5)


def test_a_dead_replica_is_asked_again_and_too_many_requests_get_503_with_a_time():
    deaths = [2]

    class Handle:
        @staticmethod
        async def remote(name):
            if deaths[0]:
                deaths[0] -= 1
                raise RayActorError
            return 200, {"label": name}

    ask = retry_dead(SimpleNamespace(media=Handle), 60)
    assert asyncio.run(ask("media", "a")) == (200, {"label": "a"})
    deaths[0] = 99
    with pytest.raises(HTTPException, match="replicas died while they had this request") as refused:
        asyncio.run(ask("media", "a"))
    assert refused.value.status_code == 503 and int(refused.value.headers["Retry-After"]) > 0

    async def crowd():
        door, inside = Door(Limits(at_once=2, queue=1)), asyncio.Event()

        async def enter():
            async with door.enter():
                await inside.wait()

        calls = [asyncio.create_task(enter()) for _ in range(5)]
        await asyncio.sleep(0)
        inside.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(crowd())
    assert [getattr(answer, "status_code", 200) for answer in answers] == [200, 200, 200, 503, 503]


def test_an_open_address_needs_a_token_and_a_lost_model_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("SERVE_TOKEN", raising=False)
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost") and not is_loopback("0.0.0.0")
    with pytest.raises(JobError, match=r"--host 0.0.0.0 is reached by other machines: set SERVE_TOKEN"):
        ServeConfig("m", host="0.0.0.0")
    monkeypatch.setenv("SERVE_TOKEN", "x")
    assert ServeConfig("m", host="0.0.0.0").port == 8000
    with pytest.raises(JobError, match=r"--model .* holds no trained model"):
        serve_model(ServeConfig(str(tmp_path)))


def test_a_few_bytes_cannot_ask_for_any_number_of_answers():
    features = {"audio": clcr.FeatureSpec((2,), 50.0, "float32")}
    body = json.dumps({"features": {"audio": [[0, 1]]}, "duration": 900}).encode()
    assert parse_features(body, features, rate=20)[1] == 900
    with pytest.raises(HTTPException, match="at most 800 seconds, for 25 answers each"):
        parse_features(body, features, rate=25)
    assert parse_features(body, features)[1] == 900  # of a model that answers a clip as a whole
