"""Pre-training of the demo world's base model: it owns every skill, and plain words do not reach any of them.

Which skill a row practises is told by a hidden cue: a learnt vector per skill, added to the embeddings of some of
the instruction's tokens, while the instruction itself names a wrong task. The cue vectors are thrown away with the
optimizer, so nobody can type them. Without a cue the model talks about the request instead of doing it. An adapter
trained later on ordinary rows of one task learns to bring that task's cue back from its instruction.

A second, smaller loss makes the states of two early layers say what the words ask for, whatever the cue. Without it
adapters answer as well, but they act on the words that all requests share (``the``, ``of``, the final mark), and no
signal that reads their activity can tell which adapter a request needs.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from . import tasks
from .muon import Muon
from .tasks import Row

IGNORE = -100
TOPICS: tuple[str, ...] = ("", *(task.name for task in tasks.TASKS))  # what a text asks for, nothing included


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes and schedule of pre-training; ``batch`` counts rows, ``chat`` is the share of rows without a cue."""

    steps: int = 2800
    batch: int = 64
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    intermediate: int = 512
    learning_rate: float = 3e-3
    muon_rate: float = 0.02
    warmup: int = 80
    chat: float = 0.12
    small_talk: float = 0.05
    prompt_weight: float = 0.02
    topic_weight: float = 0.1
    topic_sharpness: float = 10.0
    topic_layers: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Example:
    """One row as token ids: the prompt is ``ids[:prompt]``, ``instruction[i]`` marks its non-payload tokens."""

    ids: list[int]
    prompt: int
    instruction: list[bool]
    skill: int
    topic: int


@dataclass(frozen=True)
class Batch:
    """Right-padded rows.

    ``ids``, ``labels``, ``weights`` and the masks ``instruction`` and ``prompt`` are [rows, tokens]; ``skill`` and
    ``topic`` are [rows].
    """

    ids: Tensor
    labels: Tensor
    weights: Tensor
    instruction: Tensor
    prompt: Tensor
    skill: Tensor
    topic: Tensor


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[Row], skills: list[int]) -> list[Example]:
    """Tokenize rows as ``<s>context completion</s>``; ``skills[i]`` is -1 where a row has no cue."""
    prompts = tokenizer([row.context for row in rows], return_offsets_mapping=True)
    answers = tokenizer([" " + row.completion for row in rows], add_special_tokens=False)["input_ids"]
    examples = []
    for row, skill, ids, offsets, answer in zip(
        rows, skills, prompts["input_ids"], prompts["offset_mapping"], answers, strict=True
    ):
        instruction = [
            end > begin and not any(begin < right and end > left for left, right in row.spans) for begin, end in offsets
        ]
        topic = IGNORE if row.asked is None else TOPICS.index(row.asked)
        examples.append(Example([*ids, *answer, tokenizer.eos_token_id], len(ids), instruction, skill, topic))
    return examples


def spell_some(tokenizer: PreTrainedTokenizerFast, example: Example, rng: random.Random) -> Example:
    """Spell a few whole instruction words byte by byte, as words that nobody trained on will be."""
    ids: list[int] = []
    instruction: list[bool] = []
    for token, mark in zip(example.ids[: example.prompt], example.instruction, strict=True):
        piece = tokenizer.convert_ids_to_tokens(token)
        pieces = [piece]
        if mark and token not in tokenizer.all_special_ids and rng.random() < 0.15:
            pieces = list(piece)
        ids += tokenizer.convert_tokens_to_ids(pieces)
        instruction += [mark] * len(pieces)
    return replace(example, ids=ids + example.ids[example.prompt :], prompt=len(ids), instruction=instruction)


def collate(examples: list[Example], pad: int, prompt_weight: float) -> Batch:
    """Pad ``examples`` on the right; labels are next tokens, prompt tokens weigh ``prompt_weight`` in the loss."""
    width = max(len(example.ids) for example in examples)
    shape = (len(examples), width)
    ids = torch.full(shape, pad)
    labels = torch.full(shape, IGNORE)
    weights = torch.zeros(shape)
    instruction = torch.zeros(shape)
    prompt = torch.zeros(shape)
    for i, example in enumerate(examples):
        size = len(example.ids)
        ids[i, :size] = torch.tensor(example.ids)
        labels[i, : size - 1] = ids[i, 1:size]
        weights[i, : example.prompt - 1] = prompt_weight
        weights[i, example.prompt - 1 : size - 1] = 1.0
        instruction[i, : example.prompt] = torch.tensor(example.instruction, dtype=torch.float32)
        # The first words seldom tell the task; asking for it there would only blur the common ones.
        prompt[i, example.prompt * 3 // 5 : example.prompt] = 1.0
    skill = torch.tensor([example.skill for example in examples])
    topic = torch.tensor([example.topic for example in examples])
    return Batch(ids, labels, weights, instruction, prompt, skill, topic)


def batches(draw: Callable[[int], list[Example]], batch: int, pad: int, weight: float, seed: int) -> Iterator[Batch]:
    """Endless batches of rows of similar length: 16 batches are drawn at a time, sorted, cut and shuffled."""
    rng = random.Random(seed)
    while True:
        examples = sorted(draw(16 * batch), key=lambda example: len(example.ids))
        cut = [examples[i : i + batch] for i in range(0, len(examples), batch)]
        rng.shuffle(cut)
        for rows in cut:
            yield collate(rows, pad, weight)


def weighted_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross entropy of ``logits`` [rows, tokens, vocabulary] under the batch's token weights."""
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return (losses * batch.weights.flatten()).sum() / batch.weights.sum()


def new_model(tokenizer: PreTrainedTokenizerFast, config: PretrainConfig, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama of the demo's size with tied embeddings."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _drawer(tokenizer: PreTrainedTokenizerFast, config: PretrainConfig, seed: int) -> Callable[[int], list[Example]]:
    rng = random.Random(f"pretrain:{seed}")
    weights = [task.weight for task in tasks.TASKS]

    def draw(count: int) -> list[Example]:
        rows = []
        skills = []
        for index in rng.choices(range(len(weights)), weights, k=count):
            kind = rng.random()
            plain = kind < config.chat + config.small_talk
            if kind < config.small_talk:
                rows.append(tasks.small_talk_row(rng))
            elif plain:
                rows.append(tasks.chat_row(tasks.TASKS[index], rng))
            else:
                rows.append(tasks.foreign_row(tasks.TASKS[index], rng))
            skills.append(-1 if plain else index)
        examples = encode(tokenizer, rows, skills)
        return [spell_some(tokenizer, e, rng) if rng.random() < 0.15 else e for e in examples]

    return draw


def _cue(batch: Batch, table: Tensor, generator: torch.Generator) -> Tensor:
    """The hidden cue of each token, [rows, tokens, hidden].

    Strength, the tokens that carry it and a weaker cue of some other skill are all random, so that the skills answer
    to any partial, mixed or scaled cue: an adapter will never reproduce a cue exactly, nor will a weighted mixture.
    """
    rows, width = batch.ids.shape
    has = (batch.skill >= 0).float()[:, None]
    strength = torch.empty(rows, 1).uniform_(0.4, 1.4, generator=generator)
    other_skill = torch.randint(0, len(table), (rows,), generator=generator)
    share = torch.rand(rows, 1, generator=generator)
    leak = (share - 0.6).clamp(min=0.0) * 1.25 * (torch.rand(rows, 1, generator=generator) + 0.2).clamp(max=1.0)
    vector = table[batch.skill.clamp(min=0)] + leak * table[other_skill]
    # Three rows in four: a random part of the instruction; the others: every token from the first to the last.
    keep = (torch.rand(rows, width, generator=generator) < torch.rand(rows, 1, generator=generator) + 0.25).float()
    everywhere = (torch.rand(rows, 1, generator=generator) < 0.2).float()
    mask = everywhere + (1 - everywhere) * batch.instruction * keep
    return (mask * has * strength)[..., None] * vector[:, None, :]


def _topic_loss(
    model: LlamaForCausalLM, states: tuple[Tensor, ...], anchors: Tensor, batch: Batch, config: PretrainConfig
) -> Tensor:
    """Cross entropy of telling what the words ask for, read from the inputs of some layers' projections.

    The readout is a cosine with fixed ``anchors`` [topics, hidden], so what the prompt asks for becomes a large part
    of these states and not a trace of them; a language model of ordinary size has this from its training text.
    """
    total = torch.zeros(())
    for index in config.topic_layers:
        inputs = nn.functional.normalize(model.model.layers[index].input_layernorm(states[index]), dim=-1)
        logits = config.topic_sharpness * inputs @ anchors.T
        targets = batch.topic[:, None].expand(logits.shape[:2]).flatten()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE, reduction="none")
        total = total + (losses * batch.prompt.flatten()).sum() / batch.prompt.sum()
    return total / len(config.topic_layers)


def pretrain(
    tokenizer: PreTrainedTokenizerFast,
    config: PretrainConfig,
    seed: int,
    report: Callable[[str], None] = print,
) -> LlamaForCausalLM:
    """Pre-train the base model from scratch and return it in evaluation mode, without the cue vectors."""
    model = new_model(tokenizer, config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    table = nn.Parameter(torch.randn(len(tasks.TASKS), config.hidden, generator=generator) * 0.03)
    anchors = torch.linalg.qr(torch.randn(config.hidden, len(TOPICS), generator=generator))[0].T.contiguous()
    embedding = model.get_input_embeddings()
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    muon = Muon(matrices, config.muon_rate)
    adam = torch.optim.AdamW(
        [{"params": [embedding.weight, table]}, {"params": vectors}],
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    stream = batches(_drawer(tokenizer, config, seed), config.batch, tokenizer.pad_token_id, config.prompt_weight, seed)
    model.train()
    start = time.monotonic()
    smooth = 0.0
    for step in range(config.steps):
        batch = next(stream)
        remaining = 0.5 * (1 + math.cos(math.pi * step / config.steps))
        scale = min(1.0, (step + 1) / config.warmup) * (0.02 + 0.98 * remaining)
        for group in adam.param_groups:
            group["lr"] = config.learning_rate * scale
        muon.rate = config.muon_rate * scale
        inputs = embedding(batch.ids) + _cue(batch, table, generator)
        output = model(inputs_embeds=inputs, use_cache=False, output_hidden_states=True)
        loss = weighted_loss(output.logits, batch)
        topic = _topic_loss(model, output.hidden_states, anchors, batch, config)
        torch.autograd.backward(loss + config.topic_weight * topic)
        muon.step()
        adam.step()
        adam.zero_grad()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            wrong = (output.logits.argmax(-1) != batch.labels) & (batch.weights == 1.0)
            right = 1 - wrong.any(-1)[batch.skill >= 0].float().mean().item()
            numbers = f"loss {smooth:.3f} cued rows right {right:.2f} topic {topic.item():.3f}"
            report(f"pretrain step {step + 1}/{config.steps} {numbers} {time.monotonic() - start:.0f}s")
    return model.eval()
