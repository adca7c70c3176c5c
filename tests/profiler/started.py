"""Tiny models beside tokenizers of their own, which start a text with one token, with two, or with none."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from profiler.model.checkpoint import ModelRef, find_model
from profiler.statistics.calibration import OPENINGS

BOS, MASK, SOP, LATE = "<bos>", "[gMASK]", "<sop>", "<late>"
VOCABULARY, CONTEXT = 320, 64
STARTS = {"none": (), "one": (BOS,), "two": (MASK, SOP), "outside": (LATE,)}
"""What each kind of tokenizer puts before a text; the model has no embedding of `LATE`."""
IDS = {"none": (), "one": (0,), "two": (1, 2)}
"""The same, as tokens."""


def byte_pairs(start: str) -> PreTrainedTokenizerFast:
    """Pairs of bytes, learned from our own openings, so that every text can be read; with a start of its own."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, MASK, SOP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train([str(OPENINGS)], trainer)
    pairs.add_special_tokens([LATE])
    if STARTS[start]:
        pairs.post_processor = processors.TemplateProcessing(
            single=" ".join((*STARTS[start], "$A")),
            special_tokens=[(token, pairs.token_to_id(token)) for token in STARTS[start]],
        )
    return PreTrainedTokenizerFast(tokenizer_object=pairs)


def foreign(kind: str) -> PreTrainedTokenizerFast:
    """Starts a text with <bos>, but reads Greek alone: other letters it drops, or refuses where it knows words only."""
    if kind == "letters":
        greek = Tokenizer(models.BPE())
        greek.train_from_iterator(
            ["μῆνιν ἄειδε θεά"], trainers.BpeTrainer(special_tokens=[BOS], show_progress=False)
        )
    else:
        greek = Tokenizer(models.WordLevel({BOS: 0, "μῆνιν": 1, "ἄειδε": 2, "θεά": 3}))
        greek.pre_tokenizer = pre_tokenizers.Whitespace()
    greek.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=greek)


def small_llama(folder: Path, bos: int | None = 0) -> ModelRef:
    """A random model of one block, without a tokenizer."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        vocab_size=VOCABULARY,
        bos_token_id=bos,
        eos_token_id=None,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return find_model(str(folder))


def started_llama(folder: Path, start: str, bos: int | None = 0) -> ModelRef:
    """The same model beside a tokenizer that starts a text so."""
    byte_pairs(start).save_pretrained(folder)
    return small_llama(folder, bos)
