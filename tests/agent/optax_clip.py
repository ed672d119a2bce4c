"""optax's ``adaptive_grad_clip`` as a program: JAX warns in every later fork, so no test loads it in its own process.

``python optax_clip.py given.npz clipped.npz``: reads ``clip`` and, for each case, ``grad/NAME`` and ``weight/NAME``;
writes the clipped gradients by name. The case's name ends in ``/DIMS``, the dims that are reduced, or in ``/`` where
optax chooses them by rank.
"""

import sys

import jax
import numpy as np
import optax
from numpy.typing import NDArray


def main(given: str, clipped: str) -> None:
    """Clip every case of ``given``; one program for all, since JAX compiles each shape anew."""
    jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]
    data = np.load(given)
    names = [name.removeprefix("grad/") for name in data.files if name.startswith("grad/")]

    def clip(grads: dict[str, jax.Array], weights: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: _clip(name, grads[name], weights[name], float(data["clip"])) for name in grads}

    made = jax.jit(clip)(
        {name: jax.numpy.asarray(data[f"grad/{name}"]) for name in names},
        {name: jax.numpy.asarray(data[f"weight/{name}"]) for name in names},
    )
    arrays: dict[str, NDArray[np.generic]] = {name: np.asarray(array) for name, array in made.items()}
    np.savez(clipped, allow_pickle=False, **arrays)


def _clip(name: str, grad: jax.Array, weight: jax.Array, clip: float) -> jax.Array:
    dims = name.rpartition("/")[2]
    axis = tuple(map(int, dims.split(","))) if dims else None
    rule = optax.adaptive_grad_clip(clip, eps=1e-3, axis=axis)
    updated, _ = rule.update(grad, rule.init(weight), weight)
    return jax.numpy.asarray(updated)


if __name__ == "__main__":
    main(*sys.argv[1:])
