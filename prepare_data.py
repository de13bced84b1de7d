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
file of problems has one JSON object per line, with "question" and "answer". --documents=N ends a
download early; if the connection is lost, what came becomes the dataset.

Problems are rows of --seq_len tokens: the question, an end token, the answer, an end token, and
more end tokens. open_data() says what the files hold, so that you can also make them yourself.
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
import sys
import sysconfig
import urllib.request
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from tqdm import tqdm

# OpenMP reads this as torch is loaded, below: its threads wait without keeping the cores busy
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
from blockgen import UserError, check_at_least, check_choices, describe_tokenizer

END = "<|endoftext|>"  # how the token that ends a text is shown
# A progress bar, from the third second on, where stderr is a terminal
progress = functools.partial(tqdm, unit_scale=True, disable=None, delay=2)


# ---------------------------------------------------------------------------------------------
# Sources. Each yields (part, document): part is train or val; a document is a text, or a problem,
# which is a pair of texts, (question, answer)

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
PACKAGES = ("torch", "sympy", "networkx", "numpy", "mpmath", "jinja2", "fsspec")
SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
PIECE = 10_000_000  # characters of a file that are read at a time


def docstrings(source):
    """The docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) > 40:
                yield text


def documentation(library):
    """The docstrings of every Python file below a folder."""
    for path in sorted(Path(library).rglob("*.py"), key=lambda path: (path.parent, path.name)):
        if SKIPPED.isdisjoint(path.relative_to(library).parts):
            with contextlib.suppress(SyntaxError, ValueError):  # some are broken on purpose
                yield from docstrings(path.read_text("utf-8"))


def pydocs(packages=()):
    """The help topics that every CPython carries, then the docstrings of its standard library and
    of those of the packages that are installed; without repetitions."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    documents += documentation(sysconfig.get_path("stdlib"))
    for spec in map(importlib.util.find_spec, packages):
        documents += documentation(os.path.dirname(spec.origin)) if spec else []
    return dict.fromkeys(documents)


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
                "".join([question, answer]).encode()  # fails for what is no text, or half a one
            except (ValueError, TypeError, KeyError):
                need = 'must be a JSON object with the texts "question" and "answer"'
                raise UserError(f"{path}, line {number} {need}") from None
            yield part, (question, answer)


def stream(name, *columns, config=None):
    """A dataset on the Hugging Face hub, while it is downloaded. One of its columns is a text, two
    are a problem; rows that lack them are left out. If the connection is lost, the stream ends."""
    from datasets import load_dataset

    get, came = operator.itemgetter(*columns), False
    try:
        rows = load_dataset(name, config, split="train", streaming=True)
        for i, document in enumerate(map(get, rows)):
            if document and all(document):
                yield part_of(i), document
                came = True
    except (OSError, RuntimeError, ValueError) as error:
        if not came:
            raise UserError(f"{name}: {error}") from error
        print(f"the stream of {name} ended early: {error}", file=sys.stderr)


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
    names, known = rng.sample(NAMES, len(NAMES)), 2
    things = rng.choice(THINGS)
    sentences, lines = [], ["def simple_math_problem():"]
    for template in wording:
        x, y = rng.sample(names[:known], 2)
        numbers = dict(m=rng.randrange(20, 100), n=rng.randrange(2, 20), k=rng.randrange(2, 10))
        filled = template.format(X=x, Y=y, Z=names[known], things=things, **numbers)
        sentence, *code = filled.split(" | ")
        sentences.append(sentence)
        lines += code
        known += "{Z}" in template
    program = "; ".join([*lines, "return result"]).lower()
    return " ".join(sentences), program.replace("; ", "\n    ") + "\n"


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
# Answers. Models write them, so no program is ever executed: we read its syntax tree. It knows only
# numbers and lists of numbers; its length is bounded, and so is its work

LONGEST, LARGEST = 2_000, 1e30  # characters of a program, absolute value of its answer
STEPS_ALLOWED = 4_000  # visits to nodes of the tree, and elements of new lists
# Operators by their names in ast, and the same in the module operator
SYNTAX = "Add Sub Mult Div FloorDiv Mod Pow USub Lt LtE Gt GtE Eq NotEq Not".split()
MEANING = "add sub mul truediv floordiv mod pow neg lt le gt ge eq ne not_".split()
NAMED = (abs, min, max, sum, len, int, float, math.ceil, math.floor, math.sqrt)
FUNCTIONS = {
    **{name: getattr(operator, meaning) for name, meaning in zip(SYNTAX, MEANING)},
    **{function.__name__: function for function in NAMED},
    "And": lambda *values: all(values),
    "Or": lambda *values: any(values),
    "List": lambda *values: list(values),
    "Subscript": lambda values, i: values[int(i)],
    "range": lambda *ends: range(*map(int, ends)),
    "round": lambda x, digits=0: round(x, int(digits)),
}


def spend(steps, variables):
    """Count steps, under a name that no variable has. Raises ValueError at the limit."""
    variables["steps so far"] = steps = steps + variables.get("steps so far", 0)
    if steps > STEPS_ALLOWED:
        raise ValueError("too many steps")


def evaluate(node, variables):
    """The value of an expression: a float, so that no number grows long and no power takes time, or
    a list of floats. Raises some Exception for what is not known here."""
    spend(1, variables)
    children = ast.iter_child_nodes(node)
    operands = [child for child in children if isinstance(child, ast.expr)]
    match node:
        case ast.Constant(int() | float() as number):
            return float(number)
        case ast.Name(name):
            return variables[name]
        case ast.IfExp(test, yes, no):
            return evaluate(yes if evaluate(test, variables) else no, variables)
        case ast.Call(ast.Name(name) | ast.Attribute(ast.Name("math"), name), operands, []):
            pass
        case ast.Compare(_, [op]):
            name = type(op).__name__
        case _:
            name = type(getattr(node, "op", node)).__name__
    value = FUNCTIONS[name](*[evaluate(operand, variables) for operand in operands])
    if isinstance(value, (list, range)):
        spend(len(value), variables)
        return [float(x) for x in value]
    return float(value)


def run(statements, variables):
    """Obey statements one by one; yields (variable, its new value), and ("return", value). Raises
    some Exception for what is not known here."""
    for statement in statements:
        spend(1, variables)
        match statement:
            case ast.Import() | ast.Expr(ast.Constant()):
                continue
            case ast.FunctionDef("simple_math_problem", _, body):
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
        variables[name] = evaluate(value, variables)
        yield name, variables[name]


# A number: sign, currency, thousands, decimals, percent; ** around it, a period behind it
NUMBER = r"\**([-+]?) ?[$€£]? ?([-+]?)(\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(\.\d+)? ?%?\**\.?\**"


def solve(text):
    """The number that an answer stands for, a float; None if it has none.

    An answer is a program, or has a line that ends in "#### 18", as in GSM8K. A number must be all
    that stands there: "#### 3/4" has none. Whatever a text says, this takes milliseconds, prints
    nothing and touches nothing."""
    marked = re.findall("####(.*)", text)
    try:
        if marked:
            [line] = marked
            parts = re.fullmatch(NUMBER, line.strip(), re.ASCII).groups("")
            value = float("".join(parts).replace(",", ""))
        else:
            with warnings.catch_warnings():  # Python warns of such programs as 9if 1
                warnings.simplefilter("ignore")
                program = ast.parse(text if len(text) <= LONGEST else "")
            steps = run(program.body, {})
            value = next(value for name, value in steps if name == "return")
        return value if abs(value) <= LARGEST else None
    except Exception:  # wrong syntax, unknown, too deep, too large: no answer
        return None


def is_right(text, reference):
    """Whether an answer has the value of the reference; where that has no number, its text."""
    value, expected = solve(text), solve(reference)
    if None in (value, expected):
        return text.strip() == reference.strip()
    return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-6)


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


def beginning(texts):
    """The first SAMPLE characters of some texts, joined."""
    joined = ""
    for text in texts:
        joined += text
        if len(joined) >= SAMPLE:
            break
    return joined[:SAMPLE]


def learn_bpe(text, vocab_size):
    """Byte-pair encoding (arXiv 1508.07909): the tokens, as bytes, in the order of their ids.

    The 256 bytes come first; then, over and over, the pair of neighbors that is most frequent
    inside words becomes a token: of equals, that of the smallest ids. Raises UserError for a text
    without enough pairs."""
    import regex  # comes with tiktoken

    # Each character of a word is a token: a byte at first, and later chr(300) is that with id 300.
    words = Counter(match[0] for match in regex.finditer(WORDS, text))
    words = {word.encode().decode("latin-1"): n for word, n in words.items()}
    frequency = Counter()

    def count(word, n):
        for pair in map(operator.add, word, word[1:]):
            frequency[pair] += n

    for word, n in words.items():
        count(word, n)
    tokens = [bytes([i]) for i in range(256)]
    for new in progress(range(256, vocab_size), desc="learning tokens"):
        most = max(frequency.values(), default=0)
        if most < 2:
            raise UserError(f"the text has too few words: take bpe:{new + 1} or less, or char")
        pair = min(pair for pair, n in frequency.items() if n == most)
        # Write the new token for the pair wherever that stands, and count its new neighbors.
        for word in [word for word in words if pair in word]:
            merged = word.replace(pair, chr(new))
            words[merged] = words.pop(word)
            count(word, -words[merged])
            count(merged, words[merged])
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
        tokens = learn_bpe(beginning(texts), int(size[1]) - 1)
    else:
        raise UserError("the tokenizer must be char, gpt2, PATH.json or bpe:257 to bpe:16384")
    end, names = len(tokens), [token.hex() for token in tokens]
    return {"kind": kind, "tokens": names, "vocab_size": end + 1, "end": end}


def load_char(description):
    chars = [bytes.fromhex(token).decode() for token in description["tokens"]] + [END]
    ids = {char: i for i, char in enumerate(chars)}

    def encode(text):
        if unknown := set(text) - set(ids):
            raise UserError(f"the vocabulary has no {min(unknown)!r}")
        return [ids[char] for char in text]

    return encode, lambda tokens: "".join(chars[i] for i in tokens)


def load_bpe(description):
    import tiktoken

    if description["kind"] == "gpt2":
        bpe = tiktoken.get_encoding("gpt2")
    else:
        ranks = {bytes.fromhex(token): i for i, token in enumerate(description["tokens"])}
        special = {END: description["end"]}
        bpe = tiktoken.Encoding("bpe", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special)
    return bpe.encode_ordinary, bpe.decode


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
    raise UserError("these data are integers, and no text")


TOKENIZERS = dict(bpe=load_bpe, char=load_char, gpt2=load_bpe, json=load_json, none=load_none)


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
        tokenizer        how to decode them; else no text is shown, and none is asked for
        val_bytes        bytes of the text that is scored in val.bin: for problems, the answers
        bytes_per_token  of that text, for bits per byte
        unigram_nats     entropy of its tokens: what a model has to beat
        row_length       for problems, tokens a row; tokenizer["end"] then ends question and answer
        train_dropped    problems that were too long for a row; likewise val_dropped
        made_from        name of the source, or of a file"""
    try:
        meta = json.loads(Path(folder, "meta.json").read_text("utf-8"))
        parts = []
        for part in ("train", "val"):
            tokens = np.memmap(f"{folder}/{part}.bin", meta.get("dtype", "uint16"), "r")
            if tokens[:1_000_000].max() >= meta["vocab_size"]:
                raise ValueError(f"{part}.bin has ids that are not below vocab_size")
            parts.append(tokens)
    except (FileNotFoundError, KeyError, ValueError) as error:
        problem = f"{folder} is missing or damaged ({error})"
        raise UserError(f"{problem}: python prepare_data.py makes a dataset") from None
    meta.setdefault("tokenizer", {"kind": "none", "vocab_size": meta["vocab_size"]})
    return *parts, meta


def open_problems(folder):
    """The validation problems of a dataset, [(question, answer)], with those that are too long for
    a row. Raises UserError if it has none."""
    path = f"{folder}/val.jsonl"
    if not os.path.exists(path):
        raise UserError(f"{path} is missing: this is no dataset of problems, or an old one")
    return [problem for _, problem in read_problems("val", path)]


def check_folder(folder, made_from):
    """Raise UserError if a folder holds anything but a dataset that was made from the same."""
    with contextlib.suppress(UserError):
        if open_data(folder)[2].get("made_from") == made_from:
            return
    if os.path.exists(folder) and os.listdir(folder):
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


def write_rows(folder, documents, meta):
    """Write the documents, and count in meta; returns {token: how often it is scored in val}."""
    encode, decode = load_tokenizer(meta["tokenizer"])
    length, counts = meta.get("row_length"), Counter()
    bar = progress(desc="writing", unit=" tokens")
    for n, (part, document) in enumerate(documents, 1):
        question, answer = document if length else ("", document)
        row, scored = make_row(meta, encode, decode, question, answer)
        # All validation problems stay as texts, for the judge of any model.
        if length and part == "val":
            with open(f"{folder}/val.jsonl", "a") as file:
                print(json.dumps(dict(question=question, answer=answer)), file=file)
        if length and len(row) > length:
            meta[f"{part}_dropped"] += 1
            continue
        with open(f"{folder}/{part}.bin", "ab") as file:
            np.array(row, meta["dtype"]).tofile(file)
        if part == "val":
            meta["val_bytes"] += len(answer.encode())
            counts.update(scored)
        bar.set_postfix(documents=n, refresh=False)
        bar.update(len(row))
    bar.close()
    return counts


def write_dataset(folder, documents, meta):
    """Write all files, and complete meta."""
    size = meta["tokenizer"]["vocab_size"]
    meta |= dict(vocab_size=size, dtype="uint16" if size <= 1 << 16 else "uint32", val_bytes=0)
    counts = write_rows(folder, documents, meta)
    if not os.path.exists(f"{folder}/train.bin") or not meta["val_bytes"]:
        raise UserError("too short: a part is empty; problems may need a larger --seq_len")
    # What makes bits per byte of nats per token, and the entropy, which a model has to beat.
    meta["bytes_per_token"] = meta["val_bytes"] / counts.total()
    p = np.array([*counts.values()]) / counts.total()
    meta["unigram_nats"] = -(p * np.log(p)).sum()
    Path(folder, "meta.json").write_text(json.dumps(meta))


# ---------------------------------------------------------------------------------------------
# The command line of all scripts: a flag is a field of a dataclass

OPTIONAL = "datasets huggingface_hub safetensors tiktoken tokenizers transformers"


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
    behind a field is its help, a Literal names its choices, the type of its default says how to
    read it. defaults: beat the fields' own. Raises UserError."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, formatter_class=layout, allow_abbrev=False
    )

    def error(message):
        raise UserError(f"{message} (--help lists the flags)")

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

    def true_or_false(text):
        return bool(["false", "true"].index(text.lower()))  # ValueError for other words

    def comma_separated(text):
        kind = type(default[0]) if default else float
        return tuple(map(kind, text.split(",")))

    return {bool: true_or_false, tuple: comma_separated}.get(type(default), type(default))


def from_values(settings, values):
    """A dataclass from a dict that may hold more than its fields."""
    return settings(**{f.name: values[f.name] for f in fields(settings) if f.name in values})


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
USUAL = {"math": "bpe:512", "fineweb": "gpt2", "openwebtext": "gpt2", "tinygsm": "gpt2"}


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
        check_at_least(self, 0, "documents")


def prepare(source, data_dir="data", **settings):
    """Make data_dir/source, or data_dir/name, and print its figures; returns its meta. Raises
    UserError, OSError, or ModuleNotFoundError for an optional package."""
    s = Settings(source, data_dir=data_dir, **settings)
    folder, made_from = f"{data_dir}/{s.name or source}", s.input or source
    check_folder(folder, made_from)

    # Tokens are learned from the first documents (for char from all, for gpt2 from none); tee keeps
    # these in memory, to be written, too.
    documents = itertools.islice(SOURCES[source](s), s.documents or None)
    documents, first = itertools.tee(documents)
    texts = ("".join(document) for _, document in progress(first, desc="reading"))
    kind = USUAL.get(source, "bpe:1024") if s.tokenizer == "auto" else s.tokenizer
    meta = {"tokenizer": make_tokenizer(kind, texts), "made_from": made_from}
    del first, texts  # or all that follow would be kept, too
    if source in ("math", "problems", "tinygsm"):
        meta |= dict(row_length=s.seq_len, train_dropped=0, val_dropped=0)
    with new_folder(folder) as temporary:
        write_dataset(temporary, documents, meta)

    train, val, _ = open_data(folder)
    print(f"{folder}: {len(train):,} tokens for training, {len(val):,} for validation")
    for name, value in meta.items():
        if name != "tokenizer":
            print(f"{name:>20}: {value}")
    return meta


def main():
    prepare(**parse_flags(__doc__, Settings, positional="source"))


if __name__ == "__main__":
    run_script(main)
