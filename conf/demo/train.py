"""Train the demo model: a tiny Llama that adds two integers (0..999) asked as a chat.

The demo needs a model and a dataset that are small enough to be committed, that run on one CPU core and
whose generations can be marked right or wrong. So this script makes its own data, trains on it, and writes,
next to itself,

- `model/`: a Hugging Face checkpoint (float32) with its tokenizer and chat template, and
- `questions.jsonl`: held-out questions, with columns `id`, `question` and `answer`.

The model answers "What is 347 + 586?" with "347 + 586 = 933": the last integer of the text is its answer.
It knows this one wording, asked in a single turn. Everything is drawn from one seed and computed on one
thread, so a rerun on the same machine with the same versions writes the same bytes. It takes some 8 minutes.

    python conf/demo/train.py
"""

import argparse
import json
import os
import re
import time
from pathlib import Path

# One thread each: it keeps the run reproducible, and polite on a shared machine.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
SEED = 0
BATCH_SIZE = 128
LEARNING_RATE = 3e-3
NUM_QUESTIONS = 512
IGNORED = -100  # the label that transformers' loss skips

# An operand is drawn below 10, 100 or 1000, with these weights. Small ones are rare because there are few of
# them: holding out many of the 100 one-digit sums would leave too few to learn them from.
OPERAND_LIMITS = torch.tensor([10, 100, 1000])
OPERAND_WEIGHTS = torch.tensor([0.1, 0.3, 0.6])

SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    # Better refused than rendered: having seen none in training, the model would answer with nonsense.
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('the demo model knows only the roles user and assistant') }}"
    "{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Pair = tuple[int, int]


def question_text(pair: Pair) -> str:
    return f"What is {pair[0]} + {pair[1]}?"


def answer_text(pair: Pair) -> str:
    # Repeating the operands first reads well, and brings their digits close to where the sum is written.
    return f"{pair[0]} + {pair[1]} = {sum(pair)}"


def last_integer(text: str) -> str | None:
    integers = re.findall(r"\d+", text)
    return integers[-1] if integers else None


def draw_pairs(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `count` pairs of operands, as a tensor of shape (count, 2)."""
    sizes = torch.multinomial(OPERAND_WEIGHTS, 2 * count, replacement=True, generator=generator)
    limits = OPERAND_LIMITS[sizes]
    return (torch.rand(2 * count, generator=generator) * limits).long().view(count, 2)


def hold_out_pairs(generator: torch.Generator) -> tuple[list[Pair], torch.Tensor]:
    """Choose the held-out pairs; return them with a table that is True at every pair kept from training."""
    pairs: dict[Pair, None] = {}  # a dict, and not a set, to keep the order of the draws
    while len(pairs) < NUM_QUESTIONS:
        first, second = draw_pairs(1, generator)[0].tolist()
        if (second, first) not in pairs:
            pairs[first, second] = None

    held_out = torch.zeros(1000, 1000, dtype=torch.bool)
    first, second = torch.tensor(list(pairs)).T
    held_out[first, second] = True
    held_out[second, first] = True  # a + b would give b + a away
    return list(pairs), held_out


def draw_training_pairs(held_out: torch.Tensor, generator: torch.Generator) -> list[Pair]:
    """Draw a batch of pairs, none of them held out."""
    pairs = draw_pairs(2 * BATCH_SIZE, generator)  # twice what is needed, as some are rejected
    # Where tens add up to 9 the carry comes from the units: the hardest sums, so a quarter is made of them.
    hard = pairs[::4]
    hard[:, 1] += 10 * (9 - (hard // 10 % 10).sum(dim=1))
    allowed = pairs[~held_out[pairs[:, 0], pairs[:, 1]]]
    return [(first, second) for first, second in allowed[:BATCH_SIZE].tolist()]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer: single digits, the words of the chats whole, any other text as bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([question_text((0, 0)), answer_text((0, 0))], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,  # heads of 32: the smallest that vLLM's attention takes on CPU
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    # Greedy as transformers and vLLM both read it: vLLM knows no do_sample and would draw at temperature 1.
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=1,
        max_new_tokens=32,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def encode_batch(tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn pairs into the token ids of whole chats and the labels: the assistant's tokens only."""
    chats = [
        [
            {"role": "user", "content": question_text(pair)},
            {"role": "assistant", "content": answer_text(pair)},
        ]
        for pair in pairs
    ]
    # Padding on the right (the default) needs no attention mask: causal attention never looks at it.
    encoded = tokenizer.apply_chat_template(chats, padding=True, return_dict=True, return_tensors="pt")
    input_ids = encoded["input_ids"]
    header = input_ids == tokenizer.convert_tokens_to_ids("<|assistant|>")
    is_reply = (header.cumsum(dim=1) > 0) & ~header & (input_ids != tokenizer.pad_token_id)
    return input_ids, input_ids.where(is_reply, IGNORED)


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held_out: torch.Tensor,
    steps: int,
    generator: torch.Generator,
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(1, steps + 1):
        input_ids, labels = encode_batch(tokenizer, draw_training_pairs(held_out, generator))
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            elapsed = time.monotonic() - started
            print(f"step {step}/{steps}  loss {loss.item():.5f}  {elapsed:.0f} s", flush=True)


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[Pair]) -> float:
    """Answer the questions greedily; return the share whose last integer is the right sum."""
    chats = [[{"role": "user", "content": question_text(pair)}] for pair in pairs]
    prompts = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},  # so that every reply starts at the same index
    )
    model.eval()
    outputs = model.generate(input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"])
    replies = tokenizer.batch_decode(outputs[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(last_integer(reply) == str(sum(pair)) for reply, pair in zip(replies, pairs, strict=True))
    return right / len(pairs)


def write_questions(path: Path, pairs: list[Pair]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index, pair in enumerate(pairs):
            row = {"id": f"sum-{index:03d}", "question": question_text(pair), "answer": str(sum(pair))}
            file.write(json.dumps(row) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model and write it with its questions.")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: next to this file)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)

    held_out_pairs, held_out = hold_out_pairs(generator)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_questions(arguments.out / "questions.jsonl", held_out_pairs)

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, tokenizer, held_out, arguments.steps, generator)

    model.save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model", save_jinja_files=False)
    print(f"held-out accuracy: {accuracy(model, tokenizer, held_out_pairs):.2%}")


if __name__ == "__main__":
    main()
