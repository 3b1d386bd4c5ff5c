"""routes.py: the routing is that of sampling, the tables are those counted by hand, the page holds the data."""

import gzip
import html.parser
import itertools
import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_script

import routes
from lab import checkpoint
from lab.common import UserError
from lab.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from routes import Routes

SMALL = {"block_size": 16, "vocab_size": 257, "n_layer": 3, "n_head": 2, "n_embd": 16, "n_exp": 8, "stride": 2}


def by_hand(first, *others, n_exp=4, layer=0):
    """Routes of one layer, of choices as text: "0121" are the first choices of four tokens."""
    expert_TK = np.array([[int(e) for e in column] for column in (first, *others)]).T
    return Routes(n_exp, {layer: expert_TK}, {layer: np.full(expert_TK.shape, 1 / (1 + len(others)), np.float32)})


@torch.no_grad()
def test_the_routes_are_those_of_each_window_alone_without_noise_and_dropless():
    model = GPT(GPTConfig(**SMALL, use_noisy_top_k=True, eval_capacity=0.1, top_k=3)).eval()
    for _, moe in model.moe_layers():
        moe.router.w_noise.weight += 10
    sources, inputs = [np.random.default_rng(n).integers(0, 256, n) for n in (3, 16, 37)], []
    found = routes.collect(model, sources, 16, torch.device("cpu"))
    for _, moe in model.moe_layers():
        moe.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    start = 0
    for window in [ids[i : i + 16] for ids in sources for i in range(0, len(ids), 16)]:
        inputs.clear()
        model(torch.from_numpy(window)[None], dropless=True)
        for (layer, moe), x_TD in zip(model.moe_layers(), list(inputs), strict=True):
            wanted, here = moe.router(x_TD), slice(start, start + len(window))
            assert np.array_equal(found.experts[layer][here], wanted.expert_TK)
            assert np.allclose(found.gates[layer][here], wanted.gate_TK, atol=1e-5)
        start += len(window)
    assert all(len(expert_TK) == start == 56 for expert_TK in found.experts.values())
    model.transformer.wpe.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged"):
        routes.collect(model, sources, 16, torch.device("cpu"))


@pytest.mark.parametrize("kind, tokens", [
    ("word", [" the", "The", "é", "'s", "don't", "\u4e2d"]), ("number", ["7", " 1962", "3.14", "½"]),
    ("punctuation", [".", " (", '."', "—", "'", "?!"]), ("white space", [" ", "\n\n", "\t", "\u3000", ""]),
    ("code", ["_", "==", " {", "():", "x1", "self.x_", "->", "#", "</"]), ("other", ["©", "€", "🙂"]),
])
def test_the_characters_of_a_token_decide_its_class(kind, tokens):
    assert [routes.describe(token.encode()) for token in tokens] == [(repr(token), kind) for token in tokens]
    assert routes.describe("é".encode()[:1]) == (r"b'\xc3'", "other")


def test_shares_of_a_group():
    groups = [("all", "all tokens", np.ones(4, bool)), ("class", "word", np.array([True, True, False, False]))]
    table = routes.share_table(by_hand("0121", "1213", layer=2), groups)
    assert (table.layer == 2).all() and list(table.tokens) == [4] * 4 + [2] * 4
    assert list(table["first"]) == [1, 2, 1, 0, 1, 1, 0, 0] and list(table.chosen) == [1, 4, 2, 1, 1, 2, 1, 0]
    assert list(table.share_first) == [0.25, 0.5, 0.25, 0, 0.5, 0.5, 0, 0]
    assert list(table.share_chosen) == [1 / 8, 4 / 8, 2 / 8, 1 / 8, 1 / 4, 2 / 4, 1 / 4, 0]


def test_typical_tokens_have_the_highest_lift_and_at_least_five_occurrences_at_the_expert():
    ids = np.repeat([10, 11, 12, 13], [40, 8, 6, 4])
    first = "0" * 30 + "1" * 10 + "1" * 8 + "1" * 5 + "0" * 1 + "1" * 4
    table = routes.token_table(by_hand(first, "2" * 58), ids, {i: (f"token {i}", "word") for i in range(10, 14)})
    assert [tuple(row)[:6] for row in table.itertuples(index=False)] == [
        (0, 0, 1, "token 10", 30, 40), (0, 1, 1, "token 11", 8, 8), (0, 1, 2, "token 12", 5, 6)]
    assert np.allclose(table.lift, [30 / 40 / (31 / 58), 1 / (27 / 58), 5 / 6 / (27 / 58)])


def test_pairs_of_independent_choices_have_ratio_1_and_those_that_go_together_stand_out():
    expert_TK = np.random.default_rng(0).random((40_000, 8)).argsort(axis=1)[:, :3]
    table = routes.pair_table(Routes(8, {7: expert_TK}, {}))
    assert list(zip(table.a, table.b, strict=True)) == list(itertools.combinations(range(8), 2))
    assert (table.layer == 7).all() and np.allclose(table.ratio, 1, atol=0.05)
    expert_TK[:1000] = [3, 1, 7]
    table = routes.pair_table(Routes(8, {7: expert_TK}, {}))
    chosen = [(expert_TK == e).any(axis=1) for e in range(8)]
    assert list(table.together) == [(chosen[a] & chosen[b]).sum() for a, b in itertools.combinations(range(8), 2)]
    best = table.sort_values("ratio").tail(3)
    assert set(zip(best.a, best.b, strict=True)) == {(1, 3), (1, 7), (3, 7)}
    assert np.isclose(table.expected.sum(), 3 * 40_000) and not len(routes.pair_table(by_hand("0123")))  # top 1


def test_stability_counts_first_choices_and_sets():
    first, sets = routes.stability_table(by_hand("0012", "1223"), by_hand("0210", "1021")).itertuples(index=False)
    assert (first.choice, first.tokens, first.same) == ("first", 4, 2 / 4)  # tokens 0 and 2
    assert first.chance == (2 * 2 + 1 * 1 + 1 * 1) / 16
    assert (sets.choice, sets.same) == ("set", 3 / 4)  # 01, 02 in the other order, 12
    assert sets.chance == (1 * 2 + 1 * 1 + 1 * 1) / 16


def test_texts_of_files_and_tables_share_max_tokens(tmp_path):
    for name in ("sub", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + b"a" * 100))
    (tmp_path / "b.jsonl").write_text('\ufeff{"content": "one"}\n{"content": null}\n{"content": "two"}\n')
    pd.DataFrame({"content": ["three", None, "four"]}).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "model.bin").write_bytes(b"\xff")  # no text: left out of a folder
    sources = routes.read_sources([tmp_path], get_tokenizer("bytes"), 90, "content")
    texts = {name: bytes(ids.tolist()) for name, ids in sources.items()}
    assert texts == {"b.jsonl": b"one\n\ntwo", "c.parquet": b"three\n\nfour", "sub/a.txt.gz": b"a" * 30}
    for name in ("b.jsonl", "c.parquet", "model.bin"):
        with pytest.raises(UserError, match=name):
            routes.read_sources([tmp_path / name], get_tokenizer("bytes"), 90, "no_such_column")
    assert list(routes.read_sources((), get_tokenizer("gpt2"), 2000)) == ["prose (built in)", "argparse.py"]


class Page(html.parser.HTMLParser):
    def handle_starttag(self, tag, attrs):
        assert not {"src", "href"} & dict(attrs).keys()  # self-contained
        self.scripts += [""] if tag == "script" else []

    def handle_data(self, data):
        if self.scripts:
            self.scripts[-1] += data


@pytest.mark.slow
def test_the_script_writes_tables_and_a_page_that_holds_a_hostile_text(tmp_path):
    for step in (1, 2):
        model = GPT(GPTConfig(**SMALL, top_k=2), torch.Generator().manual_seed(step))
        state = {"model": model.state_dict(), "config": asdict(model.config), "tokenizer": "bytes"}
        checkpoint.save(state, tmp_path / f"step_{step:06d}.pt")
    text = tmp_path / "<!--<script>b.txt"
    text.write_text("</script><script>alert(1)</script><!-- <b>&amp; ROUTES_DATA é\n" * 10, encoding="utf-8")
    first, out = tmp_path / "step_000001.pt", tmp_path / "out"
    run_script("routes.py", "--checkpoint", tmp_path, "--against", first, "--text", text, "--out", out, check=0)
    page, Page.scripts = Page(), []
    page.feed((out / "routes.html").read_text(encoding="utf-8"))
    assert len(page.scripts) == 2
    data = json.loads(page.scripts[0])
    assert "".join(data["pieces"]).replace("·", "") == text.read_text(encoding="utf-8")
    assert data["sources"] == [[text.name, len(text.read_bytes())]] and data["layers"] == [0, 2]
    shares = pd.read_csv(out / "shares.csv").query("by == 'all' and layer == 2")
    assert list(shares["first"]) == [sum(e[0] == expert for e in data["experts"][1]) for expert in range(8)]
    assert list(data["tables"]) == ["shares", "tokens", "pairs", "stability"]
    assert all(len(pd.read_csv(out / f"{name}.csv")) == len(table) for name, table in data["tables"].items())
