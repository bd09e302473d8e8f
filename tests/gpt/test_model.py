"""The model against transformers' GPT-2, torch's own transformer layers, and the published parameter counts."""

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from fusedgpt.gpt.config import PRESETS, ModelConfig, RunConfig, preset
from fusedgpt.gpt.huggingface import GELU, to_transformers
from fusedgpt.gpt.model import GPT
from fusedgpt.kernels import reference

SMALL = {"vocab_size": 130, "context_length": 24, "n_layer": 2, "n_head": 3, "n_embd": 36}
SIZES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def random_model(seed: int = 0, **options: object) -> GPT:
    """A model whose every parameter is random: fresh biases and LayerNorms would hide mistakes."""
    model = GPT(ModelConfig(**(SMALL | options)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.15, generator=generator).add_(0.5 if p.dim() == 1 else 0.0)
    return model


def random_ids(batch: int, length: int, vocab_size: int = SMALL["vocab_size"], seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def rival(model: GPT) -> GPT2LMHeadModel:
    """transformers' GPT-2 with this model's weights."""
    c = model.config
    config = GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.context_length,
        n_embd=c.n_embd,
        n_layer=c.n_layer,
        n_head=c.n_head,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        activation_function=GELU[c.gelu],
        attn_implementation="eager",
    )
    other = GPT2LMHeadModel(config).to(model.wte.weight.dtype)
    lacking = other.load_state_dict(to_transformers(model), strict=False)
    assert lacking.missing_keys == ["lm_head.weight"]  # tied
    assert not lacking.unexpected_keys
    return other


def gradients(model: GPT) -> dict[str, Tensor]:
    """This model's gradients under transformers' names and in its shapes."""
    twin = copy.deepcopy(model)
    for ours, p in zip(twin.parameters(), model.parameters(), strict=True):
        ours.data = p.grad
    return to_transformers(twin)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("options", "batch", "length"),
    [
        ({}, 2, 24),
        ({"qkv_bias": False}, 3, 17),
        ({"bias": False}, 1, 1),
        ({"gelu": "exact"}, 2, 11),
        ({"vocab_size": 128, "n_head": 1, "n_embd": 20, "n_layer": 3}, 2, 7),
        ({"vocab_size": 300, "n_head": 4, "n_embd": 64, "n_layer": 1}, 5, 23),
    ],
)
def test_logits_loss_and_every_gradient_equal_those_of_transformers(
    options: dict, batch: int, length: int
) -> None:
    model = random_model(**options)
    other = rival(model)
    ids = random_ids(batch, length + 1, model.config.vocab_size)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[1:, 0] = -100

    logits = model(inputs)
    expected_logits = other(inputs).logits
    assert logits.shape == expected_logits.shape
    assert relative(logits, expected_logits) < 1e-5

    loss = model(inputs, targets)
    expected_loss = F.cross_entropy(expected_logits.flatten(0, 1), targets.flatten())
    assert abs(loss.item() / expected_loss.item() - 1) < 1e-5

    loss.backward()
    expected_loss.backward()
    ours = gradients(model)
    expected = dict(other.named_parameters())
    names = ["transformer." + name for name, _ in model.named_parameters()]
    errors = {name: relative(ours[name], expected[name].grad) for name in names}
    assert not {name: error for name, error in errors.items() if not error < 1e-5}


def test_the_loss_is_the_one_that_transformers_reports() -> None:
    model, ids = random_model(), random_ids(2, 20)
    assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(
        rival(model)(ids, labels=ids).loss.item(), rel=1e-5
    )


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("bias", [True, False])
def test_untied_and_post_norm_models_equal_torchs_transformer_layers(norm: str, bias: bool) -> None:
    model = random_model(norm=norm, bias=bias, tie_weights=False).double()
    config, ids = model.config, random_ids(2, 19)
    x = model.wte.weight[ids] + model.wpe.weight[:19]
    for block in model.h:
        layer = nn.TransformerEncoderLayer(
            config.n_embd,
            config.n_head,
            4 * config.n_embd,
            dropout=0.0,
            activation=lambda h: F.gelu(h, approximate="tanh"),
            batch_first=True,
            norm_first=norm == "pre",
            bias=bias,
        ).double()
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (layer.self_attn.out_proj, block.attn.c_proj),
            (layer.linear1, block.mlp.c_fc),
            (layer.linear2, block.mlp.c_proj),
            (layer.norm1, block.ln_1),
            (layer.norm2, block.ln_2),
        ]
        for theirs, ours in pairs:
            theirs.load_state_dict(ours.state_dict())
        layer.self_attn.in_proj_weight.data = block.attn.c_attn.weight.data
        if bias:
            layer.self_attn.in_proj_bias.data = block.attn.c_attn.bias.data
        mask = nn.Transformer.generate_square_subsequent_mask(19, dtype=torch.float64)
        x = layer(x, src_mask=mask, is_causal=True)
    if norm == "pre":
        x = F.layer_norm(x, x.shape[-1:], model.ln_f.weight, model.ln_f.bias)
    expected = x @ model.lm_head.weight[: config.vocab_size].T
    assert relative(model(ids), expected) < 1e-12


@functools.cache
def counted(name: str, **options: object) -> int:
    config = PRESETS[name] | {"context_length": 1024, "vocab_size": 50257} | options
    with torch.device("meta"):
        return GPT(RunConfig.from_flat(config).model).num_params()


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (
            {"qkv_bias": False, "tie_weights": False},
            (163_009_536, 406_212_608, 838_220_800, 1_637_792_000),
        ),
        ({"qkv_bias": False}, (124_412_160, 354_749_440, 773_891_840, 1_557_380_800)),
        ({}, (124_439_808, None, None, 1_557_611_200)),
    ],
)
def test_the_four_sizes_have_the_published_parameter_counts(options: dict, counts: tuple) -> None:
    for name, count in zip(SIZES, counts, strict=True):
        if count is not None:
            assert counted(name, **options) == count, name


def test_the_sizes_in_memory() -> None:
    mib = [counted(name, qkv_bias=False, tie_weights=False) * 4 / 2**20 for name in SIZES]
    assert [round(size, 2) for size in mib] == [621.83, 1549.58, 3197.56, 6247.68]


def test_a_shorter_context_has_fewer_positions_and_a_block_its_two_halves() -> None:
    assert counted("gpt2", context_length=256, qkv_bias=False, tie_weights=False) == 162_419_712
    assert counted("gpt2", context_length=256, qkv_bias=False) == 123_822_336
    with torch.device("meta"):
        model = GPT(ModelConfig(qkv_bias=False))
    assert sum(p.numel() for p in model.h[0].mlp.parameters()) == 4_722_432
    assert sum(p.numel() for p in model.h[0].attn.parameters()) == 2_360_064
    assert model.num_params() - model.num_params(position_embeddings=False) == 1024 * 768


@pytest.mark.parametrize(
    "names",
    [
        {"context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12, "drop_rate": 0.1},
        {"context_len": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "dropout": 0.1},
    ],
)
def test_a_configuration_dictionary_in_either_spelling_builds_the_model(names: dict) -> None:
    gpt_config_124m = {"vocab_size": 50257, "qkv_bias": False, **names}
    with torch.device("meta"):
        tied = GPT(ModelConfig.from_dict(gpt_config_124m))
        untied = GPT(ModelConfig.from_dict(gpt_config_124m | {"tie_weights": False}))
    assert (tied.num_params(), untied.num_params()) == (124_412_160, 163_009_536)
    assert (tied.config.embd_dropout, tied.config.attn_dropout, tied.config.resid_dropout) == (0.1, 0.1, 0.1)


def test_every_preset_builds_a_model() -> None:
    with torch.device("meta"):
        assert all(GPT(preset(name).model).num_params() > 0 for name in PRESETS)


def test_initial_weights_have_gpt2s_spread() -> None:
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=1000, context_length=256, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
            continue
        rows = p[:1000] if p is model.wte.weight else p
        std = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
        error = 4 * std / math.sqrt(2 * rows.numel())  # four standard errors of a standard deviation
        assert abs(rows.std().item() - std) < error, name
        assert abs(rows.mean().item()) < 4 * std / math.sqrt(rows.numel()), name
    assert not model.wte.weight[1000:].any()


def test_padded_vocabulary_rows_take_no_part() -> None:
    model, ids = random_model(tie_weights=False), random_ids(2, 11)
    logits, loss = model(ids), model(ids, ids)
    loss.backward()
    for table in model.vocabulary_tables():
        assert table.shape[0] == 256
        assert not table.grad[130:].any()
        table.data[130:] = 1e4
    assert torch.equal(model(ids), logits)
    assert torch.equal(model(ids, ids), loss)


def test_a_sequence_that_is_too_long_is_named() -> None:
    with pytest.raises(ValueError, match="25 tokens do not fit a context of 24"):
        random_model()(random_ids(1, 25))


DROPOUTS = {"embd_dropout": 0.3, "attn_dropout": 0.3, "resid_dropout": 0.3}


def backward(model: GPT, ids: Tensor, seed: int = 0, **options: object) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(ids, ids, seed=torch.tensor([seed]), **options)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_recomputing_blocks_gives_the_same_bits_and_keeps_fewer_activations(norm: str) -> None:
    model, ids = random_model(norm=norm, n_layer=4, **DROPOUTS), random_ids(2, 24)
    loss, grads = backward(model, ids)
    again, again_grads = backward(model, ids, recompute=True)
    assert torch.equal(loss, again)
    assert all(map(torch.equal, grads, again_grads))

    def kept(recompute: bool) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            model(ids, ids, seed=torch.tensor([0]), recompute=recompute)
        return sum(sizes)

    assert kept(True) < kept(False) / 2


@pytest.mark.parametrize("rate", [*DROPOUTS, None])
def test_dropout_follows_its_seed_and_only_in_training(rate: str | None) -> None:
    rates = DROPOUTS if rate is None else {rate: 0.3}
    model, ids = random_model(**rates), random_ids(2, 24)
    loss, grads = backward(model, ids, seed=5)
    again, again_grads = backward(model, ids, seed=5)
    assert torch.equal(loss, again)
    assert all(map(torch.equal, grads, again_grads))
    assert loss != backward(model, ids, seed=6)[0]
    model.eval()
    assert loss != backward(model, ids, seed=5)[0]
    assert torch.equal(model(ids), random_model()(ids))


def test_training_with_dropout_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="needs a seed"):
        random_model(**DROPOUTS)(random_ids(1, 4))


def test_every_dropout_of_a_step_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = []

    def recording(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(seed: Tensor, stream: int, *args: object) -> Tensor:
            streams.append(stream)
            return function(seed, stream, *args)

        return call

    for name in ("keep_mask", "attention_keep_mask"):
        monkeypatch.setattr(reference, name, recording(getattr(reference, name)))
    backward(random_model(n_layer=3, **DROPOUTS), random_ids(1, 5))
    assert len(streams) == 1 + 3 * 3  # the embeddings, and in each block attention and two additions
    assert len(set(streams)) == len(streams)


def test_lower_precision_with_a_float32_residual_stream() -> None:
    model, ids = random_model(n_layer=8), random_ids(4, 24)
    exact = model.double()(ids)
    model.float()
    logits = model(ids, dtype=torch.bfloat16)
    wide = model(ids, dtype=torch.bfloat16, residual_dtype=torch.float32)
    assert logits.dtype == wide.dtype == torch.bfloat16
    assert relative(wide.double(), exact) < relative(logits.double(), exact) < 0.03
    model(ids, ids, dtype=torch.bfloat16).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
