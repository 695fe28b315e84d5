"""Processes of the program without the seconds of its imports: forks of one that has imported it, and computed nothing.

Tests of a process's start or parent, and of variables that imports read, need a process of their own instead.
"""

import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

PATIENCE_S = 120
"""Seconds until a fork ends by SIGALRM."""


def run(
    function: str, *arguments: str, world: int = 0, env: dict[str, str] | None = None, cwd: Path | None = None
) -> list[subprocess.CompletedProcess]:
    """Call "module:function" in a fork with these arguments; returns its exit code and its output as bytes.

    `world` forks run at once, each a rank by the variables that torchrun sets; a fork that a signal has stopped is
    killed when the others have ended. `env` is added to the environment.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = {"function": function, "arguments": arguments, "world": world, "folder": folder}
        request |= {"env": {**os.environ, **(env or {})}, "cwd": str(cwd or os.getcwd())}
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        codes = json.loads(server.stdout.readline())
        return [
            subprocess.CompletedProcess(
                arguments, code, *((Path(folder) / f"{name}-{rank}").read_bytes() for name in ("stdout", "stderr"))
            )
            for rank, code in enumerate(codes)
        ]


@functools.cache
def _server() -> subprocess.Popen:
    """It ends with this process, which holds its stdin."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children: dict[int, int] = {}
        for rank in range(request["world"] or 1):
            child = os.fork()
            if child == 0:
                _become(request, rank, port)
            children[child] = rank
        codes, stopped = [0] * len(children), set()
        while children:
            child, status = os.waitpid(-1, os.WUNTRACED)
            if os.WIFSTOPPED(status):
                stopped.add(child)
            else:
                codes[children.pop(child)] = os.waitstatus_to_exitcode(status)
            if stopped >= children.keys():
                for child in children:
                    os.kill(child, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def _become(request: dict, rank: int, port: int) -> None:
    """Be the process that was asked for, to its end."""
    code = 1
    try:
        signal.alarm(PATIENCE_S)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as at a terminal: under nohup it is ignored
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{request['folder']}/{name}-{rank}", os.O_WRONLY | os.O_CREAT), descriptor)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        if request["world"]:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["world"]}
            ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in ranks.items()})
        sys.argv = [request["function"], *request["arguments"]]
        train.STARTED_NS, train.PARENT = time.monotonic_ns(), os.getppid()
        module, _, function = request["function"].partition(":")
        getattr(importlib.import_module(module), function)()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


if __name__ == "__main__":
    import rank_jobs  # noqa: F401  which finds the program

    import train

    _serve()
