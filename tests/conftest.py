"""Options and markers: unsupported tests are skipped; --require-gpu fails if no GPU test ran."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from platformdirs import user_cache_dir

# Before torch loads: test processes run in parallel, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_GPU_TESTS_RUN = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("patchbloom")
    group.addoption("--run-slow", action="store_true", help="run tests that take minutes")
    group.addoption("--data-dir", type=Path, help="an ImageFolder with train/ and val/, for `data`")
    group.addoption("--trt-bindings", type=Path, help="tensorrt_bindings folder, for trt_cases.py")
    group.addoption("--require-gpu", action="store_true", help="fail unless a GPU test ran")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_GPU_TESTS_RUN] = 0
    folder = config.getoption("--data-dir")
    if folder is not None and not folder.is_dir():
        raise pytest.UsageError(f"--data-dir {folder}: no such folder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {}
    if not config.getoption("--run-slow"):
        reasons["slow"] = "takes minutes: run it with --run-slow"
    if config.getoption("--data-dir") is None:
        reasons["data"] = "needs a real data set: give --data-dir"
    if any(item.get_closest_marker("gpu") for item in items) and not _cuda_is_here():
        reasons["gpu"] = "needs a CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if item.get_closest_marker(marker) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report: pytest.TestReport = yield
    if report.when == "call" and not report.skipped and item.get_closest_marker("gpu") is not None:
        item.config.stash[_GPU_TESTS_RUN] += 1
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _gpu_is_missed(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if _gpu_is_missed(config):
        terminalreporter.write_line("--require-gpu: not one GPU test ran", red=True, bold=True)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache alone, except pip's, whose wheels have gigabytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_CACHE_DIR", os.environ.get("PIP_CACHE_DIR", user_cache_dir("pip")))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def data_dir(pytestconfig: pytest.Config) -> Path:
    """The data set of --data-dir, with train/ and val/."""
    return pytestconfig.getoption("--data-dir")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes more rights than this user has")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Any:
    """A cli_cases.Command that runs `train ...` in this process."""
    from cli_cases import runner  # imports torch, which takes seconds

    return runner(capsys)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small generated set; read-only."""
    from cli_cases import write_small_set

    return write_small_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest) -> dict[str, str | None]:
    """What went wrong in each of the file's CASES in Triton's interpreter; None: nothing."""
    from kernel_cases import interpreted_by

    return interpreted_by(str(request.path))


def _gpu_is_missed(config: pytest.Config) -> bool:
    return config.getoption("--require-gpu") and config.stash[_GPU_TESTS_RUN] == 0


def _cuda_is_here() -> bool:
    import torch  # takes seconds; needed only when a GPU test was collected

    return torch.cuda.is_available()
