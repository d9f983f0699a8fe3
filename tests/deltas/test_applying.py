"""Deltas and compiled code: `torch.compile` ignores hooks that are added to a module later."""

import pytest
import torch
from checks import assert_same_change, random_delta, token_generator
from torch.testing import assert_close

from prosg_lib.errors import UserError


def test_a_compiled_model_has_the_change_or_refuses_it(make_lm, prompts):
    """Compiled parts run as written while there are hooks; a model that is compiled whole refuses the change, and the
    remedy of the message is the changed model."""
    lm = make_lm(layers=1).requires_grad_(False)
    ids, delta, generator = torch.tensor([prompts[0]]), random_delta(lm, 1), token_generator(lm)
    plain, changed, learnt = lm(ids)[0], lm(ids, None, delta)[0], generator.memorize(lm, prompts)
    assert not torch.allclose(plain, changed, atol=1e-3)
    whole = torch.compile(lm, backend="eager")
    lm.blocks[0].compile(backend="eager")
    assert_close(lm(ids)[0], plain)
    assert_close(lm(ids, None, delta)[0], changed)
    assert_same_change(generator.memorize(lm, prompts), learnt)
    assert_close(whole(ids)[0], plain)
    with pytest.raises(UserError, match=r"`with torch.compiler.set_stance\(\"force_eager\"\):`"):
        whole(ids, None, delta)
    with torch.compiler.set_stance("force_eager"):
        assert_close(whole(ids, None, delta)[0], changed)
    assert_close(whole(ids)[0], plain)
