"""Generation against transformers' sampler and `generate`, and against a loop without a cache."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusedgpt.data.tokenizers import BPETokenizer, CharTokenizer, Tokenizer, WordTokenizer
from fusedgpt.gpt.config import ModelConfig
from fusedgpt.gpt.generate import KVCache, TextStream, choose, generate, generate_text, penalised
from fusedgpt.gpt.huggingface import to_transformers
from fusedgpt.gpt.model import GPT

CONTEXT, VOCAB = 16, 300
PROMPTS = [[5, 6, 7], [8], [299, 0, 12, 13, 14, 15, 16, 17], [5, 6, 7, 40]]


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights in float64, of a size that makes its choices depend on everything before them."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=VOCAB, context_length=CONTEXT, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, 0.3 if p.dim() == 1 or name == "wte.weight" else 1.0)
            if name.endswith("weight") and p.dim() == 1:
                p += 1.0
        model.wte.weight[VOCAB:] = 100.0  # padding that a mistake would choose
    return model.double().eval()


def continued(
    model: GPT, prompt: list[int], tokens: int, pick: Callable[[Tensor], Tensor] = Tensor.argmax
) -> list[int]:
    """The tokens after the prompt from whole forward passes; a full window is halved."""
    window, new = list(prompt), []
    for _ in range(tokens):
        if len(window) > CONTEXT:
            window = window[-CONTEXT // 2 :]
        new.append(int(pick(model(torch.tensor([window]))[0, -1])))
        window.append(new[-1])
    return new


@torch.no_grad()
def test_cached_logits_equal_a_whole_forward_pass_for_rows_of_different_lengths(model: GPT) -> None:
    cache = KVCache(model.config, [len(p) for p in PROMPTS], CONTEXT, torch.float64, torch.device("cpu"))
    longest = max(map(len, PROMPTS))
    rows = [list(p) for p in PROMPTS]
    logits = model(torch.tensor([[0] * (longest - len(row)) + row for row in rows]), cache=cache)
    for token in (1, 2, 3):
        for row, last in zip(rows, logits[:, -1], strict=True):
            torch.testing.assert_close(last, model(torch.tensor([row]))[0, -1], rtol=1e-9, atol=1e-9)
            row.append(token)
        if token == 2:
            cache.keep([2, 0])
            rows = [rows[2], rows[0]]
        cache.advance(1)
        logits = model(torch.full((len(rows), 1), token), cache=cache)


def test_greedy_beyond_the_context_equals_a_loop_without_a_cache(model: GPT) -> None:
    expected = [continued(model, prompt, 45) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 20  # no model that says one word
    assert generate(model, PROMPTS, 45, temperature=0) == expected
    assert [generate(model, [prompt], 45, temperature=0)[0] for prompt in PROMPTS] == expected


def test_a_context_of_one_and_a_prompt_that_fills_the_context(model: GPT) -> None:
    full = list(range(CONTEXT))
    assert generate(model, [full], 12, temperature=0) == [continued(model, full, 12)]
    torch.manual_seed(0)
    bigram = GPT(ModelConfig(vocab_size=9, context_length=1, n_layer=1, n_head=1, n_embd=4)).eval()
    (new,) = generate(bigram, [[3]], 5, temperature=0)
    assert new == [bigram(torch.tensor([[token]])).argmax().item() for token in (3, *new[:-1])]


def test_greedy_text_and_penalty_equal_those_of_transformers(model: GPT) -> None:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        n_layer=2,
        n_head=2,
        n_embd=16,
        bos_token_id=0,
        eos_token_id=None,
    )
    other = GPT2LMHeadModel(config).double().eval()
    other.load_state_dict(to_transformers(model), strict=False)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    options = {"do_sample": False, "max_new_tokens": CONTEXT - longest, "pad_token_id": 0}
    expected = other.generate(ids, attention_mask=seen, **options)[:, longest:].tolist()
    assert generate(model, PROMPTS, CONTEXT - longest, temperature=0) == expected

    for prompt in PROMPTS:  # alone: transformers counts padding as seen
        options["max_new_tokens"] = CONTEXT - len(prompt)
        whole = other.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            repetition_penalty=1.7,
            **options,
        )[0].tolist()
        ours = generate(model, [prompt], CONTEXT - len(prompt), temperature=0, repetition_penalty=1.7)
        assert [prompt + ours[0]] == [whole]
    assert generate(model, PROMPTS, 5, temperature=0, repetition_penalty=1.7) != [row[:5] for row in expected]


def drawn(logits: Tensor, temperature: float, top_k: int, top_p: float, points: int = 20_000) -> Tensor:
    """The share of each token over evenly spread draws, (V,): its probability, to within 1 / points."""
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    tokens = choose(logits.expand(points, -1), uniform, temperature, top_k, top_p)
    return torch.bincount(tokens, minlength=len(logits)) / points


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (1.0, 0, 1.0),
        (0.7, 0, 1.0),
        (1.5, 4, 1.0),
        (1.0, 0, 0.8),
        (1.3, 12, 0.6),
        (1.0, 99, 1e-9),
        (2.0, 1, 1.0),
    ],
)
def test_probabilities_equal_those_of_transformers_sampler(
    temperature: float, top_k: int, top_p: float
) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, 30, generator=generator, dtype=torch.float64) * 2
    steps = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    for row, expected in zip(scores, steps(torch.zeros(2, 1).long(), scores).softmax(-1), strict=True):
        shares = drawn(row, temperature, top_k, top_p)
        assert not shares[expected == 0].any()
        torch.testing.assert_close(shares.double(), expected, rtol=0, atol=2e-4)


def test_top_p_keeps_the_token_that_crosses_the_threshold() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
    kept = [int((drawn(logits, 1.0, 0, top_p) > 0).sum()) for top_p in (0.4, 0.5, 0.51, 0.75, 0.76, 0.9, 1.0)]
    assert kept == [1, 1, 2, 2, 3, 4, 4]


def test_the_penalty_equals_that_of_transformers() -> None:
    scores, ids = torch.tensor([[1.0, -2.0, 3.0, 0.0, -1.0]]), torch.tensor([[0, 1, 3]])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())
    assert torch.equal(penalised(scores, 1.3)[0, ids[0]], expected[0, ids[0]])


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e300])
def test_extreme_temperatures_stay_numbers(temperature: float) -> None:
    logits = torch.tensor([1.0, 300.0, -300.0, 2.0], dtype=torch.float64)
    shares = drawn(logits, temperature, 0, 0.999999, points=100)
    assert shares.tolist() == ([0.25] * 4 if temperature > 1 else [0, 1, 0, 0])


def test_the_ends_of_the_unit_interval_choose_tokens_that_have_a_probability() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]], dtype=torch.float64).expand(2, -1)
    assert choose(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1.0).tolist() == [1, 2]


def test_sampling_follows_the_seed_and_not_the_other_rows(model: GPT) -> None:
    settings = {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}
    batch = generate(model, PROMPTS, 40, seed=7, **settings)
    assert batch == generate(model, PROMPTS, 40, seed=7, **settings)
    assert batch[:1] == generate(model, PROMPTS[:1], 40, seed=7, **settings)
    assert batch[:2] == generate(model, [*PROMPTS[:2], [1, 2]], 40, seed=7, **settings)[:2]
    assert batch != generate(model, PROMPTS, 40, seed=7 + 2**32, **settings)
    assert generate(model, PROMPTS, 40) != generate(model, PROMPTS, 40)
    copies = generate(model, [PROMPTS[0]] * 5, 10, seed=7)
    assert len(set(map(tuple, copies))) == 5


def test_samples_have_the_probabilities_of_the_model(model: GPT) -> None:
    prompt, rows = [5, 6, 7], 3000
    tokens = torch.tensor(generate(model, [prompt] * rows, 1, seed=0)).flatten()
    p = model(torch.tensor([prompt]))[0, -1].softmax(-1)
    counts = torch.bincount(tokens, minlength=VOCAB)
    deviation = (rows * p * (1 - p)).sqrt()
    assert ((counts - rows * p).abs() < 5 * deviation + 1).all()


def test_end_of_text_ends_each_row_on_its_own(model: GPT) -> None:
    prompts = [[number] for number in range(24)]
    free = generate(model, prompts, 50, seed=1, temperature=3.0)
    for end in (free[0][9], free[3][30]):
        cut = [row[: row.index(end)] if end in row else row for row in free]
        assert generate(model, prompts, 50, seed=1, temperature=3.0, end_of_text=end) == cut
        assert len(set(map(len, cut))) > 1


def test_rows_that_end_early_leave_the_batch(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, hidden = [], model.hidden

    def counting(ids: Tensor, **options: object) -> Tensor:
        sizes.append(len(ids))
        return hidden(ids, **options)

    monkeypatch.setattr(model, "hidden", counting)
    prompts = [[number] for number in range(8)]
    steps = [0] * 8

    def on_token(row: int, token: int) -> bool:
        steps[row] += 1
        return steps[row] > row  # row r has r + 1 tokens

    rows = generate(model, prompts, 50, seed=0, on_token=on_token)
    assert [len(row) for row in rows] == list(range(1, 9))
    assert sizes == [8, 8, 8, 8, 4, 4, 2, 1]


def test_every_row_of_a_batch_obeys_top_k(model: GPT) -> None:
    assert generate(model, PROMPTS, 40, top_k=1, seed=0) == generate(model, PROMPTS, 40, temperature=0)


def test_on_token_sees_every_token_in_order(model: GPT) -> None:
    calls: list[tuple[int, int]] = []
    rows = generate(model, PROMPTS, 7, seed=2, on_token=lambda *call: bool(calls.append(call)))
    assert calls == [(row, rows[row][step]) for step in range(7) for row in range(len(PROMPTS))]


def test_the_model_is_put_back_into_its_mode(model: GPT) -> None:
    torch.manual_seed(0)
    training = GPT(ModelConfig(VOCAB, CONTEXT, 1, 1, 8, resid_dropout=0.5))
    first = generate(training, PROMPTS, 4, seed=0)
    assert training.training
    assert first == generate(training.eval(), PROMPTS, 4, seed=0)
    assert not training.training
    training.train()

    def interrupt(row: int, token: int) -> bool:
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        generate(training, PROMPTS, 4, on_token=interrupt)
    assert training.training


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_diverged_is_named(temperature: float) -> None:
    broken = GPT(ModelConfig(VOCAB, CONTEXT, 1, 1, 8))
    broken.wte.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="not numbers"):
        generate(broken, [[1]], 2, temperature=temperature)


def test_lower_precision_runs_in_it(model: GPT) -> None:
    torch.manual_seed(0)
    small = GPT(ModelConfig(VOCAB, CONTEXT, 1, 1, 8))
    rows = generate(small, PROMPTS, 40, seed=0, dtype=torch.bfloat16)
    assert all(len(row) == 40 and max(row) < VOCAB for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_k": -1}, "top_k = -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": [[]]}, "the prompt is empty"),
        ({"prompts": [[1] * 20]}, "the prompt has 20 tokens, and the model sees 16 at once; shorten it by 4"),
        ({"prompts": [[1], [1] * 17]}, "prompt 1 has 17 tokens"),
        ({"prompts": [[1, VOCAB]]}, "has the token 300, and the model knows 0 to 299"),
        ({"prompts": [[-1, 4]]}, "has the token -1"),
    ],
)
def test_wrong_arguments_are_named(model: GPT, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"model": model, "prompts": PROMPTS, "max_tokens": 3} | change)


def test_an_empty_prompt_begins_with_end_of_text(model: GPT) -> None:
    assert generate(model, [[]], 9, seed=0, end_of_text=77) == generate(
        model, [[77]], 9, seed=0, end_of_text=77
    )


# Text: a model over bytes and a few merges, so that characters and stop strings are spread over tokens.


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return BPETokenizer(
        [(97, 98), (256, 97), (0xF0, 0x9F), (0x80, 98)], ["<|x|>"] + [f"<{i}>" for i in range(38)]
    )


def stream(
    tokenizer: Tokenizer, tokens: list[int], stop: list[str], prompt: list[int] | None = None
) -> list[str]:
    """What a TextStream releases at each token and at the end, as long as it wants more."""
    text = TextStream(tokenizer, prompt or [], stop)
    pieces = []
    for token in tokens:
        pieces.append(text.add(token))
        if text.stopped:
            break
    pieces.append(text.close())
    assert "".join(pieces) == text.text
    return pieces


def test_unfinished_characters_are_held_back(tokenizer: BPETokenizer) -> None:
    ids = tokenizer.encode_ordinary("aé😉")
    assert len(ids) == 6
    assert stream(tokenizer, ids, []) == ["a", "", "é", "", "", "😉", ""]
    assert stream(tokenizer, ids[:-1], [])[-1] == "\ufffd"  # it never came
    assert stream(tokenizer, [0xFF, 97], []) == ["", "\ufffda", ""]


def test_a_possible_stop_string_is_held_back_until_it_is_decided(tokenizer: BPETokenizer) -> None:
    a, b, c = b"abc"
    assert stream(tokenizer, [a, a, a, c, b], ["aab"]) == ["", "", "a", "aac", "b", ""]
    assert stream(tokenizer, [c, a, a, b, c], ["aab"]) == ["c", "", "", "", ""]
    assert stream(tokenizer, [c, 257, 257], ["baa"]) == ["c", "a", "", ""]  # aba aba: it spans tokens
    assert stream(tokenizer, [c, a, a], ["aab"])[-1] == "aa"  # it never came
    assert stream(tokenizer, [c, 257], ["ba", "ab"]) == ["c", "", ""]  # the first one counts


@given(
    st.lists(st.sampled_from([97, 98, 256, 257, 0xC3, 0xA9, 0x80, 259]), max_size=12),
    st.lists(st.text("abé\ufffd", min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_equals_decoding_at_the_end(tokens: list[int], stop: list[str]) -> None:
    tokenizer = BPETokenizer([(97, 98), (256, 97), (0xF0, 0x9F), (0x80, 98)])
    text = TextStream(tokenizer, [], stop)
    taken: list[int] = []
    for token in tokens:
        taken.append(token)
        text.add(token)
        assert tokenizer.decode(taken).startswith(text.text)
        if text.stopped:
            break
    text.close()
    whole = tokenizer.decode(taken)
    places = [whole.find(string) for string in stop if string in whole]
    assert text.text == whole[: min(places, default=len(whole))]


def test_words_keep_their_distance_to_the_prompt() -> None:
    tokenizer = WordTokenizer(["I", "had", "always", "thought", ",", "--"])
    prompt, tokens = tokenizer.encode("I had"), tokenizer.encode("always , thought -- I")
    pieces = stream(tokenizer, tokens, [], prompt)
    assert "I had" + "".join(pieces) == "I had always, thought -- I" == tokenizer.decode(prompt + tokens)
    assert pieces[:2] == [" always", ","]


def test_text_to_text(tokenizer: BPETokenizer) -> None:
    torch.manual_seed(1)
    model = GPT(ModelConfig(tokenizer.vocab_size, CONTEXT, 1, 1, 8))
    prompts = ["ab", "", "é<|endoftext|>b"]
    pieces: dict[int, str] = {0: "", 1: "", 2: ""}
    texts = generate_text(
        model,
        tokenizer,
        prompts,
        60,
        seed=3,
        on_text=lambda row, text: pieces.update({row: pieces[row] + text}),
    )
    end = tokenizer.end_of_text
    ids = [[256], [end], [0xC3, 0xA9, end, 98]]
    assert texts == [tokenizer.decode(row) for row in generate(model, ids, 60, seed=3, end_of_text=end)]
    assert list(pieces.values()) == texts

    stop = texts[0][8:11]
    cut = [text[: text.index(stop)] if stop in text else text for text in texts]
    assert generate_text(model, tokenizer, prompts, 60, seed=3, stop=["never that", stop]) == cut
    assert 0 < len(cut[0]) <= 8


def test_a_stop_string_ends_the_work(tokenizer: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = GPT(ModelConfig(tokenizer.vocab_size, CONTEXT, 1, 1, 8))
    (text,) = generate_text(model, tokenizer, ["ab"], 60, seed=3)
    passes, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, **options: (passes.append(1), hidden(ids, **options))[1])
    generate_text(model, tokenizer, ["ab"], 60, seed=3, stop=[text[5]])
    assert len(passes) <= 8


def test_an_empty_stop_string_and_an_unknown_character_are_named() -> None:
    tokenizer = CharTokenizer("abc")
    model = GPT(ModelConfig(tokenizer.vocab_size, CONTEXT, 1, 1, 8))
    with pytest.raises(ValueError, match="empty string"):
        generate_text(model, tokenizer, ["a"], 3, stop=["b", ""])
    with pytest.raises(ValueError, match="'x'"):
        generate_text(model, tokenizer, ["abxc"], 3)


def test_what_no_memory_holds_is_refused_first(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedgpt.gpt.device.total_memory", lambda _: 1 << 20)
    assert len(generate(model, PROMPTS, 1)) == 4
    with pytest.raises(ValueError, match=r"writing 4,000 texts of up to 16 tokens at once needs .* GiB"):
        generate(model, PROMPTS * 1000, 100)
    with pytest.raises(ValueError, match="max_tokens = 1048577 is not allowed"):
        generate(model, PROMPTS, (1 << 20) + 1)
