"""Text from a model.

    python sample.py --checkpoint checkpoints/RUN --prompt "The moon" --num_samples 4 --temperature 0.8
    python sample.py --init_from gpt2-xl --prompt_file question.txt --max_new_tokens 300 --top_p 0.95

`stream` yields the next token of each row, `generate` collects them. The keys and values of earlier tokens are cached:
a new token costs one position instead of the whole prefix.

Past block_size the window slides as in nanoGPT: the last block_size tokens are read at positions 0, 1, ... Learned
positions move with the window, so every key and value changes: the cache is of no use, and each token costs a forward
pass over block_size positions. Routing is dropless: the logits of a token depend on its own past alone, not on the rest
of the batch; this makes the cache exact for a MoE too.
"""

import codecs
import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab import checkpoint, common
from lab.common import NotNegative, Positive, Seed, UserError

# ---------------------------------------------------------------------------------------------------------------------
# Inference: type, attention and memory (hellaswag.py uses them too)


def inference_dtype(device, config):
    """Type of the matrix products: bfloat16 on CUDA, if it has the grouped products of this model, else float32."""
    widths = (config.n_embd, config.hidden_of_expert) if config.n_exp > 1 else ()
    whole = all(width % 8 == 0 for width in widths)  # rows of whole 16 bytes
    return torch.bfloat16 if device.type == "cuda" and whole else torch.float32


def attention_without_cudnn(device):
    """Context in which attention on CUDA uses no cuDNN kernel: cuDNN builds a plan for every new shape."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def require_memory(each, count, device, flag):
    """UserError, naming the flag that sets `count`, if count times `each` bytes are not free."""
    free = common.free_memory(device)
    if each * count > free:
        raise UserError(
            f"{flag} {count} needs about {each * count // 2**20:,} MiB of memory, {free // 2**20:,} MiB are free: "
            f"set {flag} to {free // each} or less"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


class BrokenModel(UserError):
    """The logits of the model are not finite."""


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Next tokens (B,) from logits (B, V).

    temperature 0 takes the most likely token. Otherwise a token is drawn, by the probabilities at this temperature,
    from the top_k most likely tokens, of these from the fewest whose probabilities (among the top_k) sum to top_p.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    tiny = torch.finfo(torch.float32).tiny  # smaller settings would be rounded to 0
    logits, tokens = logits.float(), None
    if top_k is not None or top_p is not None:  # descending
        logits, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, tiny)  # at most 0: nothing overflows
    probs = torch.softmax(scaled, dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs  # the sum over the more likely tokens
        probs = probs * (before < max(top_p, tiny))
    # The draw of torch.multinomial, without its checks, for which the host would wait for the device.
    drawn = (probs / torch.empty_like(probs).exponential_(generator=generator)).argmax(dim=-1, keepdim=True)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


def check_sampling(temperature, top_k, top_p):
    """UserError for settings that `sample_next` cannot use."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be at least 0 (0: the most likely token) and finite, not {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, or None for all tokens, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")


@torch.no_grad()
def next_logits(model, idx, cache):
    """Logits (B, V) after the tokens idx (B, T). Computes the positions that `cache` lacks; all once T > block_size."""
    window = model.config.block_size
    with attention_without_cudnn(idx.device):
        if idx.shape[1] <= window:
            hidden = model.hidden_states(idx[:, cache.length :], cache=cache, dropless=True)
        else:
            hidden = model.hidden_states(idx[:, -window:], dropless=True)
    return model.lm_head(hidden[:, -1])


@torch.no_grad()
def store_by_input(model):
    """Store the weights (out, in) of linear layers input by input, in place: the same values and shapes, other strides.

    A product with one row, which is what a new token needs of each layer, then takes 0.77 of its time on a CPU. For a
    model that only writes text: training expects contiguous weights.
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = layer.weight.data.t().contiguous().t()


CHECK_EVERY = 16  # tokens of generate() between two looks at the device


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, eot=None,
           vocab_size=None, check_every=1):  # fmt: skip
    """Yield the next tokens (B,) after idx (B, T), at most max_new_tokens times.

    With `eot` it ends when every row has sampled it; a row that has ended continues with eot. An empty idx (B, 0) then
    begins a document. Ids from vocab_size up, the padding of the embedding, are never sampled. Random numbers come from
    `generator` (on the model's device) alone; None: a new one, seeded by the system. The model is in eval mode until
    the last token, then in its former mode. Of several ranks every one calls it and gets the tokens of rank 0.
    Raises BrokenModel if the logits are not finite. The host waits for the device, to see this or the end, at every
    check_every-th token and at the last: more tokens than needed may follow the end, or logits that are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    if idx.shape[1] == 0:
        if eot is None:
            raise ValueError("idx is empty: give eot to begin a document")
        idx = torch.full((len(idx), 1), eot, device=idx.device)
    if generator is None:
        generator = torch.Generator(idx.device)
        generator.seed()
    training, over = model.training, False
    ended, broken = (torch.zeros(n, dtype=torch.bool, device=idx.device) for n in (len(idx), 1))
    model.eval()
    try:
        cache = model.new_cache(len(idx))
        for i in range(1, max_new_tokens + 1):
            logits = next_logits(model, idx, cache)[:, :vocab_size]
            tokens = sample_next(logits, temperature, top_k, top_p, generator)
            tokens = torch.where(torch.isfinite(logits.max()), tokens, -1)
            if dist.is_available() and dist.is_initialized():  # ranks that round differently must end together
                dist.broadcast(tokens, 0)
            broken |= (tokens < 0).any()
            tokens = tokens.clamp(min=0)
            if eot is not None:
                tokens = torch.where(ended, eot, tokens)
                ended |= tokens == eot
            if i % check_every == 0 or i == max_new_tokens:
                is_broken, *have_ended = torch.cat([broken, ended]).tolist()
                over = all(have_ended)
                if is_broken:
                    raise BrokenModel("the model's logits are not finite: it has diverged, use an earlier checkpoint")
            yield tokens
            if over:
                return
            idx = torch.cat([idx, tokens[:, None]], dim=1)
    finally:
        model.train(training)


def generate(model, idx, max_new_tokens, *args, eot=None, **kwargs):
    """idx (B, T) followed by the tokens of stream(): (B, T + max_new_tokens), less if all rows end earlier."""
    columns = stream(model, idx, max_new_tokens, *args, eot=eot, check_every=CHECK_EVERY, **kwargs)
    rows, T = torch.cat([idx.long(), *(tokens[:, None] for tokens in columns)], dim=1), idx.shape[1]
    if eot is None:
        return rows
    running = ((rows[:, T:] == eot).cumsum(dim=1) == 0).any(dim=0)  # per new token: whether a row continues after it
    return rows[:, : T + 1 + running.sum().tolist()]


def continue_prompt(model, tokenizer, prompt, n, max_new_tokens, seed, machine):
    """n texts that begin with `prompt`, for a look at a model in training; top 50 tokens, a generator of its own."""
    generator = torch.Generator(machine.device).manual_seed(seed)
    idx = torch.tensor([tokenizer.encode_ordinary(prompt)] * n, dtype=torch.int64, device=machine.device)
    with machine.autocast():
        rows = generate(model, idx, max_new_tokens, top_k=50, generator=generator, eot=tokenizer.eot,
                        vocab_size=tokenizer.vocab_size).tolist()  # fmt: skip
    return [tokenizer.decode(row[: row.index(tokenizer.eot)] if tokenizer.eot in row else row) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Printing

RULE = "-" * 80


def print_samples(steps, tokenizer, prompt, n):
    """Print n samples, each after `prompt`: the first while it is drawn, the others when those before it have ended.

    A token may be part of a character: its bytes wait for the rest. On Ctrl-C the text so far is printed.
    """
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(n)]
    texts, ended, front = [prompt] * n, [False] * n, 0  # texts: not yet printed
    try:
        for tokens in steps:
            for i, token in enumerate(tokens.tolist()):
                if not ended[i]:
                    ended[i] = token == tokenizer.eot
                    token_bytes = b"" if ended[i] else tokenizer.decode_bytes([token])
                    texts[i] += decoders[i].decode(token_bytes, final=ended[i])
            while True:
                print(texts[front], end="", flush=True)
                texts[front] = ""
                if not ended[front] or front == n - 1:
                    break
                front += 1
                print("\n" + RULE)
    finally:
        tails = [text + decoder.decode(b"", final=True) for text, decoder in zip(texts, decoders, strict=True)]
        print(f"\n{RULE}\n".join(tails[front:]), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


@dataclass
class Args:
    checkpoint: str = ""  # Checkpoint of train_single_gpu.py: a .pt file, or a folder (its newest)
    init_from: str = ""  # GPT-2 from Hugging Face (gpt2 ... gpt2-xl), or a folder in its format
    prompt: str = ""  # Text to continue; empty: the beginning of a document
    prompt_file: str = ""  # UTF-8 file with the prompt
    num_samples: Positive = 1  # Samples, drawn together, printed one after another
    max_new_tokens: NotNegative = 200  # Tokens per sample
    temperature: float = 1.0  # Divisor of the logits; 0: always the most likely token
    top_k: int | None = 50  # Most likely tokens to draw from; None: all
    top_p: float | None = None  # Probability: draw from the fewest of the top_k tokens that reach it
    seed: Seed = 1337  # Seed for the draws: the same seed gives the same text
    device: str = "auto"  # cuda, mps or cpu; auto: the first that is available


def read_prompt(args):
    if args.prompt and args.prompt_file:
        raise UserError("give one prompt: --prompt TEXT or --prompt_file FILE")
    if not args.prompt_file:
        return args.prompt
    try:
        return Path(args.prompt_file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read --prompt_file {args.prompt_file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompt_file {args.prompt_file} is not UTF-8 (byte {error.start})") from None


def check_memory(model, prompt_length, args, device):
    """UserError if --num_samples samples need more memory than is free: cache, prompt in the widest layer, logits."""
    c, width = model.config, inference_dtype(device, model.config).itemsize
    positions = c.block_size if device.type == "cuda" else min(c.block_size, prompt_length + args.max_new_tokens)
    cache, prompt, logits = 2 * c.n_layer * positions * width, prompt_length * 6 * width, c.vocab_size * 16
    require_memory((cache + prompt) * c.n_embd + logits, args.num_samples, device, "--num_samples")


def main():
    args = common.parse(Args)
    check_sampling(args.temperature, args.top_k, args.top_p)
    prompt = read_prompt(args)
    device = common.choose_device(args.device)
    model, tokenizer = checkpoint.open_model(args.checkpoint, args.init_from, device)
    if device.type == "cpu":
        store_by_input(model)
    ids, window = tokenizer.encode_ordinary(prompt), model.config.block_size
    if len(ids) > window:
        print(f"note: of the prompt's {len(ids)} tokens the model sees the last {window} (block_size)", file=sys.stderr)
    idx = torch.tensor(ids[-window:], dtype=torch.int64, device=device)
    check_memory(model, len(idx), args, device)
    sys.stdout.reconfigure(errors="replace")  # bytes of a character that is cut off, and what a terminal cannot show
    steps = stream(
        model, idx.repeat(args.num_samples, 1), args.max_new_tokens,
        args.temperature, args.top_k, args.top_p, torch.Generator(device).manual_seed(args.seed),
        tokenizer.eot, tokenizer.vocab_size,
    )  # fmt: skip
    with common.autocast(device, inference_dtype(device, model.config)):
        print_samples(steps, tokenizer, prompt, args.num_samples)


if __name__ == "__main__":
    common.run(main)
