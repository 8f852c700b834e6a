"""Commands with a time limit, alone or several at the same time; whatever happens to one, there is a result."""

import os
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).parent


def call(command: list, seconds: float, **options) -> dict:
    """Exit code, seconds and output of a command; the code says "timeout" past the limit.

    It runs in this folder: in the root, Python would take the sources there for the package that is installed.
    """
    begin = time.monotonic()
    print("+", *command, flush=True)
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        try:
            process = subprocess.Popen(command, cwd=HERE, start_new_session=True, **streams, **options)
            code = _wait(process, seconds)
        except OSError as error:
            code = str(error)
        output.seek(0)
        text = output.read()
    print(text[-2000:], flush=True)
    return {"exit code": code, "seconds": round(time.monotonic() - begin, 1), "output": text}


def _wait(process: subprocess.Popen, seconds: float) -> int | str:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        pass  # a GPU that hangs holds on to it: leave it
    return "timeout"


def attempt(run: Callable[[], dict]) -> dict:
    """What run() gives, or how it failed."""
    begin = time.monotonic()
    try:
        return run()
    except Exception:
        text = traceback.format_exc()
        print(text, flush=True)
        return {"exit code": "failed", "seconds": round(time.monotonic() - begin, 1), "output": text}


def together(runs: dict[str, Callable[[], dict]]) -> Iterator[tuple[str, dict]]:
    """(name, result) of each, as they end; all run at the same time."""
    with ThreadPoolExecutor(len(runs)) as pool:
        running = {pool.submit(attempt, run): name for name, run in runs.items()}
        for done in as_completed(running):
            yield running[done], done.result()
