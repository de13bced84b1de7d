"""Generate text, block by block, from a checkpoint.

    python sample.py                                  # out/ckpt.pt, ancestral sampling, one sample
    python sample.py --sampler=ar                     # the same weights, one token at a time
    python sample.py --sampler=arpc --steps=8         # diffusion proposes, the AR side sends back
    python sample.py --sampler=speculative            # diffusion drafts, AR verifies: AR samples
    python sample.py --prompt="Return the" --watch    # every step, in the terminal
    python sample.py --template="Return the ____ of"  # k > 1 underscores are k tokens to fill in
    python sample.py --table --num_samples=64         # quality against passes, every sampler
    python sample.py --ckpt=out-math/ckpt.pt --problem=17 --watch    # a math problem and its answer

One loop over blocks, `generate`, serves all samplers: each is a function that fills one block. What
is drawn depends on seed, row, block and step alone, so a row is the same in any batch. The
exception is speculative decoding, where rows wait for the slowest one: its law is the same.
"""
import re
import sys
import time
from dataclasses import dataclass

# blockgen comes first: it sets an option that torch reads when it is loaded
from blockgen import SCHEDULES, draw, find_device, load_checkpoint, pick, random_numbers
from prepare_data import (
    END,
    check_settings,
    check_tokenizer,
    from_values,
    is_question,
    is_right,
    load_tokenizer,
    open_data,
    parse_flags,
    run_script,
    solve,
)

import numpy as np
import torch
import torch.nn.functional as F

AR_CRITERIA = ["kld", "reverse_kld", "tvd", "ar_nll", "ar_gap", "ar_entropy"]
CRITERIA = AR_CRITERIA + ["diffusion_entropy", "diffusion_confidence", "diffusion_margin", "random"]
# what a random number is for, a part of its key
REVEAL, RENOISE, PRIOR, ACCEPT, RESIDUAL, VERIFY = range(6)


@dataclass
class Options:
    """How to sample: the keyword arguments of generate(), and flags."""

    sampler: str = "ancestral"  # ar | ancestral | arpc | confidence | speculative
    block_size: int = 16  # tokens per block, at least 1; the length if that is less
    steps: int = 16  # reverse steps per block, at least 1
    criterion: str = "ar_nll"  # arpc: the score of a token, see arpc_score; in the paper kld
    warmup: int = 0  # arpc: steps of a block before guidance sets in, at least 0
    guide_every: int = 1  # arpc: steps from one guided step to the next, at least 1
    threshold: float = 0.9  # confidence: tokens above this probability stay; at least 0, at most 1
    temperature: float = 1.0  # at least 0; 0 is greedy
    top_k: int = 0  # draw from the k likeliest tokens only, at least 0; 0: from all
    seed: int = 0  # of everything random, at least 0, at most 9e18

    def __post_init__(self):
        check_settings(self)
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}")


# ----------------------------------------------------------------------------------------------
# The loop over blocks


@torch.no_grad()
def generate(model, n, length, *, given=None, stop=-1, first_row=0, watch=None, **options):
    """n sequences of `length` tokens by the sampler of the options: (tokens (n, length), stats).

    given (n, length): tokens that stand already, -1 where free; anywhere, and different in each
    row. They are never noised. stop: a token that ends a row; the row is filled up with it. Rows
    count from first_row in the key of the random numbers. watch(run, xt, x, sent_back) is called
    after every step, with the block (N, n) before and after it, and what goes back to noise.
    stats: nfe (network passes), tokens (written), seconds. Raises ValueError."""
    o = Options(**options)
    longest = model.config.seq_len
    if not 1 <= length <= longest:
        raise ValueError(f"the model writes 1 to {longest} tokens a sample, not {length}")
    began = time.time()
    given = torch.full((n, length), -1) if given is None else given
    run = Run(model, o, given.to(model.head.bias.device), stop, first_row, watch)
    while not run.decided.all():
        run.end = min(run.begin + run.block_size, length)
        is_single = run.end - run.begin == 1  # such a token is the AR side's, in one step
        if run.free().any():  # else the next pass commits the block
            fill = fill_by_steps if is_single else FILL[o.sampler]
            fill(run)
        run.decided |= run.ends().any(1, keepdim=True)
        decided = ~run.free().any(0)  # (n,) in every row: the next block begins after them
        run.begin += int(decided.cumprod(0).sum())
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
        self.temperature = max(options.temperature, 1e-9)  # 0 is greedy
        self.block_size = 1 if options.sampler == "ar" else options.block_size
        self.cache = model.new_cache(n, length)
        self.given = given >= 0  # (N, L)
        self.decided = self.given.clone()  # (N, L) given or written
        self.tokens = given.clamp(min=0)  # (N, L), final where decided, up to a row's end
        self.stop = stop
        self.rows = torch.arange(first_row, first_row + n)  # (N,)
        self.watch = watch or (lambda *_: None)
        self.begin = self.end = self.nfe = 0

    def free(self):
        """Where the block is not decided, (N, n)."""
        return ~self.decided[:, self.begin : self.end]

    def random(self, purpose, step=0):
        """A uniform number for each token of the block: float64 (N, n)."""
        key = self.options.seed, purpose, step, self.begin
        u = random_numbers(key, self.rows, self.end - self.begin)
        return u.to(self.tokens.device)

    def prior(self, purpose, step=0):
        """A block of pure noise: tokens (N, n)."""
        noise = self.model.noise
        u = self.random(purpose, step) if noise.mask is None else None  # masks need none
        return noise.prior((len(self.rows), self.end - self.begin), self.tokens.device, u)

    def noisy_block(self):
        """The tokens that are decided, noise between them: (N, n)."""
        tokens = self.tokens[:, self.begin : self.end]
        return torch.where(self.free(), self.prior(PRIOR), tokens)

    def denoise(self, xt):
        """Logits of the block xt (N, n). The same pass commits what stands before the block."""
        self.nfe += 1
        commit = self.tokens[:, self.cache.length : self.begin]
        logits = self.model.denoise(xt, self.cache, commit, self.block_size)
        return logits.float() / self.temperature

    def verify(self, x, step=0):
        """AR logits of the block of proposed tokens x (N, n). Raises ValueError."""
        config = self.model.config
        if not config.token_causal:
            raise ValueError("this model's clean tokens are block-causal: its AR side has no cache")
        self.nfe += 1
        noise = self.prior(VERIFY, step) if config.ar == "paper" else None  # else it is not read
        logits = self.model.verify(x, self.cache, noise)
        return logits.float() / self.temperature

    def distribution(self, logits):
        """What tokens are drawn from, (N, n, V): the likeliest k, or all."""
        if self.options.top_k:
            k = min(self.options.top_k, logits.shape[-1])
            top = logits.topk(k).values
            logits = logits.masked_fill(logits < top[..., -1:], float("-inf"))
        return logits.softmax(-1)

    def keep(self, x, where):
        """Write the tokens x (N, n) where they are decided now."""
        block = slice(self.begin, self.end)
        self.tokens[:, block] = x
        self.decided[:, block] |= where

    def ends(self):
        """(N, L) True at written end tokens after which nothing is given: those end a row. A
        prompt's own do not."""
        given_from_here = self.given.flip(1).cumsum(1).flip(1) > 0
        return (self.tokens == self.stop) & self.decided & ~given_from_here


# ----------------------------------------------------------------------------------------------
# Filling one block


def fill_by_steps(run):
    """Ancestral sampling: reverse steps from pure noise; a block of one token takes a single step.
    Under ARPC (arXiv 2606.02241) all steps but the last are guided, or those that the options say:
    such a step goes all the way, to a proposal for the whole block, and sends the tokens that score
    worst back to noise, as many as are noise at the next level."""
    o, free = run.options, run.free()
    steps = o.steps if free.shape[1] > 1 else 1
    t = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha = SCHEDULES[run.model.config.schedule](t)[0].tolist()
    xt = run.noisy_block()
    for k in range(steps):
        guided = o.sampler == "arpc" and k in range(o.warmup, steps - 1, o.guide_every)
        logits = run.denoise(xt)
        probs = run.distribution(logits)
        alpha_s = 1.0 if guided else alpha[k + 1]
        x = run.model.noise.step(probs, xt, alpha_s, alpha[k], run.random(REVEAL, k))
        x = torch.where(free, x, xt)
        sent_back = torch.zeros_like(free)
        if guided:
            noisy_share = 1 - alpha[k + 1]
            count = max(1, round(noisy_share * free.shape[1]))
            score = arpc_score(run, x, xt, logits, k)
            sent_back = highest(score, free, count)
        run.watch(run, xt, x, sent_back)
        xt = torch.where(sent_back, run.prior(RENOISE, k + 1), x) if guided else x
    run.keep(xt, free)


def highest(score, free, count):
    """Where the `count` highest scores (N, n) of free positions are; all, if they are fewer."""
    score = score.masked_fill(~free, float("-inf"))
    order = score.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)
    return (rank < count) & free


def arpc_score(run, x, xt, logits, step):
    """How bad each token of a proposal x (N, n), made from xt, is by ARPC's criterion.

    The AR side has ar_nll, -log p_AR(token); ar_gap, how far that is from the likeliest token's;
    ar_entropy. The diffusion side has entropy; how sure it was (confidence); how far ahead of its
    second choice (margin). kld, KL(AR || diffusion), reverse_kld and tvd compare the two sides.

    With masked noise the diffusion distribution of a token that was revealed before this step is a
    point mass. There kld is infinite, and reverse_kld, -log p_AR(token), takes its place."""
    criterion = run.options.criterion
    if criterion == "random":
        return run.random(ACCEPT, step)
    if criterion in AR_CRITERIA:
        ar = run.verify(x, step).log_softmax(-1)  # (N, n, V)
        nll = -pick(ar, x)
    if criterion == "ar_nll":
        return nll
    if criterion == "ar_gap":
        return ar.amax(-1) + nll
    if criterion == "ar_entropy":
        return entropy(ar)
    noisy = run.model.noise.scored(xt)
    diffusion = logits.log_softmax(-1)
    point_mass = 1e4 * (F.one_hot(x, logits.shape[-1]) - 1.0)  # its logarithm: 0 at x
    diffusion = torch.where(noisy[..., None], diffusion, point_mass)
    if criterion == "kld":
        return torch.where(noisy, divergence(ar, diffusion), nll)
    if criterion == "reverse_kld":
        return divergence(diffusion, ar)
    if criterion == "tvd":
        difference = ar.exp() - diffusion.exp()
        return difference.abs().sum(-1) / 2
    if criterion == "diffusion_entropy":
        return entropy(diffusion)
    top = diffusion.exp().topk(2, -1).values  # (N, n, 2)
    likeliest, second = top.unbind(-1)
    return second - likeliest if criterion == "diffusion_margin" else -likeliest


def divergence(logp, logq):
    """KL(p || q), nats, from (..., V) to (...)."""
    return (logp.exp() * (logp - logq)).sum(-1)


def entropy(logp):
    """Nats, from (..., V) to (...)."""
    return -(logp.exp() * logp).sum(-1)


def fill_by_confidence(run):
    """Each pass keeps the tokens whose probability exceeds the threshold, at least the likeliest
    (SDAR, arXiv 2510.06303; Fast-dLLM)."""
    xt, k = run.noisy_block(), 0
    while run.free().any():
        free = run.free()
        probs = run.distribution(run.denoise(xt))
        x = draw(probs, run.random(REVEAL, k))
        confidence = pick(probs, x).masked_fill(~free, -1)  # (N, n)
        likeliest = F.one_hot(confidence.argmax(-1), free.shape[1]).bool()
        sure = likeliest | (confidence > run.options.threshold)
        sure = sure & free
        x = torch.where(sure, x, xt)
        run.watch(run, xt, x, torch.zeros_like(free))
        run.keep(x, sure)
        xt, k = x, k + 1


def fill_by_draft(run):
    """Speculative decoding (Leviathan et al. 2022, arXiv 2211.17192): diffusion drafts in one pass,
    the AR side verifies in one, and what comes out is exactly an AR sample. Keep x ~ q with
    probability min(1, p(x) / q(x)); at the first rejection draw from (p - q)+. After it nothing is
    decided: the next block begins at the first token that some row lacks."""
    free = run.free()
    xt = run.noisy_block()
    q = run.distribution(run.denoise(xt))  # (N, n, V)
    draft = draw(q, run.random(REVEAL))
    x = torch.where(free, draft, xt)
    p = run.distribution(run.verify(x))
    ratio = pick(p, x) / pick(q, x)
    likely = run.random(ACCEPT) < ratio
    accepted = (~free | likely).cumprod(1)  # (N, n) 1 up to the first rejection
    n_accepted = accepted.sum(1, keepdim=True)  # (N, 1)
    rejected = torch.arange(free.shape[1], device=x.device) == n_accepted  # (N, n) the first one
    replacement = draw((p - q).clamp(min=0), run.random(RESIDUAL))
    x = torch.where(rejected, replacement, x)
    kept = accepted.bool() | rejected
    run.watch(run, xt, x, ~kept & free)
    run.keep(x, kept)
    # The verifying pass wrote the keys of what every row accepted. At least one token is left to
    # the next pass, which needs its state.
    run.cache.length += min(int(n_accepted.min()), free.shape[1] - 1)


FILL = {  # the blocks of "ar" are single tokens, which all samplers fill by one step
    "ancestral": fill_by_steps,
    "arpc": fill_by_steps,
    "confidence": fill_by_confidence,
    "speculative": fill_by_draft,
}


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


def in_batches(model, given, size, options):
    """generate() for all rows of given, some at a time: yields (tokens on the CPU, stats)."""
    for i, part in enumerate(given.split(size)):
        tokens, stats = generate(model, *part.shape, given=part, first_row=i * size, **options)
        yield tokens.cpu(), stats


def make_judge(decode, train, problems):
    """A function of i and sample i (a list of tokens): what share of it is right. A problem counts
    1 or 0, by its answer; of a text it is the share of words that the training text has."""
    if problems is not None:
        answers = [decode(row).split(END)[1] for row in problems.tolist()]
        return lambda i, tokens: is_right(decode(tokens).split(END)[1], answers[i])
    known = set(re.findall(r"[A-Za-z]+", decode(train[:10_000_000].tolist())))

    def known_words(i, tokens):
        words = re.findall(r"[A-Za-z]+", decode(tokens))[1:-1]  # the outer ones may be cut
        return sum(word in known for word in words) / max(1, len(words))

    return known_words


def print_table(model, given, judge, size, options):
    """For every sampler of GRID: network passes per batch, quality with its standard error, entropy
    of the tokens (low after a collapse). Returns the curves of a plot."""
    print("sampler                       passes   quality ± s.e.  nats")
    curves = {}
    for special in GRID:
        batches = in_batches(model, given, size, {**options, **special})
        tokens, stats = zip(*batches)
        tokens = torch.cat(tokens)
        passes = np.mean([each["nfe"] for each in stats])
        each = [judge(i, row) for i, row in enumerate(tokens.tolist())]
        quality, error = np.mean(each), np.std(each) / len(each) ** 0.5
        written = tokens[(given < 0) & (tokens != options["stop"])]
        frequency = torch.bincount(written) / len(written)
        nats = torch.special.entr(frequency).sum()
        name = " ".join(map(str, special.values()))
        print(f"{name:28} {passes:7.1f} {quality:9.3f} {error:6.3f} {nats:5.2f}", flush=True)
        label = name.rstrip("0123456789. ")  # without the number of steps, or the threshold
        curves.setdefault(label, []).append((passes, quality, error))
    return curves


def plot(panels, path):
    """A picture of panels {title: {label: points (x, y, error of y)}}, side by side. Raises
    ImportError."""
    import matplotlib.pyplot as plt

    size = 5.5 * len(panels), 4
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for panel, (title, curves) in zip(axes[0], panels.items()):
        for label, points in curves.items():
            x, y, error = zip(*points)
            panel.errorbar(x, y, error, marker="o", label=label)
        panel.set_xscale("log", base=2)
        panel.set(title=title, xlabel="network passes", ylabel="share that is right")
        panel.legend(fontsize=7)
    figure.savefig(path, dpi=120, bbox_inches="tight")


# ----------------------------------------------------------------------------------------------
# The command line


@dataclass
class Flags:
    ckpt: tuple = ("out/ckpt.pt",)  # the checkpoint; for a table several, with commas between
    num_samples: int = 1  # how many samples, at least 1
    batch_size: int = 32  # how many of them at a time, at least 1
    length: int = 0  # tokens of a text, prompt included, at least 0; 0: the model's seq_len
    prompt: str = ""  # what a text begins with
    template: str = ""  # a text with holes: k > 1 underscores are k tokens
    problem: int = -1  # solve this validation problem of the model's dataset; at least -1: none
    device: str = "auto"  # cpu, cuda, ...; auto: cuda where there is one
    watch: bool = False  # show every step
    table: bool = False  # no text, but quality against passes for every sampler
    plot: str = ""  # a table, and this picture of it, PNG (needs matplotlib)

    def __post_init__(self):
        check_settings(self)
        if (self.prompt != "") + (self.template != "") + (self.problem >= 0) > 1:
            raise ValueError("--prompt, --template and --problem exclude each other")
        self.table |= self.plot != ""


def make_watcher(decode, color):
    """A function for generate(watch=...): a line for every pass of the first row. Bright: new in
    this pass; red and struck: sent back by ARPC, or rejected. Without color: +new+, -sent back-.
    A mask is `_`, a line's end ⏎, the end token ∎."""
    bright, red = ("\033[1;97m{}\033[0m", "\033[9;31m{}\033[0m") if color else ("+{}+", "-{}-")

    def watch(run, *blocks):
        words = []
        first_rows = (block[0].tolist() for block in blocks)
        for old, token, sent_back in zip(*first_rows):
            is_mask = token == run.model.noise.mask
            text = "_" if is_mask else decode([token]).replace("\n", "⏎").replace(END, "∎")
            style = red if sent_back else bright if token != old else "{}"
            words.append(style.format(text))
        print(f"{run.nfe:4} {run.begin:4} | {''.join(words)}", flush=True)

    return watch


def read_given(flags, encode, tokenizer, longest):
    """Given tokens (num_samples, length) of --prompt or --template, -1 where free."""
    parts = re.split(r"(_{2,})", flags.template) if flags.template else [flags.prompt]
    text = [tokenizer["start"]] if "start" in tokenizer else []
    for i, part in enumerate(parts):  # every second one is a hole
        text += [-1] * len(part) if i % 2 else encode(part)
    length = flags.length or (len(text) if flags.template else longest)
    if len(text) > length:
        raise ValueError(f"the prompt has {len(text)} tokens, more than the {length} to write")
    text += [-1] * (length - len(text))
    return torch.tensor(text).repeat(flags.num_samples, 1)


def choose_problems(rows, meta, flags):
    """The problems, (N, L) tokens, of a table or of --problem. Raises ValueError."""
    rows = rows.reshape(-1, meta["row_length"])
    chosen = range(flags.num_samples) if flags.table else [flags.problem] * flags.num_samples
    if max(chosen) >= len(rows):
        raise ValueError(f"there are {len(rows)} validation problems: 0 to {len(rows) - 1}")
    return torch.from_numpy(rows[list(chosen)].astype(np.int64))


def sample(path, flags, options):
    """What the flags ask of one checkpoint. Returns (title, the curves of a plot) of a table."""
    model, content = load_checkpoint(path, find_device(flags.device))
    tokenizer = content["meta"]["tokenizer"]
    encode, decode = load_tokenizer(tokenizer)
    stop = tokenizer["end"]
    options = dict(options, stop=stop)
    given = read_given(flags, encode, tokenizer, model.config.seq_len)
    problems = judge = None
    if flags.table or flags.problem >= 0:
        args = content["args"]
        if not args:
            raise ValueError(f"{path} was converted: it has no dataset to judge samples by")
        folder = f"{args['data_dir']}/{args['dataset']}"
        train, val, meta = open_data(folder)
        check_tokenizer(content["meta"], meta)
        if "row_length" in meta:
            problems = choose_problems(val, meta, flags)
            given = problems.where(is_question(problems, stop), -1)
        elif flags.problem >= 0:
            raise ValueError(f"{folder} has no problems")
        judge = make_judge(decode, train, problems)
    if flags.table:
        title = f"{path}, {model.config.noise} noise"
        print(f"\n{title}, {len(given)} samples")
        return title, print_table(model, given, judge, flags.batch_size, options)

    def show(i, tokens):
        if problems is None:
            while tokens and tokens[-1] == stop:
                tokens.pop()
            return decode(tokens)
        question, answer = decode(tokens).split(END)[:2]
        verdict = "right" if judge(i, tokens) else "wrong"
        return f"{question}\n{answer}= {solve(answer)}, {verdict}"

    if flags.watch:
        options["watch"] = make_watcher(decode, sys.stdout.isatty())
    for tokens, stats in in_batches(model, given, flags.batch_size, options):
        for i, row in enumerate(tokens.tolist()):
            print(show(i, row), "-" * 80, sep="\n")
        print(", ".join(f"{name} {value:.4g}" for name, value in stats.items()))


def main():
    values = parse_flags(__doc__, Flags, Options)
    flags = from_values(Flags, values)
    options = vars(from_values(Options, values))
    if flags.plot:
        import matplotlib.pyplot  # if it is missing, the user hears it before the work

    tables = [sample(path, flags, options) for path in flags.ckpt]
    if flags.plot:
        plot(dict(tables), flags.plot)


if __name__ == "__main__":
    run_script(main)
