"""Proof by test: every claim of the README that mathematics can settle, on cases small enough to enumerate.

    python -m pytest -q test_blockgen.py
"""
import itertools
import json
import math
import os
import signal
import subprocess
import sys
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
from blockgen import (NOISES, SCHEDULES, BlockGen, Config, MaskedNoise, UniformNoise, draw, load_checkpoint, noise_levels,
                      save_checkpoint, token_losses, uniform)
from sample import CRITERIA, SAMPLERS, VERIFIED, generate

torch.set_num_threads(1)  # faster for models of this size
HERE = os.path.dirname(os.path.abspath(__file__))


BOTH = pytest.mark.parametrize("ar", ["paper", "shift"])


def tiny(noise="masked", seed=0, **more):
    """A small model with weights large enough that everything matters."""
    torch.manual_seed(seed)
    model = BlockGen(Config(**{**dict(vocab_size=11, seq_len=21, n_layer=2, n_head=2, n_embd=16, noise=noise, noisy_gain=0.7), **more})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else p.data.add_(0.1 * torch.randn_like(p))
    return model


def close(a, b, tolerance):
    """Equal within the tolerance; NaN is not."""
    return bool(((a.double() - b.double()).abs() <= tolerance).all())


# ---------------------------------------------------------------------------------------------------------------------
# Random numbers


def test_uniform_numbers_depend_on_their_key_alone():
    rows, positions = torch.arange(5)[:, None], torch.arange(1000)
    u = uniform(3, rows, positions)
    assert u.shape == (5, 1000) and u.min() >= 0 and u.max() < 1
    assert torch.equal(u[2], uniform(3, 2, positions)) and not torch.equal(u, uniform(4, rows, positions))
    u = uniform(0, torch.arange(400)[:, None], torch.arange(500)).flatten()
    counts = torch.histc(u.float(), 50, 0, 1)
    assert ((counts - 4000) ** 2 / 4000).sum() < 49 + 5 * math.sqrt(98)  # chi-square
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.01


def test_draw_is_the_inverse_cdf_far_into_the_tail():
    probs = torch.tensor([0.0, 0.5, 1e-8, 0.0, 0.5, 0.0])
    u = torch.linspace(0, 1 - 2**-53, 1001, dtype=torch.float64)
    x = draw(probs.expand(1001, 6), u)
    assert set(x.tolist()) <= {1, 2, 4} and (x == 1).sum() == pytest.approx(500, abs=1)
    edge = 0.5 / (1 + 1e-8)
    assert draw(probs, torch.tensor(edge + 0.5e-8, dtype=torch.float64)) == 2  # float32 sampling would miss it


# ---------------------------------------------------------------------------------------------------------------------
# Noise, by enumeration: a random distribution over all V^n sequences


V, n = 3, 3
STATES = torch.tensor(list(itertools.product(range(V), repeat=n)))  # (V^n, n)


def random_distribution(seed=0):
    torch.manual_seed(seed)
    return torch.softmax(1.5 * torch.randn(len(STATES), dtype=torch.float64), 0)


def likelihood(noise, x0, xt, alpha):
    """q(xt | x0) of one token each, broadcasting."""
    if isinstance(noise, MaskedNoise):
        return alpha * (xt == x0).double() + (1 - alpha) * (xt == noise.mask).double()
    return alpha * (xt == x0).double() + (1 - alpha) / noise.vocab_size


def exact_denoiser(noise, p, xt, alpha, leave_one_out=True):
    """p(x0_i = v | xt without position i) for xt (M, n) -> (M, n, V); or, wrongly for uniform noise, p(x0_i = v | xt)."""
    each = likelihood(noise, STATES[None], xt[:, None], alpha)  # (M, V^n, n)
    out = torch.zeros(*xt.shape, V, dtype=torch.float64)
    for i in range(n):
        others = [j for j in range(n) if j != i or not leave_one_out]
        weight = p * each[:, :, others].prod(-1)  # (M, V^n)
        for v in range(V):
            out[:, i, v] = weight[:, STATES[:, i] == v].sum(-1)
    return (out / out.sum(-1, keepdim=True)).nan_to_num(1 / V)  # a state that cannot be: anything


def noisy_states(noise):
    return torch.tensor(list(itertools.product(range(noise.n_embeddings), repeat=n)))


def exact_nelbo(noise, answer, x0, schedule=blockgen.linear, points=48):
    """NELBO of sequences x0 (M, n) as one block, nats (M,), for a denoiser answer(alpha) -> logits (states, n, V) for every noisy state.
    The noise is enumerated, t integrated by Gauss-Legendre in s, t = s^2 (the integrand has a log at 0)."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    clean, noisy = torch.broadcast_tensors(x0[:, None], noisy_states(noise))  # (M, states, n)
    total = torch.zeros(len(x0), dtype=torch.float64)
    for s, w in zip((nodes + 1) / 2, weights / 2):
        alpha, dalpha = schedule(torch.tensor(s * s, dtype=torch.float64))
        chance = likelihood(noise, clean, noisy, alpha).prod(-1)  # (M, states)
        loss = noise.nelbo(answer(alpha).expand(*clean.shape, V), clean, noisy, alpha, dalpha).double().sum(-1)
        total += w * 2 * s * torch.where(chance > 0, chance * loss, 0.0).sum(1)
    return total


def integrated_nelbo(noise, p, schedule, leave_one_out=True):
    """Its expectation over x0 ~ p, with the exact denoiser."""
    answer = lambda alpha: exact_denoiser(noise, p, noisy_states(noise), alpha, leave_one_out).log()
    return float((p * exact_nelbo(noise, answer, STATES, schedule)).sum())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NOISES)
def test_nelbo_with_the_exact_denoiser_is_the_entropy(name, schedule):
    noise, p = NOISES[name](V), random_distribution()
    entropy = float(-(p * p.log()).sum())
    assert integrated_nelbo(noise, p, SCHEDULES[schedule]) == pytest.approx(entropy, abs=2e-4)
    # the test has teeth: a wrong derivative of the schedule, and for uniform noise p(x0 | xt), are far off
    wrong = lambda t: (SCHEDULES[schedule](t)[0], -2 * t if schedule == "linear" else torch.full_like(t, -1.0))
    assert abs(integrated_nelbo(noise, p, wrong) - entropy) > 0.01
    if name == "uniform":
        assert integrated_nelbo(noise, p, SCHEDULES[schedule], leave_one_out=False) > entropy + 0.01


@pytest.mark.parametrize("alpha", [1e-5, 1e-3, 0.3, 0.99])
def test_uniform_nelbo_equals_its_formula_down_to_tiny_alpha(alpha):
    """In float32, against the formula as it is written in float64."""
    noise = UniformNoise(1000)
    torch.manual_seed(0)
    logits, x0, xt = torch.randn(50, 1000), torch.arange(50), torch.arange(25, 75) % 60
    p = logits.double().softmax(-1)
    xbar, pbar = 1000 * alpha * F.one_hot(x0, 1000) + 1 - alpha, 1000 * alpha * p + 1 - alpha
    xi, pi = (y.gather(1, xt[:, None]) for y in (xbar, pbar))
    literal = ((xbar / xi * (pi * xbar / (pbar * xi)).log()).sum(1, keepdim=True) - 1000 / xi + 1000 / pi)[:, 0] / (1000 * alpha)
    ours = noise.nelbo(logits, x0, xt, torch.full((50,), alpha), torch.tensor(-1.0))
    assert close(ours, literal, 1e-4 * float(literal.max()) + 2e-3) and (ours > -2e-3).all()  # as written, float32 is off by 0.1


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("alpha_t, alpha_s", [(0.0, 0.4), (0.3, 0.31), (0.3, 0.8), (0.6, 1.0), (0.0, 1.0)])
def test_posterior_is_bayes_rule(name, alpha_t, alpha_s):
    """p(xs | xt) = sum_x0 p(x0) q(xs | x0) q(xt | xs) / normalizer, one token."""
    noise, K = NOISES[name](V), NOISES[name](V).n_embeddings
    probs = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    x0, xs, xt = torch.meshgrid(torch.arange(V), torch.arange(K), torch.arange(K), indexing="ij")
    joint = probs[:, None, None] * likelihood(noise, x0, xs, alpha_s) * likelihood(noise, xs, xt, alpha_t / alpha_s)
    if name == "masked":  # a mask stays a mask going forward
        joint = probs[:, None, None] * likelihood(noise, x0, xs, alpha_s) * torch.where(xs == noise.mask, (xt == noise.mask).double(), likelihood(noise, xs, xt, alpha_t / alpha_s))
    bayes = joint.sum(0).T  # (xt, xs)
    seen = bayes.sum(1) > 0
    states = torch.arange(K)
    result = noise.posterior(probs.expand(K, V), states, alpha_s, alpha_t)
    assert close(result[seen], (bayes / bayes.sum(1, keepdim=True))[seen], 1e-12)
    # step with u on a grid hits every outcome in proportion, to the width of the grid
    m = 20_000
    u = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    for state in states[seen]:
        drawn = noise.step(probs.expand(m, V), state.expand(m), alpha_s, alpha_t, u)
        assert close(torch.bincount(drawn, minlength=K) / m, result[state], 5 / m)


@pytest.mark.parametrize("name", NOISES)
def test_step_and_corrupt_draw_from_their_laws(name):
    """Chi-square with a fixed seed."""
    torch.manual_seed(0)
    noise, m, probs = NOISES[name](5), 100_000, torch.softmax(torch.randn(5, dtype=torch.float64), 0)
    state = torch.tensor(noise.mask if name == "masked" else 2)
    cases = [(noise.step(probs.expand(m, 5), state.expand(m), 0.7, 0.2), noise.posterior(probs[None], state[None], 0.7, 0.2)[0]),
             (noise.corrupt(torch.full((m,), 3), 0.4), likelihood(noise, torch.tensor(3), torch.arange(noise.n_embeddings), 0.4).double())]
    for drawn, law in cases:
        expected = m * law
        counts = torch.bincount(drawn, minlength=noise.n_embeddings)
        assert (counts[expected == 0] == 0).all()
        live = expected > 0
        assert ((counts - expected) ** 2 / expected)[live].sum() < live.sum() - 1 + 5 * math.sqrt(2 * (live.sum() - 1))


def ancestral_law(noise, denoiser, steps):
    """The exact law of ancestral sampling over STATES, by pushing the whole distribution through the steps.
    denoiser(xt (M, n), alpha) -> (M, n, V); or a distribution p, for its exact denoiser."""
    p = denoiser
    denoiser = denoiser if callable(denoiser) else lambda xt, alpha: exact_denoiser(noise, p, xt, alpha)
    xt, K = noisy_states(noise), noise.n_embeddings
    law = (xt == noise.mask).all(1).double() if noise.mask is not None else torch.full((len(xt),), 1 / len(xt), dtype=torch.float64)
    for k in range(steps):
        alpha_t, alpha_s = k / steps, (k + 1) / steps
        each = noise.posterior(denoiser(xt, alpha_t), xt, alpha_s, alpha_t)  # (M, n, K)
        joint = torch.einsum("ma,mb,mc->mabc", *each.unbind(1))
        law = torch.einsum("m,mabc->abc", law, joint).flatten()
    return law.view(K, K, K)[:V, :V, :V].flatten()


@pytest.mark.parametrize("name", NOISES)
def test_ancestral_sampling_converges_to_the_true_distribution(name):
    noise, p = NOISES[name](V), random_distribution(1)
    distance = {T: float(0.5 * (ancestral_law(noise, p, T) - p).abs().sum()) for T in (1, 8, 64)}
    assert distance[1] > 0.1 and distance[64] < 0.01 and distance[64] < distance[8] / 5
    marginals = torch.stack([torch.stack([p[STATES[:, i] == v].sum() for v in range(V)]) for i in range(n)])
    assert close(ancestral_law(noise, p, 1), torch.stack([marginals[i, STATES[:, i]] for i in range(n)]).prod(0), 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def dense_attention(q, k, v, view):
    """The rule, literally: softmax over what is seen, zeros where nothing is."""
    mask = view.dense(k.shape[2])
    mask = mask[:, None] if mask.dim() == 3 else mask
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -1e30)
    return (torch.softmax(scores, -1) * mask) @ v


def random_view(rows, n_queries, n_keys, seed=0):
    """Any bounds at all, overlapping, empty, a fifth of the queries blind. rows 0: one view for every row."""
    draw = lambda: torch.randint(0, n_keys + 1, (rows, n_queries) if rows else (n_queries,))
    prefix, start, end = draw(), draw(), draw()
    blind = torch.rand(prefix.shape) < 0.2
    return kernels.View(prefix.masked_fill(blind, 0), start, end.masked_fill(blind, 0))


def largest_error(attention, q, k, v, view):
    """Of o, dq, dk, dv against float64, relative to the largest value; NaN gives infinity."""
    results = []
    torch.manual_seed(1)
    grad = torch.randn_like(q)
    for f, double in ((attention, False), (dense_attention, True)):
        inputs = [(x.double() if double else x.clone()).requires_grad_() for x in (q, k, v)]
        o = f(*inputs, view)
        results.append([o, *torch.autograd.grad(o, inputs, grad.to(o.dtype))])
    errors = [((a.double() - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(*results)]
    return max(math.inf if math.isnan(e) else e for e in errors)


def every_view(rows, L, S):
    mixed = torch.tensor([max(1, S // 2)] + [S] * (rows - 1))
    return [kernels.train_view(L, S), kernels.train_view(L, S, False), kernels.train_view(L, mixed),
            random_view(0, 2 * L, 2 * L), random_view(rows, 2 * L, 2 * L)]


PATHS = [kernels.attention_torch] + ([kernels.attention_triton] if kernels.triton else [])


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed: its kernels are not tested")
@pytest.mark.parametrize("rows, heads, L, S, D", [(1, 2, 1, 1, 16), (2, 1, 50, 7, 32), (2, 1, 97, 16, 24), (1, 1, 200, 200, 64), (1, 1, 67, 1, 128)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_triton_is_dense_attention(rows, heads, L, S, D, dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, heads, 2 * L, D, dtype=dtype) for _ in range(3))
    for view in every_view(rows, L, S):
        assert largest_error(kernels.attention_triton, q, k, v, view) < tolerance


@pytest.mark.parametrize("rows, heads, L, S, D", [(1, 2, 1, 1, 16), (2, 2, 50, 7, 32), (3, 2, 200, 16, 24), (2, 1, 333, 333, 8), (2, 3, 150, 1, 16)])
def test_torch_is_dense_attention(rows, heads, L, S, D):
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, heads, 2 * L, D) for _ in range(3))
    for view in every_view(rows, L, S):
        assert largest_error(kernels.attention_torch, q, k, v, view) < 1e-5


def peak_memory(run):
    """The most bytes that run() holds at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    changes = [e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("L", [32, 256, 1024])
def test_torch_attention_needs_no_more_memory_than_a_dense_mask(L):
    view, inputs = kernels.train_view(L, 16), [torch.randn(2, 2, 2 * L, 32, requires_grad=True) for _ in range(3)]
    dense = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, view.dense(2 * L))
    sparse = lambda q, k, v: kernels.attention_torch(q, k, v, view)
    peak, limit = (peak_memory(lambda: torch.autograd.grad(f(*inputs).sum(), inputs)) for f in (sparse, dense))
    assert peak <= 1.25 * limit


@pytest.mark.parametrize("attention", PATHS)
def test_cached_views_read_nothing_behind_the_valid_keys(attention):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 17, 16), torch.randn(2, 2, 150, 16), torch.randn(2, 2, 150, 16)
    for view, valid in ((kernels.denoise_view(100, 5, 12), 117), (kernels.verify_view(60, 8), 76), (kernels.denoise_view(64, 6, 11, 3), 81)):
        queries = q[:, :, : view.prefix.shape[-1]]
        expected = dense_attention(queries, k, v, view)
        dirty = [x.index_fill(2, torch.arange(valid, 150), math.nan) for x in (k, v)]
        assert close(attention(queries, *dirty, view), expected, 1e-5)


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed")
def test_triton_splits_and_rows_of_different_lengths():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 17, 16), torch.randn(2, 2, 300, 16), torch.randn(2, 2, 300, 16)
    view = kernels.denoise_view(torch.tensor([200, 37]), 5, 12)
    expected = dense_attention(q, k, v, view)
    for x in (k, v):
        x[0, :, 217:], x[1, :, 54:] = math.nan, math.nan
    for splits in (1, 2, 3, 9):
        assert close(kernels.attention_triton(q, k, v, view, splits), expected, 1e-5)
    assert close(kernels.attention_triton(q, k, v, kernels.View(*(torch.zeros(17).int() for _ in range(3))), 2), torch.zeros(()), 0)


@pytest.mark.parametrize("S", [1, 16, 1024])
def test_kernels_visit_the_tiles_that_hold_a_visible_pair_and_no_other(S):
    view, tile = kernels.train_view(1024, S), kernels.TILE
    seen = view.dense(2048).unflatten(0, (-1, tile)).unflatten(2, (-1, tile))  # (QT, tile, KT, tile)
    some, whole = seen.any(3).any(1), seen.all(3).all(1)
    for lists, some, whole in zip(kernels.tile_lists(view, 2048), (some, some.T), (whole, whole.T)):
        for i, (n_full, n_visited, *order) in enumerate(lists[0].tolist()):
            assert sorted(order[:n_visited]) == some[i].nonzero()[:, 0].tolist()
            assert sorted(order[:n_full]) == whole[i].nonzero()[:, 0].tolist()
    if S == 16:
        assert some.sum() == 288  # of 1024


AHEAD_OF_TIME = """
import os, re, subprocess, sys, tempfile
import triton, kernels
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
types = {"scale": "fp32", "LSE": "*fp32", "DELTA": "*fp32", "BOUNDS": "*i32", "LISTS": "*i32"}
tool = os.path.join(os.path.dirname(nvidia.__file__), "bin", "cuobjdump")
for kernel in (kernels.forward_kernel, kernels.dq_kernel, kernels.dkdv_kernel):
    for D in (64, 128):
        options = dict(SPLITS=1, **kernels.launch(D))
        const = {k: options.pop(k) for k in ("D", "TILE", "SPLITS") if k in kernel.arg_names}
        options.pop("SPLITS", None)
        kind = lambda a: "constexpr" if a in const else types.get(a, "*bf16" if a.isupper() else "i32")
        signature = {a: kind(a) for a in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if signature[a].startswith("*")}
        built = triton.compile(ASTSource(kernel, signature, constexprs=const, attrs=aligned),
                               target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
        print(kernel.__name__, D, built.metadata.shared, re.search(r"REG:(\\d+)", usage)[1], re.search(r"STACK:(\\d+)", usage)[1])
"""


@pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed: the kernels are not compiled")
@pytest.mark.parametrize("architecture, shared_memory", [(80, 163), (90, 227), (100, 227)])
def test_kernels_compile_ahead_of_time(architecture, shared_memory, tmp_path):
    """For A100, H100 and B200, without a GPU: they compile, spill at most 32 bytes, and fit in shared memory (KiB)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": HERE}
    run = subprocess.run([sys.executable, "-c", AHEAD_OF_TIME, str(architecture)], env=environment, capture_output=True, text=True, cwd=HERE)
    assert run.returncode == 0, run.stderr
    rows = [line.split() for line in run.stdout.splitlines()]
    assert len(rows) == 6
    for name, D, shared, registers, spill in rows:
        assert int(shared) <= shared_memory * 1024 and int(spill) <= 32, (name, D, shared, registers, spill)


# ---------------------------------------------------------------------------------------------------------------------
# The model


@pytest.mark.parametrize("token_causal, ar", [(True, "paper"), (False, "paper"), (True, "shift")])
@pytest.mark.parametrize("noise", NOISES)
@torch.no_grad()
def test_cached_passes_equal_the_training_pass(noise, token_causal, ar):
    """denoise over a whole sequence, for odd block sizes; verify in chunks. The cache is full of NaN where nothing was written."""
    model = tiny(noise, token_causal=token_causal, ar=ar)
    x0 = torch.randint(0, 11, (3, 21))
    xt = model.noise.corrupt(x0, 0.5)
    for S in (1, 5, 8, 21):
        cache, clean = fresh_cache(model, 3), None
        for begin in range(0, 21, S):
            block = model.denoise(xt[:, begin : begin + S], cache, clean)
            assert close(block, model(x0, xt, S)[:, begin : begin + S], 1e-5)
            clean = x0[:, begin : begin + S]
    ar, cache = model(x0, xt, 1), fresh_cache(model, 3)
    model.denoise(xt[:, :1], cache, x0[:, :4], block_size=1)
    for begin, end in ((4, 9), (9, 10), (10, 21)):
        assert close(model.verify(x0[:, begin:end], cache, xt[:, begin:end]), ar[:, begin:end], 1e-5)
        cache.length = cache.length + end - begin  # accept all of them: their keys are in the cache


def fresh_cache(model, rows):
    cache = model.new_cache(rows)
    cache.keys.fill_(math.nan), cache.values.fill_(math.nan)
    return cache


@BOTH
@torch.no_grad()
def test_one_cache_serves_mixed_block_sizes(ar):
    model = tiny(ar=ar)
    x0 = torch.randint(0, 11, (2, 21))
    xt = model.noise.corrupt(x0, 0.3)
    cache, done = fresh_cache(model, 2), 0
    for begin, S in ((0, 7), (7, 1), (8, 4), (12, 4), (16, 5)):  # a block of S at begin is what forward sees if S divides begin; else compare with a fresh cache
        block = model.denoise(xt[:, begin : begin + S], cache, x0[:, done:begin])
        expected = model(x0, xt, S)[:, begin : begin + S] if begin % S == 0 else model.denoise(xt[:, begin : begin + S], fresh_cache(model, 2), x0[:, :begin])
        assert close(block, expected, 1e-5)
        done = begin


@BOTH
@pytest.mark.parametrize("noise", NOISES)
@torch.no_grad()
def test_rows_of_different_block_sizes_equal_separate_calls(noise, ar):
    model = tiny(noise, ar=ar)
    x0 = torch.randint(0, 11, (4, 21))
    xt, sizes = model.noise.corrupt(x0, 0.5), torch.tensor([1, 5, 16, 21])
    together = model(x0, xt, sizes)
    for i, S in enumerate(sizes.tolist()):
        assert close(together[i], model(x0[i : i + 1], xt[i : i + 1], S)[0], 1e-5)


@pytest.mark.parametrize("token_causal, ar", [(True, "paper"), (False, "paper"), (True, "shift")])
@torch.no_grad()
def test_nothing_leaks_from_the_future(token_causal, ar):
    """Change a token: no logit of an earlier block moves by a single bit, nor (clean tokens) of its own block; later ones do."""
    model = tiny(token_causal=token_causal, ar=ar)
    x0 = torch.randint(0, 11, (1, 21))
    xt = model.noise.corrupt(x0, 0.5)
    for S in (1, 4, 7):
        base = model(x0, xt, S)
        for i in (0, 9, 13):
            begin = i // S * S
            clean, noisy = x0.clone(), xt.clone()
            clean[0, i], noisy[0, i] = (x0[0, i] + 1) % 11, (x0[0, i] + 2) % 11
            moved = (model(clean, xt, S) != base).any(-1)[0]
            assert not moved[: begin + S].any() and moved[begin + S :].any()
            moved = (model(x0, noisy, S) != base).any(-1)[0]
            assert moved[begin : begin + S].any() == (S > 1 or ar == "paper")
            assert not moved[:begin].any() and not moved[begin + S :].any()


@BOTH
@pytest.mark.parametrize("noise", NOISES)
def test_loss_is_charged_where_it_should_be(noise, ar):
    """token_losses against nelbo on all logits; cross-entropy for blocks of one token; in parts = at once, gradients too. The AR loss that
    ar="shift" yields beside a diffusion loss is that of block size 1."""
    model = tiny(noise, ar=ar)
    x0, sizes = torch.randint(0, 11, (3, 21)), torch.tensor([1, 4, 21])
    t, u = noise_levels(torch.rand(3, 2), torch.rand(3), sizes, 21), torch.rand(3, 21, dtype=torch.float64)
    losses = token_losses(model, x0, sizes, t, u)
    alone = torch.zeros(3, 21, dtype=torch.bool)
    alone[0], alone[1, 20] = True, True  # 21 = 5 x 4 + 1
    alpha, dalpha = 1 - t, -torch.ones_like(t)
    xt = model.noise.corrupt(x0, torch.where(alone, 0.0, alpha), u)
    logits = model(x0, xt, sizes)
    nll = -logits.log_softmax(-1).gather(-1, x0[..., None])[..., 0]
    assert close(losses, torch.where(alone, nll, model.noise.nelbo(logits, x0, xt, alpha, dalpha)), 1e-4)
    for ar_weight in (0, 0.3):
        whole = token_losses(model, x0, sizes, t, u, ar_weight=ar_weight)
        parts = token_losses(model, x0, sizes, t, u, ar_weight=ar_weight, chunk=40)
        gradients = [torch.autograd.grad(x.sum(), model.embedding.weight)[0] for x in (whole, parts)]
        assert close(parts, whole, 1e-5) and close(*gradients, 1e-4)
    if ar == "shift":
        assert close(whole, 0.7 * losses + 0.3 * token_losses(model, x0, torch.ones(3).long(), t, u), 1e-5)


def test_noise_levels_are_stratified_and_constant_in_a_block():
    sizes = torch.tensor([4, 4, 4, 4, 21, 1])
    shift = torch.cat([torch.full((6, 1), 0.37), torch.rand(6, 1)], 1)
    t = noise_levels(shift, torch.tensor([0, 0.25, 0.5, 0.75, 0, 0]), sizes, 21, t_min=0)
    assert (t[:4, 0:4] == t[:4, :1]).all() and t[4].unique().numel() == 1 and t[5].unique().numel() == 21
    levels = t[:4, ::4].flatten().sort().values  # 24 blocks: one level in every 24th
    assert close(levels.diff(), torch.tensor(1 / 24), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


class ExactModel:
    """The model's contract, for a distribution p over sequences small enough to enumerate: its AR side is exact, its diffusion side gives
    the exact p(x0_i | the prefix, what is revealed in the block) for masked noise, p(x0_i | the prefix) for uniform noise."""

    def __init__(self, p, noise="masked"):
        self.p, self.noise = p, NOISES[noise](V)
        self.config = SimpleNamespace(seq_len=n, vocab_size=V, token_causal=True)

    def new_cache(self, rows, length=None):
        return SimpleNamespace(length=torch.zeros(rows, dtype=torch.int64), tokens=torch.zeros(rows, 4 * n, dtype=torch.int64))

    def conditional(self, known, tokens, position):
        """log p(x_position = v | the known positions hold tokens): known, tokens (N, n), position (N,) -> (N, V); uniform beyond the end."""
        fits = ((STATES == tokens[:, None]) | ~known[:, None]).all(-1).double() * self.p  # (N, V^n)
        here = STATES.T[position.clamp(max=n - 1)]  # (N, V^n)
        weight = torch.stack([(fits * (here == v)).sum(-1) for v in range(V)], -1)
        return torch.where(position[:, None] < n, weight, 1.0).log()

    def denoise(self, xt, cache, commit=None, block_size=None):
        commit = xt[:, :0] if commit is None else commit
        slots = cache.length[:, None] + torch.arange(commit.shape[1])
        cache.tokens = cache.tokens.scatter(1, slots, commit)
        cache.length = cache.length + commit.shape[1]
        where, length = torch.arange(n), cache.length[:, None]
        known, tokens = where < length, cache.tokens[:, :n].clone()
        if self.noise.mask is not None:
            inside = (where >= length) & (where < length + xt.shape[1])
            shown = xt.gather(1, (where - length).clamp(0, xt.shape[1] - 1))
            known, tokens = known | (inside & (shown != self.noise.mask)), torch.where(inside, shown, tokens)
        return torch.stack([self.conditional(known & (where != position[:, None]), tokens, position)
                            for position in (cache.length + i for i in range(xt.shape[1]))], 1)

    def verify(self, x, cache, noise=None):
        slots = cache.length[:, None] + torch.arange(x.shape[1])
        cache.tokens = cache.tokens.scatter(1, slots, x)
        where = torch.arange(n)
        return torch.stack([self.conditional(where < position[:, None], cache.tokens[:, :n], position)
                            for position in (cache.length + i for i in range(x.shape[1]))], 1)


def chi_square(tokens, law):
    """Does the sample (M, n) fit the law over STATES?"""
    counts = torch.bincount((tokens * torch.tensor([V * V, V, 1])).sum(1), minlength=len(STATES))
    expected, df = law * len(tokens), len(STATES) - 1
    return float(((counts - expected) ** 2 / expected).sum()) < df + 5 * math.sqrt(2 * df)


@pytest.mark.parametrize("name", NOISES)
def test_speculative_samples_are_exactly_ar_samples(name):
    p = random_distribution(2)
    model = ExactModel(p, name)
    ar, stats = generate(model, 20_000, n, sampler="ar", seed=1)
    assert chi_square(ar, p) and stats["nfe"] == n
    for S in (2, 3):
        drafted, stats = generate(model, 20_000, n, sampler="speculative", block_size=S, seed=2)
        assert chi_square(drafted, p) and 0.5 < stats["accepted_length"] < S
    # the test has teeth: the draft alone has another law
    assert not chi_square(generate(model, 20_000, n, block_size=3, steps=1, seed=3)[0], p)


@pytest.mark.parametrize("noise, ar", [("masked", "paper"), ("masked", "shift"), ("uniform", "shift")])
@torch.no_grad()
def test_ar_and_speculative_samples_follow_the_likelihood(noise, ar):
    """The same with a real model: forward at block size 1 says p(x) of every sequence, and both samplers write with that law."""
    model = tiny(noise, vocab_size=V, seq_len=n, ar=ar)
    logits = model(STATES, model.noise.prior(STATES.shape), 1).double()
    p = logits.log_softmax(-1).gather(-1, STATES[..., None])[..., 0].sum(1).exp()
    assert p.sum() == pytest.approx(1)
    assert chi_square(generate(model, 20_000, n, sampler="ar", seed=1)[0], p)
    assert chi_square(generate(model, 20_000, n, sampler="speculative", block_size=2, seed=2)[0], p)
    assert not chi_square(generate(model, 20_000, n, block_size=3, steps=1, seed=3)[0], p)


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_ancestral_samples_follow_their_closed_form(steps):
    """steps = 1: the product of the marginals; steps = S: the law pushed through the steps; many: nearly p."""
    p = random_distribution(2)
    model = ExactModel(p)
    law = ancestral_law(model.noise, p, steps)
    assert chi_square(generate(model, 5_000, n, block_size=3, steps=steps, seed=steps)[0], law)


def test_temperature_top_p_and_top_k_reach_the_tokens():
    p = random_distribution(2)
    model = ExactModel(p)
    best = torch.tensor([0, 0, 0])
    for i in range(n):  # greedy, by hand
        best[i] = model.conditional(torch.arange(n)[None] < i, best[None], torch.tensor([i]))[0].argmax()
    first = torch.stack([p[STATES[:, 0] == v].sum() for v in range(V)])
    for sampler in ("ar", "speculative"):
        for greedy in (dict(temperature=0), dict(top_k=1), dict(top_p=1e-9)):
            assert (generate(model, 3, n, sampler=sampler, **greedy)[0] == best).all()
        two = torch.bincount(generate(model, 20_000, n, sampler=sampler, top_k=2)[0][:, 0], minlength=V) / 20_000
        expected = first.masked_fill(first == first.min(), 0)
        assert close(two, expected / expected.sum(), 0.02)
        hot = torch.bincount(generate(model, 20_000, n, sampler=sampler, temperature=2.0)[0][:, 0], minlength=V) / 20_000
        assert close(hot, first.sqrt() / first.sqrt().sum(), 0.02)


GIVEN = torch.full((3, 21), -1)
GIVEN[0, :5], GIVEN[1, 3:9], GIVEN[1, 20], GIVEN[2, :13] = 1, 2, 4, 3


def variants():
    for sampler in SAMPLERS:
        for criterion in CRITERIA if sampler == "arpc" else [None]:
            yield dict(sampler=sampler, **({"criterion": criterion} if criterion else {}))


class Uncached:
    """The contract again, recomputed from scratch in every pass, each row by itself."""

    def __init__(self, model):
        self.model, self.config, self.noise = model, model.config, model.noise

    def new_cache(self, rows, length=None):
        return SimpleNamespace(length=torch.zeros(rows, dtype=torch.int64), tokens=torch.zeros(rows, 200, dtype=torch.int64))

    def put(self, x, cache):
        cache.tokens = cache.tokens.scatter(1, cache.length[:, None] + torch.arange(x.shape[1]), x)

    def denoise(self, xt, cache, commit=None, block_size=None):
        if commit is not None:
            self.put(commit, cache)
            cache.length = cache.length + commit.shape[1]
        return torch.cat([self.model.denoise(x[None], self.model.new_cache(1, 60), cache.tokens[i : i + 1, : cache.length[i]]) for i, x in enumerate(xt)])

    def verify(self, x, cache, noise=None):
        self.put(x, cache)
        rows = []
        for i, length in enumerate(cache.length.tolist()):  # one token at a time, each behind a prefix computed anew
            rows.append(torch.cat([self.model.denoise(noise[i : i + 1, j : j + 1], self.model.new_cache(1, 60), cache.tokens[i : i + 1, : length + j])
                                   for j in range(x.shape[1])], 1))
        return torch.cat(rows)


@BOTH
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("options", list(variants()), ids=lambda o: "-".join(o.values()))
def test_samplers(options, noise, ar):
    """Cached = recomputed in every pass, token for token; a row does not depend on its batch; given tokens stay; NFE is the number of calls."""
    model = tiny(noise, ar=ar)
    more = {} if options["sampler"] == "ar" else dict(block_size=5)
    if "steps" in SAMPLERS[options["sampler"]]:
        more["steps"] = 4
    if options["sampler"] == "confidence":
        more["threshold"] = 0.2
    calls = {"denoise": 0, "verify": 0}
    for name in calls:
        def spy(*args, name=name, method=getattr(model, name), **kwargs):
            calls[name] += 1
            return method(*args, **kwargs)
        setattr(model, name, spy)
    tokens, stats = generate(model, 3, 21, given=GIVEN, seed=5, **options, **more)
    assert stats["nfe"] == sum(calls.values()) and stats["tokens"] == int((GIVEN < 0).sum())
    assert (calls["verify"] > 0) == (options["sampler"] == "speculative" or options.get("criterion") in VERIFIED)
    assert ((tokens == GIVEN) | (GIVEN < 0)).all() and tokens.max() < 11 and tokens.min() >= 0
    if options["sampler"] == "ancestral" and noise == "uniform":
        assert stats["nfe"] == 4 * 5 - 3  # five blocks; the last has one token, which takes one step. Committing costs nothing
    if options.get("criterion") in VERIFIED:
        assert stats["nfe"] == 4 * 7 + 1  # 2 steps - 1 a block
    for i in range(3):
        alone, _ = generate(model, 1, 21, given=GIVEN[i : i + 1], seed=5, first_row=i, **options, **more)
        assert torch.equal(alone[0], tokens[i])
    assert torch.equal(generate(Uncached(tiny(noise, ar=ar)), 3, 21, given=GIVEN, seed=5, **options, **more)[0], tokens)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("criterion, ar", [("random", "paper"), ("ar_nll", "paper"), ("ar_nll", "shift")])
@torch.no_grad()
def test_arpc_equals_a_direct_implementation(criterion, noise, ar):
    """One row, no cache, plain loops, the same random numbers."""
    model, L, S, T, seed = tiny(noise, ar=ar), 21, 5, 6, 3
    number = lambda purpose, step, position: float(uniform(seed, purpose, step, 0, torch.tensor(position)))
    pick = lambda u: model.noise.mask if noise == "masked" else int(u * 11)
    tokens = [0] * L
    for begin in range(0, L, S):
        block = range(begin, min(begin + S, L))
        xt = [pick(number(sample.PRIOR, 0, i)) for i in block]
        steps = T if len(block) > 1 else 1
        for k in range(steps):
            noisy = torch.tensor([[*([0] * begin), *xt, *([0] * L)][:L]])
            probs = model(torch.tensor([tokens]), noisy, S)[0].double().softmax(-1)
            guided = k < steps - 1
            alpha_t, alpha_s = k / steps, (k + 1) / steps
            for i in block:
                now = torch.tensor(number(sample.REVEAL, k, i), dtype=torch.float64)
                xt[i - begin] = int(model.noise.step(probs[i], torch.tensor(xt[i - begin]), 1.0 if guided else alpha_s, alpha_t, now))
            if guided:
                tokens[begin : begin + len(xt)] = xt
                if criterion == "random":
                    score = [number(sample.ACCEPT, k + 1, i) for i in block]
                else:
                    prior = torch.tensor([[pick(number(sample.PRIOR, 0, i)) for i in range(L)]])
                    verdict = model(torch.tensor([tokens]), prior, 1)[0].double().log_softmax(-1)
                    score = [-float(verdict[i, tokens[i]]) for i in block]
                worst = sorted(range(len(xt)), key=lambda i: -score[i])[: max(1, round((1 - alpha_s) * len(xt)))]
                for i in worst:
                    xt[i] = pick(number(sample.RENOISE, k + 1, begin + i))
        tokens[begin : begin + len(xt)] = xt
    assert generate(model, 2, L, sampler="arpc", block_size=S, steps=T, criterion=criterion, seed=seed)[0][0].tolist() == tokens


def test_every_option_changes_the_sample():
    model, base = tiny("uniform"), dict(block_size=5, steps=6)
    changes = dict(block_size=7, steps=5, schedule="cosine", ar_tokens=3, criterion="kld", warmup=2, guide_every=2, threshold=0.1)
    for sampler, used in SAMPLERS.items():
        common = {k: v for k, v in base.items() if k in used}
        reference = generate(model, 8, 21, sampler=sampler, **common)[0]
        for change in [{k: changes[k]} for k in used] + [dict(temperature=0.5), dict(top_k=3), dict(top_p=0.5), dict(seed=1), dict(stop=6)]:
            assert not torch.equal(generate(model, 8, 21, sampler=sampler, **{**common, **change})[0], reference), (sampler, change)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_stop_at_their_end_token(sampler):
    model = tiny()
    model.head.bias.data[3] = 3.0  # a likely end token
    given = torch.full((6, 21), -1)
    given[:, :4], given[0, 20] = 3, 7  # the prompt's own end tokens do not count; nor do those before something given
    tokens, stats = generate(model, 6, 21, sampler=sampler, given=given, stop=3)
    assert tokens[0, 20] == 7 and (tokens[:, :4] == 3).all()
    for row in tokens[1:, 4:].tolist():
        assert 3 in row and set(row[row.index(3) :]) == {3}
    early = generate(model, 5, 21, sampler=sampler, given=given[1:], stop=3, **({} if sampler == "ar" else {"block_size": 2}))[1]
    late = generate(model, 5, 21, sampler=sampler, given=given[1:], **({} if sampler == "ar" else {"block_size": 2}))[1]
    assert early["nfe"] < late["nfe"] and early["tokens"] < late["tokens"]


# ---------------------------------------------------------------------------------------------------------------------
# Data


def test_bpe_says_any_text_and_learns_words():
    text = "the cat and the dog and the aaaa bird 12 ☃\n" * 50
    tokenizer = prepare_data.make_tokenizer("bpe:270", text)
    encode, decode = prepare_data.load_tokenizer(tokenizer)
    for sample_text in (text, "Ünseen \t wörds, 漢字 and \x00 bytes", "", "aaaaaaa"):
        assert decode(encode(sample_text)) == sample_text
    assert len(encode(" the")) == 1 and len(encode("the the")) < 4 and tokenizer["end"] == 269
    assert len(set(tokenizer["tokens"])) == 269


def test_a_markov_chain_knows_its_entropy(tmp_path):
    meta = prepare_data.prepare("markov", str(tmp_path), states=8, successors=3, tokens=200_000)
    train_tokens, val_tokens, read = train.open_data(str(tmp_path / "markov"))
    assert read == json.loads((tmp_path / "markov" / "meta.json").read_text()) and len(val_tokens) == 20_000
    logp = np.log(np.array(meta["transitions"])[train_tokens[:-1], train_tokens[1:]])
    assert -logp.mean() == pytest.approx(meta["entropy_rate"], abs=5 * logp.std() / len(logp) ** 0.5)
    assert meta["unigram_nats"] == pytest.approx(meta["first_nats"], abs=0.02)


def test_text_file_round_trip(tmp_path):
    (tmp_path / "in.txt").write_text("hello wörld\n" * 100, encoding="utf-8")
    for kind in ("char", "bpe:260"):
        meta = prepare_data.prepare("text", str(tmp_path), input=str(tmp_path / "in.txt"), tokenizer=kind)
        train_tokens, val_tokens, _ = train.open_data(str(tmp_path / "text"))
        decode = prepare_data.load_tokenizer(meta["tokenizer"])[1]
        text = "".join(decode(np.asarray(part).tolist()) for part in (train_tokens, val_tokens)).replace(prepare_data.END, "")
        assert text == "hello wörld\n" * 100


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="GPT-2's vocabulary is not at hand: TIKTOKEN_CACHE_DIR is not set")
def test_gpt2_vocabulary(tmp_path):
    (tmp_path / "in.txt").write_text("Hello world, how are you?\n" * 20)
    meta = prepare_data.prepare("text", str(tmp_path), input=str(tmp_path / "in.txt"), tokenizer="gpt2")
    encode, decode = prepare_data.load_tokenizer(meta["tokenizer"])
    assert encode("Hello world") == [15496, 995] and decode([15496, 995]) == "Hello world" and meta["vocab_size"] == 50257


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepare_data.prepare("markov", str(folder), states=12, successors=3, tokens=60_000)
    return str(folder)


SMALL = ["--dataset=markov", "--seq_len=24", "--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=8", "--eval_interval=1000",
         "--eval_seqs=8", "--device=cpu", "--dtype=float32", "--dropout=0.1", "--block_sizes=1,5"]


def call(module, *argv):
    """Run a script's main in this process; the exit status."""
    before, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, argv)]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        prepare_data.run_script(module.main)
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
        for s, handler in handlers.items():
            signal.signal(s, handler)


def run_training(data_dir, out, *flags, status=0):
    assert call(train, *SMALL, f"--data_dir={data_dir}", f"--out_dir={out}", *flags) == status
    return blockgen.read_checkpoint(os.path.join(out, "ckpt.pt")) if status == 0 else None


def same_weights(a, b, tolerance=0.0):
    return all(close(a[part][k], b[part][k], tolerance) for part in ("model", "ema") for k in a["model"])


@pytest.mark.parametrize("noise", NOISES)
def test_resuming_equals_not_interrupting(data_dir, tmp_path, noise, monkeypatch):
    """Bit for bit: weights, average, log. The interruption is a signal in the middle of the run."""
    flags = [f"--noise={noise}", "--max_iters=12", "--eval_interval=4"]
    whole = run_training(data_dir, tmp_path / "whole", *flags)
    original, steps = train.accumulate_gradients, []

    def interrupt(*args, **kwargs):
        steps.append(1)
        if len(steps) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(train, "accumulate_gradients", interrupt)
    part = run_training(data_dir, tmp_path / "part", *flags)
    assert part["step"] == 7 and not same_weights(part, whole)
    assert call(train, "--resume", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'part'}") == 0
    assert same_weights(blockgen.read_checkpoint(tmp_path / "part" / "ckpt.pt"), whole)
    assert (tmp_path / "part" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_accumulation_and_processes_change_nothing(data_dir, tmp_path):
    """Two processes under torchrun, or two parts a step, give what one process gives with the joined batch."""
    flags = ["--max_iters=3", "--dropout=0"]
    one = run_training(data_dir, tmp_path / "one", *flags)
    parts = run_training(data_dir, tmp_path / "parts", *flags, "--grad_accum=4")
    assert same_weights(one, parts, 1e-5)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", os.path.join(HERE, "train.py"),
               *SMALL, *flags, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'two'}"]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert same_weights(one, blockgen.read_checkpoint(tmp_path / "two" / "ckpt.pt"), 1e-5)


def test_block_sizes_are_stratified_over_the_batch(data_dir):
    tokens = train.open_data(os.path.join(data_dir, "markov"))[0]
    args = train.parse_args([*SMALL, "--block_sizes=1,5,24", "--block_weights=0.25,0.5,0.25", "--ar=paper"])
    for step in range(20):
        parts = [train.draw_batch(args, tokens, step, rows, "cpu") for rows in torch.arange(8).chunk(2)]
        sizes = torch.cat([part[1] for part in parts])
        assert torch.bincount(sizes, minlength=25)[[1, 5, 24]].tolist() == [2, 4, 2]
        x0, sizes, t, u = train.draw_batch(args, tokens, step, torch.arange(8), "cpu")
        assert torch.equal(x0, torch.cat([part[0] for part in parts])) and torch.equal(t, torch.cat([part[2] for part in parts]))
        levels = t[sizes == 5][:, ::5].flatten().sort().values  # 4 rows of 5 blocks: one level in each twentieth
        assert close(levels.diff(), torch.tensor((1 - 1e-3) / 20), 1e-6)
    args.ar = "shift"  # here no row is given away to block size 1: every row has it beside its own
    sizes, weights, ar_weight = train.mixture(args)
    assert sizes.tolist() == [5, 24] and weights.tolist() == pytest.approx([2 / 3, 1 / 3]) and ar_weight == 0.25


@BOTH
def test_validation_depends_on_neither_batch_size_nor_call(data_dir, ar):
    tokens, model = train.open_data(os.path.join(data_dir, "markov"))[1], tiny(vocab_size=12, seq_len=24, ar=ar)
    for S in (1, 5, 24):
        a, b = (train.evaluate(model, tokens, S, 11, draws=3, batch_size=size) for size in (1, 64))
        assert a.shape == (3, 11) and close(a, b, 1e-5)
    exact = train.evaluate(model, tokens, 1, 2)[0]  # against token by token, through the cache
    x0 = train.crops(tokens, torch.linspace(0, len(tokens) - 24, 2).long(), 24, "cpu")
    cache, total = model.new_cache(2), torch.zeros(2)
    with torch.no_grad():
        for i in range(24):
            logits = model.denoise(torch.full((2, 1), model.noise.mask), cache, x0[:, i - 1 : i] if i else None)
            total -= logits.log_softmax(-1)[:, 0].gather(-1, x0[:, i : i + 1])[:, 0]
    assert close(exact, total / 24, 1e-4)


def test_a_broken_loss_stops_the_run_and_keeps_the_checkpoint(data_dir, tmp_path, monkeypatch, capsys):
    good = run_training(data_dir, tmp_path, "--max_iters=4")
    original = train.accumulate_gradients
    for bad, word in ((math.nan, "nan"), (1e6, "risen")):
        monkeypatch.setattr(train, "accumulate_gradients", lambda m, a, t, step, *rest: bad if step == 6 else original(m, a, t, step, *rest))
        run_training(data_dir, tmp_path, "--resume", "--max_iters=10", status=2)
        error = capsys.readouterr().err
        assert "step 6" in error and word in error
        assert same_weights(blockgen.read_checkpoint(tmp_path / "ckpt.pt"), good)


# ---------------------------------------------------------------------------------------------------------------------
# What users type


@pytest.fixture(scope="session")
def checkpoint(data_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run_training(data_dir, out, "--max_iters=2")
    return os.path.join(out, "ckpt.pt")


def refused(module, capsys, *argv):
    """The one line that a script says as it exits with status 2."""
    assert call(module, *argv) == 2, argv
    lines = capsys.readouterr().err.strip().split("\n")
    lines = [line for line in lines if "step/s" not in line]
    assert len(lines) == 1 and lines[0].startswith(f"{module.__name__}.py: "), lines
    return lines[0]


@pytest.mark.parametrize("flags, word", [
    (["--nonsense"], "nonsense"), (["--block_size=1,5"], "block_size"), (["--block_weights=0.5,0.6"], "sum to 1"), (["--block_weights=1"], "2 --block_sizes"),
    (["--block_sizes=0,5"], "block_sizes"), (["--block_sizes=1,25"], "block_sizes"), (["--max_iters=0"], "max_iters"), (["--max_iters=x"], "max_iters"),
    (["--n_embd=17"], "n_embd"), (["--dropout=1"], "dropout"), (["--loss=ce", "--noise=uniform"], "masked"), (["--dataset=nowhere"], "prepare_data.py"),
    (["--device=tpu"], "device"), (["--batch_size=8", "--grad_accum=3"], "multiple"), (["--seq_len=7000"], "too small"), (["--resume"], "no such checkpoint"),
    (["--tied=maybe"], "tied"), (["--ema=1"], "ema"), (["--preset=huge"], "preset")])
def test_train_refuses(data_dir, tmp_path, capsys, flags, word):
    assert word in refused(train, capsys, *SMALL, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}", *flags)
    assert not (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.parametrize("flags, word", [
    (["--nonsense"], "nonsense"), (["--block_size=25"], "block_size"), (["--block_size=0"], "block_size"), (["--steps=0"], "steps"), (["--temperature=-1"], "temperature"),
    (["--top_p=0"], "top_p"), (["--top_p=1.1"], "top_p"), (["--prompt=" + "A" * 25], "prompt"), (["--prompt=é"], "vocabulary"), (["--length=25"], "24"), (["--length=-1"], "length"),
    (["--sampler=ar", "--steps=3"], "--steps does nothing"), (["--sampler=confidence", "--criterion=kld"], "--criterion does nothing"),
    (["--num_samples=0"], "num_samples"), (["--stop=AB"], "stop"), (["--ckpt=nowhere.pt"], "nowhere.pt"), (["--threshold=2", "--sampler=confidence"], "threshold"),
    (["--prompt=A", "--template=A__"], "template"), (["--watch", "--json"], "json"), (["--device=tpu"], "device")])
def test_sample_refuses(checkpoint, capsys, flags, word):
    assert word in refused(sample, capsys, f"--ckpt={checkpoint}", *flags)


def test_damaged_files_are_refused(data_dir, checkpoint, tmp_path, capsys):
    content = open(checkpoint, "rb").read()
    bad = tmp_path / "bad.pt"
    for junk in (b"", b"text", content[: len(content) // 2]):
        bad.write_bytes(junk)
        assert "bad.pt" in refused(sample, capsys, f"--ckpt={bad}")
    saved = torch.load(checkpoint, weights_only=True)
    for change in (lambda m: m.pop("norm.weight"), lambda m: m.update(extra=torch.zeros(1)), lambda m: m.update({"norm.weight": torch.zeros(3)})):
        weights = dict(saved["ema"])
        change(weights)
        save_checkpoint(bad, **{**saved, "ema": weights})
        assert "does not fit" in refused(sample, capsys, f"--ckpt={bad}")
    assert "another shape" in refused(train, capsys, "--resume", f"--out_dir={os.path.dirname(checkpoint)}", f"--data_dir={data_dir}", "--n_embd=32")
    folder = tmp_path / "data" / "markov"
    os.makedirs(folder)
    for part in ("train.bin", "val.bin", "meta.json"):
        (folder / part).write_bytes(open(os.path.join(data_dir, "markov", part), "rb").read())
    with open(folder / "val.bin", "r+b") as file:
        file.truncate(100)
    assert "val.bin" in refused(train, capsys, *SMALL, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}")
    (folder / "meta.json").write_text("{}")
    assert "damaged" in refused(train, capsys, *SMALL, f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path / 'out'}")


@pytest.mark.parametrize("flags, word", [(["nonsense"], "nonsense"), (["text"], "--input"), (["text", "--input=nowhere"], "nowhere"), (["text", "--input=BINARY"], "UTF-8"),
                                         (["text", "--input=SHORT"], "short"), (["text", "--input=SMALL"], "too small"), (["text", "--input=SMALL", "--tokenizer=words"], "tokenizer"),
                                         (["markov", "--successors=99"], "successors"), (["pydocs", "--states=9"], "does nothing")])
def test_prepare_data_refuses(tmp_path, capsys, flags, word):
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "SHORT").write_text("a")
    (tmp_path / "SMALL").write_text("abcdefgh" * 4)
    flags = [f.replace("input=", f"input={tmp_path}/") if f[8:].isupper() else f for f in flags]
    assert word in refused(prepare_data, capsys, *flags, f"--data_dir={tmp_path / 'data'}")
    assert not os.path.exists(tmp_path / "data" / flags[0]) and not list((tmp_path / "data").glob("*.tmp"))


def test_no_write_permission_is_one_line(data_dir, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "file" in refused(train, capsys, *SMALL, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'file'}")
    assert "file" in refused(prepare_data, capsys, "markov", "--tokens=1000", f"--data_dir={tmp_path / 'file'}")


def test_sample_command_line(checkpoint, capsys):
    for flags in ([], ["--sampler=ar"], ["--sampler=arpc", "--criterion=tvd"], ["--sampler=confidence"], ["--sampler=speculative"], ["--template=A__B____"]):
        assert call(sample, f"--ckpt={checkpoint}", "--num_samples=3", "--batch_size=2", "--json", *flags) == 0
        first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert len(first["samples"]) == 2 and len(second["samples"]) == 1 and {"nfe", "passes_per_token", "tokens_per_second"} <= first.keys()
    assert first["samples"][0][0] == "A" and first["samples"][0][3] == "B" and len(first["samples"][0]) == 8
    assert call(sample, f"--ckpt={checkpoint}", "--prompt=AB", "--prompt=C", "--num_samples=2", "--block_size=5", "--sampler=arpc", "--watch=probs") == 0
    out = capsys.readouterr().out
    assert "\033" not in out and "passes for" in out and "AR" in out and "\nC" in out


@pytest.fixture(scope="session")
def learned(data_dir, tmp_path_factory):
    """The checkpoints of small models that have learned the Markov chain, by noise."""
    flags = ["--max_iters=400", "--n_embd=32", "--seq_len=32", "--batch_size=16", "--learning_rate=0.01", "--dropout=0", "--warmup_iters=20",
             "--eval_seqs=64", "--block_sizes=1,4"]
    out = {noise: tmp_path_factory.mktemp(noise) for noise in NOISES}
    for noise, folder in out.items():
        run_training(data_dir, folder, *flags, f"--noise={noise}")
    return out


def test_model_learns_a_markov_chain(data_dir, learned):
    """It all hangs together: after few steps far below the unigram entropy, near the chain's own, and never below it."""
    meta = json.load(open(os.path.join(data_dir, "markov", "meta.json")))
    truth = (meta["first_nats"] + 31 * meta["entropy_rate"]) / 32
    for noise, folder in learned.items():
        last = [json.loads(line) for line in open(folder / "log.jsonl") if "val" in line][-1]["val"]
        for S, share in (("1", 0.35), ("4", 0.6)):
            assert truth - 0.05 < last[S][0] < truth + share * (meta["unigram_nats"] - truth), (noise, S)


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood


@BOTH
@pytest.mark.parametrize("noise", NOISES)
@torch.no_grad()
def test_the_bounds_are_bounds(noise, ar):
    """For a model small enough to enumerate: NELBO(3), and the log-sum-exp bound of a mixture of block sizes 1 and 3, against the exact
    likelihoods; p_3 is the law of ancestral sampling in many steps. evaluate() estimates that NELBO without bias."""
    model = tiny(noise, vocab_size=V, seq_len=n, ar=ar)
    answer = lambda xt, alpha=None: model(torch.zeros_like(xt), xt, n).double()
    nelbo = exact_nelbo(model.noise, lambda alpha: answer(noisy_states(model.noise)), STATES)
    p3 = ancestral_law(model.noise, lambda xt, alpha: answer(xt).softmax(-1), 500)
    assert (nelbo > -p3.log() - 1e-3).all() and (nelbo > -p3.log() + 1e-3).any()
    z = torch.full((1, n), model.noise.mask if noise == "masked" else 1)  # the noise that the AR side reads from
    p1 = model(STATES, z.expand(len(STATES), n), 1).double().log_softmax(-1).gather(-1, STATES[..., None])[..., 0].sum(1).exp()
    assert p1.sum() == pytest.approx(1)
    both, truth = torch.stack([-p1.log(), nelbo]), -(0.3 * p1 + 0.7 * p3).log()
    jensen, log_sum_exp = train.mixture_bounds(both, [0.3, 0.7])
    assert close(jensen, 0.3 * both[0] + 0.7 * both[1], 1e-9) and (jensen > truth - 1e-3).all()
    assert (log_sum_exp > truth - 1e-3).all() and log_sum_exp.mean() <= jensen.mean()
    far = both + torch.tensor([[0.0], [8.0]])  # where one size is far better, it is the log-sum-exp
    assert close(train.mixture_bounds(far, [0.3, 0.7])[1].mean(), -torch.logsumexp(torch.tensor([[0.3], [0.7]]).log() - far, 0).mean(), 0.02)
    torch.manual_seed(0)  # with much noise the log-sum-exp of the estimates sinks below the truth; this does not
    noisy = both.repeat(1, 3000)
    noisy += 3 * torch.randn_like(noisy)
    naive = -torch.logsumexp(torch.tensor([[0.3], [0.7]]).log() - noisy, 0).mean()
    assert naive < truth.mean() - 0.5 and train.mixture_bounds(noisy, [0.3, 0.7])[1].mean() > truth.mean()
    draws = train.evaluate(model, STATES.flatten().numpy(), n, len(STATES), 600, batch_size=27).mean(1) * n
    assert abs(draws.mean() - nelbo.mean()) < 4 * draws.std() / 600**0.5 + 2e-3  # 2e-3: t starts at 1e-3, not at 0


def test_more_draws_shrink_the_error_like_one_over_the_root(data_dir, learned):
    model, tokens = load_checkpoint(learned["masked"] / "ckpt.pt")[0], train.open_data(os.path.join(data_dir, "markov"))[1]
    means = train.evaluate(model, tokens, 4, 4, draws=400, batch_size=4).mean(1)  # one estimate a draw
    ratio = means.std() / means.view(25, 16).mean(1).std()
    assert 2.8 < ratio < 5.6  # 4, and its own error


@pytest.mark.parametrize("noise", NOISES)
def test_variance_of_a_level_a_block_and_a_level_a_sequence(data_dir, learned, noise):
    """Both estimate the same NELBO. TRIALS=5000 and -s print how their variances compare, and those of their gradients."""
    trials, (model, _) = int(os.environ.get("TRIALS", 60)), load_checkpoint(learned[noise] / "ckpt.pt")
    tokens, rows = train.open_data(os.path.join(data_dir, "markov"))[0], torch.arange(8)
    x0, sizes, found = train.crops(tokens, rows * 3200, 32, "cpu"), torch.full((8,), 4), {}
    for kind in ("block", "sequence", "sequence, independent"):
        losses, first, second = [], 0, 0
        for trial in range(trials):
            shared = uniform(trial, 0, rows if "independent" in kind else torch.zeros(8, dtype=torch.int64))
            shift = torch.stack([shared, uniform(trial, 1, rows)], 1)
            t = noise_levels(shift, rows / 8, sizes if kind == "block" else torch.full((8,), 32), 32)
            loss = token_losses(model, x0, sizes, t, uniform(trial, 2, rows[:, None], torch.arange(32))).mean()
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()
            first, second = first + gradient / trials, second + gradient**2 / trials
            losses.append(loss.detach())
        found[kind] = torch.stack(losses).double(), float((second - first**2).sum())
    for kind, (losses, gradient) in list(found.items())[1:]:
        a, b = found["block"][0], losses
        print(f"\n{noise}: variance with one level a {kind} / one a block: {b.var() / a.var():.2f}, of the gradient {gradient / found['block'][1]:.2f}")
        assert abs(a.mean() - b.mean()) < 5 * ((a.var() + b.var()) / trials) ** 0.5


def test_likelihood_tables(data_dir, learned, tmp_path, capsys):
    paths = [str(folder / "ckpt.pt") for folder in learned.values()]
    flags = [f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--eval_only", "--eval_block_sizes=1,2,4,L", "--eval_draws=2", "--eval_seqs=16", "--device=cpu"]
    assert call(train, *flags, "--compare", *paths) == 0
    out = capsys.readouterr().out
    masked, uniform_ = json.load(open(tmp_path / "eval.json"))
    assert set(masked["rows"]) == {"1", "2", "4", "32", "mixture: Jensen", "mixture: log-sum-exp", "true entropy"} and "side by side" in out
    for result in (masked, uniform_):
        nats = {k: x["nats"] for k, x in result["rows"].items()}
        assert nats["mixture: log-sum-exp"] <= nats["mixture: Jensen"] == pytest.approx((nats["1"] + nats["4"]) / 2)
        assert nats["true entropy"] < nats["1"] and result["rows"]["1"]["perplexity"] == pytest.approx(math.exp(nats["1"]))
    first = (tmp_path / "eval.json").read_text()
    assert call(train, *flags, "--compare", *paths) == 0 and (tmp_path / "eval.json").read_text() == first
    assert "--eval_only" in refused(train, capsys, "--compare", paths[0])


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints


PUBLISHED = dict(name="blockgen", type="ddit", hidden_size=24, cond_dim=10, length=21, n_blocks=2, n_heads=2, dropout=0.1, attn_backend="flash_attn", x0_causal=True)


def published_tensors(K, seed=0):
    """Random weights in the published layout, none of them trivial."""
    torch.manual_seed(seed)
    d, c = PUBLISHED["hidden_size"], PUBLISHED["cond_dim"]
    rand = lambda *shape: 0.2 * torch.randn(shape)
    w = {"vocab_embed.embedding": rand(K, d), "rotary_emb.inv_freq": 10000.0 ** -(torch.arange(0, 12, 2) / 12), "output_layer.norm_final.weight": 1 + rand(d),
         "sigma_map.mlp.0.weight": rand(c, 256), "sigma_map.mlp.0.bias": rand(c), "sigma_map.mlp.2.weight": rand(c, c), "sigma_map.mlp.2.bias": rand(c),
         "output_layer.linear.weight": rand(K, d), "output_layer.linear.bias": rand(K), "output_layer.adaLN_modulation.weight": rand(2 * d, c), "output_layer.adaLN_modulation.bias": rand(2 * d)}
    for i in range(PUBLISHED["n_blocks"]):
        parts = {"norm1.weight": 1 + rand(d), "attn_qkv.weight": rand(3 * d, d), "attn_out.weight": rand(d, d), "norm2.weight": 1 + rand(d), "mlp.0.weight": rand(4 * d, d),
                 "mlp.0.bias": rand(4 * d), "mlp.2.weight": rand(d, 4 * d), "mlp.2.bias": rand(d), "adaLN_modulation.weight": rand(6 * d, c), "adaLN_modulation.bias": rand(6 * d)}
        w |= {f"blocks.{i}.{k}": v for k, v in parts.items()}
    return w


def write_published(folder, tensors, **config):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: published checkpoints are not tested")
    os.makedirs(folder, exist_ok=True)
    json.dump({**PUBLISHED, **config}, open(os.path.join(folder, "config.json"), "w"))
    safetensors.save_file(tensors, os.path.join(folder, "model.safetensors"))
    return str(folder)


def published_forward(w, x0, xt, S, token_causal):
    """The network as its layout describes it, unfolded: adaLN at every layer, every mask spelled out. (N, L, K) logits of the noisy half."""
    d, heads, L = PUBLISHED["hidden_size"], PUBLISHED["n_heads"], x0.shape[1]
    layer = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
    silu = lambda x: x / (1 + torch.exp(-x))
    time = torch.tensor([1.0] * 128 + [0.0] * 128)
    condition = silu(layer(silu(layer(time, "sigma_map.mlp.0")), "sigma_map.mlp.2"))
    norm = lambda x, name: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * w[name]
    modulate = lambda x, shift, scale: x * (1 + scale) + shift
    mask = torch.zeros(2 * L, 2 * L, dtype=torch.bool)
    for i, j in itertools.product(range(L), range(L)):
        mask[i, j] = j <= i if token_causal else j // S <= i // S
        mask[L + i, j] = j // S < i // S
        mask[L + i, L + j] = i // S == j // S
    angle = torch.arange(L).repeat(2)[:, None] * w["rotary_emb.inv_freq"]
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    rotated = lambda x: x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin
    x = w["vocab_embed.embedding"][torch.cat([x0, xt], 1)]
    for i in range(PUBLISHED["n_blocks"]):
        shift1, scale1, gate1, shift2, scale2, gate2 = layer(condition, f"blocks.{i}.adaLN_modulation").chunk(6)
        q, k, v = layer(modulate(norm(x, f"blocks.{i}.norm1.weight"), shift1, scale1), f"blocks.{i}.attn_qkv").chunk(3, -1)
        q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, v))
        scores = (rotated(q) @ rotated(k).transpose(-1, -2) / (d // heads) ** 0.5).masked_fill(~mask, -math.inf)
        x = x + gate1 * layer((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"blocks.{i}.attn_out")
        h = layer(modulate(norm(x, f"blocks.{i}.norm2.weight"), shift2, scale2), f"blocks.{i}.mlp.0")
        x = x + gate2 * layer(0.5 * h * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3))), f"blocks.{i}.mlp.2")
    shift, scale = layer(condition, "output_layer.adaLN_modulation").chunk(2)
    return layer(modulate(norm(x, "output_layer.norm_final.weight"), shift, scale), "output_layer.linear")[:, L:]


@pytest.mark.parametrize("token_causal", [True, False])
@pytest.mark.parametrize("noise", NOISES)
@torch.no_grad()
def test_published_weights_give_the_logits_of_their_layout(noise, token_causal, tmp_path):
    w = published_tensors(14)
    model, _ = load_checkpoint(write_published(tmp_path, w, x0_causal=token_causal), noise=noise)
    v = 13 if noise == "masked" else 14
    assert model.config.vocab_size == v and model.config.noise == noise
    x0 = torch.randint(0, v, (2, 21))
    xt = model.noise.corrupt(x0, 0.5)
    for S in (1, 4, 21):
        expected = published_forward(w, x0, xt, S, token_causal)[..., :v]
        assert close(model(x0, xt, S), expected, 1e-5)
        cache, clean = model.new_cache(2), None
        for begin in range(0, 21, S):
            assert close(model.denoise(xt[:, begin : begin + S], cache, clean), expected[:, begin : begin + S], 1e-5)
            clean = x0[:, begin : begin + S]
    cache = model.new_cache(2)
    assert close(model.verify(x0, cache, xt), published_forward(w, x0, xt, 1, token_causal)[..., :v], 1e-5)


def test_published_weights_that_do_not_fit_are_refused(tmp_path, capsys):
    w = published_tensors(14)
    changes = {"missing": lambda t: t.pop("blocks.1.mlp.0.bias"), "unexpected": lambda t: t.update(more=torch.zeros(1)), "has shape": lambda t: t.update({"blocks.0.norm1.weight": torch.ones(5)}),
               "not finite": lambda t: t["blocks.0.attn_out.weight"].fill_(math.nan), "inv_freq": lambda t: t["rotary_emb.inv_freq"].mul_(2)}
    for word, change in changes.items():
        tensors = {k: v.clone() for k, v in w.items()}
        change(tensors)
        assert word in refused(sample, capsys, f"--ckpt={write_published(tmp_path / 'bad', tensors)}", "--noise=masked")
    for config in (dict(n_blocks=3), dict(hidden_size=48), dict(cond_dim=11)):
        assert "does not fit" in refused(sample, capsys, f"--ckpt={write_published(tmp_path / 'bad', w, **config)}", "--noise=masked")
    assert "--noise" in refused(sample, capsys, f"--ckpt={write_published(tmp_path / 'bad', w)}")
    with open(tmp_path / "bad" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert "damaged" in refused(sample, capsys, f"--ckpt={tmp_path / 'bad'}", "--noise=masked")
    os.remove(tmp_path / "bad" / "config.json")
    assert "config.json" in refused(sample, capsys, f"--ckpt={tmp_path / 'bad'}", "--noise=masked")


def test_training_starts_from_a_checkpoint(data_dir, checkpoint, tmp_path, capsys):
    """--init_from: a mixture of block sizes from an AR model; one of another shape is refused."""
    start = run_training(data_dir, tmp_path / "ar", "--max_iters=3", "--block_sizes=1")
    after = run_training(data_dir, tmp_path / "mixed", "--max_iters=1", "--block_sizes=1,5", "--learning_rate=0", f"--init_from={tmp_path / 'ar' / 'ckpt.pt'}")
    assert close(after["model"]["embedding.weight"], start["ema"]["embedding.weight"], 1e-6)
    assert "does not fit" in refused(train, capsys, *SMALL, "--n_embd=32", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'x'}", f"--init_from={checkpoint}")
