"""Proof by test: every claim of the README that mathematics can settle, on cases small enough to
enumerate; and that the scripts do what their users expect.

    python -m pytest -q test_blockgen.py
"""
import copy
import fcntl
import io
import itertools
import json
import math
import os
import random
import re
import runpy
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
from unittest.mock import MagicMock, Mock

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on CPU tensors

import numpy as np
import pytest

import prepare_data  # first: it sets an option that torch reads when it is loaded
import blockgen
import kernels
import sample
import train
import torch
import torch.nn.functional as F
from blockgen import (
    Batch,
    BlockGen,
    Config,
    NOISES,
    SCHEDULES,
    UserError,
    draw,
    random_numbers,
    read_checkpoint,
)
from prepare_data import (
    END,
    is_answer,
    is_question,
    is_right,
    load_tokenizer,
    make_tokenizer,
    math_problems,
    open_data,
    open_problems,
    parse_flags,
    prepare,
    solve,
)
from sample import CRITERIA, FILL, generate

torch.set_num_threads(1)  # faster for models of this size
HERE = os.path.dirname(os.path.abspath(blockgen.__file__))
DOUBLE = torch.float64

BOTH = pytest.mark.parametrize("ar", ["paper", "shift"])
EACH_NOISE = pytest.mark.parametrize("noise", ["masked", "uniform", "hybrid30"])
EACH_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)
EACH_AR_AND_CACHE = pytest.mark.parametrize(
    "token_causal, ar",
    [
        (True, "paper"),
        (False, "paper"),
        (True, "shift"),
    ],
)


def tiny(noise="masked", seed=0, **more):
    """A small model with weights large enough that everything matters."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=11,
        seq_len=21,
        n_layer=2,
        n_head=2,
        n_embd=16,
        noise=noise,
        noisy_gain=0.7,
    )
    model = BlockGen(Config(**{**settings, **more})).eval()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
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


class NanCache(blockgen.Cache):
    """Its slots hold NaN until they are written, so that no read too far goes unseen."""

    def __init__(self, kv, state):
        super().__init__(torch.full_like(kv, math.nan), state)


@pytest.fixture
def nan_cache(monkeypatch):
    monkeypatch.setattr(blockgen, "Cache", NanCache)


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


# ----------------------------------------------------------------------------------------------
# blockgen.py: random numbers


def test_random_numbers_depend_on_key_and_row_alone():
    u = random_numbers((3, 0), torch.arange(5), 1000)
    assert (u.shape, u.dtype) == ((5, 1000), DOUBLE)
    assert is_uniform(u, 20)
    assert torch.equal(u[[1, 1, 4]], random_numbers((3, 0), [1, 1, 4], 1000))
    for key in ((4, 0), (3, 1), (0, 3), (3, 0, 2), (9 * 10**18, 0)):
        assert not torch.equal(u, random_numbers(key, torch.arange(5), 1000))


def test_draw_is_the_inverse_cdf_far_into_the_tail():
    probs = torch.tensor([0.0, 0.5, 1e-8, 0.0, 0.5, 0.0])
    below_one = 1 - 2**-53
    u = torch.linspace(0, below_one, 1001, dtype=DOUBLE)
    x = draw(probs.expand(1001, 6), u)
    assert set(x.tolist()) <= {1, 2, 4}
    assert (x == 1).sum() == pytest.approx(500, abs=1)
    edge = 0.5 / (1 + 1e-8)
    in_the_tail = torch.tensor(edge + 0.5e-8, dtype=DOUBLE)
    assert draw(probs, in_the_tail) == 2  # float32 sampling would miss it


# ----------------------------------------------------------------------------------------------
# Noise, by enumeration: a random distribution over all V^n sequences

V, n = 3, 3


def every_sequence(size):
    """All sequences of n tokens, (size^n, n)."""
    tokens = itertools.product(range(size), repeat=n)
    return torch.tensor(list(tokens))


STATES = every_sequence(V)


def random_distribution(seed=0):
    torch.manual_seed(seed)
    logits = torch.randn(len(STATES), dtype=DOUBLE)
    return torch.softmax(1.5 * logits, 0)


def pure_noise_law(noise):
    """The prior, (K,)."""
    tokens = [(1 - noise.mask_share) / noise.vocab_size] * noise.vocab_size
    law = tokens + [noise.mask_share] * (noise.mask is not None)
    return torch.tensor(law, dtype=DOUBLE)


def likelihood(noise, x0, xt, alpha):
    """q(xt | x0) of one token each, broadcasting."""
    return alpha * (xt == x0).double() + (1 - alpha) * pure_noise_law(noise)[xt]


def token_law(weight, i):
    """p(x_i = v), (M, V), if the sequences of STATES have weights (M, V^n). Of what cannot be:
    anything."""
    law = weight @ F.one_hot(STATES[:, i], V).double()
    law = law / law.sum(-1, keepdim=True)
    return law.nan_to_num(1 / V)


def begins_like(x0, length):
    """Which of STATES begin with the first `length` tokens of x0 (M, n): (M, V^n)."""
    same = STATES[:, :length] == x0[:, None, :length]
    return same.all(-1).double()


def exact_denoiser(noise, p, xt, alpha, x0=None, block_size=n, leave_one_out=True):
    """p(x0_i = v | the clean x0 before the block, the noisy block without position i), (M, n, V),
    for xt (M, n), alpha a number or (M, n). Or, wrongly for random tokens, with position i."""
    x0 = xt if x0 is None else x0
    alpha = torch.as_tensor(alpha, dtype=DOUBLE)
    alpha = alpha.expand(xt.shape)[:, None]
    each = likelihood(noise, STATES, xt[:, None], alpha)  # (M, V^n, n)
    laws = []
    for i in range(n):
        begin = i // block_size * block_size
        end = min(begin + block_size, n)
        seen = [j for j in range(begin, end) if j != i or not leave_one_out]
        weight = p * begins_like(x0, begin) * each[:, :, seen].prod(-1)
        laws.append(token_law(weight, i))
    return torch.stack(laws, 1)


class ExactLoss(BlockGen):
    """BlockGen's loss, but the exact denoiser of p in place of the network. Its logits come in
    `dtype`."""

    def __init__(self, noise, p, schedule="linear", dtype=DOUBLE, leave_one_out=True):
        shape = dict(vocab_size=V, seq_len=n, n_head=1, n_embd=2)
        super().__init__(Config(**shape, noise=noise, schedule=schedule, ar="paper"))
        self.to(dtype)
        self.p, self.dtype = p, dtype
        self.leave_one_out = leave_one_out

    def forward(self, batch):
        alpha, _ = SCHEDULES[self.config.schedule](batch.t)
        self.alpha = torch.where(batch.given, 1.0, alpha)  # a given token is sure to be clean
        return super().forward(batch)

    def predictions(self, x0, xt, block_size):
        inputs = xt, self.alpha, x0, int(block_size[0]), self.leave_one_out
        probs = exact_denoiser(self.noise, self.p, *inputs)
        logits = probs.log().to(self.dtype)
        return logits, logits

    def output_weight(self):
        return torch.eye(V, dtype=self.dtype)


def corruptions(noise, alpha):
    """Everything that can happen to n tokens: uniform numbers that bring it about, (C, n), and its
    probability (C,)."""
    law = pure_noise_law(noise)
    middle = (law.cumsum(0) - law / 2)[law > 0]
    survival = alpha[None]
    u = torch.cat([survival / 2, alpha + (1 - alpha) * middle])
    chance = torch.cat([survival, (1 - alpha) * law[law > 0]])
    outcomes = every_sequence(len(u))
    return u[outcomes], chance[outcomes].prod(-1)


NOTHING = (False,) * n  # is given


@torch.no_grad()
def expected_nelbo(model, x0, block_size=n, given=NOTHING, t_min=1e-9, points=40):
    """The mean of the training pass, nats (M, n) for x0 (M, n): over the noise by enumeration, over
    t in [t_min, 1] by Gauss-Legendre in log t."""
    schedule = SCHEDULES[model.config.schedule]
    nodes, weights = np.polynomial.legendre.leggauss(points)
    mean = torch.zeros(x0.shape, dtype=DOUBLE)
    for node, weight in zip(nodes, weights):
        t = torch.tensor(t_min ** ((node + 1) / 2), dtype=DOUBLE)
        u, chance = corruptions(model.noise, schedule(t)[0])
        rows = x0.repeat_interleave(len(u), 0)  # (M C, n)
        sizes = torch.full((len(rows),), block_size)
        is_given = torch.tensor(given).expand(rows.shape)
        batch = Batch(rows, sizes, t.expand(rows.shape), u.repeat(len(x0), 1), is_given)
        losses = model(batch).unflatten(0, (len(x0), -1))  # (M, C, n)
        dt = -math.log(t_min) * t * weight / 2
        mean += dt * (chance[:, None] * losses).sum(1)
    return mean / (1 - t_min)


def wrong_derivative(alpha):
    """A schedule with another slope than its own."""
    return lambda t: (alpha(t)[0], 0.5 * alpha(t)[1] - t)


@EACH_SCHEDULE
@EACH_NOISE
def test_nelbo_of_the_exact_denoiser_is_the_likelihood(noise, schedule, monkeypatch):
    """-log p(x) for every sequence, and so the entropy on average."""
    p = random_distribution()
    nelbo = expected_nelbo(ExactLoss(noise, p, schedule), STATES)
    assert close(nelbo.sum(1), -p.log(), 2e-4)

    # The test has teeth: with random tokens, p(x0 | xt) is far off; so is a wrong derivative.
    entropy = -(p * p.log()).sum()
    if noise != "masked":
        model = ExactLoss(noise, p, schedule, leave_one_out=False)
        wrong = expected_nelbo(model, STATES)
        assert p @ wrong.sum(1) > entropy + 0.01
    alpha = SCHEDULES[schedule]
    monkeypatch.setitem(SCHEDULES, schedule, wrong_derivative(alpha))
    wrong = expected_nelbo(ExactLoss(noise, p, schedule), STATES)
    assert abs(p @ wrong.sum(1) - entropy) > 0.01


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
        total += log_marginal(p, list(range(end)))
        total -= log_marginal(p, known)
    return total


@pytest.mark.parametrize("block_size, pattern", [(1, "g__"), (2, "_g_"), (3, "g_g"), (2, "___")])
@EACH_NOISE
def test_nelbo_of_an_answer_is_its_likelihood_given_the_question(noise, pattern, block_size):
    """-log p(free | given) for every sequence; given tokens cost nothing."""
    given = tuple(c == "g" for c in pattern)
    p = random_distribution(1)
    model = ExactLoss(noise, p)
    nelbo = expected_nelbo(model, STATES, block_size, given)
    truth = -log_conditional(p, block_size, given)
    assert close(nelbo.sum(1), truth, 2e-4)
    assert (nelbo[:, torch.tensor(given)] == 0).all()


@EACH_SCHEDULE
@EACH_NOISE
def test_what_is_printed_is_a_bound(noise, schedule):
    """In the precision of evaluation, float64 noise levels and float32 logits, t from 1e-6 on
    misses less of the truth than is printed. From 1e-3 on, as in training, it is no bound."""
    p = random_distribution()
    model = ExactLoss(noise, p, schedule, dtype=torch.float32)

    def missing(t_min):
        """What leaving out t < t_min takes from the figure, nats a token."""
        nelbo = expected_nelbo(model, STATES, t_min=t_min, points=60)
        entropy = -(p * p.log()).sum()
        return (entropy - p @ nelbo.sum(1)) / n

    assert abs(missing(1e-6)) < 1e-4
    if noise == "uniform":
        assert missing(1e-3) > 1e-3


@pytest.mark.parametrize("alpha", [1e-5, 1e-3, 0.3, 0.99])
def test_uniform_nelbo_equals_its_formula(alpha):
    """As UDLM and Duo write it, for alpha' = -1; in float32 it stays accurate."""
    torch.manual_seed(0)
    size = 1000
    logits = torch.randn(50, size)
    x0 = torch.arange(50)
    xt = torch.arange(25, 75) % 60
    p = logits.double().softmax(-1)
    xbar = size * alpha * F.one_hot(x0, size).double() + 1 - alpha
    pbar = size * alpha * p + 1 - alpha
    xbar_i, pbar_i = (x.gather(1, xt[:, None]) for x in (xbar, pbar))
    log_ratio = (pbar_i * xbar / (pbar * xbar_i)).log()
    divergence = (xbar / xbar_i * log_ratio).sum(1, keepdim=True)
    literal = (divergence - size / xbar_i + size / pbar_i)[:, 0] / (size * alpha)
    largest = float(literal.max())
    for dtype, relative, absolute in ((DOUBLE, 1e-8, 1e-7), (torch.float32, 1e-4, 2e-3)):
        alphas = torch.full((50,), alpha, dtype=dtype)
        ours = NOISES["uniform"](size).nelbo(logits, x0, xt, alphas, torch.tensor(-1.0))
        assert ours.dtype == dtype
        assert close(ours, literal, relative * largest + absolute)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@EACH_SCHEDULE
def test_schedules_reach_their_ends_and_know_their_slope(schedule, dtype):
    """Exactly 1 at t = 0, and exactly 0 at t = 1."""
    schedule = SCHEDULES[schedule]
    ends = torch.tensor([0, 1], dtype=dtype)
    assert schedule(ends)[0].tolist() == [1, 0]
    t = torch.linspace(0.01, 0.99, 99, dtype=dtype, requires_grad=True)
    alpha, dalpha = schedule(t)
    slope = torch.autograd.grad(alpha.sum(), t)[0]
    assert close(dalpha, slope, 1e-6)
    assert (dalpha < 0).all()


@EACH_NOISE
@pytest.mark.parametrize("alpha_t, alpha_s", [(0, 0.4), (0.3, 0.31), (0.3, 0.8), (0.6, 1), (0, 1)])
def test_posterior_is_bayes_rule(noise, alpha_t, alpha_s):
    """p(xs | xt) = sum_x0 p(x0) q(xs | x0) q(xt | xs) / normalizer, one token. With numbers u on a
    grid, step, corrupt and prior hit every outcome in proportion, to the width of the grid."""
    noise = NOISES[noise](V)
    K = noise.n_embeddings
    states = torch.arange(K)
    probs = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE)
    x0, xs, xt = torch.meshgrid(torch.arange(V), states, states, indexing="ij")
    to_xs = likelihood(noise, x0, xs, alpha_s)
    to_xt = likelihood(noise, xs, xt, alpha_t / alpha_s)
    bayes = (probs[:, None, None] * to_xs * to_xt).sum(0).T  # (xt, xs)
    seen = bayes.sum(1) > 0
    bayes = bayes / bayes.sum(1, keepdim=True)
    posterior = noise.posterior(probs.expand(K, V), states, alpha_s, alpha_t)
    assert close(posterior[seen], bayes[seen], 1e-12)

    m = 20_000
    u = (torch.arange(m, dtype=DOUBLE) + 0.5) / m

    def has_law(drawn, law):
        counts = torch.bincount(drawn, minlength=K)
        return close(counts / m, law, 6 / m)

    for state in states[seen]:
        drawn = noise.step(probs.expand(m, V), state.expand(m), alpha_s, alpha_t, u)
        assert has_law(drawn, posterior[state])
    token = torch.tensor(1)
    law = likelihood(noise, token, states, alpha_t)
    assert has_law(noise.corrupt(token.expand(m), alpha_t, u), law)
    assert has_law(noise.prior((m,), u=u), pure_noise_law(noise))


def ancestral_law(noise, denoiser, steps):
    """The exact law of ancestral sampling over STATES, by pushing the whole distribution through
    the steps. denoiser(xt (M, n), alpha) -> (M, n, V)."""
    K = noise.n_embeddings
    xt = every_sequence(K)  # (K^n, n)
    law = pure_noise_law(noise)[xt].prod(1)
    for k in range(steps):
        alpha_t, alpha_s = k / steps, (k + 1) / steps
        probs = denoiser(xt, alpha_t)
        each = noise.posterior(probs, xt, alpha_s, alpha_t)  # (K^n, n, K)
        a, b, c = each.unbind(1)
        law = torch.einsum("m,ma,mb,mc->abc", law, a, b, c).flatten()
    law = law.view(K, K, K)
    return law[:V, :V, :V].flatten()


@EACH_NOISE
def test_ancestral_sampling_converges_to_the_true_distribution(noise):
    noise = NOISES[noise](V)
    p = random_distribution(1)
    denoiser = partial(exact_denoiser, noise, p)
    one, some, many = (ancestral_law(noise, denoiser, T) for T in (1, 8, 64))

    def distance(law):
        """Total variation."""
        return 0.5 * (law - p).abs().sum()

    assert distance(one) > 0.1
    assert distance(many) < 0.01
    assert distance(many) < distance(some) / 5
    product_of_marginals = sum(log_marginal(p, [i]) for i in range(n)).exp()
    assert close(one, product_of_marginals, 1e-12)


# ----------------------------------------------------------------------------------------------
# The model


def random_text(model, rows, alpha=0.5):
    """Clean tokens (rows, 21) and noisy ones."""
    x0 = torch.randint(0, 11, (rows, 21))
    return x0, model.noise.corrupt(x0, alpha)


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
    """denoise over a whole sequence, for odd block sizes; verify in parts."""
    model = tiny(noise, token_causal=token_causal, ar=ar)
    x0, xt = random_text(model, 3)
    for S in (1, 5, 8, 21):
        cache = model.new_cache(3)
        expected = predict(model, x0, xt, S)
        commit = None
        for begin in range(0, 21, S):
            block = slice(begin, begin + S)
            logits = model.denoise(xt[:, block], cache, commit)
            assert close(logits, expected[:, block], 1e-5)
            commit = x0[:, block]

    cache = model.new_cache(3)
    expected = predict(model, x0, xt, 1)
    model.denoise(xt[:, :1], cache, x0[:, :4], block_size=1)
    for begin, end in ((4, 9), (9, 10), (10, 21)):
        block = slice(begin, end)
        logits = model.verify(x0[:, block], cache, xt[:, block])
        assert close(logits, expected[:, block], 1e-5)
        cache.accept(end - begin)
    assert cache.length == 21


@NAN_CACHE
@BOTH
@torch.no_grad()
def test_one_cache_serves_mixed_block_sizes(ar):
    """Against a fresh cache for each block. After a verification, accepting some tokens commits
    them alone: what follows sees nothing of the others, by either side."""
    model = tiny(ar=ar)
    x0, xt = random_text(model, 2, alpha=0.3)
    cache = model.new_cache(2)
    begin = 0
    for S, accepted in ((7, 3), (1, 1), (4, 4), (4, 0), (5, 0)):
        block = slice(begin, begin + S)
        logits = model.denoise(xt[:, block], cache, x0[:, cache.length : begin])
        fresh = model.new_cache(2)
        assert close(logits, model.denoise(xt[:, block], fresh, x0[:, :begin]), 1e-5)
        proposal = x0[:, block].clone()
        proposal[:, accepted:] = (proposal[:, accepted:] + 1) % 11
        whole = torch.cat([x0[:, :begin], proposal, x0[:, begin + S :]], 1)
        verdict = model.verify(proposal, cache, xt[:, block])
        assert close(verdict, predict(model, whole, xt, 1)[:, block], 1e-5)
        cache.accept(accepted)
        assert cache.length == begin + accepted
        begin += S
    assert begin == 21


@pytest.mark.parametrize("S", [1, 4, 7])
@EACH_AR_AND_CACHE
@torch.no_grad()
def test_nothing_leaks_from_the_future(token_causal, ar, S):
    """Change a token: no logit of an earlier block moves by a single bit, nor (clean tokens) of its
    own block; later ones do."""
    model = tiny(token_causal=token_causal, ar=ar)
    x0, xt = random_text(model, 1)
    base = predict(model, x0, xt, S)

    def moved(x0, xt):
        return (predict(model, x0, xt, S) != base).any(-1)[0]

    for i in (0, 9, 13):
        begin = i // S * S
        end = begin + S
        clean, noisy = x0.clone(), xt.clone()
        clean[0, i] = (x0[0, i] + 1) % 11
        noisy[0, i] = (x0[0, i] + 2) % 11
        by_clean = moved(clean, xt)
        assert not by_clean[:end].any()
        assert by_clean[end:].any()
        by_noisy = moved(x0, noisy)
        reads_noise = S > 1 or ar == "paper"
        assert by_noisy[begin:end].any() == reads_noise
        assert not by_noisy[:begin].any()
        assert not by_noisy[end:].any()


def loss_inputs(question=(0, 0, 0), dtype=DOUBLE):
    """A batch of three rows, of which the first `question` tokens are given."""
    torch.manual_seed(0)
    x0 = torch.randint(0, 11, (3, 21))
    t = 0.001 + 0.999 * torch.rand(3, 21, dtype=dtype)
    u = torch.rand(3, 21, dtype=DOUBLE)
    given = torch.arange(21) < torch.tensor(question)[:, None]
    return Batch(x0, torch.tensor([1, 4, 21]), t, u, given)


QUESTIONS = pytest.mark.parametrize("question", [(3, 9, 0), (0, 21, 2)], ids=str)


@QUESTIONS
@BOTH
@EACH_NOISE
@torch.no_grad()
def test_loss_is_charged_where_it_should_be(noise, ar, question):
    """The bound on all logits; cross-entropy for blocks of one token; nothing for given tokens,
    which are not noised either."""
    model = tiny(noise, ar=ar)
    x0, sizes, t, u, given = batch = loss_inputs(question)
    single = torch.zeros_like(given)
    single[0] = True
    single[1, 20] = True  # 21 = 5 x 4 + 1
    alpha, dalpha = 1 - t, -torch.ones_like(t)
    survival = torch.where(single, 0.0, alpha)
    xt = model.noise.corrupt(x0, survival, u)
    xt = torch.where(given, x0, xt)
    logits = predict(model, x0, xt, sizes)
    nll = -logits.log_softmax(-1).gather(2, x0[..., None])[..., 0]
    nelbo = model.noise.nelbo(logits, x0, xt, alpha, dalpha)
    expected = torch.where(single, nll, nelbo)
    losses = model(batch)
    assert losses.dtype == DOUBLE
    assert close(losses, expected.masked_fill(given, 0), 1e-4)
    assert (losses[given] == 0).all()

    is_scored = ~given
    if noise == "masked":
        is_scored = (single | (xt == model.noise.mask)) & ~given
    assert close(model(batch, loss="ce"), nll.masked_fill(~is_scored, 0), 1e-5)


@QUESTIONS
@BOTH
@EACH_NOISE
@pytest.mark.parametrize("ar_weight", [0, 0.3])
def test_losses_of_a_batch_are_those_of_its_rows(noise, ar, question, ar_weight):
    """The head in parts gives what it gives at once, gradients too. The AR loss that ar="shift"
    yields beside a diffusion loss is that of block size 1."""
    model = tiny(noise, ar=ar)
    batch = loss_inputs(question, torch.float32)
    losses = partial(model, ar_weight=ar_weight)
    whole = losses(batch)
    assert whole.dtype == torch.float32
    alone = [losses(Batch(*row)) for row in zip(*(x.split(1) for x in batch))]
    assert close(torch.cat(alone), whole, 1e-4)

    model.losses = partial(model.losses, chunk=40)  # three tokens at a time
    parts = losses(batch)
    assert close(parts, whole, 1e-5)
    weight = model.embedding.weight
    gradient = torch.autograd.grad(whole.sum(), weight)[0]
    gradient_of_parts = torch.autograd.grad(parts.sum(), weight)[0]
    assert close(gradient_of_parts, gradient, 1e-4)

    if ar == "shift":
        diffusion = model(batch)
        by_ar = model(batch._replace(block_size=torch.ones(3, dtype=torch.long)))
        mixed = (1 - ar_weight) * diffusion + ar_weight * by_ar
        assert close(whole, mixed, 1e-5)


def test_the_head_makes_no_more_logits_than_a_chunk(monkeypatch):
    """And none where nothing is scored."""
    model, linear, sizes = tiny(), F.linear, []

    def record(x, weight, bias=None):
        made = linear(x, weight, bias)
        if bias is model.head_bias:
            sizes.append(made.numel())
        return made

    monkeypatch.setattr(F, "linear", record)
    model.losses = partial(model.losses, chunk=40)
    model(loss_inputs())
    assert max(sizes) == 33
    assert sum(sizes) < 3 * 21 * 11


@torch.no_grad()
def test_heads_begin_by_looking_back():
    """Before training, where the norm's output is zero, the first head's scores are highest one
    position back, and the last head has no preference."""
    model = BlockGen(Config(n_layer=1, n_head=4))
    cos, sin = model.rotary
    zeros = torch.zeros(1, 128, 128)
    q, k, _ = model.blocks[0].before(zeros, cos, sin)  # (1, H, L, D)
    scores = (q @ k.mT)[0, :, -1]  # (H, L) of the last query
    assert scores[0].argmax() == 126
    assert scores[0].max() > scores[0].mean() + 1
    assert scores[3].max() == scores[3].min()


def test_other_norms_and_layers_are_initialized(monkeypatch):
    """What a student changes first: a norm without a bias, other layers that add to the stream."""
    monkeypatch.setattr(torch.nn, "LayerNorm", torch.nn.RMSNorm)
    outputs = blockgen.Block.outputs
    monkeypatch.setattr(blockgen.Block, "outputs", lambda block: [block.mlp[0], *outputs(block)])
    model = BlockGen(Config(n_layer=4))
    stds = {name: p.std().item() for name, p in model.blocks[0].named_parameters()}
    assert stds["mlp.0.weight"] == pytest.approx(stds["attn_out.weight"], rel=0.1)
    assert stds["attn_qkv.weight"] == pytest.approx(8**0.5 * stds["mlp.2.weight"], rel=0.1)
    assert stds["mlp.2.weight"] == pytest.approx(0.5 * 128**-0.5 / 8**0.5, rel=0.1)
    assert model.embedding.weight.std().item() == pytest.approx(128**-0.5, rel=0.1)


def test_settings_are_checked_in_subclasses_too():
    @dataclass
    class Mine(Config):
        flavor: Literal["sweet", "sour"] = "sweet"

    assert Mine().flavor == "sweet"
    for wrong in (dict(flavor="bitter"), dict(noise="gaussian"), dict(ar="none")):
        [(name, value)] = wrong.items()
        with pytest.raises(UserError, match=f"{name} is {value}, but must be one of"):
            Mine(**wrong)
    with pytest.raises(UserError, match="n_head"):
        Config(n_embd=20, n_head=4)
    with pytest.raises(UserError, match="ar must be paper"):
        Config(token_causal=False)


ALONE = """
import torch, blockgen
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
    """Two files in an empty folder train and generate."""
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
    for sizes in ([1, 4, 5], [16, 21, 16], [2, 8, 1]):
        batch = loss_inputs()._replace(block_size=torch.tensor(sizes))
        gradients = []
        for model in (plain, compiled):
            model.zero_grad()
            model(batch, ar_weight=0.5).sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert close(*gradients, 1e-4)
    assert counters["stats"]["unique_graphs"] == 2


# ----------------------------------------------------------------------------------------------
# Devices and checkpoints


@pytest.fixture
def gpu(monkeypatch):
    """torch believes in two GPUs; they can do nothing. What it is told: .current, .capability."""
    told = SimpleNamespace(current=None, capability=(9, 0))
    fakes = dict(
        is_available=lambda: True,
        device_count=lambda: 2,
        set_device=lambda device: setattr(told, "current", str(device)),
        get_device_capability=lambda device=None: told.capability,
        is_bf16_supported=lambda *_, **__: True,  # this counts emulation: it says so of a T4 too
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    return told


def test_a_gpu_has_an_index(gpu):
    expected = {"auto": 0, "cuda": 0, "cuda:0": 0, "cuda:1": 1, "cpu": None}
    for name, index in expected.items():
        gpu.current = None
        device = blockgen.find_device(name)
        assert (device.type, device.index) == ("cpu" if index is None else "cuda", index)
        assert gpu.current == (None if index is None else f"cuda:{index}")
    for name in ("cuda:2", "cuda:x", "meta", "mps", ""):
        with pytest.raises(UserError, match=f"--device={name}"):
            blockgen.find_device(name)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    """By name: whoever changed the code since reads which field or key differs."""
    path = f"{tmp_path}/ckpt.pt"
    model = tiny()
    weights, config = model.state_dict(), asdict(model.config)
    without_gain = {name: x for name, x in weights.items() if name != "noisy_gain"}
    without_tied = {name: x for name, x in config.items() if name != "tied"}
    cases = {
        "noisy_gain": (config, without_gain),
        "norm.weight": (config, {**weights, "norm.weight": torch.ones(7)}),
        "not finite": (config, {**weights, "norm.bias": weights["norm.bias"] / 0}),
        "flavor": ({**config, "flavor": 1}, weights),
        "tied": (without_tied, weights),
    }
    for word, (config, weights) in cases.items():
        torch.save(dict(config=config, model=weights), path)
        with pytest.raises(UserError, match=word) as error:
            blockgen.load_checkpoint(path)
        assert "\n" not in str(error.value)
    torch.save(weights, path)
    half = open(path, "rb").read()[:500]
    for content in (half, b"", b"text"):
        with pytest.raises(UserError, match="no checkpoint"):
            blockgen.load_checkpoint(path)
        with open(path, "wb") as file:
            file.write(content)
    with pytest.raises(UserError, match="nowhere.pt is missing"):
        blockgen.load_checkpoint(f"{tmp_path}/nowhere.pt")


def test_checkpoints_hold_the_best_weights(tmp_path, monkeypatch):
    """The best in validation, else the average, else what there is; in bfloat16, too. A save that
    fails leaves the old file, and nothing else."""
    path = f"{tmp_path}/ckpt.pt"
    names = ["model", "average", "best"]
    models = [tiny(seed=i).state_dict() for i in range(3)]
    config = asdict(tiny().config)
    for n_kinds in (1, 2, 3):
        kinds = dict(zip(names[:n_kinds], models))
        blockgen.save_checkpoint(path, config=config, **kinds)
        loaded, _ = blockgen.load_checkpoint(path)
        assert not loaded.training
        assert torch.equal(loaded.norm.bias, models[n_kinds - 1]["norm.bias"])
    half = {name: x.bfloat16() for name, x in models[0].items()}
    blockgen.save_checkpoint(path, config=config, model=half)
    assert close(blockgen.load_checkpoint(path)[0].norm.bias, models[0]["norm.bias"], 1e-2)

    monkeypatch.setattr(torch, "save", lambda content, file: file.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        blockgen.save_checkpoint(path)
    assert os.listdir(tmp_path) == ["ckpt.pt"]
    blockgen.load_checkpoint(path)


# ----------------------------------------------------------------------------------------------
# Published checkpoints

PUBLISHED = dict(
    name="blockgen",
    type="ddit",
    hidden_size=24,
    cond_dim=10,
    length=21,
    n_blocks=2,
    n_heads=2,
    dropout=0.1,
    attn_backend="flash_attn",
    x0_causal=True,
)


def published_tensors(noise, K=50258):
    """Random weights in the published layout, none of them trivial but what the mask's row of the
    head is, which never got a gradient."""
    torch.manual_seed(0)
    d, c = PUBLISHED["hidden_size"], PUBLISHED["cond_dim"]
    layers = {  # (outputs, inputs); these have biases
        "sigma_map.mlp.0": (c, 256),
        "sigma_map.mlp.2": (c, c),
        "output_layer.linear": (K, d),
        "output_layer.adaLN_modulation": (2 * d, c),
    }
    others = {"vocab_embed.embedding": (K, d), "output_layer.norm_final.weight": (d,)}
    for i in range(PUBLISHED["n_blocks"]):
        block = f"blocks.{i}"
        layers[f"{block}.mlp.0"] = (4 * d, d)
        layers[f"{block}.mlp.2"] = (d, 4 * d)
        layers[f"{block}.adaLN_modulation"] = (6 * d, c)
        others[f"{block}.attn_qkv.weight"] = (3 * d, d)
        others[f"{block}.attn_out.weight"] = (d, d)
        others[f"{block}.norm1.weight"] = others[f"{block}.norm2.weight"] = (d,)
    for name, shape in layers.items():
        others |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    tensors = {name: 0.2 * torch.randn(shape) + ("norm" in name) for name, shape in others.items()}
    if noise == "masked":
        tensors["output_layer.linear.weight"][-1] = 0
        tensors["output_layer.linear.bias"][-1] = 0
    return tensors


def write_published(folder, tensors, **config):
    """The folder, as a str."""
    safetensors = pytest.importorskip("safetensors.torch")
    os.makedirs(folder, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED | config))
    safetensors.save_file(tensors, folder / "model.safetensors")
    return str(folder)


def published_forward(w, x0, xt, S, token_causal):
    """Logits (N, L, K) of the noisy half, by the network as its layout describes it, unfolded:
    adaLN at every layer."""
    L, d = x0.shape[1], PUBLISHED["hidden_size"]
    mask = kernels.train_view(L, S, token_causal).dense(2 * L)

    def layer(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name, shift, scale):
        return F.layer_norm(x, (d,), w[f"{name}.weight"]) * (1 + scale) + shift

    def rotate(x):
        inv_freq = 10000.0 ** -(torch.arange(0, 12, 2) / 12)
        angle = torch.arange(L).repeat(2)[:, None] * inv_freq
        turn = torch.polar(torch.ones_like(angle), angle)
        a, b = x.chunk(2, -1)
        turned = torch.complex(a, b) * turn
        return torch.cat([turned.real, turned.imag], -1)

    def attention(x, name):
        qkv = layer(x, f"{name}.attn_qkv").chunk(3, -1)
        q, k, v = (y.unflatten(-1, (PUBLISHED["n_heads"], -1)).transpose(1, 2) for y in qkv)
        o = F.scaled_dot_product_attention(rotate(q), rotate(k), v, mask)
        return layer(o.transpose(1, 2).flatten(2), f"{name}.attn_out")

    time = torch.tensor([1.0] * 128 + [0.0] * 128)
    condition = F.silu(layer(F.silu(layer(time, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
    x = w["vocab_embed.embedding"][torch.cat([x0, xt], 1)]
    for i in range(PUBLISHED["n_blocks"]):
        name = f"blocks.{i}"
        modulation = layer(condition, f"{name}.adaLN_modulation")
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6)
        x = x + gate1 * attention(norm(x, f"{name}.norm1", shift1, scale1), name)
        h = layer(norm(x, f"{name}.norm2", shift2, scale2), f"{name}.mlp.0")
        x = x + gate2 * layer(F.gelu(h, approximate="tanh"), f"{name}.mlp.2")
    shift, scale = layer(condition, "output_layer.adaLN_modulation").chunk(2)
    x = norm(x, "output_layer.norm_final", shift, scale)
    return layer(x[:, L:], "output_layer.linear")


@pytest.mark.parametrize("token_causal", [True, False])
@pytest.mark.parametrize("noise", ["masked", "uniform"])
@torch.no_grad()
def test_published_weights_give_the_logits_of_their_layout(noise, token_causal, tmp_path):
    """The noise is read off the head."""
    w = published_tensors(noise)
    folder = write_published(tmp_path, w, x0_causal=token_causal)
    model, content = blockgen.load_checkpoint(folder)
    size = 50257 if noise == "masked" else 50258
    assert (model.config.noise, model.config.vocab_size) == (noise, size)
    tokenizer = content["meta"]["tokenizer"]
    assert (tokenizer["kind"], tokenizer["start"], tokenizer["end"]) == ("gpt2", 50256, 50256)
    assert content["args"] == {}
    x0 = torch.randint(size, (2, 21))
    xt = model.noise.corrupt(x0, 0.5)
    for S in (1, 4):
        expected = published_forward(w, x0, xt, S, token_causal)[..., :size]
        assert close(predict(model, x0, xt, S), expected, 1e-5)


def small_tokenizer(*special, size=30):
    """The text of a tokenizer.json of single characters."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=list(special))
    tokenizer.train_from_iterator(["abcdefghij 0123456789\\n+="], trainer)
    return tokenizer.to_str()


def test_the_tokenizer_of_published_weights(tmp_path):
    """A tokenizer.json beside them, which must fit; without it GPT-2's number of tokens."""
    path = tmp_path / "tokenizer.json"

    def tokenizer(n_tokens, text):
        write_published(tmp_path, published_tensors("uniform", n_tokens))
        path.write_text(text)
        return blockgen.read_checkpoint(str(tmp_path))["meta"]["tokenizer"]

    text = small_tokenizer("<s>", "</s>")
    found = tokenizer(40, text)
    assert found == dict(kind="json", json=text, vocab_size=30, start=0, end=1, separator="\\n")
    found = tokenizer(40, small_tokenizer("<|endoftext|>"))
    assert (found["start"], found["end"]) == (0, 0)
    for n_tokens, special, words in ((40, "[X]", "needs one of"), (9, "</s>", "only 9 tokens")):
        with pytest.raises(UserError, match=words):
            tokenizer(n_tokens, small_tokenizer(special))
    path.unlink()
    with pytest.raises(UserError, match="put the tokenizer.json"):
        blockgen.load_checkpoint(str(tmp_path))


def test_published_tensors_that_do_not_fit_are_refused(tmp_path):
    """By name."""
    tensors = published_tensors("masked")
    for name in ("blocks.1.mlp.0.bias", "vocab_embed.embedding"):
        some = {other: x for other, x in tensors.items() if other != name}
        with pytest.raises(UserError, match=name):
            blockgen.load_checkpoint(write_published(tmp_path, some))
    folder = write_published(tmp_path, tensors, n_heads=4)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="length"):
        blockgen.load_checkpoint(folder)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        blockgen.load_checkpoint(folder)


# --------------------------------------------------------------------------------------------------
# Attention: who sees whom


CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
PATHS = [kernels.attention_torch, kernels.attention_triton][: 1 + (kernels.triton is not None)]
EACH_PATH = pytest.mark.parametrize("attention", PATHS)


def test_train_view_is_its_definition():
    L, S = 11, 4
    query, key = torch.arange(2 * L)[:, None], torch.arange(2 * L)
    query_block, key_block = query % L // S, key % L // S
    noisy = torch.where(key < L, key_block < query_block, key_block == query_block)
    clean_by_block = (key < L) & (key_block <= query_block)
    for token_causal, clean in ((True, key <= query), (False, clean_by_block)):
        seen = kernels.train_view(L, S, token_causal).dense(2 * L)
        assert torch.equal(seen, torch.where(query < L, clean, noisy))
    mixed = kernels.train_view(L, torch.tensor([1, 4, 11])).dense(2 * L)
    for row, S in zip(mixed, (1, 4, 11)):
        assert torch.equal(row, kernels.train_view(L, S).dense(2 * L))


def test_denoise_view_is_its_definition():
    C, c, n = 5, 7, 3
    query, key = torch.arange(c + n)[:, None], torch.arange(C + c + n + 2)
    for S in (1, 3):
        block_end = (query // S + 1) * S
        last = torch.where(query < c, block_end.clamp(max=c), c + n)
        assert torch.equal(kernels.denoise_view(C, c, n, S).dense(len(key)), key < C + last)


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


# --------------------------------------------------------------------------------------------------
# Attention, in PyTorch and in Triton's interpreter


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
    torch.manual_seed(0)
    qkv = random_qkv(2 * L, D, dtype)
    grad = torch.randn_like(qkv[0])
    mixed = kernels.train_view(L, torch.tensor([max(1, S // 2), S]))
    for view in (mixed, random_view(2 * L, 2 * L), random_view(2 * L, 2, 2 * L)):
        ours = with_gradients(attention, qkv, view, grad)
        exact = with_gradients(kernels.attention_naive, qkv.double(), view, grad)
        for a, b in zip(ours, exact):
            assert close(a, b, tolerance * b.abs().max().clamp(min=1))


@EACH_PATH
@pytest.mark.parametrize(
    "view, valid",
    [
        (kernels.denoise_view(64, 6, 11, 3), 81),
        (kernels.denoise_view(70, 0, 1), 71),
        (kernels.verify_view(5, 70), 145),
    ],
)
def test_nothing_is_read_behind_the_last_visible_key(attention, view, valid):
    torch.manual_seed(0)
    q = torch.randn(2, 2, len(view.prefix), 16)
    kv = torch.randn(2, 2, 2, 150, 16)
    exact = with_gradients(kernels.attention_naive, (q, *kv), view, q)
    kv[..., valid:, :] = 1e4
    for a, b in zip(with_gradients(attention, (q, *kv), view, q), exact):
        assert close(a, b, 1e-5)


# --------------------------------------------------------------------------------------------------
# Which tiles are visited, and how often that is found out


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


@pytest.mark.parametrize("tile", [32, 64])
@pytest.mark.parametrize("L, S", [(512, 1), (1024, 16), (100, 100), (333, 7), (75, None)])
def test_kernels_visit_the_tiles_that_hold_a_visible_pair_and_no_other(L, S, tile):
    torch.manual_seed(0)
    T = 2 * L
    view = kernels.train_view(L, S) if S else random_view(T, 3, T)
    bounds, *tables = kernels.make_tables(view, T, tile, CPU)
    masks = view.dense(T).view(-1, T, T)
    assert len(bounds) == len(masks)
    for mask, by_query, by_key in zip(masks, *tables, strict=True):
        states = states_of(mask, tile)
        assert torch.equal(states_in(by_query, len(states)), states)
        assert torch.equal(states_in(by_key, len(states)), states.T)


def test_torch_visits_no_other_tiles_either():
    view = kernels.train_view(1024, 16)
    states = states_of(view.dense(2048), 64)
    assert (states > 0).sum() == 288  # of 1024
    _, tile, masks = kernels.make_masks(view, CPU)
    for (tiles, mask), row in zip(masks, states, strict=True):
        assert tiles == row.nonzero()[:, 0].tolist()
        assert mask.shape == (1, 1, 64, 64 * len(tiles))
    _, _, masks = kernels.make_masks(kernels.denoise_view(100, 0, 16), CPU)
    assert masks == [([0], None)]  # a slice of the cache, without a mask


@EACH_PATH
def test_rows_of_one_block_size_share_what_a_view_needs(monkeypatch, attention):
    """In all layers and steps: it is made once."""
    monkeypatch.setattr(blockgen, "block_attention", attention)
    made = kernels.make_masks if attention is PATHS[0] else kernels.make_tables
    before = made.cache_info().misses
    model = tiny(n_layer=3)
    for u in torch.rand(2, 4, 21):
        x0 = torch.zeros(4, 21, dtype=torch.long)
        model(Batch(x0, torch.full((4,), 5), u, u, x0 > 0))
    assert made.cache_info().misses == before + 1


# --------------------------------------------------------------------------------------------------
# Which implementation runs


def failing_kernel(error):
    return MagicMock(**{"__getitem__.side_effect": error})


@needs_triton
def test_use_triton(monkeypatch, capsys):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: torch.zeros(*shape))

    def reason(capability):
        """What stderr says, once, if the kernels cannot run; otherwise nothing."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        kernels.use_triton.cache_clear()
        answers = {kernels.use_triton(gpu), kernels.use_triton(gpu)}
        said = capsys.readouterr().err
        assert answers == {said == ""} and said.count("\n") == (said != "")
        return said

    assert not kernels.use_triton(CPU)
    assert reason((8, 0)) == reason((12, 0)) == ""
    assert "capability 8.0" in reason((7, 5))
    no_compiler = RuntimeError("Failed to find C compiler.\nPlease specify one.")
    for error in (no_compiler, subprocess.CalledProcessError(1, "gcc"), OSError()):
        monkeypatch.setattr(kernels, "probe_kernel", failing_kernel(error))
        assert "cannot compile" in reason((9, 0))
    monkeypatch.setattr(kernels, "probe_kernel", failing_kernel(NameError("a bug")))
    with pytest.raises(NameError):
        reason((9, 0))
    monkeypatch.setattr(kernels, "triton", None)
    assert "not installed" in reason((9, 0))
    kernels.use_triton.cache_clear()


def test_block_attention_leaves_wide_heads_to_torch(monkeypatch):
    chosen = []
    monkeypatch.setattr(kernels, "attention_triton", lambda *_: chosen.append("triton"))
    monkeypatch.setattr(kernels, "attention_torch", lambda *_: chosen.append("torch"))
    for triton_works, D in ((False, 64), (True, 64), (True, 128), (True, 129)):
        monkeypatch.setattr(kernels, "use_triton", lambda device: triton_works)
        kernels.block_attention(*random_qkv(4, D), None)
    assert chosen == ["torch", "triton", "triton", "torch"]


def test_kernels_start_at_once_and_in_silence():
    """Without torch.compile and the benchmark's timer."""
    code = "import sys, kernels; print({'torch._dynamo', 'torch.utils.benchmark'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    assert (run.stdout, run.stderr) == ("set()\n", "")


def test_kernels_has_no_flags(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--L=3"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(kernels.__file__, run_name="__main__")
    assert re.fullmatch(".*--L=3\n", capsys.readouterr().err)


# --------------------------------------------------------------------------------------------------
# The kernels, compiled ahead of time: no GPU is needed for that


AHEAD_OF_TIME = """
import os, re, subprocess, sys, tempfile
import triton, kernels
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOL = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
FIXED = {"scale": "fp32", "LSE": "*fp32", "DELTA": "*fp32", "DQ": "*fp32"}
FIXED |= {"BOUNDS": "*i32", "LISTS": "*i32"}

def report(kernel, architecture, dtype, D, options):
    constants = {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        signature[name] = FIXED.get(name, "*" + dtype if name.isupper() else "i32")
        if name in constants:
            signature[name] = "constexpr"
        elif signature[name].startswith("*"):
            attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", int(architecture), 32)
    built = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [TOOL, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True).stdout
    spill = int(re.search(r"STACK:(\\d+)", usage)[1])
    shared = built.metadata.shared
    assert "mma" in built.asm["ptx"] and shared <= 99 * 1024 and spill <= 32, (shared, spill)

for case in sys.argv[1:]:
    print(case, flush=True)
    architecture, dtype, D = case.split(",")
    D, itemsize = int(D), 2 if dtype == "bf16" else 4
    forward = kernels.launch_options(D, itemsize, backward=False)
    report(kernels.forward_kernel, architecture, dtype, D, forward)
    backward = kernels.launch_options(D, itemsize, backward=True)
    report(kernels.backward_kernel, architecture, dtype, D, backward)
"""

COMPILED = [
    "80,bf16,64",
    "90,bf16,64",
    "100,bf16,64",
    "120,bf16,64",
    "80,fp32,128",
    "90,bf16,128",
]


@needs_triton
def test_kernels_compile_ahead_of_time(tmp_path):
    """From A100 to B200 and RTX 5090: they compile, use the matrix units, fit in the 99 KB of
    shared memory that the smaller ones have, and spill at most 32 bytes."""
    environment = dict(os.environ)
    del environment["TRITON_INTERPRET"]
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", AHEAD_OF_TIME, *COMPILED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == COMPILED


# --------------------------------------------------------------------------------------------------
# The model with the kernels, in the interpreter


def loss_and_gradients(model):
    """Losses (N, L) of a batch of several block sizes, and the gradients of all parameters."""
    torch.manual_seed(0)
    x0 = torch.randint(11, (4, 21))
    t, u = torch.rand(2, 4, 21)
    losses = model(Batch(x0, torch.tensor([1, 4, 6, 21]), t, u, x0 < 0), ar_weight=0.3)
    return losses, *torch.autograd.grad(losses.mean(), list(model.parameters()))


@needs_triton
@BOTH
@EACH_NOISE
def test_training_with_the_kernels(monkeypatch, noise, ar):
    model = tiny(noise, ar=ar, n_embd=32)
    expected = loss_and_gradients(model)
    monkeypatch.setattr(blockgen, "block_attention", kernels.attention_triton)
    for a, b in zip(loss_and_gradients(model), expected):
        assert close(a, b, 1e-4)


SAMPLED = [
    ("masked", "shift", "ar"),
    ("uniform", "paper", "ancestral"),
    ("hybrid30", "shift", "speculative"),
    ("masked", "paper", "arpc"),
]


@needs_triton
@pytest.mark.parametrize("noise, ar, sampler", SAMPLED)
def test_sampling_with_the_kernels(monkeypatch, noise, ar, sampler):
    """Each pass, cached, as it would be on a GPU, against the CPU's attention. Going on from the
    kernels' result, no tie can hide or feign a difference."""
    calls = []

    def both(q, k, v, view):
        result = kernels.attention_triton(q, k, v, view)
        calls.append(close(result, kernels.attention_torch(q, k, v, view), 1e-5))
        return result

    monkeypatch.setattr(blockgen, "block_attention", both)
    given = torch.full((2, 7), -1)
    given[0, :2] = 1
    model = tiny(noise, ar=ar, n_layer=1)
    sample.generate(model, 2, 7, given=given, block_size=4, steps=2, sampler=sampler)
    assert len(calls) > 2  # blocks
    assert all(calls)


# ----------------------------------------------------------------------------------------------
# Sampling: the laws of what is drawn

EACH_SAMPLER = pytest.mark.parametrize("sampler", FILL)


def samples(model, rows, length=None, **options):
    """Tokens (rows, L)."""
    tokens, _ = generate(model, rows, length or model.config.seq_len, **options)
    return tokens


class ExactModel:
    """What generate() needs of a model and its cache, for a distribution p over STATES. Its AR side
    is exact. Its diffusion side gives p(x_i | the prefix, what is revealed in the block) under
    masked noise, p(x_i | the prefix) under uniform noise."""

    device = "cpu"

    def __init__(self, p, noise="masked"):
        self.p = p
        self.noise = NOISES[noise](V)
        self.config = Config(vocab_size=V, seq_len=n, noise=noise)

    def new_cache(self, rows, length):
        self.length = 0
        self.tokens = torch.zeros(rows, n, dtype=torch.int64)
        return self

    def accept(self, k):
        self.length += k

    def laws(self, x, known):
        """log p(x_i = v | the tokens at known(i), (N, n)), (N, n, V), for the tokens x that follow
        the committed ones."""
        begin, end = self.length, self.length + x.shape[1]
        self.tokens[:, begin:end] = x
        laws = []
        for i in range(begin, end):
            agrees = (STATES == self.tokens[:, None]) | ~known(i)[:, None]
            laws.append(token_law(self.p * agrees.all(-1), i).log())
        return torch.stack(laws, 1)

    def denoise(self, xt, cache, commit, block_size):
        self.tokens[:, self.length : self.length + commit.shape[1]] = commit
        self.length += commit.shape[1]
        known = (torch.arange(n) < self.length).repeat(len(xt), 1)
        known[:, self.length : self.length + xt.shape[1]] = (
            ~self.noise.maybe_noise(xt)
        )
        return self.laws(xt, lambda i: known & (torch.arange(n) != i))

    def verify(self, x, cache, noise):
        return self.laws(x, lambda i: torch.arange(n)[None] < i)


def has_law(tokens, law):
    """Could the rows of tokens (N, n) have been drawn from a law over STATES?"""
    index = tokens @ torch.tensor([V * V, V, 1])
    counts = torch.bincount(index, minlength=len(STATES))
    return fits(counts, law)


def ar_law(p, given=(-1,) * n, temperature=1.0, top_k=V):
    """The law over STATES of writing from left to right around given tokens, -1 where free."""
    law = torch.ones(len(STATES), dtype=DOUBLE)
    for i, token in enumerate(given):
        weight = p * (STATES[:, None, :i] == STATES[:, :i]).all(-1)
        each = token_law(weight, i) ** (
            1 / temperature
        )  # (V^n, V), one for each beginning
        each[each < each.topk(top_k).values[:, -1:]] = 0
        each = each / each.sum(-1, keepdim=True)
        if token >= 0:
            each = F.one_hot(torch.tensor([token]), V).expand_as(each)
        law = law * blockgen.at_index(each, STATES[:, i])
    return law


@pytest.mark.parametrize("shape", [{}, dict(temperature=2.0, top_k=2)], ids=str)
@EACH_NOISE
def test_speculative_samples_are_exactly_ar_samples(noise, shape):
    """Of many rows at a time, most of which run ahead of the slowest; also after temperature and
    top-k, which act on both sides."""
    p = random_distribution(2)
    model = ExactModel(p, noise)
    law = ar_law(p, **shape)
    assert has_law(samples(model, 20_000, sampler="ar", seed=1, **shape), law)
    options = dict(sampler="speculative", **shape)
    for S in (2, 3):
        tokens, stats = generate(
            model, 20_000, n, block_size=S, seed=2, **options
        )
        assert has_law(tokens, law)
        assert stats["nfe"] < 2 * n  # some rounds accept a token in every row
    # the test has teeth: the draft alone has another law
    draft = samples(model, 20_000, block_size=3, steps=1, seed=3, **shape)
    assert not has_law(draft, law)


@EACH_NOISE
def test_speculative_samples_in_a_batch_of_different_prompts(noise):
    """Small batches, which move on by several tokens at a time. Each row has the AR law of its own
    prompt, also where the prompt stands behind free tokens."""
    model = ExactModel(random_distribution(2), noise)
    prompts = [(-1, -1, -1), (2, -1, -1), (-1, 0, -1), (1, -1, 2), (0, 0, 0)]
    given = torch.tensor(prompts)
    write = partial(samples, model, sampler="speculative")
    batches = [write(5, given=given, first_row=5 * k) for k in range(500)]
    by_prompt = torch.stack(batches, 1)  # (5, batches, n)
    for tokens, prompt in zip(by_prompt, prompts):
        assert has_law(tokens, ar_law(model.p, prompt))


# ----------------------------------------------------------------------------------------------
# Sampling: the algorithms, as a paper would write them


class Direct:
    """Generation as a paper would write it: one row, plain loops, and everything is computed anew
    in every pass, from the text as it stands. The random numbers are those of generate().

    tokens are -1 where nothing is decided. A text longer than the context goes on from the last
    half of it. Each sampler is a function that fills the free tokens of a block.
    """

    def __init__(self, model, given, row, **options):
        self.model, self.tokens, self.row = model, list(given), row
        self.options = sample.Options(**options)

    def write(self):
        begin = window = 0
        L = self.model.config.seq_len
        self.size = (
            1 if self.options.sampler == "ar" else self.options.block_size
        )
        while begin < len(self.tokens):
            if begin == window + L:
                window = begin - L // 2
            end = min(begin + self.size, window + L, len(self.tokens))
            self.block, self.context = range(begin, end), range(window, begin)
            self.free = [i for i in self.block if self.tokens[i] < 0]
            if self.free:
                xt = dict(zip(self.block, self.tokens[begin:end]))
                xt |= {i: self.noise(sample.PRIOR, 0, i) for i in self.free}
                fill = (
                    steps_by_hand
                    if len(self.block) == 1
                    else BY_HAND[self.options.sampler]
                )
                fill(self, xt)
            begin = next((i for i in self.block if self.tokens[i] < 0), end)
        return self.tokens

    def uniform(self, purpose, step, i):
        """The uniform number for token i."""
        key = self.options.seed, purpose, step, self.block.start
        return random_numbers(key, [self.row], len(self.block))[
            0, i - self.block.start
        ]

    def noise(self, purpose, step, i):
        """A token of pure noise for place i."""
        return int(self.model.noise.prior((), u=self.uniform(purpose, step, i)))

    def logits(self, clean, noisy):
        """(n, V), of n noisy tokens that follow clean ones: the model without a past."""
        clean, noisy = (
            torch.tensor([tokens], dtype=torch.int64)
            for tokens in (clean, noisy)
        )
        cache = self.model.new_cache(1)
        return self.model.denoise(noisy, cache, clean, self.size)[0].float()

    def diffusion(self, xt):
        """The logits of the block at noisy tokens xt, by place."""
        context = [self.tokens[i] for i in self.context]
        return dict(zip(self.block, self.logits(context, list(xt.values()))))

    def ar(self, x, step):
        """The AR side's logits of the tokens x of the block, one after the other, by place."""
        clean = [self.tokens[i] for i in self.context]
        logits = {}
        for i in self.block:
            logits[i] = self.logits(
                clean, [self.noise(sample.VERIFY, step, i)]
            )[0]
            clean.append(x[i])
        return logits

    def law(self, logits):
        """What a token is drawn from, (V,): temperature, then the k likeliest tokens."""
        k = self.options.top_k or len(logits)
        likely = logits.topk(k).indices
        probs = torch.zeros_like(logits)
        probs[likely] = (logits[likely] / self.options.temperature).softmax(-1)
        return probs


def steps_by_hand(direct, xt):
    """Ancestral sampling and ARPC: at each of the steps predict the clean tokens, and step back to
    the next noise level. A guided step of ARPC goes all the way instead, asks the AR side, and
    sends the tokens with the lowest likelihood back to noise, so many as the level demands.
    """
    o, model = direct.options, direct.model
    steps = o.steps if len(direct.block) > 1 else 1
    for k in range(steps):
        alpha_t, alpha_s = k / steps, (k + 1) / steps
        late_enough = k >= o.warmup and (k - o.warmup) % o.guide_every == 0
        guided = o.sampler == "arpc" and late_enough and k < steps - 1
        logits = direct.diffusion(xt)
        for i in direct.free:
            old, u = torch.tensor(xt[i]), direct.uniform(sample.REVEAL, k, i)
            probs = direct.law(logits[i])
            xt[i] = int(
                model.noise.step(
                    probs, old, 1.0 if guided else alpha_s, alpha_t, u
                )
            )
        if guided:
            ar = direct.ar(xt, k)
            score = {
                i: -ar[i].log_softmax(-1)[xt[i]].item() for i in direct.free
            }
            count = max(1, round((1 - alpha_s) * len(direct.block)))
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
        drawn = {}
        for i in free:
            u = direct.uniform(sample.REVEAL, k, i)
            drawn[i] = int(draw(direct.law(logits[i]), u))
        confidence = {i: logits[i].softmax(-1)[drawn[i]].item() for i in free}
        likeliest = max(free, key=confidence.get)
        for i in free:
            if i == likeliest or confidence[i] > direct.options.threshold:
                xt[i] = direct.tokens[i] = drawn[i]
        free = [i for i in free if direct.tokens[i] < 0]
        k += 1


def draft_by_hand(direct, xt):
    """Speculative decoding: draw all free tokens from q; then, from left to right, keep a token
    with probability min(1, p / q); instead of the first that is not kept, draw from what p has
    more than q, and stop."""
    logits = direct.diffusion(xt)
    q = {i: direct.law(logits[i]) for i in direct.free}
    for i in direct.free:
        xt[i] = int(draw(q[i], direct.uniform(sample.REVEAL, 0, i)))
    ar = direct.ar(xt, 0)
    for i in direct.free:
        p, x = direct.law(ar[i]), xt[i]
        if direct.uniform(sample.ACCEPT, 0, i) < p[x] / q[i][x]:
            direct.tokens[i] = x
            continue
        rest = (p - q[i]).clamp(min=0)
        direct.tokens[i] = int(
            draw(rest, direct.uniform(sample.RESIDUAL, 0, i))
        )
        return


BY_HAND = dict.fromkeys(["ancestral", "ar", "arpc"], steps_by_hand)
BY_HAND.update(confidence=confidence_by_hand, speculative=draft_by_hand)


GIVEN = torch.full((3, 45), -1)  # the context is 21 tokens
GIVEN[0, :30] = 1
GIVEN[1, 3:9] = 2
GIVEN[1, 20:23] = 4
GIVEN[2, :13] = 3
VARIANTS = [dict(sampler=name) for name in FILL]
VARIANTS += [
    dict(
        sampler="arpc",
        warmup=1,
        guide_every=2,
        steps=6,
        top_k=0,
        temperature=1.0,
    )
]
VARIANTS += [
    dict(sampler="speculative", block_size=2, temperature=5.0)
]  # accepts whole drafts


@NAN_CACHE
@EACH_AR_AND_CACHE
@EACH_NOISE
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_samplers_equal_direct_implementations(
    variant, noise, token_causal, ar
):
    """Token for token, beyond the context too; so the cache, the other rows of a batch, and what
    has left the context change nothing. In float64, so that no rounding decides a draw.
    """
    model = tiny(noise, ar=ar, token_causal=token_causal).double()
    options = dict(
        block_size=5, steps=4, threshold=0.3, temperature=0.7, top_k=4, seed=5
    )
    options |= variant
    if not token_causal and options["sampler"] in ("arpc", "speculative"):
        with pytest.raises(UserError, match="block-causal"):
            samples(model, 3, **options)
        return
    direct = [
        Direct(model, GIVEN[i].tolist(), i, **options).write() for i in range(3)
    ]
    tokens, stats = generate(model, 3, 45, given=GIVEN, **options)
    assert stats["tokens"] == (GIVEN < 0).sum()
    if options["sampler"] == "speculative":  # there rows wait for each other
        alone = partial(samples, model, 1, 45, **options)
        tokens = torch.cat(
            [alone(given=GIVEN[i : i + 1], first_row=i) for i in range(3)]
        )
    assert tokens.tolist() == direct
    if variant == dict(sampler="arpc"):
        # Blocks of 5, 5, 5, 5, 1 tokens; then, in contexts whose first ten tokens are kept, twice
        # 5, 5, 1; at last 2. A block takes 2 steps - 1 passes, a single token one.
        assert stats["nfe"] == 9 * 7 + 3


def plain_scores(a, d, x, revealed):
    """The criteria as formulas: a and d (30, V) are the probabilities on the AR and on the
    diffusion side."""
    divergence = torch.distributions.kl_divergence
    nll = -blockgen.at_index(a, x).log()
    first, second = d.sort(-1, descending=True).values.T[:2]
    ar, diffusion = (torch.distributions.Categorical(probs) for probs in (a, d))
    return dict(
        kld=torch.where(revealed, nll, divergence(ar, diffusion)),
        reverse_kld=divergence(diffusion, ar),
        tvd=(a - d).abs().sum(-1) / 2,
        ar_nll=nll,
        ar_gap=a.max(-1).values.log() + nll,
        ar_entropy=ar.entropy(),
        diffusion_entropy=diffusion.entropy(),
        diffusion_confidence=-first,
        diffusion_margin=second - first,
    )


@EACH_NOISE
def test_criteria_equal_their_formulas(noise):
    """Under masked noise some tokens were revealed before: there the diffusion side is a point
    mass."""
    torch.manual_seed(0)
    noise = NOISES[noise](6)
    ar, diffusion = torch.randn(2, 30, 6, dtype=DOUBLE)
    x, other = torch.randint(0, 6, (2, 30))
    revealed = (torch.rand(30) < 0.4) & (noise.token_share == 0)
    xt = torch.where(revealed, x, other if noise.mask is None else noise.mask)
    model = SimpleNamespace(noise=noise)
    run = SimpleNamespace(model=model, verify=lambda *_: ar[None])
    proposal = sample.Proposal(run, x[None], xt[None], diffusion[None], 0)
    d = torch.where(
        revealed[:, None], F.one_hot(x, 6).double(), diffusion.softmax(-1)
    )
    expected = plain_scores(ar.softmax(-1), d, x, revealed)
    assert {*expected, "random"} == set(CRITERIA)
    for name, scores in expected.items():
        assert close(CRITERIA[name](proposal)[0], scores, 1e-6)


def test_the_schedule_is_the_one_of_training():
    write = partial(samples, rows=8, sampler="ancestral", block_size=7, steps=4)
    assert not torch.equal(
        write(tiny(schedule="linear")), write(tiny(schedule="cosine"))
    )


def test_a_sampler_that_decides_nothing_is_an_error(monkeypatch):
    monkeypatch.setitem(FILL, "confidence", lambda run: None)
    with pytest.raises(RuntimeError, match="confidence"):
        samples(tiny(), 2, sampler="confidence")


@EACH_SAMPLER
def test_rows_stop_at_their_end_token(sampler):
    """The prompt's own end tokens do not count, nor do those before something given. Rows that
    have ended cost no passes."""
    model = tiny()
    end = 3
    model.head_bias.data[end] = 6.0  # likely
    given = torch.full((6, 21), -1)
    given[:, :4] = end
    given[0, 20] = 7
    options = dict(sampler=sampler, block_size=2, steps=2)
    tokens = samples(model, 6, given=given, stop=end, **options)
    assert tokens[0, 20] == 7
    for row in tokens[1:, 4:].tolist():
        assert set(row[row.index(end) :]) == {end}
    _, early = generate(model, 5, 21, given=given[1:], stop=end, **options)
    _, late = generate(model, 5, 21, given=given[1:], **options)
    assert early["nfe"] < late["nfe"]
    assert early["tokens"] < late["tokens"]


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
    content = dict(
        config=asdict(model.config), model=model.state_dict(), args={}
    )
    blockgen.save_checkpoint(path, meta=dict(tokenizer=tokenizer), **content)

    def logits(x):
        hidden = model.predictions(x[None], x[None], torch.tensor([1]))[1]
        return model.logits(hidden)[0, 1:]

    return logits


def write_transformer(folder, letters, seq_len, seed):
    """The same of a random GPT-2 for the package transformers."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {letter: i for i, letter in enumerate([*letters, END])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast
    fast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END
    ).save_pretrained(folder)
    shape = dict(
        n_positions=seq_len,
        n_embd=8,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
    )
    config = transformers.GPT2Config(vocab_size=len(vocab), **shape)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    return lambda x: model(x[None]).logits[0, :-1]


@pytest.fixture
def recorded(monkeypatch):
    """The rows that generate() writes for sample.py, whose tables have one line."""
    rows = []

    def recording(*args, **options):
        tokens, stats = generate(*args, **options)
        rows.extend(tokens.tolist())
        return tokens, stats

    monkeypatch.setattr(sample, "generate", recording)
    monkeypatch.setattr(sample, "GRID", [dict(sampler="ar")])
    return rows


@pytest.mark.parametrize("write", [None, write_checkpoint, write_transformer])
@torch.no_grad()
def test_perplexity_entropy_and_bits(write, recorded, tmp_path, capsys):
    """Of a table of texts, against a plain computation. A judge with another vocabulary and a
    shorter context reads the beginning alone; the first token is free of charge, and the end
    token counts where there is one."""
    ours, path = "abcdefé", tmp_path / "model.pt"
    logits = write_checkpoint(
        path, ours, end_bias=1.5
    )  # some texts end, not all
    flags = [f"--ckpt={path}", "--table", "--num_samples=9", "--batch_size=4"]
    theirs, longest = ours, 21
    if write:
        theirs, longest = "xéfedcba", 9
        logits = write(tmp_path / "judge", theirs, seq_len=longest, seed=1)
        flags.append(f"--judge={tmp_path}/judge")
    call(sample, *flags)
    figures = capsys.readouterr().out.split()[-4:]
    sums, entropies = [], []
    for row in recorded:
        row = row[: row.index(7) + 1] if 7 in row else row
        share = np.bincount(row) / len(row)
        entropies.append(-sum(p * math.log(p) for p in share if p))
        read = [theirs.find(ours[i]) if i < 7 else len(theirs) for i in row]
        x = torch.tensor(read[:longest])
        nats = F.cross_entropy(logits(x), x[1:], reduction="sum").item()
        text = "".join(theirs[i] for i in x[1:] if i < len(theirs))
        sums.append((nats, len(x) - 1, len(text.encode())))
    assert 0 < sum(7 in row for row in recorded) < 9
    nats, tokens, n_bytes = np.array(sums).T
    mean = nats.sum() / tokens.sum()
    error = np.linalg.norm(nats - mean * tokens) / tokens.sum()
    bits = nats.sum() / math.log(2) / n_bytes.sum()
    expected = [
        math.exp(mean),
        math.exp(mean) * error,
        np.mean(entropies),
        bits,
    ]
    assert [float(x) for x in figures] == pytest.approx(expected, abs=6e-3)


PUZZLES = [
    ("a+a", "#### 2"),
    ("b+a", "#### 3"),
    ("sort ba", "ab"),
    ("a" * 30, "#### 9"),
]


@pytest.fixture
def puzzles(tmp_path):
    """Flags for a dataset of problems, and for a model that was trained on something else."""
    lines = [
        json.dumps(dict(question=question, answer=answer))
        for question, answer in PUZZLES
    ]
    path = tmp_path / "puzzles.jsonl"
    path.write_text("\n".join(lines))
    files = dict(input=str(path), test=str(path))
    prepare("problems", tmp_path, tokenizer="char", seq_len=64, **files)
    write_checkpoint(tmp_path / "ckpt.pt", "#+ 2349abort s", seq_len=24)
    dataset = [f"--data_dir={tmp_path}", "--dataset=problems"]
    return [f"--ckpt={tmp_path}/ckpt.pt"], dataset


def test_problems_of_another_dataset(puzzles, monkeypatch, capsys):
    """The model's tokenizer encodes them; an answer begins behind the question and ends at the
    first end token; a question that does not fit is counted as wrong."""
    ckpt, dataset = puzzles
    encode, _ = load_tokenizer(
        blockgen.read_checkpoint(ckpt[0][7:])["meta"]["tokenizer"]
    )

    def always_says_two(model, n, length, *, given, stop, **options):
        tokens = given.clone()
        for row in tokens:
            free = row < 0
            text = encode("#### 2") + [stop] + encode("ab" * 12)
            row[free] = torch.tensor(text)[: free.sum()]
        return tokens, dict(nfe=7, tokens=1, seconds=1.0)

    monkeypatch.setattr(sample, "generate", always_says_two)
    monkeypatch.setattr(sample, "GRID", [dict(sampler="ar")])
    call(
        sample, *ckpt, *dataset, "--table", "--num_samples=4", "--batch_size=3"
    )
    out = capsys.readouterr().out
    assert "1 too long" in out
    quality, error = out.splitlines()[-1].split()[2:4]
    assert (quality, error) == ("0.250", "0.217")  # sqrt(3 / 16 / 4)
    for problem, verdict in ((0, "a+a\n#### 2= 2.0, right\n"), (1, "wrong")):
        call(sample, *ckpt, *dataset, f"--problem={problem}")
        assert verdict in capsys.readouterr().out


def test_texts_prompts_and_templates(tmp_path, capsys):
    write_checkpoint(tmp_path / "ckpt.pt", "abcdef _")

    def run(*flags):
        call(sample, f"--ckpt={tmp_path}/ckpt.pt", *flags)
        return capsys.readouterr().out

    out = run(
        "--num_samples=3",
        "--batch_size=2",
        "--length=50",
        "--seed=3",
        "--top_k=3",
    )
    *texts, last = out.split("\n" + "-" * 80 + "\n")
    assert len(texts) == 3 and last.startswith("nfe ")
    assert 21 < len(texts[0]) <= 50
    text = run(
        "--template=__[2 tokens]b[1 token]", "--sampler=confidence"
    ).split("\n")[0]
    assert text.startswith("__") and len(text) <= 6
    out = run("--prompt=ab", "--sampler=arpc", "--watch")
    assert "\nab" in out
    assert (
        re.search(r"\| ab.*[-]._?", out) and "\033" not in out
    )  # colors are for a terminal
    greedy = partial(run, "--sampler=ar", "--temperature=0")
    assert (
        greedy("--seed=1").split("\n")[0] == greedy("--seed=2").split("\n")[0]
    )


SAMPLE_REFUSES = [
    ("--block_size=0", "block_size"),
    ("--temperature=nan", "temperature"),
    ("--prompt=aaaaaaaaaaaaaaaaaaaaaaaaa", "25 tokens"),
    ("--template=a__b", "[2 tokens]"),
    ("--prompt=a --template=[1_token]", "exclude"),
    ("--problem=4", "dataset"),
    ("--problem=4 {dataset}", "0 to 3"),
    ("--problem=3 {dataset}", "length"),
    ("--plot=nowhere/x.png", "nowhere"),
]


@pytest.mark.parametrize("flags, word", SAMPLE_REFUSES)
def test_sample_refuses(puzzles, flags, word):
    ckpt, dataset = puzzles
    flags = flags.format(dataset=" ".join(dataset)).split()
    assert word in refusal(sample, *ckpt, *flags)


def test_a_picture_of_two_tables(recorded, puzzles, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    ckpt, _ = puzzles
    path = tmp_path / "x.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        call(
            sample,
            f"{ckpt[0]},{tmp_path}/ckpt.pt",
            f"--plot={path}",
            "--length=8",
        )
    words = re.findall(r"<text[^>]*>([^<]*)", path.read_text())
    assert words.count("network passes") == words.count("perplexity") == 2
    assert {"ar", "8"} <= set(words)
    assert f"{tmp_path.name}: masked noise" in words


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
    write_data(folder / "puzzles", rows[:320], rows[320:], row_length=24, bytes_per_token=2.0)
    return folder


def toy_flags(toy_data, out, *more):
    return " ".join([TOY, f"--data_dir={toy_data} --out_dir={out}", *more]).split()


@pytest.fixture
def toy(toy_data, tmp_path):
    """A function that makes args, config, data, val and meta of some flags."""

    def make(*more):
        args, config = train.read_flags(toy_flags(toy_data, tmp_path / "out", *more))
        return args, config, *train.load_data(args, config.seq_len)

    return make


same = partial(torch.testing.assert_close, rtol=0, atol=0)  # bit for bit, in dicts and lists


def test_batches_are_stratified_and_made_of_rows(toy):
    args, config, data, _, meta = toy("--block_sizes=1,5,24 --block_weights=1,2,1 --ar=paper")
    mixture = train.make_mixture(args, config.ar)
    for step in range(20):
        draw_rows = partial(train.draw_batch, data, meta, mixture, args, step)
        batch = draw_rows(torch.arange(8))
        parts = [draw_rows(rows) for rows in torch.arange(8).chunk(3)]
        same([*batch], [torch.cat(pieces) for pieces in zip(*parts)])
        assert sorted(batch.block_size.tolist()) == [1, 1, 5, 5, 5, 5, 24, 24]
        levels = batch.t[batch.block_size == 5]
        assert (levels[:, 5:10] == levels[:, 5:6]).all()  # constant in a block
        gaps = levels[:, ::5].flatten().sort().values.diff()
        assert close(gaps, torch.tensor((1 - args.t_min) / 20), 1e-6)  # one in each interval


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
    sizes, weights, ar_weight = train.make_mixture(args, "shift")
    assert sizes.tolist() == [5, 24]
    assert [*weights, ar_weight] == pytest.approx([2 / 3, 1 / 3, 1 / 4])


def test_rows_of_texts_and_of_problems(toy):
    """Of a text one at every position."""
    _, _, data, *_ = toy()
    assert np.array_equal(data[1000, 10:], data[1010, :-10])
    _, _, data, _, meta = toy("--dataset=puzzles")
    x0, given = train.read_rows(data, torch.tensor([7]), meta)
    assert given.sum() == x0[0].tolist().index(0) + 1


# ----------------------------------------------------------------------------------------------
# Optimizers


def test_learning_rate():
    args = train.Settings(learning_rate=2.0, warmup_iters=10, max_iters=1000)
    rates = [train.learning_rate(args, step) for step in (0, 500, 1000)]
    assert rates == pytest.approx([0.2, 1.0, 0.0])
    args.lr_decay = "constant"
    assert train.learning_rate(args, 500) == 2


def take_step(optimizer, matrices, size):
    for p in matrices:
        torch.manual_seed(p.numel())
        p.grad = size * torch.randn_like(p)
    optimizer.param_groups[0]["lr"] = 0.3
    optimizer.step()


def test_muon_is_torchs_in_float32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch's, exact
    shapes = (12, 4), (4, 12), (12, 4), (6, 6)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    others = copy.deepcopy(matrices)
    ours = train.Muon(matrices, train.Settings(weight_decay=0.2))
    theirs = torch.optim.Muon(others, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    for size in (1, 1e-6, 3):
        take_step(ours, matrices, size)
        take_step(theirs, others, size)
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
RESUMED = ["--dropout=0.1", "--noise=uniform --ar=paper", "--dataset=puzzles --optimizer=adamw"]


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


def test_flags_that_change_on_resuming_do_something(toy_data, tmp_path):
    run_toy(toy_data, tmp_path)
    _, rest = go_on(tmp_path, "--max_iters=5", "--beta2=0.5")["optimizers"]
    assert rest["param_groups"][0]["betas"] == (0.9, 0.5)


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


GRADIENTS = "--max_iters=3 --eval_interval=3 --grad_clip=0 --optimizer=adamw --warmup_iters=1"


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


@pytest.mark.parametrize("flags", ["--ar=paper", "--dataset=puzzles"])
def test_parts_change_nothing(toy_data, tmp_path, flags):
    run_toy(toy_data, tmp_path / "one", GRADIENTS, flags)
    run_toy(toy_data, tmp_path / "parts", GRADIENTS, flags, "--grad_accum=3")
    check_alike(tmp_path / "one", tmp_path / "parts")


TOGETHER = {  # runs of two processes
    "paper": f"{GRADIENTS} --noise=masked --ar=paper --lr_decay=constant",
    "shift": f"{GRADIENTS} --noise=uniform --ar=shift",
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
        processes.append(subprocess.Popen(command, cwd=HERE, env=os.environ | place, **pipes))
    return folder, [process.communicate(timeout=90) for process in processes], processes


@pytest.mark.parametrize("name", ["paper", "shift", "one row"])
def test_two_processes_do_what_one_does(toy_data, tmp_path, together, name):
    folder, [(out, error), (silent, _)], _ = together
    assert silent == "" and out.count(f"--ckpt={folder}/{name}/") == 1, error
    run_toy(toy_data, tmp_path / "one", TOGETHER[name])
    check_alike(tmp_path / "one", folder / name)


def test_one_process_goes_on_from_two(toy_data, tmp_path, together):
    shutil.copytree(together[0] / "paper", tmp_path / "two")
    go_on(tmp_path / "two", "--max_iters=5")
    run_toy(toy_data, tmp_path / "one", TOGETHER["paper"])
    go_on(tmp_path / "one", "--max_iters=5")
    check_alike(tmp_path / "one", tmp_path / "two")


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


def test_one_failing_save_is_told_and_the_last_is_an_error(toy_data, tmp_path, monkeypatch, capsys):
    def full(path, **content):
        raise OSError("disk full")

    monkeypatch.setattr(train, "save_checkpoint", full)
    with pytest.raises(OSError, match="disk full"):
        run_toy(toy_data, tmp_path, "--eval_interval=1")
    err = capsys.readouterr().err
    assert "step 3 is not saved, the run goes on: disk full" in err


def test_best_weights_are_those_of_the_best_validation(toy_data, tmp_path, monkeypatch):
    """It gets worse on purpose, by the weighted mean of the block sizes. --resume goes on from the
    last weights; and where it is measured otherwise, the best ones are found anew."""
    figures = iter([1.0, 3.0, 5.0, 1.0, 4.0, 4.0, 9.0])  # S = 1, S = 5, and so on
    averages = []

    def validation(model, *more):
        averages.append(copy.deepcopy(model.state_dict()))
        return torch.full((2,), next(figures)), None

    monkeypatch.setattr(train, "evaluate", validation)
    run_toy(toy_data, tmp_path, "--block_weights=0.25,0.75 --eval_interval=2")
    content = go_on(tmp_path, "--max_iters=6")
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
    assert f"saved step 300: python sample.py --ckpt={tmp_path}/ckpt.pt" in out
    assert err.count("it/s") < 8


# ----------------------------------------------------------------------------------------------
# Likelihood


@BOTH
@pytest.mark.parametrize("dataset", ["chain", "puzzles"])
@torch.no_grad()
def test_validation_at_block_size_1_is_the_exact_likelihood(toy, dataset, ar):
    """Of problems, that of the answer and one end token."""
    _, _, _, data, meta = toy(f"--dataset={dataset}")
    model = tiny(vocab_size=12, seq_len=24, ar=ar)
    exact, lengths = train.evaluate(model, data, meta, 1, 2)
    x0 = torch.from_numpy(data[[0, len(data) - 1]].astype(np.int64))
    logits = model.verify(x0, model.new_cache(2))
    nats = F.cross_entropy(logits.mT, x0, reduction="none")
    begin, end = 0, 24
    for i, row in enumerate(x0.tolist()):
        if dataset == "puzzles":
            begin = row.index(0) + 1
            end = row.index(0, begin) + 1
        assert lengths[i] == end - begin
        assert close(exact[i], nats[i, begin:end].mean(), 1e-4)


def test_validation_does_not_depend_on_the_batch_size(toy):
    _, _, _, data, meta = toy()
    model = tiny(vocab_size=12, seq_len=24)
    (a, _), (b, _) = (train.evaluate(model, data, meta, 5, 11, 3, size) for size in (1, 64))
    assert close(a, b, 1e-4)


class LevelsModel:
    """Its loss is the noise level."""

    device = "cpu"

    def __call__(self, batch):
        return batch.t


def test_evaluation_averages_all_noise_levels(toy):
    _, _, _, data, meta = toy()
    means = []
    for seed in range(300):
        nats, _ = train.evaluate(LevelsModel(), data, meta, 4, 3, 3, seed=seed)
        means.append(nats)
    means = torch.stack(means)
    assert means.mean() == pytest.approx(0.5, abs=0.01)
    assert means.std() < 0.2  # of three draws, each spread evenly over [0, 1]


def test_evaluation_reads_two_billion_rows_to_the_last():
    """A float32 would go past it."""
    data = np.broadcast_to(np.uint16(0), (2**31, 24))  # takes no memory
    nats, _ = train.evaluate(LevelsModel(), data, {}, 4, 100)
    assert nats.isfinite().all()


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
    _, *lines = capsys.readouterr().out.splitlines()
    rows = [re.search(r" *(.+): ([\d.]+) ", line).groups() for line in lines]
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


def test_mixture_bounds_count_the_tokens_that_are_scored(finished, capsys, monkeypatch):
    """Where one of two block sizes is far better, -log p(x) is its NELBO and log 2, once for a
    sequence."""
    nats = {1: 1.0, 5: 5.0}
    lengths = torch.tensor([7.0, 9.0, 24.0], dtype=DOUBLE)

    def evaluation(model, data, meta, block_size, *more):
        return torch.full_like(lengths, nats[block_size]), lengths

    monkeypatch.setattr(train, "evaluate", evaluation)
    rows = likelihood_table(capsys, f"--out_dir={finished}", "--eval_block_sizes=1")
    expected = 1 + (math.log(2) / lengths).mean()
    assert close(torch.tensor(rows["mixture: log-sum-exp"]), expected, 1e-4)


# ----------------------------------------------------------------------------------------------
# Flags and refusals of train.py

TRAIN_REFUSES = [
    ("--block_sizes=0,5", "block_sizes"),
    ("--block_sizes=5,5", "different"),
    ("--block_weights=0.5,-0.5", "block_weights"),
    ("--block_weights=1", "block_weights"),
    ("--max_iters=0", "max_iters"),
    ("--learning_rate=nan", "learning_rate"),
    ("--ema=1", "ema"),
    ("--noisy_gain=nan", "noisy_gain"),
    ("--out_dir=", "out_dir"),
    ("--loss=mse", "nelbo, ce"),
    ("--device=tpu", "device"),
    ("--dataset=nowhere", "prepare_data.py"),
    ("--dataset=puzzles --seq_len=12", "--seq_len=24"),
    ("--seq_len=7000", "too small"),
    ("--resume", "ckpt.pt is missing"),
    ("--init_from=nowhere.pt", "nowhere.pt is missing"),
    ("--eval_only", "ckpt.pt is missing"),
]


@pytest.mark.parametrize("flags, word", TRAIN_REFUSES)
def test_train_refuses(toy_data, tmp_path, flags, word):
    out = tmp_path / "out"
    assert word in refusal(train, *toy_flags(toy_data, out, flags)).replace("'", "")
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
        args, config = train.read_flags([])
        values = vars(args) | vars(config)
        assert values | train.PRESETS["gpu"] == values
        assert train.find_autocast(args, gpu)._enabled == (capability >= (8, 0))


def test_flags_beat_presets():
    args, config = train.read_flags(["--preset=paper", "--noise=uniform", "--beta2=0.9"])
    assert (args.loss, args.t_min, args.beta2) == ("nelbo", 1e-3, 0.9)  # as the authors' own
    assert config.n_layer == 12


# ----------------------------------------------------------------------------------------------
# Tokenizers


def slow_bpe(words, vocab_size):
    """Byte-pair encoding as it is told. A character of a word is a token."""
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        pairs = Counter(word[i : i + 2] for word in words for i in range(len(word) - 1))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [word.replace(best, chr(len(tokens))) for word in words]
        tokens.append(tokens[ord(best[0])] + tokens[ord(best[1])])
    return tokens


def test_bpe_merges_the_most_frequent_pair(monkeypatch):
    """... of the first SAMPLE characters."""
    rng = random.Random(0)
    words = [" " + "".join(rng.choices("abn", k=5)) for _ in range(300)]
    text = "".join(words)
    monkeypatch.setattr(prepare_data, "SAMPLE", len(text))
    texts = [text[:50], text[50:] + " zz" * 999, " yy" * 999]
    tokens = [token.hex() for token in slow_bpe(words, 300)]
    assert make_tokenizer("bpe:301", texts)["tokens"] == tokens


def test_bpe_says_any_text_and_learns_words():
    text = "the cat and the dog and the aaaa bird 12 ☃\n" * 50
    tokenizer = make_tokenizer("bpe:270", [text])
    encode, decode = load_tokenizer(tokenizer)
    for words in (text, "Ünseen \t wörds, 漢字 and \x00 bytes", "", "aaaaaaa"):
        assert decode(encode(words)) == words
    assert len(encode(" the")) == 1
    assert len(encode("12")) == 2  # digits stand alone
    assert tokenizer["end"] == 269 not in encode(END)  # a text cannot spell the end
    assert decode([269, 270]) == END  # 270 is a mask
    with pytest.raises(UserError, match="bpe:.*char") as error:
        make_tokenizer("bpe:9999", [text])
    make_tokenizer(re.search(r"bpe:\d+", str(error.value))[0], [text])  # as it says


def test_char_tokenizer_refuses_what_it_cannot_say():
    encode, decode = load_tokenizer(make_tokenizer("char", ["ab", "ca"]))
    assert decode(encode("cab")) == "cab"
    with pytest.raises(UserError, match="'d'"):
        encode("bad")
    assert decode([0, 3, 4, 1]) == f"a{END}b"  # 4 is a mask


def test_own_integers_have_no_text(tmp_path):
    """Somebody's own arrays, with the one key that is needed."""
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    shutil.copy(tmp_path / "train.bin", tmp_path / "val.bin")
    (tmp_path / "meta.json").write_text('{"vocab_size": 1000}')
    train, val, meta = open_data(tmp_path)
    assert train.tolist() == val.tolist() == list(range(1000))
    encode, decode = load_tokenizer(meta["tokenizer"])
    for function in (encode, decode, lambda _: open_problems(tmp_path)):
        with pytest.raises(UserError, match="integers|val.jsonl"):
            function([1])
    prepare_data.check_tokenizer(meta, meta)
    with pytest.raises(UserError, match="another tokenizer"):
        prepare_data.check_tokenizer(meta, {"tokenizer": {}})
    for damaged in ('{"vocab_size": 999}', "{", "{}"):
        (tmp_path / "meta.json").write_text(damaged)
        with pytest.raises(UserError, match="damaged.*prepare_data.py"):
            open_data(tmp_path)


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs GPT-2's vocabulary")
def test_gpt2_vocabulary():
    encode, decode = load_tokenizer(make_tokenizer("gpt2", []))
    assert encode("Hello world") == [15496, 995]
    assert decode([50257, 15496, 50257, 995]) == "Hello world"  # [PAD] is dropped


def write_tokenizer_json(path, lowercase=False):
    """A byte-level tokenizer.json with 70,000 tokens, the last of which ends a text."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = letters + [f"filler{i}" for i in range(69_999 - len(letters))]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if lowercase:
        tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.add_special_tokens([END])
    tokenizer.enable_truncation(3)
    tokenizer.save(str(path))


def test_tokenizer_json(tmp_path):
    """Any tokenizer of the package tokenizers; ids above 65,535 are written as uint32."""
    path = tmp_path / "tokenizer.json"
    write_tokenizer_json(path)
    row = json.dumps({"question": f"Is {END} it?", "answer": "Yes ☃"})
    (tmp_path / "rows").write_text(row)
    files = dict(input=f"{tmp_path}/rows", test=f"{tmp_path}/rows", tokenizer=str(path))
    prepare("problems", tmp_path, **files, seq_len=40)
    train, val, meta = open_data(tmp_path / "problems")
    assert train.dtype == np.uint32 and val.tolist() == train.tolist()
    encode, decode = load_tokenizer(meta["tokenizer"])
    row = [*encode(f"Is {END} it?"), 69_999, *encode("Yes ☃")]
    assert train.tolist() == row + [69_999] * (40 - len(row))
    assert decode([*encode("Yes ☃"), 69_999, 70_000]) == f"Yes ☃{END}"
    write_tokenizer_json(path, lowercase=True)
    with pytest.raises(UserError, match="yes ☃"):  # the judge would call every answer wrong
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


def test_text_file_round_trip(tmp_path, monkeypatch):
    """A text in pieces; a byte-order mark is no part of it."""
    monkeypatch.setattr(prepare_data, "PIECE", 700)
    text = "hello wörld\n" * 100
    (tmp_path / "in.txt").write_text(text, encoding="utf-8-sig")
    meta = prepare("text", tmp_path, input=f"{tmp_path}/in.txt", tokenizer="char", name="book")
    train, val, read = open_data(tmp_path / "book")
    assert read == meta
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    first, second = texts_of(tmp_path / "book")
    assert first[0] + second[0] + first[1] + second[1] == text
    assert [len(part) for part in first] == [630, 450]
    assert meta["bytes_per_token"] == len("".join(second).encode()) / len(val)
    assert meta["unigram_nats"] == entropy_of(val.tolist())


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
    prepare("pydocs", tmp_path / "data", tokenizer="bpe:300")
    train, val = texts_of(tmp_path / "data" / "pydocs")
    assert sum("more than forty letters" in text for text in train + val) == 40
    assert "Nobody" not in "".join(train + val)
    assert set(train).isdisjoint(val) and 0 < len(val) < len(train) / 5


class Hub:
    """A stand-in for the package datasets, whose connection is lost after some rows."""

    def __init__(self, rows, error=None):
        self.rows, self.error = rows, error

    def load_dataset(self, name, config, split, streaming):
        yield from self.rows
        if self.error:
            raise self.error


def test_documents_are_streamed(tmp_path, monkeypatch):
    """... and at most --documents of them; those without a text are left out."""
    texts = [f"document {i} " * 5 for i in range(100, 400)]
    rows = [{"text": text, "id": 0} for text in [None, "", *texts]]
    monkeypatch.setitem(sys.modules, "datasets", Hub(rows))
    prepare("fineweb", tmp_path, tokenizer="bpe:262")
    assert sorted(sum(texts_of(tmp_path / "fineweb"), [])) == texts
    prepare("openwebtext", tmp_path, tokenizer="char", documents=20)
    assert len(sum(texts_of(tmp_path / "openwebtext"), [])) == 20


@pytest.mark.parametrize("error", [RuntimeError("lost"), KeyboardInterrupt("lost")])
def test_what_came_of_a_lost_stream_is_a_dataset(tmp_path, monkeypatch, error):
    rows = [{"question": f"{i}?", "code": f"return {i}"} for i in range(100)]
    monkeypatch.setitem(sys.modules, "datasets", Hub(rows, error))
    again = partial(prepare, "tinygsm", tmp_path, tokenizer="bpe:260", seq_len=20)
    expected = (UserError, KeyboardInterrupt)
    with pytest.raises(expected):
        again()  # lost while tokens are learned
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(prepare_data, "SAMPLE", 100)
    with pytest.raises(expected, match="lost"):
        again()
    train, val, _ = open_data(tmp_path / "tinygsm")
    assert len(train) + len(val) == 100 * 20
    assert os.listdir(tmp_path) == ["tinygsm"]
    with pytest.raises(UserError, match="--name"):  # days of work are not replaced
        again()


def test_nothing_is_lost_by_replacing(tmp_path, monkeypatch):
    """A dataset is replaced by one of the same file, as a whole or not at all, through a link."""
    path = tmp_path / "in.txt"
    again = partial(prepare, "text", tmp_path, input=str(path), tokenizer="char")
    (tmp_path / "disk").mkdir()
    (tmp_path / "text").symlink_to(tmp_path / "disk")
    path.write_text("abc" * 100)
    assert again()["val_tokens"] == 31
    path.write_text("abc" * 200)
    with monkeypatch.context() as patch:
        patch.setattr("json.dump", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            again()
    assert len(open_data(tmp_path / "text")[1]) == 31
    again()
    assert len(open_data(tmp_path / "disk")[1]) == 61
    assert set(os.listdir(tmp_path)) == {"text", "disk", "in.txt"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "book.txt").write_text("precious")
    for name in ("text", "mine"):
        before = os.listdir(tmp_path / name)
        with pytest.raises(UserError, match="--name"):
            prepare("math", tmp_path, name=name)
        assert os.listdir(tmp_path / name) == before


# ----------------------------------------------------------------------------------------------
# Problems


def wording_of(question):
    """A question without its numbers, names and things."""
    variable = "|".join(prepare_data.NAMES + prepare_data.THINGS)
    return re.sub(rf"\d+|\b({variable})\b", "_", question)


@pytest.mark.parametrize("difficulty", [2, 8])
def test_math_problems_are_right_and_disjoint(difficulty):
    sides = {"train": [], "val": []}
    for part, (question, program) in math_problems(difficulty, 200, seed=1):
        sides[part].append(question)
        variables = {}
        for line in program.splitlines()[1:-1]:
            exec(line.strip(), {}, variables)  # ours, so Python may
            assert all(x > 0 and x == int(x) for x in variables.values())
        assert variables["result"] == solve(program)
    assert (len(sides["train"]), len(sides["val"])) == (200, 10)
    wordings, numbers = [], []
    for questions in sides.values():
        wordings.append({wording_of(question) for question in questions})
        numbers.append({tuple(re.findall(r"\d+", question)[:2]) for question in questions})
    assert wordings[0].isdisjoint(wordings[1])
    assert numbers[0].isdisjoint(numbers[1])


def test_rows_of_problems(tmp_path):
    """Question, end, program, ends; as tokens of the texts by themselves. Those that are too long
    are counted for each part, and stay problems for the judge."""
    meta = prepare("math", tmp_path, problems=400, seq_len=100, difficulty=3)
    train, val, _ = open_data(tmp_path / "math")
    end = meta["tokenizer"]["end"]
    encode = load_tokenizer(meta["tokenizer"])[0]
    written, dropped = {"train": [], "val": []}, Counter()
    problems, scored = [], []
    for part, (question, program) in math_problems(3, 400, 0):
        answer = encode(program) + [end]
        row = encode(question) + [end] + answer
        if part == "val":
            problems.append((question, program))
        if len(row) > 100:
            dropped[part] += 1
            continue
        written[part] += row + [end] * (100 - len(row))
        if part == "val":
            scored += answer
    assert 0 < meta["train_dropped"] == dropped["train"] < 400
    assert 0 < meta["val_dropped"] == dropped["val"] < 20
    assert train.tolist() == written["train"]
    assert val.tolist() == written["val"]
    assert open_problems(tmp_path / "math") == problems
    assert val[is_answer(val.reshape(-1, 100), end).ravel()].tolist() == scored
    assert meta["bytes_per_token"] == meta["val_bytes"] / len(scored)
    assert meta["unigram_nats"] == entropy_of(scored)


def test_a_problem_as_published_weights_know_it():
    tokenizer = {"start": 8, "end": 9, "separator": "-"}
    ids = prepare_data.encode_problem(tokenizer, lambda text: [*text.encode()], "AB", "C")
    assert ids == ([8, 65, 66, 45], [67, 9])


@pytest.mark.parametrize("library", [np.array, torch.tensor])
def test_is_question_and_is_answer(library):
    letters = "ab.c.. .a.... ...... abcdef".split()
    rows = library([[ord(letter) for letter in row] for row in letters])
    for function, expected in (
        (is_question, "###... #..... #..... ######"),
        (is_answer, "...##. .##... .#.... ......"),
    ):
        found = function(rows, ord(".")).tolist()
        shown = ["".join(".#"[x] for x in row) for row in found]
        assert shown == expected.split()


# ----------------------------------------------------------------------------------------------
# Answers

PROGRAMS = {
    "return 7": 7,
    "def simple_math_problem():\n    '''How many?'''\n    a = 2\n    return a + 1\n": 3,
    "def simple_math_problem() -> int:\n    import math\n    return math.ceil(3.1)": 4,
    "return 7 // 2 + 7 % 4 - 2 ** 3 + 1 / 4": -1.75,
    "x = 5\nx += 2\nx *= 3\nx -= 1\nx /= 4\nreturn -(-x)": 5,
    "return max(1, 5, 3) - min(2, 4) + abs(-3)": 6,
    "return round(2.567, 1) + round(3.4) + int(9.7) + float(1) + math.floor(3.9)": 18.6,
    "def simple_math_problem():\n    return 5\nprint(6)": 5,
    "x = 3\nif x < 2:\n    x = 10\nelif x >= 3:\n    return 30\nreturn x": 30,
    "x = 3\nif x != 3:\n    x = 10\nelse:\n    x = 20\nreturn x": 20,
    "return 1 / 0 if 2 <= 1 else 0.5": 0.5,
    "x: int = 0\nfor i in range(2, 9, 3):\n    x += i\nreturn x": 15,
    "for i in range(9):\n  for j in range(9):\n    if i * j == 42:\n      return i + j": 13,
    "x = []\nfor i in [3, 1, 2]:\n    x.append(2 * i)\nreturn sum(x) + 10 * len(x) + x[-1]": 46,
    "s = 0\nfor day in range(365):\n    if day % 7 == 0:\n        s += day\nreturn s": 9646,
    "return sum(range(1001))": 500_500,
}


def test_programs():
    for program, value in PROGRAMS.items():
        assert solve(program) == value, program


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
    "return " + "-" * 1500 + "1",
    "return " + "abs(" * 600,
    "return (1)(2) is '\\d'",
    "\x00",
    "\ud800",
    "return 5 #" + "#" * 3000,
]


@pytest.mark.parametrize("program", NO_ANSWERS, ids=range(len(NO_ANSWERS)))
@pytest.mark.filterwarnings("error")
def test_no_answer(program, monkeypatch, capfd):
    """Hostile and broken programs: None, in few steps and little memory, without a word."""
    evaluate = Mock(wraps=prepare_data.evaluate)
    monkeypatch.setattr(prepare_data, "evaluate", evaluate)
    tracemalloc.start()
    assert solve(program) is None
    assert tracemalloc.get_traced_memory()[1] < 2e7 and evaluate.call_count <= 5001
    tracemalloc.stop()
    assert capfd.readouterr() == ("", "")


NUMBERS = {"18": 18, " 1,234": 1234, "$5": 5, "-3": -3, "2.50": 2.5, "$1,000,000.25": 1000000.25}
NUMBERS |= {"-$18": -18, "$-18": -18, "+5": 5, "$ 18": 18, "**18**": 18, "**$18.**": 18, ".5": 0.5}
NUMBERS |= {"18.": 18, "18%": 18, "€3": 3, "18\nMore words.": 18, "18\r\n": 18}
NUMBERS |= dict.fromkeys(["3/4", "12,34", "1,5", "18 or 19", "18 x", "1e5", "1 000", "--5", "5-"])
NUMBERS |= dict.fromkeys(["-$-5", "", "none", "18 #### 18", "١", "9" * 999, "*" * 99, " " * 9999])


def test_numbers_of_answers():
    """A number is all that stands there, or there is none."""
    for line, number in NUMBERS.items():
        assert solve(f"Some words 7.\n####{line}") == number, line


def test_is_right():
    reference = "def simple_math_problem():\n    return 6 / 4"
    assert is_right("#### 1.5", reference)
    assert is_right("return 1.5000000001", reference)
    assert not is_right("return 1.50001", reference)
    assert is_right("return 0.1 + 0.2 - 0.3", "return 0")
    assert is_right(" C B A\n", "C B A")  # no number: the same text
    assert not is_right("C B", "C B A")


# ----------------------------------------------------------------------------------------------
# Flags, and what users type


@dataclass
class Flags:
    word: Literal["a", "bc"] = "a"  # the first or the second
    size: int = 3 # 100% of it
    sizes: tuple = (1, 16)  # numbers
    rates: tuple = ()  # numbers, if any
    on: bool = True  # yes
    off: bool = False  # no
    secret: int = 7  # is no flag


def read_flags(*argv, **more):
    return parse_flags("What it does.", Flags, argv=argv, skip=("secret",), **more)


def test_flags_have_the_types_of_their_defaults(capsys):
    values = read_flags("--sizes=2,3", "--rates=1,0.5", "--on=False", "--off", defaults={"size": 5})
    assert values == dict(word="a", size=5, sizes=(2, 3), rates=(1.0, 0.5), on=False, off=True)
    assert prepare_data.from_values(Flags, values | {"more": 0}) == Flags(**values)
    with pytest.raises(SystemExit):
        read_flags("--help", defaults=dict(size=5))
    words = " ".join(capsys.readouterr().out.split())
    for part in ("What it does.", "{a,bc}", "100% of it (default: 5)", "(1, 16)"):
        assert part in words
    assert "secret" not in words
    for flag in "--nonsense=1 --size=x --siz=4 --sizes=1,x --on=no --word=c --secret=1 x".split():
        with pytest.raises(UserError, match=flag.partition("=")[0]):
            read_flags(flag)


@pytest.mark.parametrize(
    "flags, word",
    [
        ("text", "--input"),
        ("text --input=nowhere", "nowhere"),
        ("text --input=DIR/utf16", "utf16 is not UTF-8"),
        ("text --input=DIR/empty --tokenizer=char", "too short"),
        ("text --input=DIR/small --tokenizer=bpe:200", "bpe:SIZE"),
        ("text --input=DIR/small --tokenizer=nowhere.json", "nowhere.json"),
        ("math --difficulty=9", "difficulty"),
        ("fineweb --documents=-1", "documents"),
        ("math --problems=400 --seq_len=10", "seq_len"),
        ("problems --input=DIR/good", "--test"),
        ("problems --input=DIR/good --test=DIR/null --tokenizer=char", "null, line 2"),
        ("fineweb", "datasets"),
        ("shakespeare", "no network"),
    ],
)
def test_prepare_data_refuses(tmp_path, capsys, monkeypatch, flags, word):
    """In one line, and nothing is left behind."""
    row = json.dumps({"question": "How many?", "answer": "#### 5"})
    (tmp_path / "utf16").write_text("a book", encoding="utf-16")
    (tmp_path / "empty").write_text("")
    (tmp_path / "small").write_text("abcdefgh" * 4)
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


def test_shakespeare_is_downloaded(tmp_path, monkeypatch, capsys):
    reply = io.BytesIO(b"To be, or not to be" * 50)
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **more: reply)
    call(prepare_data, "shakespeare", f"--data_dir={tmp_path}", "--tokenizer=char")
    out = capsys.readouterr().out
    assert f"{tmp_path}/shakespeare" in out and "train_tokens: 856" in out  # one ends the text


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
    print("1 ± 2")
    raise KeyboardInterrupt
prepare_data.run_script(main)
"""


def test_a_script_in_a_terminal_that_knows_ascii():
    """It prints what it can. OpenMP's threads do not spin for ever: that is set before torch is
    loaded."""
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    env.pop("GOMP_SPINCOUNT", None)
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env)
    assert (run.returncode, run.stdout) == (130, "5000\n1 ? 2\n"), run.stderr


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("take\nanother"), "take another"),
        (FileNotFoundError(2, "No such file", "x.txt"), "'x.txt'"),
        (ModuleNotFoundError("none", name="datasets"), "pip install datasets"),
        (ModuleNotFoundError("none", name="prepare_dta"), None),
        (ValueError("too many values to unpack"), None),
    ],
    ids=str,
)
def test_what_users_can_mend_is_one_line_and_a_bug_a_traceback(capsys, error, line):
    def main():
        raise error

    expected = type(error) if line is None else SystemExit
    with pytest.raises(expected) as raised:
        prepare_data.run_script(main)
    if line:
        assert raised.value.code == 2
        assert line in capsys.readouterr().err
