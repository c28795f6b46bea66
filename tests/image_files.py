"""Images for tests: noise, encoding one, and laying many out as a folder or an archive."""

import io
import zipfile

import numpy as np
import PIL.Image


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def lanczos(image, width, height):
    return np.array(PIL.Image.fromarray(image).resize((width, height), PIL.Image.Resampling.LANCZOS))


def png(image):
    data = io.BytesIO()
    (image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)).save(data, format='png')
    return data.getvalue()


def write(path, files):
    """Write {name: bytes} as a folder, or as an archive if the path ends in .zip."""
    if path.suffix == '.zip':
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, 'w') as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path
