"""A network that gives NaN is an error, never a black image: in every cast, in a set, in an evaluation, in a sweep."""

import pytest
import torch
from core.pico import PicoBackbone

from neon_core.pixels import NotFiniteImages, check_finite
from neon_core.synthetic import generate_set
from neon_edm.sampler import to_uint8 as edm_cast
from neon_imm.latents import RgbCodec, to_pixels
from neon_var.sampler import to_uint8 as var_cast
from neon_xar.vae import to_uint8 as xar_cast

CASTS = {"edm": edm_cast, "var": var_cast, "xar": xar_cast, "imm vae": to_pixels, "imm rgb": RgbCodec(3).decode}


class Failing(PicoBackbone):
    """Gives NaN for some seeds, as a network does that was pushed too far."""

    bad = ()
    sampled = 0

    def sample(self, seeds, labels, **settings):
        self.sampled += len(seeds)
        values = torch.zeros(len(seeds), 3)
        values[[seed in self.bad for seed in seeds]] = float("nan")
        check_finite(values)
        return super().sample(seeds, labels, **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", CASTS)
def test_no_cast_turns_what_is_not_finite_into_a_colour(name, value):
    images = torch.zeros(4, 3, 2, 2)
    images[2, 1, 0, 1] = value
    with pytest.raises(NotFiniteImages) as error:
        CASTS[name](images)
    assert error.value.row == 2
    assert CASTS[name](images[:2]).dtype == torch.uint8


def test_a_set_names_the_seed_and_is_not_finished(tmp_path):
    backbone = Failing.fresh()
    backbone.bad = (13, 14)
    with pytest.raises(NotFiniteImages, match=r"seed 13: .* not finite"):
        generate_set(backbone, range(4, 24), tmp_path, settings={}, batch_size=4, progress=False)
    assert not (tmp_path / "dataset.json").exists() and len(list(tmp_path.rglob("*.png"))) == 8
