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

In this file: the noise, the transformer, the model with its loss and its passes for generation, the
cache; then initialization, random numbers, checkpoints, published weights. Of our files it needs
kernels.py alone.

Notation: N rows, L = seq_len, S = block_size, V = vocab_size, d = n_embd, H heads of D; Q queries,
T keys; n tokens of the block at hand, c tokens that are committed to the cache. x0 are clean
tokens, xt noisy ones, t in (0, 1] is the noise level, alpha(t) the probability that a token is
still clean. NELBO is the negative evidence lower bound: an upper bound on -log p(x0). Losses are in
nats per token.

BlockGen: Deschenaux & Gulcehre 2026, arXiv 2606.02241. Block diffusion: BD3-LM, arXiv 2503.09573.
"""
import json
import math
import os
import zipfile
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import block_attention, denoise_view, train_view, verify_view


class UserError(Exception):
    """What the user can mend. The scripts print it as one line; anything else is a traceback."""


def check_choices(settings):
    """Raise UserError if a field of a dataclass is none of the choices of its type, a Literal."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        choices = get_args(field.type)
        if choices and value not in choices:
            names = ", ".join(map(str, choices))
            raise UserError(f"{field.name} is {value}, but must be one of {names}")


def check_at_least(settings, bound, *names):
    """Raise UserError if one of these fields of a dataclass is below the bound, or NaN."""
    for name in names:
        value = getattr(settings, name)
        if not value >= bound:
            raise UserError(f"{name} is {value}, but must be at least {bound}")


# ----------------------------------------------------------------------------------------------
# Noise: how tokens are corrupted, the bound on the likelihood, the step back


def linear(t):
    """alpha(t) = 1 - t, and its derivative. (In the authors' code alpha(1) is 1e-3, here 0.)"""
    return 1 - t, torch.full_like(t, -1.0)


def cosine(t):
    """alpha(t) = 1 - cos(pi/2 (1 - t)) = 1 - sin(pi/2 t), and its derivative."""
    angle = math.pi / 2 * t
    return 1 - torch.sin(angle), -math.pi / 2 * torch.cos(angle)


def at_index(x, index):
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
    return -at_index(logits.float().log_softmax(-1), x0)


class Noise:
    """A token survives with probability alpha, or else becomes a draw from the prior: the mask with
    probability mask_share, otherwise any of the V data tokens, perhaps the token itself.

    mask_share 1 is masked noise (MDLM, arXiv 2406.07524), 0 is uniform noise (Duo, arXiv
    2506.10892), and anything between is the hybrid of GIDD (arXiv 2503.04482). The mask's id is V.
    n_embeddings, K, is V + 1 if there is a mask, else V. alpha and dalpha = alpha' are numbers or
    tensors that broadcast."""

    def __init__(self, vocab_size, mask_share):
        self.vocab_size = vocab_size
        self.mask_share = mask_share
        self.mask = vocab_size if mask_share > 0 else None
        self.n_embeddings = vocab_size + (mask_share > 0)
        self.token_share = (1 - mask_share) / vocab_size  # the prior of each data token
        self.pi = torch.full((self.n_embeddings,), self.token_share, dtype=torch.float64)
        self.pi[vocab_size:] = mask_share  # (K,) the prior

    def prior(self, shape, device=None, u=None):
        """Pure noise: tokens of this shape, by one uniform number u each."""
        if u is None:
            u = torch.rand(shape, dtype=torch.float64, device=device)
        V = self.vocab_size
        tokens = (u * V / (1 - self.mask_share)).long().clamp(max=V - 1)
        return torch.where(u < 1 - self.mask_share, tokens, V)

    def maybe_noise(self, xt):
        """Where xt may be noise. Elsewhere the bound is zero."""
        return self.pi.to(xt.device)[xt] > 0

    def corrupt(self, x0, alpha, u=None):
        """xt given x0. One uniform number u per token decides both whether it survives and what it
        becomes if not."""
        u = torch.rand_like(x0, dtype=torch.float64) if u is None else u
        rest = (u - alpha) / (1 - alpha)  # uniform again among the tokens that do not survive
        noise = self.prior(x0.shape, x0.device, rest.clamp(0, 1 - 2**-53))
        return torch.where(u < alpha, x0, noise)

    def nelbo(self, logits, x0, xt, alpha, dalpha):
        """The bound of GIDD (arXiv 2503.04482, theorem 1) in continuous time, nats (...), in the
        precision of alpha; with uniform noise it is the bound of UDLM (arXiv 2412.10193) and Duo.

        Let q = alpha onehot(x0) + (1 - alpha) prior be the law of xt in truth, p = alpha softmax +
        (1 - alpha) prior the one by the model, and i = xt. The bound charges what p gets wrong
        everywhere, and once more what it gets wrong at i:

            -alpha' / alpha  prior_i / q_i  [KL(q || p) + (q_i / p_i - 1 - log(q_i / p_i))]

        All logarithms below are of ratios to pure noise, (1 - alpha) prior, where q and p differ
        from it by little as alpha goes to 0. The mask cancels: q and p agree about it."""
        V = self.vocab_size
        alpha = alpha.clamp(min=1e-6)
        noise = (1 - alpha) * self.token_share  # (...) of each data token
        gain = alpha / noise
        probs = logits.to(alpha.dtype).softmax(-1)
        log_p = torch.log1p(gain[..., None] * probs)  # (..., V)
        log_p_x0 = at_index(log_p, x0)  # (...) from here on
        log_q_x0 = torch.log1p(gain)
        log_q_i = torch.where(xt == x0, log_q_x0, 0.0)
        log_p_i = at_index(log_p, xt.clamp(max=V - 1)).masked_fill(xt == V, 0.0)
        # sum_j q_j log(q_j / p_j): q is (1 + gain) noise at x0, elsewhere noise, whose log is 0
        kl = noise * ((1 + gain) * (log_q_x0 - log_p_x0) + log_p_x0 - log_p.sum(-1))
        log_ratio = log_q_i - log_p_i
        at_i = torch.expm1(log_ratio) - log_ratio
        prior_over_q = torch.exp(-log_q_i) / (1 - alpha)
        return -dalpha / alpha * prior_over_q * (kl + at_i)

    def posterior(self, probs, xt, alpha_s, alpha_t):
        """p(xs | xt) (..., K) for alpha_s > alpha_t by Bayes' rule (D3PM, arXiv 2107.03006, eq. 3).
        probs (..., V) is what x0 may be by all tokens but xt itself, which Bayes' rule brings in.

        Either xs survived as xt, or it turned into noise that happens to be xt: then xs may be
        anything, a draw from probs or, if it was noise already, from the prior."""
        pi = self.pi.to(xt.device)
        probs = F.pad(probs, (0, self.n_embeddings - self.vocab_size))  # (..., K)
        survival = alpha_t / alpha_s
        probs_i, pi_i = at_index(probs, xt).double(), pi[xt]  # (...)
        p_xt = alpha_t * probs_i + (1 - alpha_t) * pi_i
        p_xs = alpha_s * probs_i + (1 - alpha_s) * pi_i  # that xs is the token xt
        stays = torch.where(pi_i > 0, survival * p_xs / p_xt, 1.0)
        turned = torch.where(pi_i > 0, (1 - survival) * pi_i / p_xt, 0.0)
        law = (turned * alpha_s)[..., None] * probs
        law += (turned * (1 - alpha_s))[..., None] * pi
        return law.scatter_add_(-1, xt[..., None], stays[..., None])

    def step(self, probs, xt, alpha_s, alpha_t, u=None):
        """A draw from the posterior, by one uniform number u per token."""
        u = torch.rand_like(xt, dtype=torch.float64) if u is None else u
        return draw(self.posterior(probs, xt, alpha_s, alpha_t), u)


class MaskedNoise(Noise):
    """The mask alone, where the bound is simple."""

    def __init__(self, vocab_size):
        super().__init__(vocab_size, mask_share=1.0)

    def nelbo(self, logits, x0, xt, alpha, dalpha):
        """-alpha' / (1 - alpha) [xt = mask] (-log p(x0)), nats (...): MDLM, eq. 10, in continuous
        time."""
        weight = -dalpha / (1 - alpha) * (xt == self.mask)
        return weight * cross_entropy(logits, x0)


def nelbo(noise, *inputs):
    """The bound on the likelihood."""
    return noise.nelbo(*inputs)


def flat(noise, logits, x0, xt, alpha, dalpha):
    """Cross-entropy with the same weight at every noise level."""
    return cross_entropy(logits, x0)


UniformNoise = partial(Noise, mask_share=0.0)

# To add a noise, a schedule or a loss: write it, and name it here.
NOISES = {
    "masked": MaskedNoise,
    "uniform": UniformNoise,
    "hybrid10": partial(Noise, mask_share=0.9),  # 10% of the noise are random tokens
    "hybrid30": partial(Noise, mask_share=0.7),
}
SCHEDULES = {"linear": linear, "cosine": cosine}
LOSSES = {"nelbo": nelbo, "ce": flat}


# ----------------------------------------------------------------------------------------------
# The transformer: pre-LN, rotary positions


@dataclass
class Config:
    """A model. vocab_size is V, the number of tokens of the data; the other fields are flags of
    train.py, with the comments as their help. Raises UserError for what does not fit together."""

    vocab_size: int = 1024
    seq_len: int = 128  # context length L in tokens
    n_layer: int = 4  # number of layers
    n_head: int = 4  # number of attention heads
    n_embd: int = 128  # width of the model
    dropout: float = 0.0  # dropout of what attention and MLP add
    noise: Literal[tuple(NOISES)] = "masked"  # kind of noise
    schedule: Literal[tuple(SCHEDULES)] = "linear"  # how the share of clean tokens falls with t
    ar: Literal["shift", "paper"] = "shift"  # at block size 1 clean token i-1 predicts i, or noise
    token_causal: bool = True  # clean tokens see up to themselves, instead of to their block's end
    tied: bool = True  # use the embedding as the output weights, too
    noisy_gain: float = 0.1  # initial value of the learned gain on noisy tokens' embeddings

    def __post_init__(self):
        check_choices(self)
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"n_embd ({self.n_embd}) must be an even multiple of n_head")
        if self.ar == "shift" and not self.token_causal:
            raise UserError("with token_causal=False clean tokens see ahead: ar must be paper")


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864), half-split: x (..., Q, D), cos and sin (Q, D / 2)."""
    a, b = x.chunk(2, -1)  # (..., Q, D / 2)
    rotated = [a * cos - b * sin, b * cos + a * sin]
    return torch.cat(rotated, -1).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). What stands before attention and after it are
    methods of their own, which train.py compiles."""

    def __init__(self, config, layer):
        super().__init__()
        d = config.n_embd
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = nn.Dropout(config.dropout)
        self.norm1 = nn.LayerNorm(d)
        self.attn_qkv = nn.Linear(d, 3 * d)
        self.attn_out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.LayerNorm(d)
        self.mlp = nn.Sequential(
            nn.Linear(d, 4 * d),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * d, d),
        )

    def outputs(self):
        """The layers that add to the residual stream."""
        return self.attn_out, self.mlp[-1]

    def before(self, x, cos, sin):
        N, Q, d = x.shape
        qkv = self.attn_qkv(self.norm1(x))  # (N, Q, 3 d)
        qkv = qkv.view(N, Q, 3, self.n_head, -1)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, N, H, Q, D)
        q, k = rotate(qkv[:2], cos, sin)
        return q, k, qkv[2]

    def after(self, x, o):
        o = o.transpose(1, 2).reshape(x.shape)  # (N, H, Q, D) -> (N, Q, d)
        x = x + self.dropout(self.attn_out(o))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def forward(self, x, cos, sin, view, cache=None):
        q, k, v = self.before(x, cos, sin)  # (N, H, Q, D) each
        if cache is not None:
            k, v = cache.write(self.layer, k, v)  # (N, H, slots, D)
        o = block_attention(q, k, v, view)  # (N, H, Q, D)
        return self.after(x, o)


# ----------------------------------------------------------------------------------------------
# The model: training, the loss, generation


class Batch(NamedTuple):
    """N rows of L tokens, with everything random about them."""

    x0: torch.Tensor  # (N, L) clean tokens, int64
    block_size: torch.Tensor  # (N,) on the CPU, wherever the rest is
    t: torch.Tensor  # (N, L) noise levels; float64 where the NELBO has to be accurate
    u: torch.Tensor  # (N, L) uniform numbers, float64: which tokens become noise, and which noise
    given: torch.Tensor  # (N, L) True where a token is neither noised nor scored

    def to(self, device):
        moved = Batch(*[x.to(device) for x in self])
        return moved._replace(block_size=self.block_size)


def is_single(block_size, length):
    """Which tokens are a block of their own, (N, L), at block sizes (N,): all of them at block
    size 1; at others a last one that is left over."""
    size = block_size[:, None]
    position = torch.arange(length, device=block_size.device)
    left_over = (position == length - 1) & (position % size == 0)
    return (size == 1) | left_over


same_view = lru_cache(maxsize=4)(train_view)  # for rows of one block size: made once


class BlockGen(nn.Module):
    """A transformer with a kind of noise: its loss, and the passes that generation is made of.

    The model has two sides that predict tokens. For L = 4, S = 2, who predicts x0's tokens a b c d:

        side                        a        b        c        d       reads
        diffusion                   noisy 1  noisy 2  noisy 3  noisy 4 its block, clean ones before
        AR, ar="shift" (ours)       first    clean 1  clean 2  clean 3 the clean tokens up to itself
        AR, ar="paper" (S = 1)      noisy 1  noisy 2  noisy 3  noisy 4 the clean tokens before it

    "first" is a learned state, for no token stands before the first. Under "shift" the clean half
    is an ordinary causal language model, and every row trains both sides. In the paper the AR side
    takes rows of its own, at block size 1, where each noisy token is pure noise."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.noise = NOISES[config.noise](config.vocab_size)
        self.embedding = nn.Embedding(self.noise.n_embeddings, config.n_embd)
        self.noisy_gain = nn.Parameter(torch.tensor(config.noisy_gain))
        blocks = [Block(config, layer) for layer in range(config.n_layer)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.n_embd)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if not config.tied:
            self.head_weight = nn.Parameter(torch.zeros(config.vocab_size, config.n_embd))
        if config.ar == "shift":
            self.first = nn.Parameter(torch.zeros(config.n_embd))
        head_size = config.n_embd // config.n_head
        frequency = 10000 ** -(torch.arange(0, head_size, 2) / head_size)  # (D / 2,)
        angle = torch.arange(config.seq_len)[:, None] * frequency  # (L, D / 2)
        rotary = torch.stack([angle.cos(), angle.sin()])
        self.register_buffer("rotary", rotary, persistent=False)
        initialize(self)

    @property
    def device(self):
        return self.head_bias.device

    def forward(self, batch, loss="nelbo", ar_weight=0.0):
        """The training pass: corrupt, predict, compare. Nats per token (N, L), zero where given.

        loss: "nelbo", the bound on the likelihood, or "ce", flat cross-entropy of what may be
        noise. A block of one token gets pure noise and plain cross-entropy: the exact AR
        likelihood. (Under ar="paper" with random tokens as noise it depends on those, and its
        average is a bound.) Under ar="shift" both sides predict the tokens of larger blocks, and
        ar_weight is the share of the AR side in their loss."""
        x0, block_size, t, u, given = batch
        single = is_single(block_size, x0.shape[1]).to(x0.device)

        # corrupt the tokens that are to be predicted
        alpha, dalpha = SCHEDULES[self.config.schedule](t)
        xt = self.noise.corrupt(x0, torch.where(single, 0.0, alpha), u)
        xt = torch.where(given, x0, xt)

        # predict them from both sides
        diffusion, ar = self.predictions(x0, xt, block_size)  # hidden (N, L, d)

        # compare, each side where it counts
        ar_share = torch.where(single, 1.0, ar_weight)  # (N, L)
        by_ar = (ar_share > 0) & ~given
        by_diffusion = (ar_share < 1) & ~given & self.noise.maybe_noise(xt)
        diffusion_loss = partial(LOSSES[loss], self.noise)
        ar_nats = self.losses(cross_entropy, by_ar, ar, x0)
        nats = self.losses(diffusion_loss, by_diffusion, diffusion, x0, xt, alpha, dalpha)
        return ar_share * ar_nats + (1 - ar_share) * nats

    def predictions(self, x0, xt, block_size):
        """The hidden states (N, L, d) that predict x0 (N, L), at block sizes (N,): those of the
        diffusion side, and those of the AR side."""
        N, L = x0.shape
        shift = self.config.ar == "shift"
        positions = torch.arange(L, device=x0.device)
        if shift and (block_size == 1).all():  # the clean half does it alone
            clean = noisy = self.hidden(x0, L, positions, denoise_view(0, L, 0))
        else:
            if (block_size == block_size[0]).all():
                view = same_view(L, int(block_size[0]), self.config.token_causal)
            else:
                view = train_view(L, block_size, self.config.token_causal)
            tokens = torch.cat([x0, xt], 1)  # (N, 2 L)
            hidden = self.hidden(tokens, L, positions.repeat(2), view)
            clean, noisy = hidden.split(L, 1)
        if not shift:  # ar="paper"
            return noisy, noisy
        first = self.first.expand(N, 1, -1)
        return noisy, torch.cat([first, clean[:, :-1]], 1)

    def hidden(self, tokens, n_clean, positions, view, cache=None):
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

    def output_weight(self):
        """(V, d): nothing predicts the mask."""
        if self.config.tied:
            return self.embedding.weight[: self.config.vocab_size]
        return self.head_weight

    def logits(self, hidden):
        """(..., d) -> (..., V)"""
        return F.linear(hidden, self.output_weight(), self.head_bias)

    def losses(self, loss, where, hidden, *inputs, chunk=2**23):
        """loss(logits, *inputs) at the tokens `where` (N, L), zero elsewhere: (N, L).

        The head runs only there, and makes about `chunk` logits at a time. If they are more than
        2^26 together, none are kept for backward, which computes them again."""
        weight = self.output_weight()  # once, for each slice of it has a gradient of full size

        def loss_of_chunk(hidden, *inputs):
            return loss(F.linear(hidden, weight, self.head_bias), *inputs)

        # gather the tokens that count
        V = self.config.vocab_size
        index = where.flatten().nonzero()[:, 0]  # (M,)
        chosen = [x.flatten(0, 1).index_select(0, index) for x in (hidden, *inputs)]  # (M, ...)

        # their losses, chunk by chunk
        chunks = [x.split(max(1, chunk // V)) for x in chosen]
        if len(index) * V > 2**26 and torch.is_grad_enabled():
            loss_of_chunk = partial(checkpoint, loss_of_chunk, use_reentrant=False)
        losses = torch.cat([loss_of_chunk(*pieces) for pieces in zip(*chunks)])  # (M,)

        # back to where they belong
        everywhere = losses.new_zeros(where.numel()).index_copy(0, index, losses)
        return everywhere.view_as(where)

    # Generation. A pass leaves the keys and values of its clean tokens in the cache, behind the
    # committed ones; cache.accept(k) commits the first k of them. That is the only way it grows.

    def new_cache(self, n_rows, length=None):
        """An empty cache for n_rows rows of up to length tokens, by default seq_len."""
        config = self.config
        slots = length or config.seq_len
        state = None
        if config.ar == "shift":
            state = self.first.expand(n_rows, 1, -1)
        else:  # ar="paper": verify has a noise token for each proposed one
            slots *= 2
        head_size = config.n_embd // config.n_head
        shape = 2, config.n_layer, n_rows, config.n_head, slots, head_size
        return Cache(self.head_bias.new_zeros(shape), state)

    def cached_pass(self, clean, noisy, positions, view, cache):
        """Hidden states (N, c + n, d) of clean (N, c) and noisy tokens (N, n) after the cache."""
        c = clean.shape[1]
        tokens = torch.cat([clean, noisy], 1)
        hidden = self.hidden(tokens, c, positions, view, cache)
        cache.proposed = hidden[:, :c]
        return hidden

    def denoise(self, xt, cache, commit=None, block_size=None):
        """Logits (N, n, V) of a noisy block xt (N, n) that follows the cache. The same pass first
        commits clean tokens (N, c) to the cache.

        A single token is predicted by the AR side: under ar="shift" by the last committed token,
        whatever xt. block_size is for block-causal models alone, whose clean tokens see to the end
        of their block: it says how the tokens to commit are cut into blocks (by default they are
        one)."""
        commit = xt[:, :0] if commit is None else commit
        from_state = self.config.ar == "shift" and xt.shape[1] == 1
        noisy = xt[:, :0] if from_state else xt
        c, n = commit.shape[1], noisy.shape[1]
        if c + n > 0:
            start = cache.length
            positions = torch.arange(start, start + c + n, device=xt.device)
            clean_blocks = 1 if self.config.token_causal else block_size or c or 1
            view = denoise_view(start, c, n, clean_blocks)
            hidden = self.cached_pass(commit, noisy, positions, view, cache)
            cache.accept(c)
        return self.logits(cache.state if from_state else hidden[:, c:])

    def verify(self, x, cache, noise=None):
        """AR logits (N, n, V) of proposed tokens x (N, n) in one pass: at i, p(x_i | cache, x_<i).
        To accept the first k of them, call cache.accept(k).

        Under ar="paper" the prediction of x_i is read from a noise token at its position; noise
        (N, n) says which, by default a fresh draw."""
        start, n = cache.length, x.shape[1]
        positions = torch.arange(start, start + n, device=x.device)
        if self.config.ar == "shift":
            view = denoise_view(start, n, 0)  # causal
            hidden = self.cached_pass(x, x[:, :0], positions, view, cache)
            return self.logits(torch.cat([cache.state, hidden[:, :-1]], 1))
        if noise is None:
            noise = self.noise.prior(x.shape, x.device)
        view = verify_view(start, n)
        hidden = self.cached_pass(x, noise, positions.repeat(2), view, cache)
        return self.logits(hidden[:, n:])


class Cache:
    """Keys and values (2, layers, N, H, slots, D) of the committed tokens, the same number in every
    row. What a pass writes behind them is overwritten by the next one, unless it is accepted."""

    def __init__(self, kv, state):
        self.kv = kv
        self.length = 0  # committed tokens
        self.state = state  # (N, 1, d) hidden state of the last of them; ar="shift" predicts by it
        self.proposed = None  # (N, c, d) hidden states of the last pass's clean tokens

    def write(self, layer, k, v):
        """Put k and v (N, H, Q, D) after the committed ones. Returns all slots (N, H, slots, D)."""
        keys, values = self.kv[:, layer]
        new = slice(self.length, self.length + k.shape[2])
        keys[:, :, new] = k
        values[:, :, new] = v
        return keys, values

    def accept(self, k):
        """Commit the first k of the last pass's clean tokens."""
        if k > 0:
            self.length += k
            self.state = self.proposed[:, k - 1 : k]
            self.proposed = self.proposed[:, k:]


# ----------------------------------------------------------------------------------------------
# Initialization


@torch.no_grad()
def initialize(model):
    """Unit-variance embeddings, small matrices, residual branches scaled with depth as in GPT-2,
    heads that look back."""
    config, d = model.config, model.config.n_embd
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.5 * d**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for block in model.blocks:
        for layer in block.outputs():
            layer.weight /= math.sqrt(2 * config.n_layer)
        look_back(block, *model.rotary[:, 1])
    nn.init.normal_(model.embedding.weight, std=d**-0.5 if config.tied else 1)


def look_back(block, cos, sin):
    """Let heads start with a preference for the previous token, strong in the first head, none in
    the last. Without it training stands still for hundreds of steps, until noisy positions have
    found their neighbors.

    The biases of query and key are a constant vector, the key's rotated by one position (by cos and
    sin (D / 2,)), so that the two match best at distance 1."""
    strength = torch.linspace(2, 0, block.n_head)[:, None]
    query = strength * torch.cat([torch.ones_like(cos), torch.zeros_like(sin)])  # (H, D)
    key = strength * torch.cat([cos, sin])
    value = torch.zeros_like(key)
    block.attn_qkv.bias.copy_(torch.cat([query, key, value]).flatten())  # (3 d,)


# ----------------------------------------------------------------------------------------------
# Random numbers that depend on a key alone, and not on what was drawn before


def random_numbers(key, rows, n):
    """Uniform float64 numbers (R, n), a function of the row and of the key, a tuple of ints: row 3
    is the same whichever rows (R,) stand beside it. Keys that must differ have the same length, for
    numpy fills up short ones with zeros: (3,) is (3, 0)."""
    rows = torch.as_tensor(rows)
    every_row = np.random.default_rng(key).random((int(rows.max()) + 1, n))
    return torch.from_numpy(every_row)[rows]


# ----------------------------------------------------------------------------------------------
# Devices and checkpoints


def find_device(name):
    """The device of a --device flag; auto is cuda where there is one, else cpu. Raises UserError.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cuda":
        name = "cuda:0"
    if name not in ["cpu", *gpus]:
        raise UserError(f"--device={name}: no such device here, or neither cpu nor cuda")
    device = torch.device(name)
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
    """The dict in a checkpoint, its config a Config. path may be a folder of published weights.
    Raises UserError."""
    if os.path.isdir(path):
        return read_published(path)
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: python train.py makes a checkpoint")
    content = {}
    if zipfile.is_zipfile(path):  # else it is damaged, or something else
        content = torch.load(path, map_location="cpu", weights_only=True)  # cannot run code
    if "config" not in content:
        raise UserError(f"{path} is no checkpoint of BlockGen, or damaged")
    saved, known = set(content["config"]), {field.name for field in fields(Config)}
    if saved != known:
        names = ", ".join(sorted(saved ^ known))
        raise UserError(f"{path} is of other code: only one of its Config and ours has {names}")
    content["config"] = Config(**content["config"])
    return content


def trained_weights(content):
    """Of a checkpoint the average that did best in validation; before the first validation the
    average so far; where it was published, the only weights that there are."""
    return content.get("best") or content.get("average") or content["model"]


def load_weights(model, weights, path):
    """Put weights from this path into the model. Raises UserError if they do not fit."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # its second line names keys
        reason = str(error).split("\n")[1].strip()
        raise UserError(f"{path} does not fit the code or the flags: {reason[:200]}") from None
    if not all(x.isfinite().all() for x in weights.values()):
        raise UserError(f"the weights in {path} are not finite")


def load_checkpoint(path, device="cpu"):
    """(model with its trained weights in evaluation mode, content of the checkpoint). Raises
    UserError."""
    content = read_checkpoint(path)
    model = BlockGen(content["config"])
    load_weights(model, trained_weights(content), path)
    return model.to(device).eval(), content


# ----------------------------------------------------------------------------------------------
# Published weights. Their model is a DiT: scales, shifts and gates computed from a time (adaLN)

END_TOKENS = ["<|endoftext|>", "[EOS]", "</s>", "<eos>", "<|end_of_text|>"]
START_TOKENS = ["[BOS]", "<s>", "<bos>", "<|begin_of_text|>", *END_TOKENS]


class Published(dict):
    """What stands in a published file."""

    def __missing__(self, key):
        raise UserError(f"this is not the published layout: {key} is missing")


def describe_tokenizer(text, path="tokenizer.json"):
    """What meta.json holds of a Hugging Face tokenizer with this text; the ids of the tokens that
    end and start a text in it. Raises UserError."""
    try:
        content = Published(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    special = {token["content"]: token["id"] for token in content["added_tokens"]}
    ends = [special[name] for name in END_TOKENS if name in special]
    starts = [special[name] for name in START_TOKENS if name in special]
    if not ends:
        raise UserError(f"{path} needs one of the special tokens {', '.join(END_TOKENS)}")
    size = max(len(content["model"]["vocab"]), 1 + max(special.values()))
    description = {"kind": "json", "json": text, "vocab_size": size, "end": ends[0]}
    return description, starts[0]


def published_tokenizer(folder, n_rows):
    """The tokenizer of published weights with so many rows of embeddings: a tokenizer.json beside
    them, or GPT-2's. Sequences begin with a start token; with a tokenizer.json a separator, a
    backslash and an n, stands between a question and its answer."""
    path = f"{folder}/tokenizer.json"
    if not os.path.exists(path):
        if n_rows not in (50257, 50258):
            raise UserError(f"put the tokenizer.json of these {n_rows} tokens into {folder}")
        return {"kind": "gpt2", "vocab_size": 50257, "start": 50256, "end": 50256}
    with open(path, encoding="utf-8") as file:
        description, start = describe_tokenizer(file.read(), path)
    if description["vocab_size"] > n_rows:
        raise UserError(f"{path} is of another model, for the weights have only {n_rows} tokens")
    return {**description, "start": start, "separator": "\\n"}


def read_published(folder):
    """The content of a checkpoint from config.json and model.safetensors in a folder. Raises
    UserError, OSError or ImportError."""
    from safetensors.torch import load_file

    with open(f"{folder}/config.json", encoding="utf-8") as file:
        c = Published(json.load(file))
    w = Published(load_file(f"{folder}/model.safetensors"))
    n_rows = len(w["vocab_embed.embedding"])
    is_masked = not w["output_layer.linear.weight"][-1].any()  # nothing predicts the mask
    config = Config(
        vocab_size=n_rows - is_masked,
        seq_len=c["length"],
        n_layer=c["n_blocks"],
        n_head=c["n_heads"],
        n_embd=c["hidden_size"],
        noise="masked" if is_masked else "uniform",
        ar="paper",
        token_causal=c["x0_causal"],
        tied=False,
    )
    meta = {"tokenizer": published_tokenizer(folder, n_rows)}
    return dict(config=config, model=fold(w, config), meta=meta, args={}, step=0)


def fold(w, config):
    """Our weights from theirs. Their time is always 0, so what adaLN computes from it is constant
    and folds exactly: scales and shifts into the LayerNorms, gates into the projections after
    attention and MLP."""
    V = config.vocab_size
    w = Published({name: x.double() for name, x in w.items()})

    def layer(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    time = torch.arange(256) < 128  # the cosines of 0, then the sines
    condition = F.silu(layer(time.double(), "sigma_map.mlp.0"))
    condition = F.silu(layer(condition, "sigma_map.mlp.2"))
    shift, scale = layer(condition, "output_layer.adaLN_modulation").chunk(2)
    ours = {
        "noisy_gain": torch.tensor(1.0),
        "embedding.weight": w["vocab_embed.embedding"],
        "norm.weight": w["output_layer.norm_final.weight"] * (1 + scale),
        "norm.bias": shift,
        "head_weight": w["output_layer.linear.weight"][:V],
        "head_bias": w["output_layer.linear.bias"][:V],
    }
    for i in range(config.n_layer):
        block = f"blocks.{i}"
        modulation = layer(condition, f"{block}.adaLN_modulation")
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6)
        ours[f"{block}.norm1.bias"] = shift1
        ours[f"{block}.norm2.bias"] = shift2
        ours[f"{block}.attn_qkv.bias"] = torch.zeros(3 * config.n_embd)
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
