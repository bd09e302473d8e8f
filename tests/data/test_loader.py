"""The order of training windows, its exact continuation, the thread that reads ahead, and the fixed windows."""

import hashlib
import os
import re
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fusedgpt.data import loader as loader_module
from fusedgpt.data.loader import TokenLoader, WindowOrder, _ReadAhead
from fusedgpt.data.shards import token_shards
from fusedgpt.data.token_file import open_shard, write_shards
from fusedgpt.data.tokenizers import make_tokenizer
from fusedgpt.data.untrusted import InputError
from fusedgpt.data.windows import EvalWindows, WindowDataset


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))


T = 8
LENGTHS = [100, 5, 9, 58]  # 12 + 0 + 1 + 7 windows
N = 20


@pytest.fixture
def shards():
    """Every token of every shard differs, so a window tells where it comes from."""
    starts = np.cumsum([0, *LENGTHS])
    return [np.arange(a, a + n, dtype=np.uint16) for a, n in zip(starts, LENGTHS, strict=False)]


def take(loader, n):
    batches = [next(loader) for _ in range(n)]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the order


def test_every_window_comes_once_an_epoch_and_none_overlap(shards):
    inputs, targets = take(TokenLoader(shards, T, N), 3)
    starts = set()
    for epoch in range(3):
        rows = inputs[epoch * N : (epoch + 1) * N]
        assert len(rows.unique()) == N * T  # no token is an input twice
        for shard in shards:
            inside = [row for row in rows.tolist() if row[0] in shard]
            assert len(inside) == (len(shard) - 1) // T
            for row in inside:  # contiguous in the shard, around its end
                at = [(row[0] - int(shard[0]) + i) % len(shard) + int(shard[0]) for i in range(T)]
                assert row == at
        starts.add(tuple(rows[:, 0].sort().values.tolist()))
    assert len(starts) == 3  # the borders move
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert x[1:] == y[:-1]
        shard = next(s for s in shards if x[0] in s)
        assert y[-1] == (x[-1] - int(shard[0]) + 1) % len(shard) + int(shard[0])


def test_batches_are_what_the_model_takes(shards):
    x, y = next(TokenLoader(shards, T, 3))
    for batch in (x, y):
        assert batch.dtype == torch.int64
        assert batch.shape == (3, T)
        assert batch.is_contiguous()


def test_the_order_is_shuffled_and_follows_the_seed(shards):
    one, other = take(TokenLoader(shards, T, N, seed=1), 1), take(TokenLoader(shards, T, N, seed=2), 1)
    assert same(one, take(TokenLoader(shards, T, N, seed=1), 1))
    assert not same(one, other)
    epochs = take(TokenLoader(shards, T, N, seed=1), 2)[0]
    place = [next(i for i, s in enumerate(shards) if row[0] in s) for row in epochs.tolist()]
    assert place[:N] != sorted(place[:N])
    assert place[:N] != place[N:]


def test_the_order_is_uniform(shards):
    """Over many epochs each start is as likely as any other, and so is each place in the epoch."""
    order = WindowOrder([np.arange(65, dtype=np.uint16)], T, seed=0)
    epochs, out = 2000, np.empty((2, 8, T), dtype=np.int64)
    first = np.zeros(65)
    for epoch in range(epochs):
        order.fill(epoch * 8, out)
        first[out[0, 0, 0]] += 1
    # a start is window j at phase p, both uniform: 8 j + p, so 64 starts of 65 are possible at 1/64 each
    expected = epochs / 64
    assert first[64] == 0
    assert ((first[:64] - expected) ** 2 / expected).sum() < 120  # chi square, 63 degrees: 1e-5 above 120


def test_the_order_stays_what_it_was():
    """Saved runs depend on it: a change of the order must be meant."""
    x = take(TokenLoader([np.arange(100, dtype=np.uint16)], T, 4, seed=3), 4)[0]
    assert x[:, 0].tolist() == ORDER


ORDER = [12, 44, 68, 4, 36, 76, 92, 20, 60, 84, 28, 52, 77, 93, 5, 69]  # epochs of 12 windows


def test_shard_files_and_arrays_give_the_same(shards, tmp_path):
    files = [write_shards([s], tmp_path, f"train{i}")[0] for i, s in enumerate(shards)]
    assert same(take(TokenLoader(files, T, 3), 20), take(TokenLoader(shards, T, 3), 20))


def test_an_empty_array_among_others_changes_nothing(shards):
    with_empty = [np.zeros(0, np.uint16), *shards]
    assert TokenLoader(with_empty, T, 1).n_windows == N
    pairs = zip(EvalWindows(with_empty, T, 3), EvalWindows(shards, T, 3), strict=True)
    assert all(same(a, b) for a, b in pairs)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20, 33, 61])
def test_the_batch_size_only_cuts_the_stream(shards, batch_size):
    whole = take(TokenLoader(shards, T, 1), 183)
    parts = take(TokenLoader(shards, T, batch_size), -(-183 // batch_size))
    assert same([part[:183] for part in parts], whole)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_stream_of_one(shards, world_size):
    whole = TokenLoader(shards, T, 4 * world_size)
    ranks = [TokenLoader(shards, T, 4, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(12):  # several epochs, with borders inside batches
        together = [next(rank) for rank in ranks]
        assert same([torch.cat(side) for side in zip(*together, strict=True)], next(whole))
        assert {rank.position for rank in ranks} == {whole.position}


# ---- continuing


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("batches", [0, 1, 4, 6, 7, 50])
def test_a_resumed_loader_continues_bit_for_bit(shards, world_size, batches):
    for rank in range(world_size):
        loader = TokenLoader(shards, T, 3, seed=5, rank=rank, world_size=world_size)
        for _ in range(batches):
            next(loader)
        state = loader.state_dict()
        expected = take(loader, 20)
        resumed = TokenLoader(shards, T, 3, seed=5, rank=rank, world_size=world_size)
        next(resumed)
        resumed.load_state_dict(state)
        assert same(take(resumed, 20), expected)


def test_another_number_of_ranks_continues_the_same_stream(shards):
    whole = take(TokenLoader(shards, T, 6), 10)
    before = TokenLoader(shards, T, 3, rank=0, world_size=2)
    take(before, 4)
    after = TokenLoader(shards, T, 6)
    after.load_state_dict(before.state_dict())
    assert same(take(after, 6), [side[24:] for side in whole])


def test_other_data_are_refused_and_all_differences_named(shards):
    state = TokenLoader(shards, T, 3, seed=5).state_dict()
    assert state["position"] == 0
    edited = [shards[0].copy(), *shards[1:]]
    edited[0][-1] = 999  # the last token of a shard
    longer = [*shards[:-1], np.append(shards[-1], 7)]  # as many windows as before
    data = r"training tokens \w{11}…, now \w{11}…"
    for other, differences in (
        (TokenLoader(shards, T, 3, seed=6), "seed 5, now 6"),
        (
            TokenLoader(shards, 7, 3, seed=6),
            "seed 5, now 6; context_length 8, now 7; number of windows 20, now 23",
        ),
        (TokenLoader(shards[:1], T, 3, seed=5), f"{data}; number of windows 20, now 12"),
        (TokenLoader(edited, T, 3, seed=5), data),
        (TokenLoader(longer, T, 3, seed=5), data),
        (TokenLoader([shards[1], shards[0], *shards[2:]], T, 3, seed=5), data),
        (TokenLoader(shards, T, 3, seed=5, validation=shards[:1]), data.replace("training", "validation")),
    ):
        with pytest.raises(InputError) as caught:
            other.load_state_dict(state, origin="runs/a/state.json")
        assert re.fullmatch(
            rf"runs/a/state\.json: cannot continue in these data: {differences}; resume with the same data, seed and .*",
            str(caught.value),
        )
        assert other.position == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"position": None},
        {"position": -1},
        {"position": True},
        {"position": 1.0},
        {"position": "9"},
        {"position": 10**30},
        {"data": ["\x1b[31m"] * 1000},
        {"seed": "\n" * 1000, "n_windows": {}, "document_start": [], "data": 1, "validation": 2},
    ],
)
def test_a_state_that_is_none_is_refused_in_one_line(shards, damage):
    loader = TokenLoader(shards, T, 3)
    with pytest.raises(InputError) as caught:
        loader.load_state_dict({**loader.state_dict(), **damage})
    assert all(key.split("_")[-1] in str(caught.value) for key in damage)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 400
    with pytest.raises(InputError):
        loader.load_state_dict({})


def test_files_and_arrays_of_the_same_tokens_have_the_same_state(shards, tmp_path):
    files = [write_shards([s], tmp_path, f"train{i}")[0] for i, s in enumerate(shards)]
    loader = TokenLoader(files, T, 3, validation=files[:1])
    assert loader.state_dict() == TokenLoader(shards, T, 3, validation=shards[:1]).state_dict()
    sums = "".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    assert loader.state_dict()["data"] == hashlib.sha256(sums.encode()).hexdigest()


def test_position_and_epoch_count_windows_of_all_ranks(shards):
    loader = TokenLoader(shards, T, 5, rank=1, world_size=2)
    take(loader, 3)
    assert loader.position == loader.state_dict()["position"] == 30
    assert loader.n_windows == N
    assert loader.epoch == 1.5


# ---- reading ahead


def read_ahead(loader, depth=3):
    buffers = [torch.empty(loader._shape, dtype=torch.int64) for _ in range(depth)]
    return _ReadAhead(
        loader._order.fill, loader.position + loader._offset, loader._step, buffers, torch.device("cpu")
    )


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_what_is_read_ahead_is_what_is_read(shards, depth):
    loader = TokenLoader(shards, T, 3, rank=1, world_size=2)
    ahead = read_ahead(TokenLoader(shards, T, 3, rank=1, world_size=2), depth)
    taken = [ahead.take() for _ in range(30)]  # all kept: none may be written over
    for batch in taken:
        assert same(batch, next(loader))
    ahead.close()


def test_reading_ahead_stops_when_all_buffers_are_full(shards):
    filled = []

    def fill(first, out):
        filled.append(first)

    ahead = _ReadAhead(fill, 7, 10, [torch.empty(2, 1, T, dtype=torch.int64)] * 3, torch.device("cpu"))
    deadline = time.monotonic() + 5
    while len(filled) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert filled == [7, 17, 27]
    ahead.take()
    ahead.close()
    assert filled[:4] == [7, 17, 27, 37]


def test_an_error_while_reading_ahead_reaches_the_reader_every_time():
    def fill(first, out):
        if first == 2:
            raise OSError("the disk is gone")

    ahead = _ReadAhead(fill, 0, 1, [torch.empty(2, 1, T, dtype=torch.int64)] * 2, torch.device("cpu"))
    ahead.take(), ahead.take()
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take()


def test_a_file_that_changes_while_it_is_read_ahead_is_named(tmp_path):
    (file,) = write_shards([np.arange(1000)], tmp_path, "train")
    loader = TokenLoader([file], T, 3)
    ahead = read_ahead(loader)
    ahead.take()
    os.truncate(file, 1500)
    with pytest.raises(InputError, match=r"train_000000\.bin, token \d+: it (was truncated|went from 3,024)"):
        [ahead.take() for _ in range(5)]  # what was read before, and one more
    ahead.close()


def test_a_thread_that_is_gone_leaves_nobody_waiting(shards, monkeypatch):
    monkeypatch.setattr(loader_module, "_read_ahead", lambda *args: None)
    ahead = read_ahead(TokenLoader(shards, T, 3, rank=1, world_size=2))
    for _ in range(2):
        with pytest.raises(InputError, match=r"training data, window 3: the thread .* has ended; go on with"):
            ahead.take()


def test_a_thread_that_hangs_is_given_up(shards, monkeypatch):
    monkeypatch.setattr(loader_module, "PATIENCE", 0.05)
    monkeypatch.setattr(loader_module, "_POLL", 0.01)
    wait = threading.Event()
    buffers = [torch.empty(2, 1, T, dtype=torch.int64)] * 2
    ahead = _ReadAhead(lambda first, out: wait.wait() if first else None, 0, 7, buffers, torch.device("cpu"))
    ahead.take()
    with pytest.raises(InputError, match=r"training data, window 7: no batch could be read"):
        ahead.take()
    ahead.close()  # does not wait for it
    wait.set()


def test_what_a_thread_left_is_found_after_its_end(shards, monkeypatch):
    ahead = read_ahead(TokenLoader(shards, T, 3))
    batch = ahead.take()
    ahead._stop()
    ahead._thread.join()
    assert not torch.equal(ahead.take(), batch)


def test_the_thread_ends_with_its_loader(shards):
    loader = TokenLoader(shards, T, 3)
    loader._ahead = read_ahead(loader)
    thread = loader._ahead._thread
    loader._ahead.take()
    assert thread in threading.enumerate()
    del loader
    thread.join(5)
    assert not thread.is_alive()


def test_loading_a_state_starts_reading_anew(shards):
    loader = TokenLoader(shards, T, 3)
    state = loader.state_dict()
    loader._ahead = read_ahead(loader)
    thread = loader._ahead._thread
    loader._ahead.take()
    loader.load_state_dict(state)
    assert not thread.is_alive()
    assert loader._ahead is None
    assert same(next(loader), next(TokenLoader(shards, T, 3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and streams take a GPU")
def test_a_gpu_gets_the_same_batches_while_it_is_busy(shards):
    loader, expected = TokenLoader(shards, T, 3, device="cuda"), TokenLoader(shards, T, 3)
    matrix = torch.randn(4096, 4096, device="cuda")
    sums = []
    for _ in range(50):  # memory is handed on while earlier batches still wait to be used
        matrix = matrix @ matrix * 1e-2
        x, y = next(loader)
        assert x.is_cuda
        sums.append(torch.stack([x, y]).clone())
        del x, y
    assert loader.state_dict() == {**expected.state_dict(), "position": 150}
    for got in sums:
        assert same(got.cpu(), next(expected))


# ---- fixed windows


def test_evaluation_sees_every_window_in_order(shards):
    batches = list(EvalWindows(shards, T, 6))
    assert [len(x) for x, _ in batches] == [6, 6, 6, 2]
    x, y = (torch.cat(side) for side in zip(*batches, strict=True))
    assert x[:, 0].tolist() == [*range(0, 96, T), 105, *range(114, 170, T)]
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(y[:, -1], x[:, -1] + 1)


def test_fewer_windows_are_spread_evenly_and_stay_the_same(shards):
    some = EvalWindows(shards, T, 2, max_windows=5)
    first = [x[:, 0].tolist() for x, _ in some]
    assert first == [x[:, 0].tolist() for x, _ in some]
    assert first == [[0, 32], [64, 105], [138]]  # windows 0, 4, 8, 12, 16
    assert len(some) == 3
    assert len(EvalWindows(shards, T, 2, max_windows=1000)) == 10
    assert EvalWindows(shards, T, 2).__iter__().__next__()[1].is_contiguous()


def test_the_dataset_has_the_windows_of_torch_unfold():
    tokens = np.random.default_rng(0).integers(0, 1 << 16, 101).astype(np.uint16)
    for stride in (1, 3, 8, 11):
        windows = torch.from_numpy(tokens.astype(np.int64)).unfold(0, T + 1, stride)
        dataset = WindowDataset(tokens, T, stride)
        assert len(dataset) == len(windows)
        for (x, y), window in zip(dataset, windows, strict=True):
            assert same((x, y), (window[:-1], window[1:]))
    assert len(WindowDataset(tokens.tolist(), T)) == 12


def test_the_verdict_makes_nine_training_batches_and_one_for_validation(
    shared_data, gpt2_tokenizer_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path))
    verdict = token_shards(shared_data / "the-verdict.txt", make_tokenizer("gpt2"))
    (train,), (val,) = verdict.train, verdict.val
    assert (
        len(
            DataLoader(WindowDataset(open_shard(train), 256, 256), batch_size=2, shuffle=True, drop_last=True)
        )
        == 9
    )
    assert len(DataLoader(WindowDataset(open_shard(val), 256, 256), batch_size=2)) == 1
    assert TokenLoader([train], 256, 2).n_windows == 18
    assert len(EvalWindows([val], 256, 2)) == 1
    message = (
        "the validation part has 534 tokens, too few for one window of context_length 1024 and its last target. "
        r"Use --context-length 512 \(533 at most\), a larger --val-fraction, or more text"
    )
    with pytest.raises(ValueError, match=message):
        EvalWindows([val], 1024, 2)
    with pytest.raises(ValueError, match=message):
        WindowDataset(open_shard(val), 1024, part="validation")
    EvalWindows([val], 533, 2)


# ---- mistakes


@pytest.mark.parametrize(("tokens", "fits"), [(2, 1), (3, 2), (8, 4), (9, 8), (65, 64), (66, 64)])
def test_the_context_that_is_offered_fits(tokens, fits):
    with pytest.raises(
        ValueError, match=f"the training part has {tokens} tokens.*--context-length {fits} .*smaller --val"
    ):
        TokenLoader([np.zeros(tokens, np.uint16)], 1000, 1)
    with pytest.raises(ValueError, match="too few"):  # the last target is missing
        TokenLoader([np.zeros(tokens, np.uint16)], tokens, 1)
    TokenLoader([np.zeros(tokens, np.uint16)], fits, 1)
    TokenLoader([np.zeros(tokens, np.uint16)], tokens - 1, 1)


@pytest.mark.parametrize("shards", [[], [np.zeros(0, np.uint16)], [np.zeros(1, np.uint16)]])
def test_no_text_at_all(shards):
    with pytest.raises(ValueError, match=r"the training part has [01] tokens.*Give more text"):
        TokenLoader(shards, 4, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 0}, "context_length is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"rank": 2, "world_size": 2}, "rank 2 of world_size 2"),
    ],
)
def test_impossible_numbers_are_named(shards, options, message):
    with pytest.raises(ValueError, match=message):
        TokenLoader(shards, **{"context_length": T, "batch_size": 2, **options})


def test_impossible_strides_and_counts_are_named(shards):
    with pytest.raises(ValueError, match="stride is 0"):
        WindowDataset(shards[0], T, 0)
    with pytest.raises(ValueError, match="max_windows 0"):
        EvalWindows(shards, T, 2, max_windows=0)
    with pytest.raises(IndexError):
        WindowDataset(shards[0], T)[12]


def test_windows_move_back_to_the_start_of_their_document() -> None:
    documents = [range(n) for n in (5, 9, 40, 3, 7, 30)]  # a token is its own place in the document
    tokens = np.concatenate([np.array(document, dtype=np.uint16) for document in documents])
    free = TokenLoader([tokens], 16, 4, seed=3)
    aligned = TokenLoader([tokens], 16, 4, seed=3, document_start=0)
    moves = 0
    for _ in range(12):
        (rows, _), (moved, targets) = next(free), next(aligned)
        for before, after in zip(rows.tolist(), moved.tolist(), strict=True):
            near = before[0] < 16
            assert after[0] == (0 if near else before[0])
            assert near or after == before
            moves += near and before[0] > 0
        assert torch.equal(moved[:, 1:], targets[:, :-1])
    assert moves > 10
    with pytest.raises(ValueError, match="document_start"):
        TokenLoader([tokens], 16, 4, seed=3).load_state_dict(aligned.state_dict())
