"""Autoencoders: what is drawn, what is compared, and what is refused."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from cv_jax.config.base import base_config
from cv_jax.config.errors import UserError
from cv_jax.data import load_dataset
from cv_jax.data.batches import make_batches
from cv_jax.learn.losses import squared_error
from cv_jax.models import build_model
from cv_jax.models.autoencoder import Autoencoder
from cv_jax.models.ops import plain_lax
from cv_jax.runtime.keys import derive_keys
from cv_jax.runtime.mesh import make_mesh, replicated
from cv_jax.runtime.startup import jit_once
from cv_jax.tasks import build_task
from cv_jax.tasks.autoencoder import denoise, masked
from cv_jax.train.programs import try_step
from tests.conftest import batch_shapes, random_dataset


def _config(**changes) -> ml_collections.ConfigDict:
    config = base_config()
    config.task = "autoencoder"
    config.method = "denoise(latent=16, widths=(16, 8))"
    config.model = "n94(widths=(8,))"
    config.batch_size = 50
    config.steps = 30
    config.data.limit = 250
    config.optim.name = "adamw"
    config.optim.lr = 0.01
    config.optim.lr_batch_size = 0
    config.update(changes)
    return config.lock()


def _model(model, latent=12, widths=(8, 6)):
    return Autoencoder(build_model(model, 0, jnp.float32), latent, widths)


@pytest.mark.parametrize("model", ["n94", "resnet18"])
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3), (7, 13, 3), (2, 2, 1)])
def test_images_are_drawn_in_their_own_shape(model, shape):
    model, images = _model(model), jnp.zeros((2, *shape))

    def draw():
        variables = model.init(jax.random.key(0), images, train=False)
        return model.apply(variables, images, train=False)

    with plain_lax():
        drawn, features = jax.eval_shape(draw)
    assert drawn.shape == (2, *shape)
    assert features["latent"].shape == (2, 12)
    assert features["pooled"].ndim == 2
    assert {x.dtype for x in (drawn, *features.values())} == {jnp.dtype(jnp.float32)}


def test_parameters_are_as_many_as_counted_by_hand():
    model = _model("n94(widths=(8,))")
    with plain_lax():
        variables = jax.eval_shape(
            lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
        )
    counts = {
        name: sum(x.size for x in jax.tree.leaves(part))
        for name, part in variables["params"].items()
    }
    assert counts == {
        # 2x2 filters of 1 channel and their biases; 3x3 convolutions, each with its norm's bias
        "backbone": (2 * 2 * 8 + 8) + 2 * (3 * 3 * 8 * 8 + 8),
        "latent": 3 * 3 * 8 * 12 + 12,  # 8x8 are 7x7 after 2x2 filters, and 3x3 after a pool
        "start": 12 * 4 * 4 * 8 + 4 * 4 * 8,
        "conv1": 3 * 3 * 8 * 6,
        "norm1": 2 * 6,
        "image": 3 * 3 * 6 * 1 + 1,
    }


def test_masked_hides_squares_and_compares_them_alone():
    method = masked(patch=3, share=0.25)
    image = jax.random.uniform(jax.random.key(1), (300, 8, 7, 2), minval=1.0, maxval=2.0)
    damaged, weight = map(np.array, method.damage(jax.random.key(0), image))
    hidden = damaged[..., 0] == 0
    np.testing.assert_array_equal(hidden, damaged[..., 1] == 0)
    np.testing.assert_array_equal(damaged[~hidden], image[~hidden])
    np.testing.assert_array_equal(weight[..., 0] > 0, hidden)
    # Squares are whole, but where the image ends; 300 images of 9 squares: 0.25 +- 3 * 0.008.
    corners = hidden[:, ::3, ::3]
    np.testing.assert_array_equal(hidden, corners.repeat(3, 1).repeat(3, 2)[:, :8, :7])
    assert abs(corners.mean() - 0.25) < 0.025
    some = hidden.any((1, 2))
    np.testing.assert_allclose(weight.mean((1, 2, 3)), some, rtol=1e-5)

    wrong = np.where(hidden[..., None], np.float32(0), np.float32(9))
    np.testing.assert_array_equal(squared_error(image + wrong, image, weight), np.zeros(300))
    half = np.where(hidden[..., None], np.float32(0.5), np.float32(9))
    np.testing.assert_allclose(squared_error(image + half, image, weight), some / 4, rtol=1e-4)


def test_denoise_adds_its_noise_and_compares_every_pixel():
    image = jnp.ones((20, 8, 8, 3))
    damaged, weight = denoise(std=0.5).damage(jax.random.key(0), image)
    np.testing.assert_array_equal(weight, np.ones((20, 8, 8, 1)))
    noise = np.asarray(damaged - image)
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 0.5) < 0.03
    np.testing.assert_array_equal(denoise().damage(jax.random.key(0), image)[0], image)


@pytest.mark.slow
def test_the_loss_falls_and_what_is_drawn_comes_close():
    config = _config(method="masked(patch=2, latent=16, widths=(16, 8))")
    data = load_dataset(config.data)
    task = build_task(config, data.spec)
    keys = derive_keys(0)
    mesh = make_mesh()
    batches = make_batches(config, data.train, keys.order, mesh)

    @jit_once
    def step(state, feed):
        batch = batches.pick(feed, state.step)
        return task.train_step(state, batch, jax.random.fold_in(keys.step, state.step))

    with plain_lax():
        init = jit_once(task.init, out_shardings=replicated(mesh))  # as after a step
        state, losses = init(keys.init), []
        for i in range(config.steps):
            state, metrics = step(state, batches.feed(i, 1))
            assert metrics["loss"][1] == 50
            losses.append(metrics["loss"][0] / 50)
        images = data.test["image"]
        drawn = jit_once(task.features)(state, {"image": images})["reconstruction"]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    assert drawn.shape == images.shape
    unit = images / np.float32(255)
    mean_image = data.spec.fields["image"].mean[None, None, None]
    assert ((drawn - unit) ** 2).mean() < 0.6 * ((mean_image - unit) ** 2).mean()


def _refused(config, what):
    spec = random_dataset().spec
    shapes = batch_shapes(50)
    with pytest.raises(UserError, match=what) as refused, plain_lax():
        try_step(build_task(config, spec), shapes, make_mesh())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"augment": "random_resized_crop(size=6)"},
            r"^config\.augment='random_resized_crop\(size=6\)' changes the images from "
            r"\(8, 8, 1\) to \(6, 6, 1\): an autoencoder "
            r"needs an augmentation that keeps the shape\.",
        ),
        (
            {"progressive_resizing": "size(6, until=0.5)"},
            r"^config\.progressive_resizing='size\(6, until=0\.5\)' has no effect on config\.task",
        ),
        ({"method": ""}, r"config\.method '': expected one of denoise, masked"),
        ({"method": "mask"}, r"config\.method 'mask'\. Did you mean 'masked'\?"),
        ({"method": "masked(share=1.0)"}, r"share=1\.0 must lie between 0 and 1"),
        ({"method": "masked(patch=0)"}, r"patch=0 must be 1 or more pixels"),
        ({"method": "denoise(std=-0.1)"}, r"std=-0\.1 must be 0 or more"),
        ({"method": "denoise(latent=0)"}, r"each from 1 to"),
        (
            {"label_smoothing": 0.1},
            r"^config\.label_smoothing=0\.1 has no effect on config\.task='autoencoder'",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(changes, what):
    _refused(_config(**changes), what)


def test_a_model_without_a_feature_map_is_described():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return x[:, 0, 0, :0], {"pooled": x.mean((1, 2))}

    model = Autoencoder(Flat(), 12, (8, 6))
    message = r"Flat\.__call__ returned the features \{'pooled': float32 \(1, 3\)\}\. Add a"
    with pytest.raises(UserError, match=message):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
