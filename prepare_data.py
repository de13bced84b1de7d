"""Text or problems -> data/NAME/{train.bin, val.bin, meta.json}, for train.py.

    python prepare_data.py                  # pydocs: the documentation inside your Python
    python prepare_data.py alldocs          # eight times that: the packages that torch brings too
    python prepare_data.py math             # word problems; --difficulty=2 to 8 operations
    python prepare_data.py shakespeare      # downloads 1.1 MB
    python prepare_data.py text --input=book.txt --tokenizer=bpe:1024 --name=book
    python prepare_data.py problems --input=train.jsonl --test=test.jsonl --name=gsm8k
    python prepare_data.py fineweb --documents=1000000   # needs the package datasets, disk, hours
    python prepare_data.py openwebtext                   # likewise
    python prepare_data.py tinygsm                       # likewise

The first three need no network; --tokenizer=gpt2 does once, or its files in TIKTOKEN_CACHE_DIR. A
file of problems has one JSON object per line, with "question" and "answer". Ctrl-C ends a download
early: what came so far becomes the dataset.

Problems are rows of --seq_len tokens: the question, an end token, the answer, an end token, and
more end tokens. open_data() says what the files hold, so that you can also make them yourself.
"""
import argparse
import ast
import contextlib
import functools
import hashlib
import heapq
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
import sys
import sysconfig
import urllib.request
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass, fields
from typing import Literal, get_args

import numpy as np
from tqdm import tqdm

# OpenMP reads this as torch is loaded, below: its threads wait without keeping the cores busy
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
from blockgen import UserError, check_choices, describe_tokenizer

END = "<|endoftext|>"  # how the token that ends a text is shown
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


# A progress bar, from the third second on and where stderr is a terminal
progress = functools.partial(tqdm, unit_scale=True, disable=None, delay=2)

# ---------------------------------------------------------------------------------------------
# Sources. Each yields (part, document): part is train or val, a document is a text or a problem,
# which is a pair of texts, question and answer


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
            with contextlib.suppress(SyntaxError, ValueError):  # some are broken on purpose
                with open(f"{folder}/{name}", encoding="utf-8") as file:
                    yield from docstrings(file.read())


PACKAGES = ("torch", "sympy", "networkx", "numpy", "mpmath", "jinja2", "fsspec")


def pydocs(packages=()):
    """What every CPython carries: the help topics, then the docstrings of the standard library;
    then those of the packages, where they are installed."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    documents += documentation(sysconfig.get_path("stdlib"))
    for spec in map(importlib.util.find_spec, packages):
        documents += documentation(os.path.dirname(spec.origin)) if spec else []
    return dict.fromkeys(documents)  # without repetitions


def part_of(thing):
    """val for a tenth of all things, else train: by a hash, so neighbors fall on both sides."""
    return "val" if hashlib.sha256(str(thing).encode()).digest()[0] < 26 else "train"


def split(documents):
    """Many documents: one in ten is for validation."""
    for i, document in enumerate(documents):
        yield part_of(i), document


def cut(text):
    """A single document: its last tenth is for validation."""
    end = len(text) * 9 // 10
    return [("train", text[:end]), ("val", text[end:])]


def shakespeare():
    """Tiny Shakespeare. Where there is no network, get the file otherwise: `text --input=FILE`."""
    return urllib.request.urlopen(SHAKESPEARE, timeout=60).read().decode()


@contextlib.contextmanager
def open_text(path):
    """A file of text, with or without a byte-order mark."""
    if not path:
        raise UserError("needs --input=FILE, and for problems --test=FILE too")
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: convert it, as iconv does") from None


PIECE = 10_000_000  # characters


def read_text(path):
    """The pieces of a text file, so that a file of any size fits into memory."""
    with open_text(path) as file:
        while piece := file.read(PIECE):
            yield from cut(piece)


def read_problems(part, path):
    """The problems of a file with a JSON object a line."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            try:
                problem = json.loads(line)
                question, answer = problem["question"], problem["answer"]
                if isinstance(answer, (int, float)):
                    answer = str(answer)
                (question + answer).encode()  # an error if there is half a character
            except (ValueError, TypeError, KeyError, AttributeError):
                need = 'a JSON object with the texts "question" and "answer"'
                raise UserError(f"{path}, line {number} must be {need}") from None
            yield part, (question, answer)


def stream(name, *columns, config=None):
    """A dataset on the Hugging Face hub, while it is downloaded. One of its columns is a text, two
    are a problem; rows that lack them are left out."""
    from datasets import load_dataset

    get = operator.itemgetter(*columns)
    try:
        rows = load_dataset(name, config, split="train", streaming=True)
        for i, document in enumerate(map(get, rows)):
            if document and all(document):
                yield part_of(i), document
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from error


# ---------------------------------------------------------------------------------------------
# Problems made here. An answer is a Python function

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


def fill_in(wording, rng):
    """With random names, things and numbers: the question and its program."""
    names, people = rng.sample(NAMES, len(NAMES)), 2
    things, sentences, lines = rng.choice(THINGS), [], ["def simple_math_problem():"]
    for template in wording:
        x, y = rng.sample(names[:people], 2)
        numbers = dict(m=rng.randrange(20, 100), n=rng.randrange(2, 20), k=rng.randrange(2, 10))
        filled = template.format(X=x, Y=y, Z=names[people], things=things, **numbers)
        sentence, _, code = filled.partition(" | ")
        sentences.append(sentence)
        lines += code.lower().split("; ") if code else []
        people += "{Z}" in template
    return " ".join(sentences), "\n    ".join([*lines, "return result"]) + "\n"


def math_problems(operations, count, seed):
    """Word problems in TinyGSM's form, one for validation for every twenty for training. Every
    quantity in them is a positive whole number.

    No sequence of sentences and no first two numbers of a validation problem are in training."""
    rng = random.Random(seed)
    parts = ["train"] * count + ["val"] * (count // 20)
    # Draw until a problem fits the part that is due; validation comes first.
    while parts:
        wording = draw_wording(rng, operations)
        if part_of(wording) != parts[-1]:
            continue
        question, program = fill_in(wording, rng)
        numbers = re.findall(r"\d+", question)[:2]
        quantities = [x for _, x in run(ast.parse(program).body, {})]
        whole = all(x > 0 and x == int(x) for x in quantities)
        if whole and part_of(numbers) == parts[-1]:
            yield parts.pop(), (question, program)


# ---------------------------------------------------------------------------------------------
# Answers. Models write them, so no program is ever executed: we read its syntax tree, and know only
# numbers, booleans and lists of numbers. Its length is bounded, and so is its work

LONGEST, LARGEST = 2_000, 1e30  # characters of a program, absolute value of its answer
STEPS_ALLOWED = 5_000  # visits to nodes of the tree
FUNCTIONS = {
    "Add": operator.add,  # these have their names in ast
    "Sub": operator.sub,
    "Mult": operator.mul,
    "Div": operator.truediv,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "Pow": operator.pow,
    "USub": operator.neg,
    "Lt": operator.lt,
    "LtE": operator.le,
    "Gt": operator.gt,
    "GtE": operator.ge,
    "Eq": operator.eq,
    "NotEq": operator.ne,
    "Not": operator.not_,
    "And": lambda *values: all(values),
    "Or": lambda *values: any(values),
    "List": lambda *values: list(values),
    "Subscript": lambda values, i: values[int(i)],
    "range": lambda *ends: range(*map(int, ends)),
    "abs": abs,
    "min": min,
    "max": max,
    "sum": sum,
    "len": len,
    "int": int,
    "float": float,
    "round": lambda x, digits=0: round(x, int(digits)),
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.sqrt": math.sqrt,
}


def spend(steps, variables):
    """Count steps, under a name that no variable has. Raises ValueError at the limit."""
    variables["steps so far"] = steps = steps + variables.get("steps so far", 0)
    if steps > STEPS_ALLOWED:
        raise ValueError("too many steps")


def evaluate(node, variables):
    """The value of an expression. All numbers are floats, so that none grows long and no power
    takes time. Raises some Exception for what is not known here."""
    spend(1, variables)
    children = ast.iter_child_nodes(node)
    operands = [child for child in children if isinstance(child, ast.expr)]
    match node:
        case ast.Constant(value) if type(value) in (bool, int, float):
            return value if type(value) is bool else float(value)
        case ast.Name(name):
            return variables[name]
        case ast.IfExp(test, yes, no):
            return evaluate(yes if evaluate(test, variables) else no, variables)
        case ast.Call(ast.Name(name), operands, []):
            pass
        case ast.Call(ast.Attribute(ast.Name("math"), name), operands, []):
            name = f"math.{name}"
        case ast.Compare(_, [op]):
            name = type(op).__name__
        case _:
            name = type(getattr(node, "op", node)).__name__
    function = FUNCTIONS[name]
    values = [evaluate(operand, variables) for operand in operands]
    value = function(*values)
    # Work on ten elements of lists counts as a step.
    lists = [x for x in [value, *values] if isinstance(x, (list, range))]
    spend(sum(map(len, lists)) // 10, variables)
    if isinstance(value, (list, range)):
        return [float(x) for x in value]
    return value if type(value) is bool else float(value)


def run(statements, variables):
    """Obey statements one by one; yields (variable, its new value), and ("return", value). Raises
    some Exception for what is not known here."""
    for statement in statements:
        spend(1, variables)
        match statement:
            case ast.Import([ast.alias("math", None)]) | ast.Expr(ast.Constant(str())):
                continue
            case ast.FunctionDef("simple_math_problem", ast.arguments([], []), body):
                yield from run(body, variables)
                continue
            case ast.If(test, yes, no):
                yield from run(yes if evaluate(test, variables) else no, variables)
                continue
            case ast.For(ast.Name(item), items, body, []):
                for variables[item] in evaluate(items, variables):
                    yield from run(body, variables)
                continue
            case ast.Expr(ast.Call(ast.Attribute(items, "append"), [item], [])):
                evaluate(items, variables).append(float(evaluate(item, variables)))
                continue
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value):
                pass
            case ast.AugAssign(ast.Name(name) as target, op, change):
                value = ast.BinOp(target, op, change)
            case ast.Return(value):
                name = "return"
            case _:
                raise ValueError(statement)
        variables[name] = value = evaluate(value, variables)
        yield name, value


# A number: sign, currency, thousands, decimals, percent; ** around it, a period behind it
NUMBER = r"\**([-+]?) ?[$€£]? ?([-+]?)(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(\.\d+)? ?%?\**\.?\**"


def solve(text):
    """The number that an answer stands for, a float; None if it has none.

    An answer is a program, or has a line that ends in "#### 18", as in GSM8K. A number must be all
    that stands there: "#### 3/4" and "#### 18 or 19" have none. Whatever a text says, this takes
    milliseconds, prints nothing and touches nothing."""
    marked = re.findall("####(.*)", text)
    try:
        if marked:
            [line] = marked
            parts = re.fullmatch(NUMBER, line.strip(), re.ASCII).groups("")
            value = float("".join(parts).replace(",", ""))
        else:
            with warnings.catch_warnings():  # Python warns of odd programs
                warnings.simplefilter("ignore")
                program = ast.parse(text if len(text) <= LONGEST else "")
            steps = run(program.body, {})
            value = next(value for name, value in steps if name == "return")
        return value if abs(value) <= LARGEST and type(value) is float else None
    except Exception:  # wrong syntax, unknown, too deep, too large: no answer
        return None


def is_right(text, reference):
    """Whether an answer has the value of the reference; where that has no number, its text."""
    value, expected = solve(text), solve(reference)
    if expected is None:
        return text.strip() == reference.strip()
    return value is not None and math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-6)


def encode_problem(tokenizer, encode, question, answer=""):
    """(ids of the question, ids of the answer), as a model of this tokenizer knows them: question
    and end token, answer and end token. Published weights have a start token before the question
    and a separator behind it."""
    end = [tokenizer["end"]]
    if "separator" in tokenizer:
        before = [tokenizer["start"]] + encode(question) + encode(tokenizer["separator"])
    else:
        before = encode(question) + end
    return before, encode(answer) + end


def is_question(rows, end):
    """Where rows (N, L) of tokens, torch or numpy, hold the question, its end token included."""
    ends = rows == end
    return ends.cumsum(1) <= ends


def is_answer(rows, end):
    """Where rows (N, L) of tokens, torch or numpy, hold the answer, its one end token included."""
    ends = rows == end
    return ends.cumsum(1) == ends + 1


# ---------------------------------------------------------------------------------------------
# Tokenizers: a dict in meta.json describes each. It has its "kind", "vocab_size", and in "end" the
# token that ends a text

# GPT-2's way to cut text into words, which no token crosses, but digits stand alone
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SAMPLE = 20_000_000  # characters to learn tokens from


def beginning(texts, n):
    """The first n characters of some texts, joined."""
    found = []
    for text in texts:
        found.append(text[:n])
        n -= len(found[-1])
        if not n:
            break
    return "".join(found)


def learn_bpe(text, vocab_size):
    """Byte-pair encoding (arXiv 1508.07909): the tokens, as bytes, in the order of their ids.

    The 256 bytes come first; then, over and over, the pair of neighbors that is most frequent
    inside words becomes a token: of equals, that of the smallest ids. Raises UserError for a text
    without enough pairs."""
    import regex  # comes with tiktoken

    counts = Counter(match[0] for match in regex.finditer(WORDS, text))
    # Each character of a word is a token: a byte at first, and later chr(300) is that with id 300.
    words = [word.encode().decode("latin-1") for word in counts]
    occurrences = list(counts.values())
    frequency, places = Counter(), defaultdict(set)

    def count(i, sign):
        for pair in map(operator.add, words[i], words[i][1:]):
            frequency[pair] += sign * occurrences[i]
            places[pair].add(i)

    for i in range(len(words)):
        count(i, +1)
    heap = [(0, ""), *((-n, pair) for pair, n in frequency.items())]
    heapq.heapify(heap)
    tokens = [bytes([i]) for i in range(256)]
    for new in progress(range(256, vocab_size), desc="learning tokens"):
        # Pairs can have become less frequent since they came into the heap.
        while heap[0][0] != -frequency[heap[0][1]]:
            stale = heap[0][1]
            heapq.heapreplace(heap, (-frequency[stale], stale))
        n, pair = heapq.heappop(heap)
        if n > -2:
            fewer = f"--tokenizer=bpe:{new + 1} or less, or char"
            raise UserError(f"the text has too few words for so many tokens: take {fewer}")
        # Write the new token for the pair wherever that stands, and count its new neighbors.
        changed = places.pop(pair)
        for i in changed:
            count(i, -1)
            words[i] = words[i].replace(pair, chr(new))
            count(i, +1)
        around = {p for i in changed for p in map(operator.add, words[i], words[i][1:])}
        for p in around:
            if chr(new) in p:
                heapq.heappush(heap, (-frequency[p], p))
        tokens.append(b"".join(tokens[ord(part)] for part in pair))
    return tokens


def make_tokenizer(kind, texts):
    """The description of a tokenizer. kind: bpe:SIZE or char, learned from the texts; gpt2; or the
    path of a tokenizer.json, as the package tokenizers writes it. Raises UserError."""
    size = re.fullmatch(r"bpe:(\d{3,5})", kind)
    if kind == "gpt2":
        return {"kind": "gpt2", "vocab_size": 50257, "end": 50256}
    if kind.endswith(".json"):
        with open_text(kind) as file:
            return describe_tokenizer(file.read(), kind)[0]
    if kind == "char":
        tokens = [char.encode() for char in sorted(set().union(*texts))]
    elif size and 257 <= int(size[1]) <= 16384:
        tokens = learn_bpe(beginning(texts, SAMPLE), int(size[1]) - 1)
    else:
        kinds = "char, gpt2, PATH/tokenizer.json or bpe:SIZE with SIZE from 257 to 16384"
        raise UserError(f"the tokenizer must be {kinds}, not {kind}")
    end = len(tokens)
    tokens = [token.hex() for token in tokens]
    return {"kind": kind, "tokens": tokens, "vocab_size": end + 1, "end": end}


def load_char(description):
    chars = [bytes.fromhex(token).decode() for token in description["tokens"]] + [END]
    ids = {char: i for i, char in enumerate(chars)}

    def encode(text):
        try:
            return [ids[char] for char in text]
        except KeyError as char:
            raise UserError(f"the vocabulary has no {char}") from None

    return encode, lambda tokens: "".join(chars[i] for i in tokens)


def load_bpe(description):
    import tiktoken

    ranks = {bytes.fromhex(token): i for i, token in enumerate(description["tokens"])}
    special = {END: description["end"]}
    bpe = tiktoken.Encoding("bpe", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)
    return bpe.encode_ordinary, bpe.decode


def load_gpt2(description):
    import tiktoken

    gpt2 = tiktoken.get_encoding("gpt2")
    return gpt2.encode_ordinary, gpt2.decode


def load_json(description):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(description["json"])
    tokenizer.encode_special_tokens = True  # a text cannot spell the end
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    return encode, functools.partial(tokenizer.decode, skip_special_tokens=False)


def load_none(description):
    def refuse(_):
        raise UserError("these data are integers, and no text")

    return refuse, refuse


TOKENIZERS = {
    "bpe": load_bpe,
    "char": load_char,
    "gpt2": load_gpt2,
    "json": load_json,
    "none": load_none,
}


def load_tokenizer(description):
    """(encode: str -> ids, decode: ids -> str). encode raises UserError for what it cannot say;
    decode drops ids that are not in the vocabulary, such as a mask."""
    kind = description["kind"].partition(":")[0]
    encode, decode = TOKENIZERS[kind](description)
    return encode, lambda tokens: decode([i for i in tokens if i < description["vocab_size"]])


def check_tokenizer(ours, theirs):
    """Raises UserError if the metas of a model and of data have different tokenizers."""
    for key in ("kind", "vocab_size", "tokens", "json"):
        if ours["tokenizer"].get(key) != theirs["tokenizer"].get(key):
            raise UserError("the data have another tokenizer than the model: were they remade?")


# ---------------------------------------------------------------------------------------------
# Files


def open_data(folder):
    """(train, val, meta): token ids, memory-mapped, and the content of meta.json. Raises UserError
    if something is missing or damaged.

    A dataset is a folder of train.bin and val.bin, bare arrays of integers, and meta.json:
        vocab_size       the ids are below it: all that somebody's own dataset needs
        dtype            numpy's name for the integers; else uint16
        train_tokens     how many there are; else as many as the file has
        val_tokens       likewise
        tokenizer        how to decode them; else no text is shown, and none is asked for
        bytes_per_token  of the text in val.bin, for bits per byte
        unigram_nats     entropy of the tokens in val.bin: what a model has to beat
        row_length       for problems, tokens a row; tokenizer["end"] then ends question and answer
        train_dropped    problems that were too long for a row
        val_dropped      likewise
        val_bytes        bytes of the text that is scored in val.bin
        made_from        name of the source, or of a file
    For problems bytes_per_token and unigram_nats are those of the answers, each with one end."""
    parts = []
    try:
        with open(f"{folder}/meta.json", encoding="utf-8") as file:
            meta = json.load(file)
        for part in ("train", "val"):
            length = meta.get(f"{part}_tokens")
            dtype = meta.get("dtype", "uint16")
            tokens = np.memmap(f"{folder}/{part}.bin", dtype, "r", shape=length)
            if tokens[:1_000_000].max() >= meta["vocab_size"]:
                raise ValueError(f"{part}.bin has ids that are not below vocab_size")
            parts.append(tokens)
    except (FileNotFoundError, KeyError, ValueError) as error:
        problem = f"{folder} is missing or damaged ({error})"
        raise UserError(f"{problem}: python prepare_data.py makes a dataset") from None
    meta.setdefault("tokenizer", {"kind": "none", "vocab_size": meta["vocab_size"]})
    return *parts, meta


def open_problems(folder):
    """The validation problems of a dataset, [(question, answer)], also those that are too long for
    a row. Raises UserError if it has none."""
    path = f"{folder}/val.jsonl"
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: this is no dataset of problems, or an old one")
    return [problem for _, problem in read_problems("val", path)]


def check_folder(folder, made_from, is_streamed):
    """Raise UserError if a folder holds what nobody should lose: what is no dataset, a dataset made
    from something else, or one that was streamed."""
    try:
        with open(f"{folder}/meta.json") as file:
            precious = is_streamed or json.load(file).get("made_from", made_from) != made_from
    except FileNotFoundError:
        precious = os.path.exists(folder) and os.listdir(folder)
    except ValueError:  # damaged
        precious = False
    if precious:
        raise UserError(f"{folder} holds something else: remove it, or choose another --name")


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder that takes the name `folder` if, and only if, nothing goes wrong."""
    folder = os.path.realpath(folder)  # a link stays one
    temporary = f"{folder}.{os.getpid()}.tmp"
    os.makedirs(temporary)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if os.path.exists(folder):
        os.replace(folder, f"{temporary}.old")
    os.replace(temporary, folder)
    shutil.rmtree(f"{temporary}.old", ignore_errors=True)


def make_row(meta, encode, decode, question, answer):
    """(row of tokens, those in it that are scored). Raises UserError if the judge does not call the
    answer right."""
    before, scored = encode_problem(meta["tokenizer"], encode, question, answer)
    if "row_length" not in meta:
        return scored, scored
    decoded = decode(scored[:-1])
    if decoded != answer and not is_right(decoded, answer):
        raise UserError(f"this tokenizer makes {decoded!r} of the answer {answer!r}")
    room = meta["row_length"] - len(before) - len(scored)
    return before + scored + scored[-1:] * room, scored


def write_documents(folder, documents, meta, counts):
    """Write the documents as they come, count in meta, and add to counts (V,) the tokens of val
    that are scored. Problems that are too long for a row are dropped."""
    encode, decode = load_tokenizer(meta["tokenizer"])
    is_problem = "row_length" in meta
    bar = progress(desc="writing", unit=" tokens")
    for n, (part, document) in enumerate(documents, 1):
        # All validation problems stay as texts, for the judge of any model.
        question, answer = document if is_problem else ("", document)
        row, scored = make_row(meta, encode, decode, question, answer)
        if is_problem and part == "val":
            with open(f"{folder}/val.jsonl", "a") as file:
                print(json.dumps(dict(question=question, answer=answer)), file=file)
        if is_problem and len(row) > meta["row_length"]:
            meta[f"{part}_dropped"] += 1
            continue
        # What is written is counted afterwards, so that an interruption leaves a valid dataset.
        with open(f"{folder}/{part}.bin", "ab") as file:
            np.array(row, meta["dtype"]).tofile(file)
        meta[f"{part}_tokens"] += len(row)
        if part == "val":
            meta["val_bytes"] += len(answer.encode())
            counts += np.bincount(scored, minlength=len(counts))
        bar.set_postfix(documents=n, refresh=False)
        bar.update(len(row))
    bar.close()


def write_dataset(folder, documents, meta, is_streamed=False):
    """Write all files; returns the completed meta. Whatever ends a stream early (a lost connection,
    Ctrl-C) is raised only after what came has become a dataset."""
    size, lost = meta["tokenizer"]["vocab_size"], None
    meta |= dict(vocab_size=size, dtype="uint16" if size <= 1 << 16 else "uint32")
    meta |= dict(train_tokens=0, val_tokens=0, val_bytes=0)
    counts = np.zeros(size, np.int64)
    # Of a stream we keep what came, whatever ended it.
    with new_folder(folder) as temporary:
        try:
            write_documents(temporary, documents, meta, counts)
        except BaseException as error:
            if not is_streamed:
                raise
            lost = error
        if not meta["train_tokens"] or not meta["val_bytes"]:
            short = "too short: a part is empty; problems may need a larger --seq_len"
            raise lost or UserError(short)
        # What a model has to beat, and what makes bits per byte of nats per token.
        p = counts[counts > 0] / counts.sum()
        meta["bytes_per_token"] = meta["val_bytes"] / counts.sum()
        meta["unigram_nats"] = -(p * np.log(p)).sum()  # their entropy
        with open(f"{temporary}/meta.json", "w") as file:
            json.dump(meta, file)
    if lost:
        print(f"{folder} holds what came so far", file=sys.stderr)
        raise lost
    return meta


# ---------------------------------------------------------------------------------------------
# The command line of all scripts: a flag is a field of a dataclass

OPTIONAL = "datasets huggingface_hub matplotlib safetensors tiktoken tokenizers transformers"


def run_script(main):
    """Run a script's main(). What its user can mend is one line on stderr and exit status 2: a
    UserError, a file that cannot be read or written, an optional package that is not installed."""
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="replace")  # a terminal that knows no ± prints ?
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left
        os._exit(1)
    except (UserError, OSError, ModuleNotFoundError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            if error.name not in OPTIONAL.split():
                raise
            message += f" (pip install {error.name})"
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(2)


def comments(settings):
    """{field: the comment behind it} of a dataclass whose source is at hand; else nothing."""
    try:
        source = inspect.getsource(settings)
    except (OSError, TypeError):
        return {}
    return dict(re.findall(r"^ +(\w+):.*?# *(.+)", source, re.MULTILINE))


def parse_flags(description, *classes, argv=None, defaults={}, positional=None, skip=()):
    """{name: value} of the flags for the fields of dataclasses, but those in skip. The comment
    behind a field is its help, a Literal names its choices. defaults: beat the fields' own. Raises
    UserError."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def error(message):
        raise UserError(f"{message} (--help lists the flags)")

    # Each field becomes a flag; the type of its default says how to read it.
    parser.error = error
    for settings in classes:
        notes = comments(settings)
        for field in fields(settings):
            name, own = field.name, field.default
            if name in skip:
                continue
            text = notes.get(name, "").replace("%", "%%") + " (default: %(default)s)"
            options = dict(help=text, type=reader(own), default=defaults.get(name, own))
            options["choices"] = get_args(field.type) or None
            if isinstance(own, bool) or name == positional:
                options |= dict(nargs="?", const=True)  # --NAME is --NAME=true
            parser.add_argument(name if name == positional else f"--{name}", **options)
    return vars(parser.parse_args(argv))


def reader(default):
    """What makes a flag's text a value like the default: the type argument of argparse."""

    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"must be true or false, not {text}")
        return text.lower() == "true"

    def comma_separated(text):
        read = reader(default[0] if default else 0.0)
        return tuple(read(part) for part in text.split(","))

    return {bool: boolean, tuple: comma_separated}.get(type(default), type(default))


def from_values(settings, values):
    """A dataclass from a dict that may hold more than its fields."""
    names = {field.name for field in fields(settings)}
    return settings(**{name: value for name, value in values.items() if name in names})


# ---------------------------------------------------------------------------------------------
# This script's own. To add a dataset, write a function that yields its documents, and name it here

SOURCES = {
    "pydocs": lambda s: split(pydocs()),
    "alldocs": lambda s: split(pydocs(PACKAGES)),
    "shakespeare": lambda s: cut(shakespeare()),
    "text": lambda s: read_text(s.input),
    "math": lambda s: math_problems(s.difficulty, s.problems, s.seed),
    "problems": lambda s: itertools.chain(
        read_problems("train", s.input), read_problems("val", s.test)
    ),
    "fineweb": lambda s: stream("HuggingFaceFW/fineweb-edu", "text", config="sample-10BT"),
    "openwebtext": lambda s: stream("Skylion007/openwebtext", "text"),
    "tinygsm": lambda s: stream("TinyGSM/TinyGSM", "question", "code"),
}
STREAMED = ("fineweb", "openwebtext", "tinygsm")
USUAL = {"math": "bpe:512", **dict.fromkeys(STREAMED, "gpt2")}  # tokenizers


@dataclass
class Settings:
    source: Literal[tuple(SOURCES)] = "pydocs"  # where the data come from, see above
    name: str = ""  # name of the dataset, a folder in data_dir; else that of the source
    data_dir: str = "data"  # folder of all datasets
    input: str = ""  # text, problems: file to read
    test: str = ""  # problems: file of the problems for validation
    tokenizer: str = "auto"  # bpe:SIZE, char, gpt2 or PATH/tokenizer.json; auto: as suits the data
    documents: int = 0  # use at most so many documents; 0: all of them
    difficulty: Literal[tuple(range(2, 9))] = 2  # math: operations in a problem, from 2 to 8
    problems: int = 20_000  # math: number of problems for training
    seq_len: int = 128  # problems, also math and tinygsm: tokens in a row
    seed: int = 0  # math: seed of everything random

    def __post_init__(self):
        check_choices(self)
        if self.documents < 0:
            raise UserError("documents must be at least 0")


def prepare(source, data_dir="data", **settings):
    """Make data_dir/source, or data_dir/name; returns its meta. Raises UserError, OSError, or
    ModuleNotFoundError for an optional package."""
    s = Settings(source, data_dir=data_dir, **settings)
    folder = f"{data_dir}/{s.name or source}"
    made_from, is_streamed = s.input or source, source in STREAMED
    check_folder(folder, made_from, is_streamed)

    # Tokens are learned from the first documents, which tee keeps in memory to be written, too: a
    # few for bpe, none for gpt2, all of them for char.
    documents = itertools.islice(SOURCES[source](s), s.documents or None)
    documents, first = itertools.tee(documents)
    kind = USUAL.get(source, "bpe:1024") if s.tokenizer == "auto" else s.tokenizer
    texts = ("".join(document) for _, document in progress(first, desc="reading"))
    meta = {"tokenizer": make_tokenizer(kind, texts), "made_from": made_from}
    del first, texts  # or all that follow would be kept, too
    if source in ("math", "problems", "tinygsm"):
        meta |= dict(row_length=s.seq_len, train_dropped=0, val_dropped=0)
    return write_dataset(folder, documents, meta, is_streamed)


def main():
    values = parse_flags(__doc__, Settings, positional="source")
    meta = prepare(**values)
    print(f"{values['data_dir']}/{values['name'] or values['source']}")
    for name, value in meta.items():
        if isinstance(value, (int, float)):
            print(f"{name:>20}: {round(value, 3):,}")


if __name__ == "__main__":
    run_script(main)
