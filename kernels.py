"""Block-causal attention, from one rule: query i sees keys [0, prefix_i) and keys [start_i, end_i).

`View` states the rule, its makers cover training, generation and verification. `block_attention`
computes it for q (N, H, Q, D), k and v (N, H, T, D): on a CPU in PyTorch, each tile of queries
against just the key tiles that it sees; on an NVIDIA GPU (Ampere or newer) by Triton kernels after
FlashAttention-2 (Dao 2023, arXiv 2307.08691), which skip the tiles that nobody sees and mask only
the tiles that need it. The rule is data, not code: one compiled kernel serves every block size and
every mode.

On a GPU, products of float32 numbers use TF32, as do those of the other layers under
torch.set_float32_matmul_precision("high").

    python kernels.py           # benchmark against SDPA and flex_attention
"""

import math
import sys
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

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


@dataclass(eq=False)  # a view is itself alone, which lets lru_cache remember it
class View:
    """Query i sees keys [0, prefix_i) and [start_i, end_i).

    Three integer tensors, (Q,), or (N, Q) where the rows of a batch differ."""

    prefix: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor

    def dense(self, n_keys):
        """The rule as a boolean matrix, (Q, n_keys) or (N, Q, n_keys)."""
        key = torch.arange(n_keys, device=self.prefix.device)
        bounds = (x[..., None] for x in (self.prefix, self.start, self.end))
        return sees(*bounds, key)


def train_view(length, block_size, token_causal=True, device=None):
    """Training: queries and keys are both [clean x0 (L) | noisy xt (L)].

    A clean token sees the clean tokens up to itself (token_causal) or to the end of its block.
    A noisy token sees the clean tokens before its block, and its own noisy block.
    block_size: an int, or (N,) if each row has its own."""
    query = torch.arange(2 * length, device=device)
    noisy = query >= length
    token = query % length
    size = block_size if isinstance(block_size, int) else block_size[:, None]  # (N, 1)
    begin = token // size * size  # (2 L,) or (N, 2 L)
    end = (begin + size).clamp(max=length)
    clean_prefix = token + 1 if token_causal else end
    prefix = torch.where(noisy, begin, clean_prefix)
    start = length + begin
    return View(prefix, start, torch.where(noisy, length + end, start))


# Generation asks for the same views at every step of a block, so the last few are remembered. They
# live on the CPU, and what follows from them (masks, tables) goes to the GPU once.


@lru_cache(maxsize=4)
def denoise_view(cached, committed, n, block_size=1):
    """Generation: queries [newly committed clean (c) | noisy (n)], keys [cache (C) | queries]; c is
    `committed`, and C is `cached`.

    Clean tokens are causal by blocks; at block size 1, token by token: with n = 0 that is the mask
    of an autoregressive model."""
    query = torch.arange(committed + n)
    block_end = (query // block_size + 1) * block_size
    prefix = cached + block_end.clamp(max=committed)
    start = torch.full_like(query, cached + committed)
    return View(prefix, start, start + n * (query >= committed))


@lru_cache(maxsize=4)
def verify_view(cached, n):
    """AR verification: queries [proposed (n) | noise (n)], keys [cache (C) | queries].

    Proposed tokens are causal. The i-th noise query stands at the position of the i-th of them: it
    sees the cache, the proposed tokens before i, and itself."""
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


def tile_states(seen, tile):
    """Who sees whom (R, Q, T), in tiles (R, QT, KT): 0 where no query of a tile sees any key of
    another, 2 where all see all, 1 otherwise. The last tiles are filled up with what is not seen.
    """
    n_queries, n_keys = seen.shape[1:]
    seen = F.pad(seen, (0, -n_keys % tile, 0, -n_queries % tile))
    tiles = seen.unflatten(2, (-1, tile))
    tiles = tiles.unflatten(1, (-1, tile))  # (R, QT, tile, KT, tile)
    some = tiles.any(4).any(2)
    whole = tiles.all(4).all(2)
    return some.int() + whole


def join(pieces):
    """Pieces (..., T, D) one after the other; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -2)


@lru_cache(maxsize=4)  # all layers of a pass share them
def make_masks(view, device):
    """How attention_torch goes about a view: how many keys it needs, the size of its tiles, and for
    each tile of queries the key tiles that it sees, with the mask of the scores there.

    Few queries are fastest as one tile. So is everything on a GPU that the kernels do not serve, at
    the price of the whole matrix of scores."""
    n_queries = view.prefix.shape[-1]
    n_keys = int(torch.maximum(view.prefix, view.end).max())
    in_tiles = n_queries > 128 and device.type == "cpu"
    tile = 64 if in_tiles else max(n_queries, n_keys)
    seen = view.dense(n_keys).view(-1, n_queries, n_keys)
    states = tile_states(seen, tile).amax(0) if in_tiles else torch.ones(1, 1)  # (QT, KT)
    masks = []
    for row, queries in zip(states, seen.split(tile, 1)):
        tiles = row.nonzero()[:, 0].tolist()
        key_tiles = queries.split(tile, 2)
        mask = torch.cat([key_tiles[i] for i in tiles], 2)  # (R, tile, keys)
        mask = None if mask.all() else mask[:, None].to(device)
        masks.append((tiles, mask))
    return n_keys, tile, masks


def attention_torch(q, k, v, view):
    """block_attention in PyTorch: each tile of queries attends to the key tiles that it sees."""
    n_keys, tile, masks = make_masks(view, q.device)
    k_tiles = k[:, :, :n_keys].split(tile, 2)
    v_tiles = v[:, :, :n_keys].split(tile, 2)
    outputs = []
    for q_tile, (tiles, mask) in zip(q.split(tile, 2), masks):
        keys = join([k_tiles[i] for i in tiles])
        values = join([v_tiles[i] for i in tiles])
        o = F.scaled_dot_product_attention(q_tile, keys, values, mask)
        outputs.append(o)
    return join(outputs)


# --------------------------------------------------------------------------------------------------
# Attention in Triton, a tile of queries against a tile of keys at a time


def tile_lists(states):
    """(R, A, B) states -> (R, A, 2 + B) int32, what the kernels walk over: how many of the B tiles
    are whole, how many are seen at all, and their numbers, the whole ones first."""
    n_whole = (states == 2).sum(-1, keepdim=True)
    n_seen = (states > 0).sum(-1, keepdim=True)
    order = states.argsort(dim=-1, descending=True, stable=True)
    return torch.cat([n_whole, n_seen, order], -1).int()


@lru_cache(maxsize=4)
def make_tables(view, n_keys, tile, device):
    """What the kernels know of a view: its bounds (R, Q, 3), the lists of key tiles for each tile
    of queries, and the reverse. All int32."""
    bounds = torch.stack([view.prefix, view.start, view.end], -1)
    n_queries = bounds.shape[-2]
    seen = view.dense(n_keys).view(-1, n_queries, n_keys)
    states = tile_states(seen, tile)
    bounds = bounds.view(-1, n_queries, 3).int()
    tables = bounds, tile_lists(states), tile_lists(states.mT)
    return [table.to(device, non_blocking=True) for table in tables]


if triton is not None:

    rule = triton.jit(sees)

    @triton.jit
    def place(X, rows, n_rows, D, BLOCK_D):
        """Where some rows of X (n_rows, D) stand, and which of these places exist."""
        column = tl.arange(0, BLOCK_D)[None, :]
        rows = rows[:, None]
        exists = (rows < n_rows) & (column < D)
        return X + rows * D + column, exists

    @triton.jit
    def load_rows(X, rows, n_rows, D, BLOCK_D):
        """(TILE, BLOCK_D): zeros past the last row and the last column."""
        at, exists = place(X, rows, n_rows, D, BLOCK_D)
        return tl.load(at, mask=exists, other=0.0)

    @triton.jit
    def store_rows(X, x, rows, n_rows, D, BLOCK_D):
        at, exists = place(X, rows, n_rows, D, BLOCK_D)
        tl.store(at, x.to(X.dtype.element_ty), mask=exists)

    @triton.jit
    def visible(BOUNDS, query, key, n_queries):
        """The rule for one tile, (queries, keys). What fills up the last tile sees what the last
        query sees."""
        query = tl.minimum(query, n_queries - 1)
        at = BOUNDS + query[:, None] * 3
        key = key[None, :]
        prefix = tl.load(at)
        start = tl.load(at + 1)
        end = tl.load(at + 2)
        return rule(prefix, start, end, key)

    @triton.jit
    def find_work(BOUNDS, LISTS, n_queries, n_others, n_views, TILE):
        """What a program (tile, head, row) works on: its own positions, its list of other tiles,
        the bounds of its row, its head among all N * H, where the head's numbers begin in LSE."""
        tile = tl.program_id(0)
        head = tl.program_id(1)
        row = tl.program_id(2)
        own = tile * TILE + tl.arange(0, TILE)
        view = row % n_views  # one for all rows, or one each
        list_length = 2 + tl.cdiv(n_others, TILE)
        LISTS += (view * tl.num_programs(0) + tile) * list_length
        BOUNDS += view * n_queries * 3
        n_padded = tl.cdiv(n_queries, TILE) * TILE
        head = (row * tl.num_programs(1) + head).to(tl.int64)
        return own, LISTS, BOUNDS, head, head * n_padded

    @triton.jit
    def forward_kernel(
        Q, K, V, BOUNDS, O, LSE, LISTS,
        scale, n_queries, n_keys, n_views,
        D: tl.constexpr,
        BLOCK_D: tl.constexpr,
        TILE: tl.constexpr,
    ):
        """o and log2-sum-exp2 of one tile of queries, by online softmax over its key tiles."""
        work = find_work(BOUNDS, LISTS, n_queries, n_keys, n_views, TILE)
        query, LISTS, BOUNDS, head, at_lse = work
        K += head * n_keys * D
        V += head * n_keys * D
        q = load_rows(Q + head * n_queries * D, query, n_queries, D, BLOCK_D)
        top = tl.full([TILE], -1e30, tl.float32)  # running maximum
        total = tl.zeros([TILE], tl.float32)  # running sum of 2^(score - top)
        o = tl.zeros([TILE, BLOCK_D], tl.float32)
        begin = 0
        for masked in tl.static_range(2):  # first the whole tiles, then those that need a mask
            stop = tl.load(LISTS + masked)
            for i in range(begin, stop):
                tile = tl.load(LISTS + 2 + i)
                key = tile * TILE + tl.arange(0, TILE)
                k = load_rows(K, key, n_keys, D, BLOCK_D)
                v = load_rows(V, key, n_keys, D, BLOCK_D)
                score = tl.dot(q, tl.trans(k)) * scale
                if masked:
                    seen = visible(BOUNDS, query, key, n_queries)
                    score = tl.where(seen, score, float("-inf"))
                new_top = tl.maximum(top, tl.max(score, 1))
                p = tl.exp2(score - new_top[:, None])
                decay = tl.exp2(top - new_top)
                total = total * decay + tl.sum(p, 1)
                o *= decay[:, None]
                o += tl.dot(p.to(v.dtype), v)
                top = new_top
            begin = stop
        o /= total[:, None]
        store_rows(O + head * n_queries * D, o, query, n_queries, D, BLOCK_D)
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
        work = find_work(BOUNDS, LISTS, n_queries, n_queries, n_views, TILE)
        key, LISTS, BOUNDS, head, at_lse = work
        at_query = head * n_queries * D
        at_key = head * n_keys * D
        k = load_rows(K + at_key, key, n_keys, D, BLOCK_D)
        v = load_rows(V + at_key, key, n_keys, D, BLOCK_D)
        dk = tl.zeros([TILE, BLOCK_D], tl.float32)
        dv = tl.zeros([TILE, BLOCK_D], tl.float32)
        begin = 0
        for masked in tl.static_range(2):
            stop = tl.load(LISTS + masked)
            for i in range(begin, stop):
                tile = tl.load(LISTS + 2 + i)
                query = tile * TILE + tl.arange(0, TILE)
                q = load_rows(Q + at_query, query, n_queries, D, BLOCK_D)
                do = load_rows(DO + at_query, query, n_queries, D, BLOCK_D)
                lse = tl.load(LSE + at_lse + query)
                delta = tl.load(DELTA + at_lse + query)
                score = tl.dot(q, tl.trans(k)) * scale
                if masked:
                    seen = visible(BOUNDS, query, key, n_queries)
                    score = tl.where(seen, score, float("-inf"))
                p = tl.exp2(score - lse[:, None])
                dv += tl.dot(tl.trans(p.to(do.dtype)), do)
                dp = tl.dot(do, tl.trans(v))
                ds = p * (dp - delta[:, None])  # of the scores
                ds *= scale * 0.6931471805599453  # ln 2, for scale holds log2(e)
                dk += tl.dot(tl.trans(ds.to(q.dtype)), q)
                dq = tl.dot(ds.to(k.dtype), k)
                at, exists = place(DQ + at_query, query, n_queries, D, BLOCK_D)
                tl.atomic_add(at, dq, mask=exists, sem="relaxed")
            begin = stop
        store_rows(DK + at_key, dk, key, n_keys, D, BLOCK_D)
        store_rows(DV + at_key, dv, key, n_keys, D, BLOCK_D)

    @triton.jit
    def probe_kernel(X):
        """Next to nothing: can Triton compile here?"""
        tl.store(X, 1.0)


def launch(head_size, itemsize, backward):
    """Launch options of a kernel: what fits in the 99 KB of shared memory of the smaller GPUs and
    in registers, from compute capability 8.0 to 12.0. TILE is the same forward and backward."""
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
        q = q.contiguous()
        k = k.contiguous()  # a cache is contiguous, so that it is never copied
        v = v.contiguous()
        options = launch(D, q.element_size(), backward=False)
        bounds, by_query, by_key = make_tables(view, n_keys, options["TILE"], q.device)
        o = torch.empty_like(q)
        n_padded = by_query.shape[1] * options["TILE"]
        lse = q.new_empty((N, H, n_padded), dtype=torch.float32)
        scale = math.log2(math.e) / math.sqrt(D)  # log2(e), for the kernels use exp2 and log2
        ctx.sizes = scale, n_queries, n_keys, len(bounds)
        grid = by_query.shape[1], H, N
        tensors = q, k, v, bounds, o, lse, by_query
        forward_kernel[grid](*tensors, *ctx.sizes, **options)
        ctx.save_for_backward(q, k, v, o, lse, bounds, by_key)
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse, bounds, by_key = ctx.saved_tensors
        N, H, n_queries, D = q.shape
        do = do.contiguous()
        delta = torch.zeros_like(lse)
        o_do = do.float() * o
        delta[:, :, :n_queries] = o_do.sum(-1)
        dq = torch.zeros_like(q, dtype=torch.float32)  # many tiles add to it
        dk = torch.empty_like(k)
        dv = torch.empty_like(v)
        options = launch(D, q.element_size(), backward=True)
        grid = by_key.shape[1], H, N
        tensors = q, k, v, bounds, lse, delta, do, dq, dk, dv, by_key
        backward_kernel[grid](*tensors, *ctx.sizes, **options)
        return dq.to(q.dtype), dk, dv, None


attention_triton = TritonAttention.apply


@lru_cache
def use_triton(device):
    """Whether the kernels can run on this device: an NVIDIA GPU from Ampere on, and a Triton that
    can compile. If it cannot, for want of a C compiler or of Python.h, stderr says so, once."""
    if triton is None or device.type != "cuda":
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    x = torch.empty(1, device=device)
    try:
        probe_kernel[(1,)](x)
    except Exception as error:
        line = f"Triton cannot compile, PyTorch computes attention: {error!r}"
        print(line[:300], file=sys.stderr)
        return False
    return True


# --------------------------------------------------------------------------------------------------
# The one entry


@torch.compiler.disable  # what is skipped depends on data: a clean break between compiled parts
def block_attention(q, k, v, view):
    """Softmax attention under a view: query i sees keys [0, prefix_i) and [start_i, end_i).

    q (N, H, Q, D), k and v (N, H, T, D), view over Q queries -> (N, H, Q, D). Differentiable.
    Scores are scaled by 1 / sqrt(D). Every query must see something. Keys and values that nobody
    sees must be finite all the same, for 0 times nan is nan. The view may live on the CPU, whatever
    the device of q."""
    if use_triton(q.device) and q.shape[-1] <= 128:
        return attention_triton(q, k, v, view)
    return attention_torch(q, k, v, view)


# --------------------------------------------------------------------------------------------------
# Benchmark


def flex(seen):
    """flex_attention under the same rule, a dense mask (Q, T), compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def rule(row, head, query, key):
        return seen[query, key]

    mask = create_block_mask(rule, None, None, *seen.shape, device=seen.device)
    return partial(torch.compile(flex_attention), block_mask=mask)


def benchmark(device, dtype):
    """Forward and backward of a training step's attention, against PyTorch's own."""
    for L in (1024, 256, 32):
        shape = 3, 8192 // L, 6, 2 * L, 64
        qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
        view = train_view(L, 16, device=device)
        mask = view.dense(2 * L)
        rivals = {
            "block_attention": partial(block_attention, view=view),
            "SDPA, dense mask": partial(F.scaled_dot_product_attention, attn_mask=mask),
        }
        if device == "cuda":
            rivals["flex_attention"] = flex(mask)
        step = "torch.autograd.grad(attend(*qkv).sum(), qkv)"
        for name, attend in rivals.items():
            timer = Timer(step, globals=locals(), num_threads=torch.get_num_threads())
            seconds = timer.blocked_autorange(min_run_time=2).median  # compiles, then measures
            print(f"L {L:4}, S 16: {name:16} {1e3 * seconds:9.2f} ms")


if __name__ == "__main__":
    if torch.cuda.is_available():
        benchmark("cuda", torch.bfloat16)
    else:
        benchmark("cpu", torch.float32)
