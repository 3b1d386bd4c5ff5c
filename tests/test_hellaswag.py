"""HellaSwag: packed rows give the losses of a plain implementation, one ending at a time, in any batch."""

import http.server
import json
import os
import random
import sys
import threading
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import ROOT, run_script

import hellaswag
from hellaswag import Example
from lab import checkpoint, common
from lab.common import UserError
from lab.devices import Machine
from lab.tokenizer import get_tokenizer
from model import GPT, GPTConfig

REAL = ROOT / "tests/data/hellaswag_50.jsonl"
LINE = {"ind": 0, "activity_label": "Baking", "ctx": "A man kneads dough. he", "label": 1, "split": "val"}
LINE["endings"] = ["bakes bread.", "bakes a loaf of bread.", "is a shoe on the moon.", "runs."]
MACHINE = Machine(torch.device("cpu"), torch.float32, rank=0, world_size=1, fsdp=False)


def dense(block_size=1024, vocab_size=257, **settings):
    """A model whose logits are spread out, so that a wrong mask or position cannot hide."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=3, n_head=2, n_embd=32, **settings))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def overflowing_moe(**settings):
    """Capacity would drop most choices: they reach the output only when evaluation routes dropless."""
    capacity = {"train_capacity": 0.5, "eval_capacity": 0.5, "min_capacity": 1}
    return dense(n_exp=4, top_k=2, stride=2, use_noisy_top_k=True, dropout=0.1, **capacity, **settings)


def random_examples(count, longest=40):
    """Examples of tokens of two bytes."""
    draw, examples = np.random.default_rng(0), []
    for _ in range(count):
        texts = [tuple(draw.integers(257, size=draw.integers(1, longest)).tolist()) for _ in range(5)]
        label = int(draw.integers(4))
        examples.append(Example(texts[0], tuple(texts[1:]), label, (2,) * len(texts[1 + label])))
    return examples


@torch.no_grad()
def plain_losses(model, examples):
    """Total and mean loss (n, 4) of each ending, one forward per ending, with logits at every position."""
    model.eval()
    table = []
    for context, endings, *_ in examples:
        for ending in endings:
            idx = torch.tensor([context + ending])[:, -model.config.block_size :]
            log_probs = torch.log_softmax(model(idx[:, :-1], dropless=True).logits[0].float(), dim=-1)
            losses = -log_probs.gather(1, idx[0, 1:, None])[-len(ending) :, 0].double()
            table.append((losses.sum().item(), losses.mean().item()))
    total, mean = np.array(table).T.reshape(2, -1, 4)
    return total, mean


def mean_losses(model, examples, **options):
    total, counts = hellaswag.ending_losses(model, examples, "cpu", **options)
    return total / counts


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1024, 60, 30, 2])
@pytest.mark.parametrize("build", [dense, overflowing_moe])
def test_losses_are_those_of_one_by_one(build, block_size):
    model, examples = build(block_size=block_size), random_examples(40)
    total, counts = hellaswag.ending_losses(model, examples, "cpu")
    expected_total, expected_mean = plain_losses(model, examples)
    assert np.abs(total / counts - expected_mean).max() < 1e-5 and np.allclose(total, expected_total, rtol=1e-5)


def test_capacity_would_have_changed_the_losses():
    """Without this the dropless tests could not fail."""
    model, context = overflowing_moe().eval(), torch.tensor([random_examples(1)[0].endings[0]])
    with torch.no_grad():
        assert (model(context).logits - model(context, dropless=True).logits).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name, block_size", [("gpt2", 1024), ("bytes", 1024), ("bytes", 200)])
def test_scores_of_real_examples_are_those_of_one_by_one(name, block_size):
    tokenizer, raw = get_tokenizer(name), hellaswag.load_examples(REAL)
    examples, model = hellaswag.tokenize(raw, tokenizer), dense(block_size, tokenizer.vocab_size)
    result = hellaswag.summarize(examples, *hellaswag.ending_losses(model, examples, "cpu"))
    total, mean = plain_losses(model, examples)
    labels = np.array([x["label"] for x in raw])
    accuracy = (mean.argmin(axis=1) == labels).mean()
    assert result["predictions"] == mean.argmin(axis=1).tolist()
    assert (result["n"], result["acc"], result["acc_norm"]) == (50, (total.argmin(axis=1) == labels).mean(), accuracy)
    assert result["stderr"] == pytest.approx((accuracy * (1 - accuracy) / 50) ** 0.5)
    if block_size == 1024:  # nothing cropped: the loss of whole endings, per byte of their text
        n_bytes = [len(f" {x['endings'][x['label']]}".encode()) for x in raw]
        bits = total[np.arange(50), labels] / np.log(2) / n_bytes
        assert result["bpb"] == pytest.approx(bits.mean(), rel=1e-5)
    streams = hellaswag.evaluate(model, examples, MACHINE)
    assert streams == {"hella": result["acc_norm"], "hella_bpb": result["bpb"]}


def test_losses_do_not_depend_on_the_batch():
    model, examples = overflowing_moe(block_size=64), random_examples(12)
    together = mean_losses(model, examples)
    order = np.random.default_rng(1).permutation(len(examples))
    shuffled = mean_losses(model, [examples[i] for i in order], batch_tokens=700)
    alone = np.concatenate([mean_losses(model, [example]) for example in examples])
    assert np.abs(shuffled - together[order]).max() < 1e-5 and np.abs(alone - together).max() < 1e-5


def test_rows_share_the_context_and_batches_keep_the_budget():
    examples = random_examples(20)
    rows, _ = hellaswag.build_rows(examples, 1024)
    tokens = sum(len(x.context) + sum(len(ending) - 1 for ending in x.endings) for x in examples)
    assert len(rows) == 20 and sum(row.length for row in rows) == tokens
    batches = hellaswag.split_rows(rows, 500)
    assert [row for batch in batches for row in batch] == rows and len(batches) < 20
    assert all(len(batch) * batch[0].length <= 500 for batch in batches)
    assert [len(batch) for batch in hellaswag.split_rows(rows, 1)] == [1] * 20


def test_a_broken_model_has_no_accuracy_and_a_cropped_ending_the_bytes_of_its_scored_tokens():
    model, short = dense(block_size=2), Example((1, 2), ((3, 4, 5), (6,), (7,), (8,)), 0, (5, 5, 2))
    total, counts = hellaswag.ending_losses(model, [short], "cpu")
    assert counts[0, 0] == 1
    assert hellaswag.summarize([short], total, counts)["bpb"] == pytest.approx(total[0, 0] / np.log(2) / 2)
    model.transformer.ln_f.weight.data.fill_(torch.nan)
    assert all(np.isnan(value) for value in hellaswag.evaluate(model, [short], MACHINE).values())


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(training):
    model = overflowing_moe().train(training)
    model(torch.arange(20)[None], torch.arange(20)[None]).loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    hellaswag.evaluate(model, random_examples(5), MACHINE)
    with pytest.raises(IndexError):  # a token beyond the vocabulary: the mode comes back after an error too
        hellaswag.evaluate(model, [Example((999,), ((1,),) * 4, 0, (1,))], MACHINE)
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert grads and all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in grads.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


WRONG = ["{'ctx': 1}", '{"ctx": "A man', "[1, 2]", {**LINE, "label": 4}, {**LINE, "label": ""}, {**LINE, "ctx": " "},
         {**LINE, "endings": ["a", "b", "c"]}, {**LINE, "endings": ["a", 2, "c", "d"]}, {**LINE, "endings": None}]


@pytest.mark.parametrize("line", WRONG)
def test_a_malformed_line_is_named(tmp_path, line):
    path = write_lines(tmp_path / "h.jsonl", LINE, {**LINE, "label": "3"}, line)
    with pytest.raises(UserError, match=r"h\.jsonl line 3: not an example"):
        hellaswag.load_examples(path)
    examples = hellaswag.load_examples(path, limit=2)  # lines beyond the limit are not read
    assert [x["label"] for x in examples] == [1, 3]  # the Hub stores labels as text


def test_tokens_are_those_of_the_context_and_of_a_space_and_the_ending(tmp_path):
    tokenizer = get_tokenizer("gpt2")
    (example,) = hellaswag.tokenize(hellaswag.load_examples(write_lines(tmp_path / "h.jsonl", LINE)), tokenizer)
    assert tokenizer.decode(example.context) == LINE["ctx"] and example.label == 1
    assert [tokenizer.decode(ending) for ending in example.endings] == [" " + text for text in LINE["endings"]]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (json.dumps(LINE) + "\n").encode()
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("Content-Length", str(len(body) + 100 * ("torn" in self.path)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_the_file_is_downloaded_once_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        for url in (f"{here}/missing", f"{here}/torn", "http://127.0.0.1:1/"):
            monkeypatch.setattr(hellaswag, "URL", url)
            with pytest.raises(UserError, match=r"--data .* --hellaswag_data"):
                hellaswag.load_examples()
            assert list(tmp_path.iterdir()) == []
        monkeypatch.setattr(hellaswag, "URL", f"{here}/h.jsonl")
        assert hellaswag.load_examples()[0]["ctx"] == LINE["ctx"]
        server.shutdown()
    assert len(hellaswag.load_examples("")) == 1
    assert [path.name for path in hellaswag.PATH.parent.iterdir()] == [hellaswag.PATH.name]


def evaluate_on_a_rank(rank, folder):
    """12 examples, and a single one, which leaves nothing for the second rank."""
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    share, model = {"rank": rank, "world_size": 2, "batch_tokens": 300}, overflowing_moe(block_size=60)
    torch.save([mean_losses(model, random_examples(n), **share).tolist() for n in (12, 1)], folder / f"{rank}.pt")
    os._exit(0)


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one(tmp_path):
    torch.multiprocessing.start_processes(evaluate_on_a_rank, (tmp_path,), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert ranks[0] == ranks[1]
    for losses, n in zip(ranks[0], (12, 1), strict=True):
        assert np.allclose(losses, mean_losses(overflowing_moe(block_size=60), random_examples(n)), rtol=1e-5)


@pytest.mark.slow
def test_the_script_as_a_user_starts_it(tmp_path, monkeypatch, capsys):
    model, out = dense(block_size=32), tmp_path / "made" / "out.json"
    state = {"model": model.state_dict(), "config": asdict(model.config), "tokenizer": "bytes"}
    checkpoint.save(state, tmp_path / "step_000001.pt")
    path = write_lines(tmp_path / "h.jsonl", LINE, {**LINE, "label": "0"})
    done = run_script("hellaswag.py", "--checkpoint", tmp_path, "--data", path, "--out", out, check=0)
    result = json.loads(out.read_text())
    assert result["n"] == result["cropped"] == 2 and result["model"] == str(tmp_path)
    assert f"acc_norm  {result['acc_norm']:.4f} +/- {result['stderr']:.4f}" in done.stdout
    assert f"bpb       {result['bpb']:.4f}" in done.stdout and "2 cropped" in done.stdout

    state["model"]["transformer.ln_f.weight"].fill_(torch.nan)
    checkpoint.save(state, tmp_path / "step_000002.pt")
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", "--checkpoint", str(tmp_path), "--data", str(path)])
    with pytest.raises(SystemExit) as end:
        common.run(hellaswag.main)
    assert end.value.code == 2 and "not finite" in capsys.readouterr().err
