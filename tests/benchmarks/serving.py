"""Load on the serve job over loopback: 200 clips by 8 clients, one in 20 poison, a replica killed on the way.

    python -m tests.benchmarks.serving --model RUN --clip clip.mp4

Prints clips per second, p50 and p95, and how many requests had to be sent again when a replica was killed. A client
sends again what ends in status 503, or in a broken connection, as any client of a service does.
"""

import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests
import tyro

from infra.head import ROOT, free_ports

POISON = b"\0\0\0\x20ftypisom" + bytes(4000)


@dataclass(frozen=True)
class Options:
    """What to load."""

    model: Path
    """a run or a model folder"""
    clip: Path
    """clip to post"""
    clips: int = 200
    """requests in all"""
    clients: int = 8
    """threads that send them"""
    poison: int = 20
    """one in so many is no video"""
    replicas: int = 2
    """replicas of the service"""
    kill: bool = True
    """kill a replica when half of the requests are answered"""


def main() -> None:
    """Start the job, send the clips, kill a replica, count."""
    options, port = tyro.cli(Options, description=__doc__), free_ports(1)[0]
    command = ["pipelines/serve.py", "--model", options.model, "--port", port, "--replicas", options.replicas]
    job = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, "SERVE_TOKEN": "x"})
    try:
        address = f"http://127.0.0.1:{port}"
        while not _answers(address):
            if job.poll() is not None:
                sys.exit("the server did not start")
            time.sleep(1)
        print(measure(options, address, job.pid))
    finally:
        job.terminate()
        job.wait()


def measure(options: Options, address: str, job: int) -> str:
    """One line of figures."""
    content, again, done = options.clip.read_bytes(), [0], [0]
    poison = {n for n in range(options.clips) if n % options.poison == options.poison // 2}

    def ask(number: int) -> tuple[int, float]:
        begin = time.monotonic()
        if options.kill and done[0] == options.clips // 2 and not killed:
            killed.append(kill_replica(job))
        while True:
            try:
                body = POISON if number in poison else content
                reply = requests.post(
                    f"{address}/predict?name=clip.mp4", data=body, headers={"Authorization": "Bearer x"}, timeout=300
                )
                if reply.status_code != 503:
                    break
            except requests.RequestException:
                pass
            again[0] += 1
            time.sleep(0.2 + random.random())
        done[0] += 1
        return reply.status_code, time.monotonic() - begin

    killed: list[int] = []
    started = time.monotonic()
    with ThreadPoolExecutor(options.clients) as clients:
        answers = list(clients.map(ask, range(options.clips)))
    wanted = [422 if n in poison else 200 for n in range(options.clips)]
    wrong = sum(code != want for (code, _), want in zip(answers, wanted, strict=True))
    seconds = sorted(s for _, s in answers)
    p50, p95 = seconds[len(seconds) // 2], seconds[int(0.95 * len(seconds))]
    rate = options.clips / (time.monotonic() - started)
    lost = f"{wrong} answered otherwise than they should, {again[0]} sent again, replica {killed or 'none'} killed"
    return f"{options.clips} clips, {len(poison)} poison: {rate:.1f}/s, p50 {p50:.2f} s, p95 {p95:.2f} s; {lost}"


def kill_replica(job: int) -> int:
    """Kill one replica of the service, of the Ray that the job started; its process id."""
    for process in psutil.Process(job).children(recursive=True):
        if "ServeReplica" in " ".join(process.cmdline()):
            process.kill()
            return process.pid
    return 0


def _answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/health", timeout=5).ok
    except requests.RequestException:
        return False


if __name__ == "__main__":
    main()
