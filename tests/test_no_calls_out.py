"""Nothing calls out unasked: no name is looked up, and no network address is connected to.

A library that is preloaded with LD_PRELOAD logs both, for C and for Python code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

GUARD = r"""
#define _GNU_SOURCE
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static void told(const char *what) {
    FILE *log = fopen(getenv("CALLS_OUT"), "a");
    fprintf(log, "%s\n", what);
    fclose(log);
}

int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    told(node ? node : "a null name");
    return EAI_FAIL;
}

int connect(int socket, const struct sockaddr *address, socklen_t length) {
    if (address->sa_family == AF_INET || address->sa_family == AF_INET6) told("connect");
    return syscall(SYS_connect, socket, address, length);
}
"""
RUN_ORT = """
import sys, onnx, torch
from onnx import TensorProto, helper
from patchbloom.export.engines import exporter
from patchbloom.export.hub import is_sdxl_turbo_cached

is_sdxl_turbo_cached()
ort = exporter("ort")
ort.require("fp32", "cpu")
import onnxruntime

ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", ports[:1], ports[1:])
opset = [helper.make_opsetid("", 21)]
model = helper.make_model(graph, opset_imports=opset, ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString())
assert session.run(None, {"x": torch.tensor([-1.0, 1.0]).numpy()})[0].tolist() == [0, 1]
"""
RUN_OPENVINO = """
from patchbloom.export.engines import exporter

exporter("openvino").require("fp32", "cpu")
"""
COMMANDS = """
import sys
from patchbloom.engine import cli as engine
from patchbloom.train import cli as train

ort = ["--backend", "ort", "--device", "cpu", "--bundles", "cb"]
assert engine.main(["build", "--model", "sdxl-tiny", "--batch", "4", *ort]) == 0
assert engine.main(["verify", "--bundles", "cb"]) == 0
run = ["--data", "shapes", "--shapes-per-class", "12", "--model", "sdxl-tiny", "--out", "run"]
small = ["--recipe", "small", "--image-size", "64", "--seeds", "1", "--method", "dace"]
small += ["--teacher", "convnet-d3-w8", "--student", "convnet-d3-w8"]
small += ["--teacher-epochs", "1", "--epochs", "1", "--ipc", "1"]
assert train.main([*run, *small, *ort]) == 0
assert train.main(["report", "run"]) == 0
"""


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    (folder / "guard.c").write_text(GUARD)
    built = ["gcc", "-shared", "-fPIC", "-o", folder / "guard.so", folder / "guard.c"]
    subprocess.run(built, check=True)
    return folder / "guard.so"


def calls_out(guard: Path, folder: Path, script: str) -> list[str]:
    """Names looked up and connections made by the script, and what it left in its home."""
    env = {"LD_PRELOAD": str(guard), "CALLS_OUT": str(folder / "log"), "HOME": str(folder / "home")}
    env |= {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    (folder / "home").mkdir()  # OpenVINO sends nothing where it can keep nothing
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    log = folder / "log"
    found = log.read_text().split() if log.exists() else []
    kept = (".cache/Microsoft/**/*", "intel/**/*")
    return found + [str(path) for each in kept for path in (folder / "home").glob(each)]


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        ("socket.getaddrinfo('example.invalid', 80)", "example.invalid"),
        ("socket.socket().connect(('127.0.0.1', 1))", "connect"),
    ],
)
def test_the_guard_sees_a_call(guard: Path, tmp_path: Path, call: str, seen: str) -> None:
    script = f"import socket\ntry: {call}\nexcept OSError: pass"
    assert seen in calls_out(guard, tmp_path, script)


@pytest.mark.parametrize("script", [RUN_ORT, RUN_OPENVINO])
def test_a_library_with_telemetry_calls_nobody(guard: Path, tmp_path: Path, script: str) -> None:
    assert calls_out(guard, tmp_path, script) == []


@pytest.mark.slow
def test_no_command_calls_out(guard: Path, tmp_path: Path) -> None:
    assert calls_out(guard, tmp_path, COMMANDS) == []
