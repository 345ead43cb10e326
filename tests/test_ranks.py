"""One rank alone: sums are the values, and agreement is one's own error. Several ranks are tested where they run."""

import pytest

from lightning_gym.ranks import Ranks


def test_the_sum_over_one_rank_is_what_it_gave():
    given = [0.1, 2.0]
    assert Ranks().sums(given) == [0.1, 2.0]
    assert Ranks().sums(given) is not given
    assert Ranks().sums([]) == []


def test_one_rank_agrees_with_itself_and_raises_its_own_error():
    Ranks().agree(None)
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        Ranks().agree(error)
    assert caught.value is error


def test_a_rank_alone_is_the_first_of_one_and_starts_no_process_group():
    import torch.distributed as dist

    ranks = Ranks()
    ranks.sums([1.0])
    ranks.agree(None)
    assert (ranks.rank, ranks.size) == (0, 1)
    assert not dist.is_initialized()


def test_one_rank_gathers_its_own_value():
    assert Ranks().gather({"a": 1}) == [{"a": 1}]


def test_what_fails_inside_an_agreement_is_raised_at_its_end():
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught, Ranks().agreeing():
        raise error
    assert caught.value is error
    with Ranks().agreeing():
        pass
    with pytest.raises(KeyboardInterrupt), Ranks().agreeing():
        raise KeyboardInterrupt
