"""From text to batches: corpus, tokenizer, token shards, loader, and a position that is saved and restored.

Run it with: python examples/data_pipeline.py [FILE OR FOLDER]
"""

import sys
import tempfile
from itertools import chain
from pathlib import Path

from fusedgpt.data import TokenLoader, make_tokenizer, open_corpus, token_shards, tokenize

if __name__ == "__main__":
    # text: a .txt, .jsonl or .parquet file, a folder of them, or a named corpus; 10 % are held out
    corpus = open_corpus(sys.argv[1] if len(sys.argv) > 1 else "tales:2000")
    print(f"corpus     {corpus.name}: {next(corpus.train_texts())[:60]}...")

    # tokenizer: byte-level BPE, trained here
    tokenizer = make_tokenizer("bpe", corpus.train_texts(), vocab_size=512)
    ids = tokenizer.encode("Once upon a time there was a kind girl.")
    print(f"tokenizer  {tokenizer.vocab_size} tokens: {[tokenizer.decode([i]) for i in ids]}")

    with tempfile.TemporaryDirectory() as parent:
        # shards: token ids as uint16 in llm.c's format, with the tokenizer beside them
        folder = Path(parent, "shards")
        tokenize(corpus, tokenizer, folder)
        shards = token_shards(folder)
        size = sum(file.stat().st_size for file in chain(shards.train, shards.val))
        print(f"shards     {shards.train_tokens:,} + {shards.val_tokens:,} tokens in {size / 1e6:.2f} MB")

        # loader: shuffled windows; targets are the inputs one token further on
        loader = TokenLoader(shards.train, context_length=64, batch_size=8, seed=1)
        inputs, targets = next(loader)
        print(f"loader     {tuple(inputs.shape)} of {loader.n_windows:,} windows an epoch")
        print(f"  input    {tokenizer.decode(inputs[0, :12].tolist())!r}")
        print(f"  target   {tokenizer.decode(targets[0, :12].tolist())!r}")

        state = loader.state_dict()  # an exact position: the same batches follow after a restart
        expected, _ = next(loader)
        again = TokenLoader(shards.train, context_length=64, batch_size=8, seed=1)
        again.load_state_dict(state)
        assert next(again)[0].equal(expected)
        print(f"resumed    at window {state['position']}: the next batch is the same")
