"""The model on either backend: the same losses within rounding and with dropout the same masks, transformers' gradients."""

import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fusedgpt.gpt import model as model_module
from fusedgpt.gpt.config import ModelConfig, TrainConfig
from fusedgpt.gpt.huggingface import GELU, to_transformers
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import build_optimizers
from fusedgpt.gpt.train.step import TrainStep
from fusedgpt.kernels import use_backend

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = {
    "embed",
    "layer_norm",
    "add_layer_norm",
    "linear",
    "causal_attention",
    "gelu_mlp",
    "linear_cross_entropy",
}


def losses(steps: int) -> list[float]:
    torch.manual_seed(0)
    shape = ModelConfig(
        40, context_length=9, n_layer=1, n_head=1, n_embd=16, attn_dropout=0.1, resid_dropout=0.1
    )
    model = GPT(shape).to(DEVICE)
    tokens = torch.arange(400, device=DEVICE) ** 2 % 37

    def batches():
        generator = torch.Generator().manual_seed(1)
        while True:
            starts = torch.randint(390, (1,), generator=generator).tolist()
            rows = torch.stack([tokens[start : start + 10] for start in starts])
            yield rows[:, :-1], rows[:, 1:]

    settings = TrainConfig(steps=steps, batch_size=1, lr=1e-2, warmup_steps=5, dtype="float32")
    step = TrainStep(model, build_optimizers(model, settings), batches(), settings)
    return [step()[0].item() for _ in range(steps)]


@pytest.fixture
def run_on_triton(monkeypatch):
    """Called, it sends the model's operators to their kernels; what ran there is in the set that it returns."""

    def switch() -> set[str]:
        ran = set()

        def on_triton(name, function):
            # the embedding takes a program for each of 128 rows of the vocabulary: 150 ms a step
            every = 10 if name == "embed" else 1
            calls = itertools.count()

            def call(*args, **kwargs):
                ran.add(name)
                with use_backend("torch" if next(calls) % every else "triton"):
                    return function(*args, **kwargs)

            return call

        for name in OPERATORS:
            monkeypatch.setattr(model_module, name, on_triton(name, getattr(model_module, name)))
        return ran

    return switch


def test_two_hundred_steps_give_the_same_losses_on_either_backend(run_on_triton):
    with use_backend("torch"):
        plain = losses(200)
    ran = run_on_triton()
    fused = losses(200)
    assert ran == OPERATORS
    assert plain[-1] < 0.75 * plain[0], "it learns, so the losses say something"
    assert fused == pytest.approx(plain, rel=2e-3)
    assert fused[0] == pytest.approx(plain[0], rel=1e-6), "another mask would show at once"


@pytest.mark.parametrize("gelu", GELU)
def test_gradients_are_those_of_transformers_at_an_uneven_length(run_on_triton, gelu):
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(ModelConfig(50, context_length=40, gelu=gelu, **sizes)).to(DEVICE)
    for p in model.parameters():
        p.data.normal_(0.0, 0.2)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50,
            n_positions=40,
            **sizes,
            bos_token_id=0,
            eos_token_id=0,
            activation_function=GELU[gelu],
            attn_implementation="eager",
        )
    )
    theirs.load_state_dict(to_transformers(model), strict=False)
    theirs.to(DEVICE).eval().tie_weights()
    ids = torch.randint(50, (2, 38), device=DEVICE)
    ids, targets = ids[:, :-1], ids[:, 1:]
    logits = theirs(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    ran = run_on_triton()
    loss = model(ids, targets)
    loss.backward()
    assert ran == OPERATORS
    torch.testing.assert_close(loss, expected)
    for p in model.parameters():
        p.data = p.grad
    found = to_transformers(model)  # the gradients under their names and in their shapes
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(
            found[name], p.grad.cpu(), rtol=1e-4, atol=1e-4 * p.grad.abs().max().item(), msg=name
        )
