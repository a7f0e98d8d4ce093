"Pictures of a folder, as the images of a prior"
import re

import numpy as np
import pytest
import torch
from PIL import Image

from rtb_nb.pictures import load_pictures

def bytes_of(h, w, channels=3, seed=0):
    shape = (h, w, channels) if channels > 1 else (h, w)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

def save(folder, name, pixels, **options):
    Image.fromarray(pixels).save(folder/name, **options)

def test_a_picture_of_the_right_size_is_kept_to_the_bit(tmp_path):
    pixels = bytes_of(8, 12)
    save(tmp_path, 'a.png', pixels)
    x = load_pictures(tmp_path, (3, 8, 12))
    assert torch.equal(x[0], torch.as_tensor(pixels).permute(2, 0, 1).float()*(2/255) - 1)

def test_the_middle_is_taken_and_averaged(tmp_path):
    pixels = bytes_of(16, 40, 1)
    save(tmp_path, 'wide.png', pixels)
    middle = torch.as_tensor(pixels[:, 12:28]).double()
    tiles = middle.unflatten(0, (4, 4)).unflatten(2, (4, 4)).mean((1, 3))*(2/255) - 1
    assert torch.allclose(load_pictures(tmp_path, (1, 4, 4))[0, 0].double(), tiles, atol=1e-6)

def test_names_give_the_order_and_other_files_are_passed_over(tmp_path):
    for i, name in enumerate(('c.png', 'a.png', 'b.PNG')):
        save(tmp_path, name, np.full((4, 4), 10*i, np.uint8), format='PNG')
    (tmp_path/'notes.txt').write_text('no picture')
    x = load_pictures(str(tmp_path), (1, 4, 4))
    assert torch.equal(x[:, 0, 0, 0], torch.tensor([10., 20., 0.])*(2/255) - 1)
    assert torch.equal(load_pictures(tmp_path, (1, 4, 4), most=2), x[:2])

def test_a_turned_camera_is_turned_back(tmp_path):
    pixels = bytes_of(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6 # to be shown a quarter turn clockwise
    save(tmp_path, 'a.png', pixels, exif=exif)
    upright = torch.as_tensor(np.rot90(pixels, -1).copy()).permute(2, 0, 1).float()*(2/255) - 1
    assert torch.equal(load_pictures(tmp_path, (3, 6, 4))[0], upright)

def test_what_shines_through_is_seen_before_black(tmp_path):
    pixels = np.full((2, 2, 4), 200, np.uint8)
    pixels[..., 3] = [[0, 255], [255, 0]]
    save(tmp_path, 'a.png', pixels)
    seen = load_pictures(tmp_path, (3, 2, 2))[0, 0]
    assert torch.allclose(seen, torch.tensor([[0., 200.], [200., 0.]])*(2/255) - 1)

def test_grey_becomes_colour_and_colour_grey(tmp_path):
    save(tmp_path, 'a.png', bytes_of(4, 4, 1))
    x = load_pictures(tmp_path, (3, 4, 4))
    assert torch.equal(x[:, 0], x[:, 1])
    assert torch.equal(x[:, :1], load_pictures(tmp_path, (1, 4, 4)))

def of_sixteen_bits(folder):
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(folder/'deep.png')
    return load_pictures(folder, (1, 4, 4))

def broken(folder):
    (folder/'broken.png').write_bytes(b'no picture')
    return load_pictures(folder, (1, 4, 4))

def one(folder, *args, **options):
    save(folder, 'a.png', bytes_of(8, 8))
    return load_pictures(folder, *args, **options)

bad_input = dict(
    missing=(lambda f: load_pictures(f/'none', (3, 8, 8)), 'is no folder'),
    a_file=(lambda f: (save(f, 'a.png', bytes_of(4, 4)), load_pictures(f/'a.png', (3, 4, 4))),
            'is no folder'),
    empty=(lambda f: load_pictures(f, (3, 8, 8)), 'holds no pictures'),
    small=(lambda f: one(f, (3, 16, 8)), r"'a.png' has 8 x 8 pixels, fewer than 16 x 8"),
    deep=(of_sixteen_bits, "'deep.png' holds numbers of mode I;16"),
    broken=(broken, "'broken.png' cannot be read"),
    channels=(lambda f: one(f, (2, 8, 8)), 'pictures have 1 or 3 channels'),
    flat=(lambda f: one(f, (8, 8)), r'shape must be \(C, H, W\), got \(8, 8\)'),
    number=(lambda f: one(f, 8), 'shape must be'),
    side=(lambda f: one(f, (3, 8, 0)), 'a side must be'),
    most=(lambda f: one(f, (3, 8, 8), most=0), 'most must be'))

@pytest.mark.parametrize('case', bad_input)
def test_bad_input_is_one_clear_line(case, tmp_path):
    call, words = bad_input[case]
    with pytest.raises(ValueError) as e: call(tmp_path)
    assert re.search(words, str(e.value)) and '\n' not in str(e.value)
