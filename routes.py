"""Which expert takes which token: one HTML page, and tables as CSV and PNG.

    python routes.py --checkpoint checkpoints/RUN --out routes/RUN                     # two built-in texts
    python routes.py --checkpoint checkpoints/RUN --text notes.txt --out routes/notes  # several files: a source each
    python routes.py --checkpoint RUN/step_010000.pt --against RUN/step_005000.pt --out routes/stability

Open `routes.html` of that folder in any browser; it needs no network and no other file. Beside it, per MoE layer:

    shares      tokens that each expert takes, of all tokens, of each token class and of each source
    tokens      tokens most typical of each expert, by lift = P(expert | token) / P(expert), first choices
    pairs       experts chosen together, against independence: random pairs in which each expert is as frequent
    stability   with --against: tokens with the same first choice and with the same set of experts in both checkpoints;
                chance: that share if the choices of the two checkpoints were independent

Routing is that of sampling: evaluation mode, no router noise, no token dropped. Each source is read in windows of
block_size tokens; the first tokens of a window have little context. The characters of a token decide its class; code is
a symbol that prose rarely has, such as `_`, `=` or `{`.
"""

import codecs
import io
import itertools
import json
import os
import re
import sys
import sysconfig
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import torch

import textfiles
from lab import checkpoint, common
from lab.common import Range, UserError, atomic_write
from sample import BrokenModel, attention_without_cudnn, inference_dtype

matplotlib.use("Agg")  # a file, no window
import matplotlib.pyplot as plt
from matplotlib.colors import TwoSlopeNorm

BATCH_TOKENS = 8192  # per forward pass
MAX_SOURCES = 50  # rows in a table
MIN_COUNT = 5  # occurrences at an expert from which on a token can be typical of it
TYPICAL = 10  # tokens listed per expert
PROSE = """\
A lighthouse keeper on a northern island wrote down the weather four times a day for thirty-one years. He noted the
wind, the height of the waves and the hour at which the fog came in, and he rarely added a word about himself. When the
lamp was replaced by an electric one in 1962, his nine notebooks went into a box, and the box went into a cellar. Nobody
opened it until a student asked whether anyone had measured the sea before the satellites did. She copied every line by
hand; it took two winters. "He never knew what it was for," she said later, "but he was never late." Her figures are
used today by engineers who decide how high a harbour wall must be, and no single one of them had to be precise.
"""

# ---------------------------------------------------------------------------------------------------------------------
# Texts


def read_sources(roots, tokenizer, max_tokens, column="text"):
    """({name: tokens} of the texts, each cut to an equal part of max_tokens; notes on what was left out).

    UserError for a file that cannot be read or is not UTF-8, for too many files and for texts without any token.
    """
    module = Path(sysconfig.get_path("stdlib"), "argparse.py")
    found = (textfiles.walk(p, textfiles.SUFFIXES) if p.is_dir() else [p] for p in map(Path, roots or [module]))
    paths = list(dict.fromkeys(itertools.chain(*found)))
    if not 0 < len(paths) <= MAX_SOURCES:
        raise UserError(f"--text gives {len(paths)} text files: give 1 to {MAX_SOURCES}, each is a row of the tables")
    try:
        folder = os.path.commonpath([path.absolute().parent for path in paths])
    except ValueError:  # on several drives of Windows
        folder = None
    texts = {} if roots else {"prose (built in)": PROSE.replace("\n", " ")}
    texts |= {
        printable(os.path.relpath(path, folder) if folder else str(path)): read_text(path, column, 100 * max_tokens)
        for path in paths
    }
    every = {name: tokenizer.encode_to_numpy(text) for name, text in texts.items()}
    sources = {name: ids for name, ids in every.items() if len(ids)}
    if not sources:
        raise UserError("the text has no tokens: give one that is not empty with --text FILE")
    limit = max_tokens // len(sources)
    notes = [f"{name} has no tokens and is left out" for name in every if name not in sources]
    notes += [f"{name} is cut to {limit:,} tokens (--max_tokens)" for name, ids in sources.items() if len(ids) > limit]
    return {name: ids[:limit] for name, ids in sources.items()}, notes


def printable(name, encoding="utf-8"):
    """`name` with escapes for the characters that the encoding lacks."""
    return name.encode(encoding, "backslashreplace").decode()


def read_text(path, column, max_chars):
    """First max_chars characters of a file, its documents joined by blank lines."""
    max_chars = min(max_chars, sys.maxsize)
    blocks, documents = 1 + max_chars // textfiles.BLOCK, textfiles.read_documents(path, column)
    joined = ("".join(itertools.islice(chunks, blocks)) for chunks in itertools.islice(documents, max_chars))
    return "\n\n".join(joined)[:max_chars]


CLASSES = ("word", "number", "punctuation", "white space", "code", "other")
CODE = re.compile(r"[_=<>{}\[\]\\/+*&|^~@#$%`]|\(\)")


def describe(token_bytes):
    """(token as tables show it, quoted; one of CLASSES). other: a part of a character, a symbol that is not code."""
    try:
        text = token_bytes.decode()
    except UnicodeDecodeError:
        return repr(token_bytes), "other"
    kinds = {unicodedata.category(character)[0] for character in text.strip()}
    letters, digits = bool(kinds & {"L", "M"}), "N" in kinds
    if not kinds:
        return repr(text), "white space"
    if CODE.search(text) or (letters and digits):
        return repr(text), "code"
    return repr(text), "word" if letters else "number" if digits else "punctuation" if "P" in kinds else "other"


# ---------------------------------------------------------------------------------------------------------------------
# Routing


class Routes(NamedTuple):
    n_exp: int
    experts: dict  # {layer: int64 (T, K)} the chosen experts, best first
    gates: dict  # {layer: float32 (T, K)} their weights


def open_moes(paths, device):
    """([model, ...], tokenizer) of checkpoints; UserError for a dense model and for two that do not compare."""
    models, tokenizers = zip(*(checkpoint.open_model(path, "", device) for path in paths), strict=True)
    layers = [[layer for layer, _ in model.moe_layers()] for model in models]
    if [] in layers:
        dense = paths[layers.index([])]
        raise UserError(f"{dense} is a dense model, which has no experts: train one with --n_exp 2 or more")
    kinds = [f"MoE layers {own}, top {model.config.top_k} of {model.config.n_exp}, tokenizer {tokenizer.name}"
             for own, model, tokenizer in zip(layers, models, tokenizers, strict=True)]  # fmt: skip
    if kinds[0] != kinds[-1]:
        raise UserError(f"--checkpoint has {kinds[0]}; --against has {kinds[-1]}: choose two models of one shape")
    return models, tokenizers[0]


def batches(ids, window):
    """Windows (B, S) of tokens (T,), in their order; the last batch holds a shorter window."""
    idx, full = torch.from_numpy(ids.astype(np.int64)), len(ids) // window * window
    if full:
        yield from idx[:full].view(-1, window).split(max(1, BATCH_TOKENS // window))
    if full < len(ids):
        yield idx[None, full:]


@torch.no_grad()
def collect(model, sources, window, device):
    """Routes of all tokens of `sources` (arrays), in their order. BrokenModel if a gate is not finite."""
    parts, hooks = {layer: [] for layer, _ in model.moe_layers()}, []
    for layer, moe in model.moe_layers():
        keep = parts[layer].append
        hooks.append(moe.router.register_forward_hook(lambda _, x, out, keep=keep: keep((out.expert_TK, out.gate_TK))))
    try:
        with common.autocast(device, inference_dtype(device, model.config)), attention_without_cudnn(device):
            for idx in itertools.chain(*(batches(ids, window) for ids in sources)):
                model.hidden_states(idx.to(device), dropless=True)
    finally:
        for hook in hooks:
            hook.remove()
    experts, gates = ({layer: torch.cat([pair[i] for pair in part]).cpu().numpy() for layer, part in parts.items()}
                      for i in (0, 1))  # fmt: skip
    if not all(np.isfinite(gate_TK).all() for gate_TK in gates.values()):
        raise BrokenModel("the router's weights are not finite: the model has diverged, use an earlier checkpoint")
    return Routes(model.config.n_exp, experts, gates)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def share_table(routes, groups):
    """Tokens of each group that each expert takes; groups: (by, name, bool (T,)). The shares of a group sum to 1."""
    rows = []
    for layer, expert_TK in routes.experts.items():
        for by, name, mask in groups:
            chosen, E = expert_TK[mask], routes.n_exp
            first, every = (np.bincount(part.ravel(), minlength=E) for part in (chosen[:, 0], chosen))
            rows += [(layer, by, name, len(chosen), e, first[e], first[e] / len(chosen), every[e],
                      every[e] / chosen.size) for e in range(E)]  # fmt: skip
    columns = ["layer", "by", "group", "tokens", "expert", "first", "share_first", "chosen", "share_chosen"]
    return pd.DataFrame(rows, columns=columns)


def token_table(routes, ids, words):
    """The TYPICAL tokens of each expert with the highest lift above 1; of equal lifts the more frequent first."""
    vocabulary, index_T, total_V = np.unique(ids, return_inverse=True, return_counts=True)
    rows, V = [], len(vocabulary)
    for layer, expert_TK in routes.experts.items():
        count_EV = np.bincount(expert_TK[:, 0] * V + index_T, minlength=routes.n_exp * V).reshape(-1, V)
        for e, count_V in enumerate(count_EV):
            lift_V = count_V / total_V * len(ids) / max(1, count_V.sum())
            best = [v for v in np.lexsort((-count_V, -lift_V)) if lift_V[v] > 1 and count_V[v] >= MIN_COUNT][:TYPICAL]
            rows += [(layer, e, rank, words[vocabulary[v]][0], count_V[v], total_V[v], lift_V[v])
                     for rank, v in enumerate(best, start=1)]  # fmt: skip
    return pd.DataFrame(rows, columns=["layer", "expert", "rank", "token", "count", "count_in_text", "lift"])


def pair_table(routes):
    """Tokens whose chosen experts include both a and b, and their number if pairs were independent."""
    rows, E = [], routes.n_exp
    for layer, expert_TK in routes.experts.items():
        pairs_EE = np.zeros((E, E), dtype=np.int64)
        for a_T, b_T in itertools.permutations(expert_TK.T, 2):
            pairs_EE += np.bincount(a_T * E + b_T, minlength=E * E).reshape(E, E)
        expected_EE = independent_pairs(pairs_EE.sum(axis=1))
        rows += [(layer, a, b, pairs_EE[a, b], expected_EE[a, b], pairs_EE[a, b] / expected_EE[a, b])
                 for a, b in itertools.combinations(range(E), 2) if expected_EE[a, b] > 0]  # fmt: skip
    return pd.DataFrame(rows, columns=["layer", "a", "b", "together", "expected", "ratio"])


def independent_pairs(sum_E, steps=1000):
    """Symmetric (E, E) with a zero diagonal, w_a w_b elsewhere, whose rows sum to sum_E.

    A token never chooses an expert twice, so the product of two shares is above almost every pair's. This is the
    distribution over pairs of different experts that has these shares and the most entropy.
    """
    w_E = np.sqrt(sum_E.astype(float))
    for _ in range(steps):
        w_E = np.sqrt(w_E * sum_E / np.maximum(w_E.sum() - w_E, 1e-300))
    expected_EE = np.outer(w_E, w_E)
    np.fill_diagonal(expected_EE, 0)
    return expected_EE


def stability_table(routes, other):
    """Share of tokens that two checkpoints route alike, and that share if their choices were independent."""
    rows = []
    for layer, ours_TK in routes.experts.items():
        for choice, k in (("first", 1), ("set", ours_TK.shape[1])):
            both = np.sort(np.concatenate([ours_TK[:, :k], other.experts[layer][:, :k]]))
            sets, index = np.unique(both, axis=0, return_inverse=True)
            ours_T, theirs_T = index.reshape(2, -1)
            p, q = (np.bincount(index_T, minlength=len(sets)) / len(index_T) for index_T in (ours_T, theirs_T))
            rows.append((layer, choice, len(ours_T), (ours_T == theirs_T).mean(), p @ q))
    return pd.DataFrame(rows, columns=["layer", "choice", "tokens", "same", "chance"])


def make_tables(routes, other, sources, words):
    """{name: table} of the routes, with `stability` if there are routes of another checkpoint."""
    ids, lengths = np.concatenate(list(sources.values())), [len(ids) for ids in sources.values()]
    class_T, source_T = np.array([words[i][1] for i in ids]), np.repeat(list(sources), lengths)
    groups = [("all", "all tokens", np.ones(len(ids), dtype=bool))]
    groups += [("class", name, class_T == name) for name in CLASSES if (class_T == name).any()]
    groups += [("source", name, source_T == name) for name in sources]
    tables = {"shares": share_table(routes, groups), "tokens": token_table(routes, ids, words)}
    tables["pairs"] = pair_table(routes)
    return tables | ({"stability": stability_table(routes, other)} if other else {})


# ---------------------------------------------------------------------------------------------------------------------
# Figures and the page


LEVELS = {"cmap": "cividis", "vmin": 0}
GRIDS = {  # title, panels, rows, columns, colour, text, its format, inches per column, colours
    "shares": ("share of first choices", "layer", ["by", "group"], "expert", "share_first", "share_first", "{:.0%}",
               0.4, LEVELS),
    "tokens": ("typical tokens of each expert (colour: lift)", "layer", ["expert"], "rank", "lift", "token", "{:.14}",
               0.9, LEVELS),
    "pairs": ("pairs of experts: tokens / expected if independent", "layer", ["a"], "b", "ratio", "ratio", "{:.2f}",
              0.4, {"cmap": "PuOr", "norm": TwoSlopeNorm(1, 0, 4)}),
    "stability": ("tokens that both checkpoints route alike", "choice", ["layer"], "measure", "share", "share",
                  "{:.0%}", 0.9, {**LEVELS, "vmax": 1}),
}  # fmt: skip


def draw(table, title, panel, rows, column, value, text, form, width, colours):
    """Figure with a grid per value of the column `panel`: `value` as colour, `text` in the cells unless too narrow."""
    parts = [(name, part.pivot_table([*{value, text}], rows, column, aggfunc="first", sort=False))
             for name, part in table.groupby(panel)]  # fmt: skip
    heights, columns = [0.7 + 0.19 * len(part) for _, part in parts], max(part[value].shape[1] for _, part in parts)
    size = (3 + width * min(columns, 40), 0.6 + sum(heights))
    figure, axes = plt.subplots(len(parts), figsize=size, height_ratios=heights, squeeze=False, layout="constrained")
    for axis, (name, part) in zip(axes.flat, parts, strict=True):
        values = part[value]
        image = axis.imshow(values, aspect="auto", interpolation="nearest", **colours)
        axis.set_title(f"{panel}: {name}", fontsize=9, loc="left")
        axis.set_xlabel(column, fontsize=7)
        axis.set_ylabel(rows[-1], fontsize=7)
        axis.set_xticks(range(values.shape[1]), values.columns, fontsize=7 if columns <= 16 else 4)
        labels = [printable(str(label), "ascii") for label in values.index.get_level_values(-1)]  # every font has ASCII
        axis.set_yticks(range(len(values)), labels, fontsize=7, parse_math=False)
        for (i, j), content in np.ndenumerate(part[text] if columns <= 16 else ()):
            if pd.notna(content):
                light = np.dot(image.to_rgba(values.iat[i, j])[:3], (0.299, 0.587, 0.114)) > 0.5
                axis.text(j, i, printable(form.format(content), "ascii"), fontsize=6, ha="center", va="center",
                          color="wk"[int(light)], parse_math=False)  # fmt: skip
        figure.colorbar(image, ax=axis).ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=9)
    return figure


def page(title, notes, routes, sources, tokenizer, tables, words):
    """The HTML page: the template and, as JSON, everything that it shows."""
    pieces = []  # text shown per token; a character that spans tokens stands at its last, the others show a dot
    for ids in sources.values():
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces += [decoder.decode(tokenizer.decode_bytes([i])) or "·" for i in ids]
    data = {
        "title": title, "notes": notes, "n_exp": routes.n_exp, "layers": list(routes.experts),
        "sources": [[name, len(ids)] for name, ids in sources.items()], "pieces": pieces,
        "ids": np.concatenate(list(sources.values())).tolist(), "words": words,
        "experts": [expert_TK.tolist() for expert_TK in routes.experts.values()],
        "gates": [(100 * gate_TK).round().astype(int).tolist() for gate_TK in routes.gates.values()],
        "tables": {name: table.to_dict("records") for name, table in tables.items()},
    }  # fmt: skip
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")  # no tag ends the script
    return Path(__file__).with_name("lab") / "routes_template.html".read_text(encoding="utf-8").replace("ROUTES_DATA", text)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Args:
    checkpoint: str  # Checkpoint of a MoE: a .pt file, a run folder (its newest), a Hugging Face folder
    out: str  # Folder for routes.html and the tables as CSV and PNG
    text: tuple[str, ...] = ()  # Text files or folders, a source per file; default: a paragraph of prose, Python code
    column: str = "text"  # Column or JSON key that holds the text of a parquet or jsonl file
    against: str = ""  # Second checkpoint: adds the stability of the routing
    max_tokens: Annotated[int, Range(at_least=MAX_SOURCES)] = 20_000  # Tokens in all, shared equally by the sources
    device: str = "auto"  # cuda, mps or cpu; auto: the first that is available


def make_files(tables, html):
    """{name: bytes} of the page, the tables and their figures."""
    files = {"routes.html": html.encode()}
    for name, table in tables.items():
        files[f"{name}.csv"] = table.to_csv(index=False, lineterminator="\n", float_format="%.6g").encode()
        if name == "stability":
            table = table.melt(["layer", "choice"], ["same", "chance"], "measure", "share")
        if len(table):
            png = io.BytesIO()
            figure = draw(table, *GRIDS[name])
            figure.savefig(
                png, format="png", dpi=min(200, 30_000 / figure.get_figheight())
            )  # limit of the format: 65,535
            plt.close(figure)
            files[f"{name}.png"] = png.getvalue()
    return files


def main():
    args = common.parse(Args)
    device = common.choose_device(args.device)
    paths = [args.checkpoint, *filter(None, [args.against])]
    models, tokenizer = open_moes(paths, device)
    sources, notes = read_sources(args.text, tokenizer, args.max_tokens, args.column)
    common.check_writable(args.out, "--out")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    window = min(model.config.block_size for model in models)
    routes, *other = (collect(model, sources.values(), window, device) for model in models)
    words = {int(i): describe(tokenizer.decode_bytes([i])) for i in np.unique(np.concatenate(list(sources.values())))}
    tables = make_tables(routes, other[0] if other else None, sources, words)
    title = " against ".join("/".join(Path(path).parts[-2:]) for path in paths)  # no folders of this machine
    html = page(title, notes, routes, sources, tokenizer, tables, words)
    files = make_files(tables, html)
    for name, content in files.items():
        with atomic_write(Path(args.out, name)) as f:
            f.write(content)
    for name in {f"{table}.{kind}" for table in GRIDS for kind in ("csv", "png")} - files.keys():
        Path(args.out, name).unlink(missing_ok=True)  # of an earlier call with more tables
    print(f"{args.out}: {', '.join(files)}")


if __name__ == "__main__":
    common.run(main)
