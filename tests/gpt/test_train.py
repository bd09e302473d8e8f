"""Training as a whole on tiny models: it learns, it resumes bit for bit, and it stops the way it says."""

import gzip
import json
import math
import os
import re
import signal
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from fusedgpt.data.corpus import open_corpus
from fusedgpt.data.documents import document_batches
from fusedgpt.data.shards import tokenize
from fusedgpt.data.tokenizers import make_tokenizer
from fusedgpt.gpt.checkpoint import checkpoints, model_tensors
from fusedgpt.gpt.config import ModelConfig, RunConfig, TrainConfig
from fusedgpt.gpt.evaluate import CorpusReport, evaluate_run, mean_loss
from fusedgpt.gpt.metrics import read_metrics
from fusedgpt.gpt.model import GPT
from fusedgpt.gpt.optim import build_optimizers
from fusedgpt.gpt.run import load_run
from fusedgpt.gpt.settings import resolve
from fusedgpt.gpt.train import loop, preparation
from fusedgpt.gpt.train import step as step_module
from fusedgpt.gpt.train.loop import TrainingError, train
from fusedgpt.gpt.train.step import TrainStep

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    shape = ModelConfig(
        29, context_length=16, n_layer=1, n_head=2, n_embd=16, attn_dropout=0.1, resid_dropout=0.1
    )
    settings = TrainConfig(
        data=str(tmp_path / "text.txt"),
        tokenizer="char",
        steps=12,
        batch_size=4,
        lr=1e-2,
        warmup_steps=2,
        log_interval=1,
        eval_interval=6,
        save_interval=6,
        sample_tokens=8,
        device="cpu",
    )
    return RunConfig(shape, settings)


def losses(run):
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def with_train(config, **changes):
    return replace(config, train=replace(config.train, **changes))


def test_a_run_learns_and_leaves_what_the_design_lists(config, tmp_path):
    run = tmp_path / "run"
    train(with_train(config, steps=60), run, origins={})
    curve = losses(run)
    assert curve[-1] < 0.75 * curve[0]
    assert {p.name for p in run.iterdir()} == {
        "config.toml",
        "tokenizer.json",
        "metrics.jsonl",
        "loss_curve.png",
        "samples.txt",
        "checkpoints",
        ".lock",
    }
    evaluations = [record for record in read_metrics(run / "metrics.jsonl") if "val_loss" in record]
    assert [record["step"] for record in evaluations] == list(range(0, 61, 6))
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]
    assert [p.name for p in checkpoints(run)] == ["step-000054", "step-000060"], "the newest two stay"


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "micro_batch": 0},
        {"optimizer": "adamw", "micro_batch": 2},
        {"optimizer": "muon", "micro_batch": 2},
        {"optimizer": "adamw", "dtype": "float16"},  # whose loss scale has moved by the time it is saved
    ],
)
def test_a_resumed_run_continues_bit_for_bit(config, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(step_module, "GROWTH_INTERVAL", 4)
    config = with_train(config, **changes, schedule="constant")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    train(with_train(config, steps=6), parts)
    train(config, parts, resume=True)
    assert losses(parts) == losses(whole)
    a, b = load_run(whole), load_run(parts)
    assert a.step == b.step == 12
    for name, tensor in model_tensors(a.model).items():
        assert torch.equal(tensor, model_tensors(b.model)[name]), name


def test_accumulation_gives_the_same_gradients_as_one_batch(config):
    shape = replace(config.model, vocab_size=30, attn_dropout=0.0, resid_dropout=0.0)
    ids = torch.randint(30, (4, 17), generator=torch.Generator().manual_seed(0))
    weights = []
    for size in (4, 1):
        torch.manual_seed(0)
        model = GPT(shape)
        settings = replace(config.train, micro_batch=size, dtype="float32", grad_clip=0.0)
        batches = iter([(part[:, :-1], part[:, 1:]) for part in ids.split(size)])
        loss, norm = TrainStep(model, build_optimizers(model, settings), batches, settings)()
        weights.append((loss, norm, model.wte.weight.detach().clone()))
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_dropout_masks_differ_between_steps_ranks_and_runs(config):
    def first_seeds(rank=0, seed=0, step=0):
        model = GPT(replace(config.model, vocab_size=30))
        settings = replace(config.train, dtype="float32", seed=seed, micro_batch=2)
        ids = torch.zeros(2, 16, dtype=torch.int64)
        batches = iter([(ids, ids)] * 8)
        stepper = TrainStep(model, build_optimizers(model, settings), batches, settings, rank=rank, step=step)
        seen = [stepper.seed.item()]
        for _ in range(2):
            stepper()
            seen.append(stepper.seed.item())
        return seen

    a = first_seeds()
    assert a[1] == a[0] + 2, "one seed a micro-step"
    assert first_seeds(step=1)[0] == a[1], "a resumed run goes on where it stopped"
    assert len({*a, *first_seeds(rank=1), *first_seeds(seed=1)}) == 9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_trains_with_float32_weights(config, tmp_path, dtype):
    run = tmp_path / "run"
    train(with_train(config, dtype=dtype, steps=40, float32_residual=dtype == "bfloat16"), run)
    assert losses(run)[-1] < 0.85 * losses(run)[0]
    assert all(tensor.dtype == torch.float32 for tensor in model_tensors(load_run(run).model).values())


def test_checkpointing_activations_changes_no_loss(config, tmp_path):
    train(config, tmp_path / "kept")
    train(with_train(config, activation_checkpointing=True), tmp_path / "recomputed")
    assert losses(tmp_path / "kept") == losses(tmp_path / "recomputed")


def test_ctrl_c_saves_and_says_how_to_go_on(config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"

    class Interrupting(TrainStep):
        def micro_step(self, inputs, targets):
            if self.step == 4:
                os.kill(os.getpid(), signal.SIGINT)
            super().micro_step(inputs, targets)

    monkeypatch.setattr(preparation, "TrainStep", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(config, run)
    assert [p.name for p in checkpoints(run)] == ["step-000004"], "the step in flight is done again"
    assert f"train --resume {run}" in capsys.readouterr().out.replace("\n", "")
    monkeypatch.undo()
    monkeypatch.setenv("FUSEDGPT_CACHE", str(tmp_path / "cache"))
    train(config, run, resume=True)
    train(config, tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("changes", [{}, {"optimizer": "muon"}, {"dtype": "float16"}])
def test_a_step_interrupted_between_micro_steps_is_done_again_on_resuming(
    config, tmp_path, monkeypatch, number, changes
):
    config = with_train(config, micro_batch=1, **changes)
    run, whole, done = tmp_path / "run", tmp_path / "whole", []

    class Interrupting(TrainStep):
        def micro_step(self, inputs, targets):
            super().micro_step(inputs, targets)
            done.append(self.step)
            if done.count(7) == 2:
                os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "TrainStep", Interrupting)
        with pytest.raises(KeyboardInterrupt):
            train(config, run)
    assert done.count(7) == 2, "the other two micro-steps are not waited for"
    assert [p.name for p in checkpoints(run)] == ["step-000006", "step-000007"]
    train(config, run, resume=True)
    train(config, whole)
    assert losses(run) == losses(whole)
    ours, theirs = (model_tensors(load_run(folder).model) for folder in (run, whole))
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name


@pytest.mark.parametrize("where", ["mean_loss", "generate_text"])
def test_a_signal_ends_an_evaluation_too(config, tmp_path, monkeypatch, where):
    run, original, calls = tmp_path / "run", getattr(loop, where), []

    def interrupted(*args, **settings):
        calls.append(where)
        os.kill(os.getpid(), signal.SIGINT)
        result = original(*args, **settings)
        calls.append("ended")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(loop, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config, run)
    assert calls == [where]
    at = {"mean_loss": [], "generate_text": ["step-000006"]}  # the first at step 0
    assert [p.name for p in checkpoints(run)] == at[where]
    train(config, run, resume=True)
    assert len(losses(run)) == 12


def test_a_slow_step_is_announced_and_measuring_it_changes_nothing(config, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(loop, "warn_of_slow_steps", lambda session: None)
        train(config, tmp_path / "unmeasured")
    train(config, tmp_path / "measured")
    assert "a step of" not in capsys.readouterr().out
    monkeypatch.setattr(loop, "SLOW_STEP", 0.0)
    train(config, tmp_path / "announced")
    before, _, after = capsys.readouterr().out.partition("a step of 4 x 16 tokens will take about 0 s here")
    assert "step  0" not in before
    assert "--batch-size" in after.splitlines()[0]
    assert losses(tmp_path / "unmeasured") == losses(tmp_path / "measured") == losses(tmp_path / "announced")


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_way_back(config, tmp_path):
    with pytest.raises(TrainingError, match=r"no recent loss is a finite number.*--lr"):
        train(with_train(config, lr=1e30, grad_clip=0.0, warmup_steps=0), tmp_path / "run")


class Poisoned(TrainStep):
    """Its second step's gradients are not finite, and its second loss is no number."""

    def update(self):
        if self.step == 1:
            self.gradients.buffer[0] = float("inf")
            self.loss.fill_(float("nan"))
        super().update()


def test_a_skipped_step_is_reported_and_training_goes_on(config, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setattr(preparation, "TrainStep", Poisoned)
    train(with_train(config, log_interval=3), run)
    records = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
    assert [record.get("skipped") for record in records] == [1, None, None, None]
    assert all(record["loss"] < 4.0 for record in records), "the other steps' losses"
    assert (
        "1 of the last 3 steps skipped: their losses or gradients were not finite" in capsys.readouterr().out
    )


def test_out_of_memory_says_what_helps_at_the_start_and_later(config, tmp_path, monkeypatch):
    class Greedy(TrainStep):
        def micro_step(self, inputs, targets):
            if self.step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().micro_step(inputs, targets)

    monkeypatch.setattr(preparation, "TrainStep", Greedy)
    with pytest.raises(TrainingError, match=r"out of memory: .*4 x 16 tokens.*--micro-batch 2"):
        train(config, tmp_path / "run")

    def greedy(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(preparation, "build_optimizers", greedy)
    with pytest.raises(TrainingError, match=r"out of memory: .*--micro-batch 2"):
        train(config, tmp_path / "other")


def test_micro_batch_auto_is_settled_and_saved_with_its_origin(config, tmp_path):
    run = tmp_path / "run"
    train(with_train(config, micro_batch="auto"), run)
    assert any(
        line.startswith("micro_batch = 4 ") and line.endswith("# from the device")
        for line in (run / "config.toml").read_text().splitlines()
    )


@pytest.mark.parametrize(("steps", "traced"), [(9, "6 to 8"), (2, "1 to 2")])
def test_a_profile_is_a_trace_and_a_table(config, tmp_path, capsys, steps, traced):
    run = tmp_path / "run"
    train(with_train(config, steps=steps, profile=True), run)
    events = json.loads(gzip.decompress((run / "trace.json.gz").read_bytes()))["traceEvents"]
    updates = [event for event in events if "Optimizer.step#AdamW" in event.get("name", "")]
    first, _, last = traced.split()
    assert len(updates) == int(last) - int(first) + 1
    out = capsys.readouterr().out
    assert "aten::addmm" in out
    assert "Self CPU" in out
    assert f"trace of steps {traced} of this run: {run}/trace.json.gz" in out


def test_a_second_run_does_not_write_over_the_first(config, tmp_path):
    run = tmp_path / "run"
    train(config, run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="--resume"):
        train(config, run)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_half_written_checkpoint_does_not_count(config, tmp_path):
    run = tmp_path / "run"
    train(config, run)
    (run / "checkpoints" / ".step-000099.tmp").mkdir()
    assert load_run(run).step == 12


def test_damaged_files_are_named(config, tmp_path, capsys):
    run = tmp_path / "run"
    train(config, run)
    for checkpoint in reversed(checkpoints(run)):
        assert load_run(run).step == int(checkpoint.name[5:])
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
    assert "warning: step-000012 is skipped: model.safetensors: it has 100 bytes" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"all of its 2 checkpoints are damaged \(step-000012, model"):
        load_run(run)
    (run / "tokenizer.json").write_text(json.dumps({"kind": "char", "characters": "ab"}))
    with pytest.raises(ValueError, match="tokenizer"):
        load_run(run)


def test_resuming_a_finished_run_reports_again_and_asks_for_more_steps(config, tmp_path, capsys):
    run = tmp_path / "run"
    train(config, run)
    files = [(run / name).read_bytes() for name in ("metrics.jsonl", "samples.txt")]
    capsys.readouterr()
    train(config, run, resume=True)
    out = capsys.readouterr().out
    assert "has done its 12 steps; go on with --steps and a larger number" in out
    assert "validation loss:" in out
    assert [(run / name).read_bytes() for name in ("metrics.jsonl", "samples.txt")] == files
    with pytest.raises(ValueError, match="has done 12 steps"):
        train(with_train(config, steps=11), run, resume=True)


def test_epochs_set_the_number_of_steps(config, tmp_path):
    run = tmp_path / "run"
    train(with_train(config, epochs=2.0, batch_size=10), run)
    windows = (int(len(TEXT) * 0.9) - 1) // 16
    assert len(losses(run)) == -(-2 * windows // 10)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"label_smoothing": 0.3}, "training loss with label smoothing 0.3;"),
        ({"z_loss": 0.1}, "training loss with z-loss 0.1;"),
        ({"label_smoothing": 0.3, "z_loss": 0.1}, "training loss with label smoothing 0.3 and z-loss 0.1;"),
    ],
)
def test_smoothing_changes_training_alone_and_is_named(config, tmp_path, capsys, changes, named):
    """Without a learning rate the weights stay: the training loss has the extra terms, the validation loss does not."""
    config = with_train(config, lr=0.0, steps=1, eval_interval=1)
    records = []
    for name, more in (("plain", {}), ("smoothed", changes)):
        train(with_train(config, **more), tmp_path / name)
        assert (named in capsys.readouterr().out) == bool(more)
        records.append(read_metrics(tmp_path / name / "metrics.jsonl"))
    (a,), (b,) = ([r["loss"] for r in run if "loss" in r] for run in records)
    # before training the logits are near 0: log-softmax is the same for all tokens, and the log-sum-exp is log V
    assert b == pytest.approx(a + changes.get("z_loss", 0.0) * math.log(30) ** 2, abs=0.1)
    assert b != a
    a, b = ([r["val_loss"] for r in run if "val_loss" in r] for run in records)
    assert a == b
    resumed = resolve({}, resume=tmp_path / "smoothed").config.train
    assert (resumed.label_smoothing, resumed.z_loss) == (
        changes.get("label_smoothing", 0.0),
        changes.get("z_loss", 0.0),
    )


def test_the_end_gives_bits_a_byte(config, tmp_path, capsys):
    """On text and on its shards; é has two bytes and is one token."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT.replace("q", "é"), encoding="utf-8")
    tokenizer = make_tokenizer("char", [text.read_text(encoding="utf-8")])
    tokenize(open_corpus(text), tokenizer, tmp_path / "shards")
    for number, data in enumerate((text, tmp_path / "shards")):
        run = tmp_path / str(number)
        train(with_train(config, data=str(data)), run)
        val_loss = read_metrics(run / "metrics.jsonl")[-1]["val_loss"]
        held_out = text.read_text(encoding="utf-8")[int(0.9 * len(TEXT)) :]
        bits = val_loss / math.log(2) * len(held_out) / len(held_out.encode())
        end = f"validation loss: {val_loss:.4f} nats a token, {bits:.4f} bits a byte"
        assert end in capsys.readouterr().out
        evaluate_run(run, str(tmp_path / "shards"), "cpu")
        loss, shown = map(
            float,
            re.search(r"loss: ([\d.]+) nats.*\n +([\d.]+) bits a byte", capsys.readouterr().out).groups(),
        )
        assert shown == pytest.approx(loss / math.log(2) * len(held_out) / len(held_out.encode()), abs=2e-4)


def test_an_evaluation_on_what_the_run_was_trained_on_says_so(config, tmp_path, capsys):
    (tmp_path / "copy.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT + "the end")
    train(config, tmp_path / "run")
    said = []
    for data in ("text.txt", "copy.txt", "other.txt", None):
        capsys.readouterr()
        evaluate_run(tmp_path / "run", data and str(tmp_path / data), "cpu")
        out = capsys.readouterr().out
        said.append("includes the text that the run was trained on" in out)
        assert ("text.txt, validation part: " in out) == (data is None)
    assert said == [True, True, False, False]


@pytest.mark.parametrize(
    ("steps", "least", "end"),
    [
        (
            1,
            0.3,
            "--min-accepted 0.3 was not applied: this run was shortened to 1 of the preset's 1,600 steps",
        ),
        (1, 0.4, "only 0% of the generated tales are accepted"),  # a share that the user asks for
        (1600, 0.3, "only 0% of the generated tales are accepted"),
        (1, 0.0, None),
    ],
)
def test_a_shortened_run_is_not_judged_by_the_presets_share(
    config, tmp_path, monkeypatch, capsys, steps, least, end
):
    report = CorpusReport(3.0, 0.2, bytes_per_token=4.0, accepted=0.0, sample="Once.")
    monkeypatch.setattr(loop, "evaluate_corpus", lambda *_: report)
    monkeypatch.setattr(loop, "run_steps", lambda session: session.log.history.append({"val_loss": 1.0}))
    monkeypatch.setattr(loop, "plot_runs", lambda _: tmp_path / "curve.png")
    config = with_train(config, data="tales:20", min_accepted=least, steps=steps)
    fails = end is not None and end.startswith("only")
    with pytest.raises(TrainingError, match=end) if fails else nullcontext():
        train(config, tmp_path / "run")
    out = capsys.readouterr().out
    assert ("not applied" in out) == (end is not None and not fails)
    assert "accepted: 0%" in out
    assert "Once." not in out, "the last evaluation has shown a sample"


def test_without_a_network_gpt2s_vocabulary_is_not_the_first_error(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    config = with_train(config, tokenizer="gpt2")
    with pytest.raises(
        FileNotFoundError, match=r"GPT-2's vocabulary is not on this machine.*--tokenizer bpe"
    ):
        train(config, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"^fineweb10B takes shards .*vocabulary.*--data FILE"):
        train(with_train(config, data="fineweb10B"), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"missing\.txt: no such file"):
        train(with_train(config, data="missing.txt"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_documents_are_scored_token_by_token_once(config):
    model = GPT(replace(config.model, vocab_size=30)).eval()
    documents = [[1, 2, 3, 4], list(range(20)), [5, 6]]
    batches = list(document_batches(documents, 16, 2, torch.device("cpu")))
    total = 0.0
    for ids in (documents[0], documents[1][:17], documents[1][16:], documents[2]):
        row = torch.tensor(ids)
        total += torch.nn.functional.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum").item()
    assert mean_loss(model, batches) == pytest.approx(total / (3 + 19 + 1), rel=1e-5)
