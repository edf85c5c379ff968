"""Which backend serves an op, forward and backward: order, refusals, force; what docs/adding_a_backend.md promises."""

import contextvars
import sys
import threading
from types import ModuleType

import pytest
import torch

from uvg_engine import backends, ops
from uvg_engine.backends import plans
from uvg_engine.reference import gated_residual, moe_route

SPANS = torch.tensor([[0, 3], [3, 2]], dtype=torch.int32)
Q_SPANS, K_SPANS = (torch.tensor([[[0, rows]]], dtype=torch.int32) for rows in (4, 6))


class Counted:
    """A kernel that computes as the reference does and notes its calls, "forward" or "backward"."""

    def __init__(self, reference, refuses=lambda *args: None, backward=True):
        self.calls = []
        self.kernel = backends.Kernel(
            self._noting("forward", reference.forward),
            self._noting("backward", reference.backward) if backward else None,
            refuses,
        )

    def _noting(self, what, function):
        def noted(*args):
            self.calls.append(what)
            return function(*args)

        return noted


@pytest.fixture
def add_backend(monkeypatch):
    """add(name, table, place): a backend module of that name, at `place` of the order."""

    def add(name, table, place=0):
        module = ModuleType(f"uvg_engine.backends.{name}")
        module.TABLE = table
        monkeypatch.setitem(sys.modules, module.__name__, module)
        order = list(backends.ORDER)
        order.insert(place, name)
        monkeypatch.setattr(backends, "ORDER", tuple(order))
        monkeypatch.setattr(backends, "_tables", {k: v for k, v in backends._tables.items() if k != name})

    return add


@pytest.fixture(autouse=True)
def every_backend(monkeypatch):
    monkeypatch.delenv("UVG_BACKENDS", raising=False)
    with plans.kept(False):  # they take the tables to stay as they are
        yield


def residual_inputs():
    g = torch.Generator().manual_seed(0)
    h, y = (torch.randn(5, 8, generator=g, requires_grad=True) for _ in range(2))
    return h, y, torch.randn(2, 8, generator=g, requires_grad=True), SPANS


def attention_args(**changes):
    g = torch.Generator().manual_seed(0)
    made = {name: torch.randn(rows, 2, 8, generator=g) for name, rows in (("q", 4), ("k", 6), ("v", 6))}
    made |= {"q_spans": Q_SPANS, "k_spans": K_SPANS, "scale": 0.5} | changes
    return tuple(made.values())


def served_by(op, *args):
    return backends.select(op, args)[0]


def test_the_reference_is_last_and_refuses_nothing():
    assert backends.ORDER[-1] == "reference" and len(set(backends.ORDER)) == len(backends.ORDER)
    assert {op: kernel.refuses() for op, kernel in backends.table("reference").items()} == dict.fromkeys(
        backends.table("reference")
    )


@pytest.mark.parametrize("name", backends.ORDER)
def test_every_table_has_a_backward_where_the_reference_has_one(name):
    reference = backends.table("reference")
    for op, kernel in backends.table(name).items():
        lacks = reference[op].backward is None or name == "cudnn"  # whose backward has no fixed order of sums
        assert (kernel.backward is None) == lacks, f"{name}: {op}"


def test_the_first_that_accepts_serves(add_backend):
    picky = Counted(gated_residual, refuses=lambda h, *rest: "too few rows" if len(h) < 5 else None)
    easy = Counted(gated_residual)
    add_backend("easy", {"gated_residual": easy.kernel})
    add_backend("picky", {"gated_residual": picky.kernel})
    h, y, *_ = residual_inputs()
    ops.gated_residual(h, y)
    ops.gated_residual(h[:4], y[:4])
    assert picky.calls == ["forward"] and easy.calls == ["forward"]


def test_order_is_that_of_the_arguments_not_of_the_last_call(add_backend):
    add_backend("narrow", {"moe_route": Counted(moe_route, lambda x, k: None if x.shape[1] == 2 else "wide").kernel})
    for _ in range(2):
        assert served_by("moe_route", torch.zeros(3, 2), 1) == "narrow"
        assert served_by("moe_route", torch.zeros(3, 3), 1) == served_by("moe_route", torch.zeros(3, 4), 1) != "narrow"


def test_a_backend_without_the_op_is_passed_over(add_backend):
    add_backend("empty", {})
    assert served_by("moe_route", torch.zeros(3, 2).double(), 1) == "reference"
    assert backends.explain("moe_route", torch.zeros(3, 2), 1)["empty"] == "backend empty has no kernel for moe_route"


def test_environment_narrows_and_reorders(add_backend, monkeypatch):
    mine = Counted(gated_residual)
    add_backend("mine", {"gated_residual": mine.kernel})
    h, y, *_ = residual_inputs()
    assert backends.names() == backends.ORDER
    for value, names in (("reference", ("reference",)), (" reference , mine,", ("reference", "mine"))):
        monkeypatch.setenv("UVG_BACKENDS", value)
        assert backends.names() == names
        ops.gated_residual(h, y)
        assert mine.calls == []
    monkeypatch.setenv("UVG_BACKENDS", "mine,reference")
    ops.gated_residual(h, y)
    assert mine.calls == ["forward"]
    monkeypatch.setenv("UVG_BACKENDS", "")
    assert backends.names() == backends.ORDER


def test_environment_without_a_taker_tells_every_reason(monkeypatch):
    monkeypatch.setenv("UVG_BACKENDS", "sdpa")
    with pytest.raises(backends.BackendRefused) as refusal:
        ops.moe_route(torch.zeros(3, 2), 1)
    assert str(refusal.value) == "moe_route is not served here: sdpa: backend sdpa has no kernel for moe_route"
    q, k, v, *spans, _ = attention_args()
    with pytest.raises(
        backends.BackendRefused, match=r"^flash_attention is not served here: sdpa: dtype torch.float64"
    ):
        ops.flash_attention(q.double(), k.double(), v.double(), *spans)


@pytest.mark.parametrize("value", ["cud", "reference,none", ",", " , "])
def test_environment_with_unknown_names(monkeypatch, value):
    monkeypatch.setenv("UVG_BACKENDS", value)
    with pytest.raises(ValueError, match=rf"^UVG_BACKENDS must list backends out of .*reference, got {value!r}$"):
        ops.moe_route(torch.zeros(3, 2), 1)


def test_unknown_names():
    known = ", ".join(backends.ORDER)
    with pytest.raises(ValueError, match=rf"^backend must be one of {known}, got 'cublas'$"):
        backends.table("cublas")
    with pytest.raises(ValueError, match=rf"^backend must be one of {known}, got 'cublas'$"):
        with backends.force("cublas"):
            pytest.fail("entered")
    with pytest.raises(ValueError, match=r"^op must be one of flash_attention, .*window_attention, got 'softmax'$"):
        backends.explain("softmax", torch.zeros(1))
    assert backends.forced() is None


def test_force_nests_and_ends_with_its_block():
    assert backends.forced() is None
    with backends.force("reference"):
        with backends.force("sdpa"):
            assert backends.forced() == "sdpa"
        assert backends.forced() == "reference"
        with pytest.raises(RuntimeError, match="mine"), backends.force("sdpa"):
            raise RuntimeError("mine")
        assert backends.forced() == "reference"
    assert backends.forced() is None


def test_force_passes_the_order_and_the_environment_over(add_backend, monkeypatch):
    first, mine = Counted(gated_residual), Counted(gated_residual)
    add_backend("mine", {"gated_residual": mine.kernel}, place=len(backends.ORDER))
    add_backend("first", {"gated_residual": first.kernel})
    monkeypatch.setenv("UVG_BACKENDS", "reference")
    with backends.force("mine"):
        ops.gated_residual(*residual_inputs())
    assert mine.calls == ["forward"] and first.calls == []


def test_force_of_what_refuses_is_an_error_with_the_reason(add_backend):
    refusing = Counted(gated_residual, refuses=lambda h, *rest: f"width {h.shape[1]}; up to 4")
    add_backend("small", {"gated_residual": refusing.kernel})
    with backends.force("small"), pytest.raises(backends.BackendRefused) as refusal:
        ops.gated_residual(*residual_inputs())
    assert str(refusal.value) == "gated_residual is not served here: small: width 8; up to 4"
    assert isinstance(refusal.value, ValueError) and refusing.calls == []
    with backends.force("small"), pytest.raises(backends.BackendRefused, match="backend small has no kernel for moe_"):
        ops.moe_route(torch.zeros(3, 2), 1)


def backward_of(out):
    out.square().sum().backward()


def in_a_thread(function, *args):
    """Runs it where nothing is forced: a new thread begins with an empty context."""
    errors = []

    def run():
        try:
            function(*args)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=contextvars.Context().run, args=(run,))
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("call", [lambda f, *a: f(*a), in_a_thread], ids=["here", "other-thread"])
def test_force_holds_in_the_backward(add_backend, call):
    mine = Counted(gated_residual)
    add_backend("mine", {"gated_residual": mine.kernel}, place=len(backends.ORDER))  # never chosen by itself
    with backends.force("mine"):
        out = ops.gated_residual(*residual_inputs())
    call(backward_of, out)
    assert mine.calls == ["forward", "backward"] and backends.forced() is None


def test_another_force_wins_in_the_backward(add_backend):
    mine, other = Counted(gated_residual), Counted(gated_residual)
    add_backend("mine", {"gated_residual": mine.kernel})
    add_backend("other", {"gated_residual": other.kernel})
    with backends.force("mine"):
        out = ops.gated_residual(*residual_inputs())
    with backends.force("other"):
        backward_of(out)
    assert mine.calls == ["forward"] and other.calls == ["backward"]


def test_compiled_code_heeds_force_when_it_runs(add_backend):
    mine = Counted(gated_residual)
    add_backend("mine", {"gated_residual": mine.kernel}, place=len(backends.ORDER))
    torch.compiler.reset()
    compiled = torch.compile(ops.gated_residual, fullgraph=True, backend="aot_eager")
    backward_of(compiled(*residual_inputs()))
    assert mine.calls == []
    with backends.force("mine"):
        backward_of(compiled(*residual_inputs()))
    assert mine.calls == ["forward", "backward"]


def test_a_forward_without_force_is_followed_by_its_own_backward(add_backend):
    def refuses(h, *rest):
        return "one row" if len(h) == 1 else None

    mine, spare = Counted(gated_residual, refuses), Counted(gated_residual)
    add_backend("spare", {"gated_residual": spare.kernel})
    add_backend("mine", {"gated_residual": mine.kernel})
    h, y, gate, spans = residual_inputs()
    one = ops.gated_residual(h[:1], y[:1], gate[:1], spans[:1].clamp(max=1))
    backward_of(ops.gated_residual(h, y, gate, spans) + one)
    assert mine.calls == ["forward", "backward"] and spare.calls == ["forward", "backward"]


def test_force_in_one_thread_is_not_force_in_another(add_backend):
    mine = Counted(gated_residual)
    add_backend("mine", {"gated_residual": mine.kernel}, place=len(backends.ORDER))
    with backends.force("mine"):
        in_a_thread(lambda: ops.gated_residual(*residual_inputs()))
    assert mine.calls == []


def test_a_new_backend_serves_forward_and_backward_as_the_reference_does(add_backend):
    mine = Counted(gated_residual)
    add_backend("mine", {"gated_residual": mine.kernel})
    results = []
    for name in ("mine", "reference"):
        inputs = residual_inputs()
        with backends.force(name):
            out = ops.gated_residual(*inputs)
            backward_of(out)
        results.append((out.detach(), *(leaf.grad for leaf in inputs[:3])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert mine.calls == ["forward", "backward"]
    assert backends.explain("gated_residual", *residual_inputs())["mine"] is None


def test_strides_of_a_backend_do_not_show(add_backend):
    def forward(*args):
        return gated_residual.forward(*args).T.contiguous().T

    def backward(*args):
        return tuple(part.T.contiguous().T for part in gated_residual.backward(*args))

    add_backend("strided", {"gated_residual": backends.Kernel(forward, backward)})
    h, y, gate, spans = residual_inputs()
    with backends.force("strided"):
        out = ops.gated_residual(h, y, gate, spans)
        assert out.is_contiguous()
        assert all(grad.is_contiguous() for grad in torch.autograd.grad(out.sum(), (y, gate)))


def test_a_backend_without_a_backward_leaves_it_to_the_next(add_backend):
    mine = Counted(gated_residual, backward=False)
    add_backend("half", {"gated_residual": mine.kernel})
    backward_of(ops.gated_residual(*residual_inputs()))
    assert mine.calls == ["forward"]
    with backends.force("half"):
        out = ops.gated_residual(*residual_inputs())
    told = r"^gated_residual is not served here: half: it has no backward$"
    with pytest.raises(backends.BackendRefused, match=told):
        backward_of(out)


def test_an_error_inside_a_kernel_is_not_a_refusal(add_backend):
    def broken(*args):
        raise RuntimeError("the kernel broke")

    add_backend("broken", {"gated_residual": backends.Kernel(broken)})
    with pytest.raises(RuntimeError, match="the kernel broke"):
        ops.gated_residual(*residual_inputs())


def test_a_backend_whose_package_is_missing_tells_its_own_error(monkeypatch):
    """Loading a table must be possible everywhere: an ImportError from one is a bug, and is not swallowed."""
    monkeypatch.setattr(backends, "ORDER", ("never_written", *backends.ORDER))
    with pytest.raises(ModuleNotFoundError, match="never_written"):
        ops.gated_residual(*residual_inputs())


def op_calls():
    """The forward arguments of one plain call of every op, as the registered op gets them."""
    x, ids = torch.zeros(5, 8), torch.zeros(5, dtype=torch.int64)
    one, seeds = torch.ones(2), torch.zeros(2, dtype=torch.int64)
    weights, order = torch.ones(5, 1), torch.arange(5, dtype=torch.int32)
    rope_spans, rope_table = torch.tensor([[0, 5, 1, 0, 0, 0]], dtype=torch.int32), torch.ones(2, 8, 2, 2)
    offsets, vocab = torch.tensor([0, 5], dtype=torch.int32), torch.zeros(7, 8)
    mlp = (torch.zeros(1, 3, 8), torch.zeros(1, 3), torch.zeros(1, 8, 3), torch.zeros(1, 8), offsets)
    jumps = one, seeds, seeds, SPANS
    flat, video_spans = torch.zeros(5), torch.tensor([[3, 1, 1, 2]], dtype=torch.int32)
    return {
        "flash_attention": attention_args(),
        "flash_attention_int8": attention_args(),
        "flow_noise": (flat, ids, one, one, seeds, 0, SPANS, SPANS, 9, -1),
        "flow_step": (flat, flat, None, one, torch.zeros(2, 10), *[None] * 3, SPANS, ids, ids, *jumps),
        "gated_residual": (x, x, None, None),
        "gated_residual_norm": (x, x, *[None] * 6, 1e-6, torch.float32),
        "linear": (x, vocab, None, "none", None, False),
        "linear_int8": (x, vocab, None, "none"),
        "linear_cross_entropy": (x, vocab, torch.zeros(7), ids, None, None, "ce"),
        "linear_sample": (x, vocab, torch.zeros(7), ids, ids, ids, 1.0),
        "modulated_layer_norm": (x, *[None] * 5, 1e-6),
        "moe_combine": (x, order, weights),
        "moe_dispatch": (x, torch.zeros(5, 1, dtype=torch.int32), 1),
        "moe_mlp": (x, *mlp, None, False),
        "moe_mlp_int8": (x, *mlp),
        "moe_route": (x, 2),
        "qk_norm_rope": (x, x, torch.ones(8), torch.ones(8), rope_spans, rope_table, 2, 1e-6),
        "window_attention": (*[x[:, None]] * 3, video_spans, SPANS[:1], [1, 1, 1], [0, 0, 0], 1.0),
    }


@pytest.mark.parametrize("op", sorted(backends.table("reference")))
def test_explain_and_the_call_say_the_same(op):
    args = op_calls()[op]
    said = backends.explain(op, *args)
    assert tuple(said) == backends.ORDER and said["reference"] is None
    for name, reason in said.items():
        with backends.force(name):
            if reason is None:
                getattr(torch.ops.uvg, op)(*args)
                continue
            with pytest.raises(backends.BackendRefused) as refusal:
                getattr(torch.ops.uvg, op)(*args)
            assert str(refusal.value) == f"{op} is not served here: {name}: {reason}" and reason.strip()
    first = next(name for name, reason in said.items() if reason is None)
    assert served_by(op, *args) == first


def test_sdpa_refuses_what_it_says():
    args = attention_args()
    assert backends.explain("flash_attention", *args)["sdpa"] is None
    for dtype in (torch.bfloat16, torch.float16):
        narrow = [a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
        assert backends.explain("flash_attention", *narrow)["sdpa"] is None
    double = [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]
    reason = "dtype torch.float64; have bfloat16, float16, float32"
    assert backends.explain("flash_attention", *double)["sdpa"] == reason
    elsewhere = [a.to("meta") if torch.is_tensor(a) else a for a in args]
    assert backends.explain("flash_attention", *elsewhere)["sdpa"] == "tensors are on meta"
    assert backends.explain("moe_route", torch.zeros(3, 2), 1)["sdpa"] == "backend sdpa has no kernel for moe_route"


@pytest.mark.parametrize("name", [name for name in backends.ORDER if name != "reference"])
def test_refusals_look_at_shapes_dtypes_and_devices_alone(name):
    """On tensors without values (meta) every table answers, and says that it is not there that it serves."""
    for op, args in op_calls().items():
        if op in backends.table(name):
            bare = [a.to("meta") if torch.is_tensor(a) else a for a in args]
            assert backends.explain(op, *bare)[name]
