"""Several processes behind one port: a writer, workers that follow its store, and the parent that keeps them running.

Comes in: a configuration, signals. SIGTERM and SIGINT drain the workers, then the writer. SIGHUP goes to all. SIGUSR2
replaces one process after the other, a worker only once the next one serves. A process that dies is started again.

Each process is executed anew (``python -m featserve.server.worker``), never forked. It says on standard output that its
modules are loaded, takes what it is to be on standard input, says where it listens or why it cannot, and ends when
standard input does: so no process outlives the parent. The kernel spreads connections over the workers (SO_REUSEPORT).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from featserve.config import Config
from featserve.errors import FeatserveError, ServingError, by_reason

log = logging.getLogger("featserve.server")

MODULE = "featserve.server.worker"
PACKAGES = Path(__file__).parent.parent.parent
STARTING_S = 120.0
"""How long a process may take until it serves."""
STEADY_S = 30.0
"""A process that has served for so long did not die of how it was started."""
MOST_DEATHS = 6
"""After so many deaths in a row all is given up, where no worker serves."""
FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 30.0
"""The second death in a row is followed by a delay, each further one by twice that; the first one by none."""
KILLED_AFTER_S = 5.0
"""How much longer than its drain a process may take to end."""

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Part:
    """What one process is of several: ``number`` 0 writes the store, those from 1 on follow it and serve.

    ``socket``: where the writer listens for what the others pass on.
    """

    number: int
    socket: Path

    @property
    def writes(self) -> bool:
        return self.number == 0

    def __str__(self) -> str:
        return "the writer" if self.writes else f"worker {self.number}"


def cores() -> int:
    """Return how many cores this process may use: as the scheduler has it, and its control group's quota."""
    usable = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        usable = min(usable, max(int(quota) // int(period), 1))
    return usable


def supervise(config: Config, workers: int, ready: Callable[[str], None]) -> None:
    """Serve with so many workers until SIGTERM or SIGINT; ``ready`` is called with ``host:port`` once all serve.

    Raises what a process said that could not start, or ServingError for one that dies again and again.
    """
    asyncio.run(_supervise(config, workers, ready))


async def _supervise(config: Config, workers: int, ready: Callable[[str], None]) -> None:
    with (
        reserved(config.server.host, config.server.port) as port,
        tempfile.TemporaryDirectory(prefix="featserve-") as folder,
    ):
        config = replace(config, server=replace(config.server, port=port))
        parent = Parent(config, [Part(number, Path(folder) / "writer") for number in range(workers + 1)])
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        loop.add_signal_handler(signal.SIGHUP, parent.reload)
        loop.add_signal_handler(signal.SIGUSR2, parent.restart)
        serving = asyncio.create_task(parent.serve(lambda: ready(f"{config.server.host}:{port}")))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
        finally:
            stopping.cancel()
            await parent.stop(serving)
    log.info("stopped")


class Parent:
    """The processes, the writer's place first."""

    def __init__(self, config: Config, parts: list[Part]) -> None:
        self._spares = Spares()
        self._slots = [Slot(share(config, part, len(parts)), part, self._spares, self._serves) for part in parts]
        self._ready = asyncio.Event()
        self._restarting: asyncio.Task[None] | None = None

    async def serve(self, ready: Callable[[], None]) -> None:
        """Start all, and start again what dies, until cancelled."""
        writer, *workers = self._slots
        self._spares.prepare()
        first, *others = await _together(self._spares.load() for _ in self._slots)
        await writer.start(first)  # makes the store that the others follow
        await _together(worker.start(child) for worker, child in zip(workers, others, strict=True))
        self._ready.set()
        ready()
        await _together(slot.keep() for slot in self._slots)

    def reload(self) -> None:
        """Let each process look at the registry at once."""
        for slot in self._slots:
            slot.send(signal.SIGHUP)

    def restart(self) -> None:
        """Begin to replace every process by a new one, unless that is under way."""
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.create_task(self._restart())

    def _serves(self) -> bool:
        """Say whether a worker serves."""
        return any(slot.serves for slot in self._slots[1:])

    async def _restart(self) -> None:
        await self._ready.wait()
        writer, *workers = self._slots
        log.info("restarting", extra={"processes": len(self._slots)})
        self._spares.renew()
        try:
            # One that cannot be started at the moment is waited for at the end, and not by the others.
            for slot in sorted((*workers, writer), key=lambda slot: not slot.serves):
                await slot.replace()
        except FeatserveError as error:
            log.error("the restart is given up, what has not been replaced goes on: %s", error)
        else:
            log.info("restarted")

    async def stop(self, serving: asyncio.Task[None]) -> None:
        """End the workers, then the writer they pass writes to."""
        for task in (serving, self._restarting):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))
        writer, *workers = self._slots
        await asyncio.gather(*(slot.end() for slot in workers))
        await writer.end()
        await self._spares.end()


async def _together(work: Iterable[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    """Run all at once; return what each returns. The first error ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


class Slot:
    """One place among the processes, and the process that is in it now."""

    def __init__(self, config: Config, part: Part, spares: Spares, any_serves: Callable[[], bool]) -> None:
        self._config, self._part, self._spares, self._any_serves = config, part, spares, any_serves
        self._limit_s = config.server.drain_seconds + KILLED_AFTER_S
        self._changing = asyncio.Lock()
        self._child: Child | None = None
        self._all: list[Child] = []

    @property
    def serves(self) -> bool:
        return self._child is not None and self._child.process.returncode is None

    async def start(self, child: Child) -> None:
        """Tell a process that it is the one in this place, and wait until it serves."""
        self._all = [c for c in self._all if c.process.returncode is None] + [child]
        assert child.process.stdin is not None
        child.process.stdin.write(pickle.dumps((self._config, self._part)))
        await child.said(str(self._part))
        child.serves_s = time.monotonic()
        self._child = child

    async def keep(self) -> None:
        """Start a process again that dies. Raises ServingError where that is of no use, and no worker is left."""
        deaths = 0
        while True:
            child = self._child
            assert child is not None
            code = await child.process.wait()
            async with self._changing:
                if self._child is not child:
                    continue
                deaths = 1 if time.monotonic() > child.serves_s + STEADY_S else deaths + 1
                log.error("%s died", self._part, extra={"exit_code": code, "times": deaths})
                deaths = await self._start_again(deaths)

    async def _start_again(self, deaths: int) -> int:
        """Start another process after so many have died in a row; return how many have by then."""
        while deaths < MOST_DEATHS or self._any_serves():
            doubled = min(deaths - 2, 10)  # no further: it is a number that grows
            await asyncio.sleep(min(FIRST_DELAY_S * 2**doubled, LONGEST_DELAY_S) if deaths > 1 else 0)
            try:
                await self.start(await self._spares.take())
                return deaths
            except FeatserveError as error:
                deaths += 1
                log.error("%s does not start: %s", self._part, error, extra={"times": deaths})
        raise ServingError(f"{self._part} died {deaths} times in a row; its own messages say why")

    async def replace(self) -> None:
        """Put a new process in the place of the one that is there. Only one can write, so that one goes first."""
        async with self._changing:
            old, new = self._child, await self._spares.take()
            assert old is not None
            if self._part.writes:
                await self._end(old)
                await self.start(new)
            else:
                await self.start(new)
                await self._end(old)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it serves."""
        if self._child is not None:
            self._child.send(number)

    async def end(self) -> None:
        """End every process that was started for this place."""
        await asyncio.gather(*(self._end(child) for child in self._all))

    async def _end(self, child: Child) -> None:
        """Drain a process; kill it if it takes too long."""
        child.send(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._limit_s):
                await child.process.wait()
        except TimeoutError:
            log.error("%s did not end, and is killed", self._part)
            child.send(signal.SIGKILL)
            await child.process.wait()


class Spares:
    """Processes that have loaded their modules and wait to be told what they are: one is kept for whichever dies next.

    Loading takes a second or more, in which there would be no writer.
    """

    def __init__(self) -> None:
        self._all: list[Child] = []
        self._next: asyncio.Task[Child] | None = None

    def prepare(self) -> None:
        """Begin to load the next one."""
        self._next = asyncio.create_task(self.load())

    async def take(self) -> Child:
        """Return a process, and begin to load the next one. Raises ServingError where it does not load."""
        task = self._next
        assert task is not None
        self.prepare()
        with suppress(ServingError):  # of then, not of now
            child = await task
            if child.process.returncode is None:
                return child
        return await self.load()

    def renew(self) -> None:
        """Discard the one that is loaded, and begin to load the next one: with the code that is now on the disk."""
        assert self._next is not None
        self._next.add_done_callback(_discard)
        self.prepare()

    async def load(self) -> Child:
        """Start a process, and wait until it has loaded its modules. Raises ServingError."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PACKAGES), os.environ.get("PYTHONPATH", "")])}
        try:
            process = await asyncio.create_subprocess_exec(
                # Whatever lies in the current folder is no module of ours, and Ctrl-C in a terminal is for the parent.
                sys.executable, "-P", "-m", MODULE, stdin=PIPE, stdout=PIPE, env=environment, process_group=0
            )  # fmt: skip
        except OSError as error:
            raise ServingError(f"cannot start a process: {error}") from None
        child = Child(process)
        self._all = [c for c in self._all if c.process.returncode is None] + [child]
        await child.said("a new process")
        return child

    async def end(self) -> None:
        """End those that nobody took."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait((self._next,))
        for child in self._all:
            child.send(signal.SIGKILL)
            await child.process.wait()


def _discard(loading: asyncio.Task[Child]) -> None:
    """End the process of a task that has loaded one."""
    if not loading.cancelled() and loading.exception() is None:
        loading.result().send(signal.SIGKILL)


@dataclass(slots=True)
class Child:
    """A process. ``serves_s``: since when it serves, of ``time.monotonic``."""

    process: Process
    serves_s: float = 0.0

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def said(self, name: str) -> None:
        """Wait for it to have done its next step. Raises the error that it tells of."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(STARTING_S):
                line = await self.process.stdout.readline()
        except TimeoutError:
            self.send(signal.SIGKILL)
            line = b""
        said = json.loads(line or b"{}")
        if "reason" in said:
            await self.process.wait()
            raise (by_reason(said["reason"]) or ServingError)(said["message"])
        if not line:
            code = await self.process.wait()
            raise ServingError(f"{name} ended with exit code {code} before it served; its own messages say why")


def share(config: Config, part: Part, processes: int) -> Config:
    """Return the settings of one process: its share of the caches, and a port of its own for metrics."""
    store, metrics = config.store, config.telemetry.prometheus_port
    store = replace(
        store,
        block_cache_mb=max(store.block_cache_mb // processes, 1),
        row_cache_mb=store.row_cache_mb and max(store.row_cache_mb // processes, 1),
    )
    if metrics:
        metrics += part.number
    return replace(config, store=store, telemetry=replace(config.telemetry, prometheus_port=metrics))


@contextmanager
def reserved(host: str, port: int) -> Iterator[int]:
    """Hold a port that no other server listens on, any free one for 0, so that this one's workers can share it.

    Raises ServingError where it cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with _bound(family, address) as alone:
            alone.listen()  # only this finds a server that shares its port, too
            taken: int = alone.getsockname()[1]
        held = _bound(family, (address[0], taken, *address[2:]), socket.SO_REUSEPORT)
    except OSError as error:
        raise ServingError(f"cannot listen on {host}:{port}: {error}. Choose another [server] port") from None
    with held:
        yield taken


def _bound(family: int, address: Any, *options: int) -> socket.socket:
    """Return a socket with an address. What is left of the connections of a server that ended is in nobody's way."""
    bound = socket.socket(family)
    try:
        for option in (socket.SO_REUSEADDR, *options):
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
