"""Does the model draw the digit that was asked for, and does it draw digits of its own?

A reader (support vector classifier) is fitted on the 360 held-out digits, which the model's
training never saw, and reads the generated ones. Two figures guard against copying and against
drawing one digit for ever: the distance to the nearest training image, and the spread of pixels
within a class, both against real digits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import cdist
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC
from torch import Tensor

from torchtitan_flux.config.job_config import FluxJobConfig
from torchtitan_flux.data.sources.digits import DIGIT_WORDS, load_digit_arrays
from torchtitan_flux.model import FluxModelArgs
from torchtitan_flux.sampling.generate import SampleSettings
from torchtitan_flux.startup.model_args import sample_guidance

PIXELS = 64
INK = 16.0  # scikit-learn's digits run from 0 to 16
FOLDS = 5


@dataclass(frozen=True)
class DigitScore:
    """What was found of `count` digits, and of real ones.

    Attributes:
        read: share that the reader reads as prompted.
        nearest, nearest_real: median distance to the nearest training image; of held-out digits.
        spread, spread_real: standard deviation of pixels within a class, mean over pixels and
            classes; of training digits.
    """

    count: int
    read: float
    nearest: float
    nearest_real: float
    spread: float
    spread_real: float

    @property
    def line(self) -> str:
        """What the default run ends with."""
        return f"score: {100 * self.read:.1f} % of {self.count} digits read as prompted"


def score_prompts(count: int) -> tuple[list[str], np.ndarray]:
    """`count` prompts that go round the ten digits, and their labels."""
    labels = np.arange(count) % len(DIGIT_WORDS)
    return [f"a handwritten {DIGIT_WORDS[label]}" for label in labels], labels


def score_settings(
    config: FluxJobConfig, args: FluxModelArgs, cfg: float | None = None
) -> SampleSettings:
    """How the judged digits are drawn; `cfg` replaces score.classifier_free_guidance_scale."""
    score = config.score
    return SampleSettings(
        size=config.training.image_size,
        steps=score.denoising_steps,
        cfg=score.classifier_free_guidance_scale if cfg is None else cfg,
        guidance=sample_guidance(config, args),
    )


def reader() -> SVC:
    """The classifier, not yet fitted; gamma is the one of scikit-learn's digits example."""
    return SVC(gamma=0.001, C=10.0)  # type: ignore[arg-type]


def reader_accuracy() -> float:
    """The reader's own accuracy on real digits: 5-fold over the held-out ones."""
    images, labels = load_digit_arrays("held_out")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    return float(cross_val_score(reader(), images.reshape(-1, PIXELS), labels, cv=folds).mean())


def score_digits(
    images: Float[Tensor, "n 1 8 8"], labels: Sequence[int] | np.ndarray
) -> DigitScore:
    """Judge generated digits, in [-1, 1], by what each was prompted to be, 0 to 9.

    Raises:
        ValueError: when the images are not 8 x 8 with one channel.
    """
    if tuple(images.shape[1:]) != (1, 8, 8):
        raise ValueError(f"the reader reads 1 x 8 x 8 digits, not {tuple(images.shape[1:])}")
    drawn = ((images.numpy().reshape(-1, PIXELS) + 1) / 2 * INK).clip(0, INK)
    labels = np.asarray(labels)
    train, train_labels = load_digit_arrays("train")
    held_out, held_out_labels = load_digit_arrays("held_out")
    train, held_out = train.reshape(-1, PIXELS), held_out.reshape(-1, PIXELS)
    read_as = reader().fit(held_out, held_out_labels).predict(drawn)
    return DigitScore(
        count=len(drawn),
        read=float((read_as == labels).mean()),
        nearest=_median_nearest(drawn, train),
        nearest_real=_median_nearest(held_out, train),
        spread=_spread(drawn, labels),
        spread_real=_spread(train, train_labels),
    )


def _median_nearest(images: np.ndarray, among: np.ndarray) -> float:
    return float(np.median(cdist(images, among).min(axis=1)))


def _spread(images: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([images[labels == label].std(axis=0).mean() for label in set(labels)]))
