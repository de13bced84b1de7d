"""Text, problems or a Markov chain -> data/NAME/{train.bin, val.bin, meta.json}, for train.py.

    python prepare_data.py                  # pydocs: the documentation inside your Python
    python prepare_data.py alldocs          # eight times that: the packages that torch brings too
    python prepare_data.py markov           # a chain whose entropy is known exactly
    python prepare_data.py math             # word problems; --difficulty=2, 3 or 4 operations
    python prepare_data.py shakespeare      # downloads 1.1 MB
    python prepare_data.py text --input=book.txt --tokenizer=bpe:1024|char|gpt2|tokenizer.json
    python prepare_data.py problems --input=train.jsonl --test=test.jsonl   # GSM8K's form, or yours
    python prepare_data.py tinygsm          # needs the package datasets, disk and hours
    python prepare_data.py openwebtext      # so does this

The first four need no network. The .bin files are bare uint16 or uint32 token ids (numpy.memmap
opens them). meta.json says how to decode them and what a model has to beat: the unigram entropy,
and for markov the entropy of the chain. Problems are rows of --seq_len tokens: the question, an
end token, the answer, an end token, and more end tokens.
"""
import argparse
import ast
import contextlib
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import string
import sys
import sysconfig
import urllib.request
from collections import Counter
from dataclasses import dataclass, fields

import numpy as np

END = "<|endoftext|>"  # stands behind every document
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

# ---------------------------------------------------------------------------------------------
# Sources. A text source yields documents; split or cut says which are for validation


def docstrings(source):
    """The docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                yield text


SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}


def documentation(library):
    """The docstrings of every Python file below a folder."""
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(set(folders) - SKIPPED)
        for name in sorted(f for f in files if f.endswith(".py")):
            try:
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    yield from docstrings(file.read())
            except (SyntaxError, UnicodeDecodeError):
                pass  # a few files are meant to be broken


PACKAGES = ["torch", "sympy", "networkx", "numpy", "mpmath", "jinja2", "fsspec"]


def pydocs(packages=()):
    """What every CPython carries: the help topics, then the docstrings of the standard library;
    then those of the packages, where they are installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    documents = [topics[name] for name in sorted(topics)]
    documents += documentation(sysconfig.get_path("stdlib"))
    for spec in map(importlib.util.find_spec, packages):
        documents += documentation(spec.submodule_search_locations[0]) if spec else []
    return dict.fromkeys(documents)  # without repetitions


def shakespeare():
    try:
        data = urllib.request.urlopen(SHAKESPEARE, timeout=60).read()
    except OSError as error:
        advice = "get it another way, then `text --input=FILE`"
        raise OSError(f"cannot download {SHAKESPEARE} ({error}): {advice}") from None
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError("the download is not the file expected (SHA-256 differs): try again")
    return data.decode()


def read_text(path):
    if not path:
        raise ValueError("needs --input=FILE, and for problems --test=FILE too")
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None


def stream(name):
    """The rows, as dicts, of a dataset on the Hugging Face hub while they are downloaded."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"{name} needs the package datasets: pip install datasets") from None
    return load_dataset(name, split="train", streaming=True)


def held_out(index):
    """Whether a document is for validation: one in ten is, by a hash, so that neighbors in a
    folder fall on both sides."""
    return hashlib.sha256(str(index).encode()).digest()[0] < 26


def split(documents):
    for i, document in enumerate(documents):
        yield "val" if held_out(i) else "train", document


def cut(text):
    """A single document: its last tenth is for validation."""
    end = len(text) * 9 // 10
    return [("train", text[:end]), ("val", text[end:])]


# ---------------------------------------------------------------------------------------------
# Problems: (question, answer) pairs. The answer is a Python function, or ends in "#### 18".


def read_problems(part, path):
    """The problems of a file with a JSON object a line: "question", and "answer" or "code"."""
    for number, line in enumerate(read_text(path).strip().split("\n"), 1):
        try:
            row = json.loads(line)
            answer = row["answer"] if "answer" in row else row["code"]
            yield part, (str(row["question"]), str(answer))
        except (ValueError, TypeError, KeyError):
            need = 'a JSON object with "question" and "answer" (or "code")'
            raise ValueError(f"{path}, line {number} must be {need}") from None


# Sentences, and the lines of the program that they become. X and Y were mentioned before, Z is
# new; m is a large number, n a smaller one, k one digit.
STARTS = """\
{X} has {m} {things} and {Y} has {n}. | {X} = {m}; {Y} = {n}
{X} owns {n} {things}. {Y} owns {m}. | {X} = {n}; {Y} = {m}
There are {m} {things} in {X}'s bag and {n} in {Y}'s bag. | {X} = {m}; {Y} = {n}
{X} and {Y} collect {things}. {X} has {n} and {Y} has {m}. | {X} = {n}; {Y} = {m}""".splitlines()
STEPS = """\
{X} finds {n} more. | {X} = {X} + {n}
{X} gets {n} as a gift. | {X} = {X} + {n}
Then {X} buys {n}. | {X} = {X} + {n}
{X} loses {n}. | {X} = {X} - {n}
{X} gives away {n}. | {X} = {X} - {n}
Then {n} of {X}'s are stolen. | {X} = {X} - {n}
Soon {X} has {k} times as many. | {X} = {X} * {k}
{X} doubles that. | {X} = {X} * 2
{X} keeps only half. | {X} = {X} / 2
{Z} has {n} more than {X}. | {Z} = {X} + {n}
{Z} has {n} fewer than {X}. | {Z} = {X} - {n}
{Z} has {k} times as many as {X}. | {Z} = {X} * {k}
{Z} has as many as {X} and {Y} together. | {Z} = {X} + {Y}""".splitlines()
DISTRACTIONS = """\
{X} is {n} years old.
{Y} has {k} brothers.
{Y} has {n} pets.""".splitlines()
QUESTIONS = """\
How many {things} does {X} have now? | result = {X}
How many {things} are {X}'s in the end? | result = {X}
How many {things} do {X} and {Y} have together? | result = {X} + {Y}
What is the sum of {X}'s and {Y}'s {things}? | result = {X} + {Y}
How many more {things} does {X} have than {Y}? | result = {X} - {Y}
How many {things} does {X} need to catch up with {Y}? | result = {Y} - {X}
{X} puts all {things} into {k} equal boxes. How many are in a box? | result = {X} / {k}
{X} sells all {things} for {k} dollars each. How many dollars? | result = {X} * {k}""".splitlines()
NAMES = "Ann Ben Eva Ida Kim Leo Mia Sam Tom Zoe".split()
THINGS = "apples, books, cards, coins, eggs, nuts, pens, shells, liters of milk".split(", ")


def draw_wording(rng, operations):
    """The templates of a random problem."""
    question = rng.choice(QUESTIONS)
    no_operation = question.endswith("= {X}")
    steps = rng.choices(STEPS, k=operations - 1 + no_operation)
    if operations > 2:
        steps.insert(1, rng.choice(DISTRACTIONS))
    return [rng.choice(STARTS), *steps, question]


def fill_in(wording, rng, largest):
    """With random names, things and numbers: the question, the lines of its program."""
    names, people = rng.sample(NAMES, len(NAMES)), 2
    things, sentences, lines = rng.choice(THINGS), [], []
    for template in wording:
        x, y = rng.sample(names[:people], 2)
        m, n, k = rng.randrange(20, largest), rng.randrange(2, 20), rng.randrange(2, 10)
        filled = template.format(X=x, Y=y, Z=names[people], things=things, m=m, n=n, k=k)
        sentence, _, code = filled.partition(" | ")
        sentences.append(sentence)
        lines += code.lower().split("; ") if code else []
        people += "{Z}" in template
    return " ".join(sentences), lines


def only_counts(lines):
    """Whether every quantity is a positive whole number after every line."""
    program = Program()
    for line in lines:
        program.read(ast.parse(line).body)
        if not all(x > 0 and x == int(x) for x in program.variables.values()):
            return False
    return True


def math_problems(operations, count, seed):
    """Word problems in TinyGSM's form, one for validation for every twenty for training.

    No sequence of sentences and no first two numbers of a validation problem are in training."""
    rng = random.Random(seed)
    parts = ["train"] * count + ["val"] * (count // 20)
    while parts:
        wording, for_validation = draw_wording(rng, operations), parts[-1] == "val"
        if held_out(wording) != for_validation:
            continue
        question, lines = fill_in(wording, rng, largest=100 if operations == 2 else 1000)
        numbers = re.findall(r"\d+", question)[:2]
        if held_out(numbers) == for_validation and only_counts(lines):
            lines = ["def simple_math_problem():", *lines, "return result"]
            yield parts.pop(), (question, "\n    ".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------
# Answers. Their programs are not to be trusted, and none is executed: Program reads one and knows
# nothing but arithmetic. It has no attributes, strings, imports, or loops without end to abuse.

MOST_STEPS, LARGEST, LONGEST = 5_000, 1e30, 2_000  # numbers read; a number; characters
OPERATORS = dict(
    pair.split(":")
    for pair in "Add:add Sub:sub Mult:mul Div:truediv FloorDiv:floordiv Mod:mod Pow:pow "
    "USub:neg Not:not_ Lt:lt LtE:le Gt:gt GtE:ge Eq:eq NotEq:ne".split()
)  # name in ast: name in operator
FUNCTIONS = {f.__name__: f for f in (abs, min, max, sum, int, float, len)}
FUNCTIONS.update({f"math.{f.__name__}": f for f in (math.ceil, math.floor, math.sqrt)})
FUNCTIONS["range"] = lambda *bounds: list(range(*bounds)[:MOST_STEPS])
# of an int, Python would compute 10**-digits
FUNCTIONS["round"] = lambda x, digits=None: round(float(x), digits)


class Returned(Exception):
    """A program has come to a return; the argument is its value."""


class Program:
    """The state of a program: variables, which are small numbers and lists of small numbers."""

    def __init__(self):
        self.variables, self.steps = {}, 0

    def read(self, node):
        """Obey a statement or a list of them, or return what an expression stands for.

        Raises Returned, or some other Exception for whatever is not on this list."""
        match node:
            case [*statements]:
                for statement in statements:
                    self.read(statement)
            case ast.FunctionDef("simple_math_problem", ast.arguments([], []), body):
                self.read(body)
            case ast.Import([ast.alias("math", None)]) | ast.Expr(ast.Constant(str())):
                pass
            case ast.Assign([ast.Name(name)], expression):
                self.variables[name] = self.value(expression)
            case ast.AugAssign(target, op, expression):
                self.read(ast.Assign([target], ast.BinOp(target, op, expression)))
            case ast.For(ast.Name(name), items, body, []):
                for item in self.value(items):
                    self.variables[name] = item
                    self.read(body)
            case ast.If(test, yes, no) | ast.IfExp(test, yes, no):
                return self.read(yes if self.value(test) else no)
            case ast.Return(expression):
                raise Returned(self.value(expression))
            case ast.Constant(number):
                return number
            case ast.Name(name):
                return self.variables[name]
            case ast.List(items):
                return [self.value(item) for item in items]
            case ast.BinOp(left, op, right) | ast.Compare(left, [op], [right]):
                return self.operate(op, left, right)
            case ast.UnaryOp(op, operand):
                return self.operate(op, operand)
            case ast.BoolOp(op, terms):
                combine = all if isinstance(op, ast.And) else any
                return combine(map(self.value, terms))
            case ast.Call(function, arguments, []):
                return FUNCTIONS[ast.unparse(function)](*map(self.value, arguments))
            case _:
                raise ValueError(f"programs have no {node}")

    def value(self, expression):
        """What an expression stands for, if that is small, and if this has not gone on for long."""
        result = self.read(expression)
        numbers = result if isinstance(result, list) else [result]
        self.steps += 1 + len(numbers)
        if self.steps > MOST_STEPS or not all(abs(x) <= LARGEST for x in numbers):
            raise ValueError("too many steps, or too large a number")
        return result

    def operate(self, op, *expressions):
        """Arithmetic or a comparison, of numbers only."""
        numbers = [self.value(x) for x in expressions]
        if list in map(type, numbers) or isinstance(op, ast.Pow) and abs(numbers[1]) > 100:
            raise ValueError("a list, or too large an exponent")
        return getattr(operator, OPERATORS[type(op).__name__])(*numbers)


def solve(text):
    """The value of an answer, a float; None if it has none.

    An answer is a number behind "####", as in GSM8K, or a program, see Program. Whatever a text
    says, reading it takes milliseconds and touches nothing."""
    number = re.search(r"####\s*\$?(-?\d[\d,]{0,30}(\.\d+)?)", text)
    if number:
        return float(number[1].replace(",", ""))
    try:
        Program().read(ast.parse(text if len(text) <= LONGEST else "").body)
    except Returned as returned:
        [value] = returned.args
        return float(value) if type(value) in (int, float) else None
    except Exception:  # wrong syntax, unknown, too deep, too large: no answer
        pass


def is_right(text, reference):
    """Whether an answer has the value of the reference."""
    value, truth = solve(text), solve(reference)
    return None not in (value, truth) and math.isclose(value, truth, rel_tol=1e-6, abs_tol=1e-6)


def is_question(rows, end):
    """Where rows (N, L) of tokens, torch or numpy, hold the question, its end token included."""
    ends = rows == end
    count = ends.cumsum(1)
    return (count == 0) | (count == 1) & ends


# ---------------------------------------------------------------------------------------------
# Tokenizers: a dict in meta.json describes each

# GPT-2's way to cut text into words, which no token crosses, but digits stand alone
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def without_overlaps(found):
    """Of rising places where a pair begins, those that no earlier pair reaches into."""
    kept = [-2]
    for i in found.tolist():
        if i > kept[-1] + 1:
            kept.append(i)
    return np.array(kept[1:])


def learn_bpe(text, vocab_size):
    """Byte-pair encoding (arXiv 1508.07909): the tokens, as bytes, in the order of their ids.

    The 256 bytes come first; then, over and over, the pair of neighbors that is most frequent
    inside words becomes a token. Raises ValueError for a text without enough pairs."""
    import regex  # comes with tiktoken

    counts = Counter(regex.findall(WORDS, text))
    # all different words in one array, a -1 behind each; weight: how often the word occurs
    words = [word.encode() for word in counts]
    ids = np.array([i for word in words for i in (*word, -1)])
    weight = np.repeat(list(counts.values()), [len(word) + 1 for word in words])
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        left, right = ids[:-1], ids[1:]
        inside = (left >= 0) & (right >= 0)
        pairs = (left * len(tokens) + right)[inside]
        frequency = np.bincount(pairs, weight[:-1][inside], minlength=1)
        if frequency.max() < 2:
            problem = f"the text is too small for {vocab_size} tokens"
            raise ValueError(f"{problem}: it yields {len(tokens)}; ask for fewer")
        a, b = divmod(int(frequency.argmax()), len(tokens))
        found = np.flatnonzero((left == a) & (right == b))
        if a == b:  # in a run such as aaa the first pair wins
            found = without_overlaps(found)
        ids[found] = len(tokens)
        ids, weight = np.delete(ids, found + 1), np.delete(weight, found + 1)
        tokens.append(tokens[a] + tokens[b])
    return tokens


def make_tokenizer(kind, text):
    """The description of a tokenizer. kind: bpe:SIZE or char, learned from the text; gpt2; or the
    path of a tokenizer.json. Raises ValueError, OSError or ImportError."""
    if kind == "gpt2":
        return {"kind": "gpt2", "vocab_size": 50257, "end": 50256}
    if kind.endswith(".json"):
        text = read_text(kind)
        tokenizer = load_json(text)
        size, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(END)
        return {"kind": "json", "json": text, "vocab_size": size, "end": end}
    if kind == "char":
        chars = sorted(set(text))
        return {"kind": "char", "chars": chars, "vocab_size": len(chars), "end": None}
    size = re.fullmatch(r"bpe:(\d+)", kind)
    if not size or not 257 <= int(size[1]) <= 65536:
        kinds = "char, gpt2, a tokenizer.json or bpe:SIZE with SIZE from 257 to 65536"
        raise ValueError(f"tokenizer must be {kinds}, not {kind}")
    tokens = [token.hex() for token in learn_bpe(text, int(size[1]) - 1)]
    return {"kind": "bpe", "tokens": tokens, "vocab_size": len(tokens) + 1, "end": len(tokens)}


def load_json(text):
    """The tokenizer in the text of a tokenizer.json."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ImportError("a tokenizer.json needs the package tokenizers: pip install it") from None
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the package has no class of its own
        raise ValueError(f"this is no tokenizer.json: {error}") from None
    tokenizer.encode_special_tokens = True  # no text can spell the end token
    return tokenizer


def read_tokenizer(path, vocab_size):
    """The description of the tokenizer of published weights: the tokenizer.json at the path; if
    there is none, GPT-2's, and texts start with its end token as they did in training."""
    if os.path.exists(path):
        return {**make_tokenizer(path, ""), "vocab_size": vocab_size}
    if vocab_size not in (50257, 50258):  # 50258 has a [PAD]
        raise ValueError(f"{path} is missing, and {vocab_size} tokens are not GPT-2's")
    return {"kind": "gpt2", "vocab_size": vocab_size, "end": 50256, "start": 50256}


def char_tokenizer(chars):
    ids = {c: i for i, c in enumerate(chars)}

    def encode(text):
        unknown = sorted(set(text) - ids.keys())
        if unknown:
            raise ValueError(f"the vocabulary has no {', '.join(map(repr, unknown[:5]))}")
        return [ids[c] for c in text]

    return encode, lambda tokens: "".join(chars[i] for i in tokens if i < len(chars))


def load_tokenizer(description):
    """(encode: str -> ids, decode: ids -> str). encode raises ValueError for what it cannot say;
    decode drops ids that are not in the vocabulary, such as a mask."""
    import tiktoken

    if description["kind"] == "char":
        return char_tokenizer(description["chars"])
    if description["kind"] == "json":
        tokenizer = load_json(description["json"])
        encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        return encode, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False)
    if description["kind"] == "gpt2":
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except Exception as error:
            need = "it needs the internet once, or its two files in TIKTOKEN_CACHE_DIR"
            name = type(error).__name__
            raise OSError(f"tiktoken could not load GPT-2's vocabulary ({name}): {need}") from None
    else:
        ranks = {bytes.fromhex(token): i for i, token in enumerate(description["tokens"])}
        special = {END: description["end"]}
        encoding = tiktoken.Encoding(
            "blockgen", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special
        )

    def decode(tokens):
        known = [i for i in tokens if i < encoding.n_vocab]
        return encoding.decode(known, errors="replace")

    return encoding.encode_ordinary, decode


# ---------------------------------------------------------------------------------------------
# Writing. A piece is (part, tokens to write, those of them that are scored, their text)


def entropy(counts):
    """Entropy in nats of the distribution that the counts (or probabilities) give."""
    p = np.asarray(counts, np.float64)
    p = p[p > 0] / p.sum()
    return float(-(p * np.log(p)).sum())


def encode_documents(documents, meta):
    """The pieces of texts: their tokens, an end token behind each if the vocabulary has one.

    Problems become rows of meta["row_length"] tokens: question, end, answer, end, and more ends.
    So the first end token is the end of the question. Longer rows are dropped and counted."""
    encode, _ = load_tokenizer(meta["tokenizer"])
    end = [] if meta["tokenizer"]["end"] is None else [meta["tokenizer"]["end"]]
    for part, document in documents:
        if isinstance(document, str):
            tokens = encode(document) + end
            yield part, tokens, tokens, document
            continue
        question, answer = document
        scored = encode(answer) + end
        row = encode(question) + end + scored
        if len(row) <= meta["row_length"]:
            yield part, row + end * (meta["row_length"] - len(row)), scored, answer
        else:
            meta["dropped"] += 1


def markov_chain(states, successors, n_tokens, seed):
    """A random chain in which each state has few successors: (tokens, meta).

    Its entropy, the least loss a model can reach, is exact: entropy_rate nats for every token but
    the first of a sequence, which costs first_nats."""
    rng = np.random.default_rng(seed)
    transitions = np.zeros((states, states))
    for row in transitions:
        row[rng.choice(states, successors, replace=False)] = rng.dirichlet(np.ones(successors))
    stationary = np.ones(states) / states
    for _ in range(10_000):  # power iteration, damped so that a periodic chain converges too
        stationary = 0.5 * stationary + 0.5 * stationary @ transitions
    tokens, uniform = np.empty(n_tokens, np.int64), rng.random(n_tokens)
    cumulative = transitions.cumsum(1)
    state = rng.choice(states, p=stationary / stationary.sum())
    for i in range(n_tokens):
        tokens[i] = state
        u = uniform[i] * cumulative[state, -1]
        state = min(int(np.searchsorted(cumulative[state], u, side="right")), states - 1)
    letters = string.ascii_uppercase + string.ascii_lowercase
    names = [*letters[:states], *(f"<{i}>" for i in range(52, states))]
    rates = [entropy(row) for row in transitions]
    return tokens, {
        "tokenizer": {"kind": "char", "chars": names, "vocab_size": states, "end": None},
        "first_nats": entropy(stationary),
        "entropy_rate": float(stationary @ rates),
        "transitions": transitions.tolist(),
    }


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder that takes the name `folder` if, and only if, nothing goes wrong."""
    temporary = f"{folder}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_dataset(folder, pieces, meta):
    """Write the pieces as they come, then meta.json; returns the completed meta.

    bytes_per_token and unigram_nats are those of the scored tokens of the validation part."""
    meta["vocab_size"] = meta["tokenizer"]["vocab_size"]
    meta["dtype"] = "uint16" if meta["vocab_size"] <= 65536 else "uint32"
    n_bytes, counts = 0, np.zeros(meta["vocab_size"], np.int64)
    with new_folder(folder) as temporary:
        files = {}
        for part in ("train", "val"):
            files[part] = open(os.path.join(temporary, f"{part}.bin"), "wb")
        for part, tokens, scored, text in pieces:
            files[part].write(np.array(tokens, meta["dtype"]).tobytes())
            if part == "val":
                n_bytes += len(text.encode())
                counts += np.bincount(scored, minlength=len(counts))
        for part, file in files.items():
            meta[f"{part}_tokens"] = file.tell() // np.dtype(meta["dtype"]).itemsize
            file.close()
        if not meta["train_tokens"] or not n_bytes:
            raise ValueError("too short: a part is empty; problems may need a larger --seq_len")
        meta["bytes_per_token"] = n_bytes / int(counts.sum())
        meta["unigram_nats"] = entropy(counts)
        with open(os.path.join(temporary, "meta.json"), "w") as file:
            json.dump(meta, file)
    return meta


def open_data(folder):
    """(train, val, meta): memory-mapped tokens. Raises ValueError if they are not as meta says."""
    tokens = []
    try:
        with open(os.path.join(folder, "meta.json")) as file:
            meta = json.load(file)
        for part in ("train", "val"):
            path = os.path.join(folder, f"{part}.bin")
            tokens.append(np.memmap(path, meta["dtype"], "r"))
            if len(tokens[-1]) != meta[f"{part}_tokens"]:
                raise ValueError(f"{part}.bin has {len(tokens[-1])} tokens")
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no dataset: python prepare_data.py makes one") from None
    except (KeyError, ValueError) as error:
        raise ValueError(f"{folder} is damaged ({error}): make it again") from None
    return *tokens, meta


# ---------------------------------------------------------------------------------------------
# The command line of all scripts: a flag is a field of a dataclass, its help the comment behind it


def run_script(main):
    """Run a script's main(). What its user can mend is one line on stderr and exit status 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left
        os._exit(1)
    except (ValueError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(2)


def parse_flags(description, *classes, argv=None, defaults=None, positional=()):
    """Flags for the fields of dataclasses, but for those without a comment: ({name: value}, set of
    the names that were given). defaults: beat the fields' own. Raises ValueError."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )

    def error(message):
        raise ValueError(f"{message} (--help lists the flags)")

    parser.error = error
    values = {}
    for settings in classes:
        comments = re.findall(r"^ +(\w+): .*  # (.+)$", inspect.getsource(settings), re.M)
        for name, comment in comments:
            value = getattr(settings(), name)
            values[name] = (defaults or {}).get(name, value)
            shown = values[name]
            if isinstance(value, tuple):
                shown = ",".join(map(str, shown)) or "none"
            text = f"{comment} (default: {shown})".replace("%", "%%")
            flag = name if name in positional else f"--{name}"
            parser.add_argument(flag, help=text, **how_to_read(value, name in positional))
    given = vars(parser.parse_args(argv))
    return {**values, **given}, set(given)


def how_to_read(default, positional):
    """Options of argparse for a value like the default."""
    if positional:
        return dict(nargs="?")
    if isinstance(default, bool):
        return dict(type=boolean, nargs="?", const=True)
    if not isinstance(default, tuple):
        return dict(type=type(default))
    if not default or isinstance(default[0], str):
        return dict(nargs="+", action="extend")

    def numbers(text):
        return [type(default[0])(x) for x in text.split(",")]

    return dict(type=numbers)


def boolean(text):
    """argparse type."""
    if text.lower() not in ("true", "false", "1", "0"):
        raise ValueError
    return text.lower() in ("true", "1")


def from_values(settings, values):
    """A dataclass from a dict that may hold more than its fields."""
    return settings(**{f.name: values[f.name] for f in fields(settings) if f.name in values})


@functools.cache
def comments(settings):
    """{field: the comment behind it} of a dataclass."""
    source = inspect.getsource(settings)
    return dict(re.findall(r"^ +(\w+): .*?  # (.+)$", source, re.MULTILINE))


def check_settings(settings):
    """Raise ValueError where a field breaks what the comment behind it says: at least, at most, or
    a | b for a choice. Of a tuple or list that is said of each element."""
    for name, comment in comments(type(settings)).items():
        value = getattr(settings, name)
        choices = re.search(r"\w+( \| \w+)+", comment)
        if choices and value not in choices[0].split(" | "):
            raise ValueError(f"{name} must be {choices[0]}, not {value}")
        least = re.search(r"at least (-?\d[\d.e-]*)", comment)
        most = re.search(r"at most (-?\d[\d.e-]*)", comment)
        for x in value if isinstance(value, (tuple, list)) else [value]:
            if least and not x >= float(least[1]) or most and not x <= float(most[1]):
                raise ValueError(f"{name} is {x}, but: {comment}")


# ---------------------------------------------------------------------------------------------
# This script's own

SOURCES = {
    "pydocs": lambda s: split(pydocs()),
    "alldocs": lambda s: split(pydocs(PACKAGES)),
    "shakespeare": lambda s: cut(shakespeare()),
    "text": lambda s: cut(read_text(s.input)),
    "openwebtext": lambda s: split(row["text"] for row in stream("Skylion007/openwebtext")),
    "math": lambda s: math_problems(s.difficulty, s.problems, s.seed),
    "problems": lambda s: [*read_problems("train", s.input), *read_problems("val", s.test)],
    "tinygsm": lambda s: split((r["question"], r["code"]) for r in stream("TinyGSM/TinyGSM")),
}
SAMPLE = 100_000
TOKENIZERS = {"math": "bpe:512", "tinygsm": "gpt2", "openwebtext": "gpt2"}


@dataclass
class Settings:
    name: str = "pydocs"  # the dataset, see above
    data_dir: str = "data"  # it becomes a folder in here
    input: str = ""  # text, problems: the file to read
    test: str = ""  # problems: the file with those for validation
    tokenizer: str = "auto"  # bpe:SIZE, char, gpt2 or a tokenizer.json; auto: what suits the data
    states: int = 64  # markov: how many, at least 2
    successors: int = 8  # markov: of each state, at least 1
    tokens: int = 1_000_000  # markov: how many to draw, at least 10
    difficulty: int = 2  # math: operations in a problem, at least 2, at most 4
    problems: int = 20_000  # math: how many for training, at least 20
    seq_len: int = 128  # math, problems, tinygsm: tokens in a row, at least 4
    seed: int = 0  # markov, math: of everything random, at least 0

    def __post_init__(self):
        check_settings(self)
        if self.name not in (*SOURCES, "markov"):
            raise ValueError(f"there is no dataset {self.name} (--help lists them)")
        if self.successors > self.states:
            raise ValueError(f"successors must be at most states ({self.states})")


def make_pieces(s):
    """(pieces, the beginnings of their meta) of the dataset that the settings ask for."""
    if s.name == "markov":
        tokens, meta = markov_chain(s.states, s.successors, s.tokens, s.seed)
        parts = {"train": tokens[s.tokens // 10 :], "val": tokens[: s.tokens // 10]}
        return [(part, x, x, "." * len(x)) for part, x in parts.items()], meta
    documents = iter(SOURCES[s.name](s))
    sample = list(itertools.islice(documents, SAMPLE))  # a tokenizer is learned from these
    kind = TOKENIZERS.get(s.name, "bpe:1024") if s.tokenizer == "auto" else s.tokenizer
    meta = {"tokenizer": make_tokenizer(kind, "".join("".join(text) for _, text in sample))}
    if s.name in ("math", "problems", "tinygsm"):
        meta.update(row_length=s.seq_len, dropped=0)
        if meta["tokenizer"]["end"] is None:
            raise ValueError("problems need a tokenizer with an end token, such as bpe:512")
    return encode_documents(itertools.chain(sample, documents), meta), meta


def prepare(name, data_dir="data", **settings):
    """Make data_dir/name; returns its meta. Raises ValueError, OSError or ImportError."""
    s = Settings(name=name, data_dir=data_dir, **settings)
    return write_dataset(os.path.join(data_dir, name), *make_pieces(s))


def main():
    values, _ = parse_flags(__doc__, Settings, positional=["name"])
    meta = prepare(**values)
    print(os.path.join(values["data_dir"], values["name"]))
    for name, value in meta.items():
        if isinstance(value, (int, float)):
            print(f"{name:>16}: {round(value, 3):,}")


if __name__ == "__main__":
    run_script(main)
