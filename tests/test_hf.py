"""hf.py and modeling_moe_gpt2.py: exported models compute ours in transformers, and come back."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Forked

import hf
import sample
from lab import checkpoint
from lab.common import UserError
from model import GATES, GPT, MODEL_FIELDS, GPTConfig

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parent.parent
SMALL = {"block_size": 24, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16, "n_exp": 4}
BALANCED = {"use_bias_balance": True, "gate": "sigmoid", "n_shared_exp": 2, "use_noisy_top_k": True}
VARIANTS = [
    *({"gate": gate, "top_k": top_k} for gate in GATES for top_k in (1, 2)),
    *({"gate": gate, "use_bias_balance": True, "top_k": 3} for gate in GATES),
    {"n_shared_exp": 1}, {"use_noisy_top_k": True}, {"stride": 1}, {"stride": 3, "n_exp": 64}, {"bias": False},
    {"router_use_full_prec": True, "dropout": 0.3, "eval_capacity": 0.1, "train_capacity": float("inf")},
    {"n_layer": 4, "first_dense": 1, "expert_hidden": 7, "n_shared_exp": 2, "shared_expert_hidden": 5},
    {"expert_hidden": "iso", "n_shared_exp": 2}, {"use_quantile_balance": True, "gate_scale": 2.5}, {"qk_norm": True},
    {"n_exp": 1, "qk_norm": True, "bias": False},
    {**BALANCED, "bias": False, "stride": 1},
]  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:top_k=1")


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """One thread; the copies that transformers makes of an exported class stay in the test's folder."""
    torch.set_num_threads(1)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])


def random_model(**fields):
    """In eval mode, every weight and selection bias random and so large that mistakes show and greedy text varies."""
    model, generator = GPT(GPTConfig(**SMALL | fields)), torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.data.normal_(mean=float(".ln_" in name and name.endswith("weight")), std=0.3, generator=generator)
    for _, moe in model.moe_layers():
        if moe.router.biased:
            moe.router.balance_bias.normal_(std=0.3, generator=generator)
    return model.eval()


def load(folder, **kwargs):
    """The folder's model in transformers; every weight found, none left over."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **kwargs
    )
    assert not any(report.values()), report
    return model.eval()


def exported(folder, state=None, **fields):
    model = random_model(**fields)
    checkpoint.export_hf(model, folder, state)
    return model, load(folder)


def logits(model, idx):
    with torch.no_grad():
        return model.eval()(idx, dropless=True).logits


def tokens(B, S, seed=1):
    return torch.randint(61, (B, S), generator=torch.Generator().manual_seed(seed))


def assert_close(given, wanted, tolerance=1e-5):
    assert (given - wanted).abs().max() <= tolerance * wanted.abs().max()


# -- the same function


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS)
def test_an_exported_moe_has_our_logits_in_transformers_and_here(tmp_path, fields):
    model, theirs = exported(tmp_path / "out", **fields)
    idx = tokens(3, 20)
    expected = logits(model, idx)
    with torch.no_grad():
        assert_close(theirs(idx).logits, expected)
    theirs.save_pretrained(tmp_path / "again")
    for folder in ("out", "again"):
        back = checkpoint.from_pretrained(tmp_path / folder)
        assert back.config == model.config
        assert torch.equal(logits(back, idx), expected)
    with torch.no_grad():
        assert_close(load(tmp_path / "again")(idx).logits, expected)


@dataclasses.dataclass
class Narrow(GPTConfig):
    """Other widths and other MoE layers than GPTConfig's."""

    hidden = 24

    def is_moe_layer(self, layer):
        return self.n_exp > 1 and layer > 0


@pytest.mark.slow
@pytest.mark.parametrize("n_exp", [1, 4])
def test_widths_and_moe_layers_come_from_the_model(tmp_path, n_exp):
    model = GPT(Narrow(**SMALL | {"n_exp": n_exp, "n_shared_exp": 1}), torch.Generator().manual_seed(0))
    checkpoint.export_hf(model, tmp_path / "out")
    assert_close(load(tmp_path / "out")(tokens(2, 9)).logits, logits(model, tokens(2, 9)))
    with pytest.raises(UserError, match=r"n_inner is 24; this model|n_inner is 24, by its gpt_config 64"):
        checkpoint.from_pretrained(tmp_path / "out")


def test_the_loss_and_its_gradients_are_ours(tmp_path):
    model, theirs = exported(tmp_path / "out", **BALANCED | {"use_noisy_top_k": False})
    idx = tokens(3, 20)
    targets = idx[:, 1:].clone()
    targets[0, :5] = -1
    labels = torch.cat([idx[:, :1], targets], dim=1).masked_fill(torch.cat([idx[:, :1], targets], dim=1) < 0, -100)
    ours = model(idx[:, :-1], targets, dropless=True).ce_loss
    loss = theirs.train()(idx, labels=labels, use_cache=False).loss
    assert_close(loss, ours)
    ours.backward()
    loss.backward()
    names = dict(model.named_parameters())
    for name, p in theirs.named_parameters():
        assert_close(p.grad, names[name].grad, 1e-4)


def test_the_router_noise_is_in_training_alone(tmp_path):
    _, theirs = exported(tmp_path / "out", use_noisy_top_k=True)
    idx = tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(theirs(idx).logits, theirs(idx).logits)
        theirs.train()
        assert not torch.equal(theirs(idx).logits, theirs(idx).logits)


@pytest.mark.slow
@pytest.mark.parametrize("router_use_full_prec", [False, True])
def test_bfloat16_is_our_bfloat16(tmp_path, router_use_full_prec):
    model, _ = exported(tmp_path / "out", router_use_full_prec=router_use_full_prec)
    theirs, idx = load(tmp_path / "out", dtype=torch.bfloat16), tokens(3, 20)
    with torch.no_grad():
        given = theirs(idx).logits
    expected = logits(model.bfloat16(), idx)
    assert given.dtype == torch.bfloat16
    # One rounding apart, a token may go to another expert: most logits agree to the precision of the type.
    difference = (given - expected).abs().float() / expected.abs().max()
    assert difference.median() < 0.01 and (difference < 0.05).float().mean() > 0.9
    theirs.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").dtype == torch.bfloat16
    assert_close(logits(checkpoint.from_pretrained(tmp_path / "again"), idx), logits(model.float(), idx), 1e-3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert load(tmp_path / "out")(idx).logits.isfinite().all()


# -- arguments as GPT-2's class takes them


@pytest.fixture
def pair(tmp_path):
    """The same dense weights in our class and in transformers' GPT-2."""
    model = random_model(n_exp=1)
    checkpoint.export_hf(model, tmp_path / "gpt2")
    gpt2 = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").eval()
    assert type(gpt2) is transformers.GPT2LMHeadModel
    exported(tmp_path / "moe", stride=3)
    code = transformers.dynamic_module_utils.get_class_from_dynamic_module(
        hf.AUTO_MAP["AutoModelForCausalLM"], str(tmp_path / "moe")
    )
    shape = {"n_positions": 24, "vocab_size": 61, "n_layer": 3, "n_head": 2, "n_embd": 16}
    ours = code(code.config_class(**shape, moe_layers=[])).eval()
    assert not ours.load_state_dict(hf.model_weights(model), strict=False).unexpected_keys
    return ours, gpt2


LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)
POSITIONS = (LEFT.cumsum(1) - 1).clamp(min=0)
LABELS = tokens(2, 8).masked_fill(LEFT == 0, -100)
ARGUMENTS = [
    {}, {"attention_mask": LEFT}, {"attention_mask": RIGHT}, {"attention_mask": LEFT, "position_ids": POSITIONS},
    {"position_ids": torch.arange(8)[None] + 5}, {"labels": LABELS}, {"labels": LABELS, "attention_mask": LEFT},
    {"logits_to_keep": 1}, {"logits_to_keep": torch.tensor([0, 3])}, {"use_cache": False}, {"return_dict": False},
    {"output_hidden_states": True}, {"labels": LABELS, "num_items_in_batch": torch.tensor(5)},
]  # fmt: skip


def values(output):
    """The tensors of an output by name or number; of a cache its length."""
    items = enumerate(output) if isinstance(output, tuple) else output.items()
    return {
        k: v.get_seq_length() if isinstance(v, transformers.Cache) else torch.stack(v) if isinstance(v, tuple) else v
        for k, v in items
    }


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments_mean_the_same_as_for_gpt2(pair, arguments):
    ours, gpt2 = (values(model(tokens(2, 8), **arguments)) for model in pair)
    assert ours.keys() == gpt2.keys()
    for name, wanted in gpt2.items():
        if not isinstance(wanted, torch.Tensor):
            assert ours[name] == wanted
            continue
        given = ours[name]
        if name == "logits" and "attention_mask" in arguments:  # of padding they mean nothing
            keep = arguments["attention_mask"].bool()
            given, wanted = given[keep], wanted[keep]
        assert_close(given, wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_cache_gives_the_logits_of_the_whole(tmp_path, kind):
    model, theirs = exported(tmp_path / "out", **BALANCED)
    idx = tokens(2, 16)
    cache = transformers.StaticCache(theirs.config, max_cache_len=20) if kind == "static" else None
    parts = []
    for part in idx.split([5, 1, 7, 1, 2], dim=1):
        output = theirs(part, past_key_values=cache, use_cache=True)
        cache = output["past_key_values"]
        parts.append(output.logits)
    assert_close(torch.cat(parts, dim=1), logits(model, idx))
    with pytest.raises(ValueError, match="25 tokens are more than the 24 positions"):
        theirs(tokens(2, 25), use_cache=False)


@pytest.mark.slow
def test_what_the_class_cannot_do_is_refused(tmp_path):
    _, theirs = exported(tmp_path / "out")
    for unknown in ("output_attentions", "token_type_ids"):
        with pytest.raises(TypeError, match=unknown):
            theirs(tokens(1, 2), **{unknown: None})
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        theirs(tokens(1, 2), inputs_embeds=torch.zeros(1, 2, 16))
    embedded = theirs(inputs_embeds=theirs.get_input_embeddings()(tokens(1, 5))).logits
    assert torch.equal(embedded, theirs(tokens(1, 5)).logits)


def test_a_new_model_and_a_longer_vocabulary_are_usable(tmp_path):
    _, theirs = exported(tmp_path / "out", **BALANCED)
    new = type(theirs)(theirs.config)
    assert all(p.isfinite().all() for p in new.state_dict().values())
    assert new.transformer.h[0].mlp.experts.c_fc.std() < 0.03 and not new.transformer.h[0].mlp.router.balance_bias.any()
    theirs.resize_token_embeddings(70, mean_resizing=False)
    assert theirs(tokens(1, 5)).logits.shape[-1] == 70 and theirs.lm_head.weight is theirs.transformer.wte.weight


# -- text


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, BALANCED, {"top_k": 1, "stride": 1, "bias": False}])
def test_greedy_text_is_that_of_sample(tmp_path, fields):
    model, theirs = exported(tmp_path / "out", **fields)
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    rows = [tokens(1, n, seed=n)[0] for n in (3, 8, 5)]
    ours = [sample.generate(model, row[None], 12, temperature=0)[0] for row in rows]
    assert len({token for row in ours for token in row[-12:].tolist()}) > 6
    for row, wanted in zip(rows, ours, strict=True):
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            every = torch.ones_like(row[None])
            assert torch.equal(theirs.generate(row[None], attention_mask=every, **greedy, **cache)[0], wanted)
    padded = torch.stack([torch.cat([torch.zeros(8 - len(row), dtype=torch.int64), row]) for row in rows])
    mask = torch.stack([torch.arange(8) >= 8 - len(row) for row in rows]).long()
    batch = theirs.generate(padded, attention_mask=mask, **greedy)
    for row, given, wanted in zip(rows, batch, ours, strict=True):
        assert torch.equal(given[8 - len(row) :], wanted)


def test_padding_of_the_vocabulary_is_never_generated_and_end_of_text_ends(tmp_path):
    model = random_model(vocab_size=400)
    model.transformer.wte.weight.data[257:] = 9 * model.transformer.wte.weight.data[3]  # the likeliest are padding
    idx = tokens(1, 4)
    wanted = sample.generate(model, idx, 12, temperature=0, eot=256, vocab_size=257)
    assert (sample.generate(model, idx, 12, temperature=0) >= 257).any()
    checkpoint.export_hf(model, tmp_path / "out", {"tokenizer": "bytes"})
    assert torch.equal(load(tmp_path / "out").generate(idx, max_new_tokens=12, do_sample=False), wanted)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["eos_token_id"], settings["tokenizer"]) == (256, "bytes")
    assert checkpoint.tokenizer_of(tmp_path / "out") == "bytes"
    assert "a token is a byte" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "vocab.json").exists()


# -- what is refused, and nothing half-written


def test_every_setting_is_exported_or_of_the_training_alone():
    assert set(MODEL_FIELDS) <= {*hf.EXPORTED, *hf.TRAINING_ONLY}
    assert not set(hf.EXPORTED) & set(hf.TRAINING_ONLY)


def test_an_unknown_setting_is_refused(tmp_path):
    @dataclasses.dataclass
    class Wider(GPTConfig):
        wings: int = 0

    model = random_model()
    model.config = Wider(**SMALL)
    checkpoint.export_hf(model, tmp_path / "flat")
    model.config = Wider(**SMALL, wings=2)
    with pytest.raises(UserError, match=r"wings 2 cannot be exported: modeling_moe_gpt2\.py computes models with 0"):
        checkpoint.export_hf(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["flat"]


@pytest.mark.parametrize("change, said", [
    ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, r"its auto_map names evil\.Model; only modeling_moe_gpt2"),
    ({"auto_map": None}, "its auto_map names None"),
    ({"model_type": "mixtral"}, "model_type is 'mixtral'"),
    ({"model_type": "gpt2"}, "auto_map is {"),
    ({"gpt_config": None}, "has no gpt_config: export the model again"),
    ({"gpt_config": {"wings": 2}}, "no such model: .*wings"),
    ({"gpt_config": {**SMALL, "n_embd": "inf"}}, "no such model: n_embd must be int"),
    ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1, by its gpt_config 2: make them agree"),
    ({"gate": "sigmoid"}, "gate is 'sigmoid', by its gpt_config 'topk_softmax'"),
    ({"tokenizer": 7}, "unknown tokenizer '7'"),
])  # fmt: skip
def test_folders_of_other_code_or_with_edited_settings_are_refused(tmp_path, change, said):
    checkpoint.export_hf(random_model(), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        checkpoint.open_model("", str(tmp_path / "out"), "cpu")


def test_code_in_a_folder_is_not_run(tmp_path):
    model = random_model()
    checkpoint.export_hf(model, tmp_path / "out")
    (tmp_path / "out" / hf.MOE_CODE.name).write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')")
    back = checkpoint.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(back, tokens(1, 5)), logits(model, tokens(1, 5)))
    assert not (tmp_path / "it_ran").exists()


def test_only_an_earlier_export_is_written_over(tmp_path):
    model, out = random_model(), tmp_path / "out"
    out.mkdir()
    checkpoint.export_hf(model, out, {"tokenizer": "gpt2"})  # empty before
    assert {path.name for path in out.iterdir()} == set(hf.FILES)
    checkpoint.export_hf(random_model(n_exp=1), out)
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "README.md",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    foreign = {"notes.txt": b"mine", "config.json": b"{}", "model.safetensors": b""}
    for name, content in foreign.items():
        folder = tmp_path / f"with_{name}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{folder} is not empty and not an earlier export: give a new folder"):
            checkpoint.export_hf(model, folder)
        assert [path.read_bytes() for path in folder.iterdir()] == [content]
    (out / "notes.txt").write_bytes(b"mine")
    with pytest.raises(UserError, match="not an earlier export"):
        checkpoint.export_hf(model, out)
    with pytest.raises(UserError, match=r"cannot write .*notes\.txt: it is not a folder"):
        checkpoint.export_hf(model, out / "notes.txt")


FULL_DISK = """
import resource, sys
from lab import common, checkpoint
from model import GPT, GPTConfig
model = GPT(GPTConfig(block_size=24, vocab_size=61, n_layer=3, n_head=2, n_embd=16, n_exp=4))
checkpoint.export_hf(model, sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
common.run(lambda: checkpoint.export_hf(model, sys.argv[2]))
"""


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_and_the_earlier_export_whole(tmp_path):
    """A limit on file size stands for the full disk: the same OSError at the same place."""
    script = tmp_path / "full.py"
    script.write_text(FULL_DISK)
    for target in ("out", "new"):
        process = Forked(script, tmp_path / "out", tmp_path / target)
        assert process.communicate()[1] == f"error: cannot write {tmp_path / target}: File too large\n"
        assert process.wait() == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["full.py", "out"]
        checkpoint.from_pretrained(tmp_path / "out")


# -- the command


@pytest.fixture
def main(monkeypatch, capsys):
    """main(module, *flags) is the output of the script, run in this process."""

    def call(module, *flags):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, flags)])
        module.main()
        return capsys.readouterr().out

    return call


@pytest.mark.slow
@pytest.mark.parametrize("n_exp", [1, 4])
def test_the_command_writes_model_tokenizer_and_card(main, tmp_path, n_exp):
    model = random_model(vocab_size=50304, n_exp=n_exp)
    state = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "step": 9, "tokenizer": "gpt2"}
    checkpoint.save(state, tmp_path / "run" / "step_000009.pt")
    said = main(checkpoint, "--checkpoint", tmp_path / "run", "--export_hf", tmp_path / "out")
    assert ("trust_remote_code" in said) == (n_exp > 1) and "step 9" in said
    idx, theirs = torch.arange(12)[None], load(tmp_path / "out")
    assert_close(theirs(idx).logits, logits(model, idx))
    assert (type(theirs) is transformers.GPT2LMHeadModel) == (n_exp == 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=n_exp > 1)
    assert tokenizer("Hello world<|endoftext|>")["input_ids"] == [15496, 995, 50256]
    assert tokenizer.decode([15496, 995]) == "Hello world" and tokenizer.model_max_length == 24
    assert theirs.generation_config.suppress_tokens == list(range(50257, 50304))


@pytest.mark.slow
def test_the_card_of_a_run_has_its_losses_data_and_settings(train, tmp_path):
    from huggingface_hub import ModelCard

    code, streams = train(use_bias_balance=True, use_noisy_top_k=True, hellaswag_data=str(tmp_path / "hella.jsonl"))
    assert code == 0
    model, state = checkpoint.load_model(next(Path("checkpoints").iterdir()))
    checkpoint.export_hf(model, tmp_path / "out", state)
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    card.data.to_dict()
    assert card.data.tags == ["gpt2", "mixture-of-experts"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.text.splitlines() if line.startswith("|")]
    assert ["validation, nats per token", "10", f"{streams['val'][1][-1]:.4f}"] in rows
    assert [row[1] for row in rows if row[0].startswith("train, mean")] == ["10"]
    for row in (["tokenizer", "bytes"], ["shards", "words"], ["source", "tests"], ["tokens seen", "2,560"],
                ["use_bias_balance", "True"], ["n_embd", "32"], ["max_lr", "0.003"], ["steps", "10"],
                ["hellaswag_data", "hella.jsonl"], ["init_from", "scratch"]):  # fmt: skip
        assert row in rows, row
    assert str(tmp_path) not in card.text
    for other in ({"identity": "0123456789ab"}, {"settings": {"data": "0123456789ab"}}):  # another run of this name
        checkpoint.export_hf(model, tmp_path / "out", state | {"record": state["record"] | other})
        text = (tmp_path / "out" / "README.md").read_text()
        assert ("validation" not in text) == ("identity" in other) and ("source |" not in text) == ("settings" in other)
    shutil.rmtree("logs")
    checkpoint.export_hf(model, tmp_path / "out", state)
    assert "validation" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_folder_continues_in_the_trainer_and_loads_without_the_repository(train, main, tmp_path):
    assert train(max_steps=2)[0] == 0
    model, state = checkpoint.load_model(next(Path("checkpoints").iterdir()))
    checkpoint.export_hf(model, tmp_path / "out", state)
    code, streams = train(run_id="more", init_from=str(tmp_path / "out"), max_steps=2, block_size=None)
    assert code == 0 and streams["val"][1][0] < 5.5
    script = (
        "import torch, sys, transformers as t\n"
        "m = t.AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True)\n"
        "assert 'model' not in sys.modules and 'checkpoint' not in sys.modules\n"
        "torch.save(m(torch.arange(12)[None]).logits.detach(), 'logits.pt')\n"
    )
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert_close(torch.load(tmp_path / "logits.pt"), logits(model, torch.arange(12)[None]))
    assert "the" in main(sample, "--init_from", tmp_path / "out", "--prompt", "the", "--max_new_tokens", 5)
