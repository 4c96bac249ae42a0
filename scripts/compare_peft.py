"""Fine-tune with Hugging Face transformers and peft as jaxlm does, to compare what is learned.

    pip install -e ".[bench]"
    python scripts/compare_peft.py --model FOLDER --data FOLDER --seeds 5 --out peft.jsonl

Plain PyTorch, with jaxlm's hyper-parameters, head, schedule, weight decay, very batches and choice
of the best of some evaluations. Each line of the output is one run, its ``seconds`` those of
training and of these evaluations; runs that it holds already are skipped. The data folder holds
``sst2/{train,dev,test}.tsv`` (a sentence, a tab, a label; no header) and
``wnut17/{wnut17train.conll,emerging.dev.conll,emerging.test.annotated}``.
"""
# pyright: reportMissingImports=false

import argparse
import json
import math
import statistics
import sys
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

try:
    import peft
    import torch
    import transformers
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed: pip install -e '.[bench]'")
except ImportError as error:
    sys.exit(f"error: {error}; install releases that fit each other: pip install -e '.[bench]'")

from jaxlm.data.labelled.batches import make_buckets, train_batches
from jaxlm.data.labelled.examples import Examples
from jaxlm.errors import InputError, report_input_errors
from jaxlm.evaluate.tagging import read_entities
from jaxlm.train.progress import Progress

FILES = {
    "sst2": ("train.tsv", "dev.tsv", "test.tsv"),
    "wnut17": ("wnut17train.conll", "emerging.dev.conll", "emerging.test.annotated"),
}
IGNORED = -100  # the label that transformers leaves out of the loss


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyper-parameters; those without a flag are jaxlm's defaults."""

    epochs: float
    peak_lr: float
    batch_size: int = 32
    max_length: int = 128
    rank: int = 8
    alpha: int = 16
    dropout_rate: float = 0.1
    warmup_share: float = 0.06
    b1: float = 0.9
    b2: float = 0.98
    epsilon: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    num_evals: int = 10
    limit: int | None = None

    def lr(self, share: float) -> float:
        """The learning rate when that share of the run is done: a linear rise and fall."""
        fall = (share - self.warmup_share) / (1 - self.warmup_share)
        return self.peak_lr * min(1.0, share / self.warmup_share) * (1 - max(0.0, fall))


RECIPES = {
    ("sst2", "lora"): Recipe(epochs=5, peak_lr=1e-3),
    ("sst2", "full"): Recipe(epochs=3, peak_lr=5e-5),
    ("wnut17", "lora"): Recipe(epochs=10, peak_lr=1e-3),
    ("wnut17", "full"): Recipe(epochs=6, peak_lr=1e-4),
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """Words with a tag each, or a sentence with one label; and its tokens."""

    words: list[str]
    labels: list[str]
    tokens: list[int]
    firsts: dict[int, int]
    """By word, where its first subword is, if it was not cut off; a sentence's label is at 0."""


def read(task: str, path: Path) -> list[tuple[list[str], list[str]]]:
    """Texts, as a list of words or of one sentence, and labels."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; see the head of this script for --data")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    examples, words, labels = [], [], []
    for number, line in enumerate([*lines, ""], start=1):
        if line.strip():
            word, _, label = (part.strip() for part in line.rpartition("\t"))
            if not (word and label):
                raise InputError(f"{path}:{number} is no text, a tab and a label: {line!r}")
            words.append(word)
            labels.append(label)
        if words and (task == "sst2" or not line.strip()):
            examples.append((words, labels))
            words, labels = [], []
    if not examples:
        raise InputError(f"{path} holds no examples")
    return examples


def encode(
    tokenizer: transformers.PreTrainedTokenizerBase,
    task: str,
    rows: list[tuple[list[str], list[str]]],
    max_length: int,
) -> list[Example]:
    """Rows of at most ``max_length`` tokens."""
    examples = []
    for words, labels in rows:
        text, split = (words[0], False) if task == "sst2" else (words, True)
        encoding = tokenizer(
            text, is_split_into_words=split, truncation=True, max_length=max_length
        )
        owners = [0] if task == "sst2" else encoding.word_ids()
        firsts = {i: owners.index(i) for i in range(len(words)) if i in owners}
        examples.append(
            Example(words=words, labels=labels, tokens=encoding["input_ids"], firsts=firsts)
        )
    return examples


def without_duplicates(train: list[Example], held_out: list[Example]) -> list[Example]:
    """The training examples whose text, but for case and white space, is not held out."""

    def content(example: Example) -> str:
        text = unicodedata.normalize("NFKC", " ".join(example.words))
        return " ".join(text.casefold().split())

    seen = {content(example) for example in held_out}
    return [example for example in train if content(example) not in seen]


def make_batches(
    train: list[Example], held_out: list[Example], recipe: Recipe, seed: int
) -> Iterator[list[Example]]:
    """The very batches, in the very order, that jaxlm makes of a seed."""
    rows = [
        {"tokens": np.array(example.tokens), "number": np.array(number)}
        for number, example in enumerate(train)
    ]
    examples = Examples(
        rows=rows,
        along_length=frozenset({"tokens"}),
        pad=0,
        untruncated=np.array([len(example.tokens) for example in train], np.int32),
    )
    lengths = np.array([len(example.tokens) for example in [*train, *held_out]])
    buckets = make_buckets(lengths, max_length=recipe.max_length)
    for batch in train_batches(examples, recipe.batch_size, buckets, seed=seed):
        yield [train[number] for number in batch["number"]]


def collate(
    task: str, batch: list[Example], names: list[str], device: str | torch.device
) -> dict[str, torch.Tensor]:
    """Padded to the longest row; with labels where ``names`` has any."""
    length = max(len(example.tokens) for example in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.long)
    attention_mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORED)
    for row, example in enumerate(batch):
        tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        attention_mask[row, : len(example.tokens)] = 1
        for word, first in example.firsts.items() if names else ():
            labels[row, first] = names.index(example.labels[word])
    inputs = {"input_ids": tokens, "attention_mask": attention_mask}
    if names:
        inputs["labels"] = labels[:, 0] if task == "sst2" else labels
    return {name: values.to(device) for name, values in inputs.items()}


def make_model(
    task: str, tuning: str, folder: Path, names: list[str], recipe: Recipe
) -> torch.nn.Module:
    """A published encoder with its pooler, and a new last layer."""
    kind = {
        "sst2": transformers.AutoModelForSequenceClassification,
        "wnut17": transformers.AutoModelForTokenClassification,
    }[task]
    model = kind.from_pretrained(
        folder,
        num_labels=len(names),
        hidden_dropout_prob=recipe.dropout_rate,
        attention_probs_dropout_prob=recipe.dropout_rate,
        classifier_dropout=recipe.dropout_rate,
    )
    if tuning == "full":
        return model
    adapters = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules=["query", "value"],
        modules_to_save=["pooler", "classifier"] if task == "sst2" else ["classifier"],
    )
    return peft.get_peft_model(model, adapters)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Whatever transformers has to say of the model's folder is one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"--model {folder} cannot be read: {reason}") from error


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module, task: str, examples: list[Example], names: list[str], batch_size: int
) -> float:
    """Accuracy, or the F1 of entities."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
    predicted: dict[int, list[str]] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        device = next(model.parameters()).device
        logits = model(**collate(task, [examples[i] for i in numbers], [], device)).logits
        best = logits.argmax(-1).reshape(len(numbers), -1).tolist()
        for i, row in zip(numbers, best, strict=True):
            firsts = examples[i].firsts
            words = range(len(examples[i].words))
            predicted[i] = [names[row[firsts[w]]] if w in firsts else "O" for w in words]
    model.train()
    pairs = [(example.labels, predicted[i]) for i, example in enumerate(examples)]
    if task == "sst2":
        return statistics.mean(gold == guess for gold, guess in pairs)
    entities = [(set(read_entities(gold)), set(read_entities(guess))) for gold, guess in pairs]
    right = sum(len(gold & guess) for gold, guess in entities)
    return 2 * right / max(1, sum(len(gold) + len(guess) for gold, guess in entities))


def run(
    task: str,
    tuning: str,
    seed: int,
    recipe: Recipe,
    folder: Path,
    data: Path,
    device: str,
) -> dict[str, float | int]:
    """Train; what the best evaluation by the development data was, and that model's on the test."""
    parts = [read(task, data / task / name)[: recipe.limit] for name in FILES[task]]
    with reading(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    train, dev, test = (encode(tokenizer, task, part, recipe.max_length) for part in parts)
    train = without_duplicates(train, dev)
    if not train:
        raise InputError(f"{data / task}: every training text is among the development data")
    names = sorted({label for example in train for label in example.labels})
    torch.manual_seed(seed)
    with reading(folder):
        model = make_model(task, tuning, folder, names, recipe).to(device).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=recipe.peak_lr, betas=(recipe.b1, recipe.b2), eps=recipe.epsilon
    )
    steps = math.ceil(recipe.epochs * len(train) / recipe.batch_size)
    best, last, kept, start = -1.0, 0.0, [], time.perf_counter()
    batches = make_batches(train, dev, recipe, seed)
    with Progress(steps) as progress:
        for step, batch in enumerate(islice(batches, steps)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr((step + 0.5) / steps)
            model(**collate(task, batch, names, device)).loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, recipe.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) * recipe.num_evals // steps > step * recipe.num_evals // steps:
                last = evaluate(model, task, dev, names, recipe.batch_size)
                if last > best:
                    best, kept = last, [p.detach().clone() for p in learning]
                progress.update(step + 1, (step + 1) / steps, {})
    seconds = time.perf_counter() - start
    for parameter, value in zip(learning, kept, strict=True):
        parameter.data = value
    return {
        "dev": best,
        "dev_last": last,
        "test": evaluate(model, task, test, names, recipe.batch_size),
        "seconds": seconds,
        "steps": steps,
        "trained": sum(p.numel() for p in learning),
    }


def main() -> None:
    """Run what the output lacks, then print means and standard deviations."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="in Hugging Face's layout")
    parser.add_argument("--data", type=Path, required=True, help="with folders sst2 and wnut17")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, added to")
    parser.add_argument("--tasks", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--tunings", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--epochs", type=float, help="instead of the recipes' own")
    parser.add_argument("--peak-lr", type=float, help="instead of the recipes' own")
    parser.add_argument("--limit", type=int, help="use so many examples of each part, for a trial")
    options = parser.parse_args()
    for name in ("seeds", "epochs", "peak_lr", "limit"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value} is not a number above 0")
    if options.first_seed < 0:
        raise InputError(f"--first-seed {options.first_seed} is less than 0")
    if not (options.model / "config.json").is_file():
        raise InputError(f"--model {options.model}: no config.json is in it")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"--device {device} cannot be used: {reason}") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = read_rows(options.out)
    results = defaultdict(list)
    for task in dict.fromkeys(options.tasks):
        for tuning in dict.fromkeys(options.tunings):
            given = {"epochs": options.epochs, "peak_lr": options.peak_lr, "limit": options.limit}
            changes = {name: value for name, value in given.items() if value is not None}
            recipe = replace(RECIPES[task, tuning], **changes)
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                what = {"task": task, "tuning": tuning, "seed": seed, **asdict(recipe)}
                what |= {"model": str(options.model), "data": str(options.data)}
                what["device"] = device
                row = next((row for row in rows if what.items() <= row.items()), None)
                if row is None:
                    row = what | run(
                        task, tuning, seed, recipe, options.model, options.data, device
                    )
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(f"{task} {tuning} seed {seed}: {_metrics([row])}", flush=True)
                results[task, tuning].append(row)
    for (task, tuning), runs in results.items():
        print(f"{task} {tuning}, {len(runs)} seeds: {_metrics(runs)}")


def read_rows(path: Path) -> list[dict]:
    """What was run before; raises now where nothing could be added."""
    try:
        path.open("a").close()
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            _metrics([row])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}:{number} is no result of a run: remove that line") from error
        rows.append(row)
    return rows


def _metrics(rows: list[dict]) -> str:
    parts = []
    for name in ("dev", "test", "seconds"):
        values = [row[name] for row in rows]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        parts.append(f"{name} {statistics.mean(values):.4f}{spread}")
    return ", ".join(parts)


if __name__ == "__main__":
    with report_input_errors():
        main()
