"""The CUDA FP8 kernel on a Hopper GPU: each tile and layout at odd sizes, poisoned edges, graphs, streams, threads."""

from __future__ import annotations

import math
import threading

import pytest
import torch

from dscompile.kernels import gemm_cuda
from dscompile.kernels.gemm_cuda import TILES

pytestmark = pytest.mark.gpu

GROUPS_TILES = [name for name, tile in TILES.items() if not tile.dense_only]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"hopper: this device has compute capability {torch.cuda.get_device_capability()}")


def operands(seed: int, m: int, n: int, k: int, *outer: int) -> tuple[torch.Tensor, ...]:
    """x [m, k], w [*outer, n, k], and scales of uneven size, so that a wrong index shows; the padding is NaN."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def values(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda", generator=generator) * 112).clamp(-448, 448).to(torch.float8_e4m3fn)

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, device="cuda", generator=generator) * 4 / 448 + 1e-3

    k_blocks = math.ceil(k / 128)
    x_scale = scales(k_blocks, math.ceil(m / 4) * 4)
    x_scale[:, m:] = torch.nan
    return values(m, k), values(*outer, n, k), x_scale, scales(*outer, math.ceil(n / 128), k_blocks)


def product(x: torch.Tensor, w: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """The formula in float64."""
    (m, k), n = x.shape, w.shape[0]
    a = x.float().double() * x_scale[:, :m].T.repeat_interleave(128, 1)[:, :k]
    b = w.float().double() * w_scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return a @ b.T


def close(y: torch.Tensor, expected: torch.Tensor) -> bool:
    """One rounding to bf16, and the tensor cores' sums of about 14 bits within a block."""
    if not expected.numel():
        return True
    allowed = expected.abs() * 2**-8 + 2e-3 * expected.pow(2).mean().sqrt()
    return bool(((y.double() - expected).abs() <= allowed).all())  # false for NaN


DENSE = [
    (1, 8, 128),
    (64, 64, 128),
    (257, 264, 400),
    (300, 1000, 1536),
    (1000, 776, 4480),
    (2048, 2112, 640),
    (5000, 1024, 272),
]


@pytest.mark.parametrize("shape", DENSE, ids=str)
@pytest.mark.parametrize("tile", TILES)
def test_dense(tile: str, shape: tuple[int, int, int]) -> None:
    x, w, x_scale, w_scale = operands(1, *shape)
    y = gemm_cuda.linear(x, w, x_scale=x_scale, w_scale=w_scale, tile=tile)
    assert close(y, product(x, w, x_scale, w_scale))
    assert torch.equal(y, gemm_cuda.linear(x, w, x_scale=x_scale, w_scale=w_scale, tile=tile))


SIZES = {
    "ragged": (700, 264, 400, [100, 0, 300, 7, 0, 200]),
    "nobody": (64, 128, 128, [0, 0]),
    "edges": (3000, 520, 1152, [1, 2, 3, 500, 0, 128, 129, 127, 256, 257, 900]),
    "many": (5000, 384, 256, [7 * (i % 11) for i in range(70)]),
    "one": (777, 512, 640, [777]),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tile", GROUPS_TILES)
def test_groups(tile: str, sizes: str) -> None:
    """Rows of nobody are NaN and give zeros; no row of one group reaches another's."""
    m, n, k, rows = SIZES[sizes]
    x, w, x_scale, w_scale = operands(2, m, n, k, len(rows))
    ends = torch.tensor(rows, device="cuda").cumsum(0).int()
    total = int(ends[-1])
    x.view(torch.uint8)[total:] = 0x7F
    x_scale[:, total:] = torch.nan
    y = gemm_cuda.grouped(x, w, ends, x_scale=x_scale, w_scale=w_scale, tile=tile)
    assert (y[total:] == 0).all()
    for group, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist())):
        part = slice(start, end)
        assert close(y[part], product(x[part], w[group], x_scale[:, part], w_scale[group])), f"group {group}"


SLABS = {
    "ragged": (300, 264, 400, [300, 0, 17, 129]),
    "many": (64, 136, 256, [(i * 13) % 65 for i in range(40)]),
    "long": (1000, 768, 1152, [256, 999, 1000]),
}


@pytest.mark.parametrize("slabs", SLABS)
@pytest.mark.parametrize("tile", GROUPS_TILES)
def test_masked(tile: str, slabs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows past a slab's count are NaN, influence nothing and are not written."""
    most, n, k, counts = SLABS[slabs]
    parts = [operands(3 + i, most, n, k) for i in range(len(counts))]
    x, w, x_scale, w_scale = (torch.stack(tensors) for tensors in zip(*parts))
    for slab, count in enumerate(counts):
        x.view(torch.uint8)[slab, count:] = 0x7F
        x_scale[slab, :, count:] = torch.nan
    real = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size, **kw: real(self, *size, **kw).fill_(7))
    device_counts = torch.tensor(counts, device="cuda", dtype=torch.int32)
    y = gemm_cuda.masked(x, w, device_counts, x_scale=x_scale, w_scale=w_scale, tile=tile)
    for slab, count in enumerate(counts):
        expected = product(x[slab, :count], w[slab], x_scale[slab, :, :count], w_scale[slab])
        assert close(y[slab, :count], expected), f"slab {slab}"
        assert (y[slab, count:] == 7).all()


def test_a_cuda_graph_follows_ends_that_change() -> None:
    x, w, x_scale, w_scale = operands(4, 2000, 512, 512, 4)
    ends = torch.tensor([500, 900, 901, 2000], device="cuda", dtype=torch.int32)
    gemm_cuda.grouped(x, w, ends, x_scale=x_scale, w_scale=w_scale)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [gemm_cuda.grouped(x, w, ends, x_scale=x_scale, w_scale=w_scale) for _ in range(2)]
    for new in ([500, 900, 901, 2000], [0, 0, 1999, 1999], [1, 1000, 1000, 1001]):
        ends.copy_(torch.tensor(new, dtype=torch.int32))
        graph.replay()
        torch.cuda.synchronize()
        for y in results:
            for group, (start, end) in enumerate(zip([0, *new], new)):
                part = slice(start, end)
                assert close(y[part], product(x[part], w[group], x_scale[:, part], w_scale[group]))
            assert (y[new[-1] :] == 0).all()


def test_a_chain_of_launches_waits_for_its_inputs() -> None:
    """Kernels may start before those in front of them end; each must still see their results."""
    x, w, x_scale, w_scale = operands(5, 4096, 1024, 1024)
    expected = gemm_cuda.linear(x, w, x_scale=x_scale, w_scale=w_scale)
    torch.cuda.synchronize()
    for _ in range(20):
        late = torch.zeros_like(x)
        first = gemm_cuda.linear(late, w, x_scale=x_scale, w_scale=w_scale)
        late.copy_(x)
        second = gemm_cuda.linear(late, w, x_scale=x_scale, w_scale=w_scale)
        assert (first == 0).all() and torch.equal(second, expected)


def test_streams_and_threads() -> None:
    x, w, x_scale, w_scale = operands(6, 1000, 512, 512)
    expected = product(x, w, x_scale, w_scale)
    torch.cuda.synchronize()
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results[index] = gemm_cuda.linear(x, w, x_scale=x_scale, w_scale=w_scale)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(close(y, expected) for y in results.values())


def test_strided_operands() -> None:
    """Rows of x and w may be slices of wider tensors."""
    x, w, x_scale, w_scale = operands(7, 300, 264, 512)
    wide_x, wide_w = (torch.zeros(t.shape[0], 1024, device="cuda", dtype=torch.uint8) for t in (x, w))
    wide_x[:, 256:768], wide_w[:, :512] = x.view(torch.uint8), w.view(torch.uint8)
    x_slice, w_slice = wide_x.view(torch.float8_e4m3fn)[:, 256:768], wide_w.view(torch.float8_e4m3fn)[:, :512]
    y = gemm_cuda.linear(x_slice, w_slice, x_scale=x_scale, w_scale=w_scale)
    assert torch.equal(y, gemm_cuda.linear(x, w, x_scale=x_scale, w_scale=w_scale))
    assert close(y, product(x, w, x_scale, w_scale))
