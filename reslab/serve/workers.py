"""Several processes that do the same: started together, replaced when one dies, ended together."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from reslab.errors import WorkError

RETRY_SECONDS = 1.0  # before another takes the place of one that never got ready
Work = Callable[[int, Connection], None]  # is given its number and where to say b"ready"


def supervise(work: Work, count: int, ready: Callable[[], None]) -> None:
    """Runs `work` in `count` processes until SIGTERM or Ctrl-C, which each of them gets as SIGTERM.

    Calls `ready` once all have said so. Raises WorkError when one ends before that; later ones are replaced.
    """
    workers = _Workers(work)
    before = {number: signal.signal(number, workers.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for row in range(count):
            workers.start(row)
        workers.watch(ready)
    finally:
        workers.stop()
        for process in workers.processes.values():
            process.join()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Workers:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.context = multiprocessing.get_context("spawn")
        self.processes: dict[int, SpawnProcess] = {}
        self.pipes: dict[int, Connection] = {}  # of those that are not ready yet
        self.stopping = self.announced = False

    def start(self, row: int) -> None:
        if self.stopping:
            return
        self.pipes[row], theirs = self.context.Pipe(duplex=False)
        self.processes[row] = self.context.Process(target=self.work, args=(row, theirs))
        self.processes[row].start()
        theirs.close()
        if self.stopping:  # the signal came meanwhile
            self.processes[row].terminate()

    def stop(self, *_: Any) -> None:
        self.stopping = True
        for process in list(self.processes.values()):
            if process.pid is not None:
                process.terminate()

    def watch(self, ready: Callable[[], None]) -> None:
        while self.processes:
            wait([*self.pipes.values(), *(process.sentinel for process in self.processes.values())])
            for row, pipe in list(self.pipes.items()):
                if pipe.poll() and _is_ready(pipe):
                    del self.pipes[row]
            if not self.pipes and not self.announced and not self.stopping:
                self.announced = True
                ready()
            for row, process in list(self.processes.items()):
                if not process.is_alive():
                    self._bury(row, process)

    def _bury(self, row: int, process: SpawnProcess) -> None:
        del self.processes[row]
        if self.stopping:
            self.pipes.pop(row, None)
            return
        if row in self.pipes and not self.announced:
            raise WorkError(f"every worker process must start; one ended with status {process.exitcode}, and printed why: --workers 1 --debug shows more")
        print(f"reslab: worker {process.pid} ended with status {process.exitcode} and is replaced", file=sys.stderr, flush=True)
        if self.pipes.pop(row, None):
            time.sleep(RETRY_SECONDS)
        self.start(row)


def _is_ready(pipe: Connection) -> bool:
    try:
        return bool(pipe.recv_bytes(16) == b"ready")
    except (EOFError, OSError):
        return False
