"""sample.py: a cache that is exact, draws from the right distribution, text that arrives in pieces."""

import dataclasses
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import Forked

import sample
from lab import checkpoint, common
from lab.common import UserError
from lab.tokenizer import get_tokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
SMALL = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16}
VARIANTS = [
    {},
    {"bias": False},
    {"n_exp": 4, "use_noisy_top_k": True, "dropout": 0.3},
    {"n_exp": 4, "train_capacity": 0.1, "eval_capacity": 0.1, "min_capacity": 1},
    {"n_exp": 4, "top_k": 1, "gate": "softmax", "stride": 1},
    {"n_exp": 8, "top_k": 3, "gate": "sigmoid", "n_shared_exp": 1, "use_bias_balance": True},
]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def small_model(**fields):
    """Weights large enough that greedy text does not repeat one token."""
    model = GPT(GPTConfig(**{**SMALL, **fields}))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(std=0.3, generator=generator)
    for _, moe in model.moe_layers():
        if model.config.use_bias_balance:
            moe.router.balance_bias.normal_(std=0.3, generator=generator)
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


# -- the cache


@torch.no_grad()
def logits_from_the_start(model, idx):
    """As nanoGPT: all of the last block_size tokens again."""
    return model(idx[:, -model.config.block_size :], dropless=True).logits[:, -1]


@pytest.mark.slow
@pytest.mark.parametrize("prompt_length", [1, 5, 15, 16, 17, 40])
@pytest.mark.parametrize("fields", VARIANTS)
def test_logits_equal_those_of_full_recomputation(fields, prompt_length):
    """Token by token from before block_size to well past it."""
    model = small_model(**fields).eval()
    idx = torch.randint(61, (2, prompt_length), generator=seeded(1))
    cache = model.new_cache(2)
    for _ in range(30):
        logits = sample.next_logits(model, idx, cache)
        torch.testing.assert_close(logits, logits_from_the_start(model, idx), rtol=1e-5, atol=1e-5)
        idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS)
def test_greedy_text_is_that_of_full_recomputation_and_of_each_row_alone(fields):
    model = small_model(**fields)
    expected = PROMPT
    model.eval()
    for _ in range(25):
        expected = torch.cat([expected, logits_from_the_start(model, expected).argmax(-1, keepdim=True)], dim=1)
    model.train()
    out = sample.generate(model, PROMPT, 25, temperature=0)
    assert out.shape == (2, 30) and out.dtype == torch.int64
    assert torch.equal(out, expected)
    for row in range(2):
        assert torch.equal(sample.generate(model, PROMPT[row : row + 1], 25, temperature=0)[0], expected[row])


@torch.no_grad()
def test_weights_stored_by_input_are_the_same_weights():
    model, stored = (small_model(**VARIANTS[2]).eval() for _ in range(2))
    sample.store_by_input(stored)
    assert stored.lm_head.weight is stored.transformer.wte.weight and stored.lm_head.weight.mT.is_contiguous()
    for (name, ours), theirs in zip(stored.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    torch.testing.assert_close(sample.next_logits(stored, PROMPT, stored.new_cache(2)),
                               sample.next_logits(model, PROMPT, model.new_cache(2)))  # fmt: skip
    texts = [sample.generate(m, PROMPT, 25, temperature=0) for m in (model, stored)]
    assert torch.equal(*texts)


def test_the_model_and_the_global_generator_are_left_as_they_were():
    for training in (True, False):
        model = small_model(**VARIANTS[2]).train(training)
        before = torch.get_rng_state()
        sample.generate(model, PROMPT, 5, generator=seeded())
        sample.generate(model, PROMPT, 5)
        steps = sample.stream(model, PROMPT, 5)
        next(steps)
        assert not model.training
        steps.close()
        assert model.training is training and all(m.training is training for m in model.modules())
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.is_grad_enabled()
        assert all(p.grad is None for p in model.parameters())


# -- the draw


def plain_distribution(logits, temperature, top_k, top_p):
    """The same distribution, token by token in plain Python."""
    probs = torch.softmax(logits.double() / temperature, dim=0).tolist()
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])[:top_k]
    mass = sum(probs[token] for token in ranked)
    kept, reached = [], 0.0
    for token in ranked:
        if top_p is None or reached < top_p:
            kept.append(token)
        reached += probs[token] / mass
    mass = sum(probs[token] for token in kept)
    return [probs[token] / mass if token in kept else 0.0 for token in range(len(probs))]


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, None, None), (0.7, None, None), (1.5, 3, None), (1.0, 1, None), (1.0, 50, None),
    (1.0, None, 0.6), (1.0, None, 1e-9), (1.0, None, 1.0), (0.8, 5, 0.7), (1.3, 4, 0.95),
])  # fmt: skip
def test_draws_follow_a_plain_implementation(temperature, top_k, top_p):
    logits = torch.randn(12, generator=seeded(2)) * 1.5
    expected = torch.tensor(plain_distribution(logits, temperature, top_k, top_p))
    n = 100_000
    tokens = sample.sample_next(logits.expand(n, -1), temperature, top_k, top_p, seeded(3))
    found = torch.bincount(tokens, minlength=12) / n
    assert (found[expected == 0] == 0).all()
    assert (found - expected).abs().max() < 5 * 0.5 / n**0.5  # five standard deviations of the widest
    assert (found[expected > 0.001] > 0).all()


def test_draws_are_those_of_multinomial():
    logits = torch.randn(50, 12, generator=seeded(2)) * 3
    expected = torch.multinomial(torch.softmax(logits, dim=-1), 1, generator=seeded(3))[:, 0]
    assert torch.equal(sample.sample_next(logits, generator=seeded(3)), expected)


def test_rows_are_filtered_each_by_itself():
    logits = torch.tensor([[0.0, 5.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    for settings in ({"top_k": 1}, {"top_p": 0.5}, {"temperature": 0}, {"temperature": 1e-30}, {"temperature": 1e-320},
                     {"top_p": 1e-320}):  # fmt: skip
        assert sample.sample_next(logits, generator=seeded(), **settings).tolist() == [1, 0, 2]


def test_top_k_takes_exactly_k_of_equal_logits():
    tokens = sample.sample_next(torch.zeros(5000, 10), top_k=3, generator=seeded())
    assert len(tokens.unique()) == 3


@pytest.mark.slow
def test_padding_of_the_vocabulary_is_never_sampled():
    model = small_model()
    for settings in ({"temperature": 0}, {"temperature": 5.0}, {"temperature": 5.0, "top_k": 60, "top_p": 0.99}):
        out = sample.generate(model, PROMPT, 60, generator=seeded(), vocab_size=20, **settings)
        assert out.max() < 20
    assert sample.generate(model, PROMPT, 60, temperature=5.0, generator=seeded()).max() >= 20


@pytest.mark.slow
def test_the_same_seed_gives_the_same_text():
    model = small_model(**VARIANTS[2])
    texts = [sample.generate(model, PROMPT, 30, top_k=10, generator=seeded(s)).tolist() for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert sample.generate(model, PROMPT, 30).tolist() != sample.generate(model, PROMPT, 30).tolist()


@pytest.mark.slow
def test_it_ends_when_every_row_has_reached_end_of_text():
    model = small_model()
    plain = sample.generate(model, PROMPT, 200, temperature=2.0, generator=seeded(4))[:, 5:]
    eot = 7
    ends = [(row == eot).nonzero()[0].item() for row in plain]
    assert ends[0] != ends[1], "choose a seed for which the rows end apart"
    out = sample.generate(model, PROMPT, 200, temperature=2.0, generator=seeded(4), eot=eot)[:, 5:]
    assert out.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert (out[row, end:] == eot).all()
        assert eot not in out[row, :end]
    first = min(ends)
    assert torch.equal(out[:, : first + 1], plain[:, : first + 1])
    assert sample.generate(model, torch.tensor([[eot]]), 3, temperature=0, eot=eot).shape[1] > 1  # eot as a prompt


def test_looking_at_every_16th_token_gives_the_same_tokens_and_more_after_the_end():
    settings = {"temperature": 2.0, "eot": 7}
    each, some = (
        torch.stack(list(sample.stream(small_model(), PROMPT, 100, generator=seeded(), check_every=n, **settings)))
        for n in (1, 16)
    )
    assert len(each) % 16 and len(some) % 16 == 0 and len(some) - len(each) < 16
    assert torch.equal(some[: len(each)], each) and (some[len(each) :] == 7).all()


def test_no_tokens_and_wrong_settings():
    model = small_model()
    assert torch.equal(sample.generate(model, PROMPT, 0), PROMPT)
    for settings in ({"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}):
        with pytest.raises(UserError, match=next(iter(settings))):
            sample.generate(model, PROMPT, 1, **settings)
    with pytest.raises(ValueError, match="empty"):
        sample.generate(model, PROMPT[:, :0], 1)


def test_a_broken_model_is_told_from_other_errors():
    model = small_model().train()
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(sample.BrokenModel, match="not finite"):
        sample.generate(model, PROMPT, 1)
    assert model.training and issubclass(sample.BrokenModel, UserError)


def test_an_empty_prompt_begins_a_document():
    model, eot = small_model(), 7
    begun = sample.generate(model, torch.full((2, 1), eot), 5, generator=seeded(), eot=eot)[:, 1:]
    for nothing in (torch.tensor([[], []]), PROMPT[:, :0]):  # an empty list gives a float tensor
        tokens = sample.generate(model, nothing, 5, generator=seeded(), eot=eot)
        assert tokens.dtype == torch.int64 and torch.equal(tokens, begun)


# -- devices and ranks


def test_cudnn_is_off_inside_the_context_and_for_cuda_alone():
    def kernels():
        cuda = torch.backends.cuda
        return (
            cuda.cudnn_sdp_enabled(),
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
        )

    assert kernels() == (True,) * 4
    with sample.attention_without_cudnn(torch.device("cuda")):
        assert kernels() == (False, True, True, True)
    with sample.attention_without_cudnn(torch.device("cpu")):
        assert kernels() == (True,) * 4


def test_autocast_reaches_the_cache_and_the_logits():
    """The script draws in bfloat16 on CUDA; here on the CPU."""
    model = small_model(n_exp=4).eval()
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2)
        logits = sample.next_logits(model, PROMPT, cache)
        assert logits.dtype == cache.keys[0].dtype == torch.bfloat16
        assert sample.generate(model, PROMPT, 30, generator=seeded()).shape == (2, 35)


def test_bfloat16_on_cuda_where_the_grouped_products_can_read_the_rows():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for fields, whole in (({}, True), ({"n_embd": 20}, True), ({"n_exp": 4}, True), ({"n_exp": 4, "n_embd": 20}, False),
                          ({"n_exp": 4, "expert_hidden": 12}, False)):  # fmt: skip
        config = GPTConfig(**SMALL | fields)
        assert sample.inference_dtype(cuda, config) == (torch.bfloat16 if whole else torch.float32)
        assert sample.inference_dtype(cpu, config) == torch.float32


WORKER = """
import json, sys, torch, torch.distributed as dist
from lab import common, sample, test_sample as t
torch.set_num_threads(1)
rank, address, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
json.dump(t.samples_of_a_rank(rank), open(out, "w"))
dist.destroy_process_group()
common.exit_now(0)
"""


def samples_of_a_rank(rank):
    """Samples with a seed of its own, and whether a model that is broken on rank 0 alone is broken."""
    model = small_model()
    texts = sample.generate(model, PROMPT, 200, temperature=2.0, generator=seeded(rank), eot=7).tolist()
    if rank == 0:
        model.transformer.ln_f.weight.data.fill_(float("nan"))
    try:
        sample.generate(model, PROMPT, 5)
    except sample.BrokenModel:
        return texts, True
    return texts, False


@pytest.mark.slow
def test_ranks_that_would_draw_otherwise_end_together(tmp_path):
    alone = [sample.generate(small_model(), PROMPT, 200, temperature=2.0, generator=seeded(s), eot=7) for s in (0, 1)]
    assert alone[0].shape != alone[1].shape, "choose seeds that end apart"
    (tmp_path / "worker.py").write_text(WORKER)
    outs = [tmp_path / f"{rank}.json" for rank in range(2)]
    meeting = (tmp_path / "meeting").as_uri()
    workers = [Forked(tmp_path / "worker.py", rank, meeting, out) for rank, out in enumerate(outs)]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert [json.loads(out.read_text()) for out in outs] == [[alone[0].tolist(), True]] * 2


# -- printing


def printed(texts, capsys, prompt="", eot=True, stop_after=None):
    """The screen after each step when the rows of tokens are the bytes of `texts`."""
    tokenizer = get_tokenizer("bytes")
    rows = [[*text.encode(), *([tokenizer.eot] if eot else [])] for text in texts]
    n, screens = max(map(len, rows)), []

    def steps():
        for i in range(n):
            if i == stop_after:
                raise KeyboardInterrupt
            yield torch.tensor([row[i] if i < len(row) else tokenizer.eot for row in rows])
            screens.append(capsys.readouterr().out)

    try:
        sample.print_samples(steps(), tokenizer, prompt, len(texts))
    except KeyboardInterrupt:
        assert stop_after is not None
    return screens, capsys.readouterr().out


def test_characters_are_printed_when_they_are_whole(capsys):
    screens, rest = printed(["aé€🙂b"], capsys, prompt="> ", eot=False)
    assert screens == ["> a", "", "é", "", "", "€", "", "", "", "🙂", "b"]
    assert rest == "\n"


def test_text_that_breaks_off_inside_a_character(capsys):
    screens, rest = printed(["a🙂"], capsys, eot=False, stop_after=3)
    assert "".join(screens) + rest == "a�\n"


def test_samples_are_printed_one_after_another(capsys):
    screens, rest = printed(["ab", "cdefg", "h"], capsys, prompt=">")
    line = f"\n{sample.RULE}\n"
    assert "".join(screens) + rest == f">ab{line}>cdefg{line}>h\n"
    assert screens == [">a", "b", f"{line}>cde", "f", "g", f"{line}>h"]


def test_an_interrupt_prints_the_text_so_far(capsys):
    screens, rest = printed(["abcd", "efgh"], capsys, prompt=">", stop_after=2)
    assert "".join(screens) + rest == f">ab\n{sample.RULE}\n>ef\n"


# -- the script


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A checkpoint of a small byte model, as the trainer writes it."""
    folder = tmp_path_factory.mktemp("run")
    for step, extra in ((1, {}), (2, {"n_exp": 4, "use_noisy_top_k": True})):
        model = small_model(vocab_size=320, **extra)
        state = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "tokenizer": "bytes"}
        checkpoint.save(state, checkpoint.step_path(folder, step))
    return folder


@pytest.fixture
def main(monkeypatch, capsys):
    """The script inside this process (a start costs seconds): called with flags, it returns stdout and stderr."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        sample.main()
        return capsys.readouterr()

    return call


@pytest.mark.slow
def test_the_script_prints_samples(main, run_folder):
    flags = ["--checkpoint", run_folder, "--prompt", "héllo", "--num_samples", 2, "--max_new_tokens", 40]
    first, again, other = (main(*flags, "--seed", seed) for seed in (1, 1, 2))
    samples = first.out.split(sample.RULE)
    assert len(samples) == 2 and all(text.strip("\n").startswith("héllo") for text in samples)
    assert first.out == again.out != other.out
    assert first.err == ""
    assert main("--checkpoint", run_folder, "--max_new_tokens", 3, "--top_k", "None", "--top_p", 0.9).err == ""


@pytest.mark.slow
def test_the_script_takes_a_file_longer_than_the_window(run_folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("in a file, longer than the window ✓", encoding="utf-8")
    file, prompt = run_folder / "step_000001.pt", tmp_path / "prompt.txt"
    flags = ("--checkpoint", file, "--temperature", 0, "--prompt_file", prompt)
    process = Forked(ROOT / "sample.py", *flags, PYTHONIOENCODING="ascii")
    out, errors = process.communicate()
    assert process.poll() == 0
    assert out.startswith("in a file, longer than the window ?")
    assert "of the prompt's 37 tokens the model sees the last 16" in errors


@pytest.mark.slow
def test_ctrl_c_prints_the_text_so_far_and_exits_130(run_folder):
    process = Forked(ROOT / "sample.py", "--checkpoint", run_folder, "--prompt", "start", "--num_samples", 2,
                     "--max_new_tokens", 1_000_000, "--temperature", 0)  # fmt: skip
    seen = process.stdout.read(20)  # it streams: text is here long before the end
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.wait() == 130 and err == ""
    samples = (seen + out).split(sample.RULE)
    first, second = (len(text.strip()) for text in samples)
    assert first - second in (0, 1)  # 1: interrupted where a token is printed but not yet recorded as printed
    assert all(text.strip("\n").startswith("start") for text in samples)


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(run_folder):
    process = Forked(ROOT / "sample.py", "--checkpoint", run_folder, "--max_new_tokens", 9999, "--temperature", 0)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


def test_a_full_stdout_is_one_line_and_exit_code_2(main, run_folder, monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "stdout", full)
        common.run(lambda: main("--checkpoint", run_folder))
    assert (end.value.code, capsys.readouterr().err) == (2, "error: No space left on device\n")
