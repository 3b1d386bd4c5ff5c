"""sample.py: a cache that is exact, draws from the right distribution, text that arrives in pieces."""

import os
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import run_script

import sample
from lab import checkpoint, common
from lab.devices import Machine
from lab.tokenizer import get_tokenizer
from model import GPT, GPTConfig

SMALL = {"block_size": 16, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16}
MOE = {"n_exp": 4, "top_k": 2, "stride": 2, "use_noisy_top_k": True, "dropout": 0.3}
VARIANTS = [
    {"bias": False},
    MOE,
    {"n_exp": 4, "train_capacity": 0.1, "eval_capacity": 0.1, "min_capacity": 1},
    {"n_exp": 8, "top_k": 3, "gate": "sigmoid", "n_shared_exp": 1, "use_bias_balance": True},
]
PROMPT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
MACHINE = Machine(torch.device("cpu"), torch.float32, rank=0, world_size=1, fsdp=False)


def small_model(**fields):
    """In eval mode, with weights large enough that greedy text does not repeat one token."""
    model = GPT(GPTConfig(**SMALL | fields))
    generator = torch.Generator().manual_seed(0)
    for p in [*model.parameters(), *model.buffers()]:
        if p.is_floating_point():
            p.data.normal_(std=0.3, generator=generator)
    return model.eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def generate(model, idx, n, eot=-1, vocab_size=61, seed=0, **settings):
    """The new tokens (B, n) of stream() for a tokenizer of this end of text (-1: none) and size."""
    tokenizer = SimpleNamespace(eot=eot, vocab_size=vocab_size)
    return torch.stack(list(sample.stream(model, idx, n, tokenizer, seeded(seed), **settings)), dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_of_full_recomputation_and_text_that_of_each_row_alone(fields):
    """Token by token from before block_size, 16, to past it; as nanoGPT, all of the last 16 tokens again."""
    model = small_model(**fields)
    for prompt_length in (5, 16, 17):
        prompt = idx = torch.randint(61, (2, prompt_length), generator=seeded(1))
        cache = model.new_cache(2)
        for _ in range(20):
            logits = sample.next_logits(model, idx, cache)
            expected = model(idx[:, -16:], dropless=True).logits[:, -1]
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
            idx = torch.cat([idx, logits.argmax(-1, keepdim=True)], dim=1)
        for row in range(2):
            new = generate(model, prompt[row : row + 1], 20, temperature=0)
            assert torch.equal(new[0], idx[row, prompt_length:])


def test_a_model_in_training_is_left_as_it_was():
    model, tokenizer = small_model(**MOE, vocab_size=257).train(), get_tokenizer("bytes")
    before = torch.get_rng_state()
    texts = sample.continue_prompt(model, tokenizer, "héllo", 2, 30, 7, MACHINE)
    assert all(text.startswith("héllo") and len(text) > 5 for text in texts)
    assert texts == sample.continue_prompt(model, tokenizer, "héllo", 2, 30, 7, MACHINE)
    assert len(sample.continue_prompt(model, tokenizer, "", 1, 3, 7, MACHINE)) == 1  # the beginning of a document
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(sample.BrokenModel, match="not finite"):
        sample.continue_prompt(model, tokenizer, "a", 1, 1, 7, MACHINE)
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before) and all(p.grad is None for p in model.parameters())


def plain_distribution(logits, temperature, top_k, top_p):
    """The distribution of a draw, token by token in plain Python."""
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


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.7, None, None), (1.5, 3, None), (1.0, 50, None),
                                                       (1.0, None, 0.6), (1.0, None, 1.0), (0.8, 5, 0.7)])
def test_draws_follow_a_plain_implementation(temperature, top_k, top_p):
    logits = torch.randn(12, generator=seeded(2)) * 1.5
    expected = torch.tensor(plain_distribution(logits, temperature, top_k, top_p))
    n = 50_000
    tokens = sample.sample_next(logits.expand(n, -1), temperature, top_k, top_p, seeded(3))
    found = torch.bincount(tokens, minlength=12) / n
    assert (found[expected == 0] == 0).all() and (found[expected > 0.001] > 0).all()
    assert (found - expected).abs().max() < 5 * 0.5 / n**0.5  # five standard deviations of the widest


def test_rows_are_filtered_each_by_itself_and_equal_logits_to_exactly_k():
    logits = torch.tensor([[0.0, 5.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    for settings in ({"top_k": 1}, {"top_p": 0.5}, {"temperature": 0}, {"temperature": 1e-320}, {"top_p": 1e-320}):
        assert sample.sample_next(logits, generator=seeded(), **settings).tolist() == [1, 0, 2]
    assert len(sample.sample_next(torch.zeros(5000, 10), top_k=3, generator=seeded()).unique()) == 3


def test_an_exponential_of_0_draws_no_excluded_token(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self.zero_())
    logits = torch.tensor([[0.0, 200.0, 1.0]])
    for settings in ({}, {"top_p": 0.5}):
        assert sample.sample_next(logits, **settings).tolist() == [1]


def test_padding_of_the_vocabulary_is_never_drawn():
    model = small_model()
    for settings in ({"temperature": 0}, {"temperature": 5.0}, {"temperature": 5.0, "top_k": 60, "top_p": 0.99}):
        assert generate(model, PROMPT, 40, vocab_size=20, **settings).max() < 20
    assert generate(model, PROMPT, 40, temperature=5.0).max() >= 20


def test_the_seed_decides_and_rows_end_with_end_of_text():
    model, eot = small_model(), 7
    plain, again, other = (generate(model, PROMPT, 200, temperature=2.0, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(plain, again) and not torch.equal(plain, other)
    ends = [(row == eot).nonzero()[0].item() for row in plain]
    assert ends[0] != ends[1], "choose a seed for which the rows end apart"
    out = generate(model, PROMPT, 200, temperature=2.0, seed=4, eot=eot)
    assert out.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        assert (out[row, end:] == eot).all() and eot not in out[row, :end]
    assert torch.equal(out[:, : min(ends) + 1], plain[:, : min(ends) + 1])


def test_bfloat16_on_cuda_where_the_grouped_products_can_read_the_rows():
    for fields, dtype in (({"n_exp": 4}, torch.bfloat16), ({"n_exp": 4, "n_embd": 20}, torch.float32)):
        assert sample.inference_dtype(torch.device("cuda"), GPTConfig(**SMALL | fields)) == dtype


def draw_on_a_rank(rank, folder):
    """Draw by a seed of this rank's own; then with a model that is broken on rank 0 alone."""
    dist.init_process_group("gloo", init_method=(folder / "meeting").as_uri(), rank=rank, world_size=2)
    model = small_model()
    rows = generate(model, PROMPT, 200, temperature=2.0, seed=rank, eot=7)
    if rank == 0:
        model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(sample.BrokenModel):
        generate(model, PROMPT, 5)
    torch.save(rows, folder / f"{rank}.pt")
    os._exit(0)


@pytest.mark.slow
def test_ranks_that_would_draw_differently_end_together(tmp_path):
    alone = [generate(small_model(), PROMPT, 200, temperature=2.0, seed=seed, eot=7) for seed in (0, 1)]
    assert alone[0].shape != alone[1].shape, "choose seeds that end apart"
    torch.multiprocessing.start_processes(draw_on_a_rank, (tmp_path,), nprocs=2, start_method="fork")
    assert all(torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone[0]) for rank in range(2))


def test_the_first_sample_arrives_in_whole_characters_and_the_others_follow(capsys):
    tokenizer, screens = get_tokenizer("bytes"), []
    rows = [[*text.encode(), 256, 256, 256] for text in ("aé€🙂b", "xyz")]

    def steps():
        for i in range(13):
            yield torch.tensor([row[min(i, len(row) - 1)] for row in rows])
            screens.append(capsys.readouterr().out)
        raise KeyboardInterrupt  # what there is, is printed

    with pytest.raises(KeyboardInterrupt):
        sample.print_samples(steps(), tokenizer, ">", 2)
    assert screens == [">a", "", "é", "", "", "€", "", "", "", "🙂", "b", "", ""]
    assert capsys.readouterr().out == "\n" + "-" * 80 + "\n>xyz\n"


@pytest.fixture
def file(tmp_path):
    model = small_model(vocab_size=320, **MOE)
    state = {"model": model.state_dict(), "config": asdict(model.config), "tokenizer": "bytes"}
    path = tmp_path / "step_000001.pt"
    checkpoint.save(state, path)
    return path


def test_the_script_reads_a_file_and_refuses_mistakes(file, tmp_path, monkeypatch, capsys):
    prompt = tmp_path / "prompt.txt"
    cases = [
        ("\ufefflonger than the window ✓".encode(), ["--checkpoint", file], 0, "the last 16 of the prompt's 26 tokens"),
        (b"\xff\xfe", ["--checkpoint", file], 2, "is not UTF-8"),
    ]
    for content, words, code, said in cases:
        prompt.write_bytes(content)
        words = ["sample.py", *words, "--prompt_file", prompt, "--max_new_tokens", 3, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as end:
            common.run(sample.main)
        out, err = capsys.readouterr()
        assert end.value.code == code and said in err and err.count("\n") == 1
        assert out.startswith("longer than the window ✓" if code == 0 else "")


@pytest.mark.slow
def test_the_script_as_a_user_starts_it(file):
    words = ["--checkpoint", file.parent, "--prompt", "hello é", "--num_samples", 2, "--max_new_tokens", 20]
    done = run_script("sample.py", *words, env={"PYTHONIOENCODING": "ascii"}, check=0)
    assert done.stderr == "" and done.stdout.startswith("hello ?")
    assert done.stdout.count("\n" + "-" * 80 + "\nhello ?") == 1
