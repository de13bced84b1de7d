"""Proof by test: every claim of the README that mathematics can settle, on cases small enough to
enumerate; and that the scripts do what their users expect.

    python -m pytest -q test_blockgen.py
"""

import copy
import fcntl
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace
from typing import Literal
from unittest.mock import Mock

# before Triton is imported: its kernels run on CPU tensors
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest

import prepare_data  # first: it sets an option that torch reads when it is loaded
import blockgen
import kernels
import sample
import train
import torch
import torch.nn as nn
import torch.nn.functional as F
from blockgen import Batch, BlockGen, Config, NOISES, SCHEDULES, UserError
from blockgen import draw, random_numbers, read_checkpoint
from prepare_data import END, is_answer, is_question, is_right, load_tokenizer
from prepare_data import make_tokenizer, math_problems, open_data, open_problems
from prepare_data import parse_flags, prepare, solve
from sample import CRITERIA, FILL, generate

torch.set_num_threads(1)  # faster for models of this size
HERE = os.path.dirname(os.path.abspath(blockgen.__file__))
DOUBLE = torch.float64

BOTH = pytest.mark.parametrize("ar", ["paper", "shift"])
EACH_NOISE = pytest.mark.parametrize("noise", ["masked", "uniform", "hybrid30"])
AR_AND_CACHE = [(True, "paper"), (False, "paper"), (True, "shift")]
EACH_AR_AND_CACHE = pytest.mark.parametrize("token_causal, ar", AR_AND_CACHE)


def tiny(noise="masked", seed=0, **more):
    """A small model with weights large enough that everything matters."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=11, seq_len=21, n_layer=2, n_head=2, n_embd=16, noisy_gain=0.7)
    model = BlockGen(Config(noise=noise, **shape | more)).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
        else:
            p.data.add_(0.1 * torch.randn_like(p))
    return model


def close(a, b, tolerance):
    """Equal within the tolerance; NaN is not."""
    difference = (a.double() - b.double()).abs()
    return bool((difference <= tolerance).all())


def fits(counts, law):
    """Could these counts have been drawn from the law? Chi-square, at five standard deviations;
    and what cannot be does not occur."""
    expected = law * counts.sum()
    possible = expected > 0
    if counts[~possible].any():
        return False
    terms = (counts - expected) ** 2 / expected
    freedom = int(possible.sum()) - 1
    limit = freedom + 5 * math.sqrt(2 * freedom)
    return bool(terms[possible].sum() <= limit)


def is_uniform(u, bins):
    """Do these numbers fill [0, 1) evenly?"""
    counts = torch.histc(u.float(), bins, 0, 1)
    return fits(counts, torch.full((bins,), 1 / bins))


@pytest.fixture
def nan_cache(monkeypatch):
    """The slots of a cache hold NaN until they are written, so that no read too far goes unseen."""
    cache = blockgen.Cache
    monkeypatch.setattr(blockgen, "Cache", lambda kv, state: cache(kv * math.nan, state))


NAN_CACHE = pytest.mark.usefixtures("nan_cache")


def call(module, *flags):
    """Run a script's main() with these flags."""
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", *flags]
    try:
        module.main()
    finally:
        sys.argv = argv


def refusal(module, *flags):
    """The line that a script says of flags that it refuses."""
    with pytest.raises(UserError) as error:
        call(module, *flags)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_random_numbers_depend_on_key_and_row_alone():
    u = random_numbers((3, 0), torch.arange(5), 1000)
    assert is_uniform(u, 20)
    assert torch.equal(u[[1, 1, 4]], random_numbers((3, 0), [1, 1, 4], 1000))
    for key in ((4, 0), (3, 1)):
        assert not torch.equal(u, random_numbers(key, torch.arange(5), 1000))


def test_draw_is_the_inverse_cdf_far_into_the_tail():
    probs = torch.tensor([0.0, 0.5, 1e-8, 0.0, 0.5, 0.0])
    below_one = 1 - 2**-53
    u = torch.linspace(0, below_one, 1001, dtype=DOUBLE)
    x = draw(probs.expand(1001, 6), u)
    counts = x.bincount(minlength=6)
    assert counts.tolist() == [0, 500, 1, 0, 500, 0]  # float32 sampling would miss the one


# ----------------------------------------------------------------------------------------------
# Noise, by enumeration: a random distribution over all V^n sequences

V, n = 3, 3


def every_sequence(size):
    """All sequences of n tokens, (size^n, n)."""
    tokens = [torch.arange(size)] * n
    return torch.cartesian_prod(*tokens)


STATES = every_sequence(V)


def random_distribution(seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(len(STATES), dtype=DOUBLE)
    return torch.softmax(1.5 * logits, 0)


def pure_noise_law(noise):
    """The prior, (K,)."""
    size, share = noise.vocab_size, noise.mask_share
    law = [(1 - share) / size] * size + [share]
    return torch.tensor(law[: noise.n_embeddings], dtype=DOUBLE)


def likelihood(noise, x0, xt, alpha):
    """q(xt | x0) of one token each, broadcasting."""
    return alpha * (xt == x0).double() + (1 - alpha) * pure_noise_law(noise)[xt]


def token_law(weight, i):
    """p(x_i = v), (M, V), if STATES have weights (M, V^n). If all of these are 0: anything."""
    law = weight @ F.one_hot(STATES[:, i], V).double()
    law = law / law.sum(-1, keepdim=True)
    return law.nan_to_num(1 / V)


def exact_denoiser(noise, p, x0, xt, alpha, block_size=n):
    """p(x0_i = v | the clean x0 before the block, the noisy block without position i), (M, n, V),
    for x0 and xt (M, n). alpha: a number or (n,)."""
    laws = []
    for i in range(n):
        begin = i // block_size * block_size
        clean = torch.arange(n) < begin
        tokens = torch.where(clean, x0, xt)
        survival = torch.where(clean, 1.0, alpha)
        each = likelihood(noise, STATES, tokens[:, None], survival)  # (M, V^n, n)
        seen = [j for j in range(n) if j < begin + block_size and j != i]
        laws.append(token_law(p * each[:, :, seen].prod(-1), i))
    return torch.stack(laws, 1)


def exact_predictions(noise, p, alpha):
    """The exact denoiser of p for BlockGen.predictions: its hidden states are logits."""

    def predictions(x0, xt, block_size):
        probs = exact_denoiser(noise, p, x0, xt, alpha, int(block_size[0]))
        logits = probs.log().float()
        return logits, logits

    return predictions


def corruptions(noise, alpha):
    """Everything that can happen to n tokens: uniform numbers that bring it about, (C, n), and its
    probability (C,)."""
    # survival, then each noise
    law = torch.cat([alpha[None], (1 - alpha) * pure_noise_law(noise)])
    law = law[law > 0]
    middle = law.cumsum(0) - law / 2
    outcomes = every_sequence(len(law))
    return middle[outcomes], law[outcomes].prod(-1)


@torch.no_grad()
def expected_loss(config, p, block_size, given):
    """The mean of the training pass of the exact denoiser, nats (V^n, n) for each of STATES: over
    the noise by enumeration, over t in [1e-6, 1], as in evaluation, by Gauss-Legendre in log t.
    """
    model = BlockGen(config)
    model.output_weight = lambda: torch.eye(V)
    mean, t_min = 0, 1e-6
    for node, weight in zip(*np.polynomial.legendre.leggauss(30)):
        t = torch.tensor(t_min ** ((node + 1) / 2), dtype=DOUBLE)
        alpha, _ = SCHEDULES[config.schedule](t)
        survival = torch.where(given, 1.0, alpha)
        model.predictions = exact_predictions(model.noise, p, survival)
        u, chance = corruptions(model.noise, alpha)
        x0 = STATES.repeat_interleave(len(u), 0)  # (V^n C, n)
        sizes = torch.full((len(x0),), block_size)
        u = u.repeat(len(STATES), 1)
        losses = model(Batch(x0, sizes, t.expand(x0.shape), u, given.expand(x0.shape)))
        losses = losses.unflatten(0, (len(STATES), -1))  # (V^n, C, n)
        dt = -math.log(t_min) * t * weight / 2
        mean = mean + dt * (chance[:, None] * losses).sum(1)
    return mean / (1 - t_min)


def log_marginal(p, columns):
    """log p of the tokens that each of STATES has in these columns, (V^n,)."""
    part = STATES[:, columns]
    same = (part[:, None] == part).all(-1)
    return (same.double() @ p).log()


def log_conditional(p, block_size, given):
    """log p(free tokens | given ones) of each of STATES, (V^n,), block by block. A given token
    counts as known in its own block and behind it."""
    total = torch.zeros(len(STATES), dtype=DOUBLE)
    for begin in range(0, n, block_size):
        end = min(begin + block_size, n)
        known = [i for i in range(end) if i < begin or given[i]]
        total += log_marginal(p, list(range(end))) - log_marginal(p, known)
    return total


CASES = [("linear", 3, "___"), ("cosine", 3, "___"), ("linear", 2, "___")]
CASES += [("linear", 1, "g__"), ("cosine", 2, "_g_"), ("linear", 3, "g_g")]


@pytest.mark.parametrize("schedule, block_size, pattern", CASES)
@EACH_NOISE
def test_nelbo_of_the_exact_denoiser_is_the_likelihood(
    noise, schedule, block_size, pattern
):
    """-log p(free | given) for every sequence, short of what t < 1e-6 would add; given tokens cost
    nothing."""
    given = torch.tensor([letter == "g" for letter in pattern])
    p = random_distribution(1)
    shape = dict(vocab_size=V, seq_len=n, n_head=1, n_embd=2)
    config = Config(noise=noise, schedule=schedule, ar="paper", **shape)
    loss = expected_loss(config, p, block_size, given)
    truth = -log_conditional(p, block_size, given)
    assert close(loss.sum(1), truth, 5e-4)
    assert (loss[:, given] == 0).all()


@pytest.mark.parametrize("alpha", [1e-5, 1e-3, 0.3, 0.99])
@EACH_NOISE
def test_the_bound_is_accurate_in_float32(noise, alpha):
    """As in training: for many tokens, at every noise level."""
    torch.manual_seed(0)
    noise = NOISES[noise](1000)
    x0 = torch.arange(50)
    xt = noise.corrupt(x0, 0.5)
    logits = torch.randn(50, 1000)
    alpha = torch.full((50,), alpha)
    exact = noise.nelbo(logits.double(), x0, xt, alpha.double(), -1)
    bound = noise.nelbo(logits, x0, xt, alpha, -1)
    assert bound.dtype == torch.float32
    assert close(bound, exact, 2e-3 + 1e-4 * exact.max())


def test_uniform_nelbo_equals_its_formula():
    """Also for a wrong denoiser, as UDLM and Duo write it, for alpha' = -1."""
    torch.manual_seed(0)
    size, alpha = 20, 0.3
    logits = torch.randn(50, size, dtype=DOUBLE)
    x0, xt = torch.randint(size, (2, 50))
    xbar = size * alpha * F.one_hot(x0, size).double() + 1 - alpha
    pbar = size * alpha * logits.softmax(-1) + 1 - alpha
    xbar_i, pbar_i = (x.gather(1, xt[:, None]) for x in (xbar, pbar))
    log_ratio = (pbar_i * xbar / (pbar * xbar_i)).log()
    divergence = (xbar / xbar_i * log_ratio).sum(1, keepdim=True)
    formula = (divergence - size / xbar_i + size / pbar_i)[:, 0] / (size * alpha)
    alphas = torch.full((50,), alpha, dtype=DOUBLE)
    assert close(NOISES["uniform"](size).nelbo(logits, x0, xt, alphas, -1), formula, 1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES.values())
def test_schedules_reach_their_ends(schedule):
    alpha, _ = schedule(torch.tensor([0.0, 1.0]))
    assert alpha.tolist() == [1, 0]


@EACH_NOISE
@pytest.mark.parametrize(
    "alpha_t, alpha_s", [(0, 0.4), (0.3, 0.31), (0.3, 0.8), (0.6, 1), (0, 1)]
)
def test_posterior_is_bayes_rule(noise, alpha_t, alpha_s):
    """p(xs | xt) = sum_x0 p(x0) q(xs | x0) q(xt | xs) / normalizer, one token; steps draw it."""
    noise = NOISES[noise](V)
    states = torch.arange(noise.n_embeddings)
    probs = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE)
    to_xs = likelihood(noise, torch.arange(V)[:, None], states, alpha_s)  # (V, K)
    to_xt = likelihood(noise, states, states[:, None], alpha_t / alpha_s)  # (xt, xs)
    bayes = (probs @ to_xs) * to_xt
    total = bayes.sum(1, keepdim=True)
    seen = total[:, 0] > 0
    inputs = probs.expand(len(states), V), states, alpha_s, alpha_t
    posterior = noise.posterior(*inputs)
    assert close(posterior[seen], (bayes / total)[seen], 1e-12)
    u = torch.rand(len(states), dtype=DOUBLE)
    assert torch.equal(noise.step(*inputs, u), draw(posterior, u))


def ancestral_law(noise, p, steps):
    """The exact law of ancestral sampling over STATES: the steps move the whole distribution."""
    K = noise.n_embeddings
    xt = every_sequence(K)  # (K^n, n)
    law = pure_noise_law(noise)[xt].prod(1)
    for k in range(steps):
        alpha_t, alpha_s = k / steps, (k + 1) / steps
        probs = exact_denoiser(noise, p, xt, xt, alpha_t)
        each = noise.posterior(probs, xt, alpha_s, alpha_t)  # (K^n, n, K)
        law = torch.einsum("m,ma,mb,mc->abc", law, *each.unbind(1)).flatten()
    return law[(xt < V).all(1)]


@EACH_NOISE
def test_ancestral_sampling_converges_to_the_true_distribution(noise):
    noise = NOISES[noise](V)
    p = random_distribution(1)
    product_of_marginals = sum(log_marginal(p, [i]) for i in range(n)).exp()
    assert close(ancestral_law(noise, p, steps=1), product_of_marginals, 1e-12)
    difference = ancestral_law(noise, p, steps=64) - p
    assert difference.abs().sum() < 0.02


# ----------------------------------------------------------------------------------------------
# The model


def random_text(model, rows):
    """Clean tokens (rows, 21) and noisy ones."""
    x0 = torch.randint(0, 11, (rows, 21))
    return x0, model.noise.corrupt(x0, 0.5)


def predict(model, x0, xt, block_size):
    """Logits (N, L, V) of x0 from one pass without a cache, at block sizes an int or (N,)."""
    sizes = torch.as_tensor(block_size).expand(len(x0))
    diffusion, ar = model.predictions(x0, xt, sizes)
    single = blockgen.is_single(sizes, x0.shape[1])[..., None]
    return model.logits(torch.where(single, ar, diffusion))


@NAN_CACHE
@EACH_AR_AND_CACHE
@EACH_NOISE
@torch.no_grad()
def test_cached_passes_equal_the_training_pass(noise, token_causal, ar):
    """One cache serves mixed block sizes, and more than one block may be committed at once. Where
    clean tokens see to the end of their block, a cache is for one block size."""
    model = tiny(noise, token_causal=token_causal, ar=ar)
    x0, xt = random_text(model, 2)
    cache = model.new_cache(2)
    steps = [(0, 7), (14, 7)]
    if token_causal:
        steps = [(0, 7), (14, 1), (15, 1), (16, 4), (20, 1)]
    for begin, S in steps:
        block = slice(begin, begin + S)
        logits = model.denoise(
            xt[:, block], cache, x0[:, cache.length : begin], block_size=S
        )
        assert close(logits, predict(model, x0, xt, S)[:, block], 1e-5)


@NAN_CACHE
@EACH_AR_AND_CACHE
@torch.no_grad()
def test_verification_equals_the_training_pass_at_block_size_1(token_causal, ar):
    """Accepting some tokens commits them alone: what follows sees nothing of the others."""
    model = tiny(token_causal=token_causal, ar=ar)
    x0, xt = random_text(model, 2)
    cache = model.new_cache(2)
    model.denoise(xt[:, :1], cache, x0[:, :4], block_size=1)
    for begin, accepted, end in ((4, 7, 9), (7, 7, 12), (7, 8, 8), (8, 21, 21)):
        proposal = (x0 + (torch.arange(21) >= accepted)) % 11
        block = slice(begin, end)
        logits = model.verify(proposal[:, block], cache, xt[:, block])
        assert close(logits, predict(model, proposal, xt, 1)[:, block], 1e-5)
        cache.accept(accepted - begin)
    assert cache.length == 21


@pytest.mark.parametrize("S", [1, 4, 7])
@EACH_AR_AND_CACHE
@torch.no_grad()
def test_nothing_leaks_from_the_future(token_causal, ar, S):
    """Change a token: no logit of an earlier block moves by a single bit, nor (clean tokens) of its
    own block; all later ones do. Noise counts in its own block alone."""
    model = tiny(token_causal=token_causal, ar=ar)
    x0, xt = (x.expand(21, 21) for x in random_text(model, 1))
    base = predict(model, x0, xt, S)
    changed = torch.eye(21, dtype=torch.bool)  # in row i token i is another one
    clean = torch.where(changed, (x0 + 1) % 11, x0)
    noisy = torch.where(changed, (xt + 1) % 11, xt)
    # (i, j): token i moves logits of j
    by_clean = (predict(model, clean, xt, S) != base).any(-1)
    by_noisy = (predict(model, x0, noisy, S) != base).any(-1)
    block = torch.arange(21) // S
    assert torch.equal(by_clean, block[:, None] < block)
    single = blockgen.is_single(torch.tensor([S]), 21)[0]
    reads_noise = ~single | (ar == "paper")
    assert torch.equal(by_noisy, (block[:, None] == block) & reads_noise)


def loss_inputs(question=(0, 0, 0)):
    """A batch of three rows, of which the first `question` tokens are given."""
    torch.manual_seed(0)
    x0 = torch.randint(0, 11, (3, 21))
    t, u = torch.rand(2, 3, 21, dtype=DOUBLE)
    given = torch.arange(21) < torch.tensor(question)[:, None]
    return Batch(x0, torch.tensor([1, 4, 21]), t, u, given)


@pytest.mark.parametrize("question", [(3, 9, 0), (0, 21, 2)], ids=str)
@BOTH
@EACH_NOISE
@torch.no_grad()
def test_loss_is_charged_where_it_should_be(noise, ar, question):
    """The bound; cross-entropy for blocks of one token; nothing for given, clean tokens."""
    model = tiny(noise, ar=ar)
    x0, sizes, t, u, given = batch = loss_inputs(question)
    single = torch.zeros_like(given)
    single[0] = single[1, 20] = True  # 21 = 5 x 4 + 1
    alpha = 1 - t
    xt = model.noise.corrupt(x0, torch.where(single, 0.0, alpha), u)
    xt = torch.where(given, x0, xt)
    logits = predict(model, x0, xt, sizes)
    nll = -logits.log_softmax(-1).gather(2, x0[..., None])[..., 0]
    nelbo = model.noise.nelbo(logits, x0, xt, alpha, torch.tensor(-1))
    expected = torch.where(single, nll, nelbo).masked_fill(given, 0)
    assert close(model(batch), expected, 1e-4)
    is_scored = ~given
    if noise == "masked":
        is_scored = (single | (xt == model.noise.mask)) & ~given
    assert close(model(batch, loss="ce"), nll * is_scored, 1e-5)


@BOTH
@EACH_NOISE
@torch.no_grad()
def test_losses_of_a_batch_are_those_of_its_rows(noise, ar):
    """The AR loss that ar="shift" yields beside a diffusion loss is that of block size 1."""
    model = tiny(noise, ar=ar)
    batch = loss_inputs((3, 9, 0))
    whole = model(batch, ar_weight=0.3)
    rows = [Batch(*row) for row in zip(*(x.split(1) for x in batch))]
    alone = [model(row, ar_weight=0.3) for row in rows]
    assert close(torch.cat(alone), whole, 1e-4)
    if ar == "shift":
        by_ar = model(batch._replace(block_size=torch.ones(3, dtype=torch.long)))
        assert close(whole, 0.7 * model(batch) + 0.3 * by_ar, 1e-5)


def test_the_head_runs_where_it_is_asked_a_chunk_at_a_time():
    model, sizes = tiny(), []

    def loss(logits):
        sizes.append(logits.numel())
        return logits.logsumexp(-1)

    hidden = torch.randn(3, 21, 16)
    where = torch.rand(3, 21) < 0.3
    parts = model.losses(loss, where, hidden, chunk=40)
    assert max(sizes) == 33
    assert sum(sizes) == 11 * where.sum()
    assert close(parts, loss(model.logits(hidden)) * where, 1e-5)


@torch.no_grad()
def test_initialization(monkeypatch):
    """Matrices by width and depth, the first head looking one position back, the last head without
    a preference: for norms without a bias, too."""
    monkeypatch.setattr(nn, "LayerNorm", nn.RMSNorm)
    model = BlockGen(Config())
    block, std = model.blocks[0], 128**-0.5
    small = std / 2 / 8**0.5
    layers = model.embedding, block.attn_qkv, block.attn_out, block.mlp[2]
    stds = [layer.weight.std().item() for layer in layers]
    assert stds == pytest.approx([std, std / 2, small, small], rel=0.1)
    q, k, _ = block.before(torch.zeros(1, 128, 128), *model.rotary)  # (1, H, L, D)
    scores = (q @ k.mT)[0, :, -1]  # (H, L) of the last query
    assert scores[0].argmax() == 126
    assert scores[0].max() > scores[0].mean() + 1
    assert scores[3].max() == scores[3].min()


def test_settings_are_checked_in_subclasses_too():
    @dataclass
    class Mine(Config):
        flavor: Literal["sweet", "sour"] = "sweet"

    assert Mine().flavor == "sweet"
    wrong = (
        dict(flavor="bitter"),
        dict(noise="gaussian"),
        dict(n_head=3),
        dict(token_causal=False),
    )
    for settings in wrong:
        with pytest.raises(UserError):
            Mine(**settings)
    with pytest.raises(UserError, match="noisy_gain is nan"):
        blockgen.check_at_least(
            Config(n_layer=1, noisy_gain=math.nan), 1, "n_layer", "noisy_gain"
        )


ALONE = """
import sys, torch, blockgen
assert not {"torch._dynamo", "torch.utils.benchmark"} & {*sys.modules}  # they start slowly
torch.manual_seed(0)
model = blockgen.BlockGen(blockgen.Config(vocab_size=5, seq_len=8, n_layer=1, n_embd=16, n_head=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
x0 = torch.arange(8).remainder(5).expand(4, 8)
for step in range(200):
    t, u = torch.rand(2, 4, 8, dtype=torch.float64)
    sizes = torch.tensor([1, 4, 4, 8])
    loss = model(blockgen.Batch(x0, sizes, t.clamp(min=0.1), u, x0 < 0)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    cache = model.new_cache(4)
    logits = model.denoise(torch.full((4, 4), 5), cache, x0[:, :4])
print(logits.argmax(-1)[0].tolist())
"""


def test_the_model_stands_alone(tmp_path):
    """Two files in an empty folder train and generate. Their import loads nothing that is slow."""
    for name in ("blockgen.py", "kernels.py"):
        shutil.copy(f"{HERE}/{name}", tmp_path)
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[4, 0, 1, 2]\n", "")


def test_compiled_blocks_share_two_graphs_and_change_no_gradient():
    """Of all layers, at all block sizes: attention stands between two graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain = tiny(n_layer=3)
    compiled = copy.deepcopy(plain)
    for block in compiled.blocks:
        block.before = torch.compile(block.before, backend="aot_eager")
        block.after = torch.compile(block.after, backend="aot_eager")
    for sizes in ([1, 4, 5], [16, 21, 16]):
        batch = loss_inputs()._replace(block_size=torch.tensor(sizes))
        results = []
        for model in (plain, compiled):
            loss = model(batch, ar_weight=0.3).mean()
            results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for a, b in zip(*results):
            assert close(a, b, 1e-5)
    assert counters["stats"]["unique_graphs"] == 2


# ----------------------------------------------------------------------------------------------
# Devices and checkpoints


def test_a_gpu_has_an_index(monkeypatch):
    """On a machine with two of them."""
    choose = Mock()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", Mock())
    names = {"cpu": "cpu", "auto": "cuda:0", "cuda": "cuda:0", "cuda:1": "cuda:1"}
    for name, full_name in names.items():
        device = blockgen.find_device(name)
        assert device == torch.device(full_name)
    choose.assert_called_with(device)
    for name in ("cuda:2", "cuda:x", "meta", ""):
        with pytest.raises(UserError, match=f"--device={name}"):
            blockgen.find_device(name)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    """By name: whoever changed the code since reads which field or key differs."""
    path = f"{tmp_path}/ckpt.pt"

    def is_refused(words):
        with pytest.raises(UserError, match=words):
            blockgen.load_checkpoint(path)

    is_refused("ckpt.pt is missing")
    model = tiny()
    config, weights = asdict(model.config), model.state_dict()
    cases = {
        "flavor": (config | {"flavor": 1}, weights),
        "norm.weight": (config, weights | {"norm.weight": torch.ones(7)}),
        "not finite": (config, weights | {"norm.bias": weights["norm.bias"] / 0}),
    }
    for word, (config, weights) in cases.items():
        blockgen.save_checkpoint(path, config=config, model=weights)
        is_refused(word)
    os.truncate(path, 500)
    is_refused("no checkpoint")
    torch.save(weights, path)
    is_refused("no checkpoint")


def test_checkpoints_hold_the_best_weights(tmp_path, monkeypatch):
    """The best in validation, else the average, else what there is; in bfloat16, too. A save that
    fails leaves the old file, and nothing else."""
    path = f"{tmp_path}/ckpt.pt"
    content = dict(config=asdict(tiny().config))
    for seed, kind in enumerate(["model", "average", "best"]):
        content[kind] = tiny(seed=seed).bfloat16().state_dict()
        blockgen.save_checkpoint(path, **content)
        loaded, _ = blockgen.load_checkpoint(path)
        assert not loaded.training
        assert close(loaded.norm.bias, content[kind]["norm.bias"], 0)

    monkeypatch.setattr(torch, "save", lambda content, file: file.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        blockgen.save_checkpoint(path)
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    blockgen.load_checkpoint(path)


# ----------------------------------------------------------------------------------------------
# Published checkpoints: a network in their layout, with adaLN at every layer


class PublishedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(24, bias=False)
        self.attn_qkv = nn.Linear(24, 72, bias=False)
        self.attn_out = nn.Linear(24, 24, bias=False)
        self.norm2 = nn.LayerNorm(24, bias=False)
        gelu = nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(nn.Linear(24, 96), gelu, nn.Linear(96, 24))
        self.adaLN_modulation = nn.Linear(10, 144)

    def forward(self, x, condition, turn, view):
        """x (N, 2 L, 24). turn: the rotation of each position as complex numbers (2 L, 6)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(
            condition
        ).chunk(6)
        h = self.norm1(x) * (1 + scale1) + shift1
        qkv = self.attn_qkv(h).unflatten(-1, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        turned = torch.complex(*qkv[:2].chunk(2, -1)) * turn
        q, k = torch.cat([turned.real, turned.imag], -1)
        o = kernels.attention_naive(q, k, qkv[2], view)
        x = x + gate1 * self.attn_out(o.transpose(1, 2).flatten(2))
        h = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


class Published(nn.Module):
    def __init__(self, noise="masked", K=50258):
        """Random weights, none of them trivial but what the mask's row of the head is, which never
        got a gradient."""
        super().__init__()
        self.vocab_embed = nn.ParameterDict({"embedding": torch.empty(K, 24)})
        mlp = nn.Sequential(nn.Linear(256, 10), nn.SiLU(), nn.Linear(10, 10))
        self.sigma_map = nn.ModuleDict({"mlp": mlp})
        self.blocks = nn.ModuleList([PublishedBlock(), PublishedBlock()])
        self.output_layer = last = nn.Module()
        last.norm_final = nn.LayerNorm(24, bias=False)
        last.adaLN_modulation = nn.Linear(10, 48)
        last.linear = nn.Linear(24, K)
        torch.manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)
        if noise == "masked":
            last.linear.weight.data[-1] = 0

    def forward(self, x0, xt, S, token_causal):
        """Logits (N, L, K) of the noisy half."""
        L = x0.shape[1]
        view = kernels.train_view(L, S, token_causal)
        frequency = 10000.0 ** -(torch.arange(6) / 6)
        angle = torch.arange(L).repeat(2)[:, None] * frequency
        turn = torch.polar(torch.ones_like(angle), angle)
        time = torch.tensor([1.0] * 128 + [0.0] * 128)
        condition = F.silu(self.sigma_map["mlp"](time))
        x = self.vocab_embed["embedding"][torch.cat([x0, xt], 1)]
        for block in self.blocks:
            x = block(x, condition, turn, view)
        last = self.output_layer
        shift, scale = last.adaLN_modulation(condition).chunk(2)
        return last.linear(last.norm_final(x[:, L:]) * (1 + scale) + shift)


def write_published(folder, tensors, token_causal=True):
    """The folder, as a str."""
    safetensors = pytest.importorskip("safetensors.torch")
    config = dict(x0_causal=token_causal, hidden_size=24, length=21, n_blocks=2, n_heads=2)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("noise, token_causal", [("masked", True), ("uniform", False)])
@torch.no_grad()
def test_published_weights_give_the_logits_of_their_layout(noise, token_causal, tmp_path):
    """The noise is read off the head."""
    published = Published(noise)
    folder = write_published(tmp_path, published.state_dict(), token_causal)
    model, content = blockgen.load_checkpoint(folder)
    size = 50257 if noise == "masked" else 50258
    assert (model.config.noise, model.config.vocab_size) == (noise, size)
    gpt2 = dict(kind="gpt2", vocab_size=50257, start=50256, end=50256)
    assert content["meta"]["tokenizer"] == gpt2
    x0 = torch.randint(size, (2, 21))
    xt = model.noise.corrupt(x0, 0.5)
    for S in (1, 4):
        expected = published(x0, xt, S, token_causal)[..., :size]
        assert close(predict(model, x0, xt, S), expected, 1e-4)


def small_tokenizer(*special):
    """The text of a tokenizer.json of three words and these tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2}))
    tokenizer.add_special_tokens(list(special))
    return tokenizer.to_str()


def test_the_tokenizer_of_published_weights(tmp_path):
    """A tokenizer.json beside them, which must fit; without it GPT-2's number of tokens."""
    path = tmp_path / "tokenizer.json"

    def tokenizer(K, text):
        path.write_text(text)
        folder = write_published(tmp_path, Published("uniform", K).state_dict())
        return read_checkpoint(folder)["meta"]["tokenizer"]

    text = small_tokenizer("<s>", "</s>")
    expected = dict(kind="json", json=text, vocab_size=5, start=3, end=4, separator="\\n")
    assert tokenizer(9, text) == expected
    for K, special, words in ((9, "[X]", "needs one of"), (2, "</s>", "only 2 tokens")):
        with pytest.raises(UserError, match=words):
            tokenizer(K, small_tokenizer(special))
    path.unlink()
    with pytest.raises(UserError, match="put the tokenizer.json"):
        read_checkpoint(str(tmp_path))


def test_published_files_that_do_not_fit_are_refused(tmp_path):
    """By name."""
    tensors = Published().state_dict()
    del tensors["blocks.1.mlp.0.bias"]
    folder = write_published(tmp_path, tensors)
    with pytest.raises(UserError, match="blocks.1.mlp.0.bias"):
        read_checkpoint(folder)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="length"):
        read_checkpoint(folder)


CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
PATHS = [kernels.attention_torch, kernels.attention_triton][
    : 1 + (kernels.triton is not None)
]
EACH_PATH = pytest.mark.parametrize("attention", PATHS)
DRAWN = [
    (kernels.train_view, (4, 2)),
    (kernels.denoise_view, (3, 2, 2)),
    (kernels.verify_view, (2, 2)),
]


@pytest.mark.parametrize("make_view, inputs", DRAWN)
def test_views_are_as_drawn(make_view, inputs):
    """In their docstrings."""
    lines = make_view.__doc__.splitlines()
    head = next(line for line in lines if "[start, end)" in line)
    columns = [i for i, letter in enumerate(head) if letter.isdigit()]
    rows = [line for line in lines if re.search(r"(empty|\d\))$", line)]
    drawn = torch.tensor([[row[i] == "x" for i in columns] for row in rows])
    assert torch.equal(make_view(*inputs).dense(len(columns)), drawn)


def random_view(n_keys, *shape):
    """Any bounds with which each query sees something: overlapping, empty, a fifth of the queries
    without a prefix."""
    prefix, start, end = torch.randint(n_keys + 1, (3, *shape))
    prefix[torch.rand(shape) < 0.2] = 0
    start = start.clamp(max=n_keys - 1)
    own = torch.maximum(end, start + 1)
    return kernels.View(prefix, start, torch.where(prefix == 0, own, end))


def random_qkv(length, D, dtype=torch.float32):
    """(3, N, H, length, D) as the model has them: slices of one projection, not contiguous."""
    qkv = torch.randn(2, length, 3, 2, D, dtype=dtype)
    return qkv.permute(2, 0, 3, 1, 4)


def with_gradients(attention, inputs, view, grad):
    """[o, dq, dk, dv]"""
    inputs = [x.detach().requires_grad_() for x in inputs]
    o = attention(*inputs, view)
    return [o, *torch.autograd.grad(o, inputs, grad.to(o.dtype))]


@EACH_PATH
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("L, S, D", [(1, 1, 16), (81, 16, 24), (20, 1, 128), (40, 40, 5)])
def test_attention_is_the_textbooks(attention, dtype, tolerance, L, S, D):
    """Also for fewer queries than keys, of which nobody sees the last ones."""
    torch.manual_seed(0)
    mixed = kernels.train_view(L, torch.tensor([max(1, S // 2), S]))
    for view in (mixed, random_view(2 * L, 2 * L), random_view(L, 2, L)):
        q, k, v = random_qkv(2 * L, D, dtype)
        q = q[:, :, : view.prefix.shape[-1]]
        grad = torch.randn_like(q)
        ours = with_gradients(attention, (q, k, v), view, grad)
        doubles = (x.double() for x in (q, k, v))
        exact = with_gradients(kernels.attention_naive, doubles, view, grad)
        for a, b in zip(ours, exact):
            assert close(a, b, tolerance * b.abs().max().clamp(min=1))


def states_of(mask, tile):
    """(query tiles, key tiles): 2 if they hold nothing but visible pairs, 1 if they hold some."""
    n_queries, n_keys = mask.shape
    mask = F.pad(mask.float(), (0, -n_keys % tile, 0, -n_queries % tile))[None]
    return (F.max_pool2d(mask, tile) + 1 - F.max_pool2d(1 - mask, tile))[0]


def states_in(lists, n_others):
    """The same, as the kernels read it in their lists."""
    states = torch.zeros(len(lists), n_others)
    for state, (n_whole, n_seen, *order) in zip(states, lists.tolist()):
        for i in order[:n_seen] + order[:n_whole]:
            state[i] += 1
    return states


@pytest.mark.parametrize("L, S, tile", [(512, 1, 64), (333, 7, 32), (75, None, 64)])
def test_kernels_visit_the_tiles_that_hold_a_visible_pair_and_no_other(L, S, tile):
    torch.manual_seed(0)
    T = 2 * L
    view = kernels.train_view(L, S) if S else random_view(T, 3, T)
    _, *tables = kernels.make_tables(view, T, tile, CPU)
    masks = view.dense(T).view(-1, T, T)
    for mask, by_query, by_key in zip(masks, *tables, strict=True):
        states = states_of(mask, tile)
        assert torch.equal(states_in(by_query, len(states)), states)
        assert torch.equal(states_in(by_key, len(states)), states.T)


def test_torch_visits_no_other_keys_either():
    """Of 1,024 pairs of tiles, 288 hold a visible pair. A slice of the cache is not copied."""
    view = kernels.train_view(1024, 16)
    tile, masks = kernels.make_masks(view, CPU)
    rows = view.dense(2048).split(tile)
    for (keys, mask), seen in zip(masks, rows, strict=True):
        numbers = torch.arange(2048)
        numbers = numbers[:keys] if isinstance(keys, int) else keys
        visible = seen.any(0).nonzero()[:, 0]
        assert torch.equal(numbers, visible)
        assert torch.equal(mask[0, 0], seen[:, visible])
    _, masks = kernels.make_masks(kernels.denoise_view(100, 0, 16), CPU)
    assert masks == [(116, None)]


def test_rows_of_one_block_size_share_what_a_view_needs():
    """In all layers and steps: it is made once."""
    before = kernels.make_masks.cache_info().misses
    model = tiny()
    batch = loss_inputs()._replace(block_size=torch.full((3,), 5))
    for step in range(2):
        model(batch)
    assert kernels.make_masks.cache_info().misses == before + 1


@needs_triton
@BOTH
def test_training_with_the_kernels(monkeypatch, ar):
    """In the interpreter: losses and gradients as with the attention in PyTorch."""
    results = []
    for attention in PATHS:
        monkeypatch.setattr(blockgen, "block_attention", attention)
        model = tiny("hybrid30", ar=ar, n_embd=32)
        losses = model(loss_inputs(), ar_weight=0.3)
        gradients = torch.autograd.grad(losses.mean(), list(model.parameters()))
        results.append([losses, *gradients])
    for a, b in zip(*results):
        assert close(a, b, 1e-4)


@needs_triton
def test_use_triton(monkeypatch, capsys):
    """Where it cannot, stderr says why, once; a bug is a traceback."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: torch.zeros(*shape))

    def reason(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        kernels.use_triton.cache_clear()
        answers = {kernels.use_triton(gpu), kernels.use_triton(gpu)}
        said = capsys.readouterr().err
        assert answers == {said == ""} and said.count("\n") == (said != "")
        return said

    assert not kernels.use_triton(CPU)
    assert reason((8, 0)) == ""
    assert "capability 8.0" in reason((7, 5))
    probe = Mock()
    monkeypatch.setattr(kernels, "probe_kernel", {(1,): probe})
    for error in (RuntimeError("No C\ncompiler"), subprocess.CalledProcessError(1, "gcc")):
        probe.side_effect = error
        assert "cannot compile" in reason((9, 0))
    probe.side_effect = NameError("a bug")
    with pytest.raises(NameError):
        reason((9, 0))
    monkeypatch.setattr(kernels, "triton", None)
    assert "not installed" in reason((9, 0))


def test_block_attention_leaves_wide_heads_to_torch(monkeypatch):
    monkeypatch.setattr(kernels, "attention_triton", lambda *_: "triton")
    monkeypatch.setattr(kernels, "attention_torch", lambda *_: "torch")
    cases = [(False, 64, "torch"), (True, 128, "triton"), (True, 129, "torch")]
    for triton_works, D, chosen in cases:
        monkeypatch.setattr(kernels, "use_triton", lambda device: triton_works)
        assert kernels.block_attention(*random_qkv(4, D), None) == chosen


AHEAD_OF_TIME = """
import os, re, subprocess, sys
import triton, kernels
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOL = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
CUBIN = os.path.join(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
TYPES = {"scale": "fp32", "LSE": "*fp32", "DELTA": "*fp32", "DQ": "*fp32"}
TYPES |= {"BOUNDS": "*i32", "LISTS": "*i32"} | dict.fromkeys(["D", "BLOCK_D", "TILE"], "constexpr")

def check(kernel, architecture, dtype, options):
    constants = {name: options.pop(name) for name in ("D", "BLOCK_D", "TILE")}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = TYPES.get(name, "*" + dtype if name.isupper() else "i32")
        signature[name] = kind
        if kind.startswith("*"):
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, GPUTarget("cuda", int(architecture), 32), options)
    with open(CUBIN, "wb") as file:
        file.write(built.asm["cubin"])
    usage = subprocess.run([TOOL, "-res-usage", CUBIN], capture_output=True, text=True).stdout
    spill = int(re.search(r"STACK:(\\d+)", usage)[1])
    shared = built.metadata.shared
    assert "mma" in built.asm["ptx"] and shared <= 99 * 1024 and spill <= 32, (shared, spill)

for case in sys.argv[1:]:
    print(case, flush=True)
    architecture, dtype, D = case.split(",")
    for kernel, backward in ((kernels.forward_kernel, False), (kernels.backward_kernel, True)):
        options = kernels.launch_options(int(D), 2 if dtype == "bf16" else 4, backward)
        check(kernel, architecture, dtype, options)
"""
COMPILED = "80,bf16,64 90,bf16,64 100,bf16,64 120,bf16,64 80,fp32,128 90,bf16,128".split()


@needs_triton
def test_kernels_compile_ahead_of_time(tmp_path):
    """No GPU is needed for that. From A100 to B200 and RTX 5090 they use the matrix units, fit in
    the 99 KB of shared memory that the smaller ones have, and spill at most 32 bytes."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", AHEAD_OF_TIME, *COMPILED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == COMPILED


# ----------------------------------------------------------------------------------------------
# Sampling: the law of speculative decoding


def samples(model, rows, length=None, **options):
    """Tokens (rows, L)."""
    return generate(model, rows, length or model.config.seq_len, **options)[0]


def ar_law(model, given, temperature, top_k):
    """The law over STATES of writing from left to right around given tokens, -1 where free."""
    logits = model.verify(STATES, model.new_cache(len(STATES))) / temperature
    least = logits.topk(top_k).values[..., -1:]
    probs = logits.masked_fill(logits < least, -math.inf).softmax(-1)
    each = blockgen.at_index(probs, STATES).double()  # (V^n, n)
    agrees = (STATES == given).double()
    return torch.where(given < 0, each, agrees).prod(1)


@EACH_NOISE
@torch.no_grad()
def test_speculative_samples_are_exactly_ar_samples(noise):
    """Of many rows, most of which run ahead of the slowest, also where a prompt stands behind free
    tokens; temperature and top-k act on both sides."""
    model = tiny(noise, vocab_size=V, seq_len=n)
    prompts = torch.tensor([(-1, -1, -1), (2, -1, -1), (-1, 0, -1), (1, -1, 2)])
    given = prompts.repeat(5000, 1)
    shape = dict(temperature=2.0, top_k=2)
    write = partial(samples, model, len(given), given=given, seed=2, **shape)

    def has_law(tokens, prompt):
        index = tokens @ torch.tensor([V * V, V, 1])
        return fits(
            torch.bincount(index, minlength=len(STATES)), ar_law(model, prompt, **shape)
        )

    tokens = write(sampler="speculative")
    assert all(has_law(tokens[i::4], prompt) for i, prompt in enumerate(prompts))
    # the test has teeth: the draft alone has another law
    assert not has_law(write(steps=1)[::4], prompts[0])


# ----------------------------------------------------------------------------------------------
# Sampling: the algorithms, as a paper would write them


class Direct:
    """Generation as a paper would write it: one row, plain loops, and everything is computed anew
    in every pass, from the text as it stands. The random numbers are those of generate().

    tokens are -1 where nothing is decided. A text longer than the context goes on from the last
    half of it. Each sampler is a function that fills the free tokens of a block; for speculative
    decoding, at temperature 0, it is that of the AR side."""

    def __init__(self, model, given, row, **options):
        self.model, self.tokens, self.row = model, list(given), row
        self.options = sample.Options(**options)

    def write(self):
        begin = window = 0
        L = self.model.config.seq_len
        one_by_one = self.options.sampler in ("ar", "speculative")
        self.size = 1 if one_by_one else self.options.block_size
        while begin < len(self.tokens):
            if begin == window + L:
                window = begin - L // 2
            end = min(begin + self.size, window + L, len(self.tokens))
            self.block, self.context = range(begin, end), self.tokens[window:begin]
            self.free = [i for i in self.block if self.tokens[i] < 0]
            if self.free:
                xt = dict(zip(self.block, self.tokens[begin:end]))
                xt |= {i: self.noise(sample.PRIOR, 0, i) for i in self.free}
                BY_HAND[self.options.sampler](self, xt)
            begin = next((i for i in self.block if self.tokens[i] < 0), end)
        return self.tokens

    def uniform(self, purpose, step, i):
        """The uniform number for token i."""
        begin = self.block.start
        key = self.options.seed, purpose, step, begin
        return random_numbers(key, [self.row], len(self.block))[0, i - begin]

    def noise(self, purpose, step, i):
        """A token of pure noise for place i."""
        return int(self.model.noise.prior((), u=self.uniform(purpose, step, i)))

    def logits(self, clean, noisy):
        """(n, V), of n noisy tokens that follow clean ones: the model without a past."""
        clean, noisy = (torch.tensor([x], dtype=torch.int64) for x in (clean, noisy))
        return self.model.denoise(noisy, self.model.new_cache(1), clean, self.size)[
            0
        ].float()

    def diffusion(self, xt):
        """The logits of the block at noisy tokens xt, by place."""
        return dict(zip(self.block, self.logits(self.context, list(xt.values()))))

    def ar(self, x, step):
        """The AR side's logits of the tokens x of the block, one after the other, by place."""
        clean, logits = list(self.context), {}
        for i in self.block:
            noise = self.noise(sample.VERIFY, step, i)
            logits[i] = self.logits(clean, [noise])[0]
            clean.append(x[i])
        return logits

    def law(self, logits):
        """What a token is drawn from, (V,): temperature, then the k likeliest tokens."""
        likely = logits.topk(self.options.top_k or len(logits)).indices
        probs = torch.zeros_like(logits)
        probs[likely] = (logits[likely] / max(self.options.temperature, 1e-9)).softmax(-1)
        return probs


def steps_by_hand(direct, xt):
    """Ancestral sampling and ARPC: at each of the steps predict the clean tokens, and step back to
    the next noise level. A guided step of ARPC goes all the way instead, asks the AR side, and
    sends the tokens with the lowest likelihood back to noise, so many as the level demands.
    """
    o, model = direct.options, direct.model
    steps = o.steps if len(direct.block) > 1 else 1
    t = 1 - torch.arange(steps + 1, dtype=DOUBLE) / steps
    alpha = SCHEDULES[model.config.schedule](t)[0].tolist()
    for k in range(steps):
        guided = o.sampler == "arpc" and k in range(steps - 1)[o.warmup :: o.guide_every]
        target = 1.0 if guided else alpha[k + 1]
        logits = direct.diffusion(xt)
        for i in direct.free:
            u = direct.uniform(sample.REVEAL, k, i)
            probs, old = direct.law(logits[i]), torch.tensor(xt[i])
            xt[i] = int(model.noise.step(probs, old, target, alpha[k], u))
        if guided:
            ar = direct.ar(xt, k)
            score = {i: -ar[i].log_softmax(-1)[xt[i]].item() for i in direct.free}
            count = max(1, round((1 - alpha[k + 1]) * len(direct.block)))
            for i in sorted(direct.free, key=score.get, reverse=True)[:count]:
                xt[i] = direct.noise(sample.RENOISE, k + 1, i)
    for i in direct.free:
        direct.tokens[i] = xt[i]


def confidence_by_hand(direct, xt):
    """Draw all free tokens; write those that the model holds for likely, at least the likeliest;
    and again with the others."""
    k, free = 0, direct.free
    while free:
        logits = direct.diffusion(xt)
        drawn, confidence = {}, {}
        for i in free:
            drawn[i] = int(draw(direct.law(logits[i]), direct.uniform(sample.REVEAL, k, i)))
            confidence[i] = logits[i].softmax(-1)[drawn[i]].item()
        likeliest = max(free, key=confidence.get)
        for i in free:
            if i == likeliest or confidence[i] > direct.options.threshold:
                xt[i] = direct.tokens[i] = drawn[i]
        free = [i for i in free if direct.tokens[i] < 0]
        k += 1


BY_HAND = {**dict.fromkeys(FILL, steps_by_hand), "confidence": confidence_by_hand}

GIVEN = torch.full((3, 45), -1)  # the context is 21 tokens
GIVEN[0, :30] = 1
GIVEN[1, 3:9] = 2
GIVEN[1, 20:23] = 4
GIVEN[2, :13] = 3
VARIANTS = [dict(sampler=name) for name in ("ancestral", "ar", "arpc", "confidence")]
VARIANTS += [
    dict(sampler="arpc", warmup=1, guide_every=2, steps=6, top_k=0, temperature=1.0),
    dict(sampler="speculative", temperature=0.0),
]


@NAN_CACHE
@EACH_AR_AND_CACHE
@EACH_NOISE
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_samplers_equal_direct_implementations(variant, noise, token_causal, ar):
    """Token for token, beyond the context too; so the cache, the other rows of a batch, and what
    has left the context change nothing. In float64, so that no rounding decides a draw."""
    schedule = "cosine" if noise == "uniform" else "linear"
    model = tiny(noise, ar=ar, token_causal=token_causal, schedule=schedule).double()
    options = dict(block_size=5, steps=4, threshold=0.3, temperature=0.7, top_k=4, seed=5)
    options |= variant
    if not token_causal and options["sampler"] in ("arpc", "speculative"):
        with pytest.raises(UserError, match="block-causal"):
            samples(model, 3, **options)
        return
    tokens, stats = generate(model, 3, 45, given=GIVEN, **options)
    # the two draw other noise for the AR side
    noise_matters = ar == "paper" and noise != "masked"
    if not (options["sampler"] == "speculative" and noise_matters):
        for i in range(3):
            assert (
                tokens[i].tolist() == Direct(model, GIVEN[i].tolist(), i, **options).write()
            )
    if variant == dict(sampler="arpc"):
        # Blocks of 5, 5, 5, 5, 1 tokens; then, in contexts whose first ten tokens are kept, twice
        # 5, 5, 1; at last 2. A block takes 2 steps - 1 passes, a single token one.
        assert stats["nfe"] == 9 * 7 + 3


def test_criteria_equal_their_formulas():
    """Some tokens were revealed before: there the diffusion side is a point mass."""
    torch.manual_seed(0)
    noise = NOISES["masked"](6)
    ar, diffusion = torch.randn(2, 30, 6, dtype=DOUBLE)
    x = torch.randint(0, 6, (30,))
    revealed = torch.rand(30) < 0.4
    xt = torch.where(revealed, x, noise.mask)
    run = SimpleNamespace(model=SimpleNamespace(noise=noise), verify=lambda *_: ar[None])
    proposal = sample.Proposal(run, x[None], xt[None], diffusion[None], 0)

    p = ar.softmax(-1)
    q = torch.where(revealed[:, None], F.one_hot(x, 6).double(), diffusion.softmax(-1))
    nll = -blockgen.at_index(p, x).log()
    first, second = q.sort(-1, descending=True).values.T[:2]
    divergence = torch.distributions.kl_divergence
    P, Q = (torch.distributions.Categorical(probs) for probs in (p, q))
    expected = dict(
        kld=torch.where(revealed, nll, divergence(P, Q)),
        reverse_kld=divergence(Q, P),
        tvd=(p - q).abs().sum(-1) / 2,
        ar_nll=nll,
        ar_gap=p.max(-1).values.log() + nll,
        ar_entropy=P.entropy(),
        diffusion_entropy=Q.entropy(),
        diffusion_confidence=-first,
        diffusion_margin=second - first,
    )
    assert {*expected, "random"} == set(CRITERIA)
    for name, scores in expected.items():
        assert close(CRITERIA[name](proposal)[0], scores, 1e-6)


def test_a_sampler_that_decides_nothing_is_an_error(monkeypatch):
    monkeypatch.setitem(FILL, "confidence", lambda run: None)
    with pytest.raises(RuntimeError, match="confidence"):
        samples(tiny(), 2, sampler="confidence")


@pytest.mark.parametrize("sampler", FILL)
def test_rows_stop_at_their_end_token(sampler):
    """The prompt's own end tokens do not count, nor do those before something given. Rows that
    have ended cost no passes."""
    model, end = tiny(), 3
    model.head_bias.data[end] = 6.0  # likely
    given = torch.full((6, 21), -1)
    given[:, :4] = end
    given[0, 20] = 0
    options = dict(sampler=sampler, block_size=2, steps=2, stop=end)
    tokens = samples(model, 6, given=given, **options)
    assert tokens[0, 20] == 0
    for row in tokens[1:, 4:].tolist():
        assert set(row[row.index(end) :]) == {end}
    _, stats = generate(model, 5, 21, given=given[1:], **options)
    assert stats["nfe"] < 17  # as many as there are free tokens


# ----------------------------------------------------------------------------------------------
# sample.py as its users call it


def write_checkpoint(path, letters, end_bias=0.0, **config):
    """A small model of some letters, and an end token, in a file. Returns a function from tokens x
    (L,) to the AR side's logits of all but the first, (L - 1, V), by the training pass at block
    size 1."""
    end = len(letters)
    tokens = [letter.encode().hex() for letter in letters]
    tokenizer = dict(kind="char", tokens=tokens, vocab_size=end + 1, end=end)
    model = tiny(vocab_size=end + 1, **config)
    model.head_bias.data[end] += end_bias
    meta = dict(tokenizer=tokenizer)
    config = asdict(model.config)
    blockgen.save_checkpoint(
        path, meta=meta, config=config, model=model.state_dict(), args={}
    )

    def logits(x):
        hidden = model.predictions(x[None], x[None], torch.tensor([1]))[1]
        return model.logits(hidden)[0, 1:]

    return logits


def write_transformer(folder, letters, seq_len, seed):
    """The same of a random GPT-2 for the package transformers."""
    transformers = pytest.importorskip("transformers")
    import tokenizers

    vocab = {letter: i for i, letter in enumerate([*letters, END])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token=END, bos_token=END).save_pretrained(folder)
    shape = dict(n_positions=seq_len, n_embd=8, n_layer=2, n_head=2, initializer_range=0.5)
    config = transformers.GPT2Config(vocab_size=len(vocab), **shape)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return lambda x: model(x[None]).logits[0, :-1]


def run_sample(capsys, *flags):
    """What sample.py prints."""
    call(sample, *flags)
    return capsys.readouterr().out


@pytest.mark.parametrize("write", [None, write_checkpoint, write_transformer])
@torch.no_grad()
def test_perplexity_entropy_and_bits(write, monkeypatch, tmp_path, capsys):
    """Of a table of texts, against a plain computation. A judge with another vocabulary and a
    shorter context reads the beginning alone; the first token is free of charge, and the end
    token counts where there is one."""
    monkeypatch.setattr(sample, "GRID", [dict(sampler="ar")])
    ours = theirs = "abcdefé∎"  # the last one ends a text
    longest = 21
    logits = write_checkpoint(tmp_path / "model.pt", ours[:-1], end_bias=1.5)
    flags = [f"--ckpt={tmp_path}/model.pt", "--table", "--num_samples=9", "--batch_size=4"]
    if write:
        theirs, longest = "xéfedcba∎", 9
        logits = write(tmp_path / "judge", theirs[:-1], seq_len=longest, seed=1)
        flags.append(f"--judge={tmp_path}/judge")
    figures = run_sample(capsys, *flags).split()[-4:]

    model, _ = blockgen.load_checkpoint(tmp_path / "model.pt")
    rows = samples(model, 9, sampler="ar", stop=7).tolist()
    sums, entropies = [], []
    for row in rows:
        row = row[: row.index(7) + 1] if 7 in row else row
        share = np.bincount(row) / len(row)
        entropies.append(-sum(p * math.log(p) for p in share if p))
        x = torch.tensor([theirs.find(ours[i]) for i in row[:longest]])
        nats = F.cross_entropy(logits(x), x[1:], reduction="sum").item()
        text = "".join(theirs[i] for i in x[1:]).rstrip("∎")
        sums.append((nats, len(x) - 1, len(text.encode())))
    assert 0 < sum(7 in row for row in rows) < 9  # some texts end, not all
    nats, tokens, n_bytes = np.array(sums).T
    mean = nats.sum() / tokens.sum()
    error = np.linalg.norm(nats - mean * tokens) / tokens.sum()
    bits = nats.sum() / math.log(2) / n_bytes.sum()
    expected = [math.exp(mean), math.exp(mean) * error, np.mean(entropies), bits]
    assert [float(x) for x in figures] == pytest.approx(expected, abs=6e-3)


@pytest.fixture
def puzzles(tmp_path):
    """Flags for a model, and for a dataset of problems that it was not trained on."""
    problems = ("a+a", "#### 2"), ("b+a", "#### 3"), ("sort ba", "ab"), ("a" * 30, "#### 9")
    lines = [json.dumps(dict(question=q, answer=a)) for q, a in problems]
    os.mkdir(tmp_path / "puzzles")
    (tmp_path / "puzzles" / "val.jsonl").write_text("\n".join(lines))
    write_checkpoint(tmp_path / "ckpt.pt", "#+ 2349abort s", seq_len=24)
    return f"--ckpt={tmp_path}/ckpt.pt", f"--data_dir={tmp_path}", "--dataset=puzzles"


def test_problems_of_another_dataset(puzzles, monkeypatch, capsys):
    """The model's tokenizer encodes them; an answer begins behind the question and ends at the
    end token; a question that does not fit is counted as wrong."""

    def always_says_two(model, n, length, *, given, stop, **options):
        answer = torch.tensor([0, 0, 0, 0, 2, 3] + [stop] * length)  # "####", " ", "2"
        free = given < 0
        return torch.where(free, answer[free.cumsum(1) - 1], given), dict(
            nfe=7, seconds=1.0
        )

    monkeypatch.setattr(sample, "generate", always_says_two)
    monkeypatch.setattr(sample, "GRID", [dict(sampler="ar")])
    out = run_sample(capsys, *puzzles, "--table", "--num_samples=4", "--batch_size=3")
    assert "1 of them too long" in out
    assert out.split()[-3:] == ["7.0", "0.250", "0.217"]  # sqrt(3 / 16 / 4)
    assert "a+a\n#### 2= 2.0, right\n" in run_sample(capsys, *puzzles, "--problem=0")
    assert "wrong" in run_sample(capsys, *puzzles, "--problem=1")


def test_texts_prompts_and_templates(tmp_path, capsys):
    write_checkpoint(tmp_path / "ckpt.pt", "abcdef _")
    run = partial(run_sample, capsys, f"--ckpt={tmp_path}/ckpt.pt")
    out = run("--num_samples=3", "--batch_size=2", "--length=50", "--seed=3", "--top_k=3")
    *texts, last = out.split("\n" + "-" * 80 + "\n")
    assert len(texts) == 3 and last.startswith("nfe ")
    assert 21 < len(texts[0]) <= 50
    text = run("--template=__[2 tokens]b[1 token]", "--sampler=confidence").split("\n")[0]
    assert text.startswith("__") and len(text) <= 6
    out = run("--prompt=ab", "--sampler=arpc", "--watch")
    assert "\nab" in out
    assert re.search(r"\| ab.*[-]._?", out)
    assert "\033" not in out  # colors are for a terminal


SAMPLE_REFUSES = [
    ("--block_size=0", "block_size"),
    ("--temperature=nan", "temperature"),
    ("--prompt=aaaaaaaaaaaaaaaaaaaaaaaaa", "25 tokens"),
    ("--prompt=a --template=[1_token]", "exclude"),
    ("--template=a__b", "[2 tokens]"),
    ("--problem=4", "below 4"),
    ("--problem=3", "length"),
    ("--table --judge=gpt2", "judge"),
]


@pytest.mark.parametrize("flags, word", SAMPLE_REFUSES)
def test_sample_refuses(puzzles, flags, word):
    assert word in refusal(sample, *puzzles, *flags.split())


# ----------------------------------------------------------------------------------------------
# Batches

TOY = """
    --dataset=chain --seq_len=24 --n_layer=1 --n_head=2 --n_embd=16 --device=cpu --batch_size=8
    --block_sizes=1,5 --eval_interval=1000 --eval_seqs=8 --max_iters=4
"""


def write_data(folder, train, val, **more):
    """Somebody's own integers, as a dataset. The end token of problems is 0."""
    folder.mkdir()
    for part, tokens in (("train", train), ("val", val)):
        np.asarray(tokens, np.uint16).tofile(folder / f"{part}.bin")
    meta = dict(vocab_size=12, tokenizer=dict(kind="none", vocab_size=12, end=0))
    (folder / "meta.json").write_text(json.dumps(meta | more))


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """A Markov chain, and problems in rows of 24 tokens."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    successors = rng.integers(12, size=(12, 2))  # each token has two, equally likely
    chain = [0]
    for choice in rng.integers(2, size=40_000):
        chain.append(successors[chain[-1], choice])
    write_data(folder / "chain", chain[:36_000], chain[36_000:], unigram_nats=2.2)
    rows = rng.integers(1, 12, size=(400, 24))
    for row in rows:
        row[rng.integers(2, 6)] = 0
        row[rng.integers(8, 22) :] = 0
    write_data(
        folder / "puzzles", rows[:320], rows[320:], row_length=24, bytes_per_token=2.0
    )
    return folder


def toy_flags(toy_data, out, *more):
    return " ".join([TOY, f"--data_dir={toy_data} --out_dir={out}", *more]).split()


@pytest.fixture
def toy(toy_data, tmp_path):
    """A function that makes args, config, data, val and meta of some flags."""

    def make(*more):
        args, config, _ = train.read_flags(toy_flags(toy_data, tmp_path / "out", *more))
        return args, config, *train.load_data(args, config.seq_len)

    return make


same = partial(
    torch.testing.assert_close, rtol=0, atol=0
)  # bit for bit, in dicts and lists


def test_batches_are_stratified_and_made_of_rows(toy):
    args, config, data, _, meta = toy(
        "--block_sizes=1,5,24 --block_weights=1,2,1 --ar=paper"
    )
    mixture, _ = train.make_mixture(args, config.ar)
    for step in range(20):
        draw_rows = partial(train.draw_batch, data, meta, mixture, args, step)
        batch = draw_rows(torch.arange(8))
        parts = [draw_rows(rows) for rows in torch.arange(8).chunk(3)]
        same([*batch], [torch.cat(pieces) for pieces in zip(*parts)])
        assert sorted(batch.block_size.tolist()) == [1, 1, 5, 5, 5, 5, 24, 24]
        levels = batch.t[batch.block_size == 5]
        assert (levels[:, 5:10] == levels[:, 5:6]).all()  # constant in a block
        gaps = levels[:, ::5].flatten().sort().values.diff()
        one_in_each_interval = torch.tensor((1 - args.t_min) / 20)
        assert close(gaps, one_in_each_interval, 1e-6)


def test_each_noise_level_is_uniform():
    options = torch.tensor([6, 7]), torch.tensor([0.0, 0.5]), torch.tensor([4, 4]), 21
    draws = [train.draw_noise((5, k), *options, 0.25)[0] for k in range(2000)]
    level = (torch.stack(draws) - 0.25) / 0.75  # (keys, 2, 21)
    assert is_uniform(level[:, 0, 0], 20)
    assert is_uniform(level[:, 1, 20], 20)
    apart = (level[:, 1, 0] - level[:, 0, 0]) % 1  # each row begins with a random interval
    assert is_uniform(apart, 6)


def test_under_shift_every_row_has_block_size_1():
    args = train.Settings(block_sizes=(1, 5, 24), block_weights=(1, 2, 1))
    mixture, ar_weight = train.make_mixture(args, "shift")
    assert mixture == pytest.approx({5: 2 / 3, 24: 1 / 3})
    assert ar_weight == 1 / 4


def test_rows_of_a_text_begin_anywhere(toy_data, toy):
    """Those for validation are spread over all of it, even over two billion."""
    length = 2**31
    write_data(toy_data / "large", [1] * 99, range(12))
    with open(toy_data / "large" / "val.bin", "ab") as file:
        file.truncate(2 * length - 48)  # the rest is zero and takes no memory
        file.seek(0, 2)
        np.arange(24, dtype=np.uint16).tofile(file)
    _, _, data, val, _ = toy("--dataset=large --eval_seqs=100")
    assert data.shape == (76, 24)
    assert len(val.x0) == 100 and val.x0[:99].sum() == 66
    assert val.x0[-1].tolist() == [*range(24)]


# ----------------------------------------------------------------------------------------------
# Optimizers


def test_learning_rate():
    args = train.Settings(learning_rate=2.0, warmup_iters=10, max_iters=1000)
    rates = [train.learning_rate(args, step) for step in (0, 500, 1000)]
    assert rates == pytest.approx([0.2, 1.0, 0.0])
    args.lr_decay = "constant"
    assert train.learning_rate(args, 500) == 2


def test_average_of_the_weights_is_short_at_first():
    average, model = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for step, decay in ((0, 1 / 6), (10_000, 0.9)):
        expected = decay * average.weight + (1 - decay) * model.weight
        train.update_average(average, model, 0.9, step)
        assert close(average.weight, expected, 1e-6)


def test_muon_is_torchs_in_float32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's, exact
    shapes = (12, 4), (4, 12), (12, 4), (6, 6)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    others = copy.deepcopy(matrices)
    ours = train.Muon(matrices, train.Settings(weight_decay=0.2))
    theirs = torch.optim.Muon(others, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for size in (1, 1e-6, 3):
        for p, other in zip(matrices, others):
            p.grad = other.grad = size * torch.randn_like(p)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.3
            optimizer.step()
        assert all(map(partial(close, tolerance=1e-5), matrices, others))


def test_only_matrices_of_layers_decay(toy):
    args, config, *_ = toy("--weight_decay=0.3")
    layers, rest = train.make_optimizers(BlockGen(config), args)
    [group], [other] = layers.param_groups, rest.param_groups
    assert [p.shape for p in group["params"]] == [(48, 16), (16, 16), (64, 16), (16, 64)]
    assert (group["weight_decay"], other["weight_decay"]) == (0.3, 0)


# ----------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(autouse=True)
def usual_signals():
    """Take back from train.py what it does with signals."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_toy(toy_data, out, *more):
    """Run train.py; the content of its checkpoint."""
    call(train, *toy_flags(toy_data, out, *more))
    return read_checkpoint(out / "ckpt.pt")


def go_on(out, *more):
    call(train, "--resume", "--device=cpu", f"--out_dir={out}", *more)
    return read_checkpoint(out / "ckpt.pt")


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def at_step(monkeypatch, step, action):
    """Do something in the middle of a training step."""
    original = train.learning_rate

    def changed(args, now):
        if now == step:
            action()
        return original(args, now)

    monkeypatch.setattr(train, "learning_rate", changed)


def crash(*_):
    raise RuntimeError("a bug")


CRASHES = pytest.raises(RuntimeError, match="a bug")
RESUMED = [
    "--dropout=0.1 --noise=uniform --ar=paper",
    "--dataset=puzzles --optimizer=adamw",
]


@pytest.mark.parametrize("flags", RESUMED)
def test_resuming_equals_not_interrupting(toy_data, tmp_path, monkeypatch, capfd, flags):
    """Bit for bit, with the log: after a signal, which is answered, and after a crash, where the
    log is ahead of the checkpoint."""
    flags += " --max_iters=12 --eval_interval=4"
    whole, part = tmp_path / "whole", tmp_path / "part"
    expected = run_toy(toy_data, whole, flags)
    at_step(monkeypatch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_toy(toy_data, part, flags)["step"] == 7  # it is heard in the next step
    assert "stopping after this step" in capfd.readouterr().err
    at_step(monkeypatch, 10, crash)
    with CRASHES:
        go_on(part)
    assert log_of(part)[-1]["step"] == 9
    with open(part / "log.jsonl", "a") as log:
        log.write('{"step": 10')  # cut off
    monkeypatch.undo()
    again = go_on(part)
    for name in ("model", "average", "best", "best_loss", "step"):
        same(again[name], expected[name])
    for a, b in zip(again["optimizers"], expected["optimizers"]):
        same(a["state"], b["state"])
    assert log_of(part) == log_of(whole)


STOPS = """
import os, train
train.evaluate = lambda *_: [os.kill(os.getpid(), number) for number in (2, 15)]
train.main()
"""


def test_a_second_signal_ends_the_process_at_once(toy_data, tmp_path):
    """Here in the middle of an evaluation, behind the checkpoint."""
    command = [sys.executable, "-c", STOPS, *toy_flags(toy_data, tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    assert run.returncode == -signal.SIGTERM, run.stderr
    assert read_checkpoint(tmp_path / "ckpt.pt")["step"] == 4


GRADIENTS = (
    "--max_iters=3 --eval_interval=3 --grad_clip=0 --optimizer=adamw --warmup_iters=1"
)
TOGETHER = {  # runs of two processes
    "paper": f"{GRADIENTS} --ar=paper --lr_decay=constant",
    "parts": f"{GRADIENTS} --noise=uniform --dataset=puzzles --grad_accum=3",
    "one row": f"{GRADIENTS} --batch_size=1",  # a process has no part
    "signal": "--max_iters=1000",
    "bug": "",
}
PROCESS = """
import os, sys, train
original = train.learning_rate
def learning_rate(args, step):
    if step == 2 and train.RANK == 1 and "signal" in args.out_dir:
        os.kill(os.getpid(), 15)
    if step == 2 and train.RANK == 1 and "bug" in args.out_dir:
        raise RuntimeError("a bug")
    return original(args, step)
train.learning_rate = learning_rate
for run in sys.argv[1:]:
    os.environ["MASTER_PORT"], *sys.argv[1:] = run.split("|")
    train.main()
"""


@pytest.fixture(scope="session")
def together(toy_data, tmp_path_factory):
    """The runs of two processes, as torchrun starts them: their folder, and what each printed."""
    folder = tmp_path_factory.mktemp("together")
    sockets = [socket.socket() for _ in TOGETHER]
    runs = []
    for free, (name, flags) in zip(sockets, TOGETHER.items()):
        free.bind(("localhost", 0))
        argv = toy_flags(toy_data, "OUT", flags)
        argv = [flag.replace("OUT", str(folder / name)) for flag in argv]
        runs.append("|".join([str(free.getsockname()[1]), *argv]))
    for free in sockets:
        free.close()
    processes = []
    for rank in "01":
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost")
        command = [sys.executable, "-c", PROCESS, *runs]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(
            subprocess.Popen(command, cwd=HERE, env=os.environ | place, **pipes)
        )
    return folder, [process.communicate(timeout=90) for process in processes], processes


def check_alike(one, other):
    """Equal averages of the gradients, by AdamW, and logs. A sum in another order moves a gradient
    by 1e-6 of the largest. (A weight whose gradient is zero but for rounding is moved by AdamW as
    any other.)"""
    contents = [read_checkpoint(out / "ckpt.pt")["optimizers"] for out in (one, other)]
    for a, b in zip(*contents):
        for index, state in a["state"].items():
            p, q = state["exp_avg"], b["state"][index]["exp_avg"]
            assert close(p, q, 1e-3 * p.abs().max() + 1e-8)
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("name", ["paper", "parts", "one row"])
def test_two_processes_and_parts_do_what_one_does(toy_data, tmp_path, together, name):
    """And one goes on from two."""
    folder, [(out, error), (silent, _)], _ = together
    one, two = tmp_path / "one", tmp_path / "two"
    assert silent == "" and out.count(f"--ckpt={folder}/{name}/") == 1, error
    run_toy(toy_data, one, TOGETHER[name], "--grad_accum=1")
    shutil.copytree(folder / name, two)
    check_alike(one, two)
    for out in (one, two):
        go_on(out, "--max_iters=5")
    check_alike(one, two)


def test_what_stops_one_process_stops_both(together):
    """A signal cleanly; a bug with its traceback, and the other does not wait for ever."""
    folder, [(_, other), (_, error)], processes = together
    assert read_checkpoint(folder / "signal" / "ckpt.pt")["step"] == 4
    assert "a bug" in error and "a bug" not in other
    assert all(process.returncode for process in processes)
    assert not (folder / "bug" / "ckpt.pt").exists()


def test_a_broken_loss_stops_the_run_before_it_is_saved(toy_data, tmp_path, monkeypatch):
    run_toy(toy_data, tmp_path)
    good = (tmp_path / "ckpt.pt").read_bytes()
    monkeypatch.setattr(train, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    with pytest.raises(UserError, match="stopped at step 4.*nan.*--learning_rate"):
        go_on(tmp_path, "--max_iters=5")
    assert (tmp_path / "ckpt.pt").read_bytes() == good


def test_a_failing_evaluation_loses_no_step(toy_data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", crash)
    with CRASHES:
        run_toy(toy_data, tmp_path)
    content = read_checkpoint(tmp_path / "ckpt.pt")
    assert (content["step"], content["best"]) == (4, None)


def test_one_failing_save_is_told_and_the_last_is_an_error(
    toy_data, tmp_path, monkeypatch, capsys
):
    full = Mock(side_effect=OSError("disk full"))
    monkeypatch.setattr(train, "save_checkpoint", full)
    with pytest.raises(OSError, match="disk full"):
        run_toy(toy_data, tmp_path, "--eval_interval=1")
    assert "step 3 is not saved, the run goes on: disk full" in capsys.readouterr().err


def test_best_weights_are_those_of_the_best_validation(toy_data, tmp_path, monkeypatch):
    """It gets worse on purpose, by the weighted mean of the block sizes. --resume goes on from the
    last weights; and where it is measured otherwise, the best ones are found anew."""
    figures = iter([1.0, 3.0, 5.0, 1.0, 4.0, 4.0, 9.0])  # S = 1, S = 5, and so on
    averages = []

    def validation(model, *more):
        averages.append(copy.deepcopy(model.state_dict()))
        return torch.full((2,), next(figures))

    monkeypatch.setattr(train, "evaluate", validation)
    run_toy(toy_data, tmp_path, "--block_weights=0.25,0.75 --eval_interval=2")
    content = go_on(tmp_path, "--max_iters=6", "--beta2=0.5")
    assert content["optimizers"][1]["param_groups"][0]["betas"] == (0.9, 0.5)
    assert content["best_loss"] == 2
    same(content["average"], averages[-1])
    same(content["best"], averages[2])
    content = go_on(tmp_path, "--max_iters=8", "--block_sizes=5", "--block_weights=1")
    assert content["best_loss"] == 9


def test_training_starts_from_a_checkpoint(toy_data, tmp_path):
    """--init_from takes the best weights and the flags of the model, and --resume does not need
    that file again."""
    first, second = tmp_path / "ar", tmp_path / "both"
    before = run_toy(toy_data, first, "--block_sizes=1 --noise=uniform")
    start = f"--init_from={first}/ckpt.pt"
    after = run_toy(toy_data, second, start, "--max_iters=1 --learning_rate=0")
    same(after["model"], before["best"])
    assert after["config"].noise == "uniform"
    os.remove(first / "ckpt.pt")
    assert go_on(second, "--max_iters=2")["step"] == 2


def test_a_run_is_not_written_over(toy_data, tmp_path, monkeypatch):
    """Neither a finished one nor one that is running; but one that crashed at once is."""
    flags = toy_flags(toy_data, tmp_path)
    at_step(monkeypatch, 2, crash)
    with CRASHES:
        call(train, *flags)
    monkeypatch.undo()
    with open(tmp_path / "log.jsonl", "a") as log:  # of the run that is running
        fcntl.flock(log, fcntl.LOCK_EX)
        assert "another run" in refusal(train, *flags)
    call(train, *flags)
    before = (tmp_path / "ckpt.pt").read_bytes(), log_of(tmp_path)
    assert [line["step"] for line in before[1]] == [0, 1, 2, 3, 4, 4]
    line = refusal(train, *flags)
    assert "--resume" in line and "--out_dir" in line
    assert before == ((tmp_path / "ckpt.pt").read_bytes(), log_of(tmp_path))


@EACH_NOISE
def test_model_learns_a_markov_chain(toy_data, tmp_path, capsys, noise):
    """It all hangs together: soon far below the unigram entropy, near the chain's own, log 2, and
    never below it. Where stderr is no terminal, the bar is drawn a few times."""
    flags = """--max_iters=300 --n_embd=32 --batch_size=16 --learning_rate=0.01 --warmup_iters=20
        --eval_seqs=64 --block_sizes=1,4 --eval_interval=300"""
    run_toy(toy_data, tmp_path, flags, f"--noise={noise}")
    found = {line["block_size"]: line["val"] for line in log_of(tmp_path)[-2:]}
    assert 0.6 < found[1] < 0.95
    assert 0.6 < found[4] < 1.35
    out, err = capsys.readouterr()
    assert "unigram entropy 2.200 nats" in out
    assert f"at step 300: python sample.py --ckpt={tmp_path}/ckpt.pt" in out
    assert err.count("it/s") < 8


# ----------------------------------------------------------------------------------------------
# Likelihood


@BOTH
@pytest.mark.parametrize("dataset", ["chain", "puzzles"])
@torch.no_grad()
def test_validation_at_block_size_1_is_the_exact_likelihood(toy, dataset, ar):
    """Of problems, that of the answer and one end token."""
    *_, val, meta = toy(f"--dataset={dataset}")
    model = tiny(vocab_size=12, seq_len=24, ar=ar)
    exact = train.evaluate(model, val, 1, draws=2)
    logits = model.verify(val.x0, model.new_cache(8))
    nats = F.cross_entropy(logits.mT, val.x0, reduction="none")
    begin, end = 0, 24
    for i, row in enumerate(val.x0.tolist()):
        if dataset == "puzzles":
            begin = row.index(0) + 1
            end = row.index(0, begin) + 1
        assert close(exact[i], nats[i, begin:end].mean(), 1e-4)


def test_evaluation_averages_all_noise_levels(toy):
    *_, val, _ = toy("--eval_seqs=300")
    levels_model = Mock(device="cpu", side_effect=lambda batch: batch.t)
    nats = train.evaluate(levels_model, val, 4, draws=3)
    assert nats.mean() == pytest.approx(0.5, abs=0.01)
    assert 0 < nats.std() < 0.1  # of three draws, each spread evenly over [0, 1]


def test_figures_of_sequences():
    line = train.describe(torch.tensor([1.0, 3.0]), dict(bytes_per_token=2.0))
    assert line == "2.0000 ± 1.0000 nats, 1.443 bits/byte"


LOG_W = torch.tensor([[0.3], [0.7]], dtype=DOUBLE).log()


def log_sum_exp(total):
    """The tightest bound, but none of noisy estimates."""
    return -torch.logsumexp(LOG_W - total, 0)


def test_mixture_bounds_are_bounds():
    """Of NELBOs that are exact, and of estimates."""
    torch.manual_seed(0)
    exact = 3 * torch.rand(2, 27, dtype=DOUBLE) + 1
    truth = log_sum_exp(exact)
    jensen, other = train.mixture_bounds(exact, [0.3, 0.7])
    assert close(jensen, 0.3 * exact[0] + 0.7 * exact[1], 1e-9)
    assert (other >= truth - 1e-9).all()
    alike = exact[:, :1].repeat(1, 2)  # where the other sequence says what the best r is
    assert close(train.mixture_bounds(alike, [0.3, 0.7])[1], truth[:1], 1e-9)
    noisy = exact.repeat(1, 3000)
    noisy += 5 * torch.randn_like(noisy)
    assert log_sum_exp(noisy).mean() < truth.mean() - 0.5
    for bound in train.mixture_bounds(noisy, [0.3, 0.7]):
        assert bound.mean() > truth.mean()


@pytest.fixture(scope="session")
def finished(toy_data, tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("finished")
    run_toy(toy_data, folder, "--dataset=puzzles")
    return folder


def likelihood_table(capsys, *flags):
    """{block size or name: nats}"""
    capsys.readouterr()
    call(train, "--eval_only", "--device=cpu", *flags)
    rows = re.findall(r"^ *(.+): ([\d.]+) ", capsys.readouterr().out, re.MULTILINE)
    return {name: float(nats) for name, nats in rows}


def test_likelihood_tables(finished, capsys):
    """A checkpoint knows where its data are. Another mixture than its own may be asked for; no
    block is longer than the sequence."""
    flags = "--eval_block_sizes=2", "--block_sizes=1,99", "--block_weights=3,1"
    nats = likelihood_table(capsys, f"--out_dir={finished}", *flags)
    assert set(nats) == {"1", "2", "24", "mixture: Jensen", "mixture: log-sum-exp"}
    jensen = (3 * nats["1"] + nats["24"]) / 4
    assert nats["mixture: Jensen"] == pytest.approx(jensen, abs=2e-4)
    elsewhere = f"--init_from={finished}/ckpt.pt", "--out_dir=nowhere"
    assert likelihood_table(capsys, *elsewhere, *flags) == nats


def test_mixture_bounds_count_the_tokens_that_are_scored(
    toy, finished, capsys, monkeypatch
):
    """Where one of two block sizes is far better, -log p(x) is its NELBO and log 2, once for a
    sequence."""
    *_, val, _ = toy("--dataset=puzzles")
    nats = {1: 1.0, 5: 5.0}
    monkeypatch.setattr(
        train, "evaluate", lambda model, val, S, draws: torch.full((8,), nats[S])
    )
    rows = likelihood_table(capsys, f"--out_dir={finished}", "--eval_block_sizes=1")
    expected = 1 + (math.log(2) / val.counts.sum(1)).mean()
    assert close(torch.tensor(rows["mixture: log-sum-exp"]), expected, 1e-4)


# ----------------------------------------------------------------------------------------------
# Flags and refusals of train.py

TRAIN_REFUSES = [
    ("--block_sizes=0,5", "block_sizes"),
    ("--block_sizes=5,5", "different"),
    ("--block_weights=1,0", "block_weights"),
    ("--block_weights=1", "block_weights"),
    ("--learning_rate=nan", "learning_rate"),
    ("--ema=1", "ema"),
    ("--noisy_gain=nan", "noisy_gain"),
    ("--out_dir=", "out_dir"),
    ("--dataset=nowhere", "prepare_data.py"),
    ("--dataset=puzzles --seq_len=12", "--seq_len=24"),
    ("--seq_len=7000", "too small"),
    ("--resume", "ckpt.pt is missing"),
]


@pytest.mark.parametrize("flags, word", TRAIN_REFUSES)
def test_train_refuses(toy_data, tmp_path, flags, word):
    out = tmp_path / "out"
    assert word in refusal(train, *toy_flags(toy_data, out, flags))
    assert not out.exists()


def test_what_does_not_fit_the_checkpoint_is_refused(toy_data, finished, tmp_path):
    resume = "--resume", "--device=cpu", f"--out_dir={finished}", "--max_iters=9"
    for flag in ("--noise=uniform", "--optimizer=adamw"):
        assert "no flag changes" in refusal(train, *resume, flag)
    start = toy_flags(toy_data, tmp_path, f"--init_from={finished}/ckpt.pt --n_embd=32")
    assert "does not fit" in refusal(train, *start)
    write_data(tmp_path / "other", [1] * 99, [1] * 99, tokenizer={"kind": "char"})
    data = f"--data_dir={tmp_path}", "--dataset=other"
    assert "tokenizer" in refusal(train, *resume, *data)


def test_datasets_are_made_as_long_as_the_model(tmp_path, monkeypatch):
    def prepare(name, data_dir, seq_len):
        write_data(tmp_path / name, [1] * 99, [1] * 99, row_length=seq_len)

    monkeypatch.setattr(train, "prepare", prepare)
    args = train.Settings(dataset="math", data_dir=str(tmp_path))
    data, *_ = train.load_data(args, 33)
    assert data.shape == (3, 33)


def test_preset_and_precision_fit_the_device(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(train, "find_device", lambda name: gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # of a T4, too
    for capability in ((9, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        args, config, _ = train.read_flags(["--ema=0.5"])
        values = vars(args) | vars(config)
        assert values | train.PRESETS["gpu"] | {"ema": 0.5} == values
        assert train.find_autocast(args, gpu)._enabled == (capability >= (8, 0))


def test_the_paper_trains_uniform_noise_with_the_bound():
    args, config, _ = train.read_flags(["--preset=paper", "--noise=uniform"])
    assert (args.loss, args.t_min, config.n_layer) == ("nelbo", 1e-3, 12)


# ----------------------------------------------------------------------------------------------
# Tokenizers


def test_bpe_merges_the_most_frequent_pair(monkeypatch):
    """... of the first SAMPLE characters; of equals the one with the smallest ids."""
    text = " low" * 5 + " lower" * 2 + " newest" * 6 + " widest" * 3
    monkeypatch.setattr(prepare_data, "SAMPLE", len(text))
    texts = iter([text[:50], text[50:] + " zz" * 999, "is not read"])
    learned = make_tokenizer("bpe:262", texts)["tokens"][256:]
    words = [bytes.fromhex(token).decode() for token in learned]
    assert words == ["es", "est", " l", "ow", " low"]
    assert list(texts) == ["is not read"]


def test_bpe_says_any_text():
    text = "the cat and the dog and the aaaa bird 12 ☃\n" * 50
    encode, decode = load_tokenizer(make_tokenizer("bpe:270", [text]))
    for words in (text, "Ünseen \t wörds, 漢字 and \x00 bytes", ""):
        assert decode(encode(words)) == words
    assert len(encode(" the")) == 1
    assert len(encode("12")) == 2  # digits stand alone
    assert 269 not in encode(END)  # a text cannot spell the end
    assert decode([269, 270]) == END  # 270 is a mask
    with pytest.raises(UserError) as error:
        make_tokenizer("bpe:9999", [text])
    largest = re.search(r"bpe:\d+", str(error.value))[0]
    make_tokenizer(largest, [text])


def test_char_tokenizer_refuses_what_it_cannot_say():
    encode, decode = load_tokenizer(make_tokenizer("char", ["ab", "ca"]))
    assert decode(encode("cab") + [3, 4]) == f"cab{END}"  # 4 is a mask
    with pytest.raises(UserError, match="'d'"):
        encode("bad")


@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's vocabulary"
)
def test_gpt2_vocabulary():
    encode, decode = load_tokenizer(make_tokenizer("gpt2", []))
    assert encode("Hello world") == [15496, 995]
    assert decode([50257, 15496, 50257, 995]) == "Hello world"  # [PAD] is dropped


def test_tokenizer_json(tmp_path):
    """Any tokenizer of the package tokenizers; ids above 65,535 are written as uint32."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {str(i): i for i in range(70_000)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END])
    tokenizer.enable_truncation(1)
    tokenizer.save(f"{tmp_path}/tokenizer.json")
    path = tmp_path / "rows"
    files = dict(input=str(path), test=str(path), tokenizer=f"{tmp_path}/tokenizer.json")
    path.write_text(json.dumps({"question": f"5 {END} 7", "answer": "8 69999"}))
    meta = prepare("problems", tmp_path, **files, seq_len=8)
    train, val, _ = open_data(tmp_path / "problems")
    end = 70_000
    assert train.tolist() == val.tolist() == [5, 0, 7, end, 8, 69_999, end, end]
    decode = load_tokenizer(meta["tokenizer"])[1]
    assert decode([8, end, end + 1]) == f"8 {END}"  # the last is a mask
    path.write_text(json.dumps({"question": "5", "answer": "eight"}))
    with pytest.raises(UserError, match="'0' of the answer 'eight'"):
        # it can never be right
        prepare("problems", tmp_path, **files)


# ----------------------------------------------------------------------------------------------
# Datasets


def entropy_of(tokens):
    """Nats."""
    shares = [n / len(tokens) for n in Counter(tokens).values()]
    return pytest.approx(-sum(p * math.log(p) for p in shares))


def texts_of(folder):
    """The documents of train and of val."""
    *parts, meta = open_data(folder)
    decode = load_tokenizer(meta["tokenizer"])[1]
    return [decode(part.tolist()).split(END)[:-1] for part in parts]


def test_own_integers_have_no_text(tmp_path):
    """Somebody's own arrays, with the one key that is needed."""
    for name in ("train.bin", "val.bin"):
        np.arange(1000, dtype=np.uint16).tofile(tmp_path / name)
    (tmp_path / "meta.json").write_text('{"vocab_size": 1000}')
    train, val, meta = open_data(tmp_path)
    assert train.tolist() == val.tolist() == list(range(1000))
    prepare_data.check_tokenizer(meta, meta)
    for word, function, *values in (
        ("integers", load_tokenizer, meta["tokenizer"]),
        ("val.jsonl", open_problems, tmp_path),
        ("another tokenizer", prepare_data.check_tokenizer, meta, {"tokenizer": {}}),
    ):
        with pytest.raises(UserError, match=word):
            function(*values)
    for damaged in ('{"vocab_size": 999}', "{", "{}"):
        (tmp_path / "meta.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged.*prepare_data.py"):
            open_data(tmp_path)


def test_text_file_round_trip(tmp_path, monkeypatch, capsys):
    """A text in pieces; a byte-order mark is no part of it. Sizes and figures are printed."""
    monkeypatch.setattr(prepare_data, "PIECE", 700)
    text = "hello wörld\n" * 100
    (tmp_path / "in.txt").write_text(text, encoding="utf-8-sig")
    flags = (
        f"text --data_dir={tmp_path} --input={tmp_path}/in.txt --tokenizer=char --name=book"
    )
    call(prepare_data, *flags.split())
    _, val, meta = open_data(tmp_path / "book")
    first, second = texts_of(tmp_path / "book")
    assert first[0] + second[0] + first[1] + second[1] == text
    assert [len(part) for part in first] == [630, 450]
    assert meta["bytes_per_token"] == len("".join(second).encode()) / len(val)
    assert meta["unigram_nats"] == entropy_of(val.tolist())
    out = capsys.readouterr().out
    assert "1,082 tokens" in out and "made_from: " in out


def test_a_folder_of_documents(tmp_path, monkeypatch):
    """pydocs on a library of our own: what is taken, and which part it goes to."""
    for i in range(40):
        text = f"Module {i} has a docstring of more than forty letters, {i}."
        (tmp_path / f"m{i:02}.py").write_text(f'"""{text}"""')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text(f'"""{"Nobody sees this. " * 3}"""')
    (tmp_path / "broken.py").write_text("def :")
    (tmp_path / "copy.py").write_text((tmp_path / "m00.py").read_text())
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert set(prepare_data.pydocs()) < set(prepare_data.pydocs(["tqdm", "nowhere"]))
    prepare("pydocs", tmp_path, tokenizer="bpe:300")
    train, val = texts_of(tmp_path / "pydocs")
    assert sum("more than forty letters" in text for text in train + val) == 40
    assert "Nobody" not in "".join(train)
    assert set(train).isdisjoint(val) and 0 < len(val) < len(train) / 5


def test_streams(tmp_path, monkeypatch, capsys):
    """Rows without a text are left out, --documents is a limit. What came before the connection
    was lost is the dataset; if nothing came, or after Ctrl-C, there is none."""
    texts = [f"document {i} " * 5 for i in range(100, 400)]
    rows = [
        {"text": text, "question": text, "code": "a program"} for text in ["", None, *texts]
    ]
    hub = Mock()
    monkeypatch.setitem(sys.modules, "datasets", hub)

    def stream(source, rows, error=None, **more):
        def download():
            yield from rows
            if error:
                raise error

        hub.load_dataset.return_value = download()
        prepare(source, tmp_path, tokenizer="bpe:262", **more)
        return sum(texts_of(tmp_path / source), [])

    assert sorted(stream("fineweb", rows, RuntimeError("lost"))) == texts
    assert "lost" in capsys.readouterr().err
    assert len(stream("fineweb", rows, documents=20)) == 20
    for rows, error in (([], RuntimeError("lost")), (rows, KeyboardInterrupt("lost"))):
        with pytest.raises((UserError, KeyboardInterrupt), match="lost"):
            stream("tinygsm", rows, error)
    assert os.listdir(tmp_path) == ["fineweb"]


def test_nothing_is_lost_by_replacing(tmp_path, monkeypatch):
    """A dataset is replaced by one of the same file, as a whole or not at all, through a link."""
    path = tmp_path / "in.txt"
    again = partial(prepare, "text", tmp_path, input=str(path), tokenizer="char")
    (tmp_path / "disk").mkdir()
    (tmp_path / "text").symlink_to(tmp_path / "disk")
    path.write_text("abc" * 100)
    again()
    path.write_text("abc" * 200)
    with monkeypatch.context() as patch:
        patch.setattr("json.dumps", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again()
    assert len(open_data(tmp_path / "text")[1]) == 31
    again()
    assert len(open_data(tmp_path / "disk")[1]) == 61
    assert set(os.listdir(tmp_path)) == {"text", "disk", "in.txt"}
    os.remove(tmp_path / "disk" / "meta.json")  # so that it is no dataset
    for source, folder in (("math", tmp_path), ("text", tmp_path)):
        with pytest.raises(UserError, match="--name"):
            prepare(source, folder, name="disk")


# ----------------------------------------------------------------------------------------------
# Problems


def wording_of(question):
    """A question without its numbers, names and things."""
    variable = "|".join(prepare_data.NAMES + prepare_data.THINGS)
    return re.sub(rf"\d+|\b({variable})\b", "_", question)


@pytest.mark.parametrize("difficulty", [2, 8])
def test_math_problems_are_right_and_disjoint(difficulty):
    wordings, numbers = {"train": [], "val": []}, {"train": [], "val": []}
    for part, (question, program) in math_problems(difficulty, 200, seed=1):
        wordings[part].append(wording_of(question))
        numbers[part].append(re.findall(r"\d+", question)[:2])
        variables = {}
        for line in program.splitlines()[1:-1]:
            exec(line.strip(), {}, variables)  # ours, so Python may
            assert all(x > 0 and x == int(x) for x in variables.values())
        assert variables["result"] == solve(program)
    for things in (wordings, numbers):
        assert (len(things["train"]), len(things["val"])) == (200, 10)
        assert not any(thing in things["train"] for thing in things["val"])


def test_rows_of_problems(tmp_path):
    """Question, end, program, ends; as tokens of the texts by themselves. Those that are too long
    are counted for each part, and stay problems for the judge."""
    meta = prepare("math", tmp_path, problems=400, seq_len=100, difficulty=3)
    encode, end = load_tokenizer(meta["tokenizer"])[0], [meta["tokenizer"]["end"]]
    problems = {"train": [], "val": []}
    for part, problem in math_problems(3, 400, 0):
        problems[part].append(problem)
    for part, tokens in zip(problems, open_data(tmp_path / "math")):
        rows = [
            encode(question) + end + encode(answer) for question, answer in problems[part]
        ]
        fitting = [row + end * (100 - len(row)) for row in rows if len(row) < 100]
        assert tokens.reshape(-1, 100).tolist() == fitting
        assert 0 < meta[f"{part}_dropped"] == len(rows) - len(fitting) < len(rows)
    assert open_problems(tmp_path / "math") == problems["val"]
    scored = tokens[is_answer(tokens.reshape(-1, 100), *end).ravel()].tolist()
    assert meta["bytes_per_token"] == meta["val_bytes"] / len(scored)
    assert meta["unigram_nats"] == entropy_of(scored)


def test_a_problem_as_published_weights_know_it():
    tokenizer = {"start": 8, "end": 9, "separator": "-"}
    ids = prepare_data.encode_problem(tokenizer, lambda text: [*text.encode()], "AB", "C")
    assert ids == ([8, 65, 66, 45], [67, 9])


@pytest.mark.parametrize("library", [np.array, torch.tensor])
def test_is_question_and_is_answer(library):
    rows = library([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    question = [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    answer = [[0, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert is_question(rows, 0).tolist() == question
    assert is_answer(rows, 0).tolist() == answer


# ----------------------------------------------------------------------------------------------
# Answers

PROGRAMS = {
    "def simple_math_problem():\n    '''How many?'''\n    a = 2\n    return a + 1\n": 3,
    "def simple_math_problem() -> int:\n    import math\n    return math.ceil(3.1)": 4,
    "return 7 // 2 + 7 % 4 - 2 ** 3 + 1 / 4": -1.75,
    "x = 5\nx += 2\nx *= 3\nx -= 1\nx /= 4\nreturn -(-x)": 5,
    "return max(1, 5, 3) - min(2, 4) + abs(-3)": 6,
    "return round(2.567, 1) + round(3.4) + int(9.7) + float(1) + math.floor(3.9)": 18.6,
    "def simple_math_problem():\n    return 5\nprint(6)": 5,
    "x = 3\nif x < 2:\n    x = 10\nelif x >= 3:\n    return 30\nreturn x": 30,
    "x = 3\nif x != 3 or not x > 2:\n    x = 10\nelse:\n    x = 20\nreturn x": 20,
    "return 1 / 0 if 2 <= 1 and True else 0.5": 0.5,
    "x: int = 0\nfor i in range(2, 9, 3):\n    x += i\nreturn x": 15,
    "for i in range(9):\n  for j in range(9):\n    if i * j == 42:\n      return i + j": 13,
    "x = []\nfor i in [3, 1, 2]:\n    x.append(2 * i)\nreturn sum(x) + 10 * len(x) + x[-1]": 46,
    "s = 0\nfor day in range(365):\n    if day % 7 == 0:\n        s += day\nreturn s": 9646,
    "return sum(range(1001))": 500_500,
}
NUMBERS = {
    "18": 18,
    " 1,234": 1234,
    "$5": 5,
    "-3": -3,
    "2.50": 2.5,
    "$1,000,000.25": 1000000.25,
}
NUMBERS |= {
    "-$18": -18,
    "$-18": -18,
    "+5": 5,
    "$ 18": 18,
    "**18**": 18,
    "**$18.**": 18,
    ".5": 0.5,
}
NUMBERS |= {"18.": 18, "18%": 18, "€3": 3, "18\nMore words.": 18, "18\r\n": 18}
NUMBERS |= dict.fromkeys(
    ["3/4", "12,34", "1,5", "18 or 19", "18 x", "1e5", "1 000", "--5", "5-"]
)
NUMBERS |= dict.fromkeys(
    ["-$-5", "", "none", "18 #### 18", "١", "9" * 999, "*" * 99, " " * 9999]
)


def test_values_of_answers():
    """Programs; and numbers, which are all that stands there, or there is none."""
    answers = PROGRAMS | {
        f"Some words 7.\n####{line}": value for line, value in NUMBERS.items()
    }
    assert {answer: solve(answer) for answer in answers} == pytest.approx(answers)


LOOPS = "".join(" " * depth + "for i in x:\n" for depth in range(20)) + " " * 20
NO_ANSWERS = [
    "",
    "no program at all",
    "x = 5\n",
    "return",
    "return [1]",
    "return [[1]]",
    "return unknown",
    "return 1 / 0",
    "return 'five'",
    "return (-8) ** 0.5",
    "return 1e999 - 1e999",
    "return 10 ** 10 ** 10",
    "def another_problem():\n    return 5",
    "def simple_math_problem():\n    return simple_math_problem()",
    "return ().__class__.__base__.__subclasses__()",
    "return math.factorial(10 ** 9)",
    "return __import__('os')",
    "print(5)\nreturn 5",
    "return max([1, 2], key=abs)",
    "return sum(i for i in range(9))",
    "while True:\n    x = 1\nreturn 5",
    "return [0] * 10 ** 9",
    "return sum(range(10 ** 12))",
    "x = range(1000)\n" + LOOPS + "y = 1",
    "x = range(1000)\n" + LOOPS + "'a text'",
    "x = [1]\nfor i in range(60):\n    x = x + x\nreturn 5",
    "x = []\nx.append(x)\nreturn 5",
    "return " + "-" * 1500 + "1",
    "return " + "abs(" * 600,
    "\x00",
    "\ud800",
    "return 5 #" + "#" * 3000,
]


@pytest.mark.parametrize("program", NO_ANSWERS, ids=range(len(NO_ANSWERS)))
def test_no_answer(program, monkeypatch):
    """Hostile and broken programs: None, in few steps and little memory."""
    evaluate = Mock(wraps=prepare_data.evaluate)
    monkeypatch.setattr(prepare_data, "evaluate", evaluate)
    tracemalloc.start()
    assert solve(program) is None
    assert tracemalloc.get_traced_memory()[1] < 2e7 and evaluate.call_count <= 4001
    tracemalloc.stop()


def test_is_right():
    reference = "def simple_math_problem():\n    return 6 / 4"
    assert is_right("#### 1.5", reference) and is_right("return 1.5000000001", reference)
    assert not is_right("return 1.50001", reference)
    assert is_right("return 0.1 + 0.2 - 0.3", "return 0")
    assert is_right(" C B A\n", "C B A")  # no number: the same text
    assert not is_right("C B", "C B A")


# ----------------------------------------------------------------------------------------------
# Flags, and what users type


@dataclass
class Flags:
    word: Literal["a", "bc"] = "a"  # the first or the second
    size: int = 3  # 100% of it
    sizes: tuple = (1, 16)  # numbers
    rates: tuple = ()  # numbers, if any
    on: bool = True  # yes
    off: bool = False  # no
    secret: int = 7  # is no flag


def read_flags(*argv):
    return parse_flags(
        "What it does.", Flags, argv=argv, skip=["secret"], defaults={"size": 5}
    )


def test_flags_have_the_types_of_their_defaults(capsys):
    values = read_flags("--sizes=2,3", "--rates=1,0.5", "--on=False", "--off")
    assert values == dict(
        word="a", size=5, sizes=(2, 3), rates=(1.0, 0.5), on=False, off=True
    )
    assert prepare_data.from_values(Flags, values | {"more": 0}) == Flags(**values)
    with pytest.raises(SystemExit):
        read_flags("--help")
    words = " ".join(capsys.readouterr().out.split())
    for part in ("What it does.", "{a,bc}", "100% of it (default: 5)", "(1, 16)"):
        assert part in words
    for (
        flag
    ) in "--nonsense=1 --size=x --siz=4 --sizes=1,x --on=no --word=c --secret=1 x".split():
        with pytest.raises(UserError, match=flag.partition("=")[0]):
            read_flags(flag)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("text", "--input"),
        ("text --input=nowhere", "nowhere"),
        ("text --input=DIR/utf16", "utf16 is not UTF-8"),
        ("text --input=DIR/empty --tokenizer=char", "too short"),
        ("text --input=DIR/good --tokenizer=bpe:200", "bpe:257"),
        ("fineweb --documents=-1", "documents"),
        ("math --problems=400 --seq_len=10", "seq_len"),
        ("problems --input=DIR/good --test=DIR/null --tokenizer=char", "null, line 2"),
        ("fineweb", "datasets"),
        ("shakespeare", "no network"),
    ],
)
def test_prepare_data_refuses(tmp_path, capsys, monkeypatch, flags, word):
    """In one line, and nothing is left behind."""
    row = json.dumps({"question": "How many?", "answer": 5})
    (tmp_path / "utf16").write_text("a book", encoding="utf-16")
    (tmp_path / "empty").write_text("")
    (tmp_path / "good").write_text(row)
    (tmp_path / "null").write_text(f'{row}\n{{"question": "How?", "answer": null}}')
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **more: open("no network"))
    data = tmp_path / "data"
    argv = [*flags.replace("DIR", str(tmp_path)).split(), f"--data_dir={data}"]
    with pytest.raises(SystemExit) as stop:
        prepare_data.run_script(lambda: call(prepare_data, *argv))
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and word in line
    assert not data.exists() or not list(data.iterdir())


def test_a_bug_is_a_traceback():
    with pytest.raises(ZeroDivisionError):
        prepare_data.run_script(lambda: 1 / 0)


SCRIPT = """
import os, sys
class Finder:
    def find_spec(self, name, *more):
        if name == "torch":
            print(os.environ["GOMP_SPINCOUNT"], flush=True)
            sys.meta_path.remove(self)
sys.meta_path.insert(0, Finder())
import prepare_data
def main():
    print("1 ± 2", prepare_data.solve("return 9if 1else int('\\d')"))
    raise KeyboardInterrupt
prepare_data.run_script(main)
"""


def test_a_script_in_a_terminal_that_knows_ascii():
    """It prints what it can, and nothing of what Python thinks of a model's program. OpenMP's
    threads do not spin for ever: that is set before torch is loaded."""
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    env.pop("GOMP_SPINCOUNT", None)
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env)
    assert (run.returncode, run.stdout, run.stderr) == (130, "5000\n1 ? 2 9.0\n", "")
