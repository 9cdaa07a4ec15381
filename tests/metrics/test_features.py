import torch

from sims_ray.metrics.features import MAX_PIXELS, pixel_features


def test_small_images_are_their_own_features() -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(pixel_features(images), images.flatten(1) / 127.5 - 1)


def test_large_images_are_averaged_until_their_covariance_fits_and_keep_their_mean() -> None:
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    features = pixel_features(images)
    assert features.shape == (3, 3 * 32 * 32)
    assert features.shape[1] <= MAX_PIXELS
    torch.testing.assert_close(features.mean(1), (images / 127.5 - 1).flatten(1).mean(1))
