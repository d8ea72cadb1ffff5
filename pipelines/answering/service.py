"""The HTTP service that pipelines/serve.py runs on Ray Serve: a clip in, probabilities out.

    POST /predict?name=clip.mp4    a media file as the body
    POST /features                 {"features": {"audio": [[...], ...]}, "duration": 2.0}: tokens instead of media
    GET  /health, /model, /docs, / the last one is a page to try a clip in

Whatever is posted is decoded in a process that may die. A clip that crashes it, hangs or asks for too much memory is
answered with status 422 and the reason, and costs only itself.
"""

import hmac
import io
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Header, HTTPException, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, ValidationError
from ray import serve
from starlette.concurrency import run_in_threadpool

from features.corpus.folder import SUFFIXES
from pipelines.answering.clips import ClipAnswerer, answer_features, clip_of_file, make_clip
from pipelines.training.trained import TrainedModel

app = FastAPI(title="clips to predictions", description=__doc__)
# A playlist names other files and addresses, which the decoder would open from here.
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"[playlist]")
TOKENS = 1_000_000  # numbers of one posted feature


@dataclass(frozen=True)
class Limits:
    """What one request may take: MB of the body, seconds and GB to decode it. token: "" lets everyone in."""

    max_mb: float
    timeout: float
    memory_gb: float
    token: str = ""


class PostedFeatures(BaseModel):
    """Tokens by modality, (T, *shape) as nested lists, and the clip's length in seconds (for events)."""

    features: dict[str, list]
    duration: float = 0.0


def _reply(values: Mapping[str, Any]) -> dict[str, Any]:
    # Above the service: Serve copies its routes, and what they refer to, while the class is being made.
    return {name: value for name, value in values.items() if name not in ("split", "fold")}


POSTED = {
    "requestBody": {"content": {"application/json": {"schema": PostedFeatures.model_json_schema()}}, "required": True}
}


@serve.deployment
@serve.ingress(app)
class Service:
    """One replica: it holds the model and a decoding process."""

    def __init__(self, trained: TrainedModel, limits: Limits, places: Mapping[str, str], device: str) -> None:
        import torch

        torch.set_num_threads(1)
        trained.model.to(device).eval()
        self.trained, self.model, self.limits = trained, trained.model, limits
        self.answerer = ClipAnswerer(trained, limits.timeout, limits.memory_gb, places).start()

    @app.get("/", response_class=HTMLResponse)
    def page(self) -> str:
        """A page to try a clip in."""
        return (Path(__file__).parent / "page.html").read_text()

    @app.get("/health")
    def health(self) -> dict[str, str]:
        """Whether this replica answers, and by which model."""
        return {"status": "ok", "model": self.model.recipe["model"], "digest": self.trained.digest}

    @app.get("/model")
    def describe(self) -> dict[str, Any]:
        """What the model reads and answers, and the limits of a request."""
        reads = {m: {"shape": f.shape, "rate": f.rate, "dtype": f.dtype} for m, f in self.model.features.items()}
        answers = {t: {"kind": s.kind, "classes": s.classes} for t, s in self.model.tasks.items()}
        return {"reads": reads, "answers": answers, "max_mb": self.limits.max_mb, "timeout_s": self.limits.timeout}

    @app.post("/predict")
    async def predict(
        self, request: Request, name: str = "clip.mp4", authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """The answer for a media file, posted as the body. name: its ending says what it is."""
        self._require_token(authorization)
        suffix = name.rpartition(".")[2].lower()
        if suffix not in SUFFIXES:
            raise HTTPException(415, f"{name}: not a media file that is known ({', '.join(SUFFIXES)})")
        with tempfile.NamedTemporaryFile(suffix=f".{suffix}") as file:
            await self._receive(request, file)
            file.flush()
            clip = clip_of_file(file.name, Path(name).name)
            answer = await run_in_threadpool(self.answerer.answer, clip)
        if answer.failure:
            message = answer.failure["message"].replace(file.name, name)
            raise HTTPException(422, {**answer.failure, "message": message, "clip_id": answer.clip_id})
        return _reply(answer.values) | {"seconds": answer.seconds}

    @app.post("/features", openapi_extra=POSTED)
    async def predict_features(
        self, request: Request, authorization: Annotated[str | None, Header()] = None
    ) -> dict[str, Any]:
        """The answer for features as the model's store has them."""
        self._require_token(authorization)
        body = io.BytesIO()
        await self._receive(request, body)
        try:
            posted = PostedFeatures.model_validate_json(body.getvalue())
        except ValidationError as error:
            raise HTTPException(422, error.errors(include_url=False, include_input=False)) from None
        arrays = {name: self._array(name, values) for name, values in posted.features.items()}
        if not (arrays and 0 <= posted.duration < 1e6 and math.isfinite(posted.duration)):
            raise HTTPException(422, f"give one or more of {', '.join(self.model.features)}, and a duration in seconds")
        table = await run_in_threadpool(answer_features, self.model, make_clip("features"), arrays, posted.duration)
        return _reply(table.to_pylist()[0])

    def _array(self, name: str, values: list) -> np.ndarray:
        if (spec := self.model.features.get(name)) is None:
            raise HTTPException(422, f"no feature {name!r}: the model reads {', '.join(self.model.features)}")
        try:
            array = np.asarray(values, np.float64)
        except (ValueError, TypeError, OverflowError):
            array = np.zeros(())
        if array.shape[1:] != spec.shape or not len(array) or array.size > TOKENS or not np.isfinite(array).all():
            raise HTTPException(422, f"{name}: give (tokens, {', '.join(map(str, spec.shape))}) finite numbers")
        limit = np.iinfo(spec.dtype) if np.dtype(spec.dtype).kind in "iu" else np.finfo(spec.dtype)
        return array.clip(limit.min, limit.max).astype(spec.dtype)

    async def _receive(self, request: Request, file: Any) -> None:
        """Write the body to a file. Raises HTTPException (413, 415, 422) for one that is not taken."""
        most, size = self.limits.max_mb * 1e6, 0
        async for chunk in request.stream():
            if not size and chunk.lstrip()[:16].startswith(PLAYLISTS):
                raise HTTPException(415, "a playlist is no clip: post the media file itself")
            size += len(chunk)
            if size > most:
                raise HTTPException(413, f"more than {self.limits.max_mb:g} MB")
            file.write(chunk)
        if not size:
            raise HTTPException(422, "an empty body")

    def _require_token(self, authorization: str | None) -> None:
        wanted = f"Bearer {self.limits.token}".encode()
        if self.limits.token and not hmac.compare_digest((authorization or "").encode(), wanted):
            raise HTTPException(401, "send the header Authorization: Bearer TOKEN")
