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
    check_tokenizer, from_values, is_answer, is_question, open_data, parse_flags, prepare,
    run_script,
)
from blockgen import (
    LOSSES, Batch, BlockGen, Config, UserError, check_at_least, check_choices, find_device,
    load_weights, random_numbers, read_checkpoint, save_checkpoint, trained_weights,
)
from kernels import use_triton

import torch
import torch.distributed as dist
from numpy.lib.stride_tricks import sliding_window_view
from torch.nn.utils import clip_grad_norm_
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


def orthogonalize(x):
    """Matrices x (n, a, b) with their singular values moved to about 1, by the Newton-Schulz
    iteration of Muon (kellerjordan.github.io/posts/muon)."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = x.to(torch.bfloat16 if has_bfloat16(x.device) else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
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
            ahead = []
            for p in matrices:
                average = self.state[p]["average"]
                average.lerp_(p.grad, 1 - momentum)
                ahead.append(p.grad.lerp(average, momentum))  # Nesterov
            directions = orthogonalize(torch.stack(ahead))  # (n, a, b)
            scale = 0.2 * math.sqrt(max(shape))
            for p, direction in zip(matrices, directions):
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(direction, alpha=-lr * scale)


def adamw(params, args):
    options = dict(betas=(0.9, args.beta2), weight_decay=args.weight_decay)
    return torch.optim.AdamW(params, fused=True, **options)


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

GPU = dict(compile=True, eval_seqs=256)
GPT2_SMALL = dict(n_layer=12, n_head=12, n_embd=768, seq_len=1024, **GPU)
PRESETS = {  # defaults of other flags
    "cpu": {},
    "gpu": dict(  # by estimate 5 GB of GPU memory
        **GPU,
        dataset="alldocs",
        n_layer=6, n_head=6, n_embd=384, seq_len=256,
        dropout=0.1, ema=0.999,
        batch_size=64, max_iters=5000,
        learning_rate=2e-3, warmup_iters=100,
    ),
    "night": dict(  # 1.3 billion tokens; by estimate 15 GB, and 10 hours on an RTX 4090
        **GPT2_SMALL,
        dataset="fineweb",
        batch_size=256, grad_accum=16, max_iters=5000,
        learning_rate=1e-3, warmup_iters=250,
        weight_decay=0.1, beta2=0.95, ema=0.999,
        eval_interval=500,
    ),
    "paper": dict(  # the authors' recipe for masked noise; by estimate 14 GB of GPU memory
        **GPT2_SMALL,
        dataset="openwebtext",
        dropout=0.1, tied=False, noisy_gain=1.0, ar="paper",
        block_weights=(0.05, 0.95), loss="ce", t_min=1e-3,
        batch_size=512, grad_accum=64, max_iters=1_000_000,
        optimizer="adamw", weight_decay=0.0, beta2=0.999,
        learning_rate=3e-4, warmup_iters=2500, lr_decay="constant",
        ema=0.9999, eval_interval=5000,
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
        """Raise UserError for what would spoil a run without a word."""
        check_choices(self)
        positive = "max_iters batch_size grad_accum warmup_iters eval_interval eval_seqs eval_draws"
        check_at_least(self, 1, *positive.split())
        check_at_least(self, 0, *"seed learning_rate weight_decay grad_clip".split())
        check_at_least(self, 0, "t_min", "beta2", "ema")
        if max(self.t_min, self.beta2, self.ema) >= 1:
            raise UserError("t_min, beta2 and ema must be below 1")
        sizes, weights = self.block_sizes, self.block_weights
        if min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise UserError("block_sizes must be at least 1 each, and all different")
        if len(weights) not in (0, len(sizes)) or not all(0 < w < math.inf for w in weights):
            raise UserError("block_weights must be positive, one for each of block_sizes")
        if not self.out_dir:
            raise UserError("out_dir must name a folder")


def read_flags(argv=None):
    """(Settings, Config, content of the checkpoint to begin with or {}). A flag that is given beats
    the checkpoint's, that the preset's, and that the field's default. Raises UserError."""
    parse = partial(parse_flags, __doc__, Settings, Config, argv=argv, skip=["vocab_size"])
    flags = parse()  # some decide on defaults of others
    defaults, content = find_preset(flags), {}
    goes_on = flags["resume"] or flags["eval_only"]
    own = f"{flags['out_dir']}/ckpt.pt"
    if os.path.exists(own) and not goes_on:
        raise UserError(f"{own} is of another run: --resume goes on, or choose another --out_dir")
    path = flags["init_from"]
    if flags["resume"] or goes_on and not path:
        path = own
    if path:
        content = read_checkpoint(path)
        defaults |= asdict(content["config"])
    if goes_on:
        here = {name: flags[name] for name in ("out_dir", "device", "resume")}
        defaults |= content["args"] | here
    values = defaults | parse(defaults=defaults)  # the vocab_size is no flag
    values["init_from"] = path
    if not math.isfinite(values["noisy_gain"]):
        raise UserError("noisy_gain must be finite")
    return from_values(Settings, values), from_values(Config, values), content


def find_preset(flags):
    """The defaults that --preset stands for."""
    preset = flags["preset"]
    if preset == "auto":
        preset = "gpu" if device_of_process(flags["device"]).type == "cuda" else "cpu"
    if preset == "paper" and flags["noise"] != "masked":
        # With uniform noise the authors train on OpenWebText and TinyGSM with the bound, at block
        # size 1 with cross-entropy as always (on LM1B: cross-entropy of the changed tokens alone).
        return PRESETS[preset] | {"loss": "nelbo"}
    return dict(PRESETS[preset])


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


def train(run, data, val, meta, args):
    """Go on with a run until max_iters or a signal. Raises UserError."""
    compile_layers(run.model, args)
    device = run.model.device
    autocast = find_autocast(args, device)
    mixture, ar_weight = make_mixture(args, run.model.config.ar)
    # each process computes some parts of every batch, and a process alone all of them
    parts = torch.arange(args.batch_size).chunk(max(args.grad_accum, N_PROCESSES))
    my_parts = list(enumerate(parts))[RANK::N_PROCESSES]
    signals = listen()
    stop = False
    with open_log(args, run.step) as log, progress_bar(args, run.step) as bar:
        while run.step < args.max_iters and not stop:
            # the gradient of this step's batch
            sums = torch.zeros(2, device=device)  # the loss, and who is to stop: all must agree
            for part, rows in my_parts:
                seed_dropout(args.seed, run.step, part)
                batch = draw_batch(data, meta, mixture, args, run.step, rows).to(device)
                with autocast:
                    losses = run.model(batch, args.loss, ar_weight)  # (R, L)
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
                figures = f"step {run.step}: loss {loss}, norm of its gradient {norm}"
                raise UserError(f"stopped at {figures}; lower --learning_rate?")
            write(log, step=run.step, loss=loss)
            run.step += 1
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()

            # now and then save, then evaluate: if that fails, no step is lost
            ends = run.step == args.max_iters
            due = ends or run.step % args.eval_interval == 0
            if RANK == 0 and (due or stop):
                save(run, args, meta, must=ends or stop)
                if due and validate(run, val, meta, args, log):
                    save(run, args, meta, must=ends or stop)
    path = f"{args.out_dir}/ckpt.pt"
    print(f"{path} is at step {run.step}: python sample.py --ckpt={path} takes samples,")
    print(f"python train.py --resume --out_dir={args.out_dir} --max_iters=N goes on")


def start(args, config, content, val, meta, device):
    """The run at its beginning, with trained weights if there are; or where its checkpoint says.
    Raises UserError."""
    if content:
        check_tokenizer(content["meta"], meta)
    else:
        config.vocab_size = meta["vocab_size"]
    torch.manual_seed(args.seed)
    model = BlockGen(config).to(device)
    if content and not args.resume:
        load_weights(model, trained_weights(content), args.init_from)
    average = copy.deepcopy(model).eval()
    run = Run(model, average, make_optimizers(model, args), measured_on(args, val))
    if args.resume:
        restore(run, args, content)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters on {device}")
    if "unigram_nats" in meta:
        print(f"unigram entropy {meta['unigram_nats']:.3f} nats")
    return run


def restore(run, args, content):
    """Go on where a checkpoint is. Raises UserError if it is not of this run."""
    path = args.init_from
    ours = run.model.config, args.optimizer
    if ours != (content["config"], content["args"]["optimizer"]):
        problem = "has another model or optimizer, which no flag changes"
        raise UserError(f"{path} {problem}: --init_from starts anew from its weights")
    load_weights(run.model, content["model"], path)
    load_weights(run.average, content["average"], path)
    for optimizer, saved in zip(run.optimizers, content["optimizers"]):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})
    run.step = content["step"]
    if run.measured == content["measured"]:  # else the best are not comparable
        run.best, run.best_loss = content["best"], content["best_loss"]


def measured_on(args, val):
    """What the loss in validation depends on, beside the weights: the data by the sum of ids."""
    return [int(val.x0.sum()), *shares(args).items()]


def save(run, args, meta, must):
    """Write the checkpoint. If it cannot be written, the run goes on, for the next time may work;
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
    except OSError as error:
        if must:
            raise
        tqdm.write(f"step {run.step} is not saved, the run goes on: {error}", file=sys.stderr)


def validate(run, val, meta, args, log):
    """Evaluate at each block size, and print it. If the weights are the best so far, keep them, and
    return True."""
    mean = 0.0
    for S, share in shares(args).items():
        losses = evaluate(run.average, val, S)
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
        dist.all_reduce(p.grad)
    dist.all_reduce(sums)


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
    options = dict(mininterval=pace, maxinterval=60, smoothing=0, disable=RANK > 0)
    return tqdm(total=args.max_iters, initial=step, **options)


STOPS = signal.SIGINT, signal.SIGTERM


def listen():
    """A list that gets longer at the first of these signals. The second ends the process."""
    heard = []

    def hear(number, frame):
        heard.append(number)
        for known in STOPS:
            signal.signal(known, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step; a second signal stops at once\n")

    for known in STOPS:
        signal.signal(known, hear)
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
    """(rows to train on, Rows for validation, meta). The former (n, L) are a view: of a text there
    is one at every position; the latter are eval_seqs of those, spread evenly. A dataset that needs
    no help is made first. Raises UserError."""
    folder = f"{args.data_dir}/{args.dataset}"
    can_be_made = args.dataset in ("pydocs", "alldocs", "math")
    if RANK == 0 and can_be_made and not os.path.exists(folder):
        print(f"preparing {folder} ...")
        prepare(args.dataset, args.data_dir, seq_len=length)
    if N_PROCESSES > 1:
        dist.barrier()  # the others wait for it
    train, val, meta = open_data(folder)
    stride = meta.get("row_length", 1)
    if stride not in (1, length):
        raise UserError(f"the problems of {folder} need --seq_len={stride}")
    if min(len(train), len(val)) < length:
        raise UserError(f"{folder} is too small for --seq_len={length}")
    train, val = (sliding_window_view(part, length)[::stride] for part in (train, val))
    n = min(args.eval_seqs, len(val))
    chosen = torch.arange(n) * (len(val) - 1) // max(1, n - 1)  # integers are exact
    return train, read_rows(val, chosen, meta), meta


# ----------------------------------------------------------------------------------------------
# A random batch

# What a random number is for, the last part of its key
OFFSET, SHIFT, INTERVAL, NOISE, ROWS, DROPOUT = range(6)


def shares(args):
    """{block size: its weight}, in the loss and in the mixture that mixture_bounds takes the model
    for; they sum to 1."""
    weights = args.block_weights or [1.0] * len(args.block_sizes)
    return {S: weight / sum(weights) for S, weight in zip(args.block_sizes, weights)}


def make_mixture(args, ar):
    """({block size: share of the rows that have it}, share of block size 1 in every row's loss). In
    the paper block size 1 takes rows of its own. Under ar="shift" every row has it beside another
    block size: of block sizes 1 and 16 alike, all rows have 16, and the second share is 1/2."""
    mixture = shares(args)
    if ar == "paper" or max(mixture) == 1:
        return mixture, 0.0
    ar_weight = mixture.pop(1, 0.0)
    return {S: weight / (1 - ar_weight) for S, weight in mixture.items()}, ar_weight


def draw_batch(data, meta, mixture, args, step, rows):
    """Some rows (R,) of a step's batch, a Batch: the same whichever rows are asked for together."""
    key = args.seed, step

    # which rows of the data (n, L)
    chosen = random_numbers((*key, ROWS), rows, 1)[:, 0] * len(data)
    x0, given, _ = read_rows(data, chosen.long(), meta)

    # Block sizes, stratified: they share out [0, 1) by their weights, and row i of the batch takes
    # what stands at (i + offset) / batch_size.
    sizes, weights = torch.tensor([*mixture.items()], dtype=torch.float64).T
    offset = random_numbers((*key, OFFSET), [0], 1)[0]
    quantile = (rows + offset) / args.batch_size
    begin = weights.cumsum(0) - weights
    which = torch.searchsorted(begin, quantile, right=True) - 1
    block_size = sizes[which].long()

    # Noise levels, stratified over the rows of one size: where is the row in the share of its size?
    stratum = (quantile - begin[which]) / weights[which]  # [0, 1)
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


def seed_dropout(seed, step, part):
    """Dropout draws from torch's own generator: let it depend on the step and the part of the
    batch."""
    u = random_numbers((seed, step, DROPOUT), [part], 1)
    torch.manual_seed(int(2**53 * u))


class Rows(NamedTuple):
    x0: torch.Tensor  # (N, L) tokens, int64
    given: torch.Tensor  # (N, L) those that are not to be predicted: a problem's question
    counts: torch.Tensor  # (N, L) those that count in figures: its answer and one end, or all


def read_rows(data, chosen, meta):
    x0 = torch.from_numpy(data[chosen.numpy()].astype("int64"))
    if "row_length" in meta:
        end = meta["tokenizer"]["end"]
        return Rows(x0, is_question(x0, end), is_answer(x0, end))
    given = torch.zeros_like(x0, dtype=torch.bool)
    return Rows(x0, given, ~given)


# ----------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(model, val, block_size, draws=1):
    """NELBO of some Rows, the mean of so many draws of the noise: nats per token that counts,
    float64 (N,).

    The noise is a function of the draw and the row, so that no machine moves the figures. t starts
    at 1e-6: what lies below adds less than is printed."""
    N, L = val.x0.shape
    nats = torch.zeros(N, dtype=torch.float64)
    for rows in torch.arange(N).split(16):
        x0, given, counts = (part[rows] for part in val)
        sizes = torch.full_like(rows, block_size)
        for draw in range(draws):
            t, u = draw_noise((0, draw), rows, rows / N, sizes, L, t_min=1e-6)
            batch = Batch(x0, sizes, t, u, given).to(model.device)
            losses = model(batch).cpu() * counts
            nats[rows] += losses.sum(1) / counts.sum(1) / draws
    return nats


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
    other sequences. (The authors take the log-sum-exp of totals of a whole batch, so that their
    figure depends on its size.)"""
    w, n = torch.tensor(weights, dtype=torch.float64)[:, None], total.shape[1]
    others = (total.sum(1, keepdim=True) - total) / max(1, n - 1)
    r = torch.softmax(w.log() - others, 0)
    jensen = (w * total).sum(0)
    return jensen, (r * total + torch.special.xlogy(r, r / w)).sum(0)


def print_likelihood(model, val, meta, args):
    """By block size, and under the mixture."""
    L = model.config.seq_len
    losses = {}
    for S in sorted({min(L, S) for S in (*args.block_sizes, *args.eval_block_sizes)}):
        losses[S] = evaluate(model, val, S, args.eval_draws)
    lengths = val.counts.sum(1)
    total = torch.stack([losses[min(L, S)] for S in args.block_sizes]) * lengths
    jensen, log_sum_exp = mixture_bounds(total, [*shares(args).values()])
    losses["mixture: Jensen"] = jensen / lengths
    losses["mixture: log-sum-exp"] = log_sum_exp / lengths
    for S, nats in losses.items():
        print(f"{S:>20}: {describe(nats, meta)}, perplexity {nats.mean().exp():.2f}")


def main():
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process speaks for all
    args, config, content = read_flags()
    device = device_of_process(args.device)
    if N_PROCESSES > 1:
        dist.init_process_group({"cuda": "nccl", "cpu": "gloo"}[device.type])
    data, val, meta = load_data(args, config.seq_len)
    run = start(args, config, content, val, meta, device)
    del content  # or it would fill memory
    if args.eval_only:
        print_likelihood(run.average, val, meta, args)
    else:
        train(run, data, val, meta, args)
    if N_PROCESSES > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
