"""Models of a few thousand random weights, saved as transformers saves any: `--model FOLDER` takes them."""

from __future__ import annotations

from pathlib import Path

import torch

LETTERS = " abcdefghijklmnopqrstuvwxyz.\n0123456789"


def decoder(folder: Path, spread: float = 0.3) -> Path:
    """A Llama of two layers, 4 heads of 16 on 2 kv heads, with a token a letter. spread: of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(LETTERS), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=spread,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if not spread:
        torch.nn.init.zeros_(model.get_input_embeddings().weight)
    return _saved(model, folder)


def gemma(folder: Path) -> Path:
    """A Gemma 3 of two layers, the first of which sees a window of 8."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(LETTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, max_position_embeddings=256, sliding_window=8, initializer_range=0.3,
        layer_types=["sliding_attention", "full_attention"], bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return _saved(Gemma3ForCausalLM(config), folder)


def encoder(folder: Path) -> Path:
    """A BERT of two layers, 4 heads of 8."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(LETTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return _saved(BertModel(config), folder)


def _saved(model: torch.nn.Module, folder: Path) -> Path:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
