"""Tokens, in an order that depends on the seed alone, never on the layout.

A corpus is one long row of token ids, cut into windows of seq_len + 1 tokens that start seq_len apart: the last token
of a window is the first of the next, so that each token is predicted once. The run reads sequence 0, 1, 2, ...: row r
of the global batch of step s is sequence n = s · global_batch + r, which is, in epoch n // n_sequences, the window that
a keyed shuffle gives for n mod n_sequences. Nothing else is remembered: any rank can make any row of any batch, and a
run is resumed by its step number.

numpy only, so that `lab check` can open a corpus without waiting for torch.
"""

import glob
import hashlib
import os
import platform
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel.recipe import Data, RecipeError

SYNTHETIC_SEQUENCES = 2**62  # more than any run reads: steps · global_batch is at most 2^57
FEISTEL_ROUNDS = 8

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}  # `datasets`' names
# Names under which tokenizer.json files hold the end of a document (GPT-2, Llama 3, Llama 2, Gemma).
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Sequences of tokens by number; `open_corpus` makes one."""

    n_sequences: int  # windows in one epoch
    description: str  # source, number of tokens, files and a fingerprint of the content, in one line
    seq_len: int
    seed: int
    window: Callable[[int], np.ndarray]  # number of a window -> its seq_len + 1 token ids

    def sequences(self, *, step: int, global_batch: int, rows: range) -> np.ndarray:
        """Rows `rows` of the global batch of `step` (0-based), as int64 (len(rows), seq_len + 1).

        Inputs are [:, :-1] and targets [:, 1:]. Raises RecipeError where a token id is outside the vocabulary.
        """
        assert step >= 0 and all(0 <= row < global_batch for row in (*rows[:1], *rows[-1:])), (step, rows)
        epochs, positions = np.divmod(step * global_batch + np.array(rows, np.int64), self.n_sequences)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):  # a batch may end one epoch and begin the next
            windows[epochs == epoch] = shuffle(
                positions[epochs == epoch], size=self.n_sequences, seed=self.seed, epoch=int(epoch)
            )
        tokens = np.empty((len(rows), self.seq_len + 1), np.int64)
        for row, window in enumerate(windows.tolist()):
            tokens[row] = self.window(window)
        return tokens


def open_corpus(data: Data, *, seq_len: int, vocab_size: int, seed: int) -> Corpus:
    """The corpus that [data] names, in windows of seq_len + 1 tokens, shuffled by `seed`.

    Text is held in memory; a file of token ids is memory-mapped, whatever its size. Raises RecipeError where the source
    is missing, unreadable, shorter than one window, or holds ids that are not below vocab_size. Of a large file
    only a sample is checked here; the rest as it is read.
    """
    if data.source == "synthetic":
        return Corpus(
            n_sequences=SYNTHETIC_SEQUENCES,
            description=f"synthetic: random tokens below {vocab_size}, seed {seed}",
            seq_len=seq_len,
            seed=seed,
            window=lambda window: synthetic_tokens(window, n_tokens=seq_len + 1, vocab_size=vocab_size, seed=seed),
        )

    if data.source == "huggingface":
        ids, origin = _huggingface(data, vocab_size)
    else:
        ids, origin = {"stdlib": _stdlib, "files": _files, "tokens": _token_file}[data.source](data)
    needed = seq_len + 1
    if len(ids) < needed:
        raise _refused(data, f"holds {len(ids)} tokens, a sequence takes train.seq_len + 1 = {needed}; give more text")

    def tokens(start: int, stop: int) -> np.ndarray:
        part = ids[start:stop]
        worst = int(part.argmax())
        if part[worst] >= vocab_size:
            raise _refused(
                data,
                f"token {start + worst} has the id {part[worst]}, not below model.vocab_size = {vocab_size};"
                " use the vocabulary (and for a token file the data.token_dtype) it was written with",
            )
        return part

    return Corpus(
        n_sequences=(len(ids) - 1) // seq_len,
        description=f"{data.source}: {len(ids):,} tokens from {origin}, fingerprint {_fingerprint(tokens, len(ids))}",
        seq_len=seq_len,
        seed=seed,
        window=lambda window: tokens(window * seq_len, (window + 1) * seq_len + 1),
    )


# ---- order ---------------------------------------------------------------------------------------------------------


def shuffle(positions: np.ndarray, *, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where a shuffle of range(size), keyed by seed and epoch, puts each of `positions`: int64, of the same shape (n,).

    A Feistel network (Luby & Rackoff 1988) permutes all numbers of 2·half_bits bits, whatever its round function: each
    round can be undone. A number that leaves range(size) is sent through again until it comes back (cycle walking,
    Black & Rogaway 2002), at most 4 times on average. No table, so size may be anything up to 2^62.
    """
    half_bits = ((size - 1).bit_length() + 1) // 2 or 1
    mask = 2**half_bits - 1
    round_keys = np.random.Philox(key=[seed, epoch]).random_raw(FEISTEL_ROUNDS)
    numbers = positions.astype(np.uint64)
    outside = np.ones(len(numbers), bool)  # at first: not yet shuffled
    while outside.any():
        left, right = numbers[outside] >> half_bits, numbers[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        numbers[outside] = left << half_bits | right
        outside = numbers >= size
    return numbers.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on each bit of x (uint64): the finaliser of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9
    x = (x ^ x >> 27) * 0x94D049BB133111EB
    return x ^ x >> 31


def synthetic_tokens(window: int, *, n_tokens: int, vocab_size: int, seed: int) -> np.ndarray:
    """(n_tokens,) random ids below vocab_size, from a counter-based generator: no window depends on another.

    Philox (Salmon et al. 2011). Its raw numbers are the same under every numpy; those of `Generator` need not be.
    """
    return np.random.Philox(key=[seed, window]).random_raw(n_tokens) % vocab_size


def _fingerprint(tokens: Callable[[int, int], np.ndarray], n_tokens: int) -> str:
    """12 hex digits that tell one content from another: of all tokens, or of a sample where there are over 2^24."""
    part, parts = 2**20, 16
    all_of_it = range(0, n_tokens, part)
    starts = all_of_it if len(all_of_it) <= parts else np.linspace(0, n_tokens - part, parts).astype(int)
    digest = hashlib.blake2b(str(n_tokens).encode(), digest_size=6)
    for start in starts:
        digest.update(tokens(int(start), int(start) + part).tobytes())
    return digest.hexdigest()


# ---- sources: each gives ids (n_tokens,) and says where they came from ---------------------------------------------


def _stdlib(data: Data) -> tuple[np.ndarray, str]:
    """Every module of the running Python's standard library, as bytes; its tests are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # config-*, _sysconfigdata* and sitecustomize belong to the machine, not to the Python version.
    not_text = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in not_text and not name.startswith("config-")]
        own = [name for name in names if not name.startswith(("_sysconfigdata", "sitecustomize", "usercustomize"))]
        paths += [Path(folder, name) for name in own if name.endswith(".py")]
    if not paths:
        raise _refused(data, f"no .py files in {root}: this Python comes without its source; use data.source = files")
    paths.sort(key=lambda path: path.relative_to(root).as_posix())
    return _text(data, paths), f"{len(paths)} modules of Python {platform.python_version()}"


def _files(data: Data) -> tuple[np.ndarray, str]:
    """Text files, as bytes, each once and in the order of their names, whatever the order of the patterns."""
    found: dict[str, str] = {}  # the file itself -> the first of its names
    names = set()
    for pattern in data.files:
        try:
            matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
            files = [os.path.normpath(name) for name in matches if os.path.isfile(name)]
        except (OSError, ValueError) as error:  # a NUL in a name
            raise _refused(data, f"{pattern!r:.80} cannot be searched ({_brief(error)})") from None
        if not files:
            hint = " (a folder; add /**/*.txt)" if os.path.isdir(pattern) else ""
            raise _refused(data, f"{pattern!r:.80} matches no file{hint}; names are relative to {os.getcwd()}")
        names.update(files)
    for name in sorted(names):
        found.setdefault(os.path.realpath(name), name)
    paths = [Path(name) for name in found.values()]
    return _text(data, paths), f"{len(paths)} files"


def _text(data: Data, paths: Iterable[Path]) -> np.ndarray:
    """The bytes of the files with a newline between them: uint8 (n_bytes,). Any encoding: a byte is a token."""
    parts = []
    for path in paths:
        try:
            parts.append(path.read_bytes())
        except OSError as error:
            raise _refused(data, f"cannot be read ({_brief(error)})") from None
    return np.frombuffer(b"\n".join(parts), np.uint8)


def _token_file(data: Data) -> tuple[np.ndarray, str]:
    """Ids as nanoGPT, Megatron and others write them: little-endian, nothing else in the file."""
    path, dtype = Path(data.path), np.dtype(data.token_dtype).newbyteorder("<")
    if not os.path.isfile(path):
        raise _refused(data, f"is no file; names are relative to {os.getcwd()}")
    n_bytes = path.stat().st_size
    if n_bytes % dtype.itemsize:
        raise _refused(data, f"has {n_bytes} bytes, no multiple of {dtype.itemsize}; check data.token_dtype = {dtype}")
    try:
        return _mapped(path, dtype), f"one {dtype} file"
    except OSError as error:
        raise _refused(data, f"cannot be read ({_brief(error)})") from None


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    # np.asarray: slices of a memmap are slow to make, and those of a plain array stay mapped as well.
    return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.empty(0, dtype)


def _huggingface(data: Data, vocab_size: int) -> tuple[np.ndarray, str]:
    """The documents of a dataset, tokenised, an end-of-text token after each where the tokenizer has one.

    They are tokenised once per machine: the first rank writes the ids into the cache of `datasets` while the others
    wait at a lock, and all map the same file.
    """
    try:
        import datasets
        import filelock
        import tokenizers  # noqa: F401  asked for here, so that what is missing is said once
    except ImportError as error:
        remedy = f"needs `pip install parallel-lab[huggingface]` ({_brief(error)})"
        raise RecipeError("data.source", data.source, remedy) from None
    tokenizer = _tokenizer(data, vocab_size)
    documents = _documents(data)
    ends = [tokenizer.token_to_id(name) for name in END_OF_TEXT]
    end = [id for id in ends if id is not None][:1]

    content = "\n".join([documents._fingerprint, data.text_field, tokenizer.to_str()])
    name = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    path = Path(datasets.config.HF_DATASETS_CACHE, "parallel-lab", f"{name}.uint32")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):
            if not path.exists():
                with open(f"{path}.partial", "wb") as file:
                    for batch in documents.iter(batch_size=1000):
                        texts = [text for text in batch[data.text_field] if text]
                        for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
                            file.write(np.array(encoding.ids + end, "<u4").tobytes())
                os.replace(f"{path}.partial", path)
        return _mapped(path, "<u4"), f"{len(documents)} documents of {data.dataset} ({data.split})"
    except Exception as error:
        raise _refused(data, f"cannot be tokenised into {path.parent} ({_brief(error)})") from None


def _tokenizer(data: Data, vocab_size: int) -> Any:
    """The tokenizers.Tokenizer that data.tokenizer names."""
    from tokenizers import Tokenizer

    try:
        is_file = os.path.isfile(data.tokenizer)
        tokenizer = Tokenizer.from_file(data.tokenizer) if is_file else Tokenizer.from_pretrained(data.tokenizer)
    except Exception as error:  # of any type: what is wrong is the file, the name or the network
        remedy = f"give a tokenizer.json file, or a name while the hub can be reached ({_brief(error)})"
        raise RecipeError("data.tokenizer", data.tokenizer, remedy) from None
    tokenizer.no_truncation()  # which a tokenizer.json may ask for
    tokenizer.no_padding()
    needed = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0) + 1
    if needed > vocab_size:
        remedy = f"has ids up to {needed - 1}; set model.vocab_size = {needed} or more (now {vocab_size})"
        raise RecipeError("data.tokenizer", data.tokenizer, remedy)
    return tokenizer


def _documents(data: Data) -> Any:
    """The datasets.Dataset that data.dataset and data.split name, with a column of text."""
    import datasets

    datasets.disable_progress_bars()  # one per rank
    builder, files = data.dataset, None
    if os.path.isfile(data.dataset):
        builder, files = FILE_FORMATS.get(Path(data.dataset).suffix, ""), data.dataset
        if not builder:
            raise _refused(data, f"is none of {', '.join(FILE_FORMATS)}; convert it to one of these")
    try:
        documents = datasets.load_dataset(builder, data_files=files, split=data.split)
    except Exception as error:  # of any type: what is wrong is the file, the name or the network
        if str(error).startswith(("Unknown split", "Unrecognized instruction")):
            raise RecipeError("data.split", data.split, _brief(error)) from None
        wanted = f"give a file or folder ({', '.join(FILE_FORMATS)}), or a name while the hub can be reached"
        raise _refused(data, f"{wanted} ({_brief(error)})") from None
    types = {name: getattr(feature, "dtype", "") for name, feature in documents.features.items()}
    if types.get(data.text_field) not in ("string", "large_string"):
        raise RecipeError("data.text_field", data.text_field, f"is no column of strings; the columns are {types}")
    return documents


def _refused(data: Data, remedy: str) -> RecipeError:
    """The error for the key that names the source's content."""
    key = {"stdlib": "source", "files": "files", "tokens": "path", "huggingface": "dataset"}[data.source]
    value = getattr(data, key)
    return RecipeError(f"data.{key}", list(value) if isinstance(value, tuple) else value, remedy)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
