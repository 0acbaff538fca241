import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch

from parallel import corpus
from parallel.corpus import Corpus, open_corpus, shuffle
from parallel.recipe import Data, RecipeError


def opened(data: Data, *, seq_len: int = 4, vocab_size: int = 256, seed: int = 0) -> Corpus:
    return open_corpus(data, seq_len=seq_len, vocab_size=vocab_size, seed=seed)


def all_tokens(c: Corpus) -> list[int]:
    """The tokens of the windows, in the order of the source."""
    return [int(c.window(0)[0])] + [int(id) for i in range(c.n_sequences) for id in c.window(i)[1:]]


def text_of(c: Corpus) -> bytes:
    return bytes(all_tokens(c))


def refusal(data: Data, **options: int) -> str:
    with pytest.raises(RecipeError) as caught:
        opened(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def token_file(path: Path, ids: list[int] | np.ndarray, dtype: str = "uint16") -> Data:
    np.asarray(ids).astype(dtype).tofile(path)
    return Data(source="tokens", path=str(path), token_dtype=dtype)


@pytest.fixture
def counted(tmp_path: Path) -> Data:
    """Tokens 0 ... 40: with seq_len = 4 ten windows, window i = 4·i ... 4·i + 4."""
    return token_file(tmp_path / "counted.bin", np.arange(41))


# ---- order ---------------------------------------------------------------------------------------------------------


def test_the_order_is_the_one_of_every_earlier_version(counted: Data) -> None:
    assert shuffle(np.arange(10), size=10, seed=0, epoch=0).tolist() == [1, 4, 9, 5, 3, 0, 8, 6, 2, 7]
    assert shuffle(np.arange(10), size=10, seed=0, epoch=1).tolist() == [4, 6, 1, 0, 3, 7, 9, 8, 2, 5]
    assert shuffle(np.arange(2), size=2**62, seed=2**31 - 1, epoch=5).tolist() == [
        880282712568382384,
        893272951595573427,
    ]
    batch = opened(counted).sequences(step=0, global_batch=3, rows=range(3))
    assert batch.dtype == np.int64
    assert batch.tolist() == [[4, 5, 6, 7, 8], [16, 17, 18, 19, 20], [36, 37, 38, 39, 40]]  # windows 1, 4, 9
    synthetic = opened(Data(source="synthetic")).sequences(step=1, global_batch=2, rows=range(2))
    assert synthetic.tolist() == [[254, 72, 210, 90, 32], [126, 240, 92, 2, 225]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_each_window_comes_once_in_each_epoch(size: int) -> None:
    epochs = [shuffle(np.arange(size), size=size, seed=7, epoch=epoch) for epoch in range(3)]
    for order in epochs:
        assert sorted(order.tolist()) == list(range(size))
    if size > 5:
        assert not np.array_equal(epochs[0], epochs[1])
        assert not np.array_equal(epochs[0], shuffle(np.arange(size), size=size, seed=8, epoch=0))


def test_the_order_is_well_mixed() -> None:
    orders = np.stack([shuffle(np.arange(1000), size=1000, seed=seed, epoch=0) for seed in range(100)])
    # Which tenth of the windows stands in which tenth of the epoch: 10 x 10 counts, each expected to be 1000.
    counts = np.stack([np.histogram(part, bins=10, range=(0, 1000))[0] for part in np.split(orders, 10, axis=1)])
    assert abs(counts / 1000 - 1).max() < 0.15  # five standard deviations
    neighbours = np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.015  # likewise
    for small in (2, 3, 4):  # each permutation of a few windows does occur
        seen = {tuple(shuffle(np.arange(small), size=small, seed=seed, epoch=0)) for seed in range(300)}
        assert len(seen) == {2: 2, 3: 6, 4: 24}[small]


@pytest.mark.parametrize("source", ["stdlib", "tokens", "synthetic"])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 12])
def test_rows_do_not_depend_on_how_the_batch_is_split(counted: Data, source: str, parts: int) -> None:
    data = counted if source == "tokens" else Data(source=source)
    one_rank_each = [opened(data) for _ in range(parts)]
    share = 12 // parts
    for step in (0, 1, 5):
        whole = opened(data).sequences(step=step, global_batch=12, rows=range(12))
        split = [
            c.sequences(step=step, global_batch=12, rows=range(i * share, (i + 1) * share))
            for i, c in reversed(list(enumerate(one_rank_each)))  # in any order: nothing is remembered
        ]
        assert np.array_equal(np.concatenate(split[::-1]), whole)
        assert np.array_equal(opened(data).sequences(step=step, global_batch=12, rows=range(1, 12, 5)), whole[1:12:5])


def test_steps_go_on_where_the_last_ended(counted: Data) -> None:
    c = opened(counted)
    two_small = [c.sequences(step=step, global_batch=6, rows=range(6)) for step in (2, 3)]
    assert np.array_equal(np.concatenate(two_small), c.sequences(step=1, global_batch=12, rows=range(12)))
    assert c.sequences(step=0, global_batch=6, rows=range(0)).shape == (0, 5)


def test_an_epoch_may_end_inside_a_batch(counted: Data) -> None:
    c = opened(counted)
    assert c.n_sequences == 10
    first_tokens = c.sequences(step=0, global_batch=23, rows=range(23))[:, 0]
    windows = first_tokens // 4
    for epoch, part in enumerate([windows[:10], windows[10:20]]):
        assert part.tolist() == shuffle(np.arange(10), size=10, seed=0, epoch=epoch).tolist()
    assert windows[20:].tolist() == shuffle(np.arange(3), size=10, seed=0, epoch=2).tolist()


def test_seeds_give_other_orders_of_the_same_windows(counted: Data) -> None:
    a, b = (opened(counted, seed=seed).sequences(step=0, global_batch=10, rows=range(10)) for seed in (0, 1))
    assert not np.array_equal(a, b)
    assert np.array_equal(np.sort(a, axis=0), np.sort(b, axis=0))


def test_synthetic_tokens_are_below_the_vocabulary_and_differ_by_row_and_seed() -> None:
    rows = dict(step=9, global_batch=64, rows=range(64))
    zero, one = (opened(Data(source="synthetic"), seed=seed, vocab_size=50) for seed in (0, 1))
    assert zero.window(7).tolist() != one.window(7).tolist()
    a, b = zero.sequences(**rows), one.sequences(**rows)
    assert set(a.ravel().tolist()) == set(range(50))
    assert len({tuple(row) for row in np.concatenate([a, b]).tolist()}) == 128


# ---- text ----------------------------------------------------------------------------------------------------------


def test_stdlib_is_real_text_of_this_python() -> None:
    c = opened(Data(), seq_len=256)
    assert c.n_sequences > 10_000
    start = Path(os.__file__).parent.joinpath("__future__.py").read_bytes()[:257]
    assert bytes(c.window(0).tolist()) == start  # first of the sorted modules
    assert ".".join(map(str, sys.version_info[:3])) in c.description and "\n" not in c.description
    assert opened(Data(), seq_len=256).description == c.description


def test_stdlib_is_sorted_and_leaves_out_tests_and_what_belongs_to_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    kept = {"z.py": b"zz", "a/b.py": b"ab", "a.py": b"a\n", "a/__init__.py": b"", "B.py": b"\xffB"}
    left_out = ["test/x.py", "a/tests/x.py", "idlelib/idle_test/x.py", "site-packages/x.py", "dist-packages/p/x.py"]
    left_out += ["a/__pycache__/x.py", "config-3.11-linux/x.py", "_sysconfigdata_linux.py", "sitecustomize.py", "x.txt"]
    for name, content in {**kept, **dict.fromkeys(left_out, b"LEFT OUT")}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert text_of(opened(Data(), seq_len=1)) == b"\xffB\na\n\n\nab\nzz"
    assert "5 modules" in opened(Data(), seq_len=1).description
    for name in kept:
        (tmp_path / name).unlink()
    assert refusal(Data()).startswith("data.source = 'stdlib': no .py files in ")


def test_files_are_read_once_each_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "b.txt": b"bbb",
        "a.txt": b"aaa",
        "d/e/c.txt": b"ccc",
        "d/x.md": b"xxx",
        "[q].txt": b"q",
    }.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    Path("d/link.txt").symlink_to(tmp_path / "a.txt")

    def text(*patterns: str) -> bytes:
        return text_of(opened(Data(source="files", files=patterns), seq_len=1))

    assert text("b.txt", "a.txt") == b"aaa\nbbb"
    assert text("[ab].txt", "./a.txt", str(tmp_path / "a.txt")) == b"aaa\nbbb"
    assert text("d/**/*.txt") == b"ccc\naaa"  # d/e/c.txt, then d/link.txt
    assert text("d/link.txt", "**/*.txt") == b"q\naaa\nbbb\nccc"
    assert text("d/**") == b"ccc\naaa\nxxx"  # folders that match are passed over
    assert text("[q].txt", "a.txt") == b"q\naaa"  # the file of that very name


def test_files_need_not_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    assert text_of(opened(Data(source="files", files=(str(tmp_path / "binary"),)), seq_len=1)) == bytes(range(256))


def test_the_fingerprint_tells_contents_apart(tmp_path: Path) -> None:
    file, data = tmp_path / "a", Data(source="files", files=(str(tmp_path / "a"),))
    seen = set()
    for content in (b"hello world", b"hello xorld", b"hello world "):
        file.write_bytes(content)
        seen.add(opened(data).description)
        assert opened(data).description == opened(data, seq_len=2, seed=5).description
    assert len(seen) == 3


def test_the_fingerprint_of_a_huge_file_reads_a_sample() -> None:
    asked = []

    def tokens(start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= 10**11
        asked.append((start, stop))
        return np.zeros(stop - start, np.uint8)

    fingerprint = corpus._fingerprint(tokens, 10**11)
    assert fingerprint != corpus._fingerprint(tokens, 10**11 - 1)
    del asked[16:]
    assert sum(stop - start for start, stop in asked) <= 2**24
    assert asked[0][0] == 0 and asked[-1][1] == 10**11


# ---- token files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "largest"), [("uint16", 2**16 - 1), ("uint32", 2**32 - 1)])
def test_token_files_of_both_widths(tmp_path: Path, dtype: str, largest: int) -> None:
    ids = [0, 1, 255, 256, largest, 3, 2, 1, largest]
    c = opened(token_file(tmp_path / "t.bin", ids, dtype), vocab_size=largest + 1)
    assert all_tokens(c) == ids
    assert f"9 tokens from one {dtype} file" in c.description


def test_the_last_window_needs_its_target(tmp_path: Path) -> None:
    for n_tokens, windows in ((5, 1), (8, 1), (9, 2), (12, 2), (13, 3)):
        assert opened(token_file(tmp_path / "t.bin", np.arange(n_tokens))).n_sequences == windows


def test_an_id_outside_the_vocabulary_is_refused_when_opened(tmp_path: Path) -> None:
    data = token_file(tmp_path / "t.bin", [1, 2, 3, 4, 5, 50, 6])
    assert "token 5 has the id 50, not below model.vocab_size = 50" in refusal(data, vocab_size=50)
    assert all_tokens(opened(data, vocab_size=51)) == [1, 2, 3, 4, 5]


def test_an_id_outside_the_vocabulary_is_refused_when_read(tmp_path: Path) -> None:
    path, place = tmp_path / "large.bin", 3 * 2**19  # between two parts of the sample
    with open(path, "wb") as file:
        file.truncate(2 * 40 * 2**20)  # zeros, not written to the disk
        file.seek(2 * place)
        file.write(b"\xff\xff")
    c = opened(Data(source="tokens", path=str(path)), seq_len=2**20)
    read = []
    with pytest.raises(RecipeError, match=f"token {place} has the id 65535, not below model.vocab_size = 256"):
        for row in range(c.n_sequences):
            read.append(c.sequences(step=0, global_batch=c.n_sequences, rows=range(row, row + 1)).max())
    assert len(read) == shuffle(np.arange(39), size=39, seed=0, epoch=0).tolist().index(1) and not any(read)


# ---- Hugging Face --------------------------------------------------------------------------------------------------

WORDS = ["[UNK]", "<|endoftext|>", "the", "cat", "sat", "dog", "ran"]
TEXTS = ["the cat sat", "the dog", "", None, "the dog ran ran ran"]
TOKENS = [2, 3, 4, 1, 2, 5, 1, 2, 5, 6, 6, 6, 1]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer and a dataset, a cache of its own, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write_tokenizer("tokenizer.json", WORDS)
    (tmp_path / "docs").mkdir()
    rows = [json.dumps({"text": text, "number": i}) for i, text in enumerate(TEXTS)]
    (tmp_path / "docs" / "train.jsonl").write_text("\n".join(rows))
    return tmp_path


def write_tokenizer(path: str, words: list[str]) -> None:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[UNK] $A", special_tokens=[("[UNK]", 0)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(path)


def huggingface(**keys: str) -> Data:
    return Data(source="huggingface", **{"dataset": "docs", "tokenizer": "tokenizer.json", **keys})


@pytest.mark.parametrize("form", ["docs", "docs/train.jsonl", "train.parquet", "train.txt"])
def test_documents_are_tokenised_with_an_end_of_text_after_each(hub: Path, form: str) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet("train.parquet")
    Path("train.txt").write_text("\n".join(text or "" for text in TEXTS))
    c = opened(huggingface(dataset=form), seq_len=1, vocab_size=len(WORDS))
    assert all_tokens(c) == TOKENS
    assert f"13 tokens from 5 documents of {form} (train)" in c.description


def test_a_tokenizer_without_an_end_of_text_gives_none(hub: Path) -> None:
    write_tokenizer("plain.json", [word.replace("<|endoftext|>", "plain") for word in WORDS])
    c = opened(huggingface(tokenizer="plain.json"), seq_len=1)
    assert all_tokens(c) == [id for id in TOKENS if id != 1]


def test_part_of_a_split_and_another_column(hub: Path) -> None:
    Path("docs/train.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    c = opened(huggingface(split="train[:1]", text_field="body"), seq_len=1)
    assert all_tokens(c) == TOKENS[:4]


def test_documents_are_tokenised_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened(huggingface())
    assert len(list(hub.glob("cache/parallel-lab/*.uint32"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "iter", None)
        assert opened(huggingface()).description == before.description
    # Another dataset, another tokenizer: not the ids kept from before.
    Path("docs/train.jsonl").write_text(json.dumps({"text": "ran ran ran ran ran"}))
    assert all_tokens(opened(huggingface(), seq_len=1)) == [6, 6, 6, 6, 6, 1]
    write_tokenizer("tokenizer.json", WORDS[::-1])
    assert all_tokens(opened(huggingface(), seq_len=1)) == [0, 0, 0, 0, 0, 5]


def open_on_a_rank(folder: str) -> tuple[str, list[int], int]:
    datasets.config.HF_DATASETS_CACHE = f"{folder}/cache"
    batches = datasets.Dataset.iter

    def slowly(*arguments, **options):  # so that the other ranks come while the first is at it
        time.sleep(0.5)
        return batches(*arguments, **options)

    torch.distributed.barrier()
    with mock.patch.object(datasets.Dataset, "iter", autospec=True, side_effect=slowly) as tokenised:
        c = opened(huggingface(dataset=f"{folder}/docs", tokenizer=f"{folder}/tokenizer.json"), seq_len=1)
    return c.description, all_tokens(c), tokenised.call_count


def test_ranks_that_open_a_dataset_at_once_read_the_same(hub: Path, ranks) -> None:
    descriptions, tokens, tokenised = zip(*ranks(4, open_on_a_rank, str(hub)), strict=True)
    assert len(set(descriptions)) == 1
    assert tokens == (TOKENS,) * 4
    assert sum(tokenised) == 1  # by the first; the others wait
    assert len(list(hub.glob("cache/parallel-lab/*.uint32"))) == 1 and not list(hub.glob("cache/*/*.partial"))


def test_the_packages_are_asked_for_only_where_they_are_needed(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("datasets", "tokenizers"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            assert refusal(huggingface()).startswith(
                "data.source = 'huggingface': needs `pip install parallel-lab[huggingface]`"
            )
            assert opened(Data()).n_sequences


# ---- what is refused -----------------------------------------------------------------------------------------------

REFUSED = {  # [data], and what its line says
    "file: missing": (dict(source="files", files=("no.txt",)), "data.files = ['no.txt']: 'no.txt' matches no file"),
    "file: glob without a match": (dict(source="files", files=("docs/*", "*.no")), "'*.no' matches no file"),
    "file: a folder": (dict(source="files", files=("docs",)), "(a folder; add /**/*.txt)"),
    "file: a NUL in its name": (dict(source="files", files=("a\0b",)), "data.files = ['a\\x00b']: "),
    "file: a NUL in a glob": (dict(source="files", files=("*/a\0b*",)), "data.files = ['*/a\\x00b*']: "),
    "file: a name too long": (dict(source="files", files=("n" * 5000,)), "matches no file"),
    "file: empty": (dict(source="files", files=("empty",)), "data.files = ['empty']: holds 0 tokens"),
    "file: too short": (
        dict(source="files", files=("four",)),
        "holds 4 tokens, a sequence takes train.seq_len + 1 = 5",
    ),
    "tokens: missing": (dict(source="tokens", path="no.bin"), "data.path = 'no.bin': is no file"),
    "tokens: a folder": (dict(source="tokens", path="docs"), "data.path = 'docs': is no file"),
    "tokens: a NUL in its name": (dict(source="tokens", path="a\0b"), "is no file"),
    "tokens: empty": (dict(source="tokens", path="empty"), "data.path = 'empty': holds 0 tokens"),
    "tokens: too short": (dict(source="tokens", path="four"), "data.path = 'four': holds 2 tokens"),
    "tokens: half an id": (
        dict(source="tokens", path="seven"),
        "has 7 bytes, no multiple of 2; check data.token_dtype",
    ),
    "tokens: wrong type": (dict(source="tokens", path="six", token_dtype="uint32"), "has 6 bytes, no multiple of 4"),
    "tokenizer: neither file nor known": (
        dict(tokenizer="no.json"),
        "data.tokenizer = 'no.json': give a tokenizer.json",
    ),
    "tokenizer: not one": (dict(tokenizer="docs/train.jsonl"), "data.tokenizer = 'docs/train.jsonl': give a tokenizer"),
    "dataset: unreachable": (dict(dataset="someone/something"), "a name while the hub can be reached (ConnectionError"),
    "dataset: missing path": (dict(dataset="./no/such/folder"), "data.dataset = './no/such/folder': give a file or"),
    "dataset: a NUL in its name": (dict(dataset="a\0b"), "data.dataset = 'a\\x00b': give a file or"),
    "dataset: an empty folder": (dict(dataset="nothing"), "data.dataset = 'nothing': give a file or folder"),
    "dataset: of another format": (dict(dataset="empty"), "is none of .json, .jsonl, .txt, .parquet"),
    "dataset: damaged": (dict(dataset="damaged.jsonl"), "data.dataset = 'damaged.jsonl': give a file or folder"),
    "dataset: without text": (dict(split="train[2:4]"), "data.dataset = 'docs': holds 0 tokens"),
    "dataset: too short": (dict(split="train[1:2]"), "data.dataset = 'docs': holds 3 tokens"),
    "split: unknown": (dict(split="no"), "data.split = 'no': ValueError: Unknown split"),
    "split: not one": (dict(split="a[[b"), "data.split = 'a[[b': ValueError"),
    "column: unknown": (
        dict(text_field="no"),
        "data.text_field = 'no': is no column of strings; the columns are {'text",
    ),
    "column: of numbers": (dict(text_field="number"), "data.text_field = 'number': is no column of strings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(hub: Path, case: str) -> None:
    for name, content in {"empty": b"", "four": b"four", "six": b"sixsix", "seven": b"sevenxx"}.items():
        Path(name).write_bytes(content)
    Path("damaged.jsonl").write_text('{"text": "a"}\n{"text": ')
    Path("nothing").mkdir()
    keys, wanted = REFUSED[case]
    line = refusal(Data(**keys) if "source" in keys else huggingface(**keys))
    assert wanted in line
    assert line.startswith("data.")


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(hub: Path) -> None:
    assert opened(huggingface(), vocab_size=7).n_sequences
    assert refusal(huggingface(), vocab_size=6) == (
        "data.tokenizer = 'tokenizer.json': has ids up to 6; set model.vocab_size = 7 or more (now 6)"
    )


@pytest.mark.parametrize(("source", "key"), [("files", "files"), ("tokens", "path")])
def test_a_file_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, key: str
) -> None:
    path = tmp_path / "closed"
    path.write_bytes(b"12345678")

    def denied(*arguments: object, **options: object) -> None:  # chmod does not stop root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    monkeypatch.setattr(np, "memmap", denied)
    line = refusal(Data(source=source, **{key: (str(path),) if key == "files" else str(path)}))
    assert line.startswith(f"data.{key} = ") and "cannot be read (PermissionError" in line


def test_bytes_outside_a_small_vocabulary_are_refused() -> None:
    assert "not below model.vocab_size = 100" in refusal(Data(), vocab_size=100)


def test_reading_a_recipe_and_a_corpus_takes_no_torch() -> None:
    code = (
        "import sys, parallel.recipe, parallel.corpus\n"
        "parallel.corpus.open_corpus(parallel.recipe.Data(), seq_len=8, vocab_size=256, seed=0)\n"
        "print(sorted({'torch', 'datasets', 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
