"""Train a block diffusion model on a mixture of block sizes.

    python train.py                                      # prepares its data if need be; fits the machine it finds
    python train.py --dataset=shakespeare --max_iters=5000
    python train.py --block_sizes=1                      # an autoregressive model
    python train.py --block_sizes=128                    # full-sequence diffusion: MDLM, or with --noise=uniform Duo
    python train.py --preset=paper --dataset=openwebtext # 12 layers, 768 wide, L = 1024
    torchrun --nproc_per_node=8 train.py ...             # the same run, faster: rows are shared out, results stay
    python train.py --resume                             # go on from out/ckpt.pt, bit for bit
    python train.py --eval_only --eval_draws=8           # the likelihood of out/ckpt.pt at several block sizes

Writes OUT/ckpt.pt (atomically) and OUT/log.jsonl. All randomness is a function of (seed, step, row), so neither the
number of processes nor of gradient accumulation parts (dropout aside) nor an interruption changes what is computed.
"""
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, fields
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from blockgen import (BlockGen, Config, find_device, load_checkpoint, load_weights, noise_levels, read_checkpoint,
                      save_checkpoint, token_losses, uniform)
from prepare_data import load_tokenizer, new_parser, prepare, run_script
from sample import generate

PRESETS = {
    "cpu": {},  # the flags' own defaults: five minutes on two cores
    "gpu": dict(n_layer=8, n_head=8, n_embd=512, seq_len=256, dropout=0.1, batch_size=128, max_iters=5000,
                learning_rate=1e-3, warmup_iters=100, ema=0.999, eval_seqs=256),
    "paper": dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024, dropout=0.1, tied=False, noisy_gain=1.0,
                  ar="paper", block_weights="0.05,0.95", batch_size=512, grad_accum=16, max_iters=1_000_000, optimizer="adamw",
                  learning_rate=3e-4, lr_decay="constant", warmup_iters=2500, weight_decay=0.0, ema=0.9999,
                  eval_interval=5000, eval_seqs=256),
}


# ---------------------------------------------------------------------------------------------------------------------
# Data


def open_data(folder):
    """(train, val, meta): memory-mapped tokens. Raises ValueError for files that are not what meta.json says."""
    try:
        with open(os.path.join(folder, "meta.json")) as file:
            meta = json.load(file)
        parts = [np.memmap(os.path.join(folder, f"{part}.bin"), meta["dtype"], "r") for part in ("train", "val")]
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no dataset: python prepare_data.py makes one") from None
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder} is damaged ({error}): make it again with prepare_data.py") from None
    for part, tokens in zip(("train", "val"), parts):
        expected = meta[f"{part}_tokens"]
        if len(tokens) != expected:
            raise ValueError(f"{folder}/{part}.bin has {len(tokens)} tokens, not {expected}: make it again")
    return *parts, meta


def crops(tokens, starts, length, device):
    """Rows of consecutive tokens, (N, L) int64."""
    rows = np.stack([tokens[s : s + length] for s in starts.tolist()]).astype(np.int64)
    return torch.from_numpy(rows).to(device)


def mixture(args):
    """(block sizes (B,), weights (B,)) of the rows of a batch, and the share of block size 1 in the loss of every row.

    In the paper block size 1 takes rows of its own. With --ar=shift every row has it beside another block size."""
    sizes, weights = torch.tensor(args.block_sizes), torch.tensor(args.block_weights, dtype=torch.float64)
    if args.ar == "paper" or sizes.max() == 1:
        return sizes, weights, 0.0
    others = sizes > 1
    ar_weight = weights[~others].sum().item()
    return sizes[others], weights[others] / (1 - ar_weight), ar_weight


def draw_batch(args, tokens, step, rows, device):
    """Everything random about the given rows (R,) of a step's batch: x0 (R, L), block sizes (R,), t (R, L), u (R, L).

    Block sizes and, within the rows of one size, noise levels are stratified over the whole batch."""
    key = (args.seed, step)
    block_sizes, weights, _ = mixture(args)
    place = (rows + uniform(*key, 0)) / args.batch_size  # the batch tiles [0, 1)
    mine = torch.searchsorted(weights.cumsum(0), place, right=True).clamp(max=len(weights) - 1)
    inner = ((place - (weights.cumsum(0) - weights)[mine]) / weights[mine]).clamp(0, 1)  # and so does each size in it
    sizes = block_sizes[mine]
    shift = torch.stack([uniform(*key, 1).expand(len(rows)), uniform(*key, 2, rows)], 1)
    t = noise_levels(shift, inner, sizes, args.seq_len)
    u = uniform(*key, 3, rows[:, None], torch.arange(args.seq_len))
    starts = (uniform(*key, 4, rows) * (len(tokens) - args.seq_len + 1)).long()
    return crops(tokens, starts, args.seq_len, device), *(x.to(device) for x in (sizes, t, u))


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, tokens, block_size, n_seqs, draws=1, batch_size=16, seed=0):
    """NELBO of n_seqs sequences spread evenly over the tokens: nats per token, float64 (draws, n_seqs).

    The noise is a function of (seed, draw, sequence), so neither batch size nor time nor machine moves the figures."""
    L, device = model.config.seq_len, next(model.parameters()).device
    starts = torch.linspace(0, len(tokens) - L, n_seqs).long()
    result = torch.empty(draws, n_seqs, dtype=torch.float64)
    for draw in range(draws):
        for rows in torch.arange(n_seqs).split(batch_size):
            shift = torch.stack([uniform(seed, draw, 0).expand(len(rows)), uniform(seed, draw, 1, rows)], 1)
            sizes = torch.full((len(rows),), block_size)
            t = noise_levels(shift, rows / n_seqs, sizes, L)
            u = uniform(seed, draw, 2, rows[:, None], torch.arange(L))
            losses = token_losses(model, crops(tokens, starts[rows], L, device), *(x.to(device) for x in (sizes, t, u)))
            result[draw, rows] = losses.double().mean(1).cpu()
    return result


def summary(losses):
    """Mean over sequences, and its standard error, of (draws, n_seqs) estimates; a sequence's draws are averaged first."""
    each = losses.mean(0)
    return each.mean().item(), (each.std() / len(each) ** 0.5).item() if len(each) > 1 else float("nan")


def describe(losses, meta):
    """Evaluation results {block size: losses} in one line."""
    words = []
    for size, (mean, error) in ((s, summary(x)) for s, x in losses.items()):
        byte = f", {mean / math.log(2) / meta['bytes_per_token']:.3f} bits/byte" if "bytes_per_token" in meta else ""
        words.append(f"S={size}: {mean:.4f} ± {error:.4f} nats{byte}")
    return " | ".join(words)


def mixture_bounds(total, weights):
    """Upper bounds on -log p(x), nats per sequence, (n_seqs,) each, of the model that first draws a block size S with the
    given weights w: Jensen's, and one that is nearly log-sum-exp's. total (sizes, n_seqs): estimates of NELBO_S(x).

    -log p(x) = -log sum_S w_S p_S(x) <= sum_S r_S (NELBO_S(x) + log(r_S / w_S)) for any r. r = w gives Jensen's bound; the
    best r, w_S exp(-NELBO_S(x)) normalized, gives -log sum_S w_S exp(-NELBO_S(x)). But the noise of an estimate would choose
    r in its own favor, and the figure sink below the truth: r is taken from the mean NELBO_S of the other sequences."""
    w, n = torch.tensor(weights, dtype=torch.float64)[:, None], total.shape[1]
    r = torch.softmax(w.log() - (total.sum(1, keepdim=True) - total) / (n - 1), 0) if n > 1 else w
    jensen, other = (w * total).sum(0), (r * total + torch.special.xlogy(r, r / w)).sum(0)
    return jensen, min(jensen, other, key=torch.mean)


def likelihood(path, args, device):
    """What --eval_only says of a checkpoint: NELBO for each block size, bounds of the mixture that it was trained on."""
    model, content = load_checkpoint(path, device)
    trained = {**vars(args), **content["args"]}  # published checkpoints do not say: there the flags do
    L, mixture = model.config.seq_len, dict(zip(trained["block_sizes"], trained["block_weights"]))
    tokens, meta = open_data(os.path.join(args.data_dir, trained["dataset"]))[1:]
    if meta["vocab_size"] != model.config.vocab_size:
        raise ValueError(f"{path} has a vocabulary of {model.config.vocab_size} tokens, the data of {meta['vocab_size']}")
    n_seqs = min(args.eval_seqs, len(tokens) // L)
    sizes = sorted({min(L, S) for S in args.eval_block_sizes} | mixture.keys())
    losses = {S: evaluate(model, tokens, S, n_seqs, args.eval_draws) for S in sizes}
    jensen, log_sum_exp = mixture_bounds(torch.stack([losses[S].mean(0) for S in mixture]) * L, list(mixture.values()))
    losses["mixture: Jensen"], losses["mixture: log-sum-exp"] = jensen[None] / L, log_sum_exp[None] / L
    if "entropy_rate" in meta:
        losses["true entropy"] = torch.full((1, 1), (meta["first_nats"] + (L - 1) * meta["entropy_rate"]) / L).double()
    rows = {}
    for name, (mean, error) in ((str(k), summary(x)) for k, x in losses.items()):
        bits = mean / math.log(2)
        per_byte = bits / meta["bytes_per_token"] if "bytes_per_token" in meta else None
        rows[name] = dict(nats=mean, error=error, bits=bits, bits_per_byte=per_byte, perplexity=math.exp(mean))
    return dict(checkpoint=path, noise=model.config.noise, trained=mixture, step=content["step"], draws=args.eval_draws,
                seqs=n_seqs, rows=rows)


def print_likelihood(r):
    """The table of one checkpoint."""
    mixture = ", ".join(f"{S}: {w:g}" for S, w in r["trained"].items())
    print(f"\n{r['checkpoint']}: {r['noise']} noise, block sizes {{{mixture}}}, {r['step']} steps; "
          f"{r['seqs']} sequences, {r['draws']} draws")
    print(f"{'block size':>22} {'nats/token':>11} {'± s.e.':>8} {'bits/token':>11} {'bits/byte':>10} {'perplexity':>11}")
    for name, x in r["rows"].items():
        byte = f"{x['bits_per_byte']:10.4f}" if x["bits_per_byte"] else f"{'':>10}"
        print(f"{name:>22} {x['nats']:11.4f} {x['error']:8.4f} {x['bits']:11.4f} {byte} {x['perplexity']:11.2f}")


def print_side_by_side(results):
    """Nats per token of several checkpoints, a column each."""
    print("\nnats per token, side by side")
    for i, r in enumerate(results):
        print(f"  ({i + 1}) {r['checkpoint']}")
    print(f"{'block size':>22}" + "".join(f"{f'({i + 1})':>9}" for i in range(len(results))))
    for name in dict.fromkeys(name for r in results for name in r["rows"]):
        cells = (f"{r['rows'][name]['nats']:.4f}" if name in r["rows"] else "" for r in results)
        print(f"{name:>22}" + "".join(f"{cell:>9}" for cell in cells))


def eval_only(args):
    """Print the likelihood of each checkpoint of --compare (by default OUT_DIR/ckpt.pt); write OUT_DIR/eval.json."""
    device = set_up_device(args)[0]
    results = [likelihood(path, args, device) for path in args.compare or [os.path.join(args.out_dir, "ckpt.pt")]]
    for r in results:
        print_likelihood(r)
    if len(results) > 1:
        print_side_by_side(results)
    os.makedirs(args.out_dir, exist_ok=True)
    with open(os.path.join(args.out_dir, "eval.json"), "w") as file:
        json.dump(results, file, indent=1)
    if args.plot:
        plot(results, args.plot)


def plot(results, path):
    """NELBO against block size, one line a checkpoint."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.figure(figsize=(8, 4))
    for r in results:
        points = [(int(name), x["nats"], x["error"]) for name, x in r["rows"].items() if name.isdigit()]
        plt.errorbar(*zip(*points), marker="o", capsize=3, label=f"{r['noise']} {{{', '.join(map(str, r['trained']))}}}")
    plt.xscale("log", base=2)
    plt.xlabel("block size")
    plt.ylabel("NELBO, nats per token")
    plt.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.tight_layout()
    plt.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# Optimization


def make_optimizers(model, args):
    """AdamW; or Muon (arXiv 2502.16982) for the matrices between embedding and head, AdamW for the rest."""
    is_muon = lambda name, p: args.optimizer == "muon" and p.dim() == 2 and name.startswith("blocks")
    matrices = [p for name, p in model.named_parameters() if is_muon(name, p)]
    rest = [p for name, p in model.named_parameters() if not is_muon(name, p)]
    groups = [{"params": [p for p in rest if p.dim() == 2], "weight_decay": args.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, args.beta2), fused=True)]
    if matrices:  # match_rms_adamw: one learning rate suits both
        optimizers.append(torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=args.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(args, step):
    """Linear warm-up, then constant, or a cosine down to zero."""
    warm = min(1.0, (step + 1) / max(1, args.warmup_iters))
    if args.lr_decay == "constant":
        return args.learning_rate * warm
    done = max(0, step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@torch.no_grad()
def update_average(average, model, decay, step):
    """Exponential moving average of the weights; early on over a fifth of the steps so far, so that short runs profit."""
    decay = min(decay, 1 - 5 / (step + 6))
    for a, p in zip(average.parameters(), model.parameters()):
        a.lerp_(p, 1 - decay)


def accumulate_gradients(model, args, tokens, step, rank=0, world=1, device="cpu", autocast=contextlib.nullcontext()):
    """Gradients of the mean loss of this step's batch, over all parts and processes; returns the loss, nats per token."""
    total = torch.zeros((), device=device)
    parts = torch.arange(rank, args.batch_size, world).chunk(args.grad_accum)  # the rows of this process, in turn
    for i, rows in enumerate(parts):
        torch.manual_seed(hash((args.seed, step, rank, i)) % 2**63)  # for dropout
        x0, sizes, t, u = draw_batch(args, tokens, step, rows, device)
        with autocast:
            loss = token_losses(model, x0, sizes, t, u, args.loss, mixture(args)[2]).sum() / (args.batch_size * args.seq_len)
        loss.backward()
        total += loss.detach()
    if world > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([total.view(1), *(g.flatten() for g in grads)])
        dist.all_reduce(flat)
        total, *summed = flat.split([1, *(g.numel() for g in grads)])
        for g, s in zip(grads, summed):
            g.copy_(s.view_as(g))
    return total.item()


def anyone(flag, world, device):
    """Whether the flag is up on any process: all have to stop at the same step."""
    if world == 1:
        return flag
    total = torch.tensor(float(flag), device=device)
    dist.all_reduce(total)
    return total.item() > 0


def check_loss(loss, recent, norm, step, vocab_size):
    """Raise ValueError if loss or gradient is NaN, or the loss explodes: the last checkpoint was saved before that."""
    if not math.isfinite(loss + norm):
        why = f"the loss is {loss}, the norm of its gradient {norm}"
    elif recent > 5 * math.log(vocab_size) + 5:
        why = f"the loss has risen to {recent:.1f} nats"
    else:
        return
    raise ValueError(f"stopped at step {step}: {why}; the last good checkpoint is kept. Try a lower --learning_rate")


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def numbers(kind):
    """argparse type: a comma-separated list."""

    def parse(text):
        return [kind(x) for x in str(text).split(",")]

    parse.__name__ = "comma-separated list"
    return parse


def make_parser():
    parser = new_parser(__doc__)
    flag = parser.flag
    flag("preset", "auto", "sets the defaults of other flags; auto: gpu where there is one", choices=["auto", *PRESETS])
    flag("dataset", "pydocs", "a folder under data_dir made by prepare_data.py; pydocs and markov are made if missing")
    flag("data_dir", "data", "where the datasets are")
    flag("out_dir", "out", "where ckpt.pt and log.jsonl go")
    parser.add_argument("--init_from", metavar="CKPT",
                        help="start from these weights: a checkpoint of ours, a published folder, or hf:org/repo/subfolder")
    parser.add_argument("--resume", action="store_true", help="go on from OUT_DIR/ckpt.pt, with its flags where none are given")
    flag("seed", 0, "of everything random")
    # model
    flag("noise", "masked", "kind of noise", choices=["masked", "uniform"])
    flag("schedule", "linear", "of alpha(t)", choices=["linear", "cosine"])
    flag("token_causal", True, "clean tokens see clean tokens up to themselves; False: to the end of their block")
    flag("ar", "shift", "who predicts token i at block size 1: shift: clean token i - 1; paper: a noise token at i",
         choices=["shift", "paper"])
    flag("seq_len", 128, "context length L")
    flag("n_layer", 4, "layers")
    flag("n_head", 4, "attention heads")
    flag("n_embd", 128, "width")
    flag("dropout", 0.0, "dropout")
    flag("tied", True, "the head is the embedding")
    flag("noisy_gain", 0.1, "where the learned gain on noisy tokens' embeddings starts")
    # objective
    flag("block_sizes", "1,16", "block sizes S to mix, any from 1 to L", type=numbers(int))
    flag("block_weights", "0.5,0.5", "share of each in the loss", type=numbers(float))
    flag("loss", "nelbo", "nelbo: the likelihood bound; ce: unweighted, for masked noise", choices=["nelbo", "ce"])
    # optimization
    flag("max_iters", 1800, "steps")
    flag("batch_size", 8, "rows a step, over all processes and parts")
    flag("grad_accum", 1, "parts that the rows of a process are worked off in")
    flag("optimizer", "muon", "muon (for the matrices) or adamw", choices=["muon", "adamw"])
    flag("learning_rate", 6e-3, "peak learning rate")
    flag("lr_decay", "cosine", "after the warm-up", choices=["cosine", "constant"])
    flag("warmup_iters", 50, "steps of linear warm-up")
    flag("weight_decay", 0.01, "on matrices")
    flag("beta2", 0.99, "of AdamW")
    flag("grad_clip", 1.0, "largest norm of the gradient; 0: any")
    flag("ema", 0.99, "decay of the average of the weights that is evaluated and sampled; 0: none")
    # evaluation, machine
    flag("eval_interval", 300, "steps between evaluations, each with a sample and a checkpoint")
    flag("eval_seqs", 64, "validation sequences, always the same, with the same noise")
    parser.add_argument("--eval_only", action="store_true",
                        help="no training: the likelihood of OUT_DIR/ckpt.pt, as a table and as OUT_DIR/eval.json")
    parser.add_argument("--compare", nargs="+", metavar="CKPT", help="with --eval_only: of these checkpoints, side by side")
    parser.add_argument("--plot", metavar="PNG", help="with --eval_only: NELBO against block size (needs matplotlib)")
    flag("eval_block_sizes", "1,2,4,8,16,L", "with --eval_only: block sizes; L is the length",
         type=numbers(lambda s: 2**30 if s == "L" else int(s)))
    flag("eval_draws", 8, "with --eval_only: draws of the noise for each sequence")
    flag("device", "auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one")
    flag("dtype", "auto", "of the matrix products; auto: bfloat16 where it is faster",
         choices=["auto", "float32", "bfloat16"])
    flag("compile", False, "torch.compile the layers")
    return parser


def parse_args(argv=None):
    """Flags, checked. Explicit flags beat the checkpoint's (--resume), which beat the preset's, which beat the defaults."""
    parser = make_parser()
    first, _ = parser.parse_known_args(argv)
    preset = ("gpu" if torch.cuda.is_available() else "cpu") if first.preset == "auto" else first.preset
    parser.set_defaults(**PRESETS[preset])
    if first.resume:
        saved = read_checkpoint(os.path.join(first.out_dir, "ckpt.pt"))["args"]
        parser.set_defaults(**{k: v for k, v in saved.items() if k not in ("resume", "out_dir", "device")})
    args = parser.parse_args(argv)
    given = {a.split("=")[0].lstrip("-") for a in (argv if argv is not None else sys.argv[1:])}
    if "block_sizes" in given and "block_weights" not in given:
        args.block_weights = [1 / len(args.block_sizes)] * len(args.block_sizes)
    check_args(args)
    return args


def check_args(args):
    """Raises ValueError with a line for the user."""
    if (args.compare or args.plot) and not args.eval_only:
        raise ValueError("--compare and --plot go with --eval_only")
    if min(args.eval_block_sizes) < 1:
        raise ValueError("--eval_block_sizes must be at least 1")
    at_least = dict(max_iters=1, batch_size=1, grad_accum=1, eval_interval=1, eval_seqs=1, eval_draws=1, warmup_iters=0,
                    learning_rate=0, weight_decay=0, grad_clip=0)
    for name, least in at_least.items():
        if getattr(args, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if not 0 <= args.ema < 1 or not 0 <= args.beta2 < 1:
        raise ValueError("--ema and --beta2 must lie in [0, 1)")
    if len(args.block_sizes) != len(args.block_weights):
        raise ValueError(f"{len(args.block_sizes)} --block_sizes but {len(args.block_weights)} --block_weights")
    if min(args.block_weights) <= 0 or abs(sum(args.block_weights) - 1) > 1e-6:
        raise ValueError(f"--block_weights must be positive and sum to 1, not {sum(args.block_weights):g}")
    if min(args.block_sizes) < 1 or max(args.block_sizes) > args.seq_len:
        raise ValueError(f"--block_sizes must lie in 1 to seq_len ({args.seq_len}), not {args.block_sizes}")
    if args.loss == "ce" and args.noise == "uniform":
        raise ValueError("--loss=ce is for masked noise: use --loss=nelbo with --noise=uniform")
    if args.batch_size % (args.grad_accum * int(os.environ.get("WORLD_SIZE", 1))):
        raise ValueError(f"--batch_size ({args.batch_size}) must be a multiple of --grad_accum times processes")


# ---------------------------------------------------------------------------------------------------------------------
# The run


def set_up_device(args):
    """(device, autocast context): every line that depends on the machine."""
    local = os.environ.get("LOCAL_RANK")
    device = find_device(f"cuda:{local}" if local and args.device == "auto" and torch.cuda.is_available() else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        fast = torch.cuda.is_bf16_supported()
    else:  # a CPU's bfloat16 units pay from some width on
        fast = args.n_embd >= 256 and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    bf16 = args.dtype == "bfloat16" or (args.dtype == "auto" and fast)
    return device, torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def load_data(args, main):
    """The dataset of the flags, made first if it can be made without further ado."""
    folder = os.path.join(args.data_dir, args.dataset)
    if main and args.dataset in ("pydocs", "markov") and not os.path.exists(folder):
        print(f"preparing {folder} ...", flush=True)
        prepare(args.dataset, args.data_dir)
    if dist.is_initialized():
        dist.barrier()
    train, val, meta = open_data(folder)
    if min(len(train), len(val)) < args.seq_len:
        raise ValueError(f"{folder} is too small: {min(len(train), len(val))} tokens in a part, --seq_len={args.seq_len}")
    return train, val, meta


def open_log(path, step):
    """log.jsonl, cut back to what was written before the step."""
    kept = []
    if step and os.path.exists(path):
        with open(path) as file:
            kept = [line for line in file if json.loads(line)["step"] < step]
    log = open(path, "w")
    log.writelines(kept)
    return log


def restore(path, model, average, optimizers):
    """Load a checkpoint into the state of a run; returns the step to go on from."""
    content = read_checkpoint(path)
    if content["config"] != asdict(model.config):
        differs = [k for k, v in asdict(model.config).items() if content["config"].get(k) != v]
        raise ValueError(f"{path} is a model of another shape: {', '.join(differs)} differ")
    load_weights(model, content["model"], path)
    load_weights(average, content["ema"], path)
    for optimizer, state in zip(optimizers, content["optimizers"]):
        optimizer.load_state_dict(state)
    return content["step"]


def start(args):
    """Everything that a run consists of: model, average, optimizers, data, where it is; at step run.step."""
    run = SimpleNamespace(rank=int(os.environ.get("RANK", 0)), world=int(os.environ.get("WORLD_SIZE", 1)), stop=[])
    run.device, run.autocast = set_up_device(args)
    if run.world > 1:
        dist.init_process_group("nccl" if run.device.type == "cuda" else "gloo")
    run.main = run.rank == 0
    run.train, run.val, run.meta = load_data(args, run.main)
    torch.manual_seed(args.seed)
    shape = {f.name: getattr(args, f.name) for f in fields(Config) if f.name != "vocab_size"}
    run.model = BlockGen(Config(vocab_size=run.meta["vocab_size"], **shape)).to(run.device)
    if args.init_from:
        source = load_checkpoint(args.init_from, run.device, args.noise)[0]
        if source.config.ar != args.ar:
            raise ValueError(f"{args.init_from} is a model with --ar={source.config.ar}: say so")
        load_weights(run.model, source.state_dict(), args.init_from)
    run.average = copy.deepcopy(run.model).eval()
    run.optimizers = make_optimizers(run.model, args)
    run.path = os.path.join(args.out_dir, "ckpt.pt")
    os.makedirs(args.out_dir, exist_ok=True)
    run.step = restore(run.path, run.model, run.average, run.optimizers) if args.resume else 0
    run.log = open_log(os.path.join(args.out_dir, "log.jsonl"), run.step) if run.main else None
    if args.compile:
        run.model.trunk = torch.compile(run.model.trunk)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: run.stop.append(True))
    return run


def save(run, args):
    save_checkpoint(run.path, step=run.step, config=asdict(run.model.config), model=run.model.state_dict(),
                    ema=run.average.state_dict(), optimizers=[o.state_dict() for o in run.optimizers], meta=run.meta,
                    args=vars(args))


def report(run, args, bar):
    """Evaluate, log, show a sample; returns the figures for the progress bar."""
    n_seqs = min(args.eval_seqs, len(run.val) // args.seq_len)
    losses = {size: evaluate(run.average, run.val, size, n_seqs) for size in args.block_sizes}
    largest = max(args.block_sizes)
    tokens, _ = generate(run.average, 1, args.seq_len, block_size=largest, steps=largest, seed=args.seed)
    text = load_tokenizer(run.meta["tokenizer"])[1](tokens[0].tolist())
    bar.write(f"step {run.step}: {describe(losses, run.meta)}\n    {text[:400]!r}")
    run.log.write(json.dumps({"step": run.step, "val": {s: summary(x) for s, x in losses.items()}}) + "\n")
    run.log.flush()
    return {f"S{s}": f"{summary(x)[0]:.3f}" for s, x in losses.items()}


def train_step(run, args):
    """One step of all optimizers; returns the loss before it, nats per token."""
    for optimizer in run.optimizers:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, run.step)
    run.model.train()
    loss = accumulate_gradients(run.model, args, run.train, run.step, run.rank, run.world, run.device, run.autocast)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip or math.inf).item()
    recent = run.recent = loss if run.recent is None else 0.95 * run.recent + 0.05 * loss
    check_loss(loss, recent, norm, run.step, run.meta["vocab_size"])
    for optimizer in run.optimizers:
        optimizer.step()
    update_average(run.average, run.model, args.ema, run.step)
    return loss


def train(args):
    run = start(args)
    run.recent, shown, began, first = None, {}, time.time(), run.step
    if run.main:
        known = f", of the chain {run.meta['entropy_rate']:.3f}" if "entropy_rate" in run.meta else ""
        print(f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f}M parameters on {run.device}, "
              f"{len(run.train):,} training tokens; unigram entropy {run.meta['unigram_nats']:.3f} nats{known}")
    bar = tqdm(total=args.max_iters, initial=first, disable=not run.main, unit="step", dynamic_ncols=True, mininterval=0.5)
    while run.step < args.max_iters and not anyone(bool(run.stop), run.world, run.device):
        if run.main and run.step % args.eval_interval == 0 and run.step > 0:
            shown = report(run, args, bar)
            save(run, args)
        loss = train_step(run, args)
        run.step += 1
        bar.update()
        if run.main:
            speed = (run.step - first) * args.batch_size * args.seq_len / (time.time() - began)
            bar.set_postfix(loss=f"{run.recent:.3f}", **shown, tok_s=f"{speed:,.0f}", refresh=False)
            run.log.write(json.dumps({"step": run.step - 1, "loss": loss}) + "\n")
    if run.main:
        if run.step == args.max_iters:
            report(run, args, bar)
        save(run, args)
        bar.close()
        run.log.close()
        done = run.step == args.max_iters
        print(f"done; now: python sample.py --ckpt={run.path}" if done else f"stopped at step {run.step}: --resume goes on")
    if run.world > 1:
        dist.destroy_process_group()


def main():
    args = parse_args()
    eval_only(args) if args.eval_only else train(args)


if __name__ == "__main__":
    run_script(main)
