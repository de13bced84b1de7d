"""BlockGen: one transformer that is an autoregressive (AR) model at block size 1, and a block
diffusion model at any other. It trains on a clean and a noisy copy of a text side by side.
Who sees whom is the only subtle thing. For four tokens and block size 2:

                     clean      noisy
                   1 2 3 4    1 2 3 4
    clean token 1  x                      a clean token sees the tokens up to itself, whatever
                2  x x                    the block size, so that one cache of keys and values
                3  x x x                  serves every block size
                4  x x x x
    noisy token 1             x x         a noisy token sees its own block, which is noisy,
                2             x x
                3  x x            x x     and the clean tokens before that block
                4  x x            x x

In this file: the settings, a layer of the transformer, the noise, the model with its loss and
generation with the cache; then initialization, random numbers, checkpoints, published weights.

Notation: N rows, L = seq_len, S = block_size, V = vocab_size, d = n_embd, H heads of D; Q queries,
T keys; n tokens of the block at hand, c that are committed to the cache with it. x0 clean tokens,
xt noisy ones, t in (0, 1] the noise level, alpha(t) the probability that a token is still clean.
NELBO is the negative evidence lower bound: an upper bound on -log p(x0). Losses are in nats per
token.

BlockGen: Deschenaux & Gulcehre 2026, arXiv 2606.02241. Block diffusion: BD3-LM, arXiv 2503.09573.

    python blockgen.py FOLDER OUT.pt     # converts published weights
"""
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from functools import partial

# How long OpenMP's threads spin before they sleep. With its default everything is several times
# slower on a machine whose cores are busy with something else. It is read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import block_attention, denoise_view, train_view, verify_view
from prepare_data import check_settings, run_script  # of its section "The command line"


@dataclass
class Config:
    """A model. Each field with a comment is a flag of train.py: the comment is its --help, and says
    what is allowed (see check_settings). vocab_size is V, the number of tokens of the data."""

    vocab_size: int = 1024
    seq_len: int = 128  # L, the longest sequence, at least 2
    n_layer: int = 4  # layers, at least 1
    n_head: int = 4  # attention heads, at least 1
    n_embd: int = 128  # width, at least 1
    dropout: float = 0.0  # of what attention and MLP add, at least 0, at most 0.99
    noise: str = "masked"  # kind of noise: masked | uniform
    schedule: str = "linear"  # how alpha(t), the share of clean tokens, falls: linear | cosine
    ar: str = "shift"  # shift | paper: at block size 1 clean token i - 1 predicts i, or noise at i
    token_causal: bool = True  # clean tokens see up to themselves; False: to their block's end
    tied: bool = True  # the output weights are the embedding
    noisy_gain: float = 0.1  # initial value of the learned gain on noisy tokens' embeddings

    def __post_init__(self):
        check_settings(self)
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd ({self.n_embd}) must be an even multiple of n_head")
        if self.ar == "shift" and not self.token_causal:
            raise ValueError("with token_causal=False clean tokens see ahead: ar must be paper")


# ----------------------------------------------------------------------------------------------
# A layer of the transformer: pre-LN, rotary positions


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864), half-split: x (..., Q, D), cos and sin (Q, D / 2)."""
    a, b = x.chunk(2, -1)  # (..., Q, D / 2)
    rotated = [a * cos - b * sin, b * cos + a * sin]
    return torch.cat(rotated, -1).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config, layer):
        super().__init__()
        d = config.n_embd
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = nn.Dropout(config.dropout)
        self.norm1 = nn.LayerNorm(d)
        self.attn_qkv = nn.Linear(d, 3 * d, bias=False)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(
            nn.Linear(d, 4 * d),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * d, d),
        )

    def forward(self, x, cos, sin, view, cache=None):
        N, Q, d = x.shape
        qkv = self.attn_qkv(self.norm1(x))  # (N, Q, 3 d)
        qkv = qkv.view(N, Q, 3, self.n_head, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, N, H, Q, D)
        q, k = rotate(qkv[:2], cos, sin)
        v = qkv[2]
        if cache is not None:
            k, v = cache.write(self.layer, k, v)
        o = block_attention(q, k, v, view)  # (N, H, Q, D)
        o = o.transpose(1, 2).reshape(N, Q, d)
        x = x + self.dropout(self.attn_out(o))
        return x + self.dropout(self.mlp(self.norm2(x)))


# ----------------------------------------------------------------------------------------------
# Noise: how tokens are corrupted, the bound on the likelihood, the step back


def linear(t):
    """alpha(t) = 1 - t, and its derivative."""
    return 1 - t, torch.full_like(t, -1.0)


def cosine(t):
    """alpha(t) = 1 - cos(pi/2 (1 - t)) = 1 - sin(pi/2 t), and its derivative."""
    angle = math.pi / 2 * t
    return 1 - torch.sin(angle), -math.pi / 2 * torch.cos(angle)


def pick(x, index):
    """x (..., V) at index (...) -> (...)"""
    return x.gather(-1, index[..., None])[..., 0]


def draw(probs, u):
    """Tokens (...) from probs (..., V), normalized or not, by inverse CDF: u (...) in [0, 1). In
    float64, since float32 would cut off the tail."""
    cdf = probs.cumsum(-1, dtype=torch.float64)
    target = u * cdf[..., -1]
    index = torch.searchsorted(cdf, target[..., None], right=True)[..., 0]
    return index.clamp(max=probs.shape[-1] - 1)


def cross_entropy(logits, x0):
    """-log p(x0), nats (...), from logits (..., V). In float32: a bfloat16 softmax does not sum
    to 1."""
    return -pick(logits.float().log_softmax(-1), x0)


class Noise:
    """What both kinds have in common; each says its prior, scored, nelbo and posterior. alpha and
    its like are numbers, or tensors that broadcast. n_embeddings: V, or V + 1 if there is a mask.
    """

    mask = None

    def __init__(self, vocab_size):
        self.vocab_size = self.n_embeddings = vocab_size

    def corrupt(self, x0, alpha, u=None):
        """xt given x0: a token survives with probability alpha, else it becomes noise. u: one
        uniform number per token decides both."""
        u = torch.rand_like(x0, dtype=torch.float64) if u is None else u
        rest = (u - alpha) / (1 - alpha)  # uniform again, of the tokens that do not survive
        noise = self.prior(x0.shape, x0.device, rest.clamp(0, 1 - 2**-53))
        return torch.where(u < alpha, x0, noise)

    def step(self, probs, xt, alpha_s, alpha_t, u=None):
        """A draw from the posterior, by one uniform number u per token."""
        u = torch.rand_like(xt, dtype=torch.float64) if u is None else u
        return draw(self.posterior(probs, xt, alpha_s, alpha_t), u)


class MaskedNoise(Noise):
    """Noise is the mask (MDLM, arXiv 2406.07524)."""

    def __init__(self, vocab_size):
        self.vocab_size = self.mask = vocab_size
        self.n_embeddings = vocab_size + 1

    def prior(self, shape, device=None, u=None):
        """Pure noise: all masks."""
        return torch.full(shape, self.mask, device=device)

    def scored(self, xt):
        """Where xt may be noise: elsewhere the bound is zero."""
        return xt == self.mask

    def nelbo(self, logits, x0, xt, alpha, dalpha):
        """-alpha' / (1 - alpha) [xt = mask] (-log p(x0)), nats (...): MDLM, eq. 10, in continuous
        time."""
        weight = -dalpha / (1 - alpha) * (xt == self.mask)
        return weight * cross_entropy(logits, x0)

    def posterior(self, probs, xt, alpha_s, alpha_t):
        """p(xs | xt) (..., V + 1) for alpha_s > alpha_t, if x0 ~ probs (..., V): a mask is revealed
        or stays, other tokens stay (MDLM, section 3)."""
        reveal = (alpha_s - alpha_t) / (1 - alpha_t)
        reveal = reveal * (xt == self.mask).double()
        changed = reveal[..., None] * F.pad(probs, (0, 1))  # nothing becomes the mask
        return changed.scatter_add_(-1, xt[..., None], 1 - reveal[..., None])


class UniformNoise(Noise):
    """Noise is any of the V tokens, perhaps the token itself (Duo, arXiv 2506.10892)."""

    def prior(self, shape, device=None, u=None):
        """Pure noise: uniformly random tokens."""
        if u is None:
            u = torch.rand(shape, dtype=torch.float64, device=device)
        return (u * self.vocab_size).long()

    def scored(self, xt):
        """Where xt may be noise: everywhere."""
        return torch.ones_like(xt, dtype=torch.bool)

    def nelbo(self, logits, x0, xt, alpha, dalpha):
        """The bound of UDLM (arXiv 2412.10193) and Duo, nats (...), in the precision of alpha.

        With i = xt, xbar = V alpha onehot(x0) + 1 - alpha and pbar = V alpha p + 1 - alpha, it is
        the divergence between the true and the modeled rates of jumping back, -alpha' / (V alpha)
        [sum_j xbar_j / xbar_i log(pbar_i xbar_j / (pbar_j xbar_i)) - V / xbar_i + V / pbar_i].
        Below, all but the last line is xbar_i times that. log1p keeps it accurate as alpha goes to
        0, where the bracket vanishes faster than alpha."""
        V = self.vocab_size
        alpha = alpha.clamp(min=1e-6)
        p = logits.to(alpha.dtype).softmax(-1)  # (..., V)
        a = alpha[..., None]
        log_pbar = torch.addcmul(-a, p, V * a).log1p()  # (..., V)
        log_pbar_i = pick(log_pbar, xt)  # (...) from here on
        log_pbar_x0 = pick(log_pbar, x0)
        log_xbar_x0 = torch.log1p(alpha * (V - 1))
        log_xbar_other = torch.log1p(-alpha)
        is_clean = x0 == xt
        log_xbar_i = torch.where(is_clean, log_xbar_x0, log_xbar_other)
        sum_log_ratio = log_xbar_x0 + (V - 1) * log_xbar_other - log_pbar.sum(-1)
        # sum_j xbar_j log(xbar_j / pbar_j), where xbar_j is 1 - alpha, and V alpha more at x0
        jumps = V * alpha * (log_xbar_x0 - log_pbar_x0)
        jumps = jumps + (1 - alpha) * sum_log_ratio
        jumps = jumps + V * (log_pbar_i - log_xbar_i)  # the xbar_j sum to V
        difference = alpha * (V * is_clean - 1) - log_pbar_i.expm1()  # xbar_i - pbar_i
        rates = V * difference / log_pbar_i.exp()
        return -dalpha / (V * alpha) * (jumps + rates) / log_xbar_i.exp()

    def posterior(self, probs, xt, alpha_s, alpha_t):
        """p(xs | xt) (..., V) for alpha_s > alpha_t: xt stays, or a token is drawn from probs, or
        at random (D3PM, arXiv 2107.03006, eq. 3). probs (..., V) is what x0 may be by all tokens
        but xt itself, which Bayes' rule brings in here."""
        V = self.vocab_size
        ratio = alpha_t / alpha_s
        at_xt = V * alpha_t * pick(probs, xt).double()
        total = at_xt + 1 - alpha_t
        stays = (at_xt + ratio - alpha_t) / total  # these three add up to 1
        from_probs = (alpha_s - alpha_t) / total
        at_random = (1 - ratio) * (1 - alpha_s) / total
        changed = from_probs[..., None] * probs + at_random[..., None] / V
        return changed.scatter_add_(-1, xt[..., None], stays[..., None])


NOISES = {"masked": MaskedNoise, "uniform": UniformNoise}
SCHEDULES = {"linear": linear, "cosine": cosine}


# ----------------------------------------------------------------------------------------------
# The model: training, the loss, generation


def is_single(block_size, length):
    """Which tokens are a block of their own, (N, L), at block sizes (N,): all of them at block
    size 1; at others a last one that is left over."""
    size = block_size[:, None]
    position = torch.arange(length, device=block_size.device)
    left_over = (position == length - 1) & (position % size == 0)
    return (size == 1) | left_over


class BlockGen(nn.Module):
    """A transformer with a kind of noise: its loss, and the passes that generation is made of."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.noise = NOISES[config.noise](config.vocab_size)
        self.embedding = nn.Embedding(self.noise.n_embeddings, config.n_embd)
        self.noisy_gain = nn.Parameter(torch.tensor(config.noisy_gain))
        blocks = [Block(config, layer) for layer in range(config.n_layer)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        if config.tied:
            del self.head.weight  # the embedding serves, see head_weight
        head_size = config.n_embd // config.n_head
        frequency = 10000 ** -(torch.arange(0, head_size, 2) / head_size)  # (D / 2,)
        angle = torch.arange(config.seq_len)[:, None] * frequency  # (L, D / 2)
        rotary = torch.stack([angle.cos(), angle.sin()])
        self.register_buffer("rotary", rotary, persistent=False)
        if config.ar == "shift":  # no token stands before the first; this state predicts it
            self.first = nn.Parameter(torch.zeros(config.n_embd))
        initialize(self)

    def states(self, tokens, n_clean, positions, view, cache=None):
        """tokens (N, Q), the first n_clean of them clean, at positions (Q,) -> (N, Q, d), what the
        last layer says of each. view: who sees whom, see kernels.View."""
        index = torch.arange(tokens.shape[1], device=tokens.device)
        is_clean = index[:, None] < n_clean  # (Q, 1)
        gain = torch.where(is_clean, 1.0, self.noisy_gain)
        if self.config.tied:
            gain = gain * math.sqrt(self.config.n_embd)
        x = self.embedding(tokens) * gain  # (N, Q, d)
        cos, sin = self.rotary[:, positions]  # (Q, D / 2) each
        for block in self.blocks:
            x = block(x, cos, sin, view, cache)
        return self.norm(x)

    def head_weight(self):
        """(V, d): nothing predicts the mask."""
        weight = self.embedding.weight if self.config.tied else self.head.weight
        return weight[: self.config.vocab_size]

    def logits(self, states, weight=None):
        """(..., d) -> (..., V). weight: head_weight(), if several calls share it."""
        weight = self.head_weight() if weight is None else weight
        return F.linear(states, weight, self.head.bias)

    def both_sides(self, x0, xt, block_size):
        """The states (N, L, d) that predict x0, at block sizes (N,): those of the diffusion side,
        and those of the AR side.

        The diffusion side reads a prediction at the noisy token itself, and so does the AR side
        under ar="paper". Under ar="shift" it reads it at the clean token before."""
        N, L = x0.shape
        shift = self.config.ar == "shift"
        positions = torch.arange(L, device=x0.device)
        if shift and (block_size == 1).all():  # nothing is read from the noisy half
            view = denoise_view(0, L, 0)  # causal
            clean = noisy = self.states(x0, L, positions, view)
        else:
            view = train_view(L, block_size, self.config.token_causal, x0.device)
            tokens = torch.cat([x0, xt], 1)  # (N, 2 L)
            states = self.states(tokens, L, positions.repeat(2), view)
            clean, noisy = states.split(L, 1)
        if not shift:
            return noisy, noisy
        first = self.first.expand(N, 1, -1)
        return noisy, torch.cat([first, clean[:, :-1]], 1)

    def forward(self, x0, xt, block_size):
        """Logits (N, L, V) of x0 from clean x0 and noisy xt (N, L), block_size an int or (N,): what
        the model says, in one pass without a cache. The loss has a way of its own."""
        block_size = torch.as_tensor(block_size, device=x0.device).expand(len(x0))
        diffusion, ar = self.both_sides(x0, xt, block_size)
        single = is_single(block_size, x0.shape[1])[..., None]
        return self.logits(torch.where(single, ar, diffusion))

    def token_losses(self, x0, block_size, t, u, given, objective="nelbo", ar_weight=0.0):
        """Nats per token (N, L): corrupt x0 (N, L), predict it, compare.

        block_size (N,); t (N, L) noise levels, in float64 where the NELBO has to be accurate;
        u (N, L) uniform numbers. Tokens that are given (N, L) are neither noised nor scored. A
        block of one token gets pure noise and plain cross-entropy: the exact AR likelihood. (Under
        ar="paper" with uniform noise it depends on that noise, and its average is a bound.) Under
        ar="shift" the other tokens have both sides, and ar_weight is the share of the AR side.
        objective: "nelbo"; or for masked noise "ce", the same without -alpha' / (1 - alpha)."""
        single = is_single(block_size, x0.shape[1])
        alpha, dalpha = SCHEDULES[self.config.schedule](t)
        xt = self.noise.corrupt(x0, torch.where(single, 0.0, alpha), u)
        xt = torch.where(given, x0, xt)
        diffusion, ar = self.both_sides(x0, xt, block_size)

        ar_share = torch.where(single, 1.0, ar_weight)
        by_diffusion = self.noise.scored(xt) & (ar_share < 1) & ~given
        by_ar = (ar_share > 0) & ~given
        ar_nats = self.in_chunks(cross_entropy, by_ar, ar, x0)
        if objective == "ce":
            dalpha = alpha - 1  # then the weight of the NELBO is 1
        inputs = x0, xt, alpha, dalpha
        nats = self.in_chunks(self.noise.nelbo, by_diffusion, diffusion, *inputs)
        return (1 - ar_share) * nats + ar_share * ar_nats

    def in_chunks(self, loss, where, states, *inputs, chunk=2**23):
        """loss(logits, *inputs) at the tokens `where` (N, L), zero elsewhere. The head runs only
        there, and makes about `chunk` logits at a time. If they are more than 2^26 together, none
        are kept for backward, which computes them again."""
        weight = self.head_weight()  # once, for each slice of it has a gradient of full size

        def one_chunk(states, *inputs):
            return loss(self.logits(states, weight), *inputs)

        V = self.config.vocab_size
        index = where.flatten().nonzero()[:, 0]  # (M,)
        chosen = [x.flatten(0, 1).index_select(0, index) for x in (states, *inputs)]  # (M, ...)
        chunks = [x.split(max(1, chunk // V)) for x in chosen]
        if len(index) * V > 2**26 and torch.is_grad_enabled():
            one_chunk = partial(checkpoint, one_chunk, use_reentrant=False)
        losses = torch.cat([one_chunk(*pieces) for pieces in zip(*chunks)])
        everywhere = losses.new_zeros(where.numel()).index_copy(0, index, losses)
        return everywhere.view_as(where)

    def new_cache(self, n_rows, length=None):
        """An empty cache for n_rows rows of up to length tokens, by default seq_len."""
        config = self.config
        slots = length or config.seq_len
        state = None
        if config.ar == "shift":
            state = self.first.expand(n_rows, 1, -1)
        else:
            slots *= 2  # verify has a noise token for each proposed one
        head_size = config.n_embd // config.n_head
        shape = 2, config.n_layer, n_rows, config.n_head, slots, head_size
        return Cache(self.head.bias.new_zeros(shape), state)

    def denoise(self, xt, cache, commit=None, block_size=None):
        """Logits (N, n, V) of a noisy block xt (N, n) that follows the cache. The same pass first
        commits clean tokens (N, c) to the cache.

        A single token is the AR side's: under ar="shift" the last committed token predicts it,
        whatever xt. block_size matters to a block-causal model alone: the blocks of the committed
        tokens (by default they are one)."""
        from_state = self.config.ar == "shift" and xt.shape[1] == 1
        noisy = xt[:, :0] if from_state else xt
        tokens = noisy if commit is None else torch.cat([commit, noisy], 1)  # (N, c + n)
        n = noisy.shape[1]
        c = tokens.shape[1] - n
        if c + n > 0:
            start = cache.length
            positions = torch.arange(start, start + c + n, device=xt.device)
            clean_blocks = 1 if self.config.token_causal else block_size or c or 1
            view = denoise_view(start, c, n, clean_blocks)
            states = self.states(tokens, c, positions, view, cache)
        if c > 0:
            cache.length += c
            cache.state = states[:, c - 1 : c]
        return self.logits(cache.state if from_state else states[:, c:])

    def verify(self, x, cache, noise=None):
        """AR logits (N, n, V) of proposed tokens x (N, n) in one pass: at i, p(x_i | cache, x_<i).

        Under ar="paper" they are read from a noise token at the position of x_i; noise (N, n) says
        which, by default a fresh draw. The keys and values of x stay in the cache, past its end: to
        accept the first k < n tokens, add k to cache.length; the state of the last one comes with
        the next commit."""
        start, n = cache.length, x.shape[1]
        positions = torch.arange(start, start + n, device=x.device)
        if self.config.ar == "shift":
            view = denoise_view(start, n, 0)  # causal
            states = self.states(x, n, positions, view, cache)
            before = torch.cat([cache.state, states[:, :-1]], 1)
            return self.logits(before)
        if noise is None:
            noise = self.noise.prior(x.shape, x.device)
        tokens = torch.cat([x, noise], 1)  # (N, 2 n)
        view = verify_view(start, n)
        states = self.states(tokens, n, positions.repeat(2), view, cache)
        return self.logits(states[:, n:])


class Cache:
    """Keys and values (2, layers, N, H, slots, D) of the committed tokens. What a pass writes past
    `length` is scratch, until moving `length` commits it."""

    def __init__(self, kv, state):
        self.kv = kv
        self.length = 0  # committed tokens, the same in every row
        self.state = state  # (N, 1, d) of the last committed token; ar="shift" predicts from it

    def write(self, layer, k, v):
        """Put k and v (N, H, Q, D) after the committed ones. Returns all slots (N, H, slots, D)."""
        keys, values = self.kv[:, layer]
        new = slice(self.length, self.length + k.shape[2])
        keys[:, :, new] = k
        values[:, :, new] = v
        return keys, values


# ----------------------------------------------------------------------------------------------
# Initialization


@torch.no_grad()
def initialize(model):
    """Unit-variance embeddings, small matrices, residual branches scaled with depth as in GPT-2,
    heads that look back."""
    config, d = model.config, model.config.n_embd
    for name, p in model.named_parameters():
        if p.dim() == 2:
            residual = name.endswith(("attn_out.weight", "mlp.2.weight"))
            depth = math.sqrt(2 * config.n_layer) if residual else 1
            nn.init.normal_(p, std=0.5 * d**-0.5 / depth)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    for block in model.blocks:
        look_back(block, *model.rotary[:, 1])
    nn.init.normal_(model.embedding.weight, std=d**-0.5 if config.tied else 1)
    if not config.tied:
        nn.init.zeros_(model.head.weight)


def look_back(block, cos, sin):
    """Let heads start with a preference for the previous token, strong in the first head, none in
    the last: without it training stands still for hundreds of steps, until noisy positions have
    found their neighbors. cos and sin (D / 2,): the rotation by one position.

    The norm's output sums to zero, so what a row of the weight has in common over its columns acts
    on the norm's bias alone. A bias of 1 makes that a constant, in the query and in the key; the
    key's is rotated by one position, so that the two match best at distance 1."""
    strength = torch.linspace(2, 0, block.n_head)[:, None]
    unrotated = torch.cat([torch.ones_like(cos), torch.zeros_like(sin)])  # (D,)
    query = strength * unrotated  # (H, D)
    key = strength * torch.cat([cos, sin])
    value = torch.zeros_like(key)
    constant = torch.cat([query, key, value]).view(-1, 1)  # (3 d, 1)
    weight = block.attn_qkv.weight
    weight -= weight.mean(1, keepdim=True)
    weight += constant / weight.shape[1]
    nn.init.ones_(block.norm1.bias)


# ----------------------------------------------------------------------------------------------
# Random numbers that depend on a key alone, and not on what was drawn before


def random_numbers(key, rows, n):
    """Uniform float64 numbers (R, n), a function of the row and of the key, a tuple of ints: row 3
    is the same whichever rows (R,) stand beside it. The keys of one purpose have one length."""
    rows = torch.as_tensor(rows)
    every_row = np.random.default_rng(key).random((int(rows.max()) + 1, n))
    return torch.from_numpy(every_row)[rows]


# ----------------------------------------------------------------------------------------------
# Checkpoints


def find_device(name):
    """The device of a --device flag; auto is cuda where there is one, else cpu. Raises ValueError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        assert device.type in ("cpu", "cuda")
    except (RuntimeError, AssertionError):
        raise ValueError(f"--device={name}: no such device here, or neither cpu nor cuda") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as in the attention kernels
    return device


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


def read_checkpoint(path):
    """The dict in a checkpoint, its config a Config. Raises ValueError if it is none."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)  # cannot run code
        content["config"] = Config(**content["config"])
    except Exception as error:
        problem = f"{path} is no checkpoint of BlockGen, or damaged ({type(error).__name__})"
        raise ValueError(f"{problem}: python train.py makes one") from None
    return content


def trained_weights(content):
    """Of a checkpoint the average that did best in validation; before the first validation, and
    where it was converted, the only weights that there are."""
    return content.get("best") or content["model"]


def load_checkpoint(path, device="cpu"):
    """(model with its trained weights in evaluation mode, content of the checkpoint). Raises
    ValueError."""
    content = read_checkpoint(path)
    model = BlockGen(content["config"])
    model.load_state_dict(trained_weights(content))
    return model.to(device).eval(), content


# ----------------------------------------------------------------------------------------------
# Published weights. Their model is a DiT: scales, shifts and gates computed from a time (adaLN)


def convert(folder):
    """The content of a checkpoint from config.json and model.safetensors in a folder. Raises
    ValueError or ImportError."""
    from safetensors.torch import load_file

    try:
        with open(f"{folder}/config.json") as file:
            c = json.load(file)
        w = load_file(f"{folder}/model.safetensors")
        is_masked = not w["output_layer.linear.weight"][-1].any()  # nothing predicts the mask
        config = Config(
            vocab_size=len(w["vocab_embed.embedding"]) - is_masked,
            seq_len=c["length"],
            n_layer=c["n_blocks"],
            n_head=c["n_heads"],
            n_embd=c["hidden_size"],
            noise="masked" if is_masked else "uniform",
            ar="paper",
            token_causal=c["x0_causal"],
            tied=False,
        )
        model = BlockGen(config)
        model.load_state_dict(fold(w, config))
        assert torch.allclose(w["rotary_emb.inv_freq"].cos(), model.rotary[0, 1], atol=1e-4)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} does not have the published layout ({reason})") from None
    meta = {"tokenizer": dict(kind="gpt2", start=50256, end=50256)}
    return dict(config=asdict(config), model=model.state_dict(), meta=meta, args={}, step=0)


def fold(w, config):
    """Our weights from theirs. Their time is always 0, so what adaLN computes from it is constant
    and folds exactly: scales and shifts into the LayerNorms, gates into the projections after
    attention and MLP."""
    w = {name: x.double() for name, x in w.items()}

    def layer(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    time = torch.arange(256) < 128  # the cosines of 0, then the sines
    condition = F.silu(layer(time.double(), "sigma_map.mlp.0"))
    condition = F.silu(layer(condition, "sigma_map.mlp.2"))
    shift, scale = layer(condition, "output_layer.adaLN_modulation").chunk(2)
    V = config.vocab_size
    ours = {
        "noisy_gain": torch.tensor(1.0),
        "embedding.weight": w["vocab_embed.embedding"],
        "norm.weight": w["output_layer.norm_final.weight"] * (1 + scale),
        "norm.bias": shift,
        "head.weight": w["output_layer.linear.weight"][:V],
        "head.bias": w["output_layer.linear.bias"][:V],
    }
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        modulation = layer(condition, f"{block}.adaLN_modulation")
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6)
        ours[f"{block}.norm1.bias"] = shift1
        ours[f"{block}.norm2.bias"] = shift2
        factors = {
            "norm1.weight": 1 + scale1,
            "attn_qkv.weight": 1,
            "attn_out.weight": gate1[:, None],
            "norm2.weight": 1 + scale2,
            "mlp.0.weight": 1,
            "mlp.0.bias": 1,
            "mlp.2.weight": gate2[:, None],
            "mlp.2.bias": gate2,
        }
        for name, factor in factors.items():
            ours[f"{block}.{name}"] = w[f"{block}.{name}"] * factor
    return ours


def main():
    if len(sys.argv) != 3:
        raise ValueError("say python blockgen.py FOLDER OUT.pt")
    save_checkpoint(sys.argv[2], **convert(sys.argv[1]))


if __name__ == "__main__":
    run_script(main)
