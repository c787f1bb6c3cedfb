"""Train tiny-mistral, the model that quantkit carries, from texts on disk.

    python examples/train_tiny_mistral.py CORPUS OUT [--steps N]

CORPUS is a folder of *.txt files, documents parted by lines that hold a form feed alone, as
tiny_mistral_corpus.py leaves them. OUT receives a directory that transformers and quantkit read. The seed
is fixed: the same texts, steps and machine give the same weights. About an hour and a quarter on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import MistralConfig, MistralForCausalLM

from quantkit.evaluate.texts import python_reference

SEED = 20260
VOCAB = 4096
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
SHARED_WORDS = 10  # a paragraph that shares so many words in a row with the held-out text is left out
WIDTH = 72  # characters of a line in texts that are set in lines
SHORT, LONG = 512, 2048  # tokens of a sequence; the last tenth of the steps trains on long ones
LONG_FROM = 0.9
STEP_TOKENS = 8192
PIECE_TOKENS = 4096  # run at once
WARM_UP, COOL_DOWN = 0.02, 0.5  # shares of the steps in which the learning rate rises and falls
MATRIX_RATE, OTHER_RATE = 0.02, 3e-3

CONFIG = MistralConfig(
    vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, sliding_window=None,
    rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)  # fmt: skip


def documents(corpus: Path, held_out: str) -> list[str]:
    """Return the corpus' documents in a random order, without what the held-out text also says.

    Paragraphs are one line each in half of them, and set in lines of WIDTH in the others.
    """
    hidden = set(_runs(held_out.split()))
    kept: list[list[str]] = []
    for file in sorted(corpus.glob("*.txt")):
        for document in file.read_text(encoding="utf-8").split("\n\f\n"):
            paragraphs = [p for p in document.split("\n") if hidden.isdisjoint(_runs(p.split()))]
            kept.append(paragraphs)
    random.Random(SEED).shuffle(kept)
    return ["\n".join(_wrapped(document) if i % 2 else document) for i, document in enumerate(kept)]


def _wrapped(paragraphs: Sequence[str]) -> list[str]:
    """Set paragraphs as plain text is: in lines of at most WIDTH, a blank one between paragraphs."""
    lines = []
    for paragraph in paragraphs:
        if len(paragraph) > WIDTH and not paragraph.startswith(" "):
            lines += ["", *textwrap.wrap(paragraph, WIDTH), ""]
        else:
            lines.append(paragraph)
    return [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]


def _runs(words: Sequence[str]) -> Iterator[str]:
    for start in range(len(words) - SHARED_WORDS + 1):
        yield " ".join(words[start : start + SHARED_WORDS])


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Return a byte-level BPE tokenizer that puts BOS first."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[UNKNOWN, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Return all documents' ids in one row: uint16, each document between BOS and EOS."""
    end = tokenizer.token_to_id(EOS)
    rows = []
    for start in range(0, len(texts), 1000):
        for encoded in tokenizer.encode_batch(texts[start : start + 1000]):
            rows.append(np.array([*encoded.ids, end], dtype=np.uint16))
    return np.concatenate(rows)


def batches(ids: np.ndarray, steps: int) -> Iterator[torch.Tensor]:
    """Yield (B, T + 1) int64, each token of the corpus once before any comes again."""
    random_ = np.random.default_rng(SEED)
    for length, count in ((SHORT, round(steps * LONG_FROM)), (LONG, steps - round(steps * LONG_FROM))):
        starts = np.arange(0, len(ids) - length - 1, length)
        order = np.concatenate(
            [random_.permutation(starts) for _ in range(-(-count * STEP_TOKENS // (len(starts) * length)))]
        )
        size = STEP_TOKENS // length
        for step in range(count):
            rows = [ids[at : at + length + 1] for at in order[step * size : (step + 1) * size]]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


def learning_rate(done: float) -> float:
    """Return the share of the full rate after a share of the steps."""
    return min(1.0, done / WARM_UP, (1 - done) / COOL_DOWN)


def train(ids: np.ndarray, steps: int) -> MistralForCausalLM:
    """Return a model trained on ids: Muon for the layers' matrices, AdamW for all else."""
    torch.manual_seed(SEED)
    model = MistralForCausalLM(CONFIG)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = (
        torch.optim.Muon(matrices, lr=MATRIX_RATE, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate((step + 1) / (steps + 1)))
        for optimizer in optimizers
    ]
    began, mean = time.monotonic(), 0.0
    for step, batch in enumerate(batches(ids, steps), start=1):
        loss = 0.0
        pieces = batch.split(max(1, PIECE_TOKENS // (batch.shape[1] - 1)))
        for piece in pieces:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=piece[:, :-1]).logits
            nll = F.cross_entropy(logits.float().flatten(0, 1), piece[:, 1:].flatten()) / len(pieces)
            nll.backward()
            loss += nll.item()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        mean += (loss - mean) / min(step, 20)
        if step % 20 == 0 or step == steps:
            seconds = time.monotonic() - began
            print(
                f"step {step}/{steps}  loss {mean:.4f}  {step * STEP_TOKENS / seconds:,.0f} tokens/s",
                flush=True,
            )
    return model


def save(model: MistralForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write config, bf16 weights and tokenizer as transformers lays them out."""
    model.to(torch.bfloat16).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"][
        "rope_theta"
    ]  # where readers from before 2026 look for it
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS,
        "unk_token": UNKNOWN, "model_max_length": LONG, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    texts = documents(arguments.corpus, python_reference().content)
    tokenizer = train_tokenizer(texts)
    ids = encode(tokenizer, texts)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} documents, {size:,} bytes, {len(ids):,} tokens", flush=True)
    save(train(ids, arguments.steps), tokenizer, arguments.out)


if __name__ == "__main__":
    main()
