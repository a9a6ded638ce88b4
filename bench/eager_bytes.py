"""What eager torch moves: every operation that it runs reads its tensors and writes its results.

Counted by intercepting the operations (``TorchDispatchMode``), backward passes included. Rules,
chosen so that eager is never charged for more than it must move:

- a view moves nothing, nor does memory that is only allocated;
- a tensor counts the elements that it has in memory: an expanded axis once;
- what is changed in place is read and written; a copy, a fill and an ``out=`` only write;
- a gather and a sampler read no more elements of their source than they write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GATHERS = {"aten::index", "aten::index_select", "aten::gather", "aten::grid_sampler_2d"}
OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_"}
ALLOCATIONS = {
    "aten::empty", "aten::empty_like", "aten::empty_strided",
    "aten::new_empty", "aten::new_empty_strided",
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """One operation of torch that moves data."""

    name: str
    """As torch names it: aten::add."""
    moved_bytes: int
    """Read and written."""


@dataclass(frozen=True)
class Moved:
    """What a call moved, operation by operation."""

    operations: tuple[Operation, ...]
    """In the order in which they ran."""

    @property
    def total_bytes(self) -> int:
        """Read and written by all operations."""
        return sum(operation.moved_bytes for operation in self.operations)

    def passes(self, least_bytes: float) -> int:
        """How many operations moved ``least_bytes`` or more: those over a few numbers are none."""
        return sum(operation.moved_bytes >= least_bytes for operation in self.operations)


def count_moved(call: Callable[[], Any]) -> Moved:
    """Run ``call`` once and count what each of its operations moves."""
    with _Counter() as counter:
        call()
    return Moved(tuple(counter.operations))


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moved_bytes = _moved_bytes(func._schema, args, kwargs or {}, result)
        if moved_bytes:
            self.operations.append(Operation(func._schema.name, moved_bytes))
        return result


def _moved_bytes(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    if schema.name in ALLOCATIONS:
        return 0
    reads, writes = [], []
    for argument, value in _given(schema, args, kwargs):
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            writes += _tensors(value)
        if not changed or not (argument.is_out or schema.name in OVERWRITES):
            reads += _tensors(value)
    known = {_storage(tensor) for tensor in reads + writes}
    results = _tensors(result)
    new = [tensor for tensor in results if _storage(tensor) not in known]
    if results and not new and not writes:
        return 0  # a view
    writes += new
    most = max((_elements(tensor) for tensor in writes), default=0)
    if schema.name in GATHERS:
        source, *others = reads
        read_bytes = min(_elements(source), most) * source.itemsize + sum(map(_bytes, others))
    else:
        read_bytes = sum(map(_bytes, reads))
    return read_bytes + sum(map(_bytes, writes))


def _given(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    yield from zip(schema.arguments, args, strict=False)  # the rest are defaults or keywords
    for argument in schema.arguments:
        if argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _elements(tensor: torch.Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= min(size, 1) if stride == 0 else size
    return count


def _bytes(tensor: torch.Tensor) -> int:
    return _elements(tensor) * tensor.itemsize
