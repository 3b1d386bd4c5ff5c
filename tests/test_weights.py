"""weights.py and lab/modeling_moe_gpt2.py: GPT-2 and exported folders in and out, upcycling, nothing executed."""

import dataclasses
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import run_script

import model as model_module
from lab import checkpoint
from lab.common import UserError
from lab.tokenizer import get_tokenizer
from model import GATES, GPT, GPTConfig
from weights import export_hf, from_pretrained, leak, logits_of, open_model

transformers = pytest.importorskip("transformers")

SMALL = {"block_size": 24, "vocab_size": 300, "n_layer": 3, "n_head": 2, "n_embd": 16}
BALANCED = {"use_bias_balance": True, "gate": "sigmoid", "n_shared_exp": 2, "use_noisy_top_k": True}
VARIANTS = [
    *({"gate": gate, "top_k": top_k, "use_bias_balance": top_k > 2} for gate in GATES for top_k in (1, 2, 3)),
    {"stride": 3, "n_exp": 64}, {"n_layer": 4, "first_dense": 1, "expert_hidden": 7, "n_shared_exp": 1}, {"n_exp": 1},
    {"router_use_full_prec": True, "dropout": 0.3, "eval_capacity": 0.1, "train_capacity": float("inf")},
    {"use_quantile_balance": True}, {"qk_norm": True, "n_exp": 1}, {**BALANCED, "bias": False},
]
pytestmark = pytest.mark.filterwarnings("ignore:top_k=1", "ignore:.gradient_checkpointing")


@pytest.fixture(autouse=True)
def copies_of_exported_classes_stay_in_the_folder_of_the_test(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])


def random_model(**fields):
    model, generator = GPT(GPTConfig(**SMALL | {"n_exp": 4} | fields)), torch.Generator().manual_seed(0)
    for name, p in model.state_dict().items():
        p.normal_(mean=float(".ln_" in name and name.endswith("weight")), std=0.3, generator=generator)
    return model.eval()


def load(folder, **kwargs):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def exported(folder, **fields):
    model = random_model(**fields)
    export_hf(model, folder, "unknown")
    return model, load(folder)


@torch.no_grad()
def logits(model, idx):
    return (model.eval()(idx, dropless=True) if isinstance(model, GPT) else model(idx)).logits


def tokens(B, S, below=257):
    return torch.randint(below, (B, S), generator=torch.Generator().manual_seed(1))


def assert_close(given, wanted, tolerance=1e-5):
    assert (given - wanted).abs().max() <= tolerance * wanted.abs().max()


def run_folder(path, model, tokenizer="bytes", fsdp=False):
    saver, fields = checkpoint.BackgroundSaver(path, 1), {"step": 9, "tokenizer": tokenizer}
    fields["config"] = dataclasses.asdict(model.config)
    assert saver.save(model, torch.optim.AdamW(model.parameters()), fields, 9, fsdp) or saver.wait() is None
    (path / "config.json").write_text(json.dumps({"settings": {}, "model": {}}))  # as a run's folder has it
    return path


@pytest.mark.slow
@pytest.mark.parametrize("fields", VARIANTS)
def test_an_export_has_our_logits_in_transformers_and_comes_back(tmp_path, fields):
    model, theirs = exported(tmp_path / "out", **fields)
    assert_close(logits(theirs, tokens(3, 20)), logits(model, tokens(3, 20)))
    theirs.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    for folder in ("out", "again"):
        back = from_pretrained(tmp_path / folder)
        assert torch.equal(logits(back, tokens(3, 20)), logits(model, tokens(3, 20))) and back.config == model.config


def test_the_loss_and_its_gradients_are_ours_with_and_without_gradient_checkpointing(tmp_path):
    model, theirs = exported(tmp_path / "out", **BALANCED | {"use_noisy_top_k": False})
    idx = tokens(3, 20)
    labels = idx.masked_fill(torch.arange(60).view(3, 20) < 5, -100)
    ours = model(idx[:, :-1], labels[:, 1:].clamp(min=-1), dropless=True).ce_loss
    ours.backward()
    for switch in (theirs.gradient_checkpointing_disable, theirs.gradient_checkpointing_enable):
        switch()
        theirs.zero_grad()
        loss = theirs.train()(idx, labels=labels).loss
        assert_close(loss, ours)
        loss.backward()
        for name, p in theirs.named_parameters():
            assert_close(p.grad, model.get_parameter(name).grad, 1e-4)


@pytest.mark.parametrize("full", [False, True])
def test_in_bfloat16_the_selection_bias_stays_float32(tmp_path, full):
    model, _ = exported(tmp_path / "out", router_use_full_prec=full, use_bias_balance=True)
    theirs = load(tmp_path / "out", dtype=torch.bfloat16)
    router, ours = (x.transformer.h[0].mlp.router for x in (theirs, model))
    assert torch.equal(router.balance_bias, ours.balance_bias)
    assert router.w_g.weight.dtype == (torch.float32 if full else torch.bfloat16)
    assert logits(theirs, tokens(3, 20)).dtype == torch.bfloat16


@torch.no_grad()
def test_arguments_mean_the_same_as_for_gpt2(tmp_path):
    (dense, gpt2), code = exported(tmp_path / "gpt2", n_exp=1), type(exported(tmp_path / "moe")[1])
    ours = code(code.config_class(**SMALL, n_exp=1)).eval()
    ours.load_state_dict(dense.state_dict())
    left = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])
    for arguments in (
        {}, {"attention_mask": left}, {"attention_mask": left, "position_ids": (left.cumsum(1) - 1).clamp(min=0)},
        {"labels": tokens(2, 8).masked_fill(left == 0, -100), "attention_mask": left.flip(1)}, {"use_cache": False},
        {"labels": tokens(2, 8), "num_items_in_batch": torch.tensor(5)}, {"logits_to_keep": torch.tensor([0, 3])},
    ):
        given, wanted = (model(tokens(2, 8), **arguments) for model in (ours, gpt2))
        keep = arguments.get("attention_mask", torch.ones(given.logits.shape[:2])).bool()
        assert_close(given.logits[keep], wanted.logits[keep])
        assert given.keys() == wanted.keys() and ("labels" not in arguments or torch.allclose(given.loss, wanted.loss))


def test_generated_text_is_the_same_with_any_cache_and_padding(tmp_path):
    model = random_model(vocab_size=400, **BALANCED)
    model.transformer.wte.weight.data[257:] = 9 * model.transformer.wte.weight.data[3]  # padding is the likeliest
    export_hf(model, tmp_path / "out", "bytes")
    theirs, row = load(tmp_path / "out"), tokens(1, 5)
    wanted = row
    for _ in range(12):
        wanted = torch.cat([wanted, logits(model, wanted)[:, -1, :257].argmax(-1, keepdim=True)], dim=1)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(theirs.generate(row, attention_mask=torch.ones_like(row), **greedy, **cache), wanted)
    padded, mask = torch.cat([torch.zeros_like(row), row], dim=1), (torch.arange(10) >= 5).long()[None]
    assert torch.equal(theirs.generate(padded, attention_mask=mask, **greedy)[:, 5:], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name, n_exp", [("bytes", 4), ("gpt2:1000", 4), ("gpt2", 1)])
def test_an_exported_tokenizer_is_ours(tmp_path, name, n_exp):
    tokenizer, text = get_tokenizer(name), " Hello wörld , 12's\n\n  x"
    export_hf(random_model(vocab_size=tokenizer.vocab_size + 3, n_exp=n_exp), tmp_path / "out", name)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=n_exp > 1)
    ids = theirs(text + "<|endoftext|>")["input_ids"]
    assert ids == [*tokenizer.encode_ordinary(text), tokenizer.eot] and theirs.decode(ids[:-1]) == text
    assert (theirs.eos_token_id, theirs.model_max_length, len(theirs)) == (tokenizer.eot, 24, tokenizer.vocab_size)
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert open_model(tmp_path / "out", "cpu")[1].name == name


def test_what_the_class_does_not_compute_is_not_exported(tmp_path, monkeypatch):
    def refused(model, said):
        with pytest.raises(UserError, match=f"not exported: .*{said}.*: add what is new to lab/modeling_moe_gpt2"):
            export_hf(model, tmp_path / "sub" / "out", "bytes")
        assert not list((tmp_path / "sub").glob("*"))

    new_gate = GATES["softmax"]._replace(weigh=lambda logits_TK, scores_TK: 2 * scores_TK)
    monkeypatch.setattr(model_module, "check_ranges", lambda config: None)
    monkeypatch.setitem(GATES, "twice", new_gate)
    refused(random_model(gate="twice"), "gate 'twice' is not one of")
    extra, changed = random_model(), random_model(gate="softmax")
    extra.transformer.h[1].mlp.extra = torch.nn.Linear(2, 2)
    refused(extra, r"Unexpected key.*mlp\.extra\.weight")
    monkeypatch.setitem(GATES, "softmax", new_gate)
    refused(changed, "transformers computes other logits")
    for kind in (GPT, transformers.GPT2LMHeadModel):

        def leaky(self, idx, real=kind.forward, **kwargs):
            return SimpleNamespace(logits=real(self, idx, **kwargs).logits + idx.float().mean())

        monkeypatch.setattr(kind, "forward", leaky)
    refused(random_model(n_exp=1), "a later token or another row moves a logit")


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_no_later_token_and_no_other_row_moves_a_logit(fields):
    model = random_model(**fields)
    assert leak(logits_of(model), 24, model.config.vocab_size) < 1e-5


def test_a_folder_with_files_is_never_written_to_and_its_code_never_run(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    model, _ = exported(out)  # empty before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "modules"}
    (out / "modeling_moe_gpt2.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match="is not empty: give a new folder"):
        export_hf(model, out, "unknown")
    assert torch.equal(logits(from_pretrained(out), tokens(1, 5)), logits(model, tokens(1, 5)))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before and not (tmp_path / "it_ran").exists()


def random_gpt2(folder, change=None):
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 24, "vocab_size": 130}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    for p in theirs.parameters():
        p.data.normal_(std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    theirs.save_pretrained(folder, max_shard_size="50KB" if change is None else "1GB")
    if change:
        found = safetensors.torch.load_file(folder / "model.safetensors")
        safetensors.torch.save_file(change(found), folder / "model.safetensors")
    return theirs


def test_gpt2_folders_are_read_as_transformers_reads_them(tmp_path):
    theirs, idx = random_gpt2(tmp_path), tokens(3, 20, 130)
    shutil.copy(next(tmp_path.glob("model-00001-*")), tmp_path / "model-leftover.safetensors")
    ours = from_pretrained(tmp_path)
    assert_close(logits(ours, idx), logits(theirs, idx))
    assert torch.equal(logits(from_pretrained(tmp_path, block_size=20, dropout=0.1), idx), logits(ours, idx))
    grown = logits(from_pretrained(tmp_path, vocab_size=192), idx)  # an added row is the mean of the others
    torch.testing.assert_close(grown[..., :130], logits(ours, idx), rtol=0, atol=1e-5)
    assert (torch.softmax(grown, -1)[..., 130:] < 1 / 130).all()
    old = {"h.0.attn.bias": torch.ones(1, 1, 24, 24), "lm_head.weight": ours.lm_head.weight.detach().clone()}
    random_gpt2(tmp_path / "old", lambda found: old | {key.removeprefix("transformer."): found[key] for key in found})
    assert torch.equal(logits(from_pretrained(tmp_path / "old"), idx), logits(ours, idx))


def test_other_architectures_are_refused(tmp_path):
    random_gpt2(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for change, said in (
        ({"activation_function": "relu"}, "activation_function is 'relu'"), ({"n_inner": 7}, "n_inner is 7"),
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'"), ({"tie_word_embeddings": False}, "tie_word_emb"),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "auto_map is"), ({"n_head": 3}, "no such model: n_embd"),
        ({"n_layer": 4}, "do not fit: .*Missing key.*h.3"), ({"n_embd": 64}, "do not fit: .*size mismatch"),
        ({"n_layer": 2}, "do not fit: .*Unexpected key.*h.2"), ({"n_positions": -1}, "block_size must be at"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings | change))
        with pytest.raises(UserError, match=said):
            from_pretrained(tmp_path)


def test_what_is_no_source_is_named(tmp_path, monkeypatch):
    config, weights, wte = tmp_path / "config.json", tmp_path / "model.safetensors", "transformer.wte.weight"
    for make, said in (
        (tmp_path.exists, "has no checkpoint"), (lambda: config.write_text("{"), r"config\.json does not describe"),
        (lambda: random_gpt2(tmp_path, lambda found: found | {"wte.weight": found[wte] + 0}), f"holds {wte} twice"),
        (lambda: random_gpt2(tmp_path, lambda found: found | {"lm_head.weight": found[wte] + 1}), "its own"),
        (lambda: weights.write_bytes(b"not this"), "cannot read model.safetensors .*pickled weights are not read"),
    ):
        make()
        with pytest.raises(UserError, match=said):
            from_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, said in (("gpt3", "no gpt3: give a checkpoint.* or one of gpt2, gpt2-m"), ("gpt2", "--local-dir gpt2")):
        with pytest.raises(UserError, match=said):
            from_pretrained(name)


@pytest.mark.parametrize("fields", [
    {}, {"top_k": 1}, {"gate": "sigmoid", "top_k": 3}, {"use_bias_balance": True, "stride": 1},
    {"use_noisy_top_k": True, "n_shared_exp": 2}, {"use_switch_tfm_init": True, "router_use_full_prec": True},
])
def test_an_upcycled_model_computes_the_dense_function(tmp_path, fields):
    random_gpt2(tmp_path)
    dense, idx, before = from_pretrained(tmp_path), tokens(2, 16, 130), torch.get_rng_state()
    model = from_pretrained(tmp_path, n_exp=4, **fields)
    assert_close(logits(model, idx), logits(dense, idx))
    assert all(moe.router.w_g.weight.std() > 0.005 for _, moe in model.moe_layers())
    assert torch.equal(torch.get_rng_state(), before)
    for wrong in ({"gate": "softmax"}, {"gate": "sigmoid", "top_k": 1}, {"expert_hidden": 64}):
        with pytest.raises(UserError, match=r"must sum to 1|expert_hidden 64: MLPs of .* are copied whole"):
            from_pretrained(tmp_path, n_exp=4, **wrong)


def test_a_run_is_a_source_and_what_its_weights_fix_cannot_change(tmp_path):
    model, idx = random_model(use_noisy_top_k=True, qk_norm=True), tokens(2, 12)
    run = run_folder(tmp_path / "run", model)
    sharded = run_folder(tmp_path / "set", model, fsdp=True)
    for source in (run, run / "step_000009.pt", sharded, sharded / "step_000009", str(run)):
        opened, tokenizer = open_model(source, "cpu")
        assert tokenizer.name == "bytes" and not opened.training and opened.config == model.config
        assert torch.equal(logits(opened, idx), logits(model, idx))
    changed = from_pretrained(run, dropout=0.2, use_noisy_top_k=False, block_size=12, n_layer=None)
    assert torch.equal(logits(changed, idx), logits(model, idx))
    for fields, said in (
        ({"n_exp": 8}, "do not fit: .*size mismatch"), ({"n_exp": 1}, "do not fit: .*c_fc"), ({"top_k": 9}, "top_k 9"),
        ({"n_head": 4}, "n_head 4: that of .*step_000009.pt is 2"), ({"qk_norm": False}, "qk_norm False: that of"),
        ({"vocab_size": 50}, "vocab_size 50 is less than the 300"), ({"block_size": 99}, "block_size 99 is more than"),
    ):
        with pytest.raises(UserError, match=said):
            from_pretrained(run, **fields)
    with pytest.raises(UserError, match="a tokenizer that is not known here"):
        open_model(run_folder(tmp_path / "unknown", model, "unknown"), "cpu")


@pytest.mark.slow
def test_the_command_exports_and_merges(tmp_path):
    model, idx = random_model(), tokens(2, 9)
    flags = ["--checkpoint", run_folder(tmp_path / "run", model, fsdp=True), "--export-hf", "out", "--merge", "a.pt"]
    run_script("weights.py", *flags, cwd=tmp_path, env={"HF_MODULES_CACHE": str(tmp_path / "modules")}, check=0)
    assert_close(logits(load(tmp_path / "out"), idx), logits(model, idx))
    assert checkpoint.load(tmp_path / "a.pt", checkpoint.PARTS)["step"] == 9
    assert torch.equal(logits(from_pretrained(tmp_path / "a.pt"), idx), logits(model, idx))
