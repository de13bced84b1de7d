"""BlockGen: one transformer that is an autoregressive model at block size 1 and a block diffusion model at any other.

The whole model, in the order in which it is used:
  random numbers   a draw depends on its key alone, so batches, processes and resumption cannot change it
  noise            masked and uniform: corrupt, the likelihood bound, the reverse step (exact, and sampled)
  transformer      pre-LN, rotary; trained on [clean | noisy] in one pass, sampled from one KV cache
  loss             one noise level a block, exact cross-entropy at block size 1
  checkpoints      ours, and the published ones

Notation: N rows, L = seq_len, S = block_size, V = vocab_size, K embedding rows (V, and a mask for masked noise), x0
clean tokens, xt noisy ones, t in (0, 1] the noise level, alpha(t) the probability that a token is still clean. Losses
are in nats per token.

BlockGen: Deschenaux & Gulcehre 2026, arXiv 2606.02241. Block diffusion: BD3-LM, arXiv 2503.09573.
"""
import json
import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import block_attention, causal, denoise_view, train_view, verify_view


@dataclass
class Config:
    vocab_size: int = 1024  # V, the data's tokens
    seq_len: int = 256  # L, the longest sequence
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0
    noise: str = "masked"  # or "uniform"
    token_causal: bool = True  # clean tokens see the clean tokens up to themselves; False: to the end of their block
    tied: bool = True  # the head is the embedding
    noisy_gain: float = 0.1  # where the learned gain on the embeddings of noisy tokens starts
    schedule: str = "linear"  # of alpha(t); or "cosine"
    ar: str = "paper"  # p(x_i | x_<i) is read from a noise token at position i; or "shift": from clean token i - 1

    def __post_init__(self):
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd ({self.n_embd}) must be an even multiple of n_head ({self.n_head})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if self.noise not in NOISES or self.schedule not in SCHEDULES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, schedule one of {', '.join(SCHEDULES)}")
        if self.ar not in ("paper", "shift"):
            raise ValueError(f"ar must be paper or shift, not {self.ar}")
        if self.ar == "shift" and not self.token_causal:
            raise ValueError("block-causal clean tokens see the next token: with token_causal=False, ar must be paper")


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers that depend on a key alone


def scramble(x):
    """A bijection of the 64-bit integers without visible pattern: SplitMix64's finalizer (Steele et al. 2014)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor  # int64 wraps around; the & makes the shift unsigned
    return x ^ (x >> 31 & (1 << 33) - 1)


def uniform(*key, device=None):
    """Uniform float64 numbers in [0, 1), a function of the key: ints or integer tensors, which broadcast.

    uniform(seed, rows[:, None], positions) is (N, L), and row 3 is the same whichever rows stand beside it."""
    x = torch.zeros((), dtype=torch.int64, device=device)
    for part in key:
        x = scramble(x + part - 7046029254386353131)
    return (x >> 11 & (1 << 53) - 1).double() * 2.0**-53


def draw(probs, u):
    """Sample from probs (..., V), normalized or not, by inverse CDF in float64. u (...) in [0, 1) -> tokens (...)."""
    cdf = probs.double().cumsum(-1)
    index = torch.searchsorted(cdf, (u * cdf[..., -1])[..., None].contiguous(), right=True)
    return index[..., 0].clamp(max=probs.shape[-1] - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Noise: how tokens are corrupted, what the network is charged for, how to step back


def linear(t):
    """alpha(t) = 1 - t, and its derivative."""
    return 1 - t, torch.full_like(t, -1.0)


def cosine(t):
    """alpha(t) = 1 - cos(pi/2 (1 - t)), and its derivative."""
    angle = math.pi / 2 * (1 - t)
    return 1 - torch.cos(angle), -math.pi / 2 * torch.sin(angle)


def cross_entropy(logits, x0):
    """-log p(x0) in nats, (...) from logits (..., V), in float32 at least: a bfloat16 softmax does not sum to 1."""
    return F.cross_entropy(logits.float().flatten(0, -2), x0.flatten(), reduction="none").view_as(x0)


class MaskedNoise:
    """Absorbing noise: a token survives with probability alpha, else becomes the mask (MDLM, arXiv 2406.07524)."""

    def __init__(self, vocab_size):
        self.vocab_size, self.mask, self.n_embeddings = vocab_size, vocab_size, vocab_size + 1

    def prior(self, shape, device=None, u=None):
        """Pure noise: all masks."""
        return torch.full(shape, self.mask, dtype=torch.int64, device=device)

    def corrupt(self, x0, alpha, u=None):
        """xt given x0, with alpha (broadcasts) and one uniform number a token."""
        u = torch.rand(x0.shape, dtype=torch.float64, device=x0.device) if u is None else u
        return torch.where(u < alpha, x0, self.mask)

    def charged(self, xt):
        """Where the loss can be other than zero."""
        return xt == self.mask

    def nelbo(self, logits, x0, xt, alpha, dalpha):
        """-alpha' / (1 - alpha) [xt = mask] (-log p(x0)), nats (...): MDLM, eq. 10, in continuous time."""
        return -dalpha / (1 - alpha) * (xt == self.mask) * cross_entropy(logits, x0)

    def posterior(self, probs, xt, alpha_s, alpha_t):
        """p(xs | xt) (..., K) for alpha_s > alpha_t if x0 ~ probs (..., V): a mask is revealed or stays, others stay."""
        reveal = (alpha_s - alpha_t) / (1 - alpha_t)
        masked = torch.cat([probs * reveal, torch.full_like(probs[..., :1], 1 - reveal)], -1)
        return torch.where((xt == self.mask)[..., None], masked, F.one_hot(xt, self.n_embeddings).to(probs))

    def step(self, probs, xt, alpha_s, alpha_t, u=None):
        """A draw from the posterior with one uniform number a token, without forming it."""
        u = torch.rand(xt.shape, dtype=torch.float64, device=xt.device) if u is None else u
        reveal = (alpha_s - alpha_t) / (1 - alpha_t)
        return torch.where((xt == self.mask) & (u < reveal), draw(probs, (u / reveal).clamp(max=1 - 2**-53)), xt)


class UniformNoise:
    """A token survives with probability alpha, else becomes any of the V, perhaps itself (Duo, arXiv 2506.10892)."""

    def __init__(self, vocab_size):
        self.vocab_size, self.mask, self.n_embeddings = vocab_size, None, vocab_size

    def prior(self, shape, device=None, u=None):
        """Pure noise: uniformly random tokens."""
        u = torch.rand(shape, dtype=torch.float64, device=device) if u is None else u
        return (u * self.vocab_size).long().expand(shape)

    def corrupt(self, x0, alpha, u=None):
        """xt given x0, with alpha (broadcasts) and one uniform number a token."""
        u = torch.rand(x0.shape, dtype=torch.float64, device=x0.device) if u is None else u
        rest = ((u - alpha) / (1 - alpha)).clamp(0, 1 - 2**-53)  # uniform again, given that the token did not survive
        return torch.where(u < alpha, x0, (rest * self.vocab_size).long())

    def charged(self, xt):
        """Where the loss can be other than zero: everywhere."""
        return torch.ones_like(xt, dtype=torch.bool)

    def nelbo(self, logits, x0, xt, alpha, dalpha):
        """The bound of UDLM (arXiv 2412.10193) and Duo, nats (...). With i = xt, xbar = V alpha onehot(x0) + 1 - alpha
        and pbar = V alpha p + 1 - alpha it is the divergence between the true and the modeled rates of jumping back,
        -alpha' / (V alpha) [ sum_j xbar_j / xbar_i log(pbar_i xbar_j / (pbar_j xbar_i)) - V / xbar_i + V / pbar_i ].
        log1p keeps every term accurate as alpha goes to 0, where the bracket vanishes faster than alpha."""
        V, alpha = self.vocab_size, alpha.clamp(min=1e-6)
        p = logits.float().softmax(-1)
        log_pbar = torch.log1p(alpha[..., None] * (V * p - 1))  # (..., V)
        at = lambda x, i: x.gather(-1, i[..., None])[..., 0]
        log_on, log_off = torch.log1p(alpha * (V - 1)), torch.log1p(-alpha)  # log xbar at x0, and elsewhere
        log_xbar = torch.where(x0 == xt, log_on, log_off)  # (...) at xt
        xbar = log_xbar.exp()
        hit = (x0 == xt).to(p.dtype)
        difference = V * V * alpha * (at(p, xt) - hit) / (xbar * at(log_pbar, xt).exp())  # V / xbar_i - V / pbar_i
        # sum_j xbar_j log(xbar_j / pbar_j): V alpha of the weight lies on x0, 1 - alpha on every token
        on_x0, on_all = log_on - at(log_pbar, x0), log_on + (V - 1) * log_off - log_pbar.sum(-1)
        divergence = V * alpha * on_x0 + (1 - alpha) * on_all
        total = (V * (at(log_pbar, xt) - log_xbar) + divergence) / xbar
        return -dalpha / (V * alpha) * (total - difference)

    def posterior(self, probs, xt, alpha_s, alpha_t):
        """p(xs | xt) (..., V) for alpha_s > alpha_t, if x0 ~ probs (..., V)."""
        keep, fresh, random = self.mixture(probs, xt, alpha_s, alpha_t)
        kept = keep[..., None] * F.one_hot(xt, self.vocab_size)
        return (kept + fresh * probs + random / self.vocab_size) / (keep + fresh + random)[..., None]

    def mixture(self, probs, xt, alpha_s, alpha_t):
        """The posterior is a mixture: keep xt, draw from probs, draw uniformly. Its three weights, not normalized."""
        ratio = alpha_t / alpha_s
        keep = self.vocab_size * alpha_t * probs.gather(-1, xt[..., None])[..., 0] + ratio - alpha_t
        return keep, alpha_s - alpha_t, (1 - ratio) * (1 - alpha_s)

    def step(self, probs, xt, alpha_s, alpha_t, u=None):
        """A draw from the posterior with one uniform number a token: it picks a part of the mixture, its rest the token."""
        u = torch.rand(xt.shape, dtype=torch.float64, device=xt.device) if u is None else u
        keep, fresh, random = self.mixture(probs.double(), xt, alpha_s, alpha_t)
        u = u * (keep + fresh + random)
        inside = lambda begin, width: ((u - begin) / max(width, 1e-300)).clamp(0, 1 - 2**-53)
        anything = (inside(keep + fresh, random) * self.vocab_size).long()
        token = torch.where(u < keep + fresh, draw(probs, inside(keep, fresh)), anything)
        return torch.where(u < keep, xt, token)


NOISES = {"masked": MaskedNoise, "uniform": UniformNoise}
SCHEDULES = {"linear": linear, "cosine": cosine}


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


@dataclass
class Cache:
    """Keys and values of committed tokens, preallocated. The slots behind a row's length are scratch for the tokens of
    a pass; committing them is moving the length."""

    keys: torch.Tensor  # (layers, N, H, slots, D)
    values: torch.Tensor
    length: torch.Tensor  # (N,) committed tokens a row
    states: torch.Tensor | None  # (N, 1 + n, d) of the last token committed, and of the n that verify saw behind it
    base: torch.Tensor  # (N,) the length to which states[:, 0] belongs

    def state(self):
        """The state of the last committed token, (N, 1, d): under ar="shift" it predicts the next one."""
        return self.states[torch.arange(len(self.length)), self.length - self.base][:, None]

    def write(self, layer, k, v):
        """Put k and v (N, H, Q, D) behind the committed ones; return all slots of the layer (N, H, slots, D)."""
        row = torch.arange(k.shape[0], device=k.device)[:, None]
        slot = self.length[:, None] + torch.arange(k.shape[2], device=k.device)  # (N, Q)
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            store[row, :, slot] = new.transpose(1, 2).to(store.dtype)  # (N, Q, H, D)
        return self.keys[layer], self.values[layer]


def rotate(x, angles):
    """Rotary positions (arXiv 2104.09864), half-split. x (N, H, Q, D), angles (Q, D / 2) or (N, 1, Q, D / 2)."""
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def lone(block_size, length):
    """Which tokens are a block of their own, (N, L): all at block size 1, and a last one that is left over."""
    size, position = block_size[:, None], torch.arange(length, device=block_size.device)
    return (size == 1) | ((position == length - 1) & (position % size == 0))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.n_head, self.dropout = config.n_head, config.dropout
        self.norm1 = nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d)
        self.mlp_in = nn.Linear(d, 4 * d)
        self.mlp_out = nn.Linear(4 * d, d)

    def forward(self, x, angles, view, layer, cache):
        N, Q, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(N, Q, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # (N, H, Q, D) each
        q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            k, v = cache.write(layer, k, v)
            q = q.to(k.dtype)
        o = block_attention(q, k, v, view).transpose(1, 2).reshape(N, Q, d)
        x = x + F.dropout(self.attn_out(o), self.dropout, self.training)
        h = F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh")
        return x + F.dropout(self.mlp_out(h), self.dropout, self.training)


class BlockGen(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.noise = config, NOISES[config.noise](config.vocab_size)
        d, head_size = config.n_embd, config.n_embd // config.n_head
        self.embedding = nn.Embedding(self.noise.n_embeddings, d)
        self.noisy_gain = nn.Parameter(torch.tensor(config.noisy_gain))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(d)
        if config.ar == "shift":  # a start token would see itself alone: what it says is a constant, this
            self.first = nn.Parameter(torch.zeros(d))
        self.head = nn.Linear(d, config.vocab_size)
        frequency = 10000 ** -(torch.arange(0, head_size, 2) / head_size)
        angles = torch.arange(2 * config.seq_len)[:, None] * frequency  # (2 L, D / 2): a draft may run over the end
        self.register_buffer("angles", angles, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Unit-variance embeddings, small matrices, residual branches scaled with depth as in GPT-2, heads that look back."""
        d = self.config.n_embd
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("attn_out.weight", "mlp_out.weight"))
                nn.init.normal_(p, std=0.5 * d**-0.5 / (math.sqrt(2 * self.config.n_layer) if residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for block in self.blocks:
            self.look_back(block)
        nn.init.normal_(self.embedding.weight, std=d**-0.5 if self.config.tied else 1)
        if self.config.tied:
            del self.head.weight
        else:
            nn.init.zeros_(self.head.weight)

    def look_back(self, block):
        """Let heads start with a taste for the previous token, from none in the last head to a strong one in the first: a
        noisy position learns nothing before it finds its neighbors, and that is a plateau of hundreds of steps.

        The norm's output sums to zero, so what a weight row has in common over its columns acts on the norm's bias alone.
        With a bias of 1 that is a constant, in query and key. The key's is rotated by one position, so that the two match
        best at distance 1."""
        heads, angle = self.config.n_head, self.angles[1]
        strength = torch.linspace(2, 0, heads)[:, None]
        query = torch.cat([torch.ones_like(angle), torch.zeros_like(angle)]) * strength  # (H, D)
        key = torch.cat([angle.cos(), angle.sin()]) * strength
        constant = torch.cat([query.flatten(), key.flatten(), torch.zeros(self.config.n_embd)])[:, None]  # (3 d, 1)
        weight = block.qkv.weight
        weight += constant / weight.shape[1] - weight.mean(1, keepdim=True)
        nn.init.ones_(block.norm1.bias)

    def trunk(self, tokens, n_clean, positions, view, cache=None):
        """tokens (N, Q), the first n_clean of them clean, at positions (Q,) or (N, 1, Q) -> states (N, Q, d)."""
        x = self.embedding(tokens) * (math.sqrt(self.config.n_embd) if self.config.tied else 1)
        noisy = torch.arange(tokens.shape[1], device=tokens.device)[:, None] >= n_clean
        x = torch.where(noisy, x * self.noisy_gain, x)
        angles = self.angles[positions]
        for layer, block in enumerate(self.blocks):
            x = block(x, angles, view, layer, cache)
        return self.norm(x)

    def logits(self, states):
        """(..., d) -> (..., V)"""
        weight = self.embedding.weight[: self.config.vocab_size] if self.config.tied else self.head.weight
        return F.linear(states, weight, self.head.bias)

    def hidden(self, x0, xt, block_size):
        """The states (N, L, d) that predict x0 (N, L) at block sizes (N,); and under ar="shift" those at block size 1, else None.

        A noisy token speaks for its own position, in the light of its block and of the clean blocks before it. Under
        ar="shift" the clean token before it speaks for a lone token; if all are alone, the noisy half is left out."""
        N, L = x0.shape
        shift, alone = self.config.ar == "shift", lone(block_size, L)
        xt = xt[:, :0] if shift and alone.all() else xt
        positions = torch.arange(L, device=x0.device).repeat(2)[: L + xt.shape[1]]
        view = train_view(L, block_size, self.config.token_causal, x0.device).rows(0, len(positions))
        clean, noisy = self.trunk(torch.cat([x0, xt], 1), L, positions, view).tensor_split([L], 1)
        if not shift:
            return noisy, None
        ar = torch.cat([self.first.to(clean).expand(N, 1, -1), clean[:, :-1]], 1)
        return torch.where(alone[..., None], ar, noisy) if xt.shape[1] else ar, ar

    def forward(self, x0, xt, block_size):
        """Clean x0 and noisy xt (N, L), block_size an int or (N,) -> logits (N, L, V) of x0 at every noisy position."""
        block_size = torch.as_tensor(block_size, device=x0.device).expand(len(x0))
        return self.logits(self.hidden(x0, xt, block_size)[0])

    def new_cache(self, n_rows, length=None):
        """An empty cache for n_rows rows of up to length tokens (seq_len), with as many scratch slots."""
        c, like = self.config, self.head.bias
        shape = (c.n_layer, n_rows, c.n_head, 2 * (length or c.seq_len), c.n_embd // c.n_head)
        autocast = torch.is_autocast_enabled(like.device.type)
        dtype = torch.get_autocast_dtype(like.device.type) if autocast else like.dtype
        keys, values = (torch.zeros(shape, dtype=dtype, device=like.device) for _ in range(2))
        nothing = torch.zeros(n_rows, dtype=torch.int64, device=like.device)
        return Cache(keys, values, nothing, self.first.expand(n_rows, 1, -1) if c.ar == "shift" else None, nothing)

    def denoise(self, xt, cache, commit=None, block_size=None):
        """Logits (N, n, V) of a noisy block xt (N, n) behind the cache, to which the same pass first commits clean tokens
        (N, c). A lone token is the AR side's: under ar="shift" the last committed token predicts it, whatever xt.
        block_size matters to a block-causal model alone: the blocks of the committed tokens (default: one)."""
        commit = xt[:, :0] if commit is None else commit
        by_state = self.config.ar == "shift" and xt.shape[1] == 1
        xt = xt[:, :0] if by_state else xt
        c, n = commit.shape[1], xt.shape[1]
        if c + n:
            block_size = None if self.config.token_causal else block_size or c or 1
            positions = cache.length[:, None, None] + torch.arange(c + n, device=xt.device)  # (N, 1, c + n)
            view = denoise_view(cache.length, c, n, block_size)
            states = self.trunk(torch.cat([commit, xt], 1), c, positions, view, cache)
            cache.length = cache.length + c
        if c:
            cache.states, cache.base = states[:, c - 1 : c], cache.length
        return self.logits(cache.state() if by_state else states[:, c:])

    def verify(self, x, cache, noise=None):
        """AR logits (N, n, V) of proposed tokens x (N, n) in one pass: at i, p(x_i | cache, x_<i). Under ar="paper" they are
        read from a noise token at the position of x_i (noise (N, n) says which; by default a fresh draw). The keys and
        values of x stay in the slots behind the cache: to accept the first k tokens, add k to cache.length."""
        n = x.shape[1]
        positions = cache.length[:, None, None] + torch.arange(n, device=x.device)  # (N, 1, n)
        if self.config.ar == "shift":
            states = self.trunk(x, n, positions, causal(cache.length[:, None], n), cache)
            cache.states, cache.base = torch.cat([cache.state(), states], 1), cache.length
            return self.logits(cache.states[:, :n])
        noise = self.noise.prior(x.shape, x.device) if noise is None else noise
        view = verify_view(cache.length, n)
        states = self.trunk(torch.cat([x, noise], 1), n, positions.repeat(1, 1, 2), view, cache)
        return self.logits(states[:, n:])


def find_device(name):
    """The device of a --device flag: auto is cuda where there is one, else cpu. Raises ValueError."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device={name}: there is no such device here") from None
    return device


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def noise_levels(u, row, block_size, length, t_min=1e-3):
    """A noise level for each block, stratified over all blocks of a batch: t (N, L), constant in a block.

    A row with B blocks takes one level from each of B strata, at the place in the stratum that row (N,) in [0, 1) says, so
    that rows 0/N, 1/N, ... tile [0, 1). u (N, 2): u[:, 0], the same for the batch, shifts all levels; u[:, 1] turns a
    row's strata, so that a level has no favorite place."""
    size = block_size[:, None]
    n_blocks = (length + size - 1) // size  # (N, 1)
    block = torch.arange(length, device=size.device) // size + (u[:, 1:] * n_blocks).long()
    level = (u[:, :1] + (block + row[:, None]) / n_blocks) % 1  # (N, L)
    return t_min + (1 - t_min) * level


def token_losses(model, x0, block_size, t, u, objective="nelbo", ar_weight=0.0, chunk=2**25):
    """Nats per token, (N, L): corrupt, predict, charge.

    x0 (N, L), block_size (N,), noise level t (N, L), u (N, L) uniform numbers. Blocks of one token get pure noise and
    plain cross-entropy: the exact autoregressive likelihood. objective: "nelbo", or "ce", masked noise without weights.
    ar_weight: under ar="shift", the share of that likelihood in the loss of every row; the clean half yields it anyway.
    The head runs only where there is something to charge, in parts of at most `chunk` logits, to bound the memory."""
    noise = model.noise
    alpha, dalpha = SCHEDULES[model.config.schedule](t)
    ar = lone(block_size, x0.shape[1])
    alpha = torch.where(ar, 0.0, alpha)
    xt = noise.corrupt(x0, alpha, u)
    states, ar_states = model.hidden(x0, xt, block_size)

    def charge(states, x0, xt, alpha, dalpha, ar):
        logits = model.logits(states)
        ce = cross_entropy(logits, x0)
        return ce if objective == "ce" or ar.all() else torch.where(ar, ce, noise.nelbo(logits, x0, xt, alpha, dalpha))

    def losses(states, where, ar):
        """charge where there is something to charge, in parts; (N, L)."""
        rows = max(1, chunk // model.config.vocab_size)
        inputs = states[where], x0[where], xt[where], alpha[where].float(), dalpha[where].float(), ar[where]  # (M, ...) each
        parts = list(zip(*(x.split(rows) for x in inputs)))
        if len(parts) > 1 and torch.is_grad_enabled():  # keep the states, not the logits: backward computes them again
            found = [checkpoint(charge, *part, use_reentrant=False) for part in parts]
        else:
            found = [charge(*part) for part in parts]
        charged = torch.cat(found) if found else states[:0, 0, 0].float()
        return torch.zeros(x0.shape, device=x0.device).masked_scatter(where, charged)

    total = losses(states, noise.charged(xt), ar)
    if ar_weight and ar_states is not None:
        everywhere = torch.ones_like(ar)
        total = torch.lerp(total, losses(ar_states, everywhere, everywhere), ar_weight)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(path, **content):
    """Write atomically: a crash leaves the old file or the new one, never half of either."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_checkpoint(path, device="cpu"):
    """The raw dict of a checkpoint of ours. Raises ValueError (no checkpoint) or OSError (no such file)."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such checkpoint (python train.py makes one)")
    try:
        content = torch.load(path, map_location=device, weights_only=True)  # weights_only: loading cannot run code
        assert {"config", "model"} <= content.keys()
    except Exception as error:
        raise ValueError(f"{path} is not a BlockGen checkpoint, or is damaged ({type(error).__name__})") from None
    return content


def load_checkpoint(path, device="cpu", noise=None):
    """(model in evaluation mode, everything else in the file). path: a .pt file of ours, of which the averaged weights are
    taken; or, in the layout of the published checkpoints, a folder or hf:org/repo/subfolder, and their kind of noise."""
    path = str(path)
    if path.startswith("hf:") or os.path.isdir(path):
        return load_published(path, device, noise)
    content = read_checkpoint(path, device)
    model = BlockGen(Config(**content["config"]))
    load_weights(model, content.get("ema") or content["model"], path)
    return model.to(device).eval(), {k: v for k, v in content.items() if k not in ("model", "ema", "optimizers")}


def load_weights(model, weights, path):
    """load_state_dict, but what does not fit is one line (ValueError)."""
    check_shapes({k: tuple(v.shape) for k, v in model.state_dict().items()}, weights, path)
    model.load_state_dict(weights)


def check_shapes(expected, weights, path):
    """Raise ValueError unless the weights are all there, of the expected shapes, finite, and no others."""
    wrong = [f"missing {k}" for k in expected.keys() - weights.keys()]
    wrong += [f"unexpected {k}" for k in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        if tuple(weights[name].shape) != expected[name]:
            wrong.append(f"{name} has shape {tuple(weights[name].shape)}, not {expected[name]}")
        elif not weights[name].isfinite().all():
            wrong.append(f"{name} is not finite")
    if wrong:
        raise ValueError(f"{path} does not fit the model: {', '.join(sorted(wrong))}")


def read_published(path):
    """(config dict, tensors) of config.json and model.safetensors in a folder or on the Hugging Face hub."""
    try:
        from safetensors.torch import load_file

        if path.startswith("hf:"):
            from huggingface_hub import snapshot_download

            org, repo, *folder = path[3:].split("/")
            files = ["/".join([*folder, name]) for name in ("config.json", "model.safetensors")]
            path = os.path.join(snapshot_download(f"{org}/{repo}", allow_patterns=files), *folder)
    except ImportError as error:
        raise ImportError(f"published checkpoints need {error.name}: pip install {error.name}") from None
    for name in ("config.json", "model.safetensors"):
        if not os.path.isfile(os.path.join(path, name)):
            raise FileNotFoundError(f"{path} is no published checkpoint: it has no {name}")
    try:
        with open(os.path.join(path, "config.json")) as file:
            return json.load(file), load_file(os.path.join(path, "model.safetensors"))
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def published_shapes(K, d, c, heads, layers):
    """{name: shape} of every tensor in a published checkpoint."""
    linear = lambda name, rows, columns: {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    shapes = {"vocab_embed.embedding": (K, d), "rotary_emb.inv_freq": (d // heads // 2,)}
    shapes |= linear("sigma_map.mlp.0", c, 256) | linear("sigma_map.mlp.2", c, c)
    shapes |= {"output_layer.norm_final.weight": (d,)} | linear("output_layer.linear", K, d)
    shapes |= linear("output_layer.adaLN_modulation", 2 * d, c)
    for i in range(layers):
        b = f"blocks.{i}"
        shapes |= {f"{b}.norm1.weight": (d,), f"{b}.attn_qkv.weight": (3 * d, d), f"{b}.attn_out.weight": (d, d)}
        shapes |= {f"{b}.norm2.weight": (d,)} | linear(f"{b}.mlp.0", 4 * d, d) | linear(f"{b}.mlp.2", d, 4 * d)
        shapes |= linear(f"{b}.adaLN_modulation", 6 * d, c)
    return shapes


def fold_published(w, V, layers):
    """Our weights from theirs. Their network is a DiT whose time condition is always that of sigma = 0: adaLN is constant,
    and folds exactly, scale and shift into the LayerNorms, the gates into the rows of the projections before them."""
    linear = lambda x, name: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
    sigma = torch.cat([torch.ones(128), torch.zeros(128)]).double()  # cosines and sines of 0
    condition = F.silu(linear(F.silu(linear(sigma, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
    shift, scale = linear(condition, "output_layer.adaLN_modulation").chunk(2)
    ours = {"embedding.weight": w["vocab_embed.embedding"], "noisy_gain": torch.tensor(1.0)}
    ours |= {"norm.weight": w["output_layer.norm_final.weight"] * (1 + scale), "norm.bias": shift}
    ours |= {f"head.{part}": w[f"output_layer.linear.{part}"][:V] for part in ("weight", "bias")}  # without the mask's row
    for i in range(layers):
        b = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(condition, f"{b}.adaLN_modulation").chunk(6)
        ours |= {f"{b}.norm1.weight": w[f"{b}.norm1.weight"] * (1 + scale1), f"{b}.norm1.bias": shift1}
        ours |= {f"{b}.qkv.weight": w[f"{b}.attn_qkv.weight"]}
        ours |= {f"{b}.attn_out.weight": gate1[:, None] * w[f"{b}.attn_out.weight"]}
        ours |= {f"{b}.norm2.weight": w[f"{b}.norm2.weight"] * (1 + scale2), f"{b}.norm2.bias": shift2}
        ours |= {f"{b}.mlp_in.weight": w[f"{b}.mlp.0.weight"], f"{b}.mlp_in.bias": w[f"{b}.mlp.0.bias"]}
        ours |= {f"{b}.mlp_out.weight": gate2[:, None] * w[f"{b}.mlp.2.weight"]}
        ours |= {f"{b}.mlp_out.bias": gate2 * w[f"{b}.mlp.2.bias"]}
    return {k: v.float() for k, v in ours.items()}


def load_published(path, device, noise):
    """load_checkpoint for the published layout."""
    config, w = read_published(path)
    try:
        d, c, layers, heads, length = (config[k] for k in ("hidden_size", "cond_dim", "n_blocks", "n_heads", "length"))
    except KeyError as error:
        raise ValueError(f"{path}: config.json has no {error}") from None
    K = len(w.get("vocab_embed.embedding", ()))
    noise = noise or {50257: "uniform", 50258: "masked"}.get(K)  # GPT-2's vocabulary, without and with a mask
    if noise is None:
        raise ValueError(f"{path} has {K} embeddings: is the last the mask? Say --noise=masked or --noise=uniform")
    V, causal = K - (noise == "masked"), bool(config.get("x0_causal", True))
    check_shapes(published_shapes(K, d, c, heads, layers), w, path)
    model = BlockGen(Config(V, length, layers, heads, d, noise=noise, token_causal=causal, tied=False, noisy_gain=1.0,
                            ar="paper"))
    if not torch.allclose(w["rotary_emb.inv_freq"].float(), model.angles[1], rtol=1e-4):
        raise ValueError(f"{path}: rotary_emb.inv_freq is not that of base 10000")
    load_weights(model, fold_published({k: v.double() for k, v in w.items()}, V, layers), path)
    tokenizer = {"kind": "gpt2", "vocab_size": 50257, "end": 50256} if V == 50257 else None
    meta = {"tokenizer": tokenizer, "vocab_size": V}
    return model.to(device).eval(), {"config": asdict(model.config), "meta": meta, "args": {}, "step": 0}
