"""Training loops written by hand in plain PyTorch, without the lab: what its strategies are held against.

    torchrun --standalone --nproc-per-node 2 benchmarks/bare.py fsdp

The model has the lab's shape (12.2 M parameters: 6 layers, d_model 384, 6 heads, d_ff 1024, vocabulary 2048), data,
optimizer and clipping. Each rank prints a line of JSON: CPU and wall seconds per step after WARM_UP steps, and losses.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from parallel.corpus import open_corpus
from parallel.recipe import Data

LAYERS, D, HEADS, D_FF, VOCAB = 6, 384, 6, 1024, 2048
BATCH, SEQ_LEN, MICRO_BATCHES = 8, 256, 4  # sequences a step; microbatches of the pipeline
WARM_UP = 3
LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-4, 0.1, 1.0


# ---- the model -----------------------------------------------------------------------------------------------------


def rotary_tables() -> tuple[Tensor, Tensor]:
    head_dim = D // HEADS
    frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angles = torch.outer(torch.arange(SEQ_LEN).double(), frequencies).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()  # (T, E)


COS, SIN = rotary_tables()


def rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)  # (B, H, T, E)
    return x * COS + torch.cat((-second, first), dim=-1) * SIN


class Block(nn.Module):
    def __init__(self, tp: int = 1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(D, eps=1e-5), nn.RMSNorm(D, eps=1e-5)
        self.q, self.k, self.v = (nn.Linear(D, D // tp, bias=False) for _ in range(3))
        self.out = nn.Linear(D // tp, D, bias=False)
        self.gate, self.up = (nn.Linear(D, D_FF // tp, bias=False) for _ in range(2))
        self.down = nn.Linear(D_FF // tp, D, bias=False)
        self.enter: Callable[[Tensor], Tensor] = lambda x: x  # tensor parallelism sums gradients here,
        self.leave: Callable[[Tensor], Tensor] = lambda x: x  # and partial results here

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(self.norm1(x))
        q, k, v = (proj(h).unflatten(-1, (-1, D // HEADS)).transpose(1, 2) for proj in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.leave(self.out(y.transpose(1, 2).flatten(2)))
        h = self.enter(self.norm2(x))
        return x + self.leave(self.down(F.silu(self.gate(h)) * self.up(h)))


class Llama(nn.Module):
    """layers: those of this stage; the first stage has the embedding, the last the norm and the output."""

    def __init__(self, layers: range = range(LAYERS), tp: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, D) if layers.start == 0 else None
        self.blocks = nn.ModuleList(Block(tp) for _ in layers)
        last = layers.stop == LAYERS
        self.norm = nn.RMSNorm(D, eps=1e-5) if last else None
        self.output = nn.Linear(D, VOCAB // tp, bias=False) if last else None
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (math.sqrt(2 * LAYERS) if residual else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.output(self.norm(x)) if self.output is not None and self.norm is not None else x


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# ---- strategies: each makes (parameters, one step's forward and backward, clip) ------------------------------------

Step = Callable[[Tensor, Tensor], Tensor]
Strategy = tuple[list[nn.Parameter], Step, Callable[[], None]]


def plain(model: nn.Module) -> Strategy:
    parameters = list(model.parameters())

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = mean_loss(model(tokens), targets)
        loss.backward()
        return loss.detach()

    def clip() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP)

    return parameters, step, clip


def single() -> Strategy:
    return plain(Llama())


def ddp() -> Strategy:
    return plain(DistributedDataParallel(Llama()))


def fsdp() -> Strategy:
    model = Llama()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return plain(model)


class SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        largest = logits.amax(dim=-1)  # (B, T)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        local = targets - dist.get_rank() * logits.shape[-1]
        elsewhere = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(elsewhere, 0).unsqueeze(-1)
        logits = logits - largest.unsqueeze(-1)
        at_target = logits.gather(-1, local).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials = logits.exp()
        sums = torch.stack((exponentials.sum(dim=-1), at_target))
        dist.all_reduce(sums)
        ctx.save_for_backward(exponentials / sums[0].unsqueeze(-1), local, elsewhere)
        return (sums[0].log() - sums[1]).mean()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        probabilities, local, elsewhere = ctx.saved_tensors
        ours = torch.where(elsewhere, 0.0, -1.0).unsqueeze(-1)
        return probabilities.scatter_add(-1, local, ours) * (grad / elsewhere.numel()), None


def tensor() -> Strategy:
    """Megatron's, without sequence parallelism: embedding and output are split by vocabulary."""
    model = Llama(tp=dist.get_world_size())
    for block in model.blocks:
        assert isinstance(block, Block)
        block.enter, block.leave = SumGradients.apply, Sum.apply
    rows = VOCAB // dist.get_world_size()
    model.embedding = nn.Embedding(rows, D)
    nn.init.normal_(model.embedding.weight, std=0.02)
    parameters = list(model.parameters())
    assert model.norm is not None and model.output is not None
    whole = {id(p) for p in parameters if p.ndim == 1}

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        local = tokens - dist.get_rank() * rows
        elsewhere = (local < 0) | (local >= rows)
        x = model.embedding(local.masked_fill(elsewhere, 0))  # type: ignore[misc]
        x = Sum.apply(x.masked_fill(elsewhere.unsqueeze(-1), 0.0))
        for block in model.blocks:
            x = block(x)
        x = SumGradients.apply(model.norm(x))  # type: ignore[misc]
        loss = VocabParallelCrossEntropy.apply(model.output(x), targets)  # type: ignore[misc]
        loss.backward()
        return loss.detach()

    def clip() -> None:
        split = nn.utils.get_total_norm([p.grad for p in parameters if id(p) not in whole]).square()
        dist.all_reduce(split)
        total = (split + nn.utils.get_total_norm([p.grad for p in parameters if id(p) in whole]).square()).sqrt()
        nn.utils.clip_grads_with_norm_(parameters, CLIP, total)

    return parameters, step, clip


def pipeline() -> Strategy:
    """1F1B on as many stages as there are ranks."""
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    size = LAYERS // n_ranks
    model = Llama(range(rank * size, (rank + 1) * size))
    parameters = list(model.parameters())
    first, last = rank == 0, rank == n_ranks - 1
    shape = (BATCH // MICRO_BATCHES, SEQ_LEN, D)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        inputs, outputs, sends = [], [], []
        total = torch.zeros(())

        def forward(i: int) -> None:
            if first:
                x = tokens.chunk(MICRO_BATCHES)[i]
            else:
                dist.recv(x := torch.empty(shape), rank - 1)
                x.requires_grad_()
            y = model(x)
            if last:
                y = mean_loss(y, targets.chunk(MICRO_BATCHES)[i]) / MICRO_BATCHES
                total.add_(y.detach())
            else:
                sends.append(dist.isend(y.detach(), rank + 1))
            inputs.append(x)
            outputs.append(y)

        def backward(i: int) -> None:
            if last:
                outputs[i].backward()
            else:
                dist.recv(grad := torch.empty(shape), rank + 1)
                outputs[i].backward(grad)
            if not first:
                sends.append(dist.isend(inputs[i].grad, rank - 1))
            inputs[i] = outputs[i] = None

        ahead = min(n_ranks - 1 - rank, MICRO_BATCHES)
        for i in range(ahead):
            forward(i)
        for i in range(MICRO_BATCHES):
            if i + ahead < MICRO_BATCHES:
                forward(i + ahead)
            backward(i)
        for send in sends:
            send.wait()
        dist.broadcast(total, n_ranks - 1)
        return total

    def clip() -> None:
        square = nn.utils.get_total_norm([p.grad for p in parameters]).square()
        dist.all_reduce(square)
        nn.utils.clip_grads_with_norm_(parameters, CLIP, square.sqrt())

    return parameters, step, clip


STRATEGIES = {"single": single, "ddp": ddp, "fsdp": fsdp, "tp": tensor, "pp": pipeline}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("strategy", choices=STRATEGIES)
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--matmul", choices=("highest", "medium"), default="highest", help="float32 products")
    arguments = parser.parse_args()
    torch.set_float32_matmul_precision(arguments.matmul)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    parameters, forward_backward, clip = STRATEGIES[arguments.strategy]()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    corpus = open_corpus(Data(source="synthetic"), seq_len=SEQ_LEN, vocab_size=VOCAB, seed=0)
    replicas = dist.get_world_size() if arguments.strategy in ("ddp", "fsdp") else 1
    share = BATCH // replicas
    rows = range(dist.get_rank() % replicas * share, (dist.get_rank() % replicas + 1) * share)

    losses = []
    wall, cpu = 0.0, 0.0
    for number in range(arguments.steps):
        if number == WARM_UP:
            wall, cpu = time.perf_counter(), sum(os.times()[:2])
        sequences = torch.from_numpy(corpus.sequences(step=number, global_batch=BATCH, rows=rows))
        optimizer.zero_grad()
        loss = forward_backward(sequences[:, :-1], sequences[:, 1:])
        if replicas > 1:
            dist.all_reduce(loss, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
            loss = loss / replicas
        clip()
        optimizer.step()
        losses.append(loss.item())
    n_timed = arguments.steps - WARM_UP
    print(
        json.dumps(
            {
                "cpu_seconds": (sum(os.times()[:2]) - cpu) / n_timed,
                "wall_seconds": (time.perf_counter() - wall) / n_timed,
                "losses": losses,
            }
        ),
        flush=True,
    )
    os._exit(0)  # gloo's threads can abort at the interpreter's own end (pytorch issue 190489)


if __name__ == "__main__":
    main()
