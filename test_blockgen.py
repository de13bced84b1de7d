"""Proof by test: every claim of the README that mathematics can settle, on cases small enough to
enumerate; and that the scripts do what their users expect.

    python -m pytest -q test_blockgen.py
"""
import copy
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on CPU tensors

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import blockgen
import kernels
import prepare_data
import sample
import train
from blockgen import (
    NOISES,
    SCHEDULES,
    BlockGen,
    Config,
    draw,
    load_checkpoint,
    pick,
    random_numbers,
    read_checkpoint,
    save_checkpoint,
)
from prepare_data import (
    END,
    check_settings,
    from_values,
    is_question,
    is_right,
    load_tokenizer,
    make_tokenizer,
    math_problems,
    open_data,
    parse_flags,
    part_of,
    prepare,
    solve,
)
from sample import AR_CRITERIA, CRITERIA, FILL, generate
from train import draw_noise

torch.set_num_threads(1)  # faster for models of this size
HERE = os.path.dirname(os.path.abspath(__file__))

DOUBLE = torch.float64
SAMPLERS = ["ar", *FILL]

BOTH = pytest.mark.parametrize("ar", ["paper", "shift"])
EACH_NOISE = pytest.mark.parametrize("noise", NOISES)
EACH_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)
EACH_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS)
EACH_AR_AND_CACHE = pytest.mark.parametrize(
    "token_causal, ar",
    [
        (True, "paper"),
        (False, "paper"),
        (True, "shift"),
    ],
)
NAN_CACHE = pytest.mark.usefixtures("nan_cache")


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
    config = Config(**{**settings, **more})
    model = BlockGen(config).eval()
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


# ----------------------------------------------------------------------------------------------
# Random numbers


def test_random_numbers_depend_on_key_and_row_alone():
    u = random_numbers((3, 0), torch.arange(5), 1000)
    assert u.shape == (5, 1000)
    assert u.dtype == DOUBLE
    assert 0 <= u.min() and u.max() < 1
    for rows in ([2, 0], [1, 1, 4]):
        assert torch.equal(u[rows], random_numbers((3, 0), rows, 1000))
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


def test_noise_levels_are_stratified_and_constant_in_a_block():
    """All blocks of the rows of one size: one level in each of B equal intervals."""
    key, rows = (5, 0), torch.arange(6)
    sizes = torch.tensor([4, 4, 4, 4, 21, 1])
    stratum = torch.tensor([0, 0.25, 0.5, 0.75, 0, 0])
    t, u = draw_noise(key, rows, stratum, sizes, 21, t_min=0)
    for x in (t, u):
        assert x.shape == (6, 21)
        assert x.dtype == DOUBLE
    for begin in range(0, 21, 4):
        block = t[:4, begin : begin + 4]
        assert (block == block[:, :1]).all()
    for levels in (t[:4, ::4], t[4, :1], t[5]):  # a level for each block
        gaps = levels.flatten().sort().values.diff()
        assert close(gaps * levels.numel(), torch.ones(()), 1e-7)
    assert (t[4] == t[4, 0]).all()

    scaled, _ = draw_noise(key, rows, stratum, sizes, 21, t_min=0.25)
    assert close(scaled, 0.25 + 0.75 * t, 1e-12)
    some = torch.tensor([3, 1])  # a row is the same whichever rows stand beside it
    noise = draw_noise(key, some, stratum[some], sizes[some], 21, t_min=0)
    assert torch.equal(noise[0], t[some])
    assert torch.equal(noise[1], u[some])


def test_each_noise_level_is_uniform_and_rows_begin_anywhere():
    sizes = torch.tensor([4, 4])
    rows = torch.tensor([6, 7])
    stratum = torch.tensor([0.0, 0.5])
    keys = [(5, k) for k in range(2000)]
    draws = [draw_noise(key, rows, stratum, sizes, 21, t_min=0) for key in keys]
    t, u = (torch.stack(x) for x in zip(*draws))  # (keys, 2, 21)
    for row, position in itertools.product((0, 1), (0, 8, 20)):
        assert is_uniform(t[:, row, position], 20)
        assert is_uniform(u[:, row, position], 20)
    # Two rows begin one to six sixths of the circle apart (and a half, by stratum).
    apart = 6 * (t[:, 1, 0] - t[:, 0, 0]) - 0.5
    assert is_uniform((apart.round() % 6 + 0.5) / 6, 6)


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


def likelihood(noise, x0, xt, alpha):
    """q(xt | x0) of one token each, broadcasting."""
    survives = alpha * (xt == x0).double()
    if noise.mask is None:
        return survives + (1 - alpha) / noise.vocab_size
    return survives + (1 - alpha) * (xt == noise.mask).double()


def pure_noise_law(noise, xt):
    """The probability of tokens xt if nothing survives."""
    return likelihood(noise, -1, xt, 0.0)


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
    for xt (M, n), alpha a number or (M, n). Or, wrongly for uniform noise, with position i."""
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
        config = Config(
            vocab_size=V,
            seq_len=n,
            n_head=1,
            n_embd=2,
            noise=noise,
            schedule=schedule,
            ar="paper",
        )
        super().__init__(config)
        self.p, self.dtype = p, dtype
        self.leave_one_out = leave_one_out

    def token_losses(self, x0, block_size, t, u, given):
        alpha, _ = SCHEDULES[self.config.schedule](t)
        self.alpha = torch.where(given, 1.0, alpha)  # a given token is sure to be clean
        return super().token_losses(x0, block_size, t, u, given)

    def both_sides(self, x0, xt, block_size):
        probs = exact_denoiser(
            self.noise,
            self.p,
            xt,
            self.alpha,
            x0,
            int(block_size[0]),
            self.leave_one_out,
        )
        logits = probs.log().to(self.dtype)
        return logits, logits

    def logits(self, states, weight):
        return states


def corruptions(noise, alpha):
    """Everything that can happen to n tokens: uniform numbers that bring it about, (C, n), and its
    probability (C,)."""
    survival = alpha[None]
    n_random = V if noise.mask is None else 1  # what a token may turn into
    middle = (torch.arange(n_random) + 0.5) / n_random
    u = torch.cat([survival / 2, alpha + (1 - alpha) * middle])
    death = (1 - alpha).expand(n_random)
    chance = torch.cat([survival, death / n_random])
    outcomes = every_sequence(len(u))
    return u[outcomes], chance[outcomes].prod(-1)


NOTHING = (False,) * n  # is given


@torch.no_grad()
def expected_nelbo(model, x0, block_size=n, given=NOTHING, t_min=1e-9, points=40):
    """The mean of token_losses, nats (M, n) for x0 (M, n): over the noise by enumeration, over t in
    [t_min, 1] by Gauss-Legendre in log t."""
    schedule = SCHEDULES[model.config.schedule]
    nodes, weights = np.polynomial.legendre.leggauss(points)
    mean = torch.zeros(x0.shape, dtype=DOUBLE)
    for node, weight in zip(nodes, weights):
        t = torch.tensor(t_min ** ((node + 1) / 2), dtype=DOUBLE)
        u, chance = corruptions(model.noise, schedule(t)[0])
        rows = x0.repeat_interleave(len(u), 0)  # (M C, n)
        sizes = torch.full((len(rows),), block_size)
        losses = model.token_losses(
            rows,
            sizes,
            t.expand(rows.shape),
            u.repeat(len(x0), 1),
            torch.tensor(given).expand(rows.shape),
        )
        losses = losses.unflatten(0, (len(x0), -1))  # (M, C, n)
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

    # The test has teeth: with uniform noise, p(x0 | xt) is far off; and so is a wrong derivative.
    entropy = -(p * p.log()).sum()
    if noise == "uniform":
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


@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("pattern", ["free", "g__", "gg_", "_g_", "g_g"])
@EACH_NOISE
def test_nelbo_of_an_answer_is_its_likelihood_given_the_question(noise, pattern, block_size):
    """-log p(free | given) for every sequence; given tokens cost nothing."""
    given = tuple(c == "g" for c in pattern[:n])
    p = random_distribution(1)
    model = ExactLoss(noise, p)
    nelbo = expected_nelbo(model, STATES, block_size, given, points=24)
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
        """Nats a token."""
        nelbo = expected_nelbo(model, STATES, t_min=t_min)
        return p @ (-p.log() - nelbo.sum(1)) / n

    assert abs(missing(1e-6)) < 1e-4
    if noise == "uniform":
        assert missing(1e-3) > 1e-3


def literal_uniform_nelbo(logits, x0, xt, alpha):
    """As the formula is written, for alpha' = -1, in float64."""
    V = logits.shape[-1]
    p = logits.double().softmax(-1)
    onehot = F.one_hot(x0, V).double()
    xbar = V * alpha * onehot + 1 - alpha
    pbar = V * alpha * p + 1 - alpha
    i = xt[:, None]
    xbar_i, pbar_i = xbar.gather(1, i), pbar.gather(1, i)
    log_ratio = (pbar_i * xbar / (pbar * xbar_i)).log()
    divergence = (xbar / xbar_i * log_ratio).sum(1, keepdim=True)
    bracket = divergence - V / xbar_i + V / pbar_i
    return bracket[:, 0] / (V * alpha)


@pytest.mark.parametrize("alpha", [1e-5, 1e-3, 0.3, 0.99, 1 - 1e-6])
def test_uniform_nelbo_equals_its_formula(alpha):
    """In float64 everywhere; in float32 down to tiny alpha, where as written it is off by 0.1."""
    torch.manual_seed(0)
    noise = NOISES["uniform"](1000)
    logits = torch.randn(50, 1000)
    x0 = torch.arange(50)
    xt = torch.arange(25, 75) % 60
    literal = literal_uniform_nelbo(logits, x0, xt, alpha)
    largest = float(literal.max())

    def ours(dtype):
        alphas = torch.full((50,), alpha, dtype=dtype)
        return noise.nelbo(logits, x0, xt, alphas, torch.tensor(-1.0))

    assert ours(DOUBLE).dtype == DOUBLE
    assert close(ours(DOUBLE), literal, 1e-8 * largest + 1e-7)
    if alpha <= 0.99:  # training sees little more
        single = ours(torch.float32)
        assert single.dtype == torch.float32
        assert close(single, literal, 1e-4 * largest + 2e-3)
        assert (single > -2e-3).all()


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
@pytest.mark.parametrize(
    "alpha_t, alpha_s",
    [
        (0.0, 0.4),
        (0.3, 0.31),
        (0.3, 0.8),
        (0.6, 1.0),
        (0.0, 1.0),
    ],
)
def test_posterior_is_bayes_rule(noise, alpha_t, alpha_s):
    """p(xs | xt) = sum_x0 p(x0) q(xs | x0) q(xt | xs) / normalizer, one token."""
    noise = NOISES[noise](V)
    states = torch.arange(noise.n_embeddings)
    probs = torch.tensor([0.7, 0.2, 0.1], dtype=DOUBLE)
    x0, xs, xt = torch.meshgrid(torch.arange(V), states, states, indexing="ij")
    to_xs = likelihood(noise, x0, xs, alpha_s)
    to_xt = likelihood(noise, xs, xt, alpha_t / alpha_s)
    if noise.mask is not None:  # a mask stays a mask going forward
        stays = (xt == noise.mask).double()
        to_xt = torch.where(xs == noise.mask, stays, to_xt)
    joint = probs[:, None, None] * to_xs * to_xt
    bayes = joint.sum(0).T  # (xt, xs)
    seen = bayes.sum(1) > 0
    bayes = bayes / bayes.sum(1, keepdim=True)
    rows = probs.expand(len(states), V)
    posterior = noise.posterior(rows, states, alpha_s, alpha_t)
    assert close(posterior[seen], bayes[seen], 1e-12)

    # step with u on a grid hits every outcome in proportion, to the width of the grid
    m = 20_000
    u = (torch.arange(m, dtype=DOUBLE) + 0.5) / m
    rows = probs.expand(m, V)
    for state in states[seen]:
        drawn = noise.step(rows, state.expand(m), alpha_s, alpha_t, u)
        counts = torch.bincount(drawn, minlength=len(states))
        assert close(counts / m, posterior[state], 5 / m)


@EACH_NOISE
def test_step_corrupt_and_prior_draw_from_their_laws(noise):
    """Chi-square, with random numbers of their own."""
    torch.manual_seed(0)
    noise, m = NOISES[noise](5), 100_000
    probs = torch.randn(5, dtype=DOUBLE).softmax(0)
    state = torch.tensor(2 if noise.mask is None else noise.mask)
    token = torch.tensor(3)
    states = torch.arange(noise.n_embeddings)

    def has_law(drawn, law):
        counts = torch.bincount(drawn, minlength=len(states))
        return fits(counts, law)

    drawn = noise.step(probs.expand(m, 5), state.expand(m), 0.7, 0.2)
    law = noise.posterior(probs[None], state[None], 0.7, 0.2)
    assert has_law(drawn, law[0])
    corrupted = noise.corrupt(token.expand(m), 0.4)
    assert has_law(corrupted, likelihood(noise, token, states, 0.4))
    assert has_law(noise.prior((m,)), pure_noise_law(noise, states))


def ancestral_law(noise, denoiser, steps):
    """The exact law of ancestral sampling over STATES, by pushing the whole distribution through
    the steps. denoiser(xt (M, n), alpha) -> (M, n, V)."""
    K = noise.n_embeddings
    xt = every_sequence(K)  # (K^n, n)
    law = pure_noise_law(noise, xt).prod(1)
    for k in range(steps):
        alpha_t, alpha_s = k / steps, (k + 1) / steps
        probs = denoiser(xt, alpha_t)
        each = noise.posterior(probs, xt, alpha_s, alpha_t)  # (K^n, n, K)
        a, b, c = each.unbind(1)
        law = torch.einsum("m,ma,mb,mc->abc", law, a, b, c).flatten()
    law = law.view(K, K, K)
    return law[:V, :V, :V].flatten()


def product_of_marginals(p):
    """The law over STATES of tokens that are drawn without a look at each other."""
    law = torch.ones(len(STATES), dtype=DOUBLE)
    for i in range(n):
        law = law * log_marginal(p, [i]).exp()
    return law


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
    assert close(one, product_of_marginals(p), 1e-12)


# ----------------------------------------------------------------------------------------------
# The model


def random_text(model, rows, alpha=0.5):
    """Clean tokens (rows, 21) and noisy ones."""
    x0 = torch.randint(0, 11, (rows, 21))
    return x0, model.noise.corrupt(x0, alpha)


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
        expected = model(x0, xt, S)
        commit = None
        for begin in range(0, 21, S):
            block = slice(begin, begin + S)
            logits = model.denoise(xt[:, block], cache, commit)
            assert close(logits, expected[:, block], 1e-5)
            commit = x0[:, block]

    cache = model.new_cache(3)
    expected = model(x0, xt, 1)
    single = xt[:, :1]
    model.denoise(single, cache, x0[:, :4], block_size=1)
    for begin, end in ((4, 9), (9, 10), (10, 21)):
        block = slice(begin, end)
        logits = model.verify(x0[:, block], cache, xt[:, block])
        assert close(logits, expected[:, block], 1e-5)
        if ar == "shift":  # needs the state of the last token, which committing yields
            model.denoise(single, cache, x0[:, block])
        else:
            cache.length += end - begin  # accept all of them: their keys are in the cache


@NAN_CACHE
@BOTH
@torch.no_grad()
def test_one_cache_serves_mixed_block_sizes(ar):
    """Each block against the training pass where its size divides its begin, else against a cache
    of its own."""
    model = tiny(ar=ar)
    x0, xt = random_text(model, 2, alpha=0.3)
    cache = model.new_cache(2)
    sizes = (7, 1, 4, 4, 5)
    begin = 0
    for S in sizes:
        block = slice(begin, begin + S)
        commit = x0[:, cache.length : begin]
        logits = model.denoise(xt[:, block], cache, commit)
        if begin % S == 0:
            expected = model(x0, xt, S)[:, block]
        else:
            fresh = model.new_cache(2)
            expected = model.denoise(xt[:, block], fresh, x0[:, :begin])
        assert close(logits, expected, 1e-5)
        begin += S
    assert begin == 21


@NAN_CACHE
@BOTH
@torch.no_grad()
def test_accepted_tokens_are_in_the_cache(ar):
    """After a verification, moving the length commits: what follows sees the accepted tokens, and
    nothing of the rejected ones."""
    model = tiny(ar=ar)
    x0, xt = random_text(model, 2)
    cache = model.new_cache(2)
    block = slice(6, 12)
    model.denoise(xt[:, block], cache, x0[:, :6])
    proposal = x0.clone()
    proposal[:, 10:] = (x0[:, 10:] + 1) % 11
    verdict = model.verify(proposal[:, block], cache, xt[:, block])
    expected = model(proposal, xt, 1)
    assert close(verdict, expected[:, block], 1e-5)
    cache.length += 3  # of four that are right
    block = slice(10, 15)
    logits = model.denoise(xt[:, block], cache, x0[:, 9:10])
    expected = model.denoise(xt[:, block], model.new_cache(2), x0[:, :10])
    assert close(logits, expected, 1e-5)


@BOTH
@EACH_NOISE
@torch.no_grad()
def test_rows_of_different_block_sizes_equal_separate_calls(noise, ar):
    model = tiny(noise, ar=ar)
    x0, xt = random_text(model, 4)
    sizes = torch.tensor([1, 5, 16, 21])
    together = model(x0, xt, sizes)
    for i, S in enumerate(sizes.tolist()):
        row = slice(i, i + 1)
        alone = model(x0[row], xt[row], S)
        assert close(together[row], alone, 1e-5)


@pytest.mark.parametrize(
    "ar, block_size, n_tokens",
    [
        ("shift", 1, 21),
        ("shift", 4, 42),
        ("paper", 1, 42),
    ],
)
def test_autoregression_by_shift_runs_the_clean_half_alone(ar, block_size, n_tokens):
    model = tiny(ar=ar)
    shapes = []

    def record(module, inputs, output):
        shapes.append(inputs[0].shape)

    model.embedding.register_forward_hook(record)
    model(*random_text(model, 2), block_size)
    assert shapes == [(2, n_tokens)]


@pytest.mark.parametrize("S", [1, 4, 7])
@EACH_AR_AND_CACHE
@torch.no_grad()
def test_nothing_leaks_from_the_future(token_causal, ar, S):
    """Change a token: no logit of an earlier block moves by a single bit, nor (clean tokens) of its
    own block; later ones do."""
    model = tiny(token_causal=token_causal, ar=ar)
    x0, xt = random_text(model, 1)
    base = model(x0, xt, S)

    def moved(x0, xt):
        return (model(x0, xt, S) != base).any(-1)[0]

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
    """x0, sizes, t, u and given of three rows, of which the first `question` tokens are given."""
    torch.manual_seed(0)
    x0 = torch.randint(0, 11, (3, 21))
    sizes = torch.tensor([1, 4, 21])
    rows, stratum = torch.arange(3), torch.rand(3)
    t, u = draw_noise((0,), rows, stratum, sizes, 21, t_min=1e-3)
    lengths = torch.tensor(question)[:, None]
    given = torch.arange(21) < lengths
    return x0, sizes, t.to(dtype), u, given


QUESTIONS = pytest.mark.parametrize(
    "question",
    [
        (0, 0, 0),
        (3, 9, 0),
        (20, 6, 13),
        (0, 21, 2),
    ],
    ids=str,
)


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
    logits = model(x0, xt, sizes)
    nll = -pick(logits.log_softmax(-1), x0)
    nelbo = model.noise.nelbo(logits, x0, xt, alpha, dalpha)
    expected = torch.where(single, nll, nelbo)

    losses = model.token_losses(*batch)
    assert losses.dtype == DOUBLE
    assert close(losses, expected.masked_fill(given, 0), 1e-4)
    assert (losses[given] == 0).all()
    if noise == "masked":
        losses = model.token_losses(*batch, objective="ce")
        scored = (single | (xt == model.noise.mask)) & ~given
        assert close(losses, nll.masked_fill(~scored, 0), 1e-5)


@QUESTIONS
@BOTH
@EACH_NOISE
@pytest.mark.parametrize("ar_weight", [0, 0.3])
def test_losses_of_a_batch_are_those_of_its_rows(noise, ar, question, ar_weight):
    """The head in parts gives what it gives at once, gradients too. The AR loss that ar="shift"
    yields beside a diffusion loss is that of block size 1."""
    model = tiny(noise, ar=ar)
    batch = loss_inputs(question, torch.float32)
    losses = partial(model.token_losses, ar_weight=ar_weight)
    whole = losses(*batch)
    assert whole.dtype == torch.float32
    rows = zip(*(x.split(1) for x in batch))
    alone = [losses(*row) for row in rows]
    assert close(torch.cat(alone), whole, 1e-4)

    model.in_chunks = partial(model.in_chunks, chunk=40)  # three tokens at a time
    parts = losses(*batch)
    assert close(parts, whole, 1e-5)
    weight = model.embedding.weight
    gradient = torch.autograd.grad(whole.sum(), weight)[0]
    gradient_of_parts = torch.autograd.grad(parts.sum(), weight)[0]
    assert close(gradient_of_parts, gradient, 1e-4)

    if ar == "shift":
        diffusion = model.token_losses(*batch)
        x0, sizes, *rest = batch
        by_ar = model.token_losses(x0, torch.ones_like(sizes), *rest)
        mixed = (1 - ar_weight) * diffusion + ar_weight * by_ar
        assert close(whole, mixed, 1e-5)


def test_the_head_makes_no_more_logits_than_a_chunk():
    """And none where nothing is scored."""
    model = tiny()
    logits, sizes = model.logits, []

    def record(states, weight):
        made = logits(states, weight)
        sizes.append(made.numel())
        return made

    model.logits = record
    model.in_chunks = partial(model.in_chunks, chunk=40)
    model.token_losses(*loss_inputs())
    assert max(sizes) == 33
    assert sum(sizes) < 3 * 21 * 11


# ----------------------------------------------------------------------------------------------
# Sampling


def samples(model, rows, **options):
    """Tokens (rows, L)."""
    length = model.config.seq_len
    tokens, _ = generate(model, rows, length, **options)
    return tokens


def statistics(model, rows, **options):
    _, stats = generate(model, rows, model.config.seq_len, **options)
    return stats


class TokenCache:
    """A cache of tokens instead of keys: what is committed can be compared with what is decided."""

    def __init__(self, rows, length):
        self.length = 0
        self.tokens = torch.zeros(rows, length, dtype=torch.int64)

    def put(self, x):
        """Write x behind the committed tokens."""
        end = self.length + x.shape[1]
        assert end <= self.tokens.shape[1]  # drafts near the end are shorter
        self.tokens[:, self.length : end] = x

    def commit(self, x):
        if x is not None:
            self.put(x)
            self.length += x.shape[1]


def check_pass(run, *blocks):
    """A watcher. What is committed is decided; and tokens that are decided, given ones among them,
    stand in the block before and after every step."""
    committed = slice(0, run.cache.length)
    assert run.decided[:, committed].all()
    tokens = run.tokens[:, committed]
    assert torch.equal(run.cache.tokens[:, committed], tokens)
    block = slice(run.begin, run.end)
    decided = run.decided[:, block]
    tokens = run.tokens[:, block][decided]
    xt, x, sent_back = blocks
    for stage in (xt, x):
        assert torch.equal(stage[decided], tokens)
    assert not sent_back[decided].any()


class ExactModel:
    """What generate() needs of a model, for a distribution p over STATES. Its AR side is exact.
    Its diffusion side gives p(x_i | the prefix, what is revealed in the block) under masked noise,
    p(x_i | the prefix) under uniform noise."""

    head = SimpleNamespace(bias=torch.zeros(1))

    def __init__(self, p, noise="masked"):
        self.p = p
        self.noise = NOISES[noise](V)
        self.config = Config(vocab_size=V, seq_len=n, noise=noise)

    def new_cache(self, rows, length):
        return TokenCache(rows, length)

    def log_law(self, known, tokens, i):
        """log p(x_i = v | the known (N, n) positions but i hold these tokens), (N, V)."""
        known = known & (torch.arange(n) != i)
        agrees = (STATES == tokens[:, None]) | ~known[:, None]
        weight = self.p * agrees.all(-1)
        return token_law(weight, i).log()

    def denoise(self, xt, cache, commit=None, block_size=None):
        cache.commit(commit)
        begin, end = cache.length, cache.length + xt.shape[1]
        tokens = cache.tokens.clone()
        tokens[:, begin:end] = xt
        known = torch.zeros_like(tokens, dtype=torch.bool)
        known[:, :begin] = True
        if self.noise.mask is not None:
            known[:, begin:end] = xt != self.noise.mask
        laws = [self.log_law(known, tokens, i) for i in range(begin, end)]
        return torch.stack(laws, 1)

    def verify(self, x, cache, noise=None):
        cache.put(x)
        laws = []
        for i in range(cache.length, cache.length + x.shape[1]):
            before = torch.arange(n)[None] < i
            laws.append(self.log_law(before, cache.tokens, i))
        return torch.stack(laws, 1)


def has_law(tokens, law):
    """Could the rows of tokens (N, n) have been drawn from a law over STATES?"""
    index = tokens @ torch.tensor([V * V, V, 1])
    counts = torch.bincount(index, minlength=len(STATES))
    return fits(counts, law)


@EACH_NOISE
def test_speculative_samples_are_exactly_ar_samples(noise):
    """Of many rows at a time, most of which run ahead of the slowest."""
    p = random_distribution(2)
    model = ExactModel(p, noise)
    tokens, stats = generate(model, 20_000, n, sampler="ar", seed=1)
    assert has_law(tokens, p)
    assert stats["nfe"] == n
    for S in (2, 3):
        options = dict(
            sampler="speculative",
            block_size=S,
            seed=2,
            watch=check_pass,
        )
        tokens, stats = generate(model, 20_000, n, **options)
        assert has_law(tokens, p)
        assert stats["nfe"] < 2 * n  # some rounds accept a token in every row
    # the test has teeth: the draft alone has another law
    draft = samples(model, 20_000, block_size=3, steps=1, seed=3)
    assert not has_law(draft, p)


def ar_law(p, given):
    """The law over STATES of writing from left to right around given tokens, -1 where free."""
    law = torch.ones(len(STATES), dtype=DOUBLE)
    for i, token in enumerate(given.tolist()):
        if token < 0:
            longer = log_marginal(p, list(range(i + 1)))
            shorter = log_marginal(p, list(range(i)))
            law = law * (longer - shorter).exp()
        else:
            law = law * (STATES[:, i] == token)
    return law


@EACH_NOISE
def test_speculative_samples_in_a_batch_of_different_prompts(noise):
    """Small batches, which move on by several tokens at a time. Each row has the AR law of its own
    prompt, also where the prompt stands behind free tokens."""
    model = ExactModel(random_distribution(2), noise)
    prompts = torch.tensor(
        [
            [-1, -1, -1],
            [2, -1, -1],
            [-1, 0, -1],
            [1, -1, 2],
        ]
    )
    batches = []
    for k in range(1000):
        tokens = samples(
            model,
            rows=4,
            sampler="speculative",
            given=prompts,
            first_row=4 * k,
            watch=check_pass,
        )
        batches.append(tokens)
    by_prompt = torch.stack(batches, 1)  # (4, batches, n)
    for tokens, prompt in zip(by_prompt, prompts):
        assert has_law(tokens, ar_law(model.p, prompt))


def test_rows_without_free_tokens_do_not_hold_back_the_others():
    model = ExactModel(random_distribution(2))
    free = torch.full((50, n), -1)
    full = torch.zeros(30, n, dtype=torch.int64)
    together = torch.cat([free, full])
    options = dict(sampler="speculative", block_size=3)
    tokens, stats = generate(model, 50, n, given=free, **options)
    more_tokens, more_stats = generate(model, 80, n, given=together, **options)
    assert torch.equal(more_tokens[:50], tokens)
    assert more_stats["nfe"] == stats["nfe"]


def exact_likelihood(model):
    """p(x) of each of STATES by the AR side, (V^n,)."""
    noise = model.noise.prior(STATES.shape)
    if model.noise.mask is None:  # under ar="paper" any one
        noise = torch.ones_like(STATES)
    logp = model(STATES, noise, 1).double().log_softmax(-1)
    p = pick(logp, STATES).sum(1).exp()
    assert p.sum() == pytest.approx(1)
    return p


@pytest.mark.parametrize(
    "noise, ar",
    [
        ("masked", "paper"),
        ("masked", "shift"),
        ("uniform", "shift"),
    ],
)
@pytest.mark.parametrize("prompt", [[-1, -1, -1], [-1, 2, -1]], ids=str)
@torch.no_grad()
def test_ar_and_speculative_samples_follow_the_likelihood(noise, ar, prompt):
    """The same with a real model: forward at block size 1 says p(x) of every sequence, and both
    samplers write with that law."""
    model = tiny(noise, vocab_size=V, seq_len=n, ar=ar)
    given = torch.tensor(prompt)
    law = ar_law(exact_likelihood(model), given)
    write = partial(samples, model, 20_000, given=given.expand(20_000, n))
    assert has_law(write(sampler="ar", seed=1), law)
    for S in (2, 3):
        tokens = write(sampler="speculative", block_size=S, seed=2)
        assert has_law(tokens, law)
    assert not has_law(write(block_size=3, steps=1, seed=3), law)


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_ancestral_samples_follow_their_closed_form(steps):
    """steps = 1: the product of the marginals; steps = S: the law pushed through the steps; many:
    nearly p."""
    p = random_distribution(2)
    model = ExactModel(p)
    denoiser = partial(exact_denoiser, model.noise, p)
    law = ancestral_law(model.noise, denoiser, steps)
    tokens = samples(model, 5_000, block_size=3, steps=steps, seed=steps)
    assert has_law(tokens, law)


@pytest.mark.parametrize("sampler", ["ar", "speculative"])
def test_temperature_and_top_k_reach_the_tokens(sampler):
    model = ExactModel(random_distribution(2))
    best = torch.zeros(1, n, dtype=torch.int64)
    for i in range(n):  # greedy, by hand
        before = torch.arange(n)[None] < i
        best[:, i] = model.log_law(before, best, i).argmax()
    for greedy in (dict(temperature=0), dict(top_k=1)):
        tokens = samples(model, 3, sampler=sampler, **greedy)
        assert (tokens == best).all()

    def first_token_has_law(law, **options):
        tokens = samples(model, 20_000, sampler=sampler, **options)
        counts = torch.bincount(tokens[:, 0], minlength=V)
        return close(counts / 20_000, law / law.sum(), 0.02)

    law = token_law(model.p[None], 0)[0]
    likeliest_two = law.masked_fill(law == law.min(), 0)
    assert first_token_has_law(likeliest_two, top_k=2)
    assert first_token_has_law(law.sqrt(), temperature=2.0)


GIVEN = torch.full((3, 21), -1)
GIVEN[0, :5] = 1
GIVEN[1, 3:9] = 2
GIVEN[1, 20] = 4
GIVEN[2, :13] = 3


class Uncached:
    """The contract again, recomputed from scratch in every pass, each row and each verified token
    by itself."""

    def __init__(self, model):
        self.model = model
        self.config = model.config
        self.noise = model.noise
        self.head = model.head

    def new_cache(self, rows, length):
        return TokenCache(rows, length)

    def from_scratch(self, xt, prefixes):
        rows = []
        for x, prefix in zip(xt, prefixes):
            cache = self.model.new_cache(1)
            logits = self.model.denoise(x[None], cache, prefix[None])
            rows.append(logits)
        return torch.cat(rows)

    def denoise(self, xt, cache, commit=None, block_size=None):
        cache.commit(commit)
        prefixes = cache.tokens[:, : cache.length]
        return self.from_scratch(xt, prefixes)

    def verify(self, x, cache, noise=None):
        cache.put(x)
        noise = x if noise is None else noise  # under ar="shift" none is read
        columns = []
        for j in range(x.shape[1]):
            prefixes = cache.tokens[:, : cache.length + j]
            logits = self.from_scratch(noise[:, j : j + 1], prefixes)
            columns.append(logits)
        return torch.cat(columns, 1)


def count_calls(model):
    """A dict that counts the model's passes."""
    calls = dict(denoise=0, verify=0)

    def counting(name):
        method = getattr(model, name)

        def counted(*args):
            calls[name] += 1
            return method(*args)

        return counted

    for name in calls:
        setattr(model, name, counting(name))
    return calls


VARIANTS = [dict(sampler=s) for s in SAMPLERS if s != "arpc"]
VARIANTS += [dict(sampler="arpc", criterion=c) for c in CRITERIA]


@NAN_CACHE
@BOTH
@EACH_NOISE
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v.values()))
def test_samplers(variant, noise, ar):
    """Cached = recomputed in every pass, token for token; a row does not depend on its batch; given
    tokens stay; NFE is the number of calls. In float64, so that no rounding decides a draw."""
    model = tiny(noise, ar=ar).double()
    sampler, criterion = variant["sampler"], variant.get("criterion")
    options = dict(block_size=5, steps=4, threshold=0.2, seed=5, **variant)
    recompute = partial(samples, Uncached(model), watch=check_pass, **options)
    recomputed = recompute(3, given=GIVEN)
    alone = []
    for i in range(3):
        row = dict(given=GIVEN[i : i + 1], first_row=i)
        alone.append(samples(model, 1, **row, **options))
        if sampler == "speculative":  # there rows wait for each other
            assert torch.equal(alone[i], recompute(1, **row))
    calls = count_calls(model)
    tokens, stats = generate(model, 3, 21, given=GIVEN, **options)
    assert torch.equal(tokens, recomputed)
    if sampler != "speculative":
        assert torch.equal(tokens, torch.cat(alone))
    free = GIVEN < 0
    assert torch.equal(tokens[~free], GIVEN[~free])
    assert 0 <= tokens.min() and tokens.max() < 11
    assert stats["tokens"] == free.sum()

    assert stats["nfe"] == sum(calls.values())
    verifies = sampler == "speculative" or criterion in AR_CRITERIA
    assert (calls["verify"] > 0) == verifies
    # Five blocks; the last has one token, which takes one step. Committing costs nothing.
    if sampler == "ancestral" and noise == "uniform":
        assert stats["nfe"] == 4 * 4 + 1
    if criterion in AR_CRITERIA:
        assert stats["nfe"] == 4 * 7 + 1  # 2 steps - 1 a block


@NAN_CACHE
@BOTH
def test_drafts_that_are_accepted_as_a_whole(ar):
    """Then the verifying pass wrote the keys of all that is committed: cached = recomputed."""
    model = tiny(ar=ar).double()
    options = dict(sampler="speculative", block_size=2, temperature=5.0)
    for row in range(5):
        expected = samples(Uncached(model), 1, first_row=row, **options)
        tokens, stats = generate(model, 1, 21, first_row=row, **options)
        assert torch.equal(tokens, expected)
        assert stats["nfe"] < 30  # of 42, if each round wrote one token


@pytest.mark.parametrize("sampler", ["ar", "ancestral", "confidence", "arpc"])
@pytest.mark.parametrize("prompt", [0, 7, 10, 12])
@torch.no_grad()
def test_a_block_causal_model_samples_as_it_was_trained(sampler, prompt):
    """Every pass has the logits of the training pass at its block size, also behind a prompt."""
    model = tiny(token_causal=False, ar="paper")
    given = torch.full((2, 21), -1)
    given[:, :prompt] = torch.randint(0, 11, (2, prompt))
    S = 1 if sampler == "ar" else 5
    denoise, passes = model.denoise, []
    x0 = torch.zeros_like(given)

    def compare(xt, cache, commit, block_size):
        before = cache.length
        logits = denoise(xt, cache, commit, block_size)
        begin, end = cache.length, cache.length + xt.shape[1]
        x0[:, before:begin] = commit
        noisy = x0.clone()
        noisy[:, begin:end] = xt
        expected = model(x0, noisy, S)
        assert close(logits, expected[:, begin:end], 1e-5)
        passes.append(begin)
        return logits

    model.denoise = compare
    samples(
        model,
        rows=2,
        sampler=sampler,
        given=given,
        block_size=5,
        steps=2,
        criterion="diffusion_entropy",
    )
    assert passes


class Direct:
    """Sampling as a paper would write it: row 0 of a batch, no cache, plain loops; the random
    numbers are those of generate()."""

    def __init__(self, model, block_size, seed):
        self.model = model
        self.block_size, self.seed = block_size, seed
        self.length = model.config.seq_len
        self.tokens = [0] * self.length

    def number(self, purpose, step, i):
        begin = i - i % self.block_size
        n = min(self.block_size, self.length - begin)
        return random_numbers((self.seed, purpose, step, begin), [0], n)[0, i - begin]

    def pure(self, purpose, step, i):
        """A token of pure noise."""
        noise = self.model.noise
        if noise.mask is not None:
            return noise.mask
        return int(self.number(purpose, step, i) * noise.vocab_size)

    def logits(self, x0, xt, block_size):
        """The training pass, (L, V)."""
        x0, xt = torch.tensor([x0]), torch.tensor([xt])
        return self.model(x0, xt, block_size)[0].float()

    def denoise(self, block, xt):
        """Logits (L, V) at the noisy tokens xt of a block."""
        noisy = [0] * self.length
        noisy[block.start : block.stop] = xt
        return self.logits(self.tokens, noisy, self.block_size)

    def sample(self, fill):
        for begin in range(0, self.length, self.block_size):
            end = min(begin + self.block_size, self.length)
            block = range(begin, end)
            xt = [self.pure(sample.PRIOR, 0, i) for i in block]
            self.tokens[begin:end] = fill(self, block, xt)
        return self.tokens


def arpc_by_hand(direct, block, xt, steps, criterion, temperature=1.0, warmup=0, guide_every=1):
    noise, begin = direct.model.noise, block.start
    steps = steps if len(block) > 1 else 1
    for k in range(steps):
        alpha_t, alpha_s = k / steps, (k + 1) / steps
        last = k == steps - 1
        guided = not last and k >= warmup and (k - warmup) % guide_every == 0
        logits = direct.denoise(block, xt) / temperature
        probs = logits.softmax(-1)
        to = 1.0 if guided else alpha_s
        for i in block:
            u = direct.number(sample.REVEAL, k, i)
            old = torch.tensor(xt[i - begin])
            xt[i - begin] = int(noise.step(probs[i], old, to, alpha_t, u))
        if not guided:
            continue
        direct.tokens[begin : block.stop] = xt
        score = arpc_scores_by_hand(direct, block, k, criterion, temperature)
        count = max(1, round((1 - alpha_s) * len(block)))
        worst_first = sorted(block, key=score.get, reverse=True)
        for i in worst_first[:count]:
            xt[i - begin] = direct.pure(sample.RENOISE, k + 1, i)
    return xt


def arpc_scores_by_hand(direct, block, k, criterion, temperature):
    if criterion == "random":
        return {i: direct.number(sample.ACCEPT, k, i) for i in block}
    positions = range(direct.length)
    noise = [direct.pure(sample.VERIFY, k, i) for i in positions]
    logits = direct.logits(direct.tokens, noise, 1) / temperature
    logp = logits.log_softmax(-1)
    return {i: -logp[i, direct.tokens[i]].item() for i in block}


@pytest.mark.parametrize(
    "ar, options",
    [
        ("paper", dict(criterion="random")),
        ("paper", dict(criterion="ar_nll")),
        ("shift", dict(criterion="ar_nll", temperature=0.7)),
        ("shift", dict(criterion="ar_nll", warmup=1, guide_every=2)),
        ("shift", dict(criterion="ar_nll", warmup=8, steps=10)),
    ],
)
@EACH_NOISE
@torch.no_grad()
def test_arpc_equals_a_direct_implementation(noise, ar, options):
    model = tiny(noise, ar=ar).double()
    options = {"steps": 6, **options}
    fill = partial(arpc_by_hand, **options)
    expected = Direct(model, block_size=5, seed=3).sample(fill)
    tokens = samples(
        model,
        rows=1,
        sampler="arpc",
        block_size=5,
        seed=3,
        **options,
    )
    assert tokens[0].tolist() == expected


def confidence_by_hand(direct, block, xt, threshold, temperature, top_k):
    free, k = list(block), 0
    while free:
        logits = direct.denoise(block, xt) / temperature
        drawn, confidence = {}, {}
        for i in free:
            likely = logits[i].topk(top_k).indices
            probs = torch.zeros_like(logits[i])
            probs[likely] = logits[i, likely].softmax(-1)
            u = direct.number(sample.REVEAL, k, i)
            drawn[i] = draw(probs, u).item()
            confidence[i] = probs[drawn[i]].item()
        likeliest = max(free, key=confidence.get)
        sure = [i for i in free if i == likeliest or confidence[i] > threshold]
        for i in sure:
            xt[i - block.start] = drawn[i]
        free = [i for i in free if i not in sure]
        k += 1
    return xt


@BOTH
@EACH_NOISE
@torch.no_grad()
def test_confidence_equals_a_direct_implementation(noise, ar):
    """What is compared is the probability after temperature and top-k, with which a token was
    drawn."""
    model = tiny(noise, ar=ar).double()
    options = dict(threshold=0.45, temperature=0.6, top_k=4)
    fill = partial(confidence_by_hand, **options)
    expected = Direct(model, block_size=5, seed=3).sample(fill)
    tokens, stats = generate(
        model,
        2,
        21,
        sampler="confidence",
        block_size=5,
        seed=3,
        **options,
    )
    assert tokens[0].tolist() == expected
    assert 5 < stats["nfe"] < 21


def plain_score(criterion, a, d, x, revealed):
    """A criterion for one token x, as a formula. a and d are the probabilities on the AR and on the
    diffusion side; there a revealed token is a point mass."""
    if revealed:
        d = [float(v == x) for v in range(len(d))]

    def divergence(p, q):
        pairs = zip(p, q)
        return sum(p_v * math.log(p_v / q_v) for p_v, q_v in pairs if p_v)

    def entropy(p):
        return -sum(p_v * math.log(p_v) for p_v in p if p_v)

    nll = -math.log(a[x])
    first, second = sorted(d, reverse=True)[:2]
    if criterion == "kld":
        return nll if revealed else divergence(a, d)
    if criterion == "reverse_kld":
        return divergence(d, a)
    if criterion == "tvd":
        distances = [abs(a_v - d_v) for a_v, d_v in zip(a, d)]
        return sum(distances) / 2
    return dict(
        ar_nll=nll,
        ar_gap=math.log(max(a)) + nll,
        ar_entropy=entropy(a),
        diffusion_entropy=entropy(d),
        diffusion_confidence=-first,
        diffusion_margin=second - first,
    )[criterion]


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c != "random"])
@EACH_NOISE
def test_arpc_scores_equal_their_formulas(noise, criterion):
    """Under masked noise some tokens were revealed before."""
    torch.manual_seed(0)
    noise = NOISES[noise](6)
    ar, diffusion = torch.randn(2, 30, 6)
    x, other = torch.randint(0, 6, (2, 30))
    revealed = torch.rand(30) < 0.4
    if noise.mask is None:
        revealed[:] = False
        xt = other
    else:
        xt = torch.where(revealed, x, noise.mask)
    run = SimpleNamespace(
        options=sample.Options(sampler="arpc", criterion=criterion),
        model=SimpleNamespace(noise=noise),
        verify=lambda *_: ar[None],
    )
    scores = sample.arpc_score(run, x[None], xt[None], diffusion[None], 0)[0]
    a = ar.double().softmax(-1)
    d = diffusion.double().softmax(-1)
    rows = zip(a.tolist(), d.tolist(), x.tolist(), revealed.tolist())
    plain = [plain_score(criterion, *row) for row in rows]
    assert scores.tolist() == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    "score, free, expected",
    [
        ([3, 9, 2, 5], [1, 0, 1, 1], [1, 0, 0, 1]),
        ([1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]),
        ([7, 8, 9, 6], [1, 0, 0, 0], [1, 0, 0, 0]),
    ],
)
def test_what_goes_back_to_noise_is_free_and_worst(score, free, expected):
    """Two of four tokens."""
    score = torch.tensor([score]).float()
    free = torch.tensor([free]).bool()
    chosen = sample.highest(score, free, 2)
    assert chosen[0].long().tolist() == expected


CHANGES = dict(
    block_size=7,
    steps=5,
    criterion="kld",
    warmup=2,
    guide_every=2,
    threshold=0.1,
)
FOR_ALL = dict(
    temperature=0.5,
    top_k=3,
    seed=1,
    stop=6,
)
BLOCKS = {"block_size"}
STEPS = BLOCKS | {"steps", "schedule"}
USED = dict(  # those of CHANGES that are for a sampler
    ar=set(),
    ancestral=STEPS,
    arpc=STEPS | {"criterion", "warmup", "guide_every"},
    confidence=BLOCKS | {"threshold"},
    speculative=BLOCKS,
)


@EACH_SAMPLER
def test_every_option_changes_the_sample(sampler):
    """Of the samplers that it is for, and of no other."""
    model = tiny("uniform")
    base = dict(sampler=sampler, block_size=5, steps=6)
    reference = samples(model, 8, **base)
    used = USED[sampler] | FOR_ALL.keys()
    for name, value in {**CHANGES, **FOR_ALL}.items():
        tokens = samples(model, 8, **{**base, name: value})
        changed = not torch.equal(tokens, reference)
        assert changed == (name in used), name


def test_the_schedule_is_the_one_of_training():
    write = partial(samples, rows=8, sampler="ancestral", block_size=7, steps=4)
    linear, cosine = tiny(schedule="linear"), tiny(schedule="cosine")
    assert not torch.equal(write(linear), write(cosine))


@EACH_SAMPLER
def test_a_block_is_at_most_the_length(sampler):
    model = tiny("uniform", seq_len=13)
    write = partial(samples, model, 3, sampler=sampler)
    assert torch.equal(write(block_size=100), write(block_size=13))


@EACH_SAMPLER
def test_rows_stop_at_their_end_token(sampler):
    """The prompt's own end tokens do not count, nor do those before something given."""
    model = tiny()
    end = 3
    model.head.bias.data[end] = 6.0  # likely
    given = torch.full((6, 21), -1)
    given[:, :4] = end
    given[0, 20] = 7
    tokens = samples(model, 6, sampler=sampler, given=given, stop=end)
    assert tokens[0, 20] == 7
    assert (tokens[:, :4] == end).all()
    for row in tokens[1:, 4:].tolist():
        assert end in row
        behind = row[row.index(end) :]
        assert set(behind) == {end}
    measure = partial(
        statistics,
        model,
        rows=5,
        sampler=sampler,
        given=given[1:],
        block_size=2,
    )
    early, late = measure(stop=end), measure()
    assert early["nfe"] < late["nfe"]
    assert early["tokens"] < late["tokens"]


@EACH_SAMPLER
def test_a_stopped_row_does_not_hold_back_the_batch(sampler):
    """A row that ends at once costs as many passes as one that was given, and the other rows stay
    the same."""
    model = tiny()
    logits, end = model.logits, 3

    def first_row_ends(states):
        boost = torch.zeros(len(states), 1, 11)
        boost[0, :, end] = 100
        return logits(states) + boost

    model.logits = first_row_ends
    write = partial(
        generate,
        model,
        4,
        21,
        sampler=sampler,
        block_size=4,
        steps=1,
        stop=end,
    )
    given = torch.full((4, 21), -1)
    tokens, stats = write(given=given)
    assert (tokens[0] == end).all()
    given[0] = end
    expected, expected_stats = write(given=given)
    assert torch.equal(tokens, expected)
    assert stats["nfe"] == expected_stats["nfe"]
    assert stats["tokens"] == expected_stats["tokens"] + 1


# ----------------------------------------------------------------------------------------------
# Likelihood


@BOTH
@EACH_NOISE
@torch.no_grad()
def test_the_bounds_are_bounds(noise, ar):
    """For a model small enough to enumerate: NELBO(3), and the bounds of a mixture of block sizes 1
    and 3, against the exact likelihoods. p_3 is the law of ancestral sampling in many steps."""
    model = tiny(noise, vocab_size=V, seq_len=n, ar=ar)
    nelbo = expected_nelbo(model, STATES).sum(1)

    def denoiser(xt, alpha):
        logits = model(torch.zeros_like(xt), xt, n)
        return logits.double().softmax(-1)

    p3 = ancestral_law(model.noise, denoiser, 500)
    assert (nelbo > -p3.log() - 1e-3).all()
    assert (nelbo > -p3.log() + 1e-3).any()

    weights = [0.3, 0.7]
    p1 = exact_likelihood(model)
    both = torch.stack([-p1.log(), nelbo])
    truth = -(0.3 * p1 + 0.7 * p3).log()
    jensen, other = train.mixture_bounds(both, weights)
    assert close(jensen, 0.3 * both[0] + 0.7 * both[1], 1e-9)
    assert (jensen > truth - 1e-3).all()
    assert (other > truth - 1e-3).all()

    far = both + torch.tensor([[0.0], [20.0]])  # where one size is far better, it is log-sum-exp
    jensen, other = train.mixture_bounds(far, weights)
    tightest = log_sum_exp(far, weights)
    assert close(other.mean(), tightest.mean(), 0.02)
    assert other.mean() < jensen.mean() - 1

    torch.manual_seed(0)  # log-sum-exp of noisy estimates sinks below the truth; these do not
    noisy = both.repeat(1, 3000)
    noisy += 5 * torch.randn_like(noisy)
    naive = log_sum_exp(noisy, weights)
    assert naive.mean() < truth.mean() - 0.5
    for bound in train.mixture_bounds(noisy, weights):
        assert bound.mean() > truth.mean()


def log_sum_exp(total, weights):
    """-log sum_S w_S exp(-NELBO_S): the tightest bound, but none of noisy estimates."""
    log_w = torch.tensor(weights, dtype=DOUBLE).log()
    return -torch.logsumexp(log_w[:, None] - total, 0)


def test_mixture_bounds_of_few_noisy_sequences():
    """16 sequences, two block sizes of the same NELBO, 500 nats, each with an error of 30. Averaged
    over many such tables no bound is below 500; the better one of a table would be."""
    torch.manual_seed(0)
    tables = []
    for _ in range(4000):
        total = 500 + 30 * torch.randn(2, 16, dtype=DOUBLE)
        bounds = train.mixture_bounds(total, [0.5, 0.5])
        tables.append(torch.stack(bounds).mean(1))
    tables = torch.stack(tables)  # (tables, 2)
    error = tables.std(0) / math.sqrt(len(tables))
    assert (tables.mean(0) > 500 - 4 * error).all()
    assert tables.amin(1).mean() < 500 - 10 * error.max()


@BOTH
@EACH_NOISE
@torch.no_grad()
def test_evaluation_is_unbiased_and_in_float64(noise, ar):
    """Its mean is the NELBO, by enumeration."""
    model = tiny(noise, vocab_size=V, seq_len=n, ar=ar)
    nelbo = expected_nelbo(model, STATES).sum(1)
    token_losses, levels = model.token_losses, []

    def record(x0, block_size, t, *rest):
        levels.append(t)
        return token_losses(x0, block_size, t, *rest)

    model.token_losses = record
    draws = []
    for seed in range(600):
        rows = model, STATES.numpy(), {}, n, len(STATES)
        each, _ = train.evaluate(*rows, batch_size=27, seed=seed)
        draws.append(each.mean() * n)
    draws = torch.stack(draws)
    error = draws.std() / math.sqrt(600)
    assert abs(draws.mean() - nelbo.mean()) < 4 * error + 1e-4
    levels = torch.cat(levels)
    assert levels.dtype == DOUBLE
    assert 1e-6 < levels.min() < 5e-4  # it does not begin at 1e-3, as in training


# --------------------------------------------------------------------------------------------------
# Attention


needs_triton = pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
PATHS = [
    kernels.attention_torch,
    pytest.param(kernels.attention_triton, marks=needs_triton),
]


def random_view(n_rows, n_queries, n_keys):
    """Any bounds with which each query sees something: overlapping, empty, a fifth of the queries
    without a prefix. n_rows 0: one view for all rows."""
    shape = (n_rows, n_queries) if n_rows else (n_queries,)
    prefix, start, end = torch.randint(0, n_keys + 1, (3, *shape))
    prefix = prefix.clamp(min=1)
    no_prefix = torch.rand(shape) < 0.2
    start = torch.where(no_prefix, start % n_keys, start)
    end = torch.where(no_prefix, torch.maximum(end, start + 1), end)
    return kernels.View(prefix.masked_fill(no_prefix, 0), start, end)


def every_view(n_rows, L, S):
    block_sizes = torch.tensor([max(1, S // 2)] + [S] * (n_rows - 1))
    return [
        kernels.train_view(L, S),
        kernels.train_view(L, S, token_causal=False),
        kernels.train_view(L, block_sizes),
        kernels.denoise_view(0, 2 * L, 0),
        random_view(0, 2 * L, 2 * L),
        random_view(n_rows, 2 * L, 2 * L),
    ]


def with_gradients(attention, inputs, view, grad):
    """[o, dq, dk, dv]"""
    inputs = [x.clone().requires_grad_() for x in inputs]
    o = attention(*inputs, view)
    return [o, *torch.autograd.grad(o, inputs, grad.to(o.dtype))]


def largest_error(attention, inputs, view):
    """Of o, dq, dk, dv against the textbook in float64, relative to the largest value."""
    grad = torch.randn_like(inputs[0])
    ours = with_gradients(attention, inputs, view, grad)
    exact = with_gradients(kernels.attention_naive, [x.double() for x in inputs], view, grad)
    errors = []
    for a, b in zip(ours, exact):
        scale = b.abs().max().clamp(min=1)
        error = (a.double() - b).abs().max() / scale
        errors.append(error.nan_to_num(math.inf))
    return max(errors)


def random_inputs(n_rows, n_heads, n_queries, n_keys, D, dtype=torch.float32):
    def make(length):
        return torch.randn(n_rows, n_heads, length, D, dtype=dtype)

    return make(n_queries), make(n_keys), make(n_keys)


def pairs(n_queries, n_keys):
    return itertools.product(range(n_queries), range(n_keys))


def test_train_view_is_its_definition():
    L, S = 11, 4
    for token_causal in (True, False):
        seen = kernels.train_view(L, S, token_causal).dense(2 * L)
        for i, j in pairs(2 * L, 2 * L):
            query_block = i % L // S
            key_block = j % L // S
            if i < L and token_causal:
                expected = j <= i
            elif i < L:
                expected = j < L and key_block <= query_block
            elif j < L:
                expected = key_block < query_block
            else:
                expected = key_block == query_block
            assert seen[i, j] == expected
    sizes = torch.tensor([1, 4, 11])
    mixed = kernels.train_view(L, sizes).dense(2 * L)
    for row, S in zip(mixed, (1, 4, 11)):
        assert torch.equal(row, kernels.train_view(L, S).dense(2 * L))


def test_generation_views_are_their_definitions():
    C, c, n = 5, 7, 3
    for block_size in (1, 3):
        seen = kernels.denoise_view(C, c, n, block_size).dense(C + c + n + 2)
        for i, j in pairs(c + n, C + c + n + 2):
            if i >= c:
                last = c + n
            else:
                last = min(c, (i // block_size + 1) * block_size)
            assert seen[i, j] == (j < C + last)
    seen = kernels.verify_view(C, n).dense(C + 2 * n)
    for i, j in pairs(n, C + 2 * n):
        assert seen[i, j] == (j <= C + i)
        assert seen[n + i, j] == (j < C + i or j == C + n + i)
    causal = kernels.denoise_view(C, n, 0).dense(20)
    for i, j in pairs(n, 20):
        assert causal[i, j] == (j <= C + i)


def test_generation_makes_its_views_and_masks_once():
    kernels.denoise_view.cache_clear()
    before = kernels.make_masks.cache_info().misses
    q, k, v = random_inputs(1, 1, 16, 200, 8)
    for _ in range(16):
        kernels.block_attention(q, k, v, kernels.denoise_view(100, 0, 16))
    assert kernels.make_masks.cache_info().misses == before + 1


@pytest.mark.parametrize(
    "n_rows, n_heads, L, S, D",
    [
        (1, 2, 1, 1, 16),
        (2, 2, 50, 7, 32),
        (3, 2, 200, 16, 24),
        (2, 1, 333, 333, 8),
    ],
)
def test_torch_is_textbook_attention(n_rows, n_heads, L, S, D):
    torch.manual_seed(0)
    inputs = random_inputs(n_rows, n_heads, 2 * L, 2 * L, D)
    for view in every_view(n_rows, L, S):
        assert largest_error(kernels.attention_torch, inputs, view) < 1e-5


@needs_triton
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize(
    "n_rows, n_heads, L, S, D",
    [
        (1, 2, 1, 1, 16),
        (2, 1, 50, 7, 32),
        (2, 1, 81, 16, 24),
        (1, 1, 40, 1, 128),
        (1, 1, 66, 66, 5),
    ],
)
def test_triton_is_textbook_attention(n_rows, n_heads, L, S, D, dtype, tolerance):
    torch.manual_seed(0)
    inputs = random_inputs(n_rows, n_heads, 2 * L, 2 * L, D, dtype)
    for view in every_view(n_rows, L, S):
        assert largest_error(kernels.attention_triton, inputs, view) < tolerance


@needs_triton
def test_triton_in_bfloat16(monkeypatch):
    """The interpreter's own product of bfloat16 tiles is wrong: it multiplies their bits."""
    from triton.runtime import interpreter

    def wide(x):
        if x.dtype.scalar != interpreter.tl.bfloat16:
            return x.data
        bits = x.data.astype(np.uint32) << 16
        return bits.view(np.float32)

    def dot(self, a, b, d, *_):
        product = np.matmul(wide(a), wide(b), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    torch.manual_seed(0)
    inputs = random_inputs(2, 1, 70, 70, 24, torch.bfloat16)
    for view in every_view(2, 35, 7):
        assert largest_error(kernels.attention_triton, inputs, view) < 2e-2


@pytest.mark.parametrize("attention", PATHS)
def test_attention_of_slices_of_one_projection(attention):
    """q, k and v as the model has them: not contiguous."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 140, 3, 2, 16).permute(2, 0, 3, 1, 4)  # (3, N, H, Q, D)
    grad = torch.randn(2, 140, 2, 16).transpose(1, 2)
    view = kernels.train_view(70, 8)
    ours = with_gradients(attention, qkv, view, grad)
    exact = with_gradients(kernels.attention_naive, qkv.double(), view, grad)
    for a, b in zip(ours, exact):
        assert close(a, b, 1e-5)


@pytest.mark.parametrize("attention", PATHS)
@pytest.mark.parametrize(
    "view, valid",
    [
        (kernels.denoise_view(100, 5, 12), 117),
        (kernels.denoise_view(64, 6, 11, 3), 81),
        (kernels.denoise_view(0, 0, 16), 16),
        (kernels.denoise_view(70, 0, 1), 71),
        (kernels.verify_view(60, 8), 76),
        (kernels.verify_view(5, 70), 145),
        (kernels.denoise_view(3, 135, 0), 138),
    ],
)
def test_nothing_is_read_behind_the_last_visible_key(attention, view, valid):
    torch.manual_seed(0)
    q, k, v = random_inputs(2, 2, len(view.prefix), 150, 16)
    grad = torch.randn_like(q)
    exact = with_gradients(kernels.attention_naive, (q, k, v), view, grad)
    k[:, :, valid:] = 1e4
    v[:, :, valid:] = 1e4
    ours = with_gradients(attention, (q, k, v), view, grad)
    for a, b in zip(ours, exact):
        assert close(a, b, 1e-5)


def peak_memory(run):
    """The most bytes that run() holds at a time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as trace:
        run()
    events = trace.profiler.kineto_results.events()
    changes = [e.nbytes() for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("L", [32, 256, 1024])
def test_torch_attention_needs_no_more_memory_than_a_dense_mask(L):
    view = kernels.train_view(L, 16)
    inputs = [torch.randn(2, 2, 2 * L, 32, requires_grad=True) for _ in range(3)]

    def dense(q, k, v):
        mask = view.dense(2 * L)
        return F.scaled_dot_product_attention(q, k, v, mask)

    def sparse(q, k, v):
        return kernels.attention_torch(q, k, v, view)

    def peak(attention):
        def run():
            o = attention(*inputs)
            torch.autograd.grad(o.sum(), inputs)

        return peak_memory(run)

    assert peak(sparse) <= 1.25 * peak(dense)


# --------------------------------------------------------------------------------------------------
# Which tiles the kernels visit


def tiles_of(mask, tile):
    """(query tiles, key tiles): which hold a visible pair, and which nothing else."""
    some, whole = [], []
    for queries in mask.split(tile, 0):
        for part in queries.split(tile, 1):
            some.append(bool(part.any()))
            whole.append(part.shape == (tile, tile) and bool(part.all()))
    shape = -1, math.ceil(mask.shape[1] / tile)
    return torch.tensor(some).view(shape), torch.tensor(whole).view(shape)


@pytest.mark.parametrize("tile", [32, 64])
@pytest.mark.parametrize("L, S", [(1024, 1), (1024, 16), (1024, 1024), (100, 16), (333, 7)])
def test_kernels_visit_the_tiles_that_hold_a_visible_pair_and_no_other(L, S, tile):
    view = kernels.train_view(L, S)
    some, whole = tiles_of(view.dense(2 * L), tile)
    _, by_query, by_key = kernels.make_tables(view, 2 * L, tile, torch.device("cpu"))
    for lists, some, whole in ((by_query, some, whole), (by_key, some.T, whole.T)):
        for row, row_some, row_whole in zip(lists[0].tolist(), some, whole):
            n_whole, n_seen, *order = row
            assert sorted(order[:n_seen]) == row_some.nonzero()[:, 0].tolist()
            assert sorted(order[:n_whole]) == row_whole.nonzero()[:, 0].tolist()
    if (L, S, tile) == (1024, 16, 64):
        assert some.sum() == 288  # of 1024


def test_random_views_visit_every_tile_that_holds_a_visible_pair():
    torch.manual_seed(0)
    view = random_view(3, 150, 250)
    _, lists, _ = kernels.make_tables(view, 250, 32, torch.device("cpu"))
    for batch_row, mask in zip(lists, view.dense(250)):
        some, whole = tiles_of(mask, 32)
        for row, row_some, row_whole in zip(batch_row.tolist(), some, whole):
            n_whole, n_seen, *order = row
            assert sorted(order[:n_seen]) == row_some.nonzero()[:, 0].tolist()
            assert row_whole[order[:n_whole]].all()


# --------------------------------------------------------------------------------------------------
# Which implementation runs


class BrokenKernel:
    def __getitem__(self, grid):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A function of a capability: torch believes in a GPU that has it."""

    def pretend(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch, "empty", lambda *shape, device=None: torch.zeros(*shape))
        kernels.use_triton.cache_clear()

    yield pretend
    kernels.use_triton.cache_clear()


@needs_triton
def test_use_triton(pretended_gpu, monkeypatch, capsys):
    gpu = torch.device("cuda", 0)
    assert not kernels.use_triton(torch.device("cpu"))
    pretended_gpu((7, 5))  # T4
    assert not kernels.use_triton(gpu)
    pretended_gpu((8, 0))  # A100
    assert kernels.use_triton(gpu)
    pretended_gpu((12, 0))
    assert kernels.use_triton(gpu)
    assert capsys.readouterr().err == ""
    pretended_gpu((9, 0))
    monkeypatch.setattr(kernels, "probe_kernel", BrokenKernel())
    assert not kernels.use_triton(gpu)
    assert not kernels.use_triton(gpu)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "C compiler" in lines[0]
    pretended_gpu((9, 0))
    monkeypatch.setattr(kernels, "triton", None)
    assert not kernels.use_triton(gpu)


def test_block_attention_leaves_wide_heads_to_torch(monkeypatch):
    chosen = []
    monkeypatch.setattr(kernels, "attention_triton", lambda *_: chosen.append("triton"))
    monkeypatch.setattr(kernels, "attention_torch", lambda *_: chosen.append("torch"))
    view = kernels.denoise_view(0, 4, 0)
    for triton_works, D in ((False, 64), (True, 64), (True, 128), (True, 129)):
        monkeypatch.setattr(kernels, "use_triton", lambda device: triton_works)
        kernels.block_attention(*random_inputs(1, 1, 4, 4, D), view)
    assert chosen == ["torch", "triton", "triton", "torch"]


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
    spill = re.search(r"STACK:(\\d+)", usage)[1]
    print(built.metadata.shared, spill, int("mma" in built.asm["ptx"]), flush=True)

for case in sys.argv[1:]:
    architecture, dtype, D = case.split(",")
    D, itemsize = int(D), 2 if dtype == "bf16" else 4
    forward = kernels.launch(D, itemsize, backward=False)
    report(kernels.forward_kernel, architecture, dtype, D, forward)
    backward = kernels.launch(D, itemsize, backward=True)
    report(kernels.backward_kernel, architecture, dtype, D, backward)
"""

COMPILED = [
    "80,bf16,64",
    "86,bf16,64",
    "89,bf16,64",
    "90,bf16,64",
    "100,bf16,64",
    "120,bf16,64",
    "80,fp32,128",
    "90,bf16,128",
    "100,bf16,128",
    "120,fp32,32",
]


@needs_triton
def test_kernels_compile_ahead_of_time(tmp_path):
    """From A100 to B200 and RTX 5090: they compile, use the matrix units, fit in the 99 KB of
    shared memory that the smaller ones have, and spill at most 32 bytes."""
    environment = dict(os.environ)
    del environment["TRITON_INTERPRET"]
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = HERE
    command = [sys.executable, "-c", AHEAD_OF_TIME, *COMPILED]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 2 * len(COMPILED)  # forward, backward
    for i, line in enumerate(lines):
        shared, spill, uses_mma = map(int, line.split())
        case = COMPILED[i // 2], line
        assert shared <= 99 * 1024, case
        assert spill <= 32, case
        assert uses_mma, case


def call(module, *flags):
    """Run a script's main in this process, with flags separated by spaces; the exit status."""
    argv = " ".join(map(str, flags)).split()
    names = signal.SIGINT, signal.SIGTERM
    handlers = [signal.getsignal(name) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *argv])
        try:
            prepare_data.run_script(module.main)
        except SystemExit as stop:
            return stop.code
        finally:
            for name, handler in zip(names, handlers):
                signal.signal(name, handler)
    return 0


# ----------------------------------------------------------------------------------------------
# Tokenizers


def test_bpe_says_any_text_and_learns_words():
    text = "the cat and the dog and the aaaa bird 12 ☃\n" * 50
    tokenizer = make_tokenizer("bpe:270", text)
    encode, decode = load_tokenizer(tokenizer)
    for words in (text, "Ünseen \t wörds, 漢字 and \x00 bytes", "", "aaaaaaa"):
        assert decode(encode(words)) == words
    assert len(encode(" the")) == 1
    assert len(encode("the the")) < 4
    assert len(encode("12")) == 2  # digits stand alone
    assert tokenizer["end"] == 269
    assert len(set(tokenizer["tokens"])) == 269
    assert END not in decode(encode(text))
    assert 269 not in encode(END)  # a text cannot spell the end


def slow_bpe(words, vocab_size):
    """Byte-pair encoding as it is told: words {bytes: count}."""
    tokens = [bytes([i]) for i in range(256)]
    words = [([bytes([i]) for i in word], count) for word, count in words.items()]
    while len(tokens) < vocab_size:
        pairs = {}
        for parts, count in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] = pairs.get(pair, 0) + count
        order = {token: i for i, token in enumerate(tokens)}
        rank = lambda pair: (-pairs[pair], order[pair[0]], order[pair[1]])
        best = min(pairs, key=rank)
        tokens.append(best[0] + best[1])
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [tokens[-1]]
                i += 1
    return tokens


def test_bpe_merges_the_most_frequent_pair():
    words = {b"aaa": 5, b"aaaaa": 2, b"banana": 3, b"abab": 4, b"bandana": 1, b"aab": 2}
    text = " ".join(word.decode() for word, count in words.items() for _ in range(count))
    counted = {b" " + word: count for word, count in words.items()}
    first = next(iter(words))
    counted[b" " + first] -= 1
    counted[first] = 1
    tokens = prepare_data.learn_bpe(text, 270)
    assert tokens == slow_bpe(counted, 270)


def test_char_tokenizer_refuses_what_it_cannot_say():
    encode, decode = load_tokenizer(make_tokenizer("char", "abca"))
    assert decode(encode("cab")) == "cab"
    with pytest.raises(ValueError, match="'d'"):
        encode("bad")
    assert decode([0, 3, 1]) == f"a{END}b"
    assert decode([0, 4, 1]) == "ab"  # 4 is a mask


GPT2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="GPT-2's vocabulary is not at hand: TIKTOKEN_CACHE_DIR is not set",
)


@GPT2
def test_gpt2_vocabulary(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("Hello world, how are you?\n" * 20)
    meta = prepare("text", tmp_path, input=str(path), tokenizer="gpt2")
    assert meta["vocab_size"] == 50257
    encode, decode = load_tokenizer(meta["tokenizer"])
    assert encode("Hello world") == [15496, 995]
    assert decode([50257, 15496, 50257, 995]) == "Hello world"  # [PAD] is dropped


# ----------------------------------------------------------------------------------------------
# Datasets


def entropy(p):
    """Nats."""
    return -sum(x * math.log(x) for x in p if x)


def write_chain(path, states=12, successors=3, length=60_000):
    """Write a text of letters, a random Markov chain in which each has few successors. Returns the
    entropies, exact: of the first token of a sequence, and of every other."""
    rng = np.random.default_rng(1)
    transitions = np.zeros((states, states))
    for row in transitions:
        row[rng.choice(states, successors, replace=False)] = rng.dirichlet(np.ones(successors))
    lazy = (np.eye(states) + transitions) / 2  # so that a periodic chain converges too
    stationary = np.linalg.matrix_power(lazy, 10_000).mean(0)
    cumulative = transitions.cumsum(1)
    state, text = 0, ""
    for u in rng.random(length):
        text += chr(ord("A") + state)
        state = min(np.searchsorted(cumulative[state], u, side="right"), states - 1)
    path.write_text(text)
    return entropy(stationary), stationary @ [entropy(row) for row in transitions]


def prepare_chain(folder, **chain):
    """folder/text, a chain, and its entropies."""
    path = folder / "chain.txt"
    entropies = write_chain(path, **chain)
    return prepare("text", folder, input=str(path), tokenizer="char"), entropies


@pytest.mark.parametrize("kind", ["char", "bpe:260"])
def test_text_file_round_trip(tmp_path, kind):
    text = "hello wörld\n" * 100
    path = tmp_path / "in.txt"
    path.write_text(text, encoding="utf-8")
    meta = prepare("text", tmp_path, input=str(path), tokenizer=kind)
    tokens, val, _ = open_data(tmp_path / "text")
    assert (len(tokens), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    decode = load_tokenizer(meta["tokenizer"])[1]
    first, second = (decode(part.tolist()).replace(END, "") for part in (tokens, val))
    assert first + second == text
    assert len(first) == len(text) * 9 // 10
    assert meta["bytes_per_token"] == len(second.encode()) / len(val)
    share = np.bincount(val) / len(val)
    assert meta["unigram_nats"] == pytest.approx(entropy(share))


def test_the_same_documents_are_held_out_everywhere():
    assert [i for i in range(60) if part_of(i) == "val"] == [9, 39, 49, 51, 55]


def test_a_folder_of_documents(tmp_path, monkeypatch):
    """pydocs on a library of our own: what is taken, and which part it goes to."""
    for i in range(40):
        text = f"Module {i} has a docstring of more than forty letters, {i}."
        (tmp_path / f"m{i:02}.py").write_text(f'"""{text}"""')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text(f'"""{"Nobody sees this. " * 3}"""')
    (tmp_path / "broken.py").write_text("def :")
    (tmp_path / "short.py").write_text('"""Short."""')
    (tmp_path / "copy.py").write_text((tmp_path / "m00.py").read_text())
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    prepare("pydocs", tmp_path / "data", tokenizer="bpe:300")
    *parts, meta = open_data(tmp_path / "data" / "pydocs")
    decode = load_tokenizer(meta["tokenizer"])[1]
    documents = [decode(part.tolist()).split(END)[:-1] for part in parts]
    joined = "".join(documents[0] + documents[1])
    assert joined.count("Module 0 has") == 1
    assert len(re.findall("more than forty letters", joined)) == 40
    assert "Nobody" not in joined
    assert "Short." not in documents[0] + documents[1]
    assert set(documents[0]).isdisjoint(documents[1])
    assert 0 < len(documents[1]) < len(documents[0]) / 5


def test_alldocs_adds_packages(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(prepare_data, "PACKAGES", ["tqdm", "nowhere"])
    few = set(prepare_data.pydocs())
    more = set(prepare_data.pydocs(prepare_data.PACKAGES))
    assert few < more
    assert any("Decorate an iterable object" in text for text in more - few)


def test_openwebtext_is_streamed(tmp_path, monkeypatch):
    """Documents are written as they come, tokens learned from the first of them."""
    rows = [{"text": f"document {i} " * 5} for i in range(300)]
    hub = SimpleNamespace(load_dataset=lambda name, split, streaming: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    monkeypatch.setattr(prepare_data, "SAMPLE", 100)
    meta = prepare("openwebtext", tmp_path, tokenizer="bpe:262")
    tokens, val, _ = open_data(tmp_path / "openwebtext")
    decode = load_tokenizer(meta["tokenizer"])[1]
    texts = [decode(part.tolist()).split(END)[:-1] for part in (tokens, val)]
    assert sorted(texts[0] + texts[1]) == sorted(row["text"] for row in rows)
    assert meta["bytes_per_token"] == len("".join(texts[1]).encode()) / len(val)


# ----------------------------------------------------------------------------------------------
# Problems


def wording_of(question):
    """A question without its numbers, names and things."""
    names = "|".join(prepare_data.NAMES)
    things = "|".join(prepare_data.THINGS)
    return re.sub(rf"\d+|\b({names})\b|{things}", "_", question)


@pytest.mark.parametrize("difficulty", [2, 3, 4])
def test_math_problems_are_right_and_disjoint(difficulty):
    problems = list(math_problems(difficulty, 400, seed=1))
    sides = {"train": [], "val": []}
    for part, problem in problems:
        sides[part].append(problem)
    assert (len(sides["train"]), len(sides["val"])) == (400, 20)
    both = sides["train"] + sides["val"]
    for question, program in both:
        answer = solve(program)
        assert answer > 0 and answer == int(answer)
        variables = {}
        for line in program.splitlines()[1:-1]:
            exec(line.strip(), {}, variables)  # ours, so Python may
            assert all(x > 0 and x == int(x) for x in variables.values())
        assert variables["result"] == answer
        operations = len(re.findall(r" [-+*/] ", program))
        assert operations == difficulty
    wordings, numbers = [], []
    for part in sides.values():
        wordings.append({wording_of(question) for question, _ in part})
        numbers.append({tuple(re.findall(r"\d+", question)[:2]) for question, _ in part})
    assert wordings[0].isdisjoint(wordings[1])
    assert numbers[0].isdisjoint(numbers[1])
    shapes = {re.sub(r"\d+|\b[a-z]{3}\b", "_", program) for _, program in both}
    assert len(shapes) > 25
    assert problems == list(math_problems(difficulty, 400, seed=1))
    assert problems != list(math_problems(difficulty, 400, seed=2))


def test_held_out_wordings_are_made_of_known_sentences():
    seen = {"train": set(), "val": set()}
    for part, (question, _) in math_problems(2, 1500, seed=0):
        seen[part] |= set(re.split(r"(?<=[.?]) ", wording_of(question)))
    assert seen["val"] <= seen["train"]


def test_rows_of_problems(tmp_path):
    """Question, end, program, ends; as tokens of the texts by themselves."""
    meta = prepare("math", tmp_path, problems=400, seq_len=100, difficulty=3)
    train, val, read = open_data(tmp_path / "math")
    end, L = read["tokenizer"]["end"], read["row_length"]
    assert L == 100 and read["vocab_size"] == 512
    encode, decode = load_tokenizer(read["tokenizer"])
    problems = list(math_problems(3, 400, 0))
    lengths, written = [], {"train": [], "val": []}
    for part, (question, program) in problems:
        row = encode(question) + [end] + encode(program) + [end]
        lengths.append(len(row))
        if len(row) <= L:
            written[part].append(row + [end] * (L - len(row)))
    assert 0 < meta["dropped"] == sum(length > L for length in lengths) < 420
    assert train.reshape(-1, L).tolist() == written["train"]
    assert val.reshape(-1, L).tolist() == written["val"]
    answers = [decode(row).split(END)[1] for row in written["val"]]
    assert all(solve(answer) for answer in answers)
    n_scored = sum(len(encode(answer)) + 1 for answer in answers)
    assert meta["bytes_per_token"] == len("".join(answers)) / n_scored


@pytest.mark.parametrize("library", [np.array, torch.tensor])
def test_is_question(library):
    rows = library([[1, 2, 9, 3, 9, 9], [9, 1, 9, 9, 9, 9], [1, 2, 3, 4, 5, 6]])
    expected = [[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert is_question(rows, 9).tolist() == [[bool(x) for x in row] for row in expected]


def test_problems_of_files(tmp_path):
    """Answers as in GSM8K, and programs."""
    answer = "She has 9 + 9 = <<9+9=18>>18 cakes.\n#### 18"
    rows = [{"question": f"How many are 9 and {i}?", "answer": answer} for i in range(50)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = "def simple_math_problem():\n    return 18"
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "9 and 9?", "answer": code}))
    files = dict(input=f"{tmp_path}/train.jsonl", test=f"{tmp_path}/test.jsonl")
    prepare("problems", tmp_path, **files, tokenizer="bpe:270", seq_len=150)
    train, val, meta = open_data(tmp_path / "problems")
    decode = load_tokenizer(meta["tokenizer"])[1]
    assert decode(train[:150].tolist()).split(END)[:2] == [rows[0]["question"], answer]
    assert decode(val.tolist()).split(END)[:2] == ["9 and 9?", code]
    assert len(train) == 50 * 150


def test_tinygsm_is_streamed(tmp_path, monkeypatch):
    rows = [{"question": f"{i}?", "code": f"return {i}", "more": 0} for i in range(100)]
    hub = SimpleNamespace(load_dataset=lambda name, split, streaming: iter(rows))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    meta = prepare("tinygsm", tmp_path, tokenizer="bpe:260", seq_len=20)
    assert meta["train_tokens"] + meta["val_tokens"] == 2000
    assert meta["row_length"] == 20


# ----------------------------------------------------------------------------------------------
# Answers

ORDINARY = {
    "return 7": 7,
    "x = 3\ny = 4\nreturn x * y": 12,
    "def simple_math_problem():\n    '''How many?'''\n    a = 2\n    return a + 1\n": 3,
    "import math\ndef simple_math_problem():\n    return math.ceil(7 / 2)": 4,
    "def simple_math_problem() -> int:\n    import math\n    return math.floor(3.9)": 3,
    "return math.sqrt(16)": 4,
    "return 7 // 2 + 7 % 4 - 2 ** 3 + 1 / 4": -1.75,
    "return -(-3) + 1": 4,
    "x = 5\nx += 2\nx *= 3\nx -= 1\nx /= 4\nreturn x": 5,
    "return max(1, 5, 3) - min(2, 4) + abs(-3)": 6,
    "return round(2.567, 1) + round(3.4) + int(9.7) + float(1)": 15.6,
    "return 5\nreturn 6": 5,
    "def simple_math_problem():\n    return 5\nprint(6)": 5,
    "return 2 ** -100000": 0,
}


@pytest.mark.parametrize("program", ORDINARY)
def test_ordinary_programs(program):
    assert solve(program) == ORDINARY[program]


NO_ANSWERS = [
    "",
    "no program at all",
    "def simple_math_problem():\n    x = 5\n",  # no return
    "def simple_math_problem():\n    return\n",
    "def simple_math_problem():\n    retu",  # cut off
    "def simple_math_problem():\n    return 5 +",
    "def simple_math_problem(",
    "def another_problem():\n    return 5",
    "def simple_math_problem(x):\n    return 5",
    "return True",
    "return [1]",
    "return unknown",
    "return 1 / 0",
    "return 'five'",
    "return f'{5}'",
    "return None",
    "return 1j",
    "return (-8) ** 0.5",
    "return 1e999",
    "return -1e999",
    "return 1e999 - 1e999",
    "return float('nan')",
    "return float('inf')",
    "return 10 ** 10 ** 10",
    "return 10 ** 10 ** 10 % 7",
    "return (10 ** 10 ** 10) > 1",
    "return 1 << 10 ** 9",
    "return 1 >> 1",
    "return 5 & 4",
    "return ~5",
    "x = 9\nfor i in range(60):\n    x *= x\nreturn x",
    "x = 9\nfor i in range(60):\n    x = x ** 9\nreturn x",
    "return round(5, -10 ** 9) + 10 ** 31",
    "return " + "9" * 1000,
    "return 0x" + "f" * 1000,
    "return [0] * 10 ** 9",
    "return len([0] * 9)",
    "return len([1] + [2])",
    "return 'x' * 10 ** 9",
    "return len('xx')",
    "x = [1]\nx += [2]\nreturn 5",
    "x = [[1, 2], [3, 4]]\nreturn 5",
    "x = [1]\ny = [1]\nx == y\nreturn 5",
    "return sum(range(10 ** 12))",
    "return len(range(10 ** 30))",
    "return sum(i for i in range(9))",
    "return sum([i for i in range(9)])",
    "return [[[0 for i in range(99999)] for j in range(99999)] for k in range(99999)]",
    "return len({i for i in range(9)})",
    "for i in range(10 ** 9):\n    x = i\nreturn 5",
    "for i in range(101):\n    for j in range(101):\n        x = i\nreturn 5",
    "r = range(4000)\nfor i in range(99):\n    s = sum(r)\nreturn s",
    "while True:\n    x = 1\nreturn 5",
    "while 0:\n    x = 1\nreturn 5",
    "def simple_math_problem():\n    return simple_math_problem()",
    "def f():\n    return f()\nreturn f()",
    "return (lambda: 5)()",
    "return (x := 5)",
    "return ().__class__",
    "return ().__class__.__base__.__subclasses__()",
    "return (5).real",
    "return math.pi",
    "return math.factorial(10 ** 9)",
    "return math.__loader__.load_module('os').system('true')",
    "return abs.__self__.exec('1')",
    "import os\nreturn 5",
    "import os as math\nreturn 5",
    "import math as m\nreturn 5",
    "import math, os\nreturn 5",
    "from math import sqrt\nreturn 5",
    "__import__('os').system('true')\nreturn 5",
    "print(5)\nreturn 5",
    "return eval('5')",
    "return getattr(5, 'real')",
    "return open('/etc/passwd')",
    "exec('x = 5')\nreturn x",
    "return max([1, 2], key=abs)",
    "return max(*[1, 2])",
    "return int('5')",
    "return sum([[1], [2]], [])",
    "x = [1, 2]\nx[0] = 5\nreturn 5",
    "x = [1, 2]\nreturn x[0]",
    "x.y = 5\nreturn 5",
    "math.ceil = abs\nreturn 5",
    "x: int = 5\nreturn x",
    "del x\nreturn 5",
    "global x\nreturn 5",
    "class A: pass\nreturn 5",
    "try:\n    x = 1 / 0\nexcept: pass\nreturn 5",
    "with x: pass\nreturn 5",
    "async def simple_math_problem():\n    return 5",
    "yield 5",
    "return await x",
    "raise ValueError",
    "assert 5\nreturn 5",
    "match 5:\n    case 5:\n        return 5",
    "return 5 in [5]",
    "return 5 is 5",
    "return {1: 2}",
    "return (" * 5000,
    "(" * 190,
    "[" * 190,
    "return " + "-" * 1500 + "1",
    "return " + "not " * 400 + "1",
    "return " + "1+" * 990 + "1",
    "return " + "abs(" * 600,
    "x" + ".a" * 900,
    "if 1:" * 300,
    "\x00",
    "\ud800",
    "return 5" + " " * 3000,
    "return 5 #" + "#" * 3000,
    # what programs in general have, and ours do not
    "return not 0",
    "return 2 < 3",
    "x = 3\nif x > 2:\n    x = 10\nreturn x",
    "x = 3\nif x < 2 or x == 4:\n    x = 10\nelif x >= 3:\n    return 30\nreturn x",
    "return 1 if 2 <= 1 else 0.5",
    "return 1 if (0 and 1 / 0) else 2",
    "return 0 and 1 / 0",
    "total = 0\nfor i in range(5):\n    total += i\nreturn total",
    "for i in range(9):\n  for j in range(9):\n    if i * j == 42:\n      return i + j",
    "xs = [1, 2, 3]\nreturn sum(xs)",
    "x = y = 5\nreturn x",
    "x, y = 5, 6\nreturn x",
    "####",
    "#### none",
    "the answer is 18",
]


@pytest.mark.parametrize("program", NO_ANSWERS, ids=range(len(NO_ANSWERS)))
def test_no_answer(program, monkeypatch):
    """Hostile and broken programs: None, after a bounded number of steps."""
    steps = []
    read_expression = prepare_data.read_expression

    def counted(expression, variables):
        steps.append(expression)
        return read_expression(expression, variables)

    monkeypatch.setattr(prepare_data, "read_expression", counted)
    assert len(NO_ANSWERS) >= 60
    assert solve(program) is None
    assert len(steps) <= prepare_data.LONGEST


def test_gsm8k_answers():
    forms = {"18": 18, "1,234": 1234, "$5": 5, "-3": -3, "2.50": 2.5, "$1,000,000.25": 1000000.25}
    for form, number in forms.items():
        assert solve(f"Some words 7.\n#### {form}") == number
        assert solve(f"Some words 7.\n####{form} and more 9") == number
    assert solve("#### 18.") == 18
    assert solve("#### " + "9" * 500) < math.inf


def test_is_right():
    reference = "def simple_math_problem():\n    return 6 / 4"
    assert is_right("#### 1.5", reference)
    assert is_right("return 1.5000000001", reference)
    assert not is_right("return 1.50001", reference)
    assert not is_right("return None", reference)
    assert not is_right("return None", "return None")
    assert is_right("return 0.1 + 0.2 - 0.3", "return 0")


def test_ten_thousand_answers():
    problems = list(math_problems(4, 1000, seed=3))
    answers = [program for _, (_, program) in problems]
    answers += [f"Words.\n#### {i:,}" for i in range(10_000 - len(answers))]
    assert sum(is_right(answer, answer) for answer in answers) == 10_000
    wrong = [answer.replace("return result", "return result + 1") for answer in answers[:1000]]
    assert not any(map(is_right, wrong, answers))


# ----------------------------------------------------------------------------------------------
# Flags, and what users type


@dataclass
class Flags:
    hidden: int = 7
    word: str = "a"  # a | bc: the first or the second
    size: int = 3  # how many, at least 1
    rate: float = 0.5  # 100% of it, at least 0, at most 0.75
    sizes: tuple = (1, 16)  # numbers, at least 1
    names: tuple = ("a",)  # words
    rates: tuple = ()  # numbers, if any
    on: bool = True  # yes
    off: bool = False  # no

    def __post_init__(self):
        check_settings(self)


@dataclass
class MoreFlags:
    path: str = "here"  # where


def read_flags(*argv, **more):
    return parse_flags("What it does.", Flags, MoreFlags, argv=argv, **more)


def test_flags_have_the_types_of_their_defaults():
    values = read_flags()
    assert values == dict(
        word="a",
        size=3,
        rate=0.5,
        sizes=(1, 16),
        names=("a",),
        rates=(),
        on=True,
        off=False,
        path="here",
    )
    argv = "--word=bc --size=4 --rate=0.25 --sizes=2,3 --on=False --off --path=p"
    argv += " --names=x,y --rates=1,0.5"
    values = read_flags(*argv.split())
    assert (values["word"], values["size"], values["rate"]) == ("bc", 4, 0.25)
    assert (list(values["sizes"]), list(values["names"])) == ([2, 3], ["x", "y"])
    assert list(values["rates"]) == [1.0, 0.5]
    assert (values["on"], values["off"], values["path"]) == (False, True, "p")
    assert from_values(Flags, values).size == 4
    assert from_values(MoreFlags, values) == MoreFlags("p")


def test_defaults_of_flags_can_be_others(capsys):
    values = read_flags("--size=4", defaults=dict(size=5, rate=0.1, unknown=1))
    assert (values["size"], values["rate"]) == (4, 0.1)
    with pytest.raises(SystemExit) as stop:
        read_flags("--help", defaults=dict(size=5))
    assert stop.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    for part in ("What it does.", "at least 1 (default: 5)", "100% of it"):
        assert part in words
    assert "hidden" not in words


@pytest.mark.parametrize(
    "flag", ["--nonsense=1", "--size=x", "--siz=4", "--sizes=1,x", "--on=maybe", "--hidden=1", "x"]
)
def test_flags_refuse(flag):
    with pytest.raises(ValueError, match="--help lists the flags"):
        read_flags(flag)


@pytest.mark.parametrize(
    "change",
    [
        dict(word="c"),
        dict(size=0),
        dict(size=math.nan),
        dict(sizes=(2, 0)),
        dict(rate=math.nan),
        dict(rate=0.76),
    ],
)
def test_settings_out_of_bounds(change):
    [name] = change
    with pytest.raises(ValueError, match=name):
        Flags(**change)


def refused_data(capsys, folder, flags):
    """The one line that prepare_data.py says as it refuses; nothing is left behind."""
    data = folder / "data"
    assert call(prepare_data, flags.replace("DIR", str(folder)), f"--data_dir={data}") == 2
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert line.startswith("prepare_data.py: ")
    assert not data.exists() or not list(data.iterdir())
    return line


@pytest.mark.parametrize(
    "flags, word",
    [
        ("nonsense", "no dataset nonsense"),
        ("text", "--input"),
        ("text --input=nowhere", "nowhere"),
        ("text --input=DIR", "directory"),
        ("text --input=DIR/binary", "utf-8"),
        ("text --input=DIR/empty --tokenizer=char", "empty"),
        ("text --input=DIR/short", "too small"),
        ("text --input=DIR/small", "too small"),
        ("text --input=DIR/small --tokenizer=words", "tokenizer"),
        ("text --input=DIR/small --tokenizer=bpe:200", "bpe:SIZE"),
        ("text --input=DIR/small --tokenizer=nowhere.json", "nowhere.json"),
        ("math --difficulty=5", "difficulty"),
        ("math --problems=400 --seq_len=10", "seq_len"),
        ("problems", "--input"),
        ("problems --input=DIR/good", "--test"),
        ("problems --input=DIR/good --test=DIR/rows", "line 2"),
        ("problems --input=DIR/good --test=DIR/small", "line 1"),
        ("openwebtext", "datasets"),
        ("tinygsm", "datasets"),
        ("shakespeare", "no network"),
    ],
)
def test_prepare_data_refuses(tmp_path, capsys, monkeypatch, flags, word):
    row = json.dumps({"question": "How many?", "answer": "#### 5"})
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("a")
    (tmp_path / "small").write_text("abcdefgh" * 4)
    (tmp_path / "good").write_text(row)
    (tmp_path / "rows").write_text(f'{row}\n{{"question": "How?"}}')
    monkeypatch.setitem(sys.modules, "datasets", None)

    def no_network(*args, **more):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    assert word in refused_data(capsys, tmp_path, flags)


def test_shakespeare_is_downloaded(tmp_path, monkeypatch):
    class Reply:
        read = staticmethod(lambda: b"To be, or not to be" * 50)

    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **more: Reply)
    meta = prepare("shakespeare", tmp_path, tokenizer="char")
    assert meta["train_tokens"] + meta["val_tokens"] == 19 * 50 + 2  # end tokens


def test_what_is_no_dataset_is_not_replaced(tmp_path, capsys):
    (tmp_path / "math").mkdir()
    (tmp_path / "math" / "book.txt").write_text("precious")
    assert call(prepare_data, f"math --problems=400 --data_dir={tmp_path}") == 2
    assert "no dataset" in capsys.readouterr().err
    assert (tmp_path / "math" / "book.txt").read_text() == "precious"


def test_a_failure_leaves_the_old_dataset(tmp_path, monkeypatch):
    prepare_chain(tmp_path, length=1000)
    before = (tmp_path / "text" / "train.bin").read_bytes()

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr("json.dump", broken)
    with pytest.raises(OSError, match="disk full"):
        prepare_chain(tmp_path, length=2000)
    assert (tmp_path / "text" / "train.bin").read_bytes() == before
    monkeypatch.undo()
    assert prepare_chain(tmp_path, length=2000)[0]["val_tokens"] == 201  # and an end token
    assert set(os.listdir(tmp_path)) == {"text", "chain.txt"}


def test_prepare_data_tells_what_it_made(tmp_path, capsys):
    assert call(prepare_data, f"math --problems=400 --seq_len=80 --data_dir={tmp_path}") == 0
    out = capsys.readouterr().out
    meta = open_data(tmp_path / "math")[2]
    assert meta == json.loads((tmp_path / "math" / "meta.json").read_text())
    assert f"{meta['train_tokens']:,}" in out
    assert f"dropped: {meta['dropped']}" in out


def test_prepare_data_in_a_place_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call(prepare_data, f"math --problems=400 --data_dir={tmp_path}/file") == 2
    assert "file" in capsys.readouterr().err


def test_damaged_datasets_are_refused(tmp_path):
    folder = tmp_path / "text"
    with pytest.raises(ValueError, match="prepare_data.py"):
        open_data(folder)
    prepare_chain(tmp_path, length=1000)
    with open(folder / "val.bin", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="damaged"):
        open_data(folder)
    (folder / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        open_data(folder)


# ----------------------------------------------------------------------------------------------
# Training

SMALL = """
    --dataset=text --seq_len=24 --n_layer=1 --n_head=2 --n_embd=16 --dropout=0.1 --device=cpu
    --batch_size=8 --block_sizes=1,5 --eval_interval=1000 --eval_seqs=8
"""
PROBLEMS = "--dataset=math --seq_len=128"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with a Markov chain, and problems."""
    folder = tmp_path_factory.mktemp("data")
    prepare_chain(folder)
    prepare("math", folder, problems=600)
    return folder


@pytest.fixture(autouse=True)
def signals():
    """Take back from train.py what it does with signals."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)



def load_rows(data_dir, name, length):
    return train.load_data(SimpleNamespace(data_dir=data_dir, dataset=name), length)


def train_flags(data_dir, out, *more):
    return " ".join([SMALL, f"--data_dir={data_dir} --out_dir={out}", *more])


def run_training(data_dir, out, *flags):
    """Run train.py; the content of its checkpoint."""
    assert call(train, train_flags(data_dir, out, *flags)) == 0
    return read_checkpoint(out / "ckpt.pt")


@pytest.fixture
def start(data_dir, tmp_path):
    """A function that makes the (run, args) of some flags, without running it."""

    def make(*flags):
        argv = train_flags(data_dir, tmp_path / "out", *flags).split()
        args, config = train.read_flags(argv)
        return train.start(args, config), args

    return make


def leaves(x):
    """Everything in nested dicts and lists, as tensors."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list):
        return [leaf for part in x for leaf in leaves(part)]
    return [torch.as_tensor(x)]


def same(a, b):
    """Equal, bit for bit."""
    return all(map(torch.equal, leaves(a), leaves(b)))


def state(content):
    """All of a checkpoint that training goes on from."""
    kept = [content[name] for name in ("model", "average", "best", "best_loss", "step")]
    return kept + [optimizer["state"] for optimizer in content["optimizers"]]


def at_step(monkeypatch, step, change):
    """Let the result of a training step be change(result)."""
    original = train.train_step

    def changed(run, args):
        result = original(run, args)
        return change(result) if run.step == step else result

    monkeypatch.setattr(train, "train_step", changed)


def interrupt(result):
    os.kill(os.getpid(), signal.SIGTERM)
    return result


@pytest.mark.parametrize("step", [6, 7])  # behind step 7 stands an evaluation
@pytest.mark.parametrize("flags", ["--noise=masked", "--noise=uniform --ar=paper", PROBLEMS])
def test_resuming_equals_not_interrupting(data_dir, tmp_path, monkeypatch, flags, step):
    """Bit for bit, with the log. The interruption is a signal in the middle of the run."""
    flags += " --max_iters=12 --eval_interval=4"
    whole, part = tmp_path / "whole", tmp_path / "part"
    expected = run_training(data_dir, whole, flags)
    at_step(monkeypatch, step, interrupt)
    stopped = run_training(data_dir, part, flags)
    assert stopped["step"] == step + 1
    assert not same(stopped["model"], expected["model"])
    monkeypatch.undo()
    assert call(train, f"--resume --out_dir={part} --device=cpu") == 0
    assert same(state(read_checkpoint(part / "ckpt.pt")), state(expected))
    assert (part / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()


@pytest.mark.parametrize("flags", ["--ar=paper", PROBLEMS])
def test_parts_change_nothing(data_dir, tmp_path, flags):
    """Four parts a step do what the whole batch does at once.

    A gradient is a sum in another order, which differs by 1e-6 of the largest. AdamW divides each
    by its own size: of the smallest, that makes 1e-4 of a step. The bounds have room for a factor
    of 80. (Muon in bfloat16 made it 3e-2 of a step on another CPU.) An error moves weights by
    steps."""
    flags += " --max_iters=2 --dropout=0 --grad_clip=0"  # a clipped gradient hides its scale
    flags += " --optimizer=adamw --learning_rate=1e-3 --warmup_iters=1"
    one = run_training(data_dir, tmp_path / "one", flags)
    parts = run_training(data_dir, tmp_path / "parts", flags, "--grad_accum=4")
    moments, expected = (x["optimizers"][0]["state"].values() for x in (parts, one))
    for a, b in zip(moments, expected):  # exp_avg: an average of the gradients
        scale = b["exp_avg"].abs().max()
        assert close(a["exp_avg"], b["exp_avg"], 1e-4 * scale)
    for name, weight in one["model"].items():
        assert close(parts["model"][name], weight, 1e-2 * 1e-3)


def test_batches_are_stratified(start):
    run, args = start("--block_sizes=1,5,24 --block_weights=0.25,0.5,0.25 --ar=paper")
    for run.step in range(20):
        batch = train.draw_batch(run, args, torch.arange(8))
        parts = [train.draw_batch(run, args, rows) for rows in torch.arange(8).chunk(2)]
        assert same(batch, [torch.cat(pair) for pair in zip(*parts)])
        _, sizes, t, _, _ = batch
        assert sorted(sizes.tolist()) == [1, 1, 5, 5, 5, 5, 24, 24]
        levels = t[sizes == 5][:, ::5].flatten().sort().values
        twentieth = torch.tensor((1 - args.t_min) / 20)
        assert close(levels.diff(), twentieth, 1e-6)  # one level in each


def test_rows_of_a_dataset(data_dir):
    """Of problems, each is one; of a text there is one at every position."""
    problems, _, _ = prepare_data.open_data(data_dir / "math")
    rows, _, _ = load_rows(data_dir, "math", 128)
    assert np.array_equal(rows, problems.reshape(-1, 128))
    text, _, _ = prepare_data.open_data(data_dir / "text")
    rows, _, _ = load_rows(data_dir, "text", 24)
    assert len(rows) == len(text) - 23
    assert np.array_equal(rows[1000], text[1000:1024])


def test_learning_rate():
    args = train.Settings(learning_rate=2.0, warmup_iters=10, max_iters=1000)
    assert train.learning_rate(args, 0) == pytest.approx(0.2)
    assert train.learning_rate(args, 500) == pytest.approx(1.0)  # half of the cosine
    assert train.learning_rate(args, 999) < 1e-4
    args.lr_decay = "constant"
    assert [train.learning_rate(args, step) for step in (4, 500, 999)] == [1.0, 2.0, 2.0]


def test_under_shift_every_row_has_block_size_1():
    sizes, weights, ar_weight = train.sizes_of_rows([1, 5, 24], [0.25, 0.5, 0.25], "shift")
    assert sizes.tolist() == [5, 24]
    assert weights.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert ar_weight == 0.25


def test_a_batch_of_problems_is_its_rows(start):
    """Questions of different lengths: they are neither noised nor scored, and the loss of a row is
    the mean over its answer, whatever stands beside it."""
    run, args = start(PROBLEMS, "--dropout=0")
    batch = train.draw_batch(run, args, torch.arange(8))
    total = 0
    for x0, size, t, u, given in zip(*batch):
        length = given.sum()
        assert given[:length].all()
        assert x0[given].tolist().index(run.meta["tokenizer"]["end"]) == length - 1
        row = x0[None], size[None], t[None], u[None], given[None]
        with torch.no_grad():
            losses = run.model.token_losses(*row, args.loss, run.ar_weight)[0]
        assert not losses[given].any()
        total += losses.sum() / (128 - length) / 8
    assert batch[-1].sum(1).unique().numel() > 4
    loss, _ = train.train_step(run, args)
    assert close(loss, total, 1e-4)


@BOTH
@pytest.mark.parametrize("name, L, V", [("text", 24, 13), ("math", 128, 512)])
@torch.no_grad()
def test_validation(data_dir, name, L, V, ar):
    """It depends on neither batch size nor call. At block size 1 it is the exact likelihood, here
    token by token through the cache; of problems, that of the answer."""
    _, data, meta = load_rows(data_dir, name, L)
    model = tiny(vocab_size=V, seq_len=L, ar=ar)
    for S in (1, 5, L):
        (a, _), (b, _) = (train.evaluate(model, data, meta, S, 11, 3, size) for size in (1, 64))
        assert a.shape == (11,)
        assert close(a, b, 1e-4)
    exact, lengths = train.evaluate(model, data, meta, 1, 2)
    x0, given = train.read_rows(data, torch.tensor([0, len(data) - 1]), meta)
    cache, nats = model.new_cache(2), []
    for i in range(L):
        commit = x0[:, i - 1 : i] if i else None
        logits = model.denoise(torch.full((2, 1), V), cache, commit)
        nats.append(F.cross_entropy(logits[:, 0], x0[:, i], reduction="none"))
    scored = torch.stack(nats, 1) * ~given
    assert close(exact, scored.sum(1) / (~given).sum(1), 1e-3)
    assert lengths.tolist() == (~given).sum(1).tolist()


BROKEN = [(math.nan, 1, "nan"), (2, math.inf, "inf"), (math.inf, 1, "inf")]


@pytest.mark.parametrize("flags", ["--max_iters=10", "--max_iters=7", "--eval_interval=7"])
@pytest.mark.parametrize("loss, norm, word", BROKEN)
def test_a_broken_loss_stops_the_run(
    data_dir, tmp_path, monkeypatch, capsys, loss, norm, word, flags
):
    """It is read a step later, but before anything is saved."""
    good = run_training(data_dir, tmp_path, "--max_iters=4")
    at_step(monkeypatch, 6, lambda result: torch.tensor([loss, norm]))
    assert call(train, f"--resume --device=cpu --max_iters=12 --out_dir={tmp_path}", flags) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: stopped at step 6")
    assert word in error
    assert same(state(read_checkpoint(tmp_path / "ckpt.pt")), state(good))


def test_best_weights(data_dir, tmp_path, monkeypatch):
    """Validation gets worse on purpose, by the weighted mean of the block sizes. A sample takes the
    weights that did best, --resume goes on from the last."""
    figures = iter([1.0, 3.0, 5.0, 1.0, 4.0, 4.0, 4.0, 4.0])  # S = 1, S = 5, and so on
    averages = []

    def evaluate(model, *more):
        averages.append(copy.deepcopy(model.state_dict()))
        return torch.full((2,), next(figures)), torch.full((2,), 24)

    monkeypatch.setattr(train, "evaluate", evaluate)
    flags = "--block_weights=0.25,0.75 --max_iters=6 --eval_interval=2 --lr_decay=constant"
    content = run_training(data_dir, tmp_path, flags)
    best = averages[2]  # the second of three evaluations, two block sizes each
    assert same(content["best"], best)
    assert same(content["average"], averages[-1])
    assert not same(best, averages[-1])
    assert content["best_loss"] == 2
    assert call(train, f"--resume --device=cpu --max_iters=8 --out_dir={tmp_path}") == 0
    model, content = load_checkpoint(tmp_path / "ckpt.pt")
    assert same(model.state_dict(), best)
    assert content["step"] == 8
    monkeypatch.undo()
    straight = run_training(data_dir, tmp_path / "straight", flags, "--max_iters=8")
    last = read_checkpoint(tmp_path / "ckpt.pt")
    for name in ("model", "average"):
        assert same(last[name], straight[name])


def test_training_starts_from_a_checkpoint(data_dir, tmp_path):
    """--init_from: a mixture of block sizes from the best weights of an AR model. --resume does not
    need that file again."""
    first = tmp_path / "ar"
    before = run_training(data_dir, first, "--max_iters=3 --block_sizes=1")
    flags = f"--max_iters=1 --learning_rate=0 --init_from={first}/ckpt.pt"
    after = run_training(data_dir, tmp_path, flags)
    assert same(after["model"], before["best"])
    flags = ["--device=cpu", f"--init_from={first}/ckpt.pt", "--dropout=0.5"]
    args, config = train.read_flags(flags)  # the flags of the model alone are the checkpoint's
    assert (config.n_head, config.seq_len, config.dropout) == (2, 24, 0.5)
    assert args.batch_size == train.Settings.batch_size
    os.remove(first / "ckpt.pt")
    assert call(train, f"--resume --device=cpu --max_iters=2 --out_dir={tmp_path}") == 0


@pytest.fixture(scope="session")
def learned(data_dir, tmp_path_factory):
    """Folders with small models that have learned the Markov chain, by noise."""
    flags = """
        --max_iters=300 --n_embd=32 --seq_len=32 --batch_size=16 --learning_rate=0.01 --dropout=0
        --warmup_iters=20 --eval_seqs=64 --block_sizes=1,4
    """
    folders = {noise: tmp_path_factory.mktemp(noise) for noise in NOISES}
    for noise, folder in folders.items():
        run_training(data_dir, folder, flags, f"--noise={noise}")
    return folders


@pytest.mark.parametrize("noise", NOISES)
def test_model_learns_a_markov_chain(data_dir, learned, tmp_path, noise):
    """It all hangs together: soon far below the unigram entropy, near the chain's own, and never
    below it."""
    meta = open_data(data_dir / "text")[2]
    of_first, of_others = write_chain(tmp_path / "again.txt")
    truth = (of_first + 31 * of_others) / 32
    above = meta["unigram_nats"] - truth
    lines = (learned[noise] / "log.jsonl").read_text().splitlines()
    validation = {}
    for line in map(json.loads, lines[-2:]):
        validation[line["block_size"]] = line["val"]
    for S, share in ((1, 0.35), (4, 0.6)):
        assert truth - 0.05 < validation[S] < truth + share * above


# ----------------------------------------------------------------------------------------------
# What users type


@pytest.fixture(scope="session")
def checkpoint(data_dir, tmp_path_factory):
    """Of the Markov chain."""
    out = tmp_path_factory.mktemp("out")
    run_training(data_dir, out, "--max_iters=2")
    return out / "ckpt.pt"


@pytest.fixture(scope="session")
def solver(data_dir, tmp_path_factory):
    """A checkpoint of problems."""
    out = tmp_path_factory.mktemp("solver")
    run_training(data_dir, out, PROBLEMS, "--max_iters=2")
    return out / "ckpt.pt"


def refused(capsys, module, *flags):
    """The one line that a script says as it exits with status 2."""
    assert call(module, *flags) == 2
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{module.__name__}.py: ")
    return lines[0]


TRAIN_REFUSES = [
    ("--nonsense", "nonsense"),
    ("shakespeare", "shakespeare"),
    ("--max_iter=5", "max_iter"),
    ("--block_size=1,5", "block_size"),
    ("--block_sizes=0,5", "block_sizes"),
    ("--block_sizes=", "block_sizes"),
    ("--block_weights=0.5,-0.5", "block_weights"),
    ("--block_weights=1", "block_weights"),
    ("--block_weights=0,1", "block_weights"),
    ("--max_iters=0", "max_iters"),
    ("--max_iters=x", "max_iters"),
    ("--max_iters", "max_iters"),
    ("--batch_size=1e3", "batch_size"),
    ("--n_embd=17", "n_embd"),
    ("--n_head=0", "n_head"),
    ("--dropout=1", "dropout"),
    ("--learning_rate=-1", "learning_rate"),
    ("--learning_rate=nan", "learning_rate"),
    ("--beta2=1", "beta2"),
    ("--ema=1", "ema"),
    ("--eval_seqs=1", "eval_seqs"),
    ("--seed=x", "seed"),
    ("--seed=99999999999999999999", "seed"),
    ("--tied=maybe", "tied"),
    ("--noise=gaussian", "noise"),
    ("--schedule=cubic", "schedule"),
    ("--ar=none", "ar"),
    ("--token_causal=false", "ar must be paper"),
    ("--loss=ce --noise=uniform", "masked"),
    ("--preset=huge", "preset"),
    ("--dtype=float16", "dtype"),
    ("--compile=maybe", "compile"),
    ("--device=tpu", "device"),
    ("--device=cuda:0", "device"),
    ("--dataset=nowhere", "prepare_data.py"),
    ("--dataset=math", "--seq_len=128"),
    ("--seq_len=7000", "too small"),
    ("--seq_len=1 --block_sizes=1", "seq_len"),
    ("--resume", "no checkpoint"),
    ("--init_from=nowhere.pt", "nowhere.pt"),
    ("--eval_only", "no checkpoint"),
]


@pytest.mark.parametrize("flags, word", TRAIN_REFUSES)
def test_train_refuses(data_dir, tmp_path, capsys, flags, word):
    out = tmp_path / "out"
    assert word in refused(capsys, train, train_flags(data_dir, out, flags))
    assert not out.exists()


SAMPLE_REFUSES = [
    ("--nonsense", "nonsense"),
    ("--block_size=0", "block_size"),
    ("--steps=0", "steps"),
    ("--steps=2.5", "steps"),
    ("--sampler=gibbs", "sampler"),
    ("--sampler=arpc --criterion=luck", "criterion"),
    ("--temperature=-1", "temperature"),
    ("--temperature=nan", "temperature"),
    ("--top_k=-1", "top_k"),
    ("--threshold=2", "threshold"),
    ("--guide_every=0", "guide_every"),
    ("--length=25", "24"),
    ("--length=-1", "length"),
    ("--num_samples=0", "num_samples"),
    ("--batch_size=0", "batch_size"),
    ("--seed=99999999999999999999", "seed"),
    ("--prompt=AAAAAAAAAAAAAAAAAAAAAAAAA", "prompt"),
    ("--prompt=AB --length=1", "prompt"),
    ("--prompt=é", "vocabulary"),
    ("--template=A__é", "vocabulary"),
    ("--template=A__ --length=2", "prompt"),
    ("--prompt=A --template=A__", "template"),
    ("--problem=3 --prompt=A", "problem"),
    ("--problem=3", "no problems"),
    ("--problem=-2", "problem"),
    ("--device=tpu", "device"),
    ("--device=cuda:0", "device"),
    ("--ckpt=nowhere.pt", "nowhere.pt"),
]


@pytest.mark.parametrize("flags, word", SAMPLE_REFUSES)
def test_sample_refuses(checkpoint, capsys, flags, word):
    assert word in refused(capsys, sample, f"--ckpt={checkpoint}", flags)


@pytest.mark.parametrize("flags", ["--problem=60", "--table --num_samples=61"])
def test_there_is_no_such_problem(solver, capsys, flags):
    assert "problem" in refused(capsys, sample, f"--ckpt={solver}", flags)


def test_damaged_checkpoints_are_refused(checkpoint, tmp_path, capsys):
    whole = checkpoint.read_bytes()
    bad = tmp_path / "ckpt.pt"
    flags = f"--ckpt={bad}"
    for junk in (b"", b"text", whole[: len(whole) // 2]):
        bad.write_bytes(junk)
        assert "ckpt.pt" in refused(capsys, sample, flags)
    content = torch.load(checkpoint)
    save_checkpoint(bad, **content | {"config": {"unknown": 1}})
    assert "ckpt.pt" in refused(capsys, sample, flags)
    assert "ckpt.pt" in refused(capsys, train, f"--resume --device=cpu --out_dir={tmp_path}")


def test_a_checkpoint_of_another_shape_is_refused(data_dir, checkpoint, tmp_path, capsys):
    flags = f"--device=cpu --n_embd=32 --data_dir={data_dir}"
    resume = f"--resume --out_dir={checkpoint.parent}"
    assert "does not fit" in refused(capsys, train, flags, resume)
    for flag in ("--n_head=4", "--optimizer=adamw"):
        assert "no flag changes" in refused(capsys, train, flag, "--device=cpu", resume)
    start = f"--dataset=text --out_dir={tmp_path} --init_from={checkpoint}"
    assert "does not fit" in refused(capsys, train, flags, start)


def test_a_checkpoint_of_other_data_is_refused(data_dir, checkpoint, tmp_path, capsys):
    flags = f"--device=cpu --data_dir={data_dir} --dataset=math"
    start = f"--out_dir={tmp_path} --init_from={checkpoint} --seq_len=128"
    assert "another tokenizer" in refused(capsys, train, flags, start)
    evaluation = f"--eval_only --out_dir={checkpoint.parent} --dataset=math"
    assert "seq_len" in refused(capsys, train, flags, evaluation)


def test_data_of_another_tokenizer_are_refused(data_dir, checkpoint, tmp_path, capsys):
    prepare_chain(tmp_path, states=11, length=5000)
    other = f"--data_dir={tmp_path} --device=cpu --out_dir={checkpoint.parent}"
    assert "another tokenizer" in refused(capsys, train, other, "--eval_only")
    assert "another tokenizer" in refused(capsys, train, other, "--resume")
    remade = tmp_path / "ckpt.pt"
    content = torch.load(checkpoint)
    content["args"]["data_dir"] = str(tmp_path)
    save_checkpoint(remade, **content)
    assert "another tokenizer" in refused(capsys, sample, f"--ckpt={remade} --table")


def test_problems_are_made_as_long_as_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "prepare", partial(prepare, problems=200))
    _, _, meta = train.load_data(SimpleNamespace(data_dir=str(tmp_path), dataset="math"), 160)
    assert meta["row_length"] == 160


def test_damaged_data_are_refused(data_dir, tmp_path, capsys):
    shutil.copytree(data_dir / "text", tmp_path / "text")
    flags = train_flags(tmp_path, tmp_path / "out")
    os.truncate(tmp_path / "text" / "val.bin", 100)
    assert "damaged" in refused(capsys, train, flags)
    for junk in ("{}", "junk"):
        (tmp_path / "text" / "meta.json").write_text(junk)
        assert "damaged" in refused(capsys, train, flags)


def test_no_write_permission_is_one_line(data_dir, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert "file" in refused(capsys, train, train_flags(data_dir, file))


SAMPLE_FLAGS = [
    "",
    "--sampler=ar",
    "--sampler=arpc --criterion=tvd",
    "--sampler=confidence",
    "--sampler=speculative",
    "--block_size=1000",  # as much as there is
]


def printed_samples(capsys):
    """The texts that sample.py has printed, and the lines of statistics between them."""
    *texts, last = capsys.readouterr().out.split("\n" + "-" * 80 + "\n")
    return texts, last


@pytest.mark.parametrize("flags", SAMPLE_FLAGS)
def test_samples_and_their_statistics(checkpoint, capsys, flags):
    more = f"--ckpt={checkpoint} --num_samples=3 --batch_size=2"
    assert call(sample, more, flags) == 0
    texts, last = printed_samples(capsys)
    assert len(texts) == 3
    first_batch, third = texts[2].split("\n", 1)
    for text in (*texts[:2], third):
        assert len(text.replace(END, ".")) <= 24  # end tokens at its end are left out
    for statistics in (first_batch, last):
        assert statistics.startswith("nfe ") and "seconds" in statistics


def test_prompts_and_templates(checkpoint, capsys):
    flags = f"--ckpt={checkpoint} --num_samples=2"
    assert call(sample, flags, "--template=A__B____") == 0
    for text in printed_samples(capsys)[0]:
        assert text[0] + text[3] == "AB"
        assert len(text) == 8
    assert call(sample, flags, "--prompt=AB --block_size=5 --sampler=arpc --watch") == 0
    out = capsys.readouterr().out
    assert "\033" not in out  # colors are for a terminal
    assert out.count("\nAB") == 2


def test_a_problem_and_its_answer(data_dir, solver, capsys, monkeypatch):
    """The question, every pass, the program, its value, the verdict: also of the right answer,
    which this model does not find."""
    _, val, meta = prepare_data.open_data(data_dir / "math")
    problem = torch.from_numpy(val.reshape(-1, 128)[17].astype(np.int64))
    _, decode = prepare_data.load_tokenizer(meta["tokenizer"])
    question, program = decode(problem.tolist()).split(prepare_data.END)[:2]
    flags = f"--ckpt={solver} --problem=17 --watch --steps=2"
    assert call(sample, flags) == 0
    out = capsys.readouterr().out
    assert question in out
    assert "= None, wrong" in out
    passes = [line for line in out.splitlines() if " | " in line]
    assert len(passes) > 4
    original = sample.generate

    def knows(*args, **options):
        return problem[None], original(*args, **options)[1]

    monkeypatch.setattr(sample, "generate", knows)
    assert call(sample, flags) == 0
    out = capsys.readouterr().out
    assert f"{question}\n{program}" in out
    assert f"= {prepare_data.solve(program)}, right" in out


@pytest.mark.parametrize("right", [False, True])
def test_accuracy_of_every_sampler(data_dir, solver, capsys, monkeypatch, right):
    """The table, with samples replaced by the reference answers, or by those of other problems."""
    _, val, _ = prepare_data.open_data(data_dir / "math")
    rows = torch.from_numpy(val.reshape(-1, 128)[:4].astype(np.int64))
    stats = dict(nfe=7, tokens=100, seconds=1.0)

    def generate(model, n, length, *, first_row, given, **options):
        answers = rows if right else rows.roll(1, 0)
        answers = answers[first_row : first_row + n]
        return torch.where(given >= 0, given, answers), stats

    monkeypatch.setattr(sample, "generate", generate)
    flags = f"--ckpt={solver} --table --num_samples=4 --batch_size=3"
    assert call(sample, flags) == 0
    lines = capsys.readouterr().out.splitlines()
    names = tuple(SAMPLERS)
    rows = [line.split() for line in lines if line.startswith(names) and "passes" not in line]
    assert len(rows) == len(sample.GRID)
    for row in rows:
        assert float(row[-3]) == right  # then its error, entropy


@pytest.mark.parametrize("flags", ["", "--plot"])
def test_a_table_of_every_sampler(checkpoint, tmp_path, capsys, flags):
    if flags:
        pytest.importorskip("matplotlib")
        flags = f"--plot={tmp_path}/x.png --ckpt={checkpoint},{checkpoint}"  # two panels
    assert call(sample, f"--ckpt={checkpoint} --table --num_samples=2 --length=8", flags) == 0
    assert "arpc kld 8" in capsys.readouterr().out
    assert flags == "" or (tmp_path / "x.png").stat().st_size > 1000


def test_defaults():
    args, config = train.read_flags(["--device=cpu"])
    assert config == Config()
    assert args == train.Settings(device="cpu")


def test_preset_of_the_paper():
    """The authors' recipe. Given flags beat it."""
    flags = ["--device=cpu", "--preset=paper"]
    args, config = train.read_flags(flags)
    assert (config.n_layer, config.n_embd, config.seq_len) == (12, 768, 1024)
    assert (config.noise, config.ar, config.tied) == ("masked", "paper", False)
    assert (args.loss, args.beta2, args.optimizer) == ("ce", 0.999, "adamw")
    uniform = ["--noise=uniform", "--loss=nelbo", "--beta2=0.9"]
    args, config = train.read_flags([*flags, *uniform])
    assert (args.loss, args.beta2, config.noise) == ("nelbo", 0.9, "uniform")


def test_resume_takes_the_flags_of_the_checkpoint(data_dir, checkpoint):
    flags = [f"--out_dir={checkpoint.parent}", "--resume", "--device=cpu", "--max_iters=9"]
    args, config = train.read_flags(flags)
    assert (args.max_iters, args.batch_size, args.dataset) == (9, 8, "text")
    assert list(args.block_sizes) == [1, 5]
    assert (args.data_dir, config.n_embd) == (str(data_dir), 16)


SPIN = """
import os, sys
class Finder:
    def find_spec(self, name, *more):
        if name == "torch":
            print(os.environ["GOMP_SPINCOUNT"], flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
import """


@pytest.mark.parametrize("module", ["train", "sample", "blockgen"])
@pytest.mark.parametrize("chosen", [None, "7"])
def test_threads_do_not_spin_for_ever(module, chosen):
    """OpenMP reads it when torch is loaded, so it is set before; what the user has set stays."""
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    if chosen:
        env["GOMP_SPINCOUNT"] = chosen
    command = [sys.executable, "-c", SPIN + module]
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE, env=env)
    assert run.stdout.strip() == (chosen or "5000"), run.stderr


# ----------------------------------------------------------------------------------------------
# Likelihood


def test_draws_are_averaged_and_differ(data_dir, learned):
    model, _ = load_checkpoint(learned["masked"] / "ckpt.pt")
    _, data, meta = load_rows(data_dir, "text", 32)
    sums = [torch.zeros(4)]
    for draws in (1, 2, 3):
        nats, _ = train.evaluate(model, data, meta, 4, 4, draws)
        sums.append(draws * nats)
    each = [after - before for before, after in zip(sums, sums[1:])]
    for one, other in itertools.combinations(each, 2):
        assert (one > 0).all()
        assert not close(one, other, 0.01)


def levels(kind, trial, rows):
    """Noise levels t (8, 32): stratified, constant in a block of four or in a row; or independent
    from row to row."""
    if kind == "independent":
        u = random_numbers((trial, 0), rows, 1)
        return 1e-3 + (1 - 1e-3) * u.expand(8, 32)
    size = torch.full((8,), 4 if kind == "a block" else 32)
    t, _ = draw_noise([trial], rows, rows / 8, size, 32, t_min=1e-3)
    return t


@pytest.mark.parametrize("noise", NOISES)
def test_noise_levels_of_blocks_and_of_rows(data_dir, learned, noise):
    """They estimate the same NELBO. TRIALS=5000 and -s print how their variances compare, and those
    of their gradients."""
    trials = int(os.environ.get("TRIALS", 60))
    model, _ = load_checkpoint(learned[noise] / "ckpt.pt")
    data, _, meta = load_rows(data_dir, "text", 32)
    rows = torch.arange(8)
    x0, given = train.read_rows(data, rows * 3200, meta)
    found = {}
    for kind in ("a block", "a row", "independent"):
        losses, gradients = [], []
        for trial in range(trials):
            t = levels(kind, trial, rows)
            u = random_numbers((trial, 2), rows, 32)
            loss = model.token_losses(x0, torch.full((8,), 4), t, u, given).mean()
            gradient = torch.autograd.grad(loss, list(model.parameters()))
            gradients.append(torch.cat([g.flatten() for g in gradient]))
            losses.append(loss.detach())
        variance = torch.stack(gradients).var(0).sum()
        found[kind] = torch.stack(losses), variance
    first, variance = found["a block"]
    for kind, (losses, of_gradients) in found.items():
        ratio, of_gradients = losses.var() / first.var(), of_gradients / variance
        print(f"\n{noise}, {kind}: variance {ratio:.2f}, of the gradient {of_gradients:.2f}")
        error = ((first.var() + losses.var()) / trials) ** 0.5
        assert abs(first.mean() - losses.mean()) < 5 * error


def printed_likelihood(capsys):
    """{block size or name: [nats, error, bits, perplexity]}"""
    rows = {}
    for line in capsys.readouterr().out.splitlines()[1:]:
        name, _, figures = line.strip().rpartition(": ")
        rows[name] = list(map(float, re.findall(r"[\d.]+", figures)))
    return rows


def test_likelihood_tables(learned, capsys):
    """A checkpoint knows where its data are. Twice the same."""
    for folder in learned.values():
        flags = f"--eval_only --out_dir={folder} --eval_draws=2 --eval_seqs=16"
        sizes = "--eval_block_sizes=1,2,99"
        assert call(train, flags, sizes) == 0
        rows = printed_likelihood(capsys)
        nats = {name: figures[0] for name, figures in rows.items()}
        bounds = {"mixture: Jensen", "mixture: log-sum-exp"}
        assert set(nats) == {"1", "2", "4", "32"} | bounds
        assert nats["mixture: Jensen"] == pytest.approx((nats["1"] + nats["4"]) / 2, abs=2e-4)
        assert rows["1"][3] == pytest.approx(math.exp(nats["1"]), rel=1e-2)
        assert call(train, flags, sizes) == 0
        assert printed_likelihood(capsys) == rows
    assert "nowhere" in refused(capsys, train, flags, "--data_dir=nowhere")


def test_eval_only_takes_another_mixture(learned, capsys):
    """Than the one of the checkpoint; alike weights, where none are given."""
    flags = f"--eval_only --out_dir={learned['masked']} --eval_draws=1 --eval_seqs=2"
    flags += " --eval_block_sizes=2 --block_sizes=1,2,8"
    for more, weights in (("", [1 / 3] * 3), ("--block_weights=7,2,1", [0.7, 0.2, 0.1])):
        assert call(train, flags, more) == 0
        rows = printed_likelihood(capsys)
        nats = [rows[name][0] for name in ("1", "2", "8")]
        assert rows["mixture: Jensen"][0] == pytest.approx(np.dot(weights, nats), abs=2e-4)
    assert call(train, flags, "--block_sizes=1,32") == 0
    whole = printed_likelihood(capsys)
    assert call(train, flags, "--block_sizes=1,64") == 0  # no block is longer than the sequence
    assert printed_likelihood(capsys)["mixture: Jensen"] == whole["mixture: Jensen"]


@pytest.mark.parametrize("name, L", [("text", 24), ("math", 128)])
def test_mixture_bounds_count_the_tokens_that_are_scored(
    data_dir, checkpoint, solver, capsys, monkeypatch, name, L
):
    """Where one of two block sizes is far better, -log p(x) is its NELBO and log 2, once for a
    sequence, which of a problem is the answer."""
    path = solver if name == "math" else checkpoint
    _, data, meta = load_rows(data_dir, name, L)
    chosen = torch.linspace(0, len(data) - 1, 6).long()
    _, given = train.read_rows(data, chosen, meta)
    scored = (~given).sum(1)

    def evaluate(model, data, meta, block_size, n_seqs, draws):
        nats = 1.0 if block_size == 1 else 3.0
        return torch.full((n_seqs,), nats, dtype=torch.float64), scored

    monkeypatch.setattr(train, "evaluate", evaluate)
    capsys.readouterr()
    assert call(train, f"--eval_only --eval_seqs=6 --device=cpu --out_dir={path.parent}") == 0
    rows = printed_likelihood(capsys)
    expected = 1 + (math.log(2) / scored).mean()
    assert rows["mixture: log-sum-exp"][0] == pytest.approx(expected.item(), abs=1e-4)


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
    shapes = {
        "vocab_embed.embedding": (K, d),
        "sigma_map.mlp.0.weight": (c, 256),
        "sigma_map.mlp.0.bias": (c,),
        "sigma_map.mlp.2.weight": (c, c),
        "sigma_map.mlp.2.bias": (c,),
        "output_layer.norm_final.weight": (d,),
        "output_layer.linear.weight": (K, d),
        "output_layer.linear.bias": (K,),
        "output_layer.adaLN_modulation.weight": (2 * d, c),
        "output_layer.adaLN_modulation.bias": (2 * d,),
    }
    block = {
        "norm1.weight": (d,),
        "attn_qkv.weight": (3 * d, d),
        "attn_out.weight": (d, d),
        "norm2.weight": (d,),
        "mlp.0.weight": (4 * d, d),
        "mlp.0.bias": (4 * d,),
        "mlp.2.weight": (d, 4 * d),
        "mlp.2.bias": (d,),
        "adaLN_modulation.weight": (6 * d, c),
        "adaLN_modulation.bias": (6 * d,),
    }
    for i in range(PUBLISHED["n_blocks"]):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    tensors = {name: 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    for name, x in tensors.items():
        if "norm" in name:
            x += 1
    if noise == "masked":
        tensors["output_layer.linear.weight"][-1] = 0
        tensors["output_layer.linear.bias"][-1] = 0
    tensors["rotary_emb.inv_freq"] = 10000.0 ** -(torch.arange(0, 12, 2) / 12)
    return tensors


def write_published(folder, tensors, **config):
    """The folder, as a str."""
    safetensors = pytest.importorskip("safetensors.torch")
    os.makedirs(folder, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(PUBLISHED | config))
    safetensors.save_file(tensors, folder / "model.safetensors")
    return str(folder)


def published_mask(L, S, token_causal):
    """Who sees whom, pair by pair: (2 L, 2 L)."""
    mask = torch.zeros(2 * L, 2 * L, dtype=torch.bool)
    for i, j in itertools.product(range(L), range(L)):
        mask[i, j] = j <= i if token_causal else j // S <= i // S
        mask[L + i, j] = j // S < i // S
        mask[L + i, L + j] = i // S == j // S
    return mask


def published_forward(w, x0, xt, S, token_causal):
    """Logits (N, L, K) of the noisy half, by the network as its layout describes it, unfolded:
    adaLN at every layer. It has nothing in common with blockgen.py."""
    heads, L = PUBLISHED["n_heads"], x0.shape[1]
    mask = published_mask(L, S, token_causal)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def silu(x):
        return x / (1 + torch.exp(-x))

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def norm(x, name, shift, scale):
        variance = x.var(-1, unbiased=False, keepdim=True)
        x = (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
        return x * w[f"{name}.weight"] * (1 + scale) + shift

    def rotate(x):
        angle = torch.arange(L).repeat(2)[:, None] * w["rotary_emb.inv_freq"]
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def attention(x, name):
        qkv = linear(x, f"{name}.attn_qkv").chunk(3, -1)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in qkv)
        scores = rotate(q) @ rotate(k).transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        return linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn_out")

    time = torch.tensor([1.0] * 128 + [0.0] * 128)
    condition = silu(linear(time, "sigma_map.mlp.0"))
    condition = silu(linear(condition, "sigma_map.mlp.2"))
    x = w["vocab_embed.embedding"][torch.cat([x0, xt], 1)]
    for i in range(PUBLISHED["n_blocks"]):
        name = f"blocks.{i}"
        modulation = linear(condition, f"{name}.adaLN_modulation")
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6)
        h = norm(x, f"{name}.norm1", shift1, scale1)
        x = x + gate1 * attention(h, name)
        h = norm(x, f"{name}.norm2", shift2, scale2)
        x = x + gate2 * linear(gelu(linear(h, f"{name}.mlp.0")), f"{name}.mlp.2")
    shift, scale = linear(condition, "output_layer.adaLN_modulation").chunk(2)
    x = norm(x, "output_layer.norm_final", shift, scale)
    return linear(x[:, L:], "output_layer.linear")


@pytest.mark.parametrize("token_causal", [True, False])
@pytest.mark.parametrize("noise", NOISES)
@torch.no_grad()
def test_published_weights_give_the_logits_of_their_layout(noise, token_causal, tmp_path):
    """Training pass, cached passes, verification; the noise is read off the head."""
    w = published_tensors(noise)
    source = write_published(tmp_path, w, x0_causal=token_causal)
    path = tmp_path / "ckpt.pt"
    assert call(blockgen, source, str(path)) == 0
    model, content = load_checkpoint(path)
    V = 50257 if noise == "masked" else 50258
    assert (model.config.noise, model.config.vocab_size) == (noise, V)
    tokenizer = content["meta"]["tokenizer"]
    assert (tokenizer["kind"], tokenizer["start"], tokenizer["end"]) == ("gpt2", 50256, 50256)
    x0 = torch.randint(V, (2, 21))
    xt = model.noise.corrupt(x0, 0.5)

    def expected(S):
        return published_forward(w, x0, xt, S, token_causal)[..., :V]

    for S in (1, 4, 21):
        logits = expected(S)
        assert close(model(x0, xt, S), logits, 1e-5)
        cache, clean = model.new_cache(2), None
        for begin in range(0, 21, S):
            block = slice(begin, begin + S)
            assert close(model.denoise(xt[:, block], cache, clean), logits[:, block], 1e-5)
            clean = x0[:, block]
    assert close(model.verify(x0, model.new_cache(2), xt), expected(1), 1e-5)


REFUSED_TENSORS = {
    "blocks.1.mlp.0.bias": None,  # missing
    "blocks.0.norm1.weight": torch.ones(5),
    "rotary_emb.inv_freq": torch.ones(6),
    "sigma_map.mlp.0.weight": torch.ones(10, 128),
}


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_published_tensors_that_do_not_fit_are_refused(tmp_path, capsys, name):
    tensors = published_tensors("masked") | {name: REFUSED_TENSORS[name]}
    tensors = {name: x for name, x in tensors.items() if x is not None}
    target = tmp_path / "ckpt.pt"
    source = write_published(tmp_path, tensors)
    assert source in refused(capsys, blockgen, source, str(target))
    assert not target.exists()


def test_damaged_published_weights_are_refused(tmp_path, capsys, monkeypatch):
    target = tmp_path / "ckpt.pt"
    folder = tmp_path / "folder"

    def refusal(source):
        line = refused(capsys, blockgen, str(source), str(target))
        assert not target.exists()
        return line

    assert "nowhere" in refusal("nowhere")
    write_published(folder, published_tensors("masked"))
    for config in (dict(n_blocks=3), dict(hidden_size=48), dict(n_heads=5)):
        write_published(folder, published_tensors("masked"), **config)
        assert "folder" in refusal(folder)
    os.truncate(folder / "model.safetensors", 1000)
    assert "folder" in refusal(folder)
    (folder / "config.json").write_text("{}")
    assert "folder" in refusal(folder)
    os.remove(folder / "config.json")
    assert "config.json" in refusal(folder)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install" in refusal(folder)
    assert "OUT.pt" in refused(capsys, blockgen, str(folder))


def test_training_starts_from_published_weights(data_dir, tmp_path, capsys):
    """With data of fewer tokens, too. They cannot be resumed, and have no dataset."""
    source = write_published(tmp_path, published_tensors("masked", K=15))
    path = tmp_path / "ckpt.pt"
    assert call(blockgen, source, str(path)) == 0
    data = f"--dataset=text --data_dir={data_dir} --device=cpu"
    start = f"--init_from={path} --out_dir={tmp_path}/out"
    assert "another tokenizer" in refused(capsys, train, data, start)
    content = torch.load(path)  # let us say that it has the tokenizer of the data
    content["meta"] = open_data(data_dir / "text")[2]
    save_checkpoint(path, **content)
    assert "init_from" in refused(capsys, train, data, f"--resume --out_dir={tmp_path}")
    flags = "--n_layer=2 --n_embd=24 --seq_len=21 --ar=paper --tied=false --max_iters=1"
    content = run_training(data_dir, tmp_path / "out", flags, f"--init_from={path}")
    assert content["config"].vocab_size == 14
    assert content["meta"]["vocab_size"] == 13
    assert call(train, f"--resume --out_dir={tmp_path}/out --device=cpu --max_iters=2") == 0


@pytest.mark.parametrize("prompt", ["", "AB"])
def test_a_sample_begins_with_the_start_token(tmp_path, capsys, prompt):
    """It is the end token too, as in published weights; a sample does not stop there."""
    model = tiny()
    model.head.bias.data[10] = -1000  # it never ends otherwise
    tokens = [char.encode().hex() for char in "ABCDEFGHIJ."]
    tokenizer = dict(kind="char", tokens=tokens, vocab_size=11, start=10, end=10)
    meta = dict(tokenizer=tokenizer, vocab_size=11)
    config = asdict(model.config)
    path = tmp_path / "ckpt.pt"
    save_checkpoint(path, model=model.state_dict(), config=config, meta=meta, args={}, step=0)
    flags = f"--prompt={prompt}" if prompt else ""
    assert call(sample, f"--ckpt={path}", flags) == 0
    [text], _ = printed_samples(capsys)
    assert text.startswith("." + prompt)
    assert len(text) == 21


# ----------------------------------------------------------------------------------------------
# A GPU that is not there


@pytest.fixture
def gpu(monkeypatch):
    """torch believes in two GPUs; they can do nothing. What it is told: .current, .capability."""
    told = SimpleNamespace(current=None, capability=(9, 0))
    zeros = torch.zeros

    def make_zeros(*shape, device="cpu", **more):
        device = torch.device(device)
        if device.type == "cpu":
            return zeros(*shape, **more)
        index = device.index or 0  # as torch has it
        if index > 1:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return SimpleNamespace(device=torch.device("cuda", index))

    def set_device(device):
        if device.index is None:
            raise ValueError("Expected a torch.device with a specified index or an integer")
        told.current = str(device)

    fakes = dict(
        is_available=lambda: True,
        device_count=lambda: 2,
        set_device=set_device,
        get_device_capability=lambda device=None: told.capability,
        is_bf16_supported=lambda *_, **__: True,  # this counts emulation: it says so of a T4 too
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "zeros", make_zeros)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    return told


DEVICES = [
    ("auto", "cuda:0"),
    ("cuda", "cuda:0"),
    ("cuda:0", "cuda:0"),
    ("cuda:1", "cuda:1"),
    ("cpu", "cpu"),
]


@pytest.mark.parametrize("name, expected", DEVICES)
def test_a_gpu_has_an_index(gpu, name, expected):
    assert str(blockgen.find_device(name)) == expected
    assert gpu.current == (expected if "cuda" in expected else None)


def test_there_is_no_third_gpu(gpu):
    with pytest.raises(ValueError, match="cuda:2"):
        blockgen.find_device("cuda:2")


DTYPES = [
    ("--device=cuda", (9, 0), True),
    ("--device=auto", (8, 0), True),
    ("--device=cuda", (7, 5), False),
    ("--device=cuda --dtype=float32", (9, 0), False),
    ("--device=cpu", (9, 0), False),
]


@pytest.mark.parametrize("flags, capability, bfloat16", DTYPES)
def test_bfloat16_is_for_gpus_that_have_it(gpu, flags, capability, bfloat16):
    gpu.capability = capability
    args, _ = train.read_flags(flags.split())
    assert train.find_autocast(args, blockgen.find_device(args.device))._enabled == bfloat16


FITTING = [("", "gpu"), ("--device=cpu", ""), ("--preset=cpu", "")]


@pytest.mark.parametrize("flags, preset", FITTING)
def test_presets_fit_the_device(gpu, flags, preset):
    args, config = train.read_flags(flags.split())
    values = vars(args) | vars(config)
    expected = vars(train.Settings()) | vars(Config()) | train.PRESETS.get(preset, {})
    for name in train.PRESETS["gpu"]:
        assert values[name] == expected[name]


def gradients(model):
    """Losses (N, L) of a batch of several block sizes, and the gradients of all parameters."""
    torch.manual_seed(0)
    x0 = torch.randint(11, (4, 21))
    t, u = torch.rand(2, 4, 21)
    given = torch.zeros(4, 21, dtype=torch.bool)
    sizes = torch.tensor([1, 4, 6, 21])
    losses = model.token_losses(x0, sizes, t, u, given, ar_weight=0.3)
    return losses, torch.autograd.grad(losses.mean(), list(model.parameters()))


@BOTH
@pytest.mark.parametrize("noise", NOISES)
def test_training_with_the_kernels(monkeypatch, noise, ar):
    """In the interpreter, against the CPU's attention."""
    model = tiny(noise, ar=ar, n_embd=32)
    losses, grads = gradients(model)
    monkeypatch.setattr(blockgen, "block_attention", kernels.attention_triton)
    on_gpu, grads_on_gpu = gradients(model)
    assert close(on_gpu, losses, 1e-4)
    for a, b in zip(grads_on_gpu, grads):
        assert close(a, b, 1e-4)


SAMPLING = [
    dict(sampler="ar"),
    dict(sampler="ancestral"),
    dict(sampler="arpc", criterion="kld"),
    dict(sampler="confidence"),
    dict(sampler="speculative"),
]


@BOTH
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_sampling_with_the_kernels(monkeypatch, options, noise, ar):
    """Each pass of each sampler, cached, as it would be on a GPU: in the interpreter, against the
    CPU's attention. Going on from the kernels' result, no tie can hide or feign a difference."""
    calls = []

    def both(q, k, v, view):
        result = kernels.attention_triton(q, k, v, view)
        calls.append(close(result, kernels.attention_torch(q, k, v, view), 1e-5))
        return result

    monkeypatch.setattr(blockgen, "block_attention", both)
    given = torch.full((2, 7), -1)
    given[0, :2] = 1
    model = tiny(noise, ar=ar, n_layer=1)
    sample.generate(model, 2, 7, given=given, block_size=4, steps=2, **options)
    assert len(calls) > 2  # blocks
    assert all(calls)


# ----------------------------------------------------------------------------------------------
# torch.compile


def test_compiled_blocks_share_two_graphs_and_change_no_gradient():
    """Of all layers, at all block sizes: attention is a clean break between two graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain = tiny(n_layer=3)
    compiled = copy.deepcopy(plain)
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    x0 = torch.randint(0, 11, (2, 21))
    for sizes in ([1, 4], [16, 21], [2, 8]):
        sizes = torch.tensor(sizes)
        t, u = draw_noise((0,), torch.arange(2), torch.arange(2) / 2, sizes, 21, 1e-3)
        gradients = []
        for model in (plain, compiled):
            model.zero_grad()
            losses = model.token_losses(x0, sizes, t, u, x0 < 0, ar_weight=0.5)
            losses.sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert close(*gradients, 1e-5)
    assert counters["stats"]["unique_graphs"] == 2
