"""A conversation written turn by turn is the conversation that the template writes."""

import pytest

from prosg_lib.errors import UserError
from prosg_lib.text.chat_template import ChatTemplate

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize("source", [SMOLLM2, BOS])
def test_turns_add_up_to_the_conversation(source):
    """What stands in front of a conversation, as a default system prompt, is written once."""
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})
    turns = [("Hi", "Hello."), ("My town is Oslo.", None), ("Which town?", "Oslo."), ("Bye", "Bye.")]
    written, messages, last = "", [], None
    for text, answer in turns:
        messages.append({"role": "user", "content": text})
        if answer is None:
            written += template.statement(text, last)
        else:
            written += template.question(text, last) + template.answered(text, answer, last)
            messages.append({"role": "assistant", "content": answer})
        last = text, answer or ""
    assert written == template._written(messages, begin=False)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('Roles must alternate') }}",
            "chat template fails .*Roles must alternate.*; remove",
        ),
        ("{{ messages[0].content", "chat template fails .*TemplateSyntaxError"),
        ("{{ messages.nothing.at_all }}", "chat template fails .*UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "chat template fails .*SecurityError"),
        (
            "{{ messages | length }}{{ messages[-1].content }}",
            "rewrites what was said before; remove its",
        ),
    ],
)
def test_a_template_that_does_not_work_is_said(source, message):
    with pytest.raises(UserError, match=message):
        ChatTemplate(source, {}).question("Hi", ("a", "b"))
