"""Joining a query's parts, in place or by a copy, and copying in words."""

import pytest
import torch

from dscompile.lowering import layouts


def parts(dtype=torch.bfloat16, B=2, S=3, H=4, N=16, R=8):
    q = torch.arange(B * S * H * (N + R)).view(B, S, H, N + R).to(dtype).transpose(1, 2)
    return q, q[..., :N], q[..., N:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_adjacent_slices_are_joined_in_place(dtype):
    q, nope, rope = parts(dtype)
    joined = layouts.join_columns(nope, rope)
    assert joined.data_ptr() == q.data_ptr() and joined.stride() == q.stride() and torch.equal(joined, q)


def test_slices_of_a_wider_buffer_are_joined_in_place():
    q = torch.randn(2, 3, 4, 64).bfloat16().transpose(1, 2)
    joined = layouts.join_columns(q[..., 16:40], q[..., 40:48])
    assert joined.data_ptr() == q[..., 16:].data_ptr() and torch.equal(joined, q[..., 16:48])


def unequal_strides(q, nope, rope):
    return nope, rope.contiguous()


def swapped(q, nope, rope):
    return rope, nope


def gap(q, nope, rope):
    return nope[..., :8], rope


def neighbour_in_another_storage(q, nope, rope):
    return nope.clone(memory_format=torch.preserve_format), rope


def columns_apart(q, nope, rope):
    wide = torch.randn(2, 4, 3, 48).bfloat16()
    return wide[..., 0:32:2], wide[..., 32:48:2]


def heads_expanded(q, nope, rope):
    one = torch.randn(2, 3, 1, 24).bfloat16().transpose(1, 2).expand(-1, 4, -1, -1)
    return one[..., :16], one[..., 16:]


def rows_unaligned(q, nope, rope):
    odd = torch.randn(2, 3, 4, 20).bfloat16().transpose(1, 2)
    return odd[..., :12], odd[..., 12:]


def start_unaligned(q, nope, rope):
    wide = torch.randn(2, 3, 4, 32).bfloat16().transpose(1, 2)
    return wide[..., 2:18], wide[..., 18:26]


def no_rope(q, nope, rope):
    return nope, rope[..., :0]


def no_requests(q, nope, rope):
    return nope[:0], rope[:0]


@pytest.mark.parametrize(
    "make",
    [
        unequal_strides,
        swapped,
        gap,
        neighbour_in_another_storage,
        columns_apart,
        heads_expanded,
        rows_unaligned,
        start_unaligned,
        no_rope,
        no_requests,
    ],
    ids=lambda make: make.__name__,
)
def test_others_are_copied(make):
    left, right = make(*parts())
    joined = layouts.join_columns(left, right)
    assert joined.transpose(1, 2).is_contiguous() and torch.equal(joined, torch.cat([left, right], -1))
    assert joined.numel() == 0 or joined.untyped_storage().data_ptr() != left.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("dtype", "width", "start", "words"),
    [
        (torch.bfloat16, 8, 0, True),
        (torch.bfloat16, 6, 0, False),
        (torch.bfloat16, 8, 2, False),
        (torch.float32, 6, 2, True),
        (torch.float32, 5, 0, False),
        (torch.float64, 5, 1, True),
    ],
    ids=["bf16", "bf16-narrow", "bf16-shifted", "fp32", "fp32-odd", "fp64"],
)
def test_copy_is_exact_in_words_or_elements(dtype, width, start, words):
    pattern = torch.randint(-(2**15), 2**15, (3, 2, 16 * dtype.itemsize), dtype=torch.int16)  # NaN payloads among them
    source, out = pattern.view(dtype)[..., start : start + width], torch.zeros(3, 5, 2, 16, dtype=dtype)[..., :width]
    assert layouts._holds_words(source) == words
    layouts.copy_rows(out, source.unsqueeze(1))
    assert all(torch.equal(out[:, i].view(torch.int16), source.contiguous().view(torch.int16)) for i in range(5))
