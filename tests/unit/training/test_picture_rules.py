"""What [data] says of all pictures."""

from torchtitan_flux.data.transforms import PictureRules
from torchtitan_flux.startup.load_config import read_config
from torchtitan_flux.training.data import picture_rules


def rules(*arguments: str) -> PictureRules:
    return picture_rules(read_config(list(arguments)))


def test_every_key_arrives():
    assert rules() == PictureRules((255, 255, 255), 8, False)
    changed = rules(
        *("--data.background", "1", "2", "3"),
        *("--data.min_image_size", "5", "--data.color_profiles", "srgb"),
    )
    assert changed == PictureRules((1, 2, 3), 5, True)
