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
from prepare_data import (
    END,
    encode_problem,
    from_values,
    is_right,
    load_tokenizer,
    open_data,
    open_problems,
    parse_flags,
    run_script,
    solve,
)

import torch
import torch.nn.functional as F

from blockgen import (
    SCHEDULES,
    UserError,
    at_index,
    check_choices,
    cross_entropy,
    draw,
    find_device,
    load_checkpoint,
    random_numbers,
)

# what a random number is for, a part of its key
REVEAL, RENOISE, PRIOR, ACCEPT, RESIDUAL, VERIFY, JUDGE = range(7)


# ----------------------------------------------------------------------------------------------
# The loop over blocks


@torch.no_grad()
def generate(model, n, length, *, given=None, stop=-1, first_row=0, watch=None, **options):
    """n sequences of `length` tokens by the sampler of the options: (tokens (n, length), stats).

    given (n, length): tokens that stand already, -1 where free; anywhere, and different in each
    row. They are never noised. stop: a token that ends a row; the row is filled up with it. Rows
    count from first_row in the key of the random numbers. watch(run, xt, x, sent_back) is called
    after every step, with the block (N, n) before and after it, and what goes back to noise.
    stats: nfe (network passes), tokens (written), seconds. Raises UserError.

    The words of the code, for a row of 8 tokens, blocks of 4, stop = 9; the first is written:

        position    0  1  2  3    4  5  6  7
        tokens      5  9  3  4    .  .  2  .
        given       x  x  -  -    -  -  x  -     stands from the start
        decided     x  x  x  x    -  -  x  -     given or written: final
        free                      x  x  -  x     not decided, in the block at hand, 4 to 7
        ends        -  -  -  -    -  -  -  -     a written 9 with nothing given behind it

    The 9 at position 1 was given, so it ends nothing; nor would one written at 4 or 5, before a
    given token. One written at 7 would end the row."""
    o = Options(**options)
    began = time.time()
    given = torch.full((n, length), -1) if given is None else given
    run = Run(model, o, given.to(model.device), stop, first_row, watch)
    while not run.decided.all():
        # Fill the next block, if something in it is free. A single token is the AR side's.
        run.next_block()
        n_free = run.free().sum()
        if n_free > 0:
            sampler = "ar" if run.end - run.begin == 1 else o.sampler
            FILL[sampler](run)
            if run.free().sum() == n_free:
                raise RuntimeError(f"the sampler {sampler} has decided no token of a block")

        # A row that has ended needs nothing more.
        run.decided |= run.ends().any(1, keepdim=True)

        # The next block begins at the first token that some row lacks.
        decided = ~run.free().any(0)  # (n,) in every row
        run.begin += int(decided.cumprod(0).sum())

    # Fill up what is behind the end of a row.
    ends = run.ends()
    ended = ends.cumsum(1) > ends  # after the first end token
    tokens = run.tokens.masked_fill(ended, stop)
    written = int((~run.given & ~ended).sum())
    return tokens, dict(nfe=run.nfe, tokens=written, seconds=time.time() - began)


class Run:
    """The state of one call of generate(): what is decided, and the block [begin, end) at hand."""

    def __init__(self, model, options, given, stop, first_row, watch):
        n, length = given.shape
        self.model, self.options = model, options
        self.block_size = 1 if options.sampler == "ar" else options.block_size
        self.given = given >= 0  # (N, L)
        self.decided = self.given.clone()  # (N, L) given or written
        self.tokens = given.clamp(min=0)  # (N, L), final where decided, up to a row's end
        self.stop = stop
        self.rows = torch.arange(first_row, first_row + n)  # (N,)
        self.watch = watch or (lambda *_: None)
        self.begin = self.nfe = 0
        self.window = 0  # where the context begins, and the cache with it
        self.cache = model.new_cache(n, min(length, model.config.seq_len))

    def next_block(self):
        """Choose the end of the block that begins at `begin`: it stays within the length and within
        the context, the seq_len tokens from `window` on. When those are all decided, the context
        moves on and keeps the last half, so a text may be longer than the context."""
        seq_len = self.model.config.seq_len
        if self.begin == self.window + seq_len:
            self.window = self.begin - seq_len // 2
            self.cache = self.model.new_cache(len(self.rows))
        limit = min(self.window + seq_len, self.tokens.shape[1])
        self.end = min(self.begin + self.block_size, limit)
        self.block = slice(self.begin, self.end)

    def free(self):
        """Where the block is not decided, (N, n)."""
        return ~self.decided[:, self.block]

    def random(self, purpose, step=0):
        """A uniform number for each token of the block: float64 (N, n)."""
        key = self.options.seed, purpose, step, self.begin
        u = random_numbers(key, self.rows, self.end - self.begin)
        return u.to(self.tokens.device)

    def prior(self, purpose, step=0):
        """A block of pure noise: tokens (N, n)."""
        u = self.random(purpose, step)
        return self.model.noise.prior(u.shape, u.device, u)

    def noisy_block(self):
        """The tokens that are decided, noise between them: (N, n)."""
        return torch.where(self.free(), self.prior(PRIOR), self.tokens[:, self.block])

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
        noise = self.prior(VERIFY, step)  # read under ar="paper" alone
        return self.model.verify(x, self.cache, noise).float()

    def law(self, logits):
        """What tokens are drawn from, (N, n, V): the model's distribution at the temperature, and
        of that the k likeliest tokens."""
        logits = logits / max(self.options.temperature, 1e-9)  # 0 is greedy
        if self.options.top_k:
            top = logits.topk(min(self.options.top_k, logits.shape[-1]))
            nothing = torch.full_like(logits, float("-inf"))
            logits = nothing.scatter(-1, top.indices, top.values)
        return logits.softmax(-1)

    def write(self, x, where):
        """Write the tokens x (N, n) of the block, which are final at these places (N, n)."""
        self.tokens[:, self.block] = x
        self.decided[:, self.block] |= where

    def ends(self):
        """(N, L) True at written end tokens after which nothing is given: those end a row."""
        given_from_here = self.given.flip(1).cumsum(1).flip(1) > 0
        return (self.tokens == self.stop) & self.decided & ~given_from_here


# ----------------------------------------------------------------------------------------------
# Filling one block. Temperature and top_k shape what is drawn, by run.law; scores and confidence
# are of the model's own distribution. (The authors' have the temperature in them.)


def fill_by_steps(run):
    """Ancestral sampling: reverse steps from pure noise; a block of one token takes a single step.

    Under ARPC (arXiv 2606.02241) all steps but the last are guided, or those that the options say:
    such a step goes all the way, to a proposal for the whole block, and sends the tokens that score
    worst back to noise, as many as are noise at the next level. That is, of n tokens in the block
    max(1, round((1 - alpha) n)); halves are rounded to the even number, by the authors down."""
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
        probs = run.law(logits)
        x = run.model.noise.step(probs, xt, alpha_s, alpha[k], run.random(REVEAL, k))
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
    score = score.masked_fill(~free, float("-inf"))
    order = score.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    return (rank < count) & free


def fill_by_confidence(run):
    """Each pass writes the tokens whose probability exceeds the threshold, at least the likeliest
    (SDAR, arXiv 2510.06303; Fast-dLLM). The probability is the model's own of the token drawn."""
    xt, k = run.noisy_block(), 0
    while run.free().any():
        free = run.free()
        logits = run.denoise(xt)
        x = draw(run.law(logits), run.random(REVEAL, k))
        confidence = at_index(logits.softmax(-1), x)  # (N, n)
        sure = free & (confidence > run.options.threshold)
        sure = sure | highest(confidence, free, 1)
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
    accepted = (~free | likely).cumprod(1)  # (N, n) 1 up to the first rejection
    n_accepted = accepted.sum(1, keepdim=True)  # (N, 1)

    # In place of the first token that is rejected, draw from (p - q)+.
    rejected = torch.arange(free.shape[1], device=x.device) == n_accepted  # (N, n)
    replacement = draw((p - q).clamp(min=0), run.random(RESIDUAL))
    x = torch.where(rejected, replacement, x)
    written = accepted.bool() | rejected
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
        # With masked noise a token that was revealed before this step is sure on the diffusion
        # side: the logarithm is 0 at x, and elsewhere so low that its exponential is 0.
        point_mass = 1e4 * (F.one_hot(x, logits.shape[-1]) - 1.0)
        predicted = logits.log_softmax(-1)
        self.diffusion = torch.where(self.maybe_noise[..., None], predicted, point_mass)

    @cached_property
    def ar(self):
        """log p_AR (N, n, V): a network pass, made when a criterion first asks."""
        return self.run.verify(self.x, self.step).log_softmax(-1)


def ar_nll(proposal):
    """-log p_AR(x), nats (N, n)."""
    return -at_index(proposal.ar, proposal.x)


def kld(proposal):
    """KL(AR || diffusion), nats (N, n). It would be infinite at revealed tokens, where the AR
    side's -log p_AR(x) takes its place. (By the authors' epsilon they go back before others.)"""
    divergences = divergence(proposal.ar, proposal.diffusion)
    return torch.where(proposal.maybe_noise, divergences, ar_nll(proposal))


def margin(logp):
    """How far the likeliest token is ahead of the second, from (..., V) to (...)."""
    likeliest, second = logp.exp().topk(2, -1).values.unbind(-1)
    return likeliest - second


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
    "diffusion_margin": lambda p: -margin(p.diffusion),
    "random": lambda p: p.run.random(ACCEPT, p.step),
}


def check_at_least(settings, bound, *names):
    """Raise UserError where one of these fields of a dataclass is below the bound, or no number."""
    for name in names:
        value = getattr(settings, name)
        if not value >= bound:
            raise UserError(f"{name} is {value}, but must be at least {bound}")


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


def own_judge(model, content):
    """The AR side of a checkpoint of ours, by its exact likelihood. (Under ar="paper" with random
    tokens as noise it depends on those, and its average is a bound.)"""

    def logits(x):
        u = random_numbers((0, JUDGE, 0, 0), [0], x.shape[1]).to(x.device)
        noise = model.noise.prior(x.shape, u=u)
        return model.verify(x, model.new_cache(1), noise)[:, 1:]

    tokenizer = content["meta"]["tokenizer"]
    end = tokenizer["end"]
    ends = tokenizer.get("start", end), end
    return partial(read, logits, model, model.config.seq_len, ends, *load_tokenizer(tokenizer))


def load_judge(path, device):
    """A judge from the path of a checkpoint of ours, or else from a name or folder of a model for
    the package transformers."""
    if os.path.isfile(path) or path.endswith(".pt"):
        return own_judge(*load_checkpoint(path, device))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    encode = partial(tokenizer.encode, add_special_tokens=False)
    decode = partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    longest = model.config.max_position_embeddings
    return partial(read, lambda x: model(x).logits[:, :-1], model, longest, ends, encode, decode)


@torch.no_grad()
def read(logits, model, longest, ends, encode, decode, text, began, ended):
    """What a judge finds of a text: (nats, the tokens and the bytes that they are for). A judge is
    this function with all but the last three arguments: from tokens (1, L) to logits (1, L - 1, V)
    of all but the first; the model behind that, and how many tokens it reads at a time; the tokens
    that start and end a text; from text to tokens, and back.

    As in the literature (the authors' metrics.py): the text is tokenized again by the judge, cut to
    what that reads at a time, and its first token is free of charge. began and ended say whether
    the sample has a start token before the text and an end token after it: the judge reads its own
    ones there. (Theirs goes on after the first end token; our rows end there.)"""
    start, end = ends
    tokens = [start] * began + encode(text) + [end] * ended
    x = torch.tensor([tokens[:longest]], device=model.device)
    scored = x[:, 1:]
    if scored.numel() == 0:
        return 0.0, 0, 0
    nats = cross_entropy(logits(x), scored).sum()
    scored_text = decode([token for token in scored[0].tolist() if token != end])
    return nats, scored.numel(), len(scored_text.encode())


# ----------------------------------------------------------------------------------------------
# What is to be written, and how good it is


def text_row(flags, tokenizer, encode):
    """The tokens of --prompt or --template, -1 where free."""
    row = [tokenizer["start"]] if "start" in tokenizer else []
    # the parts of a template are in turn a text and the number of tokens of a hole
    parts = HOLE.split(flags.template) if flags.template else [flags.prompt]
    for i, part in enumerate(parts):
        row += [-1] * int(part) if i % 2 else encode(part)
    return row


def choose_problems(flags, content):
    """The problems, (question, answer) texts, that the flags ask for; none if they ask for texts.
    A table is of problems if the dataset is. Raises UserError."""
    if flags.prompt or flags.template or not (flags.table or flags.problem >= 0):
        return []
    args = content["args"]
    name = flags.dataset or args.get("dataset")
    folder = f"{flags.data_dir or args.get('data_dir', 'data')}/{name}"
    meta = open_data(folder)[2] if flags.dataset else content["meta"]
    if flags.problem < 0 and "row_length" not in meta:
        return []
    if not name:
        raise UserError("this model has no dataset of its own: say --dataset=NAME")
    problems = open_problems(folder)
    chosen = range(flags.num_samples) if flags.table else [flags.problem] * flags.num_samples
    if max(chosen) >= len(problems):
        raise UserError(f"there are {len(problems)} problems: 0 to {len(problems) - 1}")
    return [problems[i] for i in chosen]


class Task:
    """What is to be written: answers to problems, or else texts. A question that does not fit is
    cut and gets no answer, which is wrong."""

    def __init__(self, flags, content):
        tokenizer = content["meta"]["tokenizer"]
        encode, self.decode = load_tokenizer(tokenizer)
        self.stop = tokenizer["end"]
        self.problems = choose_problems(flags, content)
        length = flags.length or content["config"].seq_len
        if self.problems:
            rows = [encode_problem(tokenizer, encode, question)[0] for question, _ in self.problems]
            self.begins = [len(row) for row in rows]  # where what counts begins
            n_long = sum(begin >= length for begin in self.begins)
            self.quality = "share solved"
            self.heading = f"{len(rows)} problems, {n_long} too long and counted as wrong"
        else:
            row = text_row(flags, tokenizer, encode)
            if flags.template and not flags.length:
                length = len(row)
            rows = [row] * flags.num_samples
            self.begins = ["start" in tokenizer] * len(rows)
            self.quality = "perplexity"
            self.heading = f"{len(rows)} samples, judge: {flags.judge or 'its own AR side'}"
        shortest = len(min(rows, key=len))
        if shortest > length:
            raise UserError(f"{shortest} tokens are given: say --length={shortest} or more")
        padded = [(row + [-1] * length)[:length] for row in rows]
        self.given = torch.tensor(padded)  # (M, length)

    def what_counts(self, i, row):
        """Of row i, a list of tokens, what counts: the answer or the text, prompt included, up to
        and including its first end token."""
        row = row[self.begins[i] :]
        return row[: row.index(self.stop) + 1] if self.stop in row else row

    def text(self, tokens):
        return self.decode([token for token in tokens if token != self.stop])

    def grade(self, i, row, judge):
        """Of row i: (1 or 0, 1, 0) by the answer, or the nats of a text, with the tokens and the
        bytes that they are for; and at last the entropy of the tokens, nats: low after a collapse.
        """
        tokens = self.what_counts(i, row)
        text = self.text(tokens)
        share = torch.tensor(tokens).unique(return_counts=True)[1] / len(tokens)
        entropy = torch.special.entr(share).sum()
        if self.problems:
            return is_right(text, self.problems[i][1]), 1, 0, entropy
        return *judge(text, self.begins[i], tokens[-1:] == [self.stop]), entropy

    def show(self, i, row):
        if not self.problems:
            return self.text(row[self.begins[i] :])
        answer = self.text(self.what_counts(i, row))
        question, reference = self.problems[i]
        verdict = "right" if is_right(answer, reference) else "wrong"
        return f"{question}\n{answer}= {solve(answer)}, {verdict}"


def in_batches(model, given, size, options):
    """generate() for all rows of given, some at a time: yields (rows as lists, stats)."""
    for i, part in enumerate(given.split(size)):
        tokens, stats = generate(model, *part.shape, given=part, first_row=i * size, **options)
        yield tokens.tolist(), stats


# ----------------------------------------------------------------------------------------------
# Quality against passes

GRID = [dict(sampler="ar"), dict(sampler="speculative")]
GRID += [dict(sampler="ancestral", steps=k) for k in (1, 2, 4, 8, 16)]
GRID += [dict(sampler="confidence", threshold=p) for p in (0.5, 0.9)]
GRID += [
    dict(sampler="arpc", criterion=criterion, steps=k)
    for criterion in ("ar_nll", "kld", "diffusion_confidence", "random")
    for k in (2, 4, 8)
]


def print_table(model, task, judge, size, options):
    """For every sampler of GRID: network passes per batch; the share of problems solved, or the
    perplexity of the texts, with its standard error; the entropy of the tokens of a sample, mean
    over samples; of texts bits per byte, too. Returns the curves of a plot, {name: [(passes,
    quality, error), ...]}."""
    print(f"sampler                       passes {task.quality:>11} ± s.e.   nats  bits/byte")
    curves = {}
    for special in GRID:
        # Sample and judge.
        samples, passes = [], []
        for rows, stats in in_batches(model, task.given, size, {**options, **special}):
            samples += rows
            passes.append(stats["nfe"])
        grades = [task.grade(i, row, judge) for i, row in enumerate(samples)]
        values, weights, n_bytes, entropies = torch.tensor(grades, dtype=torch.float64).T

        # The mean, and its standard error as that of a ratio of sums, to first order.
        quality = values.sum() / weights.sum()
        error = (values - quality * weights).norm() / weights.sum()
        bits = "-"
        if not task.problems:
            bits = f"{values.sum() / n_bytes.sum() / math.log(2):.3f}"
            quality = quality.exp()
            error = error * quality

        point = mean(passes), quality.item(), error.item()
        figures = "{:7.1f} {:11.3f} {:6.3f}".format(*point)
        name = " ".join(map(str, special.values()))
        print(f"{name:28} {figures} {entropies.mean():6.2f} {bits:>10}", flush=True)
        label = name.rstrip("0123456789. ")  # without the number of steps, or the threshold
        curves.setdefault(label, []).append(point)
    return curves


def check_plot(path):
    """Raise UserError if a picture cannot be written: better before the work than after it."""
    import matplotlib  # if it is missing, the user hears it now

    folder = os.path.dirname(path) or "."
    if not os.access(folder, os.W_OK) or not path.endswith((".png", ".pdf", ".svg")):
        raise UserError(f"--plot={path} must be .png, .pdf or .svg, in a folder to write to")


def plot(panels, path):
    """A picture of panels (title, name of the quality, curves), side by side."""
    from matplotlib.figure import Figure

    figure = Figure((4 * len(panels), 4))  # small, so that the letters are large
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, quality, curves) in zip(axes, panels):
        for label, points in curves.items():
            passes, y, error = zip(*points)
            axis.errorbar(passes, y, error, marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")  # 16 instead of 2^4
        axis.set(title=title, xlabel="network passes", ylabel=quality)
    axis.legend(bbox_to_anchor=(1, 1))  # beside the last panel, for all
    figure.savefig(path, dpi=160, bbox_inches="tight")


# ----------------------------------------------------------------------------------------------
# The command line

HOLE = re.compile(r"\[([1-9]\d*) tokens?\]")


@dataclass
class Flags:
    ckpt: tuple = ("out/ckpt.pt",)  # checkpoint or folder of published weights; for a table several
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
    plot: str = ""  # a table, and a picture of it in this file (needs matplotlib)

    def __post_init__(self):
        check_at_least(self, 1, "num_samples", "batch_size")
        check_at_least(self, 0, "length")
        chosen = [self.prompt, self.template, self.problem >= 0]
        if sum(map(bool, chosen)) > 1:
            raise UserError("--prompt, --template and --problem exclude each other")
        if self.template and not HOLE.search(self.template):
            raise UserError('--template needs a hole, "[1 token]" or "[2 tokens]" and so on')
        self.table |= self.plot != ""


def make_watcher(decode, color):
    """A function for generate(watch=...): a line for every pass of the first row. Bright: new in
    this pass; red and struck: sent back by ARPC, or rejected. Without color: +new+, -sent back-.
    A mask is `_`, a line's end ⏎, the end token ∎."""
    bright, red = ("\033[1;97m{}\033[0m", "\033[9;31m{}\033[0m") if color else ("+{}+", "-{}-")

    def watch(run, xt, x, sent_back):
        words = []
        for old, token, is_back in zip(xt[0].tolist(), x[0].tolist(), sent_back[0]):
            is_mask = token == run.model.noise.mask
            text = "_" if is_mask else decode([token]).replace("\n", "⏎").replace(END, "∎")
            style = red if is_back else bright if token != old else "{}"
            words.append(style.format(text))
        print(f"{run.nfe:4} {run.begin:4} | {''.join(words)}", flush=True)

    return watch


def sample(path, flags, options):
    """What the flags ask of one checkpoint. Of a table, returns a panel of a plot: (title, name of
    the quality, curves)."""
    device = find_device(flags.device)
    model, content = load_checkpoint(path, device)
    task = Task(flags, content)
    options["stop"] = task.stop
    if flags.table:
        run_name = os.path.basename(path.removesuffix("/ckpt.pt"))
        title = f"{run_name}: {model.config.noise} noise"
        judge = load_judge(flags.judge, device) if flags.judge else own_judge(model, content)
        print(f"\n{title}, {task.heading}")
        return title, task.quality, print_table(model, task, judge, flags.batch_size, options)

    if flags.watch:
        options["watch"] = make_watcher(task.decode, sys.stdout.isatty())
    for rows, stats in in_batches(model, task.given, flags.batch_size, options):
        for i, row in enumerate(rows):  # all of the same problem or prompt
            print(task.show(i, row), "-" * 80, sep="\n")
        print(", ".join(f"{name} {value:.4g}" for name, value in stats.items()))


def main():
    values = parse_flags(__doc__, Flags, Options)
    flags = from_values(Flags, values)
    options = vars(from_values(Options, values))
    if flags.plot:
        check_plot(flags.plot)
    panels = [sample(path, flags, options) for path in flags.ckpt]
    if flags.plot:
        plot(panels, flags.plot)


if __name__ == "__main__":
    run_script(main)
