"""Text from a model.

    python sample.py --checkpoint checkpoints/RUN --prompt "The moon" --num_samples 4 --temperature 0.8
    python sample.py --init_from gpt2-xl --prompt_file question.txt --max_new_tokens 300 --top_p 0.95

`stream` yields the next token of each row, `generate` collects them. Keys and values of the tokens so far are kept, so
a token costs one position and not the whole prefix, in time one reading of the weights, whatever the length. With 124M
parameters, on one thread of a busy machine: 50, 55 and 52 ms for the 8th, 248th and 487th token, where computing the
prefix again takes 92, 506 and 926 ms.

Past block_size the window slides as in nanoGPT: the last block_size tokens are read at positions 0, 1, ... Learned
positions move with it, every key and value changes, nothing kept is worth anything, and each token costs a full forward
of block_size positions. Routing is dropless: a token's logits depend on its own past alone, whatever else is in the
batch, which is also what makes the cache exact for a MoE.
"""

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import common
from common import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Sampling


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Next tokens (B,) from logits (B, V).

    temperature 0 takes the likeliest. Otherwise: of the top_k likeliest tokens, the fewest whose probabilities (among
    those top_k) add up to top_p or more, drawn by their probabilities at this temperature.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, tokens = logits.float(), None
    if top_k is not None or top_p is not None:  # descending
        logits, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # the largest is 0: nothing overflows
    probs = torch.softmax(scaled, dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs  # what the likelier tokens add up to
        probs = probs * (before < top_p)
    drawn = torch.multinomial(probs, 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


def check_sampling(temperature, top_k, top_p):
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (the likeliest token) or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}; leave it out for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must lie above 0 and at most 1, not {top_p}")


@torch.no_grad()
def next_logits(model, idx, cache):
    """Logits (B, V) after the tokens idx (B, T). Computes what `cache` does not hold, all once the window slides."""
    window = model.config.block_size
    if idx.shape[1] <= window:
        hidden = model.hidden_states(idx[:, cache.length :], cache=cache, dropless=True)
    else:
        hidden = model.hidden_states(idx[:, -window:], dropless=True)
    return model.lm_head(hidden[:, -1])


def stream(
    model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, eot=None, vocab_size=None
):
    """Yield the next tokens (B,) after idx (B, T), at most max_new_tokens times.

    With `eot` it ends when every row has sampled it; a row that has, goes on with eot. Ids from vocab_size up, the
    padding of the embedding, are never sampled. Random numbers come from `generator` (on the model's device) alone;
    None: from a new one, seeded by the system. The model is in eval mode until the last token, then as it was.
    """
    check_sampling(temperature, top_k, top_p)
    if idx.shape[1] == 0:
        raise ValueError("idx must hold at least one token a row")
    if generator is None:
        generator = torch.Generator(idx.device)
        generator.seed()
    training, ended = model.training, torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    model.eval()
    try:
        cache = model.new_cache(len(idx))
        for _ in range(max_new_tokens):
            logits = next_logits(model, idx, cache)[:, :vocab_size]
            if not torch.isfinite(logits.max()):
                raise UserError("the model's logits are not finite: it has diverged, take an older checkpoint")
            tokens = sample_next(logits, temperature, top_k, top_p, generator)
            if eot is not None:
                tokens = torch.where(ended, eot, tokens)
                ended |= tokens == eot
            yield tokens
            if ended.all():
                return
            idx = torch.cat([idx, tokens[:, None]], dim=1)
    finally:
        model.train(training)


def generate(model, idx, max_new_tokens, *args, **kwargs):
    """idx (B, T) with what stream() yields behind it: (B, T + max_new_tokens), shorter when all rows have ended."""
    return torch.cat([idx, *(tokens[:, None] for tokens in stream(model, idx, max_new_tokens, *args, **kwargs))], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Printing

RULE = "-" * 80


def print_samples(steps, tokenizer, prompt, n):
    """Print n samples, each after `prompt`: the first as its tokens come, the others when those before have ended.

    A token may be part of a character: bytes are kept until they make one. What there is is printed on Ctrl-C too.
    """
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in range(n)]
    texts, ended, front = [prompt] * n, [False] * n, 0  # texts: what is not printed yet
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
    checkpoint: str = ""  # a step_*.pt file, or a folder of them (its newest)
    init_from: str = ""  # or gpt2, gpt2-medium, gpt2-large, gpt2-xl, a Hugging Face folder
    prompt: str = ""  # text to go on from; empty: the beginning of a document
    prompt_file: str = ""  # a UTF-8 file that holds the prompt
    num_samples: int = 1  # drawn side by side, printed one after another
    max_new_tokens: int = 200  # of each sample
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = 50  # sample from so many likeliest tokens; None: from all
    top_p: float | None = None  # and of those from the fewest that make up this probability
    seed: int = 1337  # the same seed gives the same text
    device: str = "auto"  # cuda, mps, cpu; auto: the first of them there is


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


def check_args(args):
    check_sampling(args.temperature, args.top_k, args.top_p)
    for name, least in (("num_samples", 1), ("max_new_tokens", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must lie in 0 to 2**63 - 1, not {args.seed}")


def main():
    args = common.parse(Args)
    check_args(args)
    prompt = read_prompt(args)
    device = common.choose_device(args.device)
    model, tokenizer = checkpoint.open_model(args.checkpoint, args.init_from, device)
    ids, window = tokenizer.encode_ordinary(prompt) or [tokenizer.eot], model.config.block_size
    if len(ids) > window:
        print(f"note: of the prompt's {len(ids)} tokens the model sees the last {window} (block_size)", file=sys.stderr)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    steps = stream(
        model, torch.tensor([ids[-window:]] * args.num_samples, device=device), args.max_new_tokens,
        args.temperature, args.top_k, args.top_p, torch.Generator(device).manual_seed(args.seed),
        tokenizer.eot, tokenizer.vocab_size,
    )  # fmt: skip
    print_samples(steps, tokenizer, prompt, args.num_samples)


if __name__ == "__main__":
    common.run(main)
