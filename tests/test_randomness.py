from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sslkit import randomness

keys = st.tuples(st.integers(0, 2**40), st.sampled_from(["order", "views", "step", "backbone"]), st.integers(0, 2**40))


def test_keys_are_the_same_on_every_machine_and_in_every_version() -> None:
    assert randomness.key(0, "views", 0) == 7833348614080372424
    assert randomness.key(7, "order", 12) == 8101294104174977306


@given(keys, keys)
def test_other_arguments_give_other_streams(a: tuple[int, str, int], b: tuple[int, str, int]) -> None:
    same = randomness.key(*a) == randomness.key(*b)
    assert same == (a == b)
    assert 0 <= randomness.key(*a) < 2**63


def test_a_generator_depends_on_nothing_that_was_drawn_before() -> None:
    first = torch.rand(4, generator=randomness.generator(1, "views", 5))
    torch.rand(100)
    assert torch.equal(first, torch.rand(4, generator=randomness.generator(1, "views", 5)))
    assert not torch.equal(first, torch.rand(4, generator=randomness.generator(1, "views", 6)))


def test_a_seeded_block_leaves_the_default_generator_as_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with randomness.seeded(0, "backbone"):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with randomness.seeded(0, "backbone"):
        assert torch.equal(torch.rand(3), inside)


def test_an_undisturbed_process_keeps_its_generator_and_flags_even_where_the_block_fails() -> None:
    before = torch.backends.cudnn.allow_tf32
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)

    def fail() -> None:
        with torch.no_grad(), randomness.undisturbed(torch.device("cpu")):
            torch.manual_seed(7)
            torch.backends.cudnn.allow_tf32 = not before
            assert torch.is_grad_enabled()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert torch.equal(torch.rand(3), expected)
    assert torch.backends.cudnn.allow_tf32 is before
    with torch.inference_mode(), randomness.undisturbed(torch.device("cpu")):
        assert not torch.is_inference_mode_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_generators_of_gpus_are_kept_too() -> None:
    torch.cuda.manual_seed(3)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(3)
    with randomness.undisturbed(torch.device("cuda")):
        torch.manual_seed(7)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
