"""HellaSwag: packed rows give the losses of a plain implementation, one ending at a time, in any batch."""

import dataclasses
import http.server
import json
import random
import socket
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Forked

import hellaswag
from hellaswag import Example
from lab import checkpoint, common
from lab.common import Machine, UserError
from lab.tokenizer import get_tokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / "tests/data/hellaswag_50.jsonl"
LINE = {"ind": 0, "activity_label": "Baking", "ctx": "A man kneads dough. he", "label": 1, "split": "val"}
LINE["endings"] = ["bakes bread.", "bakes a loaf of bread.", "is a shoe on the moon.", "runs."]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny models: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(block_size=1024, vocab_size=257, seed=0, **changes):
    """A model whose logits are spread out, so that a wrong mask or position cannot hide."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=3, n_head=2, n_embd=32, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def overflowing_moe(**changes):
    """Capacity would drop most choices: they reach the output only when evaluation routes dropless."""
    capacity = {"train_capacity": 0.5, "eval_capacity": 0.5, "min_capacity": 1}
    return tiny(n_exp=4, use_noisy_top_k=True, dropout=0.1, **capacity, **changes)


def random_examples(count, seed=0, vocab_size=257, longest=40):
    draw = np.random.default_rng(seed)

    def tokens():
        return tuple(draw.integers(vocab_size, size=draw.integers(1, longest)).tolist())

    return [example(tokens(), tuple(tokens() for _ in range(4)), int(draw.integers(4))) for _ in range(count)]


def example(context, endings, label):
    """An Example of tokens of two bytes."""
    return Example(context, endings, label, (2,) * len(endings[label]))


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


def losses_of(model, examples, **options):
    total, counts, _ = hellaswag.ending_losses(model, examples, "cpu", **options)
    return total, total / counts


# ---- the numbers of a plain implementation


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1024, 60, 30, 2])
@pytest.mark.parametrize("build", [tiny, overflowing_moe])
def test_losses_are_those_of_one_by_one(build, block_size):
    model, examples = build(block_size=block_size), random_examples(40)
    total, mean = losses_of(model, examples)
    expected_total, expected_mean = plain_losses(model, examples)
    assert np.abs(mean - expected_mean).max() < 1e-5 and np.allclose(total, expected_total, rtol=1e-5)


@pytest.mark.parametrize("name, block_size", [("gpt2", 1024), ("bytes", 200)])
@pytest.mark.slow
def test_predictions_on_real_examples_are_those_of_one_by_one(name, block_size):
    tokenizer = get_tokenizer(name)
    examples = hellaswag.tokenize(hellaswag.load_examples(REAL), tokenizer)
    assert len(examples) == 50
    model = tiny(block_size, tokenizer.vocab_size)
    result = hellaswag.evaluate(model, examples, "cpu")
    total, mean = plain_losses(model, examples)
    labels = np.array([x.label for x in examples])
    assert result.predictions == mean.argmin(axis=1).tolist()
    assert result.acc == (total.argmin(axis=1) == labels).mean()
    assert result.acc_norm == (mean.argmin(axis=1) == labels).mean()
    n_bytes = [len(f" {x['endings'][x['label']]}".encode()) for x in hellaswag.load_examples(REAL)]
    if block_size == 1024:  # nothing cropped: the loss of whole endings, per byte of their text
        bits = total[np.arange(50), labels] / np.log(2) / n_bytes
        assert result.bpb == pytest.approx(bits.mean(), rel=1e-5)
    too_long = [len(x.context) + max(map(len, x.endings)) > block_size for x in examples]
    assert result.cropped == sum(too_long) and any(too_long) == (block_size < 1024)


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny, overflowing_moe])
def test_losses_do_not_depend_on_the_batch(build):
    model, examples = build(block_size=64), random_examples(30)
    _, together = losses_of(model, examples)
    order = np.random.default_rng(1).permutation(len(examples))
    _, shuffled = losses_of(model, [examples[i] for i in order], batch_tokens=700)
    alone = [losses_of(model, [example])[1][0] for example in examples]
    assert np.abs(shuffled - together[order]).max() < 1e-5 and np.abs(np.array(alone) - together).max() < 1e-5


def test_capacity_would_have_changed_the_losses():
    """Without this the dropless tests above could not fail."""
    model, examples = overflowing_moe().eval(), random_examples(4)
    idx = torch.tensor([examples[0].context + examples[0].endings[0]])
    with torch.no_grad():
        assert (model(idx).logits - model(idx, dropless=True).logits).abs().max() > 1e-2


def test_the_rows_share_the_context_and_fit_the_budget():
    examples = random_examples(20)
    rows, _, _, cropped = hellaswag.build_rows(examples, 1024)
    tokens = sum(len(x.context) + sum(len(ending) - 1 for ending in x.endings) for x in examples)
    assert len(rows) == 20 and cropped == 0 and sum(row.length for row in rows) == tokens
    batches = list(hellaswag.split_rows(rows, 500, 0, 1))
    assert sum(map(len, batches)) == 20 and len(batches) < 20
    assert all(len(batch) * batch[0].length <= 500 for batch in batches)
    assert [len(batch) for batch in hellaswag.split_rows(rows, 1, 0, 1)] == [1] * 20


def test_equal_endings_tie_and_the_first_is_chosen():
    model = tiny()
    context, (a, b, c, _), *_ = random_examples(1)[0]
    best = min((a, b, c), key=lambda ending: plain_losses(model, [example(context, (ending,) * 4, 0)])[1][0, 0])
    others = [ending for ending in (a, b, c) if ending != best]
    result = hellaswag.evaluate(model, [example(context, (others[0], best, others[1], best), 1)], "cpu")
    assert result.predictions == [1] and result.ties == 1 and result.acc_norm == 1


def test_standard_error_and_a_broken_model():
    examples = random_examples(20)
    result = hellaswag.evaluate(tiny(), examples, "cpu")
    assert result.n == 20 and result.stderr == pytest.approx((result.acc_norm * (1 - result.acc_norm) / 20) ** 0.5)
    model = tiny()
    model.transformer.ln_f.weight.data.fill_(torch.nan)
    result = hellaswag.evaluate(model, examples, "cpu")
    assert np.isnan(result.acc) and np.isnan(result.acc_norm) and np.isnan(result.bpb)


def test_bits_per_byte_of_a_cropped_ending_are_of_its_scored_tokens():
    short = example((1, 2), ((3, 4, 5), (6,), (7,), (8,)), 0)
    model = tiny(block_size=2)
    total, counts, _ = hellaswag.ending_losses(model, [short], "cpu")
    assert counts[0, 0] == 1
    assert hellaswag.evaluate(model, [short], "cpu").bpb == pytest.approx(total[0, 0] / np.log(2) / 2)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(training):
    model = overflowing_moe().train(training)
    model(torch.arange(20)[None], torch.arange(20)[None]).loss.backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    hellaswag.evaluate(model, random_examples(5), "cpu")
    assert model.training == training and all(m.training == training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert grads and all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in grads.items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_mode_comes_back_after_an_error():
    model = tiny(vocab_size=16).train()
    with pytest.raises(IndexError):
        hellaswag.evaluate(model, random_examples(1), "cpu")  # tokens beyond the vocabulary
    assert model.training


# ---- the file


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


MALFORMED = {
    "not JSON": "{'ctx': 1}",
    "torn": '{"ctx": "A man',
    "deeply nested": "[" * 100_000,
    "no object": "[1, 2]",
    "no label": {k: v for k, v in LINE.items() if k != "label"},
    "label 4": {**LINE, "label": 4},
    "label -1": {**LINE, "label": -1},
    "label text": {**LINE, "label": "1"},
    "label true": {**LINE, "label": True},
    "three endings": {**LINE, "endings": ["a", "b", "c"]},
    "endings text": {**LINE, "endings": "abcd"},
    "endings null": {**LINE, "endings": None},
    "empty ending": {**LINE, "endings": ["a", "b", "", "d"]},
    "blank ending": {**LINE, "endings": ["a", "b", "c", " \n"]},
    "ending number": {**LINE, "endings": ["a", 2, "c", "d"]},
    "empty context": {**LINE, "ctx": " "},
}


@pytest.mark.parametrize("line", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_line_is_named(tmp_path, line):
    path = write_lines(tmp_path / "h.jsonl", LINE, "", line)
    with pytest.raises(UserError, match=r"h\.jsonl line 3 is not a HellaSwag example"):
        hellaswag.load_examples(path)
    assert len(hellaswag.load_examples(path, limit=1)) == 1  # lines beyond the limit are not read


def test_a_limit_beyond_all_examples(tmp_path):
    assert len(hellaswag.load_examples(write_lines(tmp_path / "h.jsonl", LINE, LINE), limit=10**20)) == 2


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_examples_is_refused(tmp_path, text):
    path = tmp_path / "h.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="no examples"):
        hellaswag.load_examples(path)


def test_invalid_utf8_missing_file_and_folder(tmp_path):
    (tmp_path / "h.jsonl").write_bytes(json.dumps(LINE).encode() + b'\n{"ctx": "\xff"}\n')
    for path, message in [("h.jsonl", "line 2 is not"), ("none.jsonl", "--flag FILE"), (".", "--flag FILE")]:
        with pytest.raises(UserError, match=message):
            hellaswag.load_examples(tmp_path / path, flag="--flag")


def test_a_block_size_that_predicts_nothing_is_refused():
    with pytest.raises(UserError, match="block_size 1"):
        hellaswag.evaluate(tiny(block_size=1), random_examples(1), "cpu")


def test_tokens_are_those_of_the_context_and_of_a_space_and_the_ending():
    tokenizer = get_tokenizer("gpt2")
    (example,) = hellaswag.tokenize([LINE], tokenizer)
    assert tokenizer.decode(example.context) == LINE["ctx"] and example.label == 1
    assert [tokenizer.decode(ending) for ending in example.endings] == [" " + text for text in LINE["endings"]]
    assert tokenizer.encode_ordinary(LINE["ctx"] + " bakes bread.") == [*example.context, *example.endings[0]]


# ---- the download, from a local server


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = (json.dumps(LINE) + "\n").encode()
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("Content-Length", str(len(body) + 100 * ("torn" in self.path)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_file_is_downloaded_once(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "URL", f"{server}/h.jsonl")
    assert hellaswag.load_examples() == [LINE]
    monkeypatch.setattr(hellaswag, "URL", f"{server}/missing")
    assert hellaswag.load_examples() == [LINE]
    assert [path.name for path in hellaswag.PATH.parent.iterdir()] == [hellaswag.PATH.name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["missing", "torn", "nobody"])
def test_a_failed_download_leaves_nothing_and_names_the_flag(tmp_path, monkeypatch, server, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:1/" if name == "nobody" else f"{server}/{name}")
    with pytest.raises(UserError, match="--data FILE"):
        hellaswag.load_examples()
    assert list(tmp_path.iterdir()) == []


def test_a_silent_server_ends_the_download(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match=r"timed out.*--data FILE"):
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        hellaswag.download(url, tmp_path / "h.jsonl", "--data", timeout=0.2)


# ---- in training

ALONE = Machine(torch.device("cpu"), torch.float32, rank=0, world_size=1, fsdp=False)


def load_for_training(path, machine=ALONE, every=1):
    said = []
    return hellaswag.load_for_training(path, 3, get_tokenizer("bytes"), every, machine, said.append), said


def test_training_continues_without_hellaswag_only_if_no_file_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:1/")
    assert load_for_training("none.jsonl", every=0) == (None, [])
    examples, said = load_for_training("")
    assert examples is None and len(said) == 1 and "no HellaSwag in this run" in said[0]
    assert "--hellaswag_data FILE" in said[0]
    with pytest.raises(UserError, match="--hellaswag_data FILE"):
        load_for_training("none.jsonl")
    examples, said = load_for_training(str(REAL))
    assert len(examples) == 3 and said == []


# ---- several ranks

WORKER = """
import json, sys, torch, torch.distributed as dist
from lab import common, hellaswag, test_hellaswag as t
torch.set_num_threads(1)
hellaswag.URL = "http://127.0.0.1:1/"
rank, address, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
share = {"batch_tokens": 300, "rank": rank, "world_size": 2}
results = [t.result_on_a_rank(*case, **share) for case in t.shared_cases()]
json.dump([results, t.what_a_rank_loads(rank)], open(out, "w"))
dist.destroy_process_group()
common.exit_now(0)
"""


def shared_cases():
    """A model with 12 examples, and with a single one, which leaves nothing for the second rank."""
    return [(overflowing_moe(block_size=60), random_examples(12)), (overflowing_moe(), random_examples(1))]


def result_on_a_rank(model, examples, **share):
    total, _, _ = hellaswag.ending_losses(model, examples, "cpu", **share)
    return total.tolist(), hellaswag.evaluate(model, examples, "cpu", **share)._replace(seconds=0)


def what_a_rank_loads(rank):
    """Of a file that rank 0 alone has, of a download that fails, and of a file that is not there."""
    machine = ALONE._replace(rank=rank, world_size=2)
    outcomes = [
        load_for_training(str(REAL if rank == 0 else "elsewhere.jsonl"), machine),
        load_for_training("", machine),
    ]
    try:
        load_for_training("none.jsonl", machine)
    except UserError as error:
        outcomes.append(str(error))
    return outcomes


@pytest.mark.slow
def test_two_ranks_give_the_result_of_one(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    meeting, outs = (tmp_path / "meeting").as_uri(), [tmp_path / f"{rank}.json" for rank in range(2)]
    monkeypatch.chdir(tmp_path)
    workers = [Forked("worker.py", rank, meeting, out) for rank, out in enumerate(outs)]
    assert [worker.wait() for worker in workers] == [0, 0]
    first, second = (json.loads(out.read_text()) for out in outs)
    assert first == second
    results, ((examples, said), (nothing, reasons), refused) = first
    assert len(examples) == 3 and not said
    assert nothing is None and len(reasons) == 1 and "none.jsonl" in refused
    for case, (total, result) in zip(shared_cases(), results, strict=True):
        alone_total, alone_result = result_on_a_rank(*case)
        assert result[2] == pytest.approx(alone_result.bpb, rel=1e-5) and np.allclose(total, alone_total, rtol=1e-5)
        assert list(result) == list(alone_result._replace(bpb=result[2]))


# ---- the script


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of the bytes tokenizer, and a data file."""
    folder, model = tmp_path_factory.mktemp("hellaswag"), tiny(block_size=32)
    state = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "tokenizer": "bytes"}
    checkpoint.save(state, folder / "step_000001.pt")
    write_lines(folder / "h.jsonl", LINE, {**LINE, "label": 0})
    return folder


@pytest.fixture
def exit_code(folder, monkeypatch):
    """exit_code(*flags) of the script in this process, to save the start."""

    def call(*flags):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", *flags])
        with pytest.raises(SystemExit) as end:
            common.run(hellaswag.main)
        return end.value.code

    return call


RUN = ["--checkpoint", "step_000001.pt", "--data", "h.jsonl", "--device", "cpu"]


@pytest.mark.slow
def test_the_script_writes_what_it_prints(folder, monkeypatch):
    monkeypatch.chdir(folder)
    process = Forked(ROOT / "hellaswag.py", *RUN, "--out", "out.json", PYTHONIOENCODING="ascii")
    said, errors = process.communicate()
    assert process.poll() == 0, errors
    out = json.loads((folder / "out.json").read_text())
    examples = hellaswag.tokenize([LINE, {**LINE, "label": 0}], get_tokenizer("bytes"))
    result = hellaswag.evaluate(tiny(block_size=32), examples, "cpu")
    assert {**out, "seconds": 0} == {"model": "step_000001.pt", **result._asdict(), "seconds": 0}
    assert out.keys() >= {"acc", "acc_norm", "stderr", "n", "predictions"} and out["cropped"] == 2
    assert f"acc_norm  {result.acc_norm:.4f} +/- {result.stderr:.4f}" in said and "2 cropped" in said
    assert f"bpb       {result.bpb:.4f}" in said


def test_a_batch_larger_than_the_memory_is_refused():
    with torch.device("meta"):
        model = GPT(GPTConfig(64, 257, n_layer=1, n_head=1, n_embd=2**26))
    args = hellaswag.Args(batch_tokens=10**9)
    with pytest.raises(UserError, match=r"--batch_tokens .* MiB of memory, .* MiB are free"):
        hellaswag.check_memory(model, random_examples(40), args, torch.device("cpu"))
    hellaswag.check_memory(tiny(), random_examples(40), args, torch.device("cpu"))


NO_FILE_BEYOND_10_KB = """
import resource
from lab import common, hellaswag
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
common.run(hellaswag.main)
"""


@pytest.mark.slow
def test_a_full_disk_is_found_before_the_evaluation(folder, tmp_path):
    pytest.importorskip("resource")  # Unix
    (folder / "limited.py").write_text(NO_FILE_BEYOND_10_KB)
    limited = Forked(folder / "limited.py", "--checkpoint", "none.pt", "--out", tmp_path / "out.json")
    _, said = limited.communicate()
    assert limited.wait() == 2 and said.startswith(f"error: --out {tmp_path}") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_result_is_written_where_stdout_is_full(folder, exit_code, monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert exit_code(*RUN, "--out", "full.json") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: No space left on device"
    assert json.loads((folder / "full.json").read_text())["n"] == 2
