"""The loss on conversations: the parts of a batch add up, only the generator learns, and it learns."""

import pytest
import torch
from families import talking
from tiny import assert_parts_add_up

from prosg_lib.config.sizes import ConversationCurriculum
from prosg_lib.generators.normalised import NormalisedTokenGenerator
from prosg_lib.tasks.conversations import READING, Conversation, Question, chat, conversation_batch
from prosg_lib.training.conversation_objective import conversation_objective

SAID = [
    Conversation("My pet is a parrot.", (Question("What is my pet?", ("parrot.",)),)),
    Conversation("I live in Oslo. I am Ada.", (Question("Town?", ("Oslo.",)), Question("Name?", ("Ada.",)))),
    Conversation("It rains.", (Question("Weather?", ("rain.",)),)),
]
CURRICULUM = ConversationCurriculum(easy=0, teacher=0.5, local=0.5, locality=2.0)


@pytest.fixture
def lm():
    return talking()


@pytest.fixture
def generator(lm):
    torch.manual_seed(0)
    made = NormalisedTokenGenerator(lm, 3, 24, ("o_proj", "down_proj"))
    for p in made.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return made.eval()


def batch_of(lm, form=READING):
    return conversation_batch(lm.tokenizer, form, SAID, torch.arange(36).view(3, 12).tolist())


@pytest.mark.parametrize("step", [0, 8, 9])
@pytest.mark.parametrize("size", [1, 2])
def test_parts_add_up(lm, generator, step, size):
    loss_of = conversation_objective(lm, generator, CURRICULUM, 10)
    assert_parts_add_up(loss_of, step, batch_of(lm), size, generator.parameters(), rtol=1e-3, atol=1e-5)


def test_what_counts_when(lm, generator):
    """Right answers and the prompted model always; prose at every second of the last steps; no teacher, none of it."""
    batch = batch_of(lm)
    loss_of = conversation_objective(lm, generator, CURRICULUM, 10)
    early, late, between = (loss_of(step, batch) for step in (4, 5, 6))
    assert early.parts.keys() == between.parts.keys() == {"answer", "teacher", "prompted", "right"}
    assert late.parts.keys() == {"answer", "teacher", "prompted", "locality", "right"}
    assert late.parts["answer"] != early.parts["answer"] == between.parts["answer"]  # 5: behind prose
    parts = {name: part.detach() for name, part in late.parts.items()}
    assert late.total.item() == pytest.approx(
        (parts["answer"] + 0.5 * parts["teacher"] + 2 * parts["locality"]).item(), rel=1e-5
    )
    alone = conversation_objective(lm, generator, ConversationCurriculum(teacher=0, local=1), 10)
    assert alone(0, batch).parts.keys() == {"answer", "right"}
    assert loss_of(0, batch_of(lm, chat(lm.tokenizer))).parts.keys() == {"answer", "right"}


def test_the_loss_of_an_answer_is_that_of_its_question_alone(lm, generator):
    """Padding and other questions change nothing: the mean over all tokens of answers, one conversation at a time."""
    loss_of = conversation_objective(lm, generator, ConversationCurriculum(teacher=0.5, local=1), 10)
    total = count = 0.0
    for said in SAID:
        for question in said.questions:
            one = conversation_batch(lm.tokenizer, READING, [Conversation(said.prompt, (question,))], [[1, 2]])
            tokens = int(one.answer.sum())
            total, count = total + loss_of(0, one).total.detach() * tokens, count + tokens
    assert loss_of(0, batch_of(lm)).total.item() == pytest.approx((total / count).item(), rel=1e-4)


def test_it_learns(lm, generator):
    """With the model frozen and the window empty, a few steps on three prompts lower the loss."""
    batch, loss_of = batch_of(lm), conversation_objective(lm, generator, ConversationCurriculum(teacher=0), 10)
    optimiser = torch.optim.Adam(generator.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss = loss_of(0, batch).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert all(p.grad is None for p in lm.parameters())
