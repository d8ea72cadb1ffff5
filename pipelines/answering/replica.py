"""One replica of the service: it holds the model and a decoding process. Ray Serve runs as many as are asked for.

An answer is an HTTP status with what is to be said: the service passes it on.
"""

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.answering.clips import Answer, ClipAnswerer, Decoded, answer_features, clip_of_file, make_clip
from pipelines.answering.shared_pass import SharedPass
from pipelines.training.trained import TrainedModel

Reply = tuple[int, dict[str, Any]]


class Replica:
    """Answers clips and features.

    timeout, memory_gb: seconds and GB to decode a clip; places: weights files, see `spec_of_store`; device: of the
    model; batch: requests that share a forward pass at most.
    """

    def __init__(
        self,
        trained: TrainedModel,
        timeout: float,
        memory_gb: float,
        places: Mapping[str, str],
        device: str = "cpu",
        batch: int = 8,
    ) -> None:
        import torch

        torch.set_num_threads(1)
        self.model = trained.model.to(device).eval()
        self.answerer = ClipAnswerer(trained, timeout, memory_gb, places).start()
        self._decoding = ThreadPoolExecutor(1)  # clips that wait for a hanging one take no thread that others need
        self.forward = SharedPass(self._forward, batch)

    async def media(self, name: str, content: bytes) -> Reply:
        """A media file's answer, or status 422 and why there is none. name: its ending says what it is."""
        with tempfile.NamedTemporaryFile(suffix=f".{name.rpartition('.')[2].lower()}") as file:
            await asyncio.to_thread(Path(file.name).write_bytes, content)
            clip = clip_of_file(file.name, Path(name).name)
            decoded = await asyncio.get_running_loop().run_in_executor(self._decoding, self.answerer.decode, clip)
        if isinstance(decoded, Answer):
            failure = dict(decoded.failure or {})
            failure["message"] = failure["message"].replace(file.name, name)
            return 422, {**failure, "clip_id": clip.clip_id}
        return await self._answer(decoded)

    async def features(self, arrays: Mapping[str, np.ndarray], duration: float) -> Reply:
        """The answer for features, {modality: (T, *shape)} of the model's own types; duration in seconds."""
        return await self._answer(Decoded(make_clip("features"), arrays, duration))

    async def _answer(self, decoded: Decoded) -> Reply:
        started = asyncio.get_running_loop().time()
        row = await self.forward(decoded)
        seconds = {"decode": decoded.seconds, "model": asyncio.get_running_loop().time() - started}
        return 200, {name: value for name, value in row.items() if name not in ("split", "fold")} | {"seconds": seconds}

    def _forward(self, several: Sequence[Decoded]) -> list[dict[str, Any]]:
        return answer_features(self.model, several).to_pylist()
