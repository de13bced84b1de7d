"""Block-causal attention, from one rule: query i sees keys [0, prefix_i) and keys [start_i, end_i).

`View` states the rule, and its makers cover training, generation and verification.
`block_attention` computes it for q (N, H, Q, D), k and v (N, H, T, D): on a CPU in PyTorch, each
tile of queries against just the key tiles that it sees; on an NVIDIA GPU (Ampere or newer) by
Triton kernels after FlashAttention-2 (Dao 2023, arXiv 2307.08691), which skip the tiles that nobody
sees and mask only the tiles that need it. The rule is data, not code: one compiled kernel serves
every block size and every mode.

On a GPU, products of float32 numbers use TF32, as do those of the other layers under
torch.set_float32_matmul_precision("high").

    python kernels.py           # benchmark against SDPA

N rows, H heads of size D, Q queries, T keys. R is 1 if all rows share one view, otherwise N. A tile
is a run of neighboring queries or keys; there are QT tiles of queries and KT tiles of keys.
"""

import argparse
import math
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: PyTorch serves
    triton = None


# --------------------------------------------------------------------------------------------------
# Who sees whom


def sees(prefix, start, end, key):
    """The rule."""
    return (key < prefix) | ((start <= key) & (key < end))


@dataclass(eq=False)  # compared and hashed by identity: lru_cache can remember what belongs to one
class View:
    """Query i sees keys [0, prefix_i) and [start_i, end_i).

    Three integer tensors, (Q,), or (N, Q) where the rows of a batch differ. They live on the CPU;
    what follows from a view (masks, tables) is made once, and on the device that needs it."""

    prefix: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor

    def dense(self, n_keys):
        """The rule as a boolean matrix, (Q, n_keys) or (N, Q, n_keys)."""
        key = torch.arange(n_keys, device=self.prefix.device)
        bounds = (x[..., None] for x in (self.prefix, self.start, self.end))
        return sees(*bounds, key)


def train_view(length, block_size, token_causal=True):
    """Training: queries and keys are both [clean x0 (L) | noisy xt (L)].

    A clean token sees the clean tokens up to itself (token_causal) or to the end of its block.
    A noisy token sees the clean tokens before its block, and its own noisy block.
    block_size: an int, or a tensor (N,) on the CPU if each row has its own. For L = 4, S = 2:

                   key 0 1 2 3   4 5 6 7     prefix   [start, end)
        clean query 0  x                        1     empty
                    1  x x                      2     empty
                    2  x x x                    3     empty
                    3  x x x x                  4     empty
        noisy query 4            x x            0     [4, 6)
                    5            x x            0     [4, 6)
                    6  x x           x x        2     [6, 8)
                    7  x x           x x        2     [6, 8)
    """
    query = torch.arange(2 * length)
    noisy = query >= length
    token = query % length
    size = block_size if isinstance(block_size, int) else block_size[:, None]  # (N, 1)
    begin = token // size * size  # (2 L,) or (N, 2 L): where the token's block begins
    end = (begin + size).clamp(max=length)
    clean_prefix = token + 1 if token_causal else end
    prefix = torch.where(noisy, begin, clean_prefix)
    start = length + begin
    return View(prefix, start, torch.where(noisy, length + end, start))


@lru_cache(maxsize=4)  # the steps of a block ask for the same view again and again
def denoise_view(cached, committed, n, block_size=1):
    """Generation: queries [newly committed clean (c) | noisy (n)], keys [cache (C) | queries]; c is
    `committed`, and C is `cached`.

    Clean tokens are causal by blocks; at block size 1, token by token: with n = 0 that is the mask
    of an autoregressive model. For C = 3, c = 2, n = 2:

                   key 0 1 2   3 4   5 6     prefix   [start, end)
        clean query 0  x x x   x                4     empty
                    1  x x x   x x              5     empty
        noisy query 2  x x x   x x   x x        5     [5, 7)
                    3  x x x   x x   x x        5     [5, 7)
    """
    query = torch.arange(committed + n)
    block_end = (query // block_size + 1) * block_size
    prefix = cached + block_end.clamp(max=committed)
    start = torch.full_like(query, cached + committed)
    return View(prefix, start, start + n * (query >= committed))


@lru_cache(maxsize=4)
def verify_view(cached, n):
    """AR verification: queries [proposed (n) | noise (n)], keys [cache (C) | queries].

    Proposed tokens are causal. The i-th noise query stands at the position of the i-th of them: it
    sees the cache, the proposed tokens before i, and itself. For C = 2, n = 2:

                      key 0 1   2 3   4 5    prefix   [start, end)
        proposed query 0  x x   x               3     empty
                       1  x x   x x             4     empty
           noise query 2  x x         x         2     [4, 5)
                       3  x x   x       x       3     [5, 6)
    """
    query = torch.arange(2 * n)
    noise = query >= n
    prefix = cached + query % n + ~noise
    start = cached + query
    return View(prefix, start, start + noise)


# --------------------------------------------------------------------------------------------------
# Attention as the textbook has it


def attention_naive(q, k, v, view):
    """block_attention by the whole matrix of scores: slow, and right."""
    seen = view.dense(k.shape[2]).unsqueeze(-3)  # (1, Q, T) or (N, 1, Q, T): alike for every head
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (N, H, Q, T)
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return weights @ v  # (N, H, Q, D)


# --------------------------------------------------------------------------------------------------
# Attention in PyTorch, a tile of queries at a time


@lru_cache(maxsize=4)  # all layers of a pass share them, and all passes under the same view
def make_masks(view, device):
    """What attention_torch does under a view: (size of a tile, a pair for each tile of queries).
    The pair is the keys that any of the queries sees in any row, and which of them each one sees: a
    boolean mask (R, 1, tile, keys), or None for all. The keys are a tensor of their numbers; or an
    int, how many they are, where they are the first ones."""
    n_queries = view.prefix.shape[-1]
    n_keys = int(torch.maximum(view.prefix, view.end).max())
    seen = view.dense(n_keys).view(-1, n_queries, n_keys)  # (R, Q, T)

    # Few queries are fastest as one tile. So is everything on a GPU that the kernels do not serve,
    # at the price of the whole matrix of scores.
    in_tiles = n_queries > 128 and device.type == "cpu"
    tile = 64 if in_tiles else n_queries
    masks = []
    for queries in seen.split(tile, 1):  # (R, tile, T)
        keys = queries.any(1).any(0).nonzero()[:, 0]
        mask = queries[:, :, keys]
        mask = None if mask.all() else mask[:, None].to(device)
        are_first = keys[-1] < len(keys)
        masks.append((len(keys) if are_first else keys.to(device), mask))
    return tile, masks


def take(x, keys):
    """The rows (N, H, keys, D) of x (N, H, T, D); the first ones are not copied."""
    return x[:, :, :keys] if isinstance(keys, int) else x.index_select(2, keys)


def attention_torch(q, k, v, view):
    """block_attention in PyTorch: each tile of queries attends to the keys that it sees."""
    tile, masks = make_masks(view, q.device)
    outputs = []
    for q_tile, (keys, mask) in zip(q.split(tile, 2), masks):
        attend = F.scaled_dot_product_attention
        outputs.append(attend(q_tile, take(k, keys), take(v, keys), mask))
    return torch.cat(outputs, 2)


# --------------------------------------------------------------------------------------------------
# Attention in Triton, a tile of queries against a tile of keys at a time


def tile_states(seen, tile):
    """Who sees whom (R, Q, T) -> the same of tiles, int (R, QT, KT): 2 where every query of a tile
    sees every key of the other, 0 where none sees any, 1 otherwise. What is missing in the last
    tiles counts as not seen."""
    n_queries, n_keys = seen.shape[1:]
    seen = F.pad(seen, (0, -n_keys % tile, 0, -n_queries % tile))
    tiles = seen.unflatten(2, (-1, tile)).unflatten(1, (-1, tile))  # (R, QT, tile, KT, tile)
    some = tiles.any(4).any(2)
    whole = tiles.all(4).all(2)
    return some.int() + whole


def tile_lists(states):
    """The lists that the kernels walk over: states (R, A, B) of tile_states -> int32 (R, A, 2 + B).

    A tile's list says how many of the B others are whole, how many are seen at all, and then their
    numbers: the whole ones, those that need a mask, those that are not seen. States 1 2 0 2 make
    the list 2 3 | 1 3 0 2."""
    n_whole = (states == 2).sum(-1, keepdim=True)
    n_seen = (states > 0).sum(-1, keepdim=True)
    order = states.argsort(dim=-1, descending=True, stable=True)
    return torch.cat([n_whole, n_seen, order], -1).int()


@lru_cache(maxsize=4)
def make_tables(view, n_keys, tile, device):
    """What the kernels know of a view, int32 on the device: its bounds (R, Q, 3), the list of key
    tiles of each tile of queries (R, QT, 2 + KT), and the reverse (R, KT, 2 + QT)."""
    # the bounds are all that is copied to the device
    bounds = torch.stack([view.prefix, view.start, view.end], -1)
    n_queries = bounds.shape[-2]
    bounds = bounds.view(-1, n_queries, 3).int().to(device, non_blocking=True)

    # the lists are made there
    seen = View(*bounds.unbind(-1)).dense(n_keys)  # (R, Q, T)
    states = tile_states(seen, tile)
    return bounds, tile_lists(states), tile_lists(states.mT)


if triton is not None:
    # Names in capitals are pointers, or constants that the kernels are compiled for.

    rule = triton.jit(sees)

    @triton.jit
    def pointers(X, head, rows, n_rows, D, BLOCK_D):
        """To some rows of one head of X (N * H, n_rows, D), padded to BLOCK_D columns, and which of
        them exist."""
        column = tl.arange(0, BLOCK_D)[None, :]
        rows = rows[:, None]
        exists = (rows < n_rows) & (column < D)
        return X + head * n_rows * D + rows * D + column, exists

    @triton.jit
    def load_rows(X, head, rows, n_rows, D, BLOCK_D):
        """(TILE, BLOCK_D): zeros past the last row and the last column."""
        at, exists = pointers(X, head, rows, n_rows, D, BLOCK_D)
        return tl.load(at, mask=exists, other=0.0)

    @triton.jit
    def store_rows(X, x, head, rows, n_rows, D, BLOCK_D):
        """The same way back."""
        at, exists = pointers(X, head, rows, n_rows, D, BLOCK_D)
        tl.store(at, x.to(X.dtype.element_ty), mask=exists)

    @triton.jit
    def find_scores(q, k, scale, BOUNDS, query, key, n_queries, masked: tl.constexpr):
        """Scores of a tile of queries and a tile of keys (TILE, TILE), -inf where the rule forbids
        them. Queries past the last one see what the last one sees."""
        score = tl.dot(q, tl.trans(k)) * scale
        if masked:
            query = tl.minimum(query, n_queries - 1)
            at = BOUNDS + query[:, None] * 3  # where its prefix, start and end are
            seen = rule(tl.load(at), tl.load(at + 1), tl.load(at + 2), key[None, :])
            score = tl.where(seen, score, float("-inf"))
        return score

    @triton.jit
    def find_work(BOUNDS, LISTS, n_queries, n_others, n_views, TILE):
        """What the program (tile, head, row) works on: the positions (TILE,) of its own tile, the
        bounds of its row, the list of the tiles to walk over, the number of its head among all
        N * H, and where the numbers of this head begin in LSE."""
        tile = tl.program_id(0)
        head = tl.program_id(1)
        row = tl.program_id(2)
        own = tile * TILE + tl.arange(0, TILE)

        # there is one view for all rows, or one for each
        view = row % n_views
        bounds = BOUNDS + view * n_queries * 3
        length = 2 + tl.cdiv(n_others, TILE)
        tiles = LISTS + (view * tl.num_programs(0) + tile) * length

        # heads lie one after the other, in LSE with their queries filled up to whole tiles
        number = (row * tl.num_programs(1) + head).to(tl.int64)
        n_padded = tl.cdiv(n_queries, TILE) * TILE
        return own, bounds, tiles, number, number * n_padded

    @triton.jit
    def forward_kernel(
        Q, K, V, BOUNDS, O, LSE, LISTS,
        scale, n_queries, n_keys, n_views,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """o and log2-sum-exp2 of one tile of queries, by online softmax over its key tiles."""
        query, bounds, tiles, head, at_lse = find_work(
            BOUNDS, LISTS, n_queries, n_keys, n_views, TILE
        )
        q = load_rows(Q, head, query, n_queries, D, BLOCK_D)
        top = tl.full([TILE], -1e30, tl.float32)  # running maximum
        total = tl.zeros([TILE], tl.float32)  # running sum of 2^(score - top)
        o = tl.zeros([TILE, BLOCK_D], tl.float32)  # running sum of 2^(score - top) v
        begin = 0
        for masked in tl.static_range(2):  # first the whole tiles, then those that need a mask
            stop = tl.load(tiles + masked)
            for i in range(begin, stop):
                # the scores of the next key tile
                tile = tl.load(tiles + 2 + i)
                key = tile * TILE + tl.arange(0, TILE)
                k = load_rows(K, head, key, n_keys, D, BLOCK_D)
                v = load_rows(V, head, key, n_keys, D, BLOCK_D)
                score = find_scores(q, k, scale, bounds, query, key, n_queries, masked)

                # bring the sums so far to the new maximum, and add this tile
                new_top = tl.maximum(top, tl.max(score, 1))
                p = tl.exp2(score - new_top[:, None])
                decay = tl.exp2(top - new_top)
                total = total * decay + tl.sum(p, 1)
                o *= decay[:, None]
                o += tl.dot(p.to(v.dtype), v)
                top = new_top
            begin = stop
        o /= total[:, None]
        store_rows(O, o, head, query, n_queries, D, BLOCK_D)
        tl.store(LSE + at_lse + query, top + tl.log2(total))

    @triton.jit
    def backward_kernel(
        Q, K, V, BOUNDS, LSE, DELTA, DO, DQ, DK, DV, LISTS,
        scale, n_queries, n_keys, n_views,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """dk and dv of one tile of keys, by a walk over the tiles of queries that see it; each adds
        to its dq what comes from this tile."""
        key, bounds, tiles, head, at_lse = find_work(
            BOUNDS, LISTS, n_queries, n_queries, n_views, TILE
        )
        k = load_rows(K, head, key, n_keys, D, BLOCK_D)
        v = load_rows(V, head, key, n_keys, D, BLOCK_D)
        dk = tl.zeros([TILE, BLOCK_D], tl.float32)
        dv = tl.zeros([TILE, BLOCK_D], tl.float32)
        begin = 0
        for masked in tl.static_range(2):
            stop = tl.load(tiles + masked)
            for i in range(begin, stop):
                # the next tile of queries
                tile = tl.load(tiles + 2 + i)
                query = tile * TILE + tl.arange(0, TILE)
                q = load_rows(Q, head, query, n_queries, D, BLOCK_D)
                do = load_rows(DO, head, query, n_queries, D, BLOCK_D)
                lse = tl.load(LSE + at_lse + query)
                delta = tl.load(DELTA + at_lse + query)

                # its weights p as in the forward pass, from log-sum-exp
                score = find_scores(q, k, scale, bounds, query, key, n_queries, masked)
                p = tl.exp2(score - lse[:, None])

                # gradients: of the values, of the scores, and from those of keys and queries
                dv += tl.dot(tl.trans(p.to(do.dtype)), do)
                dp = tl.dot(do, tl.trans(v))
                ds = p * (dp - delta[:, None])
                ds *= scale * 0.6931471805599453  # ln 2, for scale holds log2(e)
                dk += tl.dot(tl.trans(ds.to(q.dtype)), q)
                dq = tl.dot(ds.to(k.dtype), k)
                at, exists = pointers(DQ, head, query, n_queries, D, BLOCK_D)
                tl.atomic_add(at, dq, mask=exists, sem="relaxed")
            begin = stop
        store_rows(DK, dk, head, key, n_keys, D, BLOCK_D)
        store_rows(DV, dv, head, key, n_keys, D, BLOCK_D)

    @triton.jit
    def probe_kernel(X):
        """Next to nothing: can Triton compile here?"""
        tl.store(X, 1.0)


def launch_options(head_size, itemsize, backward):
    """Sizes and options of a kernel: what fits in the 99 KB of shared memory of the smaller GPUs
    and in registers, from compute capability 8.0 to 12.0. TILE is the same forward and backward."""
    block = max(16, triton.next_power_of_2(head_size))  # tl.dot wants powers of 2 from 16 on
    return dict(
        D=head_size,
        BLOCK_D=block,
        TILE=64 if itemsize == 2 else min(64, 2048 // block),
        num_warps=8 if backward or block > 64 else 4,
        num_stages=1 if backward else 2,
    )


class TritonAttention(torch.autograd.Function):
    """block_attention in Triton."""

    @staticmethod
    def forward(ctx, q, k, v, view):
        N, H, n_queries, D = q.shape
        n_keys = k.shape[2]
        q, k, v = (x.contiguous() for x in (q, k, v))  # a cache is, so that it is never copied
        options = launch_options(D, q.element_size(), backward=False)
        bounds, by_query, by_key = make_tables(view, n_keys, options["TILE"], q.device)
        o = torch.empty_like(q)
        n_padded = by_query.shape[1] * options["TILE"]
        lse = q.new_empty((N, H, n_padded), dtype=torch.float32)
        scale = math.log2(math.e) / math.sqrt(D)  # log2(e), for the kernels use exp2 and log2
        ctx.sizes = scale, n_queries, n_keys, len(bounds)
        grid = by_query.shape[1], H, N
        forward_kernel[grid](q, k, v, bounds, o, lse, by_query, *ctx.sizes, **options)
        ctx.save_for_backward(q, k, v, o, lse, bounds, by_key)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, bounds, by_key = ctx.saved_tensors
        N, H, n_queries, D = q.shape
        do = do.contiguous()

        # delta is sum_j p_j dp_j of each query, which is o times do
        delta = torch.zeros_like(lse)
        delta[:, :, :n_queries] = (do.float() * o).sum(-1)

        dq = torch.zeros_like(q, dtype=torch.float32)  # many tiles add to it
        dk = torch.empty_like(k)
        dv = torch.empty_like(v)
        options = launch_options(D, q.element_size(), backward=True)
        grid = by_key.shape[1], H, N
        backward_kernel[grid](
            q, k, v, bounds, lse, delta, do, dq, dk, dv, by_key, *ctx.sizes, **options
        )
        return dq.to(q.dtype), dk, dv, None


attention_triton = TritonAttention.apply


def why_no_triton(device):
    """Why the kernels cannot run on this GPU, or None if they can."""
    if triton is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 (Ampere)"
    try:
        probe_kernel[(1,)](torch.empty(1, device=device))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return f"Triton cannot compile: {error!r}"  # for want of a C compiler, or of Python.h


@lru_cache
def use_triton(device):
    """Whether the kernels run on this device: never on a CPU, and on a GPU unless stderr says why
    not, once."""
    if device.type != "cuda":
        return False
    reason = why_no_triton(device)
    if reason:
        print(f"{device}: attention runs in PyTorch, because {reason}", file=sys.stderr)
    return not reason


# --------------------------------------------------------------------------------------------------
# The one entry


def block_attention(q, k, v, view):
    """Softmax attention under a view: query i sees keys [0, prefix_i) and [start_i, end_i).

    q (N, H, Q, D), k and v (N, H, T, D), view over Q queries -> (N, H, Q, D). Differentiable.
    Scores are scaled by 1 / sqrt(D). Every query must see something. Keys and values that nobody
    sees must be finite all the same, for 0 times nan is nan. Not for the inside of a graph of
    torch.compile, for what is skipped depends on data: compile what stands before it and what
    stands after it."""
    if use_triton(q.device) and q.shape[-1] <= 128:
        return attention_triton(q, k, v, view)
    return attention_torch(q, k, v, view)


# --------------------------------------------------------------------------------------------------
# Benchmark


def benchmark(device, dtype):
    """Forward and backward of a training step's attention, against PyTorch's with a dense mask."""
    from torch.utils.benchmark import Timer

    for L in (1024, 256, 32):
        shape = 3, 8192 // L, 6, 2 * L, 64
        qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        view = train_view(L, 16)
        mask = view.dense(2 * L).to(device)
        rivals = {
            "block_attention": partial(block_attention, view=view),
            "SDPA, dense mask": partial(F.scaled_dot_product_attention, attn_mask=mask),
        }
        step = "torch.autograd.grad(attend(*qkv).sum(), qkv)"
        for name, attend in rivals.items():
            timer = Timer(step, globals=locals(), num_threads=torch.get_num_threads())
            seconds = timer.blocked_autorange(min_run_time=2).median  # compiles, then measures
            print(f"L {L:4}, S 16: {name:16} {1e3 * seconds:9.2f} ms")


if __name__ == "__main__":
    argparse.ArgumentParser(
        usage=argparse.SUPPRESS,  # an unknown flag is answered in one line
        description="Time the attention of a training step, forward and backward, against SDPA: on "
        "a GPU in bfloat16 if there is one, otherwise on the CPU in float32.",
    ).parse_args()
    if torch.cuda.is_available():
        benchmark("cuda", torch.bfloat16)
    else:
        benchmark("cpu", torch.float32)
