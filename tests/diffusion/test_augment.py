import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.augment import SYM6, augment, augment_label, draw_augmentation

TRANSFORMATIONS = {
    "x-flip": {0: 1.0},
    "y-flip": {1: 1.0},
    "scale-up": {2: 2.0},
    "scale-down": {2: -1.5},
    "rotation": {3: 0.6},
    "anisotropy": {4: 0.7, 5: 1.5},
    "translation": {6: 0.55, 7: -0.3},
    "all": {0: 1.0, 1: 1.0, 2: 1.0, 3: 2.0, 4: -1.1, 5: -0.8, 6: 0.4, 7: 0.2},
}
each_transformation = pytest.mark.parametrize("chosen", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS.keys())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(chosen: dict[int, float], batch: int = 1) -> Tensor:
    a = torch.zeros(batch, 8, dtype=torch.float64)
    for index, value in chosen.items():
        a[:, index] = value
    return a


def pixels(side: int) -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels from the image's centre, x right and y UP: [R, R] each."""
    axis = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    y, x = torch.meshgrid(-axis, axis, indexing="ij")
    return x, y


def noise(batch: int = 4, channels: int = 1, side: int = 8) -> Tensor:
    return torch.rand(batch, channels, side, side, generator=generator(1)) * 2 - 1


def smooth(x: Tensor, y: Tensor, side: int) -> Tensor:
    """A picture without symmetry, whose finest wave is half the image long."""
    u, v = 2 * math.pi * x / side, 2 * math.pi * y / side
    return 0.4 * u.sin() + 0.3 * (u + v).cos() + 0.3 * (2 * v + 0.5).sin()


def source_of(chosen: dict[int, float], x: Tensor, y: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The point that the transformation moves to (x, y), y up: each factor of the definition inverted in turn."""
    a0, a1, a2, a3, a4, a5, a6, a7 = parameters(chosen)[0].tolist()

    def turned(x: Tensor, y: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        z = torch.complex(x, y) * complex(math.cos(angle), math.sin(angle))
        return z.real, z.imag

    x, y = x - a6 / 8 * side, y + a7 / 8 * side
    x, y = turned(x, y, -a4)
    x, y = turned(x / 2 ** (0.2 * a5), y * 2 ** (0.2 * a5), a4)
    x, y = turned(x, y, -a3)
    x, y = x / 2 ** (0.2 * a2), y / 2 ** (0.2 * a2)
    return (-x if a0 else x), (-y if a1 else y)


def largest_error(picture: Callable[[Tensor, Tensor], Tensor], chosen: dict[int, float], side: int) -> float:
    """Largest deviation of the augmented picture from its closed form, away from the border."""
    x, y = pixels(side)
    result, _ = augment(picture(x, y)[None, None], parameters(chosen))
    source = source_of(chosen, x, y, side)
    inside = torch.maximum(source[0].abs(), source[1].abs()) < side / 2 - 10  # no filter reaches a reflection
    assert inside.sum() > 30
    return float((result[0, 0] - picture(*source))[inside].abs().max())


def test_the_filter_is_orthonormal_to_its_even_shifts_and_sums_to_sqrt_2() -> None:
    h = torch.tensor(SYM6, dtype=torch.float64)
    assert float(h.sum()) == pytest.approx(math.sqrt(2), abs=1e-11)
    for shift in range(0, len(h), 2):
        assert float((h[shift:] * h[: len(h) - shift]).sum()) == pytest.approx(float(shift == 0), abs=1e-11)


def test_the_label_is_the_published_function_of_the_parameters() -> None:
    a = draw_augmentation(generator(), 50, 0.7)
    label = augment_label(a)
    assert label.shape == (50, 9)
    for row, (a0, a1, a2, a3, a4, a5, a6, a7) in zip(label.tolist(), a.tolist(), strict=True):
        cos, sin = math.cos(a3) - 1, math.sin(a3)
        expected = [a0, a1, a2, cos, sin, a5 * math.cos(a4), a5 * math.sin(a4), a6, a7]
        assert row == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("side", [8, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_unchanged_bit_for_bit_exactly_when_its_label_is_zero(side: int, channels: int) -> None:
    a = draw_augmentation(generator(), 200, 0.1)
    a[0] = torch.tensor([0, 0, 0, 0, 1.3, 0, 0, 0])  # a direction of anisotropy without strength
    images = noise(200, channels, side)
    result, label = augment(images, a)
    unchanged = (result == images).flatten(1).all(1)
    zero = (label == 0).all(1)
    assert torch.equal(unchanged, zero)
    assert zero[0]
    assert 30 < zero.sum() < 100


def test_each_transformation_is_on_at_the_given_rate_and_the_x_flip_is_a_fair_coin() -> None:
    batch_size, p = 40_000, 0.3
    a = draw_augmentation(generator(), batch_size, p)
    assert a.shape == (batch_size, 8)
    assert a.dtype == torch.float32
    assert set(a[:, :2].unique().tolist()) == {0, 1}
    rates = (a != 0).double().mean(0).tolist()
    assert rates == pytest.approx([0.5, p / 2, p, p, p, p, p, p], abs=0.01)
    on = (a[:, 1:] != 0).double()
    assert torch.equal(on[:, 3], on[:, 4])  # direction and strength together
    assert torch.equal(on[:, 5], on[:, 6])  # both axes together
    correlation = torch.corrcoef(on[:, [0, 1, 2, 3, 5]].T)
    torch.testing.assert_close(correlation, torch.eye(5, dtype=torch.float64), atol=0.02, rtol=0)


def test_parameters_that_are_on_have_the_published_distributions() -> None:
    a = draw_augmentation(generator(), 40_000, 1.0).double()
    normal, angle = a[:, [2, 5, 6, 7]], a[:, [3, 4]]
    for sample, std in ((normal, 1.0), (angle, math.pi / math.sqrt(3))):
        assert sample.mean(0).tolist() == pytest.approx([0.0] * sample.shape[1], abs=0.03)
        assert sample.std(0).tolist() == pytest.approx([std] * sample.shape[1], rel=0.02)
    assert angle.abs().max() <= math.pi
    assert float((normal**4).mean()) == pytest.approx(3, rel=0.05)


def test_the_number_of_draws_does_not_depend_on_their_outcome() -> None:
    states = []
    for p in (1e-6, 0.12, 1.0):
        used = generator(5)
        draw_augmentation(used, 33, p)
        states.append(used.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_probability_0_changes_nothing_and_draws_nothing() -> None:
    used, fresh = generator(), generator()
    assert torch.equal(draw_augmentation(used, 5, 0.0), torch.zeros(5, 8))
    assert torch.equal(used.get_state(), fresh.get_state())


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_a_probability_outside_0_to_1_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        draw_augmentation(generator(), 2, probability)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_flip_is_an_exact_involution(axis: int) -> None:
    images, a = noise(), parameters({axis: 1.0}, 4)
    once, _ = augment(images, a)
    assert torch.equal(once, images.flip(3 - axis))
    assert torch.equal(augment(once, a)[0], images)


@each_transformation
def test_a_ramp_is_transformed_exactly(chosen: dict[int, float]) -> None:
    assert largest_error(lambda x, y: 0.02 * x - 0.05 * y + 0.1, chosen, 32) < 1e-10


@each_transformation
@pytest.mark.parametrize("side", [32, 64])
def test_a_smooth_picture_is_transformed_as_its_coordinates_are(chosen: dict[int, float], side: int) -> None:
    # bilinear sampling at twice the resolution: an error of (pixel / 2)^2 |f''| / 8 per axis
    assert largest_error(lambda x, y: smooth(x, y, side), chosen, side) < 0.015 * (32 / side) ** 2


@pytest.mark.parametrize("quarters", [-2, -1, 1, 2])
def test_a_rotation_by_quarter_turns_is_rot90(quarters: int) -> None:
    image = smooth(*pixels(32), 32)[None, None]
    turned, _ = augment(image, parameters({3: quarters * math.pi / 2}))
    expected = torch.rot90(image, quarters, (2, 3))
    assert (turned - expected)[..., 4:-4, 4:-4].abs().max() < 0.01


@pytest.mark.parametrize(("side", "k"), [(8, 1), (8, 3), (32, 1), (32, 4), (32, -7)])
def test_a_translation_by_whole_pixels_moves_the_pixels_even_of_noise(side: int, k: int) -> None:
    images = noise(side=side).double()
    for axis, chosen in ((3, {6: 8 * k / side}), (2, {7: 8 * k / side})):
        moved, _ = augment(images, parameters(chosen, 4))
        kept = side - abs(k)
        torch.testing.assert_close(
            moved.narrow(axis, max(k, 0), kept), images.narrow(axis, max(-k, 0), kept), atol=1e-9, rtol=0
        )


@each_transformation
def test_a_transformation_and_its_inverse_cancel_on_a_smooth_picture(chosen: dict[int, float]) -> None:
    if len(chosen) > 2:
        chosen = {3: 1.0, 2: 1.5}  # turns and uniform scalings commute, so that the negated parameters invert both
    image = smooth(*pixels(64), 64)[None, None]
    inverse = {index: value if index in (0, 1, 4) else -value for index, value in chosen.items()}
    there, _ = augment(image, parameters(chosen))
    back, _ = augment(there, parameters(inverse))
    assert (there - image).abs().max() > 0.1
    assert (back - image)[..., 24:-24, 24:-24].abs().max() < 0.01


@pytest.mark.parametrize("side", [8, 32])
def test_a_constant_image_stays_constant_however_far_it_is_moved(side: int) -> None:
    a = 10 * draw_augmentation(generator(), 64, 1.0)
    a[:, :2] = (a[:, :2] > 0).float()
    result, _ = augment(torch.full((64, 1, side, side), 0.3), a)
    torch.testing.assert_close(result, torch.full_like(result, 0.3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [8, 32])
def test_augmenting_a_slice_is_slicing_the_augmented(side: int) -> None:
    images, a = noise(24, 3, side), draw_augmentation(generator(), 24, 0.5)
    together, labels = augment(images, a)
    for part in (slice(0, 1), slice(3, 10), slice(12, 24)):
        apart, labels_apart = augment(images[part], a[part])
        torch.testing.assert_close(apart, together[part], atol=1e-6, rtol=0)
        assert torch.equal(labels_apart, labels[part])


def test_channels_are_transformed_alike_and_apart() -> None:
    images, a = noise(6, 3, 16), draw_augmentation(generator(), 6, 0.8)
    together, _ = augment(images, a)
    for channel in range(3):
        apart, _ = augment(images[:, channel, None], a)
        torch.testing.assert_close(together[:, channel, None], apart, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(2, 1, 8, 16), (2, 1, 4, 4)])
def test_images_that_are_not_square_or_too_small_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"{shape[2]}x{shape[3]} pixels"):
        augment(torch.zeros(shape), torch.zeros(2, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_never_waited_for_and_agrees_with_the_cpu() -> None:
    images, a = noise(16, 3, 32), draw_augmentation(generator(), 16, 0.5)
    on_device = images.cuda(), a.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result, label = augment(*on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.cpu(), augment(images, a)[0], atol=5e-3, rtol=0)  # TF32 in the filters
    torch.testing.assert_close(label.cpu(), augment_label(a))
