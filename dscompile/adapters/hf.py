"""A paged latent cache for transformers: `model.generate(..., past_key_values=PagedLatentCache(model.config, 8192))`.

Since 5.15, transformers' MLA models cache the normalised latent (as "keys", [B, 1, S, C]) and the rotated key that all
heads share (as "values", [B, 1, S, R]). This cache stores both side by side in pages of 64 tokens: a pool
[P, 64, 1, C + R] for each layer, and one page table [B, pages of a request] for all layers. That is the layout of the
decode kernel. Uncompiled, the model gets a gathered copy of its pages, in plain tensor operations; compiled with
`dsinfra`, the gather is recognised and the kernel reads the pages in place.

With `dtype="fp8"` a row is 512 float8 latents, their four scales, and 64 rope columns as they are: half the memory, and
reads that dequantise. Rounding changes: a latent keeps 4 significant bits.

Static like transformers' own `StaticCache`: shapes and addresses stay, so that decoding is one graph and fits a CUDA
graph. All requests of a batch have one length, as in every cache of transformers (padding is the attention mask's).

Writing past the capacity. The table has no holes: each of its entries is a page of its own. So a token past the
capacity has no column in the table, and looking its page up, which precedes the write, is out of bounds: the index
check of the device catches it, compiled or not. Uncompiled calls are checked earlier, and with a message: exactly on a
CPU; on a GPU against the tokens that uncompiled calls have written, which needs no synchronisation.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

import dscompile.lowering.ops.mla_cache  # noqa: F401  (registers the operators of float8 rows)
from dscompile.kernels import mla_cache
from dscompile.lowering.errors import OperatorError

PAGE_SIZE = 64


class PageSizeError(OperatorError):
    """The page size is not the kernels'."""


class NoLatentError(OperatorError):
    """The model caches something else than one latent and one rotated key."""


class LatentShapeError(OperatorError):
    """The tensors to be cached have the wrong batch, length or widths."""


class LatentDtypeError(OperatorError):
    """The tensors to be cached have another dtype or device than the pool."""


class CacheDtypeError(OperatorError):
    """Rows can't be kept in the dtype asked for."""


class CapacityError(OperatorError):
    """There is no room for the tokens or pages asked for."""


class PageTable:
    """Which pages each request owns: one for all layers, because all hold the same tokens."""

    def __init__(self, max_cache_len: int, num_pages: int | None):
        self.default_pages = _pages(max_cache_len)
        self.num_pages = num_pages
        self.free: list[int] = list(range(num_pages or 0))
        self.owned: list[list[int]] = []
        self._placed: dict[torch.device, torch.Tensor] = {}

    def allocate(self, batch: int, pages: int) -> None:
        """Give each of `batch` requests `pages` pages in all, keeping those it owns; all or nothing."""
        if self.owned and batch != len(self.owned):
            raise CapacityError(
                f"pages for a batch of {batch} were asked for, {len(self.owned)} requests hold pages",
                "the table has one row for each request of the running batch",
                "Call release() first, or make a second cache",
            )
        if self.num_pages is None:
            self.num_pages = batch * pages
            self.free = list(range(self.num_pages))
        owned = self.owned or [[] for _ in range(batch)]
        missing = sum(max(0, pages - len(row)) for row in owned)
        if missing > len(self.free):
            raise CapacityError(
                f"{missing} more pages are needed for {batch} requests of {pages} pages, {len(self.free)} of "
                f"{self.num_pages} are free",
                "pages are not shared between requests",
                "Ask for fewer tokens, a smaller batch, or make the cache with a larger num_pages",
            )
        self.owned = [row + [self.free.pop(0) for _ in range(pages - len(row))] for row in owned]
        self._placed.clear()

    def on(self, device: torch.device) -> torch.Tensor:
        """The table, [B, pages] int32 without holes, at one address on `device` until pages are next allotted."""
        if device not in self._placed:
            self._placed[device] = torch.tensor(self.owned, dtype=torch.int32, device=device)
            torch._dynamo.mark_static_address(self._placed[device])
        return self._placed[device]

    def release(self) -> None:
        """Take all pages back."""
        self.free = sorted([*self.free, *(page for row in self.owned for page in row)])
        self.owned = []
        self._placed.clear()


class PagedLatentLayer(CacheLayerMixin):
    """One layer's pool [P, 64, 1, C + R], the shared page table [B, pages] int32, and an int64 scalar, the length."""

    is_compileable = True
    is_sliding = False
    is_initialized: bool

    def __init__(self, pages: PageTable, latent_width: int, rope_width: int, fp8: bool = False):
        super().__init__()
        self.pages, self.fp8 = pages, fp8
        self.latent_width, self.rope_width = latent_width, rope_width
        self.page_table: torch.Tensor | None = None
        self.cumulative_length = torch.tensor(0, dtype=torch.int64)
        self.written = 0  # tokens that uncompiled calls wrote: never more than the length on the device

    @property
    def capacity(self) -> int:
        """Tokens a request can hold."""
        return PAGE_SIZE * (self.pages.default_pages if self.page_table is None else self.page_table.shape[1])

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate pages, unless that was done, and the pool, with batch, dtype and device of `key_states`."""
        self._check(key_states, value_states)
        self.initialize(key_states.shape[0], key_states.dtype, key_states.device)

    @torch.compiler.disable(
        reason="memory allocated inside a graph has no fixed address: call early_initialization first"
    )
    def initialize(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make ready for `batch` requests; the pool starts as zeros, for pages are read before they are full."""
        if len(self.pages.owned) != batch:
            self.pages.allocate(batch, self.pages.default_pages)
        self.page_table = self.pages.on(device)
        self.batch_size, self.dtype, self.device = batch, dtype, device
        if not self.is_initialized:
            width, stored = self.latent_width + self.rope_width, dtype
            if self.fp8:
                width, stored = mla_cache.row_bytes(self.latent_width, self.rope_width, dtype), torch.uint8
            self.pool = torch.zeros(self.pages.num_pages, PAGE_SIZE, 1, width, dtype=stored, device=device)
            self.cumulative_length = self.cumulative_length.to(device)
            torch._dynamo.mark_static_address(self.pool)
            torch._dynamo.mark_static_address(self.cumulative_length)
            self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append latents [B, 1, S, C] and rotated keys [B, 1, S, R]; return both over the whole capacity T.

        Returns:
            Latents [B, 1, T, C] and rotated keys [B, 1, T, R]; rows at or past the length are stale but finite.

        Raises:
            NoLatentError, LatentShapeError, LatentDtypeError, CapacityError: nothing was written.
        """
        if self.page_table is None:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        length = key_states.shape[2]
        self._check_capacity(length)
        position_S = torch.arange(length, device=self.device) + self.cumulative_length
        row_BS = self.page_table[:, position_S // PAGE_SIZE] * PAGE_SIZE + position_S % PAGE_SIZE  # type: ignore[index]
        if self.fp8:
            torch.ops.dsinfra.mla_append_fp8(
                self.pool, key_states.flatten(0, 2), value_states.flatten(0, 2), row_BS.flatten()
            )
        else:
            token_BSW = torch.cat([key_states, value_states], dim=-1).squeeze(1)
            self.pool.view(-1, self.pool.shape[-1]).index_copy_(0, row_BS.flatten(), token_BSW.flatten(0, 1))
        # In place: the address is part of the recorded CUDA graph.
        self.cumulative_length.add_(length)
        if not torch.compiler.is_compiling():
            self.written += length
        if self.fp8:
            latent_BTC, rope_BTR = torch.ops.dsinfra.mla_read_fp8(
                self.pool, self.page_table, self.latent_width, self.rope_width, self.dtype
            )
            return latent_BTC.unsqueeze(1), rope_BTR.unsqueeze(1)
        paged_BT1W = self.pool[self.page_table].flatten(1, 2)
        return (
            paged_BT1W[..., : self.latent_width].transpose(1, 2),
            paged_BT1W[..., self.latent_width :].transpose(1, 2),
        )

    def _check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        found = f"keys {tuple(keys.shape)} {keys.dtype} and values {tuple(values.shape)} {values.dtype}"
        if keys.dim() != 4 or keys.shape[1] != 1 or values.dim() != 4 or values.shape[1] != 1:
            raise NoLatentError(
                f"{found} were given to a latent cache",
                "it holds one latent and one rotated key a token, not keys and values of each head",
                "Use a model that caches its latent (transformers 5.15 or newer for DeepSeek), or a StaticCache",
            )
        if (keys.shape[3], values.shape[3]) != (self.latent_width, self.rope_width):
            raise LatentShapeError(
                f"{found} were given to a cache of widths {self.latent_width} and {self.rope_width}",
                "a page's row holds one latent beside one rotated key",
                "Build the cache from the configuration of the model that uses it",
            )
        batch = keys.shape[0] if self.page_table is None else self.batch_size
        if keys.shape[0] != batch or values.shape[:3] != keys.shape[:3]:
            raise LatentShapeError(
                f"{found} were given where {batch} requests hold pages",
                "every request needs one latent and one rotated key for each new token",
                "Keep the batch of the first call, or call release() and start over",
            )
        like = (self.dtype, self.device) if self.is_initialized else (keys.dtype, keys.device)
        if (keys.dtype, keys.device) != like or (values.dtype, values.device) != like or not keys.is_floating_point():
            raise LatentDtypeError(
                f"{found} on {keys.device} were given to a pool of {like[0]} on {like[1]}",
                "rows are copied into pages, not converted",
                "Run the whole model in one floating-point dtype, or start over with a new cache",
            )

    def _check_capacity(self, length: int) -> None:
        if torch.compiler.is_compiling():
            return
        used = int(self.cumulative_length) if self.device.type == "cpu" else self.written
        if used + length > self.capacity:
            raise CapacityError(
                f"{length} tokens were given where {used} of {self.capacity} are taken",
                "pages are allotted ahead, so that addresses stay fixed",
                "Make the cache with a larger max_cache_len, or call allocate() with more tokens",
            )

    def set_length(self, tokens: int) -> None:
        """Declare the first `tokens` rows of every request valid, as after a rollback to that length."""
        if not 0 <= tokens <= self.capacity:
            raise CapacityError(
                f"a length of {tokens} was set where requests hold {self.capacity} tokens",
                "rows outside the pages don't exist",
                "Give a length from 0 to the capacity",
            )
        self.cumulative_length.fill_(tokens)
        self.written = tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_seq_length(self) -> Any:
        # A tensor once there is one: an int would be a new graph at each step.
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        """Forget all tokens; pages and addresses stay."""
        self.set_length(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Copy, for each request b, the pages of request `beam_idx[b]` into its own."""
        if self.page_table is not None:
            chosen = self.pool[self.page_table[beam_idx.to(self.device)]]
            self.pool.index_copy_(0, self.page_table.flatten().long(), chosen.flatten(0, 1))

    def offload(self) -> None:
        raise _unsupported("offloading a paged cache")

    def prefetch(self) -> None:
        raise _unsupported("prefetching a paged cache")


class PagedLatentCache(Cache):
    """A transformers cache in pages of 64 tokens, for models that cache a latent.

    Args:
        config: the model's configuration; gives the number of layers and both widths.
        max_cache_len: tokens a request may hold, rounded up to whole pages.
        num_pages: pages of each layer's pool; by default as many as the first batch needs.
        page_size: 64, the kernels' page size.
        dtype: None, the model's own; or "fp8", rows of float8 latents with a scale for each 128 of them and rope
            columns as they are (656 bytes instead of 1152). This changes rounding.

    Raises:
        PageSizeError, NoLatentError, CapacityError, CacheDtypeError: the arguments don't make a paged latent cache.
    """

    layers: list[PagedLatentLayer]

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        num_pages: int | None = None,
        page_size: int = PAGE_SIZE,
        dtype: str | None = None,
    ):
        if page_size != PAGE_SIZE:
            raise PageSizeError(
                f"page_size={page_size} was asked for",
                f"the decode kernels read pages of {PAGE_SIZE} tokens",
                f"Leave page_size out, or give {PAGE_SIZE}",
            )
        if max_cache_len < 1 or (num_pages is not None and num_pages < 1):
            raise CapacityError(
                f"max_cache_len={max_cache_len} and num_pages={num_pages} were asked for",
                "a cache without room holds no token",
                "Give positive numbers",
            )
        if dtype not in (None, "fp8"):
            raise CacheDtypeError(
                f"dtype={dtype!r} was asked for",
                "rows are kept as the model makes them, or in float8 with scales",
                'Leave dtype out, or give "fp8"',
            )
        config = config.get_text_config(decoder=True)
        latent, rope = getattr(config, "kv_lora_rank", None), getattr(config, "qk_rope_head_dim", None)
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if not latent or not rope or kinds != {"full_attention"}:
            raise NoLatentError(
                f"a configuration of {config.model_type} with kv_lora_rank={latent}, qk_rope_head_dim={rope} "
                f"and layers of {sorted(kinds)} was given",
                "every layer must cache one latent and one rotated key",
                "Use the cache that transformers makes for this model",
            )
        if dtype == "fp8":
            _check_fp8_width(latent)
        self.pages = PageTable(max_cache_len, num_pages)
        layers = [PagedLatentLayer(self.pages, latent, rope, dtype == "fp8") for _ in range(config.num_hidden_layers)]
        super().__init__(layers=layers)

    def early_initialization(
        self, batch_size: int, num_heads: Any, head_dim: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate before the first call, as a compiled prompt needs; the widths come from the configuration."""
        for layer in self.layers:
            if not layer.is_initialized:
                layer.initialize(batch_size, dtype, torch.device(device))

    def allocate(self, batch: int, tokens: int) -> None:
        """Allot pages for `tokens` tokens of each of `batch` requests: before the first call, or to make room for more.

        More pages for running requests widen the table: the next compiled call compiles anew.

        Raises:
            CapacityError: the pool has too few free pages; nothing was allotted.
        """
        self.pages.allocate(batch, _pages(tokens))
        for layer in self.layers:
            if layer.is_initialized:
                layer.initialize(batch, layer.dtype, layer.device)

    def release(self) -> None:
        """Forget all tokens and take all pages back; the pools keep their memory, and the batch may change."""
        for layer in self.layers:
            layer.reset()
            layer.page_table = None
        self.pages.release()

    def set_length(self, tokens: int) -> None:
        """Declare the first `tokens` tokens of every request valid, in every layer."""
        for layer in self.layers:
            layer.set_length(tokens)


def _check_fp8_width(latent: int) -> None:
    try:
        mla_cache.groups_of(latent)
    except mla_cache.BadArguments as error:
        raise CacheDtypeError(
            f'dtype="fp8" was asked for where kv_lora_rank is {latent}', str(error), "Leave dtype out"
        ) from None


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_SIZE)


def _unsupported(what: str) -> OperatorError:
    return NoLatentError(
        f"{what} was asked for", "pages keep one address for the life of the cache", "Make the cache without offloading"
    )
