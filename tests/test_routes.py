"""routes.py: the routing is that of sampling, the tables are right on cases counted by hand, the page works."""

import csv
import dataclasses
import itertools
import json
import sys
from pathlib import Path

import browser
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Forked

import routes
from lab import checkpoint
from lab.common import UserError
from lab.tokenizer import get_tokenizer
from model import GPT, GPTConfig
from routes import Routes

ROOT = Path(__file__).parent.parent
SMALL = {"block_size": 16, "vocab_size": 257, "n_layer": 3, "n_head": 2, "n_embd": 16, "n_exp": 8, "bias": False}


def save(folder, seed=0, tokenizer="bytes", **settings):
    """A run folder with the checkpoint of a small model whose routers prefer some experts, as trained ones do."""
    model = GPT(GPTConfig(**{**SMALL, **settings}), torch.Generator().manual_seed(seed))
    for _, moe in model.moe_layers():
        moe.router.w_g.weight.data *= 20
    state = {"model": model.state_dict(), "config": dataclasses.asdict(model.config), "tokenizer": tokenizer}
    checkpoint.save(state, checkpoint.step_path(folder, 1))
    return folder


@pytest.fixture
def main(monkeypatch, capsys):
    """The script inside this process (a start costs seconds): called with flags, it returns stdout and stderr."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["routes.py", *map(str, flags)])
        routes.main()
        return capsys.readouterr()

    return call


def by_hand(first, *others, n_exp=4, layer=0):
    """Routes of one layer, of choices as text: "0121" are the first choices of four tokens."""
    expert_TK = np.array([[int(e) for e in column] for column in (first, *others)]).T
    return Routes(n_exp, {layer: expert_TK}, {layer: np.full(expert_TK.shape, 1 / (1 + len(others)), np.float32)})


# -- routing


def router_inputs(model, window):
    """The input of each router, (T, D), for one window alone."""
    inputs = []
    hooks = [moe.router.register_forward_pre_hook(lambda router, args: inputs.append(args[0]))
             for _, moe in model.moe_layers()]  # fmt: skip
    model(window, dropless=True)
    for hook in hooks:
        hook.remove()
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"use_bias_balance": True, "top_k": 3}, {"top_k": 1, "gate": "softmax"}])
@torch.no_grad()
def test_the_routes_are_those_of_each_window_alone_without_noise_and_dropless(settings):
    model = GPT(GPTConfig(**SMALL, use_noisy_top_k=True, eval_capacity=0.1, stride=1, **settings)).eval()
    for _, moe in model.moe_layers():
        moe.router.w_noise.weight += 10
        if settings.get("use_bias_balance"):
            moe.router.balance_bias.copy_(torch.randn(8))
    lengths = (3, 16, 37, 16 * 600)  # less than a window, one window, several and a rest, more than a batch
    sources = [np.random.default_rng(n).integers(0, 256, n).astype(np.uint16) for n in lengths]
    found = routes.collect(model, sources, 16, torch.device("cpu"))
    assert [expert_TK.shape for expert_TK in found.experts.values()] == [(sum(lengths), model.config.top_k)] * 3
    start = 0
    for ids in sources:
        for i in range(0, min(len(ids), 640), 16):
            window = torch.from_numpy(ids[i : i + 16].astype(np.int64))[None]
            for (layer, moe), x_TD in zip(model.moe_layers(), router_inputs(model, window), strict=True):
                wanted, here = moe.router(x_TD), slice(start + i, start + i + len(x_TD))
                assert np.array_equal(found.experts[layer][here], wanted.expert_TK)
                assert np.allclose(found.gates[layer][here], wanted.gate_TK, atol=1e-5)
                if not settings:
                    assert np.array_equal(found.experts[layer][here, 0], (x_TD @ moe.router.w_g.weight.T).argmax(dim=1))
        start += len(ids)
    assert not any(moe.router._forward_hooks for _, moe in model.moe_layers())


def test_a_diverged_model_is_an_error():
    model = GPT(GPTConfig(**SMALL)).eval()
    model.transformer.wpe.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="diverged"):
        routes.collect(model, [np.arange(9)], 16, torch.device("cpu"))


# -- tables


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("word", [" the", "The", "é", "'s", "don't", "\u4e2d", "a"]),
        ("number", ["7", " 1962", "3.14", "½"]),
        ("punctuation", [".", " (", '."', "—", "'", "?!"]),
        ("white space", [" ", "\n\n", "\t", "\u3000", ""]),
        ("code", ["_", "==", " {", "():", "x1", "self.x_", "->", "#", "$", "</"]),
        ("other", ["©", "€", "🙂"]),
    ],
)
def test_the_characters_of_a_token_decide_its_class(kind, tokens):
    assert {token: routes.describe(token.encode())[1] for token in tokens} == dict.fromkeys(tokens, kind)


@pytest.mark.slow
def test_labels_are_quoted_and_show_parts_of_characters_as_bytes():
    assert routes.describe(b" the") == ("' the'", "word")
    assert routes.describe(b"\n") == (r"'\n'", "white space")
    assert routes.describe("é".encode()[:1]) == (r"b'\xc3'", "other")
    assert {routes.describe(get_tokenizer("gpt2").decode_bytes([i]))[1] for i in range(50257)} == set(routes.CLASSES)


def test_shares_of_a_group():
    table = routes.share_table(
        by_hand("0121", "1213", layer=2),
        [("all", "all tokens", np.ones(4, bool)), ("class", "word", np.array([True, True, False, False]))],
    )
    every, words = table[table["by"] == "all"], table[table["by"] == "class"]
    assert (table.layer == 2).all() and list(every.tokens) == [4] * 4 and list(words.tokens) == [2] * 4
    assert list(every["first"]) == [1, 2, 1, 0] and list(every.share_first) == [0.25, 0.5, 0.25, 0]
    assert list(every.chosen) == [1, 4, 2, 1] and list(every.share_chosen) == [1 / 8, 4 / 8, 2 / 8, 1 / 8]
    assert list(words["first"]) == [1, 1, 0, 0] and list(words.chosen) == [1, 2, 1, 0]


def test_typical_tokens_have_the_highest_lift_and_at_least_five_occurrences_at_the_expert():
    ids = np.repeat([10, 11, 12, 13], [40, 8, 6, 4])
    first = "0" * 30 + "1" * 10 + "1" * 8 + "1" * 5 + "0" * 1 + "1" * 4
    words = {i: (f"token {i}", "word") for i in range(10, 14)}
    table = routes.token_table(by_hand(first, "2" * 58), ids, words)
    rows = [tuple(row)[:6] for row in table.itertuples(index=False)]
    assert rows == [(0, 0, 1, "token 10", 30, 40), (0, 1, 1, "token 11", 8, 8), (0, 1, 2, "token 12", 5, 6)]
    assert np.allclose(table.lift, [30 / 40 / (31 / 58), 1 / (27 / 58), 5 / 6 / (27 / 58)])


def draw_pairs(weights, n, seed=0):
    """Choices (n, 2) of different experts, independent but for that: expert a is first with probability ~ weights."""
    rng, p = np.random.default_rng(seed), np.outer(weights, weights)
    np.fill_diagonal(p, 0)
    return np.stack(np.divmod(rng.choice(p.size, n, p=p.ravel() / p.sum()), len(weights)), axis=1)


def test_independent_pairs_have_ratio_1_however_unequal_the_experts():
    weights = np.array([10, 5, 2, 1, 1, 0.5])
    table = routes.pair_table(Routes(6, {0: draw_pairs(weights, 400_000)}, {}))
    assert len(table) == 15 and np.allclose(table.ratio, 1, atol=0.08)
    assert table.together.sum() == 400_000 and np.isclose(table.expected.sum(), 400_000)


def test_a_pair_that_goes_together_stands_out():
    expert_TK = draw_pairs(np.ones(12), 20_000)
    expert_TK[:1000] = [3, 1]
    table = routes.pair_table(Routes(12, {7: expert_TK}, {})).sort_values("ratio")
    best = table.iloc[-1]
    assert (best.layer, best.a, best.b) == (7, 1, 3) and best.ratio > 1.5 and table.ratio.iloc[-2] < 1.2
    together = {(row.a, row.b): row.together for row in table.itertuples()}
    for a, b in itertools.combinations(range(12), 2):
        assert together[a, b] == ((expert_TK == a).any(axis=1) & (expert_TK == b).any(axis=1)).sum()


@pytest.mark.parametrize("sums", [[4, 4, 4, 4], [9, 5, 3, 1, 2], [1, 1], [7, 0, 7], [6, 2, 2, 2], [3, 0, 2, 4, 0, 1]])
def test_expected_pairs_keep_the_share_of_each_expert(sums):
    """[6, 2, 2, 2]: the first expert is in every pair."""
    expected = routes.independent_pairs(np.array(sums))
    assert np.allclose(expected.sum(axis=1), sums, atol=0.02 * max(sums))
    assert np.array_equal(expected, expected.T) and not expected.diagonal().any()


def test_top_1_has_no_pairs_and_an_expert_that_is_never_chosen_is_in_none():
    assert not len(routes.pair_table(by_hand("0123")))
    table = routes.pair_table(by_hand("0011", "1122"))
    assert list(zip(table.a, table.b, table.together, strict=True)) == [(0, 1, 2), (0, 2, 0), (1, 2, 2)]


def test_stability_counts_first_choices_and_sets():
    table = routes.stability_table(by_hand("0012", "1223"), by_hand("0210", "1021"))
    first, sets = table.iloc[0], table.iloc[1]
    assert (first.choice, first.tokens, first.same) == ("first", 4, 2 / 4)  # tokens 0 and 2
    assert first.chance == (2 * 2 + 1 * 1 + 1 * 1) / 16
    assert (sets.choice, sets.same) == ("set", 3 / 4)  # 01, 02 in the other order, 12
    assert sets.chance == (1 * 2 + 1 * 1 + 1 * 1) / 16


# -- texts


def test_sources_share_max_tokens_and_the_notes_name_what_is_left_out(tmp_path):
    for name, text in (
        ("b.txt", "b" * 100),
        ("a.txt", "a" * 30),
        ("deep/c.md", ""),
        ("d.jsonl", '{"text": "d1"}\n' * 2),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    sources, notes = routes.read_sources([str(tmp_path)], get_tokenizer("bytes"), 150)
    assert {name: bytes(ids.tolist()) for name, ids in sources.items()} == {
        "a.txt": b"a" * 30, "b.txt": b"b" * 50, "d.jsonl": b"d1\n\nd1"}  # fmt: skip
    assert notes == ["deep/c.md has no tokens and is left out", "b.txt is cut to 50 tokens (--max_tokens)"]


def test_a_long_file_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "long.txt"
    with open(path, "wb") as f:
        f.write(b"word " * 1_000_000 + b"\xff")
    sources, _ = routes.read_sources([str(path)], get_tokenizer("bytes"), 100)
    assert len(sources["long.txt"]) == 100


def test_the_column_of_a_table_and_more_tokens_than_a_machine_counts(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    with pytest.raises(UserError, match="--column is one of: content"):
        routes.read_sources([str(tmp_path)], get_tokenizer("bytes"), 100)
    sources, _ = routes.read_sources([str(tmp_path)], get_tokenizer("bytes"), 10**20, "content")
    assert bytes(sources["a.jsonl"].tolist()) == b"one"


def test_the_default_text_has_two_sources():
    sources, notes = routes.read_sources((), get_tokenizer("gpt2"), 2000)
    assert list(sources) == ["prose (built in)", "argparse.py"] and notes == [
        "argparse.py is cut to 1,000 tokens (--max_tokens)"
    ]


# -- the script


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def data_of(html):
    return json.loads(html.split('<script type="application/json" id="data">')[1].split("</script>")[0])


ALL_FILES = sorted(
    ["routes.html", *(f"{t}.{s}" for t in ("shares", "tokens", "pairs", "stability") for s in ("csv", "png"))]
)


@pytest.mark.slow
def test_a_trained_run_becomes_page_and_tables(train, tmp_path, main):
    assert train(save_checkpoint_every=5, max_steps=10)[0] == 0
    first, last = sorted(tmp_path.glob("checkpoints/*/step_*.pt"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "words.txt").write_text("the router sends a token to two experts\n" * 20)
    (tmp_path / "text" / "x = {é}.py").write_text("x_1 = {'é': 12}\n" * 20, encoding="utf-8")
    said = main("--checkpoint", last.parent, "--against", first, "--text", tmp_path / "text", "--out", tmp_path / "out")
    assert said.err == "" and "routes.html" in said.out
    assert files_in(tmp_path / "out") == ALL_FILES
    shares = pd.read_csv(tmp_path / "out" / "shares.csv")
    assert set(shares.group) == {"all tokens", *routes.CLASSES, "words.txt", "x = {é}.py"} and set(shares.layer) == {0}
    for _, group in shares.groupby("group"):
        assert group["first"].sum() == group.tokens.iloc[0] and np.isclose(group.share_first.sum(), 1, atol=1e-4)
        assert group.chosen.sum() == 2 * group.tokens.iloc[0]
    data = data_of((tmp_path / "out" / "routes.html").read_text(encoding="utf-8"))
    text = "".join(data["pieces"])
    assert text.replace("·", "") == "the router sends a token to two experts\n" * 20 + "x_1 = {'é': 12}\n" * 20
    assert np.bincount([e[0] for e in data["experts"][0]], minlength=4).tolist() == list(
        shares[shares["by"] == "all"]["first"]
    )
    stability = pd.read_csv(tmp_path / "out" / "stability.csv")
    assert list(stability.choice) == ["first", "set"] and stability.same.between(0, 1).all()
    for path in (tmp_path / "out").glob("*.png"):
        assert min(matplotlib.image.imread(path).shape[:2]) > 300
    main("--checkpoint", last, "--out", tmp_path / "out")
    assert files_in(tmp_path / "out") == [name for name in ALL_FILES if "stability" not in name]


@pytest.mark.slow
def test_tables_survive_tokens_that_are_separators(main, tmp_path):
    (tmp_path / "text.txt").write_text("""a,b;"c"\n=1+1\t$x$\r\n""" * 10, encoding="utf-8")
    main("--checkpoint", save(tmp_path / "run"), "--text", tmp_path / "text.txt", "--out", tmp_path / "out")
    with open(tmp_path / "out" / "tokens.csv", newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert {row["token"] for row in rows} <= {repr(c) for c in """a,b;"c\n=1+\t$x\r"""}
    assert all(int(row["count"]) >= 5 for row in rows)


@pytest.mark.slow
def test_an_error_of_the_script_is_one_line_and_exit_code_2(tmp_path):
    process = Forked(ROOT / "routes.py", "--checkpoint", save(tmp_path / "run", n_exp=1), "--out", tmp_path / "out")
    out, err = process.communicate()
    assert process.wait() == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -- the page, in a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with browser.open_page(tmp_path_factory.mktemp("profile")) as page:
        yield page
    assert not page.problems, "the console of the browser reports errors"


HOSTILE = "</script><script>alert(1)</script><!-- <b>&amp; ROUTES_DATA\n"


def make_page(folder, **settings):
    """(address of routes.html, its data) for a small model and two texts, one of them hostile."""
    texts = [folder / "a.txt", folder / "<!--<script>b.txt"]
    texts[0].write_text("Ünder the lighthouse, 1962.\n\n" * 30, encoding="utf-8")
    texts[1].write_text(HOSTILE * 10, encoding="utf-8")
    words = ["routes.py", "--checkpoint", save(folder / "run", **settings), "--out", folder / "out", "--text", *texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, words)))
        routes.main()
    path = folder / "out" / "routes.html"
    return path.as_uri(), data_of(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The page of a model of 8 experts, top 2."""
    return make_page(tmp_path_factory.mktemp("eight"))


LOOKS = "spans.map(span => Number(span.dataset.e))"


@pytest.mark.slow
def test_the_page_draws_the_routes_and_its_controls_change_them(page, eight):
    url, data = eight
    page.open(url)
    assert page.js("document.title") == "Which expert takes which token"
    assert page.js(LOOKS) == [experts[0] for experts in data["experts"][0]]
    text = page.js("[...document.querySelectorAll('pre')].map(pre => pre.textContent).join('')")
    assert text.replace("↵", "") == "".join(data["pieces"])
    colour = "(node => getComputedStyle(node).backgroundColor)"
    chips = page.js(f"[...document.querySelectorAll('#legend .chip')].map({colour})")
    assert page.js(f"spans.map({colour})") == [chips[experts[0]] for experts in data["experts"][0]]
    shots = [page.screenshot()]
    page.choose("layer", 2)
    assert page.js(LOOKS) == [experts[0] for experts in data["experts"][1]]
    assert page.js("location.hash") == "#layer=2"
    shots.append(page.screenshot())
    page.choose("choice", 1)
    assert page.js(LOOKS) == [experts[1] for experts in data["experts"][1]]
    shots.append(page.screenshot())
    page.js("document.querySelector('#legend button').click()")
    shots.append(page.screenshot())
    page.js("document.getElementById('numbers').click()")
    shots.append(page.screenshot())
    page.choose("source", 1)
    assert page.js("[...document.querySelectorAll('section')].map(section => section.hidden)") == [True, False]
    shots.append(page.screenshot())
    assert len(set(shots)) == len(shots), "each control changes the picture"
    page.open(url + "#layer=2")
    assert page.js(LOOKS) == [experts[0] for experts in data["experts"][1]]
    assert {address for address in page.requests if address != "about:blank"} <= {url, url + "#layer=2"}


@pytest.mark.slow
def test_the_tables_of_the_page_follow_the_layer(page, eight):
    url, data = eight
    page.open(url)
    cells = "[...document.querySelectorAll('#shares tbody tr:first-child td')].slice(2).map(cell => cell.textContent)"
    for layer in (0, 2):
        page.choose("layer", layer)
        shares = [
            row["share_first"] for row in data["tables"]["shares"] if row["layer"] == layer and row["by"] == "all"
        ]
        assert page.js(cells) == [f"{100 * share:.1f}" for share in shares]
        legend = page.js("[...document.querySelectorAll('#legend button')].map(button => button.ariaLabel)")
        assert legend == [f"expert {e}, {100 * share:.1f} %" for e, share in enumerate(shares)]
    assert page.js("document.getElementById('tokens').textContent").count("'") > 10
    assert page.js("document.querySelectorAll('#pairs-most tbody tr').length") > 0
    assert page.js("document.getElementById('stability-part').hidden") is True


@pytest.mark.slow
def test_pointing_at_a_token_shows_all_its_experts(page, eight):
    url, data = eight
    page.open(url)
    box = page.js("(box => [box.x + box.width / 2, box.y + box.height / 2])(spans[5].getBoundingClientRect())")
    page.point(*box)
    first, second = data["experts"][0][5]
    tip = page.js("document.getElementById('tip').innerText")
    assert tip.startswith("'r' word, token 5\n") and f"first choice: expert {first} " in tip
    assert f"second choice: expert {second} " in tip and f"gate {data['gates'][0][5][0] / 100:.2f}" in tip
    page.point(1, 1)
    assert page.js("getComputedStyle(document.getElementById('tip')).display") == "none"


@pytest.mark.slow
def test_64_experts_look_different_and_top_1_has_no_pairs(page, tmp_path):
    url, _ = make_page(tmp_path, n_exp=64, top_k=1, gate="softmax")
    page.open(url)
    style = "(s => [s.backgroundColor, s.textDecorationLine, s.textDecorationStyle].join())(getComputedStyle(chip))"
    looks = page.js(f"[...document.querySelectorAll('#legend .chip')].map(chip => {style})")
    assert len(set(looks)) == 64
    assert page.js("document.getElementById('pairs-part').hidden") is True
    assert page.js("[...document.querySelectorAll('#legend .chip')].map(c => c.textContent)") == [
        str(e) for e in range(64)
    ]


@pytest.mark.slow
def test_the_page_fits_a_phone(page, eight):
    for width in (360, 1200):
        page.open(eight[0], width, 800)
        assert page.js("document.documentElement.scrollWidth") <= width
