"""Real processes that run one program together over TCP, and what they run: for tests of several hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

HOST = socket.gethostname()
# One process of several: the checkpoint, the mesh, its number of processes, its id, the port, and where its results go.
JOIN = """
import sys
import l4jax
checkpoint, mesh, processes, process_id, port, results = sys.argv[1:]
l4jax.join(f"127.0.0.1:{port}", int(processes), int(process_id), timeout_seconds=120)
"""


def start(command, devices=1, stdin=subprocess.DEVNULL):
    """A process with this many devices of its own."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # every process compiles; LLVM's optimisations are not what is tested
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def start_all(script, processes, *arguments, files, devices=1):
    """``script`` in every process, with its own id and file."""
    checkpoint, mesh, port = map(str, arguments)
    return [
        start([sys.executable, "-c", JOIN + script, checkpoint, mesh, str(processes), str(i), port, str(file)], devices)
        for i, file in enumerate(files)
    ]


def ends(processes, seconds):
    """What every process wrote and its status, once all have ended."""
    deadline = time.monotonic() + seconds
    try:
        outputs = [process.communicate(timeout=deadline - time.monotonic()) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def generate(checkpoint, *options):
    command = "import sys; from l4jax.cli import main; sys.exit(main())"
    return [sys.executable, "-c", command, "generate", str(checkpoint), "-p", "x", *map(str, options)]


def together(port, process_id, processes=2, timeout=60):
    return "--coordinator", f"127.0.0.1:{port}", "--processes", processes, "--process-id", process_id, "--coordinator-timeout", timeout


def one_line(errors):
    """The error that a command ended with; nothing else may follow it, and only Gloo may come before."""
    *before, last = errors.strip().splitlines()
    assert all("Gloo" in line for line in before), errors
    return last


def wait_for(files, processes):
    deadline = time.monotonic() + 300
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.1)
