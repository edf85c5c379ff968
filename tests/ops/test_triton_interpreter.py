"""triton_interpreter.py: right in bf16, strict about memory; and whether stock Triton has caught up."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton runs kernels without a GPU only where TRITON_INTERPRET=1", allow_module_level=True)

import numpy as np
import triton
import triton.language as tl
import triton_interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle, interpreter_builder

SIZE = 16
BF16 = torch.bfloat16


@triton.jit
def arithmetic_kernel(p_x, p_y, p_sum, p_cast, p_dot, p_less, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    b_x, b_y = tl.load(p_x + at), tl.load(p_y + at)
    tl.store(p_sum + at, b_x + b_y)
    tl.store(p_cast + at, (b_x.to(tl.float32) / 3.0).to(tl.bfloat16))
    tl.store(p_dot + at, tl.dot(b_x, b_y))
    tl.store(p_less + at, (b_x < b_y) & (at >= 0))


@triton.jit
def copy_kernel(p_x, p_out, count, shift, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    first = tl.program_id(0) * shift
    tl.store(p_out + first + at, tl.load(p_x + at, mask=at < count), mask=at < count)


@triton.jit
def reduce_kernel(p_x, p_out, SIZE: tl.constexpr):
    tl.store(p_out, tl.sum(tl.load(p_x + tl.arange(0, SIZE)), axis=0))


def test_bf16_is_rounded_to_nearest_and_multiplied_as_numbers():
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(SIZE, SIZE, generator=g).to(BF16) for _ in range(2))
    total, cast = torch.empty_like(x), torch.empty_like(x)
    product, less = torch.empty(SIZE, SIZE), torch.empty(SIZE, SIZE, dtype=torch.bool)
    arithmetic_kernel[(1,)](x, y, total, cast, product, less, SIZE=SIZE)
    assert torch.equal(total, x + y) and torch.equal(cast, (x.float() / 3).to(BF16))
    torch.testing.assert_close(product, x.float() @ y.float())
    assert torch.equal(less, x < y)


def test_a_product_in_fp32_is_rounded_once():
    """So that of the transposed matrices has the same bits, on every machine."""
    g = torch.Generator().manual_seed(0)
    x, y = (100 * torch.randn(*shape, generator=g).numpy() for shape in ((32, 16), (16, 32)))
    zero = TensorHandle(np.zeros((32, 32), np.float32), tl.float32)
    product, turned = (
        interpreter_builder.create_dot(TensorHandle(a, tl.float32), TensorHandle(b, tl.float32), zero, None, 0).data
        for a, b in ((x, y), (y.T, x.T))
    )
    assert product.dtype == np.float32 and (product == turned.T).all()
    assert (product == (x.astype(np.float64) @ y.astype(np.float64)).astype(np.float32)).all()


def test_ties_and_what_is_no_number():
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x7F800000, 0x7F7FFFFF, 0x7FC00000, 0x7F800001], dtype=torch.int32)
    x = bits.view(torch.float32)
    got = torch.from_numpy(triton_interpreter.narrowed(x.numpy()).view(np.int16)).view(BF16)
    assert torch.equal(got.isnan(), x.isnan()) and torch.equal(got[:4], x[:4].to(BF16))


def test_a_reduction_in_bf16_is_refused():
    with pytest.raises(InterpreterError, match="must not be in bfloat16"):
        reduce_kernel[(1,)](torch.ones(SIZE, dtype=BF16), torch.empty(1, dtype=BF16), SIZE=SIZE)


@pytest.mark.parametrize("rows, room, what", [(SIZE, SIZE - 1, "store"), (SIZE - 1, SIZE, "load")])
def test_memory_of_no_tensor_is_not_touched(rows, room, what):
    x, out = torch.ones(rows), torch.zeros(room)
    with pytest.raises(InterpreterError, match=f"OutOfBounds.*{what}: 1 of {SIZE} lanes of program"):
        copy_kernel[(1,)](x, out, SIZE, 0, SIZE=SIZE)
    copy_kernel[(1,)](x, out, SIZE - 1, 0, SIZE=SIZE)
    assert int(out.sum()) == SIZE - 1


def test_two_programs_do_not_store_to_one_address():
    x, out = torch.ones(SIZE), torch.zeros(2 * SIZE)
    with pytest.raises(triton_interpreter.Race, match=r"copy_kernel: 1 addresses"):
        copy_kernel[(2,)](x, out, SIZE, SIZE - 1, SIZE=SIZE)
    copy_kernel[(2,)](x, out, SIZE, SIZE, SIZE=SIZE)


def test_stock_triton_still_needs_mending():
    """A failure here is good news: what is mended upstream can go from triton_interpreter.py."""
    stock = triton_interpreter.STOCK
    third = TensorHandle(np.array([1 / 3], np.float32), tl.float32)
    cast = stock["cast_impl"](interpreter_builder, third, tl.bfloat16)
    assert triton_interpreter.widened(cast.data)[0] != torch.tensor(1 / 3).to(BF16).float(), "casts round to nearest"
    one = TensorHandle(triton_interpreter.narrowed(np.ones((16, 16), np.float32)), tl.bfloat16)
    zero = TensorHandle(np.zeros((16, 16), np.float32), tl.float32)
    assert stock["create_dot"](interpreter_builder, one, one, zero, None, 0).data[0, 0] != 16, "tl.dot is right in bf16"
    less = stock["binary_op"](interpreter_builder, third, third, np.less)
    assert less.dtype == tl.float32, "a comparison gives int1"
