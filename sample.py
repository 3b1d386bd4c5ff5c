"""Text from a model.

    python sample.py --checkpoint logs/moe_seed_42 --prompt "The moon" --num_samples 4 --temperature 0.8
    python sample.py --init_from gpt2-xl --prompt_file question.txt --max_new_tokens 300 --top_p 0.95

The keys and values of earlier tokens are cached: a new token costs one position instead of the whole prefix. Routing
is dropless, so that the cache is exact for a MoE too. Past block_size the window slides as in nanoGPT: the last
block_size tokens are read at positions 0, 1, ..., which changes every key and value: each token costs a whole pass.
"""

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

from lab import common
from lab.common import AboveZero, NotNegative, Positive, Rate, Seed, UserError

# isort: split
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from lab import devices
from weights import open_model

# Attention kernels for sequences of many lengths: cuDNN would build a plan for every new shape.
NO_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def inference_dtype(device, config):
    """Type of the matrix products: bfloat16 on CUDA, else float32."""
    # The grouped products of experts in bfloat16 read rows of whole 16 bytes.
    aligned = config.n_exp == 1 or (config.n_embd % 8 == 0 and config.hidden_of_expert % 8 == 0)
    return torch.bfloat16 if device.type == "cuda" and aligned else torch.float32


class BrokenModel(UserError):
    """The model's outputs are not finite."""


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Next tokens (B,) from logits (B, V).

    temperature 0 takes the most likely token. Otherwise a token is drawn, by the probabilities at this temperature,
    from the top_k most likely tokens, of these from the fewest whose probabilities (among the top_k) sum to top_p.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    tiny = torch.finfo(torch.float32).tiny  # smaller settings would be rounded to 0
    logits, tokens, V = logits.float(), None, logits.shape[-1]
    if top_k is not None or top_p is not None:
        logits, tokens = logits.topk(min(top_k or V, V))  # in descending order
    # Differences from the largest logit are at most 0: nothing overflows at a low temperature.
    below = logits - logits.amax(dim=-1, keepdim=True)
    probs = torch.softmax(below / max(temperature, tiny), dim=-1)
    if top_p is not None:
        of_more_likely = probs.cumsum(dim=-1) - probs
        probs = probs * (of_more_likely < max(top_p, tiny))
    # The draw of torch.multinomial, without its checks, for which the host would wait for the device. Without the clamp
    # an exponential of 0 makes the quotient of an excluded token nan, which argmax takes.
    exponential = torch.empty_like(probs).exponential_(generator=generator).clamp(min=tiny)
    drawn = (probs / exponential).argmax(dim=-1, keepdim=True)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


def next_logits(model, idx, cache):
    """Logits (B, V) after the tokens idx (B, T). Computes the positions that `cache` lacks; all once T > block_size."""
    window = model.config.block_size
    new = idx[:, cache.length :]
    if idx.shape[1] > window:
        new, cache = idx[:, -window:], None
    with sdpa_kernel(NO_CUDNN):
        hidden = model.hidden_states(new, cache=cache, dropless=True)
    return model.lm_head(hidden[:, -1])


@torch.no_grad()
def stream(model, idx, max_new_tokens, tokenizer, generator, temperature=1.0, top_k=None, top_p=None):
    """Yield the next tokens (B,) after idx (B, T), up to max_new_tokens times or until every row has ended.

    `model` is in eval mode. A row that has ended repeats end of text. Ids beyond the tokenizer's vocabulary, which pad
    the embedding, are never drawn. Of several ranks every one calls it and gets the tokens of rank 0.
    """
    cache = model.new_cache(len(idx))
    ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    for _ in range(max_new_tokens):
        logits = next_logits(model, idx, cache)[:, : tokenizer.vocab_size]
        tokens = sample_next(logits, temperature, top_k, top_p, generator)
        tokens = torch.where(logits.amax(dim=-1).isfinite(), tokens, -1)
        # Ranks that round differently would draw differently; they must end, or fail, together.
        if dist.is_available() and dist.is_initialized():
            dist.broadcast(tokens, 0)
        if (tokens < 0).any():
            raise BrokenModel("the model's logits are not finite: it has diverged, use an earlier checkpoint")
        tokens = torch.where(ended, tokenizer.eot, tokens)
        ended |= tokens == tokenizer.eot
        yield tokens
        if ended.all():
            return
        idx = torch.cat([idx, tokens[:, None]], dim=1)


def decode_row(tokenizer, row):
    """Text of the tokens of `row` before its end of text."""
    return tokenizer.decode(row[: row.index(tokenizer.eot)] if tokenizer.eot in row else row)


def continue_prompt(model, tokenizer, prompt, n, max_new_tokens, seed, machine):
    """n texts that begin with `prompt`, top 50 tokens, from a model in training, which is left as it was."""
    ids = tokenizer.encode_ordinary(prompt) or [tokenizer.eot]
    idx = torch.tensor([ids] * n, device=machine.device)
    generator = torch.Generator(machine.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        with machine.autocast():
            columns = list(stream(model, idx, max_new_tokens, tokenizer, generator, top_k=50))
    finally:
        model.train(was_training)
    return [prompt + decode_row(tokenizer, row) for row in torch.stack(columns, dim=1).tolist()]


def print_samples(steps, tokenizer, prompt, n):
    """Print the first of n samples while it is drawn, then the others; on Ctrl-C, what there is of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span tokens
    rows = [[] for _ in range(n)]
    print(prompt, end="", flush=True)
    try:
        for tokens in steps:
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            if tokenizer.eot not in rows[0][-1:]:
                print(decoder.decode(tokenizer.decode_bytes(rows[0][-1:])), end="", flush=True)
    finally:
        print(decoder.decode(b"", final=True))
        for row in rows[1:]:
            print("-" * 80 + f"\n{prompt}{decode_row(tokenizer, row)}")


@dataclass
class Args:
    checkpoint: str = ""  # Run of train_single_gpu.py: its folder (the newest checkpoint) or one checkpoint
    init_from: str = ""  # GPT-2 from Hugging Face (gpt2 ... gpt2-xl), or a folder in its format
    prompt: str = ""  # Text to continue; empty: the beginning of a document
    prompt_file: str = ""  # UTF-8 file with the prompt, in place of --prompt
    num_samples: Positive = 1  # Samples, drawn together, printed one after another
    max_new_tokens: NotNegative = 200  # Tokens per sample
    temperature: Rate = 1.0  # Divisor of the logits; 0: always the most likely token
    top_k: Positive | None = 50  # Most likely tokens to draw from; None: all
    top_p: AboveZero | None = None  # Probability: draw from the fewest of the top_k tokens that reach it
    seed: Seed = 1337  # Seed for the draws: the same seed gives the same text
    device: str = "auto"  # cuda, mps or cpu; auto: the first that is available


def main():
    args = common.parse(Args)
    if bool(args.checkpoint) == bool(args.init_from):
        raise UserError("give one model: --checkpoint RUN or --init_from gpt2")
    prompt = args.prompt
    if args.prompt_file:
        try:
            prompt = Path(args.prompt_file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt_file {args.prompt_file} is not UTF-8 (byte {error.start})") from None
    device = devices.choose_device(args.device)
    model, tokenizer = open_model(args.checkpoint or args.init_from, device)
    ids, window = tokenizer.encode_ordinary(prompt) or [tokenizer.eot], model.config.block_size
    if len(ids) > window:
        print(f"note: the model sees the last {window} of the prompt's {len(ids)} tokens", file=sys.stderr)
    idx = torch.tensor([ids] * args.num_samples, device=device)
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters of the text
    generator = torch.Generator(device).manual_seed(args.seed)
    with devices.autocast(device, inference_dtype(device, model.config)):
        steps = stream(model, idx, args.max_new_tokens, tokenizer, generator, args.temperature, args.top_k, args.top_p)
        print_samples(steps, tokenizer, prompt, args.num_samples)


if __name__ == "__main__":
    common.run(main)
