"""The HTTP service of pipelines/serve.py: a clip in, probabilities out.

    POST /predict?name=clip.mp4    a media file as the body
    POST /features                 {"features": {"audio": [[...], ...]}, "duration": 2.0}: tokens instead of media
    GET  /health, /model, /docs, / the last one is a page to try a clip in

Whatever is posted is decoded in a process of its own. A clip that crashes it, hangs or asks for too much memory is
answered with status 422 and the reason, and costs only itself. Status 503 with Retry-After: send it again later.
"""

import asyncio
import hmac
import io
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ValidationError

from clcr import FeatureSpec
from features.corpus.folder import SUFFIXES
from pipelines.answering.replica import Reply
from pipelines.training.trained import TrainedModel

# A playlist names other files and addresses, which the decoder would open from here.
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"[playlist]")
BINS = 20_000  # answers about moments of one posted clip
TOKENS = 1_000_000  # numbers of one posted feature
SLOWEST = 0.5  # MB a second at which a body must arrive: who stops sending would hold a place for ever
RETRY_AFTER = {"Retry-After": "2"}  # seconds
Ask = Callable[..., Awaitable[Reply]]  # of a replica: the method's name and its arguments


@dataclass(frozen=True)
class Limits:
    """What requests may take. max_mb: MB of a body; timeout: seconds that decoding may take; token: "" lets all in.

    at_once: requests that are received and answered at a time; queue: further ones that may wait; patience: seconds
    until a request that is not answered is given up.
    """

    max_mb: float = 50.0
    timeout: float = 30.0
    token: str = ""
    at_once: int = 4
    queue: int = 64
    patience: float = 600.0


class PostedFeatures(BaseModel):
    """Tokens by modality, (T, *shape) as nested lists, and the clip's length in seconds (for events)."""

    features: dict[str, list]
    duration: float = 0.0


POSTED = {
    "requestBody": {"content": {"application/json": {"schema": PostedFeatures.model_json_schema()}}, "required": True}
}


@dataclass
class Door:
    """Lets so many requests in at once, and so many wait; a body is read only of one that is in."""

    limits: Limits
    waiting: int = 0
    room: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self.room = asyncio.Semaphore(self.limits.at_once)

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        """Wait for room. Raises HTTPException 503 where too many wait already, or this one waits for too long."""
        if self.room.locked() and self.waiting >= self.limits.queue:
            raise HTTPException(503, f"{self.waiting} requests wait already", RETRY_AFTER)
        self.waiting += 1
        try:
            async with asyncio.timeout(self.limits.patience):
                await self.room.acquire()
        except TimeoutError:
            raise HTTPException(503, "waited too long", RETRY_AFTER) from None
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self.room.release()

    def require_token(self, authorization: str | None) -> None:
        """Raise HTTPException 401 for a request without the token."""
        wanted = f"Bearer {self.limits.token}".encode()
        if self.limits.token and not hmac.compare_digest((authorization or "").encode(), wanted):
            raise HTTPException(401, "send the header Authorization: Bearer TOKEN")


def make_app(trained: TrainedModel, ask: Ask, limits: Limits) -> FastAPI:
    """The service's routes. ask: gives a request to a replica; raises HTTPException where none answers."""
    app = FastAPI(title="clips to predictions", description=__doc__)
    model, door = trained.model, Door(limits)
    reads = {m: {"shape": f.shape, "rate": f.rate, "dtype": f.dtype} for m, f in model.features.items()}
    answers = {t: {"kind": s.kind, "classes": s.classes} for t, s in model.tasks.items()}

    @app.get("/", response_class=HTMLResponse)
    def page() -> str:
        """A page to try a clip in."""
        return (Path(__file__).parent / "page.html").read_text()

    @app.get("/health")
    def health() -> dict[str, str]:
        """Whether the service answers, and by which model."""
        return {"status": "ok", "model": model.recipe["model"], "digest": trained.digest}

    @app.get("/model")
    def describe() -> dict[str, Any]:
        """What the model reads and answers, and the limits of a request."""
        return {"reads": reads, "answers": answers, "max_mb": limits.max_mb, "timeout_s": limits.timeout}

    @app.post("/predict")
    async def predict(
        request: Request, name: str = "clip.mp4", authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """The answer for a media file, posted as the body. name: its ending says what it is."""
        door.require_token(authorization)
        if name.rpartition(".")[2].lower() not in SUFFIXES:
            raise HTTPException(415, f"{name}: not a media file that is known ({', '.join(SUFFIXES)})")
        async with door.enter():
            return said(await ask("media", name, await receive(request, limits)))

    @app.post("/features", openapi_extra=POSTED)
    async def predict_features(
        request: Request, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """The answer for features as the model's store has them."""
        door.require_token(authorization)
        async with door.enter():
            content = await receive(request, limits)
            rate = max((task.rate for task in model.tasks.values()), default=0.0)
            arrays, duration = await asyncio.to_thread(parse_features, content, model.features, rate)
            return said(await ask("features", arrays, duration))

    return app


def said(reply: Reply) -> dict[str, Any]:
    """A replica's answer. Raises HTTPException where its status is not 200."""
    status, values = reply
    if status != 200:
        raise HTTPException(status, values)
    return values


def parse_features(
    content: bytes, specs: dict[str, FeatureSpec], rate: float = 0.0
) -> tuple[dict[str, np.ndarray], float]:
    """Arrays (T, *shape) of the model's types, and the duration. Raises HTTPException 422 for what is none.

    rate: the most bins per second that the model answers, of which a few bytes could ask for any number.
    """
    try:
        posted = PostedFeatures.model_validate_json(content)
    except ValidationError as error:
        raise HTTPException(422, error.errors(include_url=False, include_input=False)) from None
    arrays = {name: _array(name, values, specs) for name, values in posted.features.items()}
    if not (arrays and 0 <= posted.duration < 1e6 and math.isfinite(posted.duration)):
        raise HTTPException(422, f"give one or more of {', '.join(specs)}, and a duration in seconds")
    if posted.duration * rate > BINS:
        raise HTTPException(422, f"duration: at most {BINS / rate:g} seconds, for {rate:g} answers each")
    return arrays, posted.duration


def _array(name: str, values: list, specs: dict[str, FeatureSpec]) -> np.ndarray:
    if (spec := specs.get(name)) is None:
        raise HTTPException(422, f"no feature {name!r}: the model reads {', '.join(specs)}")
    try:
        array = np.asarray(values, np.float64)
    except (ValueError, TypeError, OverflowError):
        array = np.zeros(())
    if array.shape[1:] != spec.shape or not len(array) or array.size > TOKENS or not np.isfinite(array).all():
        raise HTTPException(422, f"{name}: give (tokens, {', '.join(map(str, spec.shape))}) finite numbers")
    limit = np.iinfo(spec.dtype) if np.dtype(spec.dtype).kind in "iu" else np.finfo(spec.dtype)
    return array.clip(limit.min, limit.max).astype(spec.dtype)


async def receive(request: Request, limits: Limits) -> bytes:
    """The body. Raises HTTPException (408, 413, 415, 422) for one that is not taken."""
    body, seconds = io.BytesIO(), limits.timeout + limits.max_mb / SLOWEST
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                if body.tell() + len(chunk) > limits.max_mb * 1e6:
                    raise HTTPException(413, f"more than {limits.max_mb:g} MB")
                body.write(chunk)
                if bytes(body.getbuffer()[:4096]).lstrip().startswith(PLAYLISTS):
                    raise HTTPException(415, "a playlist is no clip: post the media file itself")
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {seconds:g} s") from None
    if not body.tell():
        raise HTTPException(422, "an empty body")
    return body.getvalue()
