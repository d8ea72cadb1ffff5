"""Requests that arrive while a forward pass runs share the next one.

Nothing waits for company: alone, a request passes at once. `ray.serve.batch` waits for a fixed time, and what arrives
while a pass runs would be split by that time too.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class SharedPass(Generic[Item, Result]):
    """Gathers single items for a function of several. run: items -> as many results, called in a thread."""

    def __init__(self, run: Callable[[Sequence[Item]], Sequence[Result]], most: int) -> None:
        self.run, self.most = run, most
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._running = asyncio.Lock()

    async def __call__(self, item: Item) -> Result:
        """The item's result, of a pass with at most `most` items. An error is raised for the item that causes it."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, result))
        async with self._running:
            if not result.done():  # no earlier pass took it along
                several, self._waiting = self._waiting[: self.most], self._waiting[self.most :]
                await self._pass(several)
        return await result

    async def _pass(self, several: Sequence[tuple[Item, "asyncio.Future[Result]"]]) -> None:
        try:
            results = await asyncio.to_thread(self.run, [item for item, _ in several])
        except Exception as error:
            if len(several) == 1:
                return several[0][1].set_exception(error)
            for one in several:  # whose fault it is shows when each passes alone
                await self._pass([one])
            return None
        for (_, waits), result in zip(several, results, strict=True):
            if not waits.done():
                waits.set_result(result)
