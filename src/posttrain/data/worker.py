"""Rendering in other processes: `python -m posttrain.data.worker FD` is one of them.

A process is sent the tokenizer, the template and the job once, then lists of rows; it answers with arrays. It imports
neither torch nor the program that runs here, so it is small, starts quickly, and needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from queue import SimpleQueue
from typing import Any, Self

from posttrain.data.job import Job, Rendered, render_rows
from posttrain.data.render import Renderer
from posttrain.errors import DoesNotFit, PosttrainError
from posttrain.records import Row


class Workers:
    """`n` processes. `submit` returns at once; results keep no order of their own."""

    def __init__(self, n: int, renderer: Renderer, job: Job) -> None:
        self.n = n
        self._setup = pickle.dumps((renderer.tokenizer, renderer.template.source, job))
        self._fingerprint = renderer.fingerprint
        self._all: list[_Worker] = []
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        # One thread waits for one process, so there is always an idle one for a thread that has work.
        self._threads = ThreadPoolExecutor(n, thread_name_prefix="prepare")
        for _ in range(n):
            self._all.append(_Worker())
            self._idle.put(self._all[-1])

    def submit(self, rows: Sequence[Row]) -> Future[Rendered]:
        return self._threads.submit(self._render, rows)

    def _render(self, rows: Sequence[Row]) -> Rendered:
        worker = self._idle.get()
        try:
            if not worker.is_set_up:
                theirs = worker.ask(self._setup)
                assert theirs == self._fingerprint, "a process renders with another template than this one"
                worker.is_set_up = True
            return worker.ask(pickle.dumps(rows))
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        for worker in self._all:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One process and the pipe to it."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        self.is_set_up = False
        environment = {
            **os.environ,
            # It imports from where this process imports, however that was arranged.
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            # One thread each: the processes are what fills the cores.
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "posttrain.data.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent to handle
            )

    def ask(self, request: bytes) -> Any:
        """What the process answers; what it raises is raised here."""
        try:
            self._pipe.send_bytes(request)
            answer = pickle.loads(self._pipe.recv_bytes())
        except (EOFError, OSError) as fault:
            code = self._process.wait()
            raise DoesNotFit(
                f"a process that prepares rows ended ({f'signal {-code}' if code < 0 else f'exit code {code}'}).",
                remedy="It may have run out of memory: set dataset_num_proc lower, or to 1.",
            ) from fault
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def _serve(pipe: Connection) -> None:
    """Answer until the parent hangs up."""
    try:
        tokenizer, template, job = pickle.loads(pipe.recv_bytes())
        renderer = Renderer(tokenizer, template)
        pipe.send_bytes(pickle.dumps(renderer.fingerprint))
        while True:
            pipe.send_bytes(pickle.dumps(_answer(renderer, job, pickle.loads(pipe.recv_bytes()))))
    except (EOFError, OSError):
        return


def _answer(renderer: Renderer, job: Job, rows: Sequence[Row]) -> Rendered | Exception:
    try:
        return render_rows(renderer, job, rows)
    except PosttrainError as fault:  # the user's row: it goes on as it is
        return fault
    except Exception as error:  # ours; the parent shows it as an internal error
        return RuntimeError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
