"""Train a block diffusion model on a mixture of block sizes.

    python train.py                                      # makes its data, too; fits the machine
    python train.py --dataset=math                       # likewise: problems with answers
    python train.py --dataset=shakespeare                # after python prepare_data.py shakespeare
    python train.py --block_sizes=1                      # an autoregressive model
    python train.py --block_sizes=1024                   # full-sequence diffusion: MDLM, or with
                                                         # --noise=uniform Duo
    python train.py --preset=paper                       # 12 layers, 768 wide, L = 1024
    python train.py --resume                             # go on from out/ckpt.pt
    python train.py --eval_only                          # the likelihood of out/ckpt.pt

Writes OUT_DIR/ckpt.pt (atomically) and OUT_DIR/log.jsonl. All randomness is a function of (seed,
step, row): neither the number of parts of a batch (dropout aside) nor an interruption changes what
is computed (on a GPU up to rounding, for its sums have no fixed order).
"""
import copy
import json
import math
import os
import signal
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import SimpleNamespace

from blockgen import (  # first: it sets an option that torch reads when it is loaded
    BlockGen,
    Config,
    find_device,
    load_checkpoint,
    random_numbers,
    read_checkpoint,
    save_checkpoint,
    trained_weights,
)
from kernels import use_triton
from prepare_data import (
    check_settings,
    check_tokenizer,
    from_values,
    is_question,
    open_data,
    parse_flags,
    prepare,
    run_script,
)

import numpy as np
import torch
from tqdm import tqdm


@dataclass
class Settings:
    """The flags, beside those of blockgen.Config. The defaults take five minutes on two cores."""

    preset: str = "auto"  # auto | cpu | gpu | paper: defaults of other flags, by the machine
    dataset: str = "pydocs"  # a folder in data_dir, made by prepare_data.py
    data_dir: str = "data"  # where the datasets are
    out_dir: str = "out"  # where ckpt.pt and log.jsonl go
    init_from: str = ""  # start from this checkpoint's weights, and with its flags of the model
    resume: bool = False  # go on from OUT_DIR/ckpt.pt, with its flags where none are given
    seed: int = 0  # of everything random, at least 0, at most 9e18
    # the objective
    block_sizes: tuple = (1, 16)  # block sizes S to mix, at least 1, at most 1e9; above L: L
    block_weights: tuple = ()  # how much each counts, at least 1e-9, at most 1e6; by default alike
    loss: str = "nelbo"  # nelbo | ce: the bound on the likelihood, or (masked noise) unweighted
    t_min: float = 0.3  # least noise level in training, at least 1e-6, at most 0.99
    # optimization
    max_iters: int = 1800  # steps, at least 1
    batch_size: int = 8  # rows per step, at least 1
    grad_accum: int = 1  # compute them in so many parts, to save memory, at least 1
    optimizer: str = "muon"  # of the weight matrices of the layers: muon | adamw
    learning_rate: float = 6e-3  # peak learning rate, at least 0
    lr_decay: str = "cosine"  # after the warm-up: cosine | constant
    warmup_iters: int = 50  # steps of linear warm-up, at least 1
    weight_decay: float = 0.01  # of these matrices, at least 0
    beta2: float = 0.99  # of AdamW, at least 0, at most 0.99999
    grad_clip: float = 1.0  # largest norm of the gradient, at least 0; 0: any
    ema: float = 0.95  # decay of the average of the weights, at least 0, at most 0.99999
    # evaluation
    eval_interval: int = 300  # steps from one evaluation and checkpoint to the next, at least 1
    eval_seqs: int = 64  # validation sequences, with always the same noise, at least 2
    eval_only: bool = False  # no training: the likelihood of OUT_DIR/ckpt.pt, as a table
    eval_block_sizes: tuple = (1, 2, 4, 8, 16, 10**9)  # with --eval_only; at least 1; above L: L
    eval_draws: int = 8  # with --eval_only: draws of the noise for a sequence, at least 1
    # the machine
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda where there is one
    dtype: str = "auto"  # auto | float32 | bfloat16; auto: bfloat16 on a GPU that has it
    compile: bool = False  # torch.compile, on a GPU with Triton or on a CPU

    def __post_init__(self):
        check_settings(self)
        if len(self.block_weights) not in (0, len(self.block_sizes)):
            raise ValueError("--block_sizes must have one of --block_weights each")


PRESETS = {
    "gpu": dict(  # by estimate 5 GB of GPU memory
        compile=True,
        dataset="alldocs",
        n_layer=6,
        n_head=6,
        n_embd=384,
        seq_len=256,
        dropout=0.1,
        batch_size=64,
        max_iters=5000,
        learning_rate=2e-3,
        warmup_iters=100,
        ema=0.999,
        eval_seqs=256,
    ),
    "paper": dict(  # by estimate 14 GB of GPU memory
        compile=True,
        dataset="openwebtext",
        n_layer=12,
        n_head=12,
        n_embd=768,
        seq_len=1024,
        dropout=0.1,
        tied=False,
        noisy_gain=1.0,
        ar="paper",
        block_weights=(0.05, 0.95),
        loss="ce",
        t_min=1e-3,
        batch_size=512,
        grad_accum=64,
        max_iters=1_000_000,
        optimizer="adamw",
        learning_rate=3e-4,
        lr_decay="constant",
        warmup_iters=2500,
        weight_decay=0.0,
        beta2=0.999,
        ema=0.9999,
        eval_interval=5000,
        eval_seqs=256,
    ),
}


# ----------------------------------------------------------------------------------------------
# A training step


def train_step(run, args):
    """Gradients of this step's batch, and a step of the optimizers. run: see start(). Returns a
    tensor: loss in nats per token, norm of the gradient."""
    total = torch.zeros((), device=run.device)
    for part, rows in enumerate(torch.arange(args.batch_size).chunk(args.grad_accum)):
        torch.manual_seed(hash((args.seed, run.step, part)) % 2**63)  # for dropout
        batch = draw_batch(run, args, rows)
        with run.autocast:
            losses = row_losses(run.model, batch, args.loss, run.ar_weight)
        loss = losses.sum() / args.batch_size
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip or math.inf)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, run.step)
        optimizer.step()
        optimizer.zero_grad()
    update_average(run.average, run.model, args.ema, run.step)
    return torch.stack([total, norm])


def row_losses(model, batch, *more):
    """Nats per token (N,): the means of token_losses over the tokens of a row that are not given.
    batch: x0, block sizes, t, u, given."""
    batch = [x.to(model.head.bias.device, non_blocking=True) for x in batch]
    losses = model.token_losses(*batch, *more)
    return losses.sum(1) / (~batch[-1]).sum(1)


def draw_batch(run, args, rows):
    """Everything random about some rows (R,) of a step's batch: x0 (R, L), block sizes (R,), t and
    u (R, L), and which tokens are given (R, L). Block sizes and, within the rows of one size, noise
    levels are stratified over the whole batch: row i takes what stands at (i + offset) / batch_size
    when the sizes share out [0, 1) by their weights."""
    key = args.seed, run.step
    chosen = random_numbers((*key, 4), rows, 1)[:, 0] * len(run.train)
    x0, given = read_rows(run.train, chosen.long(), run.meta)
    offset = random_numbers((*key, 0), [0], 1)[0]
    point = (rows + offset) / args.batch_size
    begin = run.weights.cumsum(0) - run.weights
    which = torch.searchsorted(begin, point, right=True) - 1
    stratum = (point - begin[which]) / run.weights[which]  # where in the share of its size, [0, 1)
    block_size = run.sizes[which]
    t, u = draw_noise(key, rows, stratum, block_size, x0.shape[1], args.t_min)
    return [x0, block_size, t.float(), u, given]


def draw_noise(key, rows, stratum, block_size, length, t_min):
    """The noise of some rows (N,) of a batch, a function of the key: noise levels t (N, L) in
    [t_min, 1], constant in a block of block_size (N,), and uniform numbers u (N, L) that corrupt.

    The levels are stratified over all blocks of a batch. A row with B blocks has one in each of B
    equal intervals of [0, 1), all at the same fraction of their interval, which is the row's
    stratum (N,): two rows of two blocks with 0 and 1/2 have 0, 1/2 and 1/4, 3/4. Each row begins
    with a random interval, and one offset is added for the whole batch, modulo 1. So every level by
    itself is uniform."""
    block_size, stratum = block_size[:, None], stratum[:, None]
    n_blocks = (length + block_size - 1) // block_size  # (N, 1)
    first = random_numbers((*key, 2), rows, 1) * n_blocks
    interval = torch.arange(length) // block_size + first.long()  # (N, L)
    level = (interval + stratum.double()) / n_blocks
    level = (level + random_numbers((*key, 1), [0], 1)) % 1
    u = random_numbers((*key, 3), rows, length)
    return t_min + (1 - t_min) * level, u


def shares(args):
    """The weights of the block sizes, in the loss and in the mixture that mixture_bounds takes
    the model for; they sum to 1."""
    weights = args.block_weights or [1.0] * len(args.block_sizes)
    return [weight / sum(weights) for weight in weights]


def sizes_of_rows(sizes, weights, ar):
    """(block sizes (B,), weights (B,)) of the rows of a batch, and the share of block size 1 in the
    loss of every row. In the paper block size 1 takes rows of its own. Under ar="shift" every row
    has it beside another block size."""
    sizes, weights = torch.tensor(sizes), torch.tensor(weights, dtype=torch.float64)
    if ar == "paper" or sizes.max() == 1:
        return sizes, weights, 0.0
    others = sizes > 1
    ar_weight = weights[~others].sum().item()
    return sizes[others], weights[others] / (1 - ar_weight), ar_weight


def read_rows(rows, chosen, meta):
    """The chosen rows, (N, L) int64, and which of their tokens are given: a problem's question."""
    x0 = torch.from_numpy(rows[chosen.numpy()].astype(np.int64))
    if "row_length" in meta:
        return x0, is_question(x0, meta["tokenizer"]["end"])
    return x0, torch.zeros_like(x0, dtype=torch.bool)


def learning_rate(args, step):
    """Linear warm-up, then constant, or a cosine down to zero."""
    rate = args.learning_rate * min(1, (step + 1) / args.warmup_iters)
    if args.lr_decay == "cosine":
        rate *= (1 + math.cos(math.pi * step / args.max_iters)) / 2
    return rate


@torch.no_grad()
def update_average(average, model, decay, step):
    """Exponential moving average of the weights; early on over a fifth of the steps so far, so that
    short runs profit."""
    decay = min(decay, 1 - 5 / (step + 6))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def make_optimizers(model, args):
    """One for the matrices of the blocks, Muon (arXiv 2502.16982) or AdamW; AdamW for the rest."""
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p not in set(matrices)]
    adamw = partial(torch.optim.AdamW, betas=(0.9, args.beta2), fused=True)
    muon = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")  # for AdamW's learning rate
    choice = muon if args.optimizer == "muon" else adamw
    return [choice(matrices, weight_decay=args.weight_decay), adamw(rest, weight_decay=0.0)]


# ----------------------------------------------------------------------------------------------
# The run


def train(args, config):
    run = start(args, config)
    with tqdm(total=args.max_iters, initial=run.step, smoothing=0) as bar:
        while run.step < args.max_iters and not run.stop:
            loss, norm = train_step(run, args).tolist()
            if not math.isfinite(loss + norm):  # what is saved is older
                why = f"the loss is {loss:.1f} nats, the norm of its gradient {norm:.1f}"
                raise ValueError(f"stopped at step {run.step}: {why}; lower --learning_rate?")
            run.log(step=run.step, loss=loss)
            run.step += 1
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if run.step % args.eval_interval == 0 or run.step == args.max_iters:
                report(run, args)
                save(run, args)
    if run.stop:
        save(run, args)
    print(f"saved step {run.step}: python sample.py --ckpt={run.path}, or --resume")


def report(run, args):
    """Evaluate, and print it; keep the weights if they are the best so far."""
    loss = 0.0
    for S, share in zip(args.block_sizes, shares(args)):
        losses, _ = evaluate(run.average, run.val, run.meta, S, args.eval_seqs)
        tqdm.write(f"step {run.step}, S={S}: {describe(losses, run.meta)}")
        nats = losses.mean().item()
        run.log(step=run.step, block_size=S, val=nats)
        loss += share * nats
    if loss < run.best_loss:
        run.best_loss, run.best = loss, copy.deepcopy(run.average.state_dict())


PROGRESS = "best", "best_loss", "step"


def save(run, args):
    save_checkpoint(
        run.path,
        config=asdict(run.model.config),
        args=asdict(args),
        meta=run.meta,
        model=run.model.state_dict(),
        average=run.average.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in run.optimizers],
        **{name: getattr(run, name) for name in PROGRESS},
    )


def restore(run, args, saved):
    """Go on from a checkpoint. Raises ValueError if it is not of this run."""
    if (run.model.config, args.optimizer) != (saved["config"], saved["args"].get("optimizer")):
        problem = f"{run.path} has another model or optimizer, which no flag changes"
        raise ValueError(f"{problem}: --init_from starts anew from its weights")
    run.model.load_state_dict(saved["model"])
    run.average.load_state_dict(saved["average"])
    for optimizer, state in zip(run.optimizers, saved["optimizers"]):
        optimizer.load_state_dict(state)
    for name in PROGRESS:
        setattr(run, name, saved[name])


def start(args, config):
    """All that a run consists of: model, average, optimizers, data, and where it is."""
    run = SimpleNamespace(stop=[], best=None, best_loss=math.inf, step=0)
    run.device = find_device(args.device)
    run.autocast = find_autocast(args, run.device)
    run.train, run.val, run.meta = load_data(args, config.seq_len)
    run.sizes, run.weights, run.ar_weight = sizes_of_rows(args.block_sizes, shares(args), config.ar)
    run.path = f"{args.out_dir}/ckpt.pt"
    source = run.path if args.resume else args.init_from
    saved = read_checkpoint(source) if source else None
    torch.manual_seed(args.seed)
    run.model = make_model(config, run.meta, saved).to(run.device)
    run.average = copy.deepcopy(run.model).eval()
    run.optimizers = make_optimizers(run.model, args)
    if args.resume:
        restore(run, args, saved)
    os.makedirs(args.out_dir, exist_ok=True)
    log = open(f"{args.out_dir}/log.jsonl", "a" if args.resume else "w", buffering=1)
    run.log = lambda **line: log.write(json.dumps(line) + "\n")
    if args.compile and (run.device.type == "cpu" or use_triton(run.device)):
        torch._dynamo.config.suppress_errors = True  # a failing compiler costs speed, not the run
        for block in run.model.blocks:
            block.compile()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: run.stop.append(True))
    n_parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{n_parameters:.2f}M parameters on {run.device}; {len(run.train):,} rows")
    print(f"unigram entropy {run.meta['unigram_nats']:.3f} nats")
    return run


def find_autocast(args, device):
    """The precision of the training pass, by default bfloat16 where it is fast."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    bfloat16 = args.dtype == "bfloat16" or args.dtype == "auto" and fast
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def load_data(args, length):
    """(rows for training, for validation, meta). Rows (n, L) are views: of a text there is one at
    every position. A dataset that needs no help is made first. Raises ValueError."""
    folder = f"{args.data_dir}/{args.dataset}"
    if args.dataset in ("pydocs", "alldocs", "math") and not os.path.exists(folder):
        print(f"preparing {folder} ...")
        prepare(args.dataset, args.data_dir, seq_len=length)
    train, val, meta = open_data(folder)
    stride = meta.get("row_length", 1)
    if stride not in (1, length):
        raise ValueError(f"the problems of {folder} need --seq_len={stride}")
    if min(len(train), len(val)) < length:
        raise ValueError(f"{folder} is too small for --seq_len={length}")
    windows = np.lib.stride_tricks.sliding_window_view
    return windows(train, length)[::stride], windows(val, length)[::stride], meta


def make_model(config, meta, saved):
    """A new model, with the weights of a checkpoint if one is given. Raises ValueError."""
    if not saved:
        return BlockGen(replace(config, vocab_size=meta["vocab_size"]))
    check_tokenizer(saved["meta"], meta)
    model = BlockGen(replace(config, vocab_size=saved["config"].vocab_size))
    try:
        model.load_state_dict(trained_weights(saved))
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit the model: {error}") from None
    return model


# ----------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, data, meta, block_size, n_seqs, draws=1, batch_size=16, seed=0):
    """NELBO of n_seqs rows, spread evenly over the data (n, L), as the mean of some draws of the
    noise. Returns nats per token that is scored, and how many those are (of problems the answer
    alone), both float64 (n_seqs,).

    The noise is a function of (seed, draw, sequence), so neither batch size nor machine moves the
    figures. t starts at 1e-6: what lies below adds less than is printed."""
    n_seqs = min(n_seqs, len(data))
    chosen = torch.linspace(0, len(data) - 1, n_seqs).long()
    nats, lengths = torch.zeros(2, n_seqs, dtype=torch.float64)
    for rows in torch.arange(n_seqs).split(batch_size):
        x0, given = read_rows(data, chosen[rows], meta)
        lengths[rows] = (~given).sum(1).double()
        sizes = torch.full((len(rows),), block_size)
        for draw in range(draws):
            noise = draw_noise((seed, draw), rows, rows / n_seqs, sizes, x0.shape[1], t_min=1e-6)
            losses = row_losses(model, [x0, sizes, *noise, given])
            nats[rows] += losses.cpu() / draws
    return nats, lengths


def describe(nats, meta):
    """The mean over sequences (n_seqs,), with its standard error."""
    mean, error = nats.mean(), nats.std() / len(nats) ** 0.5
    bits = mean / math.log(2) / meta["bytes_per_token"]
    return f"{mean:.4f} ± {error:.4f} nats, {bits:.3f} bits/byte"


def mixture_bounds(total, weights):
    """Two upper bounds on -log p(x), nats (n_seqs,), of a model that first draws a block size S
    with probabilities w. total (sizes, n_seqs): unbiased estimates of NELBO_S(x).

    -log p(x) = -log sum_S w_S p_S(x) <= sum_S r_S (NELBO_S(x) + log(r_S / w_S)) for any r. With
    r = w it is Jensen's bound, the first. The best r, w_S exp(-NELBO_S(x)) over its sum, gives
    -log sum_S w_S exp(-NELBO_S(x)). But the noise of an estimate would choose an r in its own
    favor, and the figure sink below the truth: so the second takes r from the mean NELBO_S of the
    other sequences."""
    w, n = torch.tensor(weights, dtype=torch.float64)[:, None], total.shape[1]
    others = (total.sum(1, keepdim=True) - total) / max(1, n - 1)
    r = torch.softmax(w.log() - others, 0)
    jensen = (w * total).sum(0)
    return jensen, (r * total + torch.special.xlogy(r, r / w)).sum(0)


@torch.no_grad()
def eval_only(args):
    """Print the likelihood of OUT_DIR/ckpt.pt on validation data, by block size and under the
    mixture. Raises ValueError."""
    model, content = load_checkpoint(f"{args.out_dir}/ckpt.pt", find_device(args.device))
    L = model.config.seq_len
    _, data, meta = load_data(args, L)
    check_tokenizer(content["meta"], meta)
    losses = {}
    for S in sorted({min(L, S) for S in (*args.block_sizes, *args.eval_block_sizes)}):
        losses[S], lengths = evaluate(model, data, meta, S, args.eval_seqs, args.eval_draws)
    total = torch.stack([losses[min(L, S)] for S in args.block_sizes]) * lengths
    jensen, log_sum_exp = mixture_bounds(total, shares(args))
    losses["mixture: Jensen"] = jensen / lengths
    losses["mixture: log-sum-exp"] = log_sum_exp / lengths
    print(f"{model.config.noise} noise, best of {content['step']} steps, {len(lengths)} sequences")
    for S, nats in losses.items():
        print(f"{S:>20}: {describe(nats, meta)}, perplexity {nats.mean().exp():.2f}")


# ----------------------------------------------------------------------------------------------
# The command line


def read_flags(argv=None):
    """(Settings, Config). Flags beat the checkpoint's (--resume, --eval_only; with --init_from just
    those of the model) or the preset's, and those beat the defaults. Raises ValueError."""
    values = parse_flags(__doc__, Settings, Config, argv=argv)
    preset = values["preset"]
    if preset == "auto":
        preset = "gpu" if find_device(values["device"]).type == "cuda" else "cpu"
    defaults = PRESETS.get(preset, {})
    if values["init_from"]:
        defaults = defaults | asdict(read_checkpoint(values["init_from"])["config"])
    if values["resume"] or values["eval_only"]:
        saved = read_checkpoint(f"{values['out_dir']}/ckpt.pt")
        here = dict(out_dir=values["out_dir"], device=values["device"])
        defaults = asdict(saved["config"]) | saved["args"] | here
    values = parse_flags(__doc__, Settings, Config, argv=argv, defaults=defaults)
    args, config = from_values(Settings, values), from_values(Config, values)
    if args.loss == "ce" and config.noise == "uniform":
        raise ValueError("--loss=ce is for masked noise: use --loss=nelbo with --noise=uniform")
    return args, config


def main():
    args, config = read_flags()
    if args.eval_only:
        eval_only(args)
    else:
        train(args, config)


if __name__ == "__main__":
    run_script(main)
