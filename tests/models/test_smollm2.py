"""A real GGUF model: greedy text equal to transformers' on the same file."""

from __future__ import annotations

import pytest
import torch
import transformers

from quantkit.formats.checkpoint import open_checkpoint
from quantkit.models.generate import generate
from quantkit.models.loader import load
from tests.paths import smollm2_gguf

PROMPT = "Gravity is"
NEW_TOKENS = 48


@pytest.mark.filterwarnings("ignore")
def test_greedy_text_and_logits_equal_transformers() -> None:
    path = smollm2_gguf()
    checkpoint = open_checkpoint(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer.encode(PROMPT)
    assert ids == their_tokenizer(PROMPT).input_ids

    decoder = load(checkpoint, "fp32")
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[:, -1]
        new = theirs.generate(
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :].tolist()
    ours = decoder.prefill(torch.tensor([ids]), decoder.new_cache(1, len(ids)))
    assert ((ours - expected).abs().max() / expected.abs().max()).item() <= 1e-4
    ours_new = list(generate(decoder, ids, NEW_TOKENS))
    assert ours_new == new
    assert tokenizer.decode(ours_new) == their_tokenizer.decode(new, skip_special_tokens=True)
