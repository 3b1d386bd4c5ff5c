"""Is this router healthy? A table with a row per check and MoE layer; exit code 1 where something is sick.

    python doctor.py logs/moe_seed_42                          # a run: its newest weights, val text and log
    python doctor.py OLMoE-1B-7B --data_root olmoe_tokens      # a Hugging Face folder, any MoE; or a checkpoint

In evaluation mode, in float32, dropless where no row says otherwise. Load is judged where the model beats counts of
token pairs on its text: before that routing swings widely, and random tokens show nothing of it."""

import math
import re
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

from lab import common, data, devices, runs  # before torch

# isort: split
import safetensors
import torch
import tyro

from model import GPT, ROUTER_LOSSES, Routing
from weights import build, leak, read_source, seeded

CHECKS = {  # smallest and largest healthy value; of a sick one, what it means and what to do
    "gradient": (1e-30, math.inf, "cross-entropy does not train this router: set gate softmax, or find a detach()"),
    "pull": (1e-4, math.inf, "beside the cross-entropy this loss moves nothing: find a detach(), or raise its weight"),
    "value": (0, math.inf, "not E * sum f P of this text: softmax taken twice, or divided by the micro-batches"),
    "experts": (0, 0, "they get less than a tenth of their share, dead ones no token: add balancing, raise its weight"),
    "max_vio": (0, math.inf, "balancing has stopped working: look at its weight, and at what a resume changed"),
    "entropy": (0.01, math.inf, "the softmax is saturated, without gradient: add the router z-loss, lower the rate"),
    "router_logit": (0, 100, "bfloat16 has steps of 0.5 there: add the router z-loss, or lower the learning rate"),
    "smallest router row": (0.01, 1, "an expert's row is 0 beside the others, whatever the text: draw it again"),
    "tied tokens": (0, 0.01, "last choice and next expert score alike: two rows are equal, add noise to one"),
    "same in bfloat16": (0.9, 1, "rounding changes the experts of many tokens: set router_use_full_prec"),
    "dropped in validation": (0, 0.25, "tokens are left without experts: balance, or raise eval_capacity"),
    "in evaluation": (0, 1e-4, "a second one differs or moves state: noise, dropout or updates are on out of training"),
    "leak": (0, 1e-4, "other tokens than those before move a logit, the loss is too good: route by token alone"),
    "of the run": (0, 3, "training is unstable: lower the learning rate, warm up longer, or clip at a smaller norm"),
}
Row = namedtuple("Row", "check layer value healthy verdict meaning")


def row(check, layer, value, healthy=None, seen=True, of="", shown=""):
    """A Row; sick unless `value` lies in `healthy`, as nan does not. `shown`: text in place of the value."""
    *usual, meaning = CHECKS.get(check, (-math.inf, math.inf, ""))
    low, high = healthy or usual
    end = ("not seen", "") if not seen else ("ok", "") if low <= value <= high else ("sick", meaning)
    return Row(f"{of} {check}".strip(), str(layer), shown or f"{value:.5g}", f"{low:.6g} to {high:.6g}", *end)


class Subject:
    """One interface to a GPT of model.py and to a model of transformers with routers called gate or router."""
    def __init__(self, model):
        self.model, self.is_ours = model.eval(), isinstance(model, GPT)
        self.config = model.config if self.is_ours else model.config.get_text_config()
        self.length = self.config.block_size if self.is_ours else self.config.max_position_embeddings
        found = {name: part for name, part in model.named_modules() if re.search(r"\.(gate|router)$", name)}
        found = {name: part for name, part in found.items() if not isinstance(part, torch.nn.Linear)}
        self.layers, self.routers = [re.search(r"\d+", name)[0] for name in found], list(found.values())
        self.moes = [moe for _, moe in model.moe_layers()] if self.is_ours else []
        for router in self.routers:
            router.register_forward_hook(lambda router, args, output: self.found.append(output))
        for moe in self.moes:
            moe.register_forward_hook(lambda moe, args, output: self.losses.append(output[1]))

    def __call__(self, idx, dropless=True):
        """idx int64 (B, S) -> cross-entropy, logits (B, S, V); Routing and router losses of each MoE layer."""
        self.found, self.losses, idx = [], [], idx.to(next(self.model.parameters()).device)
        logits = self.model(idx, **({"dropless": dropless} if self.is_ours else {"use_cache": False})).logits.float()
        ce = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
        if self.is_ours:
            return ce, logits, self.found, self.losses
        own = [(out[0].flatten(0, -2).float(), out[-1]) for out in self.found]  # logits, (gates,) the chosen experts
        return ce, logits, [Routing(e, None, x, x, x.softmax(-1), x) for x, e in own], [{} for _ in own]


def check_layer(subject, i, graph, parts, rounded, knows):
    """What trains the router of MoE layer i, by a forward; whom it chooses, by its Routings and the first `rounded`."""
    layer, router, config, (ce, logits, routings, losses) = subject.layers[i], subject.routers[i], subject.config, graph
    weight, r, terms, norms = next(router.parameters()), routings[i], losses[i], {}
    for name, loss in {"ce": ce, **terms}.items() if weight.requires_grad else ():  # 0 of the weight: 0 if detached
        norms[name] = torch.autograd.grad(loss + 0 * weight.sum(), weight, retain_graph=True)[0].norm().item()
    rows = [row("gradient", layer, norms.get("ce", 1), shown="" if norms else "frozen")]
    for name in terms if norms else ():
        pull = getattr(config, ROUTER_LOSSES[name].weight) * norms[name] / max(norms["ce"], 1e-30)
        rows.append(row("pull", layer, pull, of=name))
    if "aux_loss" in terms:
        odds_TE = r.logits_TE.sigmoid() if config.gate == "sigmoid" else r.logits_TE.softmax(-1)
        f_TE, P_TE = torch.zeros_like(odds_TE).scatter_(1, r.expert_TK, 1.0), odds_TE / odds_TE.sum(-1, keepdim=True)
        groups = len(logits) if config.balance_scope == "sequence" else 1  # of tokens, each balanced for itself
        f, P = (x.view(groups, -1, config.n_exp).mean(1) for x in (f_TE, P_TE))
        value = config.n_exp * (f * P).sum(1).mean().item()
        slack = 1e-5 * value + 0.02 * abs(value - config.top_k)  # softmax taken twice is near top_k at any load
        rows.append(row("value", layer, terms["aux_loss"].item(), (value - slack, value + slack), of="aux_loss"))
    logits_TE, scores_TE, expert_TK = (torch.cat([part[field] for part in parts]) for field in (3, 5, 0))
    ranked_TE = scores_TE + router.balance_bias if getattr(router, "biased", False) else logits_TE
    (T, K), E = expert_TK.shape, logits_TE.shape[1]
    load_E = expert_TK.flatten().bincount(minlength=E) * E / (T * K)  # 1 when balanced
    dead, starved, judged = int((load_E == 0).sum()), int((load_E < 0.1).sum()), knows and T * K >= 32 * E
    best_TE, size_E, first_TK = ranked_TE.sort(-1, True).values, weight.norm(dim=1), parts[0].expert_TK
    ties_T, same = best_TE[:, K - 1] == best_TE[:, min(K, E - 1)], first_TK[:, :, None] == rounded.expert_TK[:, None]
    most = subject.moes[i].capacity(len(first_TK)) if subject.is_ours else None
    over_E = (first_TK.flatten().bincount() - (most or math.inf)).clamp(min=0)
    return [
        *rows, row("experts", layer, dead, seen=judged or dead == 0, of="dead"),
        row("experts", layer, starved, (0, max(0, min(E // 2, E - K - 1))), judged, "starved"),
        row("max_vio", layer, load_E.max().item() - 1, seen=judged),
        row("dropped in validation", layer, (over_E.sum() / first_TK.numel()).item(), seen=knows and subject.is_ours),
        row("entropy", layer, torch.special.entr(logits_TE.softmax(-1)).sum(-1).mean().item()),
        row("router_logit", layer, logits_TE.abs().max().item()),
        row("smallest router row", layer, (size_E.min() / size_E.median()).item()),
        row("tied tokens", layer, ties_T.float().mean().item() * (K < E)),
        row("same in bfloat16", layer, same.sum().item() / first_TK.numel()),
    ]


@torch.no_grad()
def examine(subject, idx, pairs=0.0):
    """(rows, cross-entropy) of a model on idx, int64 (B, S). pairs: nats that counts of token pairs reach, or 0."""
    model, first, rows, twice, states = subject.model, idx[:4], [], [], []
    seen = [subject(part) for part in idx.split(4)]
    with devices.autocast(seen[0][1].device, torch.bfloat16):
        rounded = subject(first)[2]
    with torch.enable_grad():
        graph = subject(first)
        ce, n, V = sum(each[0].item() for each in seen) / len(seen), min(64, subject.length), subject.config.vocab_size
        for i in range(len(subject.layers)):
            rows += check_layer(subject, i, graph, [s[2][i] for s in seen], rounded[i], ce < runs.STUCK_PART * pairs)
    for _ in range(2):  # as validation does it
        twice.append(subject(first, dropless=False)[:2])
        states.append({name: x.clone() for name, x in (*model.state_dict().items(), *model.named_buffers())})
    (with_capacity, logits), (_, again) = twice
    moved = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    return [
        *rows, row("in evaluation", "", ((again - logits).abs().max() / logits.abs().max()).item(), of="noise"),
        row("in evaluation", "", len(moved), of="state moved", shown=" ".join(moved)),
        row("leak", "", leak(lambda idx: subject(idx[:1])[1].cpu(), n, V), of="future"),
        row("leak", "", leak(lambda idx: subject(idx[:, : n // 2])[1].cpu(), n, V), of="other rows"),
        row("nats leaked by capacity", "", (seen[0][0] - with_capacity).item(), seen=subject.is_ours),
    ], ce


def check_log(folder):
    """How a run ended; of load, gradient and router logits the median of the last tenth beside those of all tenths."""
    config, log = runs.read_config(folder), runs.read_log(folder)
    settings, state, spikes = runs.settings_of(config), runs.state(config, log), len(runs.spike_steps(log))
    balanced = any(settings.get(f"use_{name}") for name in ("aux_loss", "bias_balance", "quantile_balance"))
    rows = [row("of the run", "log", 0 if state in ("ok", "unfinished") else math.inf, of="state", shown=state)]
    rows.append(row("of the run", "log", spikes, (0, max(3, log.step.max() // 2000)), of="spikes"))
    limits = {"max_vio": (1.5, 0.5 if balanced else math.inf), "grad_norm": (10, 1), "router_logit": (0, 100)}
    for stream, (factor, more) in limits.items():
        values = torch.tensor(log.value[log.stream == stream].to_numpy())
        tenths = [part.median().item() for part in values.tensor_split(10) if len(values) >= 100] or [math.nan]
        high, shown = factor * min(tenths) + more, f"{tenths[0]:.3g} -> {tenths[-1]:.3g}"
        check, of = ("of the run", stream) if stream == "grad_norm" else (stream, "")
        rows.append(row(check, "log", tenths[-1], (0, high), len(values) >= 100, of, shown))
    return rows


@dataclass
class Args:
    source: tyro.conf.Positional[str]  # Run folder, checkpoint or Hugging Face folder
    data_root: str = ""  # Folder of shards to read (default: that of the run, where it is still there)


def main():
    args = common.parse(Args)
    path, file, root, pairs, log = Path(args.source), Path(args.source, "config.json"), args.data_root, 0.0, []
    kind = re.search(r'"model_type": *"(\w+)"', file.read_text("utf-8") if file.is_file() else "")
    if kind is None or kind[1] in ("gpt2", "moe_gpt2"):
        model = build(*read_source(args.source)[:3])
    else:
        import transformers  # slow to import
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise common.UserError(f"{path} does not load: {' '.join(str(error).split()[:40])}") from None
    subject = Subject(model.to(devices.choose_device("auto")))
    if (path / "log.txt").is_file():
        log, then = check_log(path), runs.settings_of(runs.read_config(path))["data_root"]
        root = root or (then if Path(then).is_dir() else "")
    S, V = min(256, subject.length), subject.config.vocab_size
    idx = torch.randint(V, (16, S), generator=seeded(0))
    if root:  # rows spread over its val split
        loader = data.DataLoader(root, "val", 1, S, vocab_size=V)
        idx = torch.cat([loader.rows_at(i * loader.file_rows // 16, 1)[0] for i in range(16)])
        counted = loader.rows_at(0, min(loader.file_rows, 1_000_000 // S))[0]
        pairs = runs.pair_loss(counted.numpy().ravel(), idx.numpy().ravel(), V)
    rows, ce = examine(subject, idx, pairs)
    if not subject.layers:
        print("not seen: no router here tells its logits and its choice of experts")
    print(f"{path}: {ce:.3f} nats per token of {root or 'random tokens: no --data_root'}; counted pairs {pairs:.3f}")
    lines = (Row._fields, *rows, *log)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for words in lines:
        print("  ".join(word.ljust(width) for word, width in zip(words, widths, strict=True)).rstrip())
    return int(any("sick" in words for words in lines))


if __name__ == "__main__":
    common.run(main)
