"""Wrong input: what is raised, and that the message names the operator, the argument and what it got."""

import inspect
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusedgpt import kernels
from fusedgpt.kernels.backend import _triton

Arguments = dict[str, object]
SEED = torch.tensor(3)
LONG = torch.long


def _right() -> dict[str, Arguments]:
    """Arguments that every operator takes, with no tensor optional."""
    x, width, hidden = torch.ones(2, 5, 6), torch.ones(6), torch.ones(24)
    heads = torch.ones(2, 5, 3, 2)
    drop = {"dropout_p": 0.5, "seed": SEED}
    return {
        "embed": {
            "ids": torch.ones(2, 5, dtype=LONG),
            "wte": torch.ones(9, 6),
            "wpe": torch.ones(5, 6),
            **drop,
        },
        "layer_norm": {"x": x, "weight": width, "bias": width},
        "add_layer_norm": {"x": x, "residual": x, "weight": width, "bias": width, "x_bias": width, **drop},
        "linear": {"x": x, "weight": torch.ones(24, 6), "bias": hidden},
        "causal_attention": {
            "qkv": torch.ones(2, 5, 18),
            "n_head": 3,
            "first_key": torch.zeros(2, 5, dtype=LONG),
            **drop,
        },
        "attention": {"q": heads, "k": heads, "v": heads, "first_key": torch.zeros(2, 5, dtype=LONG), **drop},
        "gelu_mlp": {
            "x": x,
            "w_fc": torch.ones(24, 6),
            "b_fc": hidden,
            "w_proj": torch.ones(6, 24),
            "b_proj": width,
        },
        "linear_cross_entropy": {
            "x": torch.ones(4, 6),
            "weight": torch.ones(9, 6),
            "targets": torch.zeros(4, dtype=LONG),
        },
        "dropout": {"x": x, "p": 0.5, "seed": SEED},
    }


RIGHT = _right()
TENSORS = [
    (operator, name)
    for operator, arguments in RIGHT.items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]
DROPPING = [operator for operator, arguments in RIGHT.items() if "seed" in arguments]


def call(operator: str, **changes: object) -> object:
    function: Callable[..., object] = getattr(kernels, operator)
    return function(**RIGHT[operator] | changes)


def assert_refused(
    operator: str, changes: Arguments, error: type[Exception], argument: str, *got: object
) -> None:
    """`error`, in one line that starts with the operator and names the argument and what it got."""
    with pytest.raises(error) as caught:
        call(operator, **changes)
    message = str(caught.value)
    named = operator if message.startswith(operator) else operator.removeprefix("causal_")
    assert message.startswith(f"{named}: "), message
    assert "\n" not in message
    assert "tensor(" not in message
    assert re.search(rf"\b{argument}\b", message), message
    for each in got:
        assert str(each) in message, message


@pytest.mark.parametrize("operator", RIGHT)
def test_the_right_arguments_are_taken(operator: str) -> None:
    call(operator)


@pytest.mark.parametrize(("operator", "name"), TENSORS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtype(operator: str, name: str, dtype: torch.dtype) -> None:
    right = RIGHT[operator][name]
    assert isinstance(right, Tensor)
    assert_refused(operator, {name: right.to(dtype)}, TypeError, name, str(dtype)[6:])


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_numbers_of_the_other_kind(operator: str, name: str) -> None:
    right = RIGHT[operator][name]
    assert isinstance(right, Tensor)
    other = torch.int64 if right.is_floating_point() else torch.float32
    assert_refused(operator, {name: right.to(other)}, TypeError, name, str(other)[6:])


@pytest.mark.parametrize(("operator", "name"), TENSORS)
def test_device(operator: str, name: str) -> None:
    """Another device, for which the meta device does on any machine; the first tensor sets what the others miss."""
    right = RIGHT[operator][name]
    assert isinstance(right, Tensor)
    argument = "the input" if name == "x" and operator == "dropout" else name
    if operator in ("causal_attention", "attention") and name in ("qkv", "q"):
        argument = (
            "first_key" if name == "qkv" else "k"
        )  # the packed projection's parts are q, k and v inside
    assert_refused(operator, {name: right.to("meta")}, ValueError, argument, "cpu", "meta")


@pytest.mark.parametrize(("operator", "name"), TENSORS)
@pytest.mark.parametrize("value", [[1.0, 2.0], 1.5], ids=["list", "float"])
def test_not_a_tensor(operator: str, name: str, value: object) -> None:
    assert_refused(operator, {name: value}, TypeError, name, type(value).__name__)


@pytest.mark.parametrize("operator", DROPPING)
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), float("inf")])
def test_probability(operator: str, p: float) -> None:
    assert_refused(operator, {"p" if operator == "dropout" else "dropout_p": p}, ValueError, "probability", p)


@pytest.mark.parametrize("operator", DROPPING)
def test_a_probability_without_a_seed(operator: str) -> None:
    assert_refused(operator, {"seed": None}, ValueError, "seed", 0.5, "int64")


@pytest.mark.parametrize("operator", DROPPING)
@pytest.mark.parametrize(
    "seed", [3, SEED.int(), SEED.double(), torch.zeros(2, dtype=LONG), torch.zeros(0, dtype=LONG)]
)
def test_seed(operator: str, seed: object) -> None:
    got = tuple(seed.shape) if isinstance(seed, Tensor) else "int"
    assert_refused(operator, {"seed": seed}, TypeError, "seed", got, "int64")


PLAIN = [
    (operator, name)
    for operator in RIGHT
    for name in inspect.signature(getattr(kernels, operator)).parameters
    if not isinstance(RIGHT[operator].get(name), Tensor)
]


@pytest.mark.parametrize(("operator", "name"), PLAIN)
@pytest.mark.parametrize("elements", [1, 2])
def test_a_tensor_in_the_place_of_a_plain_value_is_not_printed(
    operator: str, name: str, elements: int
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        call(operator, **{name: torch.full((elements,), 0.625)})
    argument = "probability" if name in ("p", "dropout_p") else name
    assert re.match(rf"{operator}: {argument} is of type Tensor; it takes ", str(caught.value))
    assert "0.625" not in str(caught.value)


def test_the_choice_of_a_backend_prints_no_tensor() -> None:
    tensor = torch.full((2,), 0.625)
    with pytest.raises(ValueError, match=r"^use_backend: unknown backend of type Tensor; it is one of auto"):
        kernels.use_backend(tensor).__enter__()
    with pytest.raises(ValueError, match=r"^explain: unknown operator of type Tensor; it is one of embed"):
        kernels.explain(tensor, tensor)
    with pytest.raises(TypeError, match=r"^explain: x is 'cuda'; it takes a tensor"):
        kernels.explain("embed", "cuda")


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=LONG)


SHAPES: list[tuple[str, str, Tensor]] = [
    ("embed", "ids", ints(5)),
    ("embed", "ids", ints(2, 5, 1)),
    ("embed", "wte", zeros(9, 7)),
    ("embed", "wte", zeros(6)),
    ("embed", "wpe", zeros(5, 7)),
    ("embed", "wpe", zeros(5, 6, 1)),
    ("layer_norm", "x", zeros()),
    ("layer_norm", "x", zeros(3, 0)),
    ("layer_norm", "weight", zeros(7)),
    ("layer_norm", "weight", zeros(1)),
    ("layer_norm", "weight", zeros(1, 6)),
    ("layer_norm", "bias", zeros(5)),
    ("add_layer_norm", "residual", zeros(2, 5, 7)),
    ("add_layer_norm", "residual", zeros(5, 6)),
    ("add_layer_norm", "residual", zeros(2, 1, 6)),
    ("add_layer_norm", "weight", zeros(7)),
    ("add_layer_norm", "bias", zeros(2, 5, 6)),
    ("add_layer_norm", "x_bias", zeros(1)),
    ("linear", "x", zeros()),
    ("linear", "x", zeros(2, 7)),
    ("linear", "weight", zeros(6, 24)),
    ("linear", "weight", zeros(6)),
    ("linear", "weight", zeros(1, 24, 6)),
    ("linear", "bias", zeros(6)),
    ("linear", "bias", zeros(1)),
    ("causal_attention", "qkv", zeros(5, 18)),
    ("causal_attention", "qkv", zeros(2, 5, 20)),
    ("causal_attention", "qkv", zeros(2, 5, 0)),
    ("causal_attention", "first_key", ints(2)),
    ("causal_attention", "first_key", ints(2, 6)),
    ("attention", "q", zeros(2, 5, 6)),
    ("attention", "q", zeros(2, 5, 3, 0)),
    ("attention", "k", zeros(2, 5, 6)),
    ("attention", "k", zeros(1, 5, 3, 2)),
    ("attention", "k", zeros(2, 5, 1, 2)),
    ("attention", "k", zeros(2, 5, 3, 4)),
    ("attention", "v", zeros(2, 6, 3, 2)),
    ("attention", "v", zeros(2, 5, 3, 4)),
    ("attention", "first_key", ints(2, 1)),
    ("gelu_mlp", "x", zeros(2, 5, 7)),
    ("gelu_mlp", "w_fc", zeros(6, 24)),
    ("gelu_mlp", "w_fc", zeros(24)),
    ("gelu_mlp", "b_fc", zeros(6)),
    ("gelu_mlp", "w_proj", zeros(24, 6)),
    ("gelu_mlp", "w_proj", zeros(24)),
    ("gelu_mlp", "b_proj", zeros(24)),
    ("linear_cross_entropy", "x", zeros(2, 2, 6)),
    ("linear_cross_entropy", "x", zeros(4, 7)),
    ("linear_cross_entropy", "weight", zeros(9)),
    ("linear_cross_entropy", "weight", zeros(6, 9)),
    ("linear_cross_entropy", "targets", ints(5)),
    ("linear_cross_entropy", "targets", ints(2, 2)),
]


@pytest.mark.parametrize(
    ("operator", "name", "value"), SHAPES, ids=lambda v: str(tuple(v.shape)) if isinstance(v, Tensor) else v
)
def test_shape(operator: str, name: str, value: Tensor) -> None:
    assert_refused(operator, {name: value}, ValueError, name, tuple(value.shape))


OTHERS: list[tuple[str, Arguments, type[Exception], str, object]] = [
    ("embed", {"ids": ints(2, 6)}, ValueError, "ids", 6),
    ("embed", {"ids": torch.full((2, 5), 9)}, ValueError, "ids", 9),
    ("embed", {"ids": torch.full((2, 5), -1)}, ValueError, "ids", -1),
    ("embed", {"out_dtype": LONG}, TypeError, "out_dtype", "int64"),
    ("layer_norm", {"out_dtype": torch.bool}, TypeError, "out_dtype", "bool"),
    ("causal_attention", {"n_head": 4}, ValueError, "heads", 4),
    ("causal_attention", {"n_head": 0}, ValueError, "heads", 0),
    ("causal_attention", {"n_head": -3}, ValueError, "heads", -3),
    ("causal_attention", {"n_head": 3.0}, TypeError, "n_head", "float"),
    ("causal_attention", {"n_head": None}, TypeError, "n_head", None),
    *(
        (operator, {"scale": scale}, ValueError, "scale", scale)
        for operator in ("causal_attention", "attention")
        for scale in (0.0, -0.4, float("nan"))
    ),
    ("attention", {"k": zeros(2, 5, 3, 2).half()}, TypeError, "k", "float16"),
    ("attention", {"v": zeros(2, 5, 3, 2).double()}, TypeError, "v", "float64"),
    ("gelu_mlp", {"approximate": "sigmoid"}, ValueError, "approximate", "sigmoid"),
    ("gelu_mlp", {"approximate": None}, ValueError, "approximate", None),
    ("linear_cross_entropy", {"vocab_size": 10}, ValueError, "vocab_size", 10),
    ("linear_cross_entropy", {"vocab_size": 0}, ValueError, "vocab_size", 0),
    ("linear_cross_entropy", {"vocab_size": -1}, ValueError, "vocab_size", -1),
    ("linear_cross_entropy", {"reduction": "avg"}, ValueError, "reduction", "avg"),
    ("linear_cross_entropy", {"label_smoothing": -0.1}, ValueError, "label_smoothing", -0.1),
    ("linear_cross_entropy", {"label_smoothing": 1.1}, ValueError, "label_smoothing", 1.1),
    ("linear_cross_entropy", {"label_smoothing": float("nan")}, ValueError, "label_smoothing", "nan"),
    ("linear_cross_entropy", {"z_loss": -1e-4}, ValueError, "z_loss", -1e-4),
    ("linear_cross_entropy", {"z_loss": float("inf")}, ValueError, "z_loss", "inf"),
    ("linear_cross_entropy", {"z_loss": float("nan")}, ValueError, "z_loss", "nan"),
    ("linear_cross_entropy", {"targets": torch.tensor([0, 9, 1, 2])}, ValueError, "target", 9),
    ("linear_cross_entropy", {"targets": torch.tensor([0, -1, 1, 2])}, ValueError, "target", -1),
    (
        "linear_cross_entropy",
        {"targets": torch.tensor([0, 8, -100, 2]), "vocab_size": 8},
        ValueError,
        "target",
        8,
    ),
]


@pytest.mark.parametrize(("operator", "changes", "error", "argument", "got"), OTHERS)
def test_the_rest(
    operator: str, changes: Arguments, error: type[Exception], argument: str, got: object
) -> None:
    assert_refused(operator, changes, error, argument, got)


def test_causal_attention_in_the_manner_of_sdpa_is_told_to_pack() -> None:
    x = zeros(2, 5, 6)
    for arguments in ((x, x, x), (x, x)):
        with pytest.raises(TypeError, match=re.escape("torch.cat((q, k, v), -1)")) as refused:
            kernels.causal_attention(*arguments)
        assert "attention(q, k, v)" in str(refused.value)
        assert "tensor(" not in str(refused.value)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", [-1, -101, 7, 8, 2**31, 2**62])
def test_targets_out_of_range_are_named_whatever_the_reduction(
    reduction: str, target: int, label_smoothing: float, backend: str
) -> None:
    if backend == "triton" and not _triton.INTERPRETED:
        pytest.skip("compiled kernels take no CPU tensors")
    targets = torch.tensor([0, -100, target, 6])
    changes: Arguments = {"targets": targets, "vocab_size": 7, "reduction": reduction}
    with kernels.use_backend(backend):
        for x in (torch.ones(4, 6), torch.ones(4, 6, requires_grad=True)):
            changes |= {"x": x, "label_smoothing": label_smoothing}
            assert_refused("linear_cross_entropy", changes, ValueError, "target", target, "[0, 7)")
