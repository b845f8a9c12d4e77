"""MLA decode over a latent cache: the entry to both kernels, their limits, and the choice of splits.

A few new queries of each request against all its cached keys, in the absorbed form: a key is a latent of C columns,
which is its value too, and a rope part of R columns, both shared by all heads. The cache is read in place, contiguous
or paged, as two tensors that may be slices of one. `impl` names the kernel, "gluon" (mla_decode_gluon.py, Hopper) or
"triton" (mla_decode_triton.py, any CUDA GPU); nothing falls back silently, and `gluon_refusal` and `triton_refusal` say
what each can't take. No host synchronisation and no state between calls: safe in a CUDA graph, where lengths may change
from replay to replay. Results are bitwise repeatable.
"""

from __future__ import annotations

import contextlib
import functools
import math

import torch

from dscompile.kernels import launch, mla_schedule
from dscompile.kernels.mla_decode_launch import Outputs, Work, launch_combine, launch_gluon, launch_triton, tile_rows
from dscompile.kernels.mla_schedule import MAX_PLANNED, PAGE, PART_ROWS

MAX_SPLITS = 128
FEW_REQUESTS = 8  # so many, or fewer, are cut into equal parts sooner than their lengths are weighed (measured on H100)
PARTIAL_COST = 4  # a part's 64 x 512 float32 results, written and read once, are the traffic of 3.5 pages
LOG2_E = math.log2(math.e)


class BadArguments(ValueError):
    """Arguments disagree with each other or with the contract of `mla_decode`."""


class KernelLimit(ValueError):
    """The kernel asked for can't compute this call, here or at all."""


def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    seqlens: torch.Tensor,
    mask: torch.Tensor | None,
    page_table: torch.Tensor | None,
    scale: float,
    causal: bool,
    latent_scale: torch.Tensor | None = None,
    *,
    impl: str = "gluon",
    splits: int | None = None,
    batch_invariant: bool = False,
    equal_lengths: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q over the cache -> o [B, S, H, C] in q's dtype, lse [B, S, H] float32 (natural logarithm).

    Args:
        q_latent, q_rope: [B, S, H, C] and [B, S, H, R], columns contiguous, other strides free; "gluon" copies them
            where queries and heads don't merge into one stride.
        latent, k_rope: the cache, in q's dtype: [B, T, C] and [B, T, R], or paged [P, 64, C] and [P, 64, R]; columns
            contiguous, other strides free. Rows from a request's length on never count: they may be NaN.
        seqlens: [B] int32 on the device, the valid keys of each request, those of its queries included. 0 is allowed;
            more than the cache has room for counts as full.
        mask: bool, broadcastable to [B, S, T] (T = 64 * max_pages when paged), True = visible; ANDed with the lengths.
        page_table: [B, max_pages] int32, the page of keys 64*p .. 64*p + 63; entries past the length are not read.
        scale: of the scores, positive.
        causal: query i of request b sees keys below seqlens[b] - (S - 1 - i) only.
        latent_scale: [B, T, C / G] or [P, 64, C / G] float32, columns contiguous, G a power of two ("triton" alone):
            latent is float8_e4m3fn, and its columns G*i .. are multiplied by scale i and rounded to q's dtype.
        impl: "gluon" or "triton".
        splits: equal parts that each request's keys are cut into, one to a program. When None, the device deals the
            pages of more than 8 requests to as many programs as run at a time, by the lengths (`mla_schedule`).
            Requests that are equally long (see `equal_lengths`), few ones and more than 2048 get equal parts, as many
            as `pick_splits` says by the capacity.
        batch_invariant: a request's bits depend on its own data, on the capacity, and on nothing else of the batch.
            Requests are cut by the capacity alone; those with more than 2048 pieces in all take several launches.
        equal_lengths: a promise, for speed alone, that nothing is gained by weighing lengths. Requests without a page
            table (a static cache) are taken to be so.

    A row that sees no key gives o = 0 and lse = -inf.

    Raises:
        BadArguments: shapes, dtypes or devices that don't fit together.
        KernelLimit: `impl` is unknown or refuses the call.
    """
    _check(q_latent, q_rope, latent, k_rope, seqlens, mask, page_table, scale, latent_scale, splits)
    if impl not in _REFUSALS:
        raise KernelLimit(f"impl is {impl!r}. No kernel has that name. Use one of {', '.join(map(repr, _REFUSALS))}.")
    refusal = _REFUSALS[impl](q_latent, q_rope, latent, k_rope, latent_scale)
    if refusal:
        raise KernelLimit(refusal)
    if batch_invariant and splits is not None:
        raise BadArguments(
            f"batch_invariant was asked for with splits={splits}. The cuts then follow from the capacity. "
            "Leave out one."
        )
    return mla_decode_unchecked(
        q_latent,
        q_rope,
        latent,
        k_rope,
        seqlens,
        mask,
        page_table,
        scale,
        causal,
        latent_scale,
        impl=impl,
        splits=splits,
        batch_invariant=batch_invariant,
        equal_lengths=equal_lengths,
    )


def mla_decode_unchecked(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    seqlens: torch.Tensor,
    mask: torch.Tensor | None,
    page_table: torch.Tensor | None,
    scale: float,
    causal: bool,
    latent_scale: torch.Tensor | None = None,
    *,
    impl: str,
    splits: int | None = None,
    batch_invariant: bool = False,
    equal_lengths: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mla_decode` for a caller that has checked the contract and asked for the refusal itself."""
    requests, s_q, heads, width = q_latent.shape
    rows, device = s_q * heads, q_latent.device
    capacity = latent.shape[1] if page_table is None else PAGE * page_table.shape[1]
    o = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=device)
    lse = torch.empty(q_latent.shape[:3], dtype=torch.float32, device=device)
    if o.numel() == 0 or capacity == 0:
        return o.zero_(), lse.fill_(-math.inf)
    if mask is not None:
        mask = mask.view(torch.uint8).expand(requests, s_q, capacity)
    deal = None
    if splits is None:
        tiles = -(-rows // tile_rows(impl, rows, latent))
        programs = launch.sm_count(device) * (1 if impl == "gluon" else 2)  # as many as run at a time
        deal = mla_schedule.deal(requests, rows, tiles, capacity, programs, batch_invariant)
        alike = equal_lengths or page_table is None or requests <= FEW_REQUESTS
        if batch_invariant and deal.items > MAX_PLANNED:
            step, cache = MAX_PLANNED // deal.pieces, (latent, k_rope, latent_scale)
            queries, options = (q_latent, q_rope), (scale, causal, impl)
            return _in_groups(step, queries, cache, seqlens, mask, page_table, options)
        if (alike or deal.items > MAX_PLANNED) and not batch_invariant:
            deal = None
            most = max(4, PART_ROWS // (requests * rows))
            splits = pick_splits(requests * tiles, -(-capacity // PAGE), launch.sm_count(device), min(most, MAX_SPLITS))
    outputs, work = Outputs(o, lse), Work(capacity, splits or 1, deal, causal, scale * LOG2_E)
    if deal is not None or work.splits > 1:
        slots = work.splits * requests if deal is None else deal.slots
        outputs = Outputs(
            o,
            lse,
            torch.empty((slots, rows, width), dtype=torch.float32, device=device),
            torch.empty((slots, rows), dtype=torch.float32, device=device),
            None if deal is None else torch.empty((requests, 2), dtype=torch.int32, device=device),
        )
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if impl == "gluon":
            launch_gluon(q_latent, q_rope, latent, k_rope, seqlens, page_table, mask, outputs, work)
        else:
            launch_triton(q_latent, q_rope, latent, k_rope, seqlens, page_table, mask, latent_scale, outputs, work)
        if outputs.o_part is not None:
            launch_combine(outputs, work)
    return o, lse


def _in_groups(
    step: int,
    queries: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    seqlens: torch.Tensor,
    mask: torch.Tensor | None,
    page_table: torch.Tensor | None,
    options: tuple[float, bool, str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """`step` requests at a time, where more have more pieces than a program can weigh; each one's are the same."""
    scale, causal, impl = options
    found = []
    for first in range(0, len(seqlens), step):
        some = slice(first, first + step)
        own = page_table is None  # then requests hold rows of their own
        latent, k_rope, latent_scale = (x[some] if own and x is not None else x for x in cache)
        found.append(
            mla_decode_unchecked(
                *(q[some] for q in queries),
                latent,  # type: ignore[arg-type]
                k_rope,  # type: ignore[arg-type]
                seqlens[some],
                None if mask is None else mask[some],
                None if page_table is None else page_table[some],
                scale,
                causal,
                latent_scale,
                impl=impl,
                batch_invariant=True,
            )
        )
    return torch.cat([o for o, _ in found]), torch.cat([lse for _, lse in found])


@functools.cache
def pick_splits(programs: int, pages: int, sms: int, most: int = MAX_SPLITS) -> int:
    """Parts to cut each request's keys into, when one part makes `programs` programs of at most `pages` pages each.

    A program occupies an SM, so programs run in waves of `sms`, each as long as one part. Cutting fills the last wave
    better and costs a partial result a part. The count with the least of waves * (pages of a part + that cost), and not
    over `most`.
    """

    def duration(splits: int) -> int:
        waves = -(-programs * splits // sms)
        return waves * (-(-pages // splits) + (PARTIAL_COST if splits > 1 else 0))

    return min(range(1, max(1, min(pages, most)) + 1), key=duration)


def gluon_refusal(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    latent_scale: torch.Tensor | None = None,
) -> str | None:
    """Why the Gluon kernel can't take these arguments, or None. Reads metadata only; they must fit the contract."""
    if not launch.has_gluon():
        return (
            f"Triton is {launch.triton_version() or 'not installed'}. The kernel is written in Gluon as of Triton "
            "3.6. Install the Triton that torch 2.11 or later brings."
        )
    if launch.interpreting() or launch.capability(q_latent.device) != (9, 0):
        return (
            f"q_latent is on {q_latent.device} of compute capability {launch.capability(q_latent.device)}. The "
            "kernel uses instructions that only Hopper, (9, 0), has. Use impl='triton'."
        )
    if q_latent.dtype not in (torch.bfloat16, torch.float16):
        return (
            f"The dtype is {q_latent.dtype}. The kernel multiplies on tensor cores in 16 bits. "
            "Convert to bfloat16 or float16, or use impl='triton'."
        )
    if latent_scale is not None:
        return f"The cache is {latent.dtype} with scales. The kernel takes 16-bit rows alone. Use impl='triton'."
    widths = q_latent.shape[-1], q_rope.shape[-1]
    if widths != (512, 64):
        return f"Latent and rope are {widths} wide. The kernel's tiles are made for (512, 64). Use impl='triton'."
    for name, x in (("q_latent", q_latent), ("q_rope", q_rope), ("latent", latent), ("k_rope", k_rope)):
        # In elements of 16 bytes together. The stride of a dimension of size 1 is never used.
        unit = 16 // x.dtype.itemsize
        steps = [stride for size, stride in zip(x.shape[:-1], x.stride()) if size > 1]
        if x.storage_offset() % unit or any(stride % unit or stride == 0 for stride in steps):
            return (
                f"{name} {tuple(x.shape)} has strides {x.stride()} and offset {x.storage_offset()}. Tensor maps "
                f"want multiples of 16 bytes ({unit} elements), not 0. Use impl='triton', or a contiguous copy."
            )
    return None


def triton_refusal(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    k_rope: torch.Tensor,
    latent_scale: torch.Tensor | None = None,
) -> str | None:
    """Why the plain Triton kernel can't take these arguments, or None. Reads metadata only."""
    if not launch.has_triton():
        return "Triton is not installed. The kernel is written in it. Install a CUDA build of torch, which brings it."
    if not launch.interpreting() and launch.capability(q_latent.device) is None:
        return (
            f"q_latent is on {q_latent.device}. The kernel runs on CUDA devices. Move the tensors to one, "
            "or set TRITON_INTERPRET=1 to debug it on the CPU."
        )
    dtypes = [torch.float32, torch.float16] if launch.interpreting() else [torch.float32, torch.float16, torch.bfloat16]
    if q_latent.dtype not in dtypes:
        return (
            f"The dtype is {q_latent.dtype}. The kernel computes in {', '.join(map(str, dtypes))} only "
            "(Triton's interpreter gets bfloat16 wrong without a word). Convert to one of these."
        )
    widths = q_latent.shape[-1], q_rope.shape[-1]
    most = (512, 128) if widths[0] <= 512 or q_latent.dtype == torch.float32 else (1024, 64)
    if not 0 < widths[0] <= most[0] or widths[1] > most[1]:
        return (
            f"Latent and rope are {widths} wide in {q_latent.dtype}. A program holds whole rows: up to 512 and 128 "
            "columns, or 1024 and 64 in 16 bits. There is no kernel for wider ones."
        )
    if latent_scale is not None and (group := widths[0] // latent_scale.shape[-1]) & (group - 1):
        return f"A scale belongs to {group} columns. The kernel's tiles are powers of two. Use groups of 128."
    capability = launch.capability(q_latent.device)
    if latent_scale is not None and not launch.interpreting() and (capability or (0, 0)) < (8, 9):
        return (
            f"The cache is float8_e4m3fn, the device of compute capability {capability}. Triton converts that type "
            "from (8, 9) on. Keep the cache in bfloat16 there."
        )
    return None


_REFUSALS = {"gluon": gluon_refusal, "triton": triton_refusal}


def _check(q_latent, q_rope, latent, k_rope, seqlens, mask, page_table, scale, latent_scale, splits) -> None:
    tensors = (q_latent, q_rope, latent, k_rope)
    names = "q_latent, q_rope, latent and k_rope"
    if (
        q_latent.dim() != 4
        or latent.dim() != 3
        or q_latent.shape[:3] != q_rope.shape[:3]
        or latent.shape[:2] != k_rope.shape[:2]
        or q_latent.shape[3] != latent.shape[2]
        or q_rope.shape[3] != k_rope.shape[2]
    ):
        raise BadArguments(
            f"{names} are {', '.join(str(tuple(x.shape)) for x in tensors)}. They must agree on the "
            "numbers of queries, of keys and of columns. Pass [B, S, H, C], [B, S, H, R], [B, T, C] and "
            "[B, T, R], the last two [P, 64, ...] when paged."
        )
    if latent_scale is not None:
        _check_scales(latent, latent_scale)
    if not q_latent.dtype == q_rope.dtype == k_rope.dtype or (latent_scale is None and latent.dtype != q_latent.dtype):
        raise BadArguments(
            f"{names} are {', '.join(str(x.dtype) for x in tensors)}. Products are taken of equal "
            "dtypes. Convert the queries to the cache's."
        )
    if not q_latent.stride(3) == q_rope.stride(3) == latent.stride(2) == k_rope.stride(2) == 1:
        raise BadArguments(
            f"{names} have column strides {[x.stride(-1) for x in tensors]}. Rows are read in one "
            "piece. Pass tensors whose last dimension is contiguous."
        )
    others = [x for x in (seqlens, mask, page_table, latent_scale) if x is not None]
    if any(x.device != q_latent.device for x in (*tensors, *others)):
        raise BadArguments(
            f"Tensors are on {sorted({str(x.device) for x in (*tensors, *others)})}. One kernel reads "
            "them all. Move them to one device."
        )
    requests, s_q = q_latent.shape[:2]
    if seqlens.dtype != torch.int32 or seqlens.shape != (requests,) or not seqlens.is_contiguous():
        raise BadArguments(
            f"seqlens is {seqlens.dtype} {tuple(seqlens.shape)} with strides {seqlens.stride()}. The "
            f"kernel reads one 32-bit length a request. Pass a contiguous int32 tensor of {requests}."
        )
    keys = latent.shape[1] if page_table is None else _check_pages(requests, latent, page_table)
    if page_table is None and latent.shape[0] != requests:
        raise BadArguments(
            f"latent is {tuple(latent.shape)} for {requests} requests. Without a page table, each has "
            f"rows of its own. Pass [{requests}, T, C], or a page table."
        )
    if mask is not None and (
        mask.dtype != torch.bool
        or mask.dim() != 3
        or any(size not in (1, full) for size, full in zip(mask.shape, (requests, s_q, keys)))
    ):
        raise BadArguments(
            f"mask is {mask.dtype} {tuple(mask.shape)} where queries and keys make "
            f"{(requests, s_q, keys)}. It says of each key whether a query may see it. Pass bool, each "
            "size that one or 1."
        )
    if not scale > 0:
        raise BadArguments(
            f"scale is {scale}. The running maximum is taken of unscaled scores, which a scale of 0 or "
            "below would turn round. Scale the queries instead."
        )
    if splits is not None and not 1 <= splits <= MAX_SPLITS:
        raise BadArguments(
            f"splits is {splits}. At most {MAX_SPLITS} partial results are joined at once. Use 1 to "
            f"{MAX_SPLITS}, or None."
        )


def _check_scales(latent: torch.Tensor, latent_scale: torch.Tensor) -> None:
    groups = latent_scale.shape[-1] if latent_scale.dim() == 3 else 0
    group = latent.shape[2] // max(groups, 1)
    if (
        latent.dtype != torch.float8_e4m3fn
        or latent_scale.dtype != torch.float32
        or latent_scale.shape[:-1] != latent.shape[:-1]
        or group * groups != latent.shape[2]
        or group & (group - 1)
        or (groups > 1 and latent_scale.stride(2) != 1)
    ):
        raise BadArguments(
            f"latent is {latent.dtype} {tuple(latent.shape)}, latent_scale {latent_scale.dtype} "
            f"{tuple(latent_scale.shape)} with strides {latent_scale.stride()}. A scale belongs to a power of two of "
            "neighbouring columns of one row. Pass float8_e4m3fn [.., .., C] and float32 [.., .., C / 128]."
        )


def _check_pages(requests: int, latent: torch.Tensor, page_table: torch.Tensor) -> int:
    """-> the keys that a request's pages have room for."""
    if latent.shape[1] != PAGE:
        raise BadArguments(
            f"latent is {tuple(latent.shape)} with a page table. The kernels step through pages of "
            f"{PAGE} rows. Pass [P, {PAGE}, C]."
        )
    if (
        page_table.dtype != torch.int32
        or page_table.dim() != 2
        or page_table.shape[0] != requests
        or page_table.stride(1) != 1
    ):
        raise BadArguments(
            f"page_table is {page_table.dtype} {tuple(page_table.shape)} with strides "
            f"{page_table.stride()}. The kernel reads a row of 32-bit page numbers a request. Pass "
            f"int32 [{requests}, max_pages] with contiguous rows."
        )
    return PAGE * page_table.shape[1]
