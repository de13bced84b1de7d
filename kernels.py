"""Block-causal attention, from one rule: query i sees keys [0, prefix_i) and keys [start_i, end_i).

Read it top to bottom: `View` states the rule, its three makers cover training, generation and verification,
`block_attention` computes it: on the CPU in plain PyTorch, a chunk of queries against just the keys in its two
ranges; on an NVIDIA GPU with three Triton kernels (forward; dq; dk and dv) after FlashAttention-2
(Dao 2023, arXiv 2307.08691), which skip the tiles that nobody sees and mask only the tiles that need it.

The bounds are data, not code: one compiled kernel serves every block size and every mode.

    python kernels.py           # benchmark: side by side, interleaved, medians, ratios
"""
import math
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: the PyTorch path serves
    triton = None

CHUNK = 128  # queries a chunk on the PyTorch path
TILE = 64  # queries and keys a tile in the kernels


# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom


@dataclass(eq=False)
class View:
    """Query i sees keys [0, prefix_i) and [start_i, end_i). Integer tensors, (Q,) or, a row each, (N, Q)."""

    prefix: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    plans: dict = field(default_factory=dict, repr=False)  # what the attention paths derive from it, for all layers

    def dense(self, n_keys):
        """The rule as a boolean matrix, (Q, n_keys) or (N, Q, n_keys): True where the query sees the key."""
        key = torch.arange(n_keys, device=self.prefix.device)
        prefix, start, end = (x[..., None] for x in (self.prefix, self.start, self.end))
        return (key < prefix) | ((start <= key) & (key < end))

    def rows(self, begin, end):
        return View(self.prefix[..., begin:end], self.start[..., begin:end], self.end[..., begin:end])

    def plan(self, key, make):
        """make(), remembered: every layer of a pass shares the view, so it is worked out once."""
        if key not in self.plans:
            self.plans[key] = make()
        return self.plans[key]


def join(*views):
    """The views of consecutive groups of queries, as one."""
    return View(*(torch.cat(parts, -1) for parts in zip(*((v.prefix, v.start, v.end) for v in views))))


def causal(begin, n):
    """n queries at positions begin, begin + 1, ...: each sees the keys up to its own. begin: (1,) or (N, 1)."""
    prefix = begin + torch.arange(1, n + 1, device=begin.device)
    return View(prefix, torch.zeros_like(prefix), torch.zeros_like(prefix))


def train_view(length, block_size, token_causal=True, device=None):
    """Training: queries and keys are both [clean x0 (L) | noisy xt (L)].

    A clean token sees the clean tokens up to itself (token_causal) or to the end of its block; a noisy token sees
    the clean tokens before its block, and its own noisy block. block_size: an int, or (N,) for one a row."""
    token = torch.arange(length, device=device)
    size = torch.as_tensor(block_size, device=device)[..., None]  # (1,) or (N, 1)
    begin = token // size * size  # (L,) or (N, L)
    end = (begin + size).clamp(max=length)
    clean = token.expand_as(begin) + 1 if token_causal else end
    nothing = torch.zeros_like(begin)
    return join(View(clean, nothing, nothing), View(begin, length + begin, length + end))


def denoise_view(cached, committed, n, block_size=None):
    """Generation: queries [newly committed clean (c) | noisy block (n)], keys [cache (C) | clean (c) | noisy (n)].

    cached: C, an int or (N,) for one a row. Clean tokens are token-causal, or, with a block_size, block-causal."""
    cached = torch.as_tensor(cached)[..., None]
    clean = causal(cached, committed)
    if block_size:
        ends = (torch.arange(committed, device=cached.device) // block_size + 1) * block_size
        clean.prefix = cached + ends.clamp(max=committed)
    begin = (cached + committed).expand(*cached.shape[:-1], n)
    return join(clean, View(begin, begin, begin + n))


def verify_view(cached, n):
    """AR verification: queries [proposed (n) | noise (n)], keys [cache (C) | proposed (n) | noise (n)].

    Noise query i stands at the position of proposed token i: it sees the cache, the proposed tokens before i, itself."""
    cached = torch.as_tensor(cached)[..., None]
    own = cached + n + torch.arange(n, device=cached.device)
    return join(causal(cached, n), View(own - n, own, own + 1))


# ---------------------------------------------------------------------------------------------------------------------
# The rule in PyTorch


def make_chunks(view, n_queries):
    """For each chunk of queries: its slice, the key ranges it needs (hull over its queries and rows), its mask."""
    size = CHUNK if n_queries > 2 * CHUNK else n_queries  # a short pass is fastest in one piece
    chunks = []
    for begin in range(0, n_queries, size):
        rule = view.rows(begin, begin + size)
        used = rule.start < rule.end
        prefix = int(rule.prefix.max())
        ranges = [(0, prefix)] if prefix else []
        if used.any():
            start, end = max(prefix, int(rule.start[used].min())), int(rule.end[used].max())
            if start < end:  # adjacent ranges are one
                ranges = [(0, end)] if start == prefix else [*ranges, (start, end)]
        mask = rule.dense(ranges[-1][1] if ranges else 0)
        mask = torch.cat([mask[..., lo:hi] for lo, hi in ranges], -1) if ranges else mask
        mask = mask[:, None] if mask.dim() == 3 else mask  # (N, 1, q, keys): the same for every head
        blind = ~mask.any(-1, keepdim=True)
        chunks.append((slice(begin, begin + size), ranges, mask, blind if blind.any() else None))
    return chunks


def gather(x, ranges):
    parts = [x[:, :, lo:hi] for lo, hi in ranges]
    return torch.cat(parts, 2) if len(parts) > 1 else (parts or [x[:, :, :0]])[0]  # (N, H, keys, D)


def attend(q, k, v, mask, blind):
    """SDPA, but zeros for the blind queries, which see nothing (a softmax over nothing is NaN)."""
    if blind is None:
        return F.scaled_dot_product_attention(q, k, v, mask)
    if mask.shape[-1] == 0:
        return q * 0 + k.sum() + v.sum()  # k and v are empty; so they get their (empty) gradients
    return F.scaled_dot_product_attention(q, k, v, mask | blind).masked_fill(blind, 0)


class ChunkedAttention(torch.autograd.Function):
    """Every chunk runs as a graph of its own: autograd would pad the gradient of each slice of k and v with zeros
    to full length before adding it up; backward here adds it in place."""

    @staticmethod
    def forward(ctx, q, k, v, chunks):
        ctx.pieces, ctx.chunks, ctx.shapes = [], chunks, (q, k, v)
        for rows, ranges, mask, blind in chunks:
            with torch.enable_grad():
                inputs = [x.detach().requires_grad_() for x in (q[:, :, rows], gather(k, ranges), gather(v, ranges))]
                ctx.pieces.append((inputs, attend(*inputs, mask, blind)))
        return torch.cat([o.detach() for _, o in ctx.pieces], 2)

    @staticmethod
    def backward(ctx, grad):
        dq, dk, dv = (torch.zeros_like(x) for x in ctx.shapes)
        for (rows, ranges, _, _), (inputs, o) in zip(ctx.chunks, ctx.pieces):
            dq[:, :, rows], *key_grads = torch.autograd.grad(o, inputs, grad[:, :, rows])
            for total, part in zip((dk, dv), key_grads):
                for (lo, hi), piece in zip(ranges, part.split([hi - lo for lo, hi in ranges], 2)):
                    total[:, :, lo:hi] += piece
        return dq, dk, dv, None


def attention_torch(q, k, v, view):
    """block_attention in PyTorch: each chunk of queries attends to just the keys in its two ranges."""
    chunks = view.plan("chunks", lambda: make_chunks(view, q.shape[2]))
    if torch.is_grad_enabled() and len(chunks) > 1:
        return ChunkedAttention.apply(q, k, v, chunks)
    out = [attend(q[:, :, rows], gather(k, ranges), gather(v, ranges), mask, blind) for rows, ranges, mask, blind in chunks]
    return out[0] if len(out) == 1 else torch.cat(out, 2)  # (N, H, Q, D)


# ---------------------------------------------------------------------------------------------------------------------
# The rule in Triton


def tile_lists(view, n_keys):
    """Which tiles hold a visible pair: for each tile of queries the list of key tiles to visit, and the transpose.

    Two pairs (order, count), int32. order (R, tiles, others): those visible as a whole first, then the partly visible,
    then the rest. count (R, tiles, 2): how many are whole, and how many to visit. R is 1, or N if rows differ."""
    prefix, start, end = (x.reshape(-1, x.shape[-1], 1) for x in (view.prefix, view.start, view.end))
    first = torch.arange(0, n_keys, TILE, device=prefix.device)  # the key tiles (KT,)
    some = (first < prefix) | ((first < end) & (start < first + TILE) & (start < end))  # (R, Q, KT)
    whole = (first + TILE <= prefix) | ((start <= first) & (first + TILE <= end))
    pad = (0, 0, 0, -some.shape[1] % TILE)
    some = F.pad(some, pad, value=False).unflatten(1, (-1, TILE)).any(2)  # (R, QT, KT)
    whole = F.pad(whole, pad, value=True).unflatten(1, (-1, TILE)).all(2)
    state = some.int() + (some & whole).int()  # 0 nobody sees it, 1 masked, 2 whole

    def listed(state):
        order = state.argsort(dim=-1, descending=True, stable=True)
        return order.int().contiguous(), torch.stack([(state == 2).sum(-1), (state > 0).sum(-1)], -1).int()

    return listed(state), listed(state.transpose(1, 2))


if triton is not None:

    @triton.jit
    def visible(BOUNDS, rows, keys, n_queries, n_keys):
        """The rule for one tile: (queries, keys) booleans. BOUNDS (Q, 3): prefix, start, end."""
        at = BOUNDS + tl.minimum(rows, n_queries - 1) * 3
        prefix, start, end = tl.load(at)[:, None], tl.load(at + 1)[:, None], tl.load(at + 2)[:, None]
        key = keys[None, :]
        return ((key < prefix) | ((start <= key) & (key < end))) & (key < n_keys) & (rows[:, None] < n_queries)

    @triton.jit
    def forward_kernel(Q, K, V, BOUNDS, ORDER, COUNT, O, LSE, scale, n_queries, n_keys, others, bounds_step, list_step,
                       heads, D: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr):
        """o and log2-sum-exp2 of one tile of queries over every SPLITS-th of its key tiles (online softmax)."""
        tile, head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
        rows, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, D)
        at_q = rows[:, None] * D + d[None, :]
        q = tl.load(Q + head * n_queries * D + at_q, mask=rows[:, None] < n_queries, other=0.0)
        K += head * n_keys * D
        V += head * n_keys * D
        BOUNDS += head // heads * bounds_step
        COUNT += (head // heads * list_step + tile) * 2
        ORDER += (head // heads * list_step + tile) * others
        top = tl.full([TILE], float("-inf"), tl.float32)  # running maximum
        total = tl.zeros([TILE], tl.float32)  # running sum of 2^(score - top)
        acc = tl.zeros([TILE, D], tl.float32)
        begin = split
        for masked in tl.static_range(2):  # first the whole tiles, then the masked ones
            stop = tl.load(COUNT + masked)
            for i in range(begin, stop, SPLITS):
                keys = tl.load(ORDER + i) * TILE + tl.arange(0, TILE)
                at_k = keys[:, None] * D + d[None, :]
                if masked:
                    seen = visible(BOUNDS, rows, keys, n_queries, n_keys)
                    valid = tl.max(seen.to(tl.int32), 0)[:, None] > 0  # what nobody sees may hold anything, even NaN
                    k = tl.load(K + at_k, mask=valid, other=0.0)
                    v = tl.load(V + at_k, mask=valid, other=0.0)
                else:
                    k = tl.load(K + at_k)
                    v = tl.load(V + at_k)
                s = tl.dot(q, tl.trans(k)) * scale
                if masked:
                    s = tl.where(seen, s, float("-inf"))
                new = tl.maximum(top, tl.max(s, 1))
                shift = tl.where(new == float("-inf"), 0.0, new)  # a query that has seen nothing yet: no inf - inf
                p = tl.exp2(s - shift[:, None])
                decay = tl.exp2(top - shift)
                total = total * decay + tl.sum(p, 1)
                acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v)
                top = new
            begin += tl.maximum((stop - begin + SPLITS - 1) // SPLITS, 0) * SPLITS
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        part = split * tl.num_programs(1) + head
        tl.store(O + part * n_queries * D + at_q, acc.to(O.dtype.element_ty), mask=rows[:, None] < n_queries)
        lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(LSE + part * n_queries + rows, lse, mask=rows < n_queries)

    @triton.jit
    def tile_gradient(q, k, v, do, lse, delta, scale):
        """p and dL/dscore of one tile, recomputed from the log-sum-exp: ds = p (do v' - delta), delta = do . o."""
        p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
        return p, p * (tl.dot(do, tl.trans(v)) - delta[:, None])

    @triton.jit
    def dq_kernel(Q, K, V, DO, LSE, DELTA, BOUNDS, ORDER, COUNT, DQ, scale, n_queries, n_keys, others, bounds_step,
                  list_step, heads, D: tl.constexpr, TILE: tl.constexpr):
        """dq of one tile of queries: the forward's walk over its key tiles."""
        tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        rows, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, D)
        inside, at_q = rows < n_queries, rows[:, None] * D + d[None, :]
        q = tl.load(Q + head * n_queries * D + at_q, mask=inside[:, None], other=0.0)
        do = tl.load(DO + head * n_queries * D + at_q, mask=inside[:, None], other=0.0)
        lse = tl.load(LSE + head * n_queries + rows, mask=inside, other=0.0)
        delta = tl.load(DELTA + head * n_queries + rows, mask=inside, other=0.0)
        BOUNDS += head // heads * bounds_step
        COUNT += (head // heads * list_step + tile) * 2
        ORDER += (head // heads * list_step + tile) * others
        dq = tl.zeros([TILE, D], tl.float32)
        begin = 0
        for masked in tl.static_range(2):
            stop = tl.load(COUNT + masked)
            for i in range(begin, stop):
                keys = tl.load(ORDER + i) * TILE + tl.arange(0, TILE)
                valid = (keys < n_keys)[:, None]
                at_k = head * n_keys * D + keys[:, None] * D + d[None, :]
                k = tl.load(K + at_k, mask=valid, other=0.0)
                v = tl.load(V + at_k, mask=valid, other=0.0)
                p, ds = tile_gradient(q, k, v, do, lse, delta, scale)
                if masked:
                    ds = tl.where(visible(BOUNDS, rows, keys, n_queries, n_keys), ds, 0.0)
                dq += tl.dot(ds.to(k.dtype), k)
            begin = stop
        dq *= scale * 0.6931471805599453  # scale counts in powers of 2
        tl.store(DQ + head * n_queries * D + at_q, dq.to(DQ.dtype.element_ty), mask=inside[:, None])

    @triton.jit
    def dkdv_kernel(Q, K, V, DO, LSE, DELTA, BOUNDS, ORDER, COUNT, DK, DV, scale, n_queries, n_keys, others,
                    bounds_step, list_step, heads, D: tl.constexpr, TILE: tl.constexpr):
        """dk and dv of one tile of keys: a walk over the query tiles that see it (the transposed lists)."""
        tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        keys, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, D)
        valid, at_k = (keys < n_keys)[:, None], head * n_keys * D + keys[:, None] * D + d[None, :]
        k = tl.load(K + at_k, mask=valid, other=0.0)
        v = tl.load(V + at_k, mask=valid, other=0.0)
        BOUNDS += head // heads * bounds_step
        COUNT += (head // heads * list_step + tile) * 2
        ORDER += (head // heads * list_step + tile) * others
        dk, dv = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE, D], tl.float32)
        begin = 0
        for masked in tl.static_range(2):
            stop = tl.load(COUNT + masked)
            for i in range(begin, stop):
                rows = tl.load(ORDER + i) * TILE + tl.arange(0, TILE)
                inside, at_q = rows < n_queries, head * n_queries * D + rows[:, None] * D + d[None, :]
                q = tl.load(Q + at_q, mask=inside[:, None], other=0.0)
                do = tl.load(DO + at_q, mask=inside[:, None], other=0.0)
                lse = tl.load(LSE + head * n_queries + rows, mask=inside, other=0.0)
                delta = tl.load(DELTA + head * n_queries + rows, mask=inside, other=0.0)
                p, ds = tile_gradient(q, k, v, do, lse, delta, scale)
                if masked:
                    seen = visible(BOUNDS, rows, keys, n_queries, n_keys)
                    p, ds = tl.where(seen, p, 0.0), tl.where(seen, ds, 0.0)
                dv += tl.dot(tl.trans(p.to(do.dtype)), do)
                dk += tl.dot(tl.trans(ds.to(q.dtype)), q)
            begin = stop
        dk *= scale * 0.6931471805599453
        tl.store(DK + at_k, dk.to(DK.dtype.element_ty), mask=valid)
        tl.store(DV + at_k, dv.to(DV.dtype.element_ty), mask=valid)


def launch(head_size):
    """Launch options for a head size: a larger tile needs more warps, or its registers spill."""
    return dict(num_warps=4 if head_size <= 64 else 8, num_stages=2)


def kernel_arguments(q, k, view):
    """What every kernel needs to know of a view: the bounds, both tile lists, the numbers."""

    def make():
        bounds = torch.stack([view.prefix, view.start, view.end], -1).int().contiguous()  # (Q, 3) or (N, Q, 3)
        return bounds, *tile_lists(view, k.shape[2])

    bounds, by_query, by_key = view.plan("tiles", make)
    own = bounds.dim() == 3  # the rows have views of their own
    numbers = [math.log2(math.e) / math.sqrt(q.shape[3]), q.shape[2], k.shape[2]]
    sizes = lambda order: [order.shape[2], q.shape[2] * 3 * own, order.shape[1] * own, q.shape[1]]
    return bounds, by_query, by_key, numbers, sizes


def run_forward(q, k, v, view, splits):
    """o (N, H, Q, D) and the log2-sum-exp2 of the scores (N, H, Q), each of `splits` parts of the keys merged."""
    bounds, (order, count), _, numbers, sizes = kernel_arguments(q, k, view)
    n, h, n_queries, d = q.shape
    o = q.new_empty(splits, *q.shape, dtype=q.dtype if splits == 1 else torch.float32)
    lse = q.new_empty(splits, n, h, n_queries, dtype=torch.float32)
    grid = (order.shape[1], n * h, splits)
    fixed = dict(D=d, TILE=TILE, SPLITS=splits, **launch(d))
    forward_kernel[grid](q, k, v, bounds, order, count, o, lse, *numbers, *sizes(order), **fixed)
    if splits == 1:
        return o[0], lse[0]
    weight = torch.softmax(lse * math.log(2), 0).nan_to_num(0)  # all parts empty: zeros
    return (weight[..., None] * o).sum(0).to(q.dtype), torch.logsumexp(lse * math.log(2), 0) / math.log(2)


class TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, view):
        o, lse = run_forward(q, k, v, view, splits=1)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.view = view
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        bounds, (q_order, q_count), (k_order, k_count), numbers, sizes = kernel_arguments(q, k, ctx.view)
        do = do.contiguous()
        delta = (do.float() * o.float()).sum(-1)  # (N, H, Q)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        common, fixed = (q, k, v, do, lse, delta, bounds), dict(D=q.shape[3], TILE=TILE, **launch(q.shape[3]))
        heads = q.shape[0] * q.shape[1]
        dq_kernel[(q_order.shape[1], heads)](*common, q_order, q_count, dq, *numbers, *sizes(q_order), **fixed)
        dkdv_kernel[(k_order.shape[1], heads)](*common, k_order, k_count, dk, dv, *numbers, *sizes(k_order), **fixed)
        return dq, dk, dv, None


def attention_triton(q, k, v, view, splits=None):
    """block_attention in Triton. splits: parts of the keys to work on in parallel; by default what fills the GPU."""
    d = q.shape[3]
    padded = max(16, triton.next_power_of_2(d))  # tl.dot wants powers of 2 from 16 on
    scaled = q * math.sqrt(padded / d)  # the kernels divide by sqrt(padded)
    q, k, v = (F.pad(x, (0, padded - d)).contiguous() for x in (q if padded == d else scaled, k, v))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return TritonAttention.apply(q, k, v, view)[..., :d]
    programs = -(-q.shape[2] // TILE) * q.shape[0] * q.shape[1]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    splits = splits or max(1, min(2 * processors // programs, -(-k.shape[2] // TILE)))
    return run_forward(q, k, v, view, splits)[0][..., :d]


@torch.compiler.disable  # the tiles depend on data: under torch.compile this is a clean break, between compiled parts
def block_attention(q, k, v, view):
    """Softmax attention under a view: query i sees keys [0, prefix_i) and [start_i, end_i). Differentiable.

    q (N, H, Q, D), k and v (N, H, T, D), view over Q queries -> (N, H, Q, D). Scores are scaled by 1 / sqrt(D).
    A query that sees nothing yields zeros. What no query of any row sees may hold anything, even NaN; what only other
    rows see must be finite on the CPU, where a chunk of queries takes one hull of keys for all rows."""
    if q.is_cuda and triton is not None:
        return attention_triton(q, k, v, view)
    return attention_torch(q, k, v, view)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmark


def flex(view, device):
    """flex_attention under the same rule, compiled; it brings its own kernels and needs a GPU for its backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rule = lambda b, h, q, k: (k < view.prefix[q]) | ((view.start[q] <= k) & (k < view.end[q]))
    mask = create_block_mask(rule, None, None, *2 * [view.prefix.shape[-1]], device=device)
    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def contenders(view, causal_length, device):
    """{name: function of q, k, v}. The floor: plain causal attention of the clean sequence alone."""
    sdpa, used = F.scaled_dot_product_attention, max(int(view.end.max()), int(view.prefix.max()))
    mask = view.dense(used)
    fresh = lambda: View(view.prefix, view.start, view.end)  # its plan is worked out anew, as in every training step
    found = {"block_attention": lambda q, k, v: block_attention(q, k, v, fresh()),
             "SDPA, dense mask": lambda q, k, v: sdpa(q, k[:, :, :used], v[:, :, :used], mask)}
    if causal_length:
        found["SDPA, causal, clean half"] = lambda *qkv: sdpa(*(x[:, :, :causal_length] for x in qkv), is_causal=True)
        if device.type == "cuda":
            found["flex_attention"] = flex(view, device)
    return found


def measure(run, device):
    """(seconds, peak extra MiB, on a GPU) of one call."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else math.nan


def compare(title, shape, view, n_keys, causal_length, tokens, backward, dtype, device, repeats):
    """Print one table: all contenders on q, k, v of shape (N, H, ., D), medians of interleaved calls."""
    rows, heads, D = shape
    lengths = view.prefix.shape[-1], n_keys, n_keys
    q, k, v = (torch.randn(rows, heads, n, D, device=device, dtype=dtype, requires_grad=backward) for n in lengths)
    runs, results = contenders(view, causal_length, device), {}
    call = lambda f: f(q, k, v).sum().backward() if backward else f(q, k, v)
    for f in runs.values():
        call(f)
    for _ in range(repeats):
        for name, f in runs.items():
            results.setdefault(name, []).append(measure(lambda: call(f), device))
    print(f"\n{title}, {'forward + backward' if backward else 'forward'}")
    base = sorted(results["block_attention"])[repeats // 2][0]
    for name, measured in results.items():
        seconds = sorted(measured)[repeats // 2][0]
        pairs = causal_length * (causal_length + 1) / 2 if "causal" in name else float(view.dense(n_keys).sum())
        flops = 4 * D * pairs * rows * heads * (3.5 if backward else 1)  # of visible work
        print(f"  {name:26} {1e3 * seconds:9.2f} ms  speed {base / seconds:5.2f}  {rows * tokens / seconds:12,.0f} tokens/s  "
              f"{flops / seconds / 1e12:7.3f} TFLOP/s  {max(m for _, m in measured):7.0f} MiB")


def benchmark(device, dtype, repeats):
    print(f"{device}, {dtype}, torch {torch.__version__}; medians of {repeats} interleaved calls; speed: block_attention = 1")
    for rows, heads, L, S in ((8, 12, 1024, 16), (8, 6, 1024, 16), (8, 6, 256, 16), (64, 6, 32, 16)):
        view = train_view(L, S, device=device)
        for backward in (False, True):
            title = f"training, N {rows}, H {heads}, L {L}, S {S}, D 64"
            compare(title, (rows, heads, 64), view, 2 * L, L, L, backward, dtype, device, repeats)
    for rows, cached, S in ((1, 1008, 16), (16, 1008, 16), (16, 500, 1)):
        view = denoise_view(torch.tensor(cached, device=device), S, S)
        title = f"cached, N {rows}, H 12, {cached} keys, S {S}, D 64"
        compare(title, (rows, 12, 64), view, 2048, None, S, False, dtype, device, repeats)


if __name__ == "__main__":
    if torch.cuda.is_available():
        benchmark(torch.device("cuda"), torch.bfloat16, 50)
    else:
        benchmark(torch.device("cpu"), torch.float32, 7)
