"""Generate text, block by block, from a checkpoint.

    python sample.py                                  # out/ckpt.pt, ancestral sampling, one sample
    python sample.py --sampler=ar                     # the same weights, one token at a time
    python sample.py --sampler=arpc --steps=8         # diffusion proposes, the AR side sends back
    python sample.py --sampler=speculative            # diffusion drafts, AR verifies: AR samples
    python sample.py --prompt="Return the" --watch    # every step, in the terminal
    python sample.py --length=1000                    # longer than the context of the model
    python sample.py --template="Return the [2 tokens] of"           # holes to fill in
    python sample.py --ckpt=out-math/ckpt.pt --problem=17 --watch    # a math problem and its answer
    python sample.py --table --num_samples=64         # quality against passes, every sampler
    python sample.py --table --judge=gpt2-large       # the same, judged by another model
    python sample.py --ckpt=FOLDER --dataset=gsm8k --table           # published weights

One loop over blocks, `generate`, serves all samplers: each is a function that fills one block. What
is drawn depends on seed, row, block and step alone, so a row is the same in any batch. (But in
speculative decoding rows wait for the slowest one: there only its law is the same.) The samplers as
a paper would write them, for one row, with no cache, are in test_blockgen.py: read `Direct` first.
"""
import math
import os
import re
import sys
import time
from dataclasses import dataclass
from functools import cached_property, partial
from statistics import mean
from typing import Literal

# prepare_data comes first: it sets an option that torch reads when it is loaded
from prepare_data import END, encode_problem, is_right, load_tokenizer, open_problems, solve
from prepare_data import from_values, parse_flags, run_script

import torch
import torch.nn.functional as F

from blockgen import SCHEDULES, at_index, cross_entropy, draw, random_numbers
from blockgen import UserError, check_at_least, check_choices, find_device, load_checkpoint

# what a random number is for, a part of its key
REVEAL, RENOISE, PRIOR, ACCEPT, RESIDUAL, VERIFY = range(6)


# ----------------------------------------------------------------------------------------------
# The loop over blocks


@torch.no_grad()
def generate(
    model, n, length, *, given=None, stop=-1, first_row=0, watch=lambda *_: None, **options
):
    """n sequences of `length` tokens by the sampler of the options: (tokens (n, length), stats).
    stats: nfe, the number of network passes, and seconds. Raises UserError.

    given (n, length): tokens that stand already, -1 where free; anywhere, and different in each
    row. They are never noised. stop: a token that ends a row; the row is filled up with it. Rows
    count from first_row in the key of the random numbers. watch(run, xt, x, sent_back) is called
    after every step, with the block (N, n) before and after it, and what goes back to noise.

    For a row of 8 tokens and blocks of 4, stop = 9, when the first block is written:

        position    0  1  2  3    4  5  6  7
        given       5  9 -1 -1   -1 -1  2 -1
        tokens      5  9  3  4   -1 -1  2 -1    -1: not decided
        free                      x  x     x    not decided, in the block at hand, 4 to 7

    The 9 at position 1 was given, so it ends nothing; nor would one written at 4 or 5, before a
    given token. One written at 7 would end the row."""
    o = Options(**options)
    began = time.time()
    given = torch.full((n, length), -1) if given is None else given
    run = Run(model, o, given.to(model.device), first_row, watch)
    given_behind = (run.tokens >= 0).flip(1).cumsum(1).flip(1) > 0  # there or further on
    while (run.tokens < 0).any():
        # Fill the next block, if something in it is free. A single token is the AR side's.
        run.next_block()
        if run.free().any():
            sampler = "ar" if run.end - run.begin == 1 else o.sampler
            FILL[sampler](run)

        # Fill up the rows that have ended: they need nothing more.
        if stop >= 0:
            ends = (run.tokens == stop) & ~given_behind
            run.tokens[ends.cumsum(1) > 0] = stop

        # The next block begins at the first token that some row lacks.
        n_decided = int((~run.free()).all(0).cumprod(0).sum())
        if n_decided == 0:
            raise RuntimeError(f"the sampler {o.sampler} has not decided a block's first token")
        run.begin += n_decided
    return run.tokens, dict(nfe=run.nfe, seconds=time.time() - began)


class Run:
    """The state of one call of generate(): the tokens, and the block [begin, end) at hand."""

    def __init__(self, model, options, given, first_row, watch):
        self.model, self.options = model, options
        self.block_size = 1 if options.sampler == "ar" else options.block_size
        self.tokens = given.clone()  # (N, L) -1 where nothing is decided
        self.rows = torch.arange(first_row, first_row + len(given))  # (N,)
        self.watch = watch
        # the context begins at `window`, and the cache with it
        self.nfe = self.begin = self.window = 0
        self.cache = model.new_cache(len(given))

    def next_block(self):
        """Choose the end of the block that begins at `begin`: it stays within the length and within
        the context, the seq_len tokens from `window` on. When those are all decided, the context
        moves on and keeps the last half, so a text may be longer than the context."""
        seq_len = self.model.config.seq_len
        if self.begin == self.window + seq_len:
            self.window = self.begin - seq_len // 2
            self.cache = self.model.new_cache(len(self.rows))
        self.end = min(self.begin + self.block_size, self.window + seq_len, self.tokens.shape[1])

    def block(self):
        """The tokens of the block, (N, n): a view, to read and to write."""
        return self.tokens[:, self.begin : self.end]

    def free(self):
        """Where the block is not decided, (N, n)."""
        return self.block() < 0

    def write(self, x, where):
        """Decide the tokens of the block at these places (N, n): they are those of x (N, n)."""
        self.block().copy_(torch.where(where, x, self.block()))

    def random(self, purpose, step=0):
        """A uniform number for each token of the block: float64 (N, n)."""
        key = self.options.seed, purpose, step, self.begin
        return random_numbers(key, self.rows, self.end - self.begin).to(self.tokens.device)

    def prior(self, purpose, step=0):
        """A block of pure noise: tokens (N, n)."""
        u = self.random(purpose, step)
        return self.model.noise.prior(u.shape, u=u)

    def noisy_block(self):
        """The tokens that are decided, noise between them: (N, n)."""
        return torch.where(self.free(), self.prior(PRIOR), self.block())

    def denoise(self, xt):
        """Logits (N, n, V) of the block xt (N, n). The same pass commits what stands before it."""
        self.nfe += 1
        commit = self.tokens[:, self.window + self.cache.length : self.begin]
        return self.model.denoise(xt, self.cache, commit, self.block_size).float()

    def verify(self, x, step=0):
        """AR logits (N, n, V) of the block of proposed tokens x (N, n). Raises UserError."""
        if not self.model.config.token_causal:
            raise UserError("this model's clean tokens are block-causal: its AR side has no cache")
        self.nfe += 1
        # the noise is read under ar="paper" alone
        return self.model.verify(x, self.cache, self.prior(VERIFY, step)).float()

    def law(self, logits):
        """What tokens are drawn from, (N, n, V): the model's distribution at the temperature, and
        of that the k likeliest tokens."""
        logits = logits / max(self.options.temperature, 1e-9)  # 0 is greedy
        if self.options.top_k:
            values, tokens = logits.topk(min(self.options.top_k, logits.shape[-1]))
            logits = torch.full_like(logits, -math.inf).scatter(-1, tokens, values)
        return logits.softmax(-1)


# ----------------------------------------------------------------------------------------------
# Filling one block. Temperature and top_k shape what is drawn, by run.law; scores and confidence
# are of the model's own distribution. (The authors' have the temperature in them.)


def fill_by_steps(run):
    """Ancestral sampling: reverse steps from pure noise; a block of one token takes a single step.

    Under ARPC (arXiv 2606.02241) all steps but the last are guided, or those that the options say:
    such a step goes all the way, to a proposal for the whole block, and sends the tokens that score
    worst back to noise, max(1, round((1 - alpha) n)) of n; halves are rounded to the even number,
    by the authors down."""
    o, free = run.options, run.free()
    n = free.shape[1]
    steps = o.steps if n > 1 else 1
    t = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha = SCHEDULES[run.model.config.schedule](t)[0].tolist()  # from 0 to 1
    xt = run.noisy_block()
    for k in range(steps):
        # Predict the clean block, and step to the next noise level or to a proposal.
        guided = o.sampler == "arpc" and k in range(o.warmup, steps - 1, o.guide_every)
        alpha_s = 1.0 if guided else alpha[k + 1]
        logits = run.denoise(xt)
        x = run.model.noise.step(run.law(logits), xt, alpha_s, alpha[k], run.random(REVEAL, k))
        x = torch.where(free, x, xt)

        # Send the worst tokens of a proposal back to noise.
        sent_back = torch.zeros_like(free)
        if guided:
            count = max(1, round((1 - alpha[k + 1]) * n))
            score = CRITERIA[o.criterion](Proposal(run, x, xt, logits, k))
            sent_back = highest(score, free, count)
        run.watch(run, xt, x, sent_back)
        xt = torch.where(sent_back, run.prior(RENOISE, k + 1), x)
    run.write(xt, free)


def highest(score, free, count):
    """Where the `count` highest scores (N, n) of free positions are; all, if they are fewer."""
    score = score.where(free, -math.inf)
    rank = score.argsort(descending=True, stable=True).argsort()
    return (rank < count) & free


def fill_by_confidence(run):
    """Each pass writes the tokens whose probability exceeds the threshold, at least the likeliest
    (SDAR, arXiv 2510.06303; Fast-dLLM). The probability is the model's own of the token drawn."""
    xt, k = run.noisy_block(), 0
    while (free := run.free()).any():
        logits = run.denoise(xt)
        x = draw(run.law(logits), run.random(REVEAL, k))
        confidence = at_index(logits.softmax(-1), x)  # (N, n)
        sure = confidence > run.options.threshold
        sure = free & sure | highest(confidence, free, 1)
        x = torch.where(sure, x, xt)
        run.watch(run, xt, x, torch.zeros_like(free))
        run.write(x, sure)
        xt, k = x, k + 1


def fill_by_draft(run):
    """Speculative decoding (Leviathan et al. 2022, arXiv 2211.17192): diffusion drafts in one pass,
    the AR side verifies in one, and what comes out is exactly an AR sample, at this temperature
    and top_k. Nothing is decided behind the first rejection: the next block begins at the first
    token that some row lacks."""
    free = run.free()

    # Draft x ~ q.
    xt = run.noisy_block()
    q = run.law(run.denoise(xt))  # (N, n, V)
    x = torch.where(free, draw(q, run.random(REVEAL)), xt)

    # Accept each token with probability min(1, p(x) / q(x)), up to the first rejection.
    p = run.law(run.verify(x))  # (N, n, V)
    ratio = at_index(p, x) / at_index(q, x)
    likely = run.random(ACCEPT) < ratio
    n_accepted = (~free | likely).cumprod(1).sum(1, keepdim=True)  # (N, 1)

    # In place of the first token that is rejected, draw from (p - q)+.
    place = torch.arange(free.shape[1], device=x.device)  # (n,)
    replacement = draw((p - q).clamp(min=0), run.random(RESIDUAL))
    x = torch.where(place == n_accepted, replacement, x)
    written = place <= n_accepted  # (N, n)
    run.watch(run, xt, x, ~written & free)
    run.write(x, written)

    # The cache has one length for all rows: it takes what all of them have accepted.
    run.cache.accept(int(n_accepted.min()))


# To add a sampler: write a function that fills a block, and name it here.
FILL = {
    "ancestral": fill_by_steps,
    "ar": fill_by_steps,  # its blocks are single tokens
    "arpc": fill_by_steps,
    "confidence": fill_by_confidence,
    "speculative": fill_by_draft,
}


# ----------------------------------------------------------------------------------------------
# The criteria of ARPC: how bad each token of a proposal is


class Proposal:
    """What a criterion may ask about a proposal x (N, n), which a step made from xt (N, n)."""

    def __init__(self, run, x, xt, logits, step):
        self.run, self.x, self.step = run, x, step
        self.maybe_noise = run.model.noise.maybe_noise(xt)  # (N, n)
        # With masked noise a token that was revealed before this step is sure: its logarithm is 0,
        # that of the others so low that its exponential is 0.
        point_mass = 1e4 * F.one_hot(x, logits.shape[-1])
        logits = torch.where(self.maybe_noise[..., None], logits, point_mass)
        self.diffusion = logits.log_softmax(-1)

    @cached_property
    def ar(self):
        """log p_AR (N, n, V): a network pass, made when a criterion first asks."""
        return self.run.verify(self.x, self.step).log_softmax(-1)


def ar_nll(p):
    """-log p_AR(x), nats (N, n)."""
    return -at_index(p.ar, p.x)


def kld(p):
    """KL(AR || diffusion), nats (N, n). It would be infinite at revealed tokens, where the AR
    side's -log p_AR(x) takes its place. (By the authors' epsilon they go back before others.)"""
    return torch.where(p.maybe_noise, divergence(p.ar, p.diffusion), ar_nll(p))


def divergence(logp, logq):
    """KL(p || q), nats, from (..., V) to (...)."""
    return (logp.exp() * (logp - logq)).sum(-1)


def entropy(logp):
    """Nats, from (..., V) to (...)."""
    return -(logp.exp() * logp).sum(-1)


# To add a criterion: a function from a proposal to scores (N, n), the worst highest.
CRITERIA = {
    "kld": kld,
    "reverse_kld": lambda p: divergence(p.diffusion, p.ar),
    "tvd": lambda p: (p.ar.exp() - p.diffusion.exp()).abs().sum(-1) / 2,
    "ar_nll": ar_nll,
    "ar_gap": lambda p: p.ar.amax(-1) + ar_nll(p),  # nats to the likeliest token
    "ar_entropy": lambda p: entropy(p.ar),
    "diffusion_entropy": lambda p: entropy(p.diffusion),
    "diffusion_confidence": lambda p: -p.diffusion.amax(-1).exp(),
    # how far the second token is behind the likeliest
    "diffusion_margin": lambda p: p.diffusion.exp().topk(2).values.diff()[..., 0],
    "random": lambda p: p.run.random(ACCEPT, p.step),
}


@dataclass
class Options:
    """How to sample: the keyword arguments of generate(), and flags."""

    sampler: Literal[tuple(FILL)] = "ancestral"  # how a block is filled
    block_size: int = 16  # tokens per block; the length if that is less
    steps: int = 16  # ancestral, arpc: reverse steps per block
    criterion: Literal[tuple(CRITERIA)] = "ar_nll"  # arpc: score of tokens (the paper: kld on text)
    warmup: int = 0  # arpc: steps of a block before guidance sets in
    guide_every: int = 1  # arpc: steps from one guided step to the next
    threshold: float = 0.9  # confidence: tokens whose probability is above this are written
    temperature: float = 1.0  # temperature of what tokens are drawn from; 0 is greedy
    top_k: int = 0  # draw from the k likeliest tokens only; 0: from all
    seed: int = 0  # seed of everything random

    def __post_init__(self):
        check_choices(self)
        check_at_least(self, 1, "block_size", "steps", "guide_every")
        check_at_least(self, 0, "warmup", "threshold", "temperature", "top_k", "seed")


# ----------------------------------------------------------------------------------------------
# Generative perplexity: how likely a judge finds a text


def load_judge(path, device):
    """A function that says of a text (nats, the tokens and the bytes that they are for). path: a
    checkpoint or published weights, whose AR side judges by its exact likelihood (under ar="paper"
    with random noise by a bound); or the name or folder of a model for the package transformers.

    As in the literature (the authors' metrics.py) the judge tokenizes the text again and cuts it to
    what it reads at a time; the first token is free of charge. began and ended: the judge reads its
    own start token before the text, its end token after it. (Theirs goes on after the first end
    token; our rows end there.)"""
    of_transformers = os.path.exists(f"{path}/tokenizer_config.json")
    if path.endswith(".pt") or os.path.exists(path) and not of_transformers:
        model, content = load_checkpoint(path, device)
        tokenizer = content["meta"]["tokenizer"]
        encode, decode = load_tokenizer(tokenizer)
        end = tokenizer["end"]
        start = tokenizer.get("start", end)
        longest = model.config.seq_len

        def logits(x):
            torch.manual_seed(0)  # of the noise that the AR side may need
            return model.verify(x, model.new_cache(1))[:, 1:]

    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
        encode = partial(tokenizer.encode, add_special_tokens=False)
        decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        longest = model.config.max_position_embeddings

        def logits(x):
            return model(x).logits[:, :-1]

    @torch.no_grad()
    def judge(text, began, ended):
        tokens = [start] * began + encode(text) + [end] * ended
        scored = tokens[1:longest]
        x = torch.tensor([tokens[:longest]], device=device)
        nats = cross_entropy(logits(x), x[:, 1:]).sum()
        scored_text = decode([token for token in scored if token != end])
        return nats, len(scored), len(scored_text.encode())

    return judge


# ----------------------------------------------------------------------------------------------
# What is to be written, and how good it is


def find_problems(flags, content):
    """The problems [(question, answer)] that the flags ask for; none if they ask for texts. A table
    is of problems if the dataset is. Raises UserError."""
    of_problems = flags.dataset or "row_length" in content["meta"]
    if flags.prompt or flags.template or flags.problem < 0 and not (flags.table and of_problems):
        return []
    args = content["args"]
    name = flags.dataset or args.get("dataset")
    if not name:
        raise UserError("this model has no dataset of its own: say --dataset=NAME")
    problems = open_problems(f"{flags.data_dir or args.get('data_dir', 'data')}/{name}")
    if flags.table:
        return problems[: flags.num_samples]
    if flags.problem >= len(problems):
        raise UserError(f"--problem must be below {len(problems)}, the number of problems")
    return [problems[flags.problem]] * flags.num_samples


def begin_rows(flags, tokenizer, encode, problems):
    """(rows, begins): the tokens that stand in each row, -1 where free, and where what counts
    begins: behind a question, or behind the start token of a text."""
    if problems:
        rows = [encode_problem(tokenizer, encode, question)[0] for question, _ in problems]
        return rows, [len(row) for row in rows]
    row = [tokenizer["start"]] if "start" in tokenizer else []
    begin = len(row)
    # the parts of a template are in turn a text and the number of tokens of a hole
    parts = HOLE.split(flags.template) if flags.template else [flags.prompt]
    for i, part in enumerate(parts):
        row += [-1] * int(part) if i % 2 else encode(part)
    return [row] * flags.num_samples, [begin] * flags.num_samples


def pad(rows, length):
    """Rows (M, length), -1 behind what stands; too long ones cut. Raises UserError if all are."""
    shortest = min(map(len, rows))
    if shortest > length:
        raise UserError(f"{shortest} tokens are given: say --length={shortest} or more")
    return torch.tensor([(row + [-1] * length)[:length] for row in rows])


def in_batches(model, given, begins, decode, size, options):
    """generate() for all rows of given, some at a time. Yields (samples, stats); a sample is what
    counts in a row, as tokens, its one end token included, and as text."""
    end = options["stop"]
    for i, part in enumerate(given.split(size)):
        tokens, stats = generate(model, *part.shape, given=part, first_row=i * size, **options)
        samples = []
        for row, begin in zip(tokens.tolist(), begins[i * size :]):
            row = row[begin:]
            while row[-2:] == [end, end]:
                row.pop()
            samples.append((row, decode([token for token in row if token != end])))
        yield samples, stats


# The samplers of a table
GRID = [dict(sampler="ar"), dict(sampler="speculative")]
GRID += [dict(sampler="ancestral", steps=k) for k in (1, 2, 4, 8, 16)]
GRID += [dict(sampler="confidence", threshold=p) for p in (0.5, 0.9)]
GRID += [
    dict(sampler="arpc", criterion=criterion, steps=k)
    for criterion in ("ar_nll", "kld", "diffusion_confidence", "random")
    for k in (2, 4, 8)
]


def share_solved(problems, samples):
    """The share of problems that are solved, and its standard error: a part of a line."""
    right = [is_right(text, answer) for (_, text), (_, answer) in zip(samples, problems)]
    share = mean(right)
    error = math.sqrt(share * (1 - share) / len(right))
    return f"{share:14.3f} {error:6.3f}"


def text_quality(judge, tokenizer, samples):
    """The same of texts: the perplexity and its standard error; the entropy of the tokens of a
    sample, nats, mean over samples, low after a collapse; bits per byte."""
    found = []
    for tokens, text in samples:
        share = torch.tensor(tokens).bincount() / len(tokens)
        entropy = torch.special.entr(share).sum()
        ended = tokenizer["end"] in tokens
        found.append([*judge(text, "start" in tokenizer, ended), entropy])
    nats, n_tokens, n_bytes, entropies = torch.tensor(found, dtype=torch.float64).T

    # The error is that of a ratio of sums, to first order.
    nats_a_token = nats.sum() / n_tokens.sum()
    error = (nats - nats_a_token * n_tokens).norm() / n_tokens.sum()
    perplexity = nats_a_token.exp()
    bits = nats.sum() / n_bytes.sum() / math.log(2)
    return f"{perplexity:14.3f} {perplexity * error:6.3f} {entropies.mean():6.2f} {bits:10.3f}"


def print_table(write, options, quality):
    """A line for every sampler: passes per batch, quality. write: in_batches() of some options."""
    for special in GRID:
        samples, passes = [], []
        for batch, stats in write({**options, **special}):
            samples += batch
            passes.append(stats["nfe"])
        name = " ".join(map(str, special.values()))
        print(f"{name:28} {mean(passes):7.1f} {quality(samples)}", flush=True)


# ----------------------------------------------------------------------------------------------
# The command line

HOLE = re.compile(r"\[([1-9]\d*) tokens?\]")


@dataclass
class Flags:
    ckpt: str = "out/ckpt.pt"  # checkpoint, or a folder of published weights
    num_samples: int = 1  # how many samples
    batch_size: int = 32  # how many samples at a time
    length: int = 0  # tokens of a sample, prompt included; 0: the seq_len of the model
    prompt: str = ""  # what a text begins with
    template: str = ""  # a text with holes such as [3 tokens]
    problem: int = -1  # solve the validation problem with this number, from 0 on
    dataset: str = ""  # problem, table: the dataset; by default that of the training
    data_dir: str = ""  # the folder of the datasets; by default that of the training
    device: str = "auto"  # cpu, cuda, ...; auto: cuda where there is one
    watch: bool = False  # show every step
    table: bool = False  # no samples, but quality against passes for every sampler
    judge: str = ""  # table of texts: a checkpoint, or a model for transformers such as gpt2-large

    def __post_init__(self):
        check_at_least(self, 1, "num_samples", "batch_size")
        chosen = bool(self.prompt) + bool(self.template) + (self.problem >= 0)
        if chosen > 1:
            raise UserError("--prompt, --template and --problem exclude each other")
        if self.template and not HOLE.search(self.template):
            raise UserError('--template needs a hole, "[1 token]" or "[2 tokens]" and so on')


def make_watcher(decode, color):
    """A function for generate(watch=...): a line for every pass of the first row. Bright: new in
    this pass; red and struck: sent back by ARPC, or rejected. Without color: +new+, -sent back-.
    A mask is `_`, a line's end ⏎, the end token ∎."""
    bright, red = ("\033[1;97m{}\033[0m", "\033[9;31m{}\033[0m") if color else ("+{}+", "-{}-")

    def watch(run, xt, x, sent_back):
        line = ""
        for old, token, is_back in zip(xt[0].tolist(), x[0].tolist(), sent_back[0]):
            text = decode([token]) or "_"  # nothing is left of a mask
            style = red if is_back else bright if token != old else "{}"
            line += style.format(text.replace("\n", "⏎").replace(END, "∎"))
        print(f"{run.nfe:4} {run.begin:4} | {line}")

    return watch


def print_samples(write, options, problems):
    """Every sample: a text, or the answer to a problem, the same for all."""
    for samples, stats in write(options):
        for _, text in samples:
            if problems:
                question, reference = problems[0]
                verdict = "right" if is_right(text, reference) else "wrong"
                text = f"{question}\n{text}= {solve(text)}, {verdict}"
            print(f"{text}\n" + "-" * 80)
        print(f"nfe {stats['nfe']}, seconds {stats['seconds']:.1f}")


def main():
    values = parse_flags(__doc__, Flags, Options)
    flags = from_values(Flags, values)
    options = vars(from_values(Options, values))
    device = find_device(flags.device)
    model, content = load_checkpoint(flags.ckpt, device)
    tokenizer = content["meta"]["tokenizer"]
    encode, decode = load_tokenizer(tokenizer)
    options["stop"] = tokenizer.get("end", -1)

    # Choose what is to be written.
    problems = find_problems(flags, content)
    if flags.judge and problems:
        raise UserError("--judge is for texts: an answer is right or wrong")
    rows, begins = begin_rows(flags, tokenizer, encode, problems)
    usual = len(rows[0]) if flags.template else model.config.seq_len
    given = pad(rows, flags.length or usual)
    write = partial(in_batches, model, given, begins, decode, flags.batch_size)

    # Write it.
    if not flags.table:
        if flags.watch:
            options["watch"] = make_watcher(decode, sys.stdout.isatty())
        return print_samples(write, options, problems)
    print(f"{flags.ckpt}: {model.config.noise} noise, {len(rows)} samples")
    if problems:
        n_long = sum(begin >= given.shape[1] for begin in begins)
        print(f"of problems, {n_long} of them too long and counted as wrong")
        print("sampler                       passes   share solved ± s.e.")
        quality = partial(share_solved, problems)
    else:
        print(f"of texts, judge: {flags.judge or 'its own AR side'}")
        judge = load_judge(flags.judge or flags.ckpt, device)
        print("sampler                       passes     perplexity ± s.e.   nats  bits/byte")
        quality = partial(text_quality, judge, tokenizer)
    print_table(write, options, quality)


if __name__ == "__main__":
    run_script(main)
