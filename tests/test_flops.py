import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cv_jax.models import build_model
from cv_jax.train.flops import count_flops


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(x, kernel, strides=1, padding="SAME", groups=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (strides, strides),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def model_flops(text, size, num_classes):
    model = build_model(text, num_classes, jnp.float32)
    image = array(1, size, size, 3)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), image)
    return count_flops(lambda v, x: model.apply(v, x, train=False), variables, image)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "size", "num_classes", "published"),
    [
        # 0.236e9, without the odd rows and columns that no pool would see.
        ("n94", 32, 10, 0.236e9 - 18 * (61 * 24 * 64 + 29 * 64 * 256 + 13 * 256 * 256)),
        # torchvision's multiply-adds; with the stride on the 1x1 convolution it would be 3.86e9.
        ("resnet18(stem='imagenet')", 224, 1000, 2 * 1.814e9),
        ("resnet50(stem='imagenet')", 224, 1000, 2 * 4.089e9),
    ],
)
def test_forward_flops_are_the_published_ones(text, size, num_classes, published):
    assert model_flops(text, size, num_classes) == pytest.approx(published, rel=0.005)


def test_lenet_is_counted_by_hand():
    convolutions = 28 * 28 * 6 * 75 + 10 * 10 * 16 * 150
    assert model_flops("lenet", 32, 10) == 2 * (convolutions + 400 * 120 + 120 * 84 + 84 * 10)


def test_matrix_product_with_batch_dimensions():
    product = "bhik,bhkj->bhij"
    flops = count_flops(
        lambda a, b: jnp.einsum(product, a, b), array(2, 3, 4, 5), array(2, 3, 5, 6)
    )
    assert flops == 2 * (2 * 3 * 4 * 6) * 5


def test_grouped_convolution_meets_the_channels_of_its_group_only():
    flops = count_flops(lambda x, k: conv(x, k, groups=2), array(1, 8, 8, 4), array(3, 3, 2, 6))
    assert flops == 2 * (8 * 8 * 6) * (3 * 3 * 2)


def test_training_step_of_a_stack_without_input_gradient():
    def loss(kernels, x):
        for kernel in kernels:
            x = conv(x, kernel)
        return (x**2).sum()

    kernels = [array(3, 3, 3, 4), array(3, 3, 4, 5), array(3, 3, 5, 6)]
    first, second, third = (2 * 2 * 8 * 8 * 9 * c for c in (3 * 4, 4 * 5, 5 * 6))
    flops = count_flops(jax.value_and_grad(loss), kernels, array(2, 8, 8, 3))
    assert flops == 2 * first + 3 * second + 3 * third


@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize("strides", [2, 3])
@pytest.mark.parametrize("argnum", [0, 1])
def test_each_gradient_of_a_strided_convolution_costs_its_forward(size, strides, argnum):
    x, kernel = array(2, size, size, 3), array(3, 3, 3, 4)
    forward = count_flops(lambda x, k: conv(x, k, strides), x, kernel)
    out = -(-size // strides)
    assert forward == 2 * (2 * out * out * 4) * (3 * 3 * 3)
    gradient = jax.grad(lambda x, k: conv(x, k, strides).sum(), argnum)
    assert count_flops(gradient, x, kernel) == forward  # y itself is not needed for it


def test_gradients_of_a_grouped_convolution_cost_its_forward():
    x, kernel = array(2, 8, 8, 4), array(3, 3, 2, 6)
    forward = count_flops(lambda x, k: conv(x, k, groups=2), x, kernel)
    both = jax.grad(lambda x, k: (conv(x, k, groups=2) ** 2).sum(), (0, 1))
    assert count_flops(both, x, kernel) == 3 * forward


def test_scan_multiplies_and_nested_functions_are_walked():
    @jax.jit
    def step(carry, _):
        return jax.checkpoint(lambda c: jax.nn.relu(c @ c))(carry), None

    def scanned(x):
        return lax.scan(step, x, length=7)[0]

    assert count_flops(scanned, array(4, 4)) == 7 * 2 * 4**3
    assert count_flops(lambda x: lax.fori_loop(0, 5, lambda _, c: c @ c, x), array(4, 4)) == 640


def test_custom_derivatives_are_walked():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x + x @ g,))
    assert count_flops(square, array(4, 4)) == 128
    # The gradient of the sum needs the two products of the backward pass, and not the square.
    assert count_flops(jax.grad(lambda x: square(x).sum()), array(4, 4)) == 2 * 128

    cube = jax.custom_jvp(lambda x: x @ x @ x)
    cube.defjvp(lambda x, dx: (cube(*x), 3 * dx[0] @ x[0] @ x[0]))
    assert count_flops(cube, array(4, 4)) == 2 * 128


def test_a_branch_costs_as_the_dearest_and_a_while_loop_once():
    def branch(flag, x):
        return lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_flops(branch, jax.ShapeDtypeStruct((), jnp.bool), array(4, 4)) == 2 * 128

    def loop(x):
        return lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    assert count_flops(loop, array(4, 4)) == 128


def test_the_default_lowering_counts_on_every_platform():
    def dear(x, y):
        return x @ (y @ y)

    def function(x, y):
        return lax.platform_dependent(x, y, cpu=dear, default=lambda x, y: x @ y)

    assert count_flops(function, jnp.ones((2, 5)), jnp.ones((5, 5))) == 2 * 2 * 5 * 5


def test_vmap_counts_each_example():
    over_images = jax.vmap(lambda x, k: conv(x[None], k), in_axes=(0, 0))
    one = 2 * 8 * 8 * 4 * 27
    assert count_flops(over_images, array(5, 8, 8, 3), array(5, 3, 3, 3, 4)) == 5 * one
