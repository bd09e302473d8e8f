"""`gpt doctor`: what it says of a machine, and that a wrong operator is not passed over."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fusedgpt.gpt import device as devices
from fusedgpt.gpt import doctor
from fusedgpt.gpt.cli import main
from fusedgpt.kernels import _triton, selfcheck
from fusedgpt.kernels.examples import SMALL, small
from fusedgpt.kernels.ops.attention import operator as attention
from fusedgpt.kernels.tiles import ATTENTION_ONE_PASS, TWO_PASSES, Hardware, OnePassTile

CPU = torch.device("cpu")


def test_every_operator_is_checked_and_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for operator in SMALL:
        (line,) = [line for line in out.splitlines() if line.startswith(f"{operator} ")]
        assert line.split()[1] == "PyTorch"
        assert line.split()[4] == "ok"
    for word in (torch.__version__, "python", "ptxas", "device    cpu", f"all {len(SMALL)} operators"):
        assert word in out


def test_a_wrong_operator_is_named_and_the_exit_code_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = SMALL["layer_norm"]

    def off(**tensors: torch.Tensor) -> torch.Tensor:
        y = example.call(**tensors)
        return y * 1.001 if y.dtype == torch.float32 and selfcheck.requested() == "auto" else y

    monkeypatch.setitem(SMALL, "layer_norm", replace(example, call=off))
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "WRONG" in line] == ["layer_norm"]
    assert f"1 of {len(SMALL)} operators fail here: layer_norm." in out


def test_an_operator_that_cannot_start_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no launch\nand more")

    monkeypatch.setitem(SMALL, "embed", replace(SMALL["embed"], call=fail))
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no launch" in out
    assert "and more" not in out
    assert out.count(" ok ") == len(SMALL) - 1


def test_a_forced_backend_that_cannot_run_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSEDGPT_BACKEND", "triton")
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "linear: the triton backend was asked for but cannot run" in capsys.readouterr().out


def test_it_works_without_triton() -> None:
    code = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTriton())
from fusedgpt.gpt.cli import main
sys.exit(main(["doctor", "--device", "cpu"]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton    none (No module named 'triton')" in done.stdout
    assert "operators are right" in done.stdout


def test_what_is_missing_and_what_is_doubtful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "missing_tools", lambda: ["there is no C compiler"])
    monkeypatch.setattr(doctor, "ptxas_version", lambda architecture: "12.8")
    facts = dict(doctor.facts(CPU))
    assert "there is no C compiler" in facts["launcher"]
    assert facts["ptxas"].startswith("12.8 for sm_90: can miscompile")
    monkeypatch.setattr(doctor, "ptxas_version", lambda architecture: "13.4")
    assert dict(doctor.facts(CPU))["ptxas"] == "13.4 for sm_90"


@pytest.mark.parametrize(
    ("architecture", "version", "doubted"),
    [
        ("sm_100", "3.6.0", True),
        ("sm_103", "3.6.0", True),
        ("sm_100", "3.7.0", False),
        ("sm_100", "3.10.0+git1", False),
        ("sm_90", "3.6.0", False),
        ("sm_120", "3.6.0", False),
    ],
)
def test_a_triton_that_leaves_out_barriers_is_doubted(
    architecture: str, version: str, doubted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="a card", total_memory=2**37)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton.triton, "__version__", version)
    monkeypatch.setattr(doctor, "hardware", lambda _: Hardware(architecture, 100))
    fact = dict(doctor.facts(torch.device("cuda")))["triton"]
    assert fact.startswith(version)
    assert ("Triton issue 9871" in fact and "fixed in 3.7" in fact) == doubted


def test_the_backward_in_one_pass_is_checked_where_there_is_a_row_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched = []
    original = attention._run
    monkeypatch.setattr(attention, "_run", lambda *a: launched.append(a[0]) or original(*a))
    row = OnePassTile(64, 32, 16, 1, 1, 100, 75, 48, "")  # 200 programs, which six heads do not fill
    monkeypatch.setitem(ATTENTION_ONE_PASS, "interpreter", (row, TWO_PASSES))
    monkeypatch.setenv("FUSEDGPT_BACKEND", "triton")
    monkeypatch.setattr(selfcheck, "small", lambda *a: [e for e in small(*a) if e.operator == "attention"])
    assert main(["doctor", "--device", "cpu"]) == 0
    assert [kernel.__name__ for kernel in launched].count("one_pass_kernel") == 1
    assert [kernel.__name__ for kernel in launched].count("key_kernel") == 1
    out = capsys.readouterr().out
    assert "\nattention, one pass   Triton" in out
    assert "all 2 operators are right" in out


def test_a_gpu_that_cannot_be_used_is_not_lost_silently(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = SimpleNamespace(returncode=0, stdout="GPU 0: NVIDIA H200 (UUID: GPU-1)\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.shutil, "which", lambda _: "/bin/nvidia-smi")
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: listed)
    assert "LOST: GPU 0: NVIDIA H200; torch" in dict(doctor.facts(CPU))["GPU"]
    assert devices.pick_device("auto").type == "cpu"
    assert "has a GPU that is not used: GPU 0: NVIDIA H200" in capsys.readouterr().err
    with pytest.raises(ValueError, match="cannot be used: GPU 0: NVIDIA H200"):
        devices.pick_device("cuda")


def test_a_device_beyond_those_there_are_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert devices.pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(ValueError, match="'cuda:1' cannot be used: torch finds 1 CUDA devices here"):
        devices.pick_device("cuda:1")


def test_an_unknown_device_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "gpu"]) == 2
    assert "device 'gpu' is none that torch knows" in capsys.readouterr().err
