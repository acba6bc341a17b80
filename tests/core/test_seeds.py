"""Seeds are read and written without loss, an image's noise is its own, and batches do not know the ranks."""

import pytest
import torch

from neon_core.seeds import PerImageRandom, deal, derive_seed, format_seeds, global_batches, parse_seeds
from neon_files.errors import UserError


@pytest.mark.parametrize(
    "text, seeds", [("0-3,7,5-6", [0, 1, 2, 3, 7, 5, 6]), (" 4, 4 ", [4, 4]), ("9-7", []), ("3-3", [3])]
)
def test_lists_keep_order_and_repeats(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "1--2", "-3", "1;2", "1.5", "0-9,x"])
def test_what_is_not_a_seed_is_named(text):
    with pytest.raises(UserError, match="neither a number nor a range"):
        parse_seeds(text)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("4294967296", "4294967296 is beyond 4294967295"),
        ("0-3,4294967290-4294967296", "is beyond 4294967295"),
        ("9" * 5000, "is beyond 4294967295"),
        ("0-4000000000", "4000000001 of them; name at most 16777216"),
        (",".join(["0-9999999"] * 2), "20000000 of them"),
    ],
)
def test_seeds_that_repeat_others_or_fill_the_memory_are_refused(text, problem):
    with pytest.raises(UserError, match=problem):
        parse_seeds(text)
    assert parse_seeds("0" * 30 + "7,4294967295") == [7, 4294967295]


@pytest.mark.parametrize("seeds", [[0, 1, 2, 7], [5], [3, 2, 1], [1, 1, 2], list(range(100)), []])
def test_written_lists_are_read_back(seeds):
    text = format_seeds(seeds)
    assert (parse_seeds(text) if text else []) == seeds


def test_noise_does_not_depend_on_batch_neighbours():
    together = PerImageRandom([5, 9, 2])
    alone = PerImageRandom([9])
    for draw in (lambda r: r.randn(3, 4), lambda r: r.exponential(7), lambda r: r.randint(1000), lambda r: r.rand(2)):
        assert torch.equal(draw(together)[1], draw(alone)[0])


def test_seeds_are_taken_modulo_two_to_the_32():
    assert torch.equal(PerImageRandom([(1 << 32) + 17]).randn(4), PerImageRandom([17]).randn(4))


@pytest.mark.parametrize("num_images, batch_size", [(41, 4), (4, 64), (1, 1), (12, 4)])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_image_is_dealt_exactly_once(num_images, batch_size, ranks):
    batches = global_batches(num_images, batch_size)
    dealt = [b for rank in range(ranks) for b in deal(len(batches), rank, ranks)]
    assert sorted(i for b in dealt for i in batches[b]) == list(range(num_images))


def test_batches_done_are_not_dealt_again():
    assert sorted(deal(6, 0, 2, finished=[1, 4]) + deal(6, 1, 2, finished=[1, 4])) == [0, 2, 3, 5]


def test_derived_seeds_differ_in_every_part():
    seeds = {derive_seed("micro batch", a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125 and all(0 <= s < 2**63 for s in seeds)
