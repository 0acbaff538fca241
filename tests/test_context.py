"""Context parallelism against one process: outputs, gradients, traffic, balance, recompute, compile, dry run."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from ranks import Ranks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from parallel.recipe import Model
from parallel.strategies import context
from parallel.strategies.context import METHODS, apply_context, local_slices
from parallel.transformer import Transformer, causal_attention, cross_entropy, initial_weight

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
SHAPE = Model(n_layers=2, d_model=48, n_heads=8, n_kv_heads=2, d_ff=40, vocab_size=50)
ZIGZAG = [method for method in METHODS if method != "ulysses"]
SEQ_LEN = 24


def local_positions(*, seq_len: int, **options: Any) -> Tensor:
    return torch.cat([torch.arange(seq_len)[part] for part in local_slices(seq_len=seq_len, **options)])


# ---- which positions -----------------------------------------------------------------------------------------------


def test_local_positions_are_zigzag_or_contiguous() -> None:
    held = functools.partial(local_positions, seq_len=12, cp=3)
    for method in ZIGZAG:
        assert held(cp_rank=0, method=method).tolist() == [0, 1, 10, 11]
        assert held(cp_rank=2, method=method).tolist() == [4, 5, 6, 7]
    assert held(cp_rank=1, method="ulysses").tolist() == [4, 5, 6, 7]
    assert held(cp_rank=1, method="ulysses").dtype == torch.int64


@pytest.mark.parametrize("method", METHODS)
def test_every_position_is_held_once(method: str) -> None:
    held = [local_positions(seq_len=40, cp=5, cp_rank=rank, method=method) for rank in range(5)]
    assert torch.cat(held).sort().values.tolist() == list(range(40))


# ---- attention against one process ---------------------------------------------------------------------------------


def _inputs(*, batch: int, heads: int, kv_heads: int, seq_len: int, head_dim: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, the same on every rank."""
    generator = torch.Generator().manual_seed(heads * seq_len + batch)
    shapes = [(batch, n, seq_len, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def _with_gradients(attend: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """out, dq, dk, dv of inputs q, k, v and the gradient of out."""
    qkv = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, inputs[3])]


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers as the model gives them (heads inside tokens), contiguous, or with holes between them."""
    if layout == "model":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.contiguous() if layout == "contiguous" else torch.stack((x, x), dim=-1)[..., 0]


def _relative(x: Tensor, y: Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def attention_errors(method: str, cases: list[dict[str, Any]]) -> list[float]:
    """On each rank, per case: the largest relative difference to one process of out, dq, dk and dv at my positions."""
    errors = []
    for case in cases:
        case, layout, dtype = dict(case), case["layout"], getattr(torch, case["dtype"])
        inputs = [x.to(dtype) for x in _inputs(**{k: v for k, v in case.items() if k not in ("layout", "dtype")})]
        whole = _with_gradients(causal_attention, *(x.double() for x in inputs))
        positions = local_positions(
            seq_len=case["seq_len"], cp=dist.get_world_size(), cp_rank=dist.get_rank(), method=method
        )
        mine = [_laid_out(x[:, :, positions], layout) for x in inputs]
        results = _with_gradients(functools.partial(METHODS[method], group=dist.group.WORLD), *mine)
        assert all(result.dtype == dtype for result in results)
        errors.append(max(_relative(x, y[:, :, positions]) for x, y in zip(results, whole, strict=True)))
    return errors


def _cases(world_size: int, dtype: str) -> list[dict[str, Any]]:
    heads = 6 if world_size == 3 else 8
    few = 1 if world_size == 3 else 2  # fewer than most world sizes here, which divides them as Ulysses needs
    keys = ("kv_heads", "batch", "head_dim", "seq_len", "layout")
    rows = [
        (heads, 1, 6, 2 * world_size, "model"),  # chunks of one token
        (heads, 3, 16, 6 * world_size, "contiguous"),
        (heads // 2, 3, 6, 10 * world_size, "model"),
        (heads // 2, 1, 16, 2 * world_size, "strided"),
        (few, 1, 6, 8 * world_size, "strided"),
        (few, 3, 16, 4 * world_size, "model"),
    ]
    return [dict(zip(keys, row, strict=True), heads=heads, dtype=dtype) for row in rows]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_attention_and_gradients_equal_one_process(ranks: Ranks, world_size: int, method: str) -> None:
    errors = ranks(world_size, attention_errors, method, _cases(world_size, "float64"))
    assert max(map(max, errors)) <= 1e-12, errors


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_attention_in_lower_precision(ranks: Ranks, method: str, dtype: str, bound: float) -> None:
    errors = ranks(4, attention_errors, method, _cases(4, dtype))
    assert max(map(max, errors)) <= bound, errors


def sum_error(method: str) -> float:
    """dq where the gradient is an expanded scalar, which has no dense last dim."""
    q, k, v, _ = _inputs(batch=1, heads=4, kv_heads=2, seq_len=16, head_dim=6)
    whole = _with_gradients(causal_attention, q, k, v, torch.ones_like(q))
    positions = local_positions(seq_len=16, cp=dist.get_world_size(), cp_rank=dist.get_rank(), method=method)
    mine = [x[:, :, positions] for x in (q, k, v)]
    grad = torch.ones((), dtype=q.dtype).expand(mine[0].shape)
    parts = _with_gradients(functools.partial(METHODS[method], group=dist.group.WORLD), *mine, grad)
    return max(_relative(x, y[:, :, positions]) for x, y in zip(parts, whole, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_a_sum(ranks: Ranks, method: str) -> None:
    assert max(ranks(2, sum_error, method)) <= 1e-12


# ---- that the comparison can fail ----------------------------------------------------------------------------------


def mutated_error(method: str, mutation: str) -> float:
    """attention_errors with one step of the method broken."""
    calls = 0
    add_gradients, attend_piece = context._add_gradients, context._attend_piece

    def scaled_once(dq: Tensor, dkv: Tensor, parts: tuple[Tensor, ...], piece: Any, *, factor: float) -> None:
        nonlocal calls
        calls += 1
        add_gradients(dq, dkv, (parts[0], parts[1] * (factor if calls == 2 else 1.0), parts[2]), piece)

    def forgotten_once(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls != 2:
            attend_piece(*arguments)

    patches: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "none": nullcontext,
        "dk dropped": lambda: mock.patch.object(context, "_add_gradients", functools.partial(scaled_once, factor=0.0)),
        "dk doubled": lambda: mock.patch.object(context, "_add_gradients", functools.partial(scaled_once, factor=2.0)),
        "piece forgotten": lambda: mock.patch.object(context, "_attend_piece", forgotten_once),
        "all-to-all doubled": lambda: mock.patch.object(
            context._AllToAll, "backward", lambda ctx, grad: (2 * context._AllToAll.apply(grad, ctx.group), None)
        ),
    }
    with patches[mutation]():
        return attention_errors(method, _cases(dist.get_world_size(), "float64")[1:2])[0]


@pytest.mark.parametrize(
    ("method", "mutation"),
    [(method, mutation) for method in ZIGZAG for mutation in ("dk dropped", "dk doubled", "piece forgotten")]
    + [("ulysses", "all-to-all doubled")],
)
def test_a_broken_step_is_seen(ranks: Ranks, method: str, mutation: str) -> None:
    assert max(ranks(4, mutated_error, method, "none")) <= 1e-12
    assert max(ranks(4, mutated_error, method, mutation)) > 1e-3


# ---- traffic and balance -------------------------------------------------------------------------------------------


@contextmanager
def _counting_traffic() -> Iterator[dict[str, int]]:
    """Counts the bytes that this rank sends, and the messages or collectives."""
    counted = dict(bytes=0, calls=0)

    def counting(call: Callable[..., Any], sent_bytes: Callable[..., int]) -> Callable[..., Any]:
        def counted_call(*arguments: Any, **options: Any) -> Any:
            counted["bytes"] += sent_bytes(*arguments, **options)
            counted["calls"] += 1
            return call(*arguments, **options)

        return counted_call

    sent: list[tuple[Any, str, Callable[..., int]]] = [  # of the collectives, what the best algorithm sends
        (dist, "batch_isend_irecv", lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend)),
        (context, "all_gather", lambda x, *, dim, group: x.nbytes * (group.size() - 1)),
        (context, "reduce_scatter", lambda x, *, dim, group: x.nbytes - x.nbytes // group.size()),
        (funcol, "all_to_all_single", lambda x, to, of, group: x.nbytes - x.nbytes // group.size()),
    ]
    with ExitStack() as stack:
        for module, name, size in sent:
            stack.enter_context(mock.patch.object(module, name, counting(getattr(module, name), size)))
        yield counted


def traffic(method: str, dtype: torch.dtype, seq_len: int, cp: int, group: Any = None) -> list[dict[str, int]]:
    """Traffic of forward and of backward of one attention: B 3, H 8, K 2, E 6."""
    group = group or dist.group.WORLD
    mine = seq_len // cp
    q, k, v = (torch.randn(3, n, mine, 6, dtype=dtype, requires_grad=True) for n in (8, 2, 2))
    with _counting_traffic() as forward:
        out = METHODS[method](q, k, v, group=group)
    with _counting_traffic() as backward:
        out.sum().backward()
    for x in (q, k, v):
        assert x.grad is not None and x.grad.shape == x.shape and x.grad.dtype == dtype
    return [forward, backward]


def _textbook_traffic(method: str, dtype: torch.dtype, seq_len: int, cp: int) -> list[dict[str, int]]:
    mine, itemsize, wide = seq_len // cp, dtype.itemsize, max(4, dtype.itemsize)  # gradients are summed in float32
    kv = 2 * 3 * 2 * mine * 6
    if method == "ring":
        return [
            dict(bytes=(cp - 1) * kv * itemsize, calls=cp - 1),
            dict(bytes=(cp - 1) * kv * (itemsize + wide), calls=2 * (cp - 1)),
        ]
    if method == "all-gather":
        return [dict(bytes=(cp - 1) * kv * itemsize, calls=1), dict(bytes=(cp - 1) * kv * wide, calls=1)]
    heads = 2 * (8 + max(2, cp))
    return 2 * [dict(bytes=(cp - 1) * 3 * heads * mine * 6 * itemsize // cp, calls=2)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_traffic_is_the_textbook_volume(ranks: Ranks, method: str, world_size: int, dtype: torch.dtype) -> None:
    for counted in ranks(world_size, traffic, method, dtype, SEQ_LEN, world_size):
        assert counted == _textbook_traffic(method, dtype, SEQ_LEN, world_size)


def visible_pairs(method: str) -> tuple[int, int]:
    """How many (query, key) pairs this rank computes, forward and backward."""
    counts = [0, 0]

    def counting(index: int, call: Callable[..., Any], q: Tensor, k: Tensor, *rest: Any, causal: bool) -> Any:
        n_queries, n_keys = q.shape[2], k.shape[2]
        counts[index] += n_queries * (n_queries + 1) // 2 if causal else n_queries * n_keys
        return call(q, k, *rest, causal=causal)

    def counting_backward(call: Callable[..., Any], grad: Tensor, *rest: Any, causal: bool) -> Any:
        return counting(1, functools.partial(call, grad), *rest, causal=causal)

    with (
        mock.patch.object(context, "_attention", functools.partial(counting, 0, context._attention)),
        mock.patch.object(
            context, "_attention_backward", functools.partial(counting_backward, context._attention_backward)
        ),
    ):
        traffic(method, torch.float32, SEQ_LEN, dist.get_world_size())
    return counts[0], counts[1]


@pytest.mark.parametrize("method", ZIGZAG)
def test_every_rank_has_the_same_work_and_no_more_than_needed(ranks: Ranks, method: str) -> None:
    share = SEQ_LEN * (SEQ_LEN + 1) // 2 // 4
    assert ranks(4, visible_pairs, method) == 4 * [(share, share)]


# ---- the whole model -----------------------------------------------------------------------------------------------


def _load(model: Transformer) -> Transformer:
    model.to_empty(device="cpu")
    model.rotary.reset_buffers()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(initial_weight(name, weight.shape, seed=0, n_layers=SHAPE.n_layers, device="cpu"))
    return model


def _meta_model() -> Transformer:
    with torch.device("meta"):
        return Transformer(SHAPE, seq_len=SEQ_LEN, compute_dtype=torch.float64).double()


def _recompute(model: Transformer, mode: str) -> None:
    def policy(_: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op is FLASH else CheckpointPolicy.PREFER_RECOMPUTE

    options: dict[str, Any] = dict(use_reentrant=False)
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
    for block in model.blocks.values():
        block.forward = functools.partial(checkpoint, block.forward, **options)


class _CountFlash(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.calls += op is FLASH
        return op(*arguments, **(options or {}))


def _loss_and_gradients(model: Transformer, tokens: Tensor, targets: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = cross_entropy(model(tokens), targets)
    loss.backward()
    return [loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)]


def model_results(method: str, mesh_dims: tuple[str, ...], mesh_shape: tuple[int, ...]) -> dict[str, Any]:
    """A model on a cp dimension of the mesh, other dimensions taking other sequences, against one process."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(SHAPE.vocab_size, (2, 4, SEQ_LEN), generator=generator)
    whole = _loss_and_gradients(_load(_meta_model()), tokens, targets)
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=mesh_dims)
    cp = mesh["cp"]
    positions = local_positions(seq_len=SEQ_LEN, cp=cp.size(), cp_rank=cp.get_local_rank(), method=method)
    if "dp" in mesh_dims:
        tokens, targets = (x.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()] for x in (tokens, targets))
    tokens, targets = tokens[:, positions], targets[:, positions]
    local, calls = {}, {}
    for mode in ("none", "full", "selective"):
        model = _meta_model()
        apply_context(model, mesh=cp, method=method)
        _load(model)
        if mode != "none":
            _recompute(model, mode)
        with _CountFlash() as counter:
            local[mode] = _loss_and_gradients(model, tokens, targets)
        calls[mode] = counter.calls
    same = [mode for mode in local if all(map(torch.equal, local[mode], local["none"]))]
    for x in local["none"]:
        dist.all_reduce(x)
    errors = [_relative(x, y) for x, y in zip(local["none"], whole, strict=True)]
    return dict(error=max(errors), bit_equal=same, flash_calls=calls)


@pytest.mark.parametrize(
    ("mesh_dims", "mesh_shape"), [(("cp",), (2,)), (("cp",), (4,)), (("dp", "cp"), (2, 2)), (("cp", "dp"), (2, 2))]
)
@pytest.mark.parametrize("method", METHODS)
def test_model_and_its_recomputation(
    ranks: Ranks, method: str, mesh_dims: tuple[str, ...], mesh_shape: tuple[int, ...]
) -> None:
    for result in ranks(math.prod(mesh_shape), model_results, method, mesh_dims, mesh_shape):
        assert result["error"] <= 1e-12
        assert result["bit_equal"] == ["none", "full", "selective"]
        calls = result["flash_calls"]
        assert calls["full"] == 2 * calls["none"] > 0 and calls["selective"] == calls["none"]


def rotary_is_local(method: str) -> bool:
    """On a model that already holds its tables, they follow the positions."""
    model, whole = _load(_meta_model()), _load(_meta_model())
    apply_context(model, mesh=init_device_mesh("cpu", (2,)), method=method)
    positions = local_positions(seq_len=SEQ_LEN, cp=2, cp_rank=dist.get_rank(), method=method)
    mine, tables = model.rotary, whole.rotary
    before = mine.cos
    mine.reset_buffers()
    return (
        torch.equal(mine.positions, positions)
        and torch.equal(before, tables.cos[positions])
        and torch.equal(mine.cos, before)
        and torch.equal(mine.sin, tables.sin[positions])
        and not model.rotary.state_dict()
    )


@pytest.mark.parametrize("method", METHODS)
def test_rotary_tables_follow_the_positions(ranks: Ranks, method: str) -> None:
    assert all(ranks(2, rotary_is_local, method))


def compiled_error(method: str) -> tuple[float, int]:
    """A compiled block against the same block, and how many graphs it became."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for backend in (None, "aot_eager"):
        model = _meta_model()
        apply_context(model, mesh=init_device_mesh("cpu", (2,)), method=method)
        block = _load(model).blocks["0"]
        if backend:
            block.compile(backend=backend)
        generator = torch.Generator().manual_seed(dist.get_rank())
        x = torch.randn(2, SEQ_LEN // 2, SHAPE.d_model, dtype=torch.float64, generator=generator, requires_grad=True)
        out = block(x, model.rotary)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    n_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return max(_relative(x, y) for x, y in zip(*results, strict=True)), n_graphs


@pytest.mark.parametrize("method", METHODS)
def test_compiled_block(ranks: Ranks, method: str) -> None:
    for error, n_graphs in ranks(2, compiled_error, method):
        assert error <= 1e-12
        assert n_graphs > 0  # several where attention runs as it is, between them


# ---- dry run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_group() -> Iterator[None]:
    """Rank 77 of 1,024, of which no other exists."""
    dist.init_process_group("fake", rank=77, world_size=1024, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("method", METHODS)
def test_dry_run_has_the_same_traffic(fake_group: None, method: str) -> None:
    mesh = init_device_mesh("cpu", (128, 8), mesh_dim_names=("dp", "cp"))
    with FakeTensorMode():
        counted = traffic(method, torch.bfloat16, 2**16, 8, mesh["cp"].get_group())
    assert counted == _textbook_traffic(method, torch.bfloat16, 2**16, 8)


@pytest.mark.parametrize("method", METHODS)
def test_dry_run_of_a_model(fake_group: None, method: str) -> None:
    mesh = init_device_mesh("cpu", (128, 8), mesh_dim_names=("dp", "cp"))
    with FakeTensorMode() as fake:
        model = Transformer(SHAPE, seq_len=4096)
    apply_context(model, mesh=mesh["cp"], method=method)
    with fake:
        tokens = torch.zeros(2, 512, dtype=torch.int64)
        _, *gradients = _loss_and_gradients(model, tokens, tokens)
    assert [x.shape for x in gradients] == [x.shape for x in model.parameters()]


# ---- the kernels of a piece ----------------------------------------------------------------------------------------

PIECES = [(9, 9, True), (9, 4, False), (4, 9, False), (1, 1, True)]  # queries, keys, causal


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("device", ["cpu", *["cuda"] * torch.cuda.is_available()])
def test_fused_and_plain_attention_agree(device: str, piece: tuple[int, int, bool]) -> None:
    n_queries, n_keys, causal = piece
    dtype, bound = (torch.float64, 1e-13) if device == "cpu" else (torch.bfloat16, 2e-2)
    generator = torch.Generator().manual_seed(n_queries)
    shapes = [(2, 6, n_queries, 6), (2, 6, n_queries, 6), (2, 2, n_keys, 6), (2, 2, n_keys, 6)]
    grad, q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    out, lse = context._attention(q, k, v, causal=causal)
    plain = context._plain(q, k, v, causal)
    gradients = context._attention_backward(grad, q, k, v, out, lse, causal=causal)
    plain_gradients = context._plain_backward(grad, q, k, v, out, lse, causal)
    for x, y in zip((out, lse, *gradients), (*plain, *plain_gradients), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        largest = y.abs().max().item()  # a bfloat16 has 8 bits: of a gradient of 7 the last is worth 0.03
        assert torch.allclose(x.double(), y.double(), rtol=0, atol=bound * max(largest, 1.0))


@pytest.mark.parametrize("head_dim", [6, 16])
@pytest.mark.parametrize("piece", PIECES)
def test_shapes_of_the_cuda_kernel(piece: tuple[int, int, bool], head_dim: int) -> None:
    """Arguments and padding of the CUDA calls, on tensors without numbers."""
    n_queries, n_keys, causal = piece
    q = torch.empty(2, 6, n_queries, head_dim, dtype=torch.bfloat16, device="meta")
    k = torch.empty(2, 2, n_keys, head_dim, dtype=torch.bfloat16, device="meta")
    out, lse = context._flash(q, k, k, causal)
    dq, dk, dv = context._flash_backward(out, q, k, k, out, lse, causal)
    assert out.shape == dq.shape == q.shape and dk.shape == dv.shape == k.shape
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
