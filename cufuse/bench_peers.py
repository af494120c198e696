"""PyTorch's ways through the same attention front, each captured in a CUDA graph of its own: the peers of ``cufuse bench``.

Nothing here is imported by the rest of cufuse; what is not installed is named in ``Peers.absent``.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable
from typing import Any, Final

from cufuse.bench_inputs import EPS, Block, upload
from cufuse.bench_results import COMPILE, EAGER, F_RMS_NORM, GEMM, LIGER
from cufuse.bench_timing import Clock, Run
from cufuse.bf16 import bfloat16

_RECOMPILES: Final = 1 << 16

REFERENCES: Final = (EAGER,)
"""Hugging Face's own modules."""

OTHERS: Final = (COMPILE, LIGER, F_RMS_NORM)
"""What ``--no-peers`` leaves out and ``--peer-seconds`` limits."""

_NEEDS: Final = {COMPILE: "triton", LIGER: "liger_kernel.transformers.rms_norm"}


class Peers:
    """The libraries that are there, and their forms of the front for one model at a time."""

    def __init__(self, wanted: tuple[str, ...]) -> None:
        self.absent: dict[str, str] = {}
        self.torch = self._need((GEMM, *REFERENCES, *wanted), "torch")
        if self.torch is not None and not self.torch.cuda.is_available():
            self._leave_out((GEMM, *REFERENCES, *wanted), "PyTorch finds no GPU")
            self.torch = None
        self.qwen3: Any = None
        if self.torch is not None:
            self.qwen3 = self._need((*REFERENCES, *wanted), "transformers.models.qwen3.modeling_qwen3")
        if self.qwen3 is not None:
            for name in wanted:
                if name in _NEEDS:
                    self._need((name,), _NEEDS[name])
        self.names = tuple(name for name in (GEMM, *wanted, *REFERENCES) if name not in self.absent)
        self._streams: dict[str, Any] = {}
        if COMPILE in self.names:
            # eight shapes, and it would quietly run eager from then on
            limits: Any = importlib.import_module("torch._dynamo.config")
            limits.recompile_limit = limits.accumulated_recompile_limit = _RECOMPILES

    def _need(self, columns: tuple[str, ...], module: str) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return importlib.import_module(module)
        except Exception as error:  # a library that is there but broken raises whatever it likes
            self._leave_out(columns, f"{module} cannot be imported ({type(error).__name__}: {_first_line(error)})")
            return None

    def _leave_out(self, columns: tuple[str, ...], reason: str) -> None:
        self.absent |= {name: reason for name in columns if name not in self.absent}

    def stream(self, name: str) -> Any:
        """A stream for the column, on which it is made ready and captured, the same in all cells.

        PyTorch keeps one workspace for cuBLAS for each stream, graphs hold its address, and a graph's end may free what its stream
        has (PyTorch issue 193402): columns with one stream would depend on each other's lives.
        """
        if name not in self._streams:
            self._streams[name] = self.torch.cuda.Stream()
        return self._streams[name]

    def block(self, block: Block) -> "TorchBlock":
        """The forms for one cell. Only where PyTorch is there."""
        return TorchBlock(self, block)

    def forget(self) -> None:
        """Drop compiled code and freed memory between cells."""
        if self.torch is not None:
            # where it fails, memory is lost and nothing else
            with contextlib.suppress(Exception):
                if COMPILE in self.names:
                    self.torch._dynamo.reset()
                self.torch.cuda.empty_cache()


class TorchBlock:
    """One cell in PyTorch: tensors over the same memory as CuPy's arrays."""

    def __init__(self, peers: Peers, block: Block) -> None:
        self.torch, self.qwen3, self.layer, self._peers = peers.torch, peers.qwen3, block.layer, peers
        take = self.torch.from_dlpack
        self.calls = block.calls
        self._graphs: list[Any] = []
        # what calls hold, such as an output that no pool of a graph has, must live as long as the graphs that hold its address
        self._captured: list[Callable[[int], Any]] = []
        self.x = take(block.x)
        self.weights = [take(weight) for weight in block.weights[: block.calls]]
        self.tables = [take(upload(table))[None] for table in block.tables(bfloat16)]

    def run(self, name: str, clock: Clock) -> Run:
        """The column captured, and what its last call writes."""
        torch = self.torch
        with torch.no_grad():
            call = self._product() if name == GEMM else self._front(name)
            own = self._peers.stream(name)
            torch.cuda.synchronize()
            with torch.cuda.stream(own):
                for index in (0, self.calls - 1):
                    call(index)
            torch.cuda.synchronize()
            graph, last = torch.cuda.CUDAGraph(), None
            with torch.cuda.graph(graph, stream=own):
                for index in range(self.calls):
                    last = call(index)
        self._graphs.append(graph)
        self._captured.append(call)
        stream = torch.cuda.ExternalStream(clock.stream.ptr)

        def launch() -> None:
            with torch.cuda.stream(stream):
                graph.replay()

        return Run(launch, outputs=() if name == GEMM else self._delivered(last))

    def release(self) -> None:
        """Free all graphs, of which none may run any more, whoever still holds a Run of theirs."""
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._captured.clear()

    def reference(self) -> tuple[Any, ...]:
        """q, k and v of Hugging Face's modules with the packed weight, for the last call of a graph; no graph."""
        with self.torch.no_grad():
            found = self._delivered(self._front(EAGER)(self.calls - 1))
        copies = tuple(one.copy() for one in found)
        self.torch.cuda.synchronize()
        return copies

    def _delivered(self, found: Any) -> tuple[Any, ...]:
        """[1, H, M, D] tensors as CuPy arrays [M, H, D] of the same memory."""
        import cupy

        return tuple(cupy.from_dlpack(one.detach().transpose(1, 2)[0]) for one in found)

    def _product(self) -> Callable[[int], Any]:
        out = self.torch.empty((len(self.x), self.layer.rows), dtype=self.x.dtype, device=self.x.device)
        return lambda index: self.torch.mm(self.x, self.weights[index].t(), out=out)

    def _front(self, name: str) -> Callable[[int], Any]:
        norms = [self._norm(name, weight) for weight in (self.layer.norm, self.layer.q_norm, self.layer.k_norm)]
        linear, rotate = self.torch.nn.functional.linear, self.qwen3.apply_rotary_pos_emb
        parts, head_dim = self.layer.parts, self.layer.head_dim

        def front(x: Any, weight: Any, cos: Any, sin: Any) -> tuple[Any, Any, Any]:
            y = norms[0](x)
            q, k, v = linear(y, weight).split(parts, dim=-1)
            shape = (*x.shape[:-1], -1, head_dim)
            q = norms[1](q.view(shape)).transpose(1, 2)
            k = norms[2](k.view(shape)).transpose(1, 2)
            q, k = rotate(q, k, cos, sin)
            return q, k, v.view(shape).transpose(1, 2)

        # fullgraph: an error rather than a graph in pieces, some of them eager
        function = self.torch.compile(front, dynamic=False, fullgraph=True) if name == COMPILE else front
        x = self.x[None]
        return lambda index: function(x, self.weights[index], *self.tables)

    def _norm(self, name: str, weight: Any) -> Callable[[Any], Any]:
        torch, tensor, size = self.torch, self.torch.from_dlpack(weight), len(weight)
        if name == F_RMS_NORM:
            return lambda x: torch.nn.functional.rms_norm(x, (size,), tensor, eps=EPS)
        if name == LIGER:
            liger = importlib.import_module(_NEEDS[LIGER])
            module = liger.LigerRMSNorm(size, eps=EPS, casting_mode="llama")
        else:
            module = self.qwen3.Qwen3RMSNorm(size, eps=EPS)
        module.weight = torch.nn.Parameter(tensor, requires_grad=False)
        return module.to(tensor.device)  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]
