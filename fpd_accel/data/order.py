"""People of one image next to each other, in an order that is otherwise as random as before."""

import numpy as np
from jaxtyping import Int


def by_image(order: Int[np.ndarray, " person"], images: Int[np.ndarray, " person"]) -> Int[np.ndarray, " person"]:
    """A permutation of people, those of one image in a row and in the order that they had.

    ``images[k]`` is the image of person k. An image stands where the first of its people as stored stood: where the
    first of them in ``order`` stands would bring images of many people early in every epoch.
    """
    position = np.empty_like(order)
    position[order] = np.arange(len(order), dtype=order.dtype)
    _, first, image = np.unique(images, return_index=True, return_inverse=True)
    return order[np.argsort(position[first][image][order], kind="stable")]
