"""The demonstration's data: scikit-learn's handwritten digits as a labelled image data set with two splits.

The images come with scikit-learn: nothing is downloaded. Writes nothing, and neither resizes nor augments:
those are the teacher's and the student's business.
"""

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import PipelineError

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_TEST_IMAGES = 500  # of 1797
_MAX_VALUE = 16  # each pixel counts the inked ones of a 4x4 block of the scan


def load_digits_splits() -> datasets.DatasetDict:
    """Load the 1797 digits, divided by a permutation that never changes.

    Returns:
        Splits `train` (1297 images) and `test` (500), each with the columns `image` (8-bit grey, 8x8 px) and
        `label` (ten classes, `zero` to `nine`).

    Raises:
        PipelineError: scikit-learn is not installed.
    """
    try:
        # Here and not above: scikit-learn belongs to an extra.
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise PipelineError(
            "demo needs scikit-learn, which is not installed: pip install 'clip-embed-kd[demo]'"
        ) from error
    digits = load_digits()
    pixels = np.rint(digits.images * 255 / _MAX_VALUE).astype(np.uint8)  # (1797, 8, 8)
    label = datasets.ClassLabel(names=list(CLASS_NAMES))
    features = datasets.Features({"image": datasets.Image(), "label": label})

    def split(rows: NDArray[np.int64]) -> datasets.Dataset:
        columns = {
            "image": [Image.fromarray(grey) for grey in pixels[rows]],
            "label": digits.target[rows].tolist(),
        }
        return datasets.Dataset.from_dict(columns, features=features)

    # The shipped teacher was trained on `train`: another order would let it see test images.
    order = np.random.default_rng(0).permutation(len(pixels))
    return datasets.DatasetDict(train=split(order[:-NUM_TEST_IMAGES]), test=split(order[-NUM_TEST_IMAGES:]))
