"""Our TensorRT code against stand-ins of one version; test_trt_contract.py runs it for each.

Not collected by itself: one process cannot load two versions of the bindings. ONNX Runtime plays
TensorRT: it runs the plan's graph on the addresses that the context was given, so parity and shapes
are real. torch's streams and CUDA graphs are faked on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from patchbloom.export.bundle import BundleError
from patchbloom.export.config import EngineSpec
from patchbloom.export.eight_bits import Calibration, quantise_graph
from patchbloom.export.graphs import GRAPHS, Graph, Port
from patchbloom.export.parity import Reference, check_parity, make_reference
from torch import Tensor, nn
from trt_standins import Standin, load_bindings, standin_module

ACTIVATION_BYTES = {"encoder": 4096, "denoiser": 12288, "decoder": 8192}
OWN_STREAM, DEFAULT_STREAM, CALLERS_STREAM = 11, 0, 22
UNCALIBRATED = Calibration({}, dict, {"denoiser": {}, "decoder": {}})
HAPPENED: list[str] = []
"""Events on the GPU, in order."""


@pytest.fixture(scope="session")
def bindings(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return load_bindings(
        pytestconfig.getoption("--trt-bindings"), tmp_path_factory.mktemp("libraries")
    )


class FakeTensorRT:
    """Fakes the TensorRT classes that we use, and records their calls."""

    def __init__(self, trt: ModuleType) -> None:
        self.trt = trt
        self.flags = {trt.BuilderFlag.TF32}  # TensorRT's own default
        self.ranges: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.streams: list[int] = []
        self.memory: list[tuple[int, int]] = []
        self.cache_from: list[bytes] = []
        self.config: Standin | None = None
        self.parse_fails = self.build_fails = self.refit_fails = self.cache_is_foreign = False
        self.opens = self.runs = self.capturable = True
        self.capturing = False
        self.names: dict[bytes, str] = {}
        self.ports: dict[str, list[Standin]] = {}
        self.error = 0.0
        self.strategies: list[Any] = []
        self.kernels_read: list[bytes] = []
        self.addresses: dict[str, int] = {}
        self.profiles = self.rows = 0
        self.refitted: list[str] = []
        self.during_build: Callable[[], None] = lambda: None
        self.logger: Any = None

    def standin(self, real: str, **plays: Any) -> Standin:
        return Standin(self.trt, getattr(self.trt, real), plays)

    def parts(self) -> dict[str, Callable[..., Any]]:
        return {
            "Builder": self.builder,
            "OnnxParser": self.parser,
            "Runtime": self.runtime,
            "Refitter": lambda engine, logger: self.standin(
                "Refitter", refit_cuda_engine=self.refit
            ),
            "OnnxParserRefitter": self.refitter,
        }

    def builder(self, logger: Any) -> Standin:
        self.logger = logger
        return self.standin(
            "Builder",
            create_network=self.network,
            create_builder_config=self.builder_config,
            create_optimization_profile=lambda: self.standin(
                "IOptimizationProfile", set_shape=self.set_range
            ),
            build_serialized_network=self.build,
        )

    def runtime(self, logger: Any) -> Standin:
        self.logger = logger
        return self.standin("Runtime", deserialize_cuda_engine=self.deserialize)

    def network(self, flags: int = 0) -> Standin:
        assert flags == 1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        return self.standin("INetworkDefinition")

    def parser(self, network: Standin, logger: Any) -> Standin:
        fault = self.standin(
            "ParserError",
            node_name=lambda: "conv7",
            node_operator=lambda: "Conv",
            desc=lambda: "no importer",
        )
        return self.standin(
            "OnnxParser",
            parse_from_file=lambda model: self.parse(model, network),
            num_errors=1,
            get_error=lambda index: fault,
        )

    def parse(self, model: str, network: Standin) -> bool:
        self.parsed = Path(model)
        onnx.checker.check_model(model)
        ports = [self.standin("ITensor", name=port.name) for port in onnx.load(model).graph.input]
        self.ports[self.parsed.stem] = ports
        network._plays.update(num_inputs=len(ports), get_input=lambda index: ports[index])
        return not self.parse_fails

    def builder_config(self) -> Standin:
        def add_profile(profile: Standin) -> int:
            self.profiles += 1
            return 0

        def set_cache(cache: Standin, ignore_mismatch: bool) -> bool:
            assert not ignore_mismatch  # another GPU's timings are worse than none
            return not (self.cache_is_foreign and self.cache_from[-1])

        self.config = self.standin(
            "IBuilderConfig",
            set_flag=lambda flag: self.flags.add(flag),
            clear_flag=lambda flag: self.flags.discard(flag),
            add_optimization_profile=add_profile,
            create_timing_cache=self.timing_cache,
            set_timing_cache=set_cache,
            set_compute_capability=lambda capability, index: None,
        )
        return self.config

    def timing_cache(self, serialized_timing_cache: bytes) -> Standin:
        self.cache_from.append(serialized_timing_cache)
        return self.standin("ITimingCache", serialize=lambda: b"timings")

    def set_range(self, name: str, *sizes: tuple[int, ...]) -> None:
        self.ranges[name] = tuple(tuple(size) for size in sizes)

    def build(self, network: Standin, config: Standin) -> bytes | None:
        # The real one stays in C++ for minutes: its thread runs no signal handler meanwhile.
        assert threading.current_thread() is not threading.main_thread()
        monitor = config._set["progress_monitor"]
        assert isinstance(monitor, self.trt.IProgressMonitor)
        monitor.phase_start("Building Engine", None, 2)
        self.during_build()
        going = [monitor.step_complete("Building Engine", step) for step in range(2)]
        monitor.phase_finish("Building Engine")
        if self.build_fails:
            self.logger.log(self.trt.ILogger.Severity.WARNING, "hot day")
            self.logger.log(self.trt.ILogger.Severity.ERROR, "out of memory\n at line 3")
        if self.build_fails or not all(going):
            return None
        plan = self.parsed.read_bytes()
        self.names[plan] = self.parsed.stem
        return plan

    def deserialize(self, serialized_engine: bytes) -> Standin | None:
        if not self.opens:
            return None
        name = self.names[serialized_engine]
        return self.standin(
            "ICudaEngine",
            device_memory_size_v2=ACTIVATION_BYTES[name],
            create_execution_context=lambda given: self.context(given, serialized_engine),
            create_runtime_config=self.runtime_config,
        )

    def runtime_config(self) -> Standin:
        """As TensorRT for RTX has; TensorRT has none."""

        def read(blob: bytes) -> bool:
            self.kernels_read.append(blob)
            return True

        return self.standin(
            "IRuntimeConfig",
            set_execution_context_allocation_strategy=self.strategies.append,
            set_runtime_cache=lambda cache: True,
            create_runtime_cache=lambda: self.standin(
                "IRuntimeCache", deserialize=read, serialize=lambda: b"kernels"
            ),
        )

    def refit(self) -> bool:
        self.refitted.append("applied")
        return not self.refit_fails

    def take_weights(self, model: str) -> bool:
        onnx.load(model)
        self.refitted.append(Path(model).stem)
        return not self.refit_fails

    def refitter(self, refitter: Standin, logger: Any) -> Standin:
        fault = self.standin("ParserError", desc=lambda: "weight missing")
        return self.standin(
            "OnnxParserRefitter",
            refit_from_file=self.take_weights,
            num_errors=1,
            get_error=lambda index: fault,
        )

    def context(self, given: Any, plan: bytes) -> Standin:
        strategy = self.strategies.pop() if isinstance(given, Standin) else given
        assert strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
        addresses: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {
            port.name: port._set["shape"]
            for port in self.ports[self.names[plan]]
            if "shape" in port._set
        }

        def set_address(name: str, memory: int) -> bool:
            addresses[name] = self.addresses[name] = memory
            return name in {port.name for port in (*session.get_inputs(), *session.get_outputs())}

        def set_shape(name: str, shape: tuple[int, ...]) -> bool:
            shapes[name] = tuple(shape)
            return True

        def execute(stream_handle: int) -> bool:
            if not self.runs:
                self.logger.log(self.trt.ILogger.Severity.ERROR, "no such kernel")
                return False
            self.streams.append(stream_handle)
            HAPPENED.append(f"run on {stream_handle}")
            first = session.get_inputs()[0]
            self.rows = shapes.get(first.name, first.shape)[0]
            inputs = {
                port.name: _array(addresses[port.name], shapes.get(port.name, port.shape))
                for port in session.get_inputs()
            }
            (output,) = session.run(None, inputs)
            _array(addresses[session.get_outputs()[0].name], output.shape)[:] = output + self.error
            return True

        return self.standin(
            "IExecutionContext",
            set_device_memory=lambda memory, size: self.memory.append((memory, size)),
            set_tensor_address=set_address,
            set_input_shape=set_shape,
            execute_async_v3=execute,
            is_stream_capturable=lambda stream: self.capturable,
        )


def _array(address: int, shape: Any) -> np.ndarray:
    """View of the fp32 numbers at an address."""
    count = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)


class FakeStream(SimpleNamespace):
    """Fakes torch.cuda.Stream."""

    def __init__(self, cuda_stream: int = OWN_STREAM) -> None:
        super().__init__(cuda_stream=cuda_stream)

    def wait_stream(self, other: FakeStream) -> None:
        assert other.cuda_stream != self.cuda_stream
        HAPPENED.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

    def synchronize(self) -> None:
        HAPPENED.append("synchronize")


class FakeGraph:
    """Fakes torch.cuda.CUDAGraph: a replay repeats the recorded run."""

    def __init__(self) -> None:
        self.replays = 0
        self.again: Callable[[], Any] = lambda: None

    def replay(self) -> None:
        self.replays += 1
        self.again()


@pytest.fixture
def tensorrt(bindings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorRT]:
    yield played(bindings, "tensorrt", monkeypatch)
    for name in ("trt_build", "trt_session"):
        sys.modules.pop(f"patchbloom.export.{name}", None)


def played(bindings: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """Put stand-ins in the place of module `name`, and fake torch's streams and graphs."""
    fake = FakeTensorRT(bindings)
    HAPPENED.clear()
    monkeypatch.setitem(sys.modules, name, standin_module(bindings, fake.parts()))
    current = FakeStream(DEFAULT_STREAM)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: FakeStream(DEFAULT_STREAM))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capturing)

    @contextlib.contextmanager
    def record(graph: FakeGraph, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        from patchbloom.export.trt_session import EngineSession

        execute = EngineSession._execute

        def recorded(session: EngineSession, stream: Any) -> None:
            graph.again = lambda: execute(session, stream)

        HAPPENED.append("record")
        with monkeypatch.context() as patch:
            patch.setattr(EngineSession, "_execute", recorded)
            yield

    monkeypatch.setattr(torch.cuda, "graph", record)
    fake.current = current  # type: ignore[attr-defined]
    return fake


class Denoiser(nn.Module):
    """A convolution and a linear layer with a denoiser's inputs and output, two images a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.project = nn.Linear(10, 1)

    def forward(self, latents: Tensor, timestep: Tensor, added: Tensor, keys: Tensor) -> Tensor:
        texts = (added.mean(1)[:, None] + self.project(keys)).expand(-1, 2).flatten()
        return self.mix(latents) + timestep / 1000 + texts[:, None, None, None]


def new_graphs(spec: EngineSpec) -> tuple[Graph, ...]:
    """Graphs that are quick to write: what TensorRT gets does not depend on their layers."""
    torch.manual_seed(0)
    batch, prompts, fp32 = spec.batch, spec.prompts, torch.float32
    images = Port("images", (batch, 3, 32, 32), fp32, 2)
    latents = Port("latents", (batch, 4, 8, 8), fp32, 2)
    texts = (Port("added", (prompts, 6), fp32, 1), Port("keys_values", (prompts, 10), fp32, 1))
    noise, moments = (
        Port("noise", latents.shape, fp32, 2),
        Port("moments", (batch, 8, 8, 8), fp32, 2),
    )
    fewest = spec.min_prompts if spec.min_batch else None
    return (
        Graph("encoder", nn.Conv2d(3, 8, 4, 4), (images,), moments, fewest),
        Graph(
            "denoiser", Denoiser(), (latents, Port("timestep", (1,), fp32), *texts), noise, fewest
        ),
        Graph("decoder", nn.ConvTranspose2d(4, 3, 4, 4), (latents,), images, fewest),
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Folder, spec and torch's references of graphs exported for TensorRT; cached."""
    from patchbloom.export import to_tensorrt

    made: dict[tuple, tuple[Path, EngineSpec, list[Reference]]] = {}

    def make(**shapes: Any) -> tuple[Path, EngineSpec, list[Reference]]:
        key = tuple(sorted(shapes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("bundles") / "engine"
            folder.mkdir()
            spec = EngineSpec(size_px=32, **shapes)
            references = []
            for graph in new_graphs(spec):
                quantise_graph(graph, spec.precision, spec.precision, UNCALIBRATED)
                references.append(make_reference(graph))
                to_tensorrt.export_graph(graph, folder, spec)
            made[key] = folder, spec, references
        return made[key]

    return make


def compiled(exported: Callable[..., Any], said: list[str], **shapes: Any) -> Any:
    from patchbloom.export import to_tensorrt

    folder, spec, references = exported(**shapes)
    report = to_tensorrt.compile_graphs(folder, spec, said.append)
    return folder, spec, references, report


def test_a_static_batch(tensorrt: FakeTensorRT, exported: Callable[..., Any]):
    from patchbloom.export import to_tensorrt

    said: list[str] = []
    shapes = {"batch": 16, "images_per_prompt": 2}
    folder, spec, references, report = compiled(exported, said, **shapes)
    assert report["plans"].keys() == set(GRAPHS)
    flags = tensorrt.trt.BuilderFlag
    assert tensorrt.flags == {flags.STRIP_PLAN, flags.REFIT_IDENTICAL}
    assert tensorrt.config is not None
    assert tensorrt.config._set["max_aux_streams"] == 0
    assert tensorrt.config._set["builder_optimization_level"] == 3
    assert tensorrt.ranges == {}
    assert [line for line in said if line.startswith("compiled the ")] != []

    assert tensorrt.profiles == 0
    sessions = to_tensorrt.open_sessions(folder, spec)
    assert tensorrt.refitted == [told for name in GRAPHS for told in (name, "applied")]
    # One shared memory, of the largest size that a graph needs.
    assert len({address for address, _ in tensorrt.memory}) == 1
    assert {size for _, size in tensorrt.memory} == {max(ACTIVATION_BYTES.values())}
    for reference in references:
        session = sessions[reference.graph]
        assert check_parity(reference, session.run)["max_abs"] < 1e-4
        first, *rest = reference.inputs
        with pytest.raises(ValueError, match=r"must be \[16, .*the engine's shape, got \[15, "):
            session.run(first[:15], *rest)
        # Buffers are allocated once: the next answer has the last one's address.
        answer = session.run(*reference.inputs)
        assert session.run(first.double(), *rest).data_ptr() == answer.data_ptr()
    assert set(tensorrt.streams) == {OWN_STREAM}
    assert HAPPENED[-3:] == ["11 waits for 0", "run on 11", "0 waits for 11"]
    tensorrt.current.cuda_stream = CALLERS_STREAM  # type: ignore[attr-defined]
    session.run(*reference.inputs)
    assert tensorrt.streams[-1] == CALLERS_STREAM
    session.close()


def test_keys_and_values_are_read_where_they_lie(
    tensorrt: FakeTensorRT, exported: Callable[..., Any]
):
    from patchbloom.export import to_tensorrt
    from patchbloom.export.trt_session import ALIGNMENT

    shapes = {"batch": 16, "images_per_prompt": 2}
    folder, spec, references, _ = compiled(exported, [], **shapes)
    session: Any = to_tensorrt.open_sessions(folder, spec)["denoiser"]
    reference = next(each for each in references if each.graph == "denoiser")
    *others, keys = reference.inputs
    memory = torch.empty(keys.numel() + ALIGNMENT)
    shift = -memory.data_ptr() // 4 % (ALIGNMENT // 4)
    for offset, read_there in ((shift, True), (shift + 1, False)):
        lying = memory[offset : offset + keys.numel()].view_as(keys).copy_(keys)
        again = replace(reference, inputs=[*others, lying])
        assert check_parity(again, session.run)["max_abs"] < 1e-4
        assert (tensorrt.addresses["keys_values"] == lying.data_ptr()) is read_there
        assert ("keys_values" in session._buffers) is not read_there


def test_a_small_batch_is_replayed(tensorrt: FakeTensorRT, exported: Callable[..., Any]):
    from patchbloom.export import to_tensorrt

    folder, spec, references, _ = compiled(exported, [], batch=4, images_per_prompt=2)
    sessions = to_tensorrt.open_sessions(folder, spec)
    assert HAPPENED == ["11 waits for 0", "run on 11", "synchronize", "record"] * 3
    for reference in references:
        session: Any = sessions[reference.graph]
        assert session._replay.replays == 0
        assert check_parity(reference, session.run)["max_abs"] < 1e-4
        assert session._replay.replays == 1
    tensorrt.capturing = True
    assert check_parity(reference, session.run)["max_abs"] < 1e-4
    assert session._replay.replays == 1, "a graph cannot be launched while another is recorded"


def test_a_range_of_batches(tensorrt: FakeTensorRT, exported: Callable[..., Any]):
    from patchbloom.export import to_tensorrt

    shapes = {"batch": 6, "min_batch": 2, "images_per_prompt": 2}
    folder, spec, references, _ = compiled(exported, [], **shapes)
    latents = ((2, 4, 8, 8), (6, 4, 8, 8), (6, 4, 8, 8))
    assert tensorrt.profiles == 3
    assert tensorrt.ranges["latents"] == latents
    assert tensorrt.ranges["added"][0][0] == 1
    assert tensorrt.ranges["added"][1] == tensorrt.ranges["added"][2]
    assert "timestep" not in tensorrt.ranges
    sessions = to_tensorrt.open_sessions(folder, spec)
    for reference in references:
        session: Any = sessions[reference.graph]
        assert session._replay is None
        assert check_parity(reference, session.run)["max_abs"] < 1e-4
        ports = session._borders.inputs
        fewer = [
            value[: port.per_prompt * 2] if port.per_prompt else value
            for port, value in zip(ports, reference.inputs, strict=True)
        ]
        found = session.run(*fewer)
        assert len(found) == tensorrt.rows == 4
        assert float((found - reference.expected[:4]).abs().max()) < 1e-4
        with pytest.raises(ValueError, match="must have 2 to 6 rows in steps of 2"):
            session.run(*(torch.zeros(8, *value.shape[1:]) for value in reference.inputs))


@pytest.mark.parametrize(("precision", "rounded"), [("int8", {"Conv", "Gemm"}), ("fp8", {"Gemm"})])
def test_eight_bits(
    tensorrt: FakeTensorRT, exported: Callable[..., Any], precision: str, rounded: set[str]
):
    from patchbloom.export import to_tensorrt

    shapes = {"batch": 4, "images_per_prompt": 2, "precision": precision}
    folder, spec, references, _ = compiled(exported, [], **shapes)
    graph = onnx.load(folder / "denoiser.onnx").graph
    back = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    fed = {node.op_type for node in graph.node if back & {*node.input}}
    assert fed - {"Transpose", "MatMul"} == rounded
    flags = tensorrt.trt.BuilderFlag
    assert tensorrt.flags == {flags.STRIP_PLAN, flags.REFIT_IDENTICAL}
    sessions = to_tensorrt.open_sessions(folder, spec)
    assert tensorrt.refitted == [told for name in GRAPHS for told in (name, "applied")]
    for reference in references:
        assert check_parity(reference, sessions[reference.graph].run)["max_abs"] < 1e-2


def test_the_timing_cache_is_kept(tensorrt: FakeTensorRT, exported: Callable[..., Any]):
    shapes = {"batch": 4, "images_per_prompt": 2}
    folder, *_ = compiled(exported, [], **shapes)
    (kept,) = folder.parent.glob(".tensorrt-*-cpu.timing")
    assert tensorrt.trt.__version__ in kept.name
    assert kept.read_bytes() == b"timings"
    tensorrt.cache_from.clear()
    compiled(exported, [], **shapes)
    assert tensorrt.cache_from == [b"timings"] * 3
    tensorrt.cache_is_foreign, said = True, []
    tensorrt.cache_from.clear()
    compiled(exported, said, **shapes)
    assert tensorrt.cache_from[:2] == [b"timings", b""]
    assert "timing everything again" in said[0]
    assert not list(folder.parent.glob("*.partial"))


def test_the_timing_cache_is_written_through_no_link(
    tensorrt: FakeTensorRT, exported: Callable[..., Any]
):
    folder, *_ = compiled(exported, [], batch=4, images_per_prompt=2)
    (kept,) = folder.parent.glob(".tensorrt-*-cpu.timing")
    victim = folder.parent / "victim"
    victim.write_bytes(b"of another")
    for name in (f"{kept.name}.partial", f"{kept.name}.{os.getpid()}.partial"):
        kept.with_name(name).symlink_to(victim)
    compiled(exported, [], batch=4, images_per_prompt=2)
    assert victim.read_bytes() == b"of another"
    assert kept.read_bytes() == b"timings"
    assert not kept.is_symlink()


def test_faults_are_told(
    tensorrt: FakeTensorRT, exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    from patchbloom.export import to_tensorrt

    shapes = {"batch": 4, "images_per_prompt": 2}
    folder, spec, references, _ = compiled(exported, [], **shapes)
    monkeypatch.setattr(
        importlib.import_module("patchbloom.export.trt_session"), "REPLAYED_BATCH", 0
    )
    sessions, tensorrt.runs = to_tensorrt.open_sessions(folder, spec), False
    with pytest.raises(RuntimeError, match="refused to run the engine: no such kernel"):
        sessions["encoder"].run(*references[0].inputs)
    tensorrt.opens = False
    with pytest.raises(BundleError, match=r"does not open encoder\.plan .*remove the engine"):
        to_tensorrt.open_sessions(folder, spec)
    tensorrt.opens, tensorrt.refit_fails = True, True
    with pytest.raises(BundleError, match=r"weights of encoder\.onnx do not fit .*weight missing"):
        to_tensorrt.open_sessions(folder, spec)
    tensorrt.build_fails = True
    with pytest.raises(BundleError, match=r"\(out of memory at line 3\).*smaller --batch"):
        compiled(exported, [], **shapes)
    tensorrt.parse_fails = True
    with pytest.raises(
        BundleError, match=r"does not take decoder\.onnx \(Conv conv7: no importer\)"
    ):
        compiled(exported, [], **shapes)


def test_an_interrupt_ends_the_build(tensorrt: FakeTensorRT, exported: Callable[..., Any]):
    before = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        assert tensorrt.config is not None
        progress, patience_s = tensorrt.config._set["progress_monitor"], time.monotonic() + 10
        os.kill(os.getpid(), signal.SIGINT)
        while not progress.stopped and time.monotonic() < patience_s:
            time.sleep(0.01)

    tensorrt.during_build = interrupt
    with pytest.raises(KeyboardInterrupt):
        compiled(exported, [], batch=4, images_per_prompt=2)
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_is_told(
    tensorrt: FakeTensorRT, exported: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    trt_build = importlib.import_module("patchbloom.export.trt_build")  # reimported in every test
    monkeypatch.setattr(trt_build, "_PATIENCE_S", 0.0)
    said: list[str] = []
    compiled(exported, said, batch=4, images_per_prompt=2)
    assert any(
        line.startswith("compiling the denoiser: Building Engine, 1 of 2, ") for line in said
    )


def test_stand_ins_have_what_is_real_and_no_more(tensorrt: FakeTensorRT):
    """The harness itself: what TensorRT lacks must fail."""
    trt = sys.modules["tensorrt"]
    builder = trt.Builder(_log(trt))
    config = builder.create_builder_config()
    for wrong in ("create_graph", "make_network"):
        with pytest.raises(AttributeError, match=f"Builder has no attribute '{wrong}'"):
            getattr(builder, wrong)
    with pytest.raises(AttributeError, match="cannot be set"):
        config.aux_streams = 0
    with pytest.raises(AttributeError, match="cannot be set"):
        config.set_flag = None
    with pytest.raises(AttributeError):
        _ = trt.BuilderFlag.STRIP_WEIGHTS
    with pytest.raises(AttributeError):
        _ = trt.EngineBuilder
    for call in (
        lambda: builder.create_network("1"),
        lambda: builder.create_network(1, 2),
        lambda: builder.create_network(flag=1),
        lambda: config.set_flag(1),
        lambda: config.set_timing_cache(config.create_timing_cache(b"")),
        lambda: config.create_timing_cache("text"),
        lambda: builder.build_serialized_network(config, config),
        lambda: trt.Builder(),
        lambda: trt.Builder(print),
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(AssertionError, match="no part was given"):
        _ = builder.reset
    ten = trt.__version__.startswith("10.")
    assert hasattr(trt.BuilderFlag, "FP16") == ten
    assert hasattr(tensorrt.trt.ICudaEngine, "device_memory_size") == ten


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            pass

    return Log()
