"""Which expert takes which token: one HTML page, and tables as CSV.

    python routes.py --checkpoint logs/moe_seed_42 --out routes/moe                   # two built-in texts
    python routes.py --checkpoint RUN --text notes.txt books/ --out routes/notes      # several files: a source each
    python routes.py --checkpoint RUN/step_010000.pt --against RUN/step_005000.pt --out routes/stability

Open `routes.html` of that folder in any browser; it needs no network and no other file. Beside it, per MoE layer:

    shares.csv      tokens that each expert takes, of all tokens, of each token class and of each source
    tokens.csv      tokens most typical of each expert, by lift = P(expert | token) / P(expert), first choices
    pairs.csv       experts chosen together, and how often if they were chosen independently
    stability.csv   with --against: tokens that both checkpoints route alike, and by chance if they were independent

Routing is that of sampling: no router noise, no token dropped. Each source is read in windows of block_size tokens; the
first tokens of a window have little context. The class of a token follows from its characters; `_`, `=`, `{` are code.
"""

import argparse
import codecs
import itertools
import json
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from lab import common
from lab.common import Range, UserError, atomic_write

# isort: split
import numpy as np
import pandas as pd
import torch
from torch.nn.attention import sdpa_kernel

import fineweb
from lab import devices
from sample import NO_CUDNN, BrokenModel, inference_dtype
from weights import open_model

MAX_SOURCES = 50  # rows in a table
MIN_COUNT = 5  # occurrences at an expert from which on a token can be typical of it
TYPICAL = 10  # tokens listed per expert
PROSE = """\
A lighthouse keeper on a northern island wrote down the weather four times a day for thirty-one years. He noted the
wind, the height of the waves and the hour at which the fog came in, and he rarely added a word about himself. When the
lamp was replaced by an electric one in 1962, his nine notebooks went into a box, and the box went into a cellar. "He
never knew what it was for," a student said who copied every line by hand, "but he was never late."
"""


def read_sources(roots, tokenizer, max_tokens, column="text"):
    """{name: int64 (T,)}: the tokens of the texts, each cut to an equal part of max_tokens.

    Files are found and read as by fineweb.py. A name is relative to the folder that holds all of them.
    """
    args = fineweb.Args(files=roots or (argparse.__file__,), column=column)
    paths = [path.absolute() for path in fineweb.find_files(args)]
    if len(paths) > MAX_SOURCES:
        raise UserError(f"--text gives {len(paths)} text files: at most {MAX_SOURCES}, each is a row of the tables")
    texts = {} if roots else {"prose (built in)": PROSE.replace("\n", " ")}
    folder = os.path.commonpath([path.parent for path in paths])
    for path in paths:
        documents = itertools.islice(fineweb.local_documents(args, [path], None), max_tokens)
        text = "\n\n".join("".join(pieces) for _, pieces in documents)
        texts[path.relative_to(folder).as_posix()] = text[: 100 * max_tokens]
    ids = {name: np.array(tokenizer.encode_ordinary(text), dtype=np.int64) for name, text in texts.items()}
    sources = {name: tokens[: max_tokens // len(ids)] for name, tokens in ids.items() if len(tokens)}
    if not sources:
        raise UserError("the text has no tokens: give one that is not empty with --text FILE")
    return sources


CLASSES = ("word", "number", "punctuation", "white space", "code", "other")
CODE = re.compile(r"[_=<>{}\[\]\\/+*&|^~@#$%`]|\(\)")


def describe(token_bytes):
    """(token as tables show it, quoted; one of CLASSES). other: a part of a character, a symbol that is not code."""
    text = token_bytes.decode(errors="replace")
    if "\ufffd" in text:
        return repr(token_bytes), "other"
    kinds = {unicodedata.category(character)[0] for character in text.strip()}
    letters, digits = bool(kinds & {"L", "M"}), "N" in kinds
    if not kinds:
        return repr(text), "white space"
    if CODE.search(text) or (letters and digits):
        return repr(text), "code"
    if letters:
        return repr(text), "word"
    if digits:
        return repr(text), "number"
    return repr(text), "punctuation" if "P" in kinds else "other"


class Routes(NamedTuple):
    n_exp: int
    experts: dict  # {layer: int64 (T, K)} the chosen experts, best first
    gates: dict  # {layer: float32 (T, K)} their weights


@torch.no_grad()
def collect(model, sources, window, device):
    """Routes of all tokens of `sources` (int64 arrays), in their order, read in windows of `window` tokens."""
    moes = dict(model.moe_layers())
    if not moes:
        raise UserError("this is a dense model, which has no experts: choose a run with --n_exp 2 or more")
    found = []  # (experts, gates) of each MoE layer, window after window

    def keep(router, inputs, routing):
        found.append((routing.expert_TK.cpu().numpy(), routing.gate_TK.float().cpu().numpy()))

    hooks = [moe.router.register_forward_hook(keep) for moe in moes.values()]
    with devices.autocast(device, inference_dtype(device, model.config)), sdpa_kernel(NO_CUDNN):
        for ids in sources:
            for idx in torch.from_numpy(ids).to(device).split(window):
                model.hidden_states(idx[None], dropless=True)
    for hook in hooks:
        hook.remove()
    experts, gates = {}, {}
    for i, layer in enumerate(moes):
        of_layer = found[i :: len(moes)]
        experts[layer] = np.concatenate([expert_TK for expert_TK, _ in of_layer])
        gates[layer] = np.concatenate([gate_TK for _, gate_TK in of_layer])
        if not np.isfinite(gates[layer]).all():
            raise BrokenModel("the router's weights are not finite: the model has diverged, use an earlier checkpoint")
    return Routes(model.config.n_exp, experts, gates)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def share_table(routes, groups):
    """Tokens of each group that each expert takes; groups: (by, name, bool (T,)). The shares of a group sum to 1."""
    parts = []
    for layer, expert_TK in routes.experts.items():
        for by, name, mask in groups:
            chosen = expert_TK[mask]
            first_E = np.bincount(chosen[:, 0], minlength=routes.n_exp)
            every_E = np.bincount(chosen.ravel(), minlength=routes.n_exp)
            group = {"layer": layer, "by": by, "group": name, "tokens": len(chosen), "expert": range(routes.n_exp)}
            first = {"first": first_E, "share_first": first_E / len(chosen)}
            every = {"chosen": every_E, "share_chosen": every_E / chosen.size}
            parts.append(pd.DataFrame(group | first | every))
    return pd.concat(parts, ignore_index=True)


def token_table(routes, ids, words):
    """The TYPICAL tokens of each expert with the highest lift above 1; of equal lifts the more frequent first."""
    vocabulary, index_T, total_V = np.unique(ids, return_inverse=True, return_counts=True)
    names = [words[token][0] for token in vocabulary.tolist()]
    parts = []
    for layer, expert_TK in routes.experts.items():
        for e in range(routes.n_exp):
            count_V = np.bincount(index_T[expert_TK[:, 0] == e], minlength=len(vocabulary))
            lift_V = count_V / total_V * len(ids) / max(1, count_V.sum())
            of_expert = {"layer": layer, "expert": e, "rank": 0, "token": names}
            table = pd.DataFrame(of_expert | {"count": count_V, "count_in_text": total_V, "lift": lift_V})
            table = table[(table["lift"] > 1) & (table["count"] >= MIN_COUNT)]
            table = table.sort_values(["lift", "count"], ascending=False, kind="stable").head(TYPICAL)
            parts.append(table.assign(rank=range(1, len(table) + 1)))
    return pd.concat(parts, ignore_index=True)


def pair_table(routes):
    """Tokens whose chosen experts include both a and b, and their number if a token's choices were independent.

    expected: all pairs, shared out in proportion to (tokens with a) * (tokens with b); exact where loads are equal.
    """
    parts = []
    for layer, expert_TK in routes.experts.items():
        chosen_TE = np.zeros((len(expert_TK), routes.n_exp))
        np.put_along_axis(chosen_TE, expert_TK, 1, axis=1)
        a, b = np.triu_indices(routes.n_exp, k=1)
        together = (chosen_TE.T @ chosen_TE)[a, b].astype(int)
        product = chosen_TE.sum(axis=0)[a] * chosen_TE.sum(axis=0)[b]
        expected = product * together.sum() / max(1, product.sum())
        table = pd.DataFrame({"layer": layer, "a": a, "b": b, "together": together, "expected": expected})
        parts.append(table[expected > 0])
    table = pd.concat(parts, ignore_index=True)
    return table.assign(ratio=table["together"] / table["expected"])


def stability_table(routes, other):
    """Share of tokens that two checkpoints route alike, and that share if their choices were independent."""
    rows = []
    for layer, ours_TK in routes.experts.items():
        T, K = ours_TK.shape
        for choice, k in (("first", 1), ("set", K)):
            # Number the sets of experts that occur, then compare the numbers and multiply their frequencies.
            both = np.sort(np.concatenate([ours_TK[:, :k], other.experts[layer][:, :k]]))
            sets, index = np.unique(both, axis=0, return_inverse=True)
            ours_T, theirs_T = index.reshape(2, T)
            counts = [np.bincount(index_T, minlength=len(sets)) for index_T in (ours_T, theirs_T)]
            rows.append((layer, choice, T, (ours_T == theirs_T).mean(), counts[0] @ counts[1] / T**2))
    return pd.DataFrame(rows, columns=["layer", "choice", "tokens", "same", "chance"])


def make_tables(routes, sources, words):
    """{name: table} of the routes of one checkpoint."""
    ids = np.concatenate(list(sources.values()))
    class_T = np.array([words[token][1] for token in ids.tolist()])
    source_T = np.repeat(list(sources), [len(tokens) for tokens in sources.values()])
    groups = [("all", "all tokens", np.ones(len(ids), dtype=bool))]
    groups += [("class", name, class_T == name) for name in CLASSES if (class_T == name).any()]
    groups += [("source", name, source_T == name) for name in sources]
    shares, typical = share_table(routes, groups), token_table(routes, ids, words)
    return {"shares": shares, "tokens": typical, "pairs": pair_table(routes)}


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page(title, routes, sources, tokenizer, tables, words):
    """The HTML page: the template and, as JSON, everything that it shows."""
    pieces = []  # text shown per token; a character that spans tokens stands at its last, the others show a dot
    for ids in sources.values():
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces += [decoder.decode(tokenizer.decode_bytes([token])) or "·" for token in ids]
    data = {
        "title": title, "n_exp": routes.n_exp, "layers": list(routes.experts),
        "sources": [[name, len(ids)] for name, ids in sources.items()],
        "ids": np.concatenate(list(sources.values())).tolist(), "pieces": pieces, "words": words,
        "experts": [expert_TK.tolist() for expert_TK in routes.experts.values()],
        "gates": [(100 * gate_TK).round().astype(int).tolist() for gate_TK in routes.gates.values()],
        "tables": {name: table.to_dict("records") for name, table in tables.items()},
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag ends the script
    template = Path(__file__).with_name("lab") / "routes_template.html"
    return template.read_text(encoding="utf-8").replace("ROUTES_DATA", text)


@dataclass
class Args:
    checkpoint: str  # Run of a MoE: its folder (the newest checkpoint), one checkpoint, or a Hugging Face folder
    out: str  # Folder for routes.html and the tables
    text: tuple[str, ...] = ()  # Text files or folders, a source per file; default: a paragraph of prose, Python code
    column: str = "text"  # Column or JSON key that holds the text of a parquet or jsonl file
    against: str = ""  # Second checkpoint: adds the stability of the routing
    max_tokens: Annotated[int, Range(at_least=MAX_SOURCES)] = 20_000  # Tokens in all, shared equally by the sources
    device: str = "auto"  # cuda, mps or cpu; auto: the first that is available


def main():
    args = common.parse(Args)
    device = devices.choose_device(args.device)
    paths = [path for path in (args.checkpoint, args.against) if path]
    models, tokenizers = zip(*[open_model(path, device) for path in paths], strict=True)
    kinds = []
    for model, tokenizer in zip(models, tokenizers, strict=True):
        layers = [layer for layer, _ in model.moe_layers()]
        kinds.append(f"{tokenizer.name} tokens, top {model.config.top_k} of {model.config.n_exp} in layers {layers}")
    if kinds[0] != kinds[-1]:
        raise UserError(f"--checkpoint has {kinds[0]}; --against has {kinds[-1]}: choose two models of one shape")
    window = min(model.config.block_size for model in models)
    sources = read_sources(args.text, tokenizer, args.max_tokens, args.column)
    routes = [collect(model, sources.values(), window, device) for model in models]
    tokens = np.unique(np.concatenate(list(sources.values()))).tolist()
    words = {token: describe(tokenizer.decode_bytes([token])) for token in tokens}
    tables = make_tables(routes[0], sources, words)
    if args.against:
        tables["stability"] = stability_table(*routes)
    title = " against ".join("/".join(Path(path).parts[-2:]) for path in paths)  # no folders of this machine
    files = {"routes.html": page(title, routes[0], sources, tokenizer, tables, words)}
    for name, table in tables.items():
        files[f"{name}.csv"] = table.to_csv(index=False, float_format="%.6g")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    Path(args.out, "stability.csv").unlink(missing_ok=True)  # of an earlier call
    for name, content in files.items():
        with atomic_write(Path(args.out, name), "w") as f:
            f.write(content)
    print(f"{args.out}: {', '.join(files)}")


if __name__ == "__main__":
    common.run(main)
