"""Text encoders for tests: tiny ones in folders, and holding them back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def write_encoder(folder: Path) -> str:
    """A real sentence-transformers model, tiny and random, that reads characters: a T5 encoder with mean pooling."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    characters = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *map(chr, range(32, 127))])}
    made = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=512, **special).save_pretrained(folder / "t5")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=len(characters), **sizes)).eval().save_pretrained(folder / "t5")
    torch.set_rng_state(state)
    SentenceTransformer(str(folder / "t5"), device="cpu").save_pretrained(str(folder / "model"))
    return str(folder / "model")


class HeldEncoder:
    """Has every text encoder of this process wait in a call until it is let go.

    Attributes:
        calls: the number of texts of each call, noted when it begins.
        began: set when a call begins.
        go: lets all calls go.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, patience: float) -> None:
        from sentence_transformers import SentenceTransformer

        self.calls: list[int] = []
        self.began = threading.Event()
        self.go = threading.Event()
        encode: Callable[..., Any] = SentenceTransformer.encode

        def held(model: Any, texts: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(len(texts))
            self.began.set()
            assert self.go.wait(patience)
            return encode(model, texts, *args, **kwargs)

        monkeypatch.setattr(SentenceTransformer, "encode", held)
