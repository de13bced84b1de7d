"""Generate text, block by block, from a checkpoint.

    python sample.py                                     # out/ckpt.pt, ancestral sampling, one sample
    python sample.py --sampler=ar                        # the same weights, one token at a time
    python sample.py --sampler=arpc --steps=8            # diffusion proposes, the AR side sends the worst tokens back
    python sample.py --sampler=speculative               # diffusion drafts, the AR side verifies: exactly AR samples
    python sample.py --prompt="Return the" --watch       # every pass, in the terminal
    python sample.py --table --num_samples=64            # quality against passes, every sampler
    python sample.py --template="Return the ____ of the ____."   # a run of k > 1 underscores is a hole of k tokens

One loop over blocks (`generate`); each sampler is one function that fills a block, or for `speculative` the whole
sequence. A draw depends on (seed, row, position, step) alone, so a row's sample does not depend on its batch.
"""
import inspect
import json
import os
import re
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from blockgen import NOISES, SCHEDULES, draw, find_device, load_checkpoint, uniform
from prepare_data import load_tokenizer, new_parser, run_script

REVEAL, RENOISE, PRIOR, ACCEPT, RESIDUAL = range(5)  # what a random number is for; part of its key
CRITERIA = ["kld", "reverse_kld", "tvd", "ar_nll", "ar_gap", "ar_entropy",
            "diffusion_entropy", "diffusion_confidence", "diffusion_margin", "random"]
VERIFIED = CRITERIA[:6]  # those that look at the AR side
SAMPLERS = {  # sampler: the options of generate() that change what it does; the others are refused
    "ar": [],
    "ancestral": ["block_size", "steps", "schedule", "ar_tokens"],
    "arpc": ["block_size", "steps", "schedule", "ar_tokens", "criterion", "warmup", "guide_every"],
    "confidence": ["block_size", "threshold", "ar_tokens"],
    "speculative": ["block_size"],
}


@dataclass
class Run:
    """The state of one call of generate()."""

    model: object
    cache: object
    tokens: torch.Tensor  # (N, L), final where generation has been
    free: torch.Tensor  # (N, L) False where a token is given
    options: dict
    rows: torch.Tensor  # (N, 1) part of the key of the random numbers
    committed: int = 0  # tokens in the cache
    stats: dict = field(default_factory=lambda: dict(nfe=0, renoised=0, rounds=0, accepted=0))

    def random(self, purpose, positions, step=0):
        """Uniform numbers for positions (n,) or (N, n): float64 (N, n)."""
        return uniform(self.options["seed"], purpose, step, self.rows, positions, device=self.tokens.device)

    def prior(self, purpose, positions, step=0):
        """Pure noise at positions (n,) or (N, n): (N, n) tokens."""
        u = self.random(purpose, positions, step)
        return self.model.noise.prior(u.shape, u.device, u)

    def denoise(self, xt, begin):
        """Logits of the block xt (N, n) at begin. The pass that starts a block also commits what came before it."""
        commit = self.tokens[:, self.committed : begin]
        self.committed = begin
        self.stats["nfe"] += 1
        return self.model.denoise(xt, self.cache, commit, self.options["block_size"])

    def verify(self, x, positions):
        """AR logits of the proposed tokens x (N, n)."""
        self.stats["nfe"] += 1
        return self.model.verify(x, self.cache, self.prior(PRIOR, positions))

    def shape(self, logits):
        """The distribution to draw from, float64 (N, n, V): temperature (0 is greedy), then top-k, then top-p."""
        temperature, top_k, top_p = (self.options[o] for o in ("temperature", "top_k", "top_p"))
        if temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
        logits = logits.double() / temperature
        if top_k:
            kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < kth, float("-inf"))
        probs = logits.softmax(-1)
        if top_p < 1:
            ordered, index = probs.sort(descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p  # the tokens before it have the mass already
            probs = probs.scatter(-1, index, ordered.masked_fill(outside, 0))
        return probs / probs.sum(-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Filling one block: each returns its tokens (N, n)


def fill_by_steps(run, begin, end, steps, watch):
    """Ancestral sampling: `steps` reverse steps from pure noise. Under ARPC a guided step goes all the way, to a proposal
    for the whole block, and sends its worst tokens back to noise."""
    positions = torch.arange(begin, end, device=run.tokens.device)
    free, noise, options = run.free[:, begin:end], run.model.noise, run.options
    arpc, warmup, every = options["sampler"] == "arpc", options["warmup"], options["guide_every"]
    alpha = SCHEDULES[options["schedule"]](1 - torch.arange(steps + 1, dtype=torch.float64) / steps)[0].tolist()
    xt = torch.where(free, run.prior(PRIOR, positions), run.tokens[:, begin:end])
    for k in range(steps):
        guided = arpc and warmup <= k < steps - 1 and (k - warmup) % every == 0
        logits = run.denoise(xt, begin)
        u = run.random(REVEAL, positions, k)
        proposal = noise.step(run.shape(logits), xt, 1.0 if guided else alpha[k + 1], alpha[k], u)
        proposal = torch.where(free, proposal, xt)
        worst, ar, xs = torch.zeros_like(free), None, proposal
        if guided:
            count = max(1, round((1 - alpha[k + 1]) * (end - begin)))
            worst, ar = find_worst(run, proposal, xt, logits, positions, k, count)
            xs = torch.where(worst, run.prior(RENOISE, positions, k + 1), proposal)
            run.stats["renoised"] += worst.sum()
        if watch:
            watch(run, begin, xt, xs, worst, proposal, logits, ar)
        xt = xs
        if noise.mask is not None and not arpc and k < steps - 1 and not (xt == noise.mask).any():
            break  # all are revealed: no further step would change anything
    return xt


def find_worst(run, x, xt, logits, positions, step, count):
    """Where ARPC sends tokens back: the `count` free positions (or all, if they are fewer) of proposal x (N, n) that score
    highest under the criterion. Returns that mask (N, n), and the AR log-probabilities if the criterion needs them.

    With masked noise a position revealed before this step has no diffusion distribution but a point mass on its token,
    and kld would be infinite. There the divergences take what the point mass gives in reverse_kld, -log p_AR(token), and
    in tvd, 1 - p_AR(token); the diffusion criteria see certainty."""
    free, criterion, mask = run.free[:, positions], run.options["criterion"], run.model.noise.mask
    diffusion = logits.double().log_softmax(-1)  # (N, n, V)
    ar = run.verify(x, positions).double().log_softmax(-1) if criterion in VERIFIED else None
    settled = torch.zeros_like(free) if mask is None else xt != mask
    at = lambda logp: logp.gather(-1, x[..., None])[..., 0]  # (N, n), of the proposed token
    divergence = lambda a, b: (a.exp() * (a - b)).sum(-1)
    entropy = lambda logp: -(logp.exp() * logp).sum(-1)
    margin = lambda p: (p.topk(2, -1).values * torch.tensor([1, -1], device=p.device)).sum(-1)
    score = {
        "kld": lambda: torch.where(settled, -at(ar), divergence(ar, diffusion)),
        "reverse_kld": lambda: torch.where(settled, -at(ar), divergence(diffusion, ar)),
        "tvd": lambda: torch.where(settled, 1 - at(ar).exp(), (ar.exp() - diffusion.exp()).abs().sum(-1) / 2),
        "ar_nll": lambda: -at(ar),
        "ar_gap": lambda: ar.max(-1).values.exp() - at(ar).exp(),
        "ar_entropy": lambda: entropy(ar),
        "diffusion_entropy": lambda: entropy(diffusion).masked_fill(settled, 0),
        "diffusion_confidence": lambda: 1 - at(diffusion).exp().masked_fill(settled, 1),
        "diffusion_margin": lambda: 1 - margin(diffusion.exp()).masked_fill(settled, 1),
        "random": lambda: run.random(ACCEPT, positions, step + 1),
    }[criterion]()
    ranks = score.masked_fill(~free, float("-inf")).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (ranks < count) & free, ar


def fill_by_confidence(run, begin, end, steps, watch):
    """Each pass commits the tokens whose probability exceeds the threshold, at least the likeliest (SDAR, Fast-dLLM)."""
    positions = torch.arange(begin, end, device=run.tokens.device)
    free = run.free[:, begin:end]
    open_ = free.clone()
    xt = torch.where(free, run.prior(PRIOR, positions), run.tokens[:, begin:end])
    for k in range(end - begin):
        logits = run.denoise(xt, begin)
        x = draw(run.shape(logits), run.random(REVEAL, positions, k))
        confidence = logits.double().softmax(-1).gather(-1, x[..., None])[..., 0].masked_fill(~open_, -1)  # (N, n)
        best = F.one_hot(confidence.argmax(-1), end - begin).bool()
        take = open_ & (best | (confidence > run.options["threshold"]))
        xs = torch.where(take, x, xt)
        open_ = open_ & ~take
        if watch:
            watch(run, begin, xt, xs, torch.zeros_like(free), xs, logits, None)
        xt = xs
        if not open_.any():
            break
    return xt


# ---------------------------------------------------------------------------------------------------------------------
# Speculative decoding: whole sequences, each row at a pace of its own


def speculate(run, length, watch):
    """Draft a block by diffusion in one pass, verify it by the AR side in one, and accept so that what comes out is exactly
    an AR sample (Leviathan et al. 2022, arXiv 2211.17192): keep x ~ q with probability min(1, p(x) / q(x)), and at the
    first rejection draw from (p - q)+. The keys and values of accepted tokens are those the verifying pass wrote."""
    S, device = run.options["block_size"], run.tokens.device
    tokens, free = F.pad(run.tokens, (0, S)), F.pad(run.free, (0, S))  # a draft may run over the end; nothing is free there
    start = (~free[:, :length]).cumprod(1).sum(1)  # (N,) the prompt
    if start.max() > 0:
        run.verify(tokens[:, : start.max()], torch.arange(int(start.max()), device=device))
    run.cache.length, position, commit = start, start, None
    for k in range(length):
        if finished(run, tokens[:, :length], position).all():
            break
        active = position < length
        window = position[:, None] + torch.arange(S, device=device)  # (N, S)
        given, open_ = tokens.gather(1, window), free.gather(1, window)
        run.stats["nfe"] += 1
        xt = torch.where(open_, run.prior(RENOISE, window, k), given)
        logits = run.model.denoise(xt, run.cache, commit)
        q = run.shape(logits)  # (N, S, V)
        x = torch.where(open_, draw(q, run.random(REVEAL, window, k)), given)
        p = run.shape(run.verify(x, window))
        ratio = (p.gather(-1, x[..., None]) / q.gather(-1, x[..., None]))[..., 0]
        accepted = (~open_ | (run.random(ACCEPT, window, k) < ratio)).cumprod(1)  # (N, S) ones up to the first rejection
        n = accepted.sum(1, keepdim=True)  # (N, 1)
        at = n.clamp(max=S - 1)
        residual = (p - q).clamp(min=0).gather(1, at[..., None].expand(-1, 1, p.shape[-1]))[:, 0]  # (N, V)
        other = draw(residual, run.random(RESIDUAL, position[:, None], k)[:, 0])
        x = x.scatter(1, at, torch.where(n < S, other[:, None], x.gather(1, at)))
        tokens = tokens.scatter(1, window, torch.where(torch.arange(S, device=device) <= n, x, given))
        run.stats["accepted"] += (accepted.bool() & open_).sum()
        run.stats["rounds"] += active.sum()
        if watch:
            watch(run, int(position[0]), xt, x, (torch.arange(S, device=device) >= n) & open_, x, logits, p.log())
        position = (position + n[:, 0] + 1).minimum(position + S).clamp(max=length)
        # all new tokens but the last are in the cache; the last, perhaps a replacement, is committed by the next draft
        run.cache.length = position - 1
        commit = tokens.gather(1, position[:, None] - 1)
    run.tokens = tokens[:, :length]


# ---------------------------------------------------------------------------------------------------------------------
# The loop over blocks


def ends(run, tokens):
    """(N, L) True at generated end tokens behind which nothing is given: those finish a row. A prompt's own do not."""
    later = (~run.free).flip(1).cumsum(1).flip(1) > 0  # something given from here on
    return (tokens == run.options["stop"]) & ~later


def finished(run, tokens, position):
    """(N,) rows that have all their tokens, or an end token, before position (int or (N,))."""
    position = torch.as_tensor(position, device=tokens.device).expand(len(tokens))
    before = torch.arange(tokens.shape[1], device=tokens.device) < position[:, None]
    return (ends(run, tokens) & before).any(1) | (position >= tokens.shape[1])


def check_options(model, n, length, given, o):
    """Raises ValueError with a line for the user."""
    seq_len = model.config.seq_len
    if o["sampler"] not in SAMPLERS or o["criterion"] not in CRITERIA or o["schedule"] not in SCHEDULES:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}; criterion one of {', '.join(CRITERIA)}")
    if n < 1 or not 1 <= length <= seq_len:
        raise ValueError(f"the model writes from 1 to {seq_len} tokens, not {length}, in 1 or more samples")
    if not 1 <= o["block_size"] <= seq_len:
        raise ValueError(f"block_size must lie in 1 to {seq_len}, not {o['block_size']}")
    for name, low, high in (("steps", 1, None), ("temperature", 0, None), ("top_k", 0, None), ("guide_every", 1, None),
                            ("warmup", 0, None), ("ar_tokens", 0, length), ("threshold", 0, 1)):
        if o[name] < low or (high is not None and o[name] > high):
            most = "" if high is None else f" and at most {high}"
            raise ValueError(f"{name} must be at least {low}{most}, not {o[name]}")
    if not 0 < o["top_p"] <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {o['top_p']}")
    verified = o["sampler"] == "speculative" or (o["sampler"] == "arpc" and o["criterion"] in VERIFIED)
    if not model.config.token_causal and (verified or o["ar_tokens"]):
        raise ValueError("this model's clean tokens are block-causal: its AR side and its blocks cannot share a cache")
    if given is not None and (given.shape != (n, length) or given.max() >= model.config.vocab_size):
        raise ValueError(f"given must be ({n}, {length}) tokens of the vocabulary, -1 where free")


@torch.no_grad()
def generate(model, n, length, *, sampler="ancestral", block_size=None, steps=16, schedule="linear", given=None,
             ar_tokens=0, criterion="ar_nll", warmup=0, guide_every=1, threshold=0.9, temperature=1.0, top_k=0, top_p=1.0,
             stop=None, seed=0, first_row=0, watch=None):
    """n sequences of `length` tokens: (tokens (n, length) int64, stats).

    given (n, length): tokens that stand already, -1 where free; anywhere, different for every row. They are never noised.
    block_size: by default 16, or the model's length if that is less.
    sampler: ar; ancestral; arpc (criterion, warmup, guide_every); confidence (threshold); speculative. All use the cache.
    The first ar_tokens tokens are AR whatever the sampler. steps: reverse steps a block, evenly spaced on the schedule.
    stop: a token that finishes a row; the row is filled up with it. Rows count from first_row in the random numbers' key.
    stats: nfe (network passes), tokens (generated), passes_per_token, seconds, tokens_per_second, and where they apply
    renoised, accepted_length (drafted tokens that a speculative round keeps). Raises ValueError."""
    block_size = min(16, model.config.seq_len) if block_size is None else block_size
    options = {k: v for k, v in locals().items() if k not in ("model", "given", "watch", "length")}
    check_options(model, n, length, given, options)
    cache = model.new_cache(n, length + block_size)
    began, device = time.time(), cache.length.device
    given = torch.full((n, length), -1) if given is None else given
    given = given.to(device)
    options["stop"] = -1 if stop is None else stop
    options["block_size"] = block_size = 1 if sampler == "ar" else min(block_size, length)
    rows = torch.arange(first_row, first_row + n, device=device)[:, None]
    run = Run(model, cache, given.clamp(min=0), given < 0, options, rows)
    if sampler == "speculative":
        speculate(run, length, watch)
    else:
        fill = fill_by_confidence if sampler == "confidence" else fill_by_steps
        begins = [*range(ar_tokens), *range(ar_tokens, length, block_size), length]
        for begin, end in zip(begins, begins[1:]):
            if not run.free[:, begin:end].any():
                continue  # the next pass commits it
            one = end - begin == 1  # a block of one token takes one step: this is the AR mode
            run.tokens[:, begin:end] = (fill_by_steps if one else fill)(run, begin, end, 1 if one else steps, watch)
            if finished(run, run.tokens, end).all():
                break
    return finish(run, time.time() - began)


def finish(run, seconds):
    """Fill rows up behind their end token; work out the statistics."""
    stop, stats = run.options["stop"], run.stats
    end = ends(run, run.tokens)
    behind = (end.cumsum(1) - end.long()) > 0
    tokens = run.tokens.masked_fill(behind, max(stop, 0))
    produced = int((run.free & ~behind).sum())
    per_token = stats["nfe"] * len(tokens) / max(1, produced)
    result = dict(nfe=stats["nfe"], tokens=produced, passes_per_token=per_token, seconds=seconds,
                  tokens_per_second=produced / seconds)
    if run.options["sampler"] == "arpc":
        result["renoised"] = int(stats["renoised"])
    if run.options["sampler"] == "speculative":
        result["accepted_length"] = int(stats["accepted"]) / max(1, int(stats["rounds"]))
    return tokens, result


# ---------------------------------------------------------------------------------------------------------------------
# Quality against passes

GRID = [("ar", {}), ("speculative", {})]
GRID += [("ancestral", {"steps": k}) for k in (1, 2, 4, 8, 16)]
GRID += [("confidence", {"threshold": p}) for p in (0.5, 0.9)]
GRID += [("arpc", {"criterion": c, "steps": k}) for c in ("ar_nll", "kld", "diffusion_confidence", "random") for k in (2, 4, 8)]


def quality(tokens, decode, content):
    """What share of each sample (N, L) is right, (N,): words that the training text has; or transitions of the chain."""
    meta = content["meta"]
    if "transitions" in meta:
        possible = torch.tensor(meta["transitions"]) > 0
        return possible[tokens[:, :-1], tokens[:, 1:]].double().mean(1)
    folder = os.path.join(content["args"]["data_dir"], content["args"]["dataset"])
    known = set(re.findall(r"[A-Za-z]+", decode(np.fromfile(os.path.join(folder, "train.bin"), meta["dtype"]).tolist())))
    words = [re.findall(r"[A-Za-z]+", decode(row))[1:-1] for row in tokens.tolist()]  # the outer ones may be cut
    return torch.tensor([sum(w in known for w in row) / max(1, len(row)) for row in words], dtype=torch.float64)


def print_table(model, content, decode, args):
    """Each sampler of GRID: passes and tokens processed for each token written, quality, entropy of the tokens (low after
    a collapse), tokens/s."""
    kind = "valid transitions" if "transitions" in content["meta"] else "known words"
    L, V, processed = model.config.seq_len, model.config.vocab_size, []
    model.embedding.register_forward_hook(lambda module, inputs, output: processed.append(inputs[0].shape[1]))
    print(f"{args.ckpt}: {model.config.noise} noise, {args.num_samples} samples of {L} tokens; ± standard error\n"
          f"{'sampler':28} {'passes/token':>12} {'processed/token':>16} {kind:>18} {'entropy, nats':>14} {'tokens/s':>9}")
    for sampler, options in GRID:
        processed.clear()
        tokens, stats = generate(model, args.num_samples, L, sampler=sampler, seed=args.seed,
                                 temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, **options)
        right = quality(tokens.cpu(), decode, content)
        frequency = torch.bincount(tokens.flatten(), minlength=V).double() / tokens.numel()
        entropy = -(frequency * frequency.clamp(min=1e-300).log()).sum()
        name = " ".join([sampler, *map(str, options.values())])
        print(f"{name:28} {stats['nfe'] / L:12.3f} {sum(processed) / L:16.2f} {right.mean():10.3f} ± {right.std() / len(right) ** 0.5:.3f} "
              f"{entropy:14.2f} {stats['tokens_per_second']:9.0f}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def make_watcher(decode, color, probabilities):
    """A function for generate(watch=...): a line for every pass of the first row. Dim: noise; bright: new in this pass; red
    and struck: sent back by ARPC, or rejected. Without color: `_` for a mask, +new+, -sent back-."""
    paint = {"noise": "\033[2m{}\033[0m", "new": "\033[1;97m{}\033[0m", "worst": "\033[9;31m{}\033[0m", "old": "{}"}
    style = paint if color else {"noise": "{}", "new": "+{}+", "worst": "-{}-", "old": "{}"}
    settled = {}  # begin of a block: its positions that hold no noise

    def watch(run, begin, xt, xs, worst, proposal, logits, ar):
        free = F.pad(run.free, (0, len(xt[0])))[0, begin : begin + len(xt[0])].tolist()
        quiet = settled.setdefault(begin, {i for i, f in enumerate(free) if not f})
        xt, xs, worst, proposal = (x[0].tolist() for x in (xt, xs, worst, proposal))
        words = []
        for i, (old, new, bad) in enumerate(zip(xt, xs, worst)):
            fresh = new != old and new != run.model.noise.mask
            kind = "worst" if bad else "new" if fresh else "old" if i in quiet else "noise"
            quiet.discard(i) if bad else quiet.add(i) if fresh else None
            token = proposal[i] if bad else new
            text = "_" if token == run.model.noise.mask else decode([token]).replace("\n", "⏎")
            words.append(style[kind].format(text))
        print(f"{run.stats['nfe']:4} {begin:4} | {''.join(words)}", flush=True)
        if probabilities:
            sides = {"diffusion": logits.double().log_softmax(-1)} | ({"AR": ar} if ar is not None else {})
            for i in (i for i, bad in enumerate(worst) if bad):
                p = ", ".join(f"{name} {x[0, i, proposal[i]].exp():.2g}" for name, x in sides.items())
                print(f"          | {decode([proposal[i]])!r}: {p}")

    return watch


def read_given(args, tokenizer, longest):
    """The given tokens (num_samples, length) of --prompt or --template, -1 where free. A template is as long as it is."""
    encode = load_tokenizer(tokenizer)[0]
    if args.template is not None:
        pieces = re.split(r"(_{2,})", args.template)
        texts = [sum(([-1] * len(p) if p.startswith("__") else encode(p) for p in pieces if p), [])]
    else:
        texts = [encode(p) for p in args.prompt or []]
    length = args.length
    if length is None:
        length = len(texts[0]) if args.template is not None else longest
    given = torch.full((args.num_samples, length), -1)
    for i, text in enumerate(texts):
        if len(text) > length:
            raise ValueError(f"the prompt has {len(text)} tokens, more than the {length} to be written")
        given[i :: len(texts), : len(text)] = torch.tensor(text, dtype=torch.int64)
    return given


def make_parser():
    defaults = {k: p.default for k, p in inspect.signature(generate).parameters.items()}
    parser = new_parser(__doc__)
    flag = parser.flag

    def option(name, help, **more):
        """A flag of some samplers only: it has to be refused by the others, so what was not given stays None."""
        users = ", ".join(s for s, used in SAMPLERS.items() if name in used)
        default = 16 if name == "block_size" else defaults[name]
        more.setdefault("type", type(default))
        parser.add_argument(f"--{name}", help=f"{help} (default: {default}; for {users})", **more)

    flag("ckpt", "out/ckpt.pt", "a checkpoint: of train.py, a published folder, or hf:org/repo/subfolder")
    parser.add_argument("--noise", choices=list(NOISES),
                        help="of a published checkpoint (default: by the size of its vocabulary, where it tells)")
    flag("sampler", "ancestral", "how to sample", choices=list(SAMPLERS))
    flag("num_samples", 1, "how many samples")
    flag("batch_size", 16, "how many of them at a time; changes no sample")
    flag("length", None, "tokens a sample, prompt included; by default the template's, or all the model can", type=int)
    parser.add_argument("--prompt", action="append", help="what texts begin with; several take turns (default: nothing)")
    parser.add_argument("--template", help="a text with holes: k > 1 underscores are k tokens to fill in (default: none)")
    option("block_size", "tokens a block")
    option("steps", "reverse steps a block")
    option("schedule", "of the reverse steps", choices=list(SCHEDULES))
    option("ar_tokens", "write so many tokens AR first")
    option("criterion", "which tokens ARPC sends back", choices=CRITERIA)
    option("warmup", "steps of a block before ARPC sets in")
    option("guide_every", "ARPC corrects every so many steps")
    option("threshold", "probability from which on a token is committed")
    flag("temperature", 1.0, "0 is greedy")
    flag("top_k", 0, "draw from the k likeliest tokens only; 0: from all")
    flag("top_p", 1.0, "draw from the likeliest tokens that together have this probability")
    flag("stop", "end", "a sample ends with this token; end: the vocabulary's own; none: it does not")
    flag("seed", 0, "of everything random")
    flag("device", "auto", "cpu, cuda, ...; auto: cuda where there is one")
    parser.add_argument("--watch", nargs="?", const="steps", choices=["steps", "probs"],
                        help="show every pass; probs: and the probabilities of what ARPC sends back")
    parser.add_argument("--table", action="store_true",
                        help="no text, but quality against passes for every sampler, from num_samples samples each")
    parser.add_argument("--json", action="store_true", help="print samples and statistics as JSON, one object a batch")
    return parser


def parse_args(argv=None):
    """(args, options for generate). Raises ValueError for an option that the sampler would ignore."""
    args = make_parser().parse_args(argv)
    special = {o for used in SAMPLERS.values() for o in used}
    options = {o: getattr(args, o) for o in special if getattr(args, o) is not None}
    for name in sorted(options.keys() - set(SAMPLERS[args.sampler])):
        raise ValueError(f"--{name} does nothing with --sampler={args.sampler}")
    if args.prompt and args.template is not None:
        raise ValueError("--prompt and --template exclude each other: put the prompt into the template")
    if args.watch and args.json:
        raise ValueError("--watch and --json exclude each other")
    if min(args.num_samples, args.batch_size, 1 if args.length is None else args.length) < 1:
        raise ValueError("--num_samples, --batch_size and --length must be at least 1")
    return args, options


def stop_token(args, tokenizer):
    if args.stop in ("end", "none"):
        return tokenizer["end"] if args.stop == "end" else None
    tokens = load_tokenizer(tokenizer)[0](args.stop)
    if len(tokens) != 1:
        raise ValueError(f"--stop must be one token; {args.stop!r} is {len(tokens)}")
    return tokens[0]


def main():
    args, options = parse_args()
    model, meta = load_checkpoint(args.ckpt, find_device(args.device), args.noise)
    tokenizer = meta["meta"]["tokenizer"]
    if tokenizer is None:
        raise ValueError(f"{args.ckpt}: the tokenizer of its {model.config.vocab_size} tokens is not known here")
    decode, stop = load_tokenizer(tokenizer)[1], stop_token(args, tokenizer)
    if args.table:
        return print_table(model, meta, decode, args)
    given = read_given(args, tokenizer, model.config.seq_len)
    watch = make_watcher(decode, sys.stdout.isatty(), args.watch == "probs") if args.watch else None
    for first in range(0, args.num_samples, args.batch_size):
        rows = given[first : first + args.batch_size]
        tokens, stats = generate(model, *rows.shape, sampler=args.sampler, given=rows, temperature=args.temperature,
                                 top_k=args.top_k, top_p=args.top_p, stop=stop, seed=args.seed, first_row=first,
                                 watch=watch, **options)
        texts = [decode(row[: row.index(stop)] if stop in row else row) for row in tokens.tolist()]
        if args.json:
            print(json.dumps({"samples": texts, **stats}))
            continue
        for text in texts:
            print(text, end="\n" + "-" * 80 + "\n")
        more = "".join(f", {k.replace('_', ' ')} {stats[k]:g}" for k in ("renoised", "accepted_length") if k in stats)
        print(f"{stats['nfe']} passes for {stats['tokens']} tokens ({stats['passes_per_token']:.2f} a token), "
              f"{stats['tokens_per_second']:.0f} tokens/s{more}")


if __name__ == "__main__":
    run_script(main)
