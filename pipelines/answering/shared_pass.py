"""Requests that arrive while a forward pass runs share the next one.

Nothing waits for company: alone, a request passes at once. `ray.serve.batch` waits for a fixed time, and what arrives
while a pass runs would be split by that time too.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class SharedPass(Generic[Item, Result]):
    """Gathers single items for a function of several. run: items -> as many results, called in a thread of its own."""

    def __init__(self, run: Callable[[Sequence[Item]], Sequence[Result]], most: int) -> None:
        self.run, self.most = run, most
        self._waiting: list[tuple[Item, asyncio.Future[Result]]] = []
        self._thread = ThreadPoolExecutor(1)
        self._passes: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """The item's result, of a pass with at most `most` items. An error is raised for the item that causes it."""
        result: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, result))
        if self._passes is None or self._passes.done():  # a task of its own: a call that is cancelled ends no pass
            self._passes = asyncio.create_task(self._pass_all())
        return await result

    async def _pass_all(self) -> None:
        while waiting := [one for one in self._waiting if not one[1].done()]:  # the others were cancelled
            self._waiting = waiting[self.most :]
            await self._pass(waiting[: self.most])

    async def _pass(self, several: Sequence[tuple[Item, "asyncio.Future[Result]"]]) -> None:
        try:
            items = [item for item, _ in several]
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self.run, items)
        except Exception as error:
            if len(several) > 1:
                for one in several:  # whose fault it is shows when each passes alone
                    await self._pass([one])
            elif not several[0][1].done():
                several[0][1].set_exception(error)
            return
        for (_, waits), result in zip(several, results, strict=True):
            if not waits.done():
                waits.set_result(result)
