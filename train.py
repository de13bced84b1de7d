"""Train a block diffusion model on a mixture of block sizes.

    python train.py                                      # makes its data, too; fits the machine
    python train.py --dataset=math                       # likewise: problems with answers
    python train.py --dataset=shakespeare                # after python prepare_data.py shakespeare
    python train.py --block_sizes=1                      # an autoregressive model
    python train.py --block_sizes=1024                   # full-sequence diffusion: MDLM, or with
                                                         # --noise=uniform Duo
    python train.py --preset=night                       # 12 layers, 768 wide, L = 1024: one night
    python train.py --preset=paper                       # the same size for a million steps
    torchrun --nproc_per_node=4 train.py                 # four GPUs
    python train.py --resume                             # go on from out/ckpt.pt
    python train.py --eval_only                          # the likelihood of out/ckpt.pt

Writes OUT_DIR/ckpt.pt (atomically) and OUT_DIR/log.jsonl. All randomness is a function of (seed,
step, row): neither the number of parts of a batch or of processes (dropout aside) nor an
interruption changes what is computed (but for the order of sums, and so for rounding).

In this file: optimizers, flags, the training loop, random batches, evaluation. Read train() first.
"""
import copy
import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

from prepare_data import (  # first: it sets an option that torch reads when it is loaded
    check_tokenizer,
    from_values,
    is_answer,
    is_question,
    open_data,
    parse_flags,
    prepare,
    run_script,
)
from blockgen import (
    LOSSES,
    Batch,
    BlockGen,
    Config,
    UserError,
    check_choices,
    find_device,
    load_checkpoint,
    load_weights,
    random_numbers,
    read_checkpoint,
    save_checkpoint,
    trained_weights,
)
from kernels import use_triton

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # on Windows nobody notices two runs in one folder
    flock = None

# torchrun tells each of its processes who it is; one process alone has rank 0 of 1.
RANK = int(os.environ.get("RANK", 0))
N_PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


# ----------------------------------------------------------------------------------------------
# Optimizers: one for the weight matrices of the layers, AdamW for the rest


def has_bfloat16(device):
    """Is bfloat16 fast there? CPUs and older GPUs emulate it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def orthogonalize(x, steps=5):
    """Matrices x (n, a, b) with their singular values moved to about 1, by the
    Newton-Schulz iteration of Muon (kellerjordan.github.io/posts/muon)."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT, steps).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (n, a, a)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, scaled so that its steps are as large as AdamW's (arXiv
    2502.16982). It is torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but matrices of one
    shape go together, and in float32 where bfloat16 is slow."""

    def __init__(self, matrices, args):
        super().__init__(matrices, dict(lr=0.0, weight_decay=args.weight_decay))
        for p in matrices:
            self.state[p]["average"] = torch.zeros_like(p)  # of the gradients

    @torch.no_grad()
    def step(self, momentum=0.95):
        [group] = self.param_groups
        lr, params = group["lr"], group["params"]
        for shape in {p.shape for p in params}:
            matrices = [p for p in params if p.shape == shape]
            gradients = [p.grad for p in matrices]
            averages = [self.state[p]["average"] for p in matrices]
            torch._foreach_lerp_(averages, gradients, 1 - momentum)
            ahead = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov
            x = torch.stack(ahead)  # (n, a, b)
            dtype = torch.bfloat16 if has_bfloat16(x.device) else torch.float32
            directions = orthogonalize(x.to(dtype)).float()
            scale = 0.2 * math.sqrt(max(shape))
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, directions.unbind(), alpha=-lr * scale)


def adamw(params, args):
    betas = 0.9, args.beta2
    decay = args.weight_decay
    return torch.optim.AdamW(params, betas=betas, weight_decay=decay, fused=True)


OPTIMIZERS = {"muon": Muon, "adamw": adamw}  # of the matrices; to add one, name it here


def make_optimizers(model, args):
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p not in {*matrices}]
    without_decay = replace(args, weight_decay=0.0)
    return [OPTIMIZERS[args.optimizer](matrices, args), adamw(rest, without_decay)]


DECAYS = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,  # done: share of the steps
    "constant": lambda done: 1.0,
}


def learning_rate(args, step):
    """Linear warm-up, times the decay."""
    warmup = min(1, (step + 1) / args.warmup_iters)
    return args.learning_rate * warmup * DECAYS[args.lr_decay](step / args.max_iters)


@torch.no_grad()
def update_average(average, model, decay, step):
    """Exponential moving average of the weights; early on over a fifth of the steps so far, so that
    short runs profit."""
    decay = min(decay, 1 - 5 / (step + 6))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# ----------------------------------------------------------------------------------------------
# The flags

GPT2_SMALL = dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024)
PRESETS = {  # defaults of other flags
    "cpu": {},
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
    "night": dict(  # 1.3 billion tokens; by estimate 15 GB, and 10 hours on an RTX 4090
        **GPT2_SMALL,
        compile=True,
        dataset="fineweb",
        batch_size=256,
        grad_accum=16,
        max_iters=5000,
        learning_rate=1e-3,
        warmup_iters=250,
        weight_decay=0.1,
        beta2=0.95,
        ema=0.999,
        eval_interval=500,
        eval_seqs=256,
    ),
    "paper": dict(  # the authors' recipe for masked noise; by estimate 14 GB of GPU memory
        **GPT2_SMALL,
        compile=True,
        dataset="openwebtext",
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


@dataclass
class Settings:
    """The flags, beside those of blockgen.Config. The defaults take five minutes on two cores."""

    preset: Literal[("auto", *PRESETS)] = "auto"  # defaults of other flags; auto: by the machine
    dataset: str = "pydocs"  # a folder in data_dir, made by prepare_data.py
    data_dir: str = "data"  # where the datasets are
    out_dir: str = "out"  # where ckpt.pt and log.jsonl go
    init_from: str = ""  # checkpoint, or folder of published weights, to start (or evaluate) from
    resume: bool = False  # go on from OUT_DIR/ckpt.pt, with its flags where none are given
    seed: int = 0  # seed of everything random
    # the objective
    block_sizes: tuple = (1, 16)  # block sizes S to mix; above seq_len: seq_len
    block_weights: tuple = ()  # how much each block size counts; by default all alike
    loss: Literal[tuple(LOSSES)] = "nelbo"  # bound on the likelihood, or flat cross-entropy
    t_min: float = 0.3  # least noise level in training; the paper has 0.001
    # optimization
    max_iters: int = 1800  # number of training steps
    batch_size: int = 8  # rows per step
    grad_accum: int = 1  # compute a batch in so many parts, to save memory
    optimizer: Literal[tuple(OPTIMIZERS)] = "muon"  # optimizer of the layers' weight matrices
    learning_rate: float = 6e-3  # peak learning rate
    lr_decay: Literal[tuple(DECAYS)] = "cosine"  # learning rate after the warm-up
    warmup_iters: int = 50  # steps of linear warm-up of the learning rate
    weight_decay: float = 0.01  # decoupled weight decay of the layers' weight matrices
    beta2: float = 0.99  # decay of AdamW's average of squared gradients
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    ema: float = 0.95  # decay of the average of the weights, which is evaluated and sampled from
    # evaluation
    eval_interval: int = 300  # steps from one evaluation and checkpoint to the next
    eval_seqs: int = 64  # number of validation sequences, with always the same noise
    eval_only: bool = False  # do not train, but print the likelihood of OUT_DIR/ckpt.pt as a table
    eval_block_sizes: tuple = (1, 2, 4, 8, 16, 10**9)  # more block sizes for --eval_only
    eval_draws: int = 8  # draws of the noise for a sequence with --eval_only
    # the machine
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where it is fast
    compile: bool = False  # torch.compile, on a GPU with Triton or on a CPU

    def __post_init__(self):
        check_choices(self)
        check_bounds(self)


RANGES = {  # of settings that would spoil a run without a word
    "max_iters batch_size grad_accum warmup_iters eval_interval eval_seqs eval_draws": (1, 2**63),
    "seed learning_rate weight_decay grad_clip": (0, 2**63),
    "t_min beta2 ema": (0, 1),
}


def check_bounds(args):
    """Raise UserError for what is out of range. NaN always is."""
    for names, (least, limit) in RANGES.items():
        for name in names.split():
            if not least <= getattr(args, name) < limit:
                raise UserError(f"--{name} must be at least {least} and below {limit}")
    sizes, weights = args.block_sizes, args.block_weights
    if min(sizes, default=0) < 1 or len(set(sizes)) < len(sizes):
        raise UserError("--block_sizes must be at least 1 each, and all different")
    if len(weights) not in (0, len(sizes)) or not all(0 < w < math.inf for w in weights):
        raise UserError("--block_weights must be positive, one for each of --block_sizes")
    if not args.out_dir:
        raise UserError("--out_dir must name a folder")


def read_flags(argv=None):
    """(Settings, Config). Flags beat what find_defaults says, and that beats the fields' defaults.
    Raises UserError."""
    parse = partial(parse_flags, __doc__, Settings, Config, argv=argv, skip=["vocab_size"])
    defaults = find_defaults(parse())  # some flags decide on defaults of others
    values = parse(defaults=defaults)
    if not math.isfinite(values["noisy_gain"]):
        raise UserError("--noisy_gain must be finite")
    return from_values(Settings, values), from_values(Config, values)


def find_defaults(flags):
    """Defaults of flags: those of a preset; of the model in a checkpoint that is started from; or
    all flags of a checkpoint that is resumed or evaluated."""
    preset = flags["preset"]
    if preset == "auto":
        preset = "gpu" if device_of_process(flags["device"]).type == "cuda" else "cpu"
    defaults = dict(PRESETS[preset])
    if preset == "paper" and flags["noise"] != "masked":
        # With uniform noise the authors train on OpenWebText and TinyGSM with the bound, at block
        # size 1 with cross-entropy as always (on LM1B: cross-entropy of the changed tokens alone).
        defaults["loss"] = "nelbo"
    path = source_of(flags)
    if path:
        content = read_checkpoint(path)
        defaults |= asdict(content["config"])
        if flags["resume"] or flags["eval_only"]:
            here = {name: flags[name] for name in ("out_dir", "device", "init_from", "resume")}
            defaults |= content["args"] | here
    return defaults


def source_of(flags):
    """The checkpoint that a run begins with, or that is evaluated; "" if there is none."""
    if flags["resume"] or flags["eval_only"] and not flags["init_from"]:
        return f"{flags['out_dir']}/ckpt.pt"
    return flags["init_from"]


def device_of_process(name):
    """find_device, where each process of torchrun has a GPU of its own."""
    if N_PROCESSES > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    return find_device(name)


# ----------------------------------------------------------------------------------------------
# The training loop


@dataclass
class Run:
    """How far a run has come: with the flags, all that a checkpoint holds."""

    model: BlockGen
    average: BlockGen  # its weights are an average of the model's
    optimizers: list
    measured: list  # what best_loss was measured on
    step: int = 0
    best: dict | None = None  # weights of the average that did best in validation
    best_loss: float = math.inf


def train(args, config):
    """Train as the flags say, until max_iters or a signal. Raises UserError."""
    path = f"{args.out_dir}/ckpt.pt"
    if os.path.exists(path) and not args.resume:
        raise UserError(f"{path} is of another run: --resume goes on, or choose another --out_dir")
    device = device_of_process(args.device)
    if N_PROCESSES > 1:
        dist.init_process_group({"cuda": "nccl", "cpu": "gloo"}[device.type])
    data, val, meta = load_data(args, config.seq_len)
    mixture = make_mixture(args, config.ar)
    run = start(args, config, val, meta, device)
    compile_layers(run.model, args)
    autocast = find_autocast(args, device)
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    print(f"{millions:.2f}M parameters on {device}; {len(data):,} rows")
    if "unigram_nats" in meta:
        print(f"unigram entropy {meta['unigram_nats']:.3f} nats")

    # each process computes some parts of every batch, and a process alone all of them
    parts = torch.arange(args.batch_size).chunk(max(args.grad_accum, N_PROCESSES))
    my_parts = list(enumerate(parts))[RANK::N_PROCESSES]
    signals = listen()
    stop = saved = False
    with open_log(args, run.step) as log, progress_bar(args, run.step) as bar:
        while run.step < args.max_iters and not stop:
            # the gradient of this step's batch
            sums = torch.zeros(2, device=device)  # the loss, and who is to stop: all must agree
            for part, rows in my_parts:
                seed_dropout((args.seed, run.step), part)
                batch = draw_batch(data, meta, mixture, args, run.step, rows).to(device)
                with autocast:
                    losses = run.model(batch, args.loss, mixture.ar_weight)  # (R, L)
                row_means = losses.sum(1) / (~batch.given).sum(1)  # (R,)
                loss = row_means.sum() / args.batch_size
                loss.backward()
                sums[0] += loss.detach()
            sums[1] = len(signals)
            if N_PROCESSES > 1:
                add_up(run.model, sums)
            norm = clip_grad_norm_(run.model.parameters(), args.grad_clip or math.inf)

            # a step of the optimizers, and of the average
            lr = learning_rate(args, run.step)
            for optimizer in run.optimizers:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            update_average(run.average, run.model, args.ema, run.step)

            # the log: only here do we wait for a GPU
            loss, stop, norm = torch.stack([*sums, norm]).tolist()
            if not math.isfinite(loss + norm):  # what is saved is older
                figures = f"loss {loss:.1f}, norm of its gradient {norm:.1f}"
                raise UserError(f"stopped at step {run.step}: {figures}; lower --learning_rate?")
            write(log, step=run.step, loss=loss)
            run.step += 1
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

            # now and then save, then evaluate: if that fails, no step is lost
            ends = run.step == args.max_iters
            due = ends or run.step % args.eval_interval == 0
            if RANK == 0 and (due or stop):
                saved = save(run, args, meta, must=ends or stop)
                if due and validate(run, val, meta, args, log):
                    saved = save(run, args, meta, must=ends or stop)
    if saved:
        print(f"saved step {run.step}: python sample.py --ckpt={path} takes samples,")
        print(f"python train.py --resume --out_dir={args.out_dir} --max_iters=N goes on")
    if N_PROCESSES > 1:
        dist.destroy_process_group()


def start(args, config, val, meta, device):
    """The run at its beginning, or where its checkpoint says. Raises UserError."""
    path = source_of(vars(args))
    vocab_size = meta["vocab_size"]
    if path:
        content = read_checkpoint(path)
        check_tokenizer(content["meta"], meta)
        vocab_size = content["config"].vocab_size
    torch.manual_seed(args.seed)
    model = BlockGen(replace(config, vocab_size=vocab_size)).to(device)
    if path and not args.resume:
        load_weights(model, trained_weights(content), path)
    average = copy.deepcopy(model).eval()
    run = Run(model, average, make_optimizers(model, args), measured_on(args, val))
    if args.resume:
        restore(run, args, content, path)
    return run


def restore(run, args, content, path):
    """Go on from a checkpoint. Raises UserError if it is not of this run."""
    ours = run.model.config, args.optimizer
    if ours != (content["config"], content["args"]["optimizer"]):
        problem = f"{path} has another model or optimizer, which no flag changes"
        raise UserError(f"{problem}: --init_from starts anew from its weights")
    load_weights(run.model, content["model"], path)
    load_weights(run.average, content["average"], path)
    for optimizer, saved in zip(run.optimizers, content["optimizers"]):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
    run.step = content["step"]
    if run.measured == content["measured"]:  # else the best are not comparable
        run.best, run.best_loss = content["best"], content["best_loss"]


def measured_on(args, val):
    """What the loss in validation depends on, beside the weights."""
    sizes = zip(args.block_sizes, shares(args))
    return [args.dataset, len(val), args.eval_seqs, *sizes]


def save(run, args, meta, must):
    """Write the checkpoint; was it possible? If not, the run goes on, for the next time may work;
    but if this one must, the OSError is raised."""
    content = vars(run) | dict(
        config=asdict(run.model.config),
        args=asdict(args),
        meta=meta,
        model=run.model.state_dict(),
        average=run.average.state_dict(),
        optimizers=[optimizer.state_dict() for optimizer in run.optimizers],
    )
    try:
        save_checkpoint(f"{args.out_dir}/ckpt.pt", **content)
        return True
    except OSError as error:
        if must:
            raise
        tqdm.write(f"step {run.step} is not saved, the run goes on: {error}", file=sys.stderr)
        return False


def validate(run, val, meta, args, log):
    """Evaluate at each block size, and print it. If the weights are the best so far, keep them, and
    return True."""
    mean = 0.0
    for S, share in zip(args.block_sizes, shares(args)):
        losses, _ = evaluate(run.average, val, meta, S, args.eval_seqs)
        tqdm.write(f"step {run.step}, S={S}: {describe(losses, meta)}")
        nats = losses.mean().item()
        write(log, step=run.step, block_size=S, val=nats)
        mean += share * nats
    if mean >= run.best_loss:
        return False
    run.best_loss, run.best = mean, copy.deepcopy(run.average.state_dict())
    return True


def add_up(model, sums):
    """Sum the gradients, and sums (2,), over all processes, in place."""
    for p in model.parameters():
        if p.grad is None:  # a process without a part of the batch
            p.grad = torch.zeros_like(p)
    tensors = [*(p.grad for p in model.parameters()), sums]
    vector = parameters_to_vector(tensors)
    dist.all_reduce(vector)
    vector_to_parameters(vector, tensors)


def open_log(args, step):
    """log.jsonl, with the lines of the first steps: what a crash has left behind them goes. Raises
    UserError if another run writes it."""
    if RANK > 0:
        return open(os.devnull, "w")
    os.makedirs(args.out_dir, exist_ok=True)
    log = open(f"{args.out_dir}/log.jsonl", "a+", buffering=1)
    try:
        if flock:
            flock(log, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run writes to {args.out_dir}: choose another --out_dir") from None
    log.seek(0)
    kept = [line for line in log if is_before(line, step)]
    log.truncate(0)
    log.writelines(kept)
    return log


def is_before(line, step):
    """Does this line of log.jsonl belong to the first steps? Training logs the step that it is in,
    validation the number of steps that are done. A crash may have cut off the last line."""
    if not line.endswith("\n"):
        return False
    logged = json.loads(line)
    return logged["step"] + ("loss" in logged) <= step


def write(log, **line):
    log.write(json.dumps(line) + "\n")


def progress_bar(args, step):
    """Ten times a second on a terminal; once a minute where it goes to a file."""
    pace = 0.1 if sys.stderr.isatty() else 60  # seconds
    progress = dict(total=args.max_iters, initial=step, smoothing=0)
    return tqdm(**progress, disable=RANK > 0, mininterval=pace, maxinterval=100 * pace)


def listen():
    """A list that gets longer at the first Ctrl-C or SIGTERM. The second ends the process."""
    heard = []

    def hear(number, frame):
        heard.append(number)
        react(signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")

    def react(how):
        signal.signal(signal.SIGINT, how)
        signal.signal(signal.SIGTERM, how)

    react(hear)
    return heard


def compile_layers(model, args):
    """Compile the two parts of each layer, before and after attention, which has kernels of its
    own."""
    device = model.device
    if args.compile and (device.type == "cpu" or use_triton(device)):
        print("compiling at the first step (if that fails: --compile=false)")
        for block in model.blocks:
            block.before = torch.compile(block.before)
            block.after = torch.compile(block.after)


def find_autocast(args, device):
    """The precision of the training pass, by default bfloat16 where it is fast."""
    bfloat16 = args.dtype == "bfloat16" or args.dtype == "auto" and has_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def load_data(args, length):
    """(rows for training, for validation, meta). Rows (n, L) are views: of a text there is one at
    every position. A dataset that needs no help is made first. Raises UserError."""
    folder = f"{args.data_dir}/{args.dataset}"
    can_be_made = args.dataset in ("pydocs", "alldocs", "math")
    if RANK == 0 and can_be_made and not os.path.exists(folder):
        print(f"preparing {folder} ...")
        prepare(args.dataset, args.data_dir, seq_len=length)
    if dist.is_initialized():
        dist.barrier()  # the others wait for it
    train, val, meta = open_data(folder)
    stride = meta.get("row_length", 1)
    if stride not in (1, length):
        raise UserError(f"the problems of {folder} need --seq_len={stride}")
    if min(len(train), len(val)) < length:
        raise UserError(f"{folder} is too small for --seq_len={length}")
    windows = np.lib.stride_tricks.sliding_window_view
    return windows(train, length)[::stride], windows(val, length)[::stride], meta


# ----------------------------------------------------------------------------------------------
# A random batch

# What a random number is for, the last part of its key
OFFSET, SHIFT, INTERVAL, NOISE, ROWS, DROPOUT = range(6)


class Mixture(NamedTuple):
    """The block sizes that rows of a batch may have, and how often; and the share of block size 1
    in the loss of every row."""

    sizes: torch.Tensor  # (B,)
    weights: torch.Tensor  # (B,), which sum to 1
    ar_weight: float


def shares(args):
    """The weights of the block sizes, in the loss and in the mixture that mixture_bounds takes
    the model for; they sum to 1."""
    weights = args.block_weights or [1.0] * len(args.block_sizes)
    return [weight / sum(weights) for weight in weights]


def make_mixture(args, ar):
    """In the paper block size 1 takes rows of its own. Under ar="shift" every row has it beside
    another block size: of block sizes 1 and 16 alike, all rows have 16, and ar_weight is 1/2."""
    sizes = torch.tensor(args.block_sizes)
    weights = torch.tensor(shares(args), dtype=torch.float64)
    if ar == "paper" or sizes.max() == 1:
        return Mixture(sizes, weights, 0.0)
    others = sizes > 1
    ar_weight = weights[~others].sum().item()
    return Mixture(sizes[others], weights[others] / (1 - ar_weight), ar_weight)


def draw_batch(data, meta, mixture, args, step, rows):
    """Some rows (R,) of a step's batch, a Batch: the same whichever rows are asked for together."""
    key = args.seed, step

    # which rows of the data (n, L)
    chosen = random_numbers((*key, ROWS), rows, 1)[:, 0] * len(data)
    x0, given = read_rows(data, chosen.long(), meta)

    # Block sizes, stratified: they share out [0, 1) by their weights, and row i of the batch takes
    # what stands at (i + offset) / batch_size.
    offset = random_numbers((*key, OFFSET), [0], 1)[0]
    quantile = (rows + offset) / args.batch_size
    begin = mixture.weights.cumsum(0) - mixture.weights
    which = torch.searchsorted(begin, quantile, right=True) - 1
    block_size = mixture.sizes[which]

    # Noise levels, stratified over the rows of one size: where is the row in the share of its size?
    stratum = (quantile - begin[which]) / mixture.weights[which]  # [0, 1)
    t, u = draw_noise(key, rows, stratum, block_size, x0.shape[1], args.t_min)
    return Batch(x0, block_size, t.float(), u, given)


def draw_noise(key, rows, stratum, block_size, length, t_min):
    """The noise of some rows (N,) of a batch, a function of the key: noise levels t (N, L) in
    [t_min, 1], constant in a block of block_size (N,), and uniform numbers u (N, L) that corrupt.

    Each block has a level of its own (in the paper a sequence has one for all its blocks). The
    levels are stratified over all blocks of a batch. A row with B blocks has one in each of B
    equal intervals of [0, 1), all at the same fraction of their interval, which is the row's
    stratum (N,): two rows of two blocks with 0 and 1/2 have 0, 1/2 and 1/4, 3/4. Each row begins
    with a random interval, and one shift is added for the whole batch, modulo 1. So every level by
    itself is uniform."""
    block_size, stratum = block_size[:, None], stratum[:, None]
    n_blocks = (length + block_size - 1) // block_size  # (N, 1)
    first = random_numbers((*key, INTERVAL), rows, 1) * n_blocks
    interval = torch.arange(length) // block_size + first.long()  # (N, L)
    level = (interval + stratum.double()) / n_blocks
    level = (level + random_numbers((*key, SHIFT), [0], 1)) % 1
    u = random_numbers((*key, NOISE), rows, length)
    return t_min + (1 - t_min) * level, u


def seed_dropout(key, part):
    """Dropout draws from torch's own generator: a function of the key and the part of the batch."""
    u = random_numbers((*key, DROPOUT), [part], 1)
    torch.manual_seed(int(2**53 * u))


def read_rows(data, chosen, meta):
    """The chosen rows, (N, L) int64, and which of their tokens are given: a problem's question."""
    x0 = torch.from_numpy(data[chosen.numpy()].astype(np.int64))
    if "row_length" in meta:
        return x0, is_question(x0, meta["tokenizer"]["end"])
    return x0, torch.zeros_like(x0, dtype=torch.bool)


# ----------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, data, meta, block_size, n_seqs, draws=1, batch_size=16, seed=0):
    """NELBO of n_seqs rows, spread evenly over the data (n, L), as the mean of some draws of the
    noise. Returns nats per token that counts, and how many those are, both float64 (n_seqs,). Of a
    text all tokens count; of a problem the answer and one end token, but not the padding.

    The noise is a function of (seed, draw, sequence), so neither batch size nor machine moves the
    figures. t starts at 1e-6: what lies below adds less than is printed."""
    n_seqs = min(n_seqs, len(data))
    chosen = torch.arange(n_seqs) * (len(data) - 1) // max(1, n_seqs - 1)  # integers are exact
    nats, lengths = torch.zeros(2, n_seqs, dtype=torch.float64)
    for rows in torch.arange(n_seqs).split(batch_size):
        x0, given = read_rows(data, chosen[rows], meta)
        counts = is_answer(x0, meta["tokenizer"]["end"]) if "row_length" in meta else ~given
        lengths[rows] = counts.sum(1).double()
        sizes = torch.full((len(rows),), block_size)
        for draw in range(draws):
            noise = draw_noise((seed, draw), rows, rows / n_seqs, sizes, x0.shape[1], t_min=1e-6)
            batch = Batch(x0, sizes, *noise, given).to(model.device)
            losses = model(batch).cpu() * counts
            nats[rows] += losses.sum(1) / lengths[rows] / draws
    return nats, lengths


def describe(nats, meta):
    """The mean over sequences (n_seqs,), with its standard error, and in bits per byte of text."""
    line = f"{nats.mean():.4f}"
    if len(nats) > 1:
        line += f" ± {nats.std() / len(nats) ** 0.5:.4f}"
    line += " nats"
    if "bytes_per_token" in meta:
        line += f", {nats.mean() / math.log(2) / meta['bytes_per_token']:.3f} bits/byte"
    return line


def mixture_bounds(total, weights):
    """Two upper bounds on -log p(x), nats (n_seqs,), of a model that first draws a block size S
    with probabilities w. total (sizes, n_seqs): unbiased estimates of NELBO_S(x).

    -log p(x) = -log sum_S w_S p_S(x) <= sum_S r_S (NELBO_S(x) + log(r_S / w_S)) for any r. With
    r = w it is Jensen's bound, the first. The best r, w_S exp(-NELBO_S(x)) over its sum, gives
    -log sum_S w_S exp(-NELBO_S(x)). But the noise of an estimate would choose an r in its own
    favor, and the figure sink below the truth: so the second takes r from the mean NELBO_S of the
    other sequences.

    Both are of each sequence. (The authors take the log-sum-exp of totals of a whole batch, so that
    their figure depends on its size.)"""
    w, n = torch.tensor(weights, dtype=torch.float64)[:, None], total.shape[1]
    others = (total.sum(1, keepdim=True) - total) / max(1, n - 1)
    r = torch.softmax(w.log() - others, 0)
    jensen = (w * total).sum(0)
    return jensen, (r * total + torch.special.xlogy(r, r / w)).sum(0)


@torch.no_grad()
def eval_only(args):
    """Print the likelihood of a checkpoint on validation data, by block size and under the mixture.
    Raises UserError."""
    model, content = load_checkpoint(source_of(vars(args)), find_device(args.device))
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


def main():
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    args, config = read_flags()
    if args.eval_only:
        eval_only(args)
    else:
        train(args, config)


if __name__ == "__main__":
    run_script(main)
