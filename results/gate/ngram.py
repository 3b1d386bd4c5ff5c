"""Nats per token of counted n-grams: Kneser-Ney (1995), interpolated, on the rows that a run of so many steps has seen.

    python results/gate/ngram.py DATA_ROOT 6104          # steps of B 16, T 256, data_seed 100: 25M tokens

Scored on the first million tokens of val, in the rows of T + 1 tokens that the model sees, with no context before them.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lab.data import DataLoader

B, T, ORDERS = 16, 256, 6
VOCABULARY = 4096


def rows_of(x, y):
    return np.concatenate([x.numpy(), y.numpy()[:, -1:]], axis=1)


def main(data_root, steps):
    train = DataLoader(data_root, "train", B, T, 100, vocab_size=VOCABULARY)
    val = DataLoader(data_root, "val", B, T, vocab_size=VOCABULARY)
    seen = np.concatenate([rows_of(*train.next_batch()) for _ in range(steps)])
    text = rows_of(*val.rows_at(0, 1_000_000 // T))

    # The key of an n-gram is the number of the (n-1)-gram at its beginning, times the vocabulary, plus its last token;
    # its own number, in `ids`, is the place of its key. -1: an n-gram of the scored text that was never seen.
    ids, here, keys, prefix, suffix, counts = [seen], [text], [np.arange(VOCABULARY)], [None], [None], [None]
    counts[0] = np.bincount(seen.ravel(), minlength=VOCABULARY)
    for n in range(1, ORDERS):
        key = ids[-1][:, :-1] * VOCABULARY + seen[:, n:]
        unique, place, count = np.unique(key, return_inverse=True, return_counts=True)
        place = place.reshape(key.shape)
        keys.append(unique)
        counts.append(count)
        prefix.append(unique // VOCABULARY)
        ends = np.empty(len(unique), np.int64)  # the (n-1)-gram at the end of each n-gram
        ends[place.ravel()] = ids[-1][:, 1:].ravel()
        suffix.append(ends)
        ids.append(place)
        wanted = np.where(here[-1][:, :-1] < 0, -1, here[-1][:, :-1] * VOCABULARY + text[:, n:])
        found = np.searchsorted(unique, wanted).clip(max=len(unique) - 1)
        here.append(np.where(unique[found] == wanted, found, -1))

    for order in range(2, ORDERS + 1):
        # lower orders count the kinds of tokens that stand before an n-gram, the highest one how often it occurs
        p = None
        for n in range(order):
            count = counts[n] if n == order - 1 else np.bincount(suffix[n + 1], minlength=len(keys[n]))
            if n == 0:
                p = ((count + 1) / (count.sum() + VOCABULARY))[text[:, 1:]]
                continue
            once, twice = (count == 1).sum(), (count == 2).sum()
            discount = once / (once + 2 * twice)
            total = np.bincount(prefix[n], weights=count, minlength=len(keys[n - 1]))
            kinds = np.bincount(prefix[n], weights=count > 0, minlength=len(keys[n - 1]))
            context, gram = here[n - 1][:, :-1], here[n]  # of the tokens with n tokens before them in their row
            known = (context >= 0) & (total[context] > 0)
            numerator = np.where(gram >= 0, np.maximum(count[gram] - discount, 0), 0)
            lower = p[:, n - 1 :]
            mixed = (numerator + discount * kinds[context] * lower) / np.maximum(total[context], 1)
            p = np.concatenate([p[:, : n - 1], np.where(known, mixed, lower)], axis=1)
        print(f"{order}-gram: {-np.log(p).mean():.4f} nats per token of {seen.size:,} counted", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
