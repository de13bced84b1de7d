"""Text or problems -> data/NAME/{train.bin, val.bin, meta.json}, for train.py.

    python prepare_data.py                  # pydocs: the documentation inside your Python
    python prepare_data.py alldocs          # eight times that: the packages that torch brings too
    python prepare_data.py math             # word problems; --difficulty=2, 3 or 4 operations
    python prepare_data.py shakespeare      # downloads 1.1 MB
    python prepare_data.py text --input=book.txt --tokenizer=bpe:1024   # or char, gpt2
    python prepare_data.py problems --input=train.jsonl --test=test.jsonl   # GSM8K's form, or yours
    python prepare_data.py tinygsm          # needs the package datasets, disk and hours
    python prepare_data.py openwebtext      # likewise

The first three need no network; --tokenizer=gpt2 does once, or its files in TIKTOKEN_CACHE_DIR. A
file of problems has one JSON object per line, with "question" and "answer".

The .bin files are bare uint16 token ids (numpy.memmap opens them). meta.json says how to decode
them, and what a model has to beat: the unigram entropy. Problems are rows of --seq_len tokens: the
question, an end token, the answer, an end token, and more end tokens.
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
from collections import Counter
from dataclasses import dataclass

import numpy as np

END = "<|endoftext|>"  # follows every document
SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)

# ---------------------------------------------------------------------------------------------
# Sources. Each yields (part, document); a part is train or val, a document a text or a problem


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


PACKAGES = ["torch", "sympy", "networkx", "numpy", "mpmath", "jinja2", "fsspec"]


def pydocs(packages=()):
    """What every CPython carries: the help topics, then the docstrings of the standard library;
    then those of the packages, where they are installed."""
    from pydoc_data.topics import topics

    documents = [topics[name] for name in sorted(topics)]
    documents += documentation(sysconfig.get_path("stdlib"))
    for spec in map(importlib.util.find_spec, packages):
        documents += documentation(os.path.dirname(spec.origin)) if spec else []
    return dict.fromkeys(documents)  # without repetitions


def shakespeare():
    """Tiny Shakespeare. Where there is no network, get the file otherwise: `text --input=FILE`."""
    return urllib.request.urlopen(SHAKESPEARE, timeout=60).read().decode()


def read_text(path):
    if not path:
        raise ValueError("needs --input=FILE, and for problems --test=FILE too")
    with open(path, encoding="utf-8") as file:
        return file.read()


def part_of(thing):
    """val for a tenth of all things, else train: by a hash, so neighbors fall on both sides."""
    return "val" if hashlib.sha256(str(thing).encode()).digest()[0] < 26 else "train"


def split(documents):
    """Many documents: one in ten is for validation."""
    for i, document in enumerate(documents):
        yield part_of(i), document


def stream(name, *columns):
    """The rows of a dataset on the Hugging Face hub, while they are downloaded."""
    from datasets import load_dataset

    rows = load_dataset(name, split="train", streaming=True)
    return split(tuple(row[column] for column in columns) for row in rows)


def cut(text):
    """A single document: its last tenth is for validation."""
    end = len(text) * 9 // 10
    return [("train", text[:end]), ("val", text[end:])]


# ---------------------------------------------------------------------------------------------
# Problems: (question, answer) pairs. The answer is a Python function, or ends in "#### 18".


def read_problems(part, path):
    """The problems of a file with a JSON object a line."""
    for number, line in enumerate(read_text(path).strip().split("\n"), 1):
        try:
            problem = json.loads(line)
            yield part, (str(problem["question"]), str(problem["answer"]))
        except (ValueError, TypeError, KeyError):
            need = 'a JSON object with "question" and "answer"'
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
    while parts:
        wording = draw_wording(rng, operations)
        if part_of(wording) != parts[-1]:
            continue
        question, program = fill_in(wording, rng)
        numbers = re.findall(r"\d+", question)[:2]
        quantities = [x for _, x in read_program(ast.parse(program).body)]
        whole = all(x > 0 and x == int(x) for x in quantities)
        if whole and part_of(numbers) == parts[-1]:
            yield parts.pop(), (question, program)


# ---------------------------------------------------------------------------------------------
# Answers. Their programs are not to be trusted, and none is executed: we read them, and know only
# arithmetic. There are no objects, lists, branches or loops to abuse.

LONGEST, LARGEST = 2_000, 1e30  # characters of a program; a number in it
FUNCTIONS = {
    "Add": operator.add,  # the operators have their names in ast
    "Sub": operator.sub,
    "Mult": operator.mul,
    "Div": operator.truediv,
    "FloorDiv": operator.floordiv,
    "Mod": operator.mod,
    "Pow": operator.pow,
    "abs": abs,
    "min": min,
    "max": max,
    "int": int,
    "float": float,
    "round": lambda x, digits=0: round(x, int(digits)),
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.sqrt": math.sqrt,
}


def read_expression(node, variables):
    """The number that an expression stands for: always a float, so none grows long and no power
    takes time. Raises some Exception for anything but arithmetic."""
    match node:
        case ast.Constant(number) if type(number) in (int, float):
            return float(number)
        case ast.Name(name):
            return variables[name]
        case ast.UnaryOp(ast.USub(), operand):
            return -read_expression(operand, variables)
        case ast.BinOp(left, op, right):
            function, operands = type(op).__name__, [left, right]
        case ast.Call(called, operands, []):
            function = ast.unparse(called)
        case _:
            raise ValueError(node)
    numbers = [read_expression(operand, variables) for operand in operands]
    return float(FUNCTIONS[function](*numbers))


def read_program(statements):
    """Obey statements one by one; yields (variable, its new number), and ("return", number).

    Raises some Exception for anything but assignments of arithmetic."""
    variables = {}
    for statement in statements:
        match statement:
            case ast.FunctionDef("simple_math_problem", ast.arguments([], []), body):
                yield from read_program(body)
                continue
            case ast.Import([ast.alias("math", None)]) | ast.Expr(ast.Constant(str())):
                continue
            case ast.Assign([ast.Name(name)], expression):
                pass
            case ast.AugAssign(ast.Name(name) as target, op, change):
                expression = ast.BinOp(target, op, change)
            case ast.Return(expression):
                name = "return"
            case _:
                raise ValueError(statement)
        variables[name] = number = read_expression(expression, variables)
        if not abs(number) <= LARGEST:
            raise ValueError(number)
        yield name, number


def solve(text):
    """The value of an answer, a float; None if it has none.

    An answer is a number after "####", as in GSM8K, or a program. Whatever a text says, reading
    it takes milliseconds and touches nothing."""
    number = re.search(r"####\s*\$?(-?\d[\d,]{0,30}(\.\d+)?)", text)
    if number:
        return float(number[1].replace(",", ""))
    try:
        steps = read_program(ast.parse(text if len(text) <= LONGEST else "").body)
        return next(number for name, number in steps if name == "return")
    except Exception:  # wrong syntax, unknown, too deep, too large: no answer
        return None


def is_right(text, reference):
    """Whether an answer has the value of the reference."""
    values = solve(text), solve(reference)
    return None not in values and math.isclose(*values, rel_tol=1e-6, abs_tol=1e-6)


def is_question(rows, end):
    """Where rows (N, L) of tokens, torch or numpy, hold the question, its end token included."""
    ends = rows == end
    return ends.cumsum(1) <= ends


# ---------------------------------------------------------------------------------------------
# Tokenizers: a dict in meta.json describes each

# GPT-2's way to cut text into words, which no token crosses, but digits stand alone
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def learn_bpe(text, vocab_size):
    """Byte-pair encoding (arXiv 1508.07909): the tokens, as bytes, in the order of their ids.

    The 256 bytes come first; then, over and over, the pair of neighbors that is most frequent
    inside words becomes a token. Raises ValueError for a text without enough pairs."""
    import regex  # comes with tiktoken

    counts = Counter(regex.findall(WORDS, text))
    occurrences = np.array([*counts.values(), 0])
    # All different words as one string. A character of it is a token; between words stands byte
    # 255, which no text has.
    words = b"\xff".join(word.encode() for word in counts).decode("latin-1")
    tokens = [bytes([i]) for i in range(256)]
    while len(tokens) < vocab_size:
        ids = np.array([words]).view(np.uint32).astype(np.int64)
        between = ids == 255
        weight = occurrences[between.cumsum()] * ~between
        pairs = ids[:-1] * len(tokens) + ids[1:]
        frequency = np.bincount(pairs, weight[:-1] * ~between[1:], minlength=1)
        if frequency.max() < 2:
            raise ValueError(f"the text is too small: it yields only {len(tokens)} tokens")
        a, b = divmod(int(frequency.argmax()), len(tokens))
        words = words.replace(chr(a) + chr(b), chr(len(tokens)))
        tokens.append(tokens[a] + tokens[b])
    return tokens


def make_tokenizer(kind, text):
    """The description of a tokenizer. kind: bpe:SIZE or char, learned from the text; or gpt2.
    Raises ValueError."""
    if kind == "gpt2":
        return {"kind": "gpt2", "vocab_size": 50257, "end": 50256}
    if kind == "char":
        tokens = [char.encode() for char in sorted(set(text))]
    else:
        size = re.fullmatch(r"bpe:(\d+)", kind)
        if not size or not 257 <= int(size[1]) <= 16384:
            kinds = "char, gpt2 or bpe:SIZE with SIZE from 257 to 16384"
            raise ValueError(f"tokenizer must be {kinds}, not {kind}")
        tokens = learn_bpe(text, int(size[1]) - 1)
    end = len(tokens)
    tokens = [token.hex() for token in tokens]
    return {"kind": kind, "tokens": tokens, "vocab_size": end + 1, "end": end}


def load_tokenizer(description):
    """(encode: str -> ids, decode: ids -> str). encode raises ValueError for what it cannot say;
    decode drops ids that are not in the vocabulary, such as a mask."""
    import tiktoken

    kind = description["kind"]
    if kind == "gpt2":
        encoding = tiktoken.get_encoding("gpt2")
    else:
        ranks = {bytes.fromhex(token): i for i, token in enumerate(description["tokens"])}
        encoding = tiktoken.Encoding(
            "blockgen",
            pat_str="(?s)." if kind == "char" else WORDS,
            mergeable_ranks=ranks,
            special_tokens={END: description["end"]},
        )

    def encode(text):
        for char in set(text) if kind == "char" else ():
            if char.encode() not in ranks:
                raise ValueError(f"the vocabulary has no {char!r}")
        return encoding.encode_ordinary(text)

    def decode(tokens):
        return encoding.decode([i for i in tokens if i < encoding.n_vocab])

    return encode, decode


def check_tokenizer(ours, theirs):
    """Raises ValueError if the metas of a model and of data have different tokenizers."""
    if ours["tokenizer"].get("tokens") != theirs["tokenizer"].get("tokens"):
        raise ValueError("the data have another tokenizer than the model: were they remade?")


# ---------------------------------------------------------------------------------------------
# Writing


@contextlib.contextmanager
def new_folder(folder):
    """A temporary folder that takes the name `folder` if, and only if, nothing goes wrong. Raises
    ValueError rather than replace what is no dataset."""
    if os.path.isdir(folder) and not os.path.exists(f"{folder}/meta.json"):
        raise ValueError(f"{folder} exists and is no dataset: choose another --data_dir")
    temporary = f"{folder}.{os.getpid()}.tmp"
    os.makedirs(temporary)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_dataset(folder, documents, meta):
    """Write the documents as they come, then meta.json; returns the completed meta.

    After each text stands an end token. Problems become rows of meta["row_length"] tokens:
    question, end, answer, end, and more ends. So the first end token is the end of the question.
    Longer rows are dropped and counted.

    bytes_per_token and unigram_nats are those of the validation part, but not of questions."""
    encode, _ = load_tokenizer(meta["tokenizer"])
    size, end = meta["tokenizer"]["vocab_size"], meta["tokenizer"]["end"]
    meta.update(vocab_size=size, train_tokens=0, val_tokens=0)
    n_bytes, counts = 0, np.zeros(size, np.int64)
    with new_folder(folder) as temporary:
        for part, document in documents:
            texts = [document] if isinstance(document, str) else document
            encoded = [encode(text) + [end] for text in texts]
            row = sum(encoded, [])
            length = meta.get("row_length", len(row))
            if len(row) > length:
                meta["dropped"] += 1
                continue
            with open(f"{temporary}/{part}.bin", "ab") as file:
                np.array(row + [end] * (length - len(row)), np.uint16).tofile(file)
            meta[f"{part}_tokens"] += length
            if part == "val":
                n_bytes += len(texts[-1].encode())
                counts += np.bincount(encoded[-1], minlength=size)
        if not meta["train_tokens"] or not n_bytes:
            raise ValueError("too short: a part is empty; problems may need a larger --seq_len")
        meta["bytes_per_token"] = n_bytes / counts.sum()
        p = counts[counts > 0] / counts.sum()
        meta["unigram_nats"] = -(p * np.log(p)).sum()  # their entropy
        with open(f"{temporary}/meta.json", "w") as file:
            json.dump(meta, file)
    return meta


def open_data(folder):
    """(train, val, meta): memory-mapped tokens. Raises ValueError if some are missing."""
    tokens = []
    try:
        with open(f"{folder}/meta.json") as file:
            meta = json.load(file)
        for part in ("train", "val"):
            length = meta[f"{part}_tokens"]
            tokens.append(np.memmap(f"{folder}/{part}.bin", np.uint16, "r", shape=length))
    except (FileNotFoundError, KeyError, ValueError) as error:
        problem = f"{folder} is missing or damaged ({error})"
        raise ValueError(f"{problem}: python prepare_data.py makes a dataset") from None
    return *tokens, meta


# ---------------------------------------------------------------------------------------------
# The command line of all scripts: a flag is a field of a dataclass, its help the comment after it


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
        if isinstance(error, ModuleNotFoundError):
            message += f" (pip install {error.name.split('.')[0]})"
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
        sys.exit(2)


@functools.cache
def comments(settings):
    """{field: the comment after it} of a dataclass, for the fields that have one."""
    source = inspect.getsource(settings)
    return dict(re.findall(r"^ +(\w+): .*?  # (.+)$", source, re.MULTILINE))


def parse_flags(description, *classes, argv=None, defaults={}, positional=None):
    """{name: value} of flags for the commented fields of dataclasses. defaults: beat the fields'
    own. Raises ValueError."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def error(message):
        raise ValueError(f"{message} (--help lists the flags)")

    parser.error = error
    for settings in classes:
        for name, comment in comments(settings).items():
            own = getattr(settings, name)
            default = defaults.get(name, own)
            shown = ",".join(map(str, default)) if isinstance(own, tuple) else default
            text = f"{comment} (default: {shown})".replace("%", "%%")
            options = dict(help=text, type=reader(own), default=default)
            if isinstance(own, bool) or name == positional:
                options |= dict(nargs="?", const=True)  # --NAME is --NAME=true
            parser.add_argument(name if name == positional else f"--{name}", **options)
    return vars(parser.parse_args(argv))


def reader(default):
    """What makes a flag's text a value like the default: the type argument of argparse."""

    def boolean(text):
        return bool(["false", "true"].index(text.lower()))

    def comma_separated(text):
        read = reader(default[0] if default else 0.0)
        return [read(part) for part in text.split(",")]

    return {bool: boolean, tuple: comma_separated}.get(type(default), type(default))


def from_values(settings, values):
    """A dataclass from a dict that may hold more than its fields."""
    return settings(**{name: values[name] for name in comments(settings)})


def check_settings(settings):
    """Raise ValueError where a field breaks what the comment after it says: at least, at most, or
    a | b for a choice. Of a tuple or list that is said of each element."""
    for name, comment in comments(type(settings)).items():
        value = getattr(settings, name)
        choices = re.search(r"\w+( \| \w+)+", comment)
        wrong = choices and value not in choices[0].split(" | ")
        for x in np.ravel(value):
            for bound, limit in re.findall(r"at (least|most) (-?\d[\d.e-]*)", comment):
                within = x >= float(limit) if bound == "least" else x <= float(limit)
                wrong = wrong or not within
        if wrong:
            raise ValueError(f"{name} is {value}, but: {comment}")


# ---------------------------------------------------------------------------------------------
# This script's own

SOURCES = {
    "pydocs": lambda s: split(pydocs()),
    "alldocs": lambda s: split(pydocs(PACKAGES)),
    "shakespeare": lambda s: cut(shakespeare()),
    "text": lambda s: cut(read_text(s.input)),
    "openwebtext": lambda s: stream("Skylion007/openwebtext", "text"),
    "math": lambda s: math_problems(s.difficulty, s.problems, s.seed),
    "problems": lambda s: [*read_problems("train", s.input), *read_problems("val", s.test)],
    "tinygsm": lambda s: stream("TinyGSM/TinyGSM", "question", "code"),
}
SAMPLE = 100_000
TOKENIZERS = {"math": "bpe:512", "tinygsm": "gpt2", "openwebtext": "gpt2"}


@dataclass
class Settings:
    name: str = "pydocs"  # the dataset, see above
    data_dir: str = "data"  # it becomes a folder in here
    input: str = ""  # text, problems: the file to read
    test: str = ""  # problems: the file with those for validation
    tokenizer: str = "auto"  # bpe:SIZE, char or gpt2; auto: what suits the data
    difficulty: int = 2  # math: operations in a problem, at least 2, at most 4
    problems: int = 20_000  # math: how many for training, at least 20
    seq_len: int = 128  # math, problems, tinygsm: tokens in a row, at least 4
    seed: int = 0  # math: of everything random, at least 0

    def __post_init__(self):
        check_settings(self)
        if self.name not in SOURCES:
            raise ValueError(f"there is no dataset {self.name} (--help lists them)")


def prepare(name, data_dir="data", **settings):
    """Make data_dir/name; returns its meta. Raises ValueError, OSError or ImportError."""
    s = Settings(name, data_dir, **settings)
    documents = iter(SOURCES[name](s))
    sample = list(itertools.islice(documents, SAMPLE))  # enough to learn tokens from
    kind = TOKENIZERS.get(s.name, "bpe:1024") if s.tokenizer == "auto" else s.tokenizer
    meta = {"tokenizer": make_tokenizer(kind, "".join("".join(text) for _, text in sample))}
    if s.name in ("math", "problems", "tinygsm"):
        meta.update(row_length=s.seq_len, dropped=0)
    documents = itertools.chain(sample, documents)
    return write_dataset(f"{data_dir}/{name}", documents, meta)


def main():
    values = parse_flags(__doc__, Settings, positional="name")
    meta = prepare(**values)
    print(f"{values['data_dir']}/{values['name']}")
    for name, value in meta.items():
        if isinstance(value, (int, float)):
            print(f"{name:>16}: {round(value, 3):,}")


if __name__ == "__main__":
    run_script(main)
