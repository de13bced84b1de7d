"""Text (or a Markov chain) -> data/NAME/{train.bin, val.bin, meta.json}, which train.py reads.

    python prepare_data.py                           # pydocs: the documentation inside your Python, no download
    python prepare_data.py markov                    # a chain whose entropy is known exactly
    python prepare_data.py shakespeare               # downloads 1.1 MB
    python prepare_data.py text --input=book.txt --tokenizer=bpe:1024|char|gpt2
    python prepare_data.py openwebtext               # needs the package datasets, much disk, and hours

The .bin files are bare uint16 or uint32 token ids (numpy.memmap opens them); meta.json says how to decode them, and
what a model has to beat: the unigram entropy, and for markov the entropy of the chain.
"""
import argparse
import ast
import hashlib
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import urllib.request
from collections import Counter

import numpy as np

END = "<|endoftext|>"  # stands behind every document
# GPT-2's way to cut text into words, which no token crosses, but digits stand alone
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def run_script(main):
    """Run a script's main(). What its user can mend is one line on stderr and exit status 2, not a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left
        os._exit(1)
    except (ValueError, OSError, ImportError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def boolean(text):
    """argparse type."""
    if str(text).lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return str(text).lower() in ("true", "1")


def new_parser(description):
    """An argparse parser that takes no abbreviations and whose errors are one line; parser.flag(name, default, help) adds a
    flag of the default's type, and tells the default."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(message):
        raise ValueError(f"{message} (--help lists the flags)")

    def flag(name, default, help, **more):
        more.setdefault("type", boolean if isinstance(default, bool) else type(default))
        parser.add_argument(f"--{name}", default=default, help=f"{help} (default: %(default)s)", **more)

    parser.error, parser.flag = error, flag
    return parser


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: a dict in meta.json describes each


def learn_bpe(text, vocab_size):
    """Byte-pair encoding (arXiv 1508.07909): the tokens, as bytes, in the order of their ids. The 256 bytes come first;
    then, over and over, the pair of neighbors that is most frequent inside words becomes a token."""
    import regex  # comes with tiktoken

    counts = Counter(regex.findall(WORDS, text))
    words = [word.encode() for word in counts]
    # all words in one array, a -1 behind each; weight: how often the word occurs
    ids = np.concatenate([np.frombuffer(word + b"\0", np.uint8) for word in words]).astype(np.int64)
    lengths = np.array([len(word) + 1 for word in words])
    ids[lengths.cumsum() - 1] = -1
    weight = np.repeat(np.fromiter(counts.values(), np.int64), lengths)
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        left, right = ids[:-1], ids[1:]
        inside = (left >= 0) & (right >= 0)
        pairs = np.bincount((left * vocab_size + right)[inside], weight[:-1][inside])
        if pairs.size == 0 or pairs.max() < 2:
            raise ValueError(f"the text is too small for {vocab_size} tokens: it yields {len(tokens)}; ask for fewer")
        a, b = divmod(int(pairs.argmax()), vocab_size)
        at = np.flatnonzero((left == a) & (right == b))
        if a == b:  # in a run such as aaa the first pair wins
            run = np.flatnonzero(np.diff(at, prepend=-2) != 1)
            at = at[(np.arange(len(at)) - np.repeat(run, np.diff(run, append=len(at)))) % 2 == 0]
        ids[at] = len(tokens)
        ids, weight = np.delete(ids, at + 1), np.delete(weight, at + 1)
        tokens.append(tokens[a] + tokens[b])
    return tokens


def make_tokenizer(kind, text):
    """The description of a tokenizer for the text: kind is bpe:SIZE, char or gpt2. Raises ValueError."""
    if kind == "char":
        return {"kind": "char", "chars": sorted(set(text)), "vocab_size": len(set(text)), "end": None}
    if kind == "gpt2":
        return {"kind": "gpt2", "vocab_size": 50257, "end": 50256}
    size = re.fullmatch(r"bpe:(\d+)", kind)
    if not size or not 257 <= int(size[1]) <= 65536:
        raise ValueError(f"tokenizer must be char, gpt2 or bpe:SIZE with SIZE from 257 to 65536, not {kind}")
    tokens = learn_bpe(text, int(size[1]) - 1)
    return {"kind": "bpe", "tokens": [t.hex() for t in tokens], "vocab_size": len(tokens) + 1, "end": len(tokens)}


def load_tokenizer(tokenizer):
    """(encode: str -> ids, decode: ids -> str) of a description. encode raises ValueError for what it cannot say."""
    import tiktoken

    kind = tokenizer["kind"]
    if kind == "letters":  # a Markov chain's states; decoding needs no more than a name for each
        names = [chr(ord("A") + i) if i < 26 else chr(ord("a") + i - 26) for i in range(52)]
        names += [f"<{i}>" for i in range(52, tokenizer["vocab_size"])]
        tokenizer, kind = {"chars": names[: tokenizer["vocab_size"]]}, "char"
    if kind == "char":
        ids = {c: i for i, c in enumerate(tokenizer["chars"])}

        def encode(text):
            unknown = sorted(set(text) - ids.keys())
            if unknown:
                raise ValueError(f"the vocabulary has no {', '.join(map(repr, unknown[:5]))}")
            return [ids[c] for c in text]

        return encode, lambda tokens: "".join(tokenizer["chars"][i] for i in tokens)
    if kind == "gpt2":
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:
            raise OSError(f"tiktoken could not load GPT-2's vocabulary ({type(error).__name__}): it needs the internet "
                          "once, or its two files in TIKTOKEN_CACHE_DIR") from None
    else:
        ranks = {bytes.fromhex(t): i for i, t in enumerate(tokenizer["tokens"])}
        special = {END: tokenizer["end"]}
        encoding = tiktoken.Encoding("blockgen", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)
    return encoding.encode_ordinary, lambda tokens: encoding.decode(tokens, errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def docstrings(source):
    """The docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                yield text


SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}


def pydocs():
    """Documents that every CPython carries: the help topics, then the docstrings of the standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    documents = [topics[name] for name in sorted(topics)]
    library = sysconfig.get_path("stdlib")
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(set(folders) - SKIPPED)
        for name in sorted(f for f in files if f.endswith(".py")):
            try:
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    documents += docstrings(file.read())
            except (SyntaxError, UnicodeDecodeError):
                pass  # a few files are meant to be broken
    return list(dict.fromkeys(documents))  # without repetitions


def shakespeare():
    try:
        data = urllib.request.urlopen(SHAKESPEARE, timeout=60).read()
    except OSError as error:
        raise OSError(f"cannot download {SHAKESPEARE} ({error}): get it another way, then `text --input=FILE`") from None
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError("the downloaded file is not the one expected (its SHA-256 differs): try again")
    return [data.decode()]


def read_text(path):
    if not path:
        raise ValueError("text needs --input=FILE")
    try:
        with open(path, encoding="utf-8") as file:
            return [file.read()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def openwebtext():
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("openwebtext needs the package datasets: pip install datasets") from None
    return (row["text"] for row in load_dataset("Skylion007/openwebtext", split="train", streaming=True))


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def entropy(counts):
    """Entropy in nats of the distribution that the counts (or probabilities) give."""
    p = np.asarray(counts, np.float64)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


def held_out(index):
    """Every tenth document, by a hash, so that neighbors in a folder fall on both sides."""
    return hashlib.sha256(str(index).encode()).digest()[0] < 26


def split_documents(documents):
    """(train, val) lists; a single document is cut at nine tenths."""
    if len(documents) == 1:
        cut = len(documents[0]) * 9 // 10
        return [documents[0][:cut]], [documents[0][cut:]]
    return [[d for i, d in enumerate(documents) if held_out(i) == side] for side in (False, True)]


def encode_documents(documents, tokenizer):
    """(ids in one array, an end token behind each document where the vocabulary has one; number of bytes of text)."""
    encode, _ = load_tokenizer(tokenizer)
    end = [] if tokenizer["end"] is None else [tokenizer["end"]]
    dtype = np.uint16 if tokenizer["vocab_size"] <= 65536 else np.uint32
    return np.concatenate([np.array(encode(d) + end, dtype) for d in documents]), sum(len(d.encode()) for d in documents)


def text_dataset(documents, kind):
    """{train, val} arrays and meta of a list of documents."""
    train, val = split_documents(documents)
    if not "".join(train).strip() or not "".join(val).strip():
        raise ValueError("the text is too short to hold out a tenth of it")
    tokenizer = make_tokenizer(kind, "".join(documents))
    (train, _), (val, val_bytes) = (encode_documents(part, tokenizer) for part in (train, val))
    meta = {"tokenizer": tokenizer, "bytes_per_token": val_bytes / len(val), "unigram_nats": entropy(np.bincount(val))}
    return {"train": train, "val": val}, meta


def markov_dataset(states, successors, n_tokens, seed):
    """A random chain in which each state has few successors. Its entropy, the least loss a model can reach, is exact:
    entropy_rate nats for every token but the first of a sequence, which costs first_nats."""
    if not 1 <= successors <= states or states < 2:
        raise ValueError(f"markov needs 2 states or more and 1 to that many successors, not {states} and {successors}")
    rng = np.random.default_rng(seed)
    transitions = np.zeros((states, states))
    for row in transitions:
        row[rng.choice(states, successors, replace=False)] = rng.dirichlet(np.ones(successors))
    stationary = np.ones(states) / states
    for _ in range(10_000):  # power iteration, damped so that a periodic chain converges too
        stationary = 0.5 * stationary + 0.5 * stationary @ transitions
    tokens, cdf, uniform = np.empty(n_tokens, np.uint16), transitions.cumsum(1), rng.random(n_tokens)
    state = rng.choice(states, p=stationary / stationary.sum())
    for i in range(n_tokens):
        tokens[i] = state
        state = min(int(np.searchsorted(cdf[state], uniform[i] * cdf[state, -1], side="right")), states - 1)
    val = n_tokens // 10
    meta = {"tokenizer": {"kind": "letters", "vocab_size": states, "end": None},
            "unigram_nats": entropy(np.bincount(tokens[:val])), "first_nats": entropy(stationary),
            "entropy_rate": float(stationary @ [entropy(row) for row in transitions]), "transitions": transitions.tolist()}
    return {"train": tokens[val:], "val": tokens[:val]}, meta


def stream_dataset(documents, folder):
    """Meta of more documents than fit in memory, in GPT-2's vocabulary; the .bin files are written as they come."""
    tokenizer, n_bytes, counts = make_tokenizer("gpt2", ""), 0, np.zeros(50257, np.int64)
    encode, _ = load_tokenizer(tokenizer)
    files = {part: open(os.path.join(folder, f"{part}.bin"), "wb") for part in ("train", "val")}
    for i, document in enumerate(documents):
        val = i % 2000 == 0
        ids = np.array(encode(document) + [tokenizer["end"]], np.uint16)
        files["val" if val else "train"].write(ids.tobytes())
        if val:
            n_bytes += len(document.encode())
            counts += np.bincount(ids, minlength=50257)
    for file in files.values():
        file.close()
    bytes_per_token = n_bytes / max(1, counts.sum())
    return {}, {"tokenizer": tokenizer, "bytes_per_token": bytes_per_token, "unigram_nats": entropy(counts)}


def write_dataset(folder, make):
    """make(temporary folder) -> (arrays, meta); the folder appears under its name only when it is complete."""
    temporary = f"{folder}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        arrays, meta = make(temporary)
        for part, tokens in arrays.items():
            tokens.tofile(os.path.join(temporary, f"{part}.bin"))
        width = 2 if meta["tokenizer"]["vocab_size"] <= 65536 else 4
        meta["vocab_size"], meta["dtype"] = meta["tokenizer"]["vocab_size"], f"uint{8 * width}"
        for part in ("train", "val"):  # train.py refuses a file of another length
            meta[f"{part}_tokens"] = os.path.getsize(os.path.join(temporary, f"{part}.bin")) // width
        with open(os.path.join(temporary, "meta.json"), "w") as file:
            json.dump(meta, file)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def prepare(name, data_dir="data", input=None, tokenizer="bpe:1024", states=64, successors=8, tokens=1_000_000, seed=0):
    """Make data_dir/name and return its meta. Raises ValueError, OSError or ImportError with a line for the user."""
    if name == "markov":
        make = lambda folder: markov_dataset(states, successors, tokens, seed)
    elif name == "openwebtext":
        make = lambda folder: stream_dataset(openwebtext(), folder)
    else:
        documents = {"pydocs": pydocs, "shakespeare": shakespeare, "text": lambda: read_text(input)}[name]()
        make = lambda folder: text_dataset(documents, tokenizer)
    return write_dataset(os.path.join(data_dir, name), make)


def main():
    parser = new_parser(__doc__)
    names = ["pydocs", "markov", "shakespeare", "text", "openwebtext"]
    parser.add_argument("name", nargs="?", default="pydocs", choices=names)
    parser.flag("data_dir", "data", "the dataset becomes a folder in here")
    parser.flag("input", None, "text: the UTF-8 file to read", type=str)
    parser.flag("tokenizer", "bpe:1024", "bpe:SIZE, learned from the text; char; gpt2")
    parser.flag("states", 64, "markov: number of states")
    parser.flag("successors", 8, "markov: successors of a state")
    parser.flag("tokens", 1_000_000, "markov: how many to draw")
    parser.flag("seed", 0, "markov: seed")
    args = parser.parse_args()
    used = {"text": ["input", "tokenizer"], "markov": ["states", "successors", "tokens", "seed"], "openwebtext": []}
    for name in ("input", "tokenizer", "states", "successors", "tokens", "seed"):
        if getattr(args, name) != parser.get_default(name) and name not in used.get(args.name, ["tokenizer"]):
            raise ValueError(f"--{name} does nothing for {args.name}")
    meta = prepare(**vars(args))
    nats = meta["unigram_nats"]
    more = f", {nats / math.log(2) / meta['bytes_per_token']:.3f} bits per byte" if "bytes_per_token" in meta else ""
    more += f"; entropy of the chain: {meta['entropy_rate']:.3f}" if "entropy_rate" in meta else ""
    print(f"{os.path.join(args.data_dir, args.name)}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} "
          f"validation tokens, vocabulary {meta['vocab_size']:,}\n"
          f"unigram entropy of the validation tokens: {nats:.3f} nats per token{more}")


if __name__ == "__main__":
    run_script(main)
