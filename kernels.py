"""Block-causal attention, from one rule: query i sees keys [0, prefix_i) and keys [start_i, end_i).

Read it top to bottom: `View` states the rule, its three makers cover training, generation and verification,
`block_attention` computes it: on the CPU in plain PyTorch, a chunk of queries against just the keys in its two
ranges; on an NVIDIA GPU with three Triton kernels (forward; dq; dk and dv) after FlashAttention-2
(Dao 2023, arXiv 2307.08691), which skip the tiles that nobody sees and mask only the tiles that need it.

The bounds are data, not code: one compiled kernel serves every block size and every mode.

    python kernels.py           # benchmark: side by side, interleaved, medians, ratios
"""
import math
import statistics
from dataclasses import dataclass, field
from functools import partial
from timeit import timeit

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: the PyTorch path serves
    triton = None

CHUNK = 64  # queries a chunk on the PyTorch path, at least
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


def make_mask(view):
    """The rule for SDPA, up to the last key that anybody sees: (Q, keys), or (N, 1, Q, keys), the same for every head."""
    mask = view.dense(int(torch.maximum(view.prefix, view.end).max()))
    return mask[:, None] if mask.dim() == 3 else mask


def make_piece(start, end, dtype):
    """The hull of the key ranges [start, end) of some queries: its slice, the mask to add to the scores (None: all see
    all), and which queries see nothing of it (None: every one sees something). None if that holds for all."""
    some = start < end
    if not some.any():
        return None
    keys = torch.arange(int(start[some].min()), int(end[some].max()), device=start.device)
    seen = (start[..., None] <= keys) & (keys < end[..., None])  # (q, keys) or (N, q, keys)
    mask = torch.zeros(seen.shape, dtype=dtype, device=start.device).masked_fill(~seen, -math.inf)
    mask, blind = (x if start.dim() == 1 else x[:, None] for x in (mask, ~some))  # the same for every head
    return slice(int(keys[0]), int(keys[-1]) + 1), None if seen.all() else mask, None if some.all() else blind


def make_chunks(view, n_queries, dtype):
    """[(slice of the queries, its pieces)]: a chunk's prefixes are one piece, its own ranges the other."""
    size, chunks = max(CHUNK, n_queries // 16), []
    for begin in range(0, n_queries, size):
        rule = view.rows(begin, begin + size)
        prefixes = make_piece(torch.zeros_like(rule.prefix), rule.prefix, dtype)
        own = make_piece(torch.maximum(rule.start, rule.prefix), rule.end, dtype)
        chunks.append((slice(begin, begin + size), [piece for piece in (prefixes, own) if piece]))
    return chunks


class ChunkedAttention(torch.autograd.Function):
    """Every chunk attends to its pieces one by one, and the results are merged by their log-sum-exp, as FlashAttention
    merges tiles. Backward needs no merging: with the merged o and lse, each piece yields its share of the gradients."""

    # the kernels behind SDPA, by their internal names: the public function keeps the log-sum-exp to itself
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    @staticmethod
    def forward(ctx, q, k, v, chunks):
        o, lse = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        for rows, pieces in chunks:
            for keys, mask, blind in pieces:
                part, part_lse = ChunkedAttention.kernel(q[:, :, rows], k[:, :, keys], v[:, :, keys], attn_mask=mask)
                if blind is not None:
                    part_lse = part_lse.masked_fill(blind, -math.inf)
                weight = torch.sigmoid(part_lse - lse[:, :, rows]).nan_to_num(0)  # nan: blind to all so far
                o[:, :, rows].lerp_(part, weight[..., None].to(part.dtype))
                lse[:, :, rows] = torch.logaddexp(lse[:, :, rows], part_lse)
        ctx.save_for_backward(q, k, v, o, lse.masked_fill(lse == -math.inf, math.inf))  # exp(score - inf) = 0
        ctx.chunks = chunks
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        for rows, pieces in ctx.chunks:
            for keys, mask, _ in pieces:
                inputs = do[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], o[:, :, rows], lse[:, :, rows]
                parts = ChunkedAttention.kernel_backward(*inputs, 0.0, False, attn_mask=mask)
                for total, part in zip((dq[:, :, rows], dk[:, :, keys], dv[:, :, keys]), parts):
                    total += part
        return dq, dk, dv, None


def attention_torch(q, k, v, view):
    """block_attention in PyTorch: on a CPU each chunk of queries attends to just the keys in its two ranges. A short pass is
    fastest in one piece under a mask; so is everything on a GPU for which there is no Triton."""
    n_queries = q.shape[2]
    if n_queries > 2 * CHUNK and q.device.type == "cpu":
        return ChunkedAttention.apply(q, k, v, view.plan(q.dtype, lambda: make_chunks(view, n_queries, q.dtype)))
    mask = view.plan("mask", lambda: make_mask(view))
    return F.scaled_dot_product_attention(q, k[:, :, : mask.shape[-1]], v[:, :, : mask.shape[-1]], mask)


# ---------------------------------------------------------------------------------------------------------------------
# The rule in Triton


def tile_lists(view, n_keys):
    """Which tiles hold a visible pair: for each tile of queries, (R, tiles, 2 + others) int32: how many key tiles it sees
    as a whole, how many it sees at all, and their numbers, the whole ones first; and the transpose, for each tile of keys.
    R is 1, or N if the rows of the batch differ."""
    prefix, start, end = (x.reshape(-1, x.shape[-1], 1) for x in (view.prefix, view.start, view.end))
    first = torch.arange(0, n_keys, TILE, device=prefix.device)  # the key tiles (KT,)
    some = (first < prefix) | ((first < end) & (start < first + TILE) & (start < end))  # (R, Q, KT)
    whole = (first + TILE <= prefix) | ((start <= first) & (first + TILE <= end))
    pad = (0, 0, 0, -some.shape[1] % TILE)
    some = F.pad(some, pad, value=False).unflatten(1, (-1, TILE)).any(2)  # (R, QT, KT)
    whole = F.pad(whole, pad, value=True).unflatten(1, (-1, TILE)).all(2)
    state = some.int() + (some & whole).int()  # 0 nobody sees it, 1 masked, 2 whole

    def listed(state):
        counts = torch.stack([(state == 2).sum(-1), (state > 0).sum(-1)], -1)
        return torch.cat([counts, state.argsort(dim=-1, descending=True, stable=True)], -1).int()

    return listed(state), listed(state.transpose(1, 2))


if triton is not None:

    @triton.jit
    def load_tile(X, index, n, D: tl.constexpr):
        """The rows `index` of X (n, D); zeros behind the last."""
        return tl.load(X + index[:, None] * D + tl.arange(0, D)[None, :], mask=(index < n)[:, None], other=0.0)

    @triton.jit
    def store_tile(X, x, index, n, D: tl.constexpr):
        at = X + index[:, None] * D + tl.arange(0, D)[None, :]
        tl.store(at, x.to(X.dtype.element_ty), mask=(index < n)[:, None])

    @triton.jit
    def visible(BOUNDS, rows, keys, n_queries, n_keys):
        """The rule for one tile: (queries, keys) booleans. BOUNDS (Q, 3): prefix, start, end."""
        at = BOUNDS + tl.minimum(rows, n_queries - 1) * 3
        prefix, start, end = tl.load(at)[:, None], tl.load(at + 1)[:, None], tl.load(at + 2)[:, None]
        key = keys[None, :]
        return ((key < prefix) | ((start <= key) & (key < end))) & (key < n_keys) & (rows[:, None] < n_queries)

    @triton.jit
    def forward_kernel(Q, K, V, BOUNDS, LISTS, O, LSE, scale, n_queries, n_keys, heads, bounds_step, list_step, list_size,
                       D: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr):
        """o and log2-sum-exp2 of one tile of queries over every SPLITS-th of its key tiles (online softmax)."""
        tile, head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
        BOUNDS += head // heads * bounds_step
        LISTS += head // heads * list_step + tile * list_size
        rows = tile * TILE + tl.arange(0, TILE)
        q = load_tile(Q + head * n_queries * D, rows, n_queries, D)
        top = tl.full([TILE], float("-inf"), tl.float32)  # running maximum
        total = tl.zeros([TILE], tl.float32)  # running sum of 2^(score - top)
        acc = tl.zeros([TILE, D], tl.float32)
        begin = split
        for masked in tl.static_range(2):  # first the whole tiles, then the masked ones
            stop = tl.load(LISTS + masked)
            for i in range(begin, stop, SPLITS):
                keys = tl.load(LISTS + 2 + i) * TILE + tl.arange(0, TILE)
                if masked:
                    seen = visible(BOUNDS, rows, keys, n_queries, n_keys)
                    keys = tl.where(tl.max(seen.to(tl.int32), 0) > 0, keys, n_keys)  # the others may hold anything, even NaN
                k = load_tile(K + head * n_keys * D, keys, n_keys, D)
                v = load_tile(V + head * n_keys * D, keys, n_keys, D)
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
        part = split * tl.num_programs(1) + head
        store_tile(O + part * n_queries * D, acc / tl.where(total > 0, total, 1.0)[:, None], rows, n_queries, D)
        lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(LSE + part * n_queries + rows, lse, mask=rows < n_queries)

    @triton.jit
    def load_queries(Q, DO, LSE, DELTA, rows, n_queries, D: tl.constexpr):
        """What backward needs of a tile of queries: q, dL/do, log2-sum-exp2, and delta = dL/do . o."""
        lse = tl.load(LSE + rows, mask=rows < n_queries, other=0.0)
        delta = tl.load(DELTA + rows, mask=rows < n_queries, other=0.0)
        return load_tile(Q, rows, n_queries, D), load_tile(DO, rows, n_queries, D), lse, delta

    @triton.jit
    def tile_softmax(q, k, lse, scale, BOUNDS, rows, keys, n_queries, n_keys, masked: tl.constexpr):
        """p of one tile, recomputed from the log-sum-exp. With it, dL/dscore = p (do v' - delta)."""
        p = tl.exp2(tl.dot(q, tl.trans(k)) * scale - lse[:, None])
        if masked:
            p = tl.where(visible(BOUNDS, rows, keys, n_queries, n_keys), p, 0.0)
        return p

    @triton.jit
    def dq_kernel(Q, K, V, DO, LSE, DELTA, BOUNDS, LISTS, DQ, scale, n_queries, n_keys, heads, bounds_step, list_step,
                  list_size, D: tl.constexpr, TILE: tl.constexpr):
        """dq of one tile of queries: the forward's walk over its key tiles."""
        tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        BOUNDS += head // heads * bounds_step
        LISTS += head // heads * list_step + tile * list_size
        rows, at = tile * TILE + tl.arange(0, TILE), head * n_queries * D
        q, do, lse, delta = load_queries(Q + at, DO + at, LSE + at // D, DELTA + at // D, rows, n_queries, D)
        dq = tl.zeros([TILE, D], tl.float32)
        begin = 0
        for masked in tl.static_range(2):
            stop = tl.load(LISTS + masked)
            for i in range(begin, stop):
                keys = tl.load(LISTS + 2 + i) * TILE + tl.arange(0, TILE)
                k = load_tile(K + head * n_keys * D, keys, n_keys, D)
                v = load_tile(V + head * n_keys * D, keys, n_keys, D)
                p = tile_softmax(q, k, lse, scale, BOUNDS, rows, keys, n_queries, n_keys, masked)
                ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
                dq += tl.dot(ds.to(k.dtype), k)
            begin = stop
        store_tile(DQ + head * n_queries * D, dq * (scale * 0.6931471805599453), rows, n_queries, D)  # scale holds log2(e)

    @triton.jit
    def dkdv_kernel(Q, K, V, DO, LSE, DELTA, BOUNDS, LISTS, DK, DV, scale, n_queries, n_keys, heads, bounds_step,
                    list_step, list_size, D: tl.constexpr, TILE: tl.constexpr):
        """dk and dv of one tile of keys: a walk over the query tiles that see it (the transposed lists)."""
        tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
        BOUNDS += head // heads * bounds_step
        LISTS += head // heads * list_step + tile * list_size
        keys, at = tile * TILE + tl.arange(0, TILE), head * n_queries * D
        k = load_tile(K + head * n_keys * D, keys, n_keys, D)
        v = load_tile(V + head * n_keys * D, keys, n_keys, D)
        dk, dv = tl.zeros([TILE, D], tl.float32), tl.zeros([TILE, D], tl.float32)
        begin = 0
        for masked in tl.static_range(2):
            stop = tl.load(LISTS + masked)
            for i in range(begin, stop):
                rows = tl.load(LISTS + 2 + i) * TILE + tl.arange(0, TILE)
                q, do, lse, delta = load_queries(Q + at, DO + at, LSE + at // D, DELTA + at // D, rows, n_queries, D)
                p = tile_softmax(q, k, lse, scale, BOUNDS, rows, keys, n_queries, n_keys, masked)
                dv += tl.dot(tl.trans(p.to(do.dtype)), do)
                ds = p * (tl.dot(do, tl.trans(v)) - delta[:, None])
                dk += tl.dot(tl.trans(ds.to(q.dtype)), q)
            begin = stop
        store_tile(DK + head * n_keys * D, dk * (scale * 0.6931471805599453), keys, n_keys, D)
        store_tile(DV + head * n_keys * D, dv, keys, n_keys, D)


def launch(head_size):
    """Launch options for a head size: a larger tile needs more warps, or its registers spill."""
    return dict(D=head_size, TILE=TILE, num_warps=4 if head_size <= 64 else 8, num_stages=2)


def kernel_arguments(q, k, view):
    """(bounds, lists by query, lists by key, function of lists: the numbers) that the kernels need to know of a view."""

    def make():
        bounds = torch.stack([view.prefix, view.start, view.end], -1).int().contiguous()  # (Q, 3) or (N, Q, 3)
        return bounds, *tile_lists(view, k.shape[2])

    bounds, by_query, by_key = view.plan("tiles", make)
    own = bounds.dim() == 3  # the rows have views of their own
    shared = [math.log2(math.e) / math.sqrt(q.shape[3]), q.shape[2], k.shape[2], q.shape[1], q.shape[2] * 3 * own]
    return bounds, by_query, by_key, lambda lists: shared + [lists[0].numel() * own, lists.shape[2]]


def run_forward(q, k, v, view, splits):
    """o (N, H, Q, D) and the log2-sum-exp2 of the scores (N, H, Q), each of `splits` parts of the keys merged."""
    bounds, lists, _, numbers = kernel_arguments(q, k, view)
    n, h, n_queries, d = q.shape
    o = q.new_empty(splits, *q.shape, dtype=q.dtype if splits == 1 else torch.float32)
    lse = q.new_empty(splits, n, h, n_queries, dtype=torch.float32)
    grid = (lists.shape[1], n * h, splits)
    forward_kernel[grid](q, k, v, bounds, lists, o, lse, *numbers(lists), SPLITS=splits, **launch(d))
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
        bounds, by_query, by_key, numbers = kernel_arguments(q, k, ctx.view)
        do = do.contiguous()
        delta = (do.float() * o.float()).sum(-1)  # (N, H, Q)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        inputs, heads, options = (q, k, v, do, lse, delta, bounds), q.shape[0] * q.shape[1], launch(q.shape[3])
        dq_kernel[(by_query.shape[1], heads)](*inputs, by_query, dq, *numbers(by_query), **options)
        dkdv_kernel[(by_key.shape[1], heads)](*inputs, by_key, dk, dv, *numbers(by_key), **options)
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
    A query that sees nothing yields zeros. Keys and values behind the last that any query of any row sees may hold
    anything, even NaN; those before it must be finite on the CPU, where many queries share one hull of keys."""
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
    """(seconds of one call, the peak of its extra memory on a GPU in MiB)."""
    if device.type != "cuda":
        return timeit(run, number=1), math.nan
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.synchronize()
    seconds = timeit(lambda: (run(), torch.cuda.synchronize()), number=1)
    return seconds, (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(title, shape, view, n_keys, causal_length, tokens, backward, dtype, device, repeats):
    """Print one table: all contenders on q, k, v of shape (N, H, ., D), medians of interleaved calls."""
    rows, heads, D = shape
    lengths = view.prefix.shape[-1], n_keys, n_keys
    q, k, v = (torch.randn(rows, heads, n, D, device=device, dtype=dtype, requires_grad=backward) for n in lengths)
    call = lambda f: torch.autograd.grad(f(q, k, v).sum(), (q, k, v)) if backward else f(q, k, v)
    runs = {name: partial(call, f) for name, f in contenders(view, causal_length, device).items()}
    rounds = [{name: measure(run, device) for name, run in runs.items()} for _ in range(repeats + 1)][1:]  # the first warms up
    median = {name: statistics.median(results[name][0] for results in rounds) for name in runs}
    print(f"\n{title}, {'forward + backward' if backward else 'forward'}")
    for name, seconds in median.items():
        pairs = causal_length * (causal_length + 1) / 2 if "causal" in name else float(view.dense(n_keys).sum())
        flops = 4 * D * pairs * rows * heads * (3.5 if backward else 1)  # of visible work
        memory = f"  {rounds[0][name][1]:7.1f} MiB" if device.type == "cuda" else ""
        print(f"  {name:26} {1e3 * seconds:9.2f} ms  speed {median['block_attention'] / seconds:5.2f}  "
              f"{rows * tokens / seconds:12,.0f} tokens/s  {flops / seconds / 1e12:7.3f} TFLOP/s{memory}")


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
