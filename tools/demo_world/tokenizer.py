"""The demo world's tokenizer: whole tokens for the words of instructions, bytes for everything else.

It is a byte-level BPE without merges. A pre-token that is in the vocabulary (an instruction word, with or without
its leading space) is one token; any other text is spelled byte by byte, so that spelling tasks see letters, and
every Unicode string decodes back exactly.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .phrasings import REPLY
from .tasks import TASKS, WRAPPERS

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MAX_LENGTH = 512


def _whole_words() -> list[str]:
    """Byte-level pre-tokens of at least two letters that occur in a training phrasing, a wrapper or a reply."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lines = [template for task in TASKS for template in task.train_templates] + list(WRAPPERS)
    texts = [form for line in lines for form in (line, line[0].lower() + line[1:], " " + line)]
    texts += [" " + reply for reply in REPLY.values()]
    found: set[str] = set()
    for text in texts:
        for slot in ("{x}", "{a}", "{b}", "{t}"):
            text = text.replace(slot, " 0")
        found |= {piece for piece, _ in splitter.pre_tokenize_str(text)}
    return sorted(piece for piece in found if sum(c.isalpha() and c != "Ġ" for c in piece) > 1)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; ``tokenizer(text)`` puts ``<s>`` first and adds no ``</s>``."""
    pieces = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *_whole_words()]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
